"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import datetime
from typing import Literal

import pytest

from foldrace.console.terminal import Terminal
from foldrace.core.metrics import MetricScore
from foldrace.reporting.live import LiveView, leaderboard_table, print_leaderboard
from foldrace.reporting.sentences import submission_line
from foldrace.run_folder.blend_records import SubmissionNote
from foldrace.run_folder.progress import BudgetUse, Event, Progress, RunningTrial
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TrialRecord,
    VariantScore,
)

_LONG = "stack(torchvision/convnext_tiny,timm/caformer_b36.sail_in22k)"


def _trial(
    candidate: str,
    fold: int,
    loss: float | None = 0.5,
    error: str | None = None,
    seconds: float = 1.0,
) -> TrialRecord:
    shown = loss or 0.0
    score = VariantScore(
        rows=10, val_logloss=shown + 1, calibrated_logloss=shown, val_acc=0.8, epoch=1
    )
    return TrialRecord(
        candidate=candidate, fold=fold, status="failed" if loss is None else "finished",
        backbone="b", params={}, folds_hash="h", seed=0, error=error, seconds=seconds,
        variants={} if loss is None else {"raw": score},
    )  # fmt: skip


def _summary(
    candidate: str,
    status: Literal["running", "complete", "failed", "stopped"],
    *trials: TrialRecord,
    backbone: str = "timm/resnet18",
    decisions: tuple[RaceDecision, ...] = (),
) -> CandidateSummary:
    record = CandidateRecord(candidate=candidate, backbone=backbone, params={})
    return CandidateSummary(record, status, trials, 2, decisions)


def _decision(
    candidate: str, action: Literal["continue", "stop", "complete"], gain: float
) -> RaceDecision:
    return RaceDecision(
        number=0, candidate=candidate, fold=1, rule="gain", action=action, folds_done=2, rows=20,
        gain=gain, gain_se=0.0009, complete=5, blend_logloss=0.2, epochs_trained=9,
        reason=f"gain {gain:+.4f} ± 0.0009",
    )  # fmt: skip


def _progress(
    *events: Event,
    before: int = 0,
    leaders: tuple[CandidateSummary, ...] = (),
    running: tuple[RunningTrial, ...] = (),
    eta: float | None = 70.0,
) -> Progress:
    done = before + sum(isinstance(event, TrialRecord) for event in events)
    return Progress(done, 18, running, {}, leaders, events, 0, 12.0, eta, 0.1234)


def _plain(*steps: Progress) -> list[str]:
    out = io.StringIO()
    with LiveView(Terminal(out, width=40)) as view:
        for step in steps:
            view.update(step)
    assert not [c for c in out.getvalue() if not c.isprintable() and c != "\n"]
    return out.getvalue().splitlines()


def test_plain_lines_one_for_each_event() -> None:
    events: list[Event] = [_trial("c0002", 1, 0.1234)]
    first = _progress(*events)
    events += [_trial("c0002", 0, 0.3)]
    events += [_summary("c0002", "complete", *(e for e in events if isinstance(e, TrialRecord)))]
    lines = _plain(_progress(), first, first, _progress(*events))
    assert [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in lines] == [
        "1/18 fold trials  c0002 fold1 finished: log loss 0.1234  ETA 1m10s",
        "2/18 fold trials  c0002 fold0 finished: log loss 0.3000  ETA 1m10s",
        "2/18 fold trials  c0002 complete: OOF log loss 0.2117 (timm/resnet18)  ETA 1m10s",
    ]
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)


def test_a_decision_to_stop_is_one_line_with_its_numbers() -> None:
    on, stop = _decision("c0012", "continue", 0.002), _decision("c0012", "stop", -0.0031)
    last = _decision("c0013", "complete", 0.0105)
    stopped = _summary("c0012", "stopped", _trial("c0012", 0), decisions=(on, stop))
    complete = _summary("c0013", "complete", _trial("c0013", 0), decisions=(last,))
    lines = _plain(_progress(on, stop, stopped, last, complete, eta=None))
    assert [line.split("  ", 2)[2] for line in lines] == [
        "c0012 stopped after fold 1: gain -0.0031 ± 0.0009",
        "c0013 complete: OOF log loss 0.5000, gain +0.0105 (timm/resnet18)",
    ]


