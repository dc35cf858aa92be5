"""What runs next: the order of the race's moves, against what each candidate promises by hand."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest

from foldrace.config.schema import RaceConfig
from tests.scheduling.raced_runs import (
    EPOCHS,
    Floats,
    Raced,
    RacedRun,
    gain_by_definition,
    optimal_mix,
    race_config,
)
from tests.scheduling.test_race import BAD, opened

CLOSE = 2e-3


@pytest.fixture
def run(tmp_path: Path) -> RacedRun:
    return RacedRun.make(tmp_path / "run")


def below(run: RacedRun, loss: float, noise: float = 0.0) -> Floats:
    """(N, 3) log-probabilities so many nats below the blend of `opened`, in the true class."""
    columns = [run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in (0, 1, 100, 101)]
    true = optimal_mix(np.array(columns)) * np.exp(-loss)
    true *= np.exp(noise * np.random.default_rng(3).normal(size=240))
    model = np.full((240, 3), -np.inf)
    model[np.arange(240), run.labels] = np.log(np.minimum(true, 1.0))
    return model


def expected_of(raced: Raced, number: int) -> tuple[float, float]:
    """The expected gain of a parked candidate and its error, as its move tells them."""
    [move] = [m for m in raced.race.moves(more=False) if m.state is raced[number]]
    found = re.fullmatch(r"gain (\S+) ± (\S+) expected, the most promising", move.reason)
    assert found is not None, move.reason
    return float(found[1]), float(found[2])


# -- folds that may run at once


def test_interrupted_first_folds_come_before_granted_ones_and_those_before_new_ones(
    run: RacedRun,
) -> None:
    raced = Raced(run, race_config())
    raced.add(0, 0)
    raced.add(1, 0)
    raced.state.release("c0001", 0)
    assert raced.moves() == [("fold", 1), ("fold", 0), ("new", None)]
    raced.start(0, 1, 2)
    raced.start(1, 0)
    assert raced.moves() == [("new", None)] and raced.moves(more=False) == []


def test_a_granted_candidate_gets_no_further_fold_while_the_blend_says_that_it_adds_nothing(
    run: RacedRun,
) -> None:
    raced = opened(run)
    raced.first_fold(2, run.model(7, 1.5))
    [move] = [m for m in raced.race.moves(more=False) if m.state is raced[2]]
    decision = raced.race.accept(move)
    assert decision is not None and decision.reason == move.reason
    raced.book(decision)
    raced.start(2, 1)
    assert raced.moves()[0] == ("fold", 2)
    raced.add(3, 0, 1, 2)
    for fold in range(3):
        raced.finish(3, fold, {"raw": run.model(7, 1.5)})
    assert ("fold", 2) not in raced.moves()


def test_by_the_forgiving_rule_folds_come_one_by_one_until_slots_are_idle(run: RacedRun) -> None:
    raced = Raced(run, race_config(rule="forgiving"))
    raced.add(0, 0)
    assert raced.moves() == [("new", None), ("fold", 0)]
    raced.finish(0, 0, {"raw": run.model(0, 1.0)})
    assert raced.moves() == [("fold", 0), ("new", None)]


def test_without_a_rule_the_oldest_candidate_comes_first(run: RacedRun) -> None:
    raced = Raced(run, race_config(rule="none"))
    raced.add(0, 0)
    raced.add(1, 0)
    assert raced.moves() == [("fold", 0), ("fold", 1), ("new", None)]


# -- grants


@pytest.mark.parametrize(("folds", "eta"), [(1, 2), (2, 2), (3, 2), (4, 3), (5, 4), (10, 4)])
def test_by_default_about_as_many_trials_are_first_folds_as_others(folds: int, eta: int) -> None:
    assert RaceConfig().one_in(folds) == eta
    assert RaceConfig(eta=7).one_in(folds) == 7


@pytest.mark.parametrize("eta", [None, 1, 2, 4])
def test_one_in_eta_of_the_measured_first_folds_is_granted_before_a_new_candidate(
    run: RacedRun, eta: int | None
) -> None:
    """The complete ones had all folds at once, the first of them by a grant."""
    raced = Raced(run, race_config(eta=eta))
    eta = eta or 2  # of three folds
    raced.complete(0, seed=0)
    measured, granted = 1, 1
    for number in range(1, 10):
        raced.first_fold(number, run.model(number, 1.5))
        measured += 1
        while granted < measured / eta:
            kind, best = raced.moves()[0]
            assert kind == "grant" and best is not None
            decision = raced.race.accept(next(raced.race.moves(more=True)))
            assert decision is not None and decision.grants
            raced.book(decision)
            raced.start(best, 1, 2)
            granted += 1
        assert raced.moves()[0] == ("new", None)


@pytest.mark.parametrize(("first", "move"), [(2, ("grant", 1)), (EPOCHS, ("new", None))])
def test_a_first_candidate_of_few_epochs_takes_no_turn_from_those_of_all(
    run: RacedRun, first: int, move: tuple[str, int | None]
) -> None:
    raced = Raced(run, race_config(eta=4), epochs=first)
    raced.complete(0, seed=0)
    raced.epochs = EPOCHS
    raced.first_fold(1, run.model(1, 1.5))
    assert raced.moves()[0] == move


def test_before_a_blend_the_least_loss_is_granted_first(run: RacedRun) -> None:
    raced = Raced(run, race_config(eta=1))
    raced.add(0, 0, 1, 2)
    losses = {}
    for number, skill in ((1, 0.5), (2, 2.0), (3, 1.0)):
        raced.first_fold(number, run.model(number, skill), seconds=100.0 * number)
        score = run.summary(f"c{number:04d}").trials[0].variants["raw"]
        losses[number] = score.calibrated_logloss
    order = [("grant", number) for number in sorted(losses, key=lambda n: losses[n])]
    assert raced.moves() == [*order, ("new", None)]


def test_of_the_same_gain_the_cheap_one_comes_first(run: RacedRun) -> None:
    raced = opened(run)
    for number, seconds in ((2, 30.0), (3, 10.0), (4, 20.0)):
        raced.first_fold(number, run.model(7, 1.5), seconds)
    assert raced.moves(more=False) == [("grant", 3), ("grant", 4), ("grant", 2)]


def test_waiting_candidates_go_by_plausible_gain_for_a_second_of_what_is_left(
    run: RacedRun,
) -> None:
    """Of one that has two of its folds, one is left."""
    raced = opened(run, race_config(z=2.0))
    rng, promise = np.random.default_rng(0), {}
    q = optimal_mix(
        np.array([run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in (0, 1, 100, 101)])
    )
    for number in range(2, 12):
        model, seconds = run.model(number, rng.uniform(-0.5, 2.0)), rng.uniform(5.0, 50.0)
        folds = range(rng.integers(1, 3))
        raced.add(number, *folds)
        for fold in folds:
            raced.finish(number, fold, {"raw": model}, seconds=seconds)
        gain, se = gain_by_definition(run.calibrated(model, *folds), q[run.rows(*folds)])
        promise[number] = (gain + 2.0 * se) / ((3 - len(folds)) * seconds)
    order = sorted((n for n in promise if promise[n] > 0), key=lambda n: -promise[n])
    assert 3 < len(order) < 10  # nothing implausible is among them
    assert raced.moves(more=False) == [("grant", number) for number in order]


# -- parked trials


def parked(raced: Raced, number: int, losses: list[float], loss: float) -> None:
    """A candidate that was parked at a rung, so many nats below the blend."""
    raced.add(number, 0)
    raced.park(number, raced.reach(number, losses, {"raw": below(raced.run, loss)}))


def good_ones(raced: Raced, count: int) -> None:
    """Candidates from c0010 on whose first fold has reached both rungs with a low loss."""
    for number in range(10, 10 + count):
        raced.add(number, 0)
        raced.reach(number, [0.1] * 4)


def test_parked_trials_return_once_they_are_among_the_best_of_their_rung(run: RacedRun) -> None:
    """The furthest first, then the least loss; before a new candidate."""
    raced = opened(run)
    good_ones(raced, 3)
    parked(raced, 2, [0.7, 0.7], 0.6)
    parked(raced, 3, [0.9, 0.9], 0.6)
    parked(raced, 4, [*BAD, 0.8, 0.8], 0.6)
    assert raced.moves()[0] == ("new", None)
    for number in (12, 13, 14):  # worse ones come
        raced.add(number, 0)
        raced.reach(number, [0.95, 0.95, 0.95, 0.95], {"raw": below(run, -0.5)})
    assert raced.moves()[:3] == [("return", 4), ("return", 2), ("new", None)]
    move = next(raced.race.moves(more=True))
    decision, before = raced.race.accept(move), raced[4].latest
    assert decision is not None and before is not None
    assert decision.reason == "among the best 1/2 of its rung by now"
    assert (decision.action, decision.epoch, decision.gain) == ("continue", 4, before.gain)
    assert decision.number > before.number and not decision.grants


def test_a_parked_trial_is_expected_to_rise_as_those_before_it_did(run: RacedRun) -> None:
    """By hand: its gain at the rung, plus the mean rise of five first folds from that rung."""
    raced = opened(run)
    columns = [run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in (0, 1, 100, 101)]
    q, mine = optimal_mix(np.array(columns))[run.rows(0)], run.rows(0)
    rises = []
    raced.add(10, 0)
    raced.reach(10, [0.1, 0.1], {"raw": below(run, -0.1)})
    parked(raced, 2, BAD, 0.06)
    gain, se = gain_by_definition(q * np.exp(-0.06), q)
    assert expected_of(raced, 2) == pytest.approx((gain, np.hypot(se, 0.1)), abs=CLOSE)
    for number in range(3, 8):
        raced.add(number, 0)
        early, late = run.model(number, 0.7), run.model(number, 1.1)
        raced.reach(number, [0.3, 0.2], {"raw": early})
        raced.finish(number, 0, {"raw": late})
        true = np.exp(early[mine, run.labels[mine]])
        before = gain_by_definition(true, q)[0]
        rises.append(gain_by_definition(run.calibrated(late, 0), q)[0] - before)
        if len(rises) < 3:
            assert expected_of(raced, 2) == pytest.approx((gain, np.hypot(se, 0.1)), abs=CLOSE)
        else:
            by_hand = gain + mean(rises), np.hypot(se, stdev(rises))
            assert expected_of(raced, 2) == pytest.approx(by_hand, abs=2 * CLOSE)


def test_parked_and_waiting_trials_go_by_the_same_promise(run: RacedRun) -> None:
    """A parked one has the rest of its fold and its other folds to go: 6 of 8 and 16 epochs of
    two seconds. Its gain may rise by 0.1 before three first folds have shown how much."""
    raced = opened(run, race_config(eta=100))
    good_ones(raced, 3)
    parked(raced, 2, BAD, 0.04)
    at_rung = np.log1p(0.1 * np.expm1(-0.04)) / 0.1
    promise = (at_rung + 0.1) / (6 * 2.0 + 16 * 2.0)
    decision = raced.first_fold(3, run.model(7, 1.5))
    assert decision.gain is not None and decision.gain_se is not None
    own = decision.gain + decision.gain_se
    for number, factor in ((4, 0.96), (5, 1.04)):  # less and more than the parked one
        seconds = own / promise / factor / 2
        raced.first_fold(number, run.model(7, 1.5), seconds)
    order = [number for _, number in raced.moves(more=False)]
    assert order.index(5) < order.index(2) < order.index(4)


def test_parked_trials_without_a_plausible_gain_wait_for_the_end(run: RacedRun) -> None:
    raced = opened(run)
    good_ones(raced, 3)
    for number, loss in ((2, 0.6), (3, 0.05), (4, 0.3)):
        parked(raced, number, BAD, loss)
    assert raced.moves(more=False)[0] == ("return", 3)
    assert {("return", 2), ("return", 4)}.isdisjoint(raced.moves())
    assert [state.number for state in raced.race.parked()] == [2, 4, 3]
    stop = raced.race.give_up(raced[2], "nothing promises a gain any more")
    before = raced[2].latest
    assert before is not None
    assert (stop.action, stop.epoch, stop.gain) == ("stop", 2, before.gain)
    assert (stop.score, stop.limit, stop.seconds) == (0.8, before.limit, 4.0)
    waiting = raced.first_fold(5, below(run, 0.6))
    stop = raced.race.give_up(raced[5], "nothing promises a gain any more")
    assert (stop.action, stop.epoch, stop.fold, stop.gain) == ("stop", None, 0, waiting.gain)


def test_before_a_blend_parked_trials_come_after_waiting_ones_by_rung_and_rank(
    run: RacedRun,
) -> None:
    raced = Raced(run, race_config())
    raced.add(0, 0, 1, 2)
    good_ones(raced, 3)
    for number, losses in ((2, [0.8, 0.8]), (3, [0.7, 0.7]), (4, [0.9] * 4)):
        raced.add(number, 0)
        raced.park(number, raced.reach(number, losses, {}))
    assert raced.moves(more=False)[:3] == [("return", 4), ("return", 3), ("return", 2)]
    raced.first_fold(5, run.model(5, 0.0))
    moves = raced.moves(more=False)[:4]
    assert moves == [("grant", 5), ("return", 4), ("return", 3), ("return", 2)]
    assert [state.number for state in raced.race.parked()] == [2, 3, 4]


# -- idle slots


def test_an_idle_slot_takes_a_further_fold_of_a_first_fold_that_does_well(run: RacedRun) -> None:
    raced = opened(run)
    for number in (2, 3, 4):
        raced.add(number, 0)
    assert raced.moves(more=False) == []  # nothing is known of them
    raced.reach(3, [0.5, 0.4])
    raced.reach(4, [0.5, 0.3])
    raced.reach(2, BAD, {"raw": below(run, -0.5)})
    assert raced.moves(more=False) == [("grant", 4)]  # the best 1/2 of three
    move = next(raced.race.moves(more=False))
    assert move.reason == "a slot is idle"
    decision = raced.race.accept(move)
    assert decision is not None and decision.grants
    raced.book(decision)
    assert not raced.race.is_judged_at_rungs(raced[4]) and raced[4].granted
    assert raced.moves(more=False) == [("fold", 4)]


def test_without_epoch_stopping_any_first_fold_may_have_company(run: RacedRun) -> None:
    raced = opened(run, race_config(epoch_stopping=False))
    for number in (2, 3):
        raced.add(number, 0)
    assert raced.moves(more=False) == [("grant", 2), ("grant", 3)]
    raced.state.expect_stop("c0002", 0)  # it is on its way out
    assert raced.moves(more=False) == [("grant", 3)]
