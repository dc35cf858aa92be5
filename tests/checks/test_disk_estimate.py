"""The disk that a run may take: decoded images by their own shapes, once for each image size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foldrace.checks.preflight import estimate_bytes
from foldrace.config.schema import SweepConfig
from foldrace.dataset.manifest import Manifest
from foldrace.search_spaces.space import build_space

WIDE, SQUARE = (1920, 1080), (1080, 1080)


@pytest.mark.parametrize(
    ("space", "square", "wide"),
    [
        ({"image_size": 64}, 96 * 96, 171 * 96),
        (
            {"image_size": {"choices": [32, 64]}, "resize": "search"},
            48 * 48 + 96 * 96,
            86 * 48 + 171 * 96,
        ),
    ],
)
def test_decoded_images(space: dict[str, Any], square: int, wide: int) -> None:
    search = {"backbones": ["timm/test_resnet"], "space": space}
    raw = {"name": "n", "data": {"train": "."}, "search": search}
    config = SweepConfig.model_validate_json(json.dumps(raw))
    built, wrong = build_space(config, "c.yaml")
    assert not wrong
    labels = np.array([0, 1], np.int64)
    manifest = Manifest(Path(), ("a", "b"), labels, ("cat", "dog"), None, None)

    def estimated(images: list[tuple[int, int]]) -> int:
        return estimate_bytes(config, built, manifest, images)

    without = estimated([])
    assert without > 0
    assert estimated([SQUARE] * 100) - without == pytest.approx(300 * square, rel=0.03)
    assert estimated([WIDE] * 100) - without == pytest.approx(300 * wide, rel=0.03)
    assert estimated([WIDE] * 50 + [(10, 10)]) - without == pytest.approx(150 * wide, rel=0.03)
