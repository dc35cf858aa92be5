"""Free lists of transforms: each library's contract, our own against closed forms, and what is
said of lists that cannot run."""

from __future__ import annotations

import json
import pickle
import random
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from foldrace.checks.transforms import check_transforms
from foldrace.config.load import ParsedConfig, parse_config, to_yaml
from foldrace.config.schema import AugmentConfig, TransformConfig
from foldrace.trainables.data.augment import POLICIES, augment
from foldrace.trainables.data.custom_transforms import CUSTOM, UnsharpMask
from foldrace.trainables.data.loader import Batch, BatchDataset, ShuffledBatchSampler, build_loader
from foldrace.trainables.data.transforms import Transforms

ROOT = Path(__file__).resolve().parents[3]
Pixels = NDArray[np.uint8]
MIXED: tuple[TransformConfig, ...] = (
    {"albumentations.RandomBrightnessContrast": {"p": 0.9}},
    {"torchvision.RandomErasing": {"p": 0.8}},
    {"foldrace.UnsharpMask": {"p": 0.7}},
    {"albumentations.ElasticTransform": {"alpha": 20, "sigma": 5, "p": 0.9}},
    {"torchvision.ColorJitter": {"brightness": 0.3, "hue": 0.1}},
)
LISTS: dict[str, tuple[TransformConfig, ...]] = {
    "albumentations": ({"albumentations.GaussNoise": {"p": 1}},),
    "torchvision": ({"torchvision.ElasticTransform": {}},),
    "foldrace": ({"foldrace.UnsharpMask": {}},),
    "mixed": MIXED,
}
each_list = pytest.mark.parametrize("entries", LISTS.values(), ids=LISTS)


def noise(n: int = 6, size: int = 24) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def varied(entries: Any, seed: int = 1, images: Pixels | None = None) -> Pixels:
    given = noise() if images is None else images.copy()
    return Transforms(entries)(given, np.random.default_rng(seed))


def messages(*entries: TransformConfig, sizes: tuple[int, ...] = (24,)) -> list[str]:
    return [str(problem) for problem in check_transforms(entries, sizes)]


@each_list
def test_the_seed_decides_and_the_global_generators_do_not(entries: Any) -> None:
    once = varied(entries)
    assert once.shape == (6, 24, 24, 3) and once.dtype == np.uint8
    assert (once != noise()).any()
    np.random.seed(7)
    random.seed(7)
    torch.manual_seed(7)
    np.testing.assert_array_equal(varied(entries), once)
    assert (varied(entries, seed=2) != once).any()
    assert np.random.random() == np.random.RandomState(7).random()
    assert random.random() == random.Random(7).random()
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))


@each_list
def test_an_image_does_not_depend_on_the_others(entries: Any) -> None:
    other = noise()
    other[0] = 128
    np.testing.assert_array_equal(varied(entries)[1:], varied(entries, images=other)[1:])


@each_list
def test_a_used_list_gives_the_same_again(entries: Any) -> None:
    """Transforms hold no state from one image to the next, and survive the way to a worker."""
    used = Transforms(entries)
    used(noise(), np.random.default_rng(9))
    again: Transforms = pickle.loads(pickle.dumps(used))
    for transforms in (used, again):
        out = transforms(noise(), np.random.default_rng(1))
        np.testing.assert_array_equal(out, varied(entries))


def test_an_empty_list_draws_nothing() -> None:
    rng = np.random.default_rng(0)
    images = noise()
    assert Transforms(())(images, rng) is images
    assert rng.random() == np.random.default_rng(0).random()


class Noise:
    """A picklable image source."""

    def __len__(self) -> int:
        return 40

    def image(self, row: int) -> Pixels:
        return np.random.default_rng(int(row)).integers(0, 256, (30, 20, 3), dtype=np.uint8)


def batches(workers: int) -> list[Batch]:
    config = AugmentConfig(policy="medium", transforms=MIXED)
    loader: DataLoader[Batch] = build_loader(
        BatchDataset(Noise(), 24, config), ShuffledBatchSampler(np.arange(40), 8, 3), workers, False
    )
    return list(loader)


