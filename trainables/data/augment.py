"""Named augmentation policies: how far a training image may be moved, turned and recoloured.

Takes uint8 images of any size and a NumPy generator, gives square uint8 images. All geometry of a
policy, together with the horizontal flip, which is a hyperparameter of its own, is one map, affine
or a homography in coordinates of pixel centres (0 to size - 1), and so one interpolation, straight
from the stored image, or from its averages where there are many more pixels than the output has.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import TransformConfig
from foldrace.core.plugins import Table
from foldrace.trainables.data.framing import Image, frames

Maps = NDArray[np.float64]  # (n, 3, 3)


def homogeneous(affine: NDArray[np.float64]) -> Maps:
    """(n, 2, 3) affine maps as homographies."""
    last = np.broadcast_to((0.0, 0.0, 1.0), (len(affine), 1, 3))
    return np.concatenate([affine, last], axis=1)


def shear(degrees: NDArray[np.float64], size: int) -> Maps:
    """Rows slide along x around the centre: x - tan(angle) * (y - centre)."""
    slope = np.tan(np.deg2rad(degrees))
    maps = np.tile(np.eye(3), (len(degrees), 1, 1))
    maps[:, 0, 1], maps[:, 0, 2] = -slope, slope * (size - 1) / 2
    return maps


def perspective(inset: NDArray[np.float64], size: int) -> Maps:
    """Homographies that move each corner inwards.

    `inset` (n, 4, 2): x and y, fractions of the side, of the top left, top right, bottom right and
    bottom left corner.

    Heckbert, Fundamentals of Texture Mapping and Image Warping, master's thesis, University of
    California, Berkeley, 1989 (unit square to quadrilateral).
    """
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]])
    p = corners + np.where(corners == 0, inset, -inset)
    (ax, ay), (bx, by) = (p[:, 1] - p[:, 2]).T, (p[:, 3] - p[:, 2]).T
    sx, sy = (p[:, 0] - p[:, 1] + p[:, 2] - p[:, 3]).T
    area = ax * by - bx * ay
    maps = np.empty((len(inset), 3, 3))
    maps[:, 2, 0], maps[:, 2, 1] = (sx * by - bx * sy) / area, (ax * sy - sx * ay) / area
    maps[:, 2, 2] = 1.0
    maps[:, :2, 0] = p[:, 1] - p[:, 0] + maps[:, 2, :1] * p[:, 1]
    maps[:, :2, 1] = p[:, 3] - p[:, 0] + maps[:, 2, 1:2] * p[:, 3]
    maps[:, :2, 2] = p[:, 0]
    span = np.array([size - 1.0, size - 1.0, 1.0]).clip(min=1)  # a single pixel has no span
    scaled: Maps = span[:, None] * maps / span
    return scaled


def averaged(
    image: NDArray[np.uint8], matrix: NDArray[np.float64], block: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Means of blocks of `block` rows and columns, and the map from there.

    A rest at the bottom or right that fills no block is left out. `matrix`: (2, 3) affine or
    (3, 3).
    """
    rows, columns = block.tolist()
    if rows == columns == 1:
        return image, matrix
    height, width = image.shape[0] // rows, image.shape[1] // columns
    whole = image[: height * rows, : width * columns]
    # Halfway between two pixels is their mean, which cv2 has four times as soon as an average.
    method = cv2.INTER_LINEAR if rows + columns == 3 else cv2.INTER_AREA
    means = cv2.resize(whole, (width, height), interpolation=method)
    x, y = (columns - 1) / 2, (rows - 1) / 2  # the first block's centre
    spread = np.array([[columns, 0, x], [0, rows, y], [0, 0, 1]])
    return np.asarray(means, np.uint8), matrix @ spread


class Warper:
    """A puller of RGB images of the given shapes, (n, 2) height and width, to squares.

    It adds a fourth channel that it drops again: the values are the same, and cv2 takes a third
    less time.
    """

    def __init__(self, shapes: NDArray[np.int64], size: int) -> None:
        self._source = np.empty(int(shapes.prod(axis=1).max()) * 4, np.uint8)
        self._warped = np.empty((size, size, 4), np.uint8)

    def warp(
        self, image: NDArray[np.uint8], matrix: NDArray[np.float64], out: NDArray[np.uint8]
    ) -> None:
        """Write the warped image into `out`; the image's edge goes on beyond it.

        `matrix`: (2, 3) affine or (3, 3), from the image's pixels to those of `out`.
        """
        height, width, _ = image.shape
        source = self._source[: height * width * 4].reshape(height, width, 4)
        cv2.cvtColor(image, cv2.COLOR_RGB2RGBA, dst=source)
        (cv2.warpAffine if len(matrix) == 2 else cv2.warpPerspective)(
            source,
            matrix,
            self._warped.shape[:2],
            dst=self._warped,
            flags=cv2.INTER_LINEAR,
            borderMode=cv2.BORDER_REPLICATE,
        )
        cv2.cvtColor(self._warped, cv2.COLOR_RGBA2RGB, dst=out)


