"""What the report says of the blend: members from anywhere, gains, guarantee, calibration, cost."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from numpy.typing import NDArray

from ensemble.greedy import greedy
from ensemble.reliability import reliability
from experiment.oof import npy
from experiment.records import (
    Calibration,
    CalibrationTrial,
    CurvePoint,
    EnsembleRecord,
    HeldOutScore,
    MemberRecord,
    NearDuplicates,
    Reliability,
    ReliabilityBin,
    UnvalidatedRecord,
)
from experiment.store import RunStore
from reporting import blend_charts, charts
from reporting.blend import blend as blend_section
from reporting.blend_facts import bound, facts, meaning_of_weights
from reporting.calibration import calibration as calibration_section
from reporting.context import ReportContext
from reporting.correlation import correlation as correlation_section
from reporting.leaderboard import leaderboard
from reporting.members import true_prob
from reporting.overview import summary, warnings
from reporting.plots import looks, short
from reporting.report import write_report
from tests.reporting.pages import Page, table_of

Run = Any  # the record that conftest.py makes
MakeRun = Callable[..., Run]
_LONG = "stack(timm/caformer_b36.sail_in22k_ft_in1k_384,timm/tf_efficientnetv2_xl.in21k_ft_in1k)"
_HANGUL = "나의_플러그인/한글이름이_아주_긴_백본_모델_이름_대형_384_사전학습"


@pytest.fixture(scope="module")
def other(make_run: MakeRun) -> Run:
    """A second run on the same rows, whose c0001 has another backbone than the first run's."""
    run = make_run(rows=60, epochs=1, complete=3, broken=False, seed=5)
    record = run.store.candidates()[1].model_copy(update={"backbone": "timm/of_the_other_run"})
    run.store.save_candidate(record)
    return run


@pytest.fixture(scope="module")
def rich(make_run: MakeRun, other: Run) -> Run:
    """A blend of own, other and added members with everything that can be known of it."""
    run = make_run(rows=60, epochs=1, complete=3, broken=False)
    added = _true(run, "c0002")
    run.store.files.write("ensemble/added/kernel.v2/true_prob.npy", npy(added))
    run.store.blend.update(run.store.blend.record().model_copy(update=_rich(run, other)))
    return run


def _rich(run: Run, other: Run) -> dict[str, object]:
    before = reliability(run.blend.max(axis=1), run.blend.argmax(axis=1) == run.labels)
    return {
        "members": (
            MemberRecord(candidate="c0001", variant="ema", weight=0.2, run=other.store.root),
            MemberRecord(
                candidate="c0000", variant="raw", weight=0.5, temperature=1.5, gain=0.0123,
                ms_per_image=12.34, weight_bytes=345_000_000,
            ),
            MemberRecord(
                candidate="kernel.v2", variant="added", weight=0.3, added=True, gain=-2e-6
            ),
        ),
        "mixture_logloss": 0.75,
        "certificate": 0.125,
        "blend_temperature": 1.25,
        "calibration": Calibration(
            members=False,
            blend=True,
            tried=tuple(
                CalibrationTrial(
                    members=m, blend=b, crossfit_logloss=0.9 - 0.2 * b + 0.1 * m, crossfit_se=0.02
                )
                for m in (False, True)
                for b in (False, True)
            ),
            before=before,
            after=before.model_copy(update={"ece": 0.0321}),
        ),
        "ms_per_image": 23.4,
        "device": "NVIDIA <H200>",
        "weight_bytes": 1_234_000_000,
        "curve": tuple(
            CurvePoint(ms_per_image=t, oof_logloss=0.7 + 1 / t, members=t) for t in (1, 5, 30)
        ),
        "duplicates": (("c0000 raw", "c0002 ema"),),
        "near_duplicates": NearDuplicates(rows=7, oof_logloss_without=0.98765),
        "unvalidated": (UnvalidatedRecord(name="public-kernel", weight=0.25),),
        "held_out": HeldOutScore(rows=12, logloss=0.4321, accuracy=0.875),
    }  # fmt: skip


def _true(run: Run, candidate: str) -> NDArray[np.float32]:
    """(N,) of a complete candidate."""
    prob = run.prob[candidate]
    return np.asarray(prob[np.arange(len(prob)), run.labels], dtype=np.float32)


def _record(run: Run, **update: object) -> EnsembleRecord:
    record: EnsembleRecord = run.store.blend.record().model_copy(update=update)
    return record


def test_members_are_told_by_where_they_come_from(rich: Run, other: Run) -> None:
    rows = table_of(blend_section(ReportContext(rich.store)) or "", "from")
    assert [(r["candidate"], r["variant"], r["backbone"], r["from"]) for r in rows] == [
        ("c0000", "raw", "torchvision/convnext_tiny", "this run"),
        ("kernel.v2", "", "made elsewhere", "added"),
        ("c0001", "ema", "timm/of_the_other_run", other.store.root),
    ]
    own = [_true(rich, "c0000"), _true(rich, "c0002"), _true(other, "c0001")]
    shown = [float(r["own OOF log loss"]) for r in rows]
    assert shown == pytest.approx([-np.log(t.astype(float)).mean() for t in own], abs=6e-5)


