"""The peers' greedy selections, run in the peers' own environment (`peers/requirements.txt`).

Each gets what its interface asks for: AutoGluon and amltk full (N, C) probabilities a member,
hillclimbers, which knows one column a member, the probabilities of the true class.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Callable

import numpy as np
from measured import Answer, Data, Prepared, Side, main
from numpy.typing import NDArray


def _autogluon(data: Data, rounds: int) -> Prepared:
    from autogluon.core.metrics import log_loss
    from autogluon.core.models.greedy_ensemble.ensemble_selection import EnsembleSelection

    full = data.full()
    members = list(full)

    def call() -> Answer:
        selection = EnsembleSelection(
            rounds, "multiclass", log_loss, random_state=np.random.RandomState(0)
        )
        return Answer(weights=selection.fit(members, data.labels).weights_)

    return Prepared(call, full.nbytes)


Metric = Callable[[NDArray[np.int64], NDArray[np.floating]], float]


def _amltk(data: Data, rounds: int, members: NDArray[np.floating], metric: Metric) -> Prepared:
    from amltk.ensembling.weighted_ensemble_caruana import weighted_ensemble_caruana

    named = dict(enumerate(members))

    def call() -> Answer:
        chosen, _, _ = weighted_ensemble_caruana(
            model_predictions=named,
            targets=data.labels,
            size=rounds,
            metric=metric,
            select=min,
            seed=0,
        )
        weights = np.zeros(len(named))
        weights[list(chosen)] = list(chosen.values())
        return Answer(weights=weights)

    return Prepared(call, members.nbytes)


def _amltk_log_loss(data: Data, rounds: int) -> Prepared:
    from sklearn.metrics import log_loss

    classes = np.arange(data.labels.max() + 1)
    metric = functools.partial(log_loss, labels=classes)
    return _amltk(data, rounds, data.full(), metric)


def _amltk_true_class(data: Data, rounds: int) -> Prepared:
    """The metric looks at the true class alone; the blend is still made of full rows."""
    rows = np.arange(len(data.labels))

    def metric(labels: NDArray[np.int64], prob: NDArray[np.floating]) -> float:
        return float(-np.log(prob[rows, labels]).mean())

    return _amltk(data, rounds, data.full(), metric)


def _amltk_columns(data: Data, rounds: int) -> Prepared:
    """What a user gains who knows that the true class's column is enough."""

    def metric(labels: NDArray[np.int64], prob: NDArray[np.floating]) -> float:
        return float(-np.log(prob).mean())

    return _amltk(data, rounds, data.true_prob, metric)


def _hillclimbers(data: Data, rounds: int) -> Prepared:
    """It has no number of rounds: it stops when no member at any of 50 weights helps."""
    import pandas as pd
    from hillclimbers import climb_hill, partial

    columns = pd.DataFrame(
        data.true_prob.T.astype(np.float64),
        columns=[f"m{i:04d}" for i in range(len(data.true_prob))],
    )
    train = pd.DataFrame({"label": data.labels})

    def loss(labels: NDArray[np.int64], prob: NDArray[np.floating]) -> float:
        return float(-np.log(prob).mean())

    def call() -> Answer:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            _, blended = climb_hill(
                train=train,
                oof_pred_df=columns,
                test_pred_df=columns.head(1),
                target="label",
                objective="minimize",
                eval_metric=partial(loss),
                plot_hill=False,
                return_oof_preds=True,
            )
        return Answer(blended=blended, members=1 + printed.getvalue().count("Model added"))

    return Prepared(call, columns.to_numpy().nbytes)


_SIDES: dict[str, Side] = {
    "AutoGluon EnsembleSelection": _autogluon,
    "amltk, log loss": _amltk_log_loss,
    "amltk, true class": _amltk_true_class,
    "amltk, columns": _amltk_columns,
    "hillclimbers": _hillclimbers,
}

if __name__ == "__main__":
    main(_SIDES, lambda data, name, rounds: {})
