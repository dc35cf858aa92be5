"""No two streams of random numbers of a sweep coincide."""

from __future__ import annotations

import random
from itertools import product
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from foldrace.config.hyperparameters import TrialParams, fold_trial_seed
from foldrace.core.random_streams import Stream, generator, sequence
from foldrace.trainables.data.loader import ShuffledBatchSampler
from foldrace.trainables.devices import seed_epoch, seed_trial
from foldrace.trainables.spec import FoldTrial

EPOCHS, RANKS, ROWS = range(3), range(3), np.arange(40)
CANDIDATES = (TrialParams(), TrialParams(lr=2e-4))


def seeds() -> list[int]:
    """Of two candidates' fold trials in three folds."""
    return [fold_trial_seed(0, "timm/x", p, fold) for p, fold in product(CANDIDATES, range(3))]


def from_words(*words: int) -> np.random.Generator:
    """A generator of these numbers, not by way of the product: four words of entropy, then a place
    of its own for each further one."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(words)))


def test_a_place_is_more_words_after_four_of_the_seed() -> None:
    for place in ((), (0,), (0, 0), (5, 0, 7)):
        expected = from_words(9, 0, 0, 0, 4, *place).integers(2**63, size=4)
        found = generator(9, Stream.AUGMENTATION, *place).integers(2**63, size=4)
        np.testing.assert_array_equal(found, expected)


def test_all_streams_of_a_sweep_begin_differently() -> None:
    first = {
        (seed, stream, place): tuple(generator(seed, stream, *place).integers(2**63, size=2))
        for seed in (0, 1, *seeds())
        for stream in Stream
        for length in range(4)
        for place in product(range(3), repeat=length)
    }
    plain = {("folds", seed): tuple(np.random.default_rng(seed).integers(2**63, size=2))
             for seed in (0, 1, *seeds())}  # fmt: skip
    assert len({*first.values(), *plain.values()}) == len(first) + len(plain)


def test_global_generators_are_seeded_apart() -> None:
    """NumPy's global generator and torch's are one algorithm: one seed would be one stream."""
    drawn: list[tuple[int, ...]] = []
    for seed in seeds():
        trial = cast(FoldTrial, SimpleNamespace(seed=seed, spec=SimpleNamespace(cpus=1)))
        for epoch, rank in product(EPOCHS, RANKS):
            mixing = seed_epoch(trial, epoch, rank)
            drawn.append(tuple(mixing.integers(2**32, size=3)))
            drawn += global_draws()
        seed_trial(trial)
        drawn += global_draws()
    assert len(set(drawn)) == len(drawn) == len(seeds()) * (len(EPOCHS) * len(RANKS) * 4 + 3)


def global_draws() -> list[tuple[int, ...]]:
    """Three times 24 bits of each global generator."""
    return [
        tuple(random.getrandbits(24) for _ in range(3)),
        tuple(np.random.randint(2**24, size=3).tolist()),
        tuple(torch.randint(2**24, (3,)).tolist()),
    ]


def test_equal_global_streams_would_be_seen() -> None:
    np.random.seed(7)
    torch.manual_seed(7)
    of_numpy, of_torch = global_draws()[1:]
    assert of_numpy == of_torch


def test_the_order_of_rows_is_no_other_streams() -> None:
    for seed, epoch in product(seeds(), EPOCHS):
        batches = ShuffledBatchSampler(ROWS, 10, seed)
        batches.epoch = epoch
        planned = list(batches)
        order = np.concatenate([batch.rows for batch in planned])
        expected = from_words(seed, 0, 0, 0, Stream.ORDER, epoch).permutation(ROWS)
        np.testing.assert_array_equal(order, expected)
        others = [np.random.default_rng(batch.seed).permutation(ROWS) for batch in planned]
        others += [
            generator(batch.seed[0], Stream.AUGMENTATION, *batch.seed[1:]).permutation(ROWS)
            for batch in planned
            if batch.seed is not None
        ]
        assert len(others) == 8 and not any((other == order).all() for other in others)


def test_ranks_share_the_order_and_vary_apart() -> None:
    ranks = [list(ShuffledBatchSampler(ROWS, 10, 3, rank, 2)) for rank in range(2)]
    together = [
        np.sort(np.concatenate([a.rows, b.rows])).tolist() for a, b in zip(*ranks, strict=True)
    ]
    alone = [np.sort(batch.rows).tolist() for batch in ShuffledBatchSampler(ROWS, 10, 3)]
    assert together == alone
    assert len({batch.seed for rank in ranks for batch in rank}) == 8
    assert sequence(0, Stream.ORDER, 1).spawn_key == (Stream.ORDER, 1)
