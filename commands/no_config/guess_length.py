"""Length of a sweep that nobody has written a config for, by the measured speed of its backbones.

Takes what `no_config.guess` has found of data, backbones and sizes; gives the keys with folds,
epochs, candidates and a short first candidate, and lines that say what the sweep costs.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import SweepConfig
from foldrace.core.errors import EnvironmentProblem
from foldrace.dataset.guess import DataGuess
from foldrace.dataset.manifest import Manifest
from foldrace.reporting.formats import counted, duration
from foldrace.scheduling.budget import Deadline
from foldrace.scheduling.nodes import Node, default_gpus, slots, this_machine
from foldrace.search_spaces.portfolio import first_candidates
from foldrace.search_spaces.space import SearchSpace, build_space
from foldrace.search_spaces.sweep_length import Speed, SweepLength, Work, sweep_length
from foldrace.trainables.speeds import MeasuredSpeeds, TimingRequest, measure_speeds

_MEASURING, _MEASURING_PART = 20.0, 0.02  # seconds at most, and part of the time
_CHECKS, _CHECKS_PART = 5.0, 0.25  # seconds of Ray and the checks, as part of the time until here
_TIMED_IMAGES = 32  # that batches are made of
_BESIDE_OTHERS = 1.25  # measured alone, but cores share caches and memory, and the driver's work
_DISK_PART = 0.5  # of the free disk that weights may take
_WEIGHT_BYTES = 2 * 4  # raw and EMA in float32


@dataclass(frozen=True)
class Basis:
    """What the choices depend on."""

    given: Mapping[str, Any]
    """Keys that the user has set, by section."""
    config: SweepConfig
    manifest: Manifest
    side: float
    """Median of the images' shorter sides, in pixels."""
    aspect: float
    """Median of the longer side / the shorter one."""
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
        return key in keys_of(self.given, section) or (
            section == "training" and isinstance(space, Mapping) and key in space
        )


def with_length(
    keys: dict[str, Any], found: DataGuess, basis: Basis, started: float, lines: list[str]
) -> dict[str, Any]:
    """The keys with folds, epochs, candidates, and the backbones that are fast enough.

    `started`: when the command did, by `time.monotonic`; `lines`: gets what is to be said.
    """
    config = basis.config
    measured = _measure(basis)
    if measured.failure is not None:
        lines.append(f"the speed could not be measured: {measured.failure}")
    for backbone, error in measured.errors.items():
        lines.append(f"{backbone} cannot train here: {error}")
    if measured.errors and not measured.speeds:
        raise EnvironmentProblem.single(
            "search.backbones", "none of them can train: " + "; ".join(measured.errors.values())
        )
    length = sweep_length(_work(basis, measured, started))
    lines += _length_lines(length, basis, measured.speeds)
    own = basis.sets("search", "backbones")
    backbones = (() if own else length.backbones) or config.search.backbones
    search = {
        **keys["search"],
        "backbones": list(backbones),
        "candidates": length.candidates,
        "points": _short_first(length, basis),
    }
    return {
        **keys,
        "folds": found.folds or {"k": length.folds},
        "search": {name: value for name, value in search.items() if value},
        "training": {"epochs": length.epochs, **keys["training"]},
    }


def _short_first(length: SweepLength, basis: Basis) -> list[dict[str, Any]]:
    """A first candidate of few epochs, as a sweep of so few begins; none where all are short."""
    backbone = length.first_backbone
    if length.first_epochs == length.epochs or basis.sets("search", "points"):
        return []
    [(_, short)] = first_candidates(_space(basis, length, length.first_epochs), 1)
    usual = _space(basis, length, length.epochs).default(backbone).as_dict()
    own = {name: value for name, value in short.as_dict().items() if value != usual[name]}
    return [{"backbone": backbone, "params": own}]


def _space(basis: Basis, length: SweepLength, epochs: int) -> SearchSpace:
    """The space of the first candidate's backbone: its rates go by the number of updates."""
    config, backbone = basis.config, length.first_backbone
    own = {name: form for name, form in config.search.per_backbone.items() if name == backbone}
    changes = {
        "folds": config.folds.model_copy(update={"k": length.folds}),
        "search": config.search.model_copy(update={"backbones": (backbone,), "per_backbone": own}),
        "training": config.training.model_copy(update={"epochs": epochs}),
    }
    return build_space(config.model_copy(update=changes), "", len(basis.manifest))[0]


