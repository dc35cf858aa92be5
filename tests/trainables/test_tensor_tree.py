"""Nested values in a safetensors file: what comes back, and what is refused."""

from __future__ import annotations

import io
import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from foldrace.trainables.tensor_tree import UnpackableError, pack, seal, unpack

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def there_and_back(tree: object) -> Any:
    return unpack(packed(tree))


def packed(tree: object) -> bytes:
    file = pack(tree)
    seal(file)
    return bytes(file)


KEYS = st.integers() | st.text() | st.floats(allow_nan=False)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.lists(inner).map(deque)
        | st.dictionaries(KEYS | st.tuples(KEYS, KEYS), inner)
    ),
)


@settings(deadline=None, max_examples=60)
@given(PLAIN)
def test_plain_values_come_back_with_their_types(tree: object) -> None:
    assert repr(there_and_back(tree)) == repr(tree)


def test_types_of_tensors_and_bounded_queues() -> None:
    tree = {"dtype": torch.bfloat16, "last": deque([1, 2], maxlen=2)}
    assert there_and_back(tree) == tree and there_and_back(tree)["last"].maxlen == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_tensors_come_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    tree = {"odd": torch.ones(3, dtype=torch.int8), "it": (numbers % 2).to(dtype)}
    back = there_and_back(tree)
    for name, tensor in tree.items():
        assert (back[name].dtype, back[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(back[name], tensor)


def test_numbers_that_are_not_finite() -> None:
    back = there_and_back([math.nan, math.inf, -math.inf, torch.tensor([math.nan])])
    assert math.isnan(back[0]) and back[1:3] == [math.inf, -math.inf]
    assert back[3].isnan().all()


def test_arrays_come_back_as_arrays() -> None:
    array = np.array([[1.5, -2.0]], dtype=np.float16)
    back = there_and_back({"oof": array})["oof"]
    assert isinstance(back, np.ndarray) and back.dtype == np.float16
    np.testing.assert_array_equal(back, array)


def test_the_memory_layout_comes_back() -> None:
    """torch's fused optimisers pair a parameter's memory with its state's, whatever the strides:
    in another layout a step would go wrong without a word."""
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    sliced = torch.randn(6, 8)[:, ::2]
    back = there_and_back([weight, weight.transpose(0, 1), sliced])
    assert back[0].stride() == weight.stride() and torch.equal(back[0], weight)
    assert back[1].stride() == weight.transpose(0, 1).stride()
    assert torch.equal(back[2], sliced)


def test_others_can_read_it() -> None:
    tensors = load(packed({"a": torch.arange(3.0), "b": [torch.arange(4)]}))
    assert sorted(t.tolist() for t in tensors.values()) == [[0, 1, 2], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    "value",
    [object(), {torch.ones(1): 0}, {"a": [{3}]}, torch.zeros(2, dtype=torch.complex64), len],
    ids=["object", "tensor as a key", "set", "complex", "function"],
)
def test_what_cannot_be_kept_without_pickle_is_refused(value: object) -> None:
    with pytest.raises(UnpackableError, match="cannot be kept"):
        pack({"state": value})


def test_torn_and_damaged_files_are_refused() -> None:
    whole = packed({"a": torch.arange(100), "b": (1, None)})
    for end in (0, 4, 8, 50, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError):
            unpack(whole[:end])
    flipped = bytearray(whole)
    flipped[-3] ^= 1
    with pytest.raises(ValueError, match="checksum"):
        unpack(bytes(flipped))
    pickled = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, pickled)
    for foreign in (b"\xff" * 64, b"not a state at all", pickled.getvalue()):
        with pytest.raises(ValueError):
            unpack(foreign)