def _note(minute: int, loss: float) -> SubmissionNote:
    """Written at 09:00 of this machine's time, plus so many minutes."""
    return SubmissionNote(
        created=datetime(2026, 3, 1, 9, minute).astimezone(), crossfit_logloss=loss
    )


def test_each_submission_is_one_line() -> None:
    """Not that of an earlier session."""
    first, second = _note(5, 0.25), _note(30, 0.125)
    before = replace(_progress(eta=None), submission=first)
    after = replace(before, submission=second)
    lines = _plain(before, before, after, after)
    assert [line.split("  ", 2)[2] for line in lines] == [
        "submission of 2026-03-01 09:30:00: log loss of one fold's models 0.1250"
    ]


def test_a_submission_tells_its_errors_and_the_own_metric() -> None:
    own = MetricScore("macro_f1", 0.75, True, 0.0211)
    note = _note(5, 0.25).model_copy(update={"crossfit_se": 0.0123, "chosen_metric": own})
    assert submission_line(note) == (
        "submission of 2026-03-01 09:05:00: log loss of one fold's models 0.2500 ± 0.0123, "
        "macro_f1 0.7500 ± 0.0211"
    )


def test_terminal_shows_the_submission_so_far() -> None:
    lines = _screen(replace(_progress(), submission=_note(5, 0.25))).splitlines()
    line = "submission of 2026-03-01 09:05:00: log loss of one fold's models 0.2500"
    assert line in [line.strip() for line in lines]


def test_the_line_of_a_submission_has_the_loss_of_the_mean_first() -> None:
    known = _note(5, 0.25).model_copy(update={"submitted_logloss": 0.2, "submitted_se": 0.0125})
    assert submission_line(known).endswith(
        "expected log loss 0.2000 ± 0.0125 (log loss of one fold's models 0.2500)"
    )


def test_what_ended_before_the_session_is_one_line() -> None:
    lines = _plain(_progress(before=2, eta=None), _progress(_trial("c1", 0), before=2, eta=None))
    assert [line[10:] for line in lines] == [
        "2/18 fold trials  2 had ended before this start",
        "3/18 fold trials  c1 fold0 finished: log loss 0.5000",
    ]


def test_a_failure_shows_its_first_line_without_control_characters() -> None:
    trial = _trial("c1", 0, None, "bad \x1b[31mred\x07 [bold]\nmore")
    lines = _plain(_progress(), _progress(trial, _summary("c1", "failed", trial), eta=None))
    assert lines[0].endswith(r"c1 fold0 failed: bad \x1b[31mred\x07 [bold]")
    assert lines[1].endswith("c1 failed")


def test_a_note_is_shown_once_as_a_line() -> None:
    noted = [replace(_progress(), notes=notes) for notes in ((), ("no [room]",))]
    more = replace(_progress(), notes=("no [room]", "no\nmemory"))
    lines = _plain(*noted, noted[1], more, more)
    assert lines == ["warning: no [room]", r"warning: no\nmemory"]
    screen = _screen(more)
    assert "warning: no [room]" in screen and "0/18 fold trials" in screen


def test_a_dumb_terminal_gets_plain_lines() -> None:
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=True, _environ={"TERM": "dumb"}, color_system=None)
    with LiveView(console) as view:
        view.update(_progress())
        view.update(_progress(_trial("c1", 0)))
    assert "c1 fold0 finished" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def _screen(progress: Progress, height: int = 30) -> str:
    """The last picture of a terminal of 80 columns."""
    out = io.StringIO()
    console = Terminal(file=out, force_terminal=True, width=80, height=height, color_system=None)
    with LiveView(console) as view:
        view.update(progress)
    return re.sub(r"\x1b\[[?\dA-Z;]*[A-Za-z]", "", out.getvalue())


