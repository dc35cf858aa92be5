"""A sweep's events, told to a real command and a real HTTP server; and what goes wrong there."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foldrace.config.schema import NotifyConfig
from foldrace.core.consent import allow_command
from foldrace.core.errors import Interrupted, RunFailure, UserError
from foldrace.run_folder.records import CandidateRecord, CandidateSummary, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling import notify
from foldrace.scheduling.notify import Notifier, notify_problems, notifying
from tests.scheduling.webhooks import SECRET, Hook, told_to


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    found = Hook()
    monkeypatch.setenv("HOOK", found.url)
    yield found
    found.close()


def store_of(root: Path) -> RunStore:
    return RunStore(root / "run")


def summary(name: str, status: Any, error: str | None = None) -> CandidateSummary:
    record = CandidateRecord(candidate=name, backbone="timm/resnet18", params={})
    trial = TrialRecord(
        candidate=name, fold=0, status="failed", backbone="timm/resnet18", params={},
        folds_hash="h", seed=0, error=error,
    )  # fmt: skip
    return CandidateSummary(record, status, (trial,), 2)


def test_command_and_webhook_get_the_same_events_in_order(hook: Hook, tmp_path: Path) -> None:
    """The command finds an event on its input and in its environment."""
    given, variable = tmp_path / "given", tmp_path / "variable"
    command = f"cat >> {given}; echo >> {given}; printf '%s\\n' \"$FOLDRACE_EVENT\" >> {variable}"
    config = NotifyConfig(command=command, webhook="env:HOOK")
    store = store_of(tmp_path)
    notifier = Notifier(store, config, "cars")
    notifier.settled(summary("c0003", "failed", "Traceback (most recent call last):\n  x\nA: 빨강"))
    for status in ("complete", "stopped"):
        notifier.settled(summary("c0004", status))
    notifier.settled(summary("c0005", "diverged"))
    notifier.result_written()  # there is none
    notifier.paused("a node was lost")
    notifier.ended(0)
    events = told_to(given)
    assert events == told_to(variable) == hook.events
    assert {(path, kind) for path, kind, _ in hook.got} == {(f"/{SECRET}", "application/json")}
    assert [e["event"] for e in events] == ["failed", "failed", "paused", "ended"]
    assert {(e["run"], e["folder"]) for e in events} == {("cars", store.root)}
    assert events[0]["text"] == "cars: c0003 failed: A: 빨강"
    assert (events[1]["candidate"], events[1]["status"]) == ("c0005", "diverged")
    assert events[2]["reason"] == "a node was lost"
    assert (events[3]["exit_code"], events[3]["state"]) == (0, "done")


@pytest.mark.parametrize(
    ("error", "code", "state", "reason"),
    [
        (Interrupted("interrupted; go on with: foldrace resume x\nmore"), 130, "interrupted",
         "interrupted; go on with: foldrace resume x"),
        (KeyboardInterrupt(), 130, "interrupted", "KeyboardInterrupt"),
        (UserError.single("--address x", "no"), 2, "failed", "--address x: no"),
        (RunFailure("no complete candidate"), 1, "failed", "no complete candidate"),
        (OSError(28, "No space left on device"), 1, "failed", "[Errno 28] No space left on device"),
        (ValueError(SECRET), 1, "failed", "ValueError"),
    ],
)  # fmt: skip
def test_how_a_run_ends_is_told(
    make_tiny_run: Callable[..., Any], tmp_path: Path, error: BaseException, code: int, state: str,
    reason: str,
) -> None:  # fmt: skip
    store = make_tiny_run().store
    told = tmp_path / "told"
    config = store.config().model_copy(update={"notify": NotifyConfig(command=f"cat >> {told}")})
    store.save_config(config)
    allow_command(store.config().notify.command)
    with pytest.raises(type(error)), notifying(store):
        raise error
    [event] = told_to(told)
    assert (event["exit_code"], event["state"], event["reason"]) == (code, state, reason)


def test_nobody_is_told_without_a_config(tmp_path: Path) -> None:
    before = threading.active_count()
    notifier = Notifier(store_of(tmp_path), NotifyConfig(), "cars")
    notifier.paused("for a test")
    assert threading.active_count() == before
    notifier.ended(0)


@pytest.mark.parametrize(
    ("status", "waits", "line"),
    [
        (500, 0.0, "notify.webhook: it answers with status 500"),
        (200, 2.0, "notify.webhook: no answer within 0 s"),
        (None, 0.0, "notify.webhook: Connection refused"),
    ],
)
def test_a_webhook_that_fails_is_one_line_without_its_url(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    status: int | None,
    waits: float,
    line: str,
) -> None:
    """The command hears of every event all the same."""
    server = Hook(status or 200, waits)
    monkeypatch.setenv("HOOK", server.url)
    monkeypatch.setattr(notify, "_WEBHOOK_SECONDS", 0.3)
    if status is None:
        server.close()
    told = tmp_path / "told"
    config = NotifyConfig(command=f"cat >> {told}; echo >> {told}", webhook="env:HOOK")
    notifier = Notifier(store_of(tmp_path), config, "cars")
    with caplog.at_level(logging.INFO, "foldrace"):
        notifier.paused("for a test")
        notifier.ended(0)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [("WARNING", line)] * 2
    assert [e["event"] for e in told_to(told)] == ["paused", "ended"]
    if status is not None:
        server.close()


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("echo $HOOK >&2; exit 3", "notify.command: exit code 3: ***"),
        ("no-such-program-here", "notify.command: exit code 127: "),
        ("sleep 60", "notify.command: ended after 1 s, which it may take"),
    ],
)
def test_a_command_that_fails_is_one_line(
    hook: Hook,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: str,
    line: str,
) -> None:
    monkeypatch.setattr(notify, "_COMMAND_SECONDS", 0.6)
    config = NotifyConfig(command=command, webhook="env:HOOK")
    with caplog.at_level(logging.INFO, "foldrace"):
        Notifier(store_of(tmp_path), config, "cars").ended(0)
    [record] = caplog.records
    assert record.levelname == "WARNING" and record.getMessage().startswith(line)
    assert SECRET not in record.getMessage() and len(hook.got) == 1


def test_a_command_may_leave_something_running(tmp_path: Path) -> None:
    """It is not waited for: `notify-send ... &`."""
    config, began = NotifyConfig(command="sleep 20 &"), time.monotonic()
    Notifier(store_of(tmp_path), config, "cars").ended(0)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "the environment variable HOOK is not set"),
        ("  ", "the environment variable HOOK is not set"),
        (SECRET, "the environment variable HOOK holds no URL"),
        (f"ftp://host/{SECRET}", "holds no URL"),
        (f"http:///{SECRET}", "holds no URL"),
        (f"http://[{SECRET}", "holds no URL"),
        (f"https://host/{SECRET}\nX: y", "holds no URL"),
    ],
)
def test_a_variable_without_a_url_is_a_problem_that_does_not_show_it(
    monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    monkeypatch.delenv("HOOK", raising=False)
    if value is not None:
        monkeypatch.setenv("HOOK", value)
    [problem] = notify_problems(NotifyConfig(webhook="env:HOOK"))
    assert problem.where == "notify.webhook" and said in problem.message
    assert SECRET not in str(problem)


def test_a_url_in_its_variable_is_no_problem(hook: Hook) -> None:
    assert list(notify_problems(NotifyConfig(webhook="env:HOOK"))) == []
    assert list(notify_problems(NotifyConfig())) == []
