"""Policies and the maps they are made of: exact cases, cv2's and torchvision's."""

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
    averaged,
    homogeneous,
    perspective,
    shear,
)
from foldrace.trainables.data.framing import resize
from foldrace.trainables.data.pixel_cache import stored_side

each_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


class Draws:
    """Gives the same number to every decision, but for those named by index."""

    def __init__(self, default: float = 0.5, **named: float) -> None:
        self._row = np.full(12, default)
        for name, value in named.items():
            self._row[int(name[1:])] = value

    def random(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        return np.tile(self._row, (shape[0], 1))


def apply(
    image: NDArray[np.uint8], size: int, policy: Policy, flip: float = 0.0, **draws: float
) -> NDArray[np.uint8]:
    return augment([image], size, policy, Draws(**draws), flip=flip)[0]  # type: ignore[arg-type]


def noise(height: int, width: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width]
    layers = [
        128 + 100 * np.sin(x / 9),
        128 + 100 * np.cos(y / 7),
        (x + y) * 255 / (height + width),
    ]
    return np.stack(layers, axis=2).astype(np.uint8)


@each_policy
def test_shape_type_and_seed(policy: Policy) -> None:
    images = [noise(20, 30), noise(50, 17), noise(1, 1), noise(64, 64)]
    once = augment(images, 24, policy, np.random.default_rng(1))
    assert once.shape == (4, 24, 24, 3) and once.dtype == np.uint8
    np.testing.assert_array_equal(once, augment(images, 24, policy, np.random.default_rng(1)))
    if policy.name != "none":
        assert (once != augment(images, 24, policy, np.random.default_rng(2))).any()


@each_policy
def test_an_image_does_not_depend_on_the_others(policy: Policy) -> None:
    one, other, third = noise(20, 30), noise(31, 19, 1), noise(9, 9, 2)
    first = augment([one, other, third], 16, policy, np.random.default_rng(3))
    second = augment([third, other, one], 16, policy, np.random.default_rng(3))
    np.testing.assert_array_equal(first[1], second[1])


@each_policy
def test_images_are_left_as_they_were(policy: Policy) -> None:
    image = noise(20, 20)
    image.flags.writeable = False  # as in the memory-mapped cache
    augment([image], 16, policy, np.random.default_rng(0))
    np.testing.assert_array_equal(image, noise(20, 20))


@each_policy
def test_one_colour_stays_one_colour(policy: Policy) -> None:
    """Nothing is drawn from outside the image: its edge goes on."""
    image = np.full((20, 30, 3), (200, 90, 40), np.uint8)
    for out in augment([image] * 20, 16, policy, np.random.default_rng(0)):
        assert (out.reshape(-1, 3).max(0).astype(int) - out.reshape(-1, 3).min(0) <= 1).all()


@each_policy
def test_ranges_are_sound(policy: Policy) -> None:
    assert POLICIES[policy.name] is policy and policy.doc
    assert 0 < policy.crop_area[0] <= policy.crop_area[1] <= 1
    assert 0 < policy.crop_ratio[0] <= 1 <= policy.crop_ratio[1]
    assert 0 <= policy.zoom < 1 and policy.rotate <= 180


@pytest.mark.parametrize(("height", "width", "size"), [(20, 30, 40), (32, 32, 32), (48, 36, 32)])
def test_none_is_a_plain_resize(height: int, width: int, size: int) -> None:
    image = smooth(height, width)
    out = augment([image], size, POLICIES["none"], np.random.default_rng(0))[0]
    expected = cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    assert np.abs(out.astype(int) - expected.astype(int)).max() <= 3


@pytest.mark.parametrize("size", [15, 32, 33, 224])
def test_what_the_cache_stores_by_default_is_interpolated_once(size: int) -> None:
    side = stored_side(size)
    image = noise(side, side)
    scale = size / side
    matrix = np.array([[scale, 0, (scale - 1) / 2], [0, scale, (scale - 1) / 2]])
    expected = cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)
    np.testing.assert_array_equal(apply(image, size, POLICIES["none"]), expected)


@pytest.mark.parametrize("name", ["none", "light"])
@pytest.mark.parametrize(("height", "width", "size"), [(336, 336, 112), (1024, 1000, 224)])
def test_noise_is_averaged_as_in_scoring(height: int, width: int, size: int, name: str) -> None:
    image = noise(height, width)
    out = augment([image] * 4, size, POLICIES[name], np.random.default_rng(0))
    scored = cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    assert out.std() == pytest.approx(scored.std(), rel=0.2)


