"""What Optuna is asked and told."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from experiment.config import DataConfig, RangeConfig, SearchConfig, SweepConfig
from experiment.records import CandidateRecord, CandidateSummary, TrialRecord, VariantScore
from scheduling.study import CandidateStudy
from search_spaces.sampling import build_space

BACKBONES = ("timm/test_resnet", "timm/test_vit")


def make(**search: object) -> CandidateStudy:
    config = sweep(**search)
    space, problems = build_space(config, "")
    assert not problems
    return CandidateStudy(space, config.search, 10)


def sweep(**search: object) -> SweepConfig:
    section = SearchConfig(backbones=BACKBONES, **search)  # type: ignore[arg-type]
    return SweepConfig(name="s", data=DataConfig(train="t"), search=section)


def settled(record: CandidateRecord, status: str, losses: tuple[float, ...]) -> CandidateSummary:
    trials = tuple(
        TrialRecord(
            candidate=record.candidate,
            fold=fold,
            status="finished",
            backbone=record.backbone,
            params=record.params,
            folds_hash="h",
            seed=0,
            variants={"raw": VariantScore(rows=rows, val_logloss=x, val_acc=0.5, best_epoch=0)},
        )
        for fold, (x, rows) in enumerate(zip(losses, (10, 30), strict=False))
    )
    return CandidateSummary(record, status, trials, 2)  # type: ignore[arg-type]


def test_the_first_candidate_of_each_backbone_is_its_default() -> None:
    study = make()
    space, _ = build_space(sweep(), "")
    for number, backbone in enumerate(BACKBONES):
        record = study.ask(number)
        assert record.backbone == backbone
        assert record.params == space.default(backbone).as_dict()
    assert study.ask(2).params != space.default(study.ask(3).backbone).as_dict()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_same_number_gets_the_same_suggestion(sampler: str) -> None:
    first, second = make(sampler=sampler), make(sampler=sampler)
    for number in range(5):
        one = first.ask(number)
        assert one == second.ask(number)
        first.tell(settled(one, "complete", (0.5, 0.6)))
        second.tell(settled(one, "complete", (0.5, 0.6)))


def test_replayed_candidates_leave_the_sampler_where_it_was() -> None:
    """A resumed sweep suggests what the undisturbed one would have."""
    whole = make()
    told = []
    for number in range(12):
        record = whole.ask(number)
        summary = settled(record, "complete", (0.1 * number, 0.2))
        whole.tell(summary)
        told.append(summary)
    resumed = make()
    for summary in told:
        resumed.replay(summary)
    assert resumed.ask(12) == whole.ask(12)


def test_an_unfinished_candidate_goes_on_as_running() -> None:
    study = make()
    record = study.ask(0)
    resumed = make()
    resumed.replay(settled(record, "running", (0.4,)))
    assert resumed.running == 1
    resumed.tell(settled(record, "complete", (0.4, 0.8)))
    assert resumed.running == 0


