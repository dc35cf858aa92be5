"""Metrics of classes against scikit-learn, also with rows that count several times."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from sklearn import metrics as sk

from foldrace.core.class_metrics import (
    accuracy_of,
    balanced_accuracy_of,
    macro_f1_of,
    quadratic_kappa_of,
)
from foldrace.core.metrics import METRICS, order_problem

PAIRS = {
    "accuracy": (accuracy_of, sk.accuracy_score),
    "macro_f1": (macro_f1_of, partial(sk.f1_score, average="macro", zero_division=0)),
    "balanced_accuracy": (balanced_accuracy_of, sk.balanced_accuracy_score),
    "qwk": (quadratic_kappa_of, partial(sk.cohen_kappa_score, weights="quadratic")),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_gives_the_same(name: str, seed: int) -> None:
    """Of six classes one never occurs and another is never predicted."""
    ours, theirs = PAIRS[name]
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, 2, 4, 5], size=80)
    predicted = np.where(rng.random(80) < 0.6, labels, rng.integers(0, 5, 80)) % 5
    assert ours(labels, predicted, 6) == pytest.approx(theirs(labels, predicted), rel=1e-12)
    times = rng.integers(0, 3, 80)
    weighted = ours(labels, predicted, 6, times)
    repeated = theirs(np.repeat(labels, times), np.repeat(predicted, times))
    assert weighted == pytest.approx(repeated, rel=1e-12)


def test_kappa_of_one_class_alone_is_no_agreement_beyond_chance() -> None:
    one = np.zeros(4, dtype=np.int64)
    assert quadratic_kappa_of(one, one, 3) == 0.0


def test_the_table_has_the_same_functions() -> None:
    for name, (ours, _) in PAIRS.items():
        assert METRICS[name].of_classes is ours


@pytest.mark.parametrize(
    ("name", "classes", "told"),
    [
        ("qwk", ["mild", "none", "severe"], "mild < none < severe; where they have another"),
        ("qwk", [f"k{'x' * i}" for i in range(20)], " < ..."),
        ("qwk", ["0", "1", "2"], None),
        ("qwk", ["grade 1", "grade 2"], None),
        ("macro_f1", ["mild", "none", "severe"], None),
        ("no_such", ["mild", "none"], None),
    ],
)
def test_an_order_that_no_number_says_is_told(
    name: str, classes: list[str], told: str | None
) -> None:
    problem = order_problem(name, classes)
    assert (problem is None) == (told is None)
    assert problem is None or (told in problem.message and problem.where == "ensemble.metric")
