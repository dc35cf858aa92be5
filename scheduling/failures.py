"""Attempts at fold trials that failed: whose fault that is, and what becomes of the trial.

The surroundings (a lost node, a preemption, a full memory) are nobody's fault: the trial goes on
from its saved state, and as long as it gets further each time, for ever. An error of the trial's
own counts; after the last attempt the trial is held until another one has ended well, and then
fails its candidate. When the same error meets several candidates in a row, it is an outage: data
disk away, broken environment. The sweep pauses, looks again by one trial now and then, and none of
them is blamed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from foldrace.core.errors import message_line
from foldrace.run_folder.records import TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.spending import RunningFold
from foldrace.scheduling.state import FoldTask, SweepState

_CANDIDATES, _ATTEMPTS = 2, 3  # of one error in a row: an outage
_FIRST_LOOK, _LONGEST = 10.0, 300.0  # seconds between looks whether it is over
_NO_WORD = "its worker ended without a result"
_SURROUNDINGS = {
    "its node was lost": r"node has died|NodeDiedError|owner has died|node was preempted",
    # The first word of a node that is gone; of a process alone Ray says that it has died.
    "the connection to its node was lost": r"The actor is temporarily unavailable",
    "Ray's memory monitor ended it, since its node's memory was full": (
        r"NODE_OUT_OF_MEMORY|ray\.exceptions\.OutOfMemoryError|node running low on memory"
    ),
}
"""What Ray says when it is not the trial's fault."""


@dataclass
class Outage:
    """An error that is everybody's."""

    error: str
    since: float  # on the clock of `Failures`
    next_look: float
    pause: float = _FIRST_LOOK  # seconds
    look: str | None = None  # trial id of the one that looks whether it is over


@dataclass(frozen=True)
class Attempt:
    """What became of an attempt that failed."""

    line: str
    """For the terminal and the log."""
    failed: bool
    """True where the trial is not tried again, and its candidate is lost."""


