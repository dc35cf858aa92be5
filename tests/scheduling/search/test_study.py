"""Which candidate comes next, and what the sampler sees of those that there are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from foldrace.config.hyperparameters import TrialParams
from foldrace.run_folder.records import CandidateRecord, CandidateSummary, RaceDecision
from foldrace.scheduling.search.sampler_history import SamplerHistory
from foldrace.scheduling.search.samplers import SAMPLERS
from foldrace.scheduling.search.study import CandidateStudy
from tests.conftest import examples
from tests.scheduling.search.searches import BACKBONES, FEW, ended, running, space_of, sweep

A, B = BACKBONES


def make(gains: Mapping[str, float] | None = None, **search: object) -> CandidateStudy:
    config = sweep(**search)
    return CandidateStudy(space_of(config), config.search, 10, None, lambda: gains or {})


def asked(study: CandidateStudy, number: int, backbone: str | None = None) -> CandidateRecord:
    record = study.ask(number, backbone)
    assert record is not None
    return record


def test_the_first_candidate_of_each_backbone_is_its_default() -> None:
    study, space = make(), space_of(sweep())
    for number, backbone in enumerate(BACKBONES):
        record = asked(study, number, B)
        assert record.candidate == f"c000{number}"
        assert record.backbone == backbone
        assert record.params == space.default(backbone).as_dict()
    assert asked(study, 2, A).params != space.default(A).as_dict()


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "list"])
def test_the_sampler_gets_the_backbone_that_is_asked_for(sampler: str) -> None:
    study = make(sampler=sampler, per_backbone={B: {"lr": {"low": 1e-6, "high": 1e-5}}})
    for number in range(4):
        asked(study, number)
    for number, backbone in enumerate([A, B, B, A, A], start=4):
        assert asked(study, number, backbone).backbone == backbone


def test_without_a_backbone_all_get_their_turn() -> None:
    study = make(sampler="random")
    assert {asked(study, number).backbone for number in range(2, 12)} == set(BACKBONES)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("list", "gp")])
@pytest.mark.parametrize("objective", ["logloss", "gain"])
def test_a_resumed_search_suggests_what_the_undisturbed_one_would(
    sampler: str, objective: str
) -> None:
    """Whatever the order in which the candidates ended."""
    gains: dict[str, float] = {}
    keys = {"sampler": sampler, "objective": objective}
    whole, told = make(gains, **keys), []
    for number in range(15):
        record = asked(whole, number, BACKBONES[number % 2])
        status = ["complete", "stopped", "complete", "diverged", "failed"][number % 5]
        told.append(ended(record, status, (0.1 * number, 0.2)[: 1 + (status == "complete")]))
        gains[record.candidate] = math.sin(number)
        if number % 4:
            whole.tell(told[-1])
    left = [summary for number, summary in enumerate(told) if not number % 4]
    resumed = make(gains, **keys)
    for summary in random.Random(0).sample(told, len(told)):
        still_running = summary in left
        resumed.replay(ended(summary.candidate, "running") if still_running else summary)
    assert running(resumed) == running(whole) == len(left)
    assert resumed.ask(15, A) == whole.ask(15, A)
    for study in (whole, resumed):
        for summary in left:
            study.tell(summary)
    assert resumed.ask(16, B) == whole.ask(16, B)
    assert running(resumed) == 2


def test_points_come_first_and_each_once() -> None:
    points = [
        {"backbone": B, "params": {"lr": 0.5, "batch_size": 48}},  # outside the range; not searched
        {"backbone": A},
        {"backbone": B, "params": {"lr": 0.001, "dropout": 0.3}},
    ]
    study, space = make(points=points), space_of(sweep())
    first = asked(study, 0, A)
    assert (first.backbone, first.params["lr"], first.params["batch_size"]) == (B, 0.5, 48)
    assert first.params["dropout"] == space.default(B).dropout
    again = make(points=points)  # resumed after the first one
    again.replay(ended(first, "complete", (0.4, 0.5)))
    for one in (study, again):
        assert asked(one, 1).params == space.default(A).as_dict()
        third = asked(one, 2)
        assert (third.backbone, third.params["lr"], third.params["dropout"]) == (B, 0.001, 0.3)
        assert asked(one, 3, B).params["batch_size"] == 32  # the sampler's own
    assert running(again) == 3 and running(study) == 3  # the first one has no place in the space


def test_a_list_is_its_points_alone() -> None:
    points = [{"backbone": B, "params": {"lr": 0.001}}, {"backbone": B, "params": {"lr": 0.002}}]
    study = make(sampler="list", points=points)
    assert [asked(study, n, A).params["lr"] for n in range(2)] == [0.001, 0.002]
    assert study.ask(2, A) is None
    assert study.ask(2) is None


def test_a_grid_is_every_combination_once() -> None:
    space = FEW | {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "epochs": {"choices": [3, 9]}}
    study = make(sampler="grid", space=space)
    found = [asked(study, number, A) for number in range(20)]
    assert study.ask(20, A) is None and study.ask(20, B) is None
    expected = itertools.product(BACKBONES, (1e-4, 10**-3.5, 1e-3, 10**-2.5, 1e-2), (3, 9))
    combinations = sorted((r.backbone, r.params["lr"], r.params["epochs"]) for r in found)
    for ours, theirs in zip(combinations, sorted(expected), strict=True):
        assert ours[0] == theirs[0] and ours[1:] == pytest.approx(theirs[1:])
    # The backbone that is asked for, as long as it has any.
    assert [r.backbone for r in found] == [A] * 10 + [B] * 10


@pytest.mark.parametrize("sampler", ["tpe", "random", "gp"])
def test_no_configuration_is_asked_for_twice(sampler: str) -> None:
    """And where all are taken, nothing is left, however they ended."""
    space = FEW | {
        "lr": 0.001,
        "epochs": {"choices": [3, 5, 9]},
        "batch_size": {"choices": [8, 16]},
    }
    study = make(sampler=sampler, space=space)
    seen = set()
    for number in range(12):
        record = asked(study, number, A)
        seen.add((record.backbone, record.params["epochs"], record.params["batch_size"]))
        if number % 3:
            status = ["complete", "failed"][number % 2]
            study.tell(ended(record, status, (0.5, 0.5)))
    assert len(seen) == 12
    assert study.ask(12, A) is None
    assert running(study) == 4


def test_refused_asks_teach_the_sampler_nothing() -> None:
    """A study that has asked in vain sees what one that has not sees."""
    space = FEW | {"lr": 0.001, "epochs": {"choices": [3, 5, 9]}}
    study, other = make(space=space), make(space=space)
    for number in range(6):
        record = asked(study, number, A)
        other.replay(ended(record, "running"))
    assert study.ask(6) is None
    assert running(study) == running(other) == 6


class History:
    """A `SamplerHistory` of one searched knob, and candidates c0000, c0001 ... as they are told."""

    def __init__(self, sampler: str = "tpe", gains: Mapping[str, float] | None = None) -> None:
        self.space = space_of(sweep(space=FEW))
        live = None if gains is None else (lambda: gains)
        self.history = SamplerHistory(self.space, SAMPLERS[sampler], 10, live)

    def record(self, number: int, backbone: str = A) -> CandidateRecord:
        params = self.space.configured(backbone, {"lr": 1e-4 + number * 1e-7})
        return CandidateRecord(
            candidate=f"c{number:04d}", backbone=backbone, params=params.as_dict()
        )

    def start(self, number: int, backbone: str = A) -> None:
        record = self.record(number, backbone)
        self.history.start(record.candidate, backbone, TrialParams.from_dict(record.params))

    def end(self, number: int, status: str, *losses: float, backbone: str = A) -> None:
        self.history.end(self.summary(number, status, *losses, backbone=backbone))

    def summary(
        self, number: int, status: str, *losses: float, backbone: str = A
    ) -> CandidateSummary:
        return ended(self.record(number, backbone), status, losses, folds=3)

    def seen(self, backbone: str = A) -> dict[int, object]:
        """Candidate's number -> value, (folds, value) of a pruned one, or `running`."""
        found: dict[int, object] = {}
        for trial in self.history.trials(backbone):
            value: object = trial.value
            if trial.state == TrialState.PRUNED:
                value = next(iter(trial.intermediate_values.items()), None)
            running = trial.state == TrialState.RUNNING
            found[trial.number - 1] = "running" if running else value
        return found


