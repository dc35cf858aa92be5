"""Backbones by registry name: `timm/<name>`, `torchvision/<name>`, and stacks of them.

Takes a name, gives a problem with the nearest names, or the backbone without its classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import timm

from experiment.errors import EnvironmentProblem, Problem
from experiment.names import closest
from trainables.body import Body
from trainables.stack import check_form, is_stack, members, stacked
from trainables.timm_bodies import timm_body, timm_names
from trainables.torchvision_bodies import NO_LINEAR_HEAD, torchvision_body, torchvision_names
from trainables.weights_loading import load_weights, weights_file

Pretrained = bool | str


@dataclass(frozen=True)
class Family:
    """One row of the table: where backbone names come from and how one is built.
    `build(name, pretrained, drop_path, image_size)`."""

    prefix: str
    names: Callable[[], Sequence[str]]
    build: Callable[[str, bool, float, int], Body]


FAMILIES: dict[str, Family] = {
    family.prefix: family
    for family in (
        Family("timm", timm_names, timm_body),
        Family("torchvision", torchvision_names, torchvision_body),
    )
}


def build_body(backbone: str, image_size: int, pretrained: Pretrained, drop_path: float) -> Body:
    """`image_size` is that of the images, in pixels; a stack's members may have their own. Raises
    EnvironmentProblem where pretrained weights cannot be had."""
    parts = members(backbone)
    if is_stack(backbone) and isinstance(pretrained, str) and not Path(pretrained).is_dir():
        raise EnvironmentProblem.single(
            f"training.pretrained: {pretrained}",
            f"is no folder; {backbone} needs one with a <backbone>.safetensors for each member",
        )
    bodies = [
        _build_one(part.backbone, part.image_size or image_size, pretrained, drop_path)
        for part in parts
    ]
    return stacked(bodies, [p.image_size for p in parts]) if is_stack(backbone) else bodies[0]


def check_backbone(backbone: str) -> Problem | None:
    """A problem, with the nearest names, where there is no such backbone."""
    if not is_stack(backbone):
        message = _unknown(backbone)
    elif (message := check_form(backbone)) is None:
        found = ((m.backbone, _unknown(m.backbone)) for m in members(backbone))
        message = "; ".join(f"{name}: {text}" for name, text in found if text) or None
    return Problem(f"search.backbones: {backbone}", message) if message else None


def _unknown(backbone: str) -> str | None:
    """What is wrong with a plain name."""
    prefix, slash, name = backbone.partition("/")
    if not slash or prefix not in FAMILIES:
        every = [f"{family}/{n}" for family in FAMILIES for n in _names(family)]
        near = [f"{family}/{backbone}" for family in FAMILIES if backbone in _names(family)]
        near = near or closest(backbone, every)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        forms = " or ".join(f"{family}/<name>" for family in FAMILIES)
        return f"should look like {forms}{hint}"
    if prefix == "torchvision" and name in NO_LINEAR_HEAD:
        return "has no linear classifier to replace; use timm's version of it"
    plain = name.split(".")[0] if prefix == "timm" else name
    if plain in _names(prefix) and (plain == name or name in timm.list_pretrained()):
        return None
    names = timm.list_pretrained(f"{plain}.*") if plain in _names(prefix) else _names(prefix)
    near = closest(name, names, n=4)
    listed = ", ".join(f"{prefix}/{n}" for n in near)
    return f"unknown backbone; {f'close matches: {listed}' if near else 'no close match'}"


def _names(prefix: str) -> frozenset[str]:
    return _names_of(FAMILIES[prefix])


@cache
def _names_of(family: Family) -> frozenset[str]:
    return frozenset(family.names())


def _build_one(backbone: str, image_size: int, pretrained: Pretrained, drop_path: float) -> Body:
    prefix, _, name = backbone.partition("/")
    try:
        body = FAMILIES[prefix].build(name, pretrained is True, drop_path, image_size)
    except Exception as error:  # whatever the hub's client raises: it has no common base
        if pretrained is not True:
            raise
        raise EnvironmentProblem.single(
            f"training.pretrained: {backbone}",
            f"the pretrained weights cannot be fetched ({type(error).__name__}: {error}); set "
            "training.pretrained to true (on a machine that reaches the hub), false (from "
            "scratch), or the path of a weights file or of a folder of <backbone>.safetensors",
        ) from error
    if isinstance(pretrained, str):
        load_weights(body.module, weights_file(pretrained, backbone))
    return body
