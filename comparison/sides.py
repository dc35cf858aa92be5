"""The runs that are compared, brought to the same images and the same order of classes.

Takes run folders, gives a `Comparison`: of each run the out-of-fold probabilities of its blend on
the images that all have scored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foldrace.core.errors import Problem, RunFolderError, listing
from foldrace.core.metrics import normalise, row_losses
from foldrace.ensemble.decisions import decide
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore


@dataclass(frozen=True, eq=False)
class Side:
    """One of the runs."""

    name: str
    """Last part of its folder; with as many parts before it as tell it from the others."""
    store: RunStore
    blend: EnsembleRecord
    prob: NDArray[np.float64]
    """(n, C) OOF probabilities of the blend on the shared images, in the shared order."""
    predicted: NDArray[np.int64]
    """(n,) classes by the blend's decision rule."""
    columns: NDArray[np.int64]
    """(C,) place of each shared class among the run's own."""
    own_rows: int
    """Number of images that the run has scored."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs on the images that all of them have scored."""

    sides: tuple[Side, ...]
    classes: tuple[str, ...]
    image_paths: tuple[str, ...]
    labels: NDArray[np.int64]
    """(n,)"""
    fold: NDArray[np.int64]
    """(n,) fold in the first run."""
    groups: NDArray[np.int64] | None
    """(n,) number of each image's group, in the first run; None where it has none."""
    same_folds: bool
    """True where all runs have the same folds.csv."""

    def losses(self, side: Side) -> NDArray[np.float64]:
        """(n,) log loss of each image."""
        return row_losses(side.prob[np.arange(len(self.labels)), self.labels])

    def hits(self, side: Side) -> NDArray[np.float64]:
        """(n,) 1 where the class is right, else 0."""
        return np.asarray(side.predicted == self.labels, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class _Scored:
    """The scored rows of one run, before they are brought together."""

    name: str
    store: RunStore
    blend: EnsembleRecord
    rows: dict[str, int]
    """Place of each image among the scored rows."""


def compare_runs(roots: Sequence[str]) -> Comparison:
    """Bring the runs together; RunFolderError with every problem.

    They need a blend, the same names of classes, and images that all have scored with the same
    label. Images are told by their `image_path` in folds.csv.
    """
    found = _open(roots)
    first = found[0]
    shared = [path for path in first.rows if all(path in other.rows for other in found[1:])]
    problems = _unlike_classes(found)
    if not problems and not shared:
        message = "the runs have no training image in common (by image_path in folds.csv)"
        problems = [Problem("compare", message)]
    if not problems:
        problems = _unlike_labels(found, shared)
    if problems:
        raise RunFolderError(problems)
    classes = first.store.classes()
    folds, scored = first.store.folds(), first.store.scored_rows()
    rows = scored[[first.rows[path] for path in shared]]
    return Comparison(
        sides=tuple(_side(one, classes, shared) for one in found),
        classes=classes,
        image_paths=tuple(shared),
        labels=first.store.labels()[rows],
        fold=folds.fold[rows],
        groups=None if folds.group_numbers is None else folds.group_numbers[rows],
        same_folds=len({one.blend.folds_hash for one in found}) == 1,
    )


def _open(roots: Sequence[str]) -> list[_Scored]:
    if len(roots) < 2:
        raise RunFolderError.single("compare", "give two run folders or more")
    names, found = short_names(roots), []
    problems: list[Problem] = [
        Problem(root, "is given twice") for root, n in Counter(roots).items() if n > 1
    ]
    for name, root in zip(names, roots, strict=True):
        try:
            found.append(_scored(name, RunStore.open(root)))
        except RunFolderError as error:
            problems += error.problems
    if problems:
        raise RunFolderError(problems)
    return found


def _scored(name: str, store: RunStore) -> _Scored:
    blend = store.blend.record()
    if blend is None:
        message = "has no blend yet; `ensemble DIR` makes one from complete candidates"
        raise RunFolderError.single(store.root, message)
    folds = store.folds()
    if blend.folds_hash != folds.hash:
        message = "has a blend of other folds; blend again: `ensemble DIR`"
        raise RunFolderError.single(store.root, message)
    paths = [folds.image_paths[row] for row in store.scored_rows()]
    return _Scored(name, store, blend, {path: place for place, path in enumerate(paths)})


def _side(one: _Scored, classes: Sequence[str], shared: Sequence[str]) -> Side:
    own = one.store.classes()
    place = {name: i for i, name in enumerate(own)}
    columns = np.array([place[name] for name in classes])
    own_prob = normalise(one.store.blend.oof()[[one.rows[path] for path in shared]])
    position = np.argsort(columns)  # own class -> shared class
    return Side(
        name=one.name,
        store=one.store,
        blend=one.blend,
        prob=own_prob[:, columns],
        predicted=position[decide(one.blend.rule, own_prob)],
        columns=columns,
        own_rows=len(one.rows),
    )


def short_names(roots: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    parts = [[part for part in root.split("/") if part not in ("", ".")] for root in roots]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) or "/" for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(roots)


def _unlike_classes(found: Sequence[_Scored]) -> list[Problem]:
    first = found[0]
    known, problems = set(first.store.classes()), []
    for other in found[1:]:
        theirs = set(other.store.classes())
        if theirs != known:
            only = listing(sorted(theirs - known), 5) or "none"
            without = listing(sorted(known - theirs), 5) or "none"
            problems.append(
                Problem(
                    other.store.root,
                    f"has other classes than {first.store.root}: only here {only}; only there "
                    f"{without}",
                )
            )
    return problems


def _unlike_labels(found: Sequence[_Scored], shared: Sequence[str]) -> list[Problem]:
    targets = [_targets(one) for one in found]
    first, problems = found[0], []
    for other, theirs in zip(found[1:], targets[1:], strict=True):
        unlike = [path for path in shared if targets[0][path] != theirs[path]]
        if unlike:
            path = unlike[0]
            problems.append(
                Problem(
                    other.store.root,
                    f"{len(unlike)} of {len(shared)} images have another label than in "
                    f"{first.store.root}, such as {path}: {theirs[path]!r} there "
                    f"{targets[0][path]!r}; runs of other labels cannot be compared",
                )
            )
    return problems


def _targets(one: _Scored) -> dict[str, str]:
    """The class of each scored image; merged ones by their merged class."""
    classes, labels = one.store.classes(), one.store.labels()[one.store.scored_rows()]
    return {path: classes[labels[place]] for path, place in one.rows.items()}
