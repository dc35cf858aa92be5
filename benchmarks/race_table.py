"""The recorded fold trials that the race's benchmark replays: `benchmarks/data/fold_race.npz`.

`save` writes it, `load` reads it; no pickle. It holds, of every fold trial, its record, its log and
the rows that its raw and EMA weights scored; of first folds those rows at some epochs; of complete
candidates what a blend needs to be scored on the test images.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from harness import ROOT
from numpy.typing import NDArray

from foldrace.config.schema import SweepConfig
from foldrace.core.metrics import log_loss_of_true
from foldrace.core.temperature import calibrated_log_loss, fit_temperature, true_prob_at
from foldrace.dataset.folds import FoldTable, read_folds
from foldrace.run_folder.records import CandidateRecord, Oof, TrialRecord
from foldrace.run_folder.variants import EMA, RAW

TABLES = {
    name: ROOT / "benchmarks" / "data" / f"{name}.npz" for name in ("fold_race", "photo_race")
}
PACKED = TABLES["fold_race"]
VARIANTS = (RAW, EMA)
Key = tuple[str, int]  # candidate, fold


@dataclass(frozen=True, eq=False)
class RaceTable:
    """M candidates of K folds, N rows, C classes; where a fold trial diverged there is NaN."""

    config: SweepConfig
    folds_csv: str
    classes: tuple[str, ...]
    candidates: tuple[CandidateRecord, ...]
    trials: Mapping[Key, TrialRecord]
    logs: Mapping[Key, str]
    oof: NDArray[np.float16]  # (2, M, N, C) natural log, raw and EMA of each trial's record
    rung_epochs: tuple[int, ...]  # E numbers of epochs trained
    at_rungs: NDArray[np.float16]  # (2, M, E, rows of fold 0, C)
    test_true: NDArray[np.float32]
    """(2, M, test images): mean over the folds of the true class's probability at the member's
    temperature, which its OOF rows give. A mixture's held-out loss needs no more."""

    @cached_property
    def folds(self) -> FoldTable:
        return read_folds(self.folds_csv)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        return np.array([self.classes.index(target) for target in self.folds.targets])

    @cached_property
    def fold_count(self) -> int:
        return int(self.folds.fold.max()) + 1

    @property
    def epochs(self) -> int:
        """What all folds of all candidates cost."""
        return sum(trial.epochs_trained for trial in self.trials.values())

    @cached_property
    def index(self) -> dict[str, int]:
        """Candidate -> its place."""
        return {c.candidate: i for i, c in enumerate(self.candidates)}

    def seconds(self, key: Key) -> list[float]:
        """Of each epoch: what its backbone takes on a quiet core, since while the trials were
        recorded the machine did other work, too."""
        trial = self.trials[key]
        return [self._quiet_seconds[trial.backbone]] * trial.epochs_trained

    def epoch(self, key: Key, epochs: int) -> dict[str, Any]:
        """What the fold trial reported after so many epochs."""
        line = self._lines[key][epochs - 1]
        return {k: int(v) if k == "epoch" else float(v) for k, v in line.items()}

    def ended_well(self, key: Key) -> bool:
        return self.trials[key].status == "finished"

    @cached_property
    def _quiet_seconds(self) -> dict[str, float]:
        """Backbone -> the lower quartile of the seconds of its epochs."""
        found: dict[str, list[float]] = defaultdict(list)
        for key, lines in self._lines.items():
            found[self.trials[key].backbone] += [float(line["seconds"]) for line in lines]
        return {backbone: float(np.quantile(times, 0.25)) for backbone, times in found.items()}

    @cached_property
    def _lines(self) -> dict[Key, list[dict[str, str]]]:
        """Of train_log.csv, by epoch."""
        return {key: list(csv.DictReader(io.StringIO(log))) for key, log in self.logs.items()}

    def fold_oof(self, key: Key) -> dict[str, Oof]:
        """What a fold trial writes of its rows."""
        rows = np.flatnonzero(self.folds.fold == key[1])
        found = {}
        for i, variant in enumerate(VARIANTS):
            log_prob = self.oof[i, self.index[key[0]], rows]
            true = np.exp(log_prob[np.arange(len(rows)), self.labels[rows]].astype(np.float32))
            found[variant] = Oof(log_prob, np.minimum(true, np.float32(1)))
        return found

    @lru_cache(maxsize=4096)  # noqa: B019  one table lives as long as its process
    def rung_columns(self, candidate: str, epoch: int) -> dict[str, NDArray[np.float32]]:
        """Variant -> (n,) calibrated probability of the true class on the rows of fold 0 after so
        many epochs."""
        labels = self.labels[self.folds.fold == 0]
        place = self.rung_epochs.index(epoch)
        found = {}
        for i, variant in enumerate(VARIANTS):
            log_prob = self.at_rungs[i, self.index[candidate], place]
            temperature = fit_temperature(log_prob, labels)
            found[variant] = true_prob_at(log_prob, labels, temperature)
        return found

    @cached_property
    def complete(self) -> tuple[str, ...]:
        """Candidates all of whose folds ended well."""
        lost = {c for (c, _), trial in self.trials.items() if trial.status != "finished"}
        return tuple(c.candidate for c in self.candidates if c.candidate not in lost)

    @cached_property
    def oof_true(self) -> NDArray[np.float32]:
        """(2, M, N) calibrated probability of the true class."""
        found = np.full(self.oof.shape[:3], np.nan, np.float32)
        for i, m in product(range(len(VARIANTS)), map(self.index.__getitem__, self.complete)):
            temperature = fit_temperature(self.oof[i, m], self.labels)
            found[i, m] = true_prob_at(self.oof[i, m], self.labels, temperature)
        return found

    def first_folds(self, count: int) -> RaceTable:
        """The first `count` folds alone: rows of the others are left out, as if nobody had them."""
        header, *lines = self.folds_csv.splitlines()
        kept = self.folds.fold < count
        chosen = [line for line, keep in zip(lines, kept, strict=True) if keep]
        return replace(
            self,
            folds_csv="\n".join([header, *chosen, ""]),
            trials={key: trial for key, trial in self.trials.items() if key[1] < count},
            logs={key: log for key, log in self.logs.items() if key[1] < count},
            oof=self.oof[:, :, kept],
        )

    def first(self, count: int) -> RaceTable:
        """The first `count` candidates alone."""
        kept = self.candidates[:count]
        names = {c.candidate for c in kept}
        return replace(
            self,
            candidates=kept,
            trials={key: trial for key, trial in self.trials.items() if key[0] in names},
            logs={key: log for key, log in self.logs.items() if key[0] in names},
            oof=self.oof[:, :count],
            at_rungs=self.at_rungs[:, :count],
            test_true=self.test_true[:, :count],
        )


