"""Gradient checkpointing: activations computed anew in the backward pass instead of kept, less
memory for about a third more time. (Chen et al., Training Deep Nets with Sublinear Memory Cost,
2016.)

Takes a backbone's body, switches it on; only timm's backbones have it, and not all of them.
"""

from __future__ import annotations

import torch
from torch import nn

from experiment.errors import Problem, UserError
from trainables.backbones import build_body
from trainables.stack import Stack, members

_WHERE = "training.gradient_checkpointing"


def checkpoint_gradients(body: nn.Module, backbone: str) -> None:
    """The same outputs and gradients, with less memory. Raises UserError where a backbone, or a
    stack's member, does not offer it."""
    parts = list(body.members) if isinstance(body, Stack) else [body]
    for part, member in zip(parts, members(backbone), strict=True):
        try:
            part.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:  # timm asserts where it cannot
            raise UserError([_problem(member.backbone)]) from error


def check_gradient_checkpointing(backbone: str) -> Problem | None:
    """A problem where the backbone cannot; one that exists is expected. (Whether it can does not
    depend on the image size.)"""
    for member in members(backbone):
        if not member.backbone.startswith("timm/"):
            return _problem(member.backbone)
    try:
        with torch.device("meta"):
            checkpoint_gradients(build_body(backbone, 224, False, 0.0).module, backbone)
    except UserError as error:
        return error.problems[0]
    except (RuntimeError, NotImplementedError, AssertionError, ValueError):
        return None  # it needs real memory or another size to be built: the trial will tell
    return None


def _problem(backbone: str) -> Problem:
    return Problem(
        _WHERE,
        f"{backbone} does not offer it: torchvision's backbones do not, and most of timm's do; set "
        "it to false, or choose another backbone",
    )
