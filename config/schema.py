"""The sweep's configuration: frozen records, one a section of the YAML or JSON file.

`foldrace.config.load` is the only reader of such files, `foldrace.config.problems` words what
is wrong with one.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    """Seconds from '90m', '1.5h', '45s', '2d' or a number of seconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", value)
    if match is None:
        raise ValueError("should be seconds, or a number with s, m, h or d, such as 90m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Places of the images, labels and test images; paths are relative to the config file."""

    train: str
    """A CSV of image paths and labels, a folder with one folder per class, or a zip of either."""
    train_images: str | None = None
    """Folder or zip that the CSV's image paths are relative to. Default: the CSV's folder."""
    image_column: str = "image_path"
    label_column: str = "target"
    group_column: str | None = None
    """Rows of one group (a patient, a vehicle) never lie on both sides of a fold."""
    max_per_class: Annotated[int, Field(ge=1)] | None = None
    """Use only the first images of each class, at most this many: to try things out."""
    test: str | None = None
    """A CSV with ids and image paths, a folder of images, or a zip of it."""
    test_images: str | None = None
    test_image_column: str | None = None
    """Default: `image_column`."""
    test_id_column: str | None = None
    """Default: the first column of the sample submission, else the first column of the test CSV."""
    sample_submission: str | None = None


class FoldsConfig(_Section):
    """Split of the training rows into folds."""

    k: Annotated[int, Field(ge=1, le=100)] = 5
    """Number of folds; 1 means one fixed validation split of `valid_fraction`."""
    seed: Annotated[int, Field(ge=0)] = 42
    column: str | None = None
    """A CSV column that already gives each row's fold (0 .. k-1; with k: 1 `train`, `valid`,
    `test`)."""
    valid_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """k: 1 only: fraction of rows, of groups where there are groups."""
    test_fraction: Fraction = 0.0
    """k: 1 only: fraction that no trial sees; the blend is scored on it once."""

    @model_validator(mode="after")
    def _fractions_leave_training_rows(self) -> FoldsConfig:
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"valid_fraction + test_fraction = {self.valid_fraction + self.test_fraction:g} "
                "leaves no training rows; allowed: a sum below 1"
            )
        return self


def _form(value: object) -> str | None:
    """The branch of a union that a value is meant for, so that it gets that branch's message."""
    if isinstance(value, bool):
        return "<bool>"
    if isinstance(value, (int, float)):
        return "<number>"
    if isinstance(value, str):
        return "<text>"
    return "<range>" if isinstance(value, (dict, BaseModel)) else None


ValueConfig = Annotated[
    Annotated[float, Tag("<number>")] | Annotated[str, Tag("<text>")],
    Discriminator(
        _form, custom_error_type="form", custom_error_message="should be a number or a name"
    ),
]


