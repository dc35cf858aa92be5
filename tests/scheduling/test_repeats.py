"""The race over repeated folds: gains compare the same rows of the same repeats, and the later
repeats come last."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from foldrace.config.schema import RaceConfig
from foldrace.ensemble.running_blend import bounded_gain
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.gains import Gains
from foldrace.scheduling.race import Race
from foldrace.scheduling.state import FoldTask, SweepState
from tests.ensemble.repeated_runs import (
    ALL,
    LABELS,
    SPLITS,
    Floats,
    add,
    finish,
    fold_prob,
    repeated_run,
)
from tests.ensemble.temperature_reference import smoothed_temperature
from tests.scheduling.raced_runs import optimal_mix


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return repeated_run(tmp_path / "run")


def pairs(number: int, folds: tuple[int, ...], skill: float) -> Floats:
    """Calibrated true-class probabilities of the folds' own models, by repeat and row."""
    stored, labels = [], []
    for repeat in (0, 1):
        for row in range(len(LABELS)):
            fold = SPLITS[repeat, row]
            if fold in folds:
                log_prob = np.log(fold_prob(number, fold, skill)[row])
                stored.append(log_prob.astype(np.float16).astype(np.float64))
                labels.append(LABELS[row])
    rows, truth = np.array(stored), np.array(labels)
    scaled = log_softmax(rows / smoothed_temperature(rows, truth), axis=1)
    return np.asarray(np.exp(scaled[np.arange(len(rows)), truth]))


@pytest.mark.parametrize("folds", [(0,), (0, 1, 2), (0, 1, 2, 3), (0, 1, 2, 3, 4)])
def test_a_gain_is_over_the_models_of_the_same_repeats(
    folds: tuple[int, ...], store: RunStore
) -> None:
    """Over those of the complete candidates; a row that two repeats have scored counts once."""
    add(store, 0, skill=1.1)
    add(store, 1, skill=0.9)
    add(store, 2, folds)
    first, second, third = store.summaries(True)
    gains = Gains(store)
    gains.join([first, second])
    mixed = optimal_mix(np.array([pairs(0, ALL, 1.1), pairs(1, ALL, 0.9)]))
    mine = np.isin(SPLITS.ravel(), folds)
    x = np.log1p(0.1 * (pairs(2, folds, 1.0) / mixed[mine] - 1.0)) / 0.1
    of_row = np.tile(np.arange(len(LABELS)), 2)[mine]
    means = np.array([x[of_row == row].mean() for row in np.unique(of_row)])
    found = gains.of(third)
    assert found is not None and found[1].rows == len(means)
    assert found[1].mean == pytest.approx(means.mean(), abs=2e-3)
    assert found[1].se == pytest.approx(means.std(ddof=1) / np.sqrt(len(means)), rel=2e-2)
    assert gains.blend_loss == pytest.approx(-np.log(mixed).mean(), abs=1e-4)
    again = Gains(store)  # from race.safetensors
    again.join([first, second])
    assert again.blend_loss == gains.blend_loss


def test_a_row_of_several_entries_counts_once() -> None:
    """As many entries of one row as there may be: neither mean nor error go by their number."""
    rng = np.random.default_rng(0)
    t, q = rng.random(6), rng.uniform(0.2, 0.8, 6)
    once = bounded_gain(t, q)
    often = np.array([0, 0, 0, 1, 2, 3, 3, 4, 5])
    found = bounded_gain(t[often], q[often], 7 * often)  # rows need not be numbered 0, 1, ...
    assert (found.mean, found.se) == pytest.approx((once.mean, once.se))
    assert found.rows == once.rows == 6


def test_the_later_repeats_come_last_and_are_saved(store: RunStore) -> None:
    """A candidate that adds nothing is parked before its second repeat has begun."""
    state = SweepState(store.fold_count, 0, repeats=2)
    race = Race(store, RaceConfig(epoch_stopping=False), state)

    def start(number: int) -> None:
        record = CandidateRecord(candidate=f"c{number:04d}", backbone="timm/x", params={})
        store.save_candidate(record)
        granted = race.grant_first(state.add(record))
        if granted is not None:
            state.decide(granted)

    def run(number: int, skill: float) -> list[int]:
        """Its folds, in the order in which the race has them run."""
        name, order = f"c{number:04d}", []
        while state[name].waiting and not (order and not race.is_granted(state[name])):
            fold = state[name].waiting[0]
            order.append(fold)
            state.start(FoldTask(state[name].record, fold))
            state.end(finish(store, number, fold, skill))
            race.fold_ended(name)
            state.decide(race.judge(name, fold))
        return order

    start(0)
    assert run(0, 2.0) == list(ALL)
    assert state["c0000"].summary.status == "complete"
    start(1)
    assert run(1, -2.0) == [0]
    assert state["c0001"].summary.status == "parked"
    assert state["c0001"].waiting == ALL[1:]
