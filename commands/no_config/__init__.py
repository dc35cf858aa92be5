"""A config for data that nobody has written one for."""
