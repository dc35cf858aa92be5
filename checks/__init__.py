"""Everything that can be wrong with a sweep, found before any trial starts."""
