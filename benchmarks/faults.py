"""What becomes of a sweep when things go wrong: real signals, real raylets, full disks, a real S3
server, a real PostgreSQL.

Each fault hits a sweep of six fold trials in its middle. `exit` and `seconds` are how it ended, or
with `-` that it went on by itself; `says` is the terminal's last line. After that `resume` finishes
what is left. `lost`: fold trials that had ended and are not as they were; `twice`: those that ended
well more than once (both are the one trial whose record was cut in half, in the row that does
that); `equal`: every array and weight has the bits of an undisturbed sweep. After each, the
submission must be there.

`soak` hits one sweep after another with faults chosen by chance, 100 in all.

--only takes names of faults, with commas; `soak` is run only where it is named.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
from harness import ROOT, Options, Results, options
from sides.fault_scene import (
    TRIALS,
    Hangs,
    Scene,
    digests,
    with_suppressed,
    write_config,
    write_data,
)
from sides.fault_servers import SERVERS, disk, postgresql_server, s3_server

from foldrace.core.files import open_files

Fault = Callable[[Scene], None]
_SOAK = 100


@dataclass(frozen=True)
class Case:
    """A fault and what may follow it."""

    name: str
    fault: Fault
    goes_on: bool = False
    """True where the sweep is to go on by itself."""
    exits: tuple[int, ...] = ()
    """Exit codes that are right where it does not."""
    begins: Callable[[Scene], None] | None = None
    """Starts the sweep in another way."""
    resources: Mapping[str, object] = field(default_factory=dict)
    """Of the config."""
    env: Mapping[str, str] = field(default_factory=dict)
    within: tuple[str, ...] = ()
    """A command that starts the one that is given to it."""
    disk: str = ""
    """Size of a disk of its own."""
    cache_disk: str = ""
    """Size of a disk of the cache's own."""
    server: str = ""
    """S3 or PostgreSQL, where the sweep needs it."""
    may_lose: int = 0
    """Fold trials that the fault itself takes away: they are trained again."""


def _kill(pattern: str) -> Fault:
    def fault(scene: Scene) -> None:
        for process in scene.named(pattern)[:1]:
            with_suppressed(process.kill)

    return fault


def _send(number: signal.Signals, group: bool = False, times: int = 1) -> Fault:
    def fault(scene: Scene) -> None:
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):
                scene.signal(number, group)
            time.sleep(1.0 if times > 1 else 0)

    return fault


def _full_disk(scene: Scene) -> None:
    """Fill the disk of the run folder for some seconds."""
    ballast = scene.folder / "ballast"
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    time.sleep(8)
    ballast.unlink()


def _images_away(scene: Scene) -> None:
    """The data disk and the node's cache are away for some seconds."""
    data = scene.folder / "data"
    data.rename(scene.folder / "away")
    shutil.rmtree(scene.env["FOLDRACE_CACHE"], ignore_errors=True)
    scene.until(lambda: "paused" in scene.text() or "same error" in scene.text())
    (scene.folder / "away").rename(data)


def _refused(*words: str) -> Fault:
    """Another command on the same folder: it changes nothing."""

    def fault(scene: Scene) -> None:
        files = open_files(scene.place)
        before = [files.read(name) for name in ("sweep.yaml", "folds.csv")]
        other = Scene(scene.folder / "other", scene.config, scene.env)
        other.folder.mkdir()
        place = ("--out", scene.place) if words[0] == "run" else ()
        what = scene.config if words[0] == "run" else scene.place
        other.start(words[0], what, *place, *words[1:])
        assert other.end() == 2, other.output
        assert before == [files.read(name) for name in ("sweep.yaml", "folds.csv")]

    return fault


def _store_away(scene: Scene) -> None:
    """The object store does not answer for a minute."""
    with _stopped(SERVERS["S3"]):
        time.sleep(60)


def _database_away(scene: Scene) -> None:
    """The database of the study answers nobody until the sweep is over."""
    stopped = [p for p in psutil.process_iter(["name"]) if p.info["name"] == "postgres"]
    with contextlib.ExitStack() as stack:
        for process in stopped:
            stack.enter_context(_stopped(process))
        scene.end()


@contextlib.contextmanager
def _stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


