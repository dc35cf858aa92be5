"""Two attempts of one fold trial that write into one folder, on a disk and in an object store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.files import Files
from foldrace.run_folder.store import RunStore
from tests.run_folder.stored_runs import new_store, save_fold, trial_record

TRIAL = "trials/c0000/fold0"


class Interrupted(Files):
    """Files that call a function once, before a file is written."""

    def __init__(self, files: Files, name: str, then: Callable[[], object]) -> None:
        self._files, self._name, self._then = files, name, [then]

    def __getattribute__(self, name: str) -> object:
        if name.startswith("_") or name == "write":
            return object.__getattribute__(self, name)
        return getattr(self._files, name)

    def write(self, name: str, data: bytes | memoryview) -> None:
        if name == f"{TRIAL}/{self._name}" and self._then:
            self._then.pop()()
        self._files.write(name, data)


@pytest.fixture(params=["disk", "object store"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "run")
    endpoint = request.getfixturevalue("s3_environment")
    query = f"endpoint_override=http://{endpoint}&scheme=http&region=us-east-1"
    return f"s3://runs/attempts/{tmp_path.name}?{query}"


@pytest.fixture
def zombie(root: str, fold: NDArray[np.int64]) -> RunStore:
    """The run as the node sees it that was given up for lost."""
    return new_store(root, fold)


@pytest.fixture
def ours(zombie: RunStore) -> RunStore:
    return RunStore.open(zombie.root)


@pytest.fixture
def others_prob(prob: NDArray[np.float32]) -> NDArray[np.float32]:
    return prob[:, ::-1].copy()


def is_whole(store: RunStore) -> bool:
    """Every file that the record names is there, as it was written."""
    record = store.trial("c0000", 0)
    assert record is not None and len(record.digests) == 7
    found = {
        name: hashlib.sha256(store.files.read(f"{TRIAL}/{name}")).hexdigest()
        for name in record.digests
    }
    return found == record.digests


def rows_of_fold(store: RunStore, prob: NDArray[np.float32]) -> NDArray[np.float16]:
    return np.log(prob[store.folds().fold == 0]).astype(np.float16)


def test_a_finished_trial_is_left_to_the_attempt_that_finished_it(
    zombie: RunStore,
    ours: RunStore,
    prob: NDArray[np.float32],
    others_prob: NDArray[np.float32],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = save_fold(ours, 0, prob, attempt="ours")
    assert save_fold(zombie, 0, others_prob, attempt="zombie") == first
    assert zombie.save_trial(trial_record(zombie, 0, status="failed", error="lost")) == first
    zombie.clear_trial("c0000", 0)
    assert ours.trial("c0000", 0) == first and is_whole(ours)
    found = ours.oof_log_prob("c0000", "raw", (0,))
    np.testing.assert_array_equal(found, rows_of_fold(ours, prob))
    told = [r.getMessage() for r in caplog.records if r.name == "foldrace"]
    line = "c0000 fold0: another attempt has finished, this one's result is left out"
    assert told == [line, line]


def test_the_same_attempt_may_add_to_its_trial(ours: RunStore, prob: NDArray[np.float32]) -> None:
    """As a soup does."""
    record = save_fold(ours, 0, prob, attempt="ours")
    more = ours.save_trial(record.model_copy(update={"notes": ("more",)}), weights={"soup": b"s"})
    assert more.digests == record.digests | {
        "best_soup.safetensors": hashlib.sha256(b"s").hexdigest()
    }
    assert ours.trial("c0000", 0) == more


def test_a_failed_attempt_is_replaced(ours: RunStore, prob: NDArray[np.float32]) -> None:
    ours.save_trial(trial_record(ours, 0, status="failed", error="boom", attempt="first"))
    save_fold(ours, 0, prob, attempt="second")
    assert is_whole(ours)


@pytest.mark.parametrize("moment", ["rows.npy", "oof_ema.npy", "best_ema.safetensors"])
def test_an_attempt_that_ends_among_our_arrays_leaves_none_of_its_own(
    zombie: RunStore,
    ours: RunStore,
    prob: NDArray[np.float32],
    others_prob: NDArray[np.float32],
    moment: str,
) -> None:
    ours.files = Interrupted(
        ours.files, moment, lambda: save_fold(zombie, 0, others_prob, attempt="zombie")
    )
    save_fold(ours, 0, prob, attempt="ours")
    record = zombie.trial("c0000", 0)
    assert record is not None and record.attempt == "ours" and is_whole(zombie)
    found = zombie.oof_log_prob("c0000", "raw", (0,))
    np.testing.assert_array_equal(found, rows_of_fold(zombie, prob))


def test_arrays_of_another_attempt_are_refused(
    zombie: RunStore, ours: RunStore, prob: NDArray[np.float32], others_prob: NDArray[np.float32]
) -> None:
    """The other one writes everything when our record alone is still to come."""
    ours.files = Interrupted(
        ours.files, "trial.json", lambda: save_fold(zombie, 0, others_prob, attempt="zombie")
    )
    save_fold(ours, 0, prob, attempt="ours")
    assert not is_whole(zombie)
    for array in ("oof", "true_prob"):
        with pytest.raises(RunFolderError) as error:
            zombie.oof_log_prob("c0000", "raw", (0,)) if array == "oof" else zombie._pooled(
                "c0000", "true_prob.npy", (0,)
            )
        (problem,) = error.value.problems
        assert problem.where == f"{zombie.root}/{TRIAL}/{array}.npy"
        assert "c0000, fold 0: it does not belong to the trial.json beside it" in problem.message
        assert problem.message.endswith("delete this fold's folder and resume")


def test_weights_of_another_attempt_are_refused(ours: RunStore, prob: NDArray[np.float32]) -> None:
    save_fold(ours, 0, prob)
    assert ours.weights("c0000", 0, "ema") == b"ema weights"
    ours.files.write(f"{TRIAL}/best_ema.safetensors", b"others' weights")
    with pytest.raises(ValueError, match="does not belong to the trial"):
        ours.weights("c0000", 0, "ema")


def test_a_record_of_an_older_version_has_no_digests(
    ours: RunStore, prob: NDArray[np.float32]
) -> None:
    """Its arrays are read as they are."""
    record = save_fold(ours, 0, prob)
    ours.save_trial(record.model_copy(update={"digests": {}}))
    assert ours.oof_log_prob("c0000", "raw", (0,)).shape == (40, 3)
    assert ours.weights("c0000", 0, "raw") == b"raw weights"
