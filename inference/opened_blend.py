"""A run's blend, ready to combine what its fold models say.

Takes a run folder and the record of a blend, gives probabilities (n, C) from a function that has
each fold model's log-probabilities: per fold the members at their temperatures, combined; then the
geometric mean over the folds, at the blend's temperature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError, listing
from foldrace.core.metrics import normalise
from foldrace.core.temperature import at_temperature
from foldrace.ensemble.decisions import decide
from foldrace.ensemble.fold_mean import FoldMean, fold_mean
from foldrace.ensemble.pool import Member
from foldrace.ensemble.pooling import POOLINGS, Combiner, pool_terms
from foldrace.ensemble.selection.members import member_name
from foldrace.inference.engine.fold_models import Take
from foldrace.inference.engine.passes import FoldKey
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.oof import mean_log_prob
from foldrace.run_folder.store import RunStore

OfAdded = Callable[[MemberRecord], NDArray[np.floating]]
"""A member that was predicted elsewhere -> its (n, C) log-probabilities."""


class OpenedBlend:
    """The members that count, and how they are combined."""

    def __init__(self, store: RunStore, record: EnsembleRecord) -> None:
        """RunFolderError where the record does not fit this version, its files or the classes."""
        self.store, self.record = store, record
        self._combiner = _combiner(store, record)
        _check_rule(store, record)
        self._k, self._fold_count = store.folds().k, store.fold_count

    @property
    def counting(self) -> list[tuple[int, MemberRecord]]:
        """The members that the combiner asks for, with their number."""
        weights = self._combiner.weights
        return [(i, m) for i, m in enumerate(self.record.members) if weights[i] != 0]

    def require_models(self) -> None:
        """RunFolderError where a member has predictions of the test set alone."""
        names = [member.candidate for _, member in self.counting if member.added]
        if names:
            raise RunFolderError.single(
                f"{self.store.root}/ensemble/ensemble.json",
                f"the blend has members that were predicted elsewhere ({listing(names)}): of them "
                "only the test set's probabilities are known, so that no other image can be "
                "predicted; blend again without them: `ensemble` without --add",
            )

    def keys_of_fold(self, fold: int) -> list[FoldKey]:
        """One fold trial's models of all members, in their order."""
        return [FoldKey(m.run, m.candidate, m.variant, fold) for _, m in self.counting]

    def of_one_fold(self, fold: int, take: Take) -> NDArray[np.float64]:
        """(n, C) probabilities by one fold trial's models alone."""
        members = zip(self.counting, self.keys_of_fold(fold), strict=True)
        terms = (
            (number, at_temperature(take(key), member.temperature))
            for (number, member), key in members
        )
        pooled = np.log(normalise(pool_terms(self._combiner, terms)))
        return fold_mean([pooled], self.record.blend_temperature).prob

    def keys(self) -> list[FoldKey]:
        """The fold models that count, in the order in which the blend asks for them."""
        trained = [member for _, member in self.counting if not member.added]
        keys = [key for member in trained for key in self.keys_of(member)]
        return sorted(keys, key=lambda key: key.fold % self._k)

    def keys_of(self, member: MemberRecord) -> list[FoldKey]:
        """A member's fold models, those of one fold's repeats together."""
        return [
            FoldKey(member.run, member.candidate, member.variant, number)
            for fold in range(self._k)
            for number in range(fold, self._fold_count, self._k)
        ]

    def blended(self, take: Take, of_added: OfAdded | None = None) -> FoldMean:
        """The geometric mean over the folds, at the blend's temperature.

        The temperatures are fitted to single folds' models. The arithmetic mean over folds is
        flatter than each of them, and would want a temperature of its own.
        """
        return fold_mean(self.of_folds(take, of_added), self.record.blend_temperature)

    def of_folds(
        self, take: Take, of_added: OfAdded | None = None
    ) -> Iterator[NDArray[np.float64]]:
        """(n, C) log-probabilities of each fold's models, before the blend's temperature."""
        for fold in range(self._k):
            pooled = pool_terms(self._combiner, self._members(fold, take, of_added))
            yield np.log(normalise(pooled))

    def _members(
        self, fold: int, take: Take, of_added: OfAdded | None
    ) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """(member, its calibrated log-probabilities (n, C)), one in memory at a time.

        `fold` is the number within a repeat.
        """
        for number, member in self.counting:
            if member.added and of_added is not None:
                log_prob = at_temperature(of_added(member), member.temperature)
            else:
                log_prob = self._of_fold(member, fold, take)
            yield number, log_prob

    def _of_fold(self, member: MemberRecord, fold: int, take: Take) -> NDArray[np.floating]:
        """(n, C) calibrated log-probabilities: the mean over the repeats' models of this fold."""
        keys = [key for key in self.keys_of(member) if key.fold % self._k == fold]
        return at_temperature(mean_log_prob([take(key) for key in keys]), member.temperature)

    def of_member(self, member: MemberRecord, take: Take) -> NDArray[np.float64]:
        """(n, C) probabilities of one member alone."""
        folds = range(self._k)
        return fold_mean(self._of_fold(member, fold, take) for fold in folds).prob


def _combiner(store: RunStore, ensemble: EnsembleRecord) -> Combiner:
    """The combiner as the method fitted it; RunFolderError where this version knows it not."""
    build = POOLINGS.get(ensemble.pooling)
    if build is None:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json",
            f"combines its members by {ensemble.pooling!r}, which this version does not know (it "
            f"knows {', '.join(POOLINGS)}); blend again: `ensemble DIR`",
        )
    weights = np.array([member.weight for member in ensemble.members])
    arrays = store.blend.combiner_arrays(ensemble)
    try:
        combiner = build(weights, arrays)
        row = np.zeros((1, len(store.classes())), dtype=np.float32)
        tried = pool_terms(combiner, ((member, row) for member in range(len(weights))))
        if not np.isfinite(tried).all():
            raise ValueError("its numbers are not finite")
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise RunFolderError.single(
            f"{store.root}/ensemble/{ensemble.combiner or 'ensemble.json'}",
            f"does not fit the blend: {error!r}; blend again: `ensemble {store.root}`",
        ) from error
    return combiner


def name_of(member: MemberRecord) -> str:
    """The name in messages: `c0003 ema`, of another run `c0003 ema of RUN`."""
    return member_name(Member(member.candidate, member.variant, run=member.run))


def _check_rule(store: RunStore, ensemble: EnsembleRecord) -> None:
    try:
        decide(ensemble.rule, np.full((1, len(store.classes())), 1.0))
    except ValueError as error:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json", f"{error}; blend again: `ensemble {store.root}`"
        ) from error


def run_of(store: RunStore, ensemble: EnsembleRecord, run: str) -> RunStore:
    """The run folder that holds a member."""
    if not run:
        return store
    other = member_run(store, run)
    if other.folds().hash != ensemble.folds_hash:
        raise RunFolderError.single(
            other.root,
            f"has other folds than the blend of {store.root}, which has members of it; blend "
            "again: `ensemble DIR`",
        )
    return other
