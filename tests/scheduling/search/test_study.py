"""Which candidate comes next, and what the sampler sees of those that there are."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from foldrace.run_folder.records import CandidateRecord, CandidateSummary
from foldrace.scheduling.search.sampler_history import SamplerHistory
from foldrace.scheduling.search.samplers import SAMPLERS
from foldrace.scheduling.search.study import CandidateStudy
from tests.conftest import examples
from tests.scheduling.search.searches import (
    BACKBONES,
    FEW,
    decision,
    ended,
    running,
    space_of,
    sweep,
    tell,
)

pytestmark = pytest.mark.usefixtures("nothing_recorded")

A, B = BACKBONES


def make(**search: object) -> CandidateStudy:
    config = sweep(**search)
    return CandidateStudy(space_of(config), config.search, 10)


def asked(study: CandidateStudy, number: int, backbone: str | None = None) -> CandidateRecord:
    """Ask, and start what is given."""
    record = study.ask(number, backbone)
    assert record is not None
    study.candidate_started(record)
    return record


def test_the_first_candidate_of_each_backbone_is_its_default() -> None:
    study, space = make(), space_of(sweep())
    for number, backbone in enumerate(BACKBONES):
        record = asked(study, number, B)
        assert record.candidate == f"c000{number}"
        assert record.backbone == backbone
        assert record.params == space.default(backbone).as_dict()
    assert asked(study, 2, A).params != space.default(A).as_dict()


def test_the_backbone_of_what_comes_before_the_sampler_is_known() -> None:
    study, number = make(), 0
    while study.upcoming is not None:
        upcoming = study.upcoming
        assert asked(study, number, A if upcoming == B else B).backbone == upcoming
        number += 1
    assert number >= len(BACKBONES)
    assert [asked(study, number + i, b).backbone for i, b in enumerate(BACKBONES)] == [A, B]


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


def course(record: CandidateRecord, kind: int, objective: str) -> list[CandidateSummary]:
    """One candidate's summaries, event by event, of a life of its own."""
    number = int(record.candidate[1:])
    gain = math.sin(number) if objective == "gain" else None
    loss = 0.1 * number
    park = decision(record, fold=0, epoch=3, action="continue", score=1.0 + loss)
    after = decision(record, fold=0, action="continue", gain=gain)
    stop = decision(record, fold=1, action="stop", gain=gain)
    parked = ended(record, "running", decisions=[park])
    one = ended(record, "running", (loss,), decisions=[after])
    ends = [
        ended(record, "complete", (loss, 0.2), decisions=[after]),
        ended(record, "stopped", (loss, 0.2), folds=3, decisions=[after, stop]),
        ended(record, "diverged", (loss,), decisions=[after]),
        ended(record, "failed", (loss,), decisions=[after]),
    ]
    lives = [[parked, one, ends[0]], [one, ends[1]], [ends[2]], [parked, one, ends[3]]]
    return [*lives, [parked], [one], [parked, one]][kind]


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in ("list", "gp")])
@pytest.mark.parametrize("objective", ["logloss", "gain"])
@settings(deadline=None, max_examples=examples(6))
@given(
    kinds=st.lists(st.integers(0, 6), min_size=16, max_size=22),
    order=st.randoms(use_true_random=False),
)
def test_a_resumed_search_suggests_what_the_undisturbed_one_would(
    sampler: str, objective: str, kinds: list[int], order: random.Random
) -> None:
    """Whatever happens to the candidates meanwhile, and in whatever order each is told."""
    keys = {"sampler": sampler, "objective": objective}
    whole = make(**keys)
    told: dict[str, list[CandidateSummary]] = {}
    left: list[list[CandidateSummary]] = []
    records = []
    for number, kind in enumerate(kinds):
        record = asked(whole, number, BACKBONES[number % 2])
        records.append(record)
        left.append(list(reversed(course(record, kind, objective))))
        while left and order.random() < 0.7:  # the next event of one that runs
            events = order.choice(left)
            summary = events.pop()
            told.setdefault(summary.candidate.candidate, []).append(summary)
            tell(whole, summary)
            left = [events for events in left if events]
    once, again = make(**keys), make(**keys)
    for record in order.sample(records, len(records)):  # the last word alone, as from a run folder
        once.candidate_started(record)
        for summary in told.get(record.candidate, [])[-1:]:
            tell(once, summary)
    for record in records:  # every event, all candidates first
        again.candidate_started(record)
    queues = [list(reversed(events)) for events in told.values()]
    while queues:
        tell(again, order.choice(queues).pop())
        queues = [events for events in queues if events]
    number = len(records)
    expected = whole.ask(number, A), whole.ask(number + 1, B)
    for study in (once, again):
        assert (study.ask(number, A), study.ask(number + 1, B)) == expected
        assert running(study) == running(whole)


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
    again.candidate_started(first)
    tell(again, ended(first, "complete", (0.4, 0.5)))
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
            tell(study, ended(record, status, (0.5, 0.5)))
    assert len(seen) == 12
    assert study.ask(12, A) is None
    assert running(study) == 4


