"""The race's decisions against the blend and the gain by their definitions, on real OOF files."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from foldrace.config.schema import RaceConfig
from foldrace.run_folder.records import RaceDecision
from foldrace.scheduling.race import Race, is_decided
from foldrace.scheduling.race_columns import ColumnCache
from tests.scheduling.raced_runs import RacedRun, gain_by_definition, optimal_mix

GAIN = RaceConfig(min_complete=2)
CLOSE = 2e-3
"""The race's blend is optimal to 1e-5 nats, which leaves its weights that uncertain."""


@pytest.fixture
def run(tmp_path: Path) -> RacedRun:
    return RacedRun.make(tmp_path / "run")


def complete(run: RacedRun, race: Race, name: str, seed: int, skill: float = 1.0) -> RaceDecision:
    """All folds of a candidate with two variants, judged after each and saved."""
    models = {"raw": run.model(seed, skill), "ema": run.model(seed + 100, skill)}
    for fold in range(run.store.fold_count):
        race.trial_ended(run.finish(name, fold, models))
        decision = race.judge(run.summary(name))
        run.store.save_decision(decision)
    return decision


def opened(run: RacedRun, config: RaceConfig = GAIN) -> Race:
    race = Race(run.store, config)
    for number in range(2):
        complete(run, race, f"c{number:04d}", seed=number)
    return race


def reference_blend(run: RacedRun, *seeds: int) -> np.ndarray:
    columns = [
        run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in (*seeds, *(s + 100 for s in seeds))
    ]
    return optimal_mix(np.array(columns))


def test_the_gain_is_that_over_the_optimal_calibrated_blend(run: RacedRun) -> None:
    race = opened(run)
    q = reference_blend(run, 0, 1)
    models = {"raw": run.model(7, 0.3), "ema": run.model(8, 1.2)}
    for folds in [(1,), (0, 1)]:
        for fold in folds:
            run.finish("c0002", fold, models)
        decision = race.judge(run.summary("c0002"))
        mine = run.rows(*folds)
        mean, se = gain_by_definition(run.calibrated(models["ema"], *folds), q[mine])
        assert (decision.variant, decision.rows) == ("ema", int(mine.sum()))
        assert decision.gain == pytest.approx(mean, abs=CLOSE)
        assert decision.gain_se == pytest.approx(se, abs=CLOSE)
        assert decision.blend_logloss == pytest.approx(float(-np.log(q).mean()), abs=2e-5)
        assert decision.action == ("continue" if mean + se > 0 else "stop")
        assert decision.reason == f"gain {decision.gain:+.4f} ± {decision.gain_se:.4f}"
        assert (decision.complete, decision.epochs_trained, decision.z) == (2, 60, 1.0)


@pytest.mark.parametrize("z", [0.0, 1.0, 3.0])
def test_z_standard_errors_are_allowed(run: RacedRun, z: float) -> None:
    race = opened(run, RaceConfig(min_complete=2, z=z))
    actions = set()
    for number, skill in enumerate([-1.0, 0.0, 0.3, 0.6, 1.0, 2.0]):
        name = f"c{number + 2:04d}"
        run.finish(name, 0, {"raw": run.model(50 + number, skill)})
        decision = race.judge(run.summary(name))
        assert decision.gain is not None and decision.gain_se is not None
        expected = "continue" if decision.gain + z * decision.gain_se > 0 else "stop"
        assert decision.action == expected
        actions.add(expected)
    assert actions == {"continue", "stop"}


def test_a_member_that_is_there_already_adds_nothing(run: RacedRun) -> None:
    race = opened(run)
    run.finish("c0002", 0, {"raw": run.model(0, 1.0)})
    decision = race.judge(run.summary("c0002"))
    mixed = reference_blend(run, 0, 1)[run.rows(0)]
    mean, _ = gain_by_definition(run.calibrated(run.model(0, 1.0), 0), mixed)
    assert decision.gain == pytest.approx(mean, abs=CLOSE)
    assert decision.line.startswith("c0002 ") and " after fold 0: gain " in decision.line


def test_the_last_fold_completes_and_all_variants_join(run: RacedRun) -> None:
    race = opened(run)
    before = reference_blend(run, 0, 1)
    decision = complete(run, race, "c0002", seed=2)
    calibrated = {s: run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in (2, 102)}
    expected = max(gain_by_definition(t, before)[0] for t in calibrated.values())
    assert (decision.action, decision.folds_done, decision.complete) == ("complete", 3, 3)
    assert decision.gain == pytest.approx(expected, abs=CLOSE)
    with_it = float(-np.log(reference_blend(run, 0, 1, 2)).mean())
    assert decision.blend_logloss == pytest.approx(with_it, abs=2e-5)
    run.finish("c0003", 0, {"raw": run.model(9, 0.0)})
    after = race.judge(run.summary("c0003"))
    assert (after.complete, after.blend_logloss) == (3, decision.blend_logloss)


