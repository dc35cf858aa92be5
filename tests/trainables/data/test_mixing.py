"""MixUp, CutMix and random erasing: closed forms, and against torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.data.mixing import (
    cutmix,
    erase_,
    erasing_boxes,
    mix,
    mixed_epochs,
    mixup,
    soft_targets,
)


def batch(n: int = 8, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (n,), generator=generator)
    images = torch.rand(n, 3, 4, 4, generator=generator)
    return images, labels, soft_targets(labels, classes, 0.1)


class Fixed:
    """Draws what a test wants: the weight, the pixel (y, x), the batch rolled by one."""

    def __init__(self, weight: float, *pixel: int) -> None:
        self.weight, self.pixel = weight, list(pixel)

    def random(self) -> float:
        return 0.0

    def beta(self, a: float, b: float) -> float:
        return self.weight

    def integers(self, high: int) -> int:
        return self.pixel.pop(0)

    def permutation(self, n: int) -> np.ndarray:
        return np.roll(np.arange(n), 1)


def test_soft_targets() -> None:
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.2)
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(targets, expected)
    assert soft_targets(torch.tensor([1]), 2, 0.0).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("seed", range(5))
def test_closed_form(seed: int) -> None:
    images, _, targets = batch()
    mixed, (mixed_targets,) = mixup(images, (targets,), 0.4, 1.0, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    rng.random()
    weight, order = rng.beta(0.4, 0.4), rng.permutation(8)
    expected = weight * images.numpy() + (1 - weight) * images.numpy()[order]
    np.testing.assert_allclose(mixed.numpy(), expected, atol=1e-6)
    expected = weight * targets.numpy() + (1 - weight) * targets.numpy()[order]
    np.testing.assert_allclose(mixed_targets.numpy(), expected, atol=1e-6)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(8))


def test_is_torchvisions_with_the_same_weight_and_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision mixes each image with its neighbour: order is the batch rolled by one."""
    images, labels, _ = batch()
    theirs = v2.MixUp(alpha=1.0, num_classes=5)
    monkeypatch.setattr(theirs._dist, "sample", lambda shape=(): torch.tensor([0.3]))
    their_images, their_targets = theirs(images, labels)

    targets = soft_targets(labels, 5, 0.0)
    ours = mixup(images, (targets,), 1.0, 1.0, Fixed(0.3))  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0], their_images)
    torch.testing.assert_close(ours[1][0], their_targets)


@pytest.mark.parametrize(("alpha", "probability"), [(0.0, 1.0), (0.4, 0.0)])
def test_turned_off(alpha: float, probability: float) -> None:
    images, _, targets = batch()
    same, (same_targets,) = mixup(images, (targets,), alpha, probability, np.random.default_rng(0))
    assert same is images and same_targets is targets


def test_how_often() -> None:
    images, _, targets = batch(2)
    rng = np.random.default_rng(0)
    mixed = sum(mixup(images, (targets,), 1.0, 0.3, rng)[0] is not images for _ in range(2000))
    assert mixed == pytest.approx(600, abs=70)


@pytest.mark.parametrize(("y", "x"), [(10, 7), (0, 0), (19, 13), (3, 12)])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_cutmix_is_torchvisions_with_the_same_box(
    monkeypatch: pytest.MonkeyPatch, weight: float, y: int, x: int
) -> None:
    _, labels, _ = batch()
    images = torch.rand(8, 3, 20, 14)
    theirs = v2.CutMix(alpha=1.0, num_classes=5)
    monkeypatch.setattr(theirs._dist, "sample", lambda shape=(): torch.tensor([weight]))
    pixel = iter([x, y])
    monkeypatch.setattr(torch, "randint", lambda high, size: torch.tensor([next(pixel)]))
    their_images, their_targets = theirs(images, labels)
    rng = Fixed(weight, y, x)
    ours = cutmix(images, (soft_targets(labels, 5, 0.0),), 1.0, 1.0, rng)  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0], their_images, rtol=0, atol=0)
    torch.testing.assert_close(ours[1][0], their_targets)


def test_what_belongs_to_an_image_is_mixed_like_its_target() -> None:
    images, _, targets = batch()
    images = images.repeat(1, 1, 8, 8)
    for mixing in (mixup, cutmix):
        _, (mixed, again) = mixing(
            images, (targets, 2 * targets), 1.0, 1.0, np.random.default_rng(5)
        )
        torch.testing.assert_close(again, 2 * mixed)
        assert not torch.equal(mixed, targets)


@pytest.mark.parametrize("seed", range(20))
def test_cutmix_targets_are_the_areas(seed: int) -> None:
    labels = torch.arange(6)
    images = labels.float()[:, None, None, None].expand(6, 3, 17, 11)
    targets = soft_targets(labels, 6, 0.0)
    mixed, (mixed_targets,) = cutmix(images, (targets,), 1.0, 1.0, np.random.default_rng(seed))
    for i in range(6):
        areas = torch.bincount(mixed[i, 0].flatten().long(), minlength=6) / (17 * 11)
        torch.testing.assert_close(mixed_targets[i], areas)
    assert torch.equal(images[:, 0, 0, 0], labels.float())  # the batch itself stays


