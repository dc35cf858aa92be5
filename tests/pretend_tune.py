"""Ray Tune's part of a sweep, played in this process: trials train one by one, without Ray.

`PretendTune` takes a searcher and a trainable, asks for fold trials and tells how they end.
`pretend_ray` puts it in Ray's place, so that `run_sweep` and the command line work with it.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import ray
from ray.train._internal import session as ray_session
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

_LOG = logging.getLogger("foldrace")
_IDLE = 1000
"""Questions in vain with nothing running, after which the searcher is stuck."""


class WorkerKilled(BaseException):
    """Raised by a trial in place of the end of its process: nothing in the trial catches it."""


@dataclass
class Trial:
    """The part of a Tune trial that searcher and scheduler read."""

    trial_id: str
    config: dict[str, Any]
    status: str = "RUNNING"
    error_file: str | None = None
    last_result: dict[str, Any] = field(default_factory=dict)


class PretendTune:
    """One session of Tune's controller.

    Time is pretended: `seconds(config)` is how long a trial takes, and the one that ends first
    runs first. Trials without seconds run in the order in which they were asked for.
    """

    def __init__(
        self,
        searcher: Any,
        trainable: Callable[[dict[str, Any]], None],
        slots: int,
        step: Callable[[Sequence[Trial]], None],
        scheduler: Any = None,
        over: Callable[[], bool] = lambda: False,
        seconds: Callable[[dict[str, Any]], float] = lambda config: 0.0,
        lost: Callable[[dict[str, Any]], bool] = lambda config: False,
    ) -> None:
        """`step` is called with all trials at each step, `over()` says whether all trials are to
        end, `lost(config)` whether a trial ends before it starts, without a word to the searcher:
        so Tune does where it cannot reset the process."""
        self._searcher, self._trainable, self._slots = searcher, trainable, slots
        self._scheduler = FIFOScheduler() if scheduler is None else scheduler
        self._step, self._over, self._seconds, self._lost = step, over, seconds, lost
        self.trials: list[Trial] = []  # as Tune's: it only grows
        self._running: list[tuple[float, int]] = []  # (when it ends, index in trials)
        self._current: Trial | None = None
        self._driver_log = _LOG.handlers, _LOG.propagate
        self._finished = False
        self.now = self.busy = 0.0  # seconds of pretended time; of all slots together

    def run(self) -> None:
        """Run until the searcher is finished and nothing runs, or until all is over."""
        idle = 0
        while not self._finished or self._running:
            self._step(self.trials)
            if self._over():
                break
            self._fill()
            idle = 0 if self._running else idle + 1
            assert idle < _IDLE, "the searcher gives nothing, waits for nothing, is not finished"
            if self._running:
                self.now, index = heapq.heappop(self._running)
                self._run(self.trials[index])
        for trial in self.trials:  # those that it ends itself it tells nobody about
            trial.status = "TERMINATED" if trial.status == "RUNNING" else trial.status
        self._step(self.trials)

    def report(self, metrics: dict[str, Any], **_: Any) -> None:
        """Take a report of the trial that runs; raises SystemExit where it has to leave."""
        trial = self._current
        assert trial is not None
        with _logging_to(*self._driver_log):
            self._step(self.trials)
            trial.last_result = dict(metrics)
            if self._scheduler.on_trial_result(None, trial, dict(metrics)) == TrialScheduler.STOP:
                self._complete(trial)
                raise SystemExit
            self._searcher.on_trial_result(trial.trial_id, dict(metrics))
            if self._over():
                raise SystemExit

    @property
    def stop_event(self) -> SimpleNamespace:
        """The event that a trial looks at between batches."""
        return SimpleNamespace(is_set=self._over)

    def _fill(self) -> None:
        while not self._finished and len(self._running) < self._slots:
            config = self._searcher.suggest(f"t{len(self.trials)}")
            if not isinstance(config, dict):
                self._finished = config is not None
                return
            seconds = self._seconds(config)
            heapq.heappush(self._running, (self.now + seconds, len(self.trials)))
            self.trials.append(Trial(f"t{len(self.trials)}", config))
            self.busy += seconds

    def _run(self, trial: Trial) -> None:
        if self._lost(trial.config):
            trial.status = "ERROR"
            return
        self._current = trial
        self._driver_log = _LOG.handlers, _LOG.propagate
        try:
            with _logging_to([logging.NullHandler()], False):
                self._trainable(dict(trial.config))
        except SystemExit:
            pass
        except (Exception, WorkerKilled):
            if not self._over():
                self._fail(trial)
        if trial.status == "RUNNING" and not self._over():
            self._repeat_last_report(trial)
            self._complete(trial)

    def _repeat_last_report(self, trial: Trial) -> None:
        if trial.last_result:
            result = trial.last_result | {"done": True}
            self._scheduler.on_trial_result(None, trial, result)
            self._searcher.on_trial_result(trial.trial_id, result)

    def _complete(self, trial: Trial) -> None:
        self._scheduler.on_trial_complete(None, trial, trial.last_result)
        self._searcher.on_trial_complete(trial.trial_id, trial.last_result, False)
        trial.status = "TERMINATED"

    def _fail(self, trial: Trial) -> None:
        self._scheduler.on_trial_error(None, trial)
        self._searcher.on_trial_complete(trial.trial_id, error=True)
        trial.status = "ERROR"


@contextmanager
def _logging_to(handlers: list[logging.Handler], propagate: bool) -> Iterator[None]:
    """What a trial logs stays in its worker; what is logged while Tune hears it is the driver's."""
    before, _LOG.handlers = _LOG.handlers, handlers
    had, _LOG.propagate = _LOG.propagate, propagate
    try:
        yield
    finally:
        _LOG.handlers, _LOG.propagate = before, had


@dataclass
class PretendRay:
    """A cluster of one machine that is only pretended."""

    cpus: int
    lost: Callable[[dict[str, Any]], bool] = lambda config: False
    """Tells of which trials the process cannot be reset; tests set it."""

    def nodes(self) -> list[dict[str, Any]]:
        """As `ray.nodes` lists them."""
        return [{"Alive": True, "NodeID": "0", "Resources": {"CPU": float(self.cpus)}}]

    def tuner(self, trainable: Any, *, tune_config: Any, run_config: Any) -> SimpleNamespace:
        """In place of `ray.tune.Tuner`: what is called of it is `fit`."""

        def step(trials: Sequence[Trial]) -> None:
            for callback in run_config.callbacks:
                callback.on_step_begin(0, trials)
                callback.on_step_end(0, trials)

        tune = PretendTune(
            tune_config.search_alg, trainable, self.cpus, step, tune_config.scheduler,
            run_config.stop.stop_all, lost=lambda config: self.lost(config),
        )  # fmt: skip

        def fit() -> None:
            with patch.object(ray_session, "_session", tune):
                tune.run()

        return SimpleNamespace(fit=fit)


@contextmanager
def pretend_ray(cpus: int = 2) -> Iterator[PretendRay]:
    """A connection that is there, to a cluster with `cpus` cores that trains in this process."""
    cluster = PretendRay(cpus)
    runtime = SimpleNamespace(get_accelerator_ids=lambda: {})
    with (
        patch.multiple(
            ray,
            is_initialized=lambda: True,
            nodes=cluster.nodes,
            get_runtime_context=lambda: runtime,
        ),
        patch.object(ray._private.worker.global_worker, "node", SimpleNamespace(address_info={})),
        patch.object(ray.tune, "Tuner", cluster.tuner),
    ):
        yield cluster
