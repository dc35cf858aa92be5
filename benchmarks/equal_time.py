"""The whole sweep against what people build from Ray's parts, with equal wall time: once, for real.

digits        handwritten digits made hard (`sides/hard_digits.py`): 1,300 images
sign_digits   photos of hands (`sides/sign_photos.py`); `--data` names the folder with train.zip
              (left out without it)

Repeater      Ray Tune with Repeater(OptunaSearch(...)), TPE, all 5 folds of every candidate, mean
              loss (`sides/optuna_repeater.py`)
Foldrace      `sweep.py run` with its default race: gain, which may park first folds
Foldrace, objective: gain
              the same, whose sampler looks for what adds to the blend

All train with the product's own `run_trial`, the same backbones, space, folds and images, two fold
trials at a time, and end after the same wall time, in which everybody imports and starts Ray; ours
has its blend and report within it, too, the Repeater's come afterwards. Then `sweep.py ensemble`
blends each run folder with the same defaults, and the blend predicts images that no side has seen.
`test` is its log loss on them, `test_se` its standard error over images, `from_repeater` the
difference to the Repeater's, image by image. `fits` and `epochs` are those of fold trials that
ended within the time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from harness import ROOT, Results, environment, options
from numpy.typing import NDArray
from sides.hard_digits import test_images, write_hard_digits
from sides.sign_photos import write_sign_photos

from foldrace.core.metrics import CLIP
from foldrace.run_folder.store import RunStore

_ENDLESS = 1000  # candidates: the time is the limit
_SECONDS = 240.0  # a side
_EPOCHS = 12
_REPEATER = "Repeater"
Sides = Mapping[str, tuple[str, ...]]  # name -> what is set of the config
_OURS: Sides = {
    "Foldrace": (),
    "Foldrace, objective: gain": ("search.objective=gain",),
}


@dataclass(frozen=True)
class Data:
    """A data set, and how many seconds each side has."""

    name: str
    write: Callable[[Path], Path]
    seconds: float


@dataclass(frozen=True, eq=False)
class Ended:
    """A side's run, blended."""

    store: RunStore
    wall: float
    """Of the process that trained, from its start to its end."""
    losses: NDArray[np.float64]
    """(test images,)"""


def _ours(config: Path, run: Path, seconds: float, sets: tuple[str, ...]) -> float:
    every = (*sets, f"resources.time_budget={seconds:g}")
    words = (word for value in every for word in ("--set", value))
    return _process(str(ROOT / "sweep.py"), "run", str(config), "--out", str(run), *words)


def _repeater(config: Path, run: Path, seconds: float) -> float:
    script = ROOT / "benchmarks" / "sides" / "optuna_repeater.py"
    return _process(str(script), str(config), str(run), f"{time.time() + seconds:.1f}")


def _process(*words: str) -> float:
    """Its wall time. That nothing was complete to blend is an outcome like others."""
    started = time.perf_counter()
    command = [sys.executable, *words]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment())
    if ended.returncode != 0 and "no complete candidate" not in ended.stderr:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr}")
    return time.perf_counter() - started


def _ended(run: Path, wall: float, folder: Path) -> Ended:
    """Blended, and looked at on the test images; 1/C where no candidate is complete."""
    from foldrace.inference.predictor import Predictor

    store = RunStore.open(run)
    files, targets = test_images(folder)
    if not any(summary.status == "complete" for summary in store.summaries()):
        return Ended(store, wall, np.full(len(files), np.log(len(store.classes()))))
    _process(str(ROOT / "sweep.py"), "ensemble", str(run))
    labels = [store.classes().index(target) for target in targets]
    true = Predictor(store).probabilities(files)[np.arange(len(files)), labels]
    return Ended(store, wall, -np.log(np.maximum(true, CLIP)))


def _add(results: Results, data: Data, side: str, ended: Ended, peer: Ended) -> None:
    summaries, blend = ended.store.summaries(), ended.store.blend.record()
    trials = [trial for summary in summaries for trial in summary.trials]
    change = ended.losses - peer.losses
    results.add(
        f"{data.name}: {data.seconds:g} s a side",
        side=side,
        wall_s=ended.wall,
        candidates=len(summaries),
        complete=sum(summary.status == "complete" for summary in summaries),
        fits=len(trials),
        epochs=sum(trial.epochs_trained for trial in trials),
        members=None if blend is None else sum(member.weight > 0 for member in blend.members),
        oof=None if blend is None else blend.oof_logloss,
        crossfit=None if blend is None else blend.crossfit_logloss,
        test=float(ended.losses.mean()),
        test_se=_standard_error(ended.losses),
        from_repeater=float(change.mean()),
        from_repeater_se=_standard_error(change),
    )


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def _race(results: Results, data: Data, folder: Path, sides: Sides) -> None:
    config = data.write(folder)
    backbone = "timm/test_resnet"
    once = ("--set", "training.epochs=1")  # decodes the images and compiles what is compiled once
    _process(
        str(ROOT / "sweep.py"), "trial", str(config), "--backbone", backbone, "--fold", "0", *once
    )
    run = folder / "repeater"
    peer = _ended(run, _repeater(config, run, data.seconds), folder)
    _add(results, data, _REPEATER, peer, peer)
    for i, (side, sets) in enumerate(sides.items()):
        run = folder / f"ours{i}"
        ended = _ended(run, _ours(config, run, data.seconds, sets), folder)
        _add(results, data, side, ended, peer)
        change = float((ended.losses - peer.losses).mean())
        results.at_most(f"{data.name}: {side}, held-out loss less the Repeater's", 0.0, change)


def _data(given_folder: Path | None, quick: bool) -> list[Data]:
    if quick:
        return [Data("digits", lambda f: write_hard_digits(f, _ENDLESS, 1), 22.0)]
    found = [Data("digits", lambda f: write_hard_digits(f, _ENDLESS, _EPOCHS), _SECONDS)]
    if given_folder is not None:
        write = partial(write_sign_photos, data=given_folder, candidates=_ENDLESS, epochs=_EPOCHS)
        found.append(Data("sign_digits", write, _SECONDS))
    return found


def main() -> None:
    given = options(__doc__, data="the folder with sign_digits' train.zip")
    results = Results("equal_time")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        sides = dict(list(_OURS.items())[: 1 if given.quick else None])
        for data in _data(given.data, given.quick):
            _race(results, data, Path(folder) / data.name, sides)
    results.publish(given)


if __name__ == "__main__":
    main()
