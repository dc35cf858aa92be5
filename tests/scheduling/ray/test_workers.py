"""What the workers of a sweep import: the package and nothing of the user's folder."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from foldrace.config.schema import ResourcesConfig
from foldrace.core.errors import EnvironmentProblem
from foldrace.scheduling.ray import tuner
from foldrace.scheduling.ray.cluster import connect, staged_package
from foldrace.search_spaces.space import build_space
from tests.conftest import TinyRun

SHADOWS = ("ensemble.py", "inference.py", "sweep.py", "experiment/__init__.py", "timm/__init__.py")


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """A user's folder with files whose names are those of packages; each fails when imported."""
    for name in SHADOWS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise RuntimeError('the file of the user was imported')\n")
    return tmp_path


PATH_AND_TIMM = """
import json
import ray
from foldrace.config.schema import ResourcesConfig
from foldrace.scheduling.ray.cluster import connect

def path_and_timm():
    import sys
    import timm
    import foldrace.trainables.trial
    return sys.path, timm.__file__

with connect(None, ResourcesConfig()):
    print(json.dumps(ray.get(ray.remote(path_and_timm).remote())))
"""


@pytest.mark.ray
@pytest.mark.slow
def test_the_users_folder_is_not_on_a_workers_path(own_folder: Path) -> None:
    """In a process of its own, which starts Ray in that folder."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", PATH_AND_TIMM],
        cwd=own_folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    path, file = json.loads(done.stdout.splitlines()[-1])
    assert str(own_folder) not in path
    assert "" not in path
    assert not Path(file).is_relative_to(own_folder)


def test_the_staged_package_imports_without_the_checkout(tmp_path: Path) -> None:
    """In a process that does not see this checkout's own foldrace."""
    copy = staged_package(tmp_path)
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "import foldrace.scheduling.ray.fold_trial, foldrace.trainables.trial\n"
        "import foldrace.reporting.report, foldrace.commands.run\n"
        "print(foldrace.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == str(copy / "__init__.py"), done.stderr
    assert not {"tests", "benchmarks", ".git", ".venv", "runs"} & {p.name for p in copy.iterdir()}


@pytest.mark.ray
@pytest.mark.slow
def test_a_worker_that_cannot_import_ends_the_sweep_and_says_so(
    real_ray: Path,
    make_tiny_run: Callable[..., TinyRun],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The driver has a module that the workers lack."""
    (tmp_path / "driver_only.py").write_text("def fold_trial(config):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    driver_only = importlib.import_module("driver_only")
    monkeypatch.setattr(tuner, "trainable", lambda job: driver_only.fold_trial)
    run = make_tiny_run()
    config = run.store.config().model_copy(
        update={"resources": ResourcesConfig(cpus_per_trial=1, max_concurrent=1)}
    )
    space, problems = build_space(config, "here")
    assert not problems
    with connect(None, config.resources) as cluster, pytest.raises(EnvironmentProblem) as caught:
        tuner.run_sweep(run.store, config, space, str(run.images), cluster, lambda progress: None)
    [problem] = caught.value.problems
    assert "cannot import" in problem.message
    assert "No module named 'driver_only'" in problem.message
    assert f"foldrace resume {run.store.root}" in problem.message
    assert run.store.trials() == {}  # nothing is booked as failed: `resume` runs it
    assert len(run.store.candidates()) == 1
