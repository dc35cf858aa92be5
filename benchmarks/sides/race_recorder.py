"""All folds of all candidates trained for real, once: what the race's benchmark replays.

Takes a folder and the name of a table, leaves a run folder `run` in it and a file
`seen/<candidate>_fold<k>.npz` for each fold trial. Goes on where it was interrupted; two processes,
each on one core.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from race_table import Key
from sides.fold_spec import Silent
from sides.hard_digits import test_images, write_hard_digits
from sides.small_photos import write_small_photos

from foldrace.config.load import parse_config
from foldrace.config.schema import SweepConfig
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.inference.run_models import BATCH, RunModels
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import weights_name
from foldrace.search_spaces.space import build_space
from foldrace.trainables import trial as trial_module
from foldrace.trainables.data.loader import Batch, loader_settings
from foldrace.trainables.data.trial_data import TrialData
from foldrace.trainables.history import FoldScore, score_fold
from foldrace.trainables.predict import log_probabilities, scoring_loader
from foldrace.trainables.spec import FoldTrial, TrialSpec
from foldrace.trainables.state import TrainState
from foldrace.trainables.trial import run_trial


@dataclass(frozen=True)
class Recording:
    """What a table is recorded of."""

    write: Callable[[Path, int, int], Path]
    """Folder, candidates, epochs -> path of the config."""
    candidates: int
    epochs: int


RECORDINGS = {
    "fold_race": Recording(write_hard_digits, 75, 12),
    "photo_race": Recording(write_small_photos, 40, 8),
}
_PROCESSES = 2
_NICE = 15


def record(folder: Path, name: str) -> None:
    """Train whatever `folder` does not hold yet of a table."""
    folder = folder.resolve()
    os.environ["FOLDRACE_CACHE"] = str(folder / "cache")
    os.environ["OMP_NUM_THREADS"] = "1"
    store = _run_folder(folder, RECORDINGS[name])
    keys = [(c.candidate, k) for c in store.candidates() for k in range(store.fold_count)]
    left = [key for key in keys if not seen_file(folder, key).is_file()]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(_PROCESSES, context, os.nice, (_NICE,)) as pool:
        for done, line in enumerate(pool.map(partial(_record_one, folder), left), 1):
            print(f"{len(keys) - len(left) + done}/{len(keys)} {line}", flush=True)


def seen_file(folder: Path, key: Key) -> Path:
    """What was seen of a fold trial beside what the run folder keeps: `test_<variant>`
    (images, C) and, of first folds, `epochs_<variant>` (epochs, rows, C): float16 natural-log
    probabilities."""
    return folder / "seen" / f"{key[0]}_fold{key[1]}.npz"


def _run_folder(folder: Path, recording: Recording) -> RunStore:
    store = RunStore(folder / "run")
    if store.exists:
        return store
    path = recording.write(folder, recording.candidates, recording.epochs)
    config = parse_config(path, []).require()
    manifest = read_manifest(config.data)
    store.create(config, folds_csv(manifest, make_folds(manifest, config.folds)), manifest.classes)
    for candidate in _drawn(config):
        store.save_candidate(candidate)
    return store


def _drawn(config: SweepConfig) -> Iterator[CandidateRecord]:
    """At random from the config's space, each backbone as often as any other."""
    space, _ = build_space(config, "")
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.search.seed))
    for number in range(config.search.candidates):
        backbone = space.backbones[number % len(space.backbones)]
        drawn = study.ask(fixed_distributions=space.distributions(backbone)).params
        params = space.decode(backbone, drawn)
        yield CandidateRecord(
            candidate=f"c{number:04d}", backbone=backbone, params=params.as_dict()
        )


class _Watching:
    """Stands in for `score_fold`, and keeps the probabilities of every variant after each epoch."""

    def __init__(self) -> None:
        self._seen: defaultdict[str, list[NDArray[np.float16]]] = defaultdict(list)

    def score_fold(
        self, state: TrainState, data: TrialData, trial: FoldTrial, batches: Iterable[Batch]
    ) -> dict[str, FoldScore]:
        """The scores, as the product makes them."""
        found = score_fold(state, data, trial, batches)
        for name, score in found.items():
            self._seen[name].append(score.oof.log_prob)
        return found

    def arrays(self) -> dict[str, NDArray[np.float16]]:
        """`epochs_<variant>`: see `seen_file`."""
        return {f"epochs_{name}": np.stack(epochs) for name, epochs in self._seen.items()}


def _record_one(folder: Path, key: Key) -> str:
    """Train a fold trial, look at the test images with it, drop its weights.

    One that was cut off begins anew, so that each of its epochs is seen.
    """
    torch.set_num_threads(1)
    store = RunStore.open(folder / "run")
    store.forget_trial(*key)
    spec = TrialSpec(
        run=store.root,
        image_root=str(folder / "data"),
        candidate=key[0],
        fold=key[1],
        use_gpu=False,
    )
    watching = _Watching()
    with mock.patch.object(trial_module, "score_fold", watching.score_fold):
        found = run_trial(spec, Silent())
    tests = {f"test_{name}": _test(folder, store, key, name) for name in found.variants}
    _save(seen_file(folder, key), tests | (watching.arrays() if key[1] == 0 else {}))
    for name in found.variants:
        store.files.delete(weights_name(*key, name))
    losses = ", ".join(f"{n} {s.val_logloss:.3f}" for n, s in found.variants.items())
    return f"{key[0]} fold{key[1]} {found.backbone} {found.status}: {losses}, {found.seconds:.1f} s"


def _test(folder: Path, store: RunStore, key: Key, variant: str) -> NDArray[np.float16]:
    """(images, C) natural-log probabilities."""
    models = RunModels(store, torch.device("cpu"))
    model = models.open(key[0], variant, key[1])
    files, _ = test_images(folder)
    source = models.images(files, model.model_config, 1, "")
    settings = loader_settings(1, "cpu")
    loader = scoring_loader(source, np.arange(len(files)), model.model_config, BATCH, settings)
    log_prob, _ = log_probabilities(
        model.module, loader, torch.device("cpu"), model.autocast, model.model_config.activation
    )
    return np.maximum(log_prob, np.finfo(np.float16).min).astype(np.float16)


def _save(path: Path, arrays: Mapping[str, NDArray[np.float16]]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"aside-{path.name}")
    np.savez(aside, **arrays)  # type: ignore[arg-type]
    aside.replace(path)
