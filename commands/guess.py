"""A config for data that nobody has written one for: `run FOLDER`, `check FOLDER`, `init FOLDER`.

Takes a folder, a zip or a table and the keys that the user has set, gives the config as keys and
as parsed, with lines that say what was chosen and why.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from foldrace.config.load import ParsedConfig, override_keys, parse_config, parse_mapping
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import EnvironmentProblem, Problem, listing
from foldrace.core.plugins import check_plugins
from foldrace.dataset.guess import DataGuess, guess_data, is_data
from foldrace.dataset.images import pixel_size
from foldrace.dataset.manifest import Manifest, scan_manifest
from foldrace.reporting.formats import counted, duration
from foldrace.reporting.live import print_plain
from foldrace.scheduling.budget import Deadline
from foldrace.scheduling.nodes import Node, default_gpus, slots, this_machine
from foldrace.search_spaces.backbone_choice import BackboneChoice, Device, choose_backbones
from foldrace.search_spaces.sweep_length import Speed, SweepLength, Work, sweep_length
from foldrace.trainables.models.hub import weights_at_hand
from foldrace.trainables.speeds import MeasuredSpeeds, TimingRequest, measure_speeds

_MEASURING, _MEASURING_PART = 20.0, 0.02  # seconds at most, and part of the time
_CHECKS, _CHECKS_PART = 5.0, 0.25  # seconds of Ray and the checks, as part of the time until here
_SIZES, _TIMED_IMAGES = 200, 32  # images whose size is asked, and that batches are made of
_CPUS_PER_GPU = 8  # that load and augment for one
_BESIDE_OTHERS = 1.25  # measured alone, but cores share caches and memory, and the driver's work
_DISK_PART = 0.5  # of the free disk that weights may take
_WEIGHT_BYTES = 2 * 4  # raw and EMA in float32


@dataclass(frozen=True)
class SweepGuess:
    """A guessed config."""

    keys: Mapping[str, Any]
    """The keys that were chosen or given, by section."""
    parsed: ParsedConfig
    lines: tuple[str, ...]
    """What was taken for what, and what the sweep is expected to cost."""
    problems: tuple[Problem, ...] = ()
    """Problems of the training data, which the checks before a run tell, too."""


@dataclass(frozen=True)
class _Situation:
    """What the choices depend on."""

    given: Mapping[str, Any]
    config: SweepConfig
    manifest: Manifest
    side: float
    """Median of the images' shorter sides, in pixels."""
    nodes: list[Node]

    @property
    def has_gpu(self) -> bool:
        """True where trials run on GPUs."""
        return default_gpus(self.nodes, self.config.resources) > 0

    @property
    def slots(self) -> int:
        """Fold trials that run at a time."""
        resources = self.config.resources
        return max(1, slots(self.nodes, resources, default_gpus(self.nodes, resources)))

    def sets(self, section: str, key: str) -> bool:
        """True where the user has set the key himself, for all backbones."""
        search = self.given.get("search")
        space = search.get("space") if isinstance(search, Mapping) else None
        return key in _section(self.given, section) or (
            section == "training" and isinstance(space, Mapping) and key in space
        )


def parse_source(
    source: Path,
    overrides: Sequence[str],
    console: Console,
    smoke: bool = False,
    nodes: list[Node] | None = None,
    started: float | None = None,
) -> ParsedConfig:
    """Parse a config, or guess one for data and print what was chosen.

    `nodes`: those of the cluster, by default this machine; `started`: when the command did, by
    `time.monotonic`.
    """
    if not is_data(source):
        return parse_config(source, overrides, smoke)
    guess = guess_sweep(source, overrides, smoke, nodes, started)
    for line in guess.lines:
        print_plain(console, line)
    return guess.parsed


def run_name(source: Path, overrides: Sequence[str]) -> str:
    """Name of the run of a folder, zip or table, unless the user gives one."""
    given = override_keys(overrides).get("name")
    if isinstance(given, str):
        return given
    path = source.resolve()
    return path.name if path.is_dir() else path.stem


def guess_sweep(
    source: Path,
    overrides: Sequence[str],
    smoke: bool = False,
    nodes: list[Node] | None = None,
    started: float | None = None,
) -> SweepGuess:
    """The config for a folder, zip or table; DataError where the data has several readings.

    Where other things are wrong with data or overrides, no speed is measured, and the problems are
    left to the checks.
    """
    started = time.monotonic() if started is None else started
    given = override_keys(overrides)
    column = _section(given, "folds")
    fold = {"fold_column": column["column"]} if "column" in column else {}
    found = guess_data(source, _section(given, "data") | fold)
    keys: dict[str, Any] = {
        "name": run_name(source, overrides),
        "data": found.data,
        "folds": found.folds,
        "search": {"backbones": ["timm/test_resnet"]},
    }
    parsed = _parse(keys, source, overrides, smoke)
    if parsed.problems or parsed.config is None:
        return SweepGuess(keys, parsed, tuple(found.notes))
    manifest, problems = scan_manifest(parsed.config.data, parsed.config.folds.column)
    if manifest is None or problems:
        return SweepGuess(keys, parsed, tuple(found.notes), tuple(problems))
    situation = _Situation(
        given, parsed.config, manifest, _median_side(manifest), nodes or this_machine()
    )
    lines = [*found.notes, _data_line(situation)]
    keys = _with_backbones(keys, situation, smoke, lines)
    parsed = _parse(keys, source, overrides, smoke)
    if parsed.config is not None and not parsed.problems and not smoke:
        situation = replace(situation, config=parsed.config)
        keys = _with_length(keys, found, situation, started, lines)
        parsed = _parse(keys, source, overrides, smoke)
    return SweepGuess(_laid_over(keys, given), parsed, tuple(lines))


