"""What the report says of the blend: members from anywhere, gains, guarantee, calibration, cost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.core.consent import allow_run
from foldrace.core.metrics import MetricScore
from foldrace.ensemble.calibration import reliability
from foldrace.reporting.blend_lines import blend_lines
from foldrace.reporting.context import ReportContext
from foldrace.reporting.members import true_prob
from foldrace.reporting.report import write_report
from foldrace.reporting.sections.blend import blend as blend_section
from foldrace.reporting.sections.blend import bound, facts, meaning_of_weights
from foldrace.reporting.sections.calibration import calibration as calibration_section
from foldrace.reporting.sections.calibration import correlation as correlation_section
from foldrace.reporting.sections.candidates import leaderboard
from foldrace.reporting.sections.overview import summary, warnings
from foldrace.run_folder.blend_records import (
    BeatenBy,
    Calibration,
    CalibrationTrial,
    CurvePoint,
    DecisionRule,
    EnsembleRecord,
    HeldOutScore,
    MemberRecord,
    MethodTrial,
    MetricChoice,
    MetricTrial,
    NearDuplicates,
    UnvalidatedRecord,
)
from foldrace.run_folder.oof import npy
from foldrace.run_folder.store import RunStore
from tests.reporting.pages import Page, html_of, table_of

pytestmark = pytest.mark.usefixtures("quick_charts")
Run = Any  # the record that conftest.py makes
MakeRun = Callable[..., Run]


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
    allow_run(run.store.root, other.store.root)
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
        "held_out": HeldOutScore(
            rows=12, logloss=0.4321, accuracy=0.875,
            metrics=(MetricScore("macro_f1", 0.8123, True, 0.0456),),
            decided=MetricScore("macro_f1", 0.8501, True, 0.04),
        ),
    }  # fmt: skip


def _true(run: Run, candidate: str) -> NDArray[np.float32]:
    """(N,) of a complete candidate."""
    prob = run.prob[candidate]
    return np.asarray(prob[np.arange(len(prob)), run.labels], dtype=np.float32)


def _record(run: Run, **update: object) -> EnsembleRecord:
    record: EnsembleRecord = run.store.blend.record().model_copy(update=update)
    return record


def test_members_are_told_by_where_they_come_from(rich: Run, other: Run) -> None:
    rows = table_of(html_of(blend_section(ReportContext(rich.store))), "from")
    assert [(r["candidate"], r["variant"], r["backbone"], r["from"]) for r in rows] == [
        ("c0000", "raw", "torchvision/convnext_tiny", "this run"),
        ("kernel.v2", "", "made elsewhere", "added"),
        ("c0001", "ema", "timm/of_the_other_run", other.store.root),
    ]
    own = [_true(rich, "c0000"), _true(rich, "c0002"), _true(other, "c0001")]
    shown = [float(r["own OOF log loss, uncalibrated"]) for r in rows]
    assert shown == pytest.approx([-np.log(t.astype(float)).mean() for t in own], abs=6e-5)


def test_the_own_loss_is_what_was_blended_whatever_became_of_the_trial(
    rich: Run, other: Run, tmp_path: Path
) -> None:
    store = _copy(rich, tmp_path)
    members = tuple(
        m.model_copy(update={"oof_logloss": 0.25 * (i + 1), "gain": gain})
        for i, (m, gain) in enumerate(zip(_record(rich).members, (3e-10, 0.5, -2e-12), strict=True))
    )
    store.blend.update(_record(rich, members=members))
    rows = table_of(html_of(blend_section(ReportContext(store))), "run")
    assert list(rows[0])[:2] == ["candidate", "run"]
    assert [(r["candidate"], r["run"], r["own OOF log loss, uncalibrated"]) for r in rows] == [
        ("c0000", "this run", "0.5000"),
        ("kernel.v2", "added", "0.7500"),
        ("c0001", Path(other.store.root).name, "0.2500"),
    ]
    assert [r["loss rise without it"] for r in rows] == ["+0.5000", "0", "0"]


def test_the_methods_that_auto_tried(rich: Run, tmp_path: Path) -> None:
    assert "Methods that were tried" not in html_of(blend_section(ReportContext(rich.store)))
    store = _copy(rich, tmp_path)
    tried = [
        MethodTrial(method=name, crossfit_logloss=loss, crossfit_se=0.01)
        for name, loss in (("greedy", 0.5), ("geometric", 0.6))
    ]
    store.blend.update(_record(rich, methods_tried=tuple(tried)))
    rows = table_of(html_of(blend_section(ReportContext(store))), "method")
    assert [tuple(row.values()) for row in rows] == [
        ("greedy", "0.5000", "0.0100", "chosen"),
        ("geometric", "0.6000", "0.0100", ""),
    ]


def test_the_warning_compares_what_is_cross_fitted(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    losses = {"best_single_oof_logloss": 0.8, "single_crossfit_logloss": 0.7}
    store.blend.update(_record(rich, crossfit_logloss=0.75, **losses))
    found = "\n".join(warnings(ReportContext(store)))
    assert "log loss of the blend, 0.7500, is not below that of the best single model" in found
    assert "best single model, 0.7000:" in found


def test_members_table_shows_gain_time_and_size(rich: Run) -> None:
    rows = table_of(html_of(blend_section(ReportContext(rich.store))), "loss rise without it")
    assert [r["loss rise without it"] for r in rows] == ["+0.0123", "-2.0e-06", "-"]
    assert [r["time per image"] for r in rows] == ["12.3 ms", "-", "-"]
    assert [r["weight files"] for r in rows] == ["345 MB", "-", "-"]
    assert [r["temperature"] for r in rows] == ["1.5000", "1.0000", "1.0000"]


def test_the_correlation_reads_each_member_where_it_is(rich: Run, other: Run) -> None:
    ctx = ReportContext(rich.store)
    columns = [true_prob(ctx.store, m.record) for m in ctx.members]
    expected = [_true(rich, "c0000"), _true(rich, "c0002"), _true(other, "c0001")]
    assert all(np.array_equal(a, b) for a, b in zip(columns, expected, strict=True))
    assert "of all members of the blend" in html_of(correlation_section(ctx))


def test_an_added_member_of_other_rows_costs_its_section_only(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    store.files.write("ensemble/added/kernel.v2/true_prob.npy", npy(np.full(7, 0.5, np.float32)))
    html = store.files.read(write_report(store)).decode()
    assert "kernel.v2 added: has probabilities of shape (7,), should have (60,)" in html
    assert [r["own OOF log loss, uncalibrated"] for r in table_of(html, "from")][1] == "-"


def test_another_runs_member_does_not_mark_the_own_candidate(rich: Run) -> None:
    rows = table_of(html_of(leaderboard(ReportContext(rich.store))), "in blend")
    assert {r["candidate"]: r["in blend"] for r in rows} == {
        "c0000": "0.500", "c0001": "", "c0002": "",
    }  # fmt: skip


def test_a_blend_whose_other_run_is_gone_is_still_shown(
    rich: Run, other: Run, tmp_path: Path
) -> None:
    store = _copy(rich, tmp_path)
    allow_run(store.root, "/nowhere")
    text = store.files.read("ensemble/ensemble.json").decode()
    store.files.write("ensemble/ensemble.json", text.replace(other.store.root, "/nowhere").encode())
    html = store.files.read(write_report(store)).decode()
    last = table_of(html, "from")[-1]
    assert (last["backbone"], last["own OOF log loss, uncalibrated"], last["from"]) == (
        "?",
        "-",
        "/nowhere",
    )
    assert "This section cannot be shown: /nowhere" in html  # the correlation alone


def test_the_facts_are_in_words(rich: Run) -> None:
    found = dict(facts(_record(rich), 60))
    assert found == {
        "Members are combined by": "weighted mean of the probabilities",
        "Certificate": "other weights of the members considered could gain at most 0.1250: "
        "none has an OOF log loss below 0.6250, before the temperature of the blend",
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
    assert shown.endswith("c0004 raw = c0004 ema; and 4 more")


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
    html = html_of(blend_section(ReportContext(store)))
    assert "gain unknown: only for weighted means of probabilities" in html
    assert "dotted line" not in html
    assert "no weights reach" not in html_of(summary(ReportContext(store)))


def test_warnings_tell_what_the_figures_do_not_cover(rich: Run) -> None:
    found = "\n".join(warnings(ReportContext(rich.store)))
    assert "public-kernel has no OOF predictions: no score says how good that 25.00 %" in found
    assert "7 scored rows resemble an image of another fold" in found
    assert "is 0.9877, not " in found


def test_near_duplicates_that_flatter_nothing_are_no_warning(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    store.blend.update(
        _record(rich, near_duplicates=NearDuplicates(rows=7, oof_logloss_without=0.1))
    )
    assert "resemble" not in "\n".join(warnings(ReportContext(store)))


def test_held_out_rows_are_in_the_summary(rich: Run) -> None:
    words = Page(html_of(summary(ReportContext(rich.store)))).words
    assert (
        "log loss 0.4321, accuracy 0.8750, macro_f1 0.8123 ± 0.0456, macro_f1 by the decision rule "
        "0.8501 ± 0.0400"
    ) in words


CHOICE = MetricChoice(
    metric="macro_f1", greater_is_better=True, value=0.8321, se=0.0123,
    tried=(
        MetricTrial(
            method="greedy", members=True, value=0.7654, se=0.0151, behind=0.05, behind_se=0.011
        ),
        MetricTrial(
            method="single", members=False, value=0.8154, se=0.0141, behind=0.0, behind_se=0.0
        ),
    ),
    kept=1, rule=DecisionRule(log_weights=(0.0, 1.0, -1.0)), rule_gain=0.0167, rule_gain_se=0.004,
)  # fmt: skip


def test_the_users_own_metric_is_told_with_what_it_chose_from(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    own = MetricScore("macro_f1", 0.7755, True, 0.0202)
    store.blend.update(_record(rich, choice=CHOICE, metrics=(own,)))
    words = Page(html_of(summary(ReportContext(store)))).words
    assert words[words.index("Blend, macro_f1") + 1] == "0.7755 ± 0.0202 (greater is better)"
    mine = words.index("Blend, macro_f1, cross-fitted with the decision rule")
    assert words[mine + 1] == "0.8321 ± 0.0123 (greater is better)"
    html = html_of(blend_section(ReportContext(store)))
    rows = table_of(html, "cross-fitted macro_f1")
    assert [(r["method"], r["cross-fitted macro_f1"], r[""]) for r in rows] == [
        ("greedy", "0.7654", ""),
        ("single", "0.8154", "kept"),
    ]
    said = " ".join(Page(html).words)
    assert "The method with the lowest cross-fitted loss was chosen" not in said
    assert "one model alone, cross-fitted 0.8154 ± 0.0141, against 0.7654 ± 0.0151" in said
    assert "decision rule (class weights), cross-fitted macro_f1 0.8321 ± 0.0123" in said


def test_a_member_that_beats_the_blend_is_a_warning(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    lost = BeatenBy(metric="accuracy", member="c0001 ema", value=0.45, blend_value=0.35, se=0.031)
    store.blend.update(_record(rich, beaten=(lost,)))
    [text] = [line for line in warnings(ReportContext(store)) if "accuracy" in line]
    assert text == (
        "By accuracy the blend, 0.3500, is worse than c0001 (ema weights) alone, 0.4500 "
        "(difference 0.1000 ± 0.0310); if accuracy is your metric, set `ensemble.metric: accuracy`."
    )
    assert f"warning {text}" in [*blend_lines(_record(rich, beaten=(lost,)))]


def test_calibration_shows_what_was_tried_and_kept(rich: Run) -> None:
    ctx = ReportContext(rich.store)
    html = html_of(calibration_section(ctx))
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
    html = html_of(calibration_section(ReportContext(store)))
    assert [r["temperature of"] for r in table_of(html, "temperature of") if r[""]] == ["nothing"]
    assert "without any temperature and with" not in html


def test_the_path_names_who_was_picked(rich: Run) -> None:
    html = html_of(blend_section(ReportContext(rich.store)))
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
        "best_single_oof_logloss", "best_single", "oof_accuracy", "single_crossfit_logloss",
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
    (first, *_) = table_of(html, "own OOF log loss, uncalibrated")
    assert not {"from", "loss rise without it", "time per image", "weight files"} & first.keys()
    assert "could gain at most 0.0003: none has an OOF log loss below" in html
    assert calibration_section(ReportContext(store)) == []


def test_a_blend_of_one_member_has_no_correlation(rich: Run, tmp_path: Path) -> None:
    store = _copy(rich, tmp_path)
    store.blend.update(_record(rich, members=_record(rich).members[1:2]))
    assert correlation_section(ReportContext(store)) == []


def _copy(run: Run, folder: Path) -> RunStore:
    shutil.copytree(run.store.root, folder / "copy")
    return RunStore(folder / "copy")
