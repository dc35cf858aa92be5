"""Tables, images, folds and test set: from a user's files to rows, labels and pixels."""
