"""Views that are measured, parts of a blend, zips and formats of numbers."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss
from typer.testing import CliRunner

from foldrace.core.errors import UserError
from foldrace.inference.chosen_members import only_members, part_note
from foldrace.inference.predictor import Predictor
from foldrace.inference.submission import check_float_format
from foldrace.inference.tta import TTAS
from foldrace.inference.tta_gain import TtaGain, gain_lines, measure_gains, recommended
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import Oof, VariantScore
from foldrace.run_folder.store import RunStore
from foldrace.sweep import app
from tests.ensemble.made_runs import LABELS, add_candidate, make_run, random_prob
from tests.inference.tiny_blend import K, with_blend

WEIGHTS = (0.5, 0.125, 0.375)
TEMPERATURES = (1.3, 0.8, 1.0)
FINAL = 0.9


@pytest.fixture
def scored(tmp_path: Path) -> RunStore:
    """A run whose three candidates have OOF rows."""
    store = make_run(tmp_path / "scored")
    for number in range(3):
        add_candidate(store, f"c000{number}", random_prob(number))
    return store


def record(store: RunStore, **fields: Any) -> EnsembleRecord:
    members = tuple(
        MemberRecord(candidate=f"c000{i}", variant="raw", weight=w, temperature=t)
        for i, (w, t) in enumerate(zip(WEIGHTS, TEMPERATURES, strict=True))
    )
    return EnsembleRecord(
        method="greedy", members=members, oof_logloss=1, crossfit_logloss=1, crossfit_se=0,
        certificate=0, best_single_oof_logloss=1, best_single="c0000 raw", oof_accuracy=0.5,
        single_crossfit_logloss=1, members_considered=3, candidates_considered=3,
        folds_hash=store.folds().hash, blend_temperature=FINAL, combiner="", **fields,
    )  # fmt: skip


def sharpened(prob: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    powers = prob ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("asked", "kept"), [("2", (0, 2)), ("c0001, c0002 raw", (1, 2))])
def test_a_part_of_the_blend_is_scored_by_its_oof(
    scored: RunStore, asked: str, kept: tuple[int, ...]
) -> None:
    whole = record(scored)
    part = only_members(scored, whole, asked)
    weights = np.array([WEIGHTS[i] for i in kept])
    weights /= weights.sum()
    assert [member.weight for member in part.members] == pytest.approx(weights.tolist())
    mixed = sum(
        w * sharpened(random_prob(i), TEMPERATURES[i]) for i, w in zip(kept, weights, strict=True)
    )
    expected = sharpened(np.asarray(mixed), FINAL)
    assert part.oof_logloss == pytest.approx(log_loss(LABELS, expected), abs=1e-3)  # kept: float16
    losses = -np.log(expected[np.arange(len(LABELS)), LABELS])
    assert part.crossfit_se == pytest.approx(losses.std(ddof=1) / np.sqrt(len(LABELS)), rel=1e-2)
    assert part.certificate is None and part.choice is None
    assert "2 of the blend's 3 members" in part_note(whole, part)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("0", "got 0; allowed: 1 to 3, or names"),
        ("4", "got 4; allowed: 1 to 3"),
        ("c0001,c0005,x", "2 problems|c0005"),
    ],
)
def test_members_that_are_not_there(scored: RunStore, asked: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        only_members(scored, record(scored), asked)


def test_a_stacked_blend_has_no_parts(scored: RunStore) -> None:
    with pytest.raises(UserError, match=r"by stacking, .*ensemble --max-members N"):
        only_members(scored, record(scored, pooling="stacking"), "2")


def test_gains_are_those_of_oof_rows(make_tiny_run: Callable[..., Any]) -> None:
    store = with_blend(make_tiny_run("run", k=K).store)
    gains = {gain.tta: gain for gain in measure_gains(store, 1, "cpu")}
    assert list(gains) == list(TTAS) and gains["none"].gain == 0 and gains["none"].se == 0
    labels, rows = store.labels(), np.arange(60)
    losses = {
        name: -np.log(
            Predictor(store, 1, name, "cpu").oof_probabilities(rows)[np.arange(60), labels]
        )
        for name in ("none", "multi-scale")
    }
    better = losses["none"] - losses["multi-scale"]
    assert gains["multi-scale"].gain == pytest.approx(better.mean(), abs=1e-6)
    assert gains["multi-scale"].se == pytest.approx(better.std(ddof=1) / np.sqrt(60), rel=1e-4)
    assert all(gain.rows == 60 and gain.ms_per_image > 0 for gain in gains.values())


def test_only_a_sure_gain_is_taken() -> None:
    def gain(name: str, value: float, se: float) -> TtaGain:
        return TtaGain(name, value, se, 1.0, 100)

    none, lucky = gain("none", 0.0, 0.0), gain("lucky", 0.05, 0.06)
    small, worse = gain("small", 0.01, 0.001), gain("worse", -0.2, 0.01)
    assert recommended([none, lucky, worse]) is None and recommended([]) is None
    assert recommended([none, lucky, small, worse]) is small
    lines = list(gain_lines([none, lucky, small]))
    assert lines[-1].startswith("small is taken") and "+0.0500 ± 0.0600" in lines[2]


@pytest.mark.parametrize("text", ["%d", "%.6", "6", "%.6f%.6f", "%s", "%.123f", "{:.6f}"])
def test_formats_that_are_no_numbers(text: str) -> None:
    with pytest.raises(UserError, match=r"--float-format: got .* such as %\.6f"):
        check_float_format(text)


def test_submit_with_all_of_it(
    make_tiny_run: Callable[..., Any], tiny_images: Path, tmp_path: Path
) -> None:
    store = with_blend(make_tiny_run("run", k=K).store)
    for number in range(3):
        add_oof(store, f"c000{number}", number)
    config = store.config()
    data = config.data.model_copy(update={"test": str(tiny_images / "red")})
    store.save_config(config.model_copy(update={"data": data}))
    out = tmp_path / "best.csv"
    asked = ["submit", store.root, "--members", "2", "--zip", "--prior-shift", "apply"]
    more = ["--float-format", "%.4f", "--tta", "auto", "--out", str(out)]
    done = CliRunner().invoke(app, [*asked, *more])
    assert done.exit_code == 0, done.output
    assert "2 of the blend's 3 members" in done.output and "OOF rows" in done.output
    assert zipfile.ZipFile(tmp_path / "best.zip").read("best.csv") == out.read_bytes()
    receipt = json.loads((tmp_path / "best.receipt.json").read_text())
    assert receipt["float_format"] == "%.4f" and len(receipt["members"]) == 2
    assert [row["tta"] for row in receipt["tta_tried"]] == list(TTAS)
    cells = pd.read_csv(out, dtype=str).iloc[0, 1:]
    assert all(len(cell) == 6 for cell in cells)
    log = pd.read_csv(Path(store.root) / "submissions/log.csv")
    assert "a part of the blend" in log["blend"].iloc[0]
    coarse = CliRunner().invoke(app, [*asked, "--float-format", "%.0f", "--out", f"{out}2"])
    assert coarse.exit_code == 1 and "every row sums to 1 within 0.001" in coarse.stderr
    wrong = CliRunner().invoke(app, [*asked[:5], "--prior-shift", "maybe"])
    assert wrong.exit_code == 2 and "allowed: tell, apply" in wrong.stderr


def add_oof(store: RunStore, candidate: str, seed: int) -> None:
    """OOF rows as a trial would have written them, beside the weights that are there."""
    rng = np.random.default_rng(seed)
    for fold in range(K):
        trial = store.trial(candidate, fold)
        assert trial is not None
        rows = store.folds().rows_of(fold)
        prob = rng.dirichlet(np.ones(3), len(rows)).astype(np.float32)
        true = prob[np.arange(len(rows)), store.labels()[rows]]
        oof = Oof(np.log(prob).astype(np.float16), true)
        score = VariantScore(
            rows=len(rows), val_logloss=1, calibrated_logloss=1, val_acc=0, epoch=0
        )
        weights = {"raw": store.weights(candidate, fold, "raw")}
        scored = trial.model_copy(update={"variants": {"raw": score}})
        store.save_trial(scored, {"raw": oof}, rows, weights)
