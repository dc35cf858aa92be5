"""The blend as one ONNX graph: the run's probabilities, by onnxruntime, Pillow and numpy alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from foldrace.core.errors import RunFailure
from foldrace.ensemble.pooling import POOLINGS
from foldrace.export.blend import open_blend
from foldrace.export.folder import new_folder
from foldrace.export.onnx_folder import HALF, INT8, PLAIN, write_onnx
from foldrace.export.onnx_graph import OPSET
from foldrace.export.parity import check_parity, draw_sample, measure
from foldrace.export.shipped.blend_pooling import Pooling
from foldrace.inference.predictor import Predictor
from tests.export.exported_runs import FORBIDDEN, MadeModel, make_run, noisy_images, run_without

MODELS = (
    MadeModel("timm/test_resnet", 0.6, 0.6),
    MadeModel("timm/test_convnext", 0.4, 1.4, 48, "mlp", resize="pad"),
)
META = ("aspect_ratio",)


class Exported:
    """A run, its ONNX folder, and some images."""

    def __init__(self, root: Path, images: Path) -> None:
        self.store = make_run(root / "run", images, MODELS, meta=META, blend_temperature=0.8)
        self.folder = root / "onnx"
        with new_folder(self.folder) as part:
            blend = open_blend(self.store, code_free=False)
            self.parity, self.measured = write_onnx(blend, part, fp16=True, int8=True, workers=1)
        self.images = root / "images"
        self.names = noisy_images(self.images)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Iterator[Exported]:
    root = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRACE_CACHE", str(root / "cache"))
        yield Exported(root, tiny_images)


def test_parity_is_measured_and_kept(exported: Exported) -> None:
    assert exported.parity.max_difference < 2e-6
    assert exported.parity.max_pixel_difference <= 1
    about = json.loads((exported.folder / "blend.json").read_text())
    assert about["parity"]["max_difference"] == exported.parity.max_difference
    assert about["opset"] == OPSET
    [opset] = [o for o in onnx.load(str(exported.folder / PLAIN)).opset_import if not o.domain]
    assert opset.version == OPSET


def test_each_form_is_measured_on_oof_rows(exported: Exported) -> None:
    plain, half, int8 = exported.measured
    assert [each.file for each in exported.measured] == [PLAIN, HALF, INT8]
    assert abs(plain.change) < 1e-5 and abs(half.change) < 0.02 and abs(int8.change) < 0.5
    assert half.bytes < 0.7 * plain.bytes and int8.bytes < half.bytes
    assert all(each.rows == 60 and each.ms_per_image > 0 for each in exported.measured)
    for each in exported.measured:
        assert (exported.folder / each.file).stat().st_size == each.bytes


def test_it_runs_without_torch_and_foldrace(exported: Exported) -> None:
    code = f"""
import json, sys
sys.path.insert(0, {str(exported.folder)!r})
from predict import Blend
found = Blend({str(exported.folder)!r})({exported.names!r})
one_by_one = [Blend()([name])[0] for name in {exported.names[:1]!r}]
print(json.dumps([[p.path, p.label, p.error, None if p.error else p.probabilities.tolist()]
                  for p in [*found, *one_by_one]]))
"""
    done = run_without((*FORBIDDEN, "torch", "timm", "pandas"), code, exported.images)
    *found, single = json.loads(done.stdout)
    assert [row[0] for row in found] == exported.names
    assert [row[0] for row in found if row[1] == "ERROR"] == ["bad.png", "missing.png"]
    readable = [exported.images / row[0] for row in found if not row[2]]
    expected = Predictor(exported.store, device="cpu").probabilities(readable)
    prob = np.array([row[3] for row in found if not row[2]])
    np.testing.assert_allclose(prob, expected, atol=0.01)  # a pixel may be off by 1 of 255
    np.testing.assert_allclose(single[3], prob[0], atol=1e-6)  # whatever the batch


def test_a_graph_of_another_blend_is_refused(
    exported: Exported, tmp_path: Path, tiny_images: Path
) -> None:
    """Parity: the same graph, while the run's own weights have become others."""
    blend = open_blend(exported.store, code_free=False)
    sample = draw_sample(blend, 16, 1)

    def run(
        squares: list[NDArray[np.uint8]], metas: list[NDArray[np.float32]]
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        count = len(squares[0])
        return sample.prob[:count] + 0.002, sample.log_probs[:, :, :count]

    assert measure(blend, sample, lambda s, m: (run(s, m)[0], run(s, m)[1] * np.nan), "", 1) is None
    with pytest.raises(RunFailure, match=r"differs from the run's blend by 0\.0.*allowed: 0\.001"):
        check_parity(blend, sample, run)


class _All(torch.nn.Module):
    """Several poolings of the same log-probabilities, in one graph."""

    def __init__(self, poolings: list[Pooling]) -> None:
        super().__init__()
        self._all = torch.nn.ModuleList(poolings)

    def forward(self, log_probs: torch.Tensor) -> list[torch.Tensor]:
        return [pooling(log_probs) for pooling in self._all]


def test_other_poolings_are_in_the_graph(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "constant": np.array([0.1]), "scales": np.array([0.5, 0.7]),
        "matrices": rng.normal(size=(1, 4, 4)), "owners": np.array([1.0]),
        "intercept": rng.normal(size=4),
    }  # fmt: skip
    members = [{"weight": 0.4, "temperature": 0.8}, {"weight": 0.6, "temperature": 1.2}]
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    poolings = _All([Pooling(name, members, tensors, 2, 0.9) for name in POOLINGS]).eval()
    log_probs = torch.log_softmax(torch.randn(2, 6, 7, 4), -1)
    path = str(tmp_path / "pooling.onnx")
    torch.onnx.export(
        poolings, (log_probs[:, :, :2],), path, dynamo=True, verbose=False, opset_version=OPSET,
        input_names=["x"], dynamic_shapes=({2: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": log_probs.numpy()})
    assert len(found) == len(POOLINGS) == 4
    for each, expected in zip(found, poolings(log_probs), strict=True):
        np.testing.assert_allclose(each, expected.numpy(), atol=2e-6)
