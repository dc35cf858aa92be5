"""What a blend says of one image: class, confidence, the likeliest classes, probabilities.

Takes probabilities and errors, gives one `Prediction` an image, and a line about them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import listing

ERROR = "ERROR"
"""In place of a class, where an image cannot be read."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """The prediction of one image."""

    label: str
    """The class that the blend decides for; `ERROR` where the image cannot be read."""
    confidence: float | None
    """Its probability; None for an `ERROR`."""
    top_k: tuple[tuple[str, float], ...]
    """The likeliest classes with their probabilities, the likeliest first; empty for an `ERROR`."""
    probabilities: NDArray[np.float64] | None
    """(C,) in the order of `Predictor.classes`; None for an `ERROR`."""
    error: str = ""
    """Why the image cannot be read; empty where it can."""


def predictions(
    prob: NDArray[np.float64],
    decided: NDArray[np.int64],
    classes: Sequence[str],
    errors: Mapping[int, str],
    top_k: int,
) -> list[Prediction]:
    """One for each row of `prob` (n, C) and `decided` (n,); `errors` are reasons by row."""
    likeliest = np.argsort(-prob, axis=1, kind="stable")[:, :top_k]
    found = []
    for row, best in enumerate(decided.tolist()):
        if row in errors:
            found.append(Prediction(ERROR, None, (), None, errors[row]))
            continue
        top = tuple((classes[c], float(prob[row, c])) for c in likeliest[row].tolist())
        found.append(Prediction(classes[best], float(prob[row, best]), top, prob[row]))
    return found


def count_line(found: Sequence[Prediction], seconds: float) -> str:
    """How many images, time an image, failures, and how the classes are distributed."""
    counts = Counter(one.label for one in found if not one.error)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    each = 1000.0 * seconds / max(1, len(found))
    classes = listing((f"{label} {count}" for label, count in ordered), 10)
    return (
        f"{counts.total()} images predicted, {len(found) - counts.total()} unreadable, in "
        f"{seconds:.1f} s ({each:.1f} ms an image){'; ' if classes else ''}{classes}"
    )
