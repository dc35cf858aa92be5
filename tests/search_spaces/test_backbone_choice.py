"""The table of backbones for data without a config."""

from __future__ import annotations

import pytest

from foldrace.search_spaces.backbone_choice import CHOICES, choose_backbones
from foldrace.trainables.models.backbones import check_backbone
from foldrace.trainables.models.classifier import check_image_size


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("images", [10, 10**6])
def test_larger_images_are_never_trained_smaller(
    device: str, pretrained: bool, images: int
) -> None:
    sizes = [
        choose_backbones(device, side, images, pretrained).image_size  # type: ignore[arg-type]
        for side in (1, 32, 48, 64, 100, 160, 224, 1000, 10**5)
    ]
    assert sizes == sorted(sizes)


def test_every_row_is_somebodys() -> None:
    chosen = {
        choose_backbones(row.device, side, row.least_images, row.pretrained)
        for row in CHOICES
        for side in (min(row.most_side, 10**6),)
    }
    assert chosen == set(CHOICES)


@pytest.mark.parametrize("row", CHOICES, ids=lambda r: f"{r.device}-{r.pretrained}-{r.most_side}")
def test_backbones_exist_and_take_the_size(row: object) -> None:
    for name in row.backbones:  # type: ignore[attr-defined]
        assert check_backbone(name) is None
        assert check_image_size(name, row.image_size) is None  # type: ignore[attr-defined]
        assert ("." in name) == row.pretrained, "a tag names the weights"  # type: ignore[attr-defined]
