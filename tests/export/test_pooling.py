"""The exported pooling in torch, against the run's own in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foldrace.core.temperature import at_temperature
from foldrace.ensemble.fold_mean import fold_mean
from foldrace.ensemble.pooling import POOLINGS, pool_terms
from foldrace.export.shipped import blend_pooling
from foldrace.run_folder.oof import mean_log_prob

M, K, N, C = 3, 2, 40, 5
WEIGHTS = np.array([0.5, 0.3, 0.2])
TEMPERATURES = (0.7, 1.0, 2.0)
FINAL = 0.9


def _arrays(rng: np.random.Generator) -> dict[str, NDArray[np.float64]]:
    return {
        "constant": np.array([0.07]),
        "scales": rng.uniform(0, 1, M),
        "matrices": rng.normal(0, 0.2, (2, C, C)),
        "owners": np.array([0.0, 2.0]),
        "intercept": rng.normal(0, 0.1, C),
    }


def _by_numpy(
    name: str, log_probs: NDArray[np.float32], arrays: dict[str, NDArray[np.float64]], repeats: int
) -> NDArray[np.float64]:
    combiner = POOLINGS[name](WEIGHTS, arrays)
    folds = []
    for fold in range(K):
        members = [mean_log_prob([*log_probs[m, fold::K]]) for m in range(M)]
        cooled = [at_temperature(p, t) for p, t in zip(members, TEMPERATURES, strict=True)]
        folds.append(np.log(pool_terms(combiner, enumerate(cooled))))
    return fold_mean(folds, FINAL).prob


@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("name", POOLINGS)
def test_is_that_of_the_run(name: str, repeats: int) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 4, (M, K * repeats, N, C))
    logits[0, 0, :3] *= 30  # certain, beyond what a probability may be
    log_probs = torch.log_softmax(torch.from_numpy(logits), -1).float()
    arrays = _arrays(rng)
    members = [{"weight": w, "temperature": t} for w, t in zip(WEIGHTS, TEMPERATURES, strict=True)]
    pooling = blend_pooling.Pooling(
        name, members, {k: torch.from_numpy(a) for k, a in arrays.items()}, repeats, FINAL
    )
    expected = _by_numpy(name, log_probs.numpy(), arrays, repeats)
    np.testing.assert_allclose(pooling(log_probs.double()).numpy(), expected, atol=3e-6)
    np.testing.assert_allclose(pooling(log_probs).numpy(), expected, atol=1e-5)


def test_it_knows_every_pooling_of_the_run() -> None:
    assert blend_pooling.POOLINGS.keys() == POOLINGS.keys()
    with pytest.raises(ValueError, match="pooling 'median'; allowed: arithmetic"):
        blend_pooling.Pooling("median", [], {}, 1, 1.0)