def test_loader_processes_change_nothing() -> None:
    alone = batches(0)
    for one, other in zip(alone, batches(2), strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.rows, other.rows)


def test_the_list_follows_the_policy() -> None:
    config = AugmentConfig(policy="medium", transforms=({"torchvision.RandomInvert": {"p": 1}},))
    sampler = ShuffledBatchSampler(np.arange(40), 8, 3)
    loader = build_loader(BatchDataset(Noise(), 24, config), sampler, 0, False)
    for plan, batch in zip(list(sampler), loader, strict=True):
        images = [Noise().image(row) for row in plan.rows]
        assert plan.seed is not None
        seed, *place = plan.seed
        rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(4, *place)))
        plain = augment(images, 24, POLICIES["medium"], rng)
        np.testing.assert_array_equal(batch.images.numpy(), 255 - plain)


def test_transforms_do_what_their_libraries_say() -> None:
    images = noise()
    flips = ("albumentations.HorizontalFlip", "torchvision.RandomHorizontalFlip")
    for name in flips:
        np.testing.assert_array_equal(varied([{name: {"p": 1}}]), images[:, :, ::-1])
        np.testing.assert_array_equal(varied([{name: {"p": 0}}]), images)
    turned = varied([{"albumentations.Transpose": {"p": 1}}])
    np.testing.assert_array_equal(turned, images.swapaxes(1, 2))


def test_probability_is_per_image() -> None:
    images = np.repeat(noise(1), 400, axis=0)
    flipped = varied([{"albumentations.HorizontalFlip": {"p": 0.3}}], images=images)
    share = np.mean([(a != b).any() for a, b in zip(flipped, images, strict=True)])
    assert share == pytest.approx(0.3, abs=0.08)


@pytest.mark.parametrize("name", CUSTOM)
def test_custom_transforms_keep_their_contract(name: str) -> None:
    custom = CUSTOM[name]
    assert custom.name == name and custom.doc
    image = noise(1)[0]
    image.flags.writeable = False
    out = custom.make(p=1.0)(image, np.random.default_rng(0))
    assert out.shape == image.shape and out.dtype == np.uint8 and (out != image).any()
    np.testing.assert_array_equal(custom.make(p=0.0)(image, np.random.default_rng(0)), image)
    assert messages({f"foldrace.{name}": {}}) == []


def gaussian_blur(image: Pixels, kernel: int, sigma: float) -> NDArray[np.float64]:
    """By the definition, with the border mirrored (the edge pixel not repeated)."""
    reach = kernel // 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    blurred = image.astype(np.float64)
    for axis in (0, 1):
        width = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(blurred, width, mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=axis)
        blurred = windows @ weights
    return blurred


@pytest.mark.parametrize("amount", [0.0, 1.0, 1.5, 4.0])
def test_unsharp_mask_closed_form(amount: float) -> None:
    image = noise(1)[0] // 2 + 60
    sharp = UnsharpMask(amount=amount, p=1).apply(image, np.random.default_rng(0))
    exact = np.clip(image + amount * (image - gaussian_blur(image, 7, 1.5)), 0, 255)
    assert np.abs(sharp - exact).max() <= 0.5 + amount  # cv2's blurred image is within 1


def test_unsharp_mask_leaves_what_differs_little() -> None:
    image = noise(1)[0]
    difference = np.abs(image - gaussian_blur(image, 7, 1.5))
    sharp = UnsharpMask(threshold=40, p=1).apply(image, np.random.default_rng(0))
    full = UnsharpMask(p=1).apply(image, np.random.default_rng(0))
    np.testing.assert_array_equal(sharp[difference < 39], image[difference < 39])
    np.testing.assert_array_equal(sharp[difference > 41], full[difference > 41])


def alb(name: str, **arguments: object) -> TransformConfig:
    return {f"albumentations.{name}": arguments}


def tv(name: str, **arguments: object) -> TransformConfig:
    return {f"torchvision.{name}": arguments}


def ours(name: str, **arguments: object) -> TransformConfig:
    return {f"foldrace.{name}": arguments}