def test_terminal_shows_header_running_trials_and_leaderboard() -> None:
    running = (
        RunningTrial("c0003", _LONG, 1, 4, 30, 0.4321),
        RunningTrial("c0004", "timm/[red]x", 0, 0, 30, None),
    )
    leader = _summary("c0001", "complete", _trial("c0001", 0))
    screen = _screen(_progress(_trial("c0001", 0), leaders=(leader,), running=running))
    header = "1/18 fold trials   elapsed 12s   ETA 1m10s   best OOF log loss 0.1234"
    assert header in [line.strip() for line in screen.splitlines()]
    assert re.search(r"c0003 .* 4/30 +0\.4321", screen)
    assert re.search(r"c0004 +timm/\[red\]x +0 +0/30 +-", screen)
    assert re.search(r"1 +c0001 +timm/resnet18 +complete +1/2 +0\.5000 +0\.8000", screen)
    assert max(map(len, screen.splitlines())) <= 80


def test_terminal_cuts_the_running_trials_to_its_height() -> None:
    running = tuple(RunningTrial(f"c{i:04d}", "b", 0, 1, 2, 0.5) for i in range(64))
    screen = _screen(_progress(running=running), height=29)
    assert "and 59 more" in screen


def test_terminal_shows_where_the_race_stands() -> None:
    decision = _decision("c0012", "stop", -0.0031)
    leader = _summary(
        "c0003", "complete", _trial("c0003", 0), backbone=_LONG,
        decisions=(_decision("c0003", "complete", 0.0105),),
    )  # fmt: skip
    progress = replace(
        _progress(leaders=(leader, _summary("c0014", "running", _trial("c0014", 0)))),
        counts={"complete": 5, "stopped": 7, "running": 2},
        blend_logloss=0.2,
        decisions=(decision,),
        budget=(
            BudgetUse(14, 40, "candidates"),
            BudgetUse(41, 120, "fold trials"),
            BudgetUse(0.3149, 2.0, "GPU-hours"),
            BudgetUse(61.0, 7200.0, "s"),
        ),
    )
    lines = [line.strip() for line in _screen(progress).splitlines()]
    assert (
        "candidates: 7 stopped, 5 complete, 2 running   blend of the complete ones 0.2000" in lines
    )
    budget = "14 of 40 candidates, 41 of 120 fold trials, 0.31 of 2 GPU-hours"
    assert any(line.startswith(f"budget: {budget}") for line in lines)
    assert "c0012 stopped after fold 1: gain -0.0031 ± 0.0009" in lines
    assert any(re.search(r"c0003 .* complete +1/2 +0.5000 +0.8000 +\+0.0105", x) for x in lines)
    assert any(re.search(r"c0014 .* running +1/2 +0.5000 +0.8000 +-", x) for x in lines)
    assert max(map(len, lines)) <= 80


def test_the_view_stops_when_the_block_raises() -> None:
    console = Terminal(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(console)
    with LiveView(console):  # a console holds one live display at a time
        pass


def _interrupted(console: Terminal) -> None:
    with LiveView(console):
        raise KeyboardInterrupt


def _leaderboard(*summaries: CandidateSummary, limit: int = 8) -> str:
    out = io.StringIO()
    print_leaderboard(Terminal(file=out, width=80), summaries, limit)
    return out.getvalue()


def test_leaderboard_fits_80_columns_one_line_each() -> None:
    rows = [
        _summary(f"c{i:04d}", "complete", _trial("c0", 0, 0.5 - 0.01 * i), backbone=_LONG)
        for i in range(12)
    ]
    lines = _leaderboard(*rows).splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[1] for line in lines if "stack(" in line]
    assert shown == [f"c{i:04d}" for i in range(11, 3, -1)]
    assert all("…" in line for line in lines if "stack(" in line)
    assert lines[-1] == "12 candidates: 12 complete; the 8 best are shown"


def test_leaderboard_of_nothing_finished() -> None:
    shown = _leaderboard(_summary("c1", "failed", _trial("c1", 0, None)), _summary("c2", "running"))
    assert re.search(r"c1 +timm/resnet18 +failed +0/2 +- +-", shown)
    assert "2 candidates: 1 failed, 1 running" in shown
    assert _leaderboard() == "No candidate yet.\n"


def test_leaderboard_table_keeps_to_its_limit() -> None:
    rows = [_summary(f"c{i}", "complete", _trial("c0", 0)) for i in range(5)]
    assert leaderboard_table(rows, 3).row_count == 3
