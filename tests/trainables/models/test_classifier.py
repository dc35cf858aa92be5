"""A classifier's config and weights file, and gradient checkpointing."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from foldrace.core.errors import UserError
from foldrace.trainables.models.classifier import (
    ModelConfig,
    build_classifier,
    check_gradient_checkpointing,
    config_from_json,
    config_to_json,
)
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.predict import pack_weights, read_model_config, unpack_classifier

FULL = ModelConfig(
    "stack(timm/test_resnet,timm/test_vit@48)",
    4,
    32,
    "layernorm",
    ("aspect_ratio",),
    "sigmoid",
    "pad",
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


STACK = "stack(timm/test_resnet,timm/test_vit@48)"


def gradients(backbone: str, on: bool, frozen: str = "none") -> tuple[dict[str, Tensor], int]:
    """Those of one batch, and how many layers ran for it."""
    torch.manual_seed(0)
    model = build_classifier(ModelConfig(backbone, 3, 32), gradient_checkpointing=on)
    runs: list[nn.Module] = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_pre_hook(lambda module, args: runs.append(module))
    model(torch.rand(4, 3, 32, 32)).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return grads, len(runs)


@pytest.mark.parametrize(
    ("backbone", "frozen"),
    [
        ("timm/test_vit", "none"),
        ("timm/test_vit", "embed"),
        ("timm/test_convnext", "none"),
        ("timm/test_convnext", "stem"),
        (STACK, "none"),
    ],
)
def test_the_same_gradients_from_layers_that_run_twice(backbone: str, frozen: str) -> None:
    assert check_gradient_checkpointing(backbone) is None
    plain, once = gradients(backbone, on=False, frozen=frozen)
    found, more = gradients(backbone, on=True, frozen=frozen)
    assert more > 1.5 * once
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize(
    ("backbone", "member"),
    [
        ("torchvision/resnet18", "torchvision/resnet18"),
        ("timm/vgg11", "timm/vgg11"),
        ("stack(timm/test_vit,torchvision/resnet18)", "torchvision/resnet18"),
        ("stack(timm/test_vit,timm/vgg11)", "timm/vgg11"),
    ],
)
def test_backbones_without_it_are_told(backbone: str, member: str) -> None:
    problem = check_gradient_checkpointing(backbone)
    assert problem is not None and problem.where == "training.gradient_checkpointing"
    assert problem.message.startswith(f"{member} does not offer it")
    with torch.device("meta"), pytest.raises(UserError, match=f"{member} does not offer it"):
        build_classifier(ModelConfig(backbone, 2, 32), gradient_checkpointing=True)


@pytest.mark.parametrize("head", HEADS)
def test_the_head_computes_in_full_precision(head: str) -> None:
    """Under autocast too: logits in float32, as of the same features by a head without autocast."""
    model = build_classifier(ModelConfig("timm/test_resnet", 5, 32, head)).eval()
    images, seen = torch.rand(2, 3, 32, 32), list[Tensor]()
    model.body.register_forward_hook(lambda module, args, features: seen.append(features))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert seen[0].dtype == torch.bfloat16 and logits.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(logits, model.head(seen[0].float()))
