"""The sweep's configuration: frozen records, one a section of the YAML or JSON file.

`foldrace.config.load` is the only reader of such files, `foldrace.config.problems` words what
is wrong with one.
"""

from __future__ import annotations

import codecs
import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from foldrace.config.forms import ConfigSection, KnobConfig, ValueConfig, fixed_values
from foldrace.config.hyperparameters import KNOBS
from foldrace.config.ranges import Value, seconds


def _seconds(value: object) -> object:
    """Seconds from '90m', '1.5h', '45s', '2d' or a number of seconds."""
    return seconds(value) if isinstance(value, str) else value


_MOST_ETA = 4


def _encoding(value: object) -> object:
    """The name of a text encoding that Python knows."""
    try:
        known = value is None or codecs.lookup(str(value))._is_text_encoding
    except LookupError:
        known = False
    if not known:
        raise ValueError("should be the name of a text encoding: cp949, cp1252, shift_jis, ...")
    return value


def _labels(value: object) -> object:
    """One column or several."""
    names = value if isinstance(value, list | tuple) and len(value) > 1 else [value]
    if not all(isinstance(name, str) for name in names):
        raise ValueError("should be a column, or a list of at least two: [cat, dog]")
    return tuple(names) if len(names) > 1 else value


def _submission(value: object) -> object:
    """A form by its name, or `{probability_of: <class>}`, whose class may look like a number."""
    if isinstance(value, dict) and [*value] == ["probability_of"]:
        return {"probability_of": str(value["probability_of"])}
    if value not in (None, "labels", "probabilities"):
        raise ValueError("should be labels, probabilities or {probability_of: <class>}")
    return value


SMOKE = "-smoke"
"""End of a smoke run's name."""
Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0, allow_inf_nan=False)]


def _gpus(value: object) -> object:
    """A number of GPUs, `auto` or None; one message for all that is none of them."""
    if value is None or value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError("should be a number of at least 0, auto, or null")
    return value


Gpus = Annotated[float | Literal["auto"] | None, BeforeValidator(_gpus)]


def _names(value: object) -> object:
    """Names of classes, which YAML takes for numbers where they are whole ones."""
    if not isinstance(value, list | tuple):
        return value
    return tuple(str(v) if isinstance(v, int) and not isinstance(v, bool) else v for v in value)


ClassNames = Annotated[tuple[str, ...], BeforeValidator(_names), Field(min_length=1)]
Fraction = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]


class DataConfig(ConfigSection):
    """Places of the images, labels and test images; paths are relative to the config file."""

    train: str
    """A table of image paths and labels (CSV, TSV, JSON lines, Parquet), a folder with one folder
    per class or with a table, or a zip of any of them."""
    train_images: str | None = None
    """Folder or zip that the CSV's image paths are relative to. Default: the CSV's folder."""
    image_column: str = "image_path"
    """The table's column of image paths, or of file names without their suffix. Where it is not
    there and this key is not set, the column that names images."""
    label_column: Annotated[str | tuple[str, ...], BeforeValidator(_labels)] = "target"
    """The table's column of class names, or a list of columns with a 1 in that of the class. Where
    it is not there and this key is not set, what is likely to hold labels."""
    encoding: Annotated[str | None, BeforeValidator(_encoding)] = None
    """Encoding of tables that are not UTF-8. Default: by their letters, and told."""
    group_column: str | None = None
    """Rows of one group (a patient, a vehicle) never lie on both sides of a fold."""
    max_per_class: Annotated[int, Field(ge=1)] | None = None
    """Use only the first images of each class, at most this many: to try things out."""
    on_bad_image: Literal["stop", "drop"] = "stop"
    """What a training image that is missing or cannot be read does: `drop` leaves it out."""
    max_pixels: Annotated[int, Field(ge=1, le=500_000_000)] = 100_000_000
    """Pixels of the largest image that is decoded; a larger one cannot be read."""
    duplicates: Literal["report", "group", "drop"] = "report"
    """What becomes of training images that equal or nearly equal another one: a warning; one group,
    which no fold divides; or only the first of each label stays."""
    exclude: str | None = None
    """A table of image paths that are left out."""
    fixes: str | None = None
    """A table of image paths and labels that replace those of `train`."""
    merge_classes: dict[str, ClassNames] = Field(default={})
    """Name -> classes that are trained as one; the submission has each of them, with its part of
    the probability by their numbers of training images."""
    test: str | None = None
    """A CSV with ids and image paths, a folder of images, or a zip of it."""
    test_images: str | None = None
    """Folder or zip that the test CSV's image paths are relative to. Default: that CSV's folder."""
    test_image_column: str | None = None
    """Default: `image_column`."""
    test_id_column: str | None = None
    """Default: the first column of the sample submission, else the first column of the test CSV."""
    on_bad_test_image: Literal["stop", "prior"] = "stop"
    """What a test image that is missing or cannot be read does: `prior` gives its row the class
    frequencies of the training images."""
    sample_submission: str | None = None
    """A table whose ids and columns the submission takes over."""
    submission: Annotated[str | dict[str, str] | None, BeforeValidator(_submission)] = None
    """labels: the most probable class; probabilities: one of each class; `{probability_of: CLASS}`:
    one of that class. Default: as the sample has it, and told; without a sample probabilities."""

    @property
    def places(self) -> dict[str, str]:
        """Key -> path, for every key that says where something lies and is set."""
        tests = ("test", "test_images", "sample_submission")
        keys = ("train", "train_images", "exclude", "fixes", *tests)
        return {key: path for key in keys if (path := getattr(self, key)) is not None}