def test_what_the_sampler_sees_of_each_end() -> None:
    history = History()
    for number in range(7):
        history.start(number)
    history.end(0, "complete", 0.4, 0.8, 0.2)
    history.end(1, "stopped", 0.4, 0.8)
    history.end(2, "stopped")
    history.end(3, "diverged", 0.4)
    history.end(4, "failed", 0.4)
    assert history.seen() == {
        0: pytest.approx((10 * 0.4 + 30 * 0.8 + 90 * 0.2) / 130),  # pooled over rows
        1: (2, pytest.approx((10 * 0.4 + 30 * 0.8) / 40)),
        3: (0, 2 * math.log(10)),  # worse than anything that was stopped
        5: "running",
        6: "running",
    }


def test_tpe_learns_where_training_diverges_also_where_nearly_all_others_are_stopped() -> None:
    study, space = make(space=FEW), space_of(sweep(space=FEW))
    for number in range(60):
        lr = 1e-4 * 50 ** (number / 59)
        record = CandidateRecord(
            candidate=f"c{number:04d}",
            backbone=A,
            params=space.configured(A, {"lr": lr}).as_dict(),
        )
        status = "diverged" if lr > 1e-3 else "complete" if number == 12 else "stopped"
        losses = {"diverged": (), "stopped": (0.5,), "complete": (0.4, 0.4)}[status]
        study.replay(ended(record, status, losses))
    study.replay(ended(asked(study, 60, B), "failed"))  # its default
    drawn = [float(asked(study, number, A).params["lr"]) for number in range(61, 81)]
    assert sum(lr > 1.2e-3 for lr in drawn) <= 3


