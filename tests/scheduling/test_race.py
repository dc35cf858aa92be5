"""The race's decisions against the blend and the gain by their definitions, on real OOF files."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from foldrace.config.schema import RaceConfig
from foldrace.run_folder.records import RaceDecision
from foldrace.scheduling.race import is_decided
from tests.scheduling.raced_runs import (
    Raced,
    RacedRun,
    gain_by_definition,
    optimal_mix,
    race_config,
)

CLOSE = 2e-3
"""The race's blend is optimal to 1e-5 nats, which leaves its weights that uncertain."""
GOOD, BAD = [0.6, 0.5], [0.9, 0.8]
"""Losses of the two epochs until the first rung."""


@pytest.fixture
def run(tmp_path: Path) -> RacedRun:
    return RacedRun.make(tmp_path / "run")


def opened(run: RacedRun, config: RaceConfig | None = None) -> Raced:
    """A race with two complete candidates."""
    raced = Raced(run, config or race_config())
    for number in range(2):
        raced.complete(number, seed=number)
    return raced


def reference_blend(run: RacedRun, *seeds: int) -> np.ndarray:
    both = (*seeds, *(s + 100 for s in seeds))
    return optimal_mix(np.array([run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in both]))


# -- after whole folds


def test_a_decision_has_the_numbers_behind_it(run: RacedRun) -> None:
    raced = opened(run)
    q = reference_blend(run, 0, 1)
    models = {"raw": run.model(7, 0.3), "ema": run.model(8, 1.2)}
    raced.add(2)
    for done, fold in ((1, 1), (2, 0)):
        raced.start(2, fold)
        decision = raced.finish(2, fold, models)
        folds = (0, 1)[2 - done :]
        mine = run.rows(*folds)
        mean, se = gain_by_definition(run.calibrated(models["ema"], *folds), q[mine])
        assert (decision.variant, decision.rows, decision.fold) == ("ema", int(mine.sum()), fold)
        assert decision.gain == pytest.approx(mean, abs=CLOSE)
        assert decision.gain_se == pytest.approx(se, abs=CLOSE)
        assert decision.blend_logloss == pytest.approx(float(-np.log(q).mean()), abs=2e-5)
        gain = f"gain {decision.gain:+.4f} ± {decision.gain_se:.4f}"
        assert (decision.action, decision.reason) == ("park", f"{gain}; waits for its turn")
        assert (decision.folds_done, decision.complete, decision.z) == (done, 2, 1.0)
        assert decision.epochs_trained == 10 * (6 + done)
        assert (decision.epoch, decision.score, decision.limit) == (None, None, None)


@pytest.mark.parametrize("z", [0.0, 1.0, 3.0])
def test_who_has_all_folds_keeps_them_while_z_standard_errors_allow_a_gain(
    run: RacedRun, z: float
) -> None:
    raced = opened(run, race_config(z=z))
    actions = set()
    for number, skill in enumerate([-1.0, 0.0, 0.3, 0.6, 1.0, 2.0], start=2):
        raced.add(number)
        assert raced.race.grant_first(raced[number]) is None  # but the first of a sweep
        raced.book(granted(raced, number))
        raced.start(number, 0)
        decision = raced.finish(number, 0, {"raw": run.model(50 + number, skill)})
        assert decision.gain is not None and decision.gain_se is not None
        expected = "continue" if decision.gain + z * decision.gain_se > 0 else "park"
        assert decision.action == expected
        assert decision.reason == f"gain {decision.gain:+.4f} ± {decision.gain_se:.4f}"
        actions.add(expected)
    assert actions == {"continue", "park"}


def granted(raced: Raced, number: int) -> RaceDecision:
    return RaceDecision(
        number=1000 + number, candidate=f"c{number:04d}", fold=0, rule="gain", action="continue",
        folds_done=0, rows=0, complete=0, epochs_trained=0, reason="for this test",
    )  # fmt: skip


