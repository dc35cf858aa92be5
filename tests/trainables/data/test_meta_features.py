"""The contract of every meta feature; from the stored image to the logits."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foldrace.config.schema import AugmentConfig
from foldrace.trainables.data.loader import (
    Batch,
    BatchDataset,
    BatchRows,
    ShuffledBatchSampler,
    build_loader,
    loader_settings,
)
from foldrace.trainables.data.meta_features import (
    META_FEATURES,
    MetaFeature,
    check_meta,
    meta_vectors,
    meta_width,
)
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import autocast_for, log_probabilities, scoring_loader

CPU = torch.device("cpu")
IN_PROCESS = loader_settings(1, "cpu")
NAMES = tuple(META_FEATURES)
CARD = ModelConfig("timm/test_resnet", 3, 32, meta=NAMES)


class Noise:
    """Row -> its own noise, each of another shape and brightness."""

    def __len__(self) -> int:
        return 40

    def image(self, row: int) -> NDArray[np.uint8]:
        rng = np.random.default_rng(int(row))
        return rng.integers(0, 40 + 5 * int(row), (20 + row, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("feature", META_FEATURES.values(), ids=META_FEATURES)
def test_every_feature_is_finite_and_of_its_width(feature: MetaFeature) -> None:
    assert META_FEATURES[feature.name] is feature and feature.doc
    assert check_meta([feature.name]) == [] and meta_width([feature.name]) == feature.width
    images = [np.full((h, w, 3), v, np.uint8) for h, w, v in ((1, 300, 0), (300, 1, 255))]
    vectors = meta_vectors([*images, Noise().image(3)], [feature.name])
    assert vectors.shape == (3, feature.width) and vectors.dtype == np.float32
    assert np.isfinite(vectors).all() and np.abs(vectors).max() < 10


def test_closed_forms() -> None:
    image = Noise().image(7)
    mean = image.reshape(-1, 3).astype(np.float64).mean(axis=0) / 255
    expected = [*((mean - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]), math.log(30 / 27)]
    found = meta_vectors([image], ["mean_colour", "aspect_ratio"])[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    swapped = meta_vectors([image], ["aspect_ratio", "mean_colour"])[0]
    np.testing.assert_array_equal(swapped, np.roll(found, 1))


def test_batches_hold_the_features_of_the_stored_images_whatever_the_augmentation() -> None:
    batches = BatchDataset(Noise(), 32, AugmentConfig(policy="heavy"), NAMES)
    rows = np.array([5, 0, 17])
    trained = batches.__getitems__(BatchRows(rows, (1, 2, 3)))
    scored = batches.__getitems__(BatchRows(rows, None))
    expected = meta_vectors([Noise().image(row) for row in rows], NAMES)
    np.testing.assert_array_equal(trained.meta, expected)
    np.testing.assert_array_equal(scored.meta, expected)
    assert not torch.equal(trained.images, scored.images)
    plain = BatchDataset(Noise(), 32, AugmentConfig(policy="none")).__getitems__(
        BatchRows(rows, None)
    )
    assert plain.meta.shape == (3, 0)


def test_they_come_through_loader_processes() -> None:
    dataset = BatchDataset(Noise(), 16, AugmentConfig(policy="light"), NAMES)
    sampler = ShuffledBatchSampler(np.arange(40), 8, 0)
    batch: Batch
    for batch in build_loader(dataset, sampler, 1, False):
        expected = meta_vectors([Noise().image(int(row)) for row in batch.rows], NAMES)
        np.testing.assert_array_equal(batch.meta, expected)


def test_the_head_sees_them_beside_the_pooled_features() -> None:
    torch.manual_seed(0)
    model = build_classifier(CARD).eval()
    images, meta = torch.rand(2, 3, 32, 32), torch.randn(2, 4)
    linear = model.head[1]  # type: ignore[index]
    with torch.no_grad():
        pooled = model.body(model.normalise(images))
        expected = linear(torch.cat([pooled, meta], dim=1))
        torch.testing.assert_close(model(images, meta), expected)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(images, meta).shape == (2, 3)
    for wrong in (None, torch.zeros(2, 0), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="needs 4 meta features"):
            model(images, wrong)


def test_scores_depend_on_them() -> None:
    torch.manual_seed(0)
    model = build_classifier(CARD)
    rows = np.arange(10)
    loader = scoring_loader(Noise(), rows, CARD, 4, IN_PROCESS)
    found, scored = log_probabilities(model, loader, CPU, autocast_for(CPU, "fp32"), "softmax")
    assert scored.tolist() == rows.tolist()
    batch = BatchDataset(Noise(), 32, AugmentConfig(policy="none"), NAMES).__getitems__(
        BatchRows(rows, None)
    )
    images = batch.images.permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = torch.log_softmax(model(images, batch.meta), 1)
        without = torch.log_softmax(model(images, 0 * batch.meta), 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - without.numpy()).max() > 1e-3


def test_a_model_without_them_ignores_the_empty_ones() -> None:
    model = build_classifier(replace(CARD, meta=())).eval()
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(model(images), model(images, torch.zeros(2, 0)))


def test_wrong_names_are_told() -> None:
    problems = check_meta(["mean_color", "aspect_ratio", "aspect_ratio"])
    assert {p.where for p in problems} == {"training.meta_features"}
    assert [p.message for p in problems] == [
        "aspect_ratio is given twice",
        "got 'mean_color'; did you mean 'mean_colour'? allowed: mean_colour, aspect_ratio",
    ]
