"""Foldrace: race fold × backbone × hyperparameter trials, and blend the best checkpoints."""

__version__ = "0.1.0"
