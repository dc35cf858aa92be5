"""The blend's charts with few and many members, long and Korean names, tiny and huge values."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib import image

from foldrace.ensemble.solvers.greedy import greedy
from foldrace.reporting.charts import blend as blend_charts
from foldrace.reporting.charts import candidates as charts
from foldrace.reporting.charts.style import palette, short
from foldrace.run_folder.blend_records import CurvePoint, Reliability, ReliabilityBin

_LONG = "stack(timm/caformer_b36.sail_in22k_ft_in1k_384,timm/tf_efficientnetv2_xl.in21k_ft_in1k)"
_HANGUL = "나의_플러그인/한글이름이_아주_긴_백본_모델_이름_대형_384_사전학습"
_BACKBONES = (_LONG, _HANGUL, "timm/x", "torchvision/convnext_tiny")


def _bars(members: int, gains: float | None) -> list[blend_charts.Bar]:
    rng = np.random.default_rng(members)
    weights = np.sort(rng.dirichlet(np.full(members, 0.5)))[::-1]
    return [
        blend_charts.Bar(
            f"{short(_BACKBONES[i % 4], 28)}  c{i:04d} ema (실험_두번째_자동차)",
            _BACKBONES[i % 4],
            float(weight),
            None if gains is None or i == 1 else float(gains * rng.normal()),
        )
        for i, weight in enumerate(weights)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("members", "gains"),  # height by members, width by gains
    [(1, None), (1, 30.0), (2, 1e-8), (12, 0.01), (40, 30.0)],
)
def test_weights_chart_is_never_cut(members: int, gains: float | None) -> None:
    _assert_uncut(blend_charts.weights(_bars(members, gains), palette(_BACKBONES)))


def test_gains_below_zero_are_never_cut() -> None:
    bars = [
        blend_charts.Bar(f"c{i:04d}", "timm/x", 0.5, gain) for i, gain in enumerate((-2.0, 0.0))
    ]
    _assert_uncut(blend_charts.weights(bars, palette(_BACKBONES)))


@pytest.mark.slow
@pytest.mark.parametrize("members", [2, 12, 15, 30])
def test_correlation_chart_is_never_cut(members: int) -> None:
    matrix = np.corrcoef(np.random.default_rng(0).random((members, 50)))
    names = [short(_BACKBONES[i % 4], 28) for i in range(members)]
    ids = [f"c{i:04d} ema (실험_두번째_자동차)" for i in range(members)]
    _assert_uncut(charts.correlation(matrix, ids, names))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 40])
def test_confusion_chart_is_never_cut(classes: int) -> None:
    """With numbers in its outermost fields."""
    names = [f"현대_더_뉴_그랜저_하이브리드_{i}_2014_2016" for i in range(classes)]
    counts = np.full((classes, classes), 1234)
    counts[1:-1, 1:-1] = 0
    _assert_uncut(charts.confusion(counts, names))


@pytest.mark.parametrize("rows", [1, 1_000_000])
def test_reliability_chart_is_never_cut(rows: int) -> None:
    bins = tuple(
        ReliabilityBin(rows=0 if i % 3 else rows, confidence=(i + 0.5) / 15, accuracy=i / 14)
        for i in range(15)
    )
    found = Reliability(ece=0.1, bins=bins)
    _assert_uncut(blend_charts.reliability([("Before", found)]))
    _assert_uncut(blend_charts.reliability([("Before", found), ("After", found)]))


def test_path_and_curve_charts_are_never_cut() -> None:
    true_prob = np.random.default_rng(0).random((4, 50))
    path = greedy(true_prob)
    rounds = list(range(1, 1 + len(path.path_losses)))
    least = path.loss - path.certificate
    _assert_uncut(blend_charts.trajectory(rounds, path.path_losses, 1.0, least))
    one = [CurvePoint(ms_per_image=0.0, oof_logloss=1e-6, members=1)]
    many = [CurvePoint(ms_per_image=10.0**i, oof_logloss=1 / i, members=i) for i in range(1, 7)]
    for curve in (one, many, many * 3):
        _assert_uncut(blend_charts.loss_against_time(curve, (5000.0, 0.2)))
        _assert_uncut(blend_charts.loss_against_time(curve, None))


def _assert_uncut(png: bytes) -> None:
    """Nothing is drawn on the outermost pixels: what is cut off would be."""
    pixels = image.imread(io.BytesIO(png))[..., :3]
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge == 1.0).all() for edge in edges)
    assert (pixels < 1.0).any()
