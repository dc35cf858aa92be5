"""Progress while a sweep runs: a live table on a terminal, plain lines anywhere else.

Takes `Progress` records and a rich console; also prints the leaderboard for `status`. The log loss
of a trial or candidate is the calibrated one.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from foldrace.core.errors import listing, message_line
from foldrace.reporting.formats import counted, difference, duration, number
from foldrace.reporting.sentences import submission_line
from foldrace.run_folder.blend_records import SubmissionNote
from foldrace.run_folder.progress import BudgetUse, Event, Progress, RunningTrial
from foldrace.run_folder.records import CandidateStatus, CandidateSummary, RaceDecision, TrialRecord
from foldrace.run_folder.tables import ranked

_REFRESH_PER_SECOND = 4
_BEST_SHOWN = 8
_QUIET = 50.0
"""Seconds without a line after which one says that all goes on."""
_OTHER_LINES = 24
"""Lines of the terminal for everything but the running trials."""
_STATUS_STYLE = {
    "complete": "green", "running": "cyan", "parked": "blue", "stopped": "dim",
    "unfinished": "yellow", "diverged": "red", "failed": "red",
}  # fmt: skip


class LiveView:
    """Shows each `Progress` it is given, for as long as the `with` block lasts.

    Pass a first one at the start: as plain lines, what it already holds becomes one summary line.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        if console.is_terminal and not console.is_dumb_terminal:
            # Others' prints stay where the caller sends them; Live would bring them here.
            self._live = Live(
                console=console,
                refresh_per_second=_REFRESH_PER_SECOND,
                redirect_stdout=False,
                redirect_stderr=False,
            )
        self._lines = EventLines()
        self._notes_shown = 0

    def __enter__(self) -> LiveView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, progress: Progress) -> None:
        """Show this progress; cheap, as a thread redraws a terminal at most 4 times a second."""
        for note in progress.notes[self._notes_shown :]:  # above the live table, where there is one
            self._console.print(f"warning: {note}")
        self._notes_shown = len(progress.notes)
        if self._live is not None:
            self._live.update(_screen(progress, self._console.height))
            return
        for line in self._lines.new(progress):
            self._console.print(line)


class EventLines:
    """Events between two `Progress` records, as plain lines for a log file or a pipe.

    One line for each fold trial that ended, each candidate that was stopped or settled, and each
    submission; where nothing happens, one a minute that says what is at work. What had ended before
    the session, as after `resume`, is one line together.
    """

    def __init__(self) -> None:
        self._events_shown = 0
        self._submission: SubmissionNote | None = None
        self._started = False
        self._spoke = time.monotonic()

    def new(self, progress: Progress) -> list[str]:
        """Lines for the events that no earlier call has given."""
        fresh = progress.events[self._events_shown :]
        lines = [line for event in fresh if (line := _event_line(event)) is not None]
        before = progress.trials_done - sum(isinstance(e, TrialRecord) for e in fresh)
        if not self._started and before > 0:
            lines.insert(0, f"{before} had ended before this start")
        if self._started and progress.submission not in (None, self._submission):
            lines.append(submission_line(progress.submission))
        self._events_shown, self._started = len(progress.events), True
        self._submission = progress.submission
        if not lines and time.monotonic() - self._spoke > _QUIET:
            lines = [_at_work(progress)]
        if lines:
            self._spoke = time.monotonic()
        now = time.strftime("%H:%M:%S")
        done = f"{progress.trials_done}/{progress.trials_total} fold trials"
        eta = f"  ETA {duration(progress.eta_s)}" if progress.eta_s is not None else ""
        return [f"{now}  {done}  {line}{eta}" for line in lines]


def _at_work(progress: Progress) -> str:
    """What runs, or why nothing does."""
    if progress.waiting is not None:
        return progress.waiting
    running = (f"{t.candidate} fold{t.fold} epoch {t.epoch}/{t.epochs}" for t in progress.running)
    return f"running: {listing(running, limit=4) or 'nothing yet'}"


def _event_line(event: Event) -> str | None:
    """One line of text; None where another event has the same news."""
    if isinstance(event, TrialRecord):
        return _trial_line(event)
    if isinstance(event, RaceDecision):
        return event.line if event.action == "stop" else None
    stopped = any(decision.action == "stop" for decision in event.decisions)
    return None if stopped else _candidate_line(event)


def _trial_line(trial: TrialRecord) -> str:
    head = f"{trial.candidate} fold{trial.fold} {trial.status}"
    if trial.best is not None:
        return f"{head}: log loss {number(trial.variants[trial.best].calibrated_logloss)}"
    error = message_line(trial.error or "")
    return f"{head}: {error}" if error else head


def _candidate_line(summary: CandidateSummary) -> str:
    head = f"{summary.candidate.candidate} {summary.status}"
    if summary.best is None:
        return head
    loss = f"OOF log loss {number(summary.pooled_calibrated(summary.best))}"
    folds = "" if summary.status == "complete" else f" on {len(summary.finished)} fold(s)"
    if summary.gain is not None:
        loss += f", gain {difference(summary.gain)}"
    return f"{head}: {loss}{folds} ({summary.candidate.backbone})"


