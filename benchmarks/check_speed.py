"""How long `foldrace check` takes where there are very many small images.

120,000 JPEGs of 32 px, all different, 1,000 of them for training. `check` reads each, decodes it to
its end and compares it with the others. The peer does the first part of that alone: Pillow decodes
each file and ImageHash makes its perceptual hash, in as many processes as there are cores. Both
sides in turns, from a warm page cache; seconds of the clock and of all processors.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import cv2
import imagehash
import numpy as np
from harness import ROOT, Results, environment, in_turns, options
from PIL import Image

_IMAGES, _TRAINING, _SIZE = 120_000, 1_000, 32
_GOAL_SECONDS = 30
_CONFIG = """\
data: {train: train, test: test}
search: {backbones: [timm/test_resnet]}
training: {pretrained: false, image_size: 32}
"""


@dataclass(frozen=True)
class Timed:
    """What one run of a side took, in seconds."""

    clock: float
    processors: float


def _write(folder: Path, number: int) -> None:
    """The image of this number, which differs from every other one."""
    place = folder / (f"train/{'ab'[number % 2]}" if number < _TRAINING else "test")
    coarse = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    cv2.imwrite(str(place / f"{number:06d}.jpg"), cv2.resize(coarse, (_SIZE, _SIZE)))


def _hash(path: Path) -> str:
    with Image.open(path) as image:
        return str(imagehash.phash(image))


def _processors() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _timed(work: partial[object]) -> Timed:
    clock, before = time.monotonic(), _processors()
    work()
    return Timed(time.monotonic() - clock, _processors() - before)


def _check(folder: Path) -> None:
    command = [sys.executable, str(ROOT / "sweep.py"), "check", "check.yaml"]
    subprocess.run(command, cwd=folder, env=environment(), check=True, capture_output=True)


def _peer(folder: Path) -> None:
    paths = [Path(entry.path) for entry in os.scandir(folder / "test")]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        list(pool.map(_hash, paths, chunksize=256))


def main() -> None:
    given = options(__doc__)
    images, pairs = (9_000, 1) if given.quick else (_IMAGES, 3)
    results = Results("check_speed")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for place in ("train/a", "train/b", "test"):
            (folder / place).mkdir(parents=True)
        (folder / "check.yaml").write_text(_CONFIG)
        with ProcessPoolExecutor() as pool:
            list(pool.map(partial(_write, folder), range(images), chunksize=1000))
        turns = in_turns(
            lambda: _timed(partial(_check, folder)), lambda: _timed(partial(_peer, folder)), pairs
        )
    for side, runs in (("foldrace check", turns.a), ("Pillow and ImageHash", turns.b)):
        results.add(
            f"{images:,} images of {_SIZE} px",
            side=side,
            seconds=median(run.clock for run in runs),
            slowest=max(run.clock for run in runs),
            processor_seconds=median(run.processors for run in runs),
            ratio=median(turns.ratios(lambda run: run.clock)) if side == "foldrace check" else 1.0,
        )
    if not given.quick:
        clock = median(run.clock for run in turns.a)
        results.at_most("check of 120,000 images: seconds", _GOAL_SECONDS, clock)
    results.publish(given)


if __name__ == "__main__":
    main()
