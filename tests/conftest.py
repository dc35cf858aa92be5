"""What many tests need: a cache folder of their own, and a tiny run folder with real images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.core.plugin_files import PluginFile
from foldrace.core.plugins import load
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.store import RunStore

ROOT = Path(__file__).resolve().parents[1]
TINY_CLASSES = ("blue", "green", "red")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is read from or left in the user's cache."""
    folder = tmp_path / "foldrace-cache"
    monkeypatch.setenv("FOLDRACE_CACHE", str(folder))
    return folder


@pytest.fixture
def plugins_end() -> Iterator[None]:
    """For tests that load plugins: the tables of this process are left as they were."""
    yield
    load((), ())


@pytest.fixture(scope="session")
def example_plugin() -> str:
    """The plugin of docs/plugins.md."""
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    return text.split("```python\n")[1].split("```")[0]


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


@pytest.fixture
def make_tiny_run(tmp_path: Path, tiny_images: Path) -> Callable[..., TinyRun]:
    """Makes run folders over the tiny images: `make_tiny_run("name", k=3)`."""

    def make(name: str = "run", k: int = 3, plugins: Sequence[PluginFile] = ()) -> TinyRun:
        config = SweepConfig(
            name=name,
            data=DataConfig(train=str(tiny_images)),
            folds=FoldsConfig(k=k),
            search=SearchConfig(backbones=("timm/test_vit",)),
        )
        manifest = read_manifest(config.data)
        store = RunStore(tmp_path / name)
        folds = folds_csv(manifest, make_folds(manifest, config.folds))
        store.create(config, folds, manifest.classes, plugins)
        return TinyRun(store, manifest.image_root)

    return make


@pytest.fixture
def tiny_run(make_tiny_run: Callable[..., TinyRun]) -> TinyRun:
    return make_tiny_run()


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
