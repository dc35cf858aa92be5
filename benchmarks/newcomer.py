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
the quotient. Who had nothing by then counts as every class alike.

Each side's readings are kept in `benchmarks/data/newcomer/`, so that data sets (`--only
digits,hard_digits`) and sides (`--only 'digits:plain loop'`) can be run alone; what is kept is not
measured again: delete its file for that. `--record FOLDER` keeps them elsewhere. `IMAGE_SETS` and
`LITE_WEIGHTS` (environment variables): see `sides/image_sets.py` and `sides/portfolio_recorder.py`.
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
    Case("small_photos Lite", "small_photos", pretrained=True),
    Case("clothing", "clothing"),
)
_CLASSES = 10  # of each of these sets
_KEPT = ROOT / "benchmarks" / "data" / "newcomer"
Scores = NDArray[np.float64]  # (2, test images): log loss, and 1 where the class is right, else 0
Reading = dict[int, Scores | None]  # by minutes


def _scores(ids: list[str], classes: list[str], prob: Scores, folder: Path) -> Scores:
    """In the order of the labels."""
    labels, row_of = test_labels(folder), {name: i for i, name in enumerate(ids)}
    prob = np.array([prob[row_of[name]] / prob[row_of[name]].sum() for name in labels])
    true = np.array([classes.index(label) for label in labels.values()])
    losses = -np.log(np.maximum(prob[np.arange(len(true)), true], _CLIP))
    return np.stack([losses, prob.argmax(1) == true])


def _of_submission(path: Path, folder: Path) -> Scores | None:
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    prob = np.array([[float(value) for value in row[1:]] for row in rows])
    return _scores([Path(row[0]).stem for row in rows], header[1:], prob, folder)


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
    first = True
    for minutes, at in zip(_MINUTES, seconds, strict=True):
        while process.poll() is None and time.monotonic() < started + at:
            if first and (run / "submission.csv").is_file():
                print(f"    first submission after {time.monotonic() - started:.0f} s", flush=True)
                first = False
            time.sleep(0.5)
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(run / "submission.csv", work / f"submission_{minutes}.csv")
    print(f"    {'still running' if process.poll() is None else 'ended'} after "
          f"{time.monotonic() - started:.0f} s", flush=True)  # fmt: skip
    if process.poll() is None:
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
            found[minutes] = _scores(
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
    case: Case, sides: tuple[str, ...], kept: Path, sets: Path, scale: float, before: Path | None
) -> Iterator[tuple[str, Reading]]:
    """The readings of each side: those that are kept, else, of `sides`, measured now."""
    folder = sets / case.set
    seconds = [60.0 * minutes * scale for minutes in _MINUTES]
    for side in _SIDES:
        file = kept / f"{case.name} {side}.npz"
        if not file.is_file() and side in sides:
            if not (folder / "test_labels.csv").is_file():
                write_image_set(IMAGE_SETS[case.set], folder)
            with tempfile.TemporaryDirectory() as work:
                print(f"{case.name}: {side}", flush=True)
                found = _read(side, case, folder, Path(work), seconds, before)
            if found is not None:
                kept.mkdir(parents=True, exist_ok=True)
                arrays = {str(m): scores for m, scores in found.items() if scores is not None}
                np.savez(file, **arrays)  # type: ignore[arg-type]
        if file.is_file():
            with np.load(file) as stored:
                arrays = dict(stored)
            yield side, {m: arrays.get(str(m)) for m in _MINUTES}


def _add(results: Results, case: Case, readings: dict[str, Reading]) -> None:
    some = [scores for reading in readings.values() for scores in reading.values()]
    count = next((scores.shape[1] for scores in some if scores is not None), 1)
    nothing = np.stack([np.full(count, np.log(_CLASSES)), np.full(count, 1 / _CLASSES)])
    for minutes in _MINUTES:
        scores = {side: reading[minutes] for side, reading in readings.items()}
        filled = {side: nothing if found is None else found for side, found in scores.items()}
        peers = {side: found[0] for side, found in filled.items() if side not in _OURS}
        peer = min(peers, key=lambda side: peers[side].mean(), default=None)
        for side, (losses, hits) in filled.items():
            cells: dict[str, float] = {}
            if peer is not None:
                change = losses - peers[peer]
                cells = {
                    "to_best_peer": float(change.mean()),
                    "to_best_peer_se": _standard_error(change),
                    "ratio": float(losses.mean() / peers[peer].mean()),
                }
            results.add(
                f"{case.name}: after {minutes} minutes",
                side=side,
                test=float(losses.mean()),
                test_se=_standard_error(losses),
                accuracy=float(hits.mean()),
                accuracy_se=_standard_error(hits),
                **cells,
                nothing_yet=scores[side] is None,
            )
            if side == "run --time" and peer is not None:
                goal = f"{case.name}, {minutes} minutes: loss / the best peer's ({peer})"
                results.at_most(goal, _GOALS[minutes], cells["ratio"])


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0


def _asked(only: str | None, case: Case) -> tuple[str, ...]:
    """The sides that are to be measured of a data set."""
    if only is None:
        return _SIDES
    words = [word.strip() for word in only.split(",")]
    if case.name in words:
        return _SIDES
    return tuple(side for side in _SIDES if f"{case.name}:{side}" in words)


def main() -> None:
    given = options(
        __doc__,
        record="a folder for the readings",
        before="a checkout of an earlier commit",
        only="names of data sets, or of a data set's sides, with commas",
    )
    results = Results("newcomer")
    with tempfile.TemporaryDirectory() as scratch:
        kept = Path(scratch) / "kept" if given.quick else given.record or _KEPT
        for case in _CASES:
            sides = _asked("digits" if given.quick else given.only, case)
            scale = 0.1 if given.quick else 1.0
            readings = dict(
                _readings(case, sides, kept, Path(scratch) / "sets", scale, given.before)
            )
            if readings:
                _add(results, case, readings)
    results.publish(given)


if __name__ == "__main__":
    main()
