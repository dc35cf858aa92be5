"""What every benchmark shares: its options, the record of the machine, the table, the JSON file.

A benchmark adds rows and goals to a `Results`; `Results.publish` prints them and writes
`benchmarks/results/<name>.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Generic, TypeVar

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
_RESULTS = ROOT / "benchmarks" / "results"
_WIDTH = 160  # columns of a log, so that no figure is cut
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
Run = TypeVar("Run")
Cell = str | int | float | bool | None

sys.path.insert(0, str(ROOT))  # a checkout that is not installed can be measured too


@dataclass(frozen=True)
class Options:
    """The command line of every benchmark."""

    quick: bool
    """A smaller version, of at most a minute."""
    out: Path | None
    """Where the JSON goes; None: beside the committed results, and nowhere for a quick run, so
    that it never replaces a full one."""
    data: Path | None = None
    """A folder of real images, for the benchmarks that use one."""
    record: Path | None = None
    """Where what is replayed is trained anew, for the benchmark that replays."""
    before: Path | None = None
    """A checkout of an earlier commit, for the benchmark that compares with one."""
    only: str | None = None
    """Names of the parts that are run, for the benchmark that takes hours."""


def options(
    doc: str | None,
    data: str | None = None,
    record: str | None = None,
    before: str | None = None,
    only: str | None = None,
) -> Options:
    """From the command line; `doc` is the benchmark's docstring, the others say what the options of
    their names are, where there are such options."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a smaller version, at most a minute")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/)")
    for name, text in (("--data", data), ("--record", record), ("--before", before)):
        if text is not None:
            parser.add_argument(name, type=Path, help=text)
    if only is not None:
        parser.add_argument("--only", help=only)
    given = parser.parse_args()
    return Options(**vars(given))


@dataclass(frozen=True)
class Machine:
    """Where the figures were taken."""

    cores: int
    memory_gb: float
    device: str


def machine() -> Machine:
    """This one; `device` is the first GPU, or the processor."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    if limit.isdigit():
        memory = min(memory, int(limit))
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor()
    return Machine(len(os.sched_getaffinity(0)), round(memory / 1e9, 1), device)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"cpu: {names[0]}" if names else "cpu"


@dataclass(frozen=True)
class Goal:
    """A figure that was promised, and the one that was measured."""

    goal: str
    target: str
    measured: float
    met: bool


@dataclass
class Results:
    """The figures of one benchmark. Rows of the same `part` make one table."""

    name: str
    rows: list[dict[str, Cell]] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)

    def add(self, part: str, **cells: Cell) -> None:
        self.rows.append({"part": part, **cells})

    def at_most(self, goal: str, limit: float, measured: float) -> None:
        self.goals.append(Goal(goal, f"<= {limit:g}", measured, measured <= limit))

    def at_least(self, goal: str, limit: float, measured: float) -> None:
        self.goals.append(Goal(goal, f">= {limit:g}", measured, measured >= limit))

    def publish(self, given: Options, console: Console | None = None) -> None:
        """Print the tables; write the JSON."""
        console = console or Console(width=None if sys.stdout.isatty() else _WIDTH)
        for part in dict.fromkeys(str(row["part"]) for row in self.rows):
            cells = [
                {k: v for k, v in row.items() if k != "part"}
                for row in self.rows
                if row["part"] == part
            ]
            console.print(_table(part, cells))
        if self.goals:
            console.print(_table("goals", [asdict(goal) for goal in self.goals]))
        out = given.out or (None if given.quick else _RESULTS / f"{self.name}.json")
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(self._record(), indent=1) + "\n", encoding="utf-8")
            console.print(f"Written: {out}")

    def _record(self) -> dict[str, object]:
        return {
            "name": self.name,
            "date": datetime.now(UTC).date().isoformat(),
            "machine": asdict(machine()),
            "rows": self.rows,
            "goals": [asdict(goal) for goal in self.goals],
        }


@dataclass(frozen=True)
class Turns(Generic[Run]):
    """Two sides measured in turns, A B B A ...: what else the machine does hits both alike."""

    a: tuple[Run, ...]
    b: tuple[Run, ...]

    def ratios(self, figure: Callable[[Run], float]) -> tuple[float, ...]:
        """Of each pair, a's figure / b's."""
        return tuple(figure(x) / figure(y) for x, y in zip(self.a, self.b, strict=True))


def in_turns(a: Callable[[], Run], b: Callable[[], Run], pairs: int) -> Turns[Run]:
    """The order within a pair changes from pair to pair."""
    runs: tuple[list[Run], list[Run]] = ([], [])
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 == 0 else (1, 0):
            runs[side].append((a, b)[side]())
    return Turns(tuple(runs[0]), tuple(runs[1]))


def environment(**more: str) -> dict[str, str]:
    """For a process of its own, whose worker processes import our packages too."""
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    return os.environ | {"PYTHONPATH": path} | more


def _table(title: str, rows: Sequence[Mapping[str, Cell]]) -> Table:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    numbers = {c for c in columns if any(isinstance(row.get(c), int | float) for row in rows)}
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in numbers else "left")
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    return table


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)
