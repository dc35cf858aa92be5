"""Predictions made elsewhere: what --add says, what lies in the run folder, what comes back."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from foldrace.config.schema import DataConfig, FoldsConfig, SearchConfig, SweepConfig
from foldrace.core.errors import ConfigError, DataError, RunFolderError
from foldrace.core.metrics import log_loss_of_true
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.selection.external import (
    VARIANT,
    AddedPredictions,
    AddSpec,
    add_sources,
    added_record,
    added_test,
    keep_only,
    parse_adds,
    save_added,
)
from foldrace.run_folder.store import RunStore

CLASSES = ("가", "b", "c")
FOLD = np.array([0, 1, 2, -1, 0, 1, 2, 0, 1, 2])
SCORED = np.flatnonzero(FOLD >= 0)
LABELS = np.arange(len(FOLD)) % 3
TEST_IDS = ("T1", "T2", "T3", "T4")
TEST = ImageSet(Path(), ("1", "2", "3", "4"), TEST_IDS, "ID", CLASSES, ("ID", *CLASSES))


def drawn(rows: int, seed: int) -> NDArray[np.float64]:
    return np.random.default_rng(seed).dirichlet(np.ones(len(CLASSES)), size=rows)


OOF, TESTED = drawn(len(SCORED), 0), drawn(len(TEST_IDS), 1)


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    config = SweepConfig(
        name="test",
        data=DataConfig(train="/data/train.csv", image_column="file"),
        folds=FoldsConfig(k=3),
        search=SearchConfig(backbones=("timm/resnet18",)),
    )
    lines = [f"{i}.png,{CLASSES[LABELS[i]]},,{f}" for i, f in enumerate(FOLD)]
    store = RunStore(tmp_path / "run")
    text = "\n".join(["image_path,target,group,fold", *lines]) + "\n"
    store.create(config, text, CLASSES)
    return store


def write_csv(path: Path, ids: list[str], prob: NDArray[np.float64], id_name: str) -> Path:
    """Rows and classes backwards."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([id_name, *CLASSES[::-1]])
        writer.writerows(
            [name, *row[::-1]] for name, row in list(zip(ids, prob, strict=True))[::-1]
        )
    return path


def oof_csv(folder: Path, prob: NDArray[np.float64] = OOF) -> Path:
    return write_csv(folder / "oof.csv", [f"{i}.png" for i in SCORED], prob, "file")


def csv_of_tests(folder: Path) -> Path:
    return write_csv(folder / "test.csv", list(TEST_IDS), TESTED, "ID")


def kept(store: RunStore, *specs: AddSpec, test: ImageSet | None = TEST) -> AddedPredictions:
    """As a blend that has them all leaves them."""
    added = add_sources(store, specs, test)
    save_added(store, added, {spec.name for spec in specs})
    return added


def arrays(store: RunStore, name: str) -> dict[str, NDArray[np.float32]]:
    folder = Path(store.root) / "ensemble" / "added" / name
    return {path.stem: np.load(path, allow_pickle=False) for path in folder.glob("*.npy")}


def test_what_add_may_say() -> None:
    texts = ["a=o.csv:t.csv", "B-2.x=d/o.npy", "u=:t.NPY", "e=o.csv:"]
    assert parse_adds(texts) == (
        AddSpec("a", Path("o.csv"), Path("t.csv")),
        AddSpec("B-2.x", Path("d/o.npy"), None),
        AddSpec("u", None, Path("t.NPY")),
        AddSpec("e", Path("o.csv"), None),
    )
    assert parse_adds(["a=~/o.csv"])[0].oof == Path.home() / "o.csv"


