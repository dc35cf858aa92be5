"""What a blend and its members say of labelled images, one row each.

Takes a run folder's stored OOF arrays, gives an `EvaluatedRows`; `evaluation.models` makes one of
images that models are run on. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.metrics import most_probable, row_losses, true_class_probability
from foldrace.core.temperature import at_temperature
from foldrace.ensemble.decisions import decide
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.members import member_name
from foldrace.ensemble.uncertainty import Groups
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.oof import read_array
from foldrace.run_folder.store import RunStore


@dataclass(frozen=True, eq=False)
class EvaluatedRows:
    """n labelled images, the blend's probabilities of them, and each member's."""

    paths: tuple[str, ...]
    """As folds.csv, or the labelled data, have them."""
    labels: NDArray[np.int64]
    """(n,) class indices."""
    classes: tuple[str, ...]
    prob: NDArray[np.float64]
    """(n, C) of the blend, calibrated; rows sum to 1."""
    predicted: NDArray[np.int64]
    """(n,) by the blend's decision rule, else the most probable class."""
    members: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """Name -> (n, C) of the member alone, at its temperature."""
    splits: tuple[NDArray[np.int64], ...] = ()
    """(n,) the fold that scored each row, one array a repeat; none where no fold did."""
    groups: Groups = None
    """(n,) number of each row's group."""

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def true_prob(self) -> NDArray[np.float64]:
        """(n,) probability of the label."""
        return true_class_probability(self.prob, self.labels)

    @cached_property
    def losses(self) -> NDArray[np.float64]:
        """(n,) -log p(label), in nats."""
        return row_losses(self.true_prob)

    @cached_property
    def confidence(self) -> NDArray[np.float64]:
        """(n,) probability of the predicted class."""
        return np.asarray(self.prob[np.arange(len(self)), self.predicted])

    @cached_property
    def votes(self) -> NDArray[np.int64]:
        """(n, C) number of members whose most probable class it is."""
        counts = np.zeros(self.prob.shape, dtype=np.int64)
        for prob in self.members.values():
            counts[np.arange(len(self)), most_probable(prob)] += 1
        return counts

    @cached_property
    def mistakes(self) -> NDArray[np.int64]:
        """Rows whose predicted class is not the label, by falling confidence."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")]


def oof_rows(store: RunStore) -> EvaluatedRows:
    """The scored training rows, by models that did not train on them.

    RunFolderError where there is no blend, it is of other folds, or its arrays are damaged.
    """
    blend = require_blend(store)
    folds, rows, classes = store.folds(), store.scored_rows(), store.classes()
    prob = _checked(store, store.blend.oof().astype(np.float64), (len(rows), len(classes)))
    prob /= prob.sum(axis=1, keepdims=True)
    return EvaluatedRows(
        paths=tuple(folds.image_paths[row] for row in rows),
        labels=store.labels()[rows],
        classes=classes,
        prob=prob,
        predicted=decided(store, blend, prob),
        members=dict(_members(store, blend, prob.shape)),
        splits=tuple(split[rows] for split in folds.by_repeat),
        groups=None if folds.group_numbers is None else folds.group_numbers[rows],
    )


def require_blend(store: RunStore) -> EnsembleRecord:
    """The record of the blend; RunFolderError where there is none, or it is of other folds."""
    blend = store.blend.record()
    if blend is None:
        raise RunFolderError.single(
            store.root, "has no blend yet; `ensemble DIR` makes one from complete candidates"
        )
    if blend.folds_hash != store.folds().hash:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json",
            f"is of another folds.csv than the one there; blend again: `ensemble {store.root}`",
        )
    return blend


def decided(store: RunStore, blend: EnsembleRecord, prob: NDArray[np.float64]) -> NDArray[np.int64]:
    """(n,) classes by the blend's decision rule; RunFolderError where that does not fit."""
    try:
        return decide(blend.rule, prob)
    except ValueError as error:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json", f"{error}; blend again: `ensemble {store.root}`"
        ) from error


def name_of(member: MemberRecord) -> str:
    """The name in tables and messages: `c0003 ema`, of another run `c0003 ema of RUN`."""
    return member_name(Member(member.candidate, member.variant, run=member.run))


def counting(blend: EnsembleRecord) -> Sequence[MemberRecord]:
    """The members that have a weight, the heaviest first."""
    known = [member for member in blend.members if member.weight]
    return sorted(known, key=lambda member: -member.weight)


def _members(
    store: RunStore, blend: EnsembleRecord, shape: tuple[int, ...]
) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Name of each member that counts, and its OOF probabilities."""
    for member in counting(blend):
        log_prob = at_temperature(_log_prob(store, member), member.temperature)
        yield name_of(member), _checked(store, np.exp(log_prob, dtype=np.float64), shape)


def _log_prob(store: RunStore, member: MemberRecord) -> NDArray[np.float32]:
    if member.added:
        return read_array(store.files, f"ensemble/added/{member.candidate}/oof.npy")
    return member_run(store, member.run).oof_log_prob(member.candidate, member.variant)


def _checked(
    store: RunStore, prob: NDArray[np.float64], shape: tuple[int, ...]
) -> NDArray[np.float64]:
    if prob.shape != shape:
        raise RunFolderError.single(
            f"{store.root}/ensemble",
            f"has OOF rows of the shape {prob.shape}, should have {shape}; blend again with "
            f"`ensemble {store.root}`",
        )
    return prob
