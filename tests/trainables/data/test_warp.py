"""Shear, perspective and hue: against torchvision's functional ops, and the policies' ranges."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import InterpolationMode, RandomPerspective
from torchvision.transforms.v2 import functional as tv

from foldrace.trainables.data.augment import (
    POLICIES,
    Policy,
    Warper,
    augment,
    homogeneous,
    perspective,
    shear,
)

SIZE = 65
BILINEAR = InterpolationMode.BILINEAR
INSETS = np.random.default_rng(0).random((6, 4, 2)) * 0.3


class Draws:
    """0.5 for every decision of the first kind, the given numbers for those of the second."""

    def __init__(self, **second: float) -> None:
        self._second = np.full(11, 0.5)
        for name, value in second.items():
            self._second[int(name[1:])] = value

    def random(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        return np.tile(np.full(12, 0.5) if shape[1] == 12 else self._second, (shape[0], 1))


def apply(image: NDArray[np.uint8], policy: Policy, **draws: float) -> NDArray[np.uint8]:
    return augment([image], image.shape[0], policy, Draws(**draws))[0]  # type: ignore[arg-type]


def smooth(size: int = SIZE) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:size, 0:size]
    layers = [128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), (x + y) * 127 / size]
    return np.stack(layers, axis=2).astype(np.uint8)


def by_torchvision(image: NDArray[np.uint8], function: object, *given: object, **more: object):
    pixels = torch.from_numpy(image).permute(2, 0, 1)
    return function(pixels, *given, **more).permute(1, 2, 0).numpy()  # type: ignore[operator]


def assert_same_inside(
    ours: NDArray[np.uint8], theirs: NDArray[np.uint8], inside: NDArray[np.bool_]
) -> None:
    """Up to interpolation; what lies outside of the image is filled otherwise."""
    difference = np.abs(ours.astype(int) - theirs.astype(int)).max(axis=2)[inside]
    assert inside.mean() > 0.2
    assert difference.max() <= 3 and difference.mean() < 0.6


def eroded(filled: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where the pixels of an image of ones arrived, without the edge."""
    return cv2.erode((filled[..., 0] == 255).astype(np.uint8), np.ones((3, 3))) > 0


WHITE = np.full((SIZE, SIZE, 3), 255, np.uint8)


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_shear_is_torchvisions(u: float) -> None:
    policy, image = Policy("p", "", shear=25), smooth()
    given = {"angle": 0, "translate": [0, 0], "scale": 1, "interpolation": BILINEAR}
    more = given | {"shear": [(2 * u - 1) * 25, 0]}
    theirs = by_torchvision(image, tv.affine, **more)
    inside = eroded(by_torchvision(WHITE, tv.affine, **more))
    assert_same_inside(apply(image, policy, u1=u), theirs, inside)


@pytest.mark.parametrize("inset", INSETS, ids=range(6))
def test_perspective_is_torchvisions(inset: NDArray[np.float64]) -> None:
    """A policy whose corners move by `inset` at most, all of them as far as they can."""
    policy, image = Policy("p", "", perspective=0.8), smooth()
    draws = {f"u{3 + i}": value for i, value in enumerate((inset / 0.4).ravel())}
    start = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    end = start + np.where(start == 0, inset, -inset)
    # torchvision counts from the edge of the first pixel when it warps, not from its centre.
    points = [(corners * (SIZE - 1) + 0.5).tolist() for corners in (start, end)]
    theirs = by_torchvision(image, tv.perspective, *points, interpolation=BILINEAR)
    inside = eroded(by_torchvision(WHITE, tv.perspective, *points))
    assert_same_inside(apply(image, policy, u2=0.49, **draws), theirs, inside)


