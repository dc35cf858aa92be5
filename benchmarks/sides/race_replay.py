"""Tune's part of a sweep on a simulated clock: slots that run recorded fold trials.

Takes a `RaceTable` and a `Player` that says what to run, gives what was trained when.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from race_table import Key, RaceTable


@dataclass(frozen=True)
class Start:
    """A recorded fold trial that begins now, or goes on."""

    key: Key
    epochs: int = 0
    """Epochs that it had trained when it was parked."""


class Player(Protocol):
    """Who decides what is trained."""

    def suggest(self, trial_id: str) -> Start | None:
        """What begins now; None: nothing before another trial ends."""

    def report(self, trial_id: str, epochs: int) -> bool:
        """After each epoch, with how many were trained. Whether to stop the trial."""

    def end(self, trial_id: str, stopped: bool) -> None:
        """A trial has ended, by itself or stopped."""


@dataclass(frozen=True)
class Replay:
    """What a player had trained."""

    epochs: int
    """Trained until it ended by itself."""
    fits: int
    """Fold trials that were begun."""
    seconds: float
    """Of the simulated clock."""
    complete: tuple[tuple[int, float, str], ...]
    """Candidates with all folds, with the epochs and the slots' seconds trained by then."""
    busy: float
    """Seconds of all slots together that were trained."""

    def complete_at(self, epochs: float) -> frozenset[str]:
        """Candidates that were complete when so many epochs had been trained."""
        return frozenset(candidate for spent, _, candidate in self.complete if spent <= epochs)

    def complete_by(self, seconds: float) -> frozenset[str]:
        """Candidates that were complete when so many seconds of slots had been trained."""
        return frozenset(candidate for _, spent, candidate in self.complete if spent <= seconds)


@dataclass
class _Flight:
    key: Key
    seconds: list[float]
    """Of each epoch."""
    epochs: int = 0


@dataclass
class _Slots:
    """The clock, and what runs."""

    table: RaceTable
    flights: dict[str, _Flight] = field(default_factory=dict)
    events: list[tuple[float, int, str]] = field(default_factory=list)
    """When the next epoch of a trial ends; ties in the order in which they were foreseen."""
    clock: float = 0.0
    started: int = 0
    foreseen: int = 0

    def start(self, begins: Start, trial_id: str) -> None:
        seconds = self.table.seconds(begins.key)
        self.flights[trial_id] = _Flight(begins.key, seconds, begins.epochs)
        self.started += begins.epochs == 0
        self._foresee(trial_id)

    def next_epoch(self) -> tuple[str, _Flight]:
        self.clock, _, trial_id = heapq.heappop(self.events)
        flight = self.flights[trial_id]
        flight.epochs += 1
        return trial_id, flight

    def goes_on(self, trial_id: str, stop: bool) -> bool:
        """Whether the trial has another epoch; else its slot is free."""
        flight = self.flights[trial_id]
        if stop or flight.epochs == len(flight.seconds):
            del self.flights[trial_id]
            return False
        self._foresee(trial_id)
        return True

    def _foresee(self, trial_id: str) -> None:
        flight = self.flights[trial_id]
        self.foreseen += 1
        ends = self.clock + flight.seconds[flight.epochs]
        heapq.heappush(self.events, (ends, self.foreseen, trial_id))


def play(table: RaceTable, player: Player, slots: int) -> Replay:
    """Until the player has nothing more to run."""
    state, epochs, busy, asked = _Slots(table), 0, 0.0, 0
    finished: Counter[str] = Counter()
    complete: list[tuple[int, float, str]] = []
    while True:
        while len(state.flights) < slots:
            trial_id, asked = f"t{asked:05d}", asked + 1
            begins = player.suggest(trial_id)
            if begins is None:
                break
            state.start(begins, trial_id)
        if not state.flights:
            return Replay(epochs, state.started, state.clock, tuple(complete), busy)
        trial_id, flight = state.next_epoch()
        epochs, busy = epochs + 1, busy + flight.seconds[flight.epochs - 1]
        stop = player.report(trial_id, flight.epochs)
        if state.goes_on(trial_id, stop):
            continue
        stopped = flight.epochs < len(flight.seconds)
        player.end(trial_id, stopped)
        finished[flight.key[0]] += not stopped and table.ended_well(flight.key)
        if not stopped and finished[flight.key[0]] == table.fold_count:
            complete.append((epochs, busy, flight.key[0]))
