"""One sweep with repeated folds, from the command line to the submission, checked by means over the
trials' own files; then extended, and changed in ways that are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss

import foldrace
from tests.end_to_end.runs import KEPT, Cli, Run, succeeded
from tests.pretend_tune import pretend_ray

K, REPEATS = 2, 2
ALL = range(K * REPEATS)
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def repeated(
    tmp_path_factory: pytest.TempPathFactory, make_project: Callable[[Path], Any], cli: Cli
) -> Run:
    """Two candidates of two repeats of two folds; never changed."""
    root = tmp_path_factory.mktemp("repeated")
    project = make_project(root / "my project")
    project.config["data"]["group_column"] = "farm"
    project.config["folds"] = {"k": K, "repeats": REPEATS}
    with pytest.MonkeyPatch.context() as patch, pretend_ray():
        patch.setenv("FOLDRACE_CACHE", str(root / "cache"))
        result = succeeded(cli("run", project.write(), "--out", root / "run"))
    assert "2 candidates × 2 folds × 2 repeats = 8 fold trials" in " ".join(result.stdout.split())
    return Run(root / "run", project)


def splits(run: Run) -> NDArray[np.int64]:
    """(R, n)"""
    return run.table("folds.csv")[["fold", "fold_r1"]].to_numpy().T


def test_every_fold_of_every_repeat_is_one_trial(repeated: Run) -> None:
    folds = splits(repeated)
    assert [sorted(set(split)) for split in folds.tolist()] == [[0, 1], [2, 3]]
    assert (folds[0] + K != folds[1]).any()
    groups = repeated.table("folds.csv")["group"]
    for split in folds:
        assert len(set(zip(groups, split, strict=True))) == groups.nunique()
    trials = repeated.table("trials.csv")
    assert sorted(zip(trials["candidate"], trials["fold"], strict=True)) == [
        (name, fold) for name in ("c0000", "c0001") for fold in ALL
    ]
    seeds = set()
    for fold in ALL:
        rows = np.load(repeated.folder / f"trials/c0000/fold{fold}/rows.npy")
        assert sorted(rows) == np.flatnonzero(folds[fold // K] == fold).tolist()
        seeds.add(repeated.json(f"trials/c0000/fold{fold}/trial.json")["seed"])
    assert len(seeds) == len(ALL)


def of_files(run: Run, member: dict[str, Any], repeat: int | None = None) -> Floats:
    """(n, C) OOF of a member, the mean over its repeats."""
    suffix = "" if member["variant"] == "raw" else f"_{member['variant']}"
    total = np.zeros((len(run.labels()), len(run.classes)))
    wanted = ALL if repeat is None else range(repeat * K, repeat * K + K)
    for fold in wanted:
        folder = run.folder / "trials" / member["candidate"] / f"fold{fold}"
        total[np.load(folder / "rows.npy")] += np.exp(
            np.load(folder / f"oof{suffix}.npy").astype(np.float64)
        )
    return np.asarray(total / total.sum(axis=1, keepdims=True))


def blended(parts: list[tuple[dict[str, Any], Floats]], temperature: float) -> Floats:
    """Each member at its temperature, weighed, at the blend's temperature."""
    total = 0.0
    for member, prob in parts:
        heated = prob ** (1 / member["temperature"])
        total = total + member["weight"] * heated / heated.sum(axis=1, keepdims=True)
    total = np.asarray(total) ** (1 / temperature)
    return np.asarray(total / total.sum(axis=1, keepdims=True))


def test_the_blend_is_of_means_over_repeats(repeated: Run) -> None:
    blend = repeated.blend
    parts = [(m, of_files(repeated, m)) for m in blend["members"]]
    prob = blended(parts, blend["blend_temperature"])
    assert blend["oof_logloss"] == pytest.approx(log_loss(repeated.labels(), prob), abs=2e-3)
    for member, own in parts:
        assert member["oof_logloss"] == pytest.approx(log_loss(repeated.labels(), own), abs=2e-3)
    run = foldrace.open_run(repeated.folder)
    name = blend["members"][0]["candidate"]
    for repeat in (0, 1):
        found = run.oof(name, "raw", repeat)[repeated.classes].to_numpy()
        expected = of_files(repeated, {"candidate": name, "variant": "raw"}, repeat)
        np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_leaderboard_has_the_mean_over_repeats_of_the_losses(repeated: Run) -> None:
    for row in repeated.table("leaderboard.csv").itertuples():
        member = {"candidate": row.candidate, "variant": row.variant}
        losses = [
            log_loss(repeated.labels(), of_files(repeated, member, repeat)) for repeat in (0, 1)
        ]
        assert row.folds_done == len(ALL)
        assert row.oof_logloss == pytest.approx(np.mean(losses), abs=2e-3)


