"""Whether an optimiser's state can be written without pickle, and comes back as it was."""

from __future__ import annotations

from collections import deque
from typing import Any

import pytest
import torch
from torch import nn

from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.trainables.optimizers import build_optimizer, optimizer_names
from foldrace.trainables.tensor_tree import UnpackableError, pack, seal, unpack

NOT_KEPT = ("pytorch_optimizer/conda", "pytorch_optimizer/scalableshampoo")


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
        with pytest.raises(UnpackableError, match="cannot be kept"):
            pack(optimizer.state_dict())
        return
    file = pack(optimizer.state_dict())
    seal(file)
    other = build_optimizer(again, params)
    other.load_state_dict(unpack(bytes(file)))
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
