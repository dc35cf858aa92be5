"""What many tests need: a cache folder of their own, a tiny run folder with real images, a cluster
that is only pretended, and how many examples a property test draws."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from foldrace.config.schema import (
    DataConfig,
    FoldsConfig,
    ResourcesConfig,
    SearchConfig,
    SweepConfig,
)
from foldrace.core.consent import allow_plugins
from foldrace.core.plugin_files import PluginFile
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.store import RunStore

if TYPE_CHECKING:
    from tests.pretend_tune import PretendRay

ROOT = Path(__file__).resolve().parents[1]
RAY_FOLDERS = ("tests/scheduling/ray", "tests/end_to_end", "tests/cluster", "tests/commands")
TINY_CLASSES = ("blue", "green", "red")
REAL = pytest.param("real", marks=[pytest.mark.slow, pytest.mark.ray])
REAL_IN_FULL = pytest.param("real", marks=[pytest.mark.slow, pytest.mark.ray, pytest.mark.full])

settings.register_profile("full", deadline=None)
settings.register_profile("quick", max_examples=20, deadline=None)


def pytest_configure(config: pytest.Config) -> None:
    """Few examples, unless `--hypothesis-profile=full` asks for all."""
    gc.disable()  # until all is imported
    if not config.getoption("hypothesis_profile", None):
        settings.load_profile("quick")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: at the end no process waits for another one's."""
    astray = [
        item.nodeid
        for item in items
        if item.get_closest_marker("ray")
        and not any(item.path.is_relative_to(ROOT / folder) for folder in RAY_FOLDERS)
    ]
    if astray:
        raise pytest.UsageError(f"make looks for tests with Ray in {RAY_FOLDERS} alone: {astray}")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """What is there by now stays: the collector need not look at it a hundred times."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """At the end all is to be collected: libraries report the rest as leaks."""
    gc.unfreeze()


def examples(most: int) -> int:
    """How many examples a property test draws that draws `most` of them in `make test-full`."""
    few = min(most, max(most // 5, 5))
    return most if settings.get_current_profile_name() == "full" else few


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is read from or left in the user's cache."""
    folder = tmp_path / "foldrace-cache"
    monkeypatch.setenv("FOLDRACE_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True, scope="session")
def own_permissions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nothing that a test allows stays allowed on this machine."""
    folder = tmp_path_factory.mktemp("config")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No power fails here, and thousands of small files are written. What writes them, in core, is
    tried as it is."""
    with pytest.MonkeyPatch.context() as patch:
        if not request.path.is_relative_to(ROOT / "tests" / "core"):
            patch.setattr(os, "fsync", lambda file: None)
            patch.setattr(os, "sync", lambda: None)
        yield


@pytest.fixture(scope="session")
def example_plugin() -> str:
    """The plugin of docs/plugins.md."""
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def quick_charts() -> Iterator[None]:
    """Reports whose charts take half the time: coarse ones, their parts not moved apart. How charts
    look is what tests/reporting asks."""
    from matplotlib.figure import Figure

    from foldrace.reporting.charts import style

    def plain(**options: Any) -> Figure:
        return Figure(**options | {"layout": "none", "dpi": 30})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(style, "Figure", plain)
        yield


@dataclass(frozen=True)
class TinyRun:
    """A run folder and the folder of its images."""

    store: RunStore
    images: Path


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 noisy PNGs of 16 to 24 pixels, 20 in each of three folders, coloured by class."""
    root = tmp_path_factory.mktemp("tiny-images")
    rng = np.random.default_rng(0)
    for label, name in enumerate(TINY_CLASSES):
        (root / name).mkdir()
        for i in range(20):
            height, width = rng.integers(16, 25, size=2)
            pixels = rng.integers(0, 160, size=(height, width, 3))
            pixels[..., 2 - label] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")
    return root


def write_tiny_run(
    root: Path, images: Path, k: int = 3, plugins: Sequence[PluginFile] = ()
) -> TinyRun:
    """A run folder at `root`, named as it, over the tiny images."""
    config = SweepConfig(
        name=root.name,
        data=DataConfig(train=str(images)),
        folds=FoldsConfig(k=k),
        search=SearchConfig(backbones=("timm/test_vit",)),
    )
    manifest = read_manifest(config.data)
    store = RunStore(root)
    folds = folds_csv(manifest, make_folds(manifest, config.folds))
    allow_plugins(plugins)
    store.create(config, folds, manifest.classes, plugins)
    return TinyRun(store, manifest.image_root)


@pytest.fixture
def make_tiny_run(tmp_path: Path, tiny_images: Path) -> Callable[..., TinyRun]:
    """Makes run folders over the tiny images: `make_tiny_run("name", k=3)`."""

    def make(name: str = "run", k: int = 3, plugins: Sequence[PluginFile] = ()) -> TinyRun:
        return write_tiny_run(tmp_path / name, tiny_images, k, plugins)

    return make


@pytest.fixture
def tiny_run(make_tiny_run: Callable[..., TinyRun]) -> TinyRun:
    return make_tiny_run()


@pytest.fixture(scope="session")
def real_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A local cluster for all sweeps of this process that want real Ray; they use a connection
    that is there. Gives the cache of its workers."""
    from foldrace.scheduling.ray.cluster import connect

    cache = tmp_path_factory.mktemp("workers-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRACE_CACHE", str(cache))
        with connect(None, ResourcesConfig()):
            yield cache


@contextlib.contextmanager
def _cluster(request: pytest.FixtureRequest) -> Iterator[PretendRay | None]:
    """The cluster of the fixture's parameter."""
    from tests.pretend_tune import pretend_ray

    if request.param == "real":
        request.getfixturevalue("real_ray")
        yield None
        return
    with pytest.MonkeyPatch.context() as patch, pretend_ray() as pretended:
        cache = request.getfixturevalue("tmp_path_factory").mktemp("cache")
        patch.setenv("FOLDRACE_CACHE", str(cache))
        yield pretended


@pytest.fixture(scope="module", params=["pretended", REAL_IN_FULL])
def any_ray(request: pytest.FixtureRequest) -> Iterator[PretendRay | None]:
    """A cluster for the sweeps of a file: pretended, and in `make test-full` a real one too, which
    gives None."""
    with _cluster(request) as found:
        yield found


@pytest.fixture(scope="module", params=["pretended", REAL])
def both_rays(request: pytest.FixtureRequest) -> Iterator[PretendRay | None]:
    """As `any_ray`, for a file whose sweep runs on real Ray in `make test` too."""
    with _cluster(request) as found:
        yield found


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """A real HTTP server that speaks S3, with one bucket."""
    server_module = pytest.importorskip("moto.server")
    import boto3

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    endpoint = f"127.0.0.1:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=f"http://{endpoint}",
        region_name="us-east-1",
        aws_access_key_id="test",
        aws_secret_access_key="test",
    )
    client.create_bucket(Bucket="runs")
    yield endpoint
    server.stop()


@pytest.fixture
def s3_environment(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return s3_endpoint
