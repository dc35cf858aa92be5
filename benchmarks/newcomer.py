"""What a newcomer gets: a folder of images, ten minutes, two cores; read after 2, 5 and 10 minutes.

run           `foldrace run DATA`, told nothing, and stopped after ten minutes
run --time    `foldrace run DATA --time 10m`
plain loop    one backbone, mean of 3 folds, its learning rate the best of three by OOF log loss
              (`sides/newcomer_loop.py`)
Repeater      Ray Tune with Repeater(OptunaSearch(...)), TPE, over what `foldrace init DATA --time
              10m` writes: backbones, space, epochs, folds; greedy blend of what is complete
before        `foldrace run` of an earlier commit (`--before`, a checkout), with a config of three
              small backbones, 8 candidates, 3 folds, 20 epochs and `time_budget: 10m`

Each side is read by what it had by then: our `submission.csv` as it lay there, the others' mean or
blend of what was complete. `test` is the log loss on images whose labels no side has, `test_se` its
standard error over images, `to_best_peer` the difference to the best peer at that time and `ratio`
the quotient. Peers that had nothing by then count as every class alike.

`--record FOLDER` keeps each side's readings, so that data sets and sides can be run alone (`--only
digits,hard_digits`) and again without training. `IMAGE_SETS` and `LITE_WEIGHTS` (environment
variables): see `sides/image_sets.py` and `sides/portfolio_recorder.py`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from harness import ROOT, Results, environment, options
from numpy.typing import NDArray
from sides.image_sets import IMAGE_SETS, test_labels, write_image_set

_MINUTES = (2, 5, 10)
_SIDES = ("run", "run --time", "plain loop", "Repeater", "before")
_OURS = ("run", "run --time")
_GOALS = {2: 1.0, 5: 0.9, 10: 0.9}
_CLIP = 1e-15


@dataclass(frozen=True)
class Case:
    """One data set and what the networks begin with."""

    name: str
    set: str
    pretrained: bool = False


_CASES = (
    Case("digits", "digits"),
    Case("hard_digits", "hard_digits"),
    Case("sign_digits", "sign_digits"),
    Case("small_photos", "small_photos"),
    Case("small_photos, Lite", "small_photos", pretrained=True),
    Case("clothing", "clothing"),
)
Reading = dict[int, NDArray[np.float64] | None]  # minutes -> (test images,) losses


def _losses(
    ids: list[str], classes: list[str], prob: NDArray[np.float64], folder: Path
) -> NDArray[np.float64]:
    """(test images,) log losses, in the order of the labels."""
    labels, row_of = test_labels(folder), {name: i for i, name in enumerate(ids)}
    prob = prob / prob.sum(1, keepdims=True)
    true = [prob[row_of[name], classes.index(label)] for name, label in labels.items()]
    return -np.log(np.maximum(true, _CLIP))


def _of_submission(path: Path, folder: Path) -> NDArray[np.float64] | None:
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    prob = np.array([[float(value) for value in row[1:]] for row in rows])
    return _losses([Path(row[0]).stem for row in rows], header[1:], prob, folder)


def _ours(case: Case, folder: Path, work: Path, told: bool, seconds: list[float]) -> Reading:
    """Our command, its submission copied at each reading."""
    run = work / "run"
    words = [sys.executable, str(ROOT / "sweep.py"), "run", str(folder / "data"), "--out", str(run)]
    words += ["--time", f"{seconds[-1]:g}s"] if told else []
    words += ["--set", f"training.pretrained={_weights()}"] if case.pretrained else []
    log = (work / "log.txt").open("w")
    started = time.monotonic()
    process = subprocess.Popen(
        words, stdout=log, stderr=log, env=_environment(case), start_new_session=True
    )
    for minutes, at in zip(_MINUTES, seconds, strict=True):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(started + at - time.monotonic(), 0.1))
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(run / "submission.csv", work / f"submission_{minutes}.csv")
    if process.poll() is None:
        if told:
            print(f"    not ended after {seconds[-1]:g} s")
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
    return {m: _of_submission(work / f"submission_{m}.csv", folder) for m in _MINUTES}


def _loop(case: Case, folder: Path, work: Path, seconds: list[float]) -> Reading:
    out = work / "loop"
    script = str(ROOT / "benchmarks" / "sides" / "newcomer_loop.py")
    size = 64 if case.pretrained else IMAGE_SETS[case.set].size
    words = [sys.executable, script, str(folder / "data"), str(out), f"{seconds[-1]:g}", str(size)]
    words += [_weights()] if case.pretrained else []
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(words, env=environment(), timeout=seconds[-1], check=True)
    found: Reading = {}
    for minutes, at in zip(_MINUTES, seconds, strict=True):
        files = [f for f in out.glob("*.npz") if float(f.stem) <= at]
        if not files:
            found[minutes] = None
            continue
        with np.load(max(files, key=lambda f: float(f.stem))) as last:
            found[minutes] = _losses(
                last["ids"].tolist(), last["classes"].tolist(), last["prob"], folder
            )
    return found


def _repeater(case: Case, folder: Path, work: Path, seconds: list[float]) -> Reading:
    config = work / "init.yaml"
    words = [sys.executable, str(ROOT / "sweep.py"), "init", str(folder / "data"), "--time",
             f"{seconds[-1]:g}s", "--out", str(config)]  # fmt: skip
    words += ["--set", f"training.pretrained={_weights()}"] if case.pretrained else []
    subprocess.run(words, env=_environment(case), check=True, capture_output=True)
    started = time.time()
    script = str(ROOT / "benchmarks" / "sides" / "optuna_repeater.py")
    run = work / "run"
    words = [sys.executable, script, str(config), str(run), f"{started + seconds[-1]:.1f}"]
    subprocess.run(words, env=_environment(case), check=True, capture_output=True)
    return _by_then(run, started, seconds, folder, ROOT / "sweep.py", _environment(case))


_BEFORE = """\
name: before
data: {{train: {data}/train, test: {data}/test}}
folds: {{k: 3}}
search: {{backbones: {backbones}, candidates: 8}}
training: {{epochs: 20, image_size: {size}, pretrained: {pretrained}}}
resources: {{time_budget: {seconds:g}}}
"""


def _before(case: Case, folder: Path, work: Path, seconds: list[float], checkout: Path) -> Reading:
    """An earlier commit's command with its defaults."""
    package = work / "package"
    package.mkdir()
    (package / "foldrace").symlink_to(checkout.resolve())
    env = _environment(case) | {"PYTHONPATH": str(package)}
    small = "[timm/test_resnet, timm/test_efficientnet, timm/test_convnext]"
    config = work / "before.yaml"
    config.write_text(
        _BEFORE.format(
            data=folder / "data",
            backbones="[timm/efficientnet_lite0]" if case.pretrained else small,
            size=64 if case.pretrained else IMAGE_SETS[case.set].size,
            pretrained=_weights() if case.pretrained else "false",
            seconds=seconds[-1],
        ),
        encoding="utf-8",
    )
    run, started = work / "run", time.time()
    command = [sys.executable, str(checkout / "sweep.py"), "run", str(config), "--out", str(run)]
    subprocess.run(command, env=env, capture_output=True)
    return _by_then(run, started, seconds, folder, checkout / "sweep.py", env)


