"""Checks of `augment.transforms`: names, arguments, values, and a run on a dummy image.

Takes the entries and the image sizes of the sweep, gives every problem, with what is allowed or the
new form of what albumentations 2 has renamed or removed.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from foldrace.config.schema import TransformConfig
from foldrace.core.errors import EnvironmentProblem, Problem, listing
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.core.synonyms import closest
from foldrace.trainables.data.framing import Image
from foldrace.trainables.data.transforms import (
    INNER,
    LIBRARIES,
    Draws,
    Maker,
    Step,
    build_step,
    inner_entries,
    seeded,
)

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
class OldName:
    """An argument that albumentations 2 has renamed."""

    old: str
    new: str
    """The new form, with {} for the old value; its first word, up to the colon, is the new
    argument, by which rows of one old name are distinguished."""
    transform: str | None = None
    """The transform that had it; None: any that has the new argument."""


_RENAMED = (
    OldName("always_apply", "p: 1"),
    OldName("max_holes", "num_holes_range: [1, {}]"),
    OldName("min_holes", "num_holes_range: [{}, <most>]"),
    OldName("max_height", "hole_height_range: [<least>, {}]"),
    OldName("min_height", "hole_height_range: [{}, <most>]"),
    OldName("max_width", "hole_width_range: [<least>, {}]"),
    OldName("min_width", "hole_width_range: [{}, <most>]"),
    OldName("height", "size: [{}, <width>]"),
    OldName("width", "size: [<height>, {}]"),
    OldName("value", "fill: {}"),
    OldName("fill_value", "fill: {}"),
    OldName("cval", "fill: {}"),
    OldName("pad_val", "fill: {}"),
    OldName("pad_cval", "fill: {}"),
    OldName("mask_value", "nothing (there are no masks)"),
    OldName("mask_fill_value", "nothing (there are no masks)"),
    OldName("mode", "border_mode: {}"),
    OldName("pad_mode", "border_mode: {}"),
    OldName("var_limit", "std_range: [<least>, <most>], as fractions of 255: sqrt(variance) / 255"),
    OldName("mean", "mean_range: [<least>, <most>], as fractions of 255", "GaussNoise"),
    OldName("quality_lower", "quality_range: [{}, <most>]"),
    OldName("quality_upper", "quality_range: [<least>, {}]"),
    OldName("scale_min", "scale_range: [{}, <most>]"),
    OldName("scale_max", "scale_range: [<least>, {}]"),
    OldName("interpolation", "interpolation_pair: {{upscale: {0}, downscale: {0}}}", "Downscale"),
    OldName("threshold", "threshold_range: [<least>, <most>], as fractions of 255", "Solarize"),
    OldName("unit_size_min", "unit_size_range: [{}, <most>]"),
    OldName("unit_size_max", "unit_size_range: [<least>, {}]"),
    OldName("holes_number_x", "holes_number_xy: [{}, <y>]"),
    OldName("holes_number_y", "holes_number_xy: [<x>, {}]"),
    OldName("shift_x", "shift_xy: [{}, <y>]"),
    OldName("shift_y", "shift_xy: [<x>, {}]"),
    OldName("fog_coef_lower", "fog_coef_range: [{}, <most>]"),
    OldName("fog_coef_upper", "fog_coef_range: [<least>, {}]"),
    OldName("slant_lower", "slant_range: [{}, <most>]"),
    OldName("slant_upper", "slant_range: [<least>, {}]"),
    OldName("snow_point_lower", "snow_point_range: [{}, <most>]"),
    OldName("snow_point_upper", "snow_point_range: [<least>, {}]"),
    OldName("num_shadows_lower", "num_shadows_limit: [{}, <most>]"),
    OldName("num_shadows_upper", "num_shadows_limit: [<least>, {}]"),
    OldName("num_flare_circles_lower", "num_flare_circles_range: [{}, <most>]"),
    OldName("num_flare_circles_upper", "num_flare_circles_range: [<least>, {}]"),
    OldName("angle_lower", "angle_range: [{}, <most>]"),
    OldName("angle_upper", "angle_range: [<least>, {}]"),
    OldName("alpha_affine", "another entry, albumentations.Affine", "ElasticTransform"),
    OldName("shift_limit", "distort_limit; albumentations.Affine shifts", "OpticalDistortion"),
)


def new_transform(name: str) -> str | None:
    """The new form of a transform that is gone, or None."""
    return _NEW_TRANSFORMS.get(name)


def new_argument(transform: str, old: str, value: object, allowed: Container[str]) -> str | None:
    """The new form of an argument of a transform that now takes the `allowed` ones, or None."""
    for row in _RENAMED:
        fits = row.transform == transform if row.transform else _has(row, allowed)
        if row.old == old and fits:
            return row.new.format(value)
    return None


def _has(row: OldName, allowed: Container[str]) -> bool:
    argument, colon, _ = row.new.partition(":")
    return argument in allowed if colon else "fill_mask" in allowed


StepOutcome = tuple[Image, str | None]  # the image, and what is wrong with it
_WHERE = "augment.transforms"
_TRIES = 5  # of a list on a dummy image: sizes may be drawn at random
_TRIES_OF_CONTAINERS = 40  # which draw what they apply
_OF_THE_MODEL = frozenset(
    (
        *("Normalize", "ToTensor", "ToTensorV2", "ToTensor3D", "ToFloat", "FromFloat", "ToDtype"),
        *("ConvertImageDtype", "ToImage", "ToPILImage", "PILToTensor", "ToPureTensor"),
    )
)
_OF_BATCHES = frozenset(("MixUp", "CutMix"))


def check_transforms(
    entries: Sequence[TransformConfig], sizes: Iterable[int], parts: Parts = NO_PARTS
) -> list[Problem]:
    """Problems of every entry; where there are none, those of the list on a dummy image."""
    problems = [
        p for i, entry in enumerate(entries) for p in _entry_problems(f"{_WHERE}.{i}", entry, parts)
    ]
    if problems:
        return list(dict.fromkeys(problems))  # a package is wrong once, not once an entry
    found = (_size_problem(entries, size, parts) for size in sorted(set(sizes)))
    return [problem for problem in found if problem is not None]


def _entry_problems(place: str, entry: TransformConfig, parts: Parts) -> Iterator[Problem]:
    [(full_name, arguments)] = entry.items()
    where = f"{place} {full_name}"
    prefix, _, name = full_name.rpartition(".")
    if name in _OF_THE_MODEL:
        advice = "images stay 8-bit RGB here, and each model normalises its own input; remove it"
        yield Problem(where, advice)
        return
    if name in _OF_BATCHES:
        yield Problem(where, "mixes images of a batch, not one image; see search.space.mixup_prob")
        return
    try:
        makers = LIBRARIES[prefix].makers(parts) if prefix in LIBRARIES else {}
    except EnvironmentProblem as error:
        yield from error.problems
        return
    if name not in makers:
        yield Problem(where, _unknown(prefix, name, makers, parts))
        return
    wrong = list(_argument_problems(where, name, makers[name], arguments))
    for i, inner in enumerate(inner_entries(entry)):
        wrong += _entry_problems(f"{place}.{INNER}.{i}", inner, parts)
    yield from wrong or _value_problems(where, entry, parts)


def _unknown(prefix: str, name: str, makers: Mapping[str, Maker], parts: Parts) -> str:
    new = new_transform(name)
    if new is not None and prefix in ("albumentations", ""):
        return f"albumentations 2 has no {name}; use {new}"
    if prefix in LIBRARIES:
        return f"unknown transform; {_did_you_mean(f'{prefix}.{n}' for n in closest(name, makers))}"
    near = (f"{library}.{name}" for library in LIBRARIES if name in _makers(library, parts))
    libraries = ", ".join(LIBRARIES)
    return f"should be named <library>.<transform>; libraries: {libraries}; {_did_you_mean(near)}"


def _makers(library: str, parts: Parts) -> Mapping[str, Maker]:
    try:
        return LIBRARIES[library].makers(parts)
    except EnvironmentProblem:
        return {}


def _did_you_mean(near: Iterable[str]) -> str:
    found = " or ".join(near)
    return f"did you mean {found}?" if found else "no close match"


def _argument_problems(
    where: str, name: str, maker: Maker, arguments: Mapping[str, Any]
) -> Iterator[Problem]:
    """Problems of arguments that the transform does not have, or needs and did not get."""
    parameters = inspect.signature(maker).parameters
    for key, value in arguments.items():
        if key in parameters:
            continue
        new = new_argument(name, key, value, parameters)
        if new is not None:
            yield Problem(where, f"argument {key!r} is gone; write {new}")
            continue
        near = closest(key, parameters, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        yield Problem(where, f"unknown argument {key!r}; {hint}allowed: {', '.join(parameters)}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    unknown = arguments.keys() - parameters.keys()
    if missing and not unknown:
        yield Problem(where, f"needs {listing(missing)}")


def _value_problems(where: str, entry: TransformConfig, parts: Parts) -> Iterator[Problem]:
    """Problems that the library finds in the values."""
    try:
        build_step(entry, parts)
    except Exception as error:  # each library and transform has its own exceptions
        cause = error if isinstance(error, ValidationError) else error.__cause__
        reasons = _reasons(cause) if isinstance(cause, ValidationError) else [str(error)]
        for reason in reasons:
            yield Problem(where, reason)


def _reasons(error: ValidationError) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        message = detail["msg"].removeprefix("Value error, ").replace("Input should", "should")
        given = json.dumps(detail["input"], default=str)
        argument = detail["loc"][:1]  # what follows are pydantic's words for a type's branches
        yield f"{argument[0]}: got {given}; {message}" if argument else message


def _size_problem(entries: Sequence[TransformConfig], size: int, parts: Parts) -> Problem | None:
    """Run every transform, whatever its probability, on noise of the policy's output size."""
    tries = _TRIES_OF_CONTAINERS if any(map(inner_entries, entries)) else _TRIES
    steps = [build_step(_always(entry, parts), parts) for entry in entries]
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    with torch.random.fork_rng(devices=[]):
        for seed in range(tries):
            draws, image = seeded(seed), noise.copy()
            for i, step in enumerate(steps):
                image, fault = _outcome(step, image, draws, entries[i], parts)
                if fault is not None:
                    where = f"{_WHERE}.{i} {next(iter(entries[i]))}"
                    return Problem(where, f"on an image of {size} x {size}: {fault}")
            if image.shape != noise.shape:
                return Problem(_WHERE, _wrong_size(image, size))
    return None