def save(table: RaceTable, path: Path) -> None:
    """Whole or not at all."""
    facts = {
        "config": table.config.model_dump(mode="json"),
        "folds": table.folds_csv,
        "classes": table.classes,
        "candidates": [record.model_dump(mode="json") for record in table.candidates],
        "trials": [record.model_dump(mode="json") for record in table.trials.values()],
        "logs": list(table.logs.values()),
        "rung_epochs": table.rung_epochs,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"aside-{path.name}")
    np.savez_compressed(
        aside,
        facts=np.frombuffer(json.dumps(facts).encode(), np.uint8),
        oof=table.oof,
        at_rungs=table.at_rungs,
        test_true=table.test_true,
    )
    aside.replace(path)


_UPDATES = 32  # of an epoch, for what the average of the weights was once given in
_NO_LONGER_KEYS = (("training", "patience"), ("training", "ema_decay"), ("cache", "longer_side"))


def load(path: Path = PACKED) -> RaceTable:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as kept:
        facts = json.loads(kept["facts"].tobytes())
        arrays = {name: kept[name] for name in ("oof", "at_rungs", "test_true")}
    facts["config"].pop("race", None)  # of the time of the recording
    for section, key in _NO_LONGER_KEYS:
        facts["config"][section].pop(key, None)
    for record in facts["candidates"]:
        decay = record["params"].pop("ema_decay", None)
        if decay is not None:
            record["params"]["ema_epochs"] = round(1 / (1 - decay) / _UPDATES, 4)
    trials = [_scored(record) for record in facts["trials"]]
    keys = [(trial.candidate, trial.fold) for trial in trials]
    return _calibrated(
        RaceTable(
            config=SweepConfig.model_validate_json(json.dumps(facts["config"])),
            folds_csv=facts["folds"],
            classes=tuple(facts["classes"]),
            candidates=tuple(CandidateRecord.model_validate(r) for r in facts["candidates"]),
            trials=dict(zip(keys, trials, strict=True)),
            logs=dict(zip(keys, facts["logs"], strict=True)),
            rung_epochs=tuple(facts["rung_epochs"]),
            **arrays,
        )
    )


def _scored(record: dict[str, Any]) -> TrialRecord:
    """A record, older ones too: their scores are of the best epoch and may not be calibrated."""
    for score in record["variants"].values():
        score.setdefault("calibrated_logloss", score["val_logloss"])
        if "best_epoch" in score:
            score["epoch"] = score.pop("best_epoch")
    return TrialRecord.model_validate(record)


def _calibrated(table: RaceTable) -> RaceTable:
    """The table with calibrated losses, which its recording may have had none of.

    Epochs stay those of the recording. In the logs only the rungs of first folds have a
    calibrated loss, as probabilities were kept of them alone.
    """
    if "val_calibrated_logloss" in next(iter(table.logs.values()), "val_calibrated_logloss"):
        return table
    trials = {key: _calibrated_trial(table, key) for key in table.trials}
    return replace(table, trials=trials, logs={key: _calibrated_log(table, key) for key in trials})


def _calibrated_trial(table: RaceTable, key: Key) -> TrialRecord:
    trial = table.trials[key]
    if not table.ended_well(key):
        return trial
    labels = table.labels[table.folds.fold == key[1]]
    losses = {
        variant: calibrated_log_loss(oof.log_prob, labels, oof.true_prob)
        for variant, oof in table.fold_oof(key).items()
    }
    scores = {
        name: score.model_copy(update={"calibrated_logloss": losses[name]})
        for name, score in trial.variants.items()
    }
    return trial.model_copy(update={"variants": scores})


def _calibrated_log(table: RaceTable, key: Key) -> str:
    header, *lines = table.logs[key].splitlines()
    columns = ",".join(f"{prefix}val_calibrated_logloss" for prefix in ("", "ema_"))
    found = [f"{header},{columns}"]
    for epochs, line in enumerate(lines, start=1):
        known = (
            table.rung_columns(key[0], epochs)
            if key[1] == 0 and epochs in table.rung_epochs
            else {}
        )
        losses = (log_loss_of_true(known[v]) if v in known else math.nan for v in VARIANTS)
        found.append(",".join([line, *map(str, losses)]))
    return "\n".join(found) + "\n"