def test_asking_changes_nothing() -> None:
    """A study that has asked in vain, or twice, gives what one that has not gives."""
    space = FEW | {"lr": 0.001, "epochs": {"choices": [3, 5, 9]}}
    study, other = make(space=space), make(space=space)
    for number in range(6):
        assert study.ask(number, A) == study.ask(number, A) == other.ask(number, A)
        other.candidate_started(asked(study, number, A))
    assert study.ask(6) is None
    assert running(study) == running(other) == 6


class History:
    """A `SamplerHistory` of one searched knob, and candidates c0000, c0001 ... as they are told."""

    def __init__(self, sampler: str = "tpe", by_gain: bool = False) -> None:
        self.space = space_of(sweep(space=FEW | {"epochs": 20}))
        self.history = SamplerHistory(self.space, SAMPLERS[sampler], 10, by_gain)

    def record(self, number: int, backbone: str = A) -> CandidateRecord:
        params = self.space.configured(backbone, {"lr": 1e-4 + number * 1e-7})
        return CandidateRecord(
            candidate=f"c{number:04d}", backbone=backbone, params=params.as_dict()
        )

    def start(self, number: int, backbone: str = A) -> None:
        self.history.start(self.record(number, backbone))

    def end(self, number: int, status: str, *losses: float, backbone: str = A) -> None:
        self.start(number, backbone)
        record = self.record(number, backbone)
        self.history.update(ended(record, status, losses, folds=3))

    def at(self, number: int, epoch: int, score: float, status: str = "running") -> None:
        """A candidate with a score in mid-training."""
        self.start(number)
        record = self.record(number)
        judged = decision(record, fold=0, epoch=epoch, score=score)
        self.history.update(ended(record, status, decisions=[judged]))

    def gained(self, number: int, status: str, gain: float | None, *losses: float) -> None:
        self.start(number)
        record = self.record(number)
        judged = decision(record, fold=len(losses) - 1, gain=gain)
        self.history.update(ended(record, status, losses, folds=3, decisions=[judged]))

    def seen(self, backbone: str = A) -> dict[int, object]:
        """Candidate's number -> value, (step, value) of a pruned one, or `running`."""
        found: dict[int, object] = {}
        for trial in self.history.trials(backbone):
            value: object = trial.value
            if trial.state == TrialState.PRUNED:
                value = next(iter(trial.intermediate_values.items()), None)
            number = round((float(trial.params["lr"]) - 1e-4) / 1e-7)
            found[number] = "running" if trial.state == TrialState.RUNNING else value
        return found


def test_what_the_sampler_sees_of_each_end() -> None:
    history = History()
    for number in range(5, 7):
        history.start(number)
    history.end(0, "complete", 0.4, 0.8, 0.2)
    history.end(1, "stopped", 0.4, 0.8)
    history.end(2, "stopped")
    history.end(3, "diverged", 0.4)
    history.end(4, "failed", 0.4)
    assert history.seen() == {
        0: pytest.approx((10 * 0.4 + 30 * 0.8 + 90 * 0.2) / 130),  # pooled over rows
        1: (200, pytest.approx((10 * 0.4 + 30 * 0.8) / 40)),
        3: (0, 2 * math.log(10)),  # worse than anything that was stopped
        5: "running",
        6: "running",
    }


