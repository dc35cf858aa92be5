"""The contract of every head; the authors' ConvNeXt; a body's own last norm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import v2

from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.models.heads import HEADS, Head

each_head = pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)


@each_head
def test_features_to_logits_with_dropout_in_training_alone(head: Head) -> None:
    assert HEADS[head.name] is head and head.doc
    torch.manual_seed(0)
    module = head.build(12, 5, 0.5).double()
    features = torch.randn(6, 12, dtype=torch.float64)
    assert not torch.equal(module(features), module(features))
    module.eval()
    logits = module(features)
    assert logits.shape == (6, 5) and torch.equal(logits, module(features))
    logits.square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    torch.testing.assert_close(module(features[2:3]), logits[2:3])  # each image by itself


def linear(x: Tensor, dropout: float, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.dropout(x, dropout) @ weight.T + bias


def layernorm(x: Tensor, dropout: float, scale: Tensor, shift: Tensor, *last: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
    return linear((x - mean) / torch.sqrt(variance + 1e-6) * scale + shift, dropout, *last)


def mlp(x: Tensor, dropout: float, weight: Tensor, bias: Tensor, *rest: Tensor) -> Tensor:
    scale, shift, *last = rest
    unchanged = torch.eye(len(bias), dtype=bias.dtype)
    hidden = layernorm(x @ weight.T + bias, 0.0, scale, shift, unchanged, shift * 0)
    return linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, dropout, *last)  # GELU


BY_HAND: dict[str, Callable[..., Tensor]] = {"linear": linear, "layernorm": layernorm, "mlp": mlp}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_heads_by_hand_with_torchs_dropout(name: str, dropout: float) -> None:
    torch.manual_seed(0)
    module = HEADS[name].build(12, 5, dropout).double()
    weights = [nn.init.normal_(parameter) for parameter in module.parameters()]
    features = torch.randn(6, 12, dtype=torch.float64)
    torch.manual_seed(1)
    logits = module(features)
    torch.manual_seed(1)
    torch.testing.assert_close(logits, BY_HAND[name](features, dropout, *weights))


@each_head
def test_every_head_fits_every_family(head: Head) -> None:
    for backbone in ("timm/test_convnext", "timm/test_vit2", "torchvision/mnasnet0_5"):
        model = build_classifier(ModelConfig(backbone, 4, 64, head.name), dropout=0.3)
        assert model(torch.rand(2, 3, 64, 64)).shape == (2, 4)


def test_the_layernorm_head_is_the_authors_convnext() -> None:
    """torchvision's model with its classifier replaced, in evaluation mode."""
    torch.manual_seed(0)
    ours = build_classifier(
        ModelConfig("torchvision/convnext_tiny", 7, 64, "layernorm"), dropout=0.3
    ).eval()
    theirs = torchvision.models.convnext_tiny()
    theirs.classifier = nn.Sequential(
        nn.Flatten(), nn.LayerNorm(768, eps=1e-6), nn.Dropout(0.3), nn.Linear(768, 7)
    )
    for parameter in ours.head.parameters():
        nn.init.normal_(parameter)
    theirs.features.load_state_dict(ours.body.features.state_dict())  # type: ignore[union-attr]
    for mine, parameter in zip(ours.head.parameters(), theirs.classifier.parameters(), strict=True):
        parameter.data.copy_(mine)
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).tolist()  # float32
    normalised = v2.functional.normalize(images, mean, std)
    with torch.no_grad():
        torch.testing.assert_close(ours.double()(images), theirs.double().eval()(normalised))
    assert count(ours) == count(theirs)


def test_the_linear_head_keeps_the_bodys_own_norm() -> None:
    """torchvision's own model, its last layer replaced."""
    theirs = torchvision.models.convnext_tiny(num_classes=7)
    with torch.device("meta"):
        ours = build_classifier(ModelConfig("torchvision/convnext_tiny", 7, 64))
    assert count(ours) == count(theirs)
    assert "body.classifier.0.weight" in ours.state_dict()


@pytest.mark.parametrize(
    ("backbone", "norm"),
    [
        ("torchvision/convnext_tiny", "classifier.0"),
        ("timm/test_convnext", "head.norm"),
        ("timm/test_vit2", "fc_norm"),
        ("timm/caformer_s18", "head.norm"),
        ("timm/test_mambaout", None),  # a layer follows
        ("timm/test_vit", None),  # of the tokens, before the pooling
        ("torchvision/swin_t", None),
        ("torchvision/vit_b_32", None),
        ("timm/test_resnet", None),
    ],
)
def test_no_pooled_feature_is_normed_twice(backbone: str, norm: str | None) -> None:
    with torch.device("meta"):
        plain = build_classifier(ModelConfig(backbone, 2, 160, "linear"))
        normed = build_classifier(ModelConfig(backbone, 2, 160, "layernorm"))
    gone = set(plain.body.state_dict()) - set(normed.body.state_dict())
    assert gone == ({f"{norm}.weight", f"{norm}.bias"} if norm else set())


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
