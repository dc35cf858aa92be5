"""Everything that can be wrong, found before any trial starts: config, data, backbones, devices,
disk.

Takes a parsed config, gives a `Plan` that is ready to run, or one UserError with every problem.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ensemble.methods import check_method
from experiment.audit import Audit, audit
from experiment.config import ParsedConfig, SweepConfig
from experiment.errors import Problem, UserError
from experiment.folds import make_folds
from experiment.manifest import Manifest, scan_manifest
from experiment.test_set import ImageSet, read_test_set
from scheduling.cluster import Node, resource_problems
from search_spaces.sampling import SearchSpace, build_space
from trainables.backbones import build_body, check_backbone
from trainables.card import ModelCard
from trainables.classifier import check_image_size, parameter_count
from trainables.config_checks import training_problems
from trainables.pixel_cache import cache_bytes
from trainables.transform_checks import check_transforms

T = TypeVar("T")
_FLOAT32, _VARIANTS = 4, 2  # bytes; raw and EMA


@dataclass(frozen=True)
class Plan:
    """A sweep that can start."""

    config: SweepConfig
    space: SearchSpace
    manifest: Manifest
    fold: NDArray[np.int64]  # (n,)
    test: ImageSet | None
    disk_bytes: int
    warnings: tuple[Problem, ...]


def preflight(parsed: ParsedConfig, folder: Path | None, nodes: list[Node], workers: int) -> Plan:
    """`folder` is where the run will be written (None: not on a mounted disk); `nodes` what the
    cluster offers. Raises UserError with every problem, those of the config first."""
    problems = list(parsed.problems)
    config = parsed.config
    if config is None:
        raise UserError(problems)
    space, found = build_space(config, parsed.source)
    problems += found
    problems += config_problems(config, space, nodes)
    manifest, fold, test, checked = _data(config, workers, problems)
    if problems or manifest is None or fold is None or checked is None:
        raise UserError(problems)
    disk = estimate_bytes(config, space, len(manifest), len(manifest.classes))
    problem = _disk_problem(disk, folder)
    if problem is not None:
        raise UserError([problem])
    return Plan(config, space, manifest, fold, test, disk, checked.warnings)


def config_problems(config: SweepConfig, space: SearchSpace, nodes: list[Node]) -> list[Problem]:
    """What these nodes cannot do, whatever the data are."""
    return [
        *_backbone_problems(config, space),
        *training_problems(config, space),
        *_blend_problems(config),
        *_transform_problems(config, space),
        *_precision_problems(config, nodes),
        *resource_problems(nodes, config.resources),
        *_batch_problems(config, space),
    ]


def _backbone_problems(config: SweepConfig, space: SearchSpace) -> list[Problem]:
    """Unknown names, refused image sizes, weights that cannot be had."""
    problems: list[Problem] = []
    for backbone in dict.fromkeys(config.search.backbones):
        problem = check_backbone(backbone)
        if problem is not None:
            problems.append(problem)
            continue
        sizes = _image_sizes(space, backbone)
        refused = [p for size in sizes if (p := check_image_size(backbone, size)) is not None]
        problems += refused
        if config.training.pretrained is not False and not refused:
            problems += _weights_problems(backbone, sizes[0], config.training.pretrained)
    repeated = {b for b in config.search.backbones if config.search.backbones.count(b) > 1}
    problems += [Problem("search.backbones", f"{b} is given twice") for b in sorted(repeated)]
    return problems


def estimate_bytes(config: SweepConfig, space: SearchSpace, rows: int, classes: int) -> int:
    """Disk that a full run may take: weights of both variants, OOF, decoded images."""
    sizes = {b: max(_image_sizes(space, b)) for b in space.backbones}
    counts = [parameter_count(ModelCard(b, classes, size)) for b, size in sizes.items()]
    weights = int(np.mean(counts)) * _FLOAT32 * _VARIANTS * config.folds.k
    oof = rows * (classes * 2 + 4) * _VARIANTS
    cache = cache_bytes(rows, sizes.values(), config.cache)
    return config.search.candidates * (weights + oof) + cache


def _image_sizes(space: SearchSpace, backbone: str) -> list[int]:
    return [int(size) for size in space.settings[backbone]["image_size"].values]


def _weights_problems(backbone: str, image_size: int, pretrained: bool | str) -> Iterable[Problem]:
    """Fetch (and so keep for the trials) or open the pretrained weights once."""
    try:
        build_body(backbone, image_size, pretrained, drop_path=0.0)
    except UserError as error:
        return error.problems
    return ()


def _blend_problems(config: SweepConfig) -> list[Problem]:
    problem = check_method(config.ensemble.method)
    return [] if problem is None else [problem]


def _transform_problems(config: SweepConfig, space: SearchSpace) -> list[Problem]:
    sizes = {size for backbone in space.backbones for size in _image_sizes(space, backbone)}
    return check_transforms(config.augment.transforms, sizes or {config.training.image_size})


def _precision_problems(config: SweepConfig, nodes: list[Node]) -> Iterable[Problem]:
    no_gpu = not any(node.gpus for node in nodes) or config.resources.gpus_per_trial == 0
    if config.training.precision == "fp16" and no_gpu:
        where = "training.precision"
        return [Problem(where, "got 'fp16', which needs a GPU; allowed here: auto, fp32, bf16")]
    return []


def _batch_problems(config: SweepConfig, space: SearchSpace) -> Iterable[Problem]:
    """Each device of a trial needs two images of a batch for its batch statistics."""
    devices = config.resources.devices_per_trial
    least = min(int(v) for b in space.backbones for v in space.settings[b]["batch_size"].values)
    if devices > 1 and least < 2 * devices:
        yield Problem(
            "search.space.batch_size",
            f"may be {least}, too few for resources.devices_per_trial {devices}; allowed: at "
            f"least {2 * devices}, two images a device",
        )


def _data(
    config: SweepConfig, workers: int, problems: list[Problem]
) -> tuple[Manifest | None, NDArray[np.int64] | None, ImageSet | None, Audit | None]:
    """Tables, folds, test set and images; goes on after a problem as far as it can."""
    manifest, found = scan_manifest(config.data, config.folds.column)
    problems += found
    if manifest is None:
        return None, None, None, None
    classes = [name for name in manifest.classes if name]  # '' is a missing label
    fold = _collect(lambda: make_folds(manifest, config.folds), problems) if not found else None
    test = _collect(lambda: read_test_set(config.data, classes), problems) if classes else None
    checked = audit(manifest, fold, test, workers)
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