def test_all_gains_are_those_over_the_blend_as_it_is_now(run: RacedRun) -> None:
    """Of all that is held: several variants, whole candidates and some of one or two folds."""
    race = opened(run)
    models = {n: {"raw": run.model(n, 0.3), "ema": run.model(n + 100, 1.2)} for n in (2, 3)}
    for number, few in ((2, (1,)), (3, (0, 2))):
        for fold in few:
            run.finish(f"c000{number}", fold, models[number])
        race.judge(run.summary(f"c000{number}"))
    complete(run, race, "c0004", seed=4)
    q, found = reference_blend(run, 0, 1, 4), race.gains()
    models |= {n: {"raw": run.model(n, 1.0), "ema": run.model(n + 100, 1.0)} for n in (0, 1, 4)}
    for number, folds in ((0, (0, 1, 2)), (2, (1,)), (3, (0, 2)), (4, (0, 1, 2))):
        columns = [run.calibrated(model, *folds) for model in models[number].values()]
        expected = max(gain_by_definition(t, q[run.rows(*folds)])[0] for t in columns)
        assert found[f"c000{number}"] == pytest.approx(expected, abs=CLOSE)


def test_nobody_is_stopped_before_enough_are_complete(run: RacedRun) -> None:
    race = Race(run.store, RaceConfig(min_complete=3))
    first = complete(run, race, "c0000", seed=0)
    assert (first.gain, first.action, first.complete) == (None, "complete", 1)
    alone = float(-np.log(reference_blend(run, 0)).mean())
    assert first.blend_logloss == pytest.approx(alone, abs=2e-5)
    assert first.reason == "the first of the blend"
    run.finish("c0001", 0, {"raw": run.model(1, -2.0)})
    decision = race.judge(run.summary("c0001"))
    assert decision.action == "continue" and decision.gain is not None and decision.gain < 0
    assert decision.line == (
        "c0001 goes on after fold 0: 1 of 3 candidates complete: nobody is stopped yet"
    )
    assert not race.open and race.gain_of(0, {"raw": np.full(80, 0.5)}) is None
    assert not race.is_stale("c0001")


def test_running_folds_are_waited_for(run: RacedRun) -> None:
    race = opened(run)
    run.finish("c0002", 0, {"raw": run.model(7, -2.0)})
    spared = race.judge(run.summary("c0002"), running=1)
    assert spared.action == "continue" and spared.gain is not None and spared.gain < 0
    assert spared.reason.endswith("; not stopped while another of its folds is running")
    assert race.is_stale("c0002")
    run.store.save_decision(spared)
    again = race.judge(run.summary("c0002"))
    assert (again.action, again.fold, again.number) == ("stop", 0, spared.number + 1)


def test_a_grown_blend_makes_a_decision_stale(run: RacedRun) -> None:
    race = opened(run)
    run.finish("c0002", 0, {"raw": run.model(7, 1.5)})
    kept = race.judge(run.summary("c0002"))
    assert kept.action == "continue" and not race.is_stale("c0002")
    complete(run, race, "c0003", seed=7, skill=1.5)
    assert race.is_stale("c0002")
    run.store.save_decision(kept)
    again = race.judge(run.summary("c0002"))
    assert again.gain is not None and kept.gain is not None and again.gain < kept.gain / 2
    assert race.gains()["c0002"] == pytest.approx(again.gain)


def test_the_forgiving_rule(run: RacedRun) -> None:
    race = opened(run, RaceConfig(rule="forgiving", min_complete=2))
    done = [run.summary(f"c{n:04d}") for n in range(2)]
    best = min(done, key=lambda s: s.pooled_logloss(s.best or ""))
    worst = max(t.variants[best.best or ""].val_logloss for t in best.trials)
    actions = set()
    for number, skill in enumerate([0.0, 0.9, 1.0, 1.1, 3.0]):
        name = f"c{number + 2:04d}"
        model = run.model(60 + number, skill)
        losses = [run.finish(name, k, {"raw": model}).variants["raw"].val_logloss for k in (0, 2)]
        decision = race.judge(run.summary(name))
        assert decision.score == pytest.approx(np.mean(losses))
        assert (decision.limit, decision.z) == (worst, None)
        assert decision.gain is not None
        assert decision.action == ("stop" if np.mean(losses) > worst else "continue")
        actions.add(decision.action)
    assert actions == {"stop", "continue"}


