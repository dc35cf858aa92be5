"""From a recorder's folder to the table that is replayed.

Takes what `race_recorder.py` left, gives a `RaceTable`. The test probabilities of the fold trials
are kept only as what a mixture of complete candidates is scored by: a tenth of the bytes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from race_table import VARIANTS, Key, RaceTable
from sides.hard_digits import test_images
from sides.race_recorder import seen_file

from foldrace.config.schema import DataConfig, SweepConfig
from foldrace.core.temperature import fit_temperature, true_prob_at
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix


def pack(folder: Path) -> RaceTable:
    """Every fold trial must have ended. First folds may be judged after any epoch but the last."""
    store = RunStore.open(folder / "run")
    candidates = store.candidates()
    epochs = int(candidates[0].params["epochs"])
    rungs = tuple(range(1, epochs))
    size = len(VARIANTS), len(candidates)
    labels, classes = store.labels(), store.classes()
    _, targets = test_images(folder)
    truth = np.array([classes.index(target) for target in targets])
    first = int((store.folds().fold == 0).sum())
    trials = store.trials()
    logs = {key: store.train_log(*key) or "" for key in trials}
    table = RaceTable(
        config=_without_paths(store.config()),
        folds_csv=store.files.read("folds.csv").decode(),
        classes=classes,
        candidates=tuple(candidates),
        trials=trials,
        logs=logs,
        oof=np.full((*size, len(labels), len(classes)), np.nan, np.float16),
        rung_epochs=rungs,
        at_rungs=np.full((*size, len(rungs), first, len(classes)), np.nan, np.float16),
        test_true=np.full((*size, len(truth)), np.nan, np.float32),
    )
    _fill_oof(table, folder)
    _fill_rungs(table, folder)
    _fill_test(table, folder, truth)
    return table


def _without_paths(config: SweepConfig) -> SweepConfig:
    """The config without folders of the machine that recorded it."""
    training = config.training.model_copy(update={"pretrained": bool(config.training.pretrained)})
    data = DataConfig(train="data/train.csv")
    return config.model_copy(update={"data": data, "training": training})


def _fill_oof(table: RaceTable, folder: Path) -> None:
    for (candidate, fold), trial in table.trials.items():
        rows = np.flatnonzero(table.folds.fold == fold)
        place = folder / "run" / RunStore.trial_folder(candidate, fold)
        for i, variant in enumerate(VARIANTS):
            if trial.status == "finished":
                scored = np.load(place / f"oof{suffix(variant)}.npy", allow_pickle=False)
                table.oof[i, table.index[candidate], rows] = scored


def _fill_rungs(table: RaceTable, folder: Path) -> None:
    for candidate, m in table.index.items():
        for i, variant in enumerate(VARIANTS):
            epochs = _seen(folder, (candidate, 0), f"epochs_{variant}")
            reached = [rung for rung in table.rung_epochs if rung <= len(epochs)]
            for e, rung in enumerate(reached):
                table.at_rungs[i, m, e] = epochs[rung - 1]


def _fill_test(table: RaceTable, folder: Path, truth: NDArray[np.int64]) -> None:
    """At the member's temperature, then the mean over the folds: the order of a submission."""
    for candidate in table.complete:
        m = table.index[candidate]
        for i, variant in enumerate(VARIANTS):
            temperature = fit_temperature(table.oof[i, m], table.labels)
            seen = [
                _seen(folder, (candidate, fold), f"test_{variant}")
                for fold in range(table.fold_count)
            ]
            true = [true_prob_at(log_prob, truth, temperature) for log_prob in seen]
            table.test_true[i, m] = np.mean(true, axis=0)


def _seen(folder: Path, key: Key, name: str) -> NDArray[np.float16]:
    with np.load(seen_file(folder, key), allow_pickle=False) as seen:
        found: NDArray[np.float16] = seen[name] if name in seen else np.empty(0, np.float16)
    return found
