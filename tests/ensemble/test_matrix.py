"""The derived matrix: what it holds, when it is read again, and that no wrong file is trusted."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.ensemble.pool import Member, MemberRows
from foldrace.ensemble.selection.matrix import open_matrix
from foldrace.ensemble.selection.members import OofSource, other_runs, run_sources
from foldrace.run_folder.store import RunStore
from tests.ensemble.made_runs import (
    FOLD,
    LABELS,
    ROWS,
    TABLE,
    K,
    add_candidate,
    make_run,
    random_prob,
    rewrite,
)
from tests.ensemble.selection_runs import add, make_store
from tests.ensemble.temperature_reference import smoothed_loss, smoothed_temperature

M = 4


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = make_run(tmp_path / "run")
    for i in range(M):
        add_candidate(store, f"c{i:04d}", random_prob(i, 1 + i / 4))
    return store


def opened(store: RunStore, calibrate: bool = True) -> MemberRows:
    return open_matrix(store, run_sources(store), calibrate)


def watched(store: RunStore) -> tuple[list[OofSource], list[str]]:
    """Sources that note who is read."""
    read: list[str] = []

    def noting(source: OofSource) -> OofSource:
        def log_prob() -> NDArray[np.float32]:
            read.append(source.member.candidate)
            return source.log_prob()

        return replace(source, log_prob=log_prob)

    return [noting(source) for source in run_sources(store)], read


def content(rows: MemberRows) -> list[NDArray[np.floating]]:
    return [np.array(a) for a in (rows.raw, rows.calibrated, rows.temperatures)]


def assert_same(left: MemberRows, right: MemberRows) -> None:
    assert left.members == right.members
    assert left.duplicates == right.duplicates
    for one, other in zip(content(left), content(right), strict=True):
        np.testing.assert_array_equal(one, other)


def at(
    prob: NDArray[np.float64], temperature: float, rows: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """True-class probabilities at the temperature, by the definition."""
    powers = prob[rows] ** (1 / temperature)
    return np.asarray((powers / powers.sum(1, keepdims=True))[np.arange(rows.sum()), LABELS[rows]])


def test_numbers_equal_the_definition(store: RunStore) -> None:
    """The least loss of each side by another minimiser; columns by another formula."""
    rows = opened(store)
    every = np.ones(ROWS, dtype=bool)
    assert [m.candidate for m in rows.members] == [f"c{i:04d}" for i in range(M)]
    np.testing.assert_array_equal(rows.parts, FOLD)
    for i in range(M):
        prob = random_prob(i, 1 + i / 4)
        np.testing.assert_array_equal(rows.raw[i], prob[every, LABELS].astype(np.float32))
        stored = np.exp(run_sources(store)[i].log_prob().astype(np.float64))
        np.testing.assert_array_equal(rows.read(i), run_sources(store)[i].log_prob())
        for side in range(1 + K):
            fitted_on = every if side == 0 else side - 1 != FOLD
            temperature = float(rows.temperatures[side, i])
            given = np.log(stored[fitted_on]), LABELS[fitted_on]
            best = smoothed_loss(*given, 1 / smoothed_temperature(*given))
            assert smoothed_loss(*given, 1 / temperature) == pytest.approx(best, abs=1e-6)
            np.testing.assert_allclose(
                rows.calibrated[side, i], at(stored, temperature, every), rtol=1e-4
            )


def test_without_calibration_the_calibrated_are_the_raw(store: RunStore) -> None:
    rows = opened(store, calibrate=False)
    assert rows.temperatures.shape == (1 + K, M) and (rows.temperatures == 1).all()
    assert rows.calibrated.shape == (1 + K, M, ROWS)
    for side in rows.calibrated:
        np.testing.assert_array_equal(side, rows.raw)
    assert np.load(store.blend.matrix_path() / "calibrated.npy").size == 0


def test_calibration_may_be_switched(store: RunStore) -> None:
    """A file without calibration is not enough; one with it serves both."""
    opened(store, calibrate=False)
    sources, read = watched(store)
    with_it = open_matrix(store, sources)
    assert len(read) == M
    without = open_matrix(store, sources, calibrate=False)
    assert len(read) == M
    assert (without.temperatures == 1).all()
    assert_same(open_matrix(store, sources), with_it)
    assert len(read) == M
    some = open_matrix(store, sources[1:], calibrate=False)  # written without it
    assert len(read) == M and (some.temperatures == 1).all()
    np.testing.assert_array_equal(some.calibrated[1], with_it.raw[1:])


def test_arrays_are_mapped_and_read_only(store: RunStore) -> None:
    rows = opened(store)
    for array in (rows.raw, rows.calibrated, rows.temperatures):
        assert not array.flags.owndata and not array.flags.writeable
    assert rows.raw.flags.c_contiguous and rows.calibrated[1].flags.c_contiguous


def test_the_folder_holds_npy_files(store: RunStore) -> None:
    matrix = opened(store)
    for name, array in zip(("raw", "calibrated", "temperatures"), content(matrix), strict=True):
        np.testing.assert_array_equal(np.load(store.blend.matrix_path() / f"{name}.npy"), array)
    assert os.listdir(store.blend.matrix_path().parent) == ["matrix"]


def test_only_what_changed_is_read_again(store: RunStore) -> None:
    first = opened(store)
    sources, read = watched(store)
    assert_same(open_matrix(store, sources), first)
    assert read == []
    add_candidate(store, "c0002", random_prob(20))  # trained anew
    add_candidate(store, "c0009", random_prob(9))
    sources, read = watched(store)
    second = open_matrix(store, sources)
    assert sorted(read) == ["c0002", "c0009"]
    shutil.rmtree(store.blend.matrix_path())
    assert_same(opened(store), second)
    np.testing.assert_array_equal(second.raw[[0, 1, 3]], first.raw[[0, 1, 3]])
    store.remove_weights("c0001", "raw")
    sources, read = watched(store)
    third = open_matrix(store, sources)
    assert read == [] and [m.candidate for m in third.members] == [
        "c0000", "c0002", "c0003", "c0009",
    ]  # fmt: skip
    np.testing.assert_array_equal(third.calibrated, second.calibrated[:, [0, 2, 3, 4]])


def test_other_folds_take_nothing_over(store: RunStore, tmp_path: Path) -> None:
    """Even where the members' files are said to be the same."""
    other = make_run(tmp_path / "other", replace(TABLE, fold=(FOLD + 1) % K))
    for i in range(M):
        add_candidate(other, f"c{i:04d}", random_prob(i, 1 + i / 4))
    ours, theirs = (
        [replace(source, fingerprint="same") for source in run_sources(run)]
        for run in (store, other)
    )
    open_matrix(store, ours)
    expected = open_matrix(other, theirs)
    shutil.rmtree(other.blend.matrix_path())
    shutil.copytree(store.blend.matrix_path(), other.blend.matrix_path())
    assert_same(open_matrix(other, theirs), expected)


