"""How far a sweep may go: candidates, fold trials, hours of its devices, wall time.

Takes counts and seconds, says what may still start and how long the rest will take. Pure: no Ray,
no clock of its own.
"""
