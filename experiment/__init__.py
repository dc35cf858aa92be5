"""What everyone shares: configuration, data, folds, metrics, the run folder, errors."""
