"""What test-time views gain and cost, measured on OOF rows.

Takes a run folder, gives for each row of the table of views the fall of the blend's log loss on
training images, each predicted by the models that did not train on it, with the standard error of
the paired differences, and the time an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import row_losses, true_class_probability
from foldrace.ensemble.uncertainty import standard_error
from foldrace.inference.plugins import run_parts
from foldrace.inference.predictor import Predictor
from foldrace.inference.tta import TTAS
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore

AUTO = "auto"
"""In place of the views' name: those that gain most, where that is sure."""
MOST_ROWS = 2000
"""OOF rows that are predicted: more cost time, and the standard error tells what these say."""
_PLAIN = "none"
_SEED = 0


@dataclass(frozen=True)
class TtaGain:
    """What one row of the table does to OOF rows."""

    tta: str
    gain: float
    """Fall of the log loss against the image as it is, in nats; below 0: it is worse."""
    se: float
    """Standard error of the paired differences."""
    ms_per_image: float
    """Of one fold's models, from the file to the blend's probabilities."""
    rows: int

    @property
    def is_sure(self) -> bool:
        """True where the gain is above its standard error."""
        return self.gain > max(self.se, 0.0)


def measure_gains(
    store: RunStore,
    workers: int,
    device: str | None = None,
    ensemble: EnsembleRecord | None = None,
    tell: Callable[[str], None] = lambda name: None,
) -> tuple[TtaGain, ...]:
    """One for each row of the table, a plugin's too, that of no views first.

    `tell` is called with the name of what is measured next. RunFolderError where a member was
    predicted elsewhere, DataError where the training images are gone.
    """
    rows = _some_rows(store)
    labels, groups = store.labels()[rows], store.folds().group_numbers
    plain: NDArray[np.float64] | None = None
    found = []
    for name in _names(store):
        tell(name)
        predictor = Predictor(store, workers, name, device, ensemble=ensemble)
        started = time.perf_counter()
        prob = predictor.oof_probabilities(rows)
        seconds = time.perf_counter() - started
        losses = row_losses(true_class_probability(prob, labels))
        plain = losses if plain is None else plain
        better = plain - losses
        se = standard_error(better, None if groups is None else groups[rows])
        each = 1000.0 * seconds / len(rows)
        found.append(TtaGain(name, float(better.mean()), se, each, len(rows)))
    return tuple(found)


def recommended(gains: Sequence[TtaGain]) -> TtaGain | None:
    """The greatest gain of those that are above their standard errors; None: no views pay."""
    sure = [gain for gain in gains if gain.is_sure]
    return max(sure, key=lambda gain: gain.gain, default=None)


def gain_lines(gains: Sequence[TtaGain]) -> Iterator[str]:
    """The table in words, and what is taken."""
    rows = gains[0].rows
    yield f"test-time views on {rows:,} OOF rows: gain in log loss, ms an image of one fold"
    width = max(len(gain.tta) for gain in gains)
    for gain in gains:
        told = "" if gain.tta == _PLAIN else f"{gain.gain:+.4f} ± {gain.se:.4f}"
        yield f"  {gain.tta:{width}}  {told:18}  {gain.ms_per_image:.1f} ms"
    best = recommended(gains)
    if best is None:
        yield "none is taken: no gain is above its standard error"
    else:
        yield f"{best.tta} is taken: the greatest gain of those above their standard errors"


def _names(store: RunStore) -> list[str]:
    names = list(run_parts(store)[TTAS])
    return [_PLAIN, *(name for name in names if name != _PLAIN)]


def _some_rows(store: RunStore) -> NDArray[np.int64]:
    """Scored rows in their order, by chance where there are more than enough."""
    rows = store.scored_rows()
    if len(rows) <= MOST_ROWS:
        return rows
    return np.sort(np.random.default_rng(_SEED).choice(rows, MOST_ROWS, replace=False))
