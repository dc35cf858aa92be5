"""The blend of a run: its members, their checks, the choice, and what is written about it."""