def leaderboard_table(summaries: Sequence[CandidateSummary], limit: int) -> Table:
    """Table of the `limit` best candidates, with gains where one is known.

    It fits 80 columns, as long backbone names are cut.
    """
    shown = ranked(summaries)[:limit]
    gains = any(summary.gain is not None for summary in shown)
    table = _table()
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("candidate", no_wrap=True)
    table.add_column("backbone", min_width=16)
    table.add_column("status", no_wrap=True)
    table.add_column("folds", justify="right", no_wrap=True)
    table.add_column("log loss", justify="right", no_wrap=True)
    table.add_column("accuracy", justify="right", no_wrap=True)
    if gains:
        table.add_column("gain", justify="right", no_wrap=True)
    for place, summary in enumerate(shown, start=1):
        gain = [difference(summary.gain)] if gains else []
        table.add_row(*_leaderboard_cells(place, summary), *gain)
    return table


def print_leaderboard(console: Console, summaries: Sequence[CandidateSummary], limit: int) -> None:
    """Print the table of the best, and one line that counts the candidates."""
    if not summaries:
        console.print("No candidate yet.")
        return
    console.print(leaderboard_table(summaries, limit))
    statuses = Counter(s.status for s in summaries)
    shown = f"; the {limit} best are shown" if len(summaries) > limit else ""
    candidates = counted(len(summaries), "candidate")
    console.print(f"{candidates}: {_counted(statuses)}{shown}")


def budget_line(budget: Sequence[BudgetUse]) -> str:
    """Budget in words: `12 of 40 candidates, 41 of 120 fold trials, 5m00s of 2h00m`."""
    return ", ".join(_used(part) for part in budget)


def _used(part: BudgetUse) -> str:
    if part.unit == "s":
        return f"{duration(part.used)} of {duration(part.limit)}"
    return f"{round(part.used, 2):g} of {part.limit:g} {part.unit}"


def _screen(progress: Progress, height: int) -> RenderableType:
    parts: list[RenderableType] = [_header(progress)]
    if progress.running:
        parts.append(_running_table(progress.running, max(2, height - _OTHER_LINES)))
    if progress.leaders:
        parts.append(leaderboard_table(progress.leaders, _BEST_SHOWN))
    parts += [_cell(decision.line) for decision in progress.decisions]
    return Group(*parts)


def _counted(statuses: Mapping[CandidateStatus, int]) -> str:
    """Counts in words, the largest first: `5 complete, 3 stopped`."""
    listed = sorted(statuses.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} {status}" for status, n in listed)


def _header(progress: Progress) -> RenderableType:
    line = Text(f"{progress.trials_done}/{progress.trials_total} fold trials", style="bold")
    line.append(f"   elapsed {duration(progress.elapsed_s)}", style="not bold")
    if progress.eta_s is not None:
        line.append(f"   ETA {duration(progress.eta_s)}", style="not bold")
    if progress.best_logloss is not None:
        line.append(f"   best OOF log loss {number(progress.best_logloss)}", style="green")
    if progress.failed:
        line.append(f"   {progress.failed} failed", style="red")
    bar = Table.grid(expand=True)  # a bar alone does not end its line
    bar.add_row(ProgressBar(total=max(progress.trials_total, 1), completed=progress.trials_done))
    return Group(bar, line, *_race_lines(progress))


def _race_lines(progress: Progress) -> Iterator[RenderableType]:
    """Why nothing starts, counts of candidates, the race's blend, and the use of the budget."""
    if progress.waiting is not None:
        yield Text(progress.waiting, style="yellow")
    if progress.counts:
        race = f"candidates: {_counted(progress.counts)}"
        if progress.blend_logloss is not None:
            race += f"   blend of the complete ones {number(progress.blend_logloss)}"
        yield _cell(race)
    if progress.submission is not None:
        yield _cell(submission_line(progress.submission))
    if progress.budget:
        yield _cell(f"budget: {budget_line(progress.budget)}")


def _running_table(running: Sequence[RunningTrial], limit: int) -> RenderableType:
    table = _table()
    table.add_column("running", no_wrap=True)
    table.add_column("backbone", min_width=16)
    table.add_column("fold", justify="right", no_wrap=True)
    table.add_column("epoch", justify="right", no_wrap=True)
    table.add_column("val log loss", justify="right", no_wrap=True)
    for trial in running[:limit]:
        table.add_row(
            _cell(trial.candidate),
            _cell(trial.backbone),
            str(trial.fold),
            f"{trial.epoch}/{trial.epochs}",
            number(trial.val_logloss),
        )
    more = len(running) - limit
    return Group(table, Text(f"and {more} more", style="dim")) if more > 0 else table


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))


def _leaderboard_cells(place: int, summary: CandidateSummary) -> Iterator[RenderableType]:
    best = summary.best
    style = _STATUS_STYLE.get(summary.status, "")
    yield str(place) if summary.is_member else ""
    yield _cell(summary.candidate.candidate)
    yield _cell(summary.candidate.backbone)
    yield Text(_status(summary), style=style)
    yield f"{len(summary.finished)}/{summary.folds}"
    yield number(summary.pooled_calibrated(best) if best else None)
    yield number(summary.pooled_accuracy(best) if best else None)


def _status(summary: CandidateSummary) -> str:
    """The status; of a complete student that it is one, and whether its score is honest."""
    if summary.status != "complete" or not summary.candidate.is_student:
        return summary.status
    return "optimistic" if summary.candidate.is_optimistic else "student"


def _cell(text: str) -> Text:
    """A name in one line."""
    return Text(text, no_wrap=True, overflow="ellipsis")
