"""What our machinery costs, against doing the same work without it.

trial       `run_trial` against a bare PyTorch loop (`sides/plain_loop.py`): the same backbone,
            images, batches, MixUp, AdamW, clipping, EMA, and raw and EMA weights scored each epoch,
            one thread each. Images are decoded before for both. `run_trial` also writes its
            weights, predictions and log to the run folder; the bare loop writes nothing.
techniques  the training steps of `run_trial` (without making batches) with SAM and with R-Drop
            against those without; MixUp and EMA on.
scheduling  24 fold trials that only sleep 0.05 s, through `run_sweep` (`sides/our_tune.py`) and
            through plain Ray Tune with its Repeater (`sides/plain_tune.py`), each in a new process
            with a Ray of its own.
sweep       `sweep.py demo` for real: how much of slots x wall time the fold trials used, and what
            took the rest.

Figures of two sides are medians of runs taken in turns.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

from harness import ROOT, Results, Turns, environment, in_turns, options
from sides.demo_sweep import pieces, run_demo
from sides.digits_trial import Digits, TrialRun

from foldrace.config.ranges import Value
from foldrace.dataset.demo import write_demo

_BACKBONES = ("timm/test_resnet", "timm/test_efficientnet")
_TECHNIQUES: dict[str, dict[str, Value]] = {
    "SAM": {"sam_rho": 0.05},
    "R-Drop": {"rdrop_alpha": 1.0},
}
_SLEEP = 0.05  # seconds of a trial that only sleeps


def _trial(results: Results, quick: bool) -> None:
    epochs, pairs = (2, 3) if quick else (8, 7)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        config = write_demo(Path(folder) / "digits")
        warm, digits = Digits(config, 1), Digits(config, epochs)
        for backbone in _BACKBONES[: 1 if quick else None]:
            warm.ours(backbone)  # decodes the images, too
            warm.plain(backbone)
            runs = in_turns(partial(digits.ours, backbone), partial(digits.plain, backbone), pairs)
            ratios[backbone] = _add_trial_rows(results, backbone, epochs, runs)
    for backbone, ratio in ratios.items():
        results.at_most(f"run_trial / bare PyTorch loop, wall time, {backbone}", 1.05, ratio)


def _add_trial_rows(results: Results, backbone: str, epochs: int, runs: Turns[TrialRun]) -> float:
    """Gives the ratio of wall times."""
    wall, cpu = runs.ratios(lambda run: run.wall), runs.ratios(lambda run: run.cpu)
    results.add(
        f"trial: run_trial against a bare loop, {epochs} epochs",
        backbone=backbone,
        pairs=len(runs.a),
        ours_s=median(run.wall for run in runs.a),
        plain_s=median(run.wall for run in runs.b),
        ratio=median(wall),
        ratio_min=min(wall),
        ratio_max=max(wall),
        cpu_ratio=median(cpu),
        ours_logloss=median(run.logloss for run in runs.a),
        plain_logloss=median(run.logloss for run in runs.b),
    )
    for piece in runs.a[0].pieces:
        mine = median(run.pieces[piece] for run in runs.a)
        other = median(run.pieces.get(piece, 0.0) for run in runs.b)
        results.add(
            "trial: seconds by piece (data of run_trial measured apart)",
            backbone=backbone,
            piece=piece,
            ours_s=mine,
            plain_s=other,
            difference_s=mine - other,
        )
    return median(wall)


def _techniques(results: Results, quick: bool) -> None:
    epochs, pairs = (1, 2) if quick else (4, 5)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        config = write_demo(Path(folder) / "digits")
        Digits(config, 1).ours(_BACKBONES[0])  # decodes the images, too
        digits = Digits(config, epochs)
        for backbone in _BACKBONES[: 1 if quick else None]:
            for name, knobs in _TECHNIQUES.items():
                changed = partial(digits.ours, backbone, **knobs)
                runs = in_turns(changed, partial(digits.ours, backbone), pairs)
                ratios = runs.ratios(lambda run: run.pieces["step"])
                results.add(
                    f"techniques: training steps of {epochs} epochs against the plain ones",
                    technique=name,
                    backbone=backbone,
                    pairs=pairs,
                    step_s=median(run.pieces["step"] for run in runs.a),
                    plain_step_s=median(run.pieces["step"] for run in runs.b),
                    ratio=median(ratios),
                    ratio_min=min(ratios),
                    ratio_max=max(ratios),
                )
                goal = f"{name} step / plain step, {backbone}"
                results.at_most(goal, 2.1, median(ratios))


def _scheduling(results: Results, quick: bool) -> None:
    candidates, folds, pairs = (2, 2, 1) if quick else (8, 3, 3)
    runs = in_turns(
        partial(_fresh_process, "plain_tune", candidates, folds),
        partial(_fresh_process, "our_tune", candidates, folds),
        pairs,
    )
    for side, timings in (("Tune with Repeater", runs.a), ("run_sweep", runs.b)):
        results.add(
            f"scheduling: {candidates} candidates x {folds} folds of {_SLEEP} s",
            side=side,
            runs=len(timings),
            trials=min(int(timing["trials"]) for timing in timings),
            sweep_s=median(timing["sweep"] for timing in timings),
            ray_start_s=median(timing["ray_start"] for timing in timings),
            process_s=median(timing["process"] for timing in timings),
        )
    whole = "whole process: imports, Ray's start and end too"
    for figure, key in (("from the Tuner's start to its end", "sweep"), (whole, "process")):
        ratios = runs.ratios(lambda timing, key=key: timing[key])
        results.add(
            "scheduling: how many times faster run_sweep is",
            figure=figure,
            ratio=median(ratios),
            ratio_min=min(ratios),
            ratio_max=max(ratios),
        )
    results.at_least(
        f"Ray Tune with Repeater / run_sweep, {candidates * folds} trivial trials, Tuner start to "
        "end",
        3.0,
        median(runs.ratios(lambda timing: timing["sweep"])),
    )


def _fresh_process(side: str, candidates: int, folds: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "timing.json"
        script = ROOT / "benchmarks" / "sides" / f"{side}.py"
        given = [str(candidates), str(folds), str(_SLEEP), str(out)]
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, str(script), *given], check=True, env=environment(), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        process = time.perf_counter() - started
        timing: dict[str, float] = json.loads(out.read_text())
    finished, wanted = timing["trials"], candidates * folds
    assert finished == wanted, f"{side}: {finished} of {wanted} trials finished"
    return timing | {"process": process}


def _sweep(results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = run_demo(Path(folder))
    for wall, seconds in (("sweep phase", run.sweep_wall), ("whole command", run.whole_wall)):
        efficiency = run.trained / (run.slots * seconds)
        results.add(
            "sweep: the demo's fold trials, their own seconds / (slots x wall)",
            wall=wall,
            trials=len(run.trials),
            slots=run.slots,
            trained_s=run.trained,
            wall_s=seconds,
            efficiency=efficiency,
        )
        results.at_least(f"demo: trials' seconds / (slots x wall of the {wall})", 0.75, efficiency)
    for piece, seconds in pieces(run):
        results.add("sweep: where the demo's wall time went", piece=piece, seconds=seconds)


def main() -> None:
    given = options(__doc__)
    results = Results("overhead")
    _trial(results, given.quick)
    _techniques(results, given.quick)
    _scheduling(results, given.quick)
    if not given.quick:
        _sweep(results)
    results.publish(given)


if __name__ == "__main__":
    main()
