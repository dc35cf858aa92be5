"""A trial's state as bytes without pickle: what comes back, and which optimisers it works for."""

from __future__ import annotations

import math
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.optimizers import build_optimizer, optimizer_names
from foldrace.trainables.resume_state import from_bytes, plain_copy, to_bytes

NOT_KEPT = ("pytorch_optimizer/conda", "pytorch_optimizer/scalableshampoo")
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def there_and_back(state: object) -> Any:
    return from_bytes(to_bytes(plain_copy(state)))


@pytest.mark.parametrize("name", optimizer_names())
def test_which_optimisers_states_can_be_kept(name: str) -> None:
    """All but two, whose states hold objects: a trial with one of these starts anew."""
    torch.manual_seed(0)
    params = TrialParams(optimizer=name)
    model, again = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)) for _ in "ab")
    optimizer = build_optimizer(model, params)
    for _ in range(2):
        model(torch.randn(4, 3, 4, 4)).square().mean().backward()
        optimizer.step()
    if name in NOT_KEPT:
        with pytest.raises(TypeError, match="cannot be kept"):
            plain_copy(optimizer.state_dict())
        return
    other = build_optimizer(again, params)
    other.load_state_dict(there_and_back(optimizer.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())


def assert_same(one: Any, two: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two)
    elif isinstance(one, dict):
        assert list(one) == list(two)
        assert_same(list(one.values()), list(two.values()))
    elif isinstance(one, (list, tuple, deque)):
        assert len(one) == len(two)
        for first, second in zip(one, two, strict=True):
            assert_same(first, second)
    else:
        assert one == two


def test_containers_and_plain_values_come_back_with_their_types() -> None:
    state = {
        "nested": [(1, 2.5, None), [True, "text"], {("a", 3): torch.bfloat16, 7: -math.inf}],
        "last two": deque([1, 2], maxlen=2),
        "all": deque([(1,), [2]]),
    }
    back = there_and_back(state)
    assert repr(back) == repr(state)
    assert (back["last two"].maxlen, back["all"].maxlen) == (2, None)
    assert math.isnan(there_and_back([math.nan])[0])
    number = there_and_back(np.float32(0.5))
    assert type(number) is float and number == 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_tensors_come_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    tensor = (numbers % 2).to(dtype)
    back = there_and_back({"it": tensor})["it"]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(back, tensor)


def test_the_memory_layout_comes_back() -> None:
    """torch's fused optimisers pair a parameter's memory with its state's, whatever the strides:
    in another layout a step would go wrong without a word."""
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    sliced = torch.randn(6, 8)[:, ::2]
    back = there_and_back([weight, weight.transpose(0, 1), sliced])
    assert back[0].stride() == weight.stride() and torch.equal(back[0], weight)
    assert back[1].stride() == weight.transpose(0, 1).stride()
    assert torch.equal(back[2], sliced)


def test_a_copy_stays_as_it_was_while_training_goes_on() -> None:
    weight = nn.Parameter(torch.ones(3))
    copy = plain_copy({"weight": weight})
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(copy["weight"], torch.ones(3))


@pytest.mark.parametrize(
    "value",
    [object(), {"a": [{3}]}, np.zeros(2), len],
    ids=["object", "set", "array", "function"],
)
def test_what_cannot_be_kept_without_pickle_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot be kept"):
        plain_copy({"state": value})


def test_every_damaged_byte_is_found() -> None:
    whole = to_bytes({"a": torch.arange(100), "b": (1, None)})
    for end in (0, 3, 4, 50, len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match="checksum"):
            from_bytes(whole[:end])
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        with pytest.raises(ValueError, match="checksum"):
            from_bytes(bytes(flipped))
