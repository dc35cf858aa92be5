"""Who works on a run folder: claims, kept fresh by their owners and seen by everyone.

A claim is a small file of its own, written again every few seconds. On a mounted folder a lock of
the operating system decides, which goes with its process, and the claim only says whose it is. An
object store has no locks: there the claims decide. Each comer puts its own and looks at the others;
since what was put is in every later listing, of two that come together at least one sees the other.
All ages are by the folder's own clock.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from foldrace.core.errors import RunFolderError
from foldrace.core.files import Files, LocalFiles, record_json, sound_record
from foldrace.run_folder.records import Count, PlainName, Seconds, StoredRecord

BEAT = 10.0
"""Seconds between two writes of a claim."""
SILENT = 60.0
"""Seconds without one after which its owner counts as gone."""
_log = logging.getLogger("foldrace")


class Claim(StoredRecord):
    """One process at work on a folder."""

    owner: PlainName
    command: str
    """Such as `resume`."""
    host: str
    place: str
    """Same text: the same machine since its start, and the same numbers of processes."""
    pid: Count
    process_started: Count
    """Start of the process in ticks of its machine: numbers of processes are used again."""
    since: Seconds
    """Unix seconds."""
    folder: str = ""
    """The folder on its disk, which a copy of it does not have; empty in an object store."""

    @property
    def words(self) -> str:
        """The owner, for people."""
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"`{self.command}` on {self.host}, process {self.pid}, since {since}"


class Claims:
    """The claims in one folder of a run, such as `logs/driver`."""

    def __init__(self, files: Files, folder: str) -> None:
        self._files, self._folder = files, folder

    def alive(self, now: float | None = None) -> list[Claim]:
        """Claims of owners that are at work; `now` is the folder's clock, by default this one's."""
        now = time.time() if now is None else now
        return [claim for claim, at in self._all() if _is_alive(claim, now - at)]

    def _id(self) -> str:
        """Number of the run folder on its disk, on this machine."""
        if not isinstance(self._files, LocalFiles):
            return ""
        found = self._files.path.stat()
        return f"{found.st_dev}:{found.st_ino}"

    @contextlib.contextmanager
    def hold(self, command: str, patience: float = 0.0) -> Iterator[HeldClaim]:
        """Be the only owner, for the block.

        RunFolderError where another one is, and stays so for `patience` seconds.
        """
        with contextlib.ExitStack() as stack:
            if isinstance(self._files, LocalFiles):
                self._lock(stack, self._files, patience)
            claim = _own_claim(command, self._id())
            stack.callback(self._files.delete, self._name(claim.owner))
            if isinstance(self._files, LocalFiles):
                for name in self._files.names(self._folder):  # of killed owners
                    self._files.delete(f"{self._folder}/{name}")
                self._put(claim)
            else:
                self._outlast(claim, patience)
            yield stack.enter_context(HeldClaim(self, claim))

    def keep(self, claim: Claim) -> bool:
        """Write a claim again; False where it is gone: another one took its owner for dead."""
        if not self._files.exists(self._name(claim.owner)):
            return False
        self._put(claim)
        return True

    def _lock(self, stack: contextlib.ExitStack, files: LocalFiles, patience: float) -> None:
        lock = files.place(f"{self._folder}.lock")
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock, timeout=patience))
        except Timeout as error:
            raise self._taken(self.alive()) from error
        except OSError as error:
            raise RunFolderError.single(files.root, f"cannot be written: {error}") from error

    def _outlast(self, claim: Claim, patience: float) -> None:
        """Put a claim beside which no other one is alive."""
        ends = time.monotonic() + patience
        while others := self._beside(claim):
            if not any(_is_alive(other, age) for other, age in others):
                for other, _ in others:
                    self._files.delete(self._name(other.owner))
                if all(_is_dead(other) for other, _ in others):
                    return
                # One that was only cut off from the store may be about to write its claim again.
                time.sleep(1.5 * BEAT)
                continue
            self._files.delete(self._name(claim.owner))
            if time.monotonic() >= ends:
                raise self._taken([other for other, _ in others])
            time.sleep(random.uniform(0.5, 1.5))  # two that wait do not come together again

    def _beside(self, claim: Claim) -> list[tuple[Claim, float]]:
        """Other claims and their ages in seconds, with one's own put first."""
        self._put(claim)
        now = self._files.modified(self._name(claim.owner))
        return [(other, now - at) for other, at in self._all() if other.owner != claim.owner]

    def _put(self, claim: Claim) -> None:
        self._files.write(self._name(claim.owner), record_json(claim))

    def _all(self) -> Iterator[tuple[Claim, float]]:
        """Claims that can be read, and when they were written, by the folder's clock."""
        for name in self._files.names(self._folder):
            path = f"{self._folder}/{name}"
            try:
                claim = sound_record(self._files, path, Claim)
                at = self._files.modified(path)
            except OSError:
                if self._files.exists(path):
                    raise
                continue  # its owner has just ended
            is_copied = claim is not None and claim.place == _place() and claim.folder != self._id()
            if claim is not None and not is_copied:
                yield claim, at

    def _name(self, owner: str) -> str:
        return f"{self._folder}/{owner}.json"

    def _taken(self, alive: list[Claim]) -> RunFolderError:
        who = alive[0].words if alive else "another process"
        return RunFolderError.single(
            self._files.root, f"{who} is at work on it; wait for it, or end it first"
        )


class HeldClaim:
    """A claim that a thread keeps fresh, for a block."""

    def __init__(self, claims: Claims, claim: Claim) -> None:
        self._claims, self._claim = claims, claim
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="claim", daemon=True)
        self.lost = False
        """True once another process has taken this one for dead: nothing more may be written."""

    def __enter__(self) -> HeldClaim:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=BEAT)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self.lost = not self._claims.keep(self._claim)
            except OSError as error:  # a store that is away: the next beat finds out what happened
                _log.warning("the claim on the run folder cannot be written: %s", error)
            if self.lost:
                return


def _own_claim(command: str, folder: str) -> Claim:
    return Claim(
        owner=uuid.uuid4().hex,
        command=command,
        host=socket.gethostname(),
        place=_place(),
        pid=os.getpid(),
        process_started=_process_started(os.getpid()) or 0,
        since=time.time(),
        folder=folder,
    )


def _is_alive(claim: Claim, age: float) -> bool:
    """True where its owner is at work: its process is there, or elsewhere it was written lately."""
    return not _is_dead(claim) if claim.place == _place() else age < SILENT


def _is_dead(claim: Claim) -> bool:
    """True where it is known that its process has ended."""
    return claim.place == _place() and _process_started(claim.pid) != claim.process_started


def _place() -> str:
    """A text that is the same in all processes that see the same process numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        text = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        text = f"{socket.gethostname()} {uuid.getnode()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _process_started(pid: int) -> int | None:
    """Ticks from the machine's start to the process's, which no change of a clock moves.

    None where there is no such process, and 0 where the system does not tell.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except FileNotFoundError:
        return None if Path("/proc/self").exists() else 0
