"""A part of the blend: only its strongest members, or those that are named, scored by their OOF.

Takes the blend's record, gives one of fewer members whose weights are renormalised. It is not the
blend that was selected and cross-fitted: its score is that of the stored OOF rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, UserError, listing
from foldrace.core.metrics import row_losses, true_class_probability
from foldrace.core.synonyms import did_you_mean
from foldrace.core.temperature import at_temperature
from foldrace.ensemble.pool import Member
from foldrace.ensemble.pooling import POOLINGS, Combiner, pool_terms
from foldrace.ensemble.selection.external import added_oof
from foldrace.ensemble.selection.members import is_named, member_name
from foldrace.ensemble.uncertainty import standard_error
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.store import RunStore

_WEIGHTED = ("arithmetic", "geometric", "votes")
_OPTION = "--members"


def only_members(store: RunStore, ensemble: EnsembleRecord, asked: str) -> EnsembleRecord:
    """The record of these members alone: a number of the strongest, or names with commas.

    UserError, with every problem, where a name is of no member that counts, or where the blend's
    members have more than a weight.
    """
    if ensemble.pooling not in _WEIGHTED:
        raise UserError.single(
            _OPTION,
            f"the blend combines its members by {ensemble.pooling}, which has no meaning without "
            "some of them; blend again: `ensemble --max-members N`",
        )
    counting = [m for m in ensemble.members if m.weight > 0]
    kept = _strongest(counting, int(asked)) if asked.isdecimal() else _named(counting, asked)
    total = sum(member.weight for member in counting)
    scale = total / sum(member.weight for member in kept)
    members = tuple(m.model_copy(update={"weight": m.weight * scale, "gain": None}) for m in kept)
    part = ensemble.model_copy(
        update={"members": members, "certificate": None, "choice": None, "metrics": ()}
        | {"unvalidated": (), "mixture_logloss": None}
    )
    losses = row_losses(true_class_probability(_oof(store, part), _labels(store)))
    groups = store.folds().group_numbers
    scored = None if groups is None else groups[store.scored_rows()]
    loss, se = float(losses.mean()), standard_error(losses, scored)
    return part.model_copy(
        update={"oof_logloss": loss, "crossfit_logloss": loss, "crossfit_se": se}
    )


def part_note(whole: EnsembleRecord, part: EnsembleRecord) -> str:
    """What is to be known of a submission by a part of the blend."""
    count = sum(member.weight > 0 for member in whole.members)
    names = listing(map(_name, part.members))
    rule = "; labels are the most probable classes, by no decision rule" if whole.rule else ""
    return (
        f"{len(part.members)} of the blend's {count} members ({names}): not the blend that was "
        f"cross-fitted ({whole.crossfit_logloss:.4f}); the log loss of one fold's models is that "
        f"of the OOF rows, to which the weights were fitted{rule}"
    )


def _strongest(members: Sequence[MemberRecord], count: int) -> list[MemberRecord]:
    """The heaviest, in the blend's order; of equal ones the first."""
    if not 1 <= count <= len(members):
        raise UserError.single(_OPTION, f"got {count}; allowed: 1 to {len(members)}, or names")
    order = sorted(range(len(members)), key=lambda i: -members[i].weight)
    return [members[i] for i in sorted(order[:count])]


def _named(members: Sequence[MemberRecord], asked: str) -> list[MemberRecord]:
    names = [name.strip() for name in asked.split(",")]
    problems = [
        Problem(
            _OPTION,
            f"got {name!r}; {did_you_mean(name, map(_name, members))}allowed: a number, or of "
            f"{listing(map(_name, members))}",
        )
        for name in names
        if not any(is_named(_member(member), name) for member in members)
    ]
    if problems:
        raise UserError(problems)
    return [m for m in members if any(is_named(_member(m), name) for name in names)]


def _oof(store: RunStore, ensemble: EnsembleRecord) -> NDArray[np.float64]:
    """(N, C) the blend's probabilities of the scored rows, by what its members have stored."""
    weights = np.array([member.weight for member in ensemble.members])
    arrays = store.blend.combiner_arrays(ensemble)
    combiner: Combiner = POOLINGS[ensemble.pooling](weights, arrays)
    pooled = pool_terms(combiner, _terms(store, ensemble))
    return np.exp(at_temperature(np.log(np.maximum(pooled, 1e-300)), ensemble.blend_temperature))


def _terms(store: RunStore, ensemble: EnsembleRecord) -> Iterator[tuple[int, NDArray[np.floating]]]:
    for number, member in enumerate(ensemble.members):
        if member.added:
            log_prob = added_oof(store, member.candidate)
        else:
            run = member_run(store, member.run) if member.run else store
            log_prob = run.oof_log_prob(member.candidate, member.variant)
        yield number, at_temperature(log_prob, member.temperature)


def _labels(store: RunStore) -> NDArray[np.int64]:
    return store.labels()[store.scored_rows()]


def _member(record: MemberRecord) -> Member:
    return Member(record.candidate, record.variant, run=record.run)


def _name(record: MemberRecord) -> str:
    return member_name(_member(record))