def test_members_table_shows_gain_time_and_size(rich: Run) -> None:
    rows = table_of(blend_section(ReportContext(rich.store)) or "", "loss rise without it")
    assert [r["loss rise without it"] for r in rows] == ["+0.0123", "-2.0e-06", "-"]
    assert [r["time per image"] for r in rows] == ["12.3 ms", "-", "-"]
    assert [r["weight files"] for r in rows] == ["345 MB", "-", "-"]
    assert [r["temperature"] for r in rows] == ["1.5000", "1.0000", "1.0000"]


def test_the_correlation_reads_each_member_where_it_is(rich: Run, other: Run) -> None:
    ctx = ReportContext(rich.store)
    columns = [true_prob(ctx.store, m.record) for m in ctx.members]
    expected = [_true(rich, "c0000"), _true(rich, "c0002"), _true(other, "c0001")]
    assert all(np.array_equal(a, b) for a, b in zip(columns, expected, strict=True))
    assert "of all members of the blend" in (correlation_section(ctx) or "")


def test_another_runs_member_does_not_mark_the_own_candidate(rich: Run) -> None:
    rows = table_of(leaderboard(ReportContext(rich.store)) or "", "in blend")
    assert {r["candidate"]: r["in blend"] for r in rows} == {
        "c0000": "0.500", "c0001": "", "c0002": "",
    }  # fmt: skip


def test_a_blend_whose_other_run_is_gone_is_still_shown(
    rich: Run, other: Run, tmp_path: Path
) -> None:
    shutil.copytree(rich.store.root, tmp_path / "copy")
    store = RunStore(tmp_path / "copy")
    text = store.files.read("ensemble/ensemble.json").decode()
    store.files.write("ensemble/ensemble.json", text.replace(other.store.root, "/nowhere").encode())
    html = store.files.read(write_report(store)).decode()
    last = table_of(html, "from")[-1]
    assert (last["backbone"], last["own OOF log loss"], last["from"]) == ("?", "-", "/nowhere")
    assert "This section cannot be shown: /nowhere" in html  # the correlation alone


def test_the_facts_are_in_words(rich: Run) -> None:
    found = dict(facts(_record(rich), 60))
    assert found == {
        "Members are combined by": "weighted mean of the probabilities",
        "Certificate": "no weights are better by more than 1.2e-01: none has an OOF log loss "
        "below 0.6250, before the temperature of the blend",
        "Temperature of the blend": "1.2500 (OOF log loss 0.7500 before it)",
        "Time per image, all fold models": "23.4 ms on NVIDIA <H200>",
        "Weight files, all fold models": "1.23 GB",
        "Same probabilities, only the first was considered": "c0000 raw = c0002 ema",
        "Near-duplicate images": found["Near-duplicate images"],
        "Unvalidated predictions in the submission": "public-kernel 0.2500",
    }
    assert "7 of 60 rows" in found["Near-duplicate images"]
    assert "0.9877 without" in found["Near-duplicate images"]


def test_many_duplicates_are_counted(rich: Run) -> None:
    groups = tuple((f"c{i:04d} raw", f"c{i:04d} ema") for i in range(9))
    found = dict(facts(_record(rich, duplicates=groups), 60))
    shown = found["Same probabilities, only the first was considered"]
    assert shown.startswith("c0000 raw = c0000 ema; ")
    assert shown.endswith("c0004 raw = c0004 ema; and 4 more groups")


def test_the_bound_is_that_of_the_mixture(rich: Run) -> None:
    assert bound(_record(rich)) == 0.625
    assert bound(_record(rich, certificate=None)) is None
    assert bound(_record(rich, mixture_logloss=None)) is None  # the temperature changed the loss
    older = _record(rich, mixture_logloss=None, blend_temperature=1.0, oof_logloss=0.5)
    assert bound(older) == 0.375


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ("arithmetic", "Weights sum to 1"),
        ("geometric", "need not sum to 1"),
        ("votes", "share of the votes"),
        ("stacking", "need not sum to 1"),
        ("my_plugin", "the pooling `my_plugin`"),
    ],
)
def test_each_pooling_says_what_its_weights_are(rich: Run, pooling: str, expected: str) -> None:
    assert expected in meaning_of_weights(_record(rich, pooling=pooling))


