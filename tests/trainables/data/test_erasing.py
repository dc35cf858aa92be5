"""Random erasing: torchvision's result with the same box and noise, sizes, places, frequency."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from foldrace.trainables.data.mixing import erase_, erasing_boxes


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


def test_how_often() -> None:
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
