"""After the sweep, and again at any time from the store: blend, held-out score, submission,
report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from foldrace.commands.ensemble import blend, count_members
from foldrace.commands.terminal import cores
from foldrace.core.errors import RunFolderError
from foldrace.core.files import Files, open_files
from foldrace.core.plugins import naming_plugins
from foldrace.dataset.test_set import ImageSet, read_test_set
from foldrace.ensemble.selection.select import remove_unused_weights
from foldrace.inference.plugins import use_run_plugins
from foldrace.inference.predictor import Predictor
from foldrace.inference.submission import Receipt, write_submission
from foldrace.inference.tta import find_tta
from foldrace.reporting.report import write_report
from foldrace.run_folder.records import EnsembleRecord
from foldrace.run_folder.store import RunStore


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
        console.print(f"Weights removed that the blend does not use: of {count_members(count)}")
    return Finished(ensemble, receipt, report)


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
        prob = predictor.test_probabilities(
            test,
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
    if receipt.unvalidated:
        shares = ", ".join(f"{u.name} ({u.share:.3f} of each row)" for u in receipt.unvalidated)
        console.print(f"[bold]Unvalidated[/bold] predictions in it, backed by no score: {shares}")
    return receipt


def _form(test: ImageSet) -> str:
    """What a submission holds."""
    classes = len(test.class_columns)
    return "labels" if test.labels else f"probabilities of {classes} classes"


def _target(store: RunStore, out: Path | None) -> tuple[Files, str]:
    if out is None:
        return store.files, "submission.csv"
    return open_files(out.resolve().parent), out.name


def submit_run(root: str, tta: str, out: Path | None, console: Console) -> None:
    """`submit DIR`."""
    submit(RunStore.open(root), tta, out, console)


def report(root: str, console: Console) -> None:
    """`report DIR`."""
    store = RunStore.open(root)
    console.print(f"Report: {store.root}/{write_report(store)}")
