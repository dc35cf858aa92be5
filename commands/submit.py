"""`submit`: predict the test set with the blend; write the submission and its receipt.

Takes a run folder with a blend; `predict_test_set` is the same at the end of a run.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from foldrace.commands.machine import cores
from foldrace.core.errors import RunFolderError
from foldrace.core.files import Files, open_files
from foldrace.core.plugins import naming_plugins
from foldrace.dataset.test_set import ImageSet, read_test_set
from foldrace.inference.plugins import run_parts
from foldrace.inference.predictor import Predictor
from foldrace.inference.submission import Receipt, write_submission
from foldrace.inference.tta import find_tta
from foldrace.run_folder.store import RunStore


def submit(root: str, tta: str, out: Path | None, console: Console) -> None:
    """Write the submission of a run folder to `out`, or to its `submission.csv`."""
    predict_test_set(RunStore.open(root), tta, out, console)


@naming_plugins()
def predict_test_set(store: RunStore, tta: str, out: Path | None, console: Console) -> Receipt:
    """Write the submission and its receipt; RunFolderError where the config has no test set."""
    find_tta(tta, run_parts(store))  # a wrong name is told before the test set is read
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
    _print_receipt(receipt, test, console)
    return receipt


def _target(store: RunStore, out: Path | None) -> tuple[Files, str]:
    if out is None:
        return store.files, "submission.csv"
    return open_files(out.resolve().parent), out.name


def _print_receipt(receipt: Receipt, test: ImageSet, console: Console) -> None:
    form = "labels" if test.labels else f"probabilities of {len(test.class_columns)} classes"
    console.print(
        f"[bold]{receipt.file}[/bold]: {receipt.rows} rows of {form}, "
        f"{len(receipt.checks)} checks passed, sha256 {receipt.sha256[:12]}…"
    )
    if receipt.unvalidated:
        shares = ", ".join(f"{u.name} ({u.share:.3f} of each row)" for u in receipt.unvalidated)
        console.print(f"[bold]Unvalidated[/bold] predictions in it, backed by no score: {shares}")