def test_a_member_that_is_there_already_adds_nothing(run: RacedRun) -> None:
    raced = opened(run)
    decision = raced.first_fold(2, run.model(0, 1.0))
    mixed = reference_blend(run, 0, 1)[run.rows(0)]
    mean, _ = gain_by_definition(run.calibrated(run.model(0, 1.0), 0), mixed)
    assert decision.gain == pytest.approx(mean, abs=CLOSE)
    assert decision.line.startswith("c0002 parked after fold 0: gain ")


def test_the_last_fold_completes_and_all_variants_join(run: RacedRun) -> None:
    raced = opened(run)
    before = reference_blend(run, 0, 1)
    decision = raced.complete(2, seed=2)
    calibrated = {s: run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in (2, 102)}
    expected = max(gain_by_definition(t, before)[0] for t in calibrated.values())
    assert (decision.action, decision.folds_done, decision.complete) == ("complete", 3, 3)
    assert decision.gain == pytest.approx(expected, abs=CLOSE)
    with_it = float(-np.log(reference_blend(run, 0, 1, 2)).mean())
    assert decision.blend_logloss == pytest.approx(with_it, abs=2e-5)
    after = raced.first_fold(3, run.model(9, 0.0))
    assert (after.complete, after.blend_logloss) == (3, decision.blend_logloss)


def test_the_first_candidate_gets_all_its_folds_and_others_wait_for_a_blend(run: RacedRun) -> None:
    raced = Raced(run, race_config())
    first = raced.add(0)
    assert first.granted and first.latest is not None
    assert first.latest.line == (
        "c0000 goes on before its first fold has ended: the first candidate gets all its folds, so "
        "that there is a blend"
    )
    other = raced.first_fold(1, run.model(1, -2.0))
    assert (other.action, other.gain) == ("park", None)
    assert other.reason == "nothing is complete yet; waits for its turn"
    for fold in range(3):
        raced.start(0, fold)
        decision = raced.finish(0, fold, {"raw": run.model(0, 1.0)})
        assert decision.action == ("complete" if fold == 2 else "continue")
    assert (decision.gain, decision.reason) == (None, "the first of the blend")


def test_the_forgiving_rule(run: RacedRun) -> None:
    raced = opened(run, race_config(rule="forgiving"))
    done = [run.summary(f"c{n:04d}") for n in range(2)]
    best = min(done, key=lambda s: s.pooled_logloss(s.best or ""))
    worst = max(t.variants[best.best or ""].val_logloss for t in best.trials)
    actions = set()
    for number, skill in enumerate([0.0, 0.9, 1.0, 1.1, 3.0], start=2):
        raced.add(number)
        model, losses = run.model(60 + number, skill), []
        for fold in (0, 2):
            if raced[number].hopeless:
                break
            raced.start(number, fold)
            decision = raced.finish(number, fold, {"raw": model})
            losses.append(-float(model[run.rows(fold), run.labels[run.rows(fold)]].mean()))
            assert decision.score == pytest.approx(np.mean(losses))
            assert (decision.limit, decision.z, decision.rule) == (worst, None, "forgiving")
            assert decision.gain is not None
            assert decision.action == ("stop" if np.mean(losses) > worst else "continue")
            actions.add(decision.action)
    assert actions == {"stop", "continue"}


def test_a_candidate_with_a_running_fold_is_not_stopped_before_that_ends(run: RacedRun) -> None:
    raced = opened(run, race_config(rule="forgiving"))
    raced.add(2, 0, 1)
    spared = raced.finish(2, 0, {"raw": run.model(7, -2.0)})
    assert spared.action == "continue" and spared.score is not None and spared.limit is not None
    assert spared.score > spared.limit
    assert spared.reason.endswith("; not stopped while another of its folds is running")
    assert list(raced.race.verdicts()) == []
    raced.state.release("c0002", 1)
    [verdict] = raced.race.verdicts()
    assert (verdict.action, verdict.fold) == ("stop", 0) and verdict.number > spared.number


