"""Epoch-level stopping that compares a trial only with trials of the same fold at the same fraction
of their own schedule.

Takes epoch reports, tells Tune which trials to stop. Sources: Li et al., A System for Massively
Parallel Hyperparameter Tuning, 2020 (ASHA), for the rungs.
"""
