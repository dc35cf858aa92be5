"""A run folder as the tests of the command line read it, with other packages than ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from click.testing import Result
from numpy.typing import NDArray

Cli = Callable[..., Result]
SAME = 2e-4
"""Absolute, between probabilities of one blend computed in other batches or processes: the
temperatures of so few rows multiply the last bits of the logits by a hundred."""

KEPT = 5e-3
"""Absolute, between `predict` and a submission: of the test set log-probabilities are kept as
float16, steps of 2**-10 around 1, which the same temperatures multiply by ten and more."""


def succeeded(result: Result) -> Result:
    """The result of a command that has to end well."""
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


def undecided(prob: NDArray[np.float64]) -> float:
    """The share of the rows whose two likeliest classes are equal up to `SAME`."""
    ordered = np.sort(prob, axis=1)
    return float((ordered[:, -1] - ordered[:, -2] < SAME).mean())


@dataclass(frozen=True)
class Run:
    """A run folder and the project that it was made from."""

    folder: Path
    project: Any

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))

    def table(self, name: str) -> pd.DataFrame:
        return pd.read_csv(self.folder / name)

    @property
    def classes(self) -> list[str]:
        return list(self.json("classes.json"))

    def labels(self) -> NDArray[np.int64]:
        """(n,) of the rows of folds.csv."""
        return np.array([self.classes.index(t) for t in self.table("folds.csv")["target"]])

    def oof(self, candidate: str, variant: str) -> NDArray[np.float64]:
        """(n, C) from the trial folders; rows without a prediction are NaN."""
        prob = np.full((len(self.labels()), len(self.classes)), np.nan)
        suffix = "" if variant == "raw" else f"_{variant}"
        for folder in sorted((self.folder / "trials" / candidate).glob("fold*")):
            log_prob = np.load(folder / f"oof{suffix}.npy", allow_pickle=False)
            assert log_prob.dtype == np.float16
            rows = np.load(folder / "rows.npy", allow_pickle=False)
            assert np.isnan(prob[rows]).all()  # no row twice
            prob[rows] = np.exp(log_prob.astype(np.float64))
        return prob / prob.sum(axis=1, keepdims=True)

    def trial_files(self) -> dict[str, tuple[int, int]]:
        """What tells whether a finished trial was written again."""
        found = sorted(self.folder.glob("trials/*/*/trial.json"))
        stats = {str(path.relative_to(self.folder)): path.stat() for path in found}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}

    @property
    def blend(self) -> dict[str, Any]:
        """The record of the blend."""
        found: dict[str, Any] = self.json("ensemble/ensemble.json")
        return found

    def folds(self) -> pd.DataFrame:
        return self.table("folds.csv")

    def good(self, noise: float) -> NDArray[np.float64]:
        """(rows, C) OOF probabilities that are better than those of the trials."""
        labels = self.labels()
        shape = len(labels), len(self.classes)
        logits = 4 * np.eye(shape[1])[labels] + noise * np.random.default_rng(1).normal(size=shape)
        return np.asarray(np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True))

    def test_ids(self) -> list[str]:
        """In the order of the submission."""
        return [row[0] for row in self.project.rows("sample submission.csv")[1:]]

    def submission(self) -> NDArray[np.float64]:
        """(n, C) with the columns in the order of the classes."""
        return np.asarray(pd.read_csv(self.folder / "submission.csv")[self.classes])

    def contents(self) -> dict[str, bytes]:
        """Of all files but logs and what is derived."""
        derived = {"matrix", "speed.json"}
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in files
            if not derived & {path.name, path.parent.name} and path.parent.name != "logs"
        }
