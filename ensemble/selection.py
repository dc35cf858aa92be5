"""The blend of a run: from the store's complete candidates to `ensemble.json`.

Takes a run folder, gives the `EnsembleRecord` that it wrote. The methods themselves see only
arrays.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ensemble.blend import Blend
from ensemble.crossfit import crossfit
from ensemble.methods import blend as run_method
from experiment.config import EnsembleConfig
from experiment.errors import RunFailure, RunFolderError
from experiment.metrics import accuracy, all_metrics, log_loss_of_true, normalise
from experiment.records import CandidateSummary, EnsembleRecord, MemberRecord
from experiment.store import RunStore, suffix


@dataclass(frozen=True, order=True)
class Candidacy:
    """A variant of a complete candidate: what a blend may choose."""

    candidate: str
    variant: str


def blend_run(store: RunStore, config: EnsembleConfig) -> EnsembleRecord:
    """Choose, certify, cross-fit and write the blend, among members whose weights are there: it is
    to predict. Raises RunFailure where no candidate is complete."""
    summaries = store.summaries()
    complete = [s for s in summaries if s.status == "complete"]
    scored = _candidacies(complete)
    members = [m for m in scored if store.has_weights(m.candidate, m.variant)]
    if not members:
        raise _nothing_to_blend(store, summaries, without_weights=len(scored))
    true_prob = np.stack([_true_prob(store, member) for member in members])
    folds = store.folds().fold[store.scored_rows()]
    method = partial(
        run_method, config.method, max_rounds=config.max_rounds, max_members=config.max_members
    )
    chosen = method(true_prob)
    fitted = crossfit(true_prob, folds, method)
    losses = [log_loss_of_true(row) for row in true_prob]
    best = int(np.argmin(losses))
    oof = _blend_oof(store, members, chosen.weights)
    labels = store.labels()[store.scored_rows()]
    on_last = folds == folds.max()
    record = EnsembleRecord(
        method=config.method,
        members=tuple(_records(members, chosen.weights)),
        oof_logloss=chosen.loss,
        crossfit_logloss=fitted.loss,
        crossfit_se=fitted.se,
        certificate=chosen.certificate,
        best_single_oof_logloss=losses[best],
        best_single=f"{members[best].candidate} {members[best].variant}",
        oof_accuracy=float(accuracy(oof, labels)),
        metrics=all_metrics(oof, labels),
        last_fold_logloss=log_loss_of_true(chosen.weights @ true_prob[:, on_last]),
        members_considered=len(members),
        candidates_considered=len(complete),
        members_without_weights=len(scored) - len(members),
        folds_hash=store.folds().hash,
    )
    store.blend.save(record, _trajectory(members, chosen), _half_logs(oof))
    return record


def remove_unused_weights(store: RunStore, blend: EnsembleRecord) -> int:
    """`keep: blend`: remove the weights of complete candidates that are not in the blend; how many
    members lost theirs. Other candidates may still become complete, and need theirs then."""
    complete = [s for s in store.summaries() if s.status == "complete"]
    used = {Candidacy(member.candidate, member.variant) for member in blend.members}
    every = {Candidacy(t.candidate, v) for s in complete for t in s.trials for v in t.variants}
    unused = sorted(every - used)  # also variants that not all folds have
    there = [m for m in unused if store.has_weights(m.candidate, m.variant)]
    for member in unused:
        store.remove_weights(member.candidate, member.variant)
    return len(there)


def _candidacies(complete: Sequence[CandidateSummary]) -> list[Candidacy]:
    return [Candidacy(s.candidate.candidate, v) for s in complete for v in s.variants]


def _nothing_to_blend(
    store: RunStore, summaries: Sequence[CandidateSummary], without_weights: int
) -> RunFailure:
    counts = ", ".join(f"{s.candidate.candidate} {s.status}" for s in summaries) or "none"
    if without_weights:
        return RunFailure(
            f"no member to blend: the weights of all {without_weights} are gone from "
            f"{store.root}/trials; delete a candidate's fold folders there and `resume "
            f"{store.root}` to train it anew"
        )
    return RunFailure(
        f"no complete candidate to blend (candidates: {counts}); see logs/error.log, then "
        f"`resume {store.root}`, with --retry-failed where trials failed"
    )


def _true_prob(store: RunStore, member: Candidacy) -> NDArray[np.float32]:
    """(N,) of a member; RunFolderError where the file holds anything but probabilities."""
    column = store.true_prob(member.candidate, member.variant)
    if not bool(((column >= 0) & (column <= 1)).all()):
        raise RunFolderError.single(
            f"{store.root}/trials/{member.candidate}/*/true_prob{suffix(member.variant)}.npy",
            "holds values that are no probabilities; delete the candidate's folder and resume",
        )
    return column


def _records(members: Sequence[Candidacy], weights: NDArray[np.float64]) -> list[MemberRecord]:
    """Members with weight, the heaviest first."""
    order = np.argsort(-weights, kind="stable")
    return [
        MemberRecord(
            candidate=members[i].candidate, variant=members[i].variant, weight=float(weights[i])
        )
        for i in order
        if weights[i] > 0
    ]


def _blend_oof(
    store: RunStore, members: Sequence[Candidacy], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(N, C) probabilities of the blend, one member in memory at a time."""
    total: NDArray[np.float64] = np.zeros((len(store.scored_rows()), len(store.classes())))
    for member, weight in zip(members, weights, strict=True):
        if weight > 0:
            total += weight * normalise(store.oof(member.candidate, member.variant))
    return total


def _half_logs(prob: NDArray[np.float64]) -> NDArray[np.float16]:
    return np.log(normalise(prob)).astype(np.float16)


def _trajectory(members: Sequence[Candidacy], chosen: Blend) -> str:
    """The text of trajectory.csv: who came in at each round, and the loss after it; the rounds
    after the best prefix have a loss alone."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["round", "candidate", "variant", "oof_logloss"])
    for i, loss in enumerate(chosen.path_losses):
        picked = members[chosen.path[i]] if i < len(chosen.path) else Candidacy("", "")
        writer.writerow([i + 1, picked.candidate, picked.variant, f"{loss:.9g}"])
    return buffer.getvalue()
