"""What may vary: ranges, the hyperparameters of a trial, and how a search draws them."""
