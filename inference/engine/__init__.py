"""Many fold models on the same images: decoded once, in memory together as far as they fit."""
