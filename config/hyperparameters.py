"""Every hyperparameter, once: name, type, default, limits, default search range, unit, meaning.

`TrialParams` is what a trial trains with; `KNOBS` is the same list as a table, for the config's
sections, the search space, the documentation and the error messages.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from foldrace.config.ranges import (
    Choice,
    Float,
    Int,
    Limits,
    Name,
    Range,
    Seconds,
    Switch,
    Value,
    is_number,
    seconds,
    shown,
)
from foldrace.core.synonyms import did_you_mean

Section = Literal["training", "augment"]


@dataclass(frozen=True)
class Knob:
    """One hyperparameter."""

    name: str
    default: Value
    limits: Limits
    """Values that anybody may ask for."""
    search: Range | None
    """Range of a config that says `search`."""
    unit: str
    doc: str
    searched_by_default: bool
    """True: searched even where the config does not name it."""
    section: Section
    """Section of the config in which its fixed value may stand."""
    null: Value | None
    """Meaning of `null` there; None: it has none."""
    changes_result: bool
    """False: it changes how a trial is computed, not what is trained."""
    by_situation: bool
    """True where the search space chooses the value that the config leaves open."""

    @property
    def left_open(self) -> bool:
        """True where a config that does not name it fixes nothing."""
        return self.searched_by_default or self.by_situation

    @property
    def whole(self) -> bool:
        """True where only whole numbers make sense."""
        return isinstance(self.limits, Int)

    @property
    def named(self) -> bool:
        """True where the value is a table's row, not a number."""
        return isinstance(self.limits, Name)

    @property
    def numeric(self) -> bool:
        """True where it may be searched by low and high."""
        return isinstance(self.limits, (Float, Int))

    def cast(self, value: Value) -> Value:
        """An allowed value in the knob's own type."""
        match self.limits:
            case Int():
                return int(value)
            case Float():
                return float(value)
            case _:
                return value

    def read(self, value: object, more: str = "") -> Value:
        """A value as the config has it, in the knob's own type; ValueError where it is not allowed.

        The error says what was given and what is allowed: a value, or `more`.
        """
        if value is None and self.null is not None:
            return self.null
        if isinstance(self.limits, Seconds) and isinstance(value, str):
            with contextlib.suppress(ValueError):  # the text itself is refused below
                value = seconds(value)
        if isinstance(value, (bool, int, float, str)) and self.limits.contains(value):
            return self.cast(value)
        if self.numeric and not is_number(value):
            given = repr(value) if isinstance(value, str) else shown(value)
            times = ", or a text such as 90s or 5m" if isinstance(self.limits, Seconds) else ""
            raise ValueError(
                f"got {given}; allowed: a number, {self.limits}{times}{more} ({self.doc})"
            )
        names = [str(v) for v in self.limits.values] if isinstance(self.limits, Choice) else []
        hint = did_you_mean(str(value), names)
        raise ValueError(f"got {shown(value)}; {hint}allowed: {self.limits} ({self.doc})")


def _knob(
    default: Value,
    limits: Limits,
    search: Range | None,
    unit: str,
    doc: str,
    *,
    searched_by_default: bool = False,
    section: Section = "training",
    null: Value | None = None,
    changes_result: bool = True,
    by_situation: bool = False,
) -> Any:
    record = {
        "limits": limits,
        "search": search,
        "unit": unit,
        "doc": doc,
        "searched_by_default": searched_by_default,
        "section": section,
        "null": null,
        "changes_result": changes_result,
        "by_situation": by_situation,
    }
    return field(default=default, metadata=record)


_EITHER = Choice((False, True))
_POLICIES = Choice(("none", "light", "medium", "heavy", "randaugment", "trivialaugment"))
_RESIZES = Choice(("squash", "pad", "crop"))


