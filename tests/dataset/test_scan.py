"""Many images are scanned by processes, and come out as each on its own does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foldrace.core.progress import shown_by
from foldrace.dataset import similarity
from foldrace.dataset.manifest import Manifest
from foldrace.dataset.similarity import scan_images


def picture(path: Path, size: tuple[int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)


def test_processes_find_what_one_thread_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{i:02d}.png" for i in range(29)]
    for i, name in enumerate(names):
        picture(tmp_path / name, (20 + i, 30), seed=i % 11)  # some twice
    (tmp_path / names[3]).unlink()
    (tmp_path / names[4]).write_bytes(b"")
    (tmp_path / names[5]).write_bytes((tmp_path / names[6]).read_bytes()[:99])
    picture(tmp_path / names[7], (300, 200), seed=1)
    images = Manifest(tmp_path, tuple(names), np.zeros(29, np.int64), ("a", "b"), None, None)
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(similarity, "_PROCESS_TASK", 4)
    monkeypatch.setattr(similarity, "LARGE", 200 * 300 - 1)
    alone = scan_images(images, 1, max_pixels=70_000)
    monkeypatch.setattr(similarity, "_MANY", 2)
    with shown_by(lambda *step: told.append(step)):
        together = scan_images(images, 2, max_pixels=70_000)
    assert len(together) == len(alone) == 29
    for one, other in zip(together, alone, strict=True):
        assert (one.size, one.digest, one.fault) == (other.size, other.digest, other.fault)
        assert (one.brightest, one.contrast, one.missing) == (
            other.brightest, other.contrast, other.missing,
        )  # fmt: skip
        assert (one.perceptual_hash is None) == (other.perceptual_hash is None)
        if one.perceptual_hash is not None and other.perceptual_hash is not None:
            assert one.perceptual_hash.hash == other.perceptual_hash.hash
            np.testing.assert_array_equal(one.perceptual_hash.thumb, other.perceptual_hash.thumb)
    assert [one.fault is None for one in together].count(False) == 3 and together[3].missing
    assert told[-1] == ("reading training images", 29, 29) and len(told) == 8