class FoldsConfig(ConfigSection):
    """Split of the training rows into folds."""

    k: Annotated[int, Field(ge=1, le=100)] = 5
    """Number of folds; 1 means one fixed validation split of `valid_fraction`."""
    repeats: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of different splits into k folds: a candidate has k × repeats fold trials, and a row's
    prediction is the mean over the repeats."""
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

    @model_validator(mode="after")
    def _repeats_are_drawn(self) -> FoldsConfig:
        if self.repeats > 1 and self.k == 1:
            raise ValueError(
                f"repeats: {self.repeats} goes with k of 2 or more, not with k: 1, one fixed split"
            )
        if self.repeats > 1 and self.column is not None:
            raise ValueError(
                f"repeats: {self.repeats} goes with folds that are drawn, not with column: "
                f"{self.column}, which gives one split"
            )
        return self

    @property
    def trials(self) -> int:
        """Fold trials of a complete candidate."""
        return self.k * self.repeats


class PointConfig(ConfigSection):
    """One candidate given by hand; hyperparameters not named take their defaults."""

    backbone: str
    params: dict[str, ValueConfig] = Field(default={})


class SearchConfig(ConfigSection):
    """The search: backbones, hyperparameters, sampler and length."""

    backbones: Annotated[tuple[str, ...], Field(min_length=1)]
    """Models that are trained: `timm/<name>` or `torchvision/<name>`."""
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
    """URL of a database (`postgresql://user@host/name`) for Optuna's view of the sweep, instead of
    `study.journal` in the run folder; `env:NAME`: the environment variable NAME holds the URL."""
    teacher: Annotated[str, Field(pattern="^t[0-9a-f]{31}$")] | None = None
    """Folder in `teachers/` of the run that candidates with a `distill_alpha` learn from; `distill
    DIR` makes it and sets this."""
    min_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.5
    """This fraction of the candidates is shared evenly among the backbones; of the others a
    backbone gets the more, the more its candidates have brought the race's blend."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    space: dict[str, KnobConfig] = Field(default={})
    """Hyperparameter -> a fixed value, `search` (its default range), or a range; it wins over a
    value in `training` or `augment`, which the first candidate then has if the range holds it."""
    per_backbone: dict[str, dict[str, KnobConfig]] = Field(default={})
    """Backbone -> the same, for that backbone only."""

    @property
    def most_candidates(self) -> int:
        """Largest number of candidates that can be started: a list has no more than its points."""
        if self.sampler == "list":
            return min(self.candidates, len(self.points))
        return self.candidates


class RaceConfig(ConfigSection):
    """The race: when a candidate gets no further folds."""

    rule: Literal["gain", "forgiving", "none"] = "gain"
    """gain: it must add to the blend of the complete candidates. forgiving: its mean log loss must
    be below the worst fold of the best complete candidate. none: every candidate gets all folds."""
    z: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] = 1.0
    """gain: how many standard errors below zero the gain may be before the candidate is stopped."""
    eta: Annotated[int, Field(ge=1)] | None = None
    """gain: one in `eta` of the candidates whose first fold was measured gets all its folds, the
    most promising first; the others wait until nothing promises more. Default: the folds less one,
    from 2 to 4."""
    epoch_stopping: bool | None = None
    """First folds may be parked in mid-training. Default: with the rule gain."""
    grace: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] = 0.5
    """Fraction of its own schedule that a trial has before it may be parked in mid-training."""
    reduction: Annotated[int, Field(ge=2)] = 3
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

    def one_in(self, folds: int) -> int:
        """`eta` for candidates of so many fold trials.

        By default as many trials go to first folds as to the others of those that are granted
        them: with few folds a whole candidate is cheap, and the blend's second and third member
        gain more than a better choice among many.
        """
        return self.eta if self.eta is not None else min(_MOST_ETA, max(2, folds - 1))

    @property
    def stops_epochs(self) -> bool:
        """True where first folds may be parked in mid-training."""
        return self.rule == "gain" and self.epoch_stopping is not False