def test_exact_duplicates_are_merged_into_the_first(store: RunStore, tmp_path: Path) -> None:
    add_candidate(store, "c0004", random_prob(0, 1))
    add_candidate(store, "c0005", random_prob(5))
    other = make_run(tmp_path / "other")
    add_candidate(other, "c0000", random_prob(0, 1))
    add_candidate(other, "c0007", random_prob(5))
    sources = [*other_runs(store, [other.root]), *run_sources(store)]
    for _ in range(2):  # written, and read back
        matrix = open_matrix(store, sources)
        assert matrix.duplicates == (
            (
                Member("c0000", "raw", "timm/x"),
                Member("c0004", "raw", "timm/x"),
                Member("c0000", "raw", "timm/x", other.root),
            ),
            (Member("c0005", "raw", "timm/x"), Member("c0007", "raw", "timm/x", other.root)),
        )
        names = [m.candidate for m in matrix.members]
        assert names == ["c0000", "c0001", "c0002", "c0003", "c0005"]
        assert matrix.raw.shape == (5, ROWS)
        np.testing.assert_array_equal(
            matrix.raw[4], random_prob(5)[np.arange(ROWS), LABELS].astype(np.float32)
        )
        np.testing.assert_allclose(np.exp(matrix.read(4)), random_prob(5), rtol=0.01)
    store.forget_trial("c0000", 0)  # the first of them goes, with its numbers in the file
    again = open_matrix(store, run_sources(store))
    assert again.duplicates == ()
    np.testing.assert_array_equal(again.raw[-2], matrix.raw[0])


def spoiled(store: RunStore, candidate: str, fold: int, name: str, change: Callable) -> None:  # type: ignore[type-arg]
    path = Path(store.root) / "trials" / candidate / f"fold{fold}" / name
    array = np.load(path)
    change(array)
    rewrite(store, candidate, fold, name, array)


