"""Students of a run's blend, by the command line: trained, listed, refused, trained once more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from tests.end_to_end.runs import Cli, Run, succeeded

pytestmark = [pytest.mark.slow]


@pytest.fixture
def copied(finished_run: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    shutil.copytree(finished_run.folder, tmp_path / "copy", copy_function=shutil.copy2)
    return Run(tmp_path / "copy", finished_run.project)


def test_students_join_the_run_and_one_is_trained_on_everything(
    copied: Run, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "more").mkdir()
    pictures = sorted(copied.project.folder.rglob("*.png"))[:3]
    for number, picture in enumerate(pictures):
        shutil.copy(picture, tmp_path / "more" / f"{number}.png")
    before = {path: path.read_bytes() for path in copied.folder.glob("trials/**/trial.json")}
    more = ("--candidates", "1", "--unlabelled", tmp_path / "more", "--refit")
    text = succeeded(cli("distill", copied.folder, *more)).output
    assert "Student c0002 of blend" in text
    assert all(path.read_bytes() == data for path, data in before.items())  # nothing is repeated
    board = copied.table("leaderboard.csv").set_index("candidate")
    assert board.loc["c0002", "status"] == "complete"
    assert board["teacher"].notna().tolist() == [name == "c0002" for name in board.index]
    [folder] = (copied.folder / "teachers").iterdir()
    folds = copied.table("folds.csv")["fold"].to_numpy()
    for fold in (0, 1):
        soft = np.load(folder / f"fold{fold}.npy").astype(np.float64)
        assert len(soft) == (folds != fold).sum() + 3  # its training rows and the unlabelled
        assert np.exp(soft).sum(axis=1) == pytest.approx(1, abs=5e-3)
    record = json.loads((folder / "teacher.json").read_text())
    assert all(m["fold"] == f["fold"] for f in record["folds"] for m in f["models"])
    with safe_open(copied.folder / "refit/c0002/model.safetensors", "np") as weights:
        assert len(list(weights.keys())) > 10
    assert copied.json("refit/c0002/refit.json")["rows"] == len(folds)


def test_another_folds_array_is_refused_before_anything_trains(copied: Run, cli: Cli) -> None:
    succeeded(cli("distill", copied.folder, "--candidates", "1"))
    [folder] = (copied.folder / "teachers").iterdir()
    shutil.copy(folder / "fold1.npy", folder / "fold0.npy")
    shutil.rmtree(copied.folder / "trials/c0002/fold0")
    result = cli("resume", copied.folder)
    assert result.exit_code == 2
    assert "whose teacher has seen labels of fold 0" in result.output


def test_a_teacher_that_has_seen_everything_makes_no_member(copied: Run, cli: Cli) -> None:
    succeeded(cli("distill", copied.folder, "--candidates", "1", "--teacher", "best-fold"))
    board = copied.table("leaderboard.csv").set_index("candidate")
    assert "optimistic" in board.loc["c0002", "teacher"]
    names = [m["candidate"] for m in copied.json("ensemble/ensemble.json")["members"]]
    assert "c0002" not in names
    refused = cli("ensemble", copied.folder, "--include", "c0002")
    assert refused.exit_code == 2 and "c0002" in refused.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backbone", "timm/test_resnett"), "test_resnett"),
        (("--teacher", "bset"), "did you mean 'best'?"),
        (("--candidates", "0"), "nothing to do"),
        (("--unlabelled", "nowhere"), "nowhere"),
        (("--set", "search.space.distill_alpha=1.5"), "distill_alpha"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_changes(
    copied: Run, cli: Cli, words: tuple[str, ...], message: str
) -> None:
    def state() -> dict[Path, bytes]:
        files = (p for p in copied.folder.rglob("*") if p.is_file() and "logs" not in p.parts)
        return {path: path.read_bytes() for path in files}

    before = state()
    result = cli("distill", copied.folder, *words)
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert state() == before
