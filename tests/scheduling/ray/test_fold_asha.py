"""Rungs against brute force, and who is stopped at them."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from ray.tune.schedulers import TrialScheduler

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import RaceConfig
from foldrace.ensemble.running_blend import Gain
from foldrace.run_folder.records import CandidateRecord, CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ledger import FoldTask, Ledger
from foldrace.scheduling.race import Race
from foldrace.scheduling.ray.fold_asha import FoldASHA
from foldrace.scheduling.ray.fold_searcher import RunningFold
from foldrace.scheduling.ray.fold_trial import RUNG
from foldrace.scheduling.rungs import Rung, RungRecords, RungReport, fractions, losses_of, rungs_of

K = 3
STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE


def setting(grace: float = 0.25, reduction: int = 2, z: float = 1.0) -> RaceConfig:
    return RaceConfig(grace=grace, reduction=reduction, z=z)


def at(config: RaceConfig, **params: Any) -> list[tuple[float, int]]:
    return [(rung.fraction, rung.epoch) for rung in rungs_of(config, TrialParams(**params))]


@pytest.mark.parametrize(
    ("config", "epochs", "expected"),
    [
        (setting(), 30, [(0.25, 8), (0.5, 15)]),
        (setting(), 4, [(0.25, 1), (0.5, 2)]),
        (setting(), 3, [(0.25, 1), (0.5, 2)]),
        (setting(), 2, [(0.5, 1)]),  # half of the schedule, whatever else it serves
        (setting(), 1, []),
        (setting(0.1, 3), 30, [(0.1, 3), (0.3, 9), (0.9, 27)]),  # 0.1 * 30 and 0.3 * 30 round up
        (setting(0.1, 10), 30, [(0.1, 3)]),
        (setting(0.9), 5, []),  # the fifth is the last
    ],
)
def test_rungs(config: RaceConfig, epochs: int, expected: list[tuple[float, int]]) -> None:
    found = at(config, epochs=epochs)
    assert [epoch for _, epoch in found] == [epoch for _, epoch in expected]
    assert [f for f, _ in found] == pytest.approx([f for f, _ in expected])


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"cycles": 2}, [(0.5, 15)]),  # the end of the first cycle serves both fractions
        ({"cycles": 3}, [(0.25, 10), (0.5, 20)]),
        ({"cycles": 5}, [(0.25, 12), (0.5, 18)]),
        ({"freeze_epochs": 1}, [(0.5, 15)]),  # 8 < 1 + 8
        ({"freeze_epochs": 3, "unfreeze_epochs": 4}, [(0.5, 15)]),
        ({"freeze_epochs": 3, "unfreeze_epochs": 5}, []),
        ({"freeze_epochs": 2, "cycles": 3}, [(0.25, 10), (0.5, 20)]),
        ({"freeze_epochs": 3, "cycles": 3}, [(0.5, 20)]),
    ],
)
def test_grace_of_curves_that_cross(
    params: dict[str, int], expected: list[tuple[float, int]]
) -> None:
    assert at(setting(), epochs=30, **params) == expected


@given(
    st.floats(0.01, 0.99), st.integers(2, 5), st.integers(1, 60), st.integers(1, 6),
    st.integers(0, 9), st.integers(0, 9),
)  # fmt: skip
def test_rungs_by_brute_force(
    grace: float, reduction: int, epochs: int, cycles: int, freeze: int, unfreeze: int
) -> None:
    """Every epoch is asked which fractions it is the first one for."""
    config, cycles = setting(grace, reduction), min(cycles, epochs)
    lengths = [len(part) for part in np.array_split(np.arange(epochs), cycles)]
    params = {"cycles": cycles, "freeze_epochs": freeze, "unfreeze_epochs": unfreeze}
    found = at(config, epochs=epochs, **params)
    assert found == sorted(found, key=lambda rung: rung[1])
    assert len({epoch for _, epoch in found}) == len(found)
    frozen = freeze + unfreeze
    for fraction, epoch in found:
        assert fraction in fractions(config)
        assert fraction <= epoch / epochs + 1e-9 and 1 <= epoch < epochs
        assert not frozen or epoch - frozen >= grace * epochs - 1e-8
        later = [f for f in fractions(config) if fraction < f <= epoch / epochs]
        assert not later
        if cycles == 1:
            assert epoch == 1 or (epoch - 1) / epochs < fraction
        else:  # cycles differ by an epoch at most, whatever their order
            assert any(abs(epoch - i * epochs / cycles) < 1 for i in range(1, cycles))
            assert epoch - max(lengths) < fraction * epochs
    if not frozen and cycles == 1 and 1 < grace * epochs <= epochs - 1:
        assert found[0][0] == grace


@given(st.lists(st.tuples(st.integers(0, 9), st.floats(0, 5)), max_size=40), st.integers(2, 4))
def test_the_cut_by_brute_force(seen: list[tuple[int, float]], reduction: int) -> None:
    """Also where a trial comes again with another loss."""
    records, latest = RungRecords(), {}
    for number, loss in seen:
        latest[str(number)] = loss
        records.add(str(number), 0, [Rung(0.5, 1)], [loss])
    assert records.count(0, 0.5) == len(latest)
    cut = records.cut(0, 0.5, reduction)
    if len(latest) < reduction:
        assert cut is None
        return
    best = sorted(latest.values())[: len(latest) // reduction]
    assert cut == best[-1]


def test_a_record_is_the_least_loss_so_far() -> None:
    records = RungRecords()
    rungs = [Rung(0.25, 2), Rung(0.5, 4), Rung(0.75, 6)]
    records.add("a", 1, rungs, [0.9, 0.5, 0.7, 0.6, 0.1])
    assert [records.score("a", 1, f) for f in (0.25, 0.5)] == [0.5, 0.5]
    assert records.count(1, 0.75) == 0  # not reached
    assert records.count(0, 0.5) == 0  # another fold


def log_of(raw: Sequence[float], ema: Sequence[float] | None = None) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["epoch", "val_calibrated_logloss", "ema_val_calibrated_logloss"])
    pairs = zip(raw, ema or [math.nan] * len(raw), strict=True)
    writer.writerows([i, *pair] for i, pair in enumerate(pairs))
    return text.getvalue()


def test_the_better_variant_counts() -> None:
    assert losses_of(log_of([0.5, 0.4], [0.6, 0.1])) == [0.5, 0.1]
    assert losses_of(log_of([0.5, math.nan])) == [0.5, math.inf]
    columns = "val_calibrated_logloss,ema_val_calibrated_logloss"
    for damaged in ("a,b\n1,2\n", f"{columns}\n0.1\n", "val_calibrated_logloss\nx\n"):
        with pytest.raises(ValueError):
            losses_of(damaged)


class Given(Race):
    """A race whose gains are given; None: not open."""

    def __init__(self, gain: Gain | None) -> None:
        self.gain, self.asked = gain, 0

    def gain_of(
        self, fold: int, columns: Mapping[str, NDArray[np.floating]]
    ) -> tuple[str, Gain] | None:
        self.asked += 1
        return None if self.gain is None else ("raw", self.gain)


NO_GAIN, SOME_GAIN, IN_DOUBT = Gain(-0.02, 0.005, 10), Gain(0.001, 0.5, 10), Gain(-0.02, 0.03, 10)


@dataclass
class Sweep:
    """What FoldASHA asks of the searcher, and trials that report at their rungs."""

    store: RunStore
    race: Race
    config: RaceConfig = field(default_factory=setting)
    running_folds: dict[str, RunningFold] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=lambda: Ledger(K, 0))
    stops: list[RaceDecision] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.asha = FoldASHA(self.store, self.race, self.config, self)

    def request_stop(self, trial_id: str, decision: RaceDecision) -> None:
        assert self.running_folds[trial_id].task.candidate.candidate == decision.candidate
        self.stops.append(decision)

    def start(self, number: int, fold: int = 0, **params: int) -> str:
        record = candidate(number, **params)
        if record.candidate not in [s.candidate.candidate for s in self.ledger.summaries()]:
            self.ledger.add(record)
        self.ledger.start(FoldTask(record, fold))
        trial_id = f"{record.candidate}/{fold}"
        self.running_folds[trial_id] = RunningFold(FoldTask(record, fold))
        return trial_id

    def reach(self, trial_id: str, losses: Sequence[float], **extra: object) -> str:
        columns = {"raw": np.full(10, 0.5, dtype=np.float32)}
        report = RungReport(log_of(losses), columns)
        return self.hear(trial_id, {"epoch": len(losses) - 1, RUNG: report, **extra})

    def hear(self, trial_id: str, result: dict[str, Any]) -> str:
        trial: Any = SimpleNamespace(trial_id=trial_id)
        return self.asha.on_trial_result(None, trial, result)  # type: ignore[arg-type]

    def end(self, trial_id: str, status: str = "finished", log: str | None = None) -> None:
        task = self.running_folds.pop(trial_id).task
        record = ended(task, status, self.store.folds().hash)
        self.store.save_candidate(task.candidate)
        self.store.save_trial(record, log=log)
        self.ledger.end(record)


def candidate(number: int, **params: int) -> CandidateRecord:
    values = TrialParams(**{"epochs": 4, **params}).as_dict()  # type: ignore[arg-type]
    return CandidateRecord(candidate=f"c{number:04d}", backbone="timm/x", params=values)


def ended(task: FoldTask, status: str, folds_hash: str = "h") -> TrialRecord:
    return TrialRecord(
        candidate=task.candidate.candidate,
        fold=task.fold,
        status=status,  # type: ignore[arg-type]
        backbone="timm/x",
        params=task.candidate.params,
        folds_hash=folds_hash,
        seed=0,
    )


@pytest.fixture
def store(make_tiny_run: Any) -> RunStore:
    found: RunStore = make_tiny_run(k=K).store
    return found


def test_only_who_lags_behind_and_adds_nothing_is_stopped(store: RunStore) -> None:
    sweep = Sweep(store, Given(NO_GAIN))
    trials = [sweep.start(number) for number in range(4)]
    assert sweep.reach(trials[0], [0.9]) == CONTINUE  # alone
    assert sweep.reach(trials[1], [0.5]) == CONTINUE  # the best, without gain
    assert sweep.reach(trials[2], [0.7]) == STOP  # of three one is the best half
    assert sweep.reach(trials[3], [0.6]) == CONTINUE  # the second of four
    (decision,) = sweep.stops
    expected = {
        "candidate": "c0002", "fold": 0, "epoch": 1, "rule": "epoch", "action": "stop",
        "variant": "raw", "folds_done": 0, "rows": 10, "gain": -0.02, "gain_se": 0.005, "z": 1.0,
        "score": 0.7, "limit": 0.5,
    }  # fmt: skip
    assert {key: getattr(decision, key) for key in expected} == expected
    assert decision.line == (
        "c0002 stopped after epoch 1 of fold 0: gain -0.0200 ± 0.0050, and log loss 0.7000 is "
        "above 0.5000, the cut for the best 1/2 of 3 trials at 25% of their epochs"
    )
    assert store.train_log("c0002", 0) == log_of([0.7])
    assert store.train_log("c0001", 0) is None


@pytest.mark.parametrize("gain", [SOME_GAIN, IN_DOUBT])
def test_who_may_add_something_goes_on_from_the_bottom(store: RunStore, gain: Gain) -> None:
    sweep = Sweep(store, Given(gain))
    losses = [0.1, 0.2, 0.3, 9.9]
    assert {sweep.reach(sweep.start(i), [loss]) for i, loss in enumerate(losses)} == {CONTINUE}


def test_z_is_what_a_gain_in_doubt_may_lack(store: RunStore) -> None:
    sweep = Sweep(store, Given(IN_DOUBT), setting(z=0.5))
    assert [sweep.reach(sweep.start(i), [0.1 * i]) for i in range(2)] == [CONTINUE, STOP]


def test_nobody_is_stopped_before_the_race_is_open(store: RunStore) -> None:
    sweep = Sweep(store, Given(None))
    answers = {sweep.reach(sweep.start(i), [0.1 * (i + 1)]) for i in range(9)}
    assert answers == {CONTINUE} and not sweep.stops
    sweep.race.gain = NO_GAIN  # type: ignore[attr-defined]  # their records are there by now
    assert sweep.reach(sweep.start(9), [0.55]) == STOP
    assert sweep.stops[0].limit == pytest.approx(0.5)


def test_schedules_of_different_lengths_meet_at_the_same_fraction(store: RunStore) -> None:
    sweep = Sweep(store, Given(NO_GAIN))
    # At a quarter: 1 of 4, 5 of 20, 10 of 40 epochs.
    assert sweep.reach(sweep.start(0, epochs=4), [0.6]) == CONTINUE
    assert sweep.reach(sweep.start(1, epochs=20), [0.9, 0.8, 0.7, 0.6, 0.5]) == CONTINUE
    long = sweep.start(2, epochs=40)
    assert sweep.reach(long, [0.58] * 5) == CONTINUE  # the fifth of 40 is no rung
    assert sweep.reach(long, [0.58] * 10) == STOP
    assert (sweep.stops[0].epoch, sweep.stops[0].limit) == (10, 0.5)
    # At half of their schedules there is nobody yet.
    assert sweep.reach(sweep.start(3, epochs=4), [0.9, 0.9]) == CONTINUE


def test_folds_are_never_mixed(store: RunStore) -> None:
    sweep = Sweep(store, Given(NO_GAIN))
    for number in range(4):  # an easy fold
        sweep.reach(sweep.start(number, fold=1), [0.1])
    assert sweep.reach(sweep.start(9, fold=0), [0.9]) == CONTINUE
    assert sweep.reach(sweep.start(10, fold=1), [0.9]) == STOP


def test_later_folds_are_neither_stopped_nor_counted(store: RunStore) -> None:
    sweep = Sweep(store, Given(NO_GAIN))
    for number in range(4):
        sweep.reach(sweep.start(number, fold=1), [0.1])
    first = sweep.start(10, fold=0)
    assert sweep.reach(first, [0.5]) == CONTINUE
    together = sweep.start(10, fold=1)  # an early candidate has all its folds running
    assert sweep.reach(together, [9.9]) == CONTINUE
    assert sweep.reach(first, [0.5, 9.9]) == CONTINUE
    sweep.end(first)
    assert sweep.reach(together, [9.9, 9.9]) == CONTINUE
    assert sweep.reach(sweep.start(11, fold=1), [0.2]) == STOP
    assert sweep.stops[0].limit == 0.1 and "of 5 trials" in sweep.stops[0].reason


def test_a_report_that_comes_again_counts_once(store: RunStore) -> None:
    """The last one of an interrupted trial comes without columns, and Tune repeats a trial's last
    report when it has ended."""
    sweep = Sweep(store, Given(NO_GAIN))
    best, again = sweep.start(0), sweep.start(1)
    assert sweep.reach(best, [0.1]) == CONTINUE
    for _ in range(3):
        assert sweep.hear(again, {RUNG: RungReport(log_of([0.5]), {})}) == CONTINUE
        assert sweep.reach(again, [0.5], done=True) == CONTINUE
    assert sweep.hear(again, {"epoch": 2, "val_logloss": 0.5}) == CONTINUE  # no rung
    assert sweep.race.asked == 0  # type: ignore[attr-defined]
    assert sweep.reach(again, [0.5]) == STOP
    assert "of 2 trials" in sweep.stops[0].reason
    assert sweep.reach("gone", [0.5]) == CONTINUE


def test_what_an_interrupted_trial_missed_is_in_its_log(store: RunStore) -> None:
    """It went on in the middle: its rungs before that count all the same."""
    sweep = Sweep(store, Given(NO_GAIN))
    sweep.hear(sweep.start(0), {RUNG: RungReport(log_of([0.2, 0.3, 0.3]), {})})
    assert sweep.reach(sweep.start(1), [0.5]) == STOP
    assert sweep.stops[0].limit == 0.2


def test_the_logs_of_ended_trials_give_the_same_records(
    store: RunStore, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    sweep = Sweep(store, Given(SOME_GAIN))
    for number in range(30):
        epochs = int(rng.integers(1, 12))
        trial_id = sweep.start(number, epochs=epochs)
        losses = rng.uniform(0.1, 1.0, epochs).tolist()
        for rung in rungs_of(sweep.config, TrialParams(epochs=epochs)):
            sweep.reach(trial_id, losses[: rung.epoch])
        sweep.end(trial_id, "finished" if number % 3 else "stopped", log_of(losses))
    store.save_train_log("c0007", 0, "damaged\nlog\n")
    resumed = Sweep(store, Given(NO_GAIN))
    resumed.asha.replay(store.summaries(running=True))
    log = f"{store.root}/{store.trial_folder('c0007', 0)}/train_log.csv"
    assert [m for m in caplog.messages if m.startswith(f"{log} is ignored: ")]
    fresh, old = resumed.asha._records, sweep.asha._records
    for fraction in (0.25, 0.5):
        seen = {n: x for n, x in old._of_candidate[0, fraction].items() if n != "c0007"}
        assert fresh._of_candidate[0, fraction] == seen
        assert fresh._sorted[0, fraction] == sorted(seen.values())


@pytest.mark.slow
def test_ten_thousand_candidates_are_rebuilt_in_seconds(store: RunStore) -> None:
    losses = np.random.default_rng(0).uniform(0.1, 1.0, 30).tolist()
    log, root = log_of(losses, losses), Path(store.root)
    summaries = []
    for number in range(10_000):
        record = candidate(number, epochs=30)
        folder = root / "trials" / record.candidate / "fold0"
        folder.mkdir(parents=True)
        (folder / "train_log.csv").write_text(log)  # not through the store: no fsync
        trials = (ended(FoldTask(record, 0), "finished"),)
        summaries.append(CandidateSummary(record, "running", trials, K))
    sweep = Sweep(store, Given(SOME_GAIN))
    started = time.perf_counter()
    sweep.asha.replay(summaries)
    assert time.perf_counter() - started < 30
    assert sweep.asha._records.count(0, 0.5) == 10_000