def test_what_a_candidate_has_come_to_is_seen_before_it_ends() -> None:
    history = History()
    history.at(0, epoch=4, score=1.5)  # parked, or still going on
    history.at(1, epoch=19, score=0.9, status="stopped")
    history.at(2, epoch=0, score=3.0)
    assert history.seen() == {0: (20, 1.5), 1: (95, 0.9), 2: (1, 3.0)}
    history.end(0, "running", 0.7)
    assert history.seen()[0] == (100, pytest.approx(0.7))
    history.end(0, "running", 0.7, 0.5)
    assert history.seen()[0] == (200, pytest.approx(0.55))
    history.end(0, "complete", 0.7, 0.5, 0.5)
    assert history.seen()[0] == pytest.approx((10 * 0.7 + 30 * 0.5 + 90 * 0.5) / 130)


def learnt_rates(tell_of: Callable[[CandidateRecord, float], CandidateSummary]) -> list[float]:
    """Learning rates that TPE proposes after 60 candidates from 1e-4 to 5e-3, with their ends."""
    study, space = make(space=FEW), space_of(sweep(space=FEW))
    for number in range(60):
        lr = 1e-4 * 50 ** (number / 59)
        params = space.configured(A, {"lr": lr}).as_dict()
        record = CandidateRecord(candidate=f"c{number:04d}", backbone=A, params=params)
        study.candidate_started(record)
        tell(study, tell_of(record, lr))
    tell(study, ended(asked(study, 60, B), "failed"))  # its default
    return [float(asked(study, number, A).params["lr"]) for number in range(61, 81)]


def test_tpe_learns_where_training_diverges_also_where_nearly_all_others_are_stopped() -> None:
    def end(record: CandidateRecord, lr: float) -> CandidateSummary:
        if lr > 1e-3:
            return ended(record, "diverged")
        if record.candidate == "c0012":
            return ended(record, "complete", (0.4, 0.4))
        return ended(record, "stopped", (0.5,))

    assert sum(lr > 1.2e-3 for lr in learnt_rates(end)) <= 3


@pytest.mark.parametrize("best", [2e-4, 3e-3])
def test_tpe_keeps_off_where_parked_candidates_were_bad(best: float) -> None:
    def parked(record: CandidateRecord, lr: float) -> CandidateSummary:
        score = 0.5 + abs(math.log10(lr / best))
        return ended(record, "running", decisions=[decision(record, 0, epoch=3, score=score)])

    assert sum((lr < 1e-3) == (best < 1e-3) for lr in learnt_rates(parked)) >= 17


def test_a_parked_candidate_that_went_further_counts_more() -> None:
    """Late scores are lower than early ones: they do not compare as they are."""

    def parked(record: CandidateRecord, lr: float) -> CandidateSummary:
        epoch, score = (16, 1.0) if lr < 1e-3 else (2, 0.9)
        return ended(record, "running", decisions=[decision(record, 0, epoch=epoch, score=score)])

    assert sum(lr < 1e-3 for lr in learnt_rates(parked)) >= 17


def test_a_sampler_that_knows_no_pruning_sees_what_the_folds_gave() -> None:
    history = History("gp")
    history.end(0, "stopped", 0.4, 0.8)
    history.end(1, "diverged")
    history.at(2, epoch=4, score=1.5)
    history.start(3)
    expected = {0: pytest.approx(0.7), 1: 2 * math.log(10), 2: 1.5, 3: "running"}
    assert history.seen() == expected


def test_with_the_gain_as_objective_the_value_is_that_of_the_last_decision() -> None:
    history = History(by_gain=True)
    history.gained(0, "complete", 0.02, 0.4, 0.8, 0.2)
    history.gained(1, "stopped", -0.01, 0.3)
    history.gained(2, "diverged", 0.5, 0.3)
    history.gained(3, "complete", None, 0.1, 0.1, 0.1)  # the race could not say
    history.gained(4, "running", None, 0.1)
    assert history.seen() == {
        0: -0.02, 1: (100, 0.01), 2: (0, 2 * math.log(10)), 4: "running",
    }  # fmt: skip


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
        changed.candidate_started(record)
        tell(changed, ended(record, "running", (0.3,)))
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
            tell(study, done[-1])
        elif event == "resume":
            study = make()
            for summary in [*done, *(ended(r, "running") for r in live)]:
                study.candidate_started(summary.candidate)
                tell(study, summary)
        assert running(study) == len(live)
    for record in live:
        tell(study, ended(record, "stopped", (0.3,)))
    assert running(study) == 0