def test_all_violations_of_all_members_come_at_once(store: RunStore) -> None:
    before = opened(store)
    row = [int(np.flatnonzero(fold == FOLD)[3]) for fold in range(K)]
    spoiled(store, "c0000", 1, "oof.npy", lambda a: a.__setitem__(3, np.nan))
    spoiled(store, "c0001", 2, "true_prob.npy", lambda a: a.__setitem__(3, 1.25))
    spoiled(store, "c0003", 0, "rows.npy", lambda a: a.__setitem__(3, a[4]))
    with pytest.raises(RunFolderError) as caught:
        opened(store)
    assert caught.value.exit_code == 2
    assert [str(p) for p in caught.value.problems] == [
        f"{store.root}/trials/c0000/fold1/oof.npy: c0000 raw, fold 1, line {row[1] + 2} of "
        f"folds.csv ({row[1]}.png): class a has the log-probability nan, should be <= 0; delete "
        "this fold's folder and resume",
        f"{store.root}/trials/c0001/fold2/true_prob.npy: c0001 raw, fold 2, line {row[2] + 2} of "
        f"folds.csv ({row[2]}.png): true_prob is 1.25, should be in [0, 1]; delete this fold's "
        "folder and resume",
        f"{store.root}/trials/c0003/fold0/rows.npy: c0003, fold 0: does not hold each scored "
        f"row once, for example line {row[0] + 2} of folds.csv ({row[0]}.png) is missing (30 "
        "rows for 30 of fold 0); delete this fold's folder and resume",
    ]
    assert os.listdir(store.blend.matrix_path().parent) == ["matrix"]
    for i in range(M):
        add_candidate(store, f"c{i:04d}", random_prob(i, 1 + i / 4))
    assert_same(opened(store), before)


def test_files_that_cannot_be_read_are_told_once_with_what_to_do(tmp_path: Path) -> None:
    """rows.npy is shared by the variants."""
    store = make_store(tmp_path / "variants")
    add(store, 0, variants=("raw", "ema"))
    folder = Path(store.root, "trials/c0000")
    for name in ("fold0/rows.npy", "fold1/true_prob_ema.npy"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-7])
    header = (folder / "fold2/oof.npy").read_bytes()
    (folder / "fold2/oof.npy").write_bytes(header.replace(b"<f2", b"|O8"))
    with pytest.raises(RunFolderError) as caught:
        opened(store)
    problems = {p.where.split("c0000/")[1]: p.message for p in caught.value.problems}
    assert len(problems) == len(caught.value.problems) == 3
    for name, message in problems.items():
        assert message.startswith(f"c0000, fold {name[4]}: cannot be read: ")
        assert message.endswith("; delete this fold's folder and resume")


def test_a_single_scored_row_cannot_be_blended(tmp_path: Path) -> None:
    store = make_store(tmp_path / "one", k=1)
    lines = store.files.read("folds.csv").decode().splitlines()
    scored = next(i for i, line in enumerate(lines) if line.endswith(",0"))
    others = [f"{line[:-2]},-1" if line.endswith(",0") else line for line in lines[1:]]
    others[scored - 1] = lines[scored]
    store.files.write("folds.csv", "\n".join([lines[0], *others, ""]).encode())
    store = RunStore(store.root)
    add(store, 0, folds=(0,))
    with pytest.raises(RunFolderError, match=r"folds\.csv: 1 of 90 rows are scored.*at least 2"):
        opened(store)


Damage = Callable[[bytes], bytes]


def torn(data: bytes) -> bytes:
    return data[:-40]


def longer(data: bytes) -> bytes:
    return data + b"x"


def empty(data: bytes) -> bytes:
    return b""


def replaced(old: bytes, new: bytes) -> Damage:
    return lambda data: data.replace(old, new, 1)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *((f"{array}.npy", way) for way in (torn, longer, empty)
          for array in ("raw", "calibrated", "temperatures")),
        ("raw.npy", replaced(b"<f4", b"<f2")),
        ("raw.npy", replaced(b"<f4", b"<i4")),
        ("raw.npy", replaced(b"<f4'", b"|O8'")),
        ("raw.npy", replaced(b"(4, 90)", b"(9, 40)")),
        ("raw.npy", replaced(b"False", b"True ")),
        ("raw.npy", replaced(b"{", b"(")),
        ("raw.npy", replaced(b"NUMPY", b"DUMPY")),
        ("index.json", torn),
        ("index.json", longer),
        ("index.json", empty),
        ("index.json", lambda data: b"[]"),
        ("index.json", replaced(b'"key": "', b'"key": "0')),
        ("index.json", replaced(b"[4, 4, 90]", b"[4, 9, 40]")),
        ("index.json", replaced(b", 3]]", b", 7]]")),
        ("index.json", replaced(b'"raw"', b"12345")),
    ],
)  # fmt: skip
def test_a_damaged_or_foreign_folder_is_made_anew(
    store: RunStore, name: str, damage: Damage
) -> None:
    expected = opened(store)
    path = store.blend.matrix_path() / name
    good = path.read_bytes()
    assert damage(good) != good
    path.unlink()  # the mapped file itself is not touched
    assert_same(opened(store), expected)
    path.unlink()
    path.write_bytes(damage(good))
    sources, read = watched(store)
    assert_same(open_matrix(store, sources), expected)
    assert len(read) == M
    if name != "index.json":  # it differs at each writing
        assert path.read_bytes() == good


