"""The state of a training: model, moving average, optimiser, schedule, and settings of a step.

Takes a `FoldTrial` and its data, gives a `TrainState`, which `step.train_step` works on.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from foldrace.config.hyperparameters import TrialParams
from foldrace.run_folder.variants import EMA, RAW
from foldrace.trainables.data.trial_data import TrialData
from foldrace.trainables.l2_sp import StartingPoint
from foldrace.trainables.losses import Distillation, build_loss
from foldrace.trainables.models.classifier import Classifier, build_classifier
from foldrace.trainables.models.layers import freezes, layer_ids
from foldrace.trainables.models.stoch_norm import make_stochastic
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.schedules import Schedule, build_schedule
from foldrace.trainables.spec import FoldTrial, first_micro_batch
from foldrace.trainables.step import StepSnapshot

_log = logging.getLogger("foldrace")


def ema_decay(epochs: float, updates_per_epoch: int) -> float:
    """Decay per update of an average in which an update's weight falls to 1/e after `epochs`.

    0 for 0 epochs.
    """
    return math.exp(-1.0 / (epochs * updates_per_epoch)) if epochs > 0 else 0.0


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """The moving average of a model's weights, or None where `decay` is 0.

    After u updates the decay is 1 - u^(-2/3), at most `decay`: the first update copies the weights,
    so that short runs do not keep the initial ones. Tarvainen and Valpola, Mean teachers are better
    role models, NeurIPS 2017, with timm's warm-up of the decay.
    """
    return _MovingAverage(model, decay) if decay > 0 else None


class _MovingAverage(ModelEmaV3):
    """timm's average, with the tensors looked up once, at the first update.

    A walk through two state dicts at every update takes several times as long as the averaging.
    torch's `_foreach` functions are private, but timm's own average uses them too. Not earlier:
    Accelerate gives the weights other memory where it prepares a model for several CPU processes.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True)
        self._averaged: list[tuple[Tensor, Tensor]] = []
        self._copied: list[tuple[Tensor, Tensor]] = []

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """Average in place; `model` is the same one each time, and stays where it is."""
        if not (self._averaged or self._copied):
            states = self.module.state_dict().values(), model.state_dict().values()
            for pair in zip(*states, strict=True):
                (self._averaged if pair[0].is_floating_point() else self._copied).append(pair)
        if self._averaged:
            own, given = zip(*self._averaged, strict=True)
            torch._foreach_lerp_(own, given, 1.0 - decay)
        if self._copied:
            own, given = zip(*self._copied, strict=True)
            torch._foreach_copy_(own, given)


Criterion = Callable[[Tensor, Tensor], Tensor]
"""(B, C) logits and (B, C) targets -> the mean loss of the batch."""


@dataclass
class TrainState:
    """Everything that one optimiser step reads and writes."""

    accelerator: Accelerator
    model: nn.Module
    """The classifier with everything that compiler and accelerator put around it."""
    bare: nn.Module
    """The classifier itself, which shares its weights."""
    ema: ModelEmaV3 | None
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    sam_rho: float
    """Distance to the perturbed weights of SAM; 0: none."""
    rdrop_alpha: float
    activation: str
    """The loss's own row of `ACTIVATIONS`."""
    layer_ids: dict[str, int] | None
    """Parameter name of `bare` -> depth, where layers are treated differently."""
    clip_grad: float | None
    """Largest norm of the gradients, or None."""
    micro_batch: int
    """Images on the device at once; halved when memory runs out."""
    start: StartingPoint | None = None
    """What the backbone's weights are pulled to."""
    distillation: Distillation | None = None
    """What a student learns from its teacher, beside its own loss."""
    updates: int = 0
    """Optimiser steps so far."""
    before_step: StepSnapshot = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)
    """The classifier's, looked up once: a walk through its modules each step takes longer."""

    def __post_init__(self) -> None:
        self.before_step = StepSnapshot(self.bare, self.device)
        self.parameters = list(self.bare.parameters())

    @property
    def device(self) -> torch.device:
        """The device that trains."""
        device: torch.device = self.accelerator.device
        return device

    def variants(self) -> dict[str, nn.Module]:
        """The models that are scored after each epoch."""
        found = {RAW: self.bare}
        return found if self.ema is None else found | {EMA: self.ema.module}


def idle_parameters(classifier: Classifier, image_size: int) -> list[str]:
    """Names of parameters that no output depends on; some backbones have some.

    Found by a backward pass of two black images; generators and batch statistics stay.
    """
    parameters = dict(classifier.named_parameters())
    like = next(iter(parameters.values()))
    images = like.new_zeros(2, 3, image_size, image_size)
    meta = like.new_zeros(2, classifier.meta_width)
    classifier.eval()(images, meta).sum().backward()
    idle = [name for name, parameter in parameters.items() if parameter.grad is None]
    classifier.train().zero_grad()
    return idle


def build_train_state(trial: FoldTrial, data: TrialData, accelerator: Accelerator) -> TrainState:
    """A new state, with the same initial weights on every device and in every process."""
    params, parts = trial.params, data.parts
    classifier = build_classifier(
        data.model_config,
        pretrained=params.pretrained,
        dropout=params.dropout,
        drop_path=params.drop_path,
        gradient_checkpointing=params.gradient_checkpointing,
        channels_last=params.channels_last,
        parts=parts,
    ).to(accelerator.device)
    if params.channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)  # as the images come
    if params.stoch_norm > 0 and make_stochastic(classifier, params.stoch_norm) == 0:
        _log.warning("stoch_norm does nothing: %s has no batch norms", trial.candidate.backbone)
    ema = build_ema(classifier, ema_decay(params.ema_epochs, len(data.batches)))
    by_layer = params.layer_decay < 1 or freezes(params)
    depths = layer_ids(classifier) if by_layer else None
    optimizer = build_optimizer(classifier, params, depths, parts)
    start = StartingPoint(classifier, optimizer, params.l2_sp) if params.l2_sp > 0 else None
    schedule = build_schedule(optimizer, params, len(data.batches), params.epochs, parts)
    if accelerator.num_processes > 1 and idle_parameters(classifier, params.image_size):
        accelerator.ddp_handler.find_unused_parameters = True  # else the second update fails
    trained = torch.compile(classifier) if params.compile else classifier
    model = accelerator.prepare(trained)
    if accelerator.scaler is not None:  # fp16; else the wrapper only looks for packages each step
        optimizer = accelerator.prepare(optimizer)
    return TrainState(
        accelerator=accelerator,
        model=model,
        bare=classifier,
        ema=ema,
        criterion=build_loss(params, data.class_counts, accelerator.device, parts),
        optimizer=optimizer,
        schedule=schedule,
        sam_rho=params.sam_rho,
        rdrop_alpha=params.rdrop_alpha,
        activation=data.model_config.activation,
        layer_ids=depths,
        clip_grad=params.clip_grad or None,
        micro_batch=first_micro_batch(trial, accelerator.num_processes),
        start=start,
        distillation=_distillation(params, data),
    )


def _distillation(params: TrialParams, data: TrialData) -> Distillation | None:
    """None for a candidate that has no teacher."""
    if data.soft is None:
        return None
    activation = data.model_config.activation
    return Distillation(params.distill_alpha, params.distill_temperature, activation)
