"""The reliability diagram against a plain loop and closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from foldrace.ensemble.calibration import reliability


@pytest.mark.parametrize(("rows", "bins"), [(1, 15), (10, 3), (2000, 15), (500, 1)])
def test_equals_a_plain_loop(rows: int, bins: int) -> None:
    rng = np.random.default_rng(rows)
    confidence = rng.uniform(0.1, 1.0, size=rows)
    hits = rng.uniform(size=rows) < confidence**2
    got, ece = reliability(confidence, hits, bins), 0.0
    assert len(got.bins) == bins
    for b, filled in enumerate(got.bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        assert filled.rows == inside.sum()
        if inside.any():
            assert filled.confidence == pytest.approx(confidence[inside].mean())
            assert filled.accuracy == pytest.approx(hits[inside].mean())
            ece += inside.mean() * abs(hits[inside].mean() - confidence[inside].mean())
    assert got.ece == pytest.approx(ece)


def test_confidence_that_is_the_accuracy_has_no_error() -> None:
    confidence = np.repeat([0.25, 0.5, 0.75], 100)
    hits = np.tile(np.arange(100), 3) < 100 * confidence
    assert reliability(confidence, hits).ece == pytest.approx(0.0)
    assert reliability(confidence, ~hits).ece == pytest.approx((0.5 + 0.0 + 0.5) / 3)


def test_overconfidence_is_the_error() -> None:
    got = reliability(np.full(10, 0.9), np.arange(10) < 6)
    assert got.ece == pytest.approx(0.3)
    assert got.bins[13].rows == 10


def test_edges_belong_to_the_lower_bin_and_all_rows_count() -> None:
    got = reliability(np.array([0.0, 0.5, 0.75, 1.0], np.float32), np.ones(4, bool), bins=4)
    assert [filled.rows for filled in got.bins] == [1, 1, 1, 1]
    assert got.bins[0].confidence == 0.0


def test_a_bin_without_rows_has_its_middle() -> None:
    empty = reliability(np.array([0.9]), np.array([True]), bins=2).bins[0]
    assert (empty.rows, empty.confidence, empty.accuracy) == (0, 0.25, 0.0)
