"""The contract of every backbone family, and names."""

from __future__ import annotations

import pytest
import torch
import torchvision
from timm.layers import DropPath
from torch import nn
from torchvision.transforms import v2

from foldrace.trainables.models.backbones import FAMILIES, check_backbone
from foldrace.trainables.models.classifier import (
    ModelConfig,
    build_classifier,
    check_image_size,
    parameter_count,
)

SMALL = (
    "timm/test_resnet", "timm/test_vit", "timm/test_convnext", "timm/test_efficientnet",
    "timm/test_nfnet", "timm/test_byobnet", "torchvision/shufflenet_v2_x0_5",
    "torchvision/mobilenet_v3_small", "torchvision/mnasnet0_5",
)  # fmt: skip
LARGE = (
    "torchvision/convnext_tiny", "torchvision/vit_b_32", "torchvision/swin_t",
    "torchvision/densenet121", "torchvision/efficientnet_b0", "torchvision/resnet18",
    "torchvision/vgg11", "timm/swin_tiny_patch4_window7_224",
    "timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224", "timm/caformer_s18",
)  # fmt: skip


def test_every_family_has_an_example_here() -> None:
    assert {name.split("/")[0] for name in (*SMALL, *LARGE)} == set(FAMILIES)
    assert all(family.prefix == prefix and family.names() for prefix, family in FAMILIES.items())


@pytest.mark.parametrize("name", SMALL)
def test_images_to_logits_and_gradients_everywhere(name: str) -> None:
    torch.manual_seed(0)
    model = build_classifier(ModelConfig(name, 5, 64), dropout=0.3, drop_path=0.1)
    logits = model(torch.rand(2, 3, 64, 64))
    assert logits.shape == (2, 5) and torch.isfinite(logits).all()
    logits.square().sum().backward()
    assert model.head[1].weight.grad is not None  # type: ignore[index,union-attr]
    assert sum(p.grad is not None for p in model.body.parameters()) > 0
    assert check_backbone(name) is None
    assert parameter_count(ModelConfig(name, 5, 64)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", LARGE)
def test_large_backbones_without_memory(name: str) -> None:
    assert check_backbone(name) is None
    with torch.device("meta"):
        model = build_classifier(ModelConfig(name, 7, 96)).eval()
        assert model(torch.zeros(2, 3, 96, 96)).shape == (2, 7)
    assert check_image_size(name, 96) is None


def test_a_backbone_that_needs_memory_to_be_built_is_left_to_the_trial() -> None:
    assert check_image_size("torchvision/regnet_y_400mf", 96) is None
    assert parameter_count(ModelConfig("torchvision/regnet_y_400mf", 2, 96)) > 1_000_000


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/shufflenet_v2_x0_5"])
def test_each_backbone_normalises_as_torchvision_would(name: str) -> None:
    model = build_classifier(ModelConfig(name, 2, 32))
    seen: list[torch.Tensor] = []
    model.body.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = torch.rand(2, 3, 32, 32)
    model.eval()(images)
    mean, std = (c.flatten().tolist() for c in (model.normalise.mean, model.normalise.std))
    torch.testing.assert_close(seen[0], v2.functional.normalize(images, mean, std))
    if name.startswith("torchvision"):
        assert mean == pytest.approx([0.485, 0.456, 0.406])
        assert std == pytest.approx([0.229, 0.224, 0.225])
    else:
        assert mean == pytest.approx(list(model.body.pretrained_cfg["mean"]))  # type: ignore


def test_normalisation_is_no_part_of_the_weights() -> None:
    state = build_classifier(ModelConfig("timm/test_resnet", 2, 32)).state_dict()
    assert {name.split(".")[0] for name in state} == {"body", "head"}


@pytest.mark.parametrize("drop_path", [0.0, 0.2])
@pytest.mark.parametrize("name", ["torchvision/convnext_tiny", "torchvision/swin_t"])
def test_stochastic_depth_rises_linearly_in_torchvision(name: str, drop_path: float) -> None:
    with torch.device("meta"):
        model = build_classifier(ModelConfig(name, 2, 32), drop_path=drop_path)
    rates = [m.p for m in model.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    assert rates == pytest.approx([drop_path * i / (len(rates) - 1) for i in range(len(rates))])


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        ("timm/vit_tiny_patch16_224", 12),
        ("timm/swin_tiny_patch4_window7_224", 2 + 2 + 6 + 2),  # its default is not zero
        ("timm/convnext_tiny", 3 + 3 + 9 + 3),
    ],
)
@pytest.mark.parametrize("drop_path", [0.0, 0.3])
def test_stochastic_depth_rises_linearly_in_timm(name: str, depth: int, drop_path: float) -> None:
    """From 0 in the first block to the whole rate in the last (Huang et al., ECCV 2016)."""
    with torch.device("meta"):
        model = build_classifier(ModelConfig(name, 2, 224), drop_path=drop_path)
    found = [m.drop_prob for m in model.modules() if isinstance(m, DropPath) and m.drop_prob]
    rates = list(dict.fromkeys(found))  # a block may use its own twice
    assert rates == pytest.approx(
        [drop_path * i / (depth - 1) for i in range(1, depth) if drop_path]
    )


