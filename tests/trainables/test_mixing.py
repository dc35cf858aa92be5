"""MixUp against its closed form and torchvision's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from trainables.mixing import mixup, soft_targets


def batch(n: int = 8, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (n,), generator=generator)
    images = torch.rand(n, 3, 4, 4, generator=generator)
    return images, labels, soft_targets(labels, classes, 0.1)


def test_soft_targets() -> None:
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.2)
    expected = torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]])
    torch.testing.assert_close(targets, expected)
    assert soft_targets(torch.tensor([1]), 2, 0.0).tolist() == [[0.0, 1.0]]


@pytest.mark.parametrize("seed", range(5))
def test_closed_form(seed: int) -> None:
    images, _, targets = batch()
    mixed, mixed_targets = mixup(images, targets, 0.4, 1.0, np.random.default_rng(seed))
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

    class Fixed:
        def random(self) -> float:
            return 0.0

        def beta(self, a: float, b: float) -> float:
            return 0.3

        def permutation(self, n: int) -> np.ndarray:
            return np.roll(np.arange(n), 1)

    targets = soft_targets(labels, 5, 0.0)
    ours = mixup(images, targets, 1.0, 1.0, Fixed())  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0], their_images)
    torch.testing.assert_close(ours[1], their_targets)


@pytest.mark.parametrize(("alpha", "probability"), [(0.0, 1.0), (0.4, 0.0)])
def test_turned_off(alpha: float, probability: float) -> None:
    images, _, targets = batch()
    same, same_targets = mixup(images, targets, alpha, probability, np.random.default_rng(0))
    assert same is images and same_targets is targets


def test_how_often() -> None:
    images, _, targets = batch(2)
    rng = np.random.default_rng(0)
    mixed = sum(mixup(images, targets, 1.0, 0.3, rng)[0] is not images for _ in range(2000))
    assert mixed == pytest.approx(600, abs=70)