def _measure(basis: Basis) -> MeasuredSpeeds:
    """Time the backbones, while this process imports what the checks need."""
    here = any(node.gpus for node in this_machine())
    if basis.has_gpu and not here:
        return MeasuredSpeeds({}, {}, failure="the cluster has GPUs, this machine has none")
    manifest, budget = basis.manifest, basis.config.resources.time_budget
    rows = spread(len(manifest), _TIMED_IMAGES)
    request = TimingRequest(
        config=basis.config.model_dump_json(),
        files=tuple(str(manifest.file(row)) for row in rows),
        rows=len(manifest),
        classes=len(manifest.classes),
        use_gpu=basis.has_gpu,
        seconds=_MEASURING if budget is None else min(_MEASURING, _MEASURING_PART * budget),
    )
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(measure_speeds, request)
        import foldrace.checks.preflight  # noqa: F401

        measured = answer.result()
    if basis.has_gpu or basis.slots == 1:
        return measured
    slower = {name: speed.slower(_BESIDE_OTHERS) for name, speed in measured.speeds.items()}
    return replace(measured, speeds=slower)


def _work(basis: Basis, measured: MeasuredSpeeds, started: float) -> Work:
    config, budget = basis.config, basis.config.resources.time_budget
    seconds = None
    if budget is not None:
        elapsed = time.monotonic() - started
        elapsed += max(_CHECKS, _CHECKS_PART * elapsed)  # on a busy machine all takes longer
        elapsed += measured.start  # workers start as the process did that measured
        seconds = max(1.0, Deadline(budget, 0.0).seconds_left(elapsed))
    counts = np.bincount(basis.manifest.labels)
    decided = basis.sets("folds", "k") or config.folds.column is not None
    repeats = config.folds.repeats
    free = shutil.disk_usage(Path.cwd()).free * _DISK_PART
    largest = max((speed.weights for speed in measured.speeds.values()), default=0)
    return Work(
        speeds=measured.speeds,
        images=len(basis.manifest),
        slots=basis.slots,
        pretrained=bool(config.training.pretrained),
        seconds=seconds,
        folds=config.folds.k if decided else None,
        most_folds=max(2, _units_of_smallest_class(basis.manifest, counts)),
        repeats=repeats,
        has_gpu=basis.has_gpu,
        epochs=config.training.epochs if basis.sets("training", "epochs") else None,
        candidates=config.search.candidates if basis.sets("search", "candidates") else None,
        most_candidates=max(2, int(free / (5 * repeats * _WEIGHT_BYTES * largest)))
        if largest
        else 1000,
    )


def _units_of_smallest_class(manifest: Manifest, counts: NDArray[np.int64]) -> int:
    """Images of the rarest class; groups of it, where rows are grouped."""
    if manifest.groups is None:
        return int(counts.min())
    pairs = set(zip(manifest.labels.tolist(), manifest.groups, strict=True))
    return min(Counter(label for label, _ in pairs).values())


def _length_lines(length: SweepLength, basis: Basis, speeds: Mapping[str, Speed]) -> Iterator[str]:
    config, images = basis.config, len(basis.manifest)
    budget, at_once = config.resources.time_budget, basis.slots
    dropped = set(speeds) - set(length.backbones)
    size = config.training.image_size
    for name in config.search.backbones:
        if name not in speeds:
            left_out = "" if basis.sets("search", "backbones") else "; left out"
            yield f"{name}: not measured in time{left_out}" if speeds else f"{name}: speed unknown"
            continue
        speed = speeds[name]
        trial = duration(speed.fold_seconds(images, length.folds, length.epochs))
        left_out = "; left out: too slow for the time" if name in dropped else ""
        yield f"{name}: about {trial} a fold trial{left_out}"
    short = length.first_epochs
    first = f" ({short} of the first candidate)" if short < length.epochs else ""
    folds = counted(length.folds, "fold")
    folds += f" × {config.folds.repeats} repeats" if config.folds.repeats > 1 else ""
    yield (
        f"{size} px, {counted(length.epochs, 'epoch')}{first}, {folds}, "
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


def spread(count: int, most: int) -> Sequence[int]:
    """At most that many row numbers, spread over all."""
    return range(0, count, -(-count // most) or 1)


def keys_of(keys: Mapping[str, Any], section: str) -> dict[str, Any]:
    """The keys of a section; none where it is missing or no section."""
    found = keys.get(section)
    return dict(found) if isinstance(found, Mapping) else {}