def test_a_backbone_without_stochastic_depth_ignores_it() -> None:
    build_classifier(ModelConfig("torchvision/shufflenet_v2_x0_5", 2, 32), drop_path=0.2)
    with torch.device("meta"):
        build_classifier(ModelConfig("timm/vgg11", 2, 224), drop_path=0.2)


def test_the_heads_dropout_is_the_only_one_before_the_classifier() -> None:
    with torch.device("meta"):
        model = build_classifier(ModelConfig("torchvision/efficientnet_b0", 2, 32), dropout=0.25)
    rates = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert [rate for rate in rates if rate] == [0.25]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", ["timm/resnet18", "torchvision/resnet18"]),
        ("Timm/resnet18", ["should look like timm/<name>", "timm/resnet18"]),
        ("timm/resnet1818", ["unknown backbone", "timm/resnet18"]),
        ("timm/resnet18.a1_in2k", ["unknown backbone", "timm/resnet18.a1_in1k"]),
        ("torchvision/convnext_tny", ["torchvision/convnext_tiny"]),
        ("torchvision/resnet18.a1_in1k", ["unknown backbone; did you mean timm/resnet18.a1_in1k?"]),
        ("hf_hub:timm/resnet18.a1_in1k", ["<name>; did you mean timm/resnet18.a1_in1k?"]),
        (
            "https://huggingface.co/timm/resnet18d.ra2_in1k",
            ["did you mean timm/resnet18d.ra2_in1k?"],
        ),
        ("convnext_tiny_in22k", ["did you mean timm/convnext_tiny.fb_in22k?"]),
        ("timm/tf_efficientnet_b0_ns", ["did you mean timm/tf_efficientnet_b0.ns_jft_in1k?"]),
        ("google/vit-base-patch16-224", ["did you mean timm/vit_base_patch16_224?"]),
        ("torchvision/ResNet18", ["did you mean torchvision/resnet18?"]),
        ("torchvision/googlenet", ["no linear classifier", "timm"]),
        ("timm/xyzzyplugh", ["no close match"]),
        ("", ["should look like"]),
    ],
)
def test_unknown_names_and_their_neighbours(name: str, expected: list[str]) -> None:
    problem = check_backbone(name)
    assert problem is not None and problem.where == f"search.backbones: {name}"
    assert all(text in problem.message for text in expected), problem.message


@pytest.mark.parametrize(
    ("name", "size"), [("timm/test_vit", 70), ("torchvision/vit_b_32", 50), ("timm/vgg11", 16)]
)
def test_refused_image_sizes(name: str, size: int) -> None:
    problem = check_image_size(name, size)
    assert problem is not None
    assert f"refuses {size} px" in problem.message and "\n" not in problem.message