class Failures:
    """The failed attempts of one session."""

    def __init__(
        self, store: RunStore, state: SweepState, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._state, self._clock = store, state, clock
        self._row: list[tuple[str, FoldTask]] = []  # (kind of error, trial) since one ended well
        self._forgiven: set[tuple[str, int]] = set()  # by an outage: it blames them no second time
        self.outage: Outage | None = None
        self._any_success = False

    # -- events

    def attempt(
        self,
        trial_id: str,
        running: RunningFold,
        record: TrialRecord | None,
        silent: bool,
        ray_says: str,
        alone: bool,
    ) -> Attempt:
        """Book a failed attempt, and clear away what it left.

        `silent`: it ended without a word and without a record, so that it never ran; `ray_says`:
        the text of Ray's error, or empty; `alone`: no other candidate is left to compare with.
        """
        task = running.task
        reason = message_line(record.error or "") if record else running.killed or ""
        self._looked_in_vain(trial_id)
        fault = _fault_of_surroundings(f"{ray_says}\n{record.error if record else ''}")
        if fault is not None or (silent and record is None):
            return self._blameless(running, fault or _NO_WORD)
        if self._is_outage(task, reason or _NO_WORD):
            self._release(task)
            return self._line(task, "waits", reason or _NO_WORD)
        if self._state.fail(task.candidate.candidate, task.fold):
            self._clear(task, anew=self._state.last_of_several(task.candidate.candidate, task.fold))
            return self._line(task, "is tried again", reason or _NO_WORD)
        key = task.candidate.candidate, task.fold
        if alone or key in self._forgiven or self._state[key[0]].hopeless:
            return self._line(task, "fails its candidate", reason or _NO_WORD, failed=True)
        self._state.hold(task.candidate.candidate, task.fold, record)
        self._clear(task)  # a session that ends here leaves it to the next one
        return self._line(task, "has failed its last attempt", reason or _NO_WORD)

    def trained(self, trial_id: str) -> None:
        """A trial has ended an epoch: where it was to look, the outage is over."""
        self._any_success = True
        if self.outage is not None and self.outage.look == trial_id:
            self.outage = None

    def ended_well(self) -> Iterator[tuple[FoldTask, TrialRecord | None]]:
        """A fold trial has ended as it should: the trials that were held fail their candidates."""
        self._any_success = True
        self._row.clear()
        yield from self.give_up()

    def give_up(self) -> Iterator[tuple[FoldTask, TrialRecord | None]]:
        """The trials that are held, which are no longer: each with the record it has."""
        for state in list(self._state):
            for fold, record in list(state.held.items()):
                yield FoldTask(state.record, fold), record

    # -- outages

    def may_start(self, trial_id: str) -> bool:
        """True where a trial may start: no outage, or it is time that one looks."""
        outage = self.outage
        if outage is None:
            return True
        if outage.look is not None or self._clock() < outage.next_look:
            return False
        outage.look = trial_id
        return True

    def did_not_start(self, trial_id: str) -> None:
        """Take back that this trial looks: there was none to start."""
        if self.outage is not None and self.outage.look == trial_id:
            self.outage.look = None

    @property
    def waiting(self) -> str | None:
        """Why nothing starts, for people; None where there is no outage."""
        if self.outage is None:
            return None
        seconds = max(0.0, self.outage.next_look - self._clock())
        when = "a trial looks whether it is over" if self.outage.look else f"{seconds:.0f} s"
        return (
            f"paused: several candidates in a row failed with the same error: {self.outage.error}; "
            f"nothing is counted against them; next try: {when}"
        )

    @property
    def outage_seconds(self) -> float:
        """Seconds since the outage began; 0 where there is none."""
        return 0.0 if self.outage is None else self._clock() - self.outage.since

    @property
    def never_worked(self) -> bool:
        """True in an outage before which nothing in this session has ended an epoch."""
        return self.outage is not None and not self._any_success

    def _is_outage(self, task: FoldTask, error: str) -> bool:
        """True where it is no fault of this trial; another outage may begin with it."""
        key = task.candidate.candidate, task.fold
        if self.outage is None and key in self._forgiven:
            return False
        if self.outage is not None:
            self._forgiven.add(key)
            return True
        now, kind = self._clock(), _kind(error)
        self._row = [*((k, t) for k, t in self._row if k == kind), (kind, task)]
        candidates = {t.candidate.candidate for _, t in self._row}
        if len(candidates) < _CANDIDATES or len(self._row) < _ATTEMPTS:
            return False
        self.outage = Outage(error, now, now + _FIRST_LOOK)
        for _, other in self._row:
            name, fold = other.candidate.candidate, other.fold
            self._forgiven.add((name, fold))
            self._state.forgive(name, fold)
            if fold in self._state[name].held:
                self._release(other)
        self._row.clear()
        return True

    def _looked_in_vain(self, trial_id: str) -> None:
        """Where this trial was to look whether the outage is over: it is not; wait longer."""
        outage = self.outage
        if outage is not None and outage.look == trial_id:
            outage.look, outage.pause = None, min(2 * outage.pause, _LONGEST)
            outage.next_look = self._clock() + outage.pause

    # -- what becomes of a trial

    def _blameless(self, running: RunningFold, fault: str) -> Attempt:
        task = running.task
        again = self._state.lose(task.candidate.candidate, task.fold, running.epoch)
        if again:
            self._clear(task)
            return self._line(task, "goes on later", fault)
        return self._line(task, "fails its candidate", f"{fault}, again and again", failed=True)

    def _release(self, task: FoldTask) -> None:
        self._state.release(task.candidate.candidate, task.fold)
        self._clear(task)

    def _clear(self, task: FoldTask, anew: bool = False) -> None:
        """Remove what the attempt left; `anew`: its saved state, too, in case that this is it."""
        candidate, fold = task.candidate.candidate, task.fold
        if anew:
            self._store.forget_resume_state(candidate, fold)
        self._store.clear_trial(candidate, fold)

    def _line(self, task: FoldTask, what: str, why: str, failed: bool = False) -> Attempt:
        return Attempt(f"{task.candidate.candidate} fold{task.fold} {what}: {why}", failed)


def _fault_of_surroundings(text: str) -> str | None:
    """What happened to the trial's surroundings, by Ray's own words; None where nothing did."""
    for fault, pattern in _SURROUNDINGS.items():
        if re.search(pattern, text):
            return fault
    return None


def _kind(error: str) -> str:
    """The error without what differs from trial to trial: paths, quoted names, numbers."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*|[0-9a-f]*\d[0-9a-f]*", "*", error)