def _no_memory(scene: Scene) -> None:
    """So little is free that Ray kills a worker."""
    memory = psutil.virtual_memory()
    wanted = int(_MEMORY_SHARE * memory.total - (memory.total - memory.available)) + (2 << 30)
    ballast = np.ones(max(1, wanted // 8))  # written to, so that it is really there
    with contextlib.suppress(Hangs):
        scene.until(lambda: "memory" in scene.text(), limit=40)
    del ballast


def _no_shared_memory(scene: Scene) -> None:
    """Fill the sweep's own /dev/shm for some seconds."""
    assert scene.process is not None
    ballast = Path(f"/proc/{scene.process.pid}/root/dev/shm/ballast")
    with ballast.open("wb") as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 20))
            file.flush()
    time.sleep(8)
    ballast.unlink()


def _damaged(pattern: str) -> Fault:
    """Kill the driver and cut a file in half."""

    def fault(scene: Scene) -> None:
        _send(signal.SIGKILL)(scene)
        scene.end()
        for path in sorted(scene.run.glob(pattern))[:1]:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return fault


def _copied(scene: Scene) -> None:
    _send(signal.SIGKILL)(scene)
    scene.end()
    shutil.copytree(scene.run, scene.folder / "copy")
    shutil.rmtree(scene.run)
    (scene.folder / "copy").rename(scene.run)


def _nobody_reads(scene: Scene) -> None:
    """A pipe whose reader ends."""
    reader, writer = os.pipe()
    scene.start("run", scene.config, "--out", scene.place, stdout=writer)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)


def _at_a_terminal(scene: Scene) -> None:
    """A terminal of its own, to press Ctrl-C on."""
    ours, theirs = os.openpty()
    scene.env = {**scene.env, "FOLDRACE_PTY": str(ours)}
    with (scene.folder / "out.txt").open("wb") as file:
        scene.process = subprocess.Popen(
            ["setsid", "--ctty", sys.executable, str(ROOT / "sweep.py"), "run", str(scene.config),
             "--out", scene.place],
            stdin=theirs, stdout=theirs, stderr=file, cwd=scene.folder,
            env=os.environ | dict(scene.env),
        )  # fmt: skip
    os.close(theirs)
    threading.Thread(target=_read_out, args=(ours,), daemon=True).start()


def _read_out(terminal: int) -> None:
    """Somebody looks at it: its buffer is small."""
    with contextlib.suppress(OSError):
        while os.read(terminal, 1 << 16):
            pass


def _press_ctrl_c(scene: Scene) -> None:
    os.write(int(scene.env["FOLDRACE_PTY"]), b"\x03")


def _false_clock(scene: Scene) -> None:
    """A wall clock of the sweep's own, in all its processes, which a file sets."""
    library, offset = scene.folder / "false_clock.so", scene.folder / "clock"
    source = ROOT / "benchmarks" / "sides" / "false_clock.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    offset.write_text("0", encoding="utf-8")
    scene.env = {**scene.env, "LD_PRELOAD": str(library), "FALSE_CLOCK": str(offset)}
    scene.begin()


def _clock_jumps(scene: Scene) -> None:
    """Two days forward, then to two days back, then right."""
    for seconds in (2 * 86400, -2 * 86400, 0):
        (scene.folder / "clock").write_text(str(seconds), encoding="utf-8")
        with contextlib.suppress(Hangs):
            scene.until(lambda: False, limit=4)


