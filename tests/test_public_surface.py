"""The package's door, its plugins' door, and what its DataFrames hold."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sklearn.metrics import log_loss

import foldrace
from foldrace import parts
from foldrace.core.errors import RunFolderError
from tests.ensemble.made_runs import CLASSES, FOLD, LABELS, add_candidate, make_run, random_prob


def test_the_public_names() -> None:
    public = {"run", "resume", "open_run", "Predictor", "greedy", "optimal", "__version__"}
    assert set(foldrace.__all__) == set(dir(foldrace)) == public
    assert all(getattr(foldrace, name) is not None for name in public)


@pytest.mark.parametrize("module", [foldrace, parts])
def test_what_a_type_checker_sees_is_what_is_there(module: ModuleType) -> None:
    [block] = [n for n in ast.parse(Path(module.__file__ or "").read_text()).body if is_typed(n)]
    typed = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == module._HOMES
    assert typed.keys() == {*module.__all__} - {"__version__"}
    for name in typed:
        assert getattr(module, name) is not None


def is_typed(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def test_a_run_as_data_frames(tmp_path: Path) -> None:
    store, prob = make_run(tmp_path / "run"), random_prob(0)
    add_candidate(store, "c0000", prob)
    add_candidate(store, "c0001", random_prob(1), folds=(0,))
    run = foldrace.open_run(tmp_path / "run")
    board = run.leaderboard()
    assert board["candidate"].tolist() == ["c0000", "c0001"]
    assert board["status"].tolist() == ["complete", "running"]
    oof = run.oof("c0000")
    assert oof["image_path"].tolist() == [f"{i}.png" for i in range(len(LABELS))]
    assert oof["fold"].tolist() == FOLD.tolist()
    assert log_loss(oof["target"], oof[list(CLASSES)]) == pytest.approx(
        -np.log(prob[np.arange(len(LABELS)), LABELS]).mean(), abs=1e-3
    )


@pytest.mark.parametrize(
    ("candidate", "variant", "message"),
    [
        ("c0001", None, "no complete candidate 'c0001'"),
        ("c0000", "ema", "c0000 has no variant 'ema'; it has raw"),
        (None, None, "ensemble"),
    ],
)
def test_predictions_that_a_run_does_not_have(
    candidate: str | None, variant: str | None, message: str, tmp_path: Path
) -> None:
    store = make_run(tmp_path / "run")
    add_candidate(store, "c0000", random_prob(0))
    add_candidate(store, "c0001", random_prob(1), folds=(0,))
    with pytest.raises(RunFolderError, match=message):
        foldrace.open_run(tmp_path / "run").oof(candidate, variant)


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="nothing"):
        foldrace.open_run(tmp_path / "nothing")
