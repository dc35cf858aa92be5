"""From a run folder's blend to predictions: Python API, submission file, held-out score."""