def _by_then(
    run: Path, started: float, seconds: list[float], folder: Path, sweep: Path, env: dict[str, str]
) -> Reading:
    """The blend of the candidates whose folds had all ended at each reading."""
    found: Reading = {}
    for minutes, at in zip(_MINUTES, seconds, strict=True):
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(scratch) / "run"
            shutil.copytree(run, copy, copy_function=os.link, ignore=_ends)
            for record in list(copy.glob("trials/*/fold*/trial.json")):
                if json.loads(record.read_text())["ended_at"] > started + at:
                    shutil.rmtree(record.parent)
            for word in ("ensemble", "submit"):
                command = [sys.executable, str(sweep), word, str(copy)]
                subprocess.run(command, env=env, capture_output=True)
            found[minutes] = _of_submission(copy / "submission.csv", folder)
    return found


def _ends(folder: str, names: list[str]) -> list[str]:
    """What the end of a run leaves, which an earlier reading had not."""
    return [n for n in names if n in ("ensemble", "submission.csv", "report.html", "logs")]


def _weights() -> str:
    return str(Path(os.environ["LITE_WEIGHTS"]).resolve())


def _environment(case: Case) -> dict[str, str]:
    """Without a hub: from scratch means from scratch for every side."""
    return environment() | {"HF_HUB_OFFLINE": "1"}


