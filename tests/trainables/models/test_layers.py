"""The layers of a classifier by number, and those that stay frozen."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn import functional

from foldrace.config.hyperparameters import TrialParams
from foldrace.trainables.models.classifier import Classifier, ModelConfig, build_classifier
from foldrace.trainables.models.layers import layer_ids, train_from, trainable_from
from foldrace.trainables.optimizers import build_optimizer
from foldrace.trainables.state import build_ema

TIMM = tuple(f"timm/{name}" for name in timm.list_models("test_*"))
TORCHVISION = {  # name -> groups: stem, blocks, head
    "resnet18": 1 + 8 + 1,
    "convnext_tiny": 1 + 18 + 1,
    "vit_b_16": 1 + 12 + 1,
    "swin_t": 1 + 12 + 3 + 1,  # and the patch mergings
    "efficientnet_b0": 1 + 16 + 1 + 1,  # and the last convolution
    "densenet121": 1 + 58 + 3 + 1,  # and the transitions
    "shufflenet_v2_x0_5": 1 + 16 + 1,
    "mnasnet0_5": 1 + 16 + 1,
    "mobilenet_v3_small": 1 + 11 + 1 + 1,
    "vgg11": 8 + 2 + 1,
}


def on_meta(name: str) -> Classifier:
    with torch.device("meta"):
        return build_classifier(ModelConfig(name, 3, 224))


@pytest.mark.parametrize(
    "name", [*TIMM, "timm/caformer_s18", *(f"torchvision/{name}" for name in TORCHVISION)]
)
def test_every_parameter_has_one_number_and_every_number_a_parameter(name: str) -> None:
    model = on_meta(name)
    ids = layer_ids(model)
    assert set(ids) == {parameter for parameter, _ in model.named_parameters()}
    last = max(ids.values())
    assert set(ids.values()) == set(range(last + 1))
    assert {ids[f"head.{p}"] for p, _ in model.head.named_parameters()} == {last}
    assert {k for k, number in ids.items() if number == 0} <= {k for k in ids if "head" not in k}


@pytest.mark.parametrize(("name", "groups"), TORCHVISION.items())
def test_torchvisions_blocks_are_counted(name: str, groups: int) -> None:
    ids = layer_ids(on_meta(f"torchvision/{name}"))
    assert max(ids.values()) + 1 == groups


@pytest.mark.parametrize("name", TIMM)
def test_timms_backbones_are_split_as_timm_does(name: str) -> None:
    with torch.device("meta"):
        whole = timm.create_model(name.removeprefix("timm/"), num_classes=3)
    theirs = group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
    ours = layer_ids(on_meta(name))
    for parameter, number in theirs.items():
        if f"body.{parameter}" in ours:
            assert ours[f"body.{parameter}"] == number, parameter
    assert ours["head.1.weight"] == max(theirs.values())


def test_resnet_from_stem_to_head() -> None:
    ids = layer_ids(on_meta("torchvision/resnet18"))
    assert ids["body.conv1.weight"] == ids["body.bn1.bias"] == 0
    assert ids["body.layer1.0.conv1.weight"] == 1 and ids["body.layer4.1.bn2.weight"] == 8
    assert ids["body.layer2.0.downsample.0.weight"] == ids["body.layer2.0.conv1.weight"] == 3


def test_what_lies_between_blocks_belongs_to_the_next() -> None:
    ids = layer_ids(on_meta("torchvision/convnext_tiny"))
    assert ids["body.features.1.2.block.0.weight"] == 3
    assert ids["body.features.2.1.weight"] == ids["body.features.3.0.block.0.weight"] == 4
    assert ids["body.classifier.0.weight"] == ids["body.features.7.2.layer_scale"] == 18


def test_a_vits_embeddings_are_its_first_layer() -> None:
    ids = layer_ids(on_meta("torchvision/vit_b_16"))
    embeddings = ("class_token", "conv_proj.weight", "encoder.pos_embedding")
    assert [ids[f"body.{name}"] for name in embeddings] == [0, 0, 0]
    assert ids["body.encoder.ln.weight"] == 12


def test_numbers_rise_as_the_image_goes_through() -> None:
    """The order in which a forward pass first meets each layer's modules."""
    model = build_classifier(ModelConfig("torchvision/mobilenet_v3_small", 3, 64)).eval()
    ids, met = layer_ids(model), []

    def hook(name: str) -> None:
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args: met.append(ids[f"{name}.weight"]))

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            hook(name)
    with torch.no_grad():
        model(torch.rand(1, 3, 64, 64))
    assert met == sorted(met) and met[0] == 0 and met[-1] == max(ids.values())


