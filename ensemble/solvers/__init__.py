"""The numerics of the blend: weights from arrays."""