WRONG: dict[str, tuple[TransformConfig, str]] = {
    "misspelt": (alb("HorizontalFlp"), "did you mean albumentations.HorizontalFlip?"),
    "torchvision misspelt": (tv("ColourJitter"), "did you mean torchvision.ColorJitter"),
    "ours misspelt": (ours("UnsharpMsk"), "did you mean foldrace.UnsharpMask?"),
    "no library": ({"HorizontalFlip": {}}, "did you mean albumentations.HorizontalFlip?"),
    "wrong library": ({"kornia.Foo": {}}, "libraries: albumentations, torchvision, foldrace"),
    "an empty container": (tv("RandomApply"), "needs transforms"),
    "functions": (tv("Lambda"), "unknown transform"),
    "unknown argument": (alb("Rotate", limits=3), "did you mean 'limit'? allowed: limit, inter"),
    "torchvision argument": (tv("RandomErasing", prob=1), "allowed: p, scale, ratio"),
    "our argument": (ours("UnsharpMask", alpha=1), "allowed: p, kernel, sigma, amount, thr"),
    "inherited init": (alb("HorizontalFlip", axis=1), "'axis'; allowed: p"),
    "old max_holes": (alb("CoarseDropout", max_holes=8), "write num_holes_range: [1, 8]"),
    "old max_height": (alb("CoarseDropout", max_height=9), "hole_height_range: [<least>, 9]"),
    "old max_width": (alb("CoarseDropout", max_width=9), "hole_width_range: [<least>, 9]"),
    "old fill_value": (alb("CoarseDropout", fill_value=1), "write fill: 1"),
    "old Cutout": (alb("Cutout", num_holes=8), "no Cutout; use CoarseDropout"),
    "old crop": (alb("RandomResizedCrop", height=24, width=24), "write size: [24, <width>]"),
    "old pad": (alb("PadIfNeeded", value=0), "write fill: 0"),
    "old shift": (alb("ShiftScaleRotate", value=0), "write fill: 0"),
    "old always_apply": (alb("Blur", always_apply=True), "write p: 1"),
    "old noise": (alb("GaussNoise", var_limit=[1, 2]), "std_range"),
    "old downscale": (alb("Downscale", interpolation=1), "{upscale: 1, downscale: 1}"),
    "old affine": (alb("Affine", mode=1), "write border_mode: 1"),
    "missing": (tv("RandomRotation"), "needs degrees"),
    "out of range": (alb("Rotate", p=2), "p: got 2; should be less than or equal"),
    "sharper": (alb("UnsharpMask", alpha=[1.5, 1.5]), "must be >= 0 and <= 1"),
    "torchvision range": (tv("RandomErasing", p=3), "interval [0.0, 1.0]"),
    "ours even": (ours("UnsharpMask", kernel=6), "kernel: got 6; should be odd"),
    "wrong type": (alb("Rotate", limit="a"), 'limit: got "a"'),
    "normalise": (alb("Normalize"), "each model normalises its own input"),
    "to tensor": (tv("ToTensor"), "each model normalises its own input"),
    "mixup": (tv("MixUp", num_classes=3), "search.space.mixup_prob"),
    "wrong size": (alb("Resize", height=16, width=20), "makes 20 x 16 pixels of 24 x 24"),
    "too large": (alb("RandomCrop", height=32, width=32), "on an image of 24 x 24: Crop size"),
    "needs masks": (alb("MaskDropout"), "requires ['mask']"),
    "five": (tv("FiveCrop", size=24), "gives several images of one"),
    "grey": (tv("Grayscale"), "does not give an RGB image"),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "text"), WRONG.values(), ids=WRONG)
def test_what_is_said_of_a_wrong_entry(entry: TransformConfig, text: str) -> None:
    found = messages(entry)
    assert found and all(message.startswith("augment.transforms") for message in found)
    assert any(text in message for message in found), found


