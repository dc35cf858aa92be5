"""Which backbone the next candidate has: each gets its minimum share, then those go first that have
brought the race's blend something.

Takes counts and gains, gives a backbone. Pure.
"""
