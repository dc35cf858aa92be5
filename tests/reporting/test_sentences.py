"""The sentences that terminal and report share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from foldrace.reporting.blend_lines import blend_lines
from foldrace.reporting.context import ReportContext
from foldrace.reporting.sections.calibration import calibration
from foldrace.reporting.sections.overview import warnings
from foldrace.reporting.sentences import (
    blending_may_gain_nothing,
    calibration_change,
    gain_of_other_weights,
    model_name,
    near_duplicates,
    unvalidated,
)
from foldrace.run_folder.blend_records import (
    Calibration,
    CalibrationTrial,
    EnsembleRecord,
    NearDuplicates,
    Reliability,
    UnvalidatedRecord,
)
from tests.reporting.pages import html_of


@pytest.fixture
def run(make_run: Callable[..., Any]) -> Any:
    return make_run(rows=60, epochs=1, complete=3, broken=False)


def _changed(run: Any, **update: object) -> EnsembleRecord:
    record: EnsembleRecord = run.store.blend.record().model_copy(update=update)
    run.store.blend.update(record)
    return record


def _calibration(ece_after: float) -> Calibration:
    tried = tuple(
        CalibrationTrial(members=m, blend=False, crossfit_logloss=1.086 - 0.0474 * m, crossfit_se=0)
        for m in (False, True)
    )
    before, after = (Reliability(ece=ece, bins=()) for ece in (0.0983, ece_after))
    return Calibration(members=True, blend=False, tried=tried, before=before, after=after)


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("c0007 ema", "c0007 (ema weights)"),
        ("c0007 raw of runs/my cars", "c0007 (raw weights) of runs/my cars"),
        ("kernel.v2 added", "kernel.v2 (made elsewhere)"),
        ("c0007", "c0007"),
    ],
)
def test_names_of_members_are_spelt_out(member: str, expected: str) -> None:
    assert model_name(member) == expected


def test_terminal_and_report_warn_with_the_same_sentences(run: Any) -> None:
    blend = _changed(
        run,
        crossfit_logloss=run.store.blend.record().single_crossfit_logloss + 0.1,
        near_duplicates=NearDuplicates(rows=7, oof_logloss_without=99.0),
        unvalidated=(UnvalidatedRecord(name="theirs", weight=0.25),),
    )
    report, terminal = warnings(ReportContext(run.store)), "\n".join(blend_lines(blend))
    for sentence in (blending_may_gain_nothing(blend), near_duplicates(blend), unvalidated(blend)):
        assert sentence is not None and sentence in report and sentence in terminal


def test_one_member_has_nothing_to_be_compared_with(run: Any) -> None:
    assert (
        blending_may_gain_nothing(_changed(run, members_considered=1, crossfit_logloss=9)) is None
    )


@pytest.mark.parametrize(("ece", "explained"), [(0.1739, True), (0.0321, False)])
def test_a_calibration_says_what_it_is_chosen_by(run: Any, ece: float, explained: bool) -> None:
    blend = _changed(run, calibration=_calibration(ece))
    sentence = calibration_change(blend)
    assert sentence is not None and sentence in list(blend_lines(blend))
    assert sentence.startswith(
        "Calibrated with one temperature per member: cross-fitted log loss 1.0860 -> 1.0386, "
        f"expected calibration error 0.0983 -> {ece:.4f}"
    )
    assert sentence.endswith("chosen by log loss") == explained
    assert sentence.partition(" -> ")[0] in html_of(calibration(ReportContext(run.store)))


@pytest.mark.parametrize(
    ("certificate", "expected"),
    [(0.0, "less than 0.0001"), (3.2e-4, "at most 0.0003"), (None, "gain unknown")],
)
def test_what_other_weights_could_gain(run: Any, certificate: float | None, expected: str) -> None:
    blend = _changed(run, certificate=certificate)
    assert expected in gain_of_other_weights(blend)
    assert any(gain_of_other_weights(blend) in line for line in blend_lines(blend))


def test_no_weights_gain_more_than_the_whole_loss(run: Any) -> None:
    """The certificate bounds by the worst row, and may be larger than the loss itself."""
    record = _changed(run, certificate=6.35, mixture_logloss=0.3148)
    assert gain_of_other_weights(record) == "could gain at most 0.3148"
    smaller = _changed(run, certificate=0.0018, mixture_logloss=0.3148)
    assert gain_of_other_weights(smaller) == "could gain at most 0.0018"
