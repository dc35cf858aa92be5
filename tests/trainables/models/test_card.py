"""The config of a weights file: every architecture comes back, and so do the files of old."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import torch
from safetensors.torch import save

from foldrace.trainables.models.classifier import (
    ModelConfig,
    build_classifier,
    config_from_json,
    config_to_json,
)
from foldrace.trainables.predict import pack_weights, read_model_config, unpack_classifier

FULL = ModelConfig(
    "stack(timm/test_resnet,timm/test_vit@48)", 4, 32, "layernorm", ("aspect_ratio",), "sigmoid"
)


def test_there_and_back() -> None:
    assert config_from_json(config_to_json(FULL)) == FULL
    assert all(asdict(FULL)[f.name] != f.default for f in fields(FULL))


def test_a_card_of_old_has_the_defaults_and_one_to_come_loses_what_is_not_known() -> None:
    old = {"backbone": "timm/test_resnet", "classes": 3, "image_size": 32}
    assert config_from_json(json.dumps(old)) == ModelConfig("timm/test_resnet", 3, 32)
    assert config_from_json(json.dumps(old | {"x": [1]})) == ModelConfig("timm/test_resnet", 3, 32)
    with pytest.raises(TypeError, match="image_size"):
        config_from_json('{"backbone": "timm/test_resnet", "classes": 3}')


def test_a_weights_file_of_old_still_loads() -> None:
    """Its keys and its header, as they were written before there were heads."""
    torch.manual_seed(0)
    model = build_classifier(ModelConfig("torchvision/mobilenet_v3_small", 3, 32)).eval()
    state = {f"body.{name}": tensor for name, tensor in model.body.state_dict().items()}
    linear = model.head[1]  # type: ignore[index]
    state |= {"head.1.weight": linear.weight.detach(), "head.1.bias": linear.bias.detach()}
    header = {"backbone": "torchvision/mobilenet_v3_small", "classes": 3, "image_size": 32}
    data = save(state, metadata={"foldrace": json.dumps(header)})
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(unpack_classifier(data, read_model_config(data))(images), model(images))


@pytest.mark.parametrize(
    "backbone",
    ["timm/test_vit", "timm/test_efficientnet", "torchvision/mnasnet0_5", "torchvision/swin_t"],
)
def test_weights_come_back_from_their_file(backbone: str) -> None:
    config = ModelConfig(backbone, 3, 64)
    state = build_classifier(config).state_dict()
    again = unpack_classifier(pack_weights(state, config), config).state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_a_stack_with_meta_features_comes_back_from_its_file() -> None:
    torch.manual_seed(0)
    model = build_classifier(FULL, dropout=0.2, drop_path=0.1).eval()
    data = pack_weights(model.state_dict(), FULL)
    assert read_model_config(data) == FULL
    images, meta = torch.rand(2, 3, 32, 32), torch.randn(2, 1)
    with torch.no_grad():
        again = unpack_classifier(data, read_model_config(data))(images, meta)
        assert torch.equal(again, model(images, meta))
