"""The blend that would have been chosen had a fold's labels not existed: the teacher of that fold.

Takes a run's members and the config's settings, gives a `FoldBlend` for each fold. Members, method,
temperatures and weights come from the other folds' rows alone, so that nothing in it knows a label
of the fold; its fold models were trained without them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import RunFailure
from foldrace.core.metrics import LOG_LOSS, log_loss_of_true, normalise
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.core.temperature import at_temperature
from foldrace.ensemble.pool import Member, MemberRows, kept_rows
from foldrace.ensemble.pooling import ArithmeticMean, Combiner, pool_terms
from foldrace.ensemble.selection.eligible import Prices, without_excluded
from foldrace.ensemble.selection.matrix import open_matrix
from foldrace.ensemble.selection.members import OofSource, is_named
from foldrace.ensemble.selection.outcome import heaviest_first
from foldrace.ensemble.selection.select import Request, choose_blend
from foldrace.run_folder.records import TeacherKind
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.variants import EMA, RAW

_LEAST = 2
"""Rows that weights and temperatures can be fitted on."""


@dataclass(frozen=True, eq=False)
class FoldBlend:
    """How one fold's teacher combines its members' fold models."""

    fold: int
    model_fold: int
    """Fold of the models; another one than `fold` for a teacher that is optimistic."""
    members: tuple[Member, ...]
    combiner: Combiner
    temperatures: tuple[float, ...]
    blend_temperature: float
    method: str
    chosen_on: int
    """Scored rows that it was chosen by."""

    def log_prob(self, log_probs: Sequence[NDArray[np.floating]]) -> NDArray[np.float16]:
        """(n, C) of the members' uncalibrated log-probabilities (n, C), in their order."""
        tempered = (
            (i, at_temperature(log_prob, self.temperatures[i]))
            for i, log_prob in enumerate(log_probs)
        )
        pooled = np.log(normalise(pool_terms(self.combiner, tempered)))
        found = at_temperature(pooled, self.blend_temperature)
        return np.maximum(found, np.finfo(np.float16).min).astype(np.float16)


def fold_blends(
    store: RunStore,
    config: EnsembleConfig,
    sources: Sequence[OofSource],
    kind: TeacherKind,
    parts: Parts = NO_PARTS,
) -> Iterator[FoldBlend]:
    """The teacher of each fold of a run, of every repeat.

    Limits of time and size do not hold, since the teacher predicts once; the log loss decides, what
    ever metric the blend went by. With `folds: {k: 1}` no row is left to choose by: the members of
    all candidates then count alike. RunFailure without a member.
    """
    members = [source.member for source in sources]
    if not members:
        raise RunFailure(
            f"no member of {store.root} can teach: a teacher is made of complete candidates with "
            "their weights, no students, soups or predictions made elsewhere among them"
        )
    settings = _settings(config, members)
    kept = without_excluded(members, settings.exclude)
    rows = open_matrix(store, [sources[i] for i in kept], calibrate=config.calibrate)
    folds = range(store.fold_count)
    if kind == "best-fold":
        best = _best_fold(store, rows.members)
        yield from (_alone(rows, fold, best[0], best[1]) for fold in folds)
        return
    scored = store.scored_rows()
    for fold in folds:
        other = np.flatnonzero(store.folds().split_of(fold)[scored] != fold)
        if len(other) < _LEAST:
            yield _equal(rows.members, fold)
        elif kind == "best":
            yield _alone(kept_rows(rows, other), fold, None, fold)
        else:
            yield _blended(kept_rows(rows, other), fold, settings, parts)


def _settings(config: EnsembleConfig, members: Sequence[Member]) -> EnsembleConfig:
    """Without limits that a teacher need not keep, and names of what cannot teach."""
    known = {
        key: tuple(name for name in names if any(is_named(m, name) for m in members))
        for key, names in (("exclude", config.exclude), ("include", config.include))
    }
    free = {"metric": LOG_LOSS, "max_ms_per_image": None, "max_bytes": None}
    return config.model_copy(update=known | free)


def _blended(rows: MemberRows, fold: int, config: EnsembleConfig, parts: Parts) -> FoldBlend:
    blended, _ = choose_blend(rows, config, Request(lambda members: Prices({}, {}), parts=parts))
    order = heaviest_first(blended.fit)
    temperatures = rows.temperatures[0] if blended.choice.members else np.ones(len(rows.members))
    return FoldBlend(
        fold=fold,
        model_fold=fold,
        members=tuple(rows.members[i] for i in order),
        combiner=blended.fit.combiner.take(order),
        temperatures=tuple(temperatures[order].tolist()),
        blend_temperature=blended.temperature,
        method=blended.method,
        chosen_on=len(rows.labels),
    )


def _alone(rows: MemberRows, fold: int, member: Member | None, model_fold: int) -> FoldBlend:
    """One member at its temperature; None: the one with the least calibrated loss on the rows."""
    losses = [log_loss_of_true(column) for column in rows.calibrated[0]]
    place = int(np.argmin(losses)) if member is None else rows.members.index(member)
    return FoldBlend(
        fold=fold,
        model_fold=model_fold,
        members=(rows.members[place],),
        combiner=ArithmeticMean(np.ones(1)),
        temperatures=(float(rows.temperatures[0][place]),),
        blend_temperature=1.0,
        method="single",
        chosen_on=len(rows.labels),
    )


def _equal(members: Sequence[Member], fold: int) -> FoldBlend:
    """One variant of each candidate, all alike: no label had a say."""
    variants = {(m.run, m.candidate): m for m in members if m.variant == RAW}
    variants |= {(m.run, m.candidate): m for m in members if m.variant == EMA}
    chosen = tuple(variants[key] for key in sorted(variants))
    weights = np.full(len(chosen), 1 / len(chosen))
    ones = (1.0,) * len(chosen)
    return FoldBlend(fold, fold, chosen, ArithmeticMean(weights), ones, 1.0, "uniform", 0)


def _best_fold(store: RunStore, members: Sequence[Member]) -> tuple[Member, int]:
    """The fold model with the least calibrated loss on its own fold."""
    losses = {}
    for place, member in enumerate(members):
        if member.run:
            continue
        for fold in range(store.fold_count):
            trial = store.trial(member.candidate, fold)
            if trial is not None and member.variant in trial.variants:
                losses[place, fold] = trial.variants[member.variant].calibrated_logloss
    place, fold = min(losses, key=lambda key: (losses[key], key))
    return members[place], fold
