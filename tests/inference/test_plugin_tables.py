"""Every table that a plugin may grow: its own rows pass what a plugin's row is tried with, and rows
that break the table's promise do not."""

from __future__ import annotations

import multiprocessing
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foldrace import parts
from foldrace.config.schema import AugmentConfig
from foldrace.core.metrics import METRICS
from foldrace.core.plugin_files import PluginFile
from foldrace.core.plugins import PluginTable, UnfitRow, check_plugins, load_parts
from foldrace.ensemble.methods import METHODS, Method
from foldrace.ensemble.pool import Pool
from foldrace.ensemble.pooling import ArithmeticMean, Combiner, Fit, GeometricMean, Settings, Votes
from foldrace.inference.plugins import ALL_TABLES
from foldrace.inference.tta import TTAS
from foldrace.trainables.data.augment import POLICIES
from foldrace.trainables.data.custom_transforms import CUSTOM
from foldrace.trainables.data.loader import BatchDataset, BatchRows
from foldrace.trainables.data.meta_features import META_FEATURES
from foldrace.trainables.data.pixel_cache import EncodedImages
from foldrace.trainables.losses import CLASS_WEIGHTS, LOSSES
from foldrace.trainables.models.backbones import FAMILIES, Family
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.optimizers import OPTIMIZERS
from foldrace.trainables.schedules import SCHEDULES

ROOT = Path(__file__).resolve().parents[2]
BY_NAME = {kind.table.record.__name__: kind for kind in ALL_TABLES}
ROWS = [
    pytest.param(kind, row, id=f"{kind.table.noun} {name}")
    for kind in ALL_TABLES
    if kind.table.record is not Family  # the first of timm's has a billion parameters
    for name, row in kind.table.items()
]


@pytest.mark.parametrize(("kind", "row"), ROWS)
def test_our_own_rows_are_what_a_plugins_should_be(kind: PluginTable[Any], row: Any) -> None:
    kind.try_row(row)
    assert kind.table[kind.table.name_of(row)] is row


