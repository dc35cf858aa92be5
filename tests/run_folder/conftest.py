"""Run folders of three folds: empty, and with a complete candidate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.run_folder.records import (
    CandidateRecord,
)
from foldrace.run_folder.store import RunStore
from tests.run_folder.stored_runs import (
    PARAMS,
    new_store,
    save_fold,
)


@pytest.fixture
def fold() -> NDArray[np.int64]:
    """Folds of different sizes, in no order."""
    return np.random.default_rng(1).permutation(np.repeat([0, 1, 2], [40, 20, 10]))


@pytest.fixture
def prob(fold: NDArray[np.int64]) -> NDArray[np.float32]:
    rng = np.random.default_rng(2)
    return rng.dirichlet(np.ones(3), size=len(fold)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path, fold: NDArray[np.int64]) -> RunStore:
    return new_store(tmp_path / "run", fold)


@pytest.fixture
def complete(store: RunStore, prob: NDArray[np.float32]) -> RunStore:
    store.save_candidate(
        CandidateRecord(candidate="c0000", backbone="timm/resnet18", params=PARAMS)
    )
    for k in (2, 0, 1):
        save_fold(store, k, prob)
    return store
