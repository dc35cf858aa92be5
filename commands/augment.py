"""`augment`: a picture of what training sees, before anything trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from foldrace.checks.search import check_part
from foldrace.checks.transforms import check_transforms
from foldrace.commands.plugins import parse_with_plugins
from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import AugmentConfig, SweepConfig
from foldrace.console.machine import refuse_existing, write_out
from foldrace.core.errors import DataError, Problem, UserError
from foldrace.core.opening import MB, read_regular
from foldrace.core.plugins import Parts, naming_plugins
from foldrace.dataset.images import ImageError
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.reporting.augment_grid import augment_grid
from foldrace.reporting.charts.style import SOFTWARE
from foldrace.search_spaces.space import build_space
from foldrace.trainables.data.loader import BatchDataset, BatchRows
from foldrace.trainables.data.pixel_cache import EncodedImages, stored_side

_SAMPLES = 7  # augmented versions of each image


@naming_plugins()
def augment(
    config: Path, overrides: Sequence[str], out: Path, images: int, console: Console
) -> None:
    """Write a PNG: one row per image, first as scored, then as training sees it.

    It takes the place of an earlier one; UserError where `out` is anything else.
    """
    if not _is_ours(out):
        refuse_existing(out)
    parsed, parts = parse_with_plugins(config, overrides)
    sweep = parsed.require()
    params = _first_params(sweep, parsed.source)
    shown = AugmentConfig(
        policy=params.policy, flip=params.flip, transforms=sweep.augment.transforms
    )
    size = params.image_size
    problems = _problems(shown, size, parts)
    if problems:
        raise UserError(problems)
    manifest = read_manifest(sweep.data, sweep.folds.column)
    rows = one_per_class_first(manifest.labels, images)
    labels = [manifest.classes[label] for label in manifest.labels[rows]]
    samples = _samples(manifest, rows, params, sweep, shown, parts)
    data = augment_grid(samples, labels, f"{_title(shown)}; {params.resize} to {size} px")
    write_out(out, data)
    console.print(f"{out}: {len(rows)} images, {_SAMPLES} samples each, {_title(shown)}")


def _is_ours(out: Path) -> bool:
    """True for a picture that Foldrace has made."""
    try:
        data = read_regular(out, 100 * MB)
    except OSError:
        return False
    return data.startswith(b"\x89PNG") and f"Software\0{SOFTWARE}".encode() in data


def one_per_class_first(labels: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Choose `count` rows: the first of each class, then the second of each, and so on."""
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], labels[order])
    nth = np.arange(len(labels)) - starts  # which one of its class each row is
    chosen: NDArray[np.int64] = order[np.lexsort((labels[order], nth))][:count]
    return chosen


def _first_params(config: SweepConfig, source: str) -> TrialParams:
    """Hyperparameters of the first backbone's first candidate."""
    space, problems = build_space(config, source)
    if problems:
        raise UserError(problems)
    return space.default(config.search.backbones[0])


def _problems(config: AugmentConfig, size: int, parts: Parts) -> list[Problem]:
    policy = check_part("policy", "augment.policy", config.policy, parts)
    return [*([policy] if policy else []), *check_transforms(config.transforms, [size], parts)]


def _samples(
    manifest: Manifest,
    rows: NDArray[np.int64],
    params: TrialParams,
    config: SweepConfig,
    shown: AugmentConfig,
    parts: Parts,
) -> list[list[NDArray[np.uint8]]]:
    """Images by row and column: the scored one, then the same in several training epochs."""
    files = [manifest.file(int(row)) for row in rows]
    source = EncodedImages(files, stored_side(params.image_size, config.cache))
    batches = BatchDataset(source, params.image_size, shown, parts=parts, how=params.resize)
    places = np.arange(len(files))
    seeds = [None, *((config.search.seed, epoch) for epoch in range(_SAMPLES))]
    try:
        columns = [batches.__getitems__(BatchRows(places, s)).images.numpy() for s in seeds]
    except ImageError as error:
        raise DataError([Problem(str(error.path), error.reason)]) from error
    return [[column[place] for column in columns] for place in places]


def _title(config: AugmentConfig) -> str:
    names = [name for entry in config.transforms for name in entry]
    more = f" and {', '.join(names)}" if names else ""
    return f"policy {config.policy}, flip {config.flip:g}{more}"
