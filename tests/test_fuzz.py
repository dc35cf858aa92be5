"""A small part of benchmarks/fuzz.py, the same cases each time: what people feed the package is
taken or refused in its own words, within bounds, and nothing is written or fetched elsewhere."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.sides.fuzz_guard import MEMORY, Batch, Box, Target, Verdict
from benchmarks.sides.fuzz_targets import all_targets
from foldrace.core.errors import UserError

_CASES = 3_000
_SLOW = {"report", "processes", "weights", "OOF rows"}
"""One case of these takes as long as a hundred others."""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Verdict]]:
    """Target -> what came of its cases."""
    root = tmp_path_factory.mktemp("fuzz").resolve()
    targets = [target for target in all_targets(root) if target.name not in _SLOW]
    whole = sum(target.share for target in targets)
    return {
        target.name: Batch(
            target, range(max(5, round(_CASES * target.share / whole))), root / "box"
        ).run()
        for target in targets
    }


def test_no_case_has_a_fault(verdicts: dict[str, list[Verdict]]) -> None:
    faults = [
        f"{name}:{case.seed} {case.fault}"
        for name, cases in verdicts.items()
        for case in cases
        if case.fault
    ]
    assert faults == []
    assert sum(map(len, verdicts.values())) >= _CASES


def test_every_target_takes_what_is_sound(verdicts: dict[str, list[Verdict]]) -> None:
    """Else its cases would be refused at the door, and nothing behind it would be tried."""
    accepted = {name: sum(case.accepted for case in cases) for name, cases in verdicts.items()}
    assert [name for name, count in accepted.items() if count == 0] == []


def _writes(box: Box) -> None:
    (box.root / "elsewhere").write_bytes(b"")


def _leads_out(box: Box) -> None:
    (box.out / "link").symlink_to(box.root)
    (box.out / "link" / "elsewhere").mkdir(exist_ok=True)


def _connects(box: Box) -> None:
    socket.create_connection(("127.0.0.1", 9), timeout=1)


def _starts(box: Box) -> None:
    subprocess.run(["true"])


def _unpickles(box: Box) -> None:
    pickle.loads(pickle.dumps(Path("x")))


def _grows(box: Box) -> None:
    bytearray(MEMORY + (64 << 20))


def _dies(box: Box) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raises(box: Box) -> None:
    {}["key"]


def _says_too_much(box: Box) -> None:
    raise UserError.single("x", "y" * 1_000_000)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (_writes, "outside"),
        (_leads_out, "outside"),
        (_connects, "socket."),
        (_starts, "subprocess.Popen"),
        (_unpickles, "pickle.find_class"),
        (_grows, "memory"),
        (_dies, "died"),
        (_raises, "KeyError"),
        (_says_too_much, "letters"),
    ],
)
def test_what_counts_as_a_fault(call: Callable[[Box], None], fault: str, tmp_path: Path) -> None:
    assert [fault in verdict.fault for verdict in _run(call, tmp_path)] == [True] * 2


def _good(box: Box) -> None:
    (box.run / "a").write_bytes(b"")
    raise UserError.single("x", "is wrong")


def test_what_does_not(tmp_path: Path) -> None:
    assert [(v.fault, v.accepted) for v in _run(_good, tmp_path)] == [("", False)] * 2


def _run(call: Callable[[Box], None], folder: Path) -> list[Verdict]:
    return Batch(Target("x", 1, lambda rng, box: lambda: call(box)), range(2), folder / "box").run()
