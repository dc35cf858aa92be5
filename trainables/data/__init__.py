"""What a trial reads: pixel cache, loaders, augmentation, mixing."""
