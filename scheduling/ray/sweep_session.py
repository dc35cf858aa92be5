"""One session of a sweep in this process: it connects the parts, writes tables, shows progress.

Takes the store, the config and the cluster; gives the searcher and the scheduler for Tune, tables
and `Progress`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from foldrace.config.schema import SweepConfig
from foldrace.core.errors import RunFailure
from foldrace.core.files import at_once
from foldrace.run_folder.claims import HeldClaim
from foldrace.run_folder.progress import Progress, RunningNow, RunningTrial
from foldrace.run_folder.records import CandidateSummary, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import Deadline
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.progress import SessionEvents, sweep_progress
from foldrace.scheduling.ray.cluster import Cluster
from foldrace.scheduling.ray.ending import Ending
from foldrace.scheduling.ray.tune_adapter import RungScheduler, SweepSearcher, TuneTrial
from foldrace.scheduling.ray.watchdog import Watchdog
from foldrace.scheduling.search.export import open_exporter
from foldrace.scheduling.search.study import open_study
from foldrace.scheduling.sweep import Sweep
from foldrace.scheduling.updates import ResultUpdates
from foldrace.search_spaces.space import SearchSpace

_TABLES_EVERY = 10.0  # seconds at least between writes of the tables
_WRITING = 0.02  # part of the time that writing them may take: it grows with the candidates
_PROGRESS_EVERY = 0.5  # seconds
_FORCED_AFTER = 10.0  # seconds for the orderly end of a sweep whose cluster is dead
_log = logging.getLogger("foldrace")


class SweepSession(SweepListener):
    """A sweep from what the run folder holds to the end of the budget or an interrupt."""

    def __init__(
        self,
        store: RunStore,
        config: SweepConfig,
        space: SearchSpace,
        cluster: Cluster,
        on_progress: Callable[[Progress], None],
        ending: Ending,
        claim: HeldClaim | None = None,
        deadline: Deadline | None = None,
        updates: ResultUpdates | None = None,
    ) -> None:
        """Read the run folder; a candidate whose last decision a kill has prevented is judged."""
        self._started = time.monotonic()
        self._store, self._config, self._cluster = store, config, cluster
        self._on_progress, self._deadline, self._updates = on_progress, deadline, updates
        self._ending, self._claim = ending, claim
        self._events = SessionEvents()
        self._shown = self._written = 0.0
        self._tables_every = _TABLES_EVERY
        self._notes: list[str] = []
        self._watchdog = Watchdog(config.resources)
        self._no_room_since: float | None = None
        self._is_paused = False
        self.failure: str | None = None
        """What ends the sweep before its end, for people; or None."""
        study = open_study(store, config, space)
        self.sweep = Sweep(store, config, study, cluster.room, self._seconds_left, updates)
        self._exporter = open_exporter(store, config, space)
        if self._exporter is not None:
            self.sweep.listeners.append(self._exporter)
        self.sweep.replay(store.summaries(running=True))
        self.sweep.listeners += [self._events, self]  # what is new alone is shown
        self.searcher = SweepSearcher(self.sweep, store)
        self.scheduler = RungScheduler(self.sweep)

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Nothing for Tune's state file: `resume` rebuilds everything from the run folder."""
        return object, ()

    @property
    def over(self) -> bool:
        """True where the running trials are to be ended."""
        left = self._seconds_left()
        if self.searcher.import_error is not None or self.failure is not None:
            return True
        return self._ending.interrupted or (left is not None and left <= 0)

    @property
    def limit(self) -> str | None:
        """The limit of the budget that lets nothing more start, or None."""
        return self.sweep.limit

    def on_step(self, trials: list[TuneTrial]) -> None:
        """Follow Tune, at each of its steps, by its list of trials."""
        self._look_for_room()
        self._tell_of_pauses()
        if self.failure is None:
            self.failure = self._failure()
            if self.failure is not None:
                _log.error("%s", self.failure)
                # At once: what follows asks a Ray that may be dead.
                self.noticed(f"{self.failure}; go on with: foldrace resume {self._store.root}")
                self._ending.force_within(_FORCED_AFTER, RunFailure.exit_code, self.failure)
        if self.over:  # first: trials that we end ourselves are not lost
            self.sweep.stopped = True
        self.searcher.watch(trials)
        for line in self._watchdog.look(self.sweep.running, trials):
            self.noticed(line)
        if self._updates is not None:
            for line in self._watchdog.look_at_update(self._updates, trials):
                self.noticed(line)
        now = time.monotonic()
        if now - self._shown > _PROGRESS_EVERY:
            self._shown = now
            self._on_progress(self.progress())
        if now - self._written > self._tables_every:
            self._write_tables()

    def progress(self) -> Progress:
        """The sweep at this moment, for the terminal."""
        return sweep_progress(
            self.sweep.state.summaries(),
            self._config.search,
            self._config.resources,
            folds=self.sweep.state.folds,
            usage=self.sweep.spending.usage,
            slots=self._cluster.room.slots(),
            devices=self._cluster.room.devices(),
            elapsed_s=time.monotonic() - self._started,
            running=tuple(self._running()),
            events=self._events.events,
            submission=None if self._updates is None else self._updates.submission,
            notes=tuple(self._notes),
            waiting=self._waiting(),
        )

    def close(self) -> list[CandidateSummary]:
        """Write the tables and the study as the run folder has them, with nothing `running`."""
        summaries = self._store.summaries()
        self._store.forget_running()
        self._store.write_tables(summaries)
        if self._exporter is not None:
            self._exporter.close()
        return summaries

    def trial_ended(self, record: TrialRecord, summary: CandidateSummary) -> None:
        """Log the trial and its warnings, show the progress."""
        best = record.best
        score = f"log loss {record.variants[best].calibrated_logloss:.4f}" if best else record.error
        _log.info("%s fold%d %s: %s", record.candidate, record.fold, record.status, score or "")
        for note in record.notes:
            if note not in self._notes:
                _log.warning("%s", note)
                self.noticed(note)
        self._on_progress(self.progress())

    def noticed(self, line: str) -> None:
        """Show it on the terminal."""
        self._notes.append(line)

    def settled(self, summary: CandidateSummary) -> None:
        """Log the candidate's end."""
        loss = f"{summary.pooled_calibrated(summary.best):.4f}" if summary.best else "none"
        _log.info("%s %s: OOF log loss %s", summary.candidate.candidate, summary.status, loss)

    def _failure(self) -> str | None:
        """What makes it useless to go on; None while all is well, or may be well again."""
        if self._claim is not None and self._claim.lost:
            return (
                "another process has taken over the run folder, since this one was cut off from it"
            )
        failures, limit = self.sweep.failures, self._config.resources.node_timeout
        if failures.never_worked or failures.outage_seconds > limit:
            assert failures.outage is not None
            return (
                "every fold trial fails with the same error, which is counted against none of "
                f"them: {failures.outage.error}"
            )
        if self._no_room_since is not None and time.monotonic() - self._no_room_since > limit:
            return f"the cluster has had no room for a fold trial for {limit:g} s"
        return self._cluster.death

    def _look_for_room(self) -> None:
        """Tell when the cluster's last node goes, and when one is back."""
        has_room = self._cluster.room.slots() > 0 and not self.sweep.waits_for_room
        if not has_room and self._no_room_since is None:
            self._no_room_since = time.monotonic()
            self.noticed("no node of the cluster has room for a fold trial any more; waiting")
        elif has_room and self._no_room_since is not None:
            waited = time.monotonic() - self._no_room_since
            self._no_room_since = None
            self.noticed(f"the cluster has room again, after {waited:.0f} s")

    def _tell_of_pauses(self) -> None:
        waiting = self._waiting()
        if waiting is not None and not self._is_paused:
            for listener in self.sweep.listeners:
                listener.paused(waiting)
        self._is_paused = waiting is not None

    def _waiting(self) -> str | None:
        """Why nothing can start, for people."""
        if self._no_room_since is None:
            return self.sweep.failures.waiting
        waited = time.monotonic() - self._no_room_since
        return f"no node of the cluster has room for a fold trial, for {waited:.0f} s now"

    def _seconds_left(self) -> float | None:
        if self._deadline is None:
            return None
        measured = None if self._updates is None else self._updates.cost
        return self._deadline.seconds_left(time.monotonic(), measured)

    def _write_tables(self) -> None:
        began = time.monotonic()
        try:
            with at_once(self._store.files):
                self._store.write_tables(self.sweep.state.summaries())
                self._store.save_running(self._snapshot())
        except OSError as error:  # they can be made again at any time
            self._once(f"the tables cannot be written, the sweep goes on: {error}")
        self._written = time.monotonic()
        self._tables_every = max(_TABLES_EVERY, (self._written - began) / _WRITING)

    def _running(self) -> Iterator[RunningTrial]:
        now = time.monotonic()
        for running in list(self.sweep.running.values()):
            candidate, pace = running.task.candidate, running.pace
            yield RunningTrial(
                candidate.candidate,
                candidate.backbone,
                running.task.fold,
                running.epoch,
                int(candidate.params["epochs"]),
                running.val_logloss,
                None if pace is None else pace.images_per_second,
                None if pace is None else pace.waiting,
                now - running.last_sign,
            )

    def _snapshot(self) -> RunningNow:
        """What runs, for `status`."""
        return RunningNow(at=time.time(), trials=tuple(self._running()), waiting=self._waiting())

    def _once(self, line: str) -> None:
        if line not in self._notes:
            _log.warning("%s", line)
            self.noticed(line)
