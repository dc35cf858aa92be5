"""Our blends against AutoGluon's EnsembleSelection, amltk's weighted_ensemble_caruana and
hillclimbers: time, loss and memory on the same OOF data with the same number of rounds.

digits       156 scikit-learn classifiers, 1,257 rows, 10 classes (`oof_data.py`)
photos       the fold trials of a real image set; `--data` names a run folder, or the folder with
             sign_digits' train.zip, on which the trials are then trained (left out without it)
synthetic    33,000 rows, 396 classes, and 20, 200 or 1,000 correlated members made from a seed;
             fewer rounds where the peers would take hours, the same for every side
on disk      10,000 members, 33,000 rows: a memory-mapped file, ours alone

Each side runs alone in a process of its own: the peers in an environment of their own, with what
their interface asks for, all else by default. `seconds` are
those of the call with its data in memory (median of several calls where one takes less than 2 s);
what numba compiles or loads is in the part `first call` and not in them. `times` is relative to
greedy (numba); `above_optimum` is the loss above that of `optimal`, whose certificate is at most
1e-6. `extra_mb` is the peak memory of the call beyond what was there with the data loaded.
`passes`: members read in the call / members; `reads_per_pass`: seconds a pass (greedy: a round) /
seconds that reading the matrix once takes. "amltk, columns" is given the true class's column alone,
which no interface of a peer suggests; hillclimbers knows nothing else, and no number of rounds. A
side that needs more memory than there is, or more time than its limit, says so.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import oof_data
from harness import Cell, Results, environment, options
from sides.blend_case import (
    COLUMNS,
    FULL,
    OURS,
    SIDES,
    Case,
    Figures,
    made_case,
    real_case,
    run_side,
)

_ROUNDS = 50
_MANY = 1_000  # members
_CACHED_MB = 100.0  # a matrix that lies in the processor's cache is not read from memory
_SHOWN = ("seconds", "loss", "members", "data_mb", "extra_mb", "certificate", "passes")


def _table(results: Results, case: Case) -> dict[str, Figures]:
    """One row per side; the figures of those that ran."""
    sides = (*OURS, *FULL, *COLUMNS)
    ran: dict[str, Figures] = {}
    notes: dict[str, str] = {}
    for side in sides:
        figures = run_side(case, side)
        if isinstance(figures, str):
            notes[side] = figures
        else:
            ran[side] = figures
    for side in sides:
        cells: dict[str, Cell] = {"note": notes[side]} if side in notes else _cells(case, side, ran)
        results.add(case.title, side=side, **cells)
    return ran


def _cells(case: Case, side: str, ran: dict[str, Figures]) -> dict[str, Cell]:
    own = ran[side]
    cells: dict[str, Cell] = {key: own[key] for key in _SHOWN if key in own}
    cells["times"] = own["seconds"] / ran["greedy (numba)"]["seconds"]
    cells["above_optimum"] = own["loss"] - ran["optimal (numba)"]["loss"]
    if side in OURS and own["data_mb"] > _CACHED_MB:
        cells["reads_per_pass"] = _reads_per_pass(own, side, case.rounds)
    return cells


def _reads_per_pass(figures: Figures, side: str, rounds: int) -> float:
    passes = rounds if side.startswith("greedy") else figures["passes"]
    return figures["seconds"] / passes / figures["read_seconds"]


def _ratio_goals(results: Results, case: Case, ran: dict[str, Figures]) -> None:
    """Against the peers, on real OOF data."""
    for peer, ours, least in (
        (FULL[0], "greedy (numba)", 1000.0),
        (FULL[1], "greedy (numba)", 1000.0),
        (FULL[0], "greedy (numpy)", 200.0),
        (FULL[1], "greedy (numpy)", 200.0),
        (FULL[2], "greedy (numba)", 20.0),
    ):
        if peer in ran:
            times = ran[peer]["seconds"] / ran[ours]["seconds"]
            results.at_least(f"{case.name}: {peer} / {ours}, seconds", least, times)


def _optimal_goals(results: Results, case: Case, ran: dict[str, Figures]) -> None:
    greedy, optimal = ran["greedy (numba)"], ran["optimal (numba)"]
    results.at_most(f"{case.name}: optimal's certificate", 1e-6, optimal["certificate"])
    if case.rounds == _ROUNDS:
        share = optimal["seconds"] / greedy["seconds"]
        results.at_most(f"{case.name}: optimal / greedy with 50 rounds, seconds", 1.0, share)


def _size_goals(results: Results, case: Case, ran: dict[str, Figures]) -> None:
    """What is promised at 1,000 members and 33,000 rows."""
    for side, seconds in (("greedy (numba)", 1.0), ("optimal (numba)", 0.5)):
        own = ran[side]
        peak = (own["data_mb"] + own["extra_mb"]) / own["data_mb"]
        results.at_most(f"{case.name}: {side}, seconds", seconds, own["seconds"])
        results.at_most(f"{case.name}: {side}, peak memory / matrix", 3.0, peak)
        reads = _reads_per_pass(own, side, case.rounds)
        results.at_most(f"{case.name}: {side}, seconds a pass / a read", 2.0, reads)


def _first_calls(results: Results) -> None:
    """In a new process, on 60 members x 200 rows: what the others leave out."""
    with tempfile.TemporaryDirectory() as empty:
        for how, side, cache in (
            ("nothing compiled yet", "greedy (numba)", empty),
            ("compiled before", "greedy (numba)", empty),
            ("compiled before", "optimal (numba)", empty),
            ("nothing to compile", "greedy (numpy)", empty),
        ):
            ended = subprocess.run(
                [sys.executable, str(SIDES / "our_blend.py"), "first_call", side],
                env=environment(NUMBA_CACHE_DIR=cache),
                capture_output=True,
                text=True,
                check=True,
            )
            results.add("first call", side=side, how=how, seconds=float(ended.stdout))


def _on_disk(results: Results, case: Case) -> None:
    (case.folder / "mapped").touch()
    for side in ("greedy (numba)", "optimal (numba)"):
        figures = run_side(case, side)
        assert not isinstance(figures, str), figures
        shown = {key: figures[key] for key in (*_SHOWN, "peak_mb")}
        results.add(f"on disk: {case.title}", side=side, **shown)
        results.at_most(f"on disk, {case.name}: {side}, peak GB", 8.0, figures["peak_mb"] / 1e3)


def _compare(results: Results, case: Case, quick: bool) -> None:
    ran = _table(results, case)
    _optimal_goals(results, case, ran)
    if quick:
        return
    if case.part != "synthetic":
        _ratio_goals(results, case, ran)
    if case.members == _MANY:
        _size_goals(results, case, ran)


def _synthetic(results: Results, top: Path) -> None:
    for members, rounds in ((20, 10), (200, 2), (_MANY, _ROUNDS)):
        with tempfile.TemporaryDirectory(dir=top) as folder:
            _compare(results, made_case(Path(folder), members, 33_000, 396, rounds), quick=False)
    with tempfile.TemporaryDirectory(dir=top) as folder:
        _on_disk(results, made_case(Path(folder), 10_000, 33_000, 396, _ROUNDS))


def main() -> None:
    given = options(
        __doc__, data="a run folder, or the folder with sign_digits' train.zip (trains on it)"
    )
    results = Results("ensemble_peers")
    with tempfile.TemporaryDirectory() as top:
        digits = oof_data.digits(given.quick).rows(np.arange(1257))
        _compare(results, real_case(Path(top), digits, 10 if given.quick else _ROUNDS), given.quick)
        if given.data is not None:
            photos = oof_data.real_image_set(given.data)
            _compare(results, real_case(Path(top), photos, _ROUNDS), given.quick)
        if given.quick:
            _compare(results, made_case(Path(top), 20, 2_000, 50, rounds=5), given.quick)
        else:
            _synthetic(results, Path(top))
    _first_calls(results)
    results.publish(given)


if __name__ == "__main__":
    main()