def test_a_blend_that_is_no_mixture_has_no_certificate(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    store.blend.update(_record(rich, pooling="geometric", certificate=None, mixture_logloss=None))
    html = blend_section(ReportContext(store)) or ""
    assert "none: it bounds weighted means of probabilities" in html
    assert "dotted line" not in html
    assert "no weights reach" not in summary(ReportContext(store))


def test_warnings_tell_what_the_figures_do_not_cover(rich: Run) -> None:
    found = "\n".join(warnings(ReportContext(rich.store)))
    assert "25.00 % of the submission comes from test predictions without OOF rows" in found
    assert "(public-kernel)" in found
    assert "7 scored rows resemble an image of another fold" in found
    assert "is 0.9877, not " in found


def test_near_duplicates_that_flatter_nothing_are_no_warning(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    store.blend.update(
        _record(rich, near_duplicates=NearDuplicates(rows=7, oof_logloss_without=0.1))
    )
    assert "resemble" not in "\n".join(warnings(ReportContext(store)))


def test_held_out_rows_are_in_the_summary(rich: Run) -> None:
    words = Page(summary(ReportContext(rich.store))).words
    assert "log loss 0.4321, accuracy 87.50 %" in words


def test_calibration_shows_what_was_tried_and_kept(rich: Run) -> None:
    ctx = ReportContext(rich.store)
    html = calibration_section(ctx) or ""
    rows = table_of(html, "temperature of")
    assert [(r["temperature of"], r["cross-fitted log loss"], r[""]) for r in rows] == [
        ("nothing", "0.9000", ""),
        ("the blend", "0.7000", "kept"),
        ("each member", "1.0000", ""),
        ("each member and the blend", "0.8000", ""),
    ]
    assert "0.0321 with those that were kept" in html
    assert list(ctx.charts) == ["reliability.png"]


def test_without_temperatures_there_is_one_reliability_diagram(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    tried = _record(rich).calibration
    assert tried is not None
    nothing = tried.model_copy(update={"blend": False, "after": tried.before})
    store.blend.update(_record(rich, calibration=nothing))
    html = calibration_section(ReportContext(store)) or ""
    assert [r["temperature of"] for r in table_of(html, "temperature of") if r[""]] == ["nothing"]
    assert "without any temperature and with" not in html


def test_the_path_names_who_was_picked(rich: Run) -> None:
    html = blend_section(ReportContext(rich.store)) or ""
    assert [r["picked"] for r in table_of(html, "picked")] == [
        "c0000 raw",
        "c0001 raw",
        "c0002 raw",
    ]
    assert "below the dotted line" in html


def test_every_chart_of_a_rich_blend_is_there(rich: Run) -> None:
    write_report(rich.store)
    names = {n for n in rich.store.files.names("report") if n.endswith(".png")}
    assert {
        "weights.png", "selection_path.png", "loss_against_time.png", "reliability.png",
        "correlation.png",
    } <= names  # fmt: skip


def test_an_ensemble_json_of_an_older_version_is_shown(make_run: MakeRun) -> None:
    store = make_run(rows=60, epochs=1, complete=2).store
    old = {
        "method", "oof_logloss", "crossfit_logloss", "crossfit_se", "certificate",
        "best_single_oof_logloss", "best_single", "oof_accuracy", "last_fold_logloss",
        "members_considered", "candidates_considered", "folds_hash",
    }  # fmt: skip
    record = json.loads(store.files.read("ensemble/ensemble.json"))
    kept = {name: value for name, value in record.items() if name in old}
    kept["members"] = [
        {key: m[key] for key in ("candidate", "variant", "weight")} for m in record["members"]
    ]
    store.files.write("ensemble/ensemble.json", json.dumps(kept).encode())
    html = store.files.read(write_report(store)).decode()
    assert "This section cannot be shown" not in html
    (first, *_) = table_of(html, "own OOF log loss")
    assert not {"from", "loss rise without it", "time per image", "weight files"} & first.keys()
    assert "no weights are better by more than 3.2e-04: none has an OOF log loss below" in html
    assert calibration_section(ReportContext(store)) is None


def test_a_blend_of_one_member_has_no_correlation(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    store.blend.update(_record(rich, members=_record(rich).members[1:2]))
    assert correlation_section(ReportContext(store)) is None


def _copy(run: Run, folder: Path) -> RunStore:
    shutil.copytree(run.store.root, folder / "copy")
    return RunStore(folder / "copy")


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


@pytest.mark.parametrize("members", [1, 2, 12, 40])
@pytest.mark.parametrize("gains", [None, 1e-8, 0.01, 30.0])
def test_weights_chart_is_never_cut(members: int, gains: float | None) -> None:
    _assert_uncut(blend_charts.weights(_bars(members, gains), looks(_BACKBONES)))


def test_gains_below_zero_are_never_cut() -> None:
    bars = [
        blend_charts.Bar(f"c{i:04d}", "timm/x", 0.5, gain) for i, gain in enumerate((-2.0, 0.0))
    ]
    _assert_uncut(blend_charts.weights(bars, looks(_BACKBONES)))


@pytest.mark.parametrize("members", [2, 12, 15, 30])
def test_correlation_chart_is_never_cut(members: int) -> None:
    matrix = np.corrcoef(np.random.default_rng(0).random((members, 50)))
    names = [short(_BACKBONES[i % 4], 28) for i in range(members)]
    ids = [f"c{i:04d} ema (실험_두번째_자동차)" for i in range(members)]
    _assert_uncut(charts.correlation(matrix, ids, names))


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
