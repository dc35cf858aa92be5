"""Fuzz targets of run folders and caches: records, arrays, weights, states, plugins, the report."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from matplotlib.figure import Figure

from benchmarks.sides.fuzz_guard import Box, Call, Target, Wrong
from benchmarks.sides.fuzz_mutations import WORDS, changed, damaged, json_text, npy, value
from benchmarks.sides.fuzz_scene import Examples, write_folder
from foldrace.commands.ensemble import Changes, reblend
from foldrace.commands.status import status
from foldrace.console.terminal import Terminal
from foldrace.core.plugin_files import import_plugins, read_plugins
from foldrace.dataset.left_out import read_left_out
from foldrace.ensemble.selection.matrix_folder import read_matrix
from foldrace.inference.predictor import Predictor, RunModels
from foldrace.reporting.charts import style
from foldrace.reporting.report import write_report
from foldrace.run_folder.claims import Claims
from foldrace.run_folder.oof import array_of
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.pixel_cache import open_images
from foldrace.trainables.resume_state import from_bytes, to_bytes

_EXTRA: dict[str, Any] = {  # what a run folder may hold too
    "merged_classes.json": {"cat": {"cat": 3, "kitten": 2}},
    "logs/running.json": {"at": 1.0, "waiting": None, "trials": []},
    "logs/gpu_memory.json": {"kinds": []},
    "ensemble/update.json": {"number": 1},
    "logs/driver/x.json": {
        "owner": "x", "command": "run", "host": "h", "place": "p", "pid": 1, "process_started": 1,
        "since": 1.0,
    },
}  # fmt: skip


class RunFolder:
    """A run folder in a box, made anew where a case has changed it."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._files = files
        self._stats: dict[str, tuple[int, int]] = {}

    def fresh(self, box: Box) -> Path:
        """The folder as it was."""
        there = set()
        for folder, folders, names in os.walk(box.run):
            at = os.path.relpath(folder, box.run)
            for name in names:
                path = name if at == "." else f"{at}/{name}"
                there.add(path)
                stat = os.lstat(os.path.join(folder, name))
                if self._stats.get(path) != (stat.st_mtime_ns, stat.st_size):
                    there.discard(path)
                    os.unlink(os.path.join(folder, name))
            for name in folders:
                inner = name if at == "." else f"{at}/{name}"
                if not any(own.startswith(f"{inner}/") for own in self._files):
                    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            folders[:] = [n for n in folders if os.path.isdir(os.path.join(folder, n))]
        for name in self._files.keys() - there:
            self.put(box, name, self._files[name])
            stat = os.lstat(box.run / name)
            self._stats[name] = stat.st_mtime_ns, stat.st_size
        return box.run

    def put(self, box: Box, name: str, data: bytes) -> None:
        write_folder(box.run, {name: data})


