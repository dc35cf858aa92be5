"""Whatever the user gets wrong: exit code 2, every problem on stderr, no traceback, nothing
written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import ray
from click.testing import Result

from foldrace.config.load import parse_config
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.store import RunStore

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]


def refused(result: Result, *texts: str) -> None:
    """Exit code 2 and a message with these texts; no crash."""
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    for text in texts:
        assert text in result.stderr, f"{text!r} is not in:\n{result.stderr}"


def edit(section: str, **values: object) -> Callable[[Any], None]:
    """A change of the config's section."""

    def change(project: Any) -> None:
        project.config.setdefault(section, {}).update(values)

    return change


def edit_csv(name: str, change: Callable[[list[list[str]]], object]) -> Callable[[Any], None]:
    """A change of a table's rows, the header being row 0."""

    def apply(project: Any) -> None:
        rows = project.rows(name)
        change(rows)
        project.save_rows(name, rows)

    return apply


def rename(row: int, column: int, cell: str) -> Callable[[list[list[str]]], None]:
    def change(rows: list[list[str]]) -> None:
        rows[row][column] = cell

    return change


def drop_column(rows: list[list[str]]) -> None:
    for row in rows:
        row.pop()


def one_rare_class(rows: list[list[str]]) -> None:
    rows[1][1] = "rare"


def truncate(name: str) -> Callable[[Any], None]:
    def change(project: Any) -> None:
        path = project.folder / name
        path.write_bytes(path.read_bytes()[:200])

    return change


def both(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(project: Any) -> None:
        for one in changes:
            one(project)

    return change


SAMPLE = "sample submission.csv"
WRONG: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "what no blend can meet": (
        edit("ensemble", method="snapshot", exclude=["c0001"], include=["c0001", "c0042"]),
        (
            "'c0042' is neither a candidate nor a backbone",
            "'c0001' is excluded by ensemble.exclude",
            "'snapshot' needs snapshots",
        ),
    ),
    "no limit of time": (edit("ensemble", max_ms_per_image=0), ("ensemble.max_ms_per_image",)),
    "unknown key": (edit("training", epoch=3), ("training.epoch", "did you mean 'epochs'?")),
    "unknown section": (edit("trainning"), ("trainning", "did you mean 'training'?")),
    "out of range": (
        edit("training", epochs=0),
        ("training.epochs", "got 0", "whole numbers 1"),
    ),
    "not a number": (
        edit("training", epochs="ten"),
        ("training.epochs", "'ten'", "a number"),
    ),
    "hyperparameter out of range": (edit("search", space={"lr": 7.0}), ("space.lr", "got 7")),
    "unknown hyperparameter": (edit("search", space={"lrr": 1e-3}), ("lrr", "'lr'", "dropout")),
    "missing CSV column": (edit("data", label_column="label"), ("no column 'label'", "target")),
    "label missing": (edit_csv("train.csv", rename(4, 1, "")), ("'target' is empty in line 5",)),
    "image missing": (
        edit_csv("train.csv", rename(4, 0, "사진 들/no 3b.png")),
        ("train.csv line 5: 사진 들/no 3b.png: missing", "but there is no 3.png"),
    ),
    "image truncated": (truncate("사진 들/no 7.png"), ("line 9: 사진 들/no 7.png: unreadable",)),
    "test image truncated": (truncate("test/t 2.png"), ("test.csv line 4: test/t 2.png: unread",)),
    "class too small": (edit_csv("train.csv", one_rare_class), ("rare (1)", "folds.k: 2")),
    "unknown class in the sample": (
        edit_csv(SAMPLE, rename(0, 2, "banana")),
        ("no class of the training data: banana", "classes without a column: 빨간 사과"),
    ),
    "missing class in the sample": (
        edit_csv(SAMPLE, drop_column),
        ("training classes without a column: green pear",),
    ),
    "unknown id in the sample": (
        edit_csv(SAMPLE, rename(1, 0, "t 99")),
        ("ids without a test image: t 99", "test images without an id"),
    ),
    "missing id in the sample": (
        edit_csv(SAMPLE, lambda rows: rows.pop()),
        ("test images without an id in it",),
    ),
    "unknown backbone": (
        edit("search", backbones=["timm/test_resnett"]),
        ("timm/test_resnett", "did you mean timm/test_resnet or"),
    ),
    "backbone given twice": (
        edit("search", backbones=["timm/test_resnet", "timm/test_resnet"]),
        ("given twice",),
    ),
    "image size that the backbone refuses": (
        both(edit("search", backbones=["torchvision/vit_b_16"]), edit("training", image_size=40)),
        ("torchvision/vit_b_16", "refuses 40 px"),
    ),
    "too many GPUs": (
        edit("resources", gpus_per_trial=99),
        ("resources.gpus_per_trial: got 99", "at most"),
    ),
    "too many CPUs": (edit("resources", cpus_per_trial=9999), ("got 9999", "at most")),
    "too many devices": (
        edit("resources", devices_per_trial=9999),
        ("resources.devices_per_trial: got 9999", "at most"),
    ),
    "a batch too small for its devices": (
        both(
            edit("resources", devices_per_trial=2),
            edit("search", space={"batch_size": {"choices": [2, 16]}}),
        ),
        ("search.space.batch_size: may be 2", "at least 4, two images a device"),
    ),
    "precision of a GPU": (
        both(edit("training", precision="fp16"), edit("resources", gpus_per_trial=0)),
        ("training.precision", "fp16"),
    ),
    "disk": (edit("search", candidates=10**9), ("GB free", "lower search.candidates")),
    "policy": (edit("augment", policy="ligth"), ("augment.policy", "did you mean 'light'?")),
    "loss": (edit("training", loss="cross_entropi"), ("training.loss", "cross_entropy")),
    "method": (edit("ensemble", method="gready"), ("ensemble.method", "did you mean 'greedy'?")),
    "no data": (edit("data", train="trein.csv"), ("trein.csv does not exist", "train.csv")),
    "no weights": (edit("training", pretrained="no.safetensors"), ("no.safetensors",)),
}


