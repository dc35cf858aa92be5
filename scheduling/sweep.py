"""The sweep as a state machine that knows no Ray: it gives fold trials and takes how they end.

Takes a run folder, the study and the limits; books every event in the state, lets the race decide,
and tells the listeners. The outcome of a trial is what its `trial.json` says.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from foldrace.config.schema import SweepConfig
from foldrace.run_folder.records import CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import trial_record
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.failures import Failures
from foldrace.scheduling.race import Move, Race, is_decided
from foldrace.scheduling.room import Place, Room, Vacancy
from foldrace.scheduling.search.backbone_allocation import BackboneAllocation
from foldrace.scheduling.search.study import CandidateStudy
from foldrace.scheduling.spending import RunningFold, Spending
from foldrace.scheduling.state import CandidateState, FoldTask, SweepState
from foldrace.scheduling.unfinished_trials import stopped_trial, with_stopped_trial
from foldrace.scheduling.updates import UPDATE, ResultUpdates
from foldrace.trainables.spec import Pace

FINISHED: Literal["finished"] = "finished"
"""Given in place of a fold trial: nothing runs, and nothing will."""
_GB = 1e9
_log = logging.getLogger("foldrace")


class Sweep:
    """Gives fold trials until every candidate of the budget is settled or nothing promises more."""

    def __init__(
        self,
        store: RunStore,
        config: SweepConfig,
        study: CandidateStudy,
        room: Room,
        seconds_left: Callable[[], float | None] = lambda: None,
        updates: ResultUpdates | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin a sweep without candidates; `replay` takes in those of earlier sessions.

        `seconds_left()` until the deadline. `updates` None: the result is written at the end alone.
        """
        self._store, self._config, self._study = store, config, study
        self._room, self._seconds_left, self.updates = room, seconds_left, updates
        self.state = SweepState(
            store.fold_count, config.resources.max_failures, room.devices, store.folds().repeats
        )
        self.race = Race(store, config.race, self.state)
        self.failures = Failures(store, self.state, clock)
        search = config.search
        self._allocation = BackboneAllocation(
            search.backbones, search.candidates, search.min_share, search.seed
        )
        self.listeners: list[SweepListener] = [study, *([] if updates is None else [updates])]
        self.running: dict[str, RunningFold] = {}
        """Trial id -> the fold trial that runs."""
        self.update_place: Place | None = None
        """What the update of the result that runs has reserved."""
        self._blocked = False  # what comes next had no place when it was last asked for
        self.spending = Spending(config, self.state, self.running, room, seconds_left)
        self._sizes: dict[tuple[str, int], int] = {}  # bytes of saved states, by the decision
        self._nothing_to_ask = False
        self._refused = False
        self.stopped = False
        """True once the sweep is to end: nothing more is given out or booked."""

    # -- what runs

    def suggest(self, trial_id: str) -> FoldTask | Literal["finished", "update"] | None:
        """The next fold trial; None while the slots are full or nothing can start yet."""
        if self.stopped:
            return FINISHED
        vacancy = self._room.vacancy(self._places())
        if vacancy.is_full:
            return None
        if self.updates is not None and self._is_due(self.updates):
            self.update_place = vacancy.take(None)
            if self.update_place is not None:
                self.updates.start(trial_id)
                return UPDATE
        if not self.failures.may_start(trial_id):
            return None
        start = self._next_task(vacancy)
        self._blocked = start is None and vacancy.waiting
        if start is None:
            self.failures.did_not_start(trial_id)
            if self.running or vacancy.waiting:
                return None
            if any(state.held for state in self.state):
                self._fail_held(self.failures.give_up())
                return self.suggest(trial_id)
            self._give_up()
            return FINISHED
        task, place = start
        state = self.state[task.candidate.candidate]
        latest = state.latest
        before = latest.seconds if latest is not None and latest.epoch is not None else 0.0
        judged = self.race.is_judged_at_rungs(state)
        self.running[trial_id] = RunningFold(task, judged, place, before)
        self.state.start(task)
        return task

    def epoch_ended(
        self, trial_id: str, epochs: int, val_logloss: float, pace: Pace | None = None
    ) -> None:
        """Note that a running trial has trained so many epochs, the last of them at this pace."""
        running = self.running.get(trial_id)
        if running is None:
            return
        if running.epoch == 0 and epochs > 1:
            task = running.task
            _log.info(
                "%s fold%d goes on from epoch %d", task.candidate.candidate, task.fold, epochs
            )
        running.epoch, running.val_logloss, running.pace = epochs, val_logloss, pace
        running.last_sign = time.monotonic()
        self.failures.trained(trial_id)

    def rung_reached(self, trial_id: str, epoch: int) -> bool:
        """Judge a running trial after so many epochs; True where it is to leave now.

        Its state, its log and its columns are in the run folder by then. The decision is booked
        when the trial has ended, unless it has finished by then.
        """
        running = self.running.get(trial_id)
        if running is None or not running.judged or running.park is not None:
            return False
        task = running.task
        more = self.has_more_candidates and not self._refused
        running.park = self.race.reach(task.candidate.candidate, task.fold, epoch, more)
        if running.park is None:
            return False
        self.state.expect_stop(task.candidate.candidate, task.fold)
        return True

    def trial_over(self, trial_id: str, silent: bool = False, ray_says: str = "") -> None:
        """Book the outcome of a trial that runs no more.

        `silent`: it ended without a word; without a record it never ran, and is not to blame.
        `ray_says`: the text of Ray's error, or empty.
        """
        if self.updates is not None and trial_id == self.updates.running:
            if not self.stopped and self.updates.end():
                self._tell("result_written")
            return
        running = self.running.pop(trial_id, None)
        if running is None or self.stopped:
            return
        candidate, fold = running.task.candidate.candidate, running.task.fold
        state = self.state[candidate]
        record = self._store.trial(candidate, fold)
        if record is not None and record.status != "failed":
            self._fail_held(self.failures.ended_well())
            self._end(record)
        elif running.park is not None:
            self._fail_held(self.failures.ended_well())
            self._park(running)
        elif state.stopped:
            self._store.forget_trial(candidate, fold)
            self.state.release(candidate, fold)
            self._settle(state)
        else:
            others = (s for s in self.state if s is not state)
            alone = not self.has_more_candidates and all(s.settled for s in others)
            attempt = self.failures.attempt(trial_id, running, record, silent, ray_says, alone)
            _log.warning("%s", attempt.line)
            self._tell("noticed", attempt.line)
            if attempt.failed:
                self._end(self._failed(running.task, record))

    def replay(self, summaries: Sequence[CandidateSummary]) -> None:
        """Take in the candidates of earlier sessions, and tell the listeners, in the same order.

        A candidate whose last decision a kill has prevented is judged now, and a stopped trial
        without its record gets it.
        """
        whole = [with_stopped_trial(self._store, summary) for summary in summaries]
        for summary in whole:
            self.state.add(summary.candidate)
            self._tell("candidate_started", summary.candidate)
        for event in _in_order(whole):
            name = event.candidate
            if isinstance(event, TrialRecord):
                self.state.end(event)
                self._tell("trial_ended", event, self.state[name].summary)
            else:
                self.state.decide(event)
                self._tell("decided", event, self.state[name].summary)
        self.race.replay()
        for state in self.state:
            if not state.hopeless and not is_decided(state.summary):
                self._decide(self.race.judge(state.name))
        for state in self.state:
            self._settle(state)

    @property
    def updating(self) -> str | None:
        """Trial id of the update of the result that runs, or None."""
        return None if self.updates is None else self.updates.running

    @property
    def waits_for_room(self) -> bool:
        """True while nothing runs, since there is no place for what comes next."""
        return self._blocked and not self._places()

    @property
    def has_more_candidates(self) -> bool:
        """True while there are further candidates to ask for."""
        return not self._nothing_to_ask and self.spending.has_candidates

    @property
    def limit(self) -> str | None:
        """The limit of the budget that lets nothing more start, or None."""
        if not self.state.trials_open and not self.has_more_candidates:
            return None
        return self.spending.exhausted_limit

    # -- the next fold trial

    def _is_due(self, updates: ResultUpdates) -> bool:
        """True where the result so far is to be written now; at the end it is written anyway."""
        goes_on = self.has_more_candidates or self.state.trials_open > 0
        return goes_on and updates.is_due(self._seconds_left())

    def _places(self) -> list[Place]:
        """What is reserved by all that runs."""
        places = [running.place for running in self.running.values()]
        if self.updating is not None and self.update_place is not None:
            places.append(self.update_place)
        return places

    def _next_task(self, vacancy: Vacancy) -> tuple[FoldTask, Place] | None:
        for decision in list(self.race.verdicts()):
            self._decide(decision)
            self._settle(self.state[decision.candidate])
        start = self._first_admitted(vacancy)
        if start is None and self.spending.has_deadline:
            # What the deadline ends goes on with `resume`, and time that is left is lost.
            start = self._first_admitted(vacancy, any_time=True)
        return start

    def _first_admitted(
        self, vacancy: Vacancy, any_time: bool = False
    ) -> tuple[FoldTask, Place] | None:
        """The first of the race's moves that the budget admits and that has a place.

        See `Spending.admits`.
        """
        self._refused = False
        for move in self.race.moves(more=self.has_more_candidates):
            if move.state is None:
                start = self._new_candidate(vacancy, any_time)
            else:
                start = self._accepted(move, move.state, vacancy, any_time)
            if start is not None:
                return start
        return None

    def _accepted(
        self, move: Move, state: CandidateState, vacancy: Vacancy, any_time: bool
    ) -> tuple[FoldTask, Place] | None:
        """The move's fold trial, if the budget lets its candidate become complete."""
        fold = state.waiting[0]
        if not self.spending.admits(state, any_time):
            self._refused = True
            return None
        place = vacancy.take(state.record.backbone)
        if place is None:
            return None
        decision = self.race.accept(move)
        if decision is not None:
            self._decide(decision)
        return FoldTask(state.record, fold), place

    def _new_candidate(self, vacancy: Vacancy, any_time: bool) -> tuple[FoldTask, Place] | None:
        number, state = self.state.next_number, self.state
        backbone, place = self._next_backbone(vacancy, any_time)
        if place is None:
            return None
        record = self._study.ask(number, backbone)
        if record is None:
            self._nothing_to_ask = True
            return None
        if record.backbone != backbone:  # there is nothing left of that one
            place = vacancy.take(record.backbone)
            if place is None:
                return None
        self._store.save_candidate(record)
        added = state.add(record)
        self._tell("candidate_started", record)
        first = self.race.grant_first(added)
        if first is not None:
            self._decide(first)
        return FoldTask(record, 0), place

    def _next_backbone(self, vacancy: Vacancy, any_time: bool) -> tuple[str, Place | None]:
        """The backbone of the next candidate, and a place; None where there is none.

        While it waits for a GPU, others may have those that it has no use for.
        """
        number, state = self.state.next_number, self.state
        given, costs = self._study.upcoming, self.spending.fold_costs()
        chosen = given or self._allocation.choose(number, state.started, state.gains(), costs)
        others = (b for b in self._config.search.backbones if b != chosen and given is None)
        for backbone in (chosen, *others):
            if not self.spending.admits_candidate(backbone, any_time):
                self._refused = True
                break
            may_start = backbone == chosen or self._allocation.may_go_first(backbone, state.started)
            place = vacancy.take(backbone) if may_start else None
            if place is not None:
                return backbone, place
        return chosen, None

    # -- how trials end

    def _end(self, record: TrialRecord) -> None:
        """Book a fold trial that is not tried again, and let the race judge its candidate."""
        candidate = record.candidate
        self.state.end(record)
        state = self.state[candidate]
        self.race.fold_ended(candidate)
        self._tell("trial_ended", record, state.summary)
        if not state.hopeless:
            self._decide(self.race.judge(candidate, record.fold))
        self._settle(state)

    def _park(self, running: RunningFold) -> None:
        """Book that a trial has left at a rung; its saved state stays."""
        decision, task = running.park, running.task
        assert decision is not None
        seconds = max(decision.seconds, running.before)
        self.state.release(task.candidate.candidate, task.fold)
        self._decide(decision.model_copy(update={"seconds": seconds}))
        self._bound_parked_states()

    def _bound_parked_states(self) -> None:
        """Stop the least promising parked candidates while their states take too much room."""
        sizes = {s.name: self._state_bytes(s) for s in self.state if s.parked_epoch is not None}
        room, limit = sum(sizes.values()), self._config.race.parked_gb * _GB
        if room <= limit:
            return
        for state in self.race.parked():
            room -= sizes[state.name]
            self._stop_for_good(state, f"parked states take over {limit / _GB:g} GB")
            if room <= limit:
                return

    def _state_bytes(self, state: CandidateState) -> int:
        """Size of a parked trial's saved state, which is asked for once: it may lie far away."""
        latest = state.latest
        assert latest is not None
        key = state.name, latest.number
        if key not in self._sizes:
            self._sizes[key] = self._store.resume_state_bytes(state.name, latest.fold)
        return self._sizes[key]

    def _give_up(self) -> None:
        """At the sweep's own end, stop whatever still waits: no gain of it is plausible.

        Not where a limit has ended it, which `resume` may lift.
        """
        if self._refused:
            return
        for state in self.state:
            if not state.settled:
                self._stop_for_good(state, "nothing promises a gain any more")

    def _stop_for_good(self, state: CandidateState, reason: str) -> None:
        decision = self.race.give_up(state, reason)
        if decision.epoch is None:
            self._decide(decision)
        else:
            # The decision first: a kill in between must not leave a stop without its reason.
            self._store.save_decision(decision)
            record = stopped_trial(
                self._store, state.record, decision, decision.seconds, time.time()
            )
            self._store.save_trial(record)
            self.state.end(record)
            self._tell("trial_ended", record, state.summary)
            self._decide(decision)
        self._settle(state)

    def _fail_held(self, held: Iterator[tuple[FoldTask, TrialRecord | None]]) -> None:
        for task, record in held:
            self._end(self._failed(task, record))

    def _failed(self, task: FoldTask, record: TrialRecord | None) -> TrialRecord:
        """The record of a fold trial that fails its candidate, which a lost one has not written."""
        if record is None or not record.error:
            error = (
                "the worker process ended without a result: killed, out of memory, or its node was "
                "lost"
            )
            record = trial_record(
                self._store, task.candidate, task.fold, "failed", error=error, ended_at=time.time()
            )
        self._store.save_trial(record)
        return record

    # -- telling

    def _decide(self, decision: RaceDecision) -> None:
        self._store.save_decision(decision)
        _log.info("%s", decision.line)
        self.state.decide(decision)
        self._tell("decided", decision, self.state[decision.candidate].summary)

    def _settle(self, state: CandidateState) -> None:
        """Tell of a candidate that gets no further fold, once."""
        if not state.settled or state.told_settled:
            return
        state.told_settled = True
        self._store.forget_resume_states(state.name)
        self._tell("settled", state.summary)

    def _tell(self, event: str, *what: object) -> None:
        for listener in self.listeners:
            getattr(listener, event)(*what)


def _in_order(summaries: Sequence[CandidateSummary]) -> list[TrialRecord | RaceDecision]:
    """Stored trials and decisions as they happened: each trial before the decision about it.

    Trials that nobody decided about (failed, diverged) come last.
    """
    trials = {(t.candidate, t.fold): t for s in summaries for t in s.trials}
    events: list[TrialRecord | RaceDecision] = []
    decisions = (d for s in summaries for d in s.decisions)
    for decision in sorted(decisions, key=lambda d: d.number):
        trial = trials.pop((decision.candidate, decision.fold), None)
        events += [decision] if trial is None else [trial, decision]
    return events + list(trials.values())
