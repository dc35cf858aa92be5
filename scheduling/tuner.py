"""The sweep on Ray Tune: from a run folder to settled candidates.

Takes the store and a connected cluster, gives a `SweepOutcome`. Holds what is particular to Tune:
resources, the callback that looks at every step, stopping.
"""

from __future__ import annotations

import logging
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from experiment.config import ResourcesConfig, SweepConfig
from experiment.progress import Progress, RunningTrial
from experiment.records import CandidateSummary, TrialRecord
from experiment.store import RunStore
from scheduling.budget import Budget, devices_of_a_trial
from scheduling.cluster import Cluster
from scheduling.device_group import NO_DEVICE
from scheduling.fold_asha import FoldASHA
from scheduling.fold_searcher import FoldSearcher, TuneTrial
from scheduling.fold_trial import TrialJob, trainable
from scheduling.ledger import Ledger
from scheduling.race import Race
from scheduling.shares import Shares
from scheduling.study import CandidateStudy
from search_spaces.sampling import SearchSpace

# Tune reads these when it is imported or started: no loggers of its own beside our run folder, its
# own Ctrl-C handling off, and its state file written rarely, since `resume` does not read it.
os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "100000")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")

from ray import tune
from ray.tune.stopper import Stopper

_TABLES_EVERY = 10.0  # seconds at least between writes of the tables
_WRITING = 0.02  # part of the time that writing them may take: it grows with the candidates
_PROGRESS_EVERY = 0.5  # seconds
_log = logging.getLogger("foldrace")


@dataclass(frozen=True)
class SweepOutcome:
    """How a sweep ended."""

    summaries: tuple[CandidateSummary, ...]
    seconds: float
    slots: int
    interrupted: bool
    out_of_time: bool