@pytest.mark.parametrize(
    ("freeze", "unfreeze", "head", "lowest"),
    [
        (0, 0, 6, [0, 0, 0]),
        (2, 0, 6, [6, 6, 0, 0]),
        (1, 2, 6, [6, 4, 2, 0, 0]),
        (0, 2, 6, [4, 2, 0, 0]),
        (1, 5, 6, [6, 5, 4, 3, 2, 1, 0]),
        (1, 3, 2, [2, 1, 1, 0, 0]),  # fewer layers than epochs
        (1, 1, 5, [5, 2, 0]),
        (3, 1, 1, [1, 1, 1, 0, 0]),
    ],
)
def test_lowest_trained_layer_of_each_epoch(
    freeze: int, unfreeze: int, head: int, lowest: list[int]
) -> None:
    params = TrialParams(freeze_epochs=freeze, unfreeze_epochs=unfreeze)
    assert [trainable_from(epoch, params, head) for epoch in range(len(lowest))] == lowest


@pytest.mark.parametrize(
    ("share", "freeze", "unfreeze", "head", "lowest"),
    [
        (0.5, 0, 0, 6, [3, 3, 3]),
        (0.5, 1, 2, 6, [6, 5, 4, 3, 3]),
        (0.4, 1, 0, 6, [6, 2, 2]),
        (1.0, 1, 1, 6, [6, 6, 6]),  # the head alone
        (0.1, 0, 0, 4, [0, 0]),  # less than half a layer
    ],
)
def test_the_first_layers_never_train(
    share: float, freeze: int, unfreeze: int, head: int, lowest: list[int]
) -> None:
    params = TrialParams(frozen_layers=share, freeze_epochs=freeze, unfreeze_epochs=unfreeze)
    assert [trainable_from(epoch, params, head) for epoch in range(len(lowest))] == lowest


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3),
        nn.BatchNorm2d(6),
        nn.BatchNorm2d(6, affine=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )


DEPTH = {"0": 0, "1": 0, "3": 1, "4": 1, "8": 2}


def depths_of(model: nn.Module) -> dict[str, int]:
    return {name: DEPTH[name.split(".")[0]] for name, _ in model.named_parameters()}


def changed(before: dict[str, Tensor], model: nn.Module) -> set[str]:
    """First parts of the names of all state that is not bit for bit the same."""
    now = model.state_dict()
    return {name.split(".")[0] for name in now if not torch.equal(now[name], before[name])}


def copy_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("optimizer_name", ["adamw", "sgd", "timm/lion", "pytorch_optimizer/adan"])
def test_frozen_state_is_unchanged_bit_for_bit(optimizer_name: str) -> None:
    model = small_model()
    ids = depths_of(model)
    params = TrialParams(optimizer=optimizer_name, lr=0.05, weight_decay=0.1)
    optimizer = build_optimizer(model, params)
    ema = build_ema(model, 0.9)
    assert ema is not None
    updates = 0
    # Everything, the head alone, the upper half, everything: momentum of older epochs lies around.
    for lowest, moves in ((0, "01345 8"), (2, "8"), (1, "34 8"), (0, "01345 8")):
        train_from(model, ids, lowest)
        ema.module.load_state_dict(model.state_dict())
        before, averaged = copy_of(model), copy_of(ema.module)
        for _ in range(3):
            updates += 1
            loss = functional.cross_entropy(model(torch.rand(8, 3, 9, 9)), torch.arange(8) % 4)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model, updates)
        assert changed(before, model) == set(moves) - {" "}
        assert changed(averaged, ema.module) == set(moves) - {" "}


def test_only_norms_leave_the_training_mode() -> None:
    model = small_model()
    train_from(model, depths_of(model), 2)
    assert [module.training for module in model] == [True, False, True, True, False, False] + [
        True
    ] * 3
    train_from(model, depths_of(model), 0)
    assert all(module.training for module in model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_gradients_are_gone() -> None:
    model = small_model()
    model(torch.rand(2, 3, 9, 9)).sum().backward()
    train_from(model, depths_of(model), 1)
    assert [p.grad is None for p in model.parameters()] == [True] * 4 + [False] * 6
