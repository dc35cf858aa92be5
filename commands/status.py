"""`status`: the leaderboard, the race and what is left, from the run folder alone.

The driver's lock tells whether its sweep goes on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from rich.console import Console

from foldrace.config.schema import SweepConfig
from foldrace.console.machine import is_at_work
from foldrace.console.warnings import warnings_shown
from foldrace.reporting.formats import counted, duration, number
from foldrace.reporting.live import budget_line, print_leaderboard
from foldrace.reporting.sentences import crossfitted, submission_line
from foldrace.run_folder.belonging import strange_trials
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import SweepUsage, devices_of_a_trial
from foldrace.scheduling.nodes import default_gpus
from foldrace.scheduling.progress import sweep_progress

_WATCH_EVERY = 5.0  # seconds


def status(root: str, watch: bool, console: Console) -> None:
    """Print leaderboard, race and what is left; `watch`: again until the sweep has ended."""
    store = RunStore.open(root)
    while True:
        began = time.monotonic()
        at_work, config = is_at_work(store), store.config()
        with warnings_shown(console):
            stored = store.stored_trials()
            summaries = store.summaries(at_work, stored)
        print_leaderboard(console, summaries, limit=20)
        for line in status_lines(summaries, config, store.fold_count, at_work):
            console.print(line)
        for line in (*running_lines(store, at_work), *_result_lines(store)):
            console.print(line)
        for problem in strange_trials(store, stored.values()):
            console.print(f"warning: {problem}")
        settled = sum(s.settled for s in summaries)
        if not watch or not at_work or settled >= config.search.candidates:
            return
        time.sleep(max(_WATCH_EVERY, time.monotonic() - began))  # a large run takes long to read


def running_lines(store: RunStore, at_work: bool) -> Iterator[str]:
    """What a sweep at work has running, with the time since each trial's last sign of life."""
    now = store.running() if at_work else None
    if now is None:
        return
    if now.waiting is not None:
        yield now.waiting
    age = max(0.0, time.time() - now.at)
    for trial in now.trials:
        ended = "last epoch ended" if trial.epoch else "started"
        yield (
            f"running: {trial.candidate} fold{trial.fold} of {trial.backbone}, epoch "
            f"{trial.epoch}/{trial.epochs}, {ended} {duration(trial.silent_s + age)} ago"
        )


def _result_lines(store: RunStore) -> Iterator[str]:
    """What there is to submit, or the blend of a run without a test set."""
    submission, blend = store.submission(), store.blend.record()
    if submission is not None:
        yield submission_line(submission)
    elif blend is not None:
        own = None if blend.choice is None else blend.choice.score
        good = crossfitted(blend.crossfit_logloss, blend.crossfit_se, own)
        yield f"blend of {counted(len(blend.members), 'member')}: {good}"


def status_lines(
    summaries: Sequence[CandidateSummary], config: SweepConfig, folds: int, at_work: bool
) -> Iterator[str]:
    """Lines below the leaderboard: fold trials, race and budget."""
    resources = config.resources
    devices = devices_of_a_trial(resources, default_gpus([], resources))
    trials = [trial for summary in summaries for trial in summary.trials]
    parked = sum(s.status == "parked" and not s.trials for s in summaries)
    seconds = sum(t.seconds * (devices if t.devices is None else t.devices) for t in trials)
    now = sweep_progress(
        summaries,
        config.search,
        resources,
        folds=folds,
        usage=SweepUsage(len(summaries), len(trials) + parked, seconds),
        slots=1,  # how many there are the folder does not tell: what is left, one by one
        devices=devices,
        elapsed_s=0.0,
    )
    if now.trials_total == now.trials_done:
        yield f"{now.trials_done} of {now.trials_total} fold trials ended"
    elif not at_work:
        yield f"{now.trials_done} fold trials ended; no run or resume is at work on this folder"
    elif resources.time_budget is not None:  # when it began the folder does not tell
        budget = duration(resources.time_budget)
        yield f"{now.trials_done} fold trials ended; the run has a time budget of {budget}"
    else:
        left = f"; about {duration(now.eta_s)} of training left" if now.eta_s is not None else ""
        yield f"{now.trials_done} of {now.trials_total} fold trials ended{left}"
    if now.blend_logloss is not None:
        yield f"race: the blend of the complete candidates has log loss {number(now.blend_logloss)}"
    yield from (f"  {decision.line}" for decision in now.decisions)
    yield f"budget: {budget_line(now.budget)}"