def test_all_problems_at_once_with_their_places() -> None:
    found = messages(
        {"albumentations.CoarseDropout": {"max_holes": 3, "max_height": 4}},
        {"albumentations.HorizontalFlip": {}},
        {"torchvision.RandomErasing": {"p": 3}},
    )
    places = [message.split(":")[0] for message in found]
    assert places == [
        "augment.transforms.0 albumentations.CoarseDropout",
        "augment.transforms.0 albumentations.CoarseDropout",
        "augment.transforms.2 torchvision.RandomErasing",
    ]


def test_lists_that_end_at_the_models_size_are_fine() -> None:
    crop, back = alb("RandomCrop", height=20, width=20), tv("Resize", size=[24, 24])
    scale = alb("RandomScale", scale_limit=0.3, p=1)
    assert messages(*MIXED) == messages(crop, back) == messages(scale, back) == []
    assert "20 x 20 pixels" in messages(crop)[0]
    [found] = messages(crop, back, sizes=(24, 32))
    assert "makes 24 x 24 pixels of 32 x 32" in found
    sometimes: TransformConfig = {
        "albumentations.RandomCrop": {"height": 20, "width": 20, "p": 0.5}
    }
    assert "not of every image; give it p: 1" in messages(sometimes, back)[0]


def test_transforms_that_only_look_strict() -> None:
    """Some of albumentations' classes pass their arguments on to a base class."""
    names = ("MedianBlur", "RandomRotate90", "ToSepia", "ShiftScaleRotate")
    assert messages(*({f"albumentations.{name}": {}} for name in names)) == []


def test_the_agpl_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.0.11")
    [found] = messages({"albumentations.Blur": {}}, {"albumentations.Rotate": {}})
    assert "AGPL" in found and "pip uninstall albumentationsx" in found
    assert messages({"foldrace.UnsharpMask": {}}) == []


def test_without_albumentations(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert messages({"albumentations.Blur": {}}) == [
        "albumentations: is not installed; pip install albumentations==2.0.8"
    ]


def test_a_library_is_imported_only_for_a_list_that_uses_it() -> None:
    code = (
        "import os, sys, numpy as np\n"
        "from foldrace.trainables.data.transforms import Transforms\n"
        "images = np.zeros((1, 8, 8, 3), np.uint8)\n"
        "Transforms([{'foldrace.UnsharpMask': {}}])(images, np.random.default_rng(0))\n"
        "assert 'albumentations' not in sys.modules\n"
        "Transforms([{'albumentations.Blur': {}}])\n"
        "assert 'albumentations' in sys.modules\n"
        "assert os.environ['NO_ALBUMENTATIONS_UPDATE'] == '1'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def parsed(transforms: object, folder: Path) -> ParsedConfig:
    raw = {
        "data": {"train": "x.csv"},
        "search": {"backbones": ["timm/resnet18"]},
        "augment": {"policy": "none", "transforms": transforms},
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(raw), encoding="utf-8")
    return parse_config(path)


def test_entries_in_the_config(tmp_path: Path) -> None:
    given = [
        "albumentations.ToGray", {"albumentations.Blur": None}, {"torchvision.Pad": {"padding": 2}}
    ]  # fmt: skip
    config = parsed(given, tmp_path).require()
    expected = (alb("ToGray"), alb("Blur"), tv("Pad", padding=2))
    assert config.augment.transforms == expected
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert parse_config(tmp_path / "again.yaml").require().augment == config.augment


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"a.B": {}, "a.C": {}}, "should be one transform with its arguments"),
        (3, "should be one transform with its arguments"),
        ({}, "should be one transform with its arguments"),
        ({"a.B": [1]}, "the arguments of a.B should be a mapping"),
    ],
)
def test_entries_of_another_form(entry: object, text: str, tmp_path: Path) -> None:
    [problem] = parsed(["albumentations.Blur", entry], tmp_path).problems
    assert problem.where.endswith("augment.transforms[1]") and text in problem.message


