"""What goes into an exported blend and comes out of it: sound files, images, predictions.

Takes a folder and paths of images, gives `Prediction`s, as many and in the order of the paths. Lies
beside `predict.py`, and needs Pillow and numpy alone.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foldrace.export.shipped.blend_images import Seen, model_inputs, read_bytes

VERSION = 1
"""Version of the format that this code reads."""
SUMS = "SHA256SUMS"
ERROR = "ERROR"
"""The class of an image that cannot be read."""
_LINE = re.compile(r"([0-9a-f]{64})  ([\w.+-]+(?:/[\w.+-]+)*)", re.ASCII)
_CHECKED = (".json", ".safetensors", ".onnx", ".data")  # code and notes may be changed
_CHUNK = 64  # images decoded at a time

Run = Callable[[list[NDArray[np.uint8]], list[NDArray[np.float32]]], NDArray[np.floating]]
"""Squares (n, S, S, 3) and meta features (n, F) of each form -> probabilities (n, C)."""
Path_ = str | os.PathLike[str]


class DamagedExport(ValueError):
    """A file of an exported folder is missing, changed, or of another version."""


@dataclass(frozen=True)
class Prediction:
    """One image's class and probabilities; ERROR, and the reason, where it cannot be read."""

    path: str
    label: str
    confidence: float
    probabilities: NDArray[np.floating] | None
    error: str = ""


def read_about(folder: Path_, name: str) -> dict[str, Any]:
    """The JSON file of that name, once every file is found to be as it was exported.

    Nothing else is read. DamagedExport with each file that is missing or changed.
    """
    root = Path(folder)
    sums = _read_sums(root)
    if name not in sums:
        raise DamagedExport(f"{root / SUMS}: has no line for {name}; export again")
    wrong = [name] if _fault(root / name, sums[name]) else []
    about = {} if wrong else _parsed(root / name)
    version = about.get("version", VERSION)
    if version != VERSION:
        message = f"is of format version {version!r:.40}; this code reads version {VERSION}"
        raise DamagedExport(f"{root / name}: {message}: use the predict.py that lies beside it")
    faults = {file: _fault(root / file, sums[file]) for file in sums if file.endswith(_CHECKED)}
    lines = [f"{root / file}: {fault}" for file, fault in faults.items() if fault]
    unlisted = [file for file in about.get("files", ()) if file not in sums]
    lines += [f"{root / SUMS}: has no line for {file}" for file in unlisted]
    if lines:
        raise DamagedExport("\n".join(lines))
    return about


def _read_sums(root: Path) -> dict[str, str]:
    """File -> SHA-256, as `sha256sum -c` reads them."""
    if not (root / SUMS).is_file():
        raise DamagedExport(f"{root / SUMS}: does not exist; is this the folder of an export?")
    sums = {}
    for number, line in enumerate((root / SUMS).read_text(errors="replace").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or ".." in match[2].split("/"):
            raise DamagedExport(f"{root / SUMS} line {number}: is no line of sha256sum")
        sums[match[2]] = match[1]
    return sums


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes().decode(errors="surrogateescape"))
    except ValueError as error:
        raise DamagedExport(f"{path}: is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise DamagedExport(f"{path}: should hold one object")
    return found


def _fault(path: Path, sha256: str) -> str:
    """What is wrong with a file; '' for nothing."""
    if not path.is_file():
        return "is missing"
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() == sha256:
        return ""
    return f"was changed: its SHA-256 is not the one in {SUMS}; copy it again"


def predict(
    paths: Sequence[Path_], about: Mapping[str, Any], run: Run, threads: int = 4
) -> Iterator[Prediction]:
    """A prediction for each path, in their order; a batch of images in memory at a time."""
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), _CHUNK):
            chunk = [os.fspath(path) for path in paths[start : start + _CHUNK]]
            seen = list(pool.map(lambda path: _seen(path, about["inputs"]), chunk))
            good = [each for each in seen if not isinstance(each, str)]
            rows = _rows(good, about, run) if good else iter(())
            for path, each in zip(chunk, seen, strict=True):
                if isinstance(each, str):
                    yield Prediction(path, ERROR, float("nan"), None, each)
                else:
                    prob, label = next(rows)
                    yield Prediction(path, about["classes"][label], float(prob[label]), prob)


def _seen(path: str, forms: Sequence[Mapping[str, Any]]) -> list[Seen] | str:
    """What the models see of an image; why it cannot be read."""
    try:
        return model_inputs(read_bytes(path), forms)
    except Exception as error:  # Pillow's plugins raise whatever their parser stumbles over
        return f"{error or type(error).__name__}".replace(repr(path), "").strip()


def _rows(
    seen: Sequence[list[Seen]], about: Mapping[str, Any], run: Run
) -> Iterator[tuple[NDArray[np.floating], int]]:
    forms = range(len(about["inputs"]))
    squares = [np.stack([image[form][0] for image in seen]) for form in forms]
    metas = [np.stack([image[form][1] for image in seen]) for form in forms]
    prob = run(squares, metas)
    return zip(prob, decide(prob, about["decision_rule"]).tolist(), strict=True)


def decide(prob: NDArray[np.floating], rule: Mapping[str, Any] | None) -> NDArray[np.int64]:
    """The class (n,) of probabilities (n, C): the most probable, or by the blend's own rule."""
    if rule is None:
        return np.asarray(prob.argmax(axis=1))
    if rule["thresholds"]:
        expected = prob @ np.arange(prob.shape[1], dtype=np.float64)
        return np.asarray(np.searchsorted(rule["thresholds"], expected))
    logs = np.log(np.maximum(prob, 1e-15))
    return np.asarray((logs + np.array(rule["log_weights"])).argmax(axis=1))


def main(blend: Callable[[Path], Any]) -> int:
    """`python predict.py IMAGE ...`: a CSV of classes and probabilities on the terminal.

    0: done; 1: none of the images could be read; 2: no image, or a damaged folder.
    """
    if len(sys.argv) < 2:
        print("usage: python predict.py IMAGE [IMAGE ...] > classes.csv", file=sys.stderr)
        return 2
    try:
        opened = blend(Path(__file__).parent)
    except DamagedExport as error:
        print(f"error {error}", file=sys.stderr)
        return 2
    found = opened(sys.argv[1:])
    try:
        _print_table(opened.classes, found)
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if any(not each.error for each in found) else 1


def _print_table(classes: Sequence[str], found: Sequence[Prediction]) -> None:
    rows = csv.writer(sys.stdout, lineterminator="\n")
    rows.writerow(["image_path", "class", "confidence", *classes, "error"])
    for each in found:
        numbers = [""] * (1 + len(classes))
        if each.probabilities is not None:
            numbers = [f"{p:.6g}" for p in (each.confidence, *each.probabilities)]
        rows.writerow([each.path, each.label, *numbers, each.error])
    sys.stdout.flush()
