"""A user's parts from the command line: checked with everything else, swept, kept in the run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from rich.console import Console

from foldrace.commands.plugins import open_run
from foldrace.core.plugin_files import PluginFile
from foldrace.run_folder.store import RunStore
from tests.end_to_end.runs import SAME

Cli = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def with_plugin(project: Any, example_plugin: str) -> Any:
    """A project whose config uses every part of the documentation's example."""
    own = project.folder.parent / "own parts"
    own.mkdir()
    (own / "my_parts.py").write_text(example_plugin, encoding="utf-8")
    project.config["plugins"] = ["../own parts/my_parts.py"]
    project.config["search"]["backbones"] = ["mine/tiny", "timm/test_resnet"]
    project.config["search"]["space"] |= {"optimizer": "signed"}
    project.config["training"] |= {"loss": "poly1"}
    project.config["augment"] = {
        "policy": "documents",
        "transforms": [{"foldrace.Vignette": {"strength": 0.4}}],
    }
    return project


def plugin_of(project: Any) -> Path:
    return Path(project.folder.parent / "own parts" / "my_parts.py")


TYPED = """
import json, sys
from foldrace.sweep import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["foldrace", *words]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def typed(folder: Path, *lines: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    """Command lines up to the first that fails, in one process of their own, in a folder of their
    own."""
    folder.mkdir(exist_ok=True)
    words = json.dumps([[str(word) for word in line] for line in lines])
    return subprocess.run(
        [sys.executable, "-c", TYPED, words],
        cwd=folder, env=os.environ, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_check_knows_the_parts(with_plugin: Any, cli: Cli) -> None:
    result = cli("check", with_plugin.write())
    assert result.exit_code == 0, result.output


def test_a_plugins_problems_stand_with_all_others(with_plugin: Any, cli: Cli) -> None:
    path = plugin_of(with_plugin)
    source = path.read_text(encoding="utf-8").replace('"poly1"', '"kl"')
    path.write_text(source.replace("(1 - right)", "undefined"), encoding="utf-8")
    with_plugin.config["training"]["epochs"] = 0
    with_plugin.config["plugins"].append("gone.py")
    with_plugin.config["search"]["backbones"] = ["mine/tinyy"]
    for command in ("check", "run", "augment"):
        result = cli(command, with_plugin.write())
        assert result.exit_code == 2 and "Traceback" not in result.stderr
        line = source[: source.index('Loss("kl"')].count("\n") + 1
        assert f"{path} line {line}: loss 'kl' exists already" in result.stderr
        assert "gone.py: the plugin cannot be read" in result.stderr
        assert "training.epochs" in result.stderr
        if command != "augment":
            assert "mine/tinyy: unknown backbone; did you mean mine/tiny" in result.stderr
            assert "'poly1'; did you mean" in result.stderr or "got 'poly1'" in result.stderr


def test_a_backbone_that_refuses_the_size_names_its_plugin(with_plugin: Any, cli: Cli) -> None:
    path = plugin_of(with_plugin)
    source = path.read_text(encoding="utf-8").replace(
        "    module = nn.Seq", "    {224: 1}[image_size]\n    module = nn.Seq"
    )
    path.write_text(source, encoding="utf-8")
    result = cli("check", with_plugin.write())
    line = source[: source.index("{224: 1}")].count("\n") + 1
    assert result.exit_code == 2
    assert f"mine/tiny: refuses 32 px: plugin {path} line {line}: KeyError: 32" in result.stderr


def test_a_trial_that_fails_in_a_plugin_names_it(
    with_plugin: Any, cli: Cli, tmp_path: Path
) -> None:
    path = plugin_of(with_plugin)
    source = path.read_text(encoding="utf-8")
    source = source.replace("    right = ", "    assert len(logits) < 7, 'too many'\n    right = ")
    path.write_text(source, encoding="utf-8")
    result = cli(
        "trial", with_plugin.write(), "--backbone", "mine/tiny", "--out", tmp_path / "trial"
    )
    line = source[: source.index("assert len")].count("\n") + 1
    assert result.exit_code == 1
    assert f"plugin {path} line {line}: AssertionError: too many" in result.stderr


def test_a_transform_that_fails_in_the_picture_names_its_plugin(
    with_plugin: Any, cli: Cli, tmp_path: Path
) -> None:
    path = plugin_of(with_plugin)
    source = path.read_text(encoding="utf-8")
    late = "        SEEN.append(1)\n        assert len(SEEN) < 30, 'too many'\n        y, x = "
    source = "SEEN = []\n" + source.replace("        y, x = ", late)
    path.write_text(source, encoding="utf-8")
    with_plugin.config["augment"]["transforms"] = [{"foldrace.Vignette": {"p": 1}}]
    result = cli("augment", with_plugin.write(), "--out", tmp_path / "grid.png")
    line = source[: source.index("assert len")].count("\n") + 1
    assert result.exit_code == 1
    assert f"plugin {path} line {line}: AssertionError: too many" in result.stderr


def test_an_original_that_cannot_be_read_does_not_stop_a_resume(make_tiny_run: Any) -> None:
    store = make_tiny_run(plugins=(PluginFile("own_parts", b"PARTS = []", "own_parts.py"),)).store
    unreadable = f"/{'long' * 100}/own_parts.py"  # for root too
    store.save_config(store.config().model_copy(update={"plugins": (unreadable,)}))
    shown = Console(record=True)
    assert open_run(store.root, shown)[1].files == store.plugins()
    assert shown.export_text() == ""


MORE = """
from foldrace.ensemble.pooling import mixture_fit
from foldrace.ensemble.solvers.greedy import greedy
from foldrace.ensemble.methods import Method
from foldrace.inference.tta import TTA


