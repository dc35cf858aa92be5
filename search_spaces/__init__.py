"""Ranges, the hyperparameters of a trial, and the space that a search draws them from."""