def test_arrays_of_two_matrices_are_never_mixed(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another blend puts its matrix in place while this one maps the arrays."""
    ours, theirs = run_sources(store)[:2], run_sources(store)[2:]
    expected = open_matrix(store, ours)
    mapped, swaps = np.lib.format.open_memmap, []

    def open_memmap(path: Path, mode: str, *args: object) -> object:
        if mode == "r" and path.parent == store.blend.matrix_path() and not swaps:
            swaps.append(path)
            open_matrix(store, theirs)
        return mapped(path, mode, *args)

    monkeypatch.setattr(np.lib.format, "open_memmap", open_memmap)
    assert_same(open_matrix(store, ours), expected)
    assert swaps


def test_an_open_matrix_outlives_its_file(store: RunStore) -> None:
    first = opened(store)
    held = content(first)
    add_candidate(store, "c0000", random_prob(30))
    second = opened(store)
    for array, expected in zip(content(first), held, strict=True):
        np.testing.assert_array_equal(array, expected)
    assert (second.raw[0] != first.raw[0]).any()


def test_blends_at_the_same_time_do_not_meet(store: RunStore) -> None:
    """Each sees the members that it asked for, whoever wrote last."""
    expected = {n: content(open_matrix(store, run_sources(store)[:n])) for n in range(1, M + 1)}
    barrier = threading.Barrier(M)

    def work(n: int) -> None:
        sources = run_sources(store)[:n]
        barrier.wait()
        for _ in range(10):
            found = content(open_matrix(store, sources))
            for one, other in zip(found, expected[n], strict=True):
                np.testing.assert_array_equal(one, other)

    with ThreadPoolExecutor(M) as threads:
        list(threads.map(work, expected))
    assert os.listdir(store.blend.matrix_path().parent) == ["matrix"]


def test_what_a_killed_process_left_goes_after_a_day(store: RunStore) -> None:
    folder = store.blend.matrix_path().parent
    folder.mkdir()
    for name in ("old", "new"):
        (folder / f".part-{name}-matrix").mkdir()
        (folder / f".part-{name}-matrix" / "raw.npy").write_bytes(b"half")
    yesterday = time.time() - 25 * 3600
    os.utime(folder / ".part-old-matrix", (yesterday, yesterday))
    opened(store)
    assert sorted(os.listdir(folder)) == [".part-new-matrix", "matrix"]


def test_a_folder_that_cannot_be_written_is_the_users_problem(store: RunStore) -> None:
    store.files.write("ensemble", b"a file where a folder should be")
    with pytest.raises(RunFolderError, match=r"matrix: cannot be written.*room"):
        opened(store)


def test_one_fixed_split_is_cut_into_five_parts(tmp_path: Path) -> None:
    store = make_run(tmp_path / "fixed", replace(TABLE, fold=np.where(FOLD == 0, 0, -1)))
    add_candidate(store, "c0000", random_prob(0), folds=(0,))
    rows = opened(store)
    assert rows.calibrated.shape == (6, 1, (FOLD == 0).sum())
    np.testing.assert_array_equal(rows.labels, LABELS[FOLD == 0])
    assert np.bincount(rows.parts).tolist() == [6] * 5


def test_the_matrix_of_a_run_in_an_object_store_lies_in_the_users_cache(
    s3_environment: str, own_cache: Path
) -> None:
    query = f"endpoint_override=http://{s3_environment}&scheme=http&region=us-east-1"
    store = make_run(f"s3://runs/matrix?{query}")
    for i in range(2):
        add_candidate(store, f"c{i:04d}", random_prob(i))
    matrix = opened(store)
    assert store.blend.matrix_path().is_relative_to(own_cache)
    np.testing.assert_allclose(matrix.raw[1], random_prob(1)[np.arange(ROWS), LABELS])
    time.sleep(1.1)  # S3 tells times in whole seconds
    add_candidate(store, "c0001", random_prob(11))
    sources, read = watched(store)
    again = open_matrix(store, sources)
    assert read == ["c0001"]
    np.testing.assert_allclose(again.raw[1], random_prob(11)[np.arange(ROWS), LABELS])