_INTERRUPTS = (130,)
_OWN_SHM = (
    "unshare",
    "-m",
    "sh",
    "-c",
    'mount -t tmpfs -o size=300m tmpfs /dev/shm; exec "$@"',
    "-",
)
_MEMORY_SHARE = 0.5
CASES = (
    Case("driver killed", _send(signal.SIGKILL), exits=(-9,)),
    Case("worker killed", _kill(r"ray::c\d+/f"), goes_on=True),
    Case("raylet killed", _kill(r"raylet/raylet "), exits=(1,)),
    Case("agent killed", _kill(r"DashboardAgent"), goes_on=True, exits=(1,)),
    Case("control process killed", _kill(r"gcs_server"), exits=(1,)),
    Case("Ctrl-C to the driver", _send(signal.SIGINT), exits=_INTERRUPTS),
    Case("Ctrl-C to the group", _send(signal.SIGINT, group=True), exits=_INTERRUPTS),
    Case("Ctrl-C twice", _send(signal.SIGINT, times=2), exits=_INTERRUPTS),
    Case("Ctrl-C on a terminal", _press_ctrl_c, exits=_INTERRUPTS, begins=_at_a_terminal),
    Case("SIGTERM to the driver", _send(signal.SIGTERM), exits=_INTERRUPTS),
    Case("SIGTERM to the group", _send(signal.SIGTERM, group=True), exits=_INTERRUPTS),
    Case("terminal closed", _send(signal.SIGHUP), exits=_INTERRUPTS),
    Case("nobody reads the output", lambda scene: None, goes_on=True, begins=_nobody_reads),
    Case("full disk", _full_disk, goes_on=True, disk="40m"),
    Case("no room for the cache", lambda scene: None, goes_on=True, cache_disk="64k"),
    Case("/dev/shm full", _no_shared_memory, goes_on=True, within=_OWN_SHM),
    Case(
        "memory full", _no_memory, goes_on=True,
        env={"RAY_memory_usage_threshold": str(_MEMORY_SHARE)},
    ),
    Case("clock jumps", _clock_jumps, goes_on=True, begins=_false_clock),
    Case("images away", _images_away, goes_on=True),
    Case("second run", _refused("run", "--set", "folds.seed=7"), goes_on=True),
    Case("second resume", _refused("resume", "--set", "ensemble.method=optimal"), goes_on=True),
    Case("state damaged", _damaged("trials/*/fold*/resume.pt"), exits=(-9,)),
    Case("journal damaged", _damaged("study.journal"), exits=(-9,)),
    Case("decision damaged", _damaged("trials/*/fold*/decision.json"), exits=(-9,)),
    Case("record damaged", _damaged("trials/*/fold*/trial.json"), exits=(-9,), may_lose=1),
    Case("candidate damaged", _damaged("trials/*/candidate.json"), exits=(-9,)),
    Case("classes damaged", _damaged("classes.json"), exits=(-9,)),
    Case("tables damaged", _damaged("leaderboard.csv"), exits=(-9,)),
    Case("run folder copied", _copied, exits=(-9,)),
    Case(
        "one of two devices killed", _kill(r"ray::.*execute|RayTrainWorker"), goes_on=True,
        resources={"devices_per_trial": 2, "max_concurrent": 1},
    ),
    Case("database away", _database_away, goes_on=True, server="PostgreSQL"),
    Case("S3: driver killed", _send(signal.SIGKILL), exits=(-9,), server="S3"),
    Case("S3: second resume", _refused("resume"), goes_on=True, server="S3"),
    Case("S3: Ctrl-C", _send(signal.SIGINT), exits=_INTERRUPTS, server="S3"),
    Case("S3: away for a minute", _store_away, goes_on=True, server="S3"),
)  # fmt: skip


@contextlib.contextmanager
def _scene(case: Case, root: Path) -> Iterator[Scene]:
    """A folder of its own, with what the case needs beside it."""
    folder = root / re.sub(r"\W+", "-", case.name)
    cache = root / f"cache-{folder.name}"
    folder.mkdir()
    cache.mkdir()
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk(folder, case.disk))
        stack.enter_context(disk(cache, case.cache_disk))
        (folder / "tmp").mkdir()
        env, url, storage = {"FOLDRACE_CACHE": str(cache), **case.env}, None, None
        if case.server == "S3":
            url = f"s3://runs/{folder.name}?{stack.enter_context(s3_server())}"
            env["TMPDIR"] = str(folder / "tmp")  # where its log lies
        elif case.server:
            storage = stack.enter_context(postgresql_server(root / "database"))
        write_data(folder / "data")
        config = write_config(
            folder / "sweep.json", folder / "data", storage, **dict(case.resources)
        )
        yield Scene(folder, config, env, within=case.within, url=url)


def _hit(case: Case, scene: Scene, expected: dict[str, str]) -> dict[str, str | int | float | bool]:
    """Run, hurt, resume, compare."""
    if case.begins is None:
        scene.begin()
    else:
        case.begins(scene)
    scene.until(scene.in_the_middle)
    before = scene.finished()
    began = time.monotonic()
    case.fault(scene)
    code = scene.end()
    seconds = time.monotonic() - began
    says = next((line for line in reversed(scene.text().splitlines()) if line.strip()), "")
    right = code == 0 if case.goes_on and not case.exits else code in (*case.exits, 0)
    files = open_files(scene.place)
    for _ in range(2):
        if len(scene.finished()) < TRIALS or not files.exists("report/index.html"):
            scene.start("resume", scene.place)
            scene.end()
    if scene.url is not None:
        scene.start("submit", scene.place)
        right &= scene.end() == 0
    after = scene.finished()
    lost = sum(after.get(name) != stat for name, stat in before.items())
    return {
        "exit": "-" if code == 0 and case.goes_on else code,
        "seconds": round(seconds, 1),
        "right": right and files.exists("submission.csv"),
        "lost": lost,
        "twice": sum(count > 1 for count in scene.trained().values()),
        "equal": digests(scene.place) == expected,
        "says": says[:70],
    }


