"""The sweep's configuration: frozen records, one a section of the YAML or JSON file.

Takes a file and `--set` overrides, gives a `SweepConfig` with absolute paths, or every problem
at once. This is the only reader of configuration files.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from experiment.errors import ConfigError, Problem
from experiment.names import closest

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(value: object) -> object:
    """'90m', '1.5h', '45s', '2d' or a number of seconds -> seconds."""
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
    """Where the images, labels and test images are. Paths are relative to the config file."""

    train: str
    """A CSV of image paths and labels, a folder with one folder per class, or a zip of either."""
    train_images: str | None = None
    """What the CSV's image paths are relative to: a folder or a zip. Default: the CSV's folder."""
    image_column: str = "image_path"
    label_column: str = "target"
    group_column: str | None = None
    """Rows of one group (a patient, a vehicle) never lie on both sides of a fold."""
    max_per_class: Annotated[int, Field(ge=1)] | None = None
    """Use only so many images of each class, the first ones: to try things out."""
    test: str | None = None
    """A CSV with ids and image paths, a folder of images, or a zip of it."""
    test_images: str | None = None
    test_image_column: str | None = None
    """Default: `image_column`."""
    test_id_column: str | None = None
    """Default: the first column of the sample submission, else the first column of the test CSV."""
    sample_submission: str | None = None


class FoldsConfig(_Section):
    """How the training rows are cut into folds."""

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
    """Which branch of a union a value is meant for, so that it gets that branch's message."""
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
    """What a knob may take in the search: low/high (with `log`), or `choices`."""

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


class SearchConfig(_Section):
    """What is searched, how, and for how long."""

    backbones: Annotated[tuple[str, ...], Field(min_length=1)]
    candidates: Annotated[int, Field(ge=1)] = 20
    """How many candidates (backbone + hyperparameters), each with its k folds."""
    sampler: Literal["tpe", "random"] = "tpe"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    space: dict[str, KnobConfig] = {}
    """Knob -> a fixed value, `search` (its default range), or a range."""
    per_backbone: dict[str, dict[str, KnobConfig]] = {}
    """Backbone -> the same, for that backbone only."""


class TrainingConfig(_Section):
    """What every trial shares."""

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
    """What is joined to the image's features, of the stored image: mean_colour, aspect_ratio."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    channels_last: bool = True
    """Memory format of weights and images; false for the few backbones that are slower with it."""
    compile: bool = False
    """torch.compile: pays off in long trials on GPUs, costs a minute at each trial's start."""
    save_every: Seconds = 60.0
    """A trial saves its state at the end of an epoch, so often at most; what is interrupted goes on
    from there."""


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
    """How training images are varied."""

    policy: str = "medium"
    transforms: tuple[TransformConfig, ...] = ()
    """Further transforms after the policy, in this order: `{<library>.<name>: {arguments}}`."""


class CacheConfig(_Section):
    """How each node keeps decoded images, in $FOLDRACE_CACHE or ~/.cache/foldrace."""

    longer_side: Annotated[int, Field(ge=16, le=8192)] | None = None
    """Pixels: larger images are stored at this longer side. Default: 1.5 × the image size."""
    format: Literal["raw", "jpeg"] = "raw"
    """raw: 3 bytes a pixel, nothing to decode; jpeg: about a tenth of the disk and memory, decoded
    at each use."""
    max_gb: Annotated[float, Field(gt=0)] = 50.0
    """10^9 bytes that all decoded images of a node may take; never more than 80 % of the free
    disk. The least recently used go first."""


