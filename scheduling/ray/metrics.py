"""A sweep's figures on Ray's Prometheus endpoint, beside Ray's own.

Takes `Progress` records, sets gauges of `ray.util.metrics`, which each node exports at its port for
metrics with `ray_` before their names. `cluster/grafana.json` draws them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import get_args

import ray
from ray.util.metrics import Gauge

from foldrace.run_folder.progress import Progress
from foldrace.run_folder.records import STATUSES, TrialStatus
from foldrace.scheduling.ray.trial_names import trial_name

_EVERY = 5.0  # seconds at least between two settings
_HOUR = 3600.0
_RUN, _STATE, _TRIAL = "run", "state", "trial"
GAUGES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "foldrace_best_logloss": ("Pooled OOF log loss of the best complete candidate", ()),
    "foldrace_blend_logloss": ("OOF log loss of the blend that the race goes by", ()),
    "foldrace_candidates": ("Candidates by state", (_STATE,)),
    "foldrace_fold_trials": ("Fold trials by state", (_STATE,)),
    "foldrace_fold_trials_expected": ("Fold trials that the sweep will have had at its end", ()),
    "foldrace_images_per_second": ("Training images a second of a running trial", (_TRIAL,)),
    "foldrace_data_wait_ratio": ("Part of the time that it waits for data", (_TRIAL,)),
    "foldrace_device_hours": ("Hours of all fold trials' devices", ()),
    "foldrace_device_hours_saved": ("Hours that the race has not spent on epochs", ()),
    "foldrace_eta_seconds": ("Seconds until the last fold trial ends", ()),
}
"""Name -> what it is, and its tags beside the run's name."""


def with_metrics(run: str, show: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """`show`, which also sets the metrics of the run of this name, every few seconds at most.

    `show` itself where no node of the connected cluster exports metrics.
    """
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    if not any(node.get("MetricsExportPort") for node in nodes if node["Alive"]):
        return show
    metrics, last = SweepMetrics(run), -_EVERY

    def show_and_set(progress: Progress) -> None:
        nonlocal last
        show(progress)
        if time.monotonic() - last >= _EVERY:
            last = time.monotonic()
            metrics.set(progress)

    return show_and_set


class SweepMetrics:
    """The gauges of one run."""

    def __init__(self, run: str) -> None:
        self._gauges = {
            name: Gauge(name, what, (_RUN, *tags)).set_default_tags({_RUN: run})
            for name, (what, tags) in GAUGES.items()
        }

    def set(self, progress: Progress) -> None:
        """Set each gauge whose value is known; Ray drops those that are set no more."""
        counts = progress.trial_counts
        self._set("best_logloss", progress.best_logloss)
        self._set("blend_logloss", progress.blend_logloss)
        self._set("fold_trials_expected", progress.trials_total)
        self._set("device_hours", progress.device_seconds / _HOUR)
        self._set("device_hours_saved", progress.saved_device_seconds / _HOUR)
        self._set("eta_seconds", progress.eta_s)
        for status in STATUSES:  # also those that have none any more
            self._set("candidates", progress.counts.get(status, 0), state=status)
        for state in ("running", *get_args(TrialStatus)):
            self._set("fold_trials", counts.get(state, 0), state=state)
        names = {trial_name(t.candidate, t.fold, t.backbone): t for t in progress.running}
        for name, trial in names.items():
            self._set("images_per_second", trial.images_per_second, trial=name)
            self._set("data_wait_ratio", trial.waiting, trial=name)

    def _set(self, name: str, value: float | None, **tags: str) -> None:
        self._gauges[f"foldrace_{name}"].set(value, tags)
