"""The race in whole sweeps: parked and stopped candidates, and a run folder that knows all there is
to know.

The trials do not train, but write made-up rows at once.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from foldrace.run_folder.records import RaceDecision
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray import tuner
from foldrace.sweep import app

pytestmark = pytest.mark.usefixtures("any_ray")
CANDIDATES, K, ETA = 12, 3, 4
DERIVED = ("leaderboard.csv", "trials.csv", "decisions.csv", "study.journal")


@pytest.fixture
def config(tiny_images: Path, tmp_path: Path) -> Path:
    path = tmp_path / "race.json"
    raw = {
        "data": {"train": str(tiny_images)},
        "folds": {"k": K},
        "search": {
            "backbones": ["timm/test_resnet"],
            "candidates": CANDIDATES,
            "sampler": "random",
        },
        "race": {"eta": ETA, "epoch_stopping": False},
        "training": {"epochs": 3, "image_size": 32, "pretrained": False},
        "resources": {"cpus_per_trial": 1, "max_concurrent": 2},
    }
    path.write_text(json.dumps(raw), encoding="utf-8")
    return path


def made_up(job: Any) -> Callable[[dict[str, Any]], None]:
    """Trials that write a model's rows at once. Candidates from the sixth on know nothing and are
    sure of it: they add nothing to any blend."""

    def trial(values: dict[str, Any]) -> None:
        import numpy as np
        from ray import tune
        from scipy.special import log_softmax

        from foldrace.run_folder.records import Oof, TrialRecord, VariantScore
        from foldrace.run_folder.store import RunStore

        store = RunStore.open(job.run)
        candidate = store.candidate(values["candidate"])
        rows = np.flatnonzero(store.folds().fold == values["fold"])
        labels, number = store.labels(), int(values["candidate"][1:])
        skill = 1.5 if number < 6 or number % 4 == 0 else -1.0
        noise = np.random.default_rng(number).normal(size=(len(labels), 3))
        log_prob = log_softmax(2 * (skill * np.eye(3)[labels] + noise), axis=1)[rows]
        true = log_prob[np.arange(len(rows)), labels[rows]]
        loss = float(-true.mean())
        score = VariantScore(
            rows=len(rows), val_logloss=loss, calibrated_logloss=loss, val_acc=0.5, epoch=0
        )
        store.save_trial(
            TrialRecord(
                candidate=values["candidate"], fold=values["fold"], status="finished",
                backbone=candidate.backbone, params=candidate.params,
                folds_hash=store.folds().hash, seed=0, variants={"raw": score}, epochs_trained=3,
            ),
            {"raw": Oof(log_prob.astype(np.float16), np.exp(true).astype(np.float32))},
            rows,
        )  # fmt: skip
        tune.report({"epoch": 2, "val_calibrated_logloss": loss})

    return trial


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def sweep(*arguments: object) -> None:
    """The blend has no weights to work with, which is its own error, after the sweep."""
    result = cli(*arguments)
    assert result.exit_code in (0, 1), f"{result.output}\n{result.exception!r}"
    failure = "".join(traceback.format_exception(result.exception)) if result.exception else ""
    assert "sweep: ended" in _log_of(Path(str(arguments[-1]))), failure


def _log_of(run: Path) -> str:
    return (run / "logs" / "application.log").read_text(encoding="utf-8")


def statuses(run: Path) -> dict[str, str]:
    return {s.candidate.candidate: s.status for s in RunStore.open(run).summaries()}


def records(run: Path) -> dict[str, tuple[int, int]]:
    """trial.json -> what changes when it is written again."""
    stats = {p: p.stat() for p in sorted(run.glob("trials/*/fold*/trial.json"))}
    return {str(p.relative_to(run)): (s.st_ino, s.st_mtime_ns) for p, s in stats.items()}


def test_a_race_that_is_resumed_from_its_records_alone(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuner, "trainable", made_up)
    run = tmp_path / "run"
    sweep("run", config, "--out", run)
    first = statuses(run)
    assert len(first) == CANDIDATES and set(first.values()) == {"complete", "stopped"}
    assert first["c0000"] == "complete"  # the first one has all its folds
    assert list(first.values()).count("complete") >= CANDIDATES / ETA

    decisions = RunStore.open(run).decisions()
    stops = [d for listed in decisions.values() for d in listed if d.action == "stop"]
    assert {d.candidate for d in stops} == {c for c, status in first.items() if status == "stopped"}
    log, table = _log_of(run), (run / "decisions.csv").read_text(encoding="utf-8").splitlines()
    for stop in stops:
        assert stop.line in log and "stopped after fold" in stop.line
        assert f"{stop.candidate} parked after fold" in log  # it has waited until the end
        assert stop.gain is not None and stop.gain_se is not None
        assert stop.complete >= 1 and stop.gain + stop.gain_se <= 0
        assert len([r for r in table if f",{stop.candidate},{stop.fold}," in r and ",stop," in r])
    assert len(table) == 1 + sum(map(len, decisions.values()))
    saved = sum(K for s in first.values() if s == "stopped") - _trials_of(run, first, "stopped")
    assert saved >= 4  # folds that were never trained

    before = records(run)
    for name in DERIVED:
        (run / name).unlink()
    complete, stopped = "trials/c0000", f"trials/{stops[0].candidate}/fold{stops[0].fold}"
    last = max(decisions["c0000"], key=lambda d: d.number).fold
    torn = [f"{complete}/fold{last}/decision.json", f"{stopped}/decision.json"]
    for name in torn:
        (run / name).write_bytes((run / name).read_bytes()[:40])
    sweep("resume", run)
    assert statuses(run) == first
    assert records(run) == before  # no finished fold ran twice
    for name in torn:
        RaceDecision.model_validate_json((run / name).read_bytes())
    for name in DERIVED:
        assert (run / name).exists(), name

    more = ("--set", "search.candidates=14", "--retry-failed")
    sweep("resume", *more, run)
    later = statuses(run)
    assert len(later) == 14 and {c: later[c] for c in first} == first
    assert {name: records(run)[name] for name in before} == before


def _trials_of(run: Path, status: dict[str, str], wanted: str) -> int:
    trials = RunStore.open(run).trials()
    return sum(status[candidate] == wanted for candidate, _ in trials)
