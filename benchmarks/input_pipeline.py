"""How fast images reach a model, and what many processes of a node hold in memory together.

rate     images a second, decoded, augmented (the `used_cars_convnext` recipe: random resized crop,
         flip, rotation, colour jitter, affine, perspective) and collated to a float batch in
         [0, 1]: ours from the warm pixel cache against torchvision's ImageFolder and DataLoader,
         with the same number of loader processes. JPEGs of 500 px, crops of 224 px. Medians of
         whole epochs taken in turns, after one to warm up. The two do not give the same pixels:
         ours crops from images stored at 336 px (1.5 x 224; torchvision from all 500), does all
         geometry in one bilinear map without antialiasing and repeats the edge outside the image;
         torchvision runs one operation after another: an antialiased bilinear crop, rotation and
         affine map by nearest neighbour, perspective bilinear, black outside.
cold     what building the cache costs, once per node.
memory   readers: processes of their own that each went through the whole cache. The sum of their
         proportional set sizes (PSS), in which a shared page counts once: by how much it grows
         with each further reader, beyond what it grows with a process that opens no image source.
         A reader with pixels of its own would add the whole cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import cv2
import numpy as np
from harness import ROOT, Results, environment, in_turns, options
from sides.photos import write_photos
from sides.torchvision_loaders import PEERS
from torch import Tensor

from foldrace.config.schema import AugmentConfig, CacheConfig
from foldrace.trainables.data.loader import (
    BatchDataset,
    ShuffledBatchSampler,
    build_loader,
    to_float,
)
from foldrace.trainables.data.pixel_cache import (
    EncodedImages,
    ImageSource,
    open_images,
    stored_side,
)

_SIZE, _BATCH = 224, 64
_READERS = (2, 8)
_GOAL = "torchvision on PIL"
_OURS = "ours, pixel cache"
Epoch = Callable[[], Iterator[Tensor]]  # float batches of one pass


def _ours(source: ImageSource, workers: int) -> Epoch:
    sampler = ShuffledBatchSampler(np.arange(len(source)), _BATCH, seed=0)
    dataset = BatchDataset(source, _SIZE, AugmentConfig(policy="vehicles", flip=0.5))
    loader = build_loader(dataset, sampler, workers, pin_memory=False)

    def epoch() -> Iterator[Tensor]:
        sampler.epoch += 1
        return (to_float(batch.images) for batch in loader)

    return epoch


def _peer(name: str, folder: Path, workers: int) -> Epoch:
    loader = PEERS[name](folder, _SIZE, _BATCH, workers)
    return lambda: (images for images, _ in loader)


def _rate(epoch: Epoch) -> float:
    """Images a second."""
    images, started = 0, time.perf_counter()
    for batch in epoch():
        assert batch.shape[1:] == (3, _SIZE, _SIZE) and batch.is_floating_point()
        images += len(batch)
    return images / (time.perf_counter() - started)


def _rates(results: Results, folder: Path, files: list[Path], quick: bool) -> None:
    """Every other side in turns with ours."""
    workers, pairs = len(os.sched_getaffinity(0)), 2 if quick else 5
    jpegs = open_images(files, _SIZE, workers, CacheConfig(format="jpeg"))
    sides: dict[str, Epoch] = {name: _peer(name, folder, workers) for name in PEERS}
    sides["ours, JPEG cache"] = _ours(jpegs, workers)
    sides["ours, no cache"] = _ours(EncodedImages(files, stored_side(_SIZE)), workers)
    ours = _ours(open_images(files, _SIZE, workers), workers)
    _rate(ours)
    for name, other in sides.items():
        _rate(other)
        turns = in_turns(partial(_rate, ours), partial(_rate, other), pairs)
        ratios = turns.ratios(lambda rate: rate)
        results.add(
            f"rate: images a second against {_OURS}, {workers} workers, batches of {_BATCH}",
            side=name,
            rate=median(turns.b),
            our_rate=median(turns.a),
            ratio=median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
        )
        if name == _GOAL:
            goal = f"images a second, {_OURS} / {name}, {workers} workers"
            results.at_least(goal, 3.0, median(ratios))


def _cold(results: Results, files: list[Path]) -> None:
    workers = len(os.sched_getaffinity(0))
    read = sum(file.stat().st_size for file in files)
    for config in (CacheConfig(), CacheConfig(format="jpeg")):
        before, started = _cached_bytes(), time.perf_counter()
        open_images(files, _SIZE, workers, config, session="benchmark")
        built, again = time.perf_counter() - started, time.perf_counter()
        open_images(files, _SIZE, workers, config, session="benchmark")
        opened = time.perf_counter() - again
        results.add(
            f"cold: the cache of {len(files)} JPEGs of {read / len(files) / 1e3:.0f} kB",
            format=config.format,
            threads=workers,
            build_s=built,
            images_per_s=len(files) / built,
            kb_per_image=(_cached_bytes() - before) / len(files) / 1e3,
            open_again_ms=opened * 1e3,
        )


def _cached_bytes() -> int:
    folder = Path(os.environ["FOLDRACE_CACHE"]) / "pixels"
    return sum(file.stat().st_size for file in folder.glob("*/pixels.bin"))


def _memory(results: Results, files: list[Path]) -> None:
    pixels = _pixels_mb(files)
    growth: dict[str, float] = {}
    for side, given in (("readers", files), ("without an image source", [])):
        total: dict[int, float] = {}
        for count in _READERS:
            found = _look(given, count)
            total[count] = sum(process["pss"] for process in found) * 1024 / 1e6
            results.add(
                f"memory: processes over a cache of {pixels:.0f} MB",
                side=side,
                processes=count,
                together_mb=total[count],
                each_maps_mb=median(process["mapped"] for process in found) * 1024 / 1e6,
            )
        few, many = _READERS
        growth[side] = (total[many] - total[few]) / (many - few)
    added = growth["readers"] - growth["without an image source"]
    results.add(
        "memory: MB that each further process adds",
        reader=growth["readers"],
        without_source=growth["without an image source"],
        difference=added,
    )
    results.at_most("memory that a further reader adds / the cache", 0.05, added / pixels)


def _pixels_mb(files: list[Path]) -> float:
    source = open_images(files, _SIZE, 1)
    return sum(source.image(row).size for row in range(len(source))) / 1e6


def _look(files: Sequence[Path], count: int) -> list[dict[str, int]]:
    """Processes that each read everything, then all look at their memory while all still live."""
    command = [sys.executable, str(ROOT / "benchmarks" / "sides" / "cache_reader.py")]
    processes = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        for _ in range(count)
    ]
    checksums = _ask(processes, json.dumps({"files": [str(file) for file in files], "size": _SIZE}))
    assert len(set(checksums)) == 1
    found = [json.loads(answer) for answer in _ask(processes, "look")]
    for process in processes:
        process.communicate("end\n", timeout=60)
    return found


def _ask(processes: list[subprocess.Popen[str]], line: str) -> list[str]:
    """Tell all, then hear all."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return [process.stdout.readline() for process in processes if process.stdout is not None]


def main() -> None:
    given = options(__doc__)
    cv2.setNumThreads(0)  # as in a trial
    results = Results("input_pipeline")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        photos = Path(folder) / "photos"
        files = write_photos(photos, 256 if given.quick else 2048)
        _cold(results, files)
        _rates(results, photos, files, given.quick)
        _memory(results, files)
    results.publish(given)


if __name__ == "__main__":
    main()
