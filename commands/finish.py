"""After the sweep, and again at any time from the store: blend, held-out score, submission,
report."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from ensemble.selection import blend_run, remove_unused_weights
from experiment.config import EnsembleConfig
from experiment.errors import RunFolderError
from experiment.files import Files, open_files
from experiment.folds import HELD_OUT
from experiment.manifest import read_manifest
from experiment.metrics import MetricScore, accuracy, all_metrics, log_loss
from experiment.plugins import naming_plugins
from experiment.records import EnsembleRecord, HeldOutScore
from experiment.store import RunStore
from experiment.test_set import ImageSet, read_test_set
from inference.plugins import use_run_plugins
from inference.predictor import Predictor
from inference.submission import Receipt, write_submission
from inference.tta import find_tta
from reporting.report import write_report

_IN_WORDS = ("log_loss", "accuracy")


@dataclass(frozen=True)
class Finished:
    """What stands at the end of a run."""

    ensemble: EnsembleRecord
    receipt: Receipt | None
    report: str


def finish(store: RunStore, console: Console) -> Finished:
    """Blend, score held-out rows, write submission and report; then remove the weights that the
    config does not keep."""
    config = store.config()
    ensemble = blend(store, config.ensemble, console)
    receipt = submit(store, "none", None, console) if config.data.test is not None else None
    report = write_report(store)
    if config.ensemble.keep == "blend":
        count = remove_unused_weights(store, ensemble)
        console.print(f"Weights removed that the blend does not use: of {_members(count)}")
    return Finished(ensemble, receipt, report)


@naming_plugins()
def blend(store: RunStore, config: EnsembleConfig, console: Console) -> EnsembleRecord:
    """Write `ensemble/` and print what was chosen."""
    use_run_plugins(store)
    ensemble = _with_held_out_score(store, blend_run(store, config))
    gain = ensemble.best_single_oof_logloss - ensemble.oof_logloss
    console.print(
        f"[bold]Blend[/bold] of {_members(len(ensemble.members))}: OOF log loss "
        f"[bold]{ensemble.oof_logloss:.4f}[/bold], best single {ensemble.best_single} "
        f"{ensemble.best_single_oof_logloss:.4f} ({gain:+.4f} better); cross-fitted "
        f"{ensemble.crossfit_logloss:.4f} ± {ensemble.crossfit_se:.4f}; at most "
        f"{ensemble.certificate:.1e} above the best possible blend; OOF accuracy "
        f"{ensemble.oof_accuracy:.4f}{_further(ensemble.metrics)}"
    )
    for member in ensemble.members:
        console.print(f"  {member.weight:.3f}  {member.candidate} {member.variant}")
    if ensemble.members_without_weights:
        console.print(
            f"Left out, since their weights were removed (ensemble.keep: blend): "
            f"{_members(ensemble.members_without_weights)}"
        )
    held_out = ensemble.held_out
    if held_out is not None:
        console.print(
            f"Held-out rows ({held_out.rows}, seen by no trial): log loss {held_out.logloss:.4f}, "
            f"accuracy {held_out.accuracy:.4f}{_further(held_out.metrics)}"
        )
    return ensemble


def _further(metrics: Iterable[MetricScore]) -> str:
    """', macro_f1 0.9012, ...': the metrics beside the two that have their own words."""
    return "".join(f", {m.name} {m.value:.4f}" for m in metrics if m.name not in _IN_WORDS)


@naming_plugins()
def submit(store: RunStore, tta: str, out: Path | None, console: Console) -> Receipt:
    """Predict the test set with the blend; write the submission and its receipt. `out` None:
    `submission.csv` in the run folder."""
    use_run_plugins(store)
    find_tta(tta)  # a wrong name is told before the test set is read
    config = store.config()
    test = read_test_set(config.data, store.classes())
    if test is None:
        raise RunFolderError.single(
            f"{store.root}/sweep.yaml", "data.test is not set, so there is nothing to submit"
        )
    predictor = Predictor(store, cores(), tta)
    with console.status(f"Predicting {len(test)} test images") as status:
        prob = predictor.probabilities(
            [test.file(row) for row in range(len(test))],
            lambda done: status.update(
                f"Predicting {len(test)} test images: model {done} of {predictor.models}"
            ),
        )
    files, name = _target(store, out)
    receipt = write_submission(files, name, test, store.classes(), prob, predictor.ensemble, tta)
    console.print(
        f"[bold]{receipt.file}[/bold]: {receipt.rows} rows of {_form(test)}, "
        f"{len(receipt.checks)} checks passed, sha256 {receipt.sha256[:12]}…"
    )
    return receipt


def _form(test: ImageSet) -> str:
    """What a submission holds."""
    classes = len(test.class_columns)
    return "labels" if test.labels else f"probabilities of {classes} classes"


def _members(count: int) -> str:
    return f"{count} member{'' if count == 1 else 's'}"


def _target(store: RunStore, out: Path | None) -> tuple[Files, str]:
    if out is None:
        return store.files, "submission.csv"
    return open_files(out.resolve().parent), out.name


def _with_held_out_score(store: RunStore, ensemble: EnsembleRecord) -> EnsembleRecord:
    """With k: 1 and a test_fraction: the blend on the rows that nothing has seen."""
    rows = np.flatnonzero(store.folds().fold == HELD_OUT)
    if len(rows) == 0:
        return ensemble
    manifest = read_manifest(store.config().data, store.config().folds.column)
    files = [manifest.file(int(row)) for row in rows]
    prob = Predictor(store, workers=cores()).probabilities(files)
    labels = store.labels()[rows]
    scored = HeldOutScore(
        rows=len(rows),
        logloss=log_loss(prob, labels),
        accuracy=accuracy(prob, labels),
        metrics=all_metrics(prob, labels),
    )
    ensemble = ensemble.model_copy(update={"held_out": scored})
    store.blend.update(ensemble)
    return ensemble


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def reblend(root: str, method: str | None, max_members: int | None, console: Console) -> None:
    """`ensemble DIR`: with other settings than the config's, where given."""
    store = RunStore.open(root)
    update = {"method": method, "max_members": max_members}
    given = {key: value for key, value in update.items() if value is not None}
    blend(store, store.config().ensemble.model_copy(update=given), console)


def submit_run(root: str, tta: str, out: Path | None, console: Console) -> None:
    """`submit DIR`."""
    submit(RunStore.open(root), tta, out, console)


def report(root: str, console: Console) -> None:
    """`report DIR`."""
    store = RunStore.open(root)
    console.print(f"Report: {store.root}/{write_report(store)}")
