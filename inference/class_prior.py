"""Whether the classes of new images are as frequent as those of the training images.

Takes calibrated probabilities of images without labels, gives the estimated frequencies and whether
they differ beyond chance; and the probabilities as they would be with these. Source: Saerens,
Latinne and Decaestecker, Adjusting the outputs of a classifier to new a priori probabilities: a
simple procedure, Neural Computation 2002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import normalise

_ROUNDS = 1000
_TOLERANCE = 1e-8
_SIGNIFICANT = 0.01
_MOST_NAMED = 5


@dataclass(frozen=True, eq=False)
class PriorShift:
    """The estimate for one set of images."""

    trained: NDArray[np.float64]
    """(C,) frequencies of the training images' classes, with half an image more each."""
    estimated: NDArray[np.float64]
    """(C,) frequencies among the new images, by maximum likelihood."""
    p_value: float
    """Chance of so great a difference where there is none: a likelihood ratio test."""

    @property
    def is_significant(self) -> bool:
        """True where chance alone would seldom do it."""
        return self.p_value < _SIGNIFICANT

    def applied(self, prob: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, C) the probabilities as they are with the estimated frequencies, by Bayes."""
        return normalise(prob * (self.estimated / self.trained))


def estimate_shift(prob: NDArray[np.float64], counts: NDArray[np.int64]) -> PriorShift:
    """From calibrated probabilities (n, C) of new images and the training images' counts (C,).

    Expectation maximisation; the test statistic is twice the gain in log-likelihood, scaled by
    N / (N + n), since the N training images are a sample, too, and chi-squared with C - 1 degrees
    of freedom.
    """
    from scipy.special import chdtrc

    trained = (counts + 0.5) / (counts + 0.5).sum()
    estimated = trained
    for _ in range(_ROUNDS):
        before, estimated = estimated, normalise(prob * (estimated / trained)).mean(axis=0)
        if np.abs(estimated - before).max() < _TOLERANCE:
            break
    gain = np.log((prob * (estimated / trained)).sum(axis=1)).sum()
    total = counts.sum()
    statistic = 2.0 * max(0.0, float(gain)) * total / (total + len(prob))
    return PriorShift(trained, estimated, float(chdtrc(len(counts) - 1, statistic)))


def shift_line(shift: PriorShift, classes: Sequence[str], is_applied: bool) -> str | None:
    """What the classes' frequencies seem to be, most changed first; None where nothing is sure."""
    if not shift.is_significant:
        return None
    order = np.argsort(-np.abs(shift.estimated - shift.trained), kind="stable")[:_MOST_NAMED]
    named = ", ".join(
        f"{classes[c]} {100 * shift.estimated[c]:.1f} % (training {100 * shift.trained[c]:.1f} %)"
        for c in order.tolist()
    )
    more = f" and {len(classes) - len(order)} more" if len(classes) > len(order) else ""
    done = "applied" if is_applied else "not applied; --prior-shift apply does"
    chance = f"p = {shift.p_value:.1g}"
    return f"classes of the test set seem to be as frequent as {named}{more}; {chance}; {done}"