def test_without_a_rule_everybody_goes_on(run: RacedRun) -> None:
    raced = opened(run, race_config(rule="none"))
    decision = raced.first_fold(2, run.model(7, -2.0))
    assert (decision.action, decision.rule, decision.z) == ("continue", "none", None)
    assert decision.gain is not None and decision.gain < 0
    assert list(raced.race.verdicts()) == []


def test_a_grown_blend_takes_folds_back(run: RacedRun) -> None:
    raced = opened(run)
    raced.first_fold(2, run.model(7, 1.5))
    [grant] = [m for m in raced.race.moves(more=False) if m.state is raced[2]]
    kept = raced.race.accept(grant)
    assert kept is not None and kept.gain is not None
    raced.book(kept)
    assert list(raced.race.verdicts()) == []
    raced.add(3)
    for fold in range(3):
        raced.start(3, fold)
        raced.finish(3, fold, {"raw": run.model(7, 1.5)})
    [verdict] = raced.race.verdicts()
    own = run.calibrated(run.model(7, 1.5), 0)
    columns = [run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in (0, 1, 100, 101)]
    q = optimal_mix(np.array([*columns, run.calibrated(run.model(7, 1.5), 0, 1, 2)]))
    assert (verdict.action, verdict.candidate) == ("park", "c0002")
    assert verdict.gain == pytest.approx(gain_by_definition(own, q[run.rows(0)])[0], abs=CLOSE)
    raced.start(2, 1)
    assert list(raced.race.verdicts()) == []  # not while a fold of it runs


def test_one_validation_split(tmp_path: Path) -> None:
    run = RacedRun.make(tmp_path / "one", k=1)
    raced = Raced(run, race_config())
    for number, skill in enumerate([1.0, 1.0, -2.0]):
        decision = raced.first_fold(number, run.model(number, skill))
        assert (decision.action, decision.rows) == ("complete", int((run.fold == 0).sum()))
    assert decision.complete == 3 and decision.gain is not None and decision.gain < 0


def test_nothing_is_held_against_rows_that_cannot_be_read(
    run: RacedRun, caplog: pytest.LogCaptureFixture
) -> None:
    raced = opened(run)
    raced.first_fold(2, run.model(2, 2.0))
    raced.add(3, 0)
    raced.state.end(run.finish("c0003", 0, {"raw": run.model(7, -2.0)}))
    run.store.files.write("trials/c0003/fold0/oof.npy", b"half")
    with caplog.at_level(logging.WARNING, "foldrace"):
        decision = raced.book(raced.race.judge("c0003", 0))
        assert decision.gain is None and decision.reason == "gain unknown; waits for its turn"
        assert raced.moves(more=False) == [("grant", 3), ("grant", 2)]
        raced.moves()
    assert caplog.text.count("c0003/fold0/oof.npy") == 1
    for fold in (1, 2):
        raced.start(3, fold)
        decision = raced.finish(3, fold, {"raw": run.model(7, -2.0)})
    assert (decision.action, decision.complete) == ("complete", 3)
    assert decision.blend_logloss == raced.race.blend_loss


# -- at rungs


def at_rung(raced: Raced, *losses: list[float]) -> None:
    """Candidates from c0010 on have reached the first rung, and run on."""
    for number, loss in enumerate(losses, start=10):
        raced.add(number, 0)
        assert raced.reach(number, loss) is None