class RangeConfig(_Section):
    """Values of a hyperparameter in the search: low/high (with `log`), or `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool | None = None
    choices: Annotated[tuple[ValueConfig, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> RangeConfig:
        bounds = (self.low is not None) + (self.high is not None)
        if self.choices is not None and bounds:
            raise ValueError("takes low and high, or choices, not both")
        if self.choices is None and bounds == 0:
            raise ValueError("needs low and/or high, or choices")
        return self


SEARCH = "search"
_KNOB_FORMS = (
    "should be a number, a name, `search`, {low, high[, log]} or {choices: [...]}, as the "
    "hyperparameter asks"
)
KnobConfig = Annotated[
    Annotated[float, Tag("<number>")]
    | Annotated[str, Tag("<text>")]
    | Annotated[RangeConfig, Tag("<range>")],
    Discriminator(
        _form,
        custom_error_type="form",
        custom_error_message=_KNOB_FORMS,
    ),
]
PretrainedConfig = Annotated[
    Annotated[bool, Tag("<bool>")] | Annotated[str, Tag("<text>")],
    Discriminator(
        _form,
        custom_error_type="form",
        custom_error_message="should be true, false or the path of a weights file or folder",
    ),
]


class PointConfig(_Section):
    """One candidate given by hand; hyperparameters not named take their defaults."""

    backbone: str
    params: dict[str, ValueConfig] = {}


class SearchConfig(_Section):
    """The search: backbones, hyperparameters, sampler and length."""

    backbones: Annotated[tuple[str, ...], Field(min_length=1)]
    candidates: Annotated[int, Field(ge=1)] = 20
    """Number of candidates (backbone + hyperparameters) started, each with up to k folds."""
    fold_trials: Annotated[int, Field(ge=1)] | None = None
    """Largest number of fold trials that are started, of all candidates together."""
    sampler: Literal["tpe", "random", "gp", "grid", "list"] = "tpe"
    """`list` takes `points` alone."""
    objective: Literal["logloss", "gain"] = "logloss"
    """Value that the sampler learns from: a candidate's own pooled OOF log loss, or its gain over
    the race's blend when it ended."""
    points: tuple[PointConfig, ...] = ()
    """Candidates given by hand, before the sampler's own."""
    warm_start: tuple[str, ...] = ()
    """Earlier run folders whose candidates the sampler learns from; none is trained again."""
    storage: str | None = None
    """URL of a database (`postgresql://user:password@host/name`) for Optuna's view of the sweep,
    instead of `study.journal` in the run folder."""
    min_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    """This fraction of the candidates is shared evenly among the backbones; of the others a
    backbone gets the more, the more its candidates have brought the race's blend."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    space: dict[str, KnobConfig] = {}
    """Hyperparameter -> a fixed value, `search` (its default range), or a range."""
    per_backbone: dict[str, dict[str, KnobConfig]] = {}
    """Backbone -> the same, for that backbone only."""

    @property
    def most_candidates(self) -> int:
        """Largest number of candidates that can be started: a list has no more than its points."""
        if self.sampler == "list":
            return min(self.candidates, len(self.points))
        return self.candidates


class RaceConfig(_Section):
    """The race: when a candidate gets no further folds."""

    rule: Literal["gain", "forgiving", "none"] = "gain"
    """gain: it must add to the blend of the complete candidates. forgiving: its mean log loss must
    be below the worst fold of the best complete candidate. none: every candidate gets all folds."""
    z: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    """gain: how many standard errors below zero the gain may be before the candidate is stopped."""
    eta: Annotated[int, Field(ge=1)] = 4
    """gain: one in `eta` of the candidates whose first fold was measured gets all its folds, the
    most promising first; the others wait until nothing promises more."""
    epoch_stopping: bool | None = None
    """First folds may be parked in mid-training. Default: with the rule gain."""
    grace: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.25
    """Fraction of its own schedule that a trial has before it may be parked in mid-training."""
    reduction: Annotated[int, Field(ge=2)] = 2
    """In mid-training the best 1/reduction of a rung goes on whatever its gain; the next rung is
    at `reduction` times the fraction."""
    parked_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 20.0
    """10^9 bytes that the saved states of parked trials may take; beyond them the least promising
    candidates are stopped for good."""

    @model_validator(mode="after")
    def _epochs_are_judged_by_gain(self) -> RaceConfig:
        if self.epoch_stopping and self.rule != "gain":
            raise ValueError(
                f"epoch_stopping: true goes with rule: gain, not with rule: {self.rule}"
            )
        return self

    @property
    def stops_epochs(self) -> bool:
        """True where first folds may be parked in mid-training."""
        return self.rule == "gain" and self.epoch_stopping is not False


class TrainingConfig(_Section):
    """Settings that every trial shares."""

    epochs: Annotated[int, Field(ge=1)] = 30
    image_size: Annotated[int, Field(ge=16, le=2048)] = 224
    """Pixels; images are square on the way into the model."""
    patience: Annotated[int, Field(ge=1)] = 10
    """Epochs without a lower validation log loss before a trial ends."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    pretrained: PretrainedConfig = True
    """true (from the hub), false (from scratch), or a weights file or a folder of
    `<backbone name>.safetensors`."""
    loss: str = "cross_entropy"
    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm; null: no clipping."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Images on the device at once; larger batches accumulate gradients over several. A trial that
    runs out of device memory halves it by itself."""
    meta_features: tuple[str, ...] = ()
    """Numbers of the stored image joined to the image's features: mean_colour, aspect_ratio."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    channels_last: bool = True
    """Memory format of weights and images; false for the few backbones that are slower with it."""
    compile: bool = False
    """torch.compile: pays off in long trials on GPUs, costs a minute at each trial's start."""
    save_every: Seconds = 60.0
    """Minimum time between two saved states of a trial, each at the end of an epoch; an interrupted
    trial continues from the last one."""


