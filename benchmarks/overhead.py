"""What our machinery costs, against doing the same work without it.

trial       `run_trial` against a bare PyTorch loop (`sides/plain_loop.py`): the same backbone,
            images, batches, MixUp, AdamW, clipping, EMA, and raw and EMA weights scored each epoch,
            one thread each. Images are decoded before for both. `run_trial` also writes its
            weights, predictions and log to the run folder; the bare loop writes nothing.
scheduling  24 fold trials that only sleep 0.05 s, through `run_sweep` (`sides/our_tune.py`) and
            through plain Ray Tune with its Repeater (`sides/plain_tune.py`), each in a new process
            with a Ray of its own.
sweep       `sweep.py demo` for real: how much of slots x wall time the fold trials used, and what
            took the rest.

Figures of two sides are medians of runs taken in turns.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median

import torch
from harness import ROOT, Results, Turns, in_turns, options
from sides.plain_loop import Settings, train

from experiment.config import SweepConfig, parse_config
from experiment.demo_data import write_demo
from experiment.folds import folds_csv, make_folds
from experiment.manifest import Manifest, read_manifest
from experiment.store import RunStore
from search_spaces.sampling import build_space
from trainables.augment import POLICIES, resize
from trainables.backbones import build_classifier
from trainables.data import Batches, ShuffledBatches, build_loader
from trainables.pixel_cache import open_images
from trainables.trial import EpochReport, TrialSpec, run_trial

_BACKBONES = ("timm/test_resnet", "timm/test_efficientnet")
_FOLD = 0
_SLEEP = 0.05  # seconds of a trial that only sleeps
_LOG_TIME = "%Y-%m-%d %H:%M:%S,%f"


# -- one trial


@dataclass
class _Marks:
    """A monitor that only looks at the clock: it is asked before every batch."""

    scored: int
    """Batches that one variant is scored in."""
    asked: list[float] = field(default_factory=list)
    reported: list[float] = field(default_factory=list)
    splits: list[tuple[float, float, float]] = field(default_factory=list)
    """Of each epoch: its first batch, its first scored batch, its end."""

    def stop_requested(self) -> bool:
        self.asked.append(time.perf_counter())
        return False

    def report(self, epoch: EpochReport) -> None:
        now = time.perf_counter()
        self.splits.append((self.asked[0], self.asked[-2 * self.scored], now))
        self.reported.append(now)
        self.asked.clear()


@dataclass(frozen=True)
class _Side:
    """One run of one side."""

    wall: float
    cpu: float
    logloss: float
    pieces: dict[str, float]


class _Digits:
    """The demo's data set and config, ready for both sides."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self._folder = folder
        parsed = parse_config(write_demo(folder), [f"training.epochs={epochs}"])
        self._config: SweepConfig = parsed.require()
        self._manifest: Manifest = read_manifest(self._config.data)
        self._folds = folds_csv(self._manifest, make_folds(self._manifest, self._config.folds))

    def spec(self, backbone: str) -> TrialSpec:
        """One fold trial of the default configuration, in a new run folder."""
        store = RunStore(tempfile.mkdtemp(dir=self._folder))
        store.create(self._config, self._folds, self._manifest.classes)
        space, _ = build_space(self._config.search, self._config.training, "")
        return TrialSpec(
            run=store.root,
            image_root=str(self._manifest.image_root),
            candidate="c0000",
            backbone=backbone,
            params=space.default(backbone),
            fold=_FOLD,
            training=self._config.training,
            augment=self._config.augment,
            seed=0,
            cpus=1,
        )

    def ours(self, backbone: str) -> _Side:
        spec = self.spec(backbone)
        rows = int((RunStore.open(spec.run).folds().fold == _FOLD).sum())
        marks = _Marks(scored=-(-rows // (2 * spec.params.batch_size)))
        started, cpu = time.perf_counter(), time.process_time()
        record = run_trial(spec, marks)
        ended, used = time.perf_counter(), time.process_time() - cpu
        data = self._seconds_of_batches(spec)
        train_s = sum(scoring - first for first, scoring, _ in marks.splits)
        pieces = {
            "setup": marks.splits[0][0] - started,
            "data": data,
            "step": train_s - data,
            "evaluate": sum(end - scoring for _, scoring, end in marks.splits),
            "write": ended - marks.reported[-1],
        }
        loss = min(score.val_logloss for score in record.variants.values())
        return _Side(ended - started, used, loss, pieces)

    def _seconds_of_batches(self, spec: TrialSpec) -> float:
        """Making all training batches of a trial, on its own and after the trial: from outside,
        the trial's own batches cannot be told from its steps."""
        store = RunStore.open(spec.run)
        files = [Path(spec.image_root) / path for path in store.folds().image_paths]
        source = open_images(files, spec.params.image_size, 1)
        rows = (store.folds().fold != _FOLD).nonzero()[0]
        batches = ShuffledBatches(rows, spec.params.batch_size, 0)
        dataset = Batches(source, spec.params.image_size, spec.augment)
        loader = build_loader(dataset, batches, 0, False)
        started = time.perf_counter()
        for epoch in range(spec.params.epochs):
            batches.epoch = epoch
            for _ in loader:
                pass
        return time.perf_counter() - started

    def plain(self, backbone: str) -> _Side:
        spec = self.spec(backbone)
        params, clip_grad = spec.params, spec.training.clip_grad
        policy = POLICIES[spec.augment.policy]
        store = RunStore.open(spec.run)
        files = [Path(spec.image_root) / path for path in store.folds().image_paths]
        source = open_images(files, params.image_size, 1)
        pixels = resize([source.image(row) for row in range(len(files))], params.image_size)
        normal = build_classifier(backbone, 2, params.image_size)
        images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - normal.mean) / normal.std
        fold = torch.from_numpy(store.folds().fold)
        assert clip_grad is not None
        settings = Settings(
            backbone=backbone.partition("/")[2],
            epochs=params.epochs,
            lr=params.lr,
            weight_decay=params.weight_decay,
            warmup=params.warmup,
            batch_size=params.batch_size,
            dropout=params.dropout,
            mixup_alpha=params.mixup_alpha,
            mixup_prob=params.mixup_prob,
            ema_decay=params.ema_decay,
            clip_grad=clip_grad,
            rotate=policy.rotate,
            zoom=policy.zoom,
            shift=policy.shift,
            threads=1,
        )
        train_rows, val_rows = (fold != _FOLD).nonzero()[:, 0], (fold == _FOLD).nonzero()[:, 0]
        labels = torch.from_numpy(store.labels())
        started, cpu = time.perf_counter(), time.process_time()
        losses, seconds = train(images, labels, train_rows, val_rows, settings)
        wall, used = time.perf_counter() - started, time.process_time() - cpu
        return _Side(wall, used, min(losses.values()), dataclasses.asdict(seconds))


def _trial(results: Results, quick: bool) -> None:
    epochs, pairs = (2, 2) if quick else (8, 7)
    ratios: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["FOLDRACE_CACHE"] = f"{folder}/cache"
        warm = _Digits(Path(folder) / "warm", 1)
        digits = _Digits(Path(folder) / "digits", epochs)
        for backbone in _BACKBONES[: 1 if quick else None]:
            warm.ours(backbone), warm.plain(backbone)
            digits.ours(backbone)  # decodes the images
            runs = in_turns(partial(digits.ours, backbone), partial(digits.plain, backbone), pairs)
            ratios[backbone] = _add_trial_rows(results, backbone, epochs, runs)
    for backbone, ratio in ratios.items():
        results.at_most(f"run_trial / bare PyTorch loop, wall time, {backbone}", 1.05, ratio)


def _add_trial_rows(results: Results, backbone: str, epochs: int, runs: Turns[_Side]) -> float:
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


# -- scheduling alone


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
            [sys.executable, str(script), *given], check=True, env=_environment(), text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        timing: dict[str, float] = json.loads(out.read_text())
        return timing | {"process": time.perf_counter() - started}


def _environment(**more: str) -> dict[str, str]:
    """The worker processes import our packages too."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {"PYTHONPATH": path} | more


# -- a real sweep


@dataclass(frozen=True)
class _DemoRun:
    """The demo's own log and records, in seconds of the wall clock."""

    began: float
    ended: float
    events: dict[str, float]
    slots: int
    trials: tuple[tuple[float, float], ...]  # began, ended

    @property
    def trained(self) -> float:
        return sum(end - start for start, end in self.trials)


def _sweep(results: Results) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = _demo(Path(folder))
    sweep_wall = run.events["sweep: ended"] - run.events["sweep: begins"]
    whole_wall = run.ended - run.began
    for wall, seconds in (("sweep phase", sweep_wall), ("whole command", whole_wall)):
        results.add(
            "sweep: the demo's fold trials, seconds of training / (slots x wall)",
            wall=wall,
            trials=len(run.trials),
            slots=run.slots,
            trained_s=run.trained,
            wall_s=seconds,
            efficiency=run.trained / (run.slots * seconds),
        )
    for piece, seconds in _rest(run):
        results.add("sweep: where the demo's wall time went", piece=piece, seconds=seconds)
    results.at_least(
        "demo, training / (slots x wall of the sweep phase)",
        0.75,
        run.trained / (run.slots * sweep_wall),
    )
    results.at_least(
        "demo, training / (slots x wall of the whole command)",
        0.75,
        run.trained / (run.slots * whole_wall),
    )


def _rest(run: _DemoRun) -> list[tuple[str, float]]:
    """The command from its start to its end, without a gap; slot time that no trial used is
    divided by the slots."""
    event = run.events
    first = min(start for start, _ in run.trials)
    last = max(end for _, end in run.trials)
    by_end = sorted(end for _, end in run.trials)
    tail = sum(last - end for end in by_end[-run.slots :]) / run.slots
    between = (last - first) - run.trained / run.slots - tail
    return [
        ("imports, data written, checks", event["Ray: starting"] - run.began),
        ("Ray's start", event["sweep: begins"] - event["Ray: starting"]),
        ("Tune's start, workers' start and imports", first - event["sweep: begins"]),
        ("training, per slot", run.trained / run.slots),
        ("between trials and staggered start, per slot", between),
        ("the last trials: slots without work, per slot", tail),
        ("Tune's end", event["sweep: ended"] - last),
        ("Ray's end", event["Ray: stopped"] - event["sweep: ended"]),
        (
            "blend, submission, report",
            event["run: blend and report written"] - event["Ray: stopped"],
        ),
        ("Python's end", run.ended - event["run: blend and report written"]),
    ]


def _demo(folder: Path) -> _DemoRun:
    out = folder / "demo"
    began = time.time()
    subprocess.run(
        [sys.executable, str(ROOT / "sweep.py"), "demo", "--out", str(out)],
        check=True,
        stdout=subprocess.DEVNULL,
        env=_environment(FOLDRACE_CACHE=str(folder / "cache")),
    )
    ended = time.time()
    store = RunStore.open(out / "run")
    log = (out / "run" / "logs" / "application.log").read_text(encoding="utf-8").splitlines()
    events = {
        message: datetime.strptime(line[:23], _LOG_TIME).timestamp()
        for line in log
        if (message := _event(line)) is not None
    }
    slots = re.search(r"sweep: begins, (\d+) fold trials", "\n".join(log))
    assert slots is not None
    trials = []
    for (candidate, fold), record in store.trials().items():
        written = out / "run" / store.trial_folder(candidate, fold) / "trial.json"
        end = written.stat().st_mtime
        trials.append((end - record.seconds, end))
    return _DemoRun(began, ended, events, int(slots[1]), tuple(trials))


def _event(line: str) -> str | None:
    """`2026-01-01 10:00:00,123 INFO Ray: starting` -> `Ray: starting`."""
    match = re.match(r"\S+ \S+ INFO ((?:Ray|sweep|run): [a-z ]+)", line)
    return match[1].removesuffix(" after ") if match else None


def main() -> None:
    given = options(__doc__)
    results = Results("overhead")
    _trial(results, given.quick)
    _scheduling(results, given.quick)
    if not given.quick:
        _sweep(results)
    results.publish(given)


if __name__ == "__main__":
    main()
