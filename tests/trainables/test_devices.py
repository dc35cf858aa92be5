"""What a reused process still knows of its last trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import TrainingConfig
from foldrace.trainables.devices import fresh_accelerator
from foldrace.trainables.spec import TrialSpec


@pytest.mark.parametrize("compiles", [False, True])
def test_a_trial_that_compiles_forgets_what_others_compiled(compiles: bool) -> None:
    """Else they would count against its limit."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(1)
        return graph.forward

    def add_one(x: Tensor) -> Tensor:
        return x + 1

    function = torch.compile(add_one, backend=backend)
    for _ in range(2):
        function(torch.ones(2))
    assert len(compiled) == 1
    fresh_accelerator(spec_for(compiles))
    function(torch.ones(2))
    assert len(compiled) == (2 if compiles else 1)


def spec_for(compiles: bool) -> TrialSpec:
    return TrialSpec(
        run="", image_root="", candidate="c0000", backbone="timm/test_vit", params=TrialParams(),
        fold=0, training=TrainingConfig(compile=compiles), transforms=(), seed=0, use_gpu=False,
    )  # fmt: skip
