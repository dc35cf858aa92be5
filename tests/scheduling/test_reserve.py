"""What of a time budget is kept for the end of a run."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foldrace.run_folder.records import CandidateRecord, CandidateSummary, TrialRecord, VariantScore
from foldrace.scheduling.budget import Deadline, Ending

_ENDING = Ending(rows=1000, classes=10, folds=5, test_images=2000, backbones=2)


def _trial(fold: int, seconds: float) -> TrialRecord:
    score = VariantScore(rows=200, val_logloss=0.5, val_acc=0.8, best_epoch=1)
    return TrialRecord(
        candidate="c0", fold=fold, status="finished", backbone="a", params={}, folds_hash="h",
        seed=0, seconds=seconds, epochs_trained=10, variants={"raw": score, "ema": score},
    )  # fmt: skip


def _complete(seconds: float) -> CandidateSummary:
    record = CandidateRecord(candidate="c0", backbone="a", params={})
    return CandidateSummary(record, "complete", tuple(_trial(k, seconds) for k in range(5)), 5)


def _after(candidates: int, budget: float = 1e6, ending: Ending = _ENDING) -> Deadline:
    deadline = Deadline(budget, 100.0, ending)
    for _ in range(candidates):
        summary = _complete(40.0)
        for trial in summary.trials:
            deadline.add(trial)
        deadline.settle(summary)
    return deadline


def test_before_anything_has_run_only_what_is_certain_is_kept() -> None:
    deadline = _after(0)
    assert deadline.reserved == pytest.approx(10 + 2 * 3 + 2000 * 0.005)
    assert deadline.seconds_left(150.0) == pytest.approx(1e6 - 50 - deadline.reserved)


def test_the_submission_is_models_times_images() -> None:
    """A fold trial passes its rows forward and back in 40 s / 10 epochs: 2 ms an image."""
    certain = _after(0).reserved
    blend = 1.5e-7 * 1000 * 10 * 2
    assert _after(1).reserved == pytest.approx(certain + blend + 2000 * 2 * 5 * 0.002)
    most = _after(30).reserved - 30 * blend
    assert most == pytest.approx(certain + 2000 * 12 * 5 * 0.002)


def test_limits_of_the_blend_bound_the_submission() -> None:
    certain, blend = _after(0).reserved, 30 * 1.5e-7 * 1000 * 10 * 2
    few = _after(30, ending=replace(_ENDING, max_members=3)).reserved
    assert few == pytest.approx(certain + blend + 2000 * 3 * 5 * 0.002)
    quick = _after(30, ending=replace(_ENDING, max_ms_per_image=8.0)).reserved
    assert quick == pytest.approx(certain + blend + 2000 * 0.008)


def test_at_most_a_third_of_the_budget() -> None:
    deadline = _after(30, budget=60.0)
    assert deadline.expected > 200
    assert deadline.reserved == 20.0
    assert deadline.seconds_left(100.0) == 40.0
    assert deadline.seconds_left(141.0) == -1.0