@pytest.mark.parametrize("case", WRONG)
def test_each_mistake_is_named(project: Any, tmp_path: Path, cli: Cli, case: str) -> None:
    spoil, texts = WRONG[case]
    spoil(project)
    out = tmp_path / "out"
    refused(cli("run", project.write(), "--out", out), *texts)
    assert not out.exists()


def test_several_mistakes_are_all_named_at_once(project: Any, tmp_path: Path, cli: Cli) -> None:
    cases = (
        "unknown key", "out of range", "image missing", "image truncated",
        "unknown id in the sample", "too many GPUs", "policy", "method", "unknown hyperparameter",
    )  # fmt: skip
    for case in cases:
        WRONG[case][0](project)
    edit("search", backbones=["timm/test_resnet", "timm/no_such_net"])(project)
    result = cli("run", project.write(), "--out", tmp_path / "out")
    texts = [text for case in cases for text in WRONG[case][1]]
    refused(result, *texts, "no_such_net")
    count = int(result.stderr.split(" problems:")[0])
    assert count == len([line for line in result.stderr.splitlines() if line.startswith("- ")])
    assert count >= len(cases) + 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "texts"),
    [
        ("training.epochs", ("--set training.epochs", "should look like")),
        ("training.epoch=3", ("training.epoch", "did you mean 'epochs'?")),
        ("training.epochs=[", ("--set training.epochs=[", "not valid YAML")),
        ("training.epochs=-1", ("training.epochs", "got -1")),
        ("=3", ("--set =3", "should look like")),
        ("training=3", ("training", "got 3")),
    ],
)
def test_a_bad_override(project: Any, cli: Cli, override: str, texts: tuple[str, ...]) -> None:
    refused(cli("check", project.write(), "--set", override), *texts)


