"""The contract of every row of the table; views and averages against independent computations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from typer.testing import CliRunner

from foldrace.core.errors import UserError
from foldrace.inference.predictor import Predictor
from foldrace.inference.tta import TTA, TTAS, AveragedViews, find_tta
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.sweep import app
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights

each_tta = pytest.mark.parametrize("tta", TTAS.values(), ids=TTAS)
CARD = ModelConfig("timm/test_resnet", 3, 32)
NO_META = torch.empty(2, 0)
PLAIN, FLIP, ROTATE = TTAS["flip-rotate"].views


def noise(height: int = 20, width: int = 30, seed: int = 0) -> Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """Logits that depend on every pixel."""

    def __init__(self, classes: int = 4, pixels: int = 3 * 20 * 30) -> None:
        super().__init__()
        self.weight = torch.randn(pixels, classes, generator=torch.Generator().manual_seed(1)) * 0.2

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight


class Brightness(nn.Module):
    """Logits that a flip does not change."""

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        means = images.double().mean(dim=(2, 3))
        return torch.cat([means, means.square()], dim=1).float() * 3


@each_tta
def test_views_keep_shape_and_range_and_leave_the_images_alone(tta: TTA) -> None:
    assert TTAS[tta.name] is tta and tta.doc and find_tta(tta.name) is tta
    images, before = noise(), noise()
    for view in tta.views:
        seen = view(images)
        assert seen.shape == images.shape and seen.dtype == torch.float32
        assert seen.min() >= 0 and seen.max() <= 1 + 1e-6
    assert torch.equal(images, before)
    assert torch.equal(tta.views[0](images), images)


@each_tta
def test_an_image_does_not_depend_on_its_neighbours(tta: TTA) -> None:
    images = noise()
    for view in tta.views:
        torch.testing.assert_close(view(images)[1:], view(images[1:]))


@each_tta
def test_one_colour_stays_one_colour(tta: TTA) -> None:
    images = torch.full((1, 3, 21, 34), 0.25)
    for view in tta.views:
        torch.testing.assert_close(view(images), images)


def test_flipped_twice_is_plain() -> None:
    assert torch.equal(FLIP(FLIP(noise())), noise())
    assert torch.equal(FLIP(noise()), torch.from_numpy(noise().numpy()[..., ::-1].copy()))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 33), (24, 40)])
def test_the_rotation_is_cv2s_with_its_edge_going_on(height: int, width: int) -> None:
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([np.sin(x / 7), np.cos(y / 5), (x + y) / 50], axis=2).astype(np.float32)
    image = (smooth - smooth.min()) / np.ptp(smooth)
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), 15.0, 1.0)
    expected = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
    turned = ROTATE(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_allclose(turned.numpy(), expected, atol=0.01)


@pytest.mark.parametrize("factor", [0.8, 1.0, 1.25])
def test_a_scale_is_cv2s_about_the_centre(factor: float) -> None:
    size = 40  # times the factor an even number: the middle stays the middle
    y, x = np.mgrid[0:size, 0:size]
    smooth = np.stack([np.sin(x / 9), np.cos(y / 7), (x + y) / 80], axis=2).astype(np.float32)
    image = (smooth - smooth.min()) / np.ptp(smooth)
    centre = (size - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), 0.0, factor)
    expected = cv2.warpAffine(image, matrix, (size, size), borderMode=cv2.BORDER_REPLICATE)
    [_, scale] = find_tta(f"scale:{factor}").views
    seen = scale(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    np.testing.assert_allclose(seen.numpy(), expected, atol=0.02)


@pytest.mark.parametrize("size", [(21, 34), (32, 32), (1, 5)])
def test_views_of_a_list(size: tuple[int, int]) -> None:
    tta = find_tta("flip, flip-vertical,rotate:-90,scale:0.5,scale:1.37")
    assert tta.name == "flip,flip-vertical,rotate:-90,scale:0.5,scale:1.37"
    images = noise(*size)
    assert [view(images).shape for view in tta.views] == [images.shape] * 6
    assert torch.equal(tta.views[0](images), images)
    assert torch.equal(tta.views[2](images), images.flip(-2))
    for view in tta.views:  # one colour stays one colour
        plain = torch.full_like(images, 0.25)
        torch.testing.assert_close(view(plain), plain)


def test_a_wrong_list_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        find_tta("flip:2,rotate,rotate:200,scale:0.1,blur:3,flip,flip")
    told = [problem.message for problem in caught.value.problems]
    words = ("takes no number", "give it a number", "out of its limits", "out of its limits",
             "knows no view 'blur:3'", "names a view twice")  # fmt: skip
    assert len(told) == len(words) and all(w in t for w, t in zip(words, told, strict=True))
    with pytest.raises(UserError, match="at most 15"):
        find_tta(",".join(f"rotate:{i}" for i in range(16)))


@each_tta
def test_the_views_geometric_mean_counts(tta: TTA) -> None:
    model, images = Linear(), noise()
    product = np.ones((2, 4))
    for view in tta.views:
        logits = (view(images).flatten(1) @ model.weight).double().numpy()
        product *= np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = product ** (1 / len(tta.views))
    averaged = AveragedViews(model, tta, "softmax")(images, NO_META).exp().numpy()
    np.testing.assert_allclose(averaged, expected / expected.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(averaged.sum(axis=1), 1, atol=1e-6)


def test_a_symmetric_model_gains_nothing_from_flips() -> None:
    def both(model: nn.Module) -> list[Tensor]:
        views = (AveragedViews(model, TTAS[name], "softmax") for name in ("none", "flip"))
        return [average(noise(), NO_META) for average in views]

    torch.testing.assert_close(*both(Brightness()), atol=1e-6, rtol=0)
    assert not torch.allclose(*both(Linear()), atol=1e-2)


def test_each_view_comes_with_the_images_meta_features_and_activation() -> None:
    class Meta(nn.Module):
        def forward(self, images: Tensor, meta: Tensor) -> Tensor:
            return meta

    meta = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    for tta in TTAS.values():
        averaged = AveragedViews(Meta(), tta, "sigmoid")(noise(), meta)
        expected = meta.sigmoid() / meta.sigmoid().sum(dim=1, keepdim=True)
        torch.testing.assert_close(averaged.exp(), expected)


def test_views_are_exact_in_mixed_precision() -> None:
    class Keeps(nn.Module):
        def forward(self, images: Tensor, meta: Tensor) -> Tensor:
            self.seen = images
            return images.mean(dim=(2, 3))

    keeps = Keeps()
    images = noise(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        AveragedViews(keeps, TTAS["flip-rotate"], "softmax")(images, NO_META)
    torch.testing.assert_close(keeps.seen, ROTATE(images))


def test_unknown_names_are_told_with_what_is_allowed() -> None:
    with pytest.raises(UserError, match=r"did you mean 'flip'\? allowed: none, flip, flip-rotate"):
        find_tta("filp")


@pytest.fixture
def blend(make_tiny_run: Callable[..., Any]) -> RunStore:
    """One untrained candidate of two folds."""
    store: RunStore = make_tiny_run("run", k=2).store
    store.save_candidate(CandidateRecord(candidate="c0000", backbone="timm/test_resnet", params={}))
    for fold in range(2):
        torch.manual_seed(fold)
        model = build_classifier(CARD)
        for parameter in model.head.parameters():  # a fresh head is nearly indifferent
            parameter.data.mul_(4)
        store.save_trial(
            TrialRecord(
                candidate="c0000", fold=fold, status="finished", backbone="timm/test_resnet",
                params={"image_size": CARD.image_size}, folds_hash=store.folds().hash, seed=0,
            ),
            weights={"raw": pack_weights(model.state_dict(), CARD)},
        )  # fmt: skip
    store.blend.update(
        EnsembleRecord(
            method="greedy", members=(MemberRecord(candidate="c0000", variant="raw", weight=1.0),),
            oof_logloss=1, crossfit_logloss=1, crossfit_se=0, certificate=0,
            best_single_oof_logloss=1, best_single="c0000 raw", oof_accuracy=0.5,
            single_crossfit_logloss=1, members_considered=1, candidates_considered=1,
            folds_hash=store.folds().hash,
        )
    )  # fmt: skip
    return store


def test_the_predictor_averages_flipped_images(blend: RunStore, tmp_path: Path) -> None:
    """With `flip`: the geometric mean over folds, and over the image and its mirror image."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    files = [tmp_path / "image.png", tmp_path / "mirrored.png"]
    for file, array in zip(files, (pixels, pixels[:, ::-1]), strict=True):
        Image.fromarray(np.ascontiguousarray(array)).save(file)
    plain = Predictor(blend).probabilities(files)
    flipped = Predictor(blend, tta="flip").probabilities(files)
    mean = np.sqrt(plain.prod(axis=0))
    np.testing.assert_allclose(flipped[0], mean / mean.sum(), atol=1e-6)
    np.testing.assert_allclose(flipped[0], flipped[1], atol=1e-6)
    assert np.abs(flipped[0] - plain[0]).max() > 1e-5


def test_submit_records_the_views(blend: RunStore, tiny_images: Path, tmp_path: Path) -> None:
    config = blend.config()
    data = config.data.model_copy(update={"test": str(tiny_images / "red")})
    blend.save_config(config.model_copy(update={"data": data}))
    out = {}
    for tta in ("none", "flip-rotate"):
        file = tmp_path / f"{tta}.csv"
        result = CliRunner().invoke(app, ["submit", blend.root, "--tta", tta, "--out", str(file)])
        assert result.exit_code == 0, result.output
        assert json.loads(file.with_suffix(".receipt.json").read_text())["tta"] == tta
        out[tta] = file.read_bytes()
    assert out["none"] != out["flip-rotate"]
    refused = CliRunner().invoke(app, ["submit", blend.root, "--tta", "flips"])
    assert refused.exit_code == 2 and "Traceback" not in refused.stderr
    assert "allowed: none, flip, flip-rotate" in refused.stderr
