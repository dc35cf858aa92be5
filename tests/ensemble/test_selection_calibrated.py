"""The calibrated blend of a run folder, with temperatures that scipy finds and numpy applies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.ensemble import greedy
from foldrace.run_folder.store import RunStore
from tests.ensemble.selection_runs import (
    FOLD,
    LABELS,
    PLAIN,
    ROWS,
    K,
    add,
    blend,
    loss_of,
    make_store,
    stored,
)
from tests.ensemble.temperature_reference import smoothed_temperature

EVERY = np.ones(ROWS, dtype=np.bool_)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return make_store(tmp_path / "run")


def at(prob: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    powered = prob ** (1 / temperature)
    return np.asarray(powered / powered.sum(axis=1, keepdims=True))


def temperature_of(prob: NDArray[np.float64], rows: NDArray[np.bool_] = EVERY) -> float:
    return smoothed_temperature(np.log(prob[rows]), LABELS[rows])


def by_definition(
    members: list[NDArray[np.float64]], rows: NDArray[np.bool_], of_members: bool, of_blend: bool
) -> tuple[NDArray[np.float64], list[float], NDArray[np.float64], float]:
    """Chosen on these rows: the blend's (ROWS, 3) on all, the members' temperatures, the weights
    and the blend's temperature."""
    temperatures = [temperature_of(p, rows) if of_members else 1.0 for p in members]
    warm = [at(p, t) for p, t in zip(members, temperatures, strict=True)]
    weights = greedy(np.stack([p[rows, LABELS[rows]] for p in warm]), max_rounds=50).weights
    mixed = sum(w * p for w, p in zip(weights, warm, strict=True))
    assert isinstance(mixed, np.ndarray)
    last = temperature_of(mixed, rows) if of_blend else 1.0
    return at(mixed, last), temperatures, weights, last


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
def test_every_number_is_recomputed_from_the_stored_arrays(
    store: RunStore, sharpness: float
) -> None:
    """Sharp members are overconfident: their temperatures are worth keeping."""
    given = {f"c{i:04d}": add(store, i, sharpness=sharpness)["raw"] for i in range(4)}
    prob = [stored(p) for p in given.values()]
    record = blend(store, EnsembleConfig())
    kept = record.calibration
    assert kept is not None
    assert len(kept.tried) == 4
    tried: dict[tuple[bool, bool], np.ndarray] = {}
    for trial in kept.tried:
        losses = np.empty(ROWS)
        for fold in range(K):
            held = fold == FOLD
            mixed = by_definition(prob, ~held, trial.members, trial.blend)[0]
            losses[held] = -np.log(mixed[held, LABELS[held]])
        assert trial.crossfit_logloss == pytest.approx(losses.mean(), abs=2e-5)
        assert trial.crossfit_se == pytest.approx(losses.std(ddof=1) / np.sqrt(ROWS), abs=2e-5)
        tried[trial.members, trial.blend] = losses
    least = min(losses.mean() for losses in tried.values())
    assert tried[kept.members, kept.blend].mean() <= least + 2e-5
    chosen = np.empty(ROWS)  # by the other folds' losses
    for fold in range(K):
        held = fold == FOLD
        others = {kind: losses[~held].mean() for kind, losses in tried.items()}
        first = next(k for k, loss in others.items() if loss <= min(others.values()) + 1e-5)
        chosen[held] = tried[first][held]
    assert record.crossfit_logloss == pytest.approx(chosen.mean(), abs=2e-5)
    assert kept.members or kept.blend or sharpness == 1
    mixed, temperatures, weights, last = by_definition(prob, EVERY, kept.members, kept.blend)
    assert record.blend_temperature == pytest.approx(last, rel=1e-3)
    expected = dict(zip(given, zip(weights, temperatures, strict=True), strict=True))
    assert {m.candidate for m in record.members} == {c for c, (w, _) in expected.items() if w > 0}
    for member in record.members:
        weight, temperature = expected[member.candidate]
        assert member.weight == pytest.approx(weight, abs=1e-9)
        assert member.temperature == pytest.approx(temperature, rel=1e-3)
    assert record.oof_logloss == pytest.approx(loss_of(mixed), abs=1e-6)
    assert record.oof_accuracy == pytest.approx((mixed.argmax(axis=1) == LABELS).mean())
    np.testing.assert_allclose(store.blend.oof(), mixed, atol=2e-3)  # float16 logarithms


def test_the_mixture_is_certified_before_the_temperature_of_the_blend(store: RunStore) -> None:
    prob = [stored(add(store, i, sharpness=3.0)["raw"]) for i in range(3)]
    record = blend(store, EnsembleConfig())
    assert record.calibration is not None and record.calibration.members
    warm = np.stack([at(p, temperature_of(p))[np.arange(ROWS), LABELS] for p in prob])
    weights = {m.candidate: m.weight for m in record.members}
    chosen = np.array([weights.get(f"c{i:04d}", 0.0) for i in range(3)])
    assert record.mixture_logloss == pytest.approx(-np.log(chosen @ warm).mean(), abs=1e-6)
    drawn = np.random.default_rng(0).dirichlet(np.ones(3), size=3000)
    least = -np.log(drawn @ warm).mean(axis=1).min()
    assert record.certificate is not None
    assert record.mixture_logloss is not None
    assert record.mixture_logloss - record.certificate <= least + 1e-6


def test_the_best_single_member_is_as_it_was_trained(store: RunStore) -> None:
    prob = [add(store, i, sharpness=3.0)["raw"] for i in range(3)]
    record = blend(store, EnsembleConfig())
    assert record.best_single_oof_logloss == pytest.approx(min(map(loss_of, prob)), abs=1e-6)


def test_without_calibration_nothing_else_is_tried(store: RunStore) -> None:
    add(store, 0, sharpness=3.0)
    record = blend(store, PLAIN)
    assert record.calibration is not None
    assert [(t.members, t.blend) for t in record.calibration.tried] == [(False, False)]
    assert record.calibration.before == record.calibration.after
    assert record.blend_temperature == record.members[0].temperature == 1


def test_both_settings_share_a_run_folder(store: RunStore) -> None:
    """The derived matrix of the one serves the other, or is made anew."""
    for i in range(3):
        add(store, i, sharpness=2.0)
    first = blend(store, PLAIN), blend(store, EnsembleConfig())
    again = blend(store, PLAIN), blend(store, EnsembleConfig())
    assert first == again
    assert first[0] != first[1]


def test_one_fixed_split_is_cross_fitted_in_parts(tmp_path: Path) -> None:
    store = make_store(tmp_path / "fixed", k=1)
    for i in range(3):
        add(store, i, folds=(0,), sharpness=3.0)
    record = blend(store, EnsembleConfig())
    assert record.k == 1
    assert record.crossfit_logloss != pytest.approx(record.oof_logloss, abs=1e-6)