@pytest.mark.parametrize(
    ("params", "mixed_up", "cut"),
    [
        (TrialParams(mixup_prob=0.3, cutmix_prob=0.25), 0.3, 0.25),
        (TrialParams(mixup_prob=0.0, cutmix_prob=0.4), 0.0, 0.4),
        (TrialParams(mixup_prob=0.7, cutmix_prob=0.8), 0.7, 0.3),
        (TrialParams(mixup_prob=1.0, cutmix_prob=0.5), 1.0, 0.0),
        (TrialParams(mixup_prob=0.9, mixup_alpha=0.0, cutmix_prob=0.2), 0.0, 0.2),
        (TrialParams(mixup_prob=0.2, cutmix_prob=0.5, cutmix_alpha=0.0), 0.2, 0.0),
    ],
)
def test_how_often_each(params: TrialParams, mixed_up: float, cut: float) -> None:
    images = torch.tensor([0.0, 1.0])[:, None, None, None].expand(2, 3, 32, 32)
    targets = torch.eye(2)
    rng = np.random.default_rng(0)
    counts = {"blended": 0, "cut": 0}
    for _ in range(1500):
        mixed, _ = mix(images, (targets,), params, rng)
        if mixed is not images:
            whole = bool(((mixed == 0) | (mixed == 1)).all())
            counts["cut" if whole else "blended"] += 1
    # Half of the pairs come in their own order: blended with themselves, they stay whole.
    blended, whole = counts["blended"] / 1500, counts["cut"] / 1500
    assert blended + whole == pytest.approx(mixed_up + cut, abs=0.05)
    assert blended == pytest.approx(mixed_up / 2, abs=0.05)


def test_without_cutmix_the_draws_are_mixups_alone() -> None:
    images, _, targets = batch()
    params = TrialParams(mixup_alpha=0.4, mixup_prob=0.5, cutmix_alpha=0.0)
    ours, theirs = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(20):
        mixed, expected = (
            mix(images, (targets,), params, ours),
            mixup(images, (targets,), 0.4, 0.5, theirs),
        )
        assert torch.equal(mixed[0], expected[0]) and torch.equal(mixed[1][0], expected[1][0])


def test_is_torchvisions_with_the_same_boxes_and_noise() -> None:
    images = torch.rand(6, 3, 32, 40)
    ours = images.clone()
    erase_(ours, 0.5, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    u = rng.random((6, 5))
    noise = torch.Generator().manual_seed(int(rng.integers(2**63)))
    assert 0 < (u[:, 0] < 0.5).sum() < 6
    for i, (top, left, height, width) in enumerate(erasing_boxes(u[:, 1:], 32, 40).tolist()):
        expected = images[i]
        if u[i, 0] < 0.5:
            value = torch.empty(3, height, width).normal_(0.5, 0.25, generator=noise).clamp(0, 1)
            expected = functional.erase(images[i], top, left, height, width, value)
            assert not torch.equal(expected, images[i])
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=0)


def test_boxes_have_the_papers_areas_and_shapes() -> None:
    u = np.random.default_rng(0).random((4000, 4))
    top, left, tall, wide = erasing_boxes(u, 200, 300).T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= 200).all() and (left + wide <= 300).all()
    area, ratio = tall * wide / (200 * 300), tall / wide
    assert area.min() > 0.018 and area.max() < 0.335
    inside = (tall < 200) & (wide < 300)
    assert inside.mean() > 0.9
    assert ratio[inside].min() > 0.28 and ratio[inside].max() < 3.5
    assert np.median(ratio) == pytest.approx(1.0, abs=0.1)


def test_places_are_uniform() -> None:
    u = np.random.default_rng(1).random((4000, 4))
    top, left, tall, wide = erasing_boxes(u, 64, 64).T
    free = (64 - tall > 10) & (64 - wide > 10)
    assert (top / (64 - tall).clip(1))[free].mean() == pytest.approx(0.5, abs=0.03)
    assert (left / (64 - wide).clip(1))[free].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_tiny_images(size: int) -> None:
    images = torch.zeros(50, 3, size, size)
    erase_(images, 1.0, np.random.default_rng(0))
    assert images.min() >= 0 and images.max() <= 1


def test_how_often_an_image_is_erased() -> None:
    images = torch.zeros(2000, 3, 8, 8)
    erase_(images, 0.25, np.random.default_rng(0))
    erased = (images.flatten(1).abs().sum(1) > 0).float().mean()
    assert float(erased) == pytest.approx(0.25, abs=0.03)


def test_turned_off_draws_nothing() -> None:
    images, rng = torch.rand(3, 3, 8, 8), np.random.default_rng(0)
    before = images.clone()
    erase_(images, 0.0, rng)
    assert torch.equal(images, before)
    assert rng.random() == np.random.default_rng(0).random()


def test_depends_on_the_generator_alone() -> None:
    one = torch.zeros(4, 3, 16, 16)
    other = one.clone(memory_format=torch.channels_last)
    erase_(one, 1.0, np.random.default_rng(5))
    torch.rand(3)
    erase_(other, 1.0, np.random.default_rng(5))
    assert torch.equal(one, other) and one.any()


@pytest.mark.parametrize(
    ("mix_off", "epochs", "mixed"),
    [(0.0, 30, 30), (0.1, 30, 27), (0.1, 8, 7), (0.1, 4, 4), (0.5, 4, 2), (1.0, 30, 0)],
)
def test_the_last_epochs_are_not_mixed(mix_off: float, epochs: int, mixed: int) -> None:
    assert mixed_epochs(TrialParams(mix_off=mix_off, epochs=epochs)) == mixed