def test_containers_apply_what_they_hold() -> None:
    flips: list[TransformConfig] = [
        {"albumentations.HorizontalFlip": {"p": 1}},
        {"albumentations.VerticalFlip": {"p": 1}},
    ]
    both = varied(({"albumentations.Sequential": {"transforms": flips, "p": 1}},))
    np.testing.assert_array_equal(both, noise()[:, ::-1, ::-1])
    one = varied(({"albumentations.OneOf": {"transforms": flips, "p": 1}},), images=noise(40))
    kinds = [
        (np.array_equal(a, b[:, ::-1]), np.array_equal(a, b[::-1]))
        for a, b in zip(one, noise(40), strict=True)
    ]
    assert set(kinds) == {(True, False), (False, True)}
    theirs: TransformConfig = {"torchvision.RandomHorizontalFlip": {"p": 1.0}}
    applied = varied(({"torchvision.RandomApply": {"transforms": [theirs], "p": 1.0}},))
    np.testing.assert_array_equal(applied, noise()[:, :, ::-1])


def test_what_is_wrong_inside_a_container_has_its_place() -> None:
    inner: list[TransformConfig] = [
        {"albumentations.HorizontalFlip": {"p": 2}},
        {"albumentations.MotionBlurr": {}},
    ]
    found = messages({"albumentations.OneOf": {"transforms": inner}})
    assert len(found) == 2
    assert found[0].startswith("augment.transforms.0.transforms.0 albumentations.HorizontalFlip")
    assert "did you mean albumentations.MotionBlur" in found[1]
    mixed: TransformConfig = {
        "albumentations.OneOf": {"transforms": [{"foldrace.UnsharpMask": {}}]}
    }
    assert "transforms of another library; allowed: albumentations" in messages(mixed)[0]
    assert "changes the size" in messages(
        {"albumentations.OneOf": {"transforms": [{"albumentations.CenterCrop": {
            "height": 8, "width": 8}}, {"albumentations.HorizontalFlip": {}}], "p": 0.5}}
    )[0]  # fmt: skip


def test_words_for_torchvisions_enumerations() -> None:
    rotate = {"degrees": [30, 30], "interpolation": "bilinear"}
    assert messages({"torchvision.RandomRotation": rotate}) == []
    smooth = varied(({"torchvision.RandomRotation": rotate},))
    nearest = varied(({"torchvision.RandomRotation": {"degrees": [30, 30]}},))
    assert (smooth != nearest).any()
    assert messages({"torchvision.AutoAugment": {"policy": "cifar10"}}) == []
    [wrong] = messages({"torchvision.RandomRotation": {"degrees": 30, "interpolation": "linear"}})
    assert "Supported string values are: ['nearest'" in wrong
    [wrong] = messages({"torchvision.AutoAugment": {"policy": "cifar"}})
    assert "'cifar' is not a valid AutoAugmentPolicy" in wrong


def test_inner_entries_take_the_short_form_too(tmp_path: Path) -> None:
    text = "data: {train: x}\nsearch: {backbones: [timm/resnet18]}\naugment:\n  transforms:\n"
    text += "  - albumentations.OneOf: {transforms: [albumentations.HorizontalFlip]}\n"
    (tmp_path / "c.yaml").write_text(text)
    config = parse_config(tmp_path / "c.yaml").require()
    inner = config.augment.transforms[0]["albumentations.OneOf"]["transforms"]
    assert inner == [{"albumentations.HorizontalFlip": {}}]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ElasticTransform", {"alpha": 60, "sigma": 4}),
        ("Affine", {"rotate": [30, 30]}),
        ("Rotate", {"limit": [30, 30], "border_mode": 0}),
        ("GridDistortion", {"distort_limit": [-0.4, -0.4], "border_mode": 0}),
        ("CoarseDropout", {"num_holes_range": [4, 4]}),
    ],
)
def test_one_number_fills_all_colours(name: str, arguments: dict[str, Any]) -> None:
    """Of a black image what comes in from outside is white, and nothing is coloured."""
    black = np.zeros((6, 48, 48, 3), np.uint8)
    filled = {f"albumentations.{name}": {**arguments, "fill": 255, "p": 1}}
    changed = varied((filled,), images=black)
    assert (changed == changed[..., :1]).all() and changed.max() == 255