def _parse(
    keys: dict[str, Any], source: Path, overrides: Sequence[str], smoke: bool
) -> ParsedConfig:
    return parse_mapping(keys, str(source), Path.cwd(), overrides, smoke)


def _with_backbones(
    keys: dict[str, Any], situation: _Situation, smoke: bool, lines: list[str]
) -> dict[str, Any]:
    """The keys with image size, backbones, weights and cores of a trial."""
    search, training = situation.config.search, situation.config.training
    pretrained: bool | str = training.pretrained
    own = search.backbones if situation.sets("search", "backbones") else None
    if not situation.sets("training", "pretrained"):
        wanted = own or _choice(situation, pretrained=True).backbones
        pretrained = not smoke and weights_at_hand(wanted)
        if not pretrained and not smoke:
            lines.append(
                "from scratch: pretrained weights are in no cache here, and no hub answers "
                "(--set training.pretrained=FOLDER takes files of yours)"
            )
    choice = _choice(situation, bool(pretrained))
    backbones = own or choice.backbones
    if isinstance(pretrained, str) and own is None:
        backbones = _stored_backbones(pretrained, situation.config)
    training_keys = {"pretrained": pretrained, "image_size": choice.image_size}
    return {
        **keys,
        "search": {"backbones": list(backbones)},
        "training": {k: v for k, v in training_keys.items() if not situation.sets("training", k)},
        "resources": {"cpus_per_trial": _cpus_per_trial(situation)},
    }


def _choice(situation: _Situation, pretrained: bool) -> BackboneChoice:
    device: Device = "gpu" if situation.has_gpu else "cpu"
    return choose_backbones(device, situation.side, len(situation.manifest), pretrained)


def _stored_backbones(folder: str, config: SweepConfig) -> tuple[str, ...]:
    """Backbones whose weights lie in a folder, the smallest file first."""
    path = Path(folder)
    files = sorted(path.glob("*.safetensors"), key=lambda file: (file.stat().st_size, file.name))
    if not files:
        message = "is no folder of <backbone name>.safetensors; give one, or search.backbones, too"
        raise EnvironmentProblem.single(f"training.pretrained: {folder}", message)
    from foldrace.trainables.models.backbones import FAMILIES, check_backbone  # torch: only here
    from foldrace.trainables.plugins import TRAINING_TABLES

    parts, _ = check_plugins(config.plugins, TRAINING_TABLES)
    forms = ([f"{family}/{file.stem}" for family in parts[FAMILIES]] for file in files)
    known = [[name for name in names if check_backbone(name, parts) is None] for names in forms]
    backbones = tuple(names[0] for names in known if names)
    if not backbones:
        stems = listing(file.stem for file in files)
        message = f"holds no weights of a known backbone: {stems}"
        raise EnvironmentProblem.single(f"training.pretrained: {folder}", message)
    return backbones