def _one_name(value: object) -> object:
    """`{name: {argument: value}}`; `{name: }` and a bare `name` take every default."""
    entry: object = {value: {}} if isinstance(value, str) else value
    if not isinstance(entry, dict) or len(entry) != 1:
        raise ValueError("should be one transform with its arguments: {<library>.<name>: {...}}")
    [(name, arguments)] = entry.items()
    if not isinstance(arguments, dict | None):
        raise ValueError(f"the arguments of {name} should be a mapping: {{<name>: <value>}}")
    arguments = dict(arguments or {})
    if isinstance(arguments.get("transforms"), list):  # of OneOf, RandomApply and so on
        arguments["transforms"] = [_one_name(inner) for inner in arguments["transforms"]]
    return {name: arguments}


TransformConfig = Annotated[dict[str, dict[str, Any]], BeforeValidator(_one_name)]


class AugmentConfig(_Section):
    """Augmentation of the training images."""

    policy: str = "medium"
    transforms: tuple[TransformConfig, ...] = ()
    """Further transforms after the policy, in this order: `{<library>.<name>: {arguments}}`."""


class CacheConfig(_Section):
    """Decoded images that each node keeps, in $FOLDRACE_CACHE or ~/.cache/foldrace."""

    longer_side: Annotated[int, Field(ge=16, le=8192)] | None = None
    """Pixels: larger images are stored at this longer side. Default: 1.5 × the image size."""
    format: Literal["raw", "jpeg"] = "raw"
    """raw: 3 bytes per pixel, no decoding; jpeg: about a tenth of the disk and memory, decoded
    at each use."""
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """10^9 bytes that all decoded images of a node may take; never more than 80 % of the free
    disk. The least recently used go first."""


class ResourcesConfig(_Section):
    """Devices of a trial, and limits of the run."""

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] | None = None
    """Fractions share one device. Default: 1 where the cluster has GPUs, else 0."""
    devices_per_trial: Annotated[int, Field(ge=1)] = 1
    """Above 1: number of devices of each trial (data parallel), each with `cpus_per_trial`
    and `gpus_per_trial`."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    time_budget: Seconds | None = None
    """Seconds, or 90m, 2h, 1.5d: no fold trial runs beyond it, and the blend and the submission
    have their time within it."""
    gpu_hours: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Hours of all trials' devices together; on a machine without GPUs those of its slots. No fold
    trial starts beyond them."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Number of times that a failed fold trial (a lost node, a killed worker) is started again."""

    @model_validator(mode="after")
    def _whole_gpus_above_one(self) -> ResourcesConfig:
        gpus = self.gpus_per_trial
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_trial {gpus:g} is above 1 and no whole number")
        return self


class EnsembleConfig(_Section):
    """Choice of the blend."""

    method: str = "greedy"
    max_rounds: Annotated[int, Field(ge=1, le=10_000)] = 50
    max_members: Annotated[int, Field(ge=1)] | None = None
    bags: Annotated[int, Field(ge=0, le=1000)] = 0
    """Greedy: number of random halves of the members to search; their weights are averaged. 0: all
    members are searched once."""
    calibrate: bool = True
    """Temperatures of members and blend, each where it lowers the cross-fitted log loss."""
    max_ms_per_image: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Maximum time per image of all fold models of the blend together, in ms on the machine that
    blends."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Largest size of the weight files of all fold models of the blend together."""
    exclude: tuple[str, ...] = ()
    """Candidates (`c0007`, or one variant: `c0007 ema`) and backbones that may not enter."""
    include: tuple[str, ...] = ()
    """Candidates that must have a weight."""
    keep: Literal["all", "blend"] = "all"
    """`blend` removes the weights that the blend does not use; never the OOF."""


class SweepConfig(_Section):
    """The whole sweep."""

    name: str
    plugins: tuple[str, ...] = ()
    """Python files that add backbones, losses, optimisers and so on to the tables."""
    data: DataConfig
    folds: FoldsConfig = FoldsConfig()
    search: SearchConfig
    race: RaceConfig = RaceConfig()
    training: TrainingConfig = TrainingConfig()
    augment: AugmentConfig = AugmentConfig()
    cache: CacheConfig = CacheConfig()
    resources: ResourcesConfig = ResourcesConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    smoke: dict[str, Any] = {}
    """Keys that `run --smoke` lays over this config."""