class RunTargets:
    """The targets, over a run folder that is sound."""

    def __init__(self, examples: Examples, folder: Path) -> None:
        self._files, self._folder = examples.run, folder
        self._run = RunFolder(examples.run)
        self._names = sorted(examples.run)
        self._images = [folder / f"test/t{i}.png" for i in range(4)]
        self._states: list[bytes] = []

    def targets(self) -> tuple[Target, ...]:
        return (
            Target("records", 60, self._records),
            Target("blend records", 30, self._blend),
            Target("arrays", 100, self._array, (ValueError,)),
            Target("OOF rows", 15, self._oof),
            Target("weights", 15, self._weights),
            Target("resume states", 50, self._state, (Exception,)),
            Target("matrices", 25, self._matrix),
            Target("pixel cache", 15, self._cache),
            Target("plugins", 15, self._plugins),
            Target("report", 1, self._report),
        )

    def mutate(self, rng: random.Random, box: Box, names: list[str], extra: bool = True) -> None:
        """Damage one to three of the files in the box's run folder."""
        self._run.fresh(box)
        if extra and rng.random() < 0.05:  # code that nobody has allowed
            self._run.put(box, "plugins/mine.py", b"import os\nos.mkdir('/nowhere')\nPARTS = []\n")
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
            if extra and rng.random() < 0.1:
                name = rng.choice(list(_EXTRA))
                tree = changed(rng, _EXTRA[name], rng.choice((0, 1, 2)))
                self._run.put(box, name, json_text(rng, tree))
                continue
            name = rng.choice(names)
            self._run.put(box, name, self._damaged(rng, name))

    def _damaged(self, rng: random.Random, name: str) -> bytes:
        data = self._files[name]
        kind = rng.random()
        if kind < 0.1:
            return damaged(rng, data, [self._files[n] for n in self._names])
        if name.endswith(".json"):
            return json_text(rng, changed(rng, json.loads(data)))
        if name.endswith(".yaml"):
            return yaml_bytes(rng, changed(rng, yaml.safe_load(data)), data)
        if name.endswith(".npy"):
            return npy(rng, data)
        if name.endswith(".csv"):
            return csv_cells(rng, data)
        if name.endswith(".safetensors"):
            return safetensors(rng, data)
        return damaged(rng, data)

    def _readable(self, *suffixes: str) -> list[str]:
        return [name for name in self._names if name.endswith(suffixes)]

    def _records(self, rng: random.Random, box: Box) -> Call:
        self.mutate(rng, box, self._readable(".json", ".yaml", ".csv"))
        root = str(box.run)

        def call() -> None:
            store = RunStore.open(root)
            status(root, False, Terminal(io.StringIO()))
            read_left_out(store.files)
            Claims(store.files, "logs/driver").alive()
            for part in (store.merged, store.last_update, store.running, store.gpu_memory):
                part()
            store.labels()
            store.decisions()

        return call

    def _blend(self, rng: random.Random, box: Box) -> Call:
        names = self._readable(".json", "trajectory.csv", "oof.npy")
        self.mutate(rng, box, [n for n in names if n.startswith("ensemble/")], extra=False)

        def call() -> None:
            store = RunStore.open(box.run)
            record = store.blend.record()
            if record is None:
                return
            Predictor(store)
            for read in (store.blend.oof, store.blend.trajectory):
                read()
            store.blend.combiner_arrays(record)

        return call

    def _array(self, rng: random.Random, box: Box) -> Call:
        name = rng.choice(self._readable(".npy"))
        data = npy(rng, self._files[name])
        return lambda: array_of(data)

    def _oof(self, rng: random.Random, box: Box) -> Call:
        self.mutate(rng, box, self._readable(".npy", "trial.json", "folds.csv", "classes.json"))
        changes = Changes(method=rng.choice(("greedy", "uniform", "optimal")))
        screen = Terminal(io.StringIO())
        return lambda: reblend(str(box.run), changes, (), (), screen)

    def _weights(self, rng: random.Random, box: Box) -> Call:
        self.mutate(rng, box, ["trials/c0000/fold0/best.safetensors"], extra=False)

        def call() -> None:
            models = RunModels(RunStore.open(box.run), torch.device("cpu"))
            models.open("c0000", "raw", 0)

        return call

    def _state(self, rng: random.Random, box: Box) -> Call:
        if not self._states:
            plain = {
                "model": {"w": torch.zeros(3, 2), "b": torch.ones(1)},
                "history": {"log": [{"epoch": 1}]}, "fingerprint": "x", "seconds": 1.5,
            }  # fmt: skip
            self._states.append(to_bytes(plain))
        file = self._states[0][4:]
        if rng.random() < 0.8:
            file = _repacked(rng, file)
        elif rng.random() < 0.8:
            file = damaged(rng, file)
        data = zlib.crc32(file).to_bytes(4) + file
        return lambda: from_bytes(data)

    def _matrix(self, rng: random.Random, box: Box) -> Call:
        names = [n for n in self._names if n.startswith("ensemble/matrix/")]
        self.mutate(rng, box, names, extra=False)
        folder = box.run / "ensemble" / "matrix"
        key = json.loads(self._files["ensemble/matrix/index.json"])["key"]

        def call() -> None:
            found = read_matrix(folder, key)
            if found is not None:
                for slot in {row.slot for row in found.index}:
                    column = found.column(slot)
                    float(column.raw.sum())

        return call

    def _cache(self, rng: random.Random, box: Box) -> Call:
        shutil.rmtree(box.cache / "pixels", ignore_errors=True)
        expected = open_images(self._images, 16, 1, session="first")
        pixels = [np.array(expected.image(i)) for i in range(len(expected))]
        del expected
        root = box.cache / "pixels"
        files = [p for p in sorted(root.rglob("*")) if p.is_file() and p.suffix != ".lock"]
        files = [p for p in files if p.name != "pixels.bin"]
        for path in rng.sample(files, min(len(files), rng.choice((1, 1, 2)))):
            data = path.read_bytes()
            if path.suffix == ".json" and rng.random() < 0.8:
                path.write_bytes(json_text(rng, changed(rng, json.loads(data))))
            elif path.suffix == ".npy":
                path.write_bytes(npy(rng, data))
            else:
                path.write_bytes(damaged(rng, data))

        def call() -> None:
            found = open_images(self._images, 16, 1, session=rng.choice((None, "first")))
            for i, own in enumerate(pixels):
                if not np.array_equal(found.image(i), own):
                    raise Wrong("other pixels")

        return call

    def _plugins(self, rng: random.Random, box: Box) -> Call:
        source = rng.choice(
            (
                b"PARTS = []\n", b"x = [" + b"[" * 3_000, b"\x00", b"import nothing_there\n",
                b"# -*- coding: latin-1 -*-\nPARTS = [1]\n", b"PARTS = 5\n",
                b"raise SystemExit(3)\n", b"x = " + b"-" * 5_000 + b"1\n", b"# coding: nothing\n",
                b"def f(:\n",
                b"1" * 5_000, "é = 1\n".encode("latin-1"),
            )
        )  # fmt: skip
        source = damaged(rng, source) if rng.random() < 0.3 else source
        name = rng.choice(("mine.py", "os.py", "torch.py", "a.b.py", "class.py", "x.txt", *WORDS))
        name = name.replace("/", "_").replace("\x00", "")[:80] or "_.py"
        path = box.data / os.fsdecode(name.encode("utf-8", "replace"))
        if not path.is_dir():
            path.write_bytes(source)
        given = str(path) if rng.random() < 0.9 else rng.choice(WORDS)

        def call() -> None:
            files, _ = read_plugins([given])
            import_plugins(files)

        return call

    def _report(self, rng: random.Random, box: Box) -> Call:
        self.mutate(rng, box, self._readable(".json", ".csv", ".yaml"))

        def coarse(**options: Any) -> Figure:
            return Figure(**options | {"layout": "none", "dpi": 20})

        def call() -> None:
            with mock.patch.object(style, "Figure", coarse):  # how charts look is not asked here
                write_report(RunStore.open(box.run))

        return call


