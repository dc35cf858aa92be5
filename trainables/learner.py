"""The parts of a trial that training changes: model, average, optimiser, schedule.

Takes a `TrialSpec` and the data's sizes, gives a `Learner`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from experiment.variants import EMA, RAW
from trainables.card import ModelCard
from trainables.classifier import build_classifier
from trainables.ema import build_ema
from trainables.layers import layer_ids
from trainables.losses import LOSSES, build_loss
from trainables.memory import StepStart
from trainables.meta_features import meta_width
from trainables.optimizers import build_optimizer
from trainables.schedules import Schedule, build_schedule
from trainables.sharpness import SharpnessAware
from trainables.spec import TrialSpec, first_micro_batch
from trainables.trial_data import TrialData

Criterion = Callable[[Tensor, Tensor], Tensor]
"""(B, C) logits and (B, C) targets -> the mean loss of the batch."""


@dataclass
class Learner:
    """What one update reads and writes."""

    accelerator: Accelerator
    model: nn.Module
    """What is trained, with everything that the accelerator put around it."""
    bare: nn.Module
    """The classifier itself, which shares its weights."""
    ema: ModelEmaV3 | None
    criterion: Criterion
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    sharpness: SharpnessAware | None
    rdrop_alpha: float
    activation: str
    layer_ids: dict[str, int] | None
    """Parameter name of `bare` -> depth, where layers are treated differently."""
    clip_grad: float | None
    micro_batch: int
    """Images on the device at once; halved when memory runs out."""
    updates: int = 0
    start: StepStart = field(init=False)
    parameters: list[nn.Parameter] = field(init=False)
    """Of the classifier, looked up once: a walk through its modules each step takes longer."""

    def __post_init__(self) -> None:
        self.start = StepStart(self.bare, self.device)
        self.parameters = list(self.bare.parameters())

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device

    def variants(self) -> dict[str, nn.Module]:
        """The models that are scored after each epoch."""
        found = {RAW: self.bare}
        return found if self.ema is None else found | {EMA: self.ema.module}


def idle_parameters(classifier: nn.Module, card: ModelCard) -> list[str]:
    """Names of those that no output depends on, found by a backward pass of two black images;
    some backbones have some. Generators and batch statistics stay as they are."""
    parameters = dict(classifier.named_parameters())
    like = next(iter(parameters.values()))
    images = like.new_zeros(2, 3, card.image_size, card.image_size)
    meta = like.new_zeros(2, meta_width(card.meta))
    classifier.eval()(images, meta).sum().backward()
    idle = [name for name, parameter in parameters.items() if parameter.grad is None]
    classifier.train().zero_grad()
    return idle


def build_learner(spec: TrialSpec, data: TrialData, accelerator: Accelerator) -> Learner:
    """The same initial weights on every device and in every process."""
    params, training = spec.params, spec.training
    classifier = build_classifier(
        data.card,
        pretrained=training.pretrained,
        dropout=params.dropout,
        drop_path=params.drop_path,
        gradient_checkpointing=training.gradient_checkpointing,
        channels_last=training.channels_last,
    ).to(accelerator.device)
    if training.channels_last:
        classifier = classifier.to(memory_format=torch.channels_last)  # as the images come
    ema = build_ema(classifier, params.ema_decay)
    by_layer = params.layer_decay < 1 or params.freeze_epochs + params.unfreeze_epochs > 0
    depths = layer_ids(classifier) if by_layer else None
    optimizer = build_optimizer(classifier, params, depths)
    schedule = build_schedule(optimizer, params, len(data.batches), params.epochs)
    sharpness = SharpnessAware(optimizer, params.sam_rho) if params.sam_rho > 0 else None
    if accelerator.num_processes > 1 and idle_parameters(classifier, data.card):
        accelerator.ddp_handler.find_unused_parameters = True  # else the second update fails
    trained = torch.compile(classifier) if training.compile else classifier
    model = accelerator.prepare(trained)
    if accelerator.scaler is not None:  # fp16; else the wrapper only looks for packages each step
        optimizer = accelerator.prepare(optimizer)
    return Learner(
        accelerator=accelerator,
        model=model,
        bare=classifier,
        ema=ema,
        criterion=build_loss(params, data.class_counts, accelerator.device),
        optimizer=optimizer,
        schedule=schedule,
        sharpness=sharpness,
        rdrop_alpha=params.rdrop_alpha,
        activation=LOSSES[params.loss].activation,
        layer_ids=depths,
        clip_grad=training.clip_grad,
        micro_batch=first_micro_batch(spec, accelerator.num_processes),
    )
