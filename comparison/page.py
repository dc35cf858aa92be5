"""The page of a comparison, and its charts.

Takes what the other files of this room found, gives one self-contained HTML document and PNGs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from foldrace.comparison.differences import Difference, KeyDifference, Pair
from foldrace.comparison.models import Model
from foldrace.comparison.sides import Comparison
from foldrace.comparison.submissions import SharedTestRows
from foldrace.comparison.together import Together
from foldrace.reporting.charts import candidates as charts
from foldrace.reporting.charts.style import palette
from foldrace.reporting.content import (
    Cell,
    Chart,
    Code,
    Note,
    Part,
    Table,
    count,
    score,
    share,
    signed,
)
from foldrace.reporting.formats import counted, difference, number
from foldrace.reporting.page import Block, page
from foldrace.reporting.sections.calibration import log_prob_correlation, similar_side_by_side


@dataclass(frozen=True, eq=False)
class Found:
    """All that a comparison has found."""

    comparison: Comparison
    models: Sequence[Model]
    pairs: Sequence[Pair]
    together: Together | None
    keys: Sequence[KeyDifference]
    test: SharedTestRows | None


def charts_of(found: Found) -> dict[str, bytes]:
    """PNG files by name."""
    return {"model_accuracy.png": _accuracy(found), "correlation.png": _correlation(found)}


def page_of(found: Found, pngs: dict[str, bytes], written: str) -> str:
    """The HTML document."""
    names = [side.name for side in found.comparison.sides]
    blocks = [
        Block("runs", "Runs", list(_runs(found))),
        Block("pairs", "Image by image", list(_pairs(found))),
        Block("together", "Together", list(_together(found))),
        Block("models", "Models", list(_models(found, pngs))),
        Block("test", "Test set", list(_test(found))),
        Block("config", "What differs in the configs", list(_keys(found))),
    ]
    shown = [block for block in blocks if block.parts]
    return page(" · ".join(names), f"Foldrace comparison, written {written}", shown)


def rows_sentence(comparison: Comparison) -> str:
    """How many images are compared, and whether the folds agree."""
    n, most = len(comparison.labels), max(side.own_rows for side in comparison.sides)
    of = "" if n == most else f" (of up to {most:,}; the others are not in every run)"
    text = f"On {counted(n, 'image')} that all runs have scored out of fold{of}."
    if comparison.same_folds:
        return f"{text} All have the same folds."
    return (
        f"{text} The folds differ, so that a part of each difference is due to which images a "
        "model was trained on."
    )


def with_se(found: Difference) -> str:
    """A difference with its sign and standard error."""
    return f"{difference(found.value)} ± {number(found.se)}"


def together_sentence(found: Together, names: Sequence[str]) -> str:
    """What the mean of the runs would score, and whether that is worth it."""
    weights = ", ".join(f"{w:.2f} {name}" for w, name in zip(found.weights, names, strict=True))
    verdict = (
        f"better than {found.best} alone"
        if found.change.is_clear and found.change.value < 0
        else f"not clearly better than {found.best} alone"
    )
    return (
        f"The mean of all ({weights}) has a cross-fitted log loss of {number(found.loss.value)} ± "
        f"{number(found.loss.se)}, {verdict} ({with_se(found.change)})."
    )


def _runs(found: Found) -> Iterator[Part]:
    yield Note(rows_sentence(found.comparison))
    losses = [found.comparison.losses(side).mean() for side in found.comparison.sides]
    rows: list[tuple[Cell, ...]] = [
        (
            side.name,
            score(float(loss)),
            share(float(found.comparison.hits(side).mean())),
            count(len(side.blend.members)),
            side.blend.method,
            side.store.root,
        )
        for side, loss in zip(found.comparison.sides, losses, strict=True)
    ]
    headers = ("run", "OOF log loss", "accuracy", "members", "method", "folder")
    yield Table(headers, tuple(rows), "The runs", frozenset({int(np.argmin(losses))}))
    yield Note(
        "Each blend's weights were chosen on the same images; its own report has the cross-fitted "
        "loss."
    )


def _pairs(found: Found) -> Iterator[Part]:
    yield Note(
        "The second run less the first one, image by image, with its standard error. A difference "
        "of more than two standard errors is clear."
    )
    rows: list[tuple[Cell, ...]] = [
        (
            pair.first,
            pair.second,
            signed(pair.loss.value),
            score(pair.loss.se),
            "yes" if pair.loss.is_clear else "no",
            signed(pair.accuracy.value),
            score(pair.accuracy.se),
            count(pair.only_first_right),
            count(pair.only_second_right),
        )
        for pair in found.pairs
    ]
    headers = (
        *("first", "second", "log loss", "±", "clear", "accuracy", "±"),
        *("only first right", "only second right"),
    )
    yield Table(headers, tuple(rows), "Paired differences")


def _together(found: Found) -> Iterator[Part]:
    if found.together is None:
        return
    sides = found.comparison.sides
    yield Note(together_sentence(found.together, [side.name for side in sides]))
    if found.comparison.same_folds:
        others = " ".join(f"--run {side.store.root}" for side in sides[1:])
        yield Note("All members of all runs in one blend:")
        yield Code(f"foldrace ensemble {sides[0].store.root} {others}")


def _models(found: Found, pngs: dict[str, bytes]) -> Iterator[Part]:
    yield Chart(
        pngs["model_accuracy.png"],
        f"OOF accuracy of {len(found.models)} models",
        "Out-of-fold accuracy of each run's blend and of its best candidates, on the shared "
        "images.",
    )
    yield Chart(
        pngs["correlation.png"],
        f"Correlation of {len(found.models)} models",
        "Pearson correlation of the log-probabilities that two models give to the true class; "
        "alike ones stand side by side.",
    )


def _test(found: Found) -> Iterator[Part]:
    rows = found.test
    if rows is None:
        return
    agreed = int((rows.votes == len(rows.names)).sum())
    yield Note(
        f"All runs say the same class of {agreed:,} of {counted(len(rows.ids), 'test image')}; "
        "the file has a line for each."
    )
    cells: list[tuple[Cell, ...]] = [
        (name, *(share(float(value)) for value in values))
        for name, values in zip(rows.names, rows.agreement, strict=True)
    ]
    yield Table(("agreement", *rows.names), tuple(cells), "Agreement on the test set")


def _keys(found: Found) -> Iterator[Part]:
    if not found.keys:
        yield Note("Nothing: the configs are the same.")
        return
    names = [side.name for side in found.comparison.sides]
    rows: list[tuple[Cell, ...]] = [(one.key, *one.values) for one in found.keys]
    yield Table(("key", *names), tuple(rows), "Keys of sweep.yaml that differ")


def _accuracy(found: Found) -> bytes:
    ordered = sorted(found.models, key=lambda model: -model.accuracy)
    dots = [charts.Dot(f"{m.name}  {m.run}", m.run, m.accuracy) for m in ordered]
    return charts.accuracy(dots, None, palette(side.name for side in found.comparison.sides))


def _correlation(found: Found) -> bytes:
    matrix = log_prob_correlation(np.stack([model.true_prob for model in found.models]))
    order = similar_side_by_side(matrix)
    chosen = [found.models[i] for i in order]
    names = [f"{m.run} {m.backbone or ''}".strip() for m in chosen]
    return charts.correlation(matrix[np.ix_(order, order)], [m.name for m in chosen], names)
