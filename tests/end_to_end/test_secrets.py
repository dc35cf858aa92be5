"""A password in the config is in no file of a run but sweep.yaml, and in no output."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foldrace.run_folder.store import RunStore
from tests.end_to_end.runs import Cli, succeeded
from tests.pretend_tune import pretend_ray

SECRET = b"HUNTER2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def run(
    folder: Path, make_project: Callable[[Path], Any], cli: Cli
) -> Iterator[tuple[Path, dict[str, str]]]:
    """The run folder, and what each command printed. SQLite takes options that it does not know."""
    project = make_project(folder / "project")
    url = f"sqlite:///file:{folder}/study.db?uri=true&password={SECRET.decode()}"
    project.config["search"] |= {"storage": url, "candidates": 1}
    out = folder / "run"
    with pytest.MonkeyPatch.context() as patch, pretend_ray():
        patch.setenv("FOLDRACE_CACHE", str(folder / "cache"))
        config = project.write()
        yield (
            out,
            {
                "check": succeeded(cli("check", config)).output,
                "run": succeeded(cli("run", config, "--out", out)).output,
                "status": succeeded(cli("status", out)).output,
                "report": succeeded(cli("report", out)).output,
                "resume": succeeded(cli("resume", out, "--set", "search.candidates=2")).output,
            },
        )


def test_no_output_has_the_password(run: tuple[Path, dict[str, str]]) -> None:
    printed = {name: "".join(text.split()) for name, text in run[1].items()}  # lines are wrapped
    assert [name for name, text in printed.items() if SECRET.decode() in text] == []
    assert "env:NAME" in printed["check"] and "password=***" in printed["check"]


def test_no_file_but_the_config_has_it(run: tuple[Path, dict[str, str]], folder: Path) -> None:
    out, _ = run
    files = [path for path in folder.rglob("*") if path.is_file()]
    holding = {path for path in files if SECRET in path.read_bytes()}
    given = folder / "project"
    assert {path for path in holding if given not in path.parents} == {out / "sweep.yaml"}
    assert (out / "report" / "index.html").exists() and (out / "logs" / "application.log").exists()
    assert (folder / "study.db").stat().st_size > 0  # the password's value reached the database


def test_the_config_with_it_is_for_its_user_alone(run: tuple[Path, dict[str, str]]) -> None:
    out, _ = run
    config = RunStore.open(out).config()
    assert mode(out / "sweep.yaml") == 0o600  # after `resume` wrote it again, too
    search = config.search.model_copy(update={"storage": None})
    plain = out.with_name("plain")
    RunStore(plain).save_config(config.model_copy(update={"search": search}))
    assert mode(plain / "sweep.yaml") == mode(out / "classes.json")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    "storage",
    [
        "postgresql//u:HUNTER2@h",
        ["postgresql://u:HUNTER2@h/d"],
        "nosuch://h/d?sslpassword=HUNTER2",
        "postgresql://u:HUNTER2@h:port/d",
    ],
)
def test_a_wrong_storage_is_told_without_it(project: Any, cli: Cli, storage: object) -> None:
    project.config["search"]["storage"] = storage
    result = cli("check", project.write())
    assert result.exit_code == 2 and "search.storage" in result.output
    assert SECRET.decode() not in result.output
    result = cli("check", project.write(), "--set", f"search.storage={json.dumps(storage)}")
    assert result.exit_code == 2 and SECRET.decode() not in result.output


@pytest.mark.parametrize(
    "url", ["s3://AKIA:HUNTER2@bucket/run", "s3://b/run?secret_key=HUNTER2", "ftp://u:HUNTER2@h"]
)
def test_a_run_folder_whose_address_has_a_key_is_refused(cli: Cli, url: str) -> None:
    result = cli("status", url)
    assert result.exit_code == 2 and SECRET.decode() not in result.output
    assert "AWS_SECRET_ACCESS_KEY" in result.output or "of no kind" in result.output


def test_a_storage_in_the_environment(
    project: Any, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.config["search"]["storage"] = "env:STUDY_URL"
    monkeypatch.delenv("STUDY_URL", raising=False)
    result = cli("check", project.write())
    assert result.exit_code == 2
    assert "search.storage: got env:STUDY_URL, but the environment variable" in result.output
    url = f"sqlite:///file:{tmp_path}/study.db?uri=true&password=HUNTER2"
    monkeypatch.setenv("STUDY_URL", url)
    result = succeeded(cli("run", project.write(), "--out", tmp_path / "run"))
    assert SECRET.decode() not in result.output and "has a password" not in result.output
    assert SECRET not in (tmp_path / "run" / "sweep.yaml").read_bytes()
    assert (tmp_path / "study.db").stat().st_size > 0