@pytest.mark.parametrize("block", [(1, 2), (2, 1), (2, 2), (3, 1), (2, 3)])
def test_blocks_become_their_means(block: tuple[int, int]) -> None:
    image = noise(25, 31)
    means, _ = averaged(image, np.eye(3), np.array(block))
    rows, columns = 25 // block[0], 31 // block[1]
    whole = image[: rows * block[0], : columns * block[1]].astype(float)
    exact = whole.reshape(rows, block[0], columns, block[1], 3).mean(axis=(1, 3))
    assert means.shape == exact.shape and np.abs(means - exact).max() <= 0.51


@pytest.mark.parametrize(("height", "width"), [(100, 131), (35, 300), (300, 35), (299, 299)])
def test_averages_stay_in_their_place(height: int, width: int) -> None:
    """Also with a rest at the edges that fills no block, which the edge's own pixels replace."""
    image = smooth(height, width)
    inner = slice(1, -1)
    out = apply(image, 24, POLICIES["none"])[inner, inner].astype(int)
    scored = cv2.resize(image, (24, 24), interpolation=cv2.INTER_AREA)[inner, inner]
    assert np.abs(out - scored).max() <= 8  # one pixel further off it is 14


def test_flip_is_exact() -> None:
    image = noise(16, 16)
    flipped = apply(image, 16, POLICIES["none"], flip=0.5, u6=0.49)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    np.testing.assert_array_equal(apply(image, 16, POLICIES["none"], flip=0.5, u6=0.5), image)


@each_policy
def test_a_policy_does_not_flip_by_itself(policy: Policy) -> None:
    """An image dark on the left and bright on the right stays so, and is turned round by `flip`."""
    image = np.repeat(np.linspace(40, 200, 32).astype(np.uint8), 3).reshape(1, 32, 3)
    image = np.ascontiguousarray(np.repeat(image, 32, axis=0))
    for flip, sign in ((0.0, 1), (1.0, -1)):
        out = augment([image] * 20, 16, policy, np.random.default_rng(0), flip=flip).astype(float)
        assert (sign * (out[:, :, 8:].mean((1, 2, 3)) - out[:, :, :8].mean((1, 2, 3))) > 0).all()


@pytest.mark.parametrize(("u", "turns"), [(1.0, 1), (0.0, -1)])
def test_a_quarter_turn_is_exact(u: float, turns: int) -> None:
    image = noise(16, 16)
    turned = apply(image, 16, Policy("p", "", rotate=90), u4=u)
    np.testing.assert_array_equal(turned, np.rot90(image, -turns))  # clockwise on the screen


def test_small_turns_and_zooms_are_cv2s() -> None:
    image = smooth(33, 33)
    policy = Policy("p", "", rotate=20, zoom=0.2)
    out = apply(image, 33, policy, u4=0.9, u5=0.75)
    matrix = cv2.getRotationMatrix2D((16, 16), -16.0, 1.1)  # cv2 turns the other way round
    expected = cv2.warpAffine(image, matrix, (33, 33), borderMode=cv2.BORDER_REPLICATE)
    assert np.abs(out.astype(int) - expected.astype(int)).max() <= 3


def test_shift_moves_by_a_fraction_of_the_side() -> None:
    image = noise(20, 20)
    moved = apply(image, 20, Policy("p", "", shift=0.1), u7=1.0, u8=0.0)
    np.testing.assert_array_equal(moved[:18, 2:], image[2:, :18])


def test_crop_keeps_the_asked_area_from_the_drawn_place() -> None:
    image = noise(20, 40)
    policy = Policy("p", "", crop_area=(0.25, 0.25))
    quarter = np.ascontiguousarray(image[10:, :20])  # half the height, half the width
    out = apply(image, 10, policy, u2=0.0, u3=1.0)
    np.testing.assert_array_equal(out, apply(quarter, 10, POLICIES["none"]))


def test_brightness_and_contrast_closed_form() -> None:
    image = noise(16, 16)
    policy = Policy("p", "", brightness=0.2, contrast=0.4)
    out = apply(image, 16, policy, u9=0.75, u11=0.25)  # contrast 1.2, brightness -0.1
    exact = np.clip((image - 127.5) * 1.2 + 127.5 - 25.5, 0, 255)
    assert np.abs(out - exact).max() <= 0.5 + 1e-9


def test_saturation_closed_form() -> None:
    image = noise(16, 16)
    grey = image @ np.array([0.299, 0.587, 0.114])
    for u, factor in ((0.0, 0.5), (1.0, 1.5), (0.5, 1.0)):
        out = apply(image, 16, Policy("p", "", saturation=0.5), u10=u)
        exact = np.clip(image * factor + grey[..., None] * (1 - factor), 0, 255)
        assert np.abs(out - exact).max() <= 1.01


