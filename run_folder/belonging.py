"""What belongs to a run: its fold trials to its folds and settings, the data to its rows.

Takes a run folder, gives problems that name what differs and how to go on. Nothing is changed or
removed here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from foldrace.config.load import dotted
from foldrace.config.schema import SweepConfig
from foldrace.config.texts import inline_yaml
from foldrace.core.errors import DataError, Problem, RunFolderError, listing
from foldrace.dataset.folds import FoldTable, make_folds
from foldrace.dataset.left_out import LISTED_TWICE, read_left_out
from foldrace.dataset.manifest import Manifest, read_manifest
from foldrace.dataset.places import common_root
from foldrace.run_folder.candidates import FOLDS, Trials
from foldrace.run_folder.oof import array_of, npy
from foldrace.run_folder.records import TrialRecord
from foldrace.run_folder.store import RunStore

EXTENDABLE = (
    "search.candidates",
    "search.backbones",
    "search.space",
    "search.per_backbone",
    "search.sampler",
    "search.objective",
    "search.points",
    "search.warm_start",
    "search.teacher",
    "search.min_share",
    "search.fold_trials",
    "search.storage",
    "race.",
    "resources.",
    "ensemble.",
    "notify.",
)
"""Beginnings of the keys that `resume --set` may change: everything else would make old and new
trials incomparable."""
PLACES = (
    *("data.train", "data.exclude", "data.fixes", "data.test", "data.sample_submission"),
    *("data.submission", "data.encoding", "data.on_bad_test_image"),
)
"""Beginnings of the keys that say where the data lie, and the form of the test set."""
_WITHOUT_EFFECT = ("name", "smoke", "plugins", "cache.max_gb")
_IMAGE_SIZES = "image_sizes.npy"
_SHOWN = 20
_STATS_AT_ONCE = 16  # a network disk answers slowly, but many


def trained_settings(config: SweepConfig) -> dict[str, JsonValue]:
    """Dotted key -> value, for what of the config decides how any candidate's trial is trained."""
    others = (*EXTENDABLE, *PLACES, *_WITHOUT_EFFECT)
    return {key: value for key, value in dotted(config).items() if not key.startswith(others)}


def strange_trials(
    store: RunStore, records: Iterable[TrialRecord], folds_alone: bool = False
) -> list[Problem]:
    """What of folds.csv and sweep.yaml is not what these fold trials were trained with.

    `folds_alone` leaves sweep.yaml out. Failed trials do not count: none of their results is used.
    """
    ended = [record for record in records if record.status != "failed"]
    if not ended:
        return []
    other = [record for record in ended if record.folds_hash != store.folds().hash]
    problems = []
    if other:
        message = (
            f"is not the one that {_trials(other)} were trained on; put that one back, or start a "
            "new run"
        )
        problems.append(Problem(f"{store.root}/{FOLDS}", message))
    return problems if folds_alone else [*problems, *_other_settings(store, ended)]


def require_own_trials(store: RunStore, folds_alone: bool = False) -> Trials:
    """All fold trials that ended; RunFolderError where `strange_trials` finds something."""
    stored = store.stored_trials()
    problems = strange_trials(store, stored.values(), folds_alone)
    if problems:
        raise RunFolderError(problems)
    return stored


def _other_settings(store: RunStore, ended: Iterable[TrialRecord]) -> Iterator[Problem]:
    now = trained_settings(store.config())
    trained: dict[tuple[str, str], list[TrialRecord]] = defaultdict(list)
    for record in ended:
        # A key that only one of both has is one of another version.
        for key in record.settings.keys() & now.keys():
            if record.settings[key] != now[key]:
                trained[key, inline_yaml(record.settings[key])].append(record)
    for (key, value), records in sorted(trained.items(), key=lambda item: item[0]):
        yield Problem(
            f"{store.root}/sweep.yaml",
            f"{key} is {inline_yaml(now[key])}, but {_trials(records)} were trained with {value}; "
            "put that back, or start a new run",
        )


def _trials(records: Sequence[TrialRecord]) -> str:
    """`6 fold trials that have ended (c0000 fold0, c0000 fold1, ...)`."""
    names = listing(f"{record.candidate} fold{record.fold}" for record in records)
    return f"{len(records):,} fold trial{'s' * (len(records) > 1)} that ended ({names})"


def save_image_sizes(store: RunStore, manifest: Manifest) -> None:
    """Write the size of every training image's file, by which its content is known again."""
    store.files.write(_IMAGE_SIZES, npy(_image_sizes(manifest)))


def training_data(store: RunStore) -> Manifest:
    """The training rows where the config says that they lie.

    What was left out when the run began is left out. DataError where they cannot be read,
    RunFolderError where they are not those of folds.csv: other images, labels, groups or given
    folds, or files of another size than when the run began.
    """
    config, table = store.config(), store.folds()
    with telling_where_data_lay(store):
        manifest = _without_left_out(store, read_manifest(config.data, config.folds.column))
    if manifest.image_paths != table.image_paths:
        raise RunFolderError.single(
            f"{store.root}/{FOLDS}", _other_images(table, manifest, config.data.train)
        )
    problems = [*_other_cells(store, manifest, table), *_other_files(store, manifest)]
    if problems:
        raise RunFolderError(problems)
    return manifest


