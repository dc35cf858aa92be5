"""What goes wrong in the middle of a sweep: killed drivers and workers, a process that cannot be
used again, Ctrl-C, the end of the time. Real Ray, real training, real signals."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import Result
from typer.testing import CliRunner

from foldrace.config.load import parse_config
from foldrace.config.schema import ResourcesConfig
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray import tuner
from foldrace.scheduling.ray.cluster import connect
from foldrace.scheduling.ray.fold_searcher import FoldSearcher
from foldrace.search_spaces.space import build_space
from foldrace.sweep import app
from foldrace.trainables.resume_state import from_bytes

pytestmark = [pytest.mark.slow, pytest.mark.ray]
ROOT = Path(__file__).resolve().parents[3]
DEADLINE = 300.0  # seconds; only a fault takes so long
CANDIDATES, K = 5, 2
RESUME_STATE = "resume.safetensors"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRACE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def cluster(cache: Path) -> Iterator[None]:
    """A local cluster for the sweeps of this process."""
    with connect(None, ResourcesConfig()):
        yield


@pytest.fixture(scope="module")
def config(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten fold trials of a second or more; suggestions do not depend on who finishes first."""
    path = tmp_path_factory.mktemp("config") / "faults.json"
    raw = {
        "data": {"train": str(tiny_images)},
        "folds": {"k": K},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": CANDIDATES,
            "sampler": "random",
        },
        "training": {"epochs": 12, "patience": 12, "image_size": 32, "pretrained": False},
        "augment": {"policy": "light"},
        "resources": {"cpus_per_trial": 1, "max_concurrent": 2, "max_failures": 1},
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def undisturbed(cluster: None, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to, but that there was no room for its images."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    result = cli("run", config, "--out", folder, "--set", "cache.max_gb=1e-6")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return folder


def test_a_warning_of_every_trial_is_logged_once(undisturbed: Path) -> None:
    for name in ("application.log", "error.log"):
        log = (undisturbed / "logs" / name).read_text(encoding="utf-8").splitlines()
        (line,) = [line for line in log if "pixel cache" in line]
        assert "WARNING" in line and "cache.max_gb" in line
    trials = RunStore.open(undisturbed).trials().values()
    assert all(line.endswith(trial.notes[0]) for trial in trials)


def oof_files(folder: Path) -> dict[str, bytes]:
    files = sorted(p for p in folder.glob("trials/*/*/*.npy"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """trial.json -> what changes when it is written again."""
    stats = {p: p.stat() for p in sorted(folder.glob("trials/*/fold*/trial.json"))}
    return {str(p.relative_to(folder)): (s.st_ino, s.st_mtime_ns) for p, s in stats.items()}


def until(condition: Callable[[], object], what: str, process: Any = None) -> Any:
    """Poll; fails after the deadline, or when the process that should bring it about is gone."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        assert process is None or process.poll() is None, f"ended before: {what}"
        time.sleep(0.02)
    raise AssertionError(f"not within {DEADLINE} s: {what}")


def start(*arguments: object) -> subprocess.Popen[str]:
    """A command line in a process group of its own, as a shell starts it."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "sweep.py"), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_killed_then_interrupted_then_resumed(
    config: Path, tmp_path: Path, undisturbed: Path
) -> None:
    run = tmp_path / "run"
    driver = start("run", config, "--out", run)
    until(lambda: len(finished(run)) >= 2, "two finished trials", driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    trainers = [p for p in family if not _is_agent(p)]
    driver.kill()
    driver.communicate()
    _, alive = psutil.wait_procs(trainers, timeout=60)
    for process in family:
        _kill(process)
    assert trainers and not alive, f"left behind: {alive}"
    after_kill = finished(run)
    assert not (run / "ensemble").exists()

    driver = start("resume", run)
    goal = len(after_kill) + 2
    until(lambda: len(finished(run)) >= goal, "two more finished trials", driver)
    os.killpg(driver.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    _, stderr = driver.communicate(timeout=DEADLINE)
    assert driver.returncode == 130, stderr
    assert f"foldrace resume {run}" in stderr and "Traceback" not in stderr
    after_interrupt = finished(run)
    assert len(after_interrupt) < CANDIDATES * K
    assert {name: after_interrupt[name] for name in after_kill} == after_kill
    assert (run / "leaderboard.csv").exists()

    result = cli("resume", run)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    after_all = finished(run)
    assert {name: after_all[name] for name in after_interrupt} == after_interrupt
    assert len(after_all) == CANDIDATES * K
    summaries = RunStore.open(run).summaries()
    assert [s.status for s in summaries] == ["complete"] * CANDIDATES
    assert oof_files(run) == oof_files(undisturbed)


def test_a_trial_killed_in_its_middle_goes_on(
    config: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """From its last saved epoch, to the same bits."""
    run = tmp_path / "run"
    often = ("--set", "training.save_every=0.001", "--set", "search.candidates=1")
    driver = start("run", config, "--out", run, *often)
    until(lambda: saved_epochs(run) >= 3, "a state after three epochs", driver)
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.communicate()
    psutil.wait_procs([p for p in family if not _is_agent(p)], timeout=60)
    for process in family:
        _kill(process)
    interrupted = {p.parent.name for p in run.glob(f"trials/c0000/*/{RESUME_STATE}")}
    assert interrupted

    result = cli("resume", run)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    for fold in interrupted:
        assert re.search(rf"c0000 {fold} goes on from epoch [1-9]", log), log
    assert not list(run.glob(f"**/*{RESUME_STATE}"))
    whole = {name: data for name, data in oof_files(undisturbed).items() if "/c0000/" in name}
    assert oof_files(run) == whole


def saved_epochs(run: Path) -> int:
    """Of the most advanced trial under way."""
    found = [0]
    for path in run.glob(f"trials/*/*/{RESUME_STATE}"):
        with contextlib.suppress(FileNotFoundError):  # its trial has just ended
            found.append(len(from_bytes(path.read_bytes())["history"]["log"]))
    return max(found)


def _is_agent(process: psutil.Process) -> bool:
    """Ray's agents of a node hold no resources, and end by themselves after a minute or two."""
    try:
        return "Agent" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()  # psutil makes sure that it is still the same process


def test_a_killed_worker_costs_one_attempt(config: Path, tmp_path: Path, undisturbed: Path) -> None:
    run, killed = tmp_path / "run", []

    def kill_one() -> None:
        until(lambda: finished(run), "a finished trial")
        worker = until(training_worker, "a worker that trains")
        worker.kill()
        killed.append(worker.pid)

    thread = threading.Thread(target=kill_one)
    thread.start()
    result = cli("run", config, "--out", run)
    thread.join()
    assert killed and result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert "is tried again" in (run / "logs" / "error.log").read_text()
    statuses = [s.status for s in RunStore.open(run).summaries()]
    assert statuses == ["complete"] * CANDIDATES
    assert oof_files(run) == oof_files(undisturbed)


def training_worker() -> psutil.Process | None:
    for process in psutil.Process().children(recursive=True):
        try:
            if process.name().startswith("ray::") and ".train" in " ".join(process.cmdline()):
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def test_a_trial_that_always_kills_its_worker(
    config: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails its candidate after `max_failures` more attempts; the others go on."""
    factory = tuner.trainable

    def with_a_killer(job: Any) -> Callable[[dict[str, Any]], None]:
        real = factory(job)

        def trial(values: dict[str, Any]) -> None:
            import os
            import signal

            if (values["candidate"], values["fold"]) == ("c0001", 0):
                with open(f"{job.run}/attempts", "a") as file:
                    file.write("x")
                os.kill(os.getpid(), signal.SIGKILL)
            real(values)

        return trial

    monkeypatch.setattr(tuner, "trainable", with_a_killer)
    run = tmp_path / "run"
    overrides = ("--set", "search.candidates=2", "--set", "training.epochs=1")
    result = cli("run", config, "--out", run, *overrides)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert (run / "attempts").read_text() == "xx"
    store = RunStore.open(run)
    assert [s.status for s in store.summaries()] == ["complete", "failed"]
    record = store.trial("c0001", 0)
    assert record is not None and "killed" in str(record.error)

    monkeypatch.setattr(tuner, "trainable", factory)
    before = finished(run)
    again = cli("resume", run)
    assert again.exit_code == 0 and finished(run) == before  # a failed trial stays as it is
    mended = cli("resume", run, "--retry-failed")
    assert mended.exit_code == 0, f"{mended.output}\n{mended.exception!r}"
    assert [s.status for s in RunStore.open(run).summaries()] == ["complete"] * 2
    kept = {name: stat for name, stat in before.items() if "c0001/fold0" not in name}
    assert kept.items() <= finished(run).items()


@pytest.mark.parametrize("max_failures", [0, 2])
def test_a_worker_that_cannot_be_reset(
    config: Path,
    tmp_path: Path,
    cluster: None,
    monkeypatch: pytest.MonkeyPatch,
    max_failures: int,
) -> None:
    """Tune then ends the next trial, which is innocent, without telling the searcher. The
    sweep finds out, and runs that trial again, whatever `max_failures` is."""
    silent: list[str] = []
    settle = FoldSearcher._settle

    def spy(self: FoldSearcher, trial_id: str, **options: bool) -> None:
        if options["silent"] and trial_id in self.flights:
            silent.append(trial_id)
        settle(self, trial_id, **options)

    monkeypatch.setattr(FoldSearcher, "_settle", spy)
    monkeypatch.setattr(tuner, "trainable", _slow_to_leave)
    sweep = parse_config(config, [f"resources.max_failures={max_failures}"]).require()
    manifest = read_manifest(sweep.data)
    store = RunStore(tmp_path / "run")
    text = folds_csv(manifest, make_folds(manifest, sweep.folds))
    store.create(sweep, text, manifest.classes)
    space, _ = build_space(sweep, "")
    with connect(None, sweep.resources) as connected:
        outcome = tuner.run_sweep(store, sweep, space, "", connected, lambda progress: None)
    assert silent, "no trial was ended silently: the fault did not happen"
    assert [s.status for s in outcome.summaries] == ["complete"] * CANDIDATES
    assert not outcome.interrupted and outcome.limit is None
    for summary in outcome.summaries:
        rows = [
            np.load(p)
            for p in (tmp_path / "run/trials").glob(f"{summary.candidate.candidate}/*/rows.npy")
        ]
        assert sorted(np.concatenate(rows)) == list(range(len(manifest)))


def _slow_to_leave(job: Any) -> Callable[[dict[str, Any]], None]:
    """Trials without training: each writes a finished trial and tells Tune that it is done; the
    very first stays on for longer than Tune waits."""

    def trial(values: dict[str, Any]) -> None:
        import time
        from pathlib import Path

        import numpy as np
        from ray import tune

        from foldrace.run_folder.records import Oof, TrialRecord, VariantScore
        from foldrace.run_folder.store import RunStore

        store = RunStore.open(job.run)
        rows = np.flatnonzero(store.folds().fold == values["fold"])
        third = np.full((len(rows), 3), 1 / 3)
        score = VariantScore(rows=len(rows), val_logloss=1.0986, val_acc=0.3, best_epoch=0)
        store.save_trial(
            TrialRecord(
                candidate=values["candidate"], fold=values["fold"], status="finished",
                backbone=values["backbone"], params=values["params"],
                folds_hash=store.folds().hash, seed=0, variants={"raw": score},
            ),
            {"raw": Oof(np.log(third).astype(np.float16), third[:, 0].astype(np.float32))},
            rows,
        )  # fmt: skip
        first = True
        try:
            Path(job.run, "first").touch(exist_ok=False)
        except FileExistsError:
            first = False
        try:
            tune.report({"done": True, "val_logloss": 1.0986})  # leaves by SystemExit
        finally:
            if first:
                time.sleep(8)

    return trial


def test_the_time_budget_ends_the_sweep(config: Path, tmp_path: Path, undisturbed: Path) -> None:
    """Exit code 1 while no candidate is complete, 0 with a blend of those that are."""
    run = tmp_path / "none"
    long = ("--set", "training.epochs=3000", "--set", "training.patience=3000")
    result = cli("run", config, "--out", run, *long, "--set", "resources.time_budget=2s")
    assert result.exit_code == 1, f"{result.output}\n{result.exception!r}"
    assert "no complete candidate" in result.stderr and "Traceback" not in result.stderr
    assert statuses(run) <= {"unfinished"}
    assert not finished(run)

    run = tmp_path / "some"
    shutil.copytree(undisturbed, run)
    started = time.monotonic()
    budget = ("--set", "resources.time_budget=0.5m", "--set", "search.candidates=1000")
    result = cli("resume", run, *budget)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert time.monotonic() - started < DEADLINE
    assert {"complete"} <= statuses(run) <= {"complete", "stopped", "unfinished"}
    assert RunStore.open(run).summaries()[-1].candidate.candidate >= f"c{CANDIDATES:04d}"


def statuses(run: Path) -> set[str]:
    """Of the leaderboard's rows."""
    lines = (run / "leaderboard.csv").read_text(encoding="utf-8").splitlines()[1:]
    return {line.split(",")[2] for line in lines}


def test_an_error_in_a_trial_is_the_users_to_read(
    config: Path, tmp_path: Path, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(job: Any) -> Callable[[dict[str, Any]], None]:
        def trial(values: dict[str, Any]) -> None:
            raise RuntimeError("the dog ate it")

        return trial

    monkeypatch.setattr(tuner, "trainable", failing)
    run = tmp_path / "run"
    result = cli("run", config, "--out", run, "--set", "search.candidates=1")
    assert result.exit_code == 1, f"{result.output}\n{result.exception!r}"
    assert "c0000 failed" in result.stderr and "--retry-failed" in result.stderr
    assert statuses(run) == {"failed"}
