"""Probabilities of a run's blend for any images.

Takes a run folder and image files, gives an (n, C) array: per fold the members at their
temperatures, combined, at the blend's temperature; then the mean over the folds. Only the selected
checkpoints are read, each once.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ensemble.added import added_test
from ensemble.calibrate import at_temperature
from ensemble.combine import POOLINGS, Combiner, pool_terms
from experiment.errors import RunFolderError, listing
from experiment.metrics import normalise
from experiment.plugins import naming_plugins
from experiment.records import EnsembleRecord, MemberRecord
from experiment.store import RunStore
from experiment.test_set import ImageSet
from inference.fold_model import BATCH, RunModels, best_device
from inference.plugins import use_run_plugins
from inference.tta import AveragedViews, find_tta
from trainables.data import loader_settings
from trainables.predict import log_probabilities, scoring_loader

Heard = Callable[[int], None]


def _unheard(done: int) -> None:
    """Nobody listens."""


@dataclass(frozen=True)
class _Images:
    """What one prediction is of."""

    files: tuple[Path, ...]
    ids: tuple[str, ...] | None = None
    """Of the test set, where these are its images."""
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of the pixel cache: within one prediction the files are looked at once."""


class Predictor:
    """The blend of one run folder.

    >>> Predictor(RunStore.open("runs/cars")).probabilities([Path("car.jpg")])  # (1, C)
    """

    def __init__(self, store: RunStore, workers: int = 1, tta: str = "none") -> None:
        """`tta`: a row of `TTAS`. RunFolderError where the run has no blend, or a member's own run
        folder is gone or has other folds."""
        use_run_plugins(store)
        self._tta = find_tta(tta)
        ensemble = store.blend.record()
        if ensemble is None:
            raise RunFolderError.single(
                store.root, "has no blend yet; `ensemble DIR` makes one from complete candidates"
            )
        self.store, self.ensemble = store, ensemble
        self.classes = store.classes()
        self._workers = workers
        self._device = best_device()
        self._combiner = _combiner(store, ensemble)
        self._runs = {
            run: RunModels(_run_of(store, ensemble, run), self._device)
            for run in {member.run for member in ensemble.members if not member.added}
        }

    @property
    def models(self) -> int:
        """Fold models that a prediction runs."""
        trained = sum(not member.added for _, member in self._counting)
        return trained * self.store.fold_count

    def probabilities(
        self, files: Sequence[Path], on_model: Heard = _unheard
    ) -> NDArray[np.float64]:
        """(n, C), rows sum to 1. `on_model` hears how many of `models` are done. RunFolderError
        where a member has predictions of the test set alone."""
        self._require_models()
        return self._blended(_Images(tuple(files)), on_model)

    def test_probabilities(self, test: ImageSet, on_model: Heard = _unheard) -> NDArray[np.float64]:
        """(n, C), rows sum to 1, of the run's test set: with the predictions that were made
        elsewhere, also those that no score backs. RunFolderError where some are missing, are of
        other ids, or are not those that were blended."""
        self.store.blend.check_added(self.ensemble)
        for _, member in self._counting:
            if member.added:  # what is wrong with it is told before the models run
                added_test(self.store, member.candidate, test.ids)
        rest = 1.0 - sum(file.weight for file in self.ensemble.unvalidated)
        total: NDArray[np.float64] = np.zeros((len(test), len(self.classes)))
        for file in self.ensemble.unvalidated:
            total += file.weight * normalise(added_test(self.store, file.name, test.ids))
        if rest > 0:
            files = tuple(test.file(row) for row in range(len(test)))
            total += rest * self._blended(_Images(files, test.ids), on_model)
        return normalise(total)

    @property
    def _counting(self) -> list[tuple[int, MemberRecord]]:
        """The members that the combiner asks for, with their number."""
        weights = self._combiner.weights
        return [(i, m) for i, m in enumerate(self.ensemble.members) if weights[i] != 0]

    def _require_models(self) -> None:
        names = [member.candidate for _, member in self._counting if member.added]
        if names:
            raise RunFolderError.single(
                f"{self.store.root}/ensemble/ensemble.json",
                f"the blend has members that were predicted elsewhere ({listing(names)}): of them "
                "only the test set's probabilities are known, so that no other image can be "
                "predicted; blend again without them: `ensemble` without --add",
            )

    def _blended(self, images: _Images, on_model: Heard) -> NDArray[np.float64]:
        """The mean over the folds."""
        heard = _counted(on_model)
        mean: NDArray[np.float64] = np.zeros((len(images.files), len(self.classes)))
        try:
            with naming_plugins():
                for fold in range(self.store.fold_count):
                    pooled = pool_terms(self._combiner, self._members(fold, images, heard))
                    log_prob = np.log(normalise(pooled))
                    final = at_temperature(log_prob, self.ensemble.blend_temperature)
                    mean += normalise(np.exp(final.astype(np.float64))) / self.store.fold_count
        finally:
            use_run_plugins(self.store)  # the last member may have been of another run
        return normalise(mean)

    def _members(
        self, fold: int, images: _Images, heard: Callable[[], None]
    ) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """(member, its calibrated log-probabilities (n, C)), one in memory at a time."""
        for number, member in self._counting:
            if member.added and images.ids is not None:
                known = added_test(self.store, member.candidate, images.ids)
                log_prob: NDArray[np.floating] = np.log(normalise(known))
            else:
                log_prob = self._fold_log_prob(member, fold, images)
                heard()
            yield number, at_temperature(log_prob, member.temperature)

    def _fold_log_prob(
        self, member: MemberRecord, fold: int, images: _Images
    ) -> NDArray[np.float32]:
        """(n, C) of one fold model, uncalibrated."""
        run = self._runs[member.run]
        use_run_plugins(run.store)
        model = run.open(member.candidate, member.variant, fold)
        source = run.images(images.files, model.card, self._workers, images.session)
        settings = loader_settings(self._workers, self._device.type)
        loader = scoring_loader(source, np.arange(len(source)), model.card, BATCH, settings)
        seen = AveragedViews(model.module, self._tta, model.card.activation)
        # Averaged log-probabilities: softmax leaves them as they are.
        return log_probabilities(seen, loader, self._device, model.autocast, "softmax")[0]


def _combiner(store: RunStore, ensemble: EnsembleRecord) -> Combiner:
    """As the method fitted it; RunFolderError where this version does not know it."""
    build = POOLINGS.get(ensemble.pooling)
    if build is None:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json",
            f"combines its members by {ensemble.pooling!r}, known are {', '.join(POOLINGS)}; "
            "blend again: `ensemble DIR`",
        )
    weights = np.array([member.weight for member in ensemble.members])
    return build(weights, store.blend.combiner_arrays(ensemble))


def _run_of(store: RunStore, ensemble: EnsembleRecord, run: str) -> RunStore:
    """The run folder that holds a member."""
    if not run:
        return store
    other = RunStore.open(run)
    if other.folds().hash != ensemble.folds_hash:
        raise RunFolderError.single(
            other.root,
            f"has other folds than the blend of {store.root}, which has members of it; blend "
            "again: `ensemble DIR`",
        )
    return other


def _counted(on_model: Heard) -> Callable[[], None]:
    """Tells `on_model` 1, 2, 3, ..."""
    done = 0

    def heard() -> None:
        nonlocal done
        done += 1
        on_model(done)

    return heard
