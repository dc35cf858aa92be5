"""The blend's files: what the combiner knows comes back, damage is named."""

from __future__ import annotations

import numpy as np
import pytest

from foldrace.core.errors import RunFolderError
from foldrace.run_folder.store import RunStore
from tests.run_folder.stored_runs import (
    ensemble_record,
)


def test_what_the_combiner_knows_comes_back_bit_for_bit(complete: RunStore) -> None:
    record, oof = ensemble_record(complete), np.zeros((70, 3), np.float16)
    assert complete.blend.combiner_arrays(record) == {}
    wide = np.random.default_rng(0).normal(size=(3, 4))
    arrays = {"coefficients": wide.T, "bias": np.array(-0.25), "none": np.empty((0, 2))}
    written = complete.blend.save(record, "round\n", oof, arrays)
    found = RunStore.open(complete.root).blend.combiner_arrays(written)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (found[name].dtype, found[name].shape) == (np.float64, array.shape)
        np.testing.assert_array_equal(found[name], array)
    complete.blend.update(written.model_copy(update={"oof_logloss": 0.25}))
    assert complete.blend.combiner_arrays(written).keys() == arrays.keys()
    simple = complete.blend.save(record, "round\n", oof)  # one that knows nothing more
    assert complete.blend.combiner_arrays(simple) == {}
    assert complete.files.names("ensemble") == ["ensemble.json", "oof.npy", "trajectory.csv"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 64])
def test_damaged_combiner_arrays_are_named(complete: RunStore, content: bytes) -> None:
    complete.files.write("ensemble/combiner.safetensors", content)
    with pytest.raises(
        RunFolderError, match=r"combiner\.safetensors: cannot be read.*blends again"
    ):
        complete.blend.combiner_arrays(ensemble_record(complete))
