"""The layers of a classifier, counted from its input, and which of them train in an epoch.

Takes a classifier, gives parameter name -> layer number (0 at the stem, the head has the highest),
which layer-wise learning rates and step-by-step unfreezing go by; takes these numbers, changes the
model's `requires_grad` flags and the mode of its norms. Gradual unfreezing: Howard and Ruder,
Universal Language Model Fine-tuning for Text Classification, ACL 2018.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from timm.models import group_parameters
from torch import nn

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.models.classifier import Classifier
from foldrace.trainables.models.stack import Stack

NORMS_WITH_STATISTICS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)
"""Modules that may keep running statistics of what they have seen."""
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def layer_ids(model: Classifier) -> dict[str, int]:
    """Parameter name -> layer number, from 0 for the stem and the embeddings up to the head's.

    Every number in between is taken. timm's backbones are split as by timm's
    `param_groups_layer_decay`, where a norm right before the classifier counts to the head. A
    stack's members lie side by side, stretched to the deepest one's numbers. Bao, Dong, Piao and
    Wei, BEiT, ICLR 2022, decay the learning rate by these.
    """
    ids, head = _numbered(model.body)
    named = {f"body.{name}": number for name, number in ids.items()}
    return named | {f"head.{name}": head for name, _ in model.head.named_parameters()}


def _numbered(body: nn.Module) -> tuple[dict[str, int], int]:
    """A backbone's parameters by number, and the head's number."""
    if isinstance(body, Stack):
        return _side_by_side(body)
    if hasattr(body, "group_matcher"):
        return _by_timm(body)
    layers = _layers(body)
    return {name: number for number, names in enumerate(layers) for name in names}, len(layers)


def _side_by_side(stack: Stack) -> tuple[dict[str, int], int]:
    numbered = [_numbered(member) for member in stack.members]
    head = max(member_head for _, member_head in numbered)
    ids = {
        f"members.{i}.{name}": _stretched(number, member_head, head)
        for i, (member_ids, member_head) in enumerate(numbered)
        for name, number in member_ids.items()
    }
    return ids, head


def _stretched(number: int, own_head: int, head: int) -> int:
    """First layer to first, last to last, and the head to the head."""
    if number == own_head:
        return head
    return round(number * (head - 1) / max(1, own_head - 1))


def _by_timm(body: Any) -> tuple[dict[str, int], int]:
    """Numbers by timm's own grouping, in which the removed classifier takes part.

    Others may share its number.
    """
    classifier = body.pretrained_cfg["classifier"]
    removed = classifier if isinstance(classifier, str) else classifier[0]
    names = [*(name for name, _ in body.named_parameters()), removed]
    named: Any = _Names(names)
    ids = group_parameters(named, body.group_matcher(coarse=False), reverse=True)
    return ids, ids.pop(removed)


class _Names:
    """Parameter names, given as timm's `group_parameters` asks a module for them."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def named_parameters(self) -> Iterator[tuple[str, None]]:
        return ((name, None) for name in self._names)


def _layers(body: nn.Module) -> list[list[str]]:
    """Parameter names by layer, from input to output.

    What lies in front of the first block is a layer of its own; what lies between two blocks, such
    as a down-sampling, belongs to the second.
    """
    layers: list[list[str]] = []
    between: list[str] = []
    for names, is_block in _units(body):
        between += names
        if is_block:
            in_front = between[: -len(names)]
            layers += [in_front, names] if in_front and not layers else [between]
            between = []
    if between and layers:
        layers[-1] += between
    return layers or [between]


def _units(body: nn.Module) -> Iterator[tuple[list[str], bool]]:
    """Parts from input to output, each with True where it is a block.

    A backbone of single layers alone (VGG, AlexNet) has its weighted layers for blocks.
    """
    parts = list(_parts(body, ""))
    blocks = any(list(part.children()) for _, part in parts if part is not None)
    for names, part in parts:
        weighted = part is not None and any(p.ndim > 1 for p in part.parameters())
        yield names, bool(list(part.children())) if blocks and part is not None else weighted


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[list[str], nn.Module | None]]:
    """A module's own parameters (of no part), then its parts, lists opened."""
    own = [prefix + name for name, _ in module.named_parameters(recurse=False)]
    if own:
        yield own, None
    for name, child in module.named_children():
        if _opens(child):
            yield from _parts(child, f"{prefix}{name}.")
        elif names := [f"{prefix}{name}.{p}" for p, _ in child.named_parameters()]:
            yield names, child


def _opens(module: nn.Module) -> bool:
    """True for a mere list of parts, and for a module that has a list of blocks in it."""
    return type(module) in _LISTS or any(map(_holds_blocks, (module, *module.children())))


def _holds_blocks(module: nn.Module) -> bool:
    """True for a list of blocks of one kind.

    Convolution, norm and activation in a row are no blocks.
    """
    children = list(module.children())
    kinds = {type(child) for child in children}
    if not isinstance(module, _LISTS) or len(kinds) != 1:
        return False
    return not isinstance(children[0], _LISTS) and bool(list(children[0].children()))


def freezes(params: TrialParams) -> bool:
    """True where some layers do not train in some epochs."""
    return params.freeze_epochs + params.unfreeze_epochs > 0 or params.frozen_layers > 0


def trainable_from(epoch: int, params: TrialParams, head: int) -> int:
    """The lowest depth that trains in `epoch` (from 0); `head` is the head's own.

    The head alone for `freeze_epochs`; then more of the backbone in each of `unfreeze_epochs`,
    from its last layers to its first, in equal steps; after them everything but the share
    `frozen_layers` of the backbone's layers, which never train.
    """
    unfreezing, lowest = epoch - params.freeze_epochs, round(params.frozen_layers * head)
    if unfreezing < 0:
        return head
    steps = params.unfreeze_epochs + 1  # with the one that trains everything
    return max(head - -(-(head - lowest) * (unfreezing + 1) // steps), lowest)


def train_from(model: nn.Module, layer_ids: Mapping[str, int], lowest: int) -> None:
    """Set training mode for the layers from depth `lowest` on; those below do not change at all.

    They get no gradient, so that no optimiser touches them, and their norms keep their statistics.
    `layer_ids`: parameter name -> depth. Call it at the start of every epoch, instead of
    `model.train()`, and after the optimiser was built: that takes all parameters.
    """
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_ids[name] >= lowest)
        if not parameter.requires_grad:
            parameter.grad = None
    for name, module in model.named_modules():
        if isinstance(module, NORMS_WITH_STATISTICS) and _is_frozen(
            name, module, layer_ids, lowest
        ):
            module.eval()


def _is_frozen(name: str, norm: nn.Module, layer_ids: Mapping[str, int], lowest: int) -> bool:
    """True where a norm lies below `lowest`; one without weights until everything trains."""
    own = [layer_ids[f"{name}.{weight}"] for weight, _ in norm.named_parameters(recurse=False)]
    return max(own) < lowest if own else lowest > 0
