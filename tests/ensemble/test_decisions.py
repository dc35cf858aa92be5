"""Decision rules: what they decide, and that they find the best of their kind."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, f1_score

from foldrace.core.metrics import METRICS
from foldrace.ensemble.decisions import decide, expected_class, fit_rule
from foldrace.run_folder.blend_records import DecisionRule

PRIOR = np.array([0.70, 0.18, 0.08, 0.04])
ROWS = 4000


def honest(seed: int, prior: NDArray[np.float64] = PRIOR) -> tuple[np.ndarray, np.ndarray]:
    """Bayes' own probabilities (n, C) for unbalanced labels of overlapping normal classes."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(prior), ROWS, p=prior)
    means = 1.6 * np.eye(len(prior))
    x = means[labels] + rng.normal(size=(ROWS, len(prior)))
    logs = np.log(prior) + x @ means.T - (means**2).sum(axis=1) / 2
    prob = np.exp(logs - logs.max(axis=1, keepdims=True))
    return prob / prob.sum(axis=1, keepdims=True), labels


def grades(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Honest probabilities of five ordered grades, normal around a noisy view of the true one."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(5, ROWS, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    seen = labels + rng.normal(0, 1.0, ROWS)
    prior = np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    prob = prior * np.exp(-((seen[:, None] - np.arange(5)) ** 2) / 2)
    return prob / prob.sum(axis=1, keepdims=True), labels


def test_weights_and_thresholds_decide_as_they_say() -> None:
    prob = np.array([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.1, 0.2, 0.7]])
    weights = DecisionRule(log_weights=(0.0, np.log(1.5), np.log(3.0)))
    assert decide(weights, prob).tolist() == (prob * [1, 1.5, 3]).argmax(axis=1).tolist()
    cuts = DecisionRule(thresholds=(0.45, 1.55))
    assert expected_class(prob).tolist() == pytest.approx([0.5, 0.85, 1.6])
    assert decide(cuts, prob).tolist() == [1, 1, 2]
    assert decide(None, prob).tolist() == [0, 0, 2]


def test_a_rule_of_other_classes_is_refused() -> None:
    for rule in (DecisionRule(log_weights=(0.0, 1.0)), DecisionRule(thresholds=(0.5,))):
        with pytest.raises(ValueError, match="of 2 classes, should be 3"):
            decide(rule, np.full((1, 3), 1 / 3))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"log_weights": (0.0, 1.0), "thresholds": (0.5,)},
        {"thresholds": (1.0, 0.5)},
        {"log_weights": (0.0, float("nan"))},
        {"log_weights": (0.0, 1e9)},
    ],
)
def test_a_damaged_rule_is_refused(fields: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValidationError):
        DecisionRule(**fields)  # type: ignore[arg-type]


def test_balanced_accuracy_takes_the_frequencies_out() -> None:
    """Of honest probabilities the best rule is argmax p_c / frequency_c; on new rows, too."""
    prob, labels = honest(0)
    rule = fit_rule(METRICS["balanced_accuracy"], prob, labels)
    counts = np.bincount(labels)
    power = -np.polyfit(np.log(counts), rule.log_weights, 1)[0]
    assert 0.7 < power < 1.3
    new, truth = honest(1)
    best = balanced_accuracy_score(truth, (new / PRIOR).argmax(axis=1))
    found = balanced_accuracy_score(truth, decide(rule, new))
    assert found > balanced_accuracy_score(truth, new.argmax(axis=1)) + 0.05
    assert found > best - 0.01


def test_macro_f1_gains_on_new_rows() -> None:
    prob, labels = honest(2)
    rule = fit_rule(METRICS["macro_f1"], prob, labels)
    new, truth = honest(3)
    before = f1_score(truth, new.argmax(axis=1), average="macro")
    assert f1_score(truth, decide(rule, new), average="macro") > before + 0.01


def test_kappa_gains_on_new_rows_and_varies_as_the_labels_do() -> None:
    prob, labels = grades(4)
    rule = fit_rule(METRICS["qwk"], prob, labels)
    new, truth = grades(5)
    kappa = lambda p: cohen_kappa_score(truth, p, weights="quadratic")  # noqa: E731
    decided = decide(rule, new)
    assert kappa(decided) > kappa(new.argmax(axis=1)) + 0.01
    assert kappa(decided) > kappa(np.rint(expected_class(new)).astype(int)) + 0.005
    assert decided.std() == pytest.approx(truth.std(), rel=0.15)


def test_balanced_and_sure_rows_need_no_rule() -> None:
    """The first of equally good rules is the most probable class."""
    labels = np.arange(60) % 3
    prob = np.full((60, 3), 0.05) + 0.85 * np.eye(3)[labels]
    for name in ("accuracy", "macro_f1", "balanced_accuracy"):
        assert set(fit_rule(METRICS[name], prob, labels).log_weights) == {0.0}


def test_a_class_without_a_row_has_a_weight() -> None:
    prob, labels = honest(6)
    more = np.hstack([prob * 0.9, np.full((ROWS, 1), 0.1)])
    rule = fit_rule(METRICS["macro_f1"], more, labels)
    assert len(rule.log_weights) == 5 and np.isfinite(rule.log_weights).all()