def _outcome(
    step: Step, image: Image, draws: Draws, entry: TransformConfig, parts: Parts
) -> StepOutcome:
    """The image after the step, and what is wrong with it."""
    try:
        changed = step(image.copy(), draws)
    except Exception as error:  # each transform has its own exceptions
        return image, (str(error) or type(error).__name__).splitlines()[0]
    if changed.ndim != 3 or changed.shape[2] != 3:
        return image, "does not give an RGB image"
    if changed.dtype != np.uint8:
        return image, f"gives {changed.dtype}, not 8-bit, pixels"
    if changed.shape != image.shape and not _is_certain(entry, parts):
        return image, "changes the size, and not of every image; give it p: 1"
    return changed, None


def _wrong_size(image: Image, size: int) -> str:
    return (
        f"the list makes {image.shape[1]} x {image.shape[0]} pixels of {size} x {size}; needed: "
        f"{size} x {size}, the sweep's image_size; change or remove what resizes, crops or pads"
    )


def _always(entry: TransformConfig, parts: Parts) -> TransformConfig:
    """The entry with probability 1, where it has one.

    What a container holds keeps its own: those of OneOf are weights.
    """
    [(name, arguments)] = entry.items()
    return entry if _default_p(name, parts) is None else {name: arguments | {"p": 1.0}}


def _is_certain(entry: TransformConfig, parts: Parts) -> bool:
    [(name, arguments)] = entry.items()
    default = _default_p(name, parts)
    return default is None or bool(arguments.get("p", default) == 1)


def _default_p(full_name: str, parts: Parts) -> float | None:
    """Default probability of the transform; None where it has none."""
    prefix, _, name = full_name.partition(".")
    parameter = inspect.signature(LIBRARIES[prefix].makers(parts)[name]).parameters.get("p")
    return None if parameter is None else parameter.default