def _without_left_out(store: RunStore, manifest: Manifest) -> Manifest:
    """The rows but those that `left_out.csv` names."""
    left_out = [one for one in read_left_out(store.files) if one.data == "training"]
    # Of rows with one path it is the table that says which stays.
    gone = {one.image_path for one in left_out if one.reason != LISTED_TWICE}
    kept = [row for row, path in enumerate(manifest.image_paths) if path not in gone]
    return manifest.chosen(np.array(kept, dtype=np.int64))


@contextmanager
def telling_where_data_lay(store: RunStore) -> Iterator[None]:
    """Add to a DataError, where data of the run are gone, which option says where they are now."""
    try:
        yield
    except DataError as error:
        data, now = RunStore(store.root).config().data, store.config().data.places
        unmoved = {key: path for key, path in data.places.items() if now.get(key) == path}
        named = {problem.where for problem in error.problems}
        gone = [k for k, p in unmoved.items() if f"data.{k}" in named and not Path(p).exists()]
        if not gone:
            raise
        message = (
            f"data.{gone[0]} is gone: where the data have moved, `--data-root DIR` names the "
            f"folder that they now have in place of {common_root(data)}, `--set "
            f"data.{gone[0]}=PATH` a single place"
        )
        raise DataError([*error.problems, Problem(f"{store.root}/sweep.yaml", message)]) from error


def _other_images(table: FoldTable, manifest: Manifest, train: str) -> str:
    here, there = set(table.image_paths), set(manifest.image_paths)
    gone = listing([path for path in table.image_paths if path not in there], 5)
    new = listing([path for path in manifest.image_paths if path not in here], 5)
    differences = [f"without {gone}"] if gone else []
    differences += [f"with {new} as well"] if new else []
    what = ", ".join(differences) or "in another order"
    return (
        f"lists {len(table.image_paths):,} images, but {train} now gives {len(manifest):,}, "
        f"{what}; put the data back, or start a new run"
    )


def _other_cells(store: RunStore, manifest: Manifest, table: FoldTable) -> Iterator[Problem]:
    """The rows whose label, group or given fold is another one than when the run began."""
    none = ("",) * len(manifest)
    columns: list[tuple[str, Sequence[object], Sequence[object]]] = [
        ("label", table.targets, [manifest.classes[label] for label in manifest.labels]),
        ("group", table.groups or none, _groups_now(store, manifest, table)),
    ]
    folds = store.config().folds
    if folds.column is not None:
        columns.append(("fold", table.fold.tolist(), make_folds(manifest, folds).tolist()))
    for name, before, now in columns:
        rows = [row for row in range(len(manifest)) if before[row] != now[row]]
        for row in rows[:_SHOWN]:
            message = f"{table.image_paths[row]}: the {name} is {now[row]!r}, was {before[row]!r}"
            yield Problem(_line(manifest, row), message)
        if rows:
            yield Problem(
                f"{store.root}/{FOLDS}",
                f"has another {name} than {manifest.table or store.config().data.train} in "
                f"{len(rows):,} of {len(manifest):,} rows, since the run began with those; put "
                "them back, or start a new run with the new ones",
            )


def _groups_now(store: RunStore, manifest: Manifest, table: FoldTable) -> Sequence[str]:
    """Each row's group by the data as they are; '' where there are none."""
    if store.config().data.duplicates != "group" or table.groups is None:
        return manifest.groups or ("",) * len(manifest)
    # Copies have joined groups when the run began: rows of one group must lie in one of these.
    joined: dict[str, str] = {}
    names = manifest.groups or table.groups
    return [joined.setdefault(a, b) for a, b in zip(names, table.groups, strict=True)]


def _other_files(store: RunStore, manifest: Manifest) -> Iterator[Problem]:
    """The images that are gone or of another size; nothing is known of an older version's run."""
    if not store.files.exists(_IMAGE_SIZES):
        return
    try:
        before = array_of(store.files.read(_IMAGE_SIZES))
    except ValueError:
        return
    if before.shape != (len(manifest),):
        return
    rows = np.flatnonzero(_image_sizes(manifest) != before)
    for row in rows[:_SHOWN].tolist():
        message = f"{manifest.image_paths[row]}: gone, or of another size than when the run began"
        yield Problem(_line(manifest, row), message)
    if len(rows):
        yield Problem(
            f"training images in {manifest.image_root}",
            f"{len(rows):,} of {len(manifest):,} are not those that the run began with; put them "
            "back (`--data-root DIR` where they have moved), or start a new run",
        )


def _line(manifest: Manifest, row: int) -> str:
    if manifest.lines is None:
        return str(manifest.image_root)
    return f"{manifest.table} line {manifest.lines[row]}"


def _image_sizes(manifest: Manifest) -> NDArray[np.int64]:
    """(n,) bytes of each row's file; -1 where there is none."""

    def size(row: int) -> int:
        try:
            return os.stat(manifest.file(row)).st_size
        except OSError:
            return -1

    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        return np.array(list(pool.map(size, range(len(manifest)))), dtype=np.int64)