def test_every_wrong_add_is_told() -> None:
    texts = [
        "o.csv",
        "c0001=o.csv",
        "../x=o.csv",
        "a=o.csv:t.csv:u.csv",
        "b=:",
        "d=o.txt",
        "b=o.csv",
    ]
    with pytest.raises(ConfigError) as caught:
        parse_adds(texts)
    kinds = ".csv or .tsv or .jsonl or .ndjson or .parquet or .npy"
    needed = f"needed: NAME=oof.csv[:test.csv] or NAME=:test.csv, each file a {kinds}"
    assert [str(p).removesuffix(f"; {needed}") for p in caught.value.problems] == [
        "--add o.csv: has no =",
        "--add c0001=o.csv: the name 'c0001' is that of a candidate of the run",
        "--add ../x=o.csv: the name '../x' is not 1 to 64 of A-Z a-z 0-9 . _ - (first a letter or "
        "digit)",
        "--add a=o.csv:t.csv:u.csv: has 2 colons: one separates the two files, and paths must "
        "not contain any",
        "--add b=:: names no file",
        "--add d=o.txt: o.txt is neither .csv nor .tsv nor .jsonl "
        "nor .ndjson nor .parquet nor .npy",
        "--add: the name 'b' is there twice; give each its own",
    ]


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_a_member_with_oof_and_test(tmp_path: Path, store: RunStore, kind: str) -> None:
    files = (oof_csv(tmp_path), csv_of_tests(tmp_path))
    if kind == "npy":
        files = (tmp_path / "oof.npy", tmp_path / "test.npy")
        np.save(files[0], OOF)
        np.save(files[1], TESTED)
    added = kept(store, AddSpec("mine", *files))
    (source,) = added.sources
    assert (source.member.candidate, source.member.variant) == ("mine", VARIANT)
    assert source.where == str(files[0])  # a fault is to be corrected there
    np.testing.assert_allclose(np.exp(source.log_prob()), OOF, rtol=1e-5)
    truth = LABELS[SCORED]
    np.testing.assert_allclose(source.true_prob(), OOF[np.arange(len(OOF)), truth], rtol=1e-6)
    expected = log_loss(truth, OOF, labels=range(3))
    assert log_loss_of_true(source.true_prob()) == pytest.approx(expected, abs=1e-6)
    stored = arrays(store, "mine")
    np.testing.assert_array_equal(stored["oof"], source.log_prob())
    np.testing.assert_array_equal(stored["true_prob"], source.true_prob())
    np.testing.assert_allclose(stored["test"], TESTED, rtol=1e-6)
    np.testing.assert_allclose(added_test(store, "mine", TEST_IDS), TESTED, rtol=1e-6)
    assert added.unvalidated == ()
    assert not added_record(store, "mine").unvalidated


def test_a_certain_zero_stays_finite(tmp_path: Path, store: RunStore) -> None:
    certain = np.eye(3)[(LABELS[SCORED] + 1) % 3]
    (source,) = add_sources(store, [AddSpec("m", oof_csv(tmp_path, certain), None)], None).sources
    np.testing.assert_allclose(source.true_prob(), 1e-15, rtol=1e-6)
    assert np.isfinite(source.log_prob()).all()


def test_test_predictions_alone_are_unvalidated(tmp_path: Path, store: RunStore) -> None:
    added = kept(store, AddSpec("u", None, csv_of_tests(tmp_path)))
    assert (added.sources, added.unvalidated) == ((), ("u",))
    assert added_record(store, "u").unvalidated
    np.testing.assert_allclose(added_test(store, "u", TEST_IDS), TESTED, rtol=1e-6)


def test_oof_alone_cannot_predict(tmp_path: Path, store: RunStore) -> None:
    kept(store, AddSpec("o", oof_csv(tmp_path), None), test=None)
    assert sorted(arrays(store, "o")) == ["oof", "true_prob"]
    with pytest.raises(RunFolderError) as caught:
        added_test(store, "o", TEST_IDS)
    assert str(caught.value).endswith(
        ": o was added without test predictions: ensemble --add o=oof.csv:test.csv"
    )


@pytest.mark.parametrize("ids", [TEST_IDS[:3], TEST_IDS[::-1], (*TEST_IDS[:3], "T5")])
def test_another_test_set_is_refused(tmp_path: Path, store: RunStore, ids: tuple[str, ...]) -> None:
    kept(store, AddSpec("u", None, csv_of_tests(tmp_path)))
    with pytest.raises(RunFolderError, match="of other images, or of another order"):
        added_test(store, "u", ids)
    with pytest.raises(RunFolderError, match=r"added/no/added.json: cannot be read"):
        added_test(store, "no", TEST_IDS)