def test_colours_stay_within_their_bounds() -> None:
    policy = Policy("p", "", brightness=0.15, contrast=0.2)
    image = np.full((8, 8, 3), 100, np.uint8)
    out = augment([image] * 300, 8, policy, np.random.default_rng(0)).astype(float)
    low = (100 - 127.5) * 1.2 + 127.5 - 0.15 * 255
    high = (100 - 127.5) * 0.8 + 127.5 + 0.15 * 255
    assert low - 0.5 <= out.min() < low + 8
    assert high - 8 < out.max() <= high + 0.5


def test_mean_brightness_is_kept_on_average() -> None:
    policy = Policy("p", "", brightness=0.1, contrast=0.1)
    image = np.full((4, 4, 3), 128, np.uint8)
    out = augment([image] * 4000, 4, policy, np.random.default_rng(0))
    assert out.mean() == pytest.approx(128, abs=1.0)


def test_resize_averages_when_it_shrinks() -> None:
    board = np.indices((32, 32)).sum(0) % 2 * 255
    image = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    assert np.abs(resize([image], 16)[0].astype(int) - 127).max() <= 1
    np.testing.assert_array_equal(resize([image], 32)[0], image)


SIZE = 65
BILINEAR = InterpolationMode.BILINEAR
INSETS = np.random.default_rng(0).random((6, 4, 2)) * 0.3


class FixedDraws:
    """0.5 for every decision of the first kind, the given numbers for those of the second."""

    def __init__(self, **second: float) -> None:
        self._second = np.full(11, 0.5)
        for name, value in second.items():
            self._second[int(name[1:])] = value

    def random(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        return np.tile(np.full(12, 0.5) if shape[1] == 12 else self._second, (shape[0], 1))


def varied(image: NDArray[np.uint8], policy: Policy, **draws: float) -> NDArray[np.uint8]:
    return augment([image], image.shape[0], policy, FixedDraws(**draws))[0]  # type: ignore[arg-type]


def smooth_square(size: int = SIZE) -> NDArray[np.uint8]:
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
    policy, image = Policy("p", "", shear=25), smooth_square()
    given = {"angle": 0, "translate": [0, 0], "scale": 1, "interpolation": BILINEAR}
    more = given | {"shear": [(2 * u - 1) * 25, 0]}
    theirs = by_torchvision(image, tv.affine, **more)
    inside = eroded(by_torchvision(WHITE, tv.affine, **more))
    assert_same_inside(varied(image, policy, u1=u), theirs, inside)


@pytest.mark.parametrize("inset", INSETS, ids=range(6))
def test_perspective_is_torchvisions(inset: NDArray[np.float64]) -> None:
    """A policy whose corners move by `inset` at most, all of them as far as they can."""
    policy, image = Policy("p", "", perspective=0.8), smooth_square()
    draws = {f"u{3 + i}": value for i, value in enumerate((inset / 0.4).ravel())}
    start = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    end = start + np.where(start == 0, inset, -inset)
    # torchvision counts from the edge of the first pixel when it warps, not from its centre.
    points = [(corners * (SIZE - 1) + 0.5).tolist() for corners in (start, end)]
    theirs = by_torchvision(image, tv.perspective, *points, interpolation=BILINEAR)
    inside = eroded(by_torchvision(WHITE, tv.perspective, *points))
    assert_same_inside(varied(image, policy, u2=0.49, **draws), theirs, inside)


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
    policy, image = Policy("p", "", perspective=0.5, perspective_prob=0.5), smooth_square()
    np.testing.assert_array_equal(varied(image, policy, u2=0.5), image)
    assert (varied(image, policy, u2=0.49) != image).any()


@pytest.mark.parametrize("u", [0.0, 0.25, 0.4, 0.5, 0.9])
def test_hue_is_torchvisions(u: float) -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    ours = varied(image, Policy("p", "", hue=0.5), u0=u).astype(int)
    theirs = by_torchvision(image, tv.adjust_hue, u - 0.5)
    difference = np.abs(ours - theirs)
    assert difference.mean() < 1.5 and np.quantile(difference, 0.99) <= 6


@pytest.mark.parametrize("u", [0.0, 0.3, 1.0])
def test_saturation_and_contrast_are_torchvisions(u: float) -> None:
    """Contrast on an image whose grey has the mean 127.5, around which ours turns."""

    class First(FixedDraws):
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