_DENSE = 1.5  # pixels a pixel of the output; bilinear interpolation skips some where there are more


@dataclass(frozen=True)
class Policy:
    """Ranges that each image draws from, uniformly and independently."""

    name: str
    doc: str
    crop_area: tuple[float, float] = (1.0, 1.0)
    """Fraction of the frame's area that is kept (random resized crop)."""
    crop_ratio: tuple[float, float] = (1.0, 1.0)
    """Width to height of the crop, log-uniform, relative to the frame's own."""
    rotate: float = 0.0  # degrees, both ways
    zoom: float = 0.0  # scale is 1 ± zoom
    shift: float = 0.0  # fraction of the side, both ways
    shear: float = 0.0  # degrees, both ways, along x
    perspective: float = 0.0  # fraction of half the side that each corner may move inwards
    perspective_prob: float = 0.5
    brightness: float = 0.0  # fraction of full scale, both ways
    contrast: float = 0.0  # factor is 1 ± contrast
    saturation: float = 0.0  # factor is 1 ± saturation
    hue: float = 0.0  # fraction of the colour circle, both ways
    transforms: tuple[TransformConfig, ...] = field(default=(), hash=False)
    """Transforms of a library that come next, in the form of `augment.transforms`."""

    @property
    def moves(self) -> bool:
        """True where it crops or shifts, so that nothing has a fixed place in the square."""
        return self.crop_area[0] < 1 or self.shift > 0


POLICIES = Table(
    Policy,
    "augmentation policy",
    (
        Policy("none", "only resized"),
        Policy(
            "light", "small moves, turns and zooms: digits, letters, small photos",
            rotate=10, zoom=0.1, shift=0.08,
        ),
        Policy(
            "medium", "random resized crop, turns, colour jitter: photos of objects",
            crop_area=(0.6, 1.0), crop_ratio=(0.8, 1.25), rotate=15,
            brightness=0.15, contrast=0.2, saturation=0.2,
        ),
        Policy(
            "heavy", "strong crops, turns and colours: long schedules, large backbones",
            crop_area=(0.3, 1.0), crop_ratio=(0.75, 1.33), rotate=25, zoom=0.15, shift=0.05,
            brightness=0.25, contrast=0.4, saturation=0.4,
        ),
        Policy(
            "vehicles",
            "crop, turn, shift, zoom, shear, perspective, colour jitter with hue: vehicles and "
            "other rigid things seen from many places",
            crop_area=(0.6, 1.0), crop_ratio=(0.75, 1.33), rotate=15, zoom=0.1, shift=0.1,
            shear=10, perspective=0.2, brightness=0.1, contrast=0.2, saturation=0.2, hue=0.05,
        ),
        Policy(
            "randaugment",
            "small moves, turns and zooms, then 2 random operations of moderate strength (Cubuk, "
            "Zoph, Shlens and Le, RandAugment, NeurIPS 2020)",
            rotate=10, zoom=0.1, shift=0.08,
            transforms=({"torchvision.RandAugment": {"interpolation": "bilinear"}},),
        ),
        Policy(
            "trivialaugment",
            "small moves, turns and zooms, then 1 random operation of random strength (Müller and "
            "Hutter, TrivialAugment, ICCV 2021)",
            rotate=10, zoom=0.1, shift=0.08,
            transforms=({"torchvision.TrivialAugmentWide": {"interpolation": "bilinear"}},),
        ),
    ),
)  # fmt: skip