def test_several_bad_overrides(project: Any, cli: Cli) -> None:
    arguments = ("--set", "training.epochs", "--set", "folds.k=0", "--set", "nothing=1")
    refused(cli("check", project.write(), *arguments), "3 problems", "folds.k", "nothing")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "data: [train"),
        ("a.json", '{"data": 1,}'),
        ("a.yaml", ""),
        ("a.yaml", "just words"),
        ("a.yaml", "data: {train: x}\ndata: {train: y}"),
        ("a.yaml", None),
    ],
)
def test_an_unreadable_config(tmp_path: Path, cli: Cli, name: str, text: str | None) -> None:
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    refused(cli("check", tmp_path / name), name)


@pytest.mark.parametrize("k", [61, 40])
def test_more_folds_than_a_class_has_images(project: Any, cli: Cli, k: int) -> None:
    result = cli("split", project.write(), "--set", f"folds.k={k}")
    refused(result, f"fewer images than folds.k: {k}", "green pear (20)", "lower folds.k")


def existing_run(project: Any, folder: Path) -> RunStore:
    config = parse_config(project.write()).require()
    manifest = read_manifest(config.data)
    store = RunStore(folder)
    text = folds_csv(manifest, make_folds(manifest, config.folds))
    store.create(config, text, manifest.classes)
    return store


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_run_folder_that_exists(project: Any, tmp_path: Path, cli: Cli) -> None:
    store = existing_run(project, tmp_path / "run")
    before = files_of(tmp_path / "run")
    same = cli("run", project.write(), "--out", store.root)
    refused(same, store.root, "exists already", f"foldrace resume {store.root}")
    other = cli("run", project.write(), "--out", store.root, "--set", "training.epochs=7")
    refused(other, "another config", "training.epochs", "--out")
    wrong = cli("run", project.write(), "--out", store.root, "--set", "training.epoch=7")
    refused(wrong, "exists already", "did you mean 'epochs'?")
    assert files_of(tmp_path / "run") == before


def test_resume_refuses_what_would_spoil_the_comparison(
    project: Any, tmp_path: Path, cli: Cli
) -> None:
    store = existing_run(project, tmp_path / "run")
    before = files_of(tmp_path / "run")
    result = cli("resume", store.root, "--set", "training.epochs=9", "--set", "folds.k=3")
    refused(result, "--set training.epochs", "--set folds.k", "search.candidates")
    refused(cli("resume", store.root, "--set", "search.backbones=[timm/nix]"), "timm/nix")
    refused(cli("resume", store.root, "--set", "resources.gpus_per_trial=99"), "got 99")
    refused(cli("resume", store.root, "--set", "ensemble.method=gready"), "'greedy'")
    after = files_of(tmp_path / "run")
    assert {name: data for name, data in after.items() if name != "logs/driver.lock"} == before


def test_resume_with_other_data(project: Any, tmp_path: Path, cli: Cli) -> None:
    store = existing_run(project, tmp_path / "run")
    project.save_rows("train.csv", project.rows("train.csv")[:-1])
    refused(cli("resume", store.root), "folds.csv", "60 images", "59")


@pytest.mark.parametrize("command", ["resume", "status", "ensemble", "submit", "predict", "report"])
def test_not_a_run_folder(tmp_path: Path, cli: Cli, command: str) -> None:
    refused(cli(command, tmp_path / "nowhere"), "nowhere", "no run folder")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("command", ["resume", "status", "report", "ensemble"])
def test_a_damaged_run_folder(project: Any, tmp_path: Path, cli: Cli, command: str) -> None:
    store = existing_run(project, tmp_path / "run")
    (tmp_path / "run" / "sweep.yaml").write_text("data: [", encoding="utf-8")
    refused(cli(command, store.root), "sweep.yaml")


def test_a_run_without_a_blend(project: Any, tmp_path: Path, cli: Cli) -> None:
    store = existing_run(project, tmp_path / "run")
    refused(cli("predict", store.root, project.folder / "test"), "no blend yet")
    refused(cli("submit", store.root), "no complete candidate to blend yet", "foldrace resume")
    nothing = cli("ensemble", store.root)
    assert nothing.exit_code == 1 and "no complete candidate" in nothing.stderr
    assert "time_budget" in nothing.stderr  # what to do; nothing has failed
    assert "error.log" not in nothing.stderr and "--retry-failed" not in nothing.stderr