def _cpus_per_trial(situation: _Situation) -> int:
    """One core beside other trials on the CPU; the cores that are there for each GPU."""
    if not situation.has_gpu:
        return 1
    shares = [node.cpus // node.gpus for node in situation.nodes if node.gpus]
    return int(max(1, min(_CPUS_PER_GPU, *shares)))


def _with_length(
    keys: dict[str, Any],
    found: DataGuess,
    situation: _Situation,
    started: float,
    lines: list[str],
) -> dict[str, Any]:
    """The keys with folds, epochs, candidates, and the backbones that are fast enough."""
    config = situation.config
    budget = config.resources.time_budget
    measured = _measure(situation, budget)
    if measured.failure is not None:
        lines.append(f"the speed could not be measured: {measured.failure}")
    for backbone, error in measured.errors.items():
        lines.append(f"{backbone} cannot train here: {error}")
    if measured.errors and not measured.speeds:
        raise EnvironmentProblem.single(
            "search.backbones", "none of them can train: " + "; ".join(measured.errors.values())
        )
    length = sweep_length(_work(situation, measured, budget, started))
    lines += _length_lines(length, situation, measured.speeds)
    own = situation.sets("search", "backbones")
    backbones = (() if own else length.backbones) or config.search.backbones
    return {
        **keys,
        "folds": found.folds or {"k": length.folds},
        "search": {"backbones": list(backbones), "candidates": length.candidates},
        "training": {"epochs": length.epochs, **keys["training"]},
    }


def _measure(situation: _Situation, budget: float | None) -> MeasuredSpeeds:
    """Time the backbones, while this process imports what the checks need."""
    here = any(node.gpus for node in this_machine())
    if situation.has_gpu and not here:
        return MeasuredSpeeds({}, {}, failure="the cluster has GPUs, this machine has none")
    manifest = situation.manifest
    rows = _spread(len(manifest), _TIMED_IMAGES)
    request = TimingRequest(
        config=situation.config.model_dump_json(),
        files=tuple(str(manifest.file(row)) for row in rows),
        rows=len(manifest),
        classes=len(manifest.classes),
        use_gpu=situation.has_gpu,
        seconds=_MEASURING if budget is None else min(_MEASURING, _MEASURING_PART * budget),
    )
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(measure_speeds, request)
        import foldrace.checks.preflight  # noqa: F401

        measured = answer.result()
    if situation.has_gpu or situation.slots == 1:
        return measured
    slower = {name: speed.slower(_BESIDE_OTHERS) for name, speed in measured.speeds.items()}
    return replace(measured, speeds=slower)


def _work(
    situation: _Situation, measured: MeasuredSpeeds, budget: float | None, started: float
) -> Work:
    config = situation.config
    seconds = None
    if budget is not None:
        elapsed = time.monotonic() - started
        elapsed += max(_CHECKS, _CHECKS_PART * elapsed)  # on a busy machine all takes longer
        elapsed += measured.start  # workers start as the process did that measured
        seconds = max(1.0, Deadline(budget, 0.0).seconds_left(elapsed))
    counts = np.bincount(situation.manifest.labels)
    decided = situation.sets("folds", "k") or config.folds.column is not None
    free = shutil.disk_usage(Path.cwd()).free * _DISK_PART
    largest = max((speed.weights for speed in measured.speeds.values()), default=0)
    return Work(
        speeds=measured.speeds,
        images=len(situation.manifest),
        slots=situation.slots,
        pretrained=bool(config.training.pretrained),
        seconds=seconds,
        folds=config.folds.k if decided else None,
        most_folds=max(2, _units_of_smallest_class(situation.manifest, counts)),
        has_gpu=situation.has_gpu,
        epochs=config.training.epochs if situation.sets("training", "epochs") else None,
        candidates=config.search.candidates if situation.sets("search", "candidates") else None,
        most_candidates=max(2, int(free / (5 * _WEIGHT_BYTES * largest))) if largest else 1000,
    )


def _units_of_smallest_class(manifest: Manifest, counts: NDArray[np.int64]) -> int:
    """Images of the rarest class; groups of it, where rows are grouped."""
    if manifest.groups is None:
        return int(counts.min())
    pairs = set(zip(manifest.labels.tolist(), manifest.groups, strict=True))
    return min(sum(1 for label, _ in pairs if label == c) for c in range(len(counts)))


def _data_line(situation: _Situation) -> str:
    images, classes = len(situation.manifest), len(situation.manifest.classes)
    device = "GPUs" if situation.has_gpu else "CPU"
    return (
        f"{counted(images, 'image')}, {classes} classes, shorter side {situation.side:.0f} px "
        f"(median); {device}"
    )


def _length_lines(
    length: SweepLength, situation: _Situation, speeds: Mapping[str, Speed]
) -> Iterator[str]:
    config, images = situation.config, len(situation.manifest)
    budget, at_once = config.resources.time_budget, situation.slots
    dropped = set(speeds) - set(length.backbones)
    size = config.training.image_size
    for name in config.search.backbones:
        if name not in speeds:
            left_out = "" if situation.sets("search", "backbones") else "; left out"
            yield f"{name}: not measured in time{left_out}" if speeds else f"{name}: speed unknown"
            continue
        speed = speeds[name]
        trial = duration(speed.fold_seconds(images, length.folds, length.epochs))
        left_out = "; left out: too slow for the time" if name in dropped else ""
        yield f"{name}: about {trial} a fold trial{left_out}"
    yield (
        f"{size} px, {counted(length.epochs, 'epoch')}, {counted(length.folds, 'fold')}, "
        f"{counted(at_once, 'fold trial')} at a time, at most "
        f"{counted(length.candidates, 'candidate')}"
    )
    if speeds:
        hours = length.slot_seconds / 3600
        within = f", all within {duration(budget)}" if budget is not None else ""
        yield (
            f"training: about {hours / at_once:.2g} hours, {hours:.2g} device-hours; the first "
            f"candidate is complete after about {duration(length.first_seconds)}{within}"
        )


def _median_side(manifest: Manifest) -> float:
    rows = _spread(len(manifest), _SIZES)
    sizes = [size for row in rows if (size := pixel_size(manifest.file(row))) is not None]
    return float(np.median([min(size) for size in sizes])) if sizes else 64.0


def _spread(count: int, most: int) -> Sequence[int]:
    """At most that many row numbers, spread over all."""
    return range(0, count, -(-count // most) or 1)


def _section(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = keys.get(name)
    return dict(section) if isinstance(section, Mapping) else {}


def _laid_over(keys: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, with those that the user has given."""
    merged = dict(keys)
    for name, value in given.items():
        whole = not isinstance(value, Mapping)
        merged[name] = value if whole else {**_section(keys, name), **value}
    return {name: value for name, value in merged.items() if value != {}}
