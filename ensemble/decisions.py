"""From probabilities to classes by a decision rule, which is fitted to a metric of classes.

Takes probabilities (n, C) and labels; gives a `DecisionRule`, and the classes that it decides for.

The log loss wants honest probabilities, and the most probable class is then right most often; a
metric in which rare classes count as much as frequent ones wants them more often. The weights are
powers of the class frequencies, w_c = frequency_c ** -a, so that one number is fitted whatever C
is: a = 0 is the most probable class, a = 1 the best choice for balanced accuracy if the
probabilities are right. Source: Menon et al., Long-Tail Learning via Logit Adjustment, ICLR 2021.

Classes that have an order (quadratic kappa) are cut from the expected class number, whose spread
and mean are fitted: kappa punishes predictions that vary less than the labels do, and the expected
class always does. Kappa has the form of the concordance correlation (Lin, A Concordance Correlation
Coefficient to Evaluate Reproducibility, Biometrics 45, 1989).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import CLIP, Metric, most_probable
from foldrace.run_folder.blend_records import DecisionRule

_POWERS = (0.0, 0.125, -0.125, 0.25, -0.25, 0.375, -0.375, 0.5, -0.5, 0.625, 0.75, 0.875, 1.0, 1.25)
"""Of equally good ones the first is taken."""
_SPREADS = np.geomspace(0.5, 4.0, 37)
_BLOCK = 1 << 18
"""Probabilities worked on at a time, so that they stay in the cache."""


def fit_rule(metric: Metric, prob: NDArray[np.floating], labels: NDArray[np.int64]) -> DecisionRule:
    """The rule with the best metric of classes for prob (n, C) and labels (n,).

    Linear in classes: each of a dozen rules is one pass over the probabilities.
    """
    assert metric.of_classes is not None
    score, n_classes = metric.of_classes, prob.shape[1]
    rules = _thresholds(prob, labels) if metric.is_ordinal else _weights(labels, n_classes)
    decided = _decide_all([*rules], prob)
    return max(decided, key=lambda pair: score(labels, pair[1], n_classes, None))[0]


def decide(rule: DecisionRule | None, prob: NDArray[np.floating]) -> NDArray[np.int64]:
    """The class (n,) of each row of probabilities (n, C); None: the most probable.

    Raises ValueError where the rule is of another number of classes.
    """
    if rule is None:
        return most_probable(prob)
    count = len(rule.log_weights) or len(rule.thresholds) + 1
    if count != prob.shape[1]:
        raise ValueError(f"the decision rule is of {count} classes, should be {prob.shape[1]}")
    return _decide_all([rule], prob)[0][1]


def _decide_all(
    rules: list[DecisionRule], prob: NDArray[np.floating]
) -> list[tuple[DecisionRule, NDArray[np.int64]]]:
    """Each rule with its classes (n,), in one pass over the probabilities."""
    found = np.empty((len(rules), len(prob)), dtype=np.int64)
    step = max(1, _BLOCK // prob.shape[1])
    weights = [np.array(rule.log_weights, dtype=np.float32) for rule in rules]
    for start in range(0, len(prob), step):
        rows = slice(start, start + step)
        logs = np.log(np.maximum(prob[rows], CLIP), dtype=np.float32)
        expected = expected_class(prob[rows])
        for i, rule in enumerate(rules):
            if rule.thresholds:
                found[i, rows] = np.searchsorted(rule.thresholds, expected)
            else:
                found[i, rows] = (logs + weights[i]).argmax(axis=1)
    return [*zip(rules, found, strict=True)]


def expected_class(prob: NDArray[np.floating]) -> NDArray[np.float64]:
    """(n,) mean of the class numbers 0..C-1 under prob (n, C)."""
    return np.asarray(prob @ np.arange(prob.shape[1], dtype=np.float64))


def _weights(labels: NDArray[np.int64], n_classes: int) -> Iterator[DecisionRule]:
    """Weights whose logarithms are 0 in the mean; a class without a row counts as having half."""
    counts = np.maximum(np.bincount(labels, minlength=n_classes), 0.5)
    logs = -np.log(counts)
    logs -= logs.mean()
    for power in _POWERS:
        yield DecisionRule(log_weights=tuple((power * logs).tolist()))


def _thresholds(prob: NDArray[np.floating], labels: NDArray[np.int64]) -> Iterator[DecisionRule]:
    """The expected class number, moved to the labels' mean and spread, then rounded."""
    mean = float(expected_class(prob).mean())
    halves = np.arange(prob.shape[1] - 1) + 0.5 - labels.mean()
    for spread in _SPREADS:
        yield DecisionRule(thresholds=tuple((mean + halves / spread).tolist()))
