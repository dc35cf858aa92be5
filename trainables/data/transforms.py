"""A free list of transforms from YAML: albumentations, torchvision v2, and our own.

Takes the entries of `augment.transforms`, gives `Transforms`, which varies a batch of square uint8
images after the policy. An image's result depends on its seed alone; no global generator is used.
Each library is imported when a list asks for it, since that costs seconds in each worker process.
"""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from typing import Any

import numpy as np
import torch

from foldrace.config.schema import TransformConfig
from foldrace.core.errors import EnvironmentProblem
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.trainables.data.custom_transforms import CUSTOM
from foldrace.trainables.data.framing import Image

Maker = Callable[..., Any]  # arguments -> the library's transform
_BASES = frozenset(
    ("BasicTransform", "DualTransform", "ImageOnlyTransform", "Transform3D", "Transform")
)
_OF_FUNCTIONS = frozenset(("Lambda", "Compose"))
_CONTAINERS = ("OneOf", "SomeOf", "Sequential", "RandomOrder")  # of albumentations
INNER = "transforms"  # the argument that holds a container's own list


@dataclass(frozen=True)
class Draws:
    """Generators of one image, which its transforms draw from."""

    numpy: np.random.Generator
    python: random.Random


@dataclass(frozen=True)
class Library:
    """One row of the table: where transforms come from, how one is made and applied."""

    prefix: str
    makers: Callable[[Parts], Mapping[str, Maker]]
    make: Callable[[Maker, dict[str, Any]], Any]
    apply: Callable[[Any, Image, Draws], Image]


Step = Callable[[Image, Draws], Image]


class Transforms:
    """A list of transforms, ready to use on batches."""

    def __init__(self, entries: Sequence[TransformConfig], parts: Parts = NO_PARTS) -> None:
        self._given = (tuple(entries), parts)
        self._steps = [build_step(entry, parts) for entry in entries]

    def __reduce__(self) -> tuple[type[Transforms], tuple[tuple[TransformConfig, ...], Parts]]:
        return Transforms, self._given  # a loader's worker makes its own

    def __call__(self, images: Image, rng: np.random.Generator) -> Image:
        """(n, size, size, 3) uint8, changed in place."""
        if not self._steps:
            return images
        seeds = rng.integers(2**63, size=len(images))
        with torch.random.fork_rng(devices=[]):
            for image, seed in zip(images, seeds, strict=True):
                image[:] = self._varied(image, int(seed))
        return images

    def _varied(self, image: Image, seed: int) -> Image:
        draws = seeded(seed)
        for step in self._steps:
            image = step(image, draws)
        return image


def seeded(seed: int) -> Draws:
    """An image's generators; torchvision draws from torch's global one, which callers fork."""
    torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed takes all
    return Draws(np.random.default_rng(seed), random.Random(seed))


def build_step(entry: TransformConfig, parts: Parts = NO_PARTS) -> Step:
    """The function of one entry; raises what the library raises at wrong arguments."""
    library = _library_of(entry)
    transform = _build(entry, parts)
    return lambda image, draws: library.apply(transform, image, draws)


def inner_entries(entry: TransformConfig) -> list[TransformConfig]:
    """Entries inside a container; none for other transforms."""
    [arguments] = entry.values()
    found: list[TransformConfig] = arguments.get(INNER, [])
    return found


def _library_of(entry: TransformConfig) -> Library:
    [name] = entry
    return LIBRARIES[name.partition(".")[0]]


def _build(entry: TransformConfig, parts: Parts) -> Any:
    """The library's own object, with the objects inside a container."""
    [(name, arguments)] = entry.items()
    library, inner = _library_of(entry), inner_entries(entry)
    if any(_library_of(each) is not library for each in inner):
        raise ValueError(f"holds transforms of another library; allowed: {library.prefix}")
    given = arguments | ({INNER: [_build(each, parts) for each in inner]} if inner else {})
    return library.make(library.makers(parts)[name.partition(".")[2]], given)


def _albumentations(parts: Parts) -> Mapping[str, Maker]:
    _require_mit()
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # it asks the network for news at import
    import albumentations

    containers = {name: getattr(albumentations, name) for name in _CONTAINERS}
    return _classes(albumentations, albumentations.BasicTransform) | containers


def _require_mit() -> None:
    """Refuse albumentationsx: the same import name, and a licence that binds what uses it."""
    if _installed("albumentationsx"):
        raise EnvironmentProblem.single(
            "albumentationsx",
            "is installed (AGPL, under albumentations' import name); use the MIT release: "
            "pip uninstall albumentationsx && pip install --force-reinstall albumentations==2.0.8",
        )
    if not _installed("albumentations"):
        message = "is not installed; pip install albumentations==2.0.8"
        raise EnvironmentProblem.single("albumentations", message)


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _make_albumentations(maker: Maker, arguments: dict[str, Any]) -> Any:
    """Make it strict: else it only warns about wrong arguments and takes its defaults."""
    fill = arguments.get("fill")
    if isinstance(fill, (int, float)):  # cv2 takes one number for red alone in some transforms
        arguments = arguments | {"fill": [fill] * 3}
    owner = next(c for c in inspect.getmro(maker) if "__init__" in vars(c))  # type: ignore[arg-type]
    strict = {"strict": True} if "InitSchema" in vars(owner) else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return maker(**arguments, **strict)


def _apply_albumentations(transform: Any, image: Image, draws: Draws) -> Image:
    transform.set_random_state(draws.numpy, draws.python)
    changed: Image = transform(image=image)["image"]
    return changed


def _torchvision(parts: Parts) -> Mapping[str, Maker]:
    from torchvision.transforms import v2

    return _classes(v2, v2.Transform)


def _make_torchvision(maker: Maker, arguments: dict[str, Any]) -> Any:
    """Make it with words for its enumerations: `interpolation: bilinear`, `policy: cifar10`."""
    defaults = {n: p.default for n, p in inspect.signature(maker).parameters.items()}
    given = {
        name: type(defaults[name])(value) if isinstance(defaults[name], Enum) else value
        for name, value in arguments.items()
    }
    return maker(**given)


def _apply_torchvision(transform: Any, image: Image, draws: Draws) -> Image:
    changed = transform(torch.from_numpy(image).permute(2, 0, 1))
    if not isinstance(changed, torch.Tensor):
        raise TypeError("gives several images of one")
    return np.ascontiguousarray(changed.permute(1, 2, 0).numpy())


def _classes(module: Any, base: type) -> dict[str, Maker]:
    classes = dict(inspect.getmembers(module, inspect.isclass))
    left_out = _BASES | _OF_FUNCTIONS
    return {n: c for n, c in classes.items() if issubclass(c, base) and n not in left_out}


def _make_plainly(maker: Maker, arguments: dict[str, Any]) -> Any:
    return maker(**arguments)


LIBRARIES: dict[str, Library] = {
    library.prefix: library
    for library in (
        Library("albumentations", _albumentations, _make_albumentations, _apply_albumentations),
        Library("torchvision", _torchvision, _make_torchvision, _apply_torchvision),
        Library(
            "foldrace",
            lambda parts: {name: custom.make for name, custom in parts[CUSTOM].items()},
            _make_plainly,
            lambda transform, image, draws: transform(image, draws.numpy),
        ),
    )
}