def test_every_table_of_records_may_grow() -> None:
    """But for the libraries of transforms, where a `CustomTransformRow` adds one's own, and for
    activations, since R-Drop's divergence holds for these two."""
    tables = set[str]()
    for package in ("trainables", "ensemble", "inference", "core"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            tables |= set(re.findall(r"^[A-Z]\w+: dict\[str, ([A-Z][A-Za-z]+)\] = ", text, re.M))
            tables |= set(re.findall(r"^[A-Z]\w+ = Table\(\s*(\w+),", text, re.M))
    assert tables - BY_NAME.keys() == {"Library", "Activation"} and BY_NAME.keys() <= tables
    assert len(BY_NAME) == len(ALL_TABLES)


def test_the_guide_lists_every_kind() -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \| ", text, re.M)
    assert {name: getattr(parts, name) for name in listed} == {
        name: kind.table.record for name, kind in BY_NAME.items()
    }


def test_a_family_is_tried_with_its_first_name() -> None:
    small = replace(FAMILIES["timm"], names=lambda: ["test_resnet"])
    BY_NAME["Family"].try_row(small)


def test_a_family_of_another_size_is_left_to_the_sweeps_own() -> None:
    def only_384(name: str, pretrained: bool, drop_path: float, image_size: int) -> Any:
        assert image_size == 384
        return FAMILIES["timm"].build("test_vit", False, 0.0, image_size)

    BY_NAME["Family"].try_row(Family("own", lambda: ["a"], only_384))


def bad_body(name: str, pretrained: bool, drop_path: float, image_size: int) -> Any:
    body = FAMILIES["timm"].build("test_resnet", False, 0.0, image_size)
    return replace(body, features=7)


def _method(combiner: Combiner) -> Method:
    return replace(METHODS["greedy"], function=lambda pool, settings: Fit(combiner))


UNFIT: dict[str, tuple[Any, str]] = {
    "Loss mean": (
        replace(LOSSES["kl"], function=lambda x, t, s: x.mean()),
        "Tensor of the shape () for 6 images, should be one number per image",
    ),
    "Loss cut off": (
        replace(LOSSES["kl"], function=lambda x, t, s: x.detach().sum(1)),
        "no gradient",
    ),
    "Loss activation": (
        replace(LOSSES["kl"], activation="tanh"),
        "has the activation 'tanh'; allowed: softmax, sigmoid",
    ),
    "Loss below 0": (
        replace(LOSSES["kl"], function=lambda x, t, s: x.sum(1) - 1),
        "not below 0",
    ),
    "ClassWeights zero": (
        replace(CLASS_WEIGHTS["none"], function=lambda n, beta: 0 * n),
        "3 numbers above 0",
    ),
    "Optimizer idle": (
        replace(OPTIMIZERS["sgd"], build=lambda g, lr, m: torch.optim.SGD(g[1:], lr=lr)),
        "leaves the weights as they are",
    ),
    "Optimizer none": (replace(OPTIMIZERS["sgd"], build=lambda g, lr, m: None), "NoneType"),
    "ScheduleRow negative": (
        replace(SCHEDULES["cosine"], factor=lambda done, plan, stalls: 1.0 - done),
        "gives -18.0 after 19 updates",
    ),
    "Head width": (
        replace(HEADS["linear"], build=lambda f, c, d: torch.nn.Linear(f, c + 1)),
        "(6, 4), should have the shape (6, 3)",
    ),
    "MetaFeature width": (replace(META_FEATURES["aspect_ratio"], width=2), "2 finite numbers"),
    "Method weights": (
        replace(METHODS["greedy"], function=lambda pool, settings: pool.true_prob.mean(1)),
        "gives ndarray, should be a Fit",
    ),
    "Method shape": (_method(GeometricMean(np.ones(2))), "of shape (2,), should be one number per"),
    "Method negative": (_method(GeometricMean(np.array([1.0, -1.0, 0.0]))), "finite, >= 0"),
    "Method nobody": (_method(GeometricMean(np.zeros(3))), "not all 0"),
    "Method pooling": (
        _method(GeometricMean(np.ones(3), pooling="median")),
        "gives the pooling 'median', should be one of: arithmetic, votes, geometric, stacking",
    ),
    "Method sum": (_method(Votes(np.ones(3) / 3, constant=-9.0)), "no probabilities"),
    "CustomTransformRow floats": (
        replace(CUSTOM["UnsharpMask"], make=lambda p=1.0: lambda image, rng: image / 2),
        "(height, width, 3) uint8",
    ),
    "Family features": (
        replace(FAMILIES["timm"], names=lambda: ["a"], build=bad_body),
        "shape (2, 7), as its Encoder says",
    ),
    "Family empty": (replace(FAMILIES["timm"], names=list), "one text or more"),
    "Metric infinite": (
        replace(METRICS["accuracy"], function=lambda prob, labels: np.inf),
        "should be a finite number",
    ),
    "TTA none": (replace(TTAS["flip"], views=()), "one or more"),
    "TTA type": (
        replace(TTAS["flip"], views=(lambda images: images.half(),)),
        "gives torch.float16 in view 0, should be float32 and finite",
    ),
    "TTA infinite": (replace(TTAS["flip"], views=(lambda images: images / 0,)), "and finite"),
    "TTA size": (
        replace(TTAS["flip"], views=(lambda images: images[:, :, ::2],)),
        "changes the shape of the images in view 0",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_breaks_the_promise_is_told(case: str) -> None:
    row, message = UNFIT[case]
    with pytest.raises(UnfitRow) as caught:
        BY_NAME[case.split()[0]].try_row(row)
    assert message in str(caught.value)


def test_a_method_is_tried() -> None:
    """Weights that are no mixture are told with what they sum to."""
    greedy = METHODS["greedy"].function

    def halved(pool: Pool, settings: Settings) -> Fit:
        return Fit(ArithmeticMean(greedy(pool, settings).combiner.weights / 2))

    with pytest.raises(ValueError, match="sum to"):
        BY_NAME["Method"].try_row(replace(METHODS["greedy"], function=halved))


def test_a_policy_is_tried() -> None:
    with pytest.raises(TypeError):
        BY_NAME["Policy"].try_row(replace(POLICIES["light"], rotate="far"))


def _images(batches: BatchDataset, plan: BatchRows) -> Any:
    return batches.__getitems__(plan).images.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_have_the_plugins(
    method: str, example_plugin: str, tiny_images: Path
) -> None:
    plugin = PluginFile("my_parts", example_plugin.encode(), "my_parts.py")
    parts = load_parts([plugin], ALL_TABLES)
    config = AugmentConfig(policy="documents", transforms=({"foldrace.Vignette": {"p": 1.0}},))
    files = sorted((tiny_images / "red").iterdir())[:4]
    batches = BatchDataset(EncodedImages(files, 48), 32, config, parts=parts)
    plan = BatchRows(np.arange(4), (3, 1))
    here = _images(batches, plan)
    with multiprocessing.get_context(method).Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(_images, (batches, plan)), here)
    assert here[:, 16, 16].mean() > 1.1 * here[:, 0, 0].mean()  # dark corners


def test_the_guides_blend_method_works(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    source = text.split("```python\n")[2].split("```")[0]
    (tmp_path / "my_blend.py").write_text(source, encoding="utf-8")
    parts, problems = check_plugins([str(tmp_path / "my_blend.py")], ALL_TABLES)
    assert problems == [] and "bayes" in parts[METHODS]