def augment(
    images: list[Image],
    size: int,
    policy: Policy,
    rng: np.random.Generator,
    how: str = "squash",
    flip: float = 0.0,
) -> Image:
    """(n, size, size, 3) uint8: each image varied by the policy, but for its `transforms`.

    `how` is a `training.resize`, `flip` the probability that an image is mirrored, left to right.
    Draws the same numbers whatever the images are, so that a batch depends on its seed alone.
    """
    n = len(images)
    out = np.empty((n, size, size, 3), np.uint8)
    u = rng.random((n, 12))  # one column a decision, in [0, 1)
    more = rng.random((n, 11)) if policy.shear or policy.perspective or policy.hue else None
    shapes = np.array([image.shape[:2] for image in images])
    crops = _crops(u, shapes, policy, how)
    maps = _affine(u, crops, size, policy, flip)
    if more is not None:
        maps = _homography(maps, more, size, policy)
    blocks = np.minimum(_block_sides(crops, size), shapes)  # a padded image may be thin
    warper = Warper(shapes // blocks, size)
    for i, image in enumerate(images):
        warper.warp(*averaged(image, maps[i], blocks[i]), out[i])
        _recolour(out[i], u[i], policy)
        if more is not None and policy.hue:
            _turn_hue(out[i], float(_symmetric(more[i, 0], policy.hue)))
    return out


def _crops(
    u: NDArray[np.float64], shapes: NDArray[np.int64], policy: Policy, how: str
) -> NDArray[np.float64]:
    """(n, 4): left, top, width, height. `u` (n, 12), `shapes` (n, 2) height and width.

    A part of the frame that is scored, so that a policy means the same for every shape; where the
    frame itself is a crop, from anywhere in the image.
    """
    frame = frames(shapes, how)
    _, _, width, height = frame.T
    low, high = policy.crop_area
    area = low + (high - low) * u[:, 0]
    ratio = np.exp(np.log(policy.crop_ratio[0]) + u[:, 1] * np.log(
        policy.crop_ratio[1] / policy.crop_ratio[0]
    ))  # fmt: skip
    crop_w = np.minimum(1.0, np.sqrt(area * ratio)) * width
    crop_h = np.minimum(1.0, np.sqrt(area / ratio)) * height
    room = frames(shapes, "squash") if how == "crop" and policy.moves else frame
    left, top, room_w, room_h = room.T
    left, top = left + u[:, 2] * (room_w - crop_w), top + u[:, 3] * (room_h - crop_h)
    return np.column_stack([left, top, crop_w, crop_h])


def _block_sides(crops: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """(n, 2) rows and columns of the blocks to average: about `_DENSE` make a pixel of the output.

    Whole numbers, since cv2 takes five times as long for others.
    """
    return np.maximum(1, np.rint(crops[:, :1:-1] / (_DENSE * size))).astype(np.int64)


def _affine(
    u: NDArray[np.float64], crops: NDArray[np.float64], size: int, policy: Policy, flip: float
) -> NDArray[np.float64]:
    """(n, 2, 3) maps from pixels of the images to pixels of the output.

    Crop, then turn, zoom, flip and shift around the centre. `u` (n, 12), `crops` (n, 4).
    """
    left, top, crop_w, crop_h = crops.T
    sx, sy = size / crop_w, size / crop_h

    angle = np.deg2rad(_symmetric(u[:, 4], policy.rotate))
    scale = 1.0 + _symmetric(u[:, 5], policy.zoom)
    mirror = np.where(u[:, 6] < flip, -1.0, 1.0)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    maps = np.empty((len(u), 2, 3))
    maps[:, 0, 0], maps[:, 0, 1] = mirror * cos * sx, -mirror * sin * sy
    maps[:, 1, 0], maps[:, 1, 1] = sin * sx, cos * sy
    # cv2 counts from pixel centres: the image's point p has the coordinate p + 0.5.
    centre = np.column_stack([left + crop_w / 2 - 0.5, top + crop_h / 2 - 0.5])  # of the crop
    shift = size * _symmetric(u[:, 7:9], policy.shift)
    maps[:, :, 2] = (size - 1) / 2 + shift - (maps[:, :, :2] @ centre[:, :, None])[:, :, 0]
    return maps


def _homography(
    affine: NDArray[np.float64], u: NDArray[np.float64], size: int, policy: Policy
) -> NDArray[np.float64]:
    """(n, 3, 3): the affine maps, then shear, then a perspective. `u` (n, 11)."""
    drawn = u[:, 2] < policy.perspective_prob
    inset = u[:, 3:11].reshape(-1, 4, 2) * (drawn[:, None, None] * policy.perspective / 2)
    sheared = shear(_symmetric(u[:, 1], policy.shear), size) @ homogeneous(affine)
    return perspective(inset, size) @ sheared


def _recolour(image: Image, u: NDArray[np.float64], policy: Policy) -> None:
    """In place: brightness and contrast as one look-up table, then saturation."""
    if policy.brightness or policy.contrast:
        factor = 1.0 + float(_symmetric(u[9], policy.contrast))
        offset = 255.0 * float(_symmetric(u[11], policy.brightness))
        table = np.clip((np.arange(256) - 127.5) * factor + 127.5 + offset, 0, 255)
        cv2.LUT(image, np.rint(table).astype(np.uint8), dst=image)
    if policy.saturation:
        factor = 1.0 + float(_symmetric(u[10], policy.saturation))
        grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        cv2.addWeighted(image, factor, grey, 1.0 - factor, 0.0, dst=image)


def _turn_hue(image: Image, turn: float) -> None:
    """In place: the hue of every pixel by `turn` of the colour circle, in HSV."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)  # wraps round, as the circle does
    cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL, dst=image)


def _symmetric(u: NDArray[np.float64], reach: float) -> NDArray[np.float64]:
    """Stretch `u` in [0, 1) to uniform in [-reach, reach)."""
    return (2.0 * u - 1.0) * reach
