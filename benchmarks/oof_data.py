"""The OOF data of the blend's benchmarks, made once and kept in `build/bench`.

digits       156 scikit-learn classifiers on noised digits (`sides/digit_models.py`), 1,797 rows
sign_digits  fold trials of Foldrace itself on photos of hands: a `sweep.py run` of
             `configs/sign_digits.yaml`, shorter and wider, with raw, EMA and snapshot weights
any run      the members of a run folder that is there already
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from harness import ROOT, environment
from numpy.typing import NDArray

from foldrace.core.metrics import normalise
from foldrace.ensemble.pool import Member
from foldrace.run_folder.store import RunStore

CACHE = ROOT / "build" / "bench"
_QUICK_MEMBERS = 24
_SIGNS = (
    "search.candidates=16",
    "race.rule=none",
    "search.space.snapshots=2",
    "folds.k=5",
    "training.epochs=8",
    "training.image_size=40",
    "data.test=null",
    "data.test_images=null",
    "data.sample_submission=null",
)


@dataclass(frozen=True, eq=False)
class OofData:
    """M members on N rows of C classes."""

    name: str
    members: tuple[Member, ...]
    log_prob: NDArray[np.float32]  # (M, N, C)
    labels: NDArray[np.int64]  # (N,)
    folds: NDArray[np.int64]  # (N,)

    @property
    def true_prob(self) -> NDArray[np.float32]:
        """(M, N)"""
        return np.exp(self.log_prob[:, np.arange(len(self.labels)), self.labels])

    def rows(self, chosen: NDArray[np.intp]) -> OofData:
        """Only these rows."""
        return replace(
            self,
            log_prob=self.log_prob[:, chosen],
            labels=self.labels[chosen],
            folds=self.folds[chosen],
        )


def digits(quick: bool = False) -> OofData:
    """About two minutes the first time; quick: 24 of the 156 members."""
    from sides import digit_models

    def make() -> OofData:
        models = digit_models.digit_models()
        models = models[:: len(models) // _QUICK_MEMBERS] if quick else models
        pixels, labels, folds = digit_models.noised_digits()
        log_prob = digit_models.oof_log_prob(models, pixels, labels, folds)
        members = tuple(Member(f"c{i:04d}", backbone=name) for i, (name, _) in enumerate(models))
        return OofData("digits", members, log_prob, labels, folds)

    source = hashlib.sha256(Path(digit_models.__file__).read_bytes()).hexdigest()[:12]
    return _kept(f"digits-{'quick-' if quick else ''}{source}", make)


def sign_digits(folder: Path) -> OofData:
    """From the folder with sign_digits' train.zip; trains for a quarter of an hour or more the
    first time, and goes on where that was interrupted."""
    run = CACHE / "sign_digits"
    if not (run / "ensemble" / "ensemble.json").is_file():
        sets = [f"data.train={(folder / 'train.zip').resolve()}", *_SIGNS]
        command = ["resume", str(run)] if (run / "sweep.yaml").is_file() else [
            "run", str(ROOT / "configs" / "sign_digits.yaml"), "--out", str(run),
            *(word for value in sets for word in ("--set", value)),
        ]  # fmt: skip
        subprocess.run(
            [sys.executable, str(ROOT / "sweep.py"), *command],
            check=True,
            stdout=subprocess.DEVNULL,
            env=environment(FOLDRACE_CACHE=str(CACHE / "pixels")),
        )
    return run_folder(run)


def run_folder(root: Path) -> OofData:
    """All variants of a run's complete candidates."""
    store = RunStore.open(root)
    scored = store.scored_rows()
    members = [
        Member(summary.candidate.candidate, variant, summary.candidate.backbone)
        for summary in store.summaries()
        if summary.status == "complete"
        for variant in summary.variants
    ]
    log_prob = [np.log(normalise(store.oof(m.candidate, m.variant))) for m in members]
    return OofData(
        name=store.config().name,
        members=tuple(members),
        log_prob=np.stack(log_prob).astype(np.float32),
        labels=store.labels()[scored],
        folds=store.folds().fold[scored],
    )


def real_image_set(data: Path) -> OofData:
    """`--data`: a run folder, or the folder with sign_digits' train.zip."""
    return run_folder(data) if (data / "sweep.yaml").is_file() else sign_digits(data)


def save(data: OofData, path: Path) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"aside-{path.name}")
    np.savez(
        aside,
        name=np.array(data.name),
        members=np.array([(m.candidate, m.variant, m.backbone) for m in data.members]),
        log_prob=data.log_prob,
        labels=data.labels,
        folds=data.folds,
    )
    aside.replace(path)


def load(path: Path) -> OofData:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as kept:
        members = tuple(Member(*(str(text) for text in texts)) for texts in kept["members"])
        name = str(kept["name"])
        return OofData(name, members, kept["log_prob"], kept["labels"], kept["folds"])


def _kept(name: str, make: Callable[[], OofData]) -> OofData:
    path = CACHE / f"{name}.npz"
    if not path.is_file():
        save(make(), path)
    return load(path)