def _read(
    side: str, case: Case, folder: Path, work: Path, seconds: list[float], before: Path | None
) -> Reading | None:
    match side:
        case "run" | "run --time":
            return _ours(case, folder, work, side == "run --time", seconds)
        case "plain loop":
            return _loop(case, folder, work, seconds)
        case "Repeater":
            return _repeater(case, folder, work, seconds)
    return None if before is None else _before(case, folder, work, seconds, before)


def _readings(
    case: Case, record: Path, scale: float, before: Path | None
) -> Iterator[tuple[str, Reading]]:
    """The readings of each side: those that are kept, else measured now."""
    folder = record / "sets" / case.set
    if not (folder / "test_labels.csv").is_file():
        write_image_set(IMAGE_SETS[case.set], folder)
    seconds = [60.0 * minutes * scale for minutes in _MINUTES]
    for side in _SIDES:
        kept = record / "readings" / f"{case.name} {side}.npz"
        if not kept.is_file():
            with tempfile.TemporaryDirectory() as work:
                print(f"{case.name}: {side}", flush=True)
                found = _read(side, case, folder, Path(work), seconds, before)
            if found is None:
                continue
            kept.parent.mkdir(parents=True, exist_ok=True)
            arrays = {str(m): losses for m, losses in found.items() if losses is not None}
            np.savez(kept, **arrays)  # type: ignore[arg-type]
        with np.load(kept) as stored:
            arrays = dict(stored)
        yield side, {m: arrays.get(str(m)) for m in _MINUTES}


def _add(results: Results, case: Case, readings: dict[str, Reading], classes: int) -> None:
    for minutes in _MINUTES:
        losses = {side: reading[minutes] for side, reading in readings.items()}
        known = {side: found for side, found in losses.items() if found is not None}
        count = len(next(iter(known.values()))) if known else 1
        nothing = np.full(count, np.log(classes))
        filled = {side: nothing if found is None else found for side, found in losses.items()}
        peers = {side: found for side, found in filled.items() if side not in _OURS}
        if not peers:
            continue
        peer = min(peers, key=lambda side: peers[side].mean())
        for side, found in filled.items():
            change = found - filled[peer]
            results.add(
                f"{case.name}: after {minutes} minutes",
                side=side,
                test=float(found.mean()),
                test_se=_standard_error(found),
                to_best_peer=float(change.mean()),
                to_best_peer_se=_standard_error(change),
                ratio=float(found.mean() / filled[peer].mean()),
                nothing_yet=losses[side] is None,
            )
            if side == "run --time":
                goal = f"{case.name}, {minutes} minutes: loss / the best peer's ({peer})"
                results.at_most(goal, _GOALS[minutes], float(found.mean() / filled[peer].mean()))


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def main() -> None:
    given = options(
        __doc__,
        record="a folder that keeps the readings",
        before="a checkout of an earlier commit",
        only="names of data sets, with commas",
    )
    results = Results("newcomer")
    with tempfile.TemporaryDirectory() as scratch:
        record = (given.record or Path(scratch)).resolve()
        names = given.only.split(",") if given.only else [case.name for case in _CASES]
        for case in _CASES:
            if case.name not in names or (given.quick and case.name != "digits"):
                continue
            scale = 0.1 if given.quick else 1.0
            readings = dict(_readings(case, record, scale, given.before))
            labels = test_labels(record / "sets" / case.set)
            _add(results, case, readings, len(set(labels.values())))
    results.publish(given)


if __name__ == "__main__":
    main()
