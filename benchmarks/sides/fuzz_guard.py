"""Runs fuzz cases in forked processes and says what was wrong with each.

A `Target` makes a case of a number: it writes inputs into a `Box` and gives the call that reads
them. The call may return or raise what its target allows. Anything else is a finding, and so are:
a file written outside of the box's own places, a connection, a process that is started, memory
beyond `MEMORY`, more than `SECONDS`, a process that dies.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from foldrace.core.errors import FoldraceError

MEMORY = 1280 << 20  # an image of as many pixels as are allowed takes 1.2 GB
"""Bytes that the cases of a process may add to what it starts with."""
SECONDS = 20.0
"""Processor time of a case."""
_SILENT = 600.0  # seconds without a word, after which a process is stopped; others may be at work
_ROOT = Path(__file__).resolve().parents[2]
_MESSAGE = 100_000  # letters that an error may have
_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR)
"""Errors about a path that the user gave, which commands end with 2 for, too."""
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_PATHS_OF = {  # audit event -> which of its arguments are paths that change
    "os.rename": (0, 1), "os.mkdir": (0,), "os.remove": (0,), "os.rmdir": (0,), "os.link": (1,),
    "os.symlink": (1,), "os.truncate": (0,), "os.chmod": (0,), "os.chown": (0,), "os.utime": (0,),
    "os.mkfifo": (0,), "os.mknod": (0,),
}  # fmt: skip
_NEVER = {
    "socket.connect", "socket.getaddrinfo", "socket.sendto", "subprocess.Popen", "os.system",
    "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pickle.find_class",
}  # fmt: skip


class Wrong(Exception):
    """Raised by a case whose answer is not right."""


@dataclass(frozen=True)
class Box:
    """Folders of one process: `data` is what a case is given, the others may be written to."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def out(self) -> Path:
        return self.root / "out"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def write(self, name: str, data: bytes) -> Path:
        """A file of the case's own."""
        path = self.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def make(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)  # of another process
        for name in ("data", "run", "out", "cache", "tmp", "home/.config"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        os.environ.update(
            FOLDRACE_CACHE=str(self.cache),
            TMPDIR=str(self.root / "tmp"),
            HOME=str(self.root / "home"),
            XDG_CONFIG_HOME=str(self.root / "home" / ".config"),
        )
        tempfile.tempdir = None  # which is known from before
        os.chdir(self.out)

    def clear(self) -> None:
        for name in ("data", "out", "tmp"):
            for entry in os.scandir(self.root / name):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path, ignore_errors=True)
                else:
                    os.unlink(entry.path)


Call = Callable[[], object]


@dataclass(frozen=True)
class Target:
    """One thing that reads what people give it."""

    name: str
    share: float
    """Cases of a thousand."""
    make: Callable[[random.Random, Box], Call]
    allowed: tuple[type[BaseException], ...] = (FoldraceError,)
    never_but: tuple[str, ...] = ()
    """Audit events of `_NEVER` that are part of the call."""


@dataclass(frozen=True)
class Verdict:
    """What came of a case."""

    seed: int
    fault: str = ""
    """Empty where nothing is wrong."""
    accepted: bool = False
    """True where the call took what it was given."""
    seconds: float = 0.0
    grown: int = 0
    """Bytes that the process had more than at its start."""
    detail: str = ""