def _repacked(rng: random.Random, file: bytes) -> bytes:
    """torch's own file, with one of its members damaged and all checksums right."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(packed, "w") as new:
        chosen = rng.choice(old.namelist())
        for name in old.namelist():
            new.writestr(name, damaged(rng, old.read(name)) if name == chosen else old.read(name))
    return packed.getvalue()


def yaml_bytes(rng: random.Random, tree: Any, old: bytes) -> bytes:
    from benchmarks.sides.fuzz_config import yaml_text

    return yaml_text(rng, tree) if rng.random() < 0.9 else damaged(rng, old)


def csv_cells(rng: random.Random, data: bytes) -> bytes:
    """A table with some cells replaced, lines doubled or gone."""
    lines = data.decode("utf-8", "replace").splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines)) if lines else 0
        kind = rng.randrange(6)
        if not lines or kind == 0:
            lines.insert(at, ",".join(rng.choice(WORDS) for _ in range(4)))
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(at, lines[at])
        else:
            cells = lines[at].split(",")
            new = rng.choice(WORDS) if rng.random() < 0.6 else str(value(rng))
            cells[rng.randrange(len(cells))] = new
            lines[at] = ",".join(cells)
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def safetensors(rng: random.Random, data: bytes) -> bytes:
    """Weights with another header."""
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    card = header.get("__metadata__", {})
    if "foldrace" in card and rng.random() < 0.6:
        own = changed(rng, json.loads(card["foldrace"]))
        if isinstance(own, dict) and rng.random() < 0.3:
            own["backbone"] = rng.choice(_BACKBONES)
        card["foldrace"] = json_text(rng, own).decode("utf-8", "replace")
    elif rng.random() < 0.5:
        first = changed(rng, {k: header[k] for k in list(header)[:6]})
        rest = {k: header[k] for k in list(header)[6:]}
        header = first | rest if isinstance(first, dict) else first
    else:
        return damaged(rng, data)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


_BACKBONES = (
    "timm/hf-hub:evil/x", "timm/local-dir:/etc", "timm/vit_giant_patch14_224", "timm/nothing", "x",
    "torchvision/resnet18", "stack(timm/test_vit,timm/test_resnet)", "timm/../x", "stack(" * 300,
)  # fmt: skip