def _soak(root: Path, expected: dict[str, str], faults: int, results: Results) -> None:
    """Sweep after sweep, each hit again and again until it is whole."""
    rng, hits, lost, twice, unequal, sweeps = random.Random(0), 0, 0, 0, 0, 0
    of_soak = [case for case in CASES[:12] if case.begins is None]
    while hits < faults:
        sweeps += 1
        with _scene(Case(f"soak {sweeps}", _send(signal.SIGINT)), root) as scene:
            scene.begin()
            before: dict[str, tuple[int, int]] = {}
            while True:
                delay = time.monotonic() + rng.uniform(0, 25)
                with contextlib.suppress(Hangs):
                    scene.until(lambda delay=delay: time.monotonic() > delay)
                if scene.process is not None and scene.process.poll() is None:
                    before |= scene.finished()
                    rng.choice(of_soak).fault(scene)
                    hits += 1
                    with contextlib.suppress(Hangs):
                        scene.until(lambda: False, limit=25)  # a worker's death ends nothing
                if scene.process is not None and scene.process.poll() is None:
                    continue
                if scene.process is not None and scene.process.returncode == 0:
                    break
                if (scene.run / "sweep.yaml").exists():
                    scene.start("resume", scene.place)
                else:  # hit before there was a run to go on with
                    scene.begin()
            after = scene.finished()
            lost += sum(after.get(name) != stat for name, stat in before.items())
            twice += sum(count > 1 for count in scene.trained().values())
            unequal += digests(scene.place) != expected
            print(f"soak: {hits} faults, {sweeps} sweeps, {lost} lost, {twice} twice, "
                  f"{unequal} unequal", flush=True)  # fmt: skip
    results.add("soak", faults=hits, sweeps=sweeps, lost=lost, twice=twice, unequal=unequal)
    results.at_most("soak: fold trials lost", 0, lost)
    results.at_most("soak: fold trials run twice", 0, twice)
    results.at_most("soak: sweeps that differ from the undisturbed one", 0, unequal)


def _undisturbed(case: Case, root: Path) -> dict[str, str]:
    """What the case's sweep comes to without a fault."""
    name = "undisturbed" if not case.resources else "undisturbed group"
    plain = Case(name if not (root / name).exists() else f"{name} again", case.fault,
                 resources=case.resources)  # fmt: skip
    with _scene(plain, root) as scene:
        scene.begin()
        assert scene.end() == 0, scene.output
        return digests(scene.place)


def main() -> None:
    given: Options = options(__doc__, only="names of faults, with commas; `soak`")
    asked = None if given.only is None else [word.strip() for word in given.only.split(",")]
    results = Results("faults")
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        root = Path(folder)
        expected: dict[str, dict[str, str]] = {}  # what the devices of a trial come to
        for case in CASES[:1] if given.quick else CASES:
            if asked is not None and case.name not in asked:
                continue
            kind = json.dumps(dict(case.resources))
            if kind not in expected:
                expected[kind] = _undisturbed(case, root)
            with _scene(case, root) as scene:
                try:
                    row = _hit(case, scene, expected[kind])
                except (Hangs, AssertionError) as error:
                    scene.kill()
                    row = {"exit": "hangs", "right": False, "says": str(error)[-70:]}
            good = row["right"] and row.get("lost", 0) <= case.may_lose and row.get("equal")
            wrong += not good
            print(f"{case.name}: {row}", flush=True)
            results.add("faults", fault=case.name, **row)
        results.at_most("faults with another end than promised", 0, wrong)
        if asked is not None and "soak" in asked:
            _soak(root, _undisturbed(CASES[0], root), 3 if given.quick else _SOAK, results)
    results.publish(given)


if __name__ == "__main__":
    main()