def test_perspective_is_cv2s() -> None:
    start = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    for inset, found in zip(INSETS, perspective(INSETS, SIZE), strict=True):
        end = start + np.where(start == 0, inset, -inset)
        pixels = [(points * (SIZE - 1)).astype(np.float32) for points in (start, end)]
        expected = cv2.getPerspectiveTransform(*pixels)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_the_drawn_perspectives_are_those_of_torchvision() -> None:
    """The same distribution of corners: uniform, from 0 to half of the distortion."""
    policy = Policy("p", "", perspective=0.5, perspective_prob=1.0)
    torch.manual_seed(0)
    drawn = [
        RandomPerspective.make_params(RandomPerspective(0.5, 1.0), [torch.zeros(3, 201, 201)])
        for _ in range(400)
    ]
    corner = np.array([d["coefficients"] for d in drawn])
    inset = np.random.default_rng(0).random((4000, 4, 2)) * policy.perspective / 2
    ours = np.linalg.inv(perspective(inset, 201))
    ours = (ours / ours[:, 2:, 2:]).reshape(-1, 9)[:, :8]
    spread = ours.std(axis=0)
    assert np.all(np.abs(corner.mean(axis=0) - ours.mean(axis=0)) < 0.25 * spread)
    np.testing.assert_allclose(corner.std(axis=0), spread, rtol=0.2)


def test_no_perspective_where_none_is_drawn() -> None:
    policy, image = Policy("p", "", perspective=0.5, perspective_prob=0.5), smooth()
    np.testing.assert_array_equal(apply(image, policy, u2=0.5), image)
    assert (apply(image, policy, u2=0.49) != image).any()


@pytest.mark.parametrize("u", [0.0, 0.25, 0.4, 0.5, 0.9])
def test_hue_is_torchvisions(u: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    ours = apply(image, Policy("p", "", hue=0.5), u0=u).astype(int)
    theirs = by_torchvision(image, tv.adjust_hue, u - 0.5)
    difference = np.abs(ours - theirs)
    assert difference.mean() < 1.5 and np.quantile(difference, 0.99) <= 6


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_saturation_and_contrast_are_torchvisions(u: float) -> None:
    """Contrast on an image whose grey has the mean 127.5, around which ours turns."""

    class First(Draws):
        def random(self, shape: tuple[int, int]) -> NDArray[np.float64]:
            row = np.full(shape[1], 0.5)
            row[[9, 10]] = u
            return np.tile(row, (shape[0], 1))

    half = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    image = np.concatenate([half, 255 - half])
    for field, function in (("saturation", tv.adjust_saturation), ("contrast", tv.adjust_contrast)):
        policy = Policy("p", "", **{field: 0.4})
        ours = augment([image], 40, policy, First())[0].astype(int)  # type: ignore[arg-type]
        theirs = by_torchvision(image, function, 1 + (2 * u - 1) * 0.4)
        assert np.abs(ours - theirs).max() <= 2, field


def test_one_interpolation_is_the_composition() -> None:
    """Crop, turn, shear and perspective at once, as pixels move one by one."""
    policy = POLICIES["vehicles"]
    rng = np.random.default_rng(1)
    points = np.array([[10.0, 20, 1], [40, 33, 1]]).T
    affine = np.array([[[0.9, 0.1, 3], [-0.2, 1.1, 5]]])
    angle, inset = np.array([policy.shear]), rng.random((1, 4, 2)) * policy.perspective / 2
    step = homogeneous(affine)[0] @ points
    centre = (SIZE - 1) / 2
    step[0] -= np.tan(np.deg2rad(policy.shear)) * (step[1] - centre)
    expected = perspective(inset, SIZE)[0] @ step
    whole = perspective(inset, SIZE) @ shear(angle, SIZE) @ homogeneous(affine)
    np.testing.assert_allclose(whole[0] @ points, expected)


@pytest.mark.parametrize("rows", [2, 3])
def test_a_warper_gives_what_cv2_gives(rows: int) -> None:
    rng = np.random.default_rng(0)
    shapes = np.array([[40, 30], [1, 1], [64, 65]])
    matrix = np.array([[0.9, 0.1, 3], [-0.2, 1.1, 5], [1e-3, 2e-3, 1]])[:rows]
    warper = Warper(shapes, 24)
    for height, width in shapes:
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        out = np.empty((24, 24, 3), np.uint8)
        warper.warp(image, matrix, out)
        warp = cv2.warpAffine if rows == 2 else cv2.warpPerspective
        expected = warp(image, matrix, (24, 24), borderMode=cv2.BORDER_REPLICATE)
        np.testing.assert_array_equal(out, expected)
