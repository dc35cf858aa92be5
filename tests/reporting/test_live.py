"""Progress on a terminal and in a log file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from typing import Literal

import pytest
from rich.console import Console

from experiment.progress import Progress, RunningTrial
from experiment.records import CandidateRecord, CandidateSummary, TrialRecord, VariantScore
from reporting.live import LiveView, leaderboard_table, print_leaderboard

_LONG = "stack(torchvision/convnext_tiny,timm/caformer_b36.sail_in22k)"


def _trial(
    candidate: str,
    fold: int,
    loss: float | None = 0.5,
    error: str | None = None,
    seconds: float = 1.0,
) -> TrialRecord:
    score = VariantScore(rows=10, val_logloss=loss or 0.0, val_acc=0.8, best_epoch=1)
    return TrialRecord(
        candidate=candidate, fold=fold, status="failed" if loss is None else "finished",
        backbone="b", params={}, folds_hash="h", seed=0, error=error, seconds=seconds,
        variants={} if loss is None else {"raw": score},
    )  # fmt: skip


def _summary(
    candidate: str,
    status: Literal["running", "complete", "failed"],
    *trials: TrialRecord,
    backbone: str = "timm/resnet18",
) -> CandidateSummary:
    record = CandidateRecord(candidate=candidate, backbone=backbone, params={})
    return CandidateSummary(record, status, trials, 2)


def _progress(
    *summaries: CandidateSummary, running: tuple[RunningTrial, ...] = (), eta: float | None = 70.0
) -> Progress:
    done = sum(len(s.trials) for s in summaries)
    return Progress(done, 18, running, summaries, 0, 12.0, eta, 0.1234)


def _plain(*steps: Progress) -> list[str]:
    out = io.StringIO()
    with LiveView(Console(file=out, width=40)) as view:
        for step in steps:
            view.update(step)
    assert not [c for c in out.getvalue() if not c.isprintable() and c != "\n"]
    return out.getvalue().splitlines()


def test_plain_lines_one_for_each_event() -> None:
    first = _summary("c0002", "running", _trial("c0002", 1, 0.1234))
    both = _summary("c0002", "complete", _trial("c0002", 0, 0.3), _trial("c0002", 1, 0.1234))
    lines = _plain(_progress(), _progress(first), _progress(first), _progress(both))
    assert [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in lines] == [
        "1/18 fold trials  c0002 fold1 finished: log loss 0.1234  ETA 1m10s",
        "2/18 fold trials  c0002 fold0 finished: log loss 0.3000  ETA 1m10s",
        "2/18 fold trials  c0002 complete: OOF log loss 0.2117 (timm/resnet18)  ETA 1m10s",
    ]
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines)


def test_what_ended_before_the_view_is_one_line() -> None:
    summary = _summary("c0001", "complete", _trial("c0001", 0), _trial("c0001", 1))
    lines = _plain(_progress(summary, eta=None))
    assert [line[10:] for line in lines] == ["2/18 fold trials  2 ended before"]


def test_a_failure_shows_its_first_line_without_control_characters() -> None:
    failed = _summary("c1", "failed", _trial("c1", 0, None, "bad \x1b[31mred\x07 [bold]\nmore"))
    lines = _plain(_progress(), _progress(failed, eta=None))
    assert lines[0].endswith("c1 fold0 failed: bad  [31mred  [bold]")
    assert lines[1].endswith("c1 failed")


def test_a_trial_that_ends_again_after_a_retry_is_shown_again() -> None:
    failed = _summary("c1", "failed", _trial("c1", 0, None))
    again = _summary("c1", "running", _trial("c1", 0, 0.4, seconds=2.0))
    done = _summary("c1", "complete", _trial("c1", 0, 0.4, seconds=2.0), _trial("c1", 1, 0.4))
    lines = _plain(_progress(), _progress(failed), _progress(again), _progress(done))
    assert [line.split("  ")[2].split(":")[0] for line in lines] == [
        "c1 fold0 failed", "c1 failed", "c1 fold0 finished", "c1 fold1 finished", "c1 complete",
    ]  # fmt: skip


def test_a_note_is_shown_once_as_a_line() -> None:
    noted = [replace(_progress(), notes=notes) for notes in ((), ("no [room]",))]
    more = replace(_progress(), notes=("no [room]", "no\nmemory"))
    lines = _plain(*noted, noted[1], more, more)
    assert lines == ["warning: no [room]", "warning: no memory"]
    screen = _screen(more)
    assert "warning: no [room]" in screen and "0/18 fold trials" in screen


def test_a_dumb_terminal_gets_plain_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, _environ={"TERM": "dumb"}, color_system=None)
    with LiveView(console) as view:
        view.update(_progress())
        view.update(_progress(_summary("c1", "running", _trial("c1", 0))))
    assert "c1 fold0 finished" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def _screen(progress: Progress, height: int = 30) -> str:
    """The last picture of a terminal of 80 columns."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, height=height, color_system=None)
    with LiveView(console) as view:
        view.update(progress)
    return re.sub(r"\x1b\[[?\dA-Z;]*[A-Za-z]", "", out.getvalue())


def test_terminal_shows_header_running_trials_and_leaderboard() -> None:
    running = (
        RunningTrial("c0003", _LONG, 1, 4, 30, 0.4321),
        RunningTrial("c0004", "timm/[red]x", 0, 0, 30, None),
    )
    screen = _screen(_progress(_summary("c0001", "complete", _trial("c0001", 0)), running=running))
    header = "1/18 fold trials   elapsed 12s   ETA 1m10s   best OOF log loss 0.1234"
    assert header in [line.strip() for line in screen.splitlines()]
    assert re.search(r"c0003 .* 4/30 +0\.4321", screen)
    assert re.search(r"c0004 +timm/\[red\]x +0 +0/30 +-", screen)
    assert re.search(r"1 +c0001 +timm/resnet18 +complete +1/2 +0\.5000 +0\.8000", screen)
    assert max(map(len, screen.splitlines())) <= 80


def test_terminal_cuts_the_running_trials_to_its_height() -> None:
    running = tuple(RunningTrial(f"c{i:04d}", "b", 0, 1, 2, 0.5) for i in range(64))
    screen = _screen(_progress(running=running), height=24)
    assert "and 59 more" in screen


def test_the_view_stops_when_the_block_raises() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt):
        _interrupted(console)
    with LiveView(console):  # a console holds one live display at a time
        pass


def _interrupted(console: Console) -> None:
    with LiveView(console):
        raise KeyboardInterrupt


def _leaderboard(*summaries: CandidateSummary, limit: int = 8) -> str:
    out = io.StringIO()
    print_leaderboard(Console(file=out, width=80), summaries, limit)
    return out.getvalue()


def test_leaderboard_fits_80_columns_one_line_each() -> None:
    rows = [
        _summary(f"c{i:04d}", "complete", _trial("x", 0, 0.5 - 0.01 * i), backbone=_LONG)
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
    rows = [_summary(f"c{i}", "complete", _trial("x", 0)) for i in range(5)]
    assert leaderboard_table(rows, 3).row_count == 3