def test_of_a_first_fold_stopped_in_mid_training_its_score_is_seen() -> None:
    history = History()
    decision = RaceDecision(
        number=0, candidate="c0000", fold=0, epoch=4, rule="epoch", action="stop", folds_done=0,
        rows=10, score=1.5, complete=5, epochs_trained=9, reason="",
    )  # fmt: skip
    history.history.end(ended(history.record(0), "stopped", decisions=[decision]))
    assert history.seen() == {0: (0, 1.5)}


@pytest.mark.parametrize("sampler", ["cmaes", "gp"])
def test_a_sampler_that_knows_no_pruning_sees_what_the_folds_gave(sampler: str) -> None:
    history = History(sampler)
    history.end(0, "stopped", 0.4, 0.8)
    assert history.seen() == {0: pytest.approx(0.7)}


def test_with_the_gain_as_objective_values_follow_the_blend() -> None:
    gains = {"c0000": 0.02, "c0001": -0.01, "c0002": 0.5}
    history = History(gains=gains)
    history.end(0, "complete", 0.4, 0.8, 0.2)
    history.end(1, "stopped", 0.3)
    history.end(2, "diverged", 0.3)
    history.end(3, "complete", 0.1, 0.1, 0.1)  # its gain is not known yet
    penalty = 2 * math.log(10)
    assert history.seen() == {0: -0.02, 1: (1, 0.01), 2: (0, penalty)}
    gains |= {"c0000": -0.03, "c0003": 0.04}
    assert history.seen() == {0: 0.03, 1: (1, 0.01), 2: (0, penalty), 3: -0.04}


def test_a_backbone_learns_from_all_until_it_has_enough_of_its_own() -> None:
    history = History()
    for number in range(9):
        history.end(number, "complete", 0.5, backbone=B)
    history.start(20)
    history.start(21, B)
    history.end(9, "complete", 0.5)
    assert history.seen(B).keys() == history.seen(A).keys() == {*range(10), 20, 21}
    history.end(10, "stopped", 0.5, backbone=B)
    assert history.seen(B).keys() == {*range(9), 10, 21}
    assert history.seen(A).keys() == {*range(11), 20, 21}


def test_of_many_the_best_and_the_newest_are_seen() -> None:
    most = SAMPLERS["tpe"].most_trials
    count, history = most + 300, History()
    losses = {n: random.Random(n).random() for n in range(count)}
    for number in random.Random(0).sample(range(count), count):
        stopped = number % 3 == 0
        history.end(number, "stopped" if stopped else "complete", losses[number])
    seen = history.seen()
    assert len(seen) == most
    assert list(seen) == sorted(seen)
    newest = set(range(count - most // 2, count))
    assert newest < seen.keys()
    # A stopped one is never better than a complete one.
    others = sorted(
        (n for n in range(count) if n not in newest), key=lambda n: (n % 3 == 0, losses[n])
    )
    assert seen.keys() - newest == set(others[: most - most // 2])


def test_what_lies_outside_a_changed_space_is_not_seen_and_not_run_again() -> None:
    old = make(space={"lr": {"low": 1e-4, "high": 2e-4}}, sampler="random")
    records = [asked(old, number, A) for number in range(4)]
    changed = make(space={"lr": {"low": 0.01, "high": 0.1, "log": True}})
    for record in records:
        changed.replay(ended(record, "running"))
    assert running(changed) == 0
    assert asked(changed, 4, B).params != space_of(sweep()).default(B).as_dict()


@settings(deadline=None, max_examples=examples(30))
@given(
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["ask", "end", "resume"])), max_size=40)
)
def test_no_candidate_is_left_running_whatever_happens(events: list[tuple[int, str]]) -> None:
    """Candidates that end in any way and order, over any number of sessions."""
    statuses = ["complete", "stopped", "diverged", "failed", "complete"]
    study, live, done = make(), list[CandidateRecord](), list[CandidateSummary]()
    number = 0
    for choice, event in events:
        if event == "ask":
            live.append(asked(study, number, BACKBONES[choice % 2]))
            number += 1
        elif event == "end" and live:
            done.append(ended(live.pop(choice % len(live)), statuses[choice], (0.3, 0.5)))
            study.tell(done[-1])
        elif event == "resume":
            study = make()
            for summary in [*done, *(ended(r, "running") for r in live)]:
                study.replay(summary)
        assert running(study) == len(live)
    for record in live:
        study.tell(ended(record, "stopped", (0.3,)))
    assert running(study) == 0
