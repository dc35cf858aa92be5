"""The parts of a trial that training changes: model, average, optimiser, schedule.

Takes a `TrialSpec` and the data's sizes, gives a `Learner`.

The exponential moving average of a model's weights, updated after every optimiser step.

Sharpness-aware minimisation: the gradient is taken where the loss is worst nearby.

Takes an optimiser whose parameters hold gradients, moves the weights there and back. Foret,
Kleiner, Mobahi and Neyshabur, Sharpness-Aware Minimization for Efficiently Improving
Generalization, ICLR 2021. pytorch-optimizer's SAM builds its base optimiser itself, keeps the old
weights in that one's state and cannot go back without a step; so the tests compare with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from foldrace.run_folder.records import EMA, RAW
from foldrace.trainables.data.meta_features import meta_width
from foldrace.trainables.data.trial_data import TrialData
from foldrace.trainables.losses import LOSSES, build_loss
from foldrace.trainables.memory import StepStart
from foldrace.trainables.models.classifier import ModelCard, build_classifier
from foldrace.trainables.models.layers import NORMS_WITH_STATISTICS, layer_ids
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.schedules import Schedule, build_schedule
from foldrace.trainables.spec import TrialSpec, first_micro_batch


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3 | None:
    """None where `decay` is 0. After u updates the decay is 1 - u^(-2/3), at most `decay`: the
    first update copies the weights, so that short runs do not keep the initial ones."""
    return _Average(model, decay) if decay > 0 else None


class _Average(ModelEmaV3):
    """timm's, but the tensors are looked up once: a walk through two state dicts at every update
    takes several times as long as the averaging."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, decay=decay, use_warmup=True)
        own, given = self.module.state_dict().values(), model.state_dict().values()
        pairs = list(zip(own, given, strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        """`model` is the one that this was built for, on the device where it was then."""
        if self._averaged:
            own, given = zip(*self._averaged, strict=True)
            torch._foreach_lerp_(own, given, 1.0 - decay)
        if self._copied:
            own, given = zip(*self._copied, strict=True)
            torch._foreach_copy_(own, given)


class SharpnessAware:
    """Around any optimiser, for one update:

    gradients at the weights; `perturb()`; gradients again, inside `kept_statistics(model)`;
    `restore()`; the optimiser's own step. With bf16 or fp32 only: fp16 scales gradients.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rho: float) -> None:
        self._optimizer, self._rho = optimizer, rho
        self._moved: list[Tensor] = []
        self._before: list[Tensor] = []

    @torch.no_grad()
    def perturb(self) -> None:
        """Weights w -> w + rho g / |g|, the norm over all gradients; the gradients are cleared."""
        groups = self._optimizer.param_groups
        self._moved = [p for group in groups for p in group["params"] if p.grad is not None]
        self._before = [p.clone() for p in self._moved]
        gradients = [p.grad for p in self._moved if p.grad is not None]
        scale = self._rho / (get_total_norm(gradients) + 1e-12)
        torch._foreach_add_(self._moved, torch._foreach_mul(gradients, scale))
        self._optimizer.zero_grad()

    @torch.no_grad()
    def restore(self) -> None:
        """The weights before `perturb`, bit for bit; also after an error in between."""
        if self._moved:
            torch._foreach_copy_(self._moved, self._before)
        self._moved, self._before = [], []


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norms normalise by the batch but do not learn from it: an image is counted
    once an update, and at the weights that it is scored with."""
    norms = [
        module
        for module in model.modules()
        if isinstance(module, NORMS_WITH_STATISTICS)
        and module.training
        and module.track_running_stats
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


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
