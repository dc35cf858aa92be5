"""A trial's data: pixel cache, loaders, augmentation, mixing."""
