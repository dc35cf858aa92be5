"""The pull to the initial weights against its closed form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.l2_sp import StartingPoint
from foldrace.trainables.models.classifier import Classifier, ModelConfig, build_classifier
from foldrace.trainables.models.layers import layer_ids, train_from
from foldrace.trainables.optimizers import build_optimizer

PARAMS = TrialParams(lr=0.01, weight_decay=0.3, layer_decay=0.8, l2_sp=0.5)


def classifier() -> Classifier:
    torch.manual_seed(0)
    return build_classifier(ModelConfig("timm/test_vit", 3, 160))


def weights(model: Classifier) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(model: Classifier, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.rand(2, 3, 160, 160)).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "timm/lamb", "sgd"])
def test_each_layer_by_its_own_rate(name: str) -> None:
    """Two steps: the second one away from where the first was pulled to."""
    model = classifier()
    params = replace(PARAMS, optimizer=name)
    ids = layer_ids(model)
    optimizer = build_optimizer(model, params, ids)
    start, first = StartingPoint(model, optimizer, params.l2_sp), weights(model)
    optimizer.load_state_dict(optimizer.state_dict())  # as on resume: its groups are new objects
    for seed in (1, 2):
        step(model, optimizer, seed)
        before = weights(model)
        start.pull()
        for parameter, now in weights(model).items():
            w, rate = before[parameter], 0.01 * 0.8 ** (max(ids.values()) - ids[parameter])
            pulled = parameter.startswith("body.") and now.ndim > 1 and now.shape[0] > 1
            expected = w - rate * 0.5 * (w - first[parameter]) if pulled else w
            torch.testing.assert_close(now, expected, msg=parameter)
            assert pulled is not torch.equal(now, w), parameter


def test_it_takes_the_place_of_the_backbones_weight_decay() -> None:
    model = classifier()
    optimizer = build_optimizer(model, PARAMS)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {n for n, p in model.named_parameters() if decay[p]} == {"head.1.weight"}


def test_frozen_weights_stay_bit_for_bit() -> None:
    model = classifier()
    ids = layer_ids(model)
    optimizer = build_optimizer(model, PARAMS, ids)
    start, first = StartingPoint(model, optimizer, 0.5), weights(model)
    train_from(model, ids, 3)
    for seed in (1, 2):
        step(model, optimizer, seed)
        start.pull()
    for name, now in weights(model).items():
        assert torch.equal(now, first[name]) is (ids[name] < 3), name
