"""Streams of random numbers that have nothing to do with each other, one for each purpose.

Takes a seed, the purpose, and where in it (an epoch, a batch, a rank); gives a generator. NumPy
pads a short seed with zeros, so that `default_rng((1, 2))` is `default_rng((1, 2, 0))`: the place
is a spawn key instead, whose zeros count.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What the numbers are drawn for."""

    WEIGHTS = 1
    """The initial weights of a fold trial."""
    EPOCH = 2
    """The global generators during an epoch (dropout and the like), by rank."""
    ORDER = 3
    """The order of an epoch's rows, the same on every rank."""
    AUGMENTATION = 4
    """The augmentation of a batch, by epoch, batch and rank."""
    MIXING = 5
    """What is done to batches on the device, by epoch and rank."""
    BACKBONE = 6
    """The backbone of a candidate, by its number."""


def sequence(seed: int, stream: Stream, *place: int) -> np.random.SeedSequence:
    """Seed of a stream: another one for any other seed, purpose or place, of whatever length."""
    return np.random.SeedSequence(seed, spawn_key=(int(stream), *place))


def generator(seed: int, stream: Stream, *place: int) -> np.random.Generator:
    """A generator at the beginning of a stream."""
    return np.random.default_rng(sequence(seed, stream, *place))
