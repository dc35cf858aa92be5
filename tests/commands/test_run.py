"""What `run`, `check` and `resume` print and allow, without a sweep."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from foldrace.commands.check import trials_line
from foldrace.commands.finish import print_trouble
from foldrace.commands.resume import _refuse_other_changes, parse_stored
from foldrace.commands.run import run
from foldrace.config.schema import DataConfig, FoldsConfig, RaceConfig, SearchConfig, SweepConfig
from foldrace.console.terminal import Terminal
from foldrace.core.errors import RunFolderError, UserError
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateStatus,
    CandidateSummary,
    TrialRecord,
)
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.tuner import SweepOutcome


def _summary(number: int, status: CandidateStatus, error: str | None = None) -> CandidateSummary:
    record = CandidateRecord(candidate=f"c{number:04d}", backbone="b", params={})
    trial = TrialRecord(
        candidate=record.candidate, fold=0, status="failed", backbone="b", params={},
        folds_hash="h", seed=0, error=error,
    )  # fmt: skip
    return CandidateSummary(record, status, (trial,) if error else (), 2)


@pytest.mark.parametrize("name", ["../../escape", "/abs", "..", ".", " ", "a/b"])
def test_a_name_that_leads_out_of_runs_needs_an_out(name: str, tmp_path: Path) -> None:
    config = tmp_path / "sweep.json"
    keys = {"name": name, "data": {"train": "none.csv"}, "search": {"backbones": ["timm/x"]}}
    config.write_text(json.dumps(keys | {"colour": 1}))

    def problems(out: str | None) -> str:
        with pytest.raises(UserError) as error:
            run(config, out, (), None, dry_run=True, smoke=False, console=Terminal(quiet=True))
        return str(error.value)

    assert f"name: got {name!r}, which is no name for a folder in runs/" in problems(None)
    assert "colour" in problems(None)
    assert "no name for a folder" not in problems(str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def _trouble(limit: str | None, *summaries: CandidateSummary) -> list[str]:
    console = Terminal(width=200)
    with console.capture() as capture:
        print_trouble(SweepOutcome(summaries, 1.0, 2, False, limit), console)
    return capture.get().splitlines()


@pytest.mark.parametrize("status", ["stopped", "parked"])
def test_what_the_race_decides_is_no_trouble(status: CandidateStatus) -> None:
    several = [_summary(i, status) for i in range(23)]
    line = f"23 candidates {status} by the race: decisions.csv has the numbers"
    assert _trouble(None, *several, _summary(23, "complete")) == [line]
    assert _trouble(None, _summary(0, status))[0].startswith(f"1 candidate {status}")
    assert _trouble(None, _summary(0, "complete")) == []


def test_each_failed_candidate_is_one_warning() -> None:
    lines = _trouble(
        "search.fold_trials: 12 have started",
        _summary(0, "failed", "Traceback (most recent call last):\n  x\nValueError: [bold] no"),
        _summary(1, "unfinished"),
        _summary(2, "diverged"),
        _summary(3, "unfinished"),
    )
    assert lines == [
        "warning the budget ended the sweep: search.fold_trials: 12 have started",
        "warning c0002 diverged: its training loss became NaN or infinite",
        "warning c0000 failed: ValueError: [bold] no",
        "warning without all of their folds, and so not in the blend: c0001, c0003",
    ]


@pytest.mark.parametrize(
    ("rule", "fold_trials", "line"),
    [
        ("none", None, "20 candidates × 5 folds = 100 fold trials"),
        ("gain", None, "20 candidates × 5 folds, up to 100 fold trials"),
        ("none", 30, "20 candidates × 5 folds, up to 30 fold trials"),
        ("none", 300, "20 candidates × 5 folds = 100 fold trials"),
    ],
)
def test_fold_trials_of_a_plan(rule: Any, fold_trials: int | None, line: str) -> None:
    config = SweepConfig(
        name="x",
        data=DataConfig(train="t"),
        folds=FoldsConfig(k=5),
        search=SearchConfig(backbones=("b",), fold_trials=fold_trials),
        race=RaceConfig(rule=rule),
    )
    assert trials_line(config) == line


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ("search.fold_trials=100", True),
        ("search.objective=gain", True),
        ("search.min_share=0.2", True),
        ("search.points=[{backbone: timm/test_vit}]", True),
        ("search.storage=postgresql://host/name", True),
        ("race.rule=none", True),
        ("race.z=2.0", True),
        ("race.eta=2", True),
        ("race.parked_gb=1", True),
        ("resources.gpu_hours=3", True),
        ("resources.time_budget=2h", True),
        ("search.seed=1", False),
        ("search.warm_start=[/other]", True),
        ("training.epochs=7", False),
    ],
)
def test_what_resume_may_change(
    change: str, allowed: bool, make_tiny_run: Callable[..., Any]
) -> None:
    store: RunStore = make_tiny_run().store
    parsed = parse_stored(store, [change])
    assert not parsed.problems
    if allowed:
        _refuse_other_changes(store, parsed)
        return
    with pytest.raises(
        RunFolderError, match=r"cannot change in a run that exists; allowed: .*race"
    ):
        _refuse_other_changes(store, parsed)


def test_paths_given_to_resume_are_relative_to_where_it_is_typed(
    make_tiny_run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store: RunStore = make_tiny_run().store
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = parse_stored(store, ["search.warm_start=[../runs/a]"]).require()
    assert config.search.warm_start == (str(tmp_path / "runs/a"),)
    assert config.data == store.config().data