def test_a_trial_is_parked_where_neither_its_loss_nor_its_gain_speaks_for_it(
    run: RacedRun,
) -> None:
    raced = opened(run)
    at_rung(raced, GOOD)
    raced.add(2, 0)
    models = {"raw": run.model(7, -1.0), "ema": run.model(8, -0.5)}
    decision = raced.reach(2, BAD, models)
    assert decision is not None
    q, rows = reference_blend(run, 0, 1)[run.rows(0)], run.rows(0)
    true = [np.exp(m[rows, run.labels[rows]]) for m in models.values()]
    mean, se = max(gain_by_definition(t, q) for t in true)
    assert decision.gain == pytest.approx(mean, abs=CLOSE) and mean + se < 0
    assert decision.gain_se == pytest.approx(se, abs=CLOSE)
    assert (decision.action, decision.rule, decision.z) == ("park", "epoch", 1.0)
    assert (decision.fold, decision.epoch, decision.seconds) == (0, 2, 4.0)
    assert (decision.score, decision.limit) == (0.8, 0.5)
    assert (decision.folds_done, decision.rows, decision.complete) == (0, 80, 2)
    assert decision.reason == (
        f"gain {decision.gain:+.4f} ± {decision.gain_se:.4f}, and log loss 0.8000 is above 0.5000, "
        "the cut for the best 1/2 of 2 trials at 25% of their epochs"
    )
    assert not raced[2].decisions and raced[2].running == {0}  # it is booked when it has left


@pytest.mark.parametrize(
    ("skill", "losses", "parked"),
    [(-1.0, BAD, True), (-1.0, GOOD, False), (1.5, BAD, False), (1.5, GOOD, False)],
)
def test_its_loss_or_its_gain_lets_a_trial_go_on(
    run: RacedRun, skill: float, losses: list[float], parked: bool
) -> None:
    raced = opened(run)
    at_rung(raced, GOOD)
    raced.add(2, 0)
    assert (raced.reach(2, losses, {"raw": run.model(7, skill)}) is not None) == parked


def test_before_there_is_a_blend_the_loss_decides(run: RacedRun) -> None:
    raced = Raced(run, race_config(reduction=3))
    raced.add(0)
    at_rung(raced, BAD, BAD)  # nothing can be said of fewer than three
    raced.add(20, 0)
    assert raced.reach(20, GOOD, {"raw": run.model(7, -1.0)}) is None
    raced.add(21, 0)
    decision = raced.reach(21, BAD, {"raw": run.model(7, 2.0)})
    assert decision is not None and (decision.gain, decision.limit) == (None, 0.5)


def test_only_a_first_fold_without_a_grant_is_judged_and_at_its_rungs_alone(
    run: RacedRun,
) -> None:
    raced = opened(run)
    at_rung(raced, GOOD, GOOD, GOOD, GOOD)
    bad = {"raw": run.model(7, -1.0)}
    for number in (2, 3, 4, 5):
        raced.add(number, 0)
    assert raced.race.reach("c0002", 0, 2, True) is None  # there is no log of it
    assert raced.reach(2, [*BAD, 0.8], bad) is None  # epoch 3 is no rung
    raced.book(granted(raced, 3))
    assert not raced.race.is_judged_at_rungs(raced[3])
    assert raced.reach(3, BAD, bad) is None
    raced.start(4, 1)
    assert raced.reach(4, BAD, bad) is None  # another fold of it runs
    assert raced.race.is_judged_at_rungs(raced[5])
    assert raced.reach(5, BAD, bad) is not None
    raced.finish(5, 0, bad)
    assert not raced.race.is_judged_at_rungs(raced[5])


@pytest.mark.parametrize("config", [race_config(epoch_stopping=False), race_config(rule="none")])
def test_without_epoch_stopping_no_fold_is_judged_at_rungs(
    run: RacedRun, config: RaceConfig
) -> None:
    raced = opened(run, config)
    raced.add(2, 0)
    assert not raced.race.is_judged_at_rungs(raced[2])


@pytest.mark.parametrize(
    ("loss", "more", "other", "parked"),
    [
        (0.05, True, False, True),  # a new candidate comes first
        (0.05, False, False, False),  # before three have ended, a rise of 0.1 is plausible
        (0.05, False, True, True),  # another one promises more
        (0.5, False, False, True),  # nothing would make it the next one
    ],
)
def test_a_trial_is_not_parked_where_it_would_be_the_next_one_to_run(
    run: RacedRun, loss: float, more: bool, other: bool, parked: bool
) -> None:
    raced = opened(run)
    if other:
        raced.first_fold(3, run.model(8, 2.0))
    at_rung(raced, GOOD)
    raced.add(2, 0)
    model = np.full((240, 3), -np.inf)
    q = reference_blend(run, 0, 1)
    model[np.arange(240), run.labels] = np.log(q) + np.log1p(-loss)  # nats below the blend
    before = (dict(raced[2].decisions), set(raced[2].running), raced[2].summary)
    assert (raced.reach(2, BAD, {"raw": model}, more) is not None) == parked
    assert (raced[2].decisions, raced[2].running, raced[2].summary) == before


