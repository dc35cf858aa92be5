"""The training size of every epoch, as tables."""

from __future__ import annotations

import pytest

from foldrace.trainables.schedules import training_size


@pytest.mark.parametrize(
    ("epochs", "image_size", "size_start", "sizes"),
    [
        (6, 224, 0.5, [128, 128, 160, 192, 224, 224]),  # 112, 140, 168, 196 before rounding
        (9, 256, 0.5, [128, 160, 160, 192, 224, 224, 256, 256, 256]),
        (3, 32, 0.25, [8, 24, 32]),
        (4, 64, 0.5, [32, 48, 64, 64]),
        (3, 16, 0.25, [8, 8, 16]),
        (2, 224, 0.5, [128, 224]),
        (1, 224, 0.5, [224]),
        (5, 224, 1.0, [224] * 5),
        (3, 130, 1.0, [130] * 3),
        (3, 500, 0.6, [288, 416, 500]),
    ],
)
def test_sizes(epochs: int, image_size: int, size_start: float, sizes: list[int]) -> None:
    assert [training_size(e, epochs, image_size, size_start) for e in range(epochs)] == sizes


@pytest.mark.parametrize("size_start", [0.25, 0.5, 0.77])
@pytest.mark.parametrize("image_size", [16, 30, 100, 224, 260, 384])
def test_never_shrinks_and_never_exceeds_the_size(image_size: int, size_start: float) -> None:
    for epochs in range(1, 40):
        sizes = [training_size(e, epochs, image_size, size_start) for e in range(epochs)]
        assert sizes == sorted(sizes) and sizes[-1] == image_size
        assert sizes.count(image_size) >= epochs / 3
        assert min(sizes) >= min(8, image_size)
