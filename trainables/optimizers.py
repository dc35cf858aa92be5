"""Optimisers by name: those of the table, and what timm and pytorch-optimizer offer.

Takes a model and the hyperparameters, gives a torch optimiser over parameter groups: biases, norms,
scales and embeddings of positions without weight decay, the head with a learning rate of its own,
and with layer decay one learning rate a layer.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from timm.optim import (  # type: ignore[attr-defined]
    create_optimizer_v2,
    get_optimizer_class,
    list_optimizers,
)
from torch import nn

from foldrace.config.hyperparameters import TrialParams
from foldrace.core.errors import Problem
from foldrace.core.plugins import NO_PARTS, Parts, Table
from foldrace.core.synonyms import closest

Group = dict[str, Any]  # torch's own form of a parameter group


@dataclass(frozen=True)
class Optimizer:
    """One row of the table."""

    name: str
    doc: str
    source: str
    build: Callable[[list[Group], float, float], torch.optim.Optimizer]
    """(groups, lr, momentum) -> optimiser; a group's own `lr` and `weight_decay` count."""


OPTIMIZERS = Table(
    Optimizer,
    "optimiser",
    (
        Optimizer(
            "adamw", "Adam with decoupled weight decay; momentum is its first beta",
            "Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019",
            lambda groups, lr, momentum: torch.optim.AdamW(
                groups, lr=lr, betas=(momentum, 0.999), fused=True
            ),
        ),
        Optimizer(
            "sgd", "stochastic gradient descent with Nesterov's momentum",
            "Sutskever, Martens, Dahl and Hinton, On the importance of initialization and "
            "momentum in deep learning, ICML 2013",
            lambda groups, lr, momentum: torch.optim.SGD(
                groups, lr=lr, momentum=momentum, nesterov=momentum > 0
            ),
        ),
    ),
)  # fmt: skip


_SGD = (
    *("sgd", "sgdc", "sgdp", "sgdw", "csgdc", "csgdp", "csgdw"),
    *("momentum", "nesterov", "nesterovw"),
)
_POSITIONS = (".pos_embedding", ".relative_position_bias_table")

_TIMM = "timm/"
_PYTORCH_OPTIMIZER = "pytorch_optimizer/"

_REASONS = {
    "needs second derivatives, which a training step here does not compute": (
        "timm/adahessian pytorch_optimizer/adahessian pytorch_optimizer/sophiah"
    ),
    "needs the loss again in every step; take adamw": (
        "pytorch_optimizer/alig pytorch_optimizer/lbfgs"
    ),
    "steps inside the backward pass or wants the whole model, so that layers cannot have rates of "
    "their own": ("pytorch_optimizer/adalomo pytorch_optimizer/lomo pytorch_optimizer/adammini"),
    "wants the matrices in groups of their own; take timm/muon or timm/adamuon": (
        "pytorch_optimizer/adago pytorch_optimizer/adamuon pytorch_optimizer/distributedmuon "
        "pytorch_optimizer/muon pytorch_optimizer/muonclip pytorch_optimizer/normuon"
    ),
    "cannot take weights in channels-last order, as trials keep them; take timm/adamp, timm/sgdp "
    "or adamw": (
        "pytorch_optimizer/adamp pytorch_optimizer/nero pytorch_optimizer/sgdp "
        "pytorch_optimizer/swats"
    ),
    "is for matrices only, and a classifier has biases too": "pytorch_optimizer/spectralsphere",
    "is for the pairs of factors of a low-rank adapter": "pytorch_optimizer/lorarite",
    "trains only the weights of small magnitude, for adapters": "pytorch_optimizer/sara",
    "has a schedule of its own and must be told the number of updates; take "
    "pytorch_optimizer/ranger": "pytorch_optimizer/ranger21",
    "must be told the number of training images": "pytorch_optimizer/bsam",
    "keeps other weights for scoring than for training; take adamw with EMA": (
        "pytorch_optimizer/schedulefreeadamw pytorch_optimizer/schedulefreeradam "
        "pytorch_optimizer/schedulefreesgd"
    ),
    "needs the package einops": "pytorch_optimizer/demo",
    "is compiled for half a minute in every trial; take pytorch_optimizer/kron": (
        "timm/kron timm/kronc timm/kronw"
    ),
    "needs the package bitsandbytes": (
        "timm/bnbadam timm/bnbadam8bit timm/bnbadamw timm/bnbadamw8bit timm/bnbademamix "
        "timm/bnbademamix8bit timm/bnblion timm/bnblion8bit timm/bnbsgd timm/bnbsgd8bit"
    ),
    "needs the package apex": (
        "timm/fusedadam timm/fusedadamw timm/fusedlamb timm/fusednovograd timm/fusedsgd"
    ),
}

REFUSED: dict[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}
"""Name that a library lists -> why a trial cannot use it."""


def optimizer_names(parts: Parts = NO_PARTS) -> list[str]:
    """Every name that a config may give."""
    listed = [*parts[OPTIMIZERS], *_library_names()]
    return [name for name in listed if name not in REFUSED]


