"""What `run` and `resume` share: sweep, blend, submission, report, and the weights that stay.

Takes a run folder with its config and folds, leaves a finished one; tells what went wrong.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from foldrace.commands.ensemble import blend
from foldrace.commands.submit import PLAIN, predict_test_set
from foldrace.commands.update import write_so_far
from foldrace.config.schema import SweepConfig
from foldrace.console.machine import log_folder, logging_to, only_our_output
from foldrace.core.errors import (
    EnvironmentProblem,
    Interrupted,
    RunFailure,
    listing,
    message_line,
)
from foldrace.core.patience import free_room
from foldrace.ensemble.selection.select import remove_unused_weights
from foldrace.reporting.formats import counted, duration
from foldrace.reporting.live import LiveView, print_leaderboard
from foldrace.reporting.sentences import DIVERGED, submission_line
from foldrace.run_folder.claims import HeldClaim
from foldrace.run_folder.kept_predictions import remove_other_predictions
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import Deadline
from foldrace.scheduling.notify import notifying
from foldrace.scheduling.ray.autoscaling import room_for_trials
from foldrace.scheduling.ray.cluster import connect
from foldrace.scheduling.ray.gpu_measuring import shared_room
from foldrace.scheduling.ray.node_checks import check_nodes
from foldrace.scheduling.ray.tuner import SweepOutcome, run_sweep
from foldrace.search_spaces.space import SearchSpace

_log = logging.getLogger("foldrace")


@contextmanager
def _telling_how_to_go_on(store: RunStore) -> Iterator[None]:
    """Give a disk's or store's error the free room and the `resume` line."""
    try:
        yield
    except OSError as error:
        place = str(error.filename or store.root)
        raise RunFailure(
            f"{error}{free_room(place)}; what is finished is safe, and once this is put right: "
            f"foldrace resume {store.root}"
        ) from error


def sweep_and_finish(
    store: RunStore,
    space: SearchSpace,
    image_root: str,
    address: str | None,
    console: Console,
    started: float,
    claim: HeldClaim,
) -> None:
    """Train the fold trials that are left, then blend, submit and report.

    `started` is when the command did: all of it is within the time budget; `claim` is the caller's
    on the run folder. Raises Interrupted on Ctrl-C.
    """
    config = store.config()
    folder = log_folder(store)
    deadline = _deadline(config, started)
    with (
        _telling_how_to_go_on(store),
        logging_to(folder),
        only_our_output(folder / "ray.log", console) as screen,
        notifying(store) as notifier,
    ):
        _log.info("Ray: starting")
        with connect(address, config.resources) as cluster:
            problems, warnings = check_nodes(store, image_root, cluster.gpus_per_trial > 0)
            for warning in warnings:
                _warn(screen, str(warning))
            if problems:
                raise EnvironmentProblem(problems)
            if config.resources.gpus_per_trial == "auto":
                cluster.room = shared_room(store, space, cluster, lambda line: screen.print(line))
            at_once = cluster.room.most
            screen.print(f"{at_once} fold trials at a time; Ray dashboard: {cluster.dashboard}")
            _log.info("sweep: begins, %d fold trials at a time", at_once)
            if deadline is not None:
                kept = duration(deadline.finishing_time())
                screen.print(
                    f"Reserved from the time budget for blend, submission and report: {kept}, "
                    "until it is known what they take"
                )
            room = room_for_trials(config, cluster.room, address)
            with LiveView(screen) as view, room:
                outcome = run_sweep(
                    store,
                    config,
                    space,
                    image_root,
                    cluster,
                    view.update,
                    lambda line: screen.print(line),
                    claim,
                    deadline,
                    write_so_far,
                    [notifier],
                )
            _log.info("sweep: ended after %.1f s", outcome.seconds)
        _log.info("Ray: stopped")
        if outcome.interrupted:
            raise Interrupted(_interrupted(store))
        print_leaderboard(screen, outcome.summaries, limit=10)
        print_trouble(outcome, screen)
        _finish(store, screen)
        notifier.result_written()
        _log.info("run: blend and report written")


def finish_again(store: RunStore, console: Console) -> None:
    """What follows the last fold trial, without Ray."""
    print_leaderboard(console, store.summaries(), limit=10)
    folder = log_folder(store)
    with (
        _telling_how_to_go_on(store),
        notifying(store),
        logging_to(folder),
        only_our_output(folder / "ray.log", console) as screen,
    ):
        _finish(store, screen)


def _interrupted(store: RunStore) -> str:
    """What is there, and how to go on."""
    text = f"interrupted; go on with: foldrace resume {store.root}"
    submission = store.submission()
    if submission is None:
        return text
    return f"{text}\n{store.root}/{store.submission_name}: {submission_line(submission)}"


def _deadline(config: SweepConfig, started: float) -> Deadline | None:
    """The end of the fold trials' part of the time budget; None without a budget."""
    budget = config.resources.time_budget
    return None if budget is None else Deadline(budget, started, time.monotonic() - started)


def print_trouble(outcome: SweepOutcome, console: Console) -> None:
    """Print why the sweep ended before its end, and which candidates are not in the blend."""
    by_status: dict[str, list[CandidateSummary]] = defaultdict(list)
    for summary in outcome.summaries:
        by_status[summary.status].append(summary)
    if outcome.limit is not None:
        _warn(console, f"the budget ended the sweep: {outcome.limit}")
    for summary in (*by_status["diverged"], *by_status["failed"]):
        errors = [t.error for t in summary.trials if t.error]
        reason = message_line(errors[0]) if errors else DIVERGED
        _warn(console, f"{summary.candidate.candidate} {summary.status}: {reason}")
    if by_status["unfinished"]:
        names = listing(s.candidate.candidate for s in by_status["unfinished"])
        _warn(console, f"without all of their folds, and so not in the blend: {names}")
    for status in ("parked", "stopped"):
        if by_status[status]:
            candidates = counted(len(by_status[status]), "candidate")
            console.print(f"{candidates} {status} by the race: decisions.csv has the numbers")


def _warn(console: Console, text: str) -> None:
    console.print(f"warning {text}")


def _finish(store: RunStore, console: Console) -> None:
    """Blend, submission and report; then the weights go that the config does not keep."""
    config = store.config()
    ensemble = blend(store, config.ensemble, console)
    _log.info("blend written")
    used = {(member.candidate, member.variant) for member in ensemble.members if not member.run}
    remove_other_predictions(store, used)
    if config.data.test is not None:
        predict_test_set(store, PLAIN, None, console)
        _log.info("submission written")
    from foldrace.reporting.report import write_report  # matplotlib: not before it is needed

    page = write_report(store)
    if config.ensemble.keep == "blend":
        count = remove_unused_weights(store, ensemble)
        members = counted(count, "member")
        console.print(f"Removed the weights of {members} that the blend does not use")
    console.print(f"Report: {store.root}/{page}")
