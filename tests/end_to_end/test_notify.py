"""What a command and a webhook hear of a whole run, and that a webhook's URL is nowhere in it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from foldrace.scheduling.ray import tuner
from tests.end_to_end.runs import Cli, succeeded
from tests.pretend_tune import WorkerKilled
from tests.scheduling.webhooks import SECRET, Hook, told_to

pytestmark = pytest.mark.slow
SHORT = ("--set", "training.epochs=1", "--set", "resources.max_concurrent=1")


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    found = Hook()
    monkeypatch.setenv("HOOK", found.url)
    yield found
    found.close()


@pytest.fixture
def told(project: Any, tmp_path: Path) -> Path:
    """The file that the config's command writes to."""
    path = tmp_path / "told"
    command = f"cat >> {path}; echo >> {path}"
    project.config["notify"] = {"command": command, "webhook": "env:HOOK"}
    project.config["search"] |= {"candidates": 3}
    project.config["resources"] = {"max_failures": 0}
    return path


def with_first_words(
    monkeypatch: pytest.MonkeyPatch, candidate: str, fold: int, first: Callable[[], None]
) -> None:
    """Let a fold trial begin with a call of `first`."""
    factory = tuner.trainable

    def changed(job: Any) -> Callable[[dict[str, Any]], None]:
        real = factory(job)

        def trial(values: dict[str, Any]) -> None:
            if (values.get("candidate"), values.get("fold")) == (candidate, fold):
                first()
            real(values)

        return trial

    monkeypatch.setattr(tuner, "trainable", changed)


def killed() -> None:
    raise WorkerKilled


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_a_run_tells_of_its_blends_its_failures_and_its_end(
    project: Any, told: Path, hook: Hook, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project.folder / "run"
    with monkeypatch.context() as patch:
        with_first_words(patch, "c0001", 1, killed)
        shown = succeeded(cli("run", project.write(), "--out", run, *SHORT)).output
    events = told_to(told)
    assert events == hook.events
    kinds = [event["event"] for event in events]
    assert kinds.count("failed") == 1 and kinds[-1] == "ended" and "blend" in kinds
    failed = events[kinds.index("failed")]
    assert (failed["candidate"], failed["status"]) == ("c0001", "failed")
    losses = [event["crossfit_logloss"] for event in events if event["event"] == "blend"]
    blend = json.loads((run / "ensemble" / "ensemble.json").read_text())["crossfit_logloss"]
    assert losses == sorted(losses, reverse=True) and min(losses) == losses[-1] <= blend
    submissions = {event["submission"] for event in events if event["event"] == "blend"}
    assert submissions == {f"{run}/submission.csv"}
    assert yaml.safe_load((run / "sweep.yaml").read_text())["notify"]["webhook"] == "env:HOOK"
    assert SECRET not in shown
    files = [path for path in run.rglob("*") if path.is_file()]
    assert len(files) > 20 and not [p for p in files if SECRET.encode() in p.read_bytes()]

    before = len(events)
    succeeded(cli("resume", run))  # nothing is left to do, and what is known is no news
    assert [event["event"] for event in told_to(told)[before:]] == ["ended"]


def test_an_interrupted_run_tells_how_to_go_on(
    project: Any, told: Path, hook: Hook, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = project.folder / "run"
    with_first_words(monkeypatch, "c0000", 1, interrupt)
    assert cli("run", project.write(), "--out", run, *SHORT).exit_code == 130
    [event] = told_to(told)
    assert (event["event"], event["state"], event["exit_code"]) == ("ended", "interrupted", 130)
    assert f"foldrace resume {run}" in event["text"]


def test_a_config_with_a_url_in_it_is_refused_without_showing_it(
    project: Any, hook: Hook, cli: Cli
) -> None:
    for wrong in (hook.url, {"webhook": hook.url}, {"webhook": [hook.url]}):
        project.config["notify"] = wrong
        result = cli("check", project.write())
        assert result.exit_code == 2 and "notify" in result.stderr
        assert SECRET not in result.output + result.stderr
    project.config["notify"] = {"webhook": "env:NO_SUCH_VARIABLE"}
    run = project.folder / "run"
    result = cli("run", project.write(), "--out", run)
    assert result.exit_code == 2 and not run.exists()
    assert "the environment variable NO_SUCH_VARIABLE is not set" in result.stderr
