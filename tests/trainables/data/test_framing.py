"""Squashed, padded and cropped images: torchvision's, and training's as they are scored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as tv

from foldrace.config.hyperparameters import KNOBS
from foldrace.config.ranges import Choice
from foldrace.trainables.data.augment import POLICIES, Policy, augment
from foldrace.trainables.data.framing import frames, resize

limits = KNOBS["resize"].limits
assert isinstance(limits, Choice)
RESIZES = [str(value) for value in limits.values]
SHAPES = ((189, 336), (336, 189), (60, 41), (20, 30), (48, 48), (40, 200), (33, 32))

each_resize = pytest.mark.parametrize("how", RESIZES)
each_shape = pytest.mark.parametrize(("height", "width"), SHAPES)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    """A wave along each side, and a ramp over both."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 60 * np.sin(6 * x / width), 128 + 60 * np.cos(6 * y / height)]
    layers = [*waves, 255 * (x + y) / (height + width)]
    return np.stack(layers, axis=2).astype(np.uint8)


def by_torchvision(image: NDArray[np.uint8], size: int, how: str) -> NDArray[np.uint8]:
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    height, width = image.shape[:2]
    if how == "crop":
        tensor = tv.center_crop(tensor, [min(height, width)])
    goal = [size, size]
    if how == "pad":
        goal = [max(1, round(size * side / max(height, width))) for side in (height, width)]
    tensor = tv.resize(tensor, goal, antialias=True)
    left, top = (size - goal[1]) // 2, (size - goal[0]) // 2
    around = [left, top, size - goal[1] - left, size - goal[0] - top]
    padded = tv.pad(tensor, around, padding_mode="edge")
    return padded.permute(1, 2, 0).numpy()


@each_resize
@each_shape
@pytest.mark.parametrize("size", [32, 45])
def test_what_is_scored_is_torchvisions(height: int, width: int, size: int, how: str) -> None:
    image = smooth(height, width)
    ours = resize([image], size, how)[0].astype(int)
    assert ours.shape == (size, size, 3)
    assert np.abs(ours - by_torchvision(image, size, how)).max() <= 8  # a pixel further off: 11


@each_resize
@each_shape
def test_training_that_varies_nothing_sees_what_is_scored(
    height: int, width: int, how: str
) -> None:
    image = smooth(height, width)
    rng = np.random.default_rng(0)
    for seen in augment([image] * 3, 32, POLICIES["none"], rng, how).astype(int):
        assert np.abs(seen - resize([image], 32, how)[0])[1:-1, 1:-1].mean() <= 3


@pytest.mark.parametrize("upright", [True, False])
def test_a_class_at_the_edges_is_kept_by_padding_and_lost_by_cropping(upright: bool) -> None:
    """Two pictures that differ in their first and last tenth alone."""
    pictures = [np.full((60, 200, 3), 128, np.uint8) for _ in range(2)]
    for picture, colour in zip(pictures, ((255, 0, 0), (0, 0, 255)), strict=True):
        picture[:, :20] = picture[:, -20:] = colour
    if upright:
        pictures = [np.ascontiguousarray(p.transpose(1, 0, 2)) for p in pictures]
    one, other = resize(pictures, 32, "crop")
    np.testing.assert_array_equal(one, other)
    for how in ("pad", "squash"):
        one, other = resize(pictures, 32, how).astype(int)
        differs = (np.abs(one - other).max(axis=2) > 100).any(axis=1 if upright else 0)
        np.testing.assert_array_equal(np.flatnonzero(differs), [0, 1, 2, 29, 30, 31])


class Draws:
    """0.5 for every decision, but for those named by index."""

    def __init__(self, **named: float) -> None:
        self._row = np.full(12, 0.5)
        for name, value in named.items():
            self._row[int(name[1:])] = value

    def random(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        return np.tile(self._row, (shape[0], 1))


def drawn(image: NDArray[np.uint8], policy: Policy, how: str, **draws: float) -> NDArray[np.int64]:
    return augment([image], 24, policy, Draws(**draws), how)[0].astype(int)  # type: ignore[arg-type]


QUARTER = Policy("p", "", crop_area=(0.25, 0.25))


@pytest.mark.parametrize("start", [0.0, 0.25, 1.0])
def test_training_crops_a_square_from_anywhere_in_the_image(start: float) -> None:
    """A quarter of the largest square: 48 x 48 of 96 x 288 pixels."""
    image = smooth(96, 288)
    left = round(240 * start)
    seen = drawn(image, QUARTER, "crop", _2=start, _3=1.0)
    expected = resize([image[48:, left : left + 48]], 24)[0]
    assert np.abs(seen - expected)[1:-1, 1:-1].max() <= 6


def test_training_crops_a_padded_image_within_its_square() -> None:
    """A quarter of 288 x 288: 144 x 144, with 96 rows of picture in the middle of 288."""
    image = smooth(96, 288)
    padded = np.pad(image, ((96, 96), (0, 0), (0, 0)), mode="edge")
    for left, top in ((0.0, 0.0), (1.0, 0.5)):
        seen = drawn(image, QUARTER, "pad", _2=left, _3=top)
        x, y = round(144 * left), round(144 * top)
        expected = resize([padded[y : y + 144, x : x + 144]], 24)[0]
        assert np.abs(seen - expected)[1:-1, 1:-1].mean() <= 3


def test_a_policy_that_neither_crops_nor_shifts_keeps_the_middle() -> None:
    image = smooth(40, 120)
    turns, shifts = Policy("p", "", rotate=5.0), Policy("p", "", shift=1e-6)
    middle = drawn(image, turns, "crop", _2=0.5)
    np.testing.assert_array_equal(drawn(image, turns, "crop", _2=0.0), middle)
    assert np.abs(drawn(image, shifts, "crop", _2=0.0) - middle).mean() > 10


def test_frames() -> None:
    shapes = np.array([[100, 60], [60, 101]])
    found = {how: frames(shapes, how).tolist() for how in RESIZES}
    assert found == {
        "squash": [[0, 0, 60, 100], [0, 0, 101, 60]],
        "pad": [[-20, 0, 100, 100], [0, -20.5, 101, 101]],
        "crop": [[0, 20, 60, 60], [20.5, 0, 60, 60]],
    }


@each_resize
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_one_colour_stays_one_colour_in_every_shape(policy: Policy, how: str) -> None:
    shapes = ((1, 1), (1, 400), (400, 1), (3, 1344), (90, 60))
    images = [np.full((*shape, 3), (200, 90, 40), np.uint8) for shape in shapes]
    rng = np.random.default_rng(0)
    for seen in (resize(images, 16, how), augment(images, 16, policy, rng, how)):
        assert seen.shape == (5, 16, 16, 3)
        pixels = seen.reshape(5, -1, 3).astype(int)
        assert (np.ptp(pixels, axis=1) <= 1).all()