class _Watch:
    """An audit hook, which cannot be taken away again; what it sees counts within `with`."""

    def __init__(self, box: Box, never_but: Sequence[str]) -> None:
        allowed = box.root / "home" / ".config" / "foldrace"  # what the user has said to trust
        self._places = tuple(
            f"{place}{os.sep}" for place in (box.run, box.out, box.cache, box.root / "tmp", allowed)
        )
        self._never = _NEVER - set(never_but)
        self._on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def __enter__(self) -> _Watch:
        self.seen.clear()
        self._on = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._on = False

    def _hook(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _OPENS_TO_WRITE:
                self._check("writes", path)
        elif event in _PATHS_OF:
            for position in _PATHS_OF[event]:
                self._check(event, arguments[position])
        elif event in self._never:
            self.seen.append(f"{event} {str(arguments)[:100]}")

    def _check(self, what: str, path: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike):
            return  # a descriptor, of a file that was opened before
        self._on = False
        folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
        place = os.path.join(os.path.realpath(folder), name, "")
        self._on = True
        if not place.startswith(self._places) and os.fsdecode(path) != os.devnull:
            self.seen.append(f"{what} outside: {os.fsdecode(path)[:200]!r}")


@dataclass
class Batch:
    """Cases of one target in one process after another."""

    target: Target
    seeds: Sequence[int]
    folder: Path
    verdicts: list[Verdict] = field(default_factory=list)

    def run(self) -> list[Verdict]:
        """A process that dies or is silent is replaced by another, for the cases after."""
        left = list(self.seeds)
        while left:
            done = self._process(left)
            left = left[done:]
        return self.verdicts

    def _process(self, seeds: Sequence[int]) -> int:
        """The number of cases that one process has answered, a fatal one included."""
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(self.target, seeds, Box(self.folder), writer)
        os.close(writer)
        with os.fdopen(reader, "rb") as answers:
            lines, hung = _lines(answers.fileno(), pid)
        if hung:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        self.verdicts += [Verdict(**json.loads(line)) for line in lines]
        done = len(lines)
        if done < len(seeds) and not (done and self.verdicts[-1].fault):
            fault = "hangs" if hung else f"the process died: {status}"
            self.verdicts.append(Verdict(seeds[done], fault))
            done += 1
        return done


def _lines(reader: int, pid: int) -> tuple[list[bytes], bool]:
    """What a process has written until its end, and whether it hung before."""
    text, heard, used = bytearray(), time.monotonic(), 0.0
    while True:
        if not select.select([reader], [], [], 5.0)[0]:
            busy = _cpu_seconds(pid) - used > 2 * SECONDS
            if busy or time.monotonic() - heard > _SILENT:
                return bytes(text).splitlines(), True
            continue
        more = os.read(reader, 1 << 16)
        if not more:
            return bytes(text).splitlines(), False
        text += more
        heard, used = time.monotonic(), _cpu_seconds(pid)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _child(target: Target, seeds: Sequence[int], box: Box, writer: int) -> None:
    """Never returns."""
    seed = seeds[0]
    try:
        gc.disable()  # what the parent has imported is not looked through again
        gc.freeze()
        gc.enable()
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        torch.set_num_threads(1)  # a pool of threads is not there after a fork
        box.make()
        limit = _virtual_bytes() + 4 * MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        watch, start = _Watch(box, target.never_but), _peak()
        for seed in seeds:
            verdict = run_case(target, seed, box, watch, start)
            os.write(writer, json.dumps(asdict(verdict)).encode() + b"\n")
            if verdict.fault.startswith("memory"):
                break  # its peak stays
    except BaseException:  # a case could not be made
        fault = Verdict(seed, "the fuzzer itself", detail=traceback.format_exc()[-4000:])
        os.write(writer, json.dumps(asdict(fault)).encode() + b"\n")
    finally:
        os._exit(0)


def run_case(target: Target, seed: int, box: Box, watch: _Watch, start: int) -> Verdict:
    """One case in this process."""
    box.clear()
    rng = random.Random(f"{target.name}:{seed}")
    fault = detail = ""
    accepted = False
    call = target.make(rng, box)
    began = time.process_time()
    with watch:
        try:
            call()
            accepted = True
        except target.allowed as error:
            text = str(error)
            if len(text) > _MESSAGE:
                fault = f"a message of {len(text):,} letters"
        except OSError as error:
            if error.errno not in _PATHS:
                fault, detail = _fault(error)
        except Wrong as error:
            fault = f"wrong: {error}"[:200]
        except BaseException as error:
            fault, detail = _fault(error)
    seconds = time.process_time() - began
    grown = max(0, _peak() - start)
    if watch.seen:
        fault, detail = watch.seen[0], "\n".join(watch.seen[:10])
    if not fault and seconds > SECONDS:
        fault = f"took more than {SECONDS:.0f} s"
    if grown > MEMORY:
        fault, detail = f"memory: {grown >> 20} MB", f"{fault} {detail}"
    return Verdict(seed, fault, accepted, round(seconds, 4), grown, detail)


def _fault(error: BaseException) -> tuple[str, str]:
    """What it is in a line, and its traceback."""
    trace = "".join(traceback.format_exception(error, limit=-12))
    return f"{type(error).__name__} {_place(error)}", trace[-4000:]


def _place(error: BaseException) -> str:
    """The innermost line of the package that an error came through."""
    found = "outside of the package"
    for frame, line in traceback.walk_tb(error.__traceback__):
        path = Path(frame.f_code.co_filename)
        own = path.is_relative_to(_ROOT) and ".venv" not in path.parts
        if own and not path.is_relative_to(_ROOT / "benchmarks"):
            found = f"{path.relative_to(_ROOT)}:{line}"
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