class ResourcesConfig(_Section):
    """What a trial gets, and how far the run may go."""

    cpus_per_trial: Annotated[int, Field(ge=1)] = 1
    gpus_per_trial: Annotated[float, Field(ge=0)] | None = None
    """Fractions share one device. Default: 1 where the cluster has GPUs, else 0."""
    devices_per_trial: Annotated[int, Field(ge=1)] = 1
    """Above 1 each trial trains on so many devices (data parallel), each with `cpus_per_trial`
    and `gpus_per_trial`."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    time_budget: Seconds | None = None
    """Seconds, or 90m, 2h, 1.5d: no fold trial runs beyond it."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """How often a fold trial that failed (a lost node, a killed worker) is started anew."""

    @model_validator(mode="after")
    def _whole_gpus_above_one(self) -> ResourcesConfig:
        gpus = self.gpus_per_trial
        if gpus is not None and gpus > 1 and gpus != int(gpus):
            raise ValueError(f"gpus_per_trial {gpus:g} is above 1 and no whole number")
        return self


class EnsembleConfig(_Section):
    """How the blend is chosen."""

    method: str = "greedy"
    max_rounds: Annotated[int, Field(ge=1, le=10_000)] = 50
    max_members: Annotated[int, Field(ge=1)] | None = None
    bags: Annotated[int, Field(ge=0, le=1000)] = 0
    """Greedy: so many random halves of the members are searched and averaged; 0: all, once."""
    calibrate: bool = True
    """Temperatures of members and blend, each where it lowers the cross-fitted log loss."""
    max_ms_per_image: Annotated[float, Field(gt=0)] | None = None
    """Of all fold models of the blend together, on the machine that blends."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Of the weight files of all fold models of the blend together."""
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
    training: TrainingConfig = TrainingConfig()
    augment: AugmentConfig = AugmentConfig()
    cache: CacheConfig = CacheConfig()
    resources: ResourcesConfig = ResourcesConfig()
    ensemble: EnsembleConfig = EnsembleConfig()
    smoke: dict[str, Any] = {}
    """What `run --smoke` lays over this config."""


@dataclass(frozen=True)
class ParsedConfig:
    """`config` is None when a required part is wrong; where problems remain but enough is right,
    it holds defaults in place of the wrong values, so that later checks can find more."""

    source: str
    config: SweepConfig | None
    problems: tuple[Problem, ...]

    def require(self) -> SweepConfig:
        """The config, or a ConfigError with every problem."""
        if self.problems or self.config is None:
            raise ConfigError(self.problems)
        return self.config


_SMOKE_DEFAULTS: dict[str, Any] = {
    "data": {"max_per_class": 8},
    "folds": {"k": 2},
    "search": {"candidates": 2, "per_backbone": {}},
    "training": {"epochs": 1, "image_size": 32, "precision": "auto", "pretrained": False},
    "resources": {"cpus_per_trial": 1, "gpus_per_trial": None},
}
_NOT_IN_SMOKE = ("epochs", "image_size", "freeze_epochs", "unfreeze_epochs", "cycles", "snapshots")
"""Knobs that only make sense at the config's own length and size."""


def load_config(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> SweepConfig:
    """Read, override and validate; raises ConfigError with all problems."""
    return parse_config(path, overrides, smoke).require()


def parse_config(path: Path, overrides: Sequence[str] = (), smoke: bool = False) -> ParsedConfig:
    """Read `path` (YAML or JSON), lay the smoke section and `key=value` overrides over it,
    validate. Raises ConfigError only where there is nothing to validate."""
    raw = _read_mapping(path)
    if smoke:
        raw = _smoke(raw)
    problems: list[Problem] = []
    for override in overrides:
        problem = _apply_override(raw, override)
        if problem is not None:
            problems.append(problem)
    raw.setdefault("name", path.stem)
    config, found = _validate(raw, str(path))
    if config is not None:
        config = _absolute_paths(config, path.absolute().parent)
    return ParsedConfig(str(path), config, (*problems, *found))


def to_yaml(config: SweepConfig) -> str:
    """The resolved config as YAML; `parse_config` of it gives the same config."""
    return yaml.dump(
        config.model_dump(mode="json"),
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
    )


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-3` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *defaults` has no value of its own
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, (str, int, float, type(None))):
                key = str(key)  # a date; a list is refused further down
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return {str(key): value for key, value in super().construct_mapping(node, deep).items()}


class _Dumper(yaml.SafeDumper):
    """Puts a text such as `1e-3` in quotes, since `_Loader` takes it for a number."""


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError.single(str(path), f"cannot be read: {error}") from error
    form = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        raw = _from_json(text) if form == "JSON" else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError.single(str(path), f"is not valid {form}: {error}") from error
    if not isinstance(raw, dict):
        found = "is empty" if raw is None else f"holds no keys, only {_short(raw)}"
        raise ConfigError.single(str(path), f"{found}; it should hold data:, search: and so on")
    return raw


def _from_json(text: str) -> Any:
    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise ValueError(f"key {twice!r} is given twice")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=mapping)