def test_the_submission_is_the_mean_over_all_models(repeated: Run) -> None:
    """Per fold the members' means over the repeats, blended; the geometric mean over the folds."""
    blend, final = repeated.blend, []
    for fold in range(K):
        parts = []
        for member in blend["members"]:
            suffix = "" if member["variant"] == "raw" else f"_{member['variant']}"
            models = []
            for number in range(fold, K * REPEATS, K):
                folder = repeated.folder / "trials" / member["candidate"] / f"fold{number}"
                [kept] = folder.glob(f"test{suffix}-*.npy")
                models.append(np.exp(np.load(kept).astype(np.float64)))
            parts.append((member, np.asarray(np.mean(models, axis=0))))
        final.append(blended(parts, blend["blend_temperature"]))
    product = np.exp(np.mean(np.log(final), axis=0))  # in the submission's order, as what is kept
    expected = product / product.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(repeated.submission(), expected, atol=KEPT)


@pytest.fixture
def copied(repeated: Run, tmp_path: Path) -> Run:
    """A copy that a test may change."""
    shutil.copytree(repeated.folder, tmp_path / "copy", copy_function=shutil.copy2)
    return Run(tmp_path / "copy", repeated.project)


def test_resume_trains_what_is_missing_of_a_later_repeat(copied: Run, cli: Cli) -> None:
    before = {n: s for n, s in copied.trial_files().items() if n != "trials/c0001/fold3/trial.json"}
    arrays = {p.name: p.read_bytes() for p in (copied.folder / "trials/c0001/fold3").glob("*.npy")}
    shutil.rmtree(copied.folder / "trials/c0001/fold3")
    status = succeeded(cli("status", copied.folder))
    assert "7 fold trials ended" in status.stdout
    succeeded(cli("resume", copied.folder))
    after = copied.trial_files()
    assert {name: after[name] for name in before} == before and len(after) == 8
    for name in ("rows.npy", "oof.npy", "true_prob.npy"):  # the same trial as before
        again = (copied.folder / "trials/c0001/fold3" / name).read_bytes()
        assert again == arrays[name]
    page = (copied.folder / "report" / "index.html").read_text(encoding="utf-8")
    assert "2 × 2 repeats" in page


@pytest.mark.parametrize("change", ["folds.repeats=3", "folds.repeats=1"])
def test_other_repeats_are_refused(change: str, repeated: Run, cli: Cli) -> None:
    before = (repeated.folder / "sweep.yaml").read_bytes()
    result = cli("resume", repeated.folder, "--set", change)
    assert result.exit_code == 2 and "folds.repeats" in result.stderr
    assert (repeated.folder / "sweep.yaml").read_bytes() == before


def test_the_files_of_another_number_of_repeats_are_refused(copied: Run, cli: Cli) -> None:
    """sweep.yaml or folds.csv changed by hand."""
    config = copied.folder / "sweep.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("repeats: 2", "repeats: 3"), encoding="utf-8")
    result = cli("resume", copied.folder)
    assert result.exit_code == 2
    assert "folds.repeats is 3, but 8 fold trials" in " ".join(result.stderr.split())
    config.write_text(text, encoding="utf-8")
    table = copied.folder / "folds.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("".join(f"{line.rpartition(',')[0]}\n" for line in lines), encoding="utf-8")
    result = cli("ensemble", copied.folder)
    assert result.exit_code == 2 and "folds.csv" in result.stderr


def test_split_and_trial_know_the_repeats(repeated: Run, tmp_path: Path, cli: Cli) -> None:
    config = repeated.project.folder / "sweep config.json"
    result = succeeded(cli("split", config, "--out", tmp_path / "folds.csv"))
    assert "60 rows in 2 folds × 2 repeats" in " ".join(result.stdout.split())
    assert (tmp_path / "folds.csv").read_bytes() == (repeated.folder / "folds.csv").read_bytes()
    refused = cli("trial", config, "--backbone", "timm/test_resnet", "--fold", "4")
    assert refused.exit_code == 2 and "no such fold; allowed: 0 to 3" in refused.stderr
    limited = cli("check", config, "--set", "search.fold_trials=3")
    text = " ".join(limited.stderr.split())
    assert limited.exit_code == 2 and "folds.k × folds.repeats = 4 fold trials" in text