class TrainingConfig(fixed_values("training")):  # type: ignore[misc]
    """Fixed hyperparameters of training; `search.space` wins where it has one of them too."""

    meta_features: tuple[str, ...] = ()
    """Numbers of the stored image joined to the image's features: mean_colour, aspect_ratio."""


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


class AugmentConfig(fixed_values("augment")):  # type: ignore[misc]
    """Fixed hyperparameters of the augmentation of the training images, and further transforms."""

    transforms: tuple[TransformConfig, ...] = ()
    """Further transforms after the policy, in this order: `{<library>.<name>: {arguments}}`."""


class CacheConfig(ConfigSection):
    """Decoded images that each node keeps, in $FOLDRACE_CACHE or ~/.cache/foldrace."""

    shorter_side: Annotated[int, Field(ge=16, le=8000)] | None = None
    """Pixels: larger images are stored at this shorter side, at most four times as long. Default:
    1.5 × the image size."""
    format: Literal["raw", "jpeg"] = "raw"
    """raw: 3 bytes per pixel, no decoding; jpeg: about a tenth of the disk and memory, decoded
    at each use."""
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """10^9 bytes that all decoded images of a node may take; never more than 80 % of the free
    disk. The least recently used go first."""


class ResourcesConfig(ConfigSection):
    """Devices of a trial, and limits of the run."""

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    """Cores of a fold trial, for each of its devices."""
    gpus_per_trial: Gpus = None
    """Fractions share one device; `auto`: by each backbone's measured memory. Default: 1 where the
    cluster has GPUs, else 0."""
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
    """Number of times that a failed fold trial is started again. Lost nodes, preemptions and errors
    that meet several candidates in a row are not counted."""
    trial_timeout: Seconds | None = None
    """A fold trial that ends no epoch for so long is ended and tried again from its saved state.
    Default: 30 minutes, or 20 times its backbone's median epoch where that is longer; 12 hours
    before the first epoch of a backbone."""
    node_timeout: Seconds = 3600.0
    """How long a sweep waits for nodes, or for the end of an error that meets every trial, before
    it ends; `resume` goes on."""

    @model_validator(mode="after")
    def _whole_gpus_above_one(self) -> ResourcesConfig:
        gpus = self.gpus_per_trial
        if gpus == "auto":
            if self.devices_per_trial > 1:
                raise ValueError(
                    f"gpus_per_trial auto with devices_per_trial {self.devices_per_trial}: each of "
                    "several devices is one whole GPU or none; allowed are 1, 0 and null"
                )
        elif isinstance(gpus, int | float) and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_trial {gpus:g} is above 1 and no whole number")
        return self


class EnsembleConfig(ConfigSection):
    """Choice of the blend."""

    method: str = "greedy"
    metric: str = "log_loss"
    """Metric that decides the last selection, among blends and single members, and the rule by
    which labels are written; search, race and weights stay on the log loss."""
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


def _variable(value: object) -> object:
    """A name of an environment variable, in the form `env:NAME`; never a URL."""
    if value is not None and not re.fullmatch(r"env:[A-Za-z_]\w*", str(value), re.ASCII):
        raise ValueError(
            "should be env:NAME, the name of an environment variable that holds the URL: whoever "
            "knows a webhook's URL can post to it, and sweep.yaml is read by others"
        )
    return value


class NotifyConfig(ConfigSection):
    """Whom the sweep tells of a better blend, a failed candidate, a pause, and its end."""

    command: Annotated[str, Field(min_length=1)] | None = None
    """Shell command, run once an event, which it gets as JSON on its input and in
    FOLDRACE_EVENT."""
    webhook: Annotated[str | None, BeforeValidator(_variable)] = None
    """`env:NAME`: the environment variable with the URL that each event is posted to as JSON."""


def _finite(value: object) -> object:
    """Values of any kind; those of a config's own keys are validated once they are laid over it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("should hold no .nan and no .inf")
    for part in inner:
        _finite(part)
    return value


class SweepConfig(ConfigSection):
    """The whole sweep."""

    name: str
    """Name of the run, and of its folder below runs/."""
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
    notify: NotifyConfig = NotifyConfig()
    smoke: Annotated[dict[str, Any], AfterValidator(_finite)] = Field(default={})
    """Keys that `run --smoke` lays over this config."""

    @property
    def is_smoke(self) -> bool:
        """True for the config of a smoke run: nobody is to send in what it writes."""
        return self.name.endswith(SMOKE)

    @property
    def fixed(self) -> dict[str, Value]:
        """Hyperparameter -> the value that `training` or `augment` fixes it at."""
        sections = {"training": self.training, "augment": self.augment}
        found = {k.name: getattr(sections[k.section], k.name) for k in KNOBS.values()}
        return {name: value for name, value in found.items() if value is not None}
