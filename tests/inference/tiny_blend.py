"""A blend of untrained models that are not indifferent."""

from __future__ import annotations

import torch

from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.predict import pack_weights

K = 2
MEMBERS = {
    "c0000": ("timm/test_resnet", 32),
    "c0001": ("timm/test_resnet", 32),
    "c0002": ("timm/test_efficientnet", 48),
}
"""Candidate -> backbone and image size."""
WEIGHTS = (0.5, 0.3, 0.2)


def with_blend(store: RunStore) -> RunStore:
    """The run of K folds, three classes, with the members' weights and their blend."""
    for number, (name, (backbone, size)) in enumerate(MEMBERS.items()):
        store.save_candidate(CandidateRecord(candidate=name, backbone=backbone, params={}))
        for fold in range(K):
            torch.manual_seed(10 * number + fold)
            config = ModelConfig(backbone, 3, size)
            model = build_classifier(config)
            for parameter in model.head.parameters():  # a fresh head is nearly indifferent
                parameter.data.mul_(4)
            store.save_trial(
                TrialRecord(
                    candidate=name, fold=fold, status="finished", backbone=backbone,
                    params={"image_size": size}, folds_hash=store.folds().hash, seed=0,
                ),
                weights={"raw": pack_weights(model.state_dict(), config)},
            )  # fmt: skip
    members = zip(MEMBERS, WEIGHTS, strict=True)
    store.blend.update(
        EnsembleRecord(
            method="greedy",
            members=tuple(MemberRecord(candidate=c, variant="raw", weight=w) for c, w in members),
            oof_logloss=1, crossfit_logloss=1, crossfit_se=0, certificate=0,
            best_single_oof_logloss=1, best_single="c0000 raw", oof_accuracy=0.5,
            single_crossfit_logloss=1, members_considered=3, candidates_considered=3,
            folds_hash=store.folds().hash,
        )
    )  # fmt: skip
    return store
