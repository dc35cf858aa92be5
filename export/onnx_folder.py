"""The blend as a folder of ONNX graphs, with code that runs them by onnxruntime.

Takes an `ExportedBlend`, fills a folder; gives how near each graph is to the run's own models.
"""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from foldrace.core.progress import tell
from foldrace.export.blend import ExportedBlend, LogProbs
from foldrace.export.folder import (
    about_blend,
    copy_code,
    write_json,
    write_requirements,
    write_sums,
)
from foldrace.export.onnx_graph import OPSET, Inputs, quantise, write_graph
from foldrace.export.parity import (
    PARITY_ROWS,
    Measured,
    Metas,
    OofSample,
    Parity,
    RunExport,
    Squares,
    check_parity,
    draw_sample,
    measure,
)

PACKAGES = ("foldrace", "torch", "timm", "torchvision", "onnx", "onnxscript", "onnxruntime")
PLAIN, HALF, INT8 = "blend.onnx", "blend.fp16.onnx", "blend.int8.onnx"
_log = logging.getLogger("foldrace")
_ROWS = 256  # OOF rows that the losses of all forms are measured on
_CALIBRATION = 64  # images, more than which change the ranges by little


def write_onnx(
    blend: ExportedBlend, folder: Path, fp16: bool, int8: bool, workers: int
) -> tuple[Parity, list[Measured]]:
    """Fill a folder; RunFailure where the graph differs from the run's models."""
    steps = 2 + fp16 + int8
    tell("Predicting OOF images by the run's models", 0, steps)
    rows = _ROWS if fp16 or int8 else PARITY_ROWS
    drawn = draw_sample(blend, rows + (_CALIBRATION if int8 else 0), workers)
    sample = drawn.part(slice(rows))
    tell(f"Writing {PLAIN}", 1, steps)
    write_graph(blend, folder / PLAIN)
    parity = check_parity(blend, sample, runner(folder / PLAIN))
    if fp16:
        tell(f"Writing {HALF}", 2, steps)
        write_graph(blend, folder / HALF, half=True)
    if int8:
        tell(f"Writing {INT8}", steps - 1, steps)
        last = drawn.part(slice(-_CALIBRATION, None))
        quantise(folder / PLAIN, folder / INT8, (named(*batch) for batch in last.batches()))
    graphs = [PLAIN, *([HALF] if fp16 else []), *([INT8] if int8 else [])]
    measured = [m for graph in graphs if (m := _measured(blend, sample, folder / graph))]
    _write_about(blend, folder, parity, measured)
    write_sums(folder)
    return parity, measured


def _measured(blend: ExportedBlend, sample: OofSample, graph: Path) -> Measured | None:
    """What a graph costs; None, and no graph any more, where its numbers are none."""
    found = measure(blend, sample, runner(graph), graph.name, _size(graph))
    if found is None:
        for file in graph.parent.glob(f"{graph.name}*"):
            file.unlink()
        _log.warning("%s is left out: some of its numbers are no finite ones", graph.name)
    return found


def runner(graph: Path) -> RunExport:
    """A function that runs a graph on the CPU."""
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])

    def run(squares: Squares, metas: Metas) -> tuple[NDArray[np.floating], LogProbs]:
        prob, log_probs = session.run(["probabilities", "log_probs"], named(squares, metas))
        return np.asarray(prob), np.asarray(log_probs)

    return run


def named(squares: Squares, metas: Metas) -> Inputs:
    """The graph's inputs by their names."""
    images: Inputs = {f"images_{i}": each for i, each in enumerate(squares)}
    return images | {f"meta_{i}": each for i, each in enumerate(metas) if each.shape[1]}


def _write_about(
    blend: ExportedBlend, folder: Path, parity: Parity, measured: list[Measured]
) -> None:
    graphs = sorted(path.name for path in folder.iterdir() if ".onnx" in path.name)
    about = about_blend(blend, PACKAGES)
    weights = zip(blend.members, blend.combiner.weights.tolist(), strict=True)
    own = {
        "opset": OPSET,
        "members": [
            {
                "candidate": member.record.candidate,
                "variant": member.record.variant,
                "backbone": member.model_config.backbone,
                "weight": weight,
                "temperature": member.record.temperature,
            }
            for member, weight in weights
        ],
        "parity": asdict(parity),
        "measured": [asdict(each) for each in measured],
        "files": graphs,
    }
    write_json(folder, "blend.json", {"format": "foldrace onnx", **about, **own})
    copy_code(folder, "onnx_predict", ("blend_io", "blend_images"))
    write_requirements(folder, ("onnxruntime", "pillow", "numpy"))


def _size(graph: Path) -> int:
    """Bytes of a graph with its weights."""
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}*"))
