"""Layer numbers: one a parameter, rising from input to output, timm's where timm has some."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.models import group_parameters  # type: ignore[attr-defined]
from torch import nn

from foldrace.trainables.models.classifier import Classifier, ModelConfig, build_classifier
from foldrace.trainables.models.layers import layer_ids

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