class _Stop(Stopper):
    """Ends the sweep: Ctrl-C, SIGTERM, or the time budget."""

    def __init__(self, budget: float | None) -> None:
        self._deadline = None if budget is None else time.monotonic() + budget
        self.interrupted = False

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    @property
    def out_of_time(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def stop_all(self) -> bool:
        return self.interrupted or self.out_of_time


class _EachStep(tune.Callback):
    """Called by Tune about ten times a second."""

    def __init__(self, look: Callable[[list[TuneTrial]], None]) -> None:
        self._look = look

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._look(trials)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._look(trials)


class _Sweep:
    """One session of a sweep, in this process."""

    def __init__(
        self,
        store: RunStore,
        config: SweepConfig,
        space: SearchSpace,
        cluster: Cluster,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._store, self._config, self._cluster = store, config, cluster
        self._on_progress = on_progress
        self._ledger = _ledger(store, config)
        race = Race(store, config.race)
        search = config.search
        self._study = CandidateStudy(
            space, search, len(store.classes()), search.storage or _journal(store), race.gains
        )
        self.searcher = FoldSearcher(
            store,
            self._study,
            self._ledger,
            race,
            Budget(search, config.resources),
            Shares(space.backbones, search.candidates, search.min_share, search.seed),
            cluster.slots,
            self._trial_ended,
            self._candidate_settled,
            devices=devices_of_a_trial(config.resources, cluster.gpus_per_trial),
        )
        summaries = store.summaries(running=True)
        self.searcher.replay(summaries)
        self.scheduler = None
        if config.race.stops_epochs:
            self.scheduler = FoldASHA(store, race, config.race, self.searcher)
            self.scheduler.replay(summaries)
        self.stop = _Stop(config.resources.time_budget)
        self._started = time.monotonic()
        self._told = self._written = 0.0
        self._tables_every = _TABLES_EVERY
        self._ended_here: list[float] = []  # seconds of the trials of this session
        self._notes: dict[str, None] = {}  # of these trials, each text once

    def __reduce__(self) -> tuple[type[object], tuple[()]]:
        """Tune pickles its parts into a state file that nobody reads: a session with its terminal
        and its study has nothing to say there."""
        return object, ()

    def look(self, trials: list[TuneTrial]) -> None:
        if self.stop.stop_all():  # first: trials that we end ourselves are not lost
            self.searcher.stopped = True
        self.searcher.watch(trials)
        now = time.monotonic()
        if now - self._told > _PROGRESS_EVERY:
            self._told = now
            self._on_progress(self.progress())
        if now - self._written > self._tables_every:
            self.write_tables()

    def write_tables(self) -> None:
        began = time.monotonic()
        self._store.write_tables(self._ledger.summaries())
        self._written = time.monotonic()
        self._tables_every = max(_TABLES_EVERY, (self._written - began) / _WRITING)

    def summaries(self) -> list[CandidateSummary]:
        return self._ledger.summaries()

    def progress(self) -> Progress:
        summaries = self._ledger.summaries()
        new = max(0, self._config.search.candidates - len(summaries))
        left = self._ledger.trials_open + new * self._ledger.folds
        done = self._ledger.trials_ended
        return Progress(
            trials_done=done,
            trials_total=done + left,
            running=tuple(self._running()),
            finished=tuple(s for s in summaries if s.trials),
            failed=self._ledger.trials_lost,
            elapsed_s=time.monotonic() - self._started,
            eta_s=self._eta(left),
            best_logloss=self._ledger.best_loss,
            notes=tuple(self._notes),
        )

    def _running(self) -> Iterator[RunningTrial]:
        for flight in list(self.searcher.flights.values()):
            candidate = flight.task.candidate
            yield RunningTrial(
                candidate.candidate,
                candidate.backbone,
                flight.task.fold,
                flight.epoch,
                int(candidate.params["epochs"]),
                flight.val_logloss,
            )

    def _eta(self, left: int) -> float | None:
        if not self._ended_here:
            return None
        mean = sum(self._ended_here) / len(self._ended_here)
        return left * mean / max(1, self._cluster.slots())

    def _trial_ended(self, record: TrialRecord) -> None:
        self._ended_here.append(record.seconds)
        best = record.best
        score = f"log loss {record.variants[best].val_logloss:.4f}" if best else record.error
        _log.info("%s fold%d %s: %s", record.candidate, record.fold, record.status, score or "")
        for note in record.notes:
            if note not in self._notes:
                self._notes[note] = None
                _log.warning("%s", note)
        self._on_progress(self.progress())

    def _candidate_settled(self, summary: CandidateSummary) -> None:
        loss = f"{summary.pooled_logloss(summary.best):.4f}" if summary.best else "none"
        _log.info("%s %s: OOF log loss %s", summary.candidate.candidate, summary.status, loss)


def run_sweep(
    store: RunStore,
    config: SweepConfig,
    space: SearchSpace,
    image_root: str,
    cluster: Cluster,
    on_progress: Callable[[Progress], None],
) -> SweepOutcome:
    """Run every fold trial that the budget allows and the run folder does not hold yet."""
    started = time.monotonic()
    sweep = _Sweep(store, config, space, cluster, on_progress)
    job = TrialJob(
        run=store.root,
        image_root=image_root,
        training=config.training,
        transforms=config.augment.transforms,
        seed=config.search.seed,
        session=uuid4().hex,
        cpus=config.resources.cpus_per_trial,
        use_gpu=cluster.gpus_per_trial > 0,
        devices=config.resources.devices_per_trial,
        race=config.race if config.race.stops_epochs else None,
    )
    # Tune starts one actor at a time unless told that so many may be pending.
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(1, cluster.slots()))
    with tempfile.TemporaryDirectory(prefix="foldrace-tune-") as scratch, _signals(sweep.stop):
        tuner = tune.Tuner(
            tune.with_resources(trainable(job), _resources(config.resources, cluster)),
            tune_config=tune.TuneConfig(
                search_alg=sweep.searcher,
                scheduler=sweep.scheduler,
                num_samples=-1,
                reuse_actors=True,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=scratch,
                stop=sweep.stop,
                callbacks=[_EachStep(sweep.look)],
                verbose=0,
            ),
        )
        tuner.fit()
    on_progress(sweep.progress())
    summaries = store.summaries()
    store.write_tables(summaries)  # nothing is `running` any more
    return SweepOutcome(
        tuple(summaries),
        time.monotonic() - started,
        cluster.slots(),
        sweep.stop.interrupted,
        sweep.stop.out_of_time,
    )


def _resources(resources: ResourcesConfig, cluster: Cluster) -> tune.PlacementGroupFactory:
    """What Tune holds for a trial."""
    own = {"CPU": float(resources.cpus_per_trial), "GPU": cluster.gpus_per_trial}
    return tune.PlacementGroupFactory([NO_DEVICE if resources.devices_per_trial > 1 else own])


@contextmanager
def _signals(stop: _Stop) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the sweep in order; a second Ctrl-C ends the process."""

    def interrupt(number: int, frame: object) -> None:
        _log.warning("interrupted: ending the running trials")
        stop.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _ledger(store: RunStore, config: SweepConfig) -> Ledger:
    race = config.race
    needed = None if race.rule == "none" else race.min_complete
    return Ledger(store.fold_count, config.resources.max_failures, needed)


def _journal(store: RunStore) -> Path | None:
    folder = store.log_folder()
    return None if folder is None else folder.parent / "study.journal"
