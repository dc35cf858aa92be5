"""The whole blend as one ONNX graph: uint8 squares in, probabilities out.

Takes an `ExportedBlend`, writes a graph in float32, with models in float16, or quantised to 8 bits.
Normalisation, temperatures, weights and the mean over folds are in the graph; its second output are
the fold models' own log-probabilities, by which OOF rows can be scored honestly.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foldrace.core.errors import EnvironmentProblem, RunFailure, message_line
from foldrace.export.blend import ExportedBlend, ExportedMember
from foldrace.export.shipped.blend_pooling import Pooling
from foldrace.trainables.data.meta_features import meta_width
from foldrace.trainables.losses import log_probs
from foldrace.trainables.models.classifier import Classifier

OPSET = 20
"""What the tests run by onnxruntime; the first with GELU as an operator of its own."""
_MOST_IN_ONE = 1_800_000_000
"""Bytes of weights in one file; protobuf ends at 2 GiB, and the rest lies beside it."""
_EXAMPLES = 2  # images that the export is traced with
Inputs = dict[str, NDArray[Any]]


def require_onnx() -> None:
    """Raise EnvironmentProblem where the packages that write and run graphs are not there."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ModuleNotFoundError as error:
        raise EnvironmentProblem.single(
            "--format onnx", f"needs the package {error.name}: pip install 'foldrace[onnx]'"
        ) from error


class _MemberModel(nn.Module):
    """One fold model, from images in [0, 1] to log-probabilities in float32."""

    def __init__(self, classifier: Classifier, activation: str, half: bool) -> None:
        super().__init__()
        self._classifier, self._activation, self._half = classifier, activation, half
        if half:
            classifier.body.half()

    def forward(self, images: Tensor, meta: Tensor | None) -> Tensor:
        """(B, C)."""
        model = self._classifier
        given = model.normalise(images)
        features = model.body(given.half() if self._half else given).float()
        if meta is not None:
            features = torch.cat([features, meta], dim=1)
        return log_probs(model.head(features), self._activation)


class BlendGraph(nn.Module):
    """The blend as a module of torch: what is exported."""

    def __init__(self, blend: ExportedBlend, half: bool) -> None:
        super().__init__()
        self._forms = [blend.forms.index(member.form) for member in blend.members]
        with_meta = _with_meta(blend)
        self._metas = [with_meta.index(f) if f in with_meta else -1 for f in self._forms]
        self._folds = blend.folds
        self._models = nn.ModuleList(
            _model(member, fold, half) for member in blend.members for fold in range(blend.folds)
        )
        arrays = {name: torch.from_numpy(a) for name, a in blend.combiner.arrays().items()}
        listed = [
            {"weight": weight, "temperature": member.record.temperature}
            for weight, member in zip(blend.combiner.weights.tolist(), blend.members, strict=True)
        ]
        repeats = blend.store.folds().repeats
        self._pooling = Pooling(blend.combiner.pooling, listed, arrays, repeats, blend.temperature)

    def forward(self, squares: list[Tensor], metas: list[Tensor]) -> tuple[Tensor, Tensor]:
        """(B, C) probabilities and (M, F, B, C) log-probabilities of (B, S, S, 3) uint8."""
        images = [each.permute(0, 3, 1, 2).float() / 255 for each in squares]
        found = []
        for i, (form, at) in enumerate(zip(self._forms, self._metas, strict=True)):
            meta = metas[at] if at >= 0 else None
            models = self._models[i * self._folds : (i + 1) * self._folds]
            found.append(torch.stack([model(images[form], meta) for model in models]))
        log_prob = torch.stack(found)
        return self._pooling(log_prob), log_prob


def _model(member: ExportedMember, fold: int, half: bool) -> _MemberModel:
    opened = member.open(fold)
    return _MemberModel(opened.module, opened.model_config.activation, half)


def input_names(blend: ExportedBlend) -> list[str]:
    """Names of the graph's inputs: `images_0`, ..., then `meta_0`, ... where there are some."""
    images = [f"images_{i}" for i in range(len(blend.forms))]
    return [*images, *(f"meta_{i}" for i in _with_meta(blend))]


def write_graph(blend: ExportedBlend, path: Path, half: bool = False) -> None:
    """Write the graph; RunFailure with the exporter's reason where it cannot be expressed."""
    require_onnx()
    graph = BlendGraph(blend, half).eval()
    squares = [torch.zeros(_EXAMPLES, f.size, f.size, 3, dtype=torch.uint8) for f in blend.forms]
    metas = [torch.zeros(_EXAMPLES, _meta_width(blend, i)) for i in _with_meta(blend)]
    batch = torch.export.Dim.DYNAMIC
    weights = sum(p.numel() * p.element_size() for p in graph.parameters())
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                graph,
                (squares, metas),
                str(path),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=input_names(blend),
                output_names=["probabilities", "log_probs"],
                dynamic_shapes=([{0: batch} for _ in squares], [{0: batch} for _ in metas]),
                external_data=weights > _MOST_IN_ONE,
            )
    except Exception as error:  # whatever a backbone's code meets in the exporter
        names = ", ".join(dict.fromkeys(m.model_config.backbone for m in blend.members))
        raise RunFailure(
            f"the blend cannot be written as ONNX ({names}): {message_line(str(error))}; "
            "`--format bundle` can, or blend again without that backbone (`ensemble DIR --exclude`)"
        ) from error


def _with_meta(blend: ExportedBlend) -> list[int]:
    """The forms that have meta features."""
    return [i for i, form in enumerate(blend.forms) if form.meta]


def quantise(source: Path, target: Path, calibration: Iterator[Inputs]) -> None:
    """Write the graph with 8-bit weights and activations of its convolutions and matrix products.

    Ranges are those that the calibration inputs reach; heads and what makes the blend of the models
    stay in float32.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quant_pre_process, quantize_static

    with tempfile.TemporaryDirectory() as folder, _quiet():
        prepared = Path(folder) / "prepared.onnx"
        large = source.stat().st_size > _MOST_IN_ONE or _data_file(source).exists()
        quant_pre_process(
            str(source), str(prepared), skip_symbolic_shape=True, save_as_external_data=large
        )
        quantize_static(
            str(prepared),
            str(target),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_kept_in_float(source),
            use_external_data_format=large,
        )


def _meta_width(blend: ExportedBlend, form: int) -> int:
    """Number of meta features of a form."""
    member = next(member for member in blend.members if member.form == blend.forms[form])
    return meta_width(member.form.meta, member.models.parts)


class _Reader:
    """Inputs one after another, as onnxruntime asks for them."""

    def __init__(self, inputs: Iterator[Inputs]) -> None:
        self._inputs = inputs

    def get_next(self) -> Inputs | None:
        return next(self._inputs, None)


def _kept_in_float(graph: Path) -> list[str]:
    """Names of the nodes of heads and of the pooling."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    return [
        node.name
        for node in model.graph.node
        for prop in node.metadata_props
        if prop.key == "namespace" and (".head" in prop.value or "_pooling" in prop.value)
    ]


def _data_file(graph: Path) -> Path:
    """The file of a large graph's weights."""
    return graph.with_name(f"{graph.name}.data")


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's own warnings and log lines are no user's business."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