def test_without_a_rule_everybody_goes_on(run: RacedRun) -> None:
    race = opened(run, RaceConfig(rule="none", min_complete=1))
    run.finish("c0002", 0, {"raw": run.model(7, -2.0)})
    decision = race.judge(run.summary("c0002"))
    assert (decision.action, decision.rule) == ("continue", "none")
    assert decision.gain is not None and decision.gain < 0
    assert not race.open


def test_a_soup_judges_nobody(run: RacedRun) -> None:
    race = opened(run)
    models = {"raw": run.model(7, -2.0), "soup": run.model(8, 3.0)}
    run.finish("c0002", 0, models, soups=("soup",))
    decision = race.judge(run.summary("c0002"))
    assert (decision.variant, decision.action) == ("raw", "stop")


def test_one_validation_split(tmp_path: Path) -> None:
    run = RacedRun.make(tmp_path / "one", k=1)
    race = Race(run.store, RaceConfig(min_complete=1))
    for number, skill in enumerate([1.0, 1.0, -2.0]):
        name = f"c{number:04d}"
        run.finish(name, 0, {"raw": run.model(number, skill)})
        decision = race.judge(run.summary(name))
        assert (decision.action, decision.rows) == ("complete", int((run.fold == 0).sum()))
    assert decision.complete == 3 and decision.gain is not None and decision.gain < 0


def test_rows_that_cannot_be_read_stop_nobody(
    run: RacedRun, caplog: pytest.LogCaptureFixture
) -> None:
    race = opened(run)
    run.finish("c0002", 0, {"raw": run.model(7, -2.0)})
    run.store.files.write("trials/c0002/fold0/oof.npy", b"half")
    with caplog.at_level(logging.WARNING, "foldrace"):
        decision = race.judge(run.summary("c0002"))
    assert (decision.action, decision.gain) == ("continue", None)
    assert "c0002/fold0/oof.npy" in caplog.text
    for fold in (1, 2):
        run.finish("c0002", fold, {"raw": run.model(7, -2.0)})
    assert race.judge(run.summary("c0002")).action == "complete"


def test_a_trial_in_its_middle_has_a_gain_of_its_own(run: RacedRun) -> None:
    race = opened(run)
    columns = {n: run.calibrated(run.model(s, 1.0), 1) for n, s in (("raw", 20), ("ema", 21))}
    found = race.gain_of(1, columns)
    q = reference_blend(run, 0, 1)[run.rows(1)]
    gains = {name: gain_by_definition(t, q) for name, t in columns.items()}
    better = max(gains, key=lambda name: gains[name][0])
    assert found is not None and found[0] == better
    assert (found[1].mean, found[1].se) == pytest.approx(gains[better], abs=CLOSE)


def test_who_is_stopped_in_mid_training_has_a_gain_before_and_after_a_resume(
    run: RacedRun,
) -> None:
    race = opened(run)
    stopped = run.finish("c0002", 0, {}).model_copy(update={"status": "stopped"})
    run.store.save_trial(stopped)
    decision = RaceDecision(
        number=0, candidate="c0002", fold=0, epoch=3, rule="epoch", action="stop", folds_done=0,
        rows=80, gain=-0.25, gain_se=0.01, complete=0, epochs_trained=0, reason="lags behind",
    )  # fmt: skip
    run.store.save_decision(race.numbered(decision))
    again = Race(run.store, GAIN)
    again.replay(run.store.summaries(True))
    for one in (race, again):
        assert one.gains()["c0002"] == -0.25
        assert one.gains().keys() == {"c0000", "c0001", "c0002"}


def test_replay_brings_the_same_state(run: RacedRun) -> None:
    race = opened(run)
    for number, skill in enumerate([1.5, -2.0, 1.6]):
        name = f"c{number + 2:04d}"
        race.trial_ended(run.finish(name, 0, {"raw": run.model(30 + number, skill)}))
        run.store.save_decision(race.judge(run.summary(name)))
    again = Race(run.store, GAIN)
    summaries = run.store.summaries(True)
    assert [s.status for s in summaries] == ["complete"] * 2 + ["running", "stopped", "running"]
    again.replay(summaries)
    assert again.open
    known = again.gains()
    for name in ("c0002", "c0004"):
        assert again.is_stale(name)  # judged by a session that is gone
        one, other = race.judge(run.summary(name)), again.judge(run.summary(name))
        assert other.gain == pytest.approx(one.gain, abs=CLOSE)
        changing = {"gain", "gain_se", "reason", "blend_logloss"}
        assert one.model_dump(exclude=changing) == other.model_dump(exclude=changing)
    assert known["c0003"] == run.summary("c0003").gain


