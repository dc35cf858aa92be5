"""Frozen layers: which train in an epoch, and a model in which the others stay as they are.

Takes the depth of every parameter (0 at the stem, the head has the highest), changes the model's
`requires_grad` flags and the mode of its norms. Gradual unfreezing: Howard and Ruder, Universal
Language Model Fine-tuning for Text Classification, ACL 2018.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from search_spaces.params import TrialParams


def trainable_from(epoch: int, params: TrialParams, head: int) -> int:
    """The lowest depth that trains in `epoch` (from 0); `head` is the head's own.

    The head alone for `freeze_epochs`; then more of the backbone in each of `unfreeze_epochs`,
    from its last layers to its first, in equal steps; everything after them.
    """
    unfreezing = epoch - params.freeze_epochs
    if unfreezing < 0:
        return head
    steps = params.unfreeze_epochs + 1  # with the one that trains everything
    return max(head - -(-head * (unfreezing + 1) // steps), 0)


def train_from(model: nn.Module, layer_ids: Mapping[str, int], lowest: int) -> None:
    """Training mode for the layers from depth `lowest` on. Those below it do not change at all:
    no gradient, so that no optimiser touches them, and norms that keep their statistics.

    `layer_ids`: parameter name -> depth. Call it at the start of every epoch, instead of
    `model.train()`, and after the optimiser was built: that takes all parameters.
    """
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(layer_ids[name] >= lowest)
        if not parameter.requires_grad:
            parameter.grad = None
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and _is_frozen(name, module, layer_ids, lowest):
            module.eval()


def _is_frozen(name: str, norm: nn.Module, layer_ids: Mapping[str, int], lowest: int) -> bool:
    """Whether a norm lies below `lowest`; one without weights until everything trains."""
    own = [layer_ids[f"{name}.{weight}"] for weight, _ in norm.named_parameters(recurse=False)]
    return max(own) < lowest if own else lowest > 0