def _smoke(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with generic small values and its own smoke section laid over it. The techniques
    of its search space stay on: they are what a smoke run tries."""
    defaults, own = dict(_SMOKE_DEFAULTS), raw.get("smoke")
    folds = raw.get("folds")
    if isinstance(folds, dict) and (folds.get("column") is not None or folds.get("k") == 1):
        del defaults["folds"]  # the column says how many folds there are; a fixed split stays one
    # A smoke section that is no mapping is left to the validation.
    return _merge(_merge(_without_length(raw), defaults), own if isinstance(own, dict) else {})


def _without_length(raw: dict[str, Any]) -> dict[str, Any]:
    search = raw.get("search")
    if not isinstance(search, dict) or not isinstance(search.get("space"), dict):
        return raw
    space = search["space"]
    kept = {name: form for name, form in space.items() if name not in _NOT_IN_SMOKE}
    return raw | {"search": search | {"space": kept}}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """`over` wins; sections and the search space merge key by key, but a knob's range and
    `per_backbone` are replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        whole = within == "space" or key == "per_backbone"
        if isinstance(old, dict) and isinstance(value, dict) and not whole:
            value = _merge(old, value, key)
        merged[key] = value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> Problem | None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        return Problem(f"--set {override}", "should look like search.candidates=80")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        return Problem(f"--set {override}", f"the value is not valid YAML: {error}")
    target = raw
    for part in parts[:-1]:
        child = target.get(part)
        child = dict(child) if isinstance(child, dict) else {}
        target[part] = child
        target = child
    target[parts[-1]] = value
    return None


def _validate(raw: dict[str, Any], source: str) -> tuple[SweepConfig | None, list[Problem]]:
    """Validate; where values are wrong, validate again without them to give later checks a
    config to work on. JSON mode: lists become tuples, strings are never numbers."""
    try:
        return SweepConfig.model_validate_json(json.dumps(raw, default=str)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = [_describe(source, detail) for detail in details]
    for _ in range(8):  # a value that went may leave its section incomplete: prune that too
        raw = _pruned(raw, (_keys(detail["loc"]) for detail in details))
        try:
            return SweepConfig.model_validate_json(json.dumps(raw, default=str)), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
    return None, problems


def _keys(loc: Iterable[int | str]) -> tuple[int | str, ...]:
    """An error's location as the user wrote it: without pydantic's union tags."""
    return tuple(part for part in loc if not str(part).startswith("<"))


def _describe(source: str, detail: Any) -> Problem:
    loc = _keys(detail["loc"])
    where = f"{source}: {'.'.join(str(part) for part in loc) or 'top level'}"
    kind, given = detail["type"], _short(detail.get("input"))
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(where, _unknown_key(loc))
    if kind == "missing":
        return Problem(where, "is missing; this key has no default")
    if kind == "literal_error":
        return Problem(where, f"got {given}; allowed: {context['expected']}")
    if kind == "value_error":
        return Problem(where, f"{context['error']} (got {given})")
    return Problem(where, f"got {given}; {detail['msg'].replace('Input should', 'should')}")


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    fields = sorted(_model_at(loc[:-1]).model_fields)
    near = closest(str(loc[-1]), fields)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown key; {hint}allowed: {', '.join(fields)}"


def _model_at(loc: Iterable[int | str]) -> type[BaseModel]:
    model: type[BaseModel] = SweepConfig
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            return RangeConfig  # below search.space and search.per_backbone
        options = (field.annotation, *get_args(field.annotation))
        model = next((o for o in options if _is_model(o)), model)
    return model


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _short(value: object, limit: int = 80) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pruned(raw: dict[str, Any], locations: Iterable[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy without the wrong values, so that their defaults stand in."""
    copy: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    for loc in locations:
        target: Any = copy
        for i, part in enumerate(loc):
            inner = target.get(part) if isinstance(target, dict) else None
            if not isinstance(target, dict) or part not in target:
                break
            if i == len(loc) - 1 or not isinstance(inner, dict):
                del target[part]
                break
            target = inner
    return copy


def _absolute_paths(config: SweepConfig, base: Path) -> SweepConfig:
    """Relative paths are relative to the config file, wherever the command is typed."""
    data = config.data
    names = ("train", "train_images", "test", "test_images", "sample_submission")
    found = {name: getattr(data, name) for name in names}
    absolute = {n: _absolute(v, base) for n, v in found.items() if v is not None}
    update: dict[str, Any] = {
        "data": data.model_copy(update=absolute),
        "plugins": tuple(_absolute(path, base) for path in config.plugins),
    }
    if isinstance(config.training.pretrained, str):
        weights = _absolute(config.training.pretrained, base)
        update["training"] = config.training.model_copy(update={"pretrained": weights})
    return config.model_copy(update=update)


def _absolute(path: str, base: Path) -> str:
    """Symbolic links stay: what a linked `train.csv` points to may have another name and folder."""
    return os.path.abspath(base / Path(path).expanduser())