def few(pool, settings):
    return mixture_fit(greedy(pool.true_prob, max_rounds=1))


def fails(*arguments):
    raise KeyError("mine")


PARTS += [
    Method("few", "the best member", few),
    Method("broken", "", fails),
    TTA("mirrored", "upside down too", (lambda x: x, lambda x: x.flip(2))),
    TTA("broken", "", (fails,)),
]
"""


def _methods_and_views(run: Path, cli: Cli) -> None:
    """Those that work, and those that fail; from the run's own copy."""
    copy = run / "plugins/my_parts.py"
    before = copy.read_text(encoding="utf-8")
    copy.write_text(before + MORE, encoding="utf-8")
    line = (before + MORE).split("raise KeyError")[0].count("\n") + 1
    result = cli("ensemble", run, "--method", "few")
    assert result.exit_code == 2 and f"{copy}: is code, which would run" in result.stderr
    result = cli("ensemble", run, "--method", "few", "--trust-plugins")
    assert result.exit_code == 0, result.output
    assert len(RunStore.open(run).blend.record().members) == 1  # type: ignore[union-attr]
    assert cli("submit", run, "--tta", "mirrored").exit_code == 0
    for arguments in (("ensemble", run, "--method", "broken"), ("submit", run, "--tta", "broken")):
        result = cli(*arguments)
        assert result.exit_code == 1
        assert f"plugin {copy} line {line}: KeyError: 'mine'" in result.stderr
    copy.write_text(before, encoding="utf-8")


def numbers(submission: str) -> list[list[float]]:
    """(n, C) probabilities of a submission."""
    _, *rows = csv.reader(submission.splitlines())
    return [[float(cell) for cell in row[1:]] for row in rows]


@pytest.mark.slow
def test_run_then_use_without_the_original(
    any_ray: object,
    with_plugin: Any,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One sweep, typed in another folder, whose plugin is deleted afterwards."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = tmp_path / "run"
    result = cli("run", with_plugin.write(), "--out", run)
    assert result.exit_code == 0, result.output

    store = RunStore.open(run)
    assert [s.status for s in store.summaries()] == ["complete"] * 2
    backbones = {s.candidate.backbone for s in store.summaries()}
    assert backbones == {"mine/tiny", "timm/test_resnet"}
    record = json.loads((run / "ensemble/ensemble.json").read_text())
    prob, labels = store.blend.oof(), store.labels()
    best = np.argsort(-prob, axis=1)[:, :2]
    share = float(np.mean((best == labels[:, None]).any(axis=1)))
    expected = {"name": "top2_accuracy", "value": share, "greater_is_better": True}
    shown = record["metrics"][-1]
    error = shown.pop("se")
    assert shown == expected and (error > 0) == (0 < share < 1)
    assert "Blend, top2_accuracy" in (run / "report/index.html").read_text(encoding="utf-8")
    copy = run / "plugins/my_parts.py"
    assert copy.read_bytes() == plugin_of(with_plugin).read_bytes()

    plugin_of(with_plugin).unlink()
    image = with_plugin.folder / "test/t 0.png"
    first = (run / "submission.csv").read_text(encoding="utf-8")
    (run / "submission.csv").unlink()
    done = typed(tmp_path / "third", ("submit", run), ("predict", run, image), ("ensemble", run))
    assert done.returncode == 0, done.stdout + done.stderr
    again = numbers((run / "submission.csv").read_text(encoding="utf-8"))
    np.testing.assert_allclose(again, numbers(first), rtol=0, atol=SAME)  # with more threads
    assert "top2_accuracy" in done.stdout

    more = ("resume", run, "--set", "search.candidates=3")
    plugin_of(with_plugin).write_text("PARTS = 1", encoding="utf-8")
    result = cli(*more)
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "has changed since the run was made; the run goes on with its own copy" in said
    assert len(RunStore.open(run).trials()) == 6

    _methods_and_views(run, cli)
    result = cli("resume", run, "--set", "plugins=[]")
    assert result.exit_code == 2 and "--set plugins: cannot change" in result.stderr

    source = copy.read_text(encoding="utf-8")
    failing = source.replace("    right = ", "    assert 0\n    right = ")
    copy.write_text(failing, encoding="utf-8")
    result = cli("resume", run, "--set", "search.candidates=4", "--trust-plugins")
    line = failing.split("assert 0")[0].count("\n") + 1
    errors = [t.error for t in RunStore.open(run).trials().values() if t.status == "failed"]
    assert errors, result.output
    assert all(f"plugin {copy} line {line}: AssertionError" in str(e) for e in errors)

    copy.write_text("raise RuntimeError('damaged')", encoding="utf-8")
    result = cli("predict", run, image, "--trust-plugins")
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert f"{copy} line 1: the plugin cannot be imported" in result.stderr
