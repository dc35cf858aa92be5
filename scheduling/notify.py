"""Tells a command and a webhook of a better blend, a failed candidate, a pause, and a sweep's end.

Takes the sweep's events, gives each as JSON to the command and the URL of the config's section
`notify`, in a thread: nothing waits for them, and what goes wrong there is a line of the log. The
URL is a secret, and stays in its environment variable: no message has any part of it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from http.client import HTTPException
from queue import SimpleQueue
from threading import Thread
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from foldrace.config.schema import NotifyConfig
from foldrace.core.consent import allowed_command
from foldrace.core.errors import (
    FoldraceError,
    Interrupted,
    Problem,
    RunFolderError,
    message_line,
)
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.events import SweepListener

_VARIABLE = "FOLDRACE_EVENT"
_COMMAND_SECONDS, _WEBHOOK_SECONDS = 60.0, 10.0
_CLOSE_SECONDS = 30.0  # that the end of a sweep waits for events that are still to be told
_log = logging.getLogger("foldrace")


def notify_problems(config: NotifyConfig) -> Iterator[Problem]:
    """Problem of an environment variable that holds no URL, in words without what it holds."""
    if config.webhook is None:
        return
    name, url = _variable_of(config.webhook)
    if not url:
        what = f"the environment variable {name} is not set; export {name}=https://... first"
        yield Problem("notify.webhook", what)
    elif not _is_http(url):
        what = f"the environment variable {name} holds no URL; allowed: https://... or http://..."
        yield Problem("notify.webhook", what)


def _variable_of(webhook: str) -> tuple[str, str]:
    """Name and value of the variable of `env:NAME`; '' where it is not set."""
    name = webhook.removeprefix("env:")
    return name, os.environ.get(name, "").strip()


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
    except ValueError:  # brackets, a port that is no number
        return False


class Notifier(SweepListener):
    """Tells of one session's events, in their order."""

    def __init__(self, store: RunStore, config: NotifyConfig, run: str) -> None:
        """`run` is its name. A blend that the run folder holds already is no news."""
        self._store, self._command, self._run = store, config.command, run
        self._url = None if config.webhook is None else _variable_of(config.webhook)[1]
        self._told = self._blend_loss()
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="notify", daemon=True)

    def settled(self, summary: CandidateSummary) -> None:
        """Tell of a candidate that failed or diverged."""
        if summary.status not in ("failed", "diverged"):
            return
        candidate = summary.candidate
        errors = [message_line(trial.error) for trial in summary.trials if trial.error]
        self._tell(
            "failed",
            f"{candidate.candidate} {summary.status}: {errors[0] if errors else 'no reason given'}",
            candidate=candidate.candidate,
            backbone=candidate.backbone,
            status=summary.status,
        )

    def result_written(self) -> None:
        """Tell of the blend that the run folder holds, where it is better than the last one."""
        loss = self._blend_loss()
        if loss is None or (self._told is not None and loss >= self._told):
            return
        self._told = loss
        note = self._store.submission()
        of_it = note if note is not None and note.crossfit_logloss == loss else None
        self._tell(
            "blend",
            f"a better blend: log loss of one fold's models {loss:.4f}",
            crossfit_logloss=loss,
            submitted_logloss=None if of_it is None else of_it.submitted_logloss,
            submission=None
            if note is None
            else f"{self._store.root}/{self._store.submission_name}",
        )

    def paused(self, reason: str) -> None:
        """Tell that nothing trains for the time being, and why."""
        self._tell("paused", f"paused: {reason}", reason=reason)

    def ended(self, exit_code: int, reason: str = "") -> None:
        """Tell of the end of the session, and wait until all events are told, for half a minute."""
        state = {0: "done", Interrupted.exit_code: "interrupted"}.get(exit_code, "failed")
        text = f"{state}: {reason}" if reason else state
        self._tell("ended", text, exit_code=exit_code, state=state, reason=reason)
        if self._thread.ident is not None:
            self._queue.put(None)
            self._thread.join(_CLOSE_SECONDS)
            if self._thread.is_alive():
                _log.warning("notify: the end was not told within %.0f s", _CLOSE_SECONDS)

    def _blend_loss(self) -> float | None:
        with suppress(RunFolderError):  # a damaged one is written anew
            record = self._store.blend.record()
            return None if record is None else record.crossfit_logloss
        return None

    def _tell(self, event: str, text: str, **more: str | float | None) -> None:
        """Put an event into the queue; `text` is its line for people."""
        if self._command is None and self._url is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        place = {"run": self._run, "folder": self._store.root, "time": now}
        told = {"event": event} | place | {"text": f"{self._run}: {text}"} | more
        self._queue.put(json.dumps(told, ensure_ascii=False))
        if self._thread.ident is None:
            self._thread.start()

    def _work(self) -> None:
        while (event := self._queue.get()) is not None:
            for tell in (self._run_command, self._post):
                try:
                    problem = tell(event)
                except Exception as error:  # the sweep needs no telling: nothing may end it
                    problem = type(error).__name__  # its text may have the URL
                if problem is not None:
                    _log.warning("notify.%s", problem)

    def _run_command(self, event: str) -> str | None:
        """Run the command; gives what went wrong."""
        if self._command is None:
            return None
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as errors:
            given.write(event.encode())
            given.seek(0)
            process = subprocess.Popen(
                self._command, shell=True, env=os.environ | {_VARIABLE: event},
                stdin=given, stdout=subprocess.DEVNULL, stderr=errors,
                start_new_session=True,  # a Ctrl-C is meant for the sweep, whose end it tells of
            )  # fmt: skip
            try:
                code = process.wait(_COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"command: ended after {_COMMAND_SECONDS:.0f} s, which it may take"
            if code == 0:
                return None
            errors.seek(0)
            said = message_line(errors.read(10_000).decode(errors="replace"))
        return self._without_url(f"command: exit code {code}{': ' if said else ''}{said}")

    def _post(self, event: str) -> str | None:
        """Post to the webhook; gives what went wrong."""
        if self._url is None:
            return None
        try:
            request = urllib.request.Request(
                self._url, event.encode(), {"Content-Type": "application/json"}, method="POST"
            )
            urllib.request.urlopen(request, timeout=_WEBHOOK_SECONDS).close()
        except HTTPError as error:
            error.close()
            return f"webhook: it answers with status {error.code}"
        except TimeoutError:
            return f"webhook: no answer within {_WEBHOOK_SECONDS:.0f} s"
        except (URLError, OSError, HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)
            what = getattr(cause, "strerror", None) or type(cause).__name__
            return self._without_url(f"webhook: {what}")
        return None

    def _without_url(self, text: str) -> str:
        return text if self._url is None else text.replace(self._url, "***")


@contextmanager
def notifying(store: RunStore) -> Iterator[Notifier]:
    """A notifier for the run, which also tells how the block ends.

    RunFolderError where the user has not allowed the command that it would run.
    """
    config = store.config()
    allowed_command(config.notify.command, f"{store.root}/sweep.yaml")
    notifier = Notifier(store, config.notify, config.name)
    try:
        yield notifier
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = Interrupted.exit_code if interrupted else getattr(error, "exit_code", 1)
        known = isinstance(error, FoldraceError | OSError)
        text = message_line(str(error)) if known else type(error).__name__
        notifier.ended(code, text)
        raise
    notifier.ended(0)
