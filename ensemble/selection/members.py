"""Where the members of a blend come from, and what they are called.

Takes run folders, gives one `OofSource` a member: a run folder's trials, or a file made elsewhere;
no array is read yet. Says whether a name in `ensemble.exclude` or `ensemble.include` means a
member.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from posixpath import basename

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, RunFolderError, UserError
from foldrace.dataset.folds import FoldTable
from foldrace.ensemble.pool import Member
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import suffix, weights_name


def member_name(member: Member) -> str:
    """Name in messages: `c0007 ema`, of a further run folder `c0007 ema of runs/other`."""
    return f"{_own_name(member)} of {member.run}" if member.run else _own_name(member)


def is_named(member: Member, name: str) -> bool:
    """Say whether a name in `exclude` or `include` means the member.

    `c0007`, `c0007 ema` or a backbone: of every run folder; with `RUN:` before, only of the folder
    with that path or last name; with `:` alone, of the run that is blended.
    """
    names = (member.candidate, _own_name(member), member.backbone)
    if name in names:
        return True
    run, colon, rest = name.rpartition(":")
    folder = run.rstrip("/") if len(run) > 1 else run
    runs = (member.run.rstrip("/"), basename(member.run.rstrip("/")))
    return bool(colon and rest) and rest in names and folder in runs


def _own_name(member: Member) -> str:
    return f"{member.candidate} {member.variant}"


@dataclass(frozen=True, eq=False)
class OofSource:
    """One member before anything of it has been read or checked."""

    member: Member
    where: str
    """File or pattern of files, for messages."""
    fingerprint: str
    """Changes whenever the files change: what is derived from them is kept under it."""
    log_prob: Callable[[], NDArray[np.float32]]
    """(N, C) natural-log probabilities as stored, unchecked; of several repeats their mean."""
    true_prob: Callable[[], NDArray[np.float32]]
    """(N,) probability of the true class as stored, unchecked; alike."""
    by_repeat: tuple[OofSource, ...] = ()
    """Of several repeats each one: what is stored, and so what is to be checked."""
    repeat: int = 0
    """The repeat whose folds these are, or the first of several."""


def run_sources(store: RunStore, run: str = "") -> list[OofSource]:
    """Every variant of every complete candidate whose weights are there: a blend is to predict.

    `run` is the run folder that the members name, see `Member.run`.
    """
    stamps = store.files.stamps("trials")
    complete = [s for s in store.summaries() if s.is_member]
    members = [
        Member(s.candidate.candidate, variant, s.candidate.backbone, run)
        for s in complete
        for variant in s.variants
    ]
    return [_source(store, m, stamps) for m in members if _has_weights(store, m, stamps)]


def other_runs(store: RunStore, roots: Sequence[str]) -> list[OofSource]:
    """The members of further run folders.

    RunFolderError with every folder that cannot be blended with this one: other classes, rows or
    folds, nothing complete, or no run.
    """
    found: list[OofSource] = []
    problems: list[Problem] = []
    seen = {store.root}
    for root in roots:
        try:
            found += _other_run(store, root, seen)
        except UserError as error:
            problems += error.problems
    if problems:
        raise RunFolderError(problems)
    return found


def _other_run(store: RunStore, root: str, seen: set[str]) -> list[OofSource]:
    other = RunStore.open(root)
    if other.root in seen:
        raise RunFolderError.single(other.root, "is named twice; name each further run once")
    seen.add(other.root)
    difference = _first_difference(other, store)
    if difference is not None:
        raise RunFolderError.single(
            other.root,
            f"cannot be blended with {store.root}: {difference}; allowed are runs of the same "
            "table, with the same classes and the same folds (folds.k, folds.repeats, folds.seed)",
        )
    sources = run_sources(other, other.root)
    if not sources:
        message = f"has no complete candidate with its weights; first `resume {other.root}`"
        raise RunFolderError.single(other.root, message)
    return sources


def _source(store: RunStore, member: Member, stamps: Mapping[str, str]) -> OofSource:
    candidate, variant = member.candidate, member.variant
    end = suffix(variant)
    names = [
        f"{store.trial_folder(candidate, fold)}/{array}.npy"
        for fold in range(store.fold_count)
        for array in ("rows", f"oof{end}", f"true_prob{end}")
    ]
    text = "\n".join(f"{name} {stamps.get(name)}" for name in names)
    whole = OofSource(
        member=member,
        where=f"{store.root}/trials/{candidate}/*/oof{end}.npy",
        fingerprint=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        log_prob=partial(store.oof_log_prob, candidate, variant),
        true_prob=partial(store.true_prob, candidate, variant),
    )
    table = store.folds()
    if table.repeats == 1:
        return whole
    parts = [
        replace(
            whole,
            log_prob=partial(store.oof_log_prob, candidate, variant, table.folds_of(repeat)),
            true_prob=partial(store.true_prob, candidate, variant, table.folds_of(repeat)),
            repeat=repeat,
        )
        for repeat in range(table.repeats)
    ]
    return replace(whole, by_repeat=tuple(parts))


def _has_weights(store: RunStore, member: Member, stamps: Mapping[str, str]) -> bool:
    folds = range(store.fold_count)
    return all(weights_name(member.candidate, k, member.variant) in stamps for k in folds)


def _first_difference(here: RunStore, there: RunStore) -> str | None:
    """The first difference in words, for a message about the run folder `here`; None: alike."""
    for i, (ours, theirs) in enumerate(zip_longest(here.classes(), there.classes())):
        if ours != theirs:
            return f"class {i} is {_shown(ours)} here and {_shown(theirs)} there"
    if here.folds().hash == there.folds().hash:
        return None
    return _first_row_difference(here.folds(), there.folds())


def _first_row_difference(here: FoldTable, there: FoldTable) -> str:
    if len(here.fold) != len(there.fold):
        return f"folds.csv has {len(here.fold):,} rows here and {len(there.fold):,} there"
    if here.repeats != there.repeats:
        return f"folds.repeats is {here.repeats} here and {there.repeats} there"
    columns: dict[str, tuple[Sequence[object], Sequence[object]]] = {
        "image": (here.image_paths, there.image_paths),
        "target": (here.targets, there.targets),
        "group": (here.groups or (), there.groups or ()),
    }
    for repeat, splits in enumerate(zip(here.by_repeat, there.by_repeat, strict=True)):
        ours, theirs = (split.tolist() for split in splits)
        columns[f"fold_r{repeat}" if repeat else "fold"] = ours, theirs
    for name, (ours, theirs) in columns.items():
        for row, (left, right) in enumerate(zip_longest(ours, theirs)):
            if left != right:
                values = f"is {_shown(left)} here and {_shown(right)} there"
                return f"the {name} in line {row + 2} of folds.csv {values}"
    return "folds.csv is written in another way"


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)