def test_predict_without_a_usable_list(project: Any, tmp_path: Path, cli: Cli) -> None:
    store = existing_run(project, tmp_path / "run")
    refused(cli("predict", store.root), "no images given")
    refused(cli("predict", store.root, "--csv", tmp_path / "no.csv"), "no.csv")
    (tmp_path / "other.csv").write_text("file\na.png\n", encoding="utf-8")
    refused(cli("predict", store.root, "--csv", tmp_path / "other.csv"), "image_path", "file")


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--fold", "2"), ("--fold 2", "no such fold", "0 to 1")),
        (("--fold", "-1"), ("--fold -1", "no such fold")),
        (
            ("--backbone", "timm/test_resnett"),
            ("timm/test_resnett", "did you mean timm/test_resnet or"),
        ),
        (("--backbone", "timm/x, timm/y"), ("timm/x, timm/y",)),
    ],
)
def test_trial(
    project: Any, tmp_path: Path, cli: Cli, arguments: tuple[str, str], texts: tuple[str, ...]
) -> None:
    given = {"--backbone": "timm/test_resnet", "--fold": "0"} | {arguments[0]: arguments[1]}
    flat = [part for pair in given.items() for part in pair]
    refused(cli("trial", project.write(), *flat, "--out", tmp_path / "out"), *texts)
    assert not (tmp_path / "out").exists()


def test_addresses(project: Any, tmp_path: Path, cli: Cli) -> None:
    config, out = project.write(), tmp_path / "out"
    with patch.object(ray, "is_initialized", lambda: False):  # undone before the pretended Ray ends
        through = cli("run", config, "--out", out, "--address", "ray://localhost:10001")
        nobody = cli("run", config, "--out", out, "--address", "127.0.0.1:1")
    refused(through, "ray://", "--address auto", "ray job submit")
    refused(nobody, "127.0.0.1:1", "no Ray cluster answers", "ray start --head")
    assert not out.exists()


def test_an_unwritable_place(project: Any, tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_text("")
    refused(cli("run", project.write(), "--out", tmp_path / "file" / "run"), "cannot be written")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
def test_a_cache_of_another_user(project: Any, own_cache: Path, cli: Cli) -> None:
    (own_cache / "pixels").mkdir(parents=True)
    os.chown(own_cache / "pixels", 65534, 65534)
    project.config["search"]["candidates"] = 0  # beside it
    problems = (f"{own_cache}/pixels: is a folder of", "set FOLDRACE_CACHE", "search.candidates")
    refused(cli("check", project.write()), *problems)


def test_dry_run_and_check_write_nothing(project: Any, tmp_path: Path, cli: Cli) -> None:
    config, before = project.write(), None
    before = files_of(project.folder)
    for arguments in (("check", config), ("run", config, "--dry-run", "--out", tmp_path / "out")):
        result = cli(*arguments)
        assert result.exit_code == 0, result.output
        assert "60 images, 3 classes, 9 test images; 2 candidates × 2 folds" in " ".join(
            result.stdout.split()
        )
    assert files_of(project.folder) == before and not (tmp_path / "out").exists()


def test_split_once(project: Any, cli: Cli) -> None:
    assert cli("split", project.write()).exit_code == 0
    rows = project.rows("folds.csv")
    assert rows[0] == ["image_path", "target", "group", "fold"] and len(rows) == 61
    refused(cli("split", project.write()), "folds.csv", "exists")


@pytest.mark.slow
def test_in_a_process_of_its_own(project: Any, tmp_path: Path, cli: Cli) -> None:
    """From another folder, through the real entry point; `--debug` is for tracebacks."""
    store = existing_run(project, tmp_path / "run")
    (tmp_path / "run" / "sweep.yaml").write_text("data: [", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, ROOT / "sweep.py", "status", "run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert "run/sweep.yaml: is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Traceback" in cli("--debug", "status", store.root).stderr
