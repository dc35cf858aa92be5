"""What is written about a blend, against scikit-learn and numpy."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, log_loss

from foldrace.ensemble.calibration import choose_calibration, final_fit
from foldrace.ensemble.methods import fit_method
from foldrace.ensemble.pool import Member, member_rows
from foldrace.ensemble.pooling import Fit, GeometricMean, Settings
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.outcome import (
    ChoiceCounts,
    ChosenBlend,
    half_logs,
    heaviest_first,
    record_of,
    trajectory,
)
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.solvers.optimal import optimal
from foldrace.run_folder.blend_records import EnsembleRecord
from tests.ensemble.member_pools import made_up

LOG_PROBS, LABELS = made_up(5, 200, 4, seed=1)
FOLDS = np.arange(200) % 4
MEMBERS = (*(Member(f"c{i:04d}", "ema", "timm/x", "other" * (i == 3)) for i in range(4)),
           Member("mine", "added"))  # fmt: skip


def blended(method: str = "greedy", calibrate: bool = True, **changes: Any) -> ChosenBlend:
    rows = member_rows(list(LOG_PROBS), LABELS, FOLDS, MEMBERS)
    fit = lambda pool: fit_method(method, pool, Settings())  # noqa: E731
    choice = choose_calibration(rows, fit, calibrate)
    chosen, temperature, prob = final_fit(rows, fit, choice)
    given: dict[str, Any] = {
        "method": method, "methods_tried": (), "rows": rows, "fit": chosen, "choice": choice,
        "crossfit": choice.crossfit,
        "temperature": temperature, "prob": prob,
        "losses": np.array([-np.log(column).mean() for column in rows.raw]),
        "prices": Prices(dict.fromkeys(MEMBERS, 2.5), dict.fromkeys(MEMBERS, 7), "abacus"),
    }  # fmt: skip
    return ChosenBlend(**(given | changes))


def record(of: ChosenBlend, **changes: Any) -> EnsembleRecord:
    given: dict[str, Any] = {
        "considered": ChoiceCounts(4, 3), "k": 4, "folds_hash": "hash", "near": None,
        "duplicates": (), "curve": (), "unvalidated": (),
    }  # fmt: skip
    return record_of(of, **(given | changes))


@pytest.mark.parametrize("method", ["greedy", "uniform", "stacking", "geometric"])
@pytest.mark.parametrize("calibrate", [True, False])
def test_scores(method: str, calibrate: bool) -> None:
    of = blended(method, calibrate)
    found = record(of)
    prob = of.prob / of.prob.sum(axis=1, keepdims=True)
    assert found.oof_logloss == pytest.approx(log_loss(LABELS, prob), abs=1e-9)
    assert found.oof_accuracy == accuracy_score(LABELS, of.prob.argmax(axis=1))
    assert {m.name: m.value for m in found.metrics}["log_loss"] == pytest.approx(found.oof_logloss)
    assert found.crossfit_logloss == of.crossfit.loss
    single = np.empty(200)
    for fold in range(4):  # at its temperature of the other folds
        held = fold == FOLDS
        columns = of.rows.calibrated[1 + fold].astype(np.float64)
        chosen = columns[np.log(columns[:, ~held]).sum(axis=1).argmax()]
        single[held] = -np.log(chosen[held])
    change = single + np.log(of.crossfit.true_prob)
    assert found.single_crossfit_logloss == pytest.approx(single.mean(), abs=1e-9)
    assert found.gain_over_single == pytest.approx(change.mean(), abs=1e-9)
    assert found.gain_over_single_se == pytest.approx(change.std(ddof=1) / 200**0.5, abs=1e-9)
    assert found.k == 4
    best = int(np.argmin([log_loss(LABELS, np.exp(one)) for one in LOG_PROBS]))
    assert found.best_single == f"{MEMBERS[best].candidate} {MEMBERS[best].variant}"
    assert (found.members_considered, found.candidates_considered) == (5, 4)
    assert found.members_without_weights == 3


def test_members_the_heaviest_first() -> None:
    of = blended()
    found = record(of)
    weights = [m.weight for m in found.members]
    assert weights == sorted(weights, reverse=True) and sum(weights) == pytest.approx(1)
    assert [m.candidate for m in found.members] == [
        MEMBERS[i].candidate for i in heaviest_first(of.fit)
    ]
    by_name = {m.candidate: (m.run, m.added) for m in found.members}
    assert all(by_name[name] == ("other" * (name == "c0003"), name == "mine") for name in by_name)
    temperatures = dict(zip(MEMBERS, of.rows.temperatures[0], strict=True))
    for member in found.members:
        kept = next(t for m, t in temperatures.items() if m.candidate == member.candidate)
        assert member.temperature == (kept if of.choice.members else 1.0)


def test_equal_weights_stay_in_order() -> None:
    combiner = GeometricMean(np.array([0.2, 0.0, 0.5, 0.2, 0.5]))
    assert heaviest_first(Fit(combiner)).tolist() == [2, 4, 0, 3]


def test_gains_are_losses_without_each_member() -> None:
    of = blended("optimal")
    found = record(of)
    true = of.rows.pool(of.choice.members).true_prob[of.fit.used]
    names = [MEMBERS[i].candidate for i in of.fit.used]
    assert len(names) > 2
    whole = optimal(true, tolerance=1e-9).loss
    for place, name in enumerate(names):
        without = optimal(np.delete(true, place, axis=0), tolerance=1e-9).loss
        (gain,) = (m.gain for m in found.members if m.candidate == name)
        assert gain == pytest.approx(without - whole, abs=1e-6)
    assert {m.gain for m in record(blended("stacking")).members} == {None}


@pytest.mark.parametrize("method", ["uniform", "top-k", "soft-vote"])
def test_gains_of_equal_weights_are_those_of_the_mean(method: str) -> None:
    of = blended(method)
    true = of.rows.pool(of.choice.members).true_prob[of.fit.used].astype(np.float64)
    names = [MEMBERS[i].candidate for i in of.fit.used]
    gains = {m.candidate: m.gain for m in record(of).members}
    for place, name in enumerate(names):
        others = np.delete(true, place, axis=0).mean(axis=0)
        expected = np.log(true.mean(axis=0)).mean() - np.log(others).mean()
        assert gains[name] == pytest.approx(expected, abs=1e-9)


def test_prices_are_summed_where_all_are_known() -> None:
    found = record(blended("uniform"))
    assert (found.ms_per_image, found.weight_bytes, found.device) == (12.5, 35, "abacus")
    prices = Prices({MEMBERS[0]: 1.0}, dict.fromkeys(MEMBERS, 7))
    found = record(blended("uniform", prices=prices))
    assert (found.ms_per_image, found.weight_bytes) == (None, 35)
    assert [m.ms_per_image for m in found.members if m.candidate == "c0000"] == [1.0]


def test_near_duplicates_copies_and_unvalidated() -> None:
    of = blended()
    near = np.array([0, 7, 11])
    found = record(
        of, near=near, duplicates=[(MEMBERS[0], MEMBERS[4])], unvalidated=("one", "two", "three")
    )
    others = np.delete(np.arange(200), near)
    assert found.near_duplicates is not None
    prob = of.prob / of.prob.sum(axis=1, keepdims=True)
    expected = log_loss(LABELS[others], prob[others], labels=range(4))
    assert found.near_duplicates.rows == 3
    assert found.near_duplicates.oof_logloss_without == pytest.approx(expected, abs=1e-9)
    assert found.duplicates == (("c0000 ema", "mine added"),)
    assert [(u.name, u.weight) for u in found.unvalidated] == [
        (name, 0.25) for name in ("one", "two", "three")
    ]
    every = record(of, near=np.arange(200)).near_duplicates
    assert every is not None and every.oof_logloss_without is None


def test_the_trajectory() -> None:
    of = blended()
    rows = list(csv.DictReader(io.StringIO(trajectory(MEMBERS, of.fit))))
    pool = of.rows.pool(of.choice.members)
    blend = greedy(pool.true_prob, max_rounds=50)
    assert [int(row["round"]) for row in rows] == list(range(1, len(blend.path_losses) + 1))
    np.testing.assert_allclose(
        [float(r["oof_logloss"]) for r in rows], blend.path_losses, rtol=1e-8
    )
    named = [(r["candidate"], r["variant"], r["run"]) for r in rows]
    picked = [(MEMBERS[i].candidate, MEMBERS[i].variant, MEMBERS[i].run) for i in blend.path]
    assert named == picked + [("", "", "")] * (len(rows) - len(picked))
    header = "round,candidate,variant,oof_logloss,run\n"
    assert trajectory(MEMBERS, blended("stacking").fit) == header


def test_half_logs_are_finite_and_near() -> None:
    prob = np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    logs = half_logs(prob)
    assert logs.dtype == np.float16 and np.isfinite(logs).all()
    np.testing.assert_allclose(np.exp(logs.astype(np.float64)), prob, atol=1e-3)
