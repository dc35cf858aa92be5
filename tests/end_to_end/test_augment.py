"""`augment CONFIG`: the picture holds what training sees, and mistakes are told as elsewhere."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from foldrace.commands import augment as command
from foldrace.commands.augment import one_per_class_first
from foldrace.config.schema import AugmentConfig
from foldrace.reporting.augment_grid import augment_grid
from foldrace.trainables.data.framing import resize
from foldrace.trainables.data.loader import BatchDataset, BatchRows
from foldrace.trainables.data.pixel_cache import open_images

Cli = Callable[..., Result]
LIST = [{"albumentations.Rotate": {"limit": 90, "p": 1}}, {"torchvision.ColorJitter": {"hue": 0.3}}]


def test_one_of_each_class_first() -> None:
    labels = np.array([2, 0, 0, 1, 2, 0, 1])
    assert one_per_class_first(labels, 2).tolist() == [1, 3]
    assert one_per_class_first(labels, 5).tolist() == [1, 3, 0, 2, 6]
    assert sorted(one_per_class_first(labels, 99)) == list(range(7))


@pytest.fixture(scope="module")
def quick_charts() -> None:
    """The picture is looked at."""


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the command hands to the picture."""
    seen: dict[str, Any] = {}

    def keep(images: Any, labels: Any, title: str) -> bytes:
        seen.update(images=images, labels=labels, title=title)
        return augment_grid(images, labels, title)

    monkeypatch.setattr(command, "augment_grid", keep)
    return seen


def test_the_picture_holds_what_training_sees(
    project: Any, tmp_path: Path, cli: Cli, shown: dict[str, Any]
) -> None:
    project.config["augment"] = {"policy": "medium", "transforms": LIST}
    out = tmp_path / "그림.png"
    result = cli("augment", project.write(), "--out", out, "--images", "4")
    assert result.exit_code == 0, result.output
    picture = Image.open(io.BytesIO(out.read_bytes()))
    assert picture.format == "PNG" and picture.width > 1000

    assert shown["labels"] == ["blue, plum", "green pear", "빨간 사과", "blue, plum"]
    assert "medium" in shown["title"] and "albumentations.Rotate" in shown["title"]
    files = [project.folder / f"사진 들/no {i}.png" for i in (2, 1, 0, 5)]
    source = open_images(files, 32, 1)
    scored = resize([source.image(row) for row in range(4)], 32)
    np.testing.assert_array_equal([row[0] for row in shown["images"]], scored)
    config = AugmentConfig(policy="medium", transforms=tuple(LIST))
    plan = BatchRows(np.arange(4), (0, 0))
    training = BatchDataset(source, 32, config).__getitems__(plan).images.numpy()
    np.testing.assert_array_equal([row[1] for row in shown["images"]], training)
    assert all(len(row) == 8 for row in shown["images"])


@pytest.mark.parametrize("how", ["pad", "crop"])
def test_the_picture_shows_the_configs_own_squares(
    project: Any, tmp_path: Path, cli: Cli, shown: dict[str, Any], how: str
) -> None:
    project.config["training"] = {"image_size": 24, "resize": how}
    project.config["augment"] = {"policy": "light"}
    result = cli("augment", project.write(), "--out", tmp_path / "grid.png", "--images", "3")
    assert result.exit_code == 0, result.output
    assert f"{how} to 24 px" in shown["title"]
    files = [project.folder / f"사진 들/no {i}.png" for i in (2, 1, 0)]
    source = open_images(files, 24, 1)
    scored = resize([source.image(row) for row in range(3)], 24, how)
    np.testing.assert_array_equal([row[0] for row in shown["images"]], scored)
    dataset = BatchDataset(source, 24, AugmentConfig(policy="light"), how=how)
    training = dataset.__getitems__(BatchRows(np.arange(3), (0, 0))).images.numpy()
    np.testing.assert_array_equal([row[1] for row in shown["images"]], training)


def test_the_grid_shows_every_image_in_its_place() -> None:
    """One colour an image: found again in the picture, row by row."""
    colours = np.random.default_rng(0).integers(30, 226, (3, 4, 3))
    images = [[np.full((40, 40, 3), c, np.uint8) for c in row] for row in colours]
    data = augment_grid(images, ["하나", "둘", "a long name of a class, too long"], "t " * 200)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    centres = np.empty((3, 4, 2))
    for place in np.ndindex(3, 4):
        found = np.argwhere((pixels == colours[place]).all(axis=2))
        assert len(found) > 10_000, place
        centres[place] = found.mean(axis=0)
    assert (np.diff(centres[:, :, 0], axis=0) > 0).all()
    assert (np.diff(centres[:, :, 1], axis=1) > 0).all()


def test_mistakes_are_told_at_once(project: Any, tmp_path: Path, cli: Cli) -> None:
    config = project.write()
    wrong = "[{albumentations.CoarseDropout: {max_holes: 8}}, {albumentations.Rotat: {}}]"
    sets = ("--set", "augment.policy=ligth", "--set", f"augment.transforms={wrong}")
    for arguments in (("check", config), ("augment", config, "--out", tmp_path / "grid.png")):
        result = cli(*arguments, *sets)
        assert result.exit_code == 2 and "Traceback" not in result.stderr
        assert "did you mean 'light'?" in result.stderr
        assert "num_holes_range: [1, 8]" in result.stderr
        assert "did you mean albumentations.Rotate" in result.stderr
    assert not (tmp_path / "grid.png").exists()


def test_an_image_that_cannot_be_read(project: Any, tmp_path: Path, cli: Cli) -> None:
    (project.folder / "사진 들/no 1.png").write_bytes(b"no image")
    result = cli("augment", project.write(), "--out", tmp_path / "grid.png")
    assert result.exit_code == 2 and "no 1.png" in result.stderr
    assert "is not an image" in result.stderr and "Traceback" not in result.stderr


def test_only_an_earlier_picture_is_overwritten(project: Any, tmp_path: Path, cli: Cli) -> None:
    out, config = tmp_path / "grid.png", project.write()
    assert cli("augment", config, "--out", out).exit_code == 0
    first = out.read_bytes()
    assert cli("augment", config, "--out", out, "--images", "2").exit_code == 0
    assert out.read_bytes() != first
    Image.new("RGB", (9, 9)).save(out)
    own = out.read_bytes()
    result = cli("augment", config, "--out", out)
    assert result.exit_code == 2 and "grid.png exists; remove it" in result.stderr
    assert out.read_bytes() == own
