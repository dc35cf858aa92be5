"""Activation maps against closed forms: networks whose map is known, and every family's layers."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from foldrace.evaluation.activation_maps import activation_maps
from foldrace.trainables.models.classifier import ModelConfig, build_classifier


class Pooled(nn.Module):
    """A convolution, the mean over places and a linear layer: its class-activation map is exact."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), last)
        self.head = nn.Linear(6, 3)

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(images).flatten(2).mean(dim=2))
        return out


def image(side: int = 32, seed: int = 0) -> Tensor:
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(seed))


def rescaled(values: NDArray[np.float32]) -> NDArray[np.float32]:
    positive = np.maximum(values, 0)
    return positive / positive.max() if positive.max() > 0 else positive


def test_mean_and_linear_have_an_exact_map() -> None:
    torch.manual_seed(1)
    model = Pooled(nn.Identity()).eval()
    found = activation_maps(model, model.body, image(), torch.zeros(1, 0), (0, 2))
    assert found is not None and found.shape == (2, 8, 8)
    with torch.no_grad():
        features = model.body(image())[0].numpy()
    for one, map_ in zip((0, 2), found, strict=True):
        weights = model.head.weight[one].detach().numpy()
        expected = rescaled(np.einsum("c,chw->hw", weights, features))
        np.testing.assert_allclose(map_, expected, atol=1e-5)


def test_the_map_is_where_the_evidence_is() -> None:
    """A detector of bright red, and one bright red spot."""
    model = Pooled(nn.Identity()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.body[0].weight[0, 0] = 1.0
        model.head.weight[1, 0] = 1.0
    spot = torch.zeros(1, 3, 32, 32)
    spot[0, 0, 4:8, 20:24] = 1.0
    found = activation_maps(model, model.body, spot, torch.zeros(1, 0), (1, 0))
    assert found is not None
    assert np.unravel_index(found[0].argmax(), (8, 8)) == (1, 5)
    assert found[0].sum() == 1.0 and found[1].sum() == 0.0  # nothing speaks for the other


def test_a_layer_of_too_few_places_is_passed_over() -> None:
    torch.manual_seed(2)
    model = Pooled(nn.MaxPool2d(4)).eval()  # 2 x 2
    found = activation_maps(model, model.body, image(), torch.zeros(1, 0), (0,))
    assert found is not None and found.shape == (1, 8, 8)


def test_a_model_without_places() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))

        def forward(self, images: Tensor, meta: Tensor) -> Tensor:
            out: Tensor = self.body(images)
            return out

    model = Flat()
    assert activation_maps(model, model.body, image(), torch.zeros(1, 0), (0,)) is None


@pytest.mark.parametrize(
    ("backbone", "size", "grid"),
    [
        ("timm/test_resnet", 64, (4, 4)),
        ("timm/test_convnext", 96, None),
        ("timm/test_vit", 160, (10, 10)),
        ("timm/test_vit2", 64, None),
        ("torchvision/shufflenet_v2_x0_5", 128, (4, 4)),
        ("torchvision/swin_t", 64, None),
        ("stack(timm/test_resnet,timm/test_vit@160)", 64, None),
    ],
)
def test_every_family_has_a_map(backbone: str, size: int, grid: tuple[int, int] | None) -> None:
    torch.manual_seed(0)
    model = build_classifier(ModelConfig(backbone, 3, size)).eval()
    found = activation_maps(model, model.body, image(size), torch.zeros(1, 0), (0, 1, 2))
    assert found is not None and found.shape[0] == 3 and min(found.shape[1:]) >= 4
    assert grid is None or found.shape[1:] == grid
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() == pytest.approx(1.0)
    assert all(p.grad is None for p in model.parameters())


def test_tokens_are_those_of_patches() -> None:
    """Against Grad-CAM by hand at the last block's first norm of a ViT with a class token."""
    torch.manual_seed(3)
    vit = timm.create_model("test_vit", num_classes=4, img_size=160).eval()
    assert vit.num_prefix_tokens == 1 and vit.global_pool == "token"

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = vit

        def forward(self, images: Tensor, meta: Tensor) -> Tensor:
            out: Tensor = self.body(images)
            return out

    found = activation_maps(Model(), vit, image(160), torch.zeros(1, 0), (2,))
    kept: list[Tensor] = []
    hook = vit.blocks[-1].norm1.register_forward_hook(lambda m, i, o: kept.append(o))
    grad = torch.autograd.grad(vit(image(160))[0, 2], kept[0])[0][0, 1:]
    hook.remove()
    tokens = kept[0][0, 1:].detach()
    expected = rescaled((tokens @ grad.mean(dim=0)).numpy().reshape(10, 10))
    assert found is not None
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
