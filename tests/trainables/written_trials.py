"""Fold trials whose run folder says what they train: a candidate, and the config's own sections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from foldrace.config.hyperparameters import TrialParams
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.spec import FoldTrial, TrialSpec, read_trial


def written_trial(
    run: Any,
    candidate: str,
    backbone: str,
    params: dict[str, Any],
    *,
    fold: int = 0,
    seed: int = 0,
    transforms: tuple[Any, ...] = (),
    meta_features: tuple[str, ...] = (),
    **spec: Any,
) -> TrialSpec:
    """Write what the trial reads; what is no hyperparameter holds for all later trials too."""
    config = run.store.config()
    search = config.search.model_copy(update={"seed": seed})
    augment = config.augment.model_copy(update={"transforms": transforms})
    training = config.training.model_copy(update={"meta_features": meta_features})
    sections = {"search": search, "augment": augment, "training": training}
    run.store.save_config(config.model_copy(update=sections))
    known = TrialParams.from_dict({k: 0 if v is None else v for k, v in params.items()})
    write_candidate(run.store, candidate, backbone, known)
    return TrialSpec(
        run=run.store.root, image_root=str(run.images), candidate=candidate, fold=fold, **spec
    )


def write_candidate(store: RunStore, name: str, backbone: str, params: TrialParams) -> None:
    record = CandidateRecord(candidate=name, backbone=backbone, params=params.as_dict())
    store.save_candidate(record)


def read(spec: TrialSpec) -> FoldTrial:
    """The trial as it is trained."""
    return read_trial(spec, RunStore.open(spec.run))


def another(
    spec: TrialSpec, candidate: str, backbone: str | None = None, **params: Any
) -> TrialSpec:
    """A further candidate, alike but for what is given."""
    trial = read(spec)
    changed = replace(trial.params, **params)
    store = RunStore.open(spec.run)
    write_candidate(store, candidate, backbone or trial.candidate.backbone, changed)
    return replace(spec, candidate=candidate)
