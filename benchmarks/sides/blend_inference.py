"""One side of `inference.py`, in a process of its own so that its memory is its own.

`RUN IMAGES SIDE` on the command line: predicts the images in the folder with the blend of the run,
once to warm up and once timed; prints one line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from foldrace.inference.predictor import Predictor
from foldrace.inference.run_models import FoldModel, RunModels
from foldrace.run_folder.store import RunStore

_WARM = 8  # images
_BATCH = 64
Predict = Callable[[Sequence[Path]], NDArray[np.float64]]


class _Files(Dataset[torch.Tensor]):
    """Images as a tutorial reads them: Pillow, resized, a tensor in [0, 1]."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        self._files = files
        resize = v2.Resize((size, size), antialias=True)
        self._transform = v2.Compose([v2.ToImage(), resize, v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, row: int) -> torch.Tensor:
        tensor: torch.Tensor = self._transform(Image.open(self._files[row]).convert("RGB"))
        return tensor


def _plain_loop(store: RunStore, workers: int) -> Predict:
    """Every model with a DataLoader of its own, one model after the other, then their mean."""
    record = store.blend.record()
    assert record is not None
    models = RunModels(store, torch.device("cpu"))
    opened = [
        (models.open(member.candidate, member.variant, fold), member.weight)
        for member in record.members
        for fold in range(store.fold_count)
    ]

    def predict(files: Sequence[Path]) -> NDArray[np.float64]:
        return sum((w * _of_model(m, files, workers) for m, w in opened), np.zeros(()))

    return predict


@torch.inference_mode()
def _of_model(model: FoldModel, files: Sequence[Path], workers: int) -> NDArray[np.float64]:
    data = _Files(files, model.model_config.image_size)
    loader = DataLoader(data, batch_size=_BATCH, num_workers=workers)
    return torch.cat([model.module(batch).softmax(dim=1) for batch in loader]).double().numpy()


def _sides(store: RunStore) -> dict[str, Callable[[], Predict]]:
    cores = torch.get_num_threads()
    return {
        "ours": lambda: Predictor(store, cores, device="cpu").probabilities,
        "ours, one model at a time": (
            lambda: Predictor(store, cores, device="cpu", max_memory=1).probabilities
        ),
        "plain loop": lambda: _plain_loop(store, 0),
        "plain loop, loader processes": lambda: _plain_loop(store, cores),
    }


def main() -> None:
    run, folder, side = sys.argv[1:]
    predict = _sides(RunStore.open(run))[side]()
    files = sorted(Path(folder).rglob("*.jpg"))
    predict(files[:_WARM])
    started, before = time.perf_counter(), _processor_seconds()
    prob = predict(files)
    found = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": _processor_seconds() - before,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "images": len(files),
        "threads": torch.get_num_threads(),
        "mean_entropy": float(-(prob * np.log(prob)).sum(axis=1).mean()),
    }
    print(json.dumps(found))


def _processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