def check_optimizer(where: str, name: str, parts: Parts = NO_PARTS) -> Problem | None:
    """A problem where there is no such optimiser, or a trial cannot use it."""
    if name in REFUSED:
        return Problem(where, f"{name} {REFUSED[name]}")
    names = optimizer_names(parts)
    if name in names:
        return None
    near = closest(name, names) or [n for n in names if n.split("/")[-1] == name.lower()]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    rows = ", ".join(parts[OPTIMIZERS])
    allowed = f"{rows}, timm/<name> (timm.optim.list_optimizers()) or pytorch_optimizer/<name>"
    return Problem(where, f"got {name!r}; {hint}allowed: {allowed}")


def build_optimizer(
    model: nn.Module,
    params: TrialParams,
    layer_ids: Mapping[str, int] | None = None,
    parts: Parts = NO_PARTS,
) -> torch.optim.Optimizer:
    """The optimiser of `params.optimizer`; `momentum` is its momentum, or its first beta.

    `layer_ids`: see `parameter_groups`.
    """
    groups = parameter_groups(model, params, layer_ids)
    name, lr, momentum = params.optimizer, peak_lr(params), params.momentum
    rows = parts[OPTIMIZERS]
    if name in rows:
        return rows[name].build(groups, lr, momentum)
    if name.startswith(_TIMM):
        opt = name.removeprefix(_TIMM)
        extra = _momentum(get_optimizer_class(opt, bind_defaults=False), momentum)
        optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, opt=opt, lr=lr, **extra)
        return optimizer
    from pytorch_optimizer import load_optimizer  # half a second, for few trials

    make: Callable[..., Any] = load_optimizer(name.removeprefix(_PYTORCH_OPTIMIZER))
    made: torch.optim.Optimizer = make(groups, lr=lr, **_momentum(make, momentum))
    return made


def peak_lr(params: TrialParams) -> float:
    """`lr`, scaled from the batch size that it is meant for, `lr_batch`, to the one in use.

    By the square root of their ratio: Malladi, Lyu, Panigrahi and Arora, On the SDEs and Scaling
    Rules for Adaptive Gradient Algorithms, NeurIPS 2022. SGD's by the ratio itself: Goyal et al.,
    Accurate, Large Minibatch SGD, 2017.
    """
    if params.lr_batch == 0:
        return params.lr
    ratio = params.batch_size / params.lr_batch
    linear = params.optimizer.rpartition("/")[2] in _SGD
    return params.lr * (ratio if linear else math.sqrt(ratio))


def parameter_groups(
    model: nn.Module, params: TrialParams, layer_ids: Mapping[str, int] | None = None
) -> list[Group]:
    """Groups with `lr` and `weight_decay` of their own; the first ones are the head's.

    `layer_ids`: parameter name -> depth, 0 at the stem, the head has the highest. Each layer's
    rate is the next one's times `layer_decay` (Clark, Luong, Le and Manning, ELECTRA, ICLR 2020;
    Bao, Dong, Piao and Wei, BEiT, ICLR 2022). None: one rate for all. The head's own rate, that of
    `model.head`, is `head_lr` times as high. With `l2_sp`, a pull to the pretrained weights takes
    the place of the backbone's weight decay.
    """
    top = max(layer_ids.values()) if layer_ids else 0
    lr, undecayed, pulled = peak_lr(params), without_decay(model), params.l2_sp > 0
    groups: dict[tuple[bool, int, bool], Group] = {}
    for name, parameter in model.named_parameters():
        in_body = in_backbone(name)
        below_head = top - layer_ids[name] if layer_ids and params.layer_decay < 1 else 0
        decays = name not in undecayed
        empty: Group = {
            "params": [],
            "lr": lr * params.layer_decay**below_head * (1.0 if in_body else params.head_lr),
            "weight_decay": params.weight_decay if decays and not (in_body and pulled) else 0.0,
        }
        groups.setdefault((in_body, below_head, decays), empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def in_backbone(name: str) -> bool:
    """True for the name of a classifier's parameter that is not its head's."""
    return not name.startswith("head.")


def without_decay(model: nn.Module) -> set[str]:
    """Names of parameters without weight decay.

    Biases; norms, scales and gains, of which at most one dimension is above 1; what a backbone of
    timm names itself, and embeddings of positions, by the names that torchvision's have.
    """
    patterns = [  # pos_embed.* and the like
        f"{prefix}.{pattern}" if prefix else pattern
        for prefix, module in model.named_modules()
        if callable(named := getattr(module, "no_weight_decay", None))
        for pattern in named()
    ]
    return {
        name
        for name, parameter in model.named_parameters()
        if sum(side > 1 for side in parameter.shape) < 2
        or name.endswith((".bias", *_POSITIONS))
        or any(fnmatch(name, pattern) for pattern in patterns)
    }


@functools.cache
def _library_names() -> tuple[str, ...]:
    from pytorch_optimizer import get_supported_optimizers

    of_timm = (f"{_TIMM}{name}" for name in list_optimizers())
    others = (_PYTORCH_OPTIMIZER + name for name in get_supported_optimizers())
    return (*of_timm, *others)


def _momentum(make: Callable[..., Any], momentum: float) -> dict[str, Any]:
    """The argument of `make` that takes the momentum, if it has one."""
    parameters = inspect.signature(make).parameters
    if "momentum" in parameters:
        return {"momentum": momentum}
    betas = parameters["betas"].default if "betas" in parameters else None
    return {"betas": (momentum, *betas[1:])} if isinstance(betas, tuple) else {}
