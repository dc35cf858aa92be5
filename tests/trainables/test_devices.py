"""What a reused process still knows of its last trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import CacheConfig
from foldrace.run_folder.records import CandidateRecord
from foldrace.trainables.devices import fresh_accelerator
from foldrace.trainables.spec import FoldTrial, TrialSpec


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
    fresh_accelerator(trial_that(compiles))
    function(torch.ones(2))
    assert len(compiled) == (2 if compiles else 1)


def trial_that(compiles: bool) -> FoldTrial:
    spec = TrialSpec(run="", image_root="", candidate="c0000", fold=0, use_gpu=False)
    record = CandidateRecord(candidate="c0000", backbone="timm/test_vit", params={})
    params = TrialParams(compile=compiles)
    return FoldTrial(spec, record, params, 0, (), (), CacheConfig())
