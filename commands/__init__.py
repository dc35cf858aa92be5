"""What each command of the command line does, from its arguments to an exit code.

Puts the packages together: the only place, beside `sweep.py`, that may import all of them.
"""
