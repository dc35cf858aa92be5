"""A candidate's hyperparameters and seeds by its run folder, and the maker of its trials' records.

Takes the run folder, the candidate, the fold and how it ended, gives the `TrialRecord`.
"""

from __future__ import annotations

from collections.abc import Mapping

from foldrace.config.hyperparameters import TrialParams, fold_trial_seed
from foldrace.run_folder.belonging import trained_settings
from foldrace.run_folder.records import CandidateRecord, TrialRecord, TrialStatus, VariantScore
from foldrace.run_folder.store import RunStore


def candidate_params(store: RunStore, candidate: CandidateRecord) -> TrialParams:
    """The hyperparameters that a candidate trains with.

    A candidate of an earlier version lacks newer ones: it has those that the config fixes.
    """
    return TrialParams.from_dict(store.config().fixed | candidate.params)


def candidate_seed(store: RunStore, candidate: CandidateRecord, fold: int) -> int:
    """The random seed of one of a candidate's fold trials: see `fold_trial_seed`."""
    params = candidate_params(store, candidate)
    return fold_trial_seed(store.config().search.seed, candidate.backbone, params, fold)


def trial_record(
    store: RunStore,
    candidate: CandidateRecord,
    fold: int,
    status: TrialStatus,
    *,
    variants: Mapping[str, VariantScore] | None = None,
    epochs_trained: int = 0,
    seconds: float = 0.0,
    started_at: float = 0.0,
    ended_at: float = 0.0,
    node: str = "",
    device: str = "",
    accelerators: tuple[str, ...] = (),
    devices: float | None = None,
    micro_batch: int = 0,
    error: str | None = None,
    notes: tuple[str, ...] = (),
    attempt: str = "",
) -> TrialRecord:
    """The record of a fold trial, with the folds, settings and the seed that it trained with.

    Times are seconds, `started_at` (of the first attempt) and `ended_at` since 1970.
    """
    return TrialRecord(
        candidate=candidate.candidate,
        fold=fold,
        status=status,
        backbone=candidate.backbone,
        params=candidate.params,
        teacher=candidate.teacher,
        folds_hash=store.folds().hash,
        seed=candidate_seed(store, candidate, fold),
        variants=dict(variants or {}),
        epochs_trained=epochs_trained,
        seconds=seconds,
        started_at=started_at,
        ended_at=ended_at,
        node=node,
        device=device,
        accelerators=accelerators,
        devices=devices,
        micro_batch=micro_batch,
        error=error,
        notes=notes,
        settings=trained_settings(store.config()),
        attempt=attempt,
    )