@dataclass(frozen=True)
class TrialParams:
    """The hyperparameters of one candidate."""

    lr: float = _knob(
        1e-3, Float(1e-7, 1.0), Float(1e-4, 5e-3, log=True), "per update",
        "peak learning rate", searched_by_default=True,
    )  # fmt: skip
    weight_decay: float = _knob(
        0.02, Float(0.0, 1.0), Float(1e-3, 0.2, log=True), "per update",
        "weight decay; biases, norms, scales and embeddings of positions have none",
        searched_by_default=True,
    )  # fmt: skip
    warmup: float = _knob(
        0.1, Float(0.0, 0.9), Float(0.0, 0.3), "fraction of all updates",
        "linear learning-rate warm-up before the schedule", searched_by_default=True,
    )  # fmt: skip
    head_lr: float = _knob(
        1.0, Float(0.01, 1000.0), Float(0.5, 30.0, log=True), "factor",
        "learning rate of the head relative to `lr`", searched_by_default=True,
    )  # fmt: skip
    lr_batch: int = _knob(
        0, Int(0, 65_536), None, "images per update",
        "batch size that `lr` is meant for: others scale it by the square root of "
        "batch_size/lr_batch (sgd: by it); 0: lr is as given; 32 where batch_size is searched",
        by_situation=True,
    )  # fmt: skip
    batch_size: int = _knob(
        32, Int(1, 65_536), None, "images per update",
        "effective batch size, whatever the micro-batch",
    )  # fmt: skip
    dropout: float = _knob(
        0.1, Float(0.0, 0.95), Float(0.0, 0.5), "probability",
        "dropout in front of the classifier", searched_by_default=True,
    )  # fmt: skip
    drop_path: float = _knob(
        0.0, Float(0.0, 0.9), Float(0.0, 0.2), "probability",
        "stochastic depth of the last block, rising linearly; backbones without it ignore this",
        searched_by_default=True,
    )  # fmt: skip
    mixup_alpha: float = _knob(
        0.2, Float(0.0, 10.0), Float(0.1, 1.0), "of Beta(alpha, alpha)",
        "MixUp strength; 0 turns it off", searched_by_default=True, section="augment",
    )  # fmt: skip
    mixup_prob: float = _knob(
        0.5, Float(0.0, 1.0), Float(0.0, 1.0), "probability per batch",
        "how often a batch is mixed", searched_by_default=True, section="augment",
    )  # fmt: skip
    cutmix_alpha: float = _knob(
        1.0, Float(0.0, 10.0), Float(0.2, 1.0), "of Beta(alpha, alpha)",
        "CutMix: distribution of the area that is left; 0 turns it off", section="augment",
    )  # fmt: skip
    cutmix_prob: float = _knob(
        0.0, Float(0.0, 1.0), Float(0.0, 0.5), "probability per batch",
        "how often a batch is cut and mixed; MixUp's share comes first, both together at most 1",
        section="augment",
    )  # fmt: skip
    mix_off: float = _knob(
        0.1, Float(0.0, 1.0), Float(0.0, 0.3), "fraction of all epochs",
        "epochs at the end without MixUp and CutMix", section="augment",
    )  # fmt: skip
    label_smoothing: float = _knob(
        0.0, Float(0.0, 0.9), Float(0.0, 0.1), "probability mass",
        "mass moved from the true class to all classes evenly", searched_by_default=True,
    )  # fmt: skip
    ema_epochs: float = _knob(
        0.5, Float(0.0, 1000.0), Float(0.1, 3.0, log=True), "epochs",
        "reach of the weight average, whose decay is warmed up; 0 turns the EMA variant off",
    )  # fmt: skip
    optimizer: str = _knob(
        "adamw", Name(), None, "name",
        "adamw, sgd, timm/<name> or pytorch_optimizer/<name>",
    )  # fmt: skip
    momentum: float = _knob(
        0.9, Float(0.0, 0.9999), Float(0.8, 0.99), "fraction",
        "momentum of SGD (Nesterov's), first beta of Adam's family",
    )  # fmt: skip
    layer_decay: float = _knob(
        1.0, Float(0.1, 1.0), Float(0.5, 1.0), "factor per layer",
        "learning rate of each layer relative to the next one; 1 turns it off",
        searched_by_default=True,
    )  # fmt: skip
    schedule: str = _knob(
        "cosine", Name(), None, "name",
        "learning-rate schedule after the warm-up",
    )  # fmt: skip
    cycles: int = _knob(
        1, Int(1, 100), Int(1, 6), "per trial",
        "cosine: number of equal cycles, with a warm restart before each but the first",
    )  # fmt: skip
    lr_factor: float = _knob(
        0.1, Float(0.001, 0.99), Float(0.1, 0.5), "factor",
        "step, plateau: the learning rate is multiplied by this",
    )  # fmt: skip
    lr_patience: int = _knob(
        3, Int(1, 1000), Int(1, 10), "epochs",
        "step: epochs between two steps; plateau: epochs without a lower calibrated log loss",
    )  # fmt: skip
    sam_rho: float = _knob(
        0.0, Float(0.0, 2.0), Float(0.01, 0.2, log=True), "norm of the perturbation",
        "sharpness-aware minimisation; 0 turns it off",
    )  # fmt: skip
    rdrop_alpha: float = _knob(
        0.0, Float(0.0, 50.0), Float(0.1, 5.0, log=True), "weight of the divergence",
        "R-Drop: two passes with different dropout must agree; 0 turns it off",
    )  # fmt: skip
    distill_alpha: float = _knob(
        0.0, Float(0.0, 1.0), Float(0.3, 0.95), "share of the loss",
        "how much a student learns from its teacher's soft labels, the rest from its own loss; "
        "needs a teacher: `foldrace distill DIR`; 0: no student",
    )  # fmt: skip
    distill_temperature: float = _knob(
        2.0, Float(0.1, 100.0), Float(1.0, 10.0, log=True), "divides logits",
        "distill_alpha: temperature of the teacher's and the student's probabilities in their "
        "divergence, which is scaled by its square",
    )  # fmt: skip
    loss: str = _knob(
        "cross_entropy", Name(), None, "name",
        "training loss",
    )  # fmt: skip
    focal_gamma: float = _knob(
        2.0, Float(0.0, 10.0), Float(0.5, 4.0), "exponent",
        "focal: how much less easy images count",
    )  # fmt: skip
    focal_alpha: float = _knob(
        1.0, Float(0.01, 1.0), Float(0.25, 1.0), "factor",
        "focal: scale of the loss",
    )  # fmt: skip
    class_weights: str = _knob(
        "none", Name(), None, "name",
        "how much the images of rare classes count in the loss",
    )  # fmt: skip
    class_weight_beta: float = _knob(
        0.999, Float(0.0, 0.999999), Float(0.9, 0.9999), "overlap",
        "class_weights effective: 0 weighs all classes equally, near 1 by inverse frequency",
    )  # fmt: skip
    head: str = _knob(
        "linear", Name(), None, "name",
        "classifier on the pooled features",
    )  # fmt: skip
    freeze_epochs: int = _knob(
        0, Int(0, 10_000), Int(0, 5), "epochs",
        "epochs at the start in which only the head is trained",
    )  # fmt: skip
    unfreeze_epochs: int = _knob(
        0, Int(0, 10_000), Int(0, 10), "epochs",
        "epochs after freeze_epochs over which the backbone is unfrozen, last layers first",
    )  # fmt: skip
    frozen_layers: float = _knob(
        0.0, Float(0.0, 1.0), Float(0.0, 0.8), "share of the backbone's layers",
        "layers from the first one on that never train",
    )  # fmt: skip
    l2_sp: float = _knob(
        0.0, Float(0.0, 1.0), Float(1e-4, 0.1, log=True), "per update",
        "pull of the backbone's weights to the pretrained ones, in place of its weight decay; 0 "
        "turns it off",
    )  # fmt: skip
    stoch_norm: float = _knob(
        0.0, Float(0.0, 1.0), Float(0.0, 0.75), "probability per channel",
        "batch norms take moving statistics in training, not the batch's; backbones without batch "
        "norms ignore this",
    )  # fmt: skip
    policy: str = _knob(
        "light", Name(), _POLICIES, "name",
        "augmentation policy", searched_by_default=True, section="augment",
    )  # fmt: skip
    flip: float = _knob(
        0.0, Float(0.0, 1.0), Choice((0.0, 0.5)), "probability per image",
        "horizontal flip; 0 where left and right differ: digits, letters",
        searched_by_default=True, section="augment",
    )  # fmt: skip
    random_erasing: float = _knob(
        0.0, Float(0.0, 1.0), Float(0.0, 0.5), "probability per image",
        "a rectangle of the image is replaced by noise", section="augment",
    )  # fmt: skip
    size_start: float = _knob(
        1.0, Float(0.25, 1.0), Float(0.5, 1.0), "fraction of image_size",
        "side of the training images in the first epoch, growing to the whole; 1 turns it off",
    )  # fmt: skip
    snapshots: int = _knob(
        0, Int(0, 20), Int(0, 5), "weights kept",
        "further variants: the epochs before the last one; with cycles the ends of earlier cycles",
    )  # fmt: skip
    image_size: int = _knob(
        224, Int(16, 2048), None, "pixels",
        "side of the square image that the model sees; searched by choices",
    )  # fmt: skip
    resize: str = _knob(
        "squash", _RESIZES, _RESIZES, "name",
        "how an image becomes square: squash its longer side, pad its shorter side, or crop the "
        "middle (in training a random place)",
    )  # fmt: skip
    epochs: int = _knob(
        30, Int(1, 10_000), None, "passes over the training folds",
        "length of the learning-rate schedule; the weights after the last one are kept",
    )  # fmt: skip
    precision: str = _knob(
        "auto", Choice(("auto", "fp32", "bf16", "fp16")), None, "name",
        "auto: bf16 or fp16 on a GPU, fp32 on a CPU; searched by choices",
    )  # fmt: skip
    pretrained: bool | str = _knob(
        True, Switch(or_path=True), _EITHER, "switch",
        "weights from the hub, from scratch, or of a weights file or a folder of "
        "`<backbone name>.safetensors`",
    )  # fmt: skip
    clip_grad: float = _knob(
        1.0, Float(0.0, 1e6), Float(0.1, 10.0, log=True), "norm",
        "largest global gradient norm; 0 (or null) turns clipping off", null=0.0,
    )  # fmt: skip
    micro_batch: int = _knob(
        0, Int(0, 65_536), None, "images",
        "images on the device at once, larger batches accumulate gradients over several (batch "
        "norms see each alone); 0 (or null): the whole batch, halved when memory runs out",
        null=0, changes_result=False,
    )  # fmt: skip
    gradient_checkpointing: bool = _knob(
        False, Switch(), _EITHER, "switch",
        "compute activations twice instead of keeping them: less memory, a third more time",
        changes_result=False,
    )  # fmt: skip
    channels_last: bool = _knob(
        True, Switch(), _EITHER, "switch",
        "memory format of weights and images; a few backbones are faster without",
        changes_result=False,
    )  # fmt: skip
    compile: bool = _knob(
        False, Switch(), _EITHER, "switch",
        "torch.compile: pays off in long trials on GPUs, costs a minute at each trial's start",
        changes_result=False,
    )  # fmt: skip
    save_every: float = _knob(
        60.0, Seconds(0.0, 1e7), None, "seconds",
        "least time between two saved states of a trial, each at the end of an epoch; an "
        "interrupted trial continues from the last one", changes_result=False,
    )  # fmt: skip

    def as_dict(self) -> dict[str, Value]:
        """Name -> value, in the order of the fields."""
        return {name: getattr(self, name) for name in KNOBS}

    def changed(self) -> dict[str, Value]:
        """Name -> value of those that differ from their defaults and change what is learnt."""
        return {
            name: value
            for name, value in self.as_dict().items()
            if value != KNOBS[name].default and KNOBS[name].changes_result
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Value]) -> TrialParams:
        """Hyperparameters from name -> value; those not given take their defaults."""
        cast: dict[str, Any] = {name: KNOBS[name].cast(value) for name, value in values.items()}
        return cls(**cast)


KNOBS: dict[str, Knob] = {
    f.name: Knob(name=f.name, default=f.default, **f.metadata)  # type: ignore[arg-type]
    for f in fields(TrialParams)
}


def fold_trial_seed(seed: int, backbone: str, params: TrialParams, fold: int) -> int:
    """Random seed of a fold trial, in [0, 2^31), from the search's `seed`.

    A function of what is trained, not of when: the same candidate and fold train alike in whatever
    order and process the trials run. Hyperparameters at their defaults do not count, so that a new
    one changes no seed, nor those that only change how it is computed.
    """
    key = json.dumps([seed, backbone, params.changed(), fold], sort_keys=True)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) >> 1
