"""What albumentations 2 has renamed or removed: old names from tutorials, with their new form.

Takes an old name and value, gives what to write instead; None where the name was never one.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

_NEW_TRANSFORMS = {
    "Cutout": "CoarseDropout: {num_holes_range: [1, 8]}",
    "Flip": "HorizontalFlip, VerticalFlip or SquareSymmetry",
    "IAAAdditiveGaussianNoise": "GaussNoise",
    "IAAAffine": "Affine",
    "IAACropAndPad": "CropAndPad",
    "IAAEmboss": "Emboss",
    "IAAFliplr": "HorizontalFlip",
    "IAAFlipud": "VerticalFlip",
    "IAAPerspective": "Perspective",
    "IAAPiecewiseAffine": "PiecewiseAffine",
    "IAASharpen": "Sharpen",
    "IAASuperpixels": "Superpixels",
    "JpegCompression": "ImageCompression",
    "RandomBrightness": "RandomBrightnessContrast: {contrast_limit: 0}",
    "RandomContrast": "RandomBrightnessContrast: {brightness_limit: 0}",
    "TemplateTransform": "OverlayElements",
}


@dataclass(frozen=True)
class Renamed:
    """An old argument. `new` may hold {} for the old value; its first word, up to the colon, is
    the new argument, by which rows of one old name are told apart."""

    old: str
    new: str
    transform: str | None = None
    """None: any transform that has the new argument."""


_RENAMED = (
    Renamed("always_apply", "p: 1"),
    Renamed("max_holes", "num_holes_range: [1, {}]"),
    Renamed("min_holes", "num_holes_range: [{}, <most>]"),
    Renamed("max_height", "hole_height_range: [<least>, {}]"),
    Renamed("min_height", "hole_height_range: [{}, <most>]"),
    Renamed("max_width", "hole_width_range: [<least>, {}]"),
    Renamed("min_width", "hole_width_range: [{}, <most>]"),
    Renamed("height", "size: [{}, <width>]"),
    Renamed("width", "size: [<height>, {}]"),
    Renamed("value", "fill: {}"),
    Renamed("fill_value", "fill: {}"),
    Renamed("cval", "fill: {}"),
    Renamed("pad_val", "fill: {}"),
    Renamed("pad_cval", "fill: {}"),
    Renamed("mask_value", "nothing (there are no masks)"),
    Renamed("mask_fill_value", "nothing (there are no masks)"),
    Renamed("mode", "border_mode: {}"),
    Renamed("pad_mode", "border_mode: {}"),
    Renamed("var_limit", "std_range: [<least>, <most>], as fractions of 255: sqrt(variance) / 255"),
    Renamed("mean", "mean_range: [<least>, <most>], as fractions of 255", "GaussNoise"),
    Renamed("quality_lower", "quality_range: [{}, <most>]"),
    Renamed("quality_upper", "quality_range: [<least>, {}]"),
    Renamed("scale_min", "scale_range: [{}, <most>]"),
    Renamed("scale_max", "scale_range: [<least>, {}]"),
    Renamed("interpolation", "interpolation_pair: {{upscale: {0}, downscale: {0}}}", "Downscale"),
    Renamed("threshold", "threshold_range: [<least>, <most>], as fractions of 255", "Solarize"),
    Renamed("unit_size_min", "unit_size_range: [{}, <most>]"),
    Renamed("unit_size_max", "unit_size_range: [<least>, {}]"),
    Renamed("holes_number_x", "holes_number_xy: [{}, <y>]"),
    Renamed("holes_number_y", "holes_number_xy: [<x>, {}]"),
    Renamed("shift_x", "shift_xy: [{}, <y>]"),
    Renamed("shift_y", "shift_xy: [<x>, {}]"),
    Renamed("fog_coef_lower", "fog_coef_range: [{}, <most>]"),
    Renamed("fog_coef_upper", "fog_coef_range: [<least>, {}]"),
    Renamed("slant_lower", "slant_range: [{}, <most>]"),
    Renamed("slant_upper", "slant_range: [<least>, {}]"),
    Renamed("snow_point_lower", "snow_point_range: [{}, <most>]"),
    Renamed("snow_point_upper", "snow_point_range: [<least>, {}]"),
    Renamed("num_shadows_lower", "num_shadows_limit: [{}, <most>]"),
    Renamed("num_shadows_upper", "num_shadows_limit: [<least>, {}]"),
    Renamed("num_flare_circles_lower", "num_flare_circles_range: [{}, <most>]"),
    Renamed("num_flare_circles_upper", "num_flare_circles_range: [<least>, {}]"),
    Renamed("angle_lower", "angle_range: [{}, <most>]"),
    Renamed("angle_upper", "angle_range: [<least>, {}]"),
    Renamed("alpha_affine", "another entry, albumentations.Affine", "ElasticTransform"),
    Renamed("shift_limit", "distort_limit; albumentations.Affine shifts", "OpticalDistortion"),
)


def new_transform(name: str) -> str | None:
    """What does now what this transform did."""
    return _NEW_TRANSFORMS.get(name)


def new_argument(transform: str, old: str, value: object, allowed: Container[str]) -> str | None:
    """What to write for an argument of a transform that now takes the `allowed` ones."""
    for row in _RENAMED:
        fits = row.transform == transform if row.transform else _has(row, allowed)
        if row.old == old and fits:
            return row.new.format(value)
    return None


def _has(row: Renamed, allowed: Container[str]) -> bool:
    argument, colon, _ = row.new.partition(":")
    return argument in allowed if colon else "fill_mask" in allowed