def test_a_kill_between_record_and_decision_is_noticed(run: RacedRun) -> None:
    race = opened(run)
    run.finish("c0002", 0, {"raw": run.model(7, 2.0)})
    assert not is_decided(run.summary("c0002"))
    run.store.save_decision(race.judge(run.summary("c0002")))
    assert is_decided(run.summary("c0002"))
    run.finish("c0002", 1, {"raw": run.model(7, 2.0)})
    assert not is_decided(run.summary("c0002"))
    run.store.files.write("trials/c0001/fold2/decision.json", b'{"number": 3, "cand')
    assert run.summary("c0001").status == "complete" and not is_decided(run.summary("c0001"))
    again = Race(run.store, GAIN)
    again.replay(run.store.summaries(True))
    assert not again.open  # the torn one is still to be judged
    assert again.judge(run.summary("c0001")).action == "complete" and again.open


def test_columns_of_complete_candidates_are_kept_in_the_run_folder(run: RacedRun) -> None:
    complete(run, Race(run.store, GAIN), "c0000", seed=0)
    summary = run.summary("c0000")
    fitted = run.calibrated(run.model(100, 1.0), 0, 1, 2)
    run.store.files.delete("trials/c0000/fold1/oof.npy")  # it is not read again
    for _ in range(2):
        held = ColumnCache(run.store).read(summary)
        assert list(held.columns) == ["raw", "ema"] and held.complete
        assert held.columns["ema"] == pytest.approx(fitted, abs=1e-3)


@pytest.mark.parametrize("damage", ["torn", "of another trial", "of other variants", "no numbers"])
def test_kept_columns_that_do_not_fit_are_fitted_anew(run: RacedRun, damage: str) -> None:
    complete(run, Race(run.store, GAIN), "c0000", seed=0)
    name = "trials/c0000/race.safetensors"
    kept, summary = run.store.files.read(name), run.summary("c0000")
    if damage == "torn":
        run.store.files.write(name, kept[: len(kept) // 2])
    elif damage == "of another trial":
        run.finish("c0000", 1, {"raw": run.model(5, 1.0), "ema": run.model(6, 1.0)})
    elif damage == "of other variants":
        run.store.save_calibrated(summary, {"raw": np.full(240, 0.5, dtype=np.float32)})
    else:
        wrong = {v: np.full(240, np.nan, dtype=np.float32) for v in ("raw", "ema")}
        run.store.save_calibrated(summary, wrong)
    held = ColumnCache(run.store).read(run.summary("c0000"))
    again = run.model(6, 1.0) if damage == "of another trial" else run.model(100, 1.0)
    for fold in range(3):
        model = again if fold == 1 else run.model(100, 1.0)
        run.finish("c0001", fold, {"raw": run.model(0, 1.0), "ema": model})
    fresh = ColumnCache(run.store).read(run.summary("c0001"))
    assert np.array_equal(held.columns["ema"], fresh.columns["ema"])
    assert run.store.calibrated(run.summary("c0000")) is not None


def test_columns_are_kept_within_their_bound(run: RacedRun) -> None:
    """Newest first, and of the complete ones the best."""
    size = 80 * 4
    kept = ColumnCache(run.store, most_bytes=10 * size)
    for number, skill in enumerate([0.0, 2.0]):
        for fold in range(3):
            run.finish(f"c000{number}", fold, {"raw": run.model(number, skill)})
        kept.read(run.summary(f"c000{number}"))
    for number in range(2, 7):
        run.finish(f"c000{number}", 0, {"raw": run.model(number, 1.0)})
        kept.read(run.summary(f"c000{number}"))
        assert sum(columns.size for columns in kept.cached.values()) <= 10 * size
    assert set(kept.cached) == {"c0000", "c0001", "c0006"}
    run.finish("c0007", 0, {v: run.model(9, 1.0) for v in ("raw", "ema", "s1", "s2")})
    kept.read(run.summary("c0007"))
    assert set(kept.cached) == {"c0001", "c0007"}
