"""Optimiser and learning-rate schedule of a trial: warm-up, cosine."""

from __future__ import annotations

import torch
from timm.optim import param_groups_weight_decay  # type: ignore[attr-defined]
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn

from search_spaces.params import TrialParams
from trainables.optimizer_table import OPTIMIZERS

_FINAL_LR = 0.01  # of the peak, at the end of the cosine


def build_optimizer(model: nn.Module, params: TrialParams) -> torch.optim.Optimizer:
    """That of `params.optimizer`; biases and norms are not decayed."""
    groups = param_groups_weight_decay(model, params.weight_decay)
    return OPTIMIZERS[params.optimizer].build(groups, params.lr, params.momentum)


def build_schedule(
    optimizer: torch.optim.Optimizer, params: TrialParams, updates: int
) -> CosineLRScheduler:
    """Linear warm-up, then cosine to 1 % of the peak after `updates` updates; call
    `step_update(number of updates done)` after each. (Loshchilov and Hutter, SGDR, ICLR 2017.)"""
    return CosineLRScheduler(
        optimizer,
        t_initial=updates,
        lr_min=params.lr * _FINAL_LR,
        warmup_t=min(round(params.warmup * updates), updates - 1),
        warmup_lr_init=params.lr * _FINAL_LR,
        warmup_prefix=False,
        t_in_epochs=False,
    )
