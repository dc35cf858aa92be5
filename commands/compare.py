"""`compare`: two runs or more side by side.

Takes run folders, gives a folder with a page, its charts and tables; prints what matters.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from rich.console import Console

from foldrace.comparison.differences import config_differences, image_rows, pairs
from foldrace.comparison.models import Model, models
from foldrace.comparison.page import (
    Found,
    charts_of,
    page_of,
    rows_sentence,
    together_sentence,
    with_se,
)
from foldrace.comparison.sides import Comparison, Side, compare_runs
from foldrace.comparison.submissions import (
    SharedTestRows,
    TestPredictions,
    rows_csv,
    shared_test_rows,
)
from foldrace.comparison.together import together
from foldrace.console.machine import cores
from foldrace.core.errors import UserError
from foldrace.core.files import open_files, to_bytes
from foldrace.dataset.test_set import read_test_set
from foldrace.run_folder.allowed import open_allowed

TEST_ROWS = "all_experiments_submission_compare.csv"


def compare(
    roots: Sequence[str],
    out: Path | None,
    console: Console,
    trust_plugins: bool = False,
    without_test: bool = False,
) -> Path:
    """Write the comparison to `out`, by default `comparisons/<time>`; gives that folder.

    UserError where `out` is there already, RunFolderError where the runs cannot be compared. Of a
    test set that cannot be predicted a line says why, and the rest is written.
    """
    now = datetime.now(UTC)
    target = out or Path("comparisons") / now.strftime("%Y%m%d-%H%M%S")
    if target.exists():
        raise UserError.single(f"--out {target}", "exists; remove it or name another folder")
    comparison = compare_runs(roots)
    console.print(rows_sentence(comparison), soft_wrap=True)
    found = Found(
        comparison=comparison,
        models=models(comparison),
        pairs=pairs(comparison),
        together=together(comparison),
        keys=config_differences([side.store.config() for side in comparison.sides]),
        test=None,
    )
    _print_found(found, console)
    id_column = "id"
    if not without_test:
        test, id_column = _test_rows(comparison, trust_plugins, console)
        found = replace(found, test=test)
    files = _contents(found, id_column, now.strftime("%Y-%m-%d %H:%M UTC"))
    folder = open_files(target.resolve())
    for name, data in files.items():
        folder.write(name, data)
    console.print(f"Comparison: {target}/index.html ({', '.join(n for n in files if '.csv' in n)})")
    return target


def _contents(found: Found, id_column: str, written: str) -> dict[str, bytes]:
    """The files of the comparison, the page last."""
    pngs = charts_of(found)
    names = [side.name for side in found.comparison.sides]
    tables = {
        "differences.csv": _csv(
            ("first", "second", "logloss", "logloss_se", "accuracy", "accuracy_se",
             "only_first_right", "only_second_right"),
            [(p.first, p.second, p.loss.value, p.loss.se, p.accuracy.value, p.accuracy.se,
              p.only_first_right, p.only_second_right) for p in found.pairs],
        ),
        "config_differences.csv": _csv(
            ("key", *names), [(one.key, *one.values) for one in found.keys]
        ),
        "images.csv": _images_csv(found),
        "models.csv": _csv(
            ("run", "model", "backbone", "oof_logloss", "oof_accuracy"),
            [_model_row(model) for model in found.models],
        ),
    }  # fmt: skip
    if found.test is not None:
        tables[TEST_ROWS] = rows_csv(found.test, id_column, found.comparison.classes)
    page = {"index.html": page_of(found, pngs, written)}
    return {**{name: to_bytes(text) for name, text in tables.items()}, **pngs,
            **{name: text.encode(errors="replace") for name, text in page.items()}}  # fmt: skip


def _model_row(model: Model) -> tuple[object, ...]:
    return model.run, model.name, model.backbone, model.logloss, model.accuracy


def _images_csv(found: Found) -> str:
    names = [side.name for side in found.comparison.sides]
    header = ("image_path", "target", *(f"{name}_prediction" for name in names),
              *(f"{name}_loss" for name in names))  # fmt: skip
    rows = image_rows(found.comparison)
    return _csv(header, [(one.path, one.label, *one.predicted, *one.losses) for one in rows])


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(
        [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows
    )
    return text.getvalue()


def _print_found(found: Found, console: Console) -> None:
    comparison = found.comparison
    for side in comparison.sides:
        loss, hits = comparison.losses(side).mean(), comparison.hits(side).mean()
        console.print(f"{side.name}: OOF log loss {loss:.4f}, accuracy {hits:.4f}")
    for pair in found.pairs:
        word = "clear" if pair.loss.is_clear else "not clear"
        console.print(
            f"{pair.second} less {pair.first}: log loss {with_se(pair.loss)} ({word}), "
            f"accuracy {with_se(pair.accuracy)}",
            soft_wrap=True,
        )
    if found.together is not None:
        names = [side.name for side in comparison.sides]
        console.print(together_sentence(found.together, names), soft_wrap=True)
    console.print(f"{len(found.keys)} keys of the configs differ")


def _test_rows(
    comparison: Comparison, trust_plugins: bool, console: Console
) -> tuple[SharedTestRows | None, str]:
    """The shared test images with the name of their column of ids."""
    sides: list[TestPredictions] = []
    id_column = "id"
    for side in comparison.sides:
        try:
            predictions, id_column = _predicted(comparison, side, trust_plugins)
        except UserError as error:
            for problem in error.problems:
                console.print(f"warning {TEST_ROWS} is not written: {problem}", soft_wrap=True)
            return None, id_column
        if predictions is None:
            console.print(f"{TEST_ROWS} is not written: {side.name} has no test set")
            return None, id_column
        sides.append(predictions)
    rows = shared_test_rows(sides)
    if rows is None:
        console.print(f"{TEST_ROWS} is not written: the test sets have no id in common")
    return rows, id_column


def _predicted(
    comparison: Comparison, side: Side, trust_plugins: bool
) -> tuple[TestPredictions | None, str]:
    """The run's predictions of its own test set, in the shared order of classes."""
    from foldrace.inference.predictor import Predictor

    store = open_allowed(side.store.root, trust_plugins)
    test = read_test_set(store.config().data, store.own_classes())
    if test is None:
        return None, "id"
    predictor = Predictor(store, cores())
    prob = predictor.test_probabilities(test).prob
    position = np.argsort(side.columns)
    decided = position[predictor.decide(prob)]
    return TestPredictions(side.name, test.ids, decided, prob[:, side.columns]), test.id_column
