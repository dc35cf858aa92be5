"""`demo`: a real sweep from nothing, on scikit-learn's handwritten digits."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from rich.console import Console

from foldrace.core.metrics import accuracy, log_loss
from foldrace.dataset.demo import hidden_labels, write_demo
from foldrace.reporting.formats import counted
from foldrace.reporting.live import print_leaderboard
from foldrace.run_folder.store import RunStore


def demo(folder: Path, console: Console) -> None:
    """Write the digits, sweep, blend, submit and report; an existing demo is only shown."""
    store = RunStore(folder / "run")
    if store.exists:
        _show(store, folder, console)
        return
    from foldrace.commands.run import run  # heavy: showing an existing demo does without

    console.print(f"Writing scikit-learn's handwritten digits as PNG files to {folder}/data")
    config = write_demo(folder)
    run(config, str(folder / "run"), (), None, dry_run=False, smoke=False, console=console)
    _print_hidden_score(store, folder, console)


def _show(store: RunStore, folder: Path, console: Console) -> None:
    console.print(f"The demo exists already in {folder}; it is shown, not run again.")
    print_leaderboard(console, store.summaries(), limit=10)
    ensemble = store.blend.record()
    if ensemble is None:
        console.print(f"It was interrupted; go on with: foldrace resume {store.root}")
        return
    console.print(
        f"Blend of {counted(len(ensemble.members), 'member')}: OOF log loss "
        f"{ensemble.oof_logloss:.4f}, of one fold's models {ensemble.crossfit_logloss:.4f}, "
        f"of the best single one {ensemble.single_crossfit_logloss:.4f}"
    )
    _print_hidden_score(store, folder, console)
    console.print(f"Report: {store.root}/report/index.html")
    console.print(f"To run it again: remove {folder}, or choose another folder with --out")


def _print_hidden_score(store: RunStore, folder: Path, console: Console) -> None:
    """Score the submission with the labels that no trial has seen."""
    if not store.files.exists("submission.csv"):
        return
    rows = list(csv.reader(store.files.read("submission.csv").decode().splitlines()))
    prob = np.array([[float(cell) for cell in row[1:]] for row in rows[1:]])
    with hidden_labels(folder).open(encoding="utf-8", newline="") as file:
        target = {row["id"]: row["target"] for row in csv.DictReader(file)}
    labels = np.array([rows[0][1:].index(target[row[0]]) for row in rows[1:]])
    console.print(
        f"On the {len(labels)} hidden test labels: accuracy "
        f"{accuracy(prob, labels):.4f}, log loss {log_loss(prob, labels):.4f}"
    )
