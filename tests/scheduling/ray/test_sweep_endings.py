"""How a sweep books trials that end badly, and what is left at the end of its time.

Everything is real but Ray; `make test-full` has real Ray and real signals too.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from foldrace.config.load import parse_config
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.budget import Deadline
from foldrace.scheduling.ray import tuner
from foldrace.scheduling.ray.cluster import connect
from foldrace.scheduling.ray.tune_adapter import SweepSearcher
from foldrace.search_spaces.space import build_space
from foldrace.sweep import app
from tests.conftest import REAL, REAL_IN_FULL
from tests.pretend_tune import PretendRay, WorkerKilled

pytestmark = pytest.mark.slow
CANDIDATES, K = 5, 2


@pytest.fixture(scope="module")
def config(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten fold trials; suggestions do not depend on who finishes first."""
    path = tmp_path_factory.mktemp("config") / "endings.json"
    raw = {
        "data": {"train": str(tiny_images)},
        "folds": {"k": K},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": CANDIDATES,
            "sampler": "random",
        },
        "training": {"epochs": 12, "image_size": 32, "pretrained": False},
        "augment": {"policy": "light"},
        "race": {"rule": "none"},  # which fold trials there are is known beforehand
        "resources": {"cpus_per_trial": 1, "max_concurrent": 2, "max_failures": 1},
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """trial.json -> what changes when it is written again."""
    stats = {p: p.stat() for p in sorted(folder.glob("trials/*/fold*/trial.json"))}
    return {str(p.relative_to(folder)): (s.st_ino, s.st_mtime_ns) for p, s in stats.items()}


def statuses(run: Path) -> set[str]:
    """Of the leaderboard's rows."""
    lines = (run / "leaderboard.csv").read_text(encoding="utf-8").splitlines()[1:]
    return {line.split(",")[2] for line in lines}


