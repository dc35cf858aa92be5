"""The blend by onnxruntime: `python predict.py IMAGE ...`, or `Blend(folder)(paths)`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from foldrace.export.shipped.blend_io import Path_, Prediction, main, predict, read_about


class Blend:
    """An exported blend; `file` is one of its graphs: blend.onnx, blend.fp16.onnx, ..."""

    def __init__(self, folder: Path_ = Path(__file__).parent, file: str = "blend.onnx") -> None:
        self.about = read_about(folder, "blend.json")
        self.classes: list[str] = self.about["classes"]
        known = onnxruntime.get_available_providers()
        providers = [f"{name}ExecutionProvider" for name in ("CUDA", "CPU")]
        providers = [name for name in providers if name in known]
        self.session = onnxruntime.InferenceSession(str(Path(folder) / file), providers=providers)

    def __call__(self, paths: Sequence[Path_]) -> list[Prediction]:
        """As many predictions as paths, in their order; ERROR where an image cannot be read."""
        return list(predict(paths, self.about, self.run))

    def run(
        self, squares: list[NDArray[np.uint8]], metas: list[NDArray[np.float32]]
    ) -> NDArray[np.floating]:
        """(n, C) probabilities."""
        given: dict[str, NDArray[Any]] = {f"images_{i}": s for i, s in enumerate(squares)}
        given |= {f"meta_{i}": m for i, m in enumerate(metas) if m.shape[1]}
        [prob] = self.session.run(["probabilities"], given)
        return np.asarray(prob)


if __name__ == "__main__":
    sys.exit(main(Blend))