def test_a_damaged_log_is_named_and_parks_nobody(
    run: RacedRun, caplog: pytest.LogCaptureFixture
) -> None:
    raced = opened(run)
    at_rung(raced, GOOD)
    raced.add(2, 0)
    run.store.save_rung("c0002", 0, 2, "epoch\n0\n1\n", {"raw": np.full(80, 0.01, np.float32)})
    with caplog.at_level(logging.WARNING, "foldrace"):
        assert raced.race.reach("c0002", 0, 2, True) is None
    assert "trials/c0002/fold0/train_log.csv is ignored: no train_log.csv" in caplog.text


# -- the next session


def test_a_kill_between_record_and_decision_is_noticed(run: RacedRun) -> None:
    raced = opened(run)
    raced.add(2, 0)
    run.finish("c0002", 0, {"raw": run.model(7, 2.0)})
    assert not is_decided(run.summary("c0002"))
    raced.finish(2, 0, {"raw": run.model(7, 2.0)})
    assert is_decided(run.summary("c0002"))
    run.finish("c0002", 1, {"raw": run.model(7, 2.0)})
    assert not is_decided(run.summary("c0002"))
    run.store.files.write("trials/c0001/fold2/decision.json", b'{"number": 3, "cand')
    assert run.summary("c0001").status == "complete" and not is_decided(run.summary("c0001"))
    again = raced.again()
    alone = float(-np.log(reference_blend(run, 0)).mean())
    assert again.race.blend_loss == pytest.approx(alone, abs=2e-5)  # the torn one is yet to come
    assert again.race.judge("c0001").action == "complete"
    both = float(-np.log(reference_blend(run, 0, 1)).mean())
    assert again.race.blend_loss == pytest.approx(both, abs=2e-5)


def test_numbers_of_decisions_go_on_in_the_next_session(run: RacedRun) -> None:
    raced = opened(run)
    last = raced.first_fold(2, run.model(7, 2.0))
    assert raced.again().first_fold(3, run.model(8, 2.0)).number == last.number + 1


def test_the_next_session_goes_on_as_this_one_would(run: RacedRun) -> None:
    """Waiting, parked, interrupted and stopped candidates; the same moves and the same blend."""
    raced = opened(run, race_config(eta=1))
    for number, skill in enumerate([1.5, -2.0, 1.6], start=2):
        raced.first_fold(number, run.model(30 + number, skill))
    at_rung(raced, GOOD, [0.55, 0.45])
    for number, losses in ((20, BAD), (21, [0.7, 0.7])):
        raced.add(number, 0)
        model = {"raw": run.model(number, -0.2)}
        raced.park(number, raced.reach(number, losses, model))
    for number in (10, 11):  # they are interrupted
        raced.state.release(f"c{number:04d}", 0)
    [worst] = [s for s in raced.state if s.number == 3]
    raced.book(raced.race.give_up(worst, "for this test"))
    again = raced.again()
    assert again.race.blend_loss == pytest.approx(raced.race.blend_loss, abs=2e-5)
    for more in (True, False):
        assert again.moves(more) == raced.moves(more)
    assert [s.name for s in again.race.parked()] == [s.name for s in raced.race.parked()]
    one, other = (r.first_fold(22, run.model(9, 0.8)) for r in (raced, again))
    assert other.gain == pytest.approx(one.gain, abs=CLOSE)
    changing = {"gain", "gain_se", "reason", "blend_logloss"}
    assert one.model_dump(exclude=changing) == other.model_dump(exclude=changing)
