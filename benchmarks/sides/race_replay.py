"""Tune's part of a sweep on a simulated clock: slots that run recorded fold trials.

Takes a `RaceTable` and a `Player` that says what to run, gives what was trained when.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from race_table import Key, RaceTable


class Player(Protocol):
    """Who decides what is trained."""

    def suggest(self, trial_id: str) -> Key | None:
        """The recorded fold trial that begins now; None: none before another one ends."""

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
    complete: tuple[tuple[int, str], ...]
    """Candidates with all folds, and the epochs that had been trained by then."""

    def complete_at(self, epochs: float) -> frozenset[str]:
        """Candidates that were complete when so many epochs had been trained."""
        return frozenset(candidate for spent, candidate in self.complete if spent <= epochs)


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

    def start(self, key: Key, trial_id: str) -> None:
        self.flights[trial_id] = _Flight(key, self.table.seconds(key))
        self.started += 1
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
    state, epochs, asked = _Slots(table), 0, 0
    finished: Counter[str] = Counter()
    complete: list[tuple[int, str]] = []
    while True:
        while len(state.flights) < slots:
            trial_id, asked = f"t{asked:05d}", asked + 1
            key = player.suggest(trial_id)
            if key is None:
                break
            state.start(key, trial_id)
        if not state.flights:
            return Replay(epochs, state.started, state.clock, tuple(complete))
        trial_id, flight = state.next_epoch()
        epochs += 1
        stop = player.report(trial_id, flight.epochs)
        if state.goes_on(trial_id, stop):
            continue
        stopped = flight.epochs < len(flight.seconds)
        player.end(trial_id, stopped)
        finished[flight.key[0]] += not stopped and table.ended_well(flight.key)
        if not stopped and finished[flight.key[0]] == table.fold_count:
            complete.append((epochs, flight.key[0]))