def test_a_trial_that_always_kills_its_worker(
    config: Path, tmp_path: Path, any_ray: PretendRay | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails its candidate after `max_failures` more attempts; the others go on."""
    factory, kill = tuner.trainable, _kill if any_ray is None else _pretend_kill

    def with_a_killer(job: Any) -> Callable[[dict[str, Any]], None]:
        real = factory(job)

        def trial(values: dict[str, Any]) -> None:
            if (values["candidate"], values["fold"]) == ("c0001", 0):
                with open(f"{job.run}/attempts", "a") as file:
                    file.write("x")
                kill()
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


def _pretend_kill() -> None:
    raise WorkerKilled


def _kill() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("max_failures", "any_ray"),
    [
        (0, "pretended"),
        (2, "pretended"),
        pytest.param(0, *REAL.values, marks=REAL.marks),
        pytest.param(2, *REAL_IN_FULL.values, marks=REAL_IN_FULL.marks),
    ],
    indirect=["any_ray"],
)
def test_a_worker_that_cannot_be_reset(
    config: Path,
    tmp_path: Path,
    any_ray: PretendRay | None,
    monkeypatch: pytest.MonkeyPatch,
    max_failures: int,
) -> None:
    """Tune then ends the next trial, which is innocent, without telling the searcher. The
    sweep finds out, and runs that trial again, whatever `max_failures` is."""
    lost: list[str] = []
    end = SweepSearcher._end

    def spy(self: SweepSearcher, trial_id: str, silent: bool) -> None:
        if silent and trial_id in self._sweep.running:
            lost.append(trial_id)
        end(self, trial_id, silent)

    monkeypatch.setattr(SweepSearcher, "_end", spy)
    stays = 8.0 if any_ray is None else 0.0
    monkeypatch.setattr(tuner, "trainable", functools.partial(_slow_to_leave, stays))
    if any_ray is not None:
        monkeypatch.setattr(any_ray, "lost", _the_second())
    sweep = parse_config(config, [f"resources.max_failures={max_failures}"]).require()
    manifest = read_manifest(sweep.data)
    store = RunStore(tmp_path / "run")
    text = folds_csv(manifest, make_folds(manifest, sweep.folds))
    store.create(sweep, text, manifest.classes)
    space, _ = build_space(sweep, "")
    with connect(None, sweep.resources) as connected:
        outcome = tuner.run_sweep(store, sweep, space, "", connected, lambda progress: None)
    assert lost, "no trial was ended silently: the fault did not happen"
    assert [s.status for s in outcome.summaries] == ["complete"] * CANDIDATES
    assert not outcome.interrupted and outcome.limit is None
    for summary in outcome.summaries:
        rows = [
            np.load(p)
            for p in (tmp_path / "run/trials").glob(f"{summary.candidate.candidate}/*/rows.npy")
        ]
        assert sorted(np.concatenate(rows)) == list(range(len(manifest)))


def _the_second() -> Callable[[dict[str, Any]], bool]:
    """Says of the second trial that it is lost."""
    asked = iter([False, True])
    return lambda config: next(asked, False)


def _slow_to_leave(stays: float, job: Any) -> Callable[[dict[str, Any]], None]:
    """Trials without training: each writes a finished trial and tells Tune that it is done; the
    very first stays on, for longer than Tune waits."""

    def trial(values: dict[str, Any]) -> None:
        import time
        from pathlib import Path

        import numpy as np
        from ray import tune

        from foldrace.run_folder.records import Oof, TrialRecord, VariantScore
        from foldrace.run_folder.store import RunStore

        store = RunStore.open(job.run)
        candidate = store.candidate(values["candidate"])
        rows = np.flatnonzero(store.folds().fold == values["fold"])
        third = np.full((len(rows), 3), 1 / 3)
        score = VariantScore(
            rows=len(rows), val_logloss=1.0986, calibrated_logloss=1.0986, val_acc=0.3, epoch=0
        )
        store.save_trial(
            TrialRecord(
                candidate=values["candidate"], fold=values["fold"], status="finished",
                backbone=candidate.backbone, params=candidate.params,
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
                time.sleep(stays)

    return trial


RACE = ("--set", "race.rule=gain", "--set", "race.z=0")
RATES = (5e-3, 1e-7, 2e-7, 3e-7)


def test_the_time_budget_leaves_what_is_complete(
    config: Path, tmp_path: Path, any_ray: PretendRay | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 0 with a blend of the candidates that are complete, and others that are not."""
    run = tmp_path / "some"
    small = ("--set", "training.epochs=1")
    assert cli("run", config, "--out", run, "--set", "search.candidates=2", *small).exit_code == 0
    budget = "0.5m"
    if any_ray is not None:
        budget = "10m"
        _let_trials_take(100.0, monkeypatch)
    more = ("--set", f"resources.time_budget={budget}", "--set", "search.candidates=1000")
    result = cli("resume", run, *more, *RACE)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert {"complete"} <= statuses(run) <= {"complete", "stopped", "parked", "unfinished"}
    listed = RunStore.open(run).summaries()
    assert "c0002" <= listed[-1].candidate.candidate < "c0999"


@pytest.mark.parametrize("any_ray", ["pretended"], indirect=True)
@pytest.mark.parametrize("ending", ["the end of the time", "Ctrl-C"])
def test_parked_trials_outlive_the_end_of_a_session(
    config: Path,
    tmp_path: Path,
    any_ray: object,
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    """Later candidates hardly learn; once two are parked the session ends in the third one."""
    params: list[dict[str, float]] = [{"lr": lr} for lr in RATES]
    params[0]["batch_size"] = 3  # so many steps that it is the best by far
    points = [{"backbone": "timm/test_resnet", "params": values} for values in params]
    setup = (
        "--set", "search.sampler=list", "--set", f"search.points={json.dumps(points)}",
        "--set", "training.epochs=4", "--set", "race.reduction=2",
        "--set", "search.candidates=4", "--set", "resources.max_concurrent=1",
    )  # fmt: skip
    run, parked = tmp_path / "run", ("c0001", "c0002")
    factory = tuner.trainable

    def interrupted(job: Any) -> Callable[[dict[str, Any]], None]:
        real = factory(job)

        def trial(values: dict[str, Any]) -> None:
            if values["candidate"] == "c0003":
                if ending == "Ctrl-C":
                    os.kill(os.getpid(), signal.SIGINT)
                else:
                    monkeypatch.setattr(Deadline, "seconds_left", lambda *_: 0.0)
            real(values)

        return trial

    with monkeypatch.context() as patch:
        patch.setattr(tuner, "trainable", interrupted)
        more = ("--set", "resources.time_budget=10h") if ending != "Ctrl-C" else ()
        result = cli("run", config, "--out", run, *setup, *RACE, *more)
    monkeypatch.undo()
    assert result.exit_code == (130 if ending == "Ctrl-C" else 0), result.output
    before = {s.candidate.candidate: s.status for s in RunStore.open(run).summaries()}
    assert before.pop("c0003") == "unfinished"
    assert before == {"c0000": "complete"} | dict.fromkeys(parked, "parked")
    for name in parked:
        left = {path.name for path in (run / "trials" / name / "fold0").iterdir()}
        assert left == {"resume.pt", "train_log.csv", "rung2.safetensors", "decision.json"}
    assert not (run / "trials/c0003/fold0").exists()
    ended = finished(run)

    result = cli("resume", run, "--set", "race.rule=none", "--set", "resources.time_budget=null")
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    store = RunStore.open(run)
    assert [s.status for s in store.summaries()] == ["complete"] * len(RATES)
    assert ended.items() <= finished(run).items()
    log = (run / "logs" / "application.log").read_text(encoding="utf-8")
    for name in parked:
        assert log.count(f"{name} fold0 goes on from epoch 2") == 1
    assert log.count("goes on from epoch") == len(parked)
    assert not list(run.glob("trials/**/resume.pt"))


def _let_trials_take(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of this process goes on by so much with each trial."""
    factory, clock, ahead = tuner.trainable, time.monotonic, [0.0]

    def slower(job: Any) -> Callable[[dict[str, Any]], None]:
        real = factory(job)

        def trial(values: dict[str, Any]) -> None:
            real(values)
            ahead[0] += seconds

        return trial

    monkeypatch.setattr(tuner, "trainable", slower)
    monkeypatch.setattr(time, "monotonic", lambda: clock() + ahead[0])


def test_an_error_in_a_trial_is_the_users_to_read(
    config: Path, tmp_path: Path, any_ray: object, monkeypatch: pytest.MonkeyPatch
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
