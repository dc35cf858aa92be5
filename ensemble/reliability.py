"""How honest a blend's confidence is: the reliability diagram and its one number.

Takes each row's highest probability and whether its class was right; gives a `Reliability`. Source:
Guo, Pleiss, Sun and Weinberger, On Calibration of Modern Neural Networks, ICML 2017, section 2.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from experiment.records import Reliability, ReliabilityBin


def reliability(
    confidence: NDArray[np.floating], hits: NDArray[np.bool_], bins: int = 15
) -> Reliability:
    """The diagram of confidence (n,) in [0, 1] and hits (n,), n at least 1.

    Bin b holds the rows with a confidence in (b / bins, (b + 1) / bins], the first also 0. All bins
    are given, so that the place of one tells its edges; one without rows has its middle as
    confidence and an accuracy of 0.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.intp) - 1, 0, bins - 1)
    rows = np.bincount(place, minlength=bins)
    sure = np.bincount(place, weights=confidence, minlength=bins)
    right = np.bincount(place, weights=hits, minlength=bins)
    return Reliability(
        ece=float(np.abs(sure - right).sum() / len(place)),
        bins=tuple(
            _bin(b, bins, int(rows[b]), float(sure[b]), float(right[b])) for b in range(bins)
        ),
    )


def _bin(place: int, bins: int, rows: int, sure: float, right: float) -> ReliabilityBin:
    if rows == 0:
        return ReliabilityBin(rows=0, confidence=(place + 0.5) / bins, accuracy=0.0)
    return ReliabilityBin(rows=rows, confidence=sure / rows, accuracy=right / rows)
