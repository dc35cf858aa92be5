"""Searches and candidates' ends, made up for the tests of the study."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from optuna.trial import TrialState

from foldrace.config.hyperparameters import KNOBS
from foldrace.config.schema import DataConfig, SearchConfig, SweepConfig
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceAction,
    RaceDecision,
    TrialRecord,
    VariantScore,
)
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.search.study import CandidateStudy
from foldrace.search_spaces.space import SearchSpace, build_space

BACKBONES = ("timm/test_resnet", "timm/test_byobnet")
FEW: dict[str, Any] = {
    name: knob.default for name, knob in KNOBS.items() if knob.searched_by_default and name != "lr"
}
"""Fixes what a config without a space would search, but for the learning rate."""


def sweep(**search: object) -> SweepConfig:
    """Keys of the search section, as in a config file; `lr` has a range of its own."""
    given: Any = {"backbones": BACKBONES, **search}
    given["space"] = {"lr": {"low": 1e-4, "high": 5e-3, "log": True}} | given.get("space", {})
    section = SearchConfig.model_validate_json(json.dumps(given))
    return SweepConfig(name="s", data=DataConfig(train="t"), search=section)


def space_of(config: SweepConfig) -> SearchSpace:
    space, problems = build_space(config, "")
    assert not problems
    return space


def running(study: CandidateStudy) -> int:
    """How many candidates the sampler takes for running."""
    own = study._history._own.values()
    return sum(lesson.state == TrialState.RUNNING for lesson in own)


def tell(listener: SweepListener, summary: CandidateSummary) -> None:
    """The events of a started candidate, as a resumed sweep sends them."""
    for record in summary.trials:
        listener.trial_ended(record, summary)
    for judged in summary.decisions:
        listener.decided(judged, summary)
    if summary.settled:
        listener.settled(summary)


def decision(
    record: CandidateRecord,
    fold: int,
    epoch: int | None = None,
    action: RaceAction = "continue",
    score: float | None = None,
    gain: float | None = None,
) -> RaceDecision:
    return RaceDecision(
        number=fold, candidate=record.candidate, fold=fold, epoch=epoch, rule="gain", action=action,
        folds_done=fold + (epoch is None), rows=10, gain=gain, score=score, complete=5,
        epochs_trained=9, reason="",
    )  # fmt: skip


def ended(
    record: CandidateRecord,
    status: str,
    losses: Sequence[float] = (),
    folds: int = 2,
    decisions: Sequence[RaceDecision] = (),
    seconds: float = 1.0,
    began: float = 0.0,
) -> CandidateSummary:
    """Fold k has 10 · 3^k rows and the loss `losses[k]`, and one after the other trains from the
    Unix time `began` on, where one is given."""
    trials = tuple(
        TrialRecord(
            candidate=record.candidate,
            fold=fold,
            status="finished",
            backbone=record.backbone,
            params=record.params,
            folds_hash="h",
            seed=0,
            seconds=seconds,
            started_at=began and began + fold * seconds,
            ended_at=began and began + (fold + 1) * seconds,
            variants={
                "raw": VariantScore(
                    rows=10 * 3**fold,
                    val_logloss=x,
                    calibrated_logloss=x,
                    val_acc=0.5,
                    epoch=0,
                )
            },
        )
        for fold, x in enumerate(losses)
    )
    return CandidateSummary(record, status, trials, folds, tuple(decisions))  # type: ignore[arg-type]
