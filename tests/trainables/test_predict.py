"""Several models in one pass over the images give what each gives alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from foldrace.trainables import predict as predict_module
from foldrace.trainables.data.loader import Batch
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import all_logits, autocast_for

CPU = torch.device("cpu")
PLAIN = autocast_for(CPU, "fp32")


def batches() -> list[Batch]:
    rng = np.random.default_rng(0)
    images = torch.from_numpy(rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8))
    shares = (slice(0, 4), slice(4, 8), slice(8, 10))
    return [Batch(images[s], torch.arange(10)[s], torch.zeros(10, 0)[s]) for s in shares]


def two_models() -> list[nn.Module]:
    torch.manual_seed(0)
    return [build_classifier(ModelConfig("timm/test_resnet", 3, 32)) for _ in range(2)]


def test_one_pass_gives_what_each_model_gives_alone() -> None:
    both = two_models()
    found, rows = all_logits(both, iter(batches()), CPU, PLAIN)  # an iterator: read but once
    assert rows.tolist() == list(range(10))
    for model, logits in zip(both, found, strict=True):
        [alone], _ = all_logits([model], batches(), CPU, PLAIN)
        assert logits.shape == (10, 3) and torch.equal(logits, alone)
    assert not torch.allclose(found[0], found[1])


def test_a_batch_that_does_not_fit_is_halved_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second model has no room for more than 2 images: nothing is scored twice."""

    class Narrow(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor, meta: Tensor) -> Tensor:
            if len(images) > 2:
                raise torch.OutOfMemoryError("no memory left")
            return self.inner(images, meta)  # type: ignore[no-any-return]

    monkeypatch.setattr(predict_module, "release", lambda device: None)
    wide, narrow = two_models()
    found, rows = all_logits([wide, Narrow(narrow)], batches(), CPU, PLAIN)
    expected, _ = all_logits([wide, narrow], batches(), CPU, PLAIN)
    assert rows.tolist() == list(range(10))
    for logits, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(logits, plain, atol=1e-5, rtol=1e-4)
