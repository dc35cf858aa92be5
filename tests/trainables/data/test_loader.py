"""Batches: each row once, in an order and with pixels that the seed alone decides."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms import v2

from foldrace.config.schema import AugmentConfig
from foldrace.core.random_streams import Stream, generator
from foldrace.trainables.data.augment import POLICIES, augment
from foldrace.trainables.data.framing import resize
from foldrace.trainables.data.loader import (
    Batch,
    BatchDataset,
    BatchRows,
    LoaderSettings,
    OrderedBatchSampler,
    ShuffledBatchSampler,
    build_loader,
    loader_settings,
    to_float,
)

LIGHT = POLICIES["light"]


class Patterns:
    """A picklable image source: row -> its own noise."""

    def __len__(self) -> int:
        return 100

    def image(self, row: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng(int(row))
        return rng.integers(0, 256, size=(10 + row % 5, 12, 3), dtype=np.uint8)


def digest(batches: list[Batch]) -> str:
    sha = hashlib.sha256()
    for batch in batches:
        sha.update(batch.images.numpy().tobytes() + batch.rows.numpy().tobytes())
    return sha.hexdigest()


def epochs(workers: int, seed: int = 3, policy: str = "medium") -> list[str]:
    sampler = ShuffledBatchSampler(np.arange(5, 40), 8, seed)
    dataset = BatchDataset(Patterns(), 16, AugmentConfig(policy=policy, flip=0.5))
    loader = build_loader(dataset, sampler, workers, False)
    found = []
    for epoch in range(2):
        sampler.epoch = epoch
        found.append(digest(list(loader)))
    return found


@pytest.mark.parametrize("how", ["squash", "pad", "crop"])
def test_batches_are_squares_of_the_kind_that_was_asked_for(how: str) -> None:
    """Also those of a copy, as a spawned loader process makes one."""
    dataset = BatchDataset(Patterns(), 16, AugmentConfig(policy="light"), how=how)
    rows, images = np.arange(8), [Patterns().image(row) for row in range(8)]
    rng = generator(1, Stream.AUGMENTATION, 2)
    expected = {None: resize(images, 16, how), (1, 2): augment(images, 16, LIGHT, rng, how)}
    for one in (dataset, pickle.loads(pickle.dumps(dataset))):
        for seed, pixels in expected.items():
            found = one.__getitems__(BatchRows(rows, seed)).images
            np.testing.assert_array_equal(found.numpy(), pixels)


@pytest.mark.parametrize("policy", ["medium", "randaugment", "trivialaugment"])
def test_loader_processes_change_nothing(policy: str) -> None:
    alone = epochs(0, policy=policy)
    assert epochs(2, policy=policy) == alone
    assert epochs(0, policy=policy) == alone
    assert alone[0] != alone[1]
    assert epochs(0, seed=4, policy=policy) != alone


def test_half_of_the_images_are_flipped() -> None:
    """As torchvision flips what the policy without a flip gives; the rest stays as it was."""
    rows = BatchRows(np.arange(400), (5, 0))
    plain, flipped, always = (
        BatchDataset(Patterns(), 16, AugmentConfig(policy="none", flip=flip)).__getitems__(rows)
        for flip in (0.0, 0.5, 1.0)
    )
    mirrored = v2.functional.horizontal_flip(plain.images.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert (always.images.int() - mirrored.int()).abs().max() <= 1
    same = (flipped.images == plain.images).flatten(1).all(1)
    assert torch.equal(flipped.images[~same], always.images[~same])
    assert same.float().mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("policy", "theirs"),
    [("randaugment", v2.RandAugment), ("trivialaugment", v2.TrivialAugmentWide)],
)
def test_automatic_augmentation_is_torchvisions(policy: str, theirs: type[v2.Transform]) -> None:
    """Of each image by its own seed, after the policy's moves; the global generator stays."""
    rows = BatchRows(np.arange(12), (5, 0))
    before = torch.get_rng_state()
    found = BatchDataset(Patterns(), 16, AugmentConfig(policy=policy)).__getitems__(rows).images
    assert torch.equal(torch.get_rng_state(), before)
    rng = generator(5, Stream.AUGMENTATION, 0)
    moved = augment([Patterns().image(row) for row in rows.rows], 16, POLICIES["light"], rng)
    seeds = rng.integers(2**63, size=12)
    transform = theirs(interpolation=v2.InterpolationMode.BILINEAR)
    with torch.random.fork_rng():
        for i, seed in enumerate(seeds):
            torch.manual_seed(int(seed))
            expected = transform(torch.from_numpy(moved[i]).permute(2, 0, 1))
            assert torch.equal(found[i].permute(2, 0, 1), expected)
    assert not np.array_equal(found.numpy(), moved)


