"""Gradient checkpointing: the same gradients, and a clear word where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from foldrace.core.errors import UserError
from foldrace.trainables.models.classifier import (
    ModelConfig,
    build_classifier,
    check_gradient_checkpointing,
)

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