def test_faults_of_all_files_at_once_and_nothing_written(tmp_path: Path, store: RunStore) -> None:
    bad = OOF.copy()
    bad[0, 0] = 1.5
    test = write_csv(tmp_path / "t.csv", ["T1", "T2", "T3", "x"], TESTED, "ID")
    specs = [
        AddSpec("good", None, csv_of_tests(tmp_path)),
        AddSpec("a", oof_csv(tmp_path, bad), test),
        AddSpec("b", tmp_path / "no.csv", None),
    ]
    with pytest.raises(DataError) as caught:
        add_sources(store, specs, TEST)
    texts = [str(p) for p in caught.value.problems]
    assert [text.split(":")[0] for text in texts] == [
        str(tmp_path / name) for name in ("oof.csv", "t.csv", "t.csv", "no.csv")
    ]
    assert "line 10, column '가': '1.5'" in texts[0]
    assert "ids that are no test image of this run: 'x' (line 2)" in texts[1]
    assert "1 of 4 test images are not in it: T4" in texts[2]
    assert store.files.names("ensemble/added") == []


def test_a_row_that_no_trial_scores_is_unknown(tmp_path: Path, store: RunStore) -> None:
    ids = [f"{i}.png" for i in range(len(FOLD))]
    path = write_csv(tmp_path / "all.csv", ids, drawn(len(FOLD), 2), "file")
    with pytest.raises(DataError, match=r"no scored row of this run: '3.png' \(line 8\)"):
        add_sources(store, [AddSpec("a", path, None)], None)


def test_without_a_test_set(tmp_path: Path, store: RunStore) -> None:
    with pytest.raises(DataError, match=r"--add u: .*but the run has no test set \(data.test\)"):
        add_sources(store, [AddSpec("u", None, csv_of_tests(tmp_path))], None)


def test_added_anew_and_removed(tmp_path: Path, store: RunStore) -> None:
    both = AddSpec("m", oof_csv(tmp_path), csv_of_tests(tmp_path))
    (first,) = kept(store, both).sources
    (again,) = kept(store, both).sources
    assert first.fingerprint == again.fingerprint
    other = AddSpec("m", oof_csv(tmp_path, OOF[::-1]), None)
    (changed,) = kept(store, other).sources
    assert changed.fingerprint != first.fingerprint
    names = store.files.names("ensemble/added/m")
    assert names == ["added.json", "oof.npy", "true_prob.npy"]
    kept(store, AddSpec("n", oof_csv(tmp_path), None))
    keep_only(store, {"n"})
    assert store.files.names("ensemble/added") == ["n"]


def test_nothing_is_written_before_a_blend_has_it(tmp_path: Path, store: RunStore) -> None:
    """The blend that is there may have a member of the same name."""
    kept(store, AddSpec("m", oof_csv(tmp_path), csv_of_tests(tmp_path)))
    before, record = arrays(store, "m"), added_record(store, "m")
    specs = [
        AddSpec("m", oof_csv(tmp_path, OOF[::-1]), None),
        AddSpec("n", oof_csv(tmp_path), None),
    ]
    added = add_sources(store, specs, TEST)
    assert store.files.names("ensemble/added") == ["m"]
    assert added_record(store, "m") == record
    for name, array in arrays(store, "m").items():
        np.testing.assert_array_equal(array, before[name])
    save_added(store, added, {"n"})
    assert added_record(store, "m") == record
    assert sorted(arrays(store, "n")) == ["oof", "true_prob"]


def test_what_was_read_is_what_is_kept(tmp_path: Path, store: RunStore) -> None:
    """Whatever becomes of the file meanwhile."""
    path = oof_csv(tmp_path)
    added = add_sources(store, [AddSpec("m", path, None)], None)
    path.unlink()
    (source,) = added.sources
    save_added(store, added, {"m"})
    np.testing.assert_array_equal(arrays(store, "m")["oof"], source.log_prob())