def test_loading_leaves_the_global_generators_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    np.random.seed(0)
    epochs(0)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.random() == np.random.RandomState(0).random()


@pytest.mark.parametrize(("n", "batch", "batches"), [(35, 8, 4), (32, 8, 4), (5, 8, 1), (9, 8, 1)])
def test_an_epoch_has_each_row_once_but_the_last_partial_batch(
    n: int, batch: int, batches: int
) -> None:
    given = np.arange(100, 100 + n)
    sampler = ShuffledBatchSampler(given, batch, 0)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == batches
    rows = np.concatenate([b.rows for b in drawn])
    assert len(rows) == batches * min(n, batch) == len(set(rows.tolist()))
    assert set(rows.tolist()) <= set(given.tolist())
    assert len({b.seed for b in drawn}) == batches


def test_over_epochs_the_left_out_rows_change() -> None:
    sampler = ShuffledBatchSampler(np.arange(9), 8, 0)
    left_out = set()
    for epoch in range(30):
        sampler.epoch = epoch
        left_out |= set(range(9)) - set(np.concatenate([b.rows for b in sampler]).tolist())
    assert len(left_out) > 4


def test_scoring_batches_hold_every_row_in_order_resized_only() -> None:
    rows = np.array([3, 1, 99, 4, 7])
    sampler = OrderedBatchSampler(rows, 2)
    loader = build_loader(
        BatchDataset(Patterns(), 16, AugmentConfig(policy="none")), sampler, 0, False
    )
    found = list(loader)
    assert len(found) == len(sampler) == 3
    assert torch.cat([b.rows for b in found]).tolist() == rows.tolist()
    expected = resize([Patterns().image(row) for row in rows], 16)
    np.testing.assert_array_equal(torch.cat([b.images for b in found]).numpy(), expected)


def test_a_training_batch_is_the_augmentation_of_its_seed() -> None:
    sampler = ShuffledBatchSampler(np.arange(8), 4, 5)
    loader = build_loader(
        BatchDataset(Patterns(), 16, AugmentConfig(policy="light")), sampler, 0, False
    )
    for plan, batch in zip(list(sampler), loader, strict=True):
        images = [Patterns().image(row) for row in plan.rows]
        assert plan.seed is not None
        rng = generator(plan.seed[0], Stream.AUGMENTATION, *plan.seed[1:])
        expected = augment(images, 16, POLICIES["light"], rng)
        np.testing.assert_array_equal(batch.images.numpy(), expected)


def test_to_float() -> None:
    pixels = torch.arange(2 * 2 * 2 * 3, dtype=torch.uint8).reshape(2, 2, 2, 3) * 10
    images = to_float(pixels)
    assert images.shape == (2, 3, 2, 2) and images.dtype == torch.float32
    assert torch.equal(images, pixels.permute(0, 3, 1, 2).float() / 255)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("cpus", "device", "settings"),
    [
        (1, "cpu", LoaderSettings(0, False, 4)),
        (8, "cpu", LoaderSettings(0, False, 4)),
        (1, "cuda", LoaderSettings(1, True, 4)),
        (2, "cuda", LoaderSettings(1, True, 4)),
        (5, "cuda", LoaderSettings(4, True, 4)),
        (6, "cuda", LoaderSettings(5, True, 2)),
        (64, "cuda", LoaderSettings(16, True, 2)),
        (4, "mps", LoaderSettings(3, False, 4)),
    ],
)
def test_a_loader_uses_what_the_trial_has(cpus: int, device: str, settings: LoaderSettings) -> None:
    assert loader_settings(cpus, device) == settings


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_is_built_as_it_is_set(workers: int) -> None:
    dataset = BatchDataset(Patterns(), 16, AugmentConfig(policy="none"))
    loader = build_loader(dataset, OrderedBatchSampler(np.arange(4), 2), workers, False, 3)
    assert loader.num_workers == workers and not loader.pin_memory
    assert loader.prefetch_factor == (3 if workers else None)
