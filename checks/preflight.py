"""All checks before any trial starts: config, data, backbones, devices, disk.

Takes a parsed config, gives a `Plan` that is ready to run, or one UserError with every problem.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from foldrace.checks.config import config_problems
from foldrace.checks.search import search_warnings
from foldrace.checks.settings import image_sizes
from foldrace.config.load import ParsedConfig
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem, UserError
from foldrace.core.metrics import order_problem
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.dataset.archive import check_cache_folder
from foldrace.dataset.audit import Audit, audit, scan_rows
from foldrace.dataset.curation import own_classes
from foldrace.dataset.duplicates import NearDuplicate
from foldrace.dataset.folds import make_folds
from foldrace.dataset.left_out import LeftOut, left_out_lines
from foldrace.dataset.manifest import Manifest, scan_manifest
from foldrace.dataset.test_set import ImageSet, read_test_set
from foldrace.scheduling.nodes import Node
from foldrace.search_spaces.space import SearchSpace, build_space
from foldrace.trainables.data.pixel_cache import cache_bytes
from foldrace.trainables.models.classifier import ModelConfig, parameter_count

T = TypeVar("T")
_FLOAT32, _VARIANTS = 4, 2  # bytes; raw and EMA


@dataclass(frozen=True)
class Plan:
    """A sweep that can start."""

    config: SweepConfig
    space: SearchSpace
    manifest: Manifest
    fold: NDArray[np.int64]
    """As `make_folds` gives it."""
    test: ImageSet | None
    disk_bytes: int
    warnings: tuple[Problem, ...]
    near_duplicates: tuple[NearDuplicate, ...]
    left_out: tuple[LeftOut, ...]
    """What of the data takes no part."""
    parts: Parts
    """The rows of the config's plugins."""


def preflight(
    parsed: ParsedConfig,
    folder: Path | None,
    nodes: list[Node],
    workers: int,
    parts: Parts = NO_PARTS,
) -> Plan:
    """The plan of a sweep; UserError with every problem, those of the config first.

    `folder`: where the run will be written (None: not on a mounted disk); `nodes`: of the cluster;
    `workers`: images that are read at a time; `parts`: the rows of the config's plugins.
    """
    problems = list(parsed.problems)
    config = parsed.config
    if config is None:
        raise UserError(problems)
    of_data = list[Problem]()
    manifest, fold, test, checked = _data(config, workers, of_data)
    rows = None if manifest is None else len(manifest)
    space, found = build_space(config, parsed.source, rows)
    problems += found
    problems += config_problems(config, space, nodes, parts=parts)
    problems += of_data
    _collect(lambda: check_cache_folder("pixels"), problems)
    if problems or manifest is None or fold is None or checked is None:
        raise UserError(problems)
    disk = estimate_bytes(config, space, manifest, checked.sizes, parts)
    problem = _disk_problem(disk, folder)
    if problem is not None:
        raise UserError([problem])
    order = order_problem(config.ensemble.metric, manifest.classes, parts)
    left_out = (*manifest.left_out, *(test.left_out if test else ()), *checked.left_out)
    lines = (*manifest.notes, *left_out_lines(left_out), *checked.warnings)
    return Plan(
        config,
        space,
        manifest,
        fold,
        test,
        disk,
        (*search_warnings(config), *([] if order is None else [order]), *lines),
        checked.near_duplicates,
        left_out,
        parts,
    )


def estimate_bytes(
    config: SweepConfig,
    space: SearchSpace,
    manifest: Manifest,
    images: Sequence[tuple[int, int]],
    parts: Parts = NO_PARTS,
) -> int:
    """Bytes that a full run may take: weights and OOF of every variant, decoded images.

    `images`: width and height of every image, in pixels.
    """
    classes = len(manifest.classes)
    sizes = {b: max(image_sizes(settings)) for b, settings in space.settings.items()}
    counts = [parameter_count(ModelConfig(b, classes, size), parts) for b, size in sizes.items()]
    snapshots = max(int(v) for b in space.backbones for v in space.settings[b]["snapshots"].values)
    variants = _VARIANTS + snapshots
    weights = int(np.mean(counts)) * _FLOAT32 * variants * config.folds.trials
    oof = len(manifest) * (classes * 2 + 4) * variants * config.folds.repeats
    every_size = {size for settings in space.settings.values() for size in image_sizes(settings)}
    cache = cache_bytes(images, every_size, config.cache)
    return int(_candidates(config) * (weights + oof)) + cache


def _candidates(config: SweepConfig) -> float:
    """Candidates that may have all of their folds, which take the most."""
    limit = config.search.fold_trials
    most = config.search.candidates
    return most if limit is None else min(most, limit / config.folds.trials)


def _data(
    config: SweepConfig, workers: int, problems: list[Problem]
) -> tuple[Manifest | None, NDArray[np.int64] | None, ImageSet | None, Audit | None]:
    """Tables, folds, test set and images; goes on after a problem as far as it can."""
    manifest, found = scan_manifest(config.data, config.folds.column)
    problems += found
    if manifest is None:
        return None, None, None, None
    scanned = scan_rows(manifest, config.data, workers)
    manifest = scanned.manifest
    known = [name for name in manifest.classes if name]  # '' is a missing label
    classes = own_classes(known, manifest.merged)
    fold = _collect(lambda: make_folds(manifest, config.folds), problems) if not found else None
    test = _collect(lambda: read_test_set(config.data, classes), problems) if classes else None
    may_be_bad, most = config.data.on_bad_test_image == "prior", config.data.max_pixels
    checked = audit(manifest, fold, test, workers, scanned.infos, may_be_bad, most)
    problems += checked.problems
    return manifest, fold, test, checked


def _collect(make: Callable[[], T], problems: list[Problem]) -> T | None:
    try:
        return make()
    except UserError as error:
        problems += error.problems
        return None


def _disk_problem(needed: int, folder: Path | None) -> Problem | None:
    if folder is None:
        return None
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed <= free:
        return None
    return Problem(
        str(folder),
        f"the run may take {needed / 1e9:.1f} GB, but the disk has {free / 1e9:.1f} GB free; "
        "lower search.candidates, choose smaller backbones, or give --out on a larger disk",
    )
