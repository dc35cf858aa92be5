"""Probabilities of a run's blend for any images.

Takes a run folder and images, gives an (n, C) array or a `Prediction` an image: per fold the
members at their temperatures, combined; then the geometric mean over the folds, at the blend's
temperature. Where there are repeats, a member's prediction of a fold is the mean over that of each
repeat, as its OOF rows are, to which temperatures and weights were fitted. Only the selected
checkpoints are read. What they say of the test set is kept beside them, so that each predicts it
once for all blends; of other images nothing is written.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.metrics import normalise
from foldrace.core.plugins import naming_plugins
from foldrace.dataset.images import ImageError
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.decisions import decide
from foldrace.ensemble.fold_mean import FoldMean
from foldrace.ensemble.selection.external import added_test
from foldrace.inference.engine.fold_models import FoldModels, OnModel, Progress, Take
from foldrace.inference.engine.given_images import GivenImage, GivenImages
from foldrace.inference.engine.passes import FoldKey, memory_limit
from foldrace.inference.opened_blend import OpenedBlend, name_of, run_of
from foldrace.inference.plugins import run_parts
from foldrace.inference.predictions import Prediction, count_line, predictions
from foldrace.inference.run_models import RunModels, best_device
from foldrace.inference.tta import find_tta
from foldrace.run_folder.allowed import open_allowed
from foldrace.run_folder.belonging import training_data
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.kept_predictions import KeptPredictions
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.cache_build import scan
from foldrace.trainables.data.pixel_cache import ImageSource, stored_side
from foldrace.trainables.models.classifier import ModelConfig

_log = logging.getLogger("foldrace")


def _no_listener(done: int) -> None:
    """Ignore the progress."""


@dataclass(frozen=True)
class _TestImages:
    """The images of the run's test set that are predicted."""

    files: tuple[Path, ...]
    ids: tuple[str, ...]
    """Ids of the whole test set."""
    rows: NDArray[np.int64]
    """Row of each image in the test set."""
    session: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Session of the pixel cache: within one prediction the files are looked at once."""

    @cached_property
    def state(self) -> str:
        """A text that differs wherever the files do, by the file system."""
        paths = hashlib.sha256("\0".join(map(str, self.files)).encode(errors="surrogateescape"))
        return f"{paths.hexdigest()} {scan(self.files).state}"


class Predictor:
    """The blend of one run folder.

    >>> Predictor("runs/cars").predict(["car.jpg", array, pil_image])  # a `Prediction` each
    >>> Predictor("runs/cars").probabilities([Path("car.jpg")])  # (1, C)

    Fold models stay in memory between calls, where all of them fit.
    """

    def __init__(
        self,
        run: RunStore | str | Path,
        workers: int | None = None,
        tta: str = "none",
        device: str | None = None,
        trust_plugins: bool = False,
        runs: Sequence[str] = (),
        max_memory: int | str | None = None,
        ensemble: EnsembleRecord | None = None,
    ) -> None:
        """Open the blend of a run; `tta` is a row of `TTAS`, of the run's plugins, or a list.

        `workers`: threads that decode, None: one a core. `device`: `cpu`, `cuda` or `mps`, None:
        the GPU where there is one. `trust_plugins` lets the run's plugins run, `runs` are the
        further run folders of its blend: once said, both are remembered. `max_memory`: bytes or
        `2GB` that models may take at a time, None: half of what is free. `ensemble`:
        another blend of the run's members than the stored one. RunFolderError where the run has no
        blend, where plugins or a member's own run folder are not allowed, or where that is gone or
        has other folds.
        """
        store = run if isinstance(run, RunStore) else open_allowed(run, trust_plugins, runs)
        self._tta = find_tta(tta, run_parts(store))
        ensemble = ensemble or store.blend.record()
        if ensemble is None:
            raise RunFolderError.single(
                store.root, "has no blend yet; `ensemble DIR` makes one from complete candidates"
            )
        self.store, self.ensemble = store, ensemble
        self.classes = store.classes()
        self._workers = workers or _cores()
        device_ = best_device() if device is None else torch.device(device)
        self._blend = OpenedBlend(store, ensemble)
        self._runs = {
            run: RunModels(run_of(store, ensemble, run), device_)
            for run in {member.run for member in ensemble.members if not member.added}
        }
        most = memory_limit(max_memory, device_)
        self._models = FoldModels(self._runs, device_, self._tta, self._workers, most)

    @property
    def models(self) -> int:
        """Fold models that a prediction runs."""
        trained = sum(not member.added for _, member in self._blend.counting)
        return trained * self.store.fold_count

    def predict(
        self, images: Sequence[GivenImage], top_k: int = 5, on_model: OnModel = _no_listener
    ) -> list[Prediction]:
        """One prediction an image, in their order; an `ERROR` with its reason where it has none.

        Paths, (H, W, 3) uint8 arrays (grey and RGBA too) or PIL images. One line of the log tells
        counts and times. RunFolderError where a member has predictions of the test set alone.
        """
        started = time.perf_counter()
        errors: dict[int, ImageError] = {}
        prob = self._of_given(images, on_model, errors.setdefault)
        reasons = {row: error.reason for row, error in errors.items()}
        found = predictions(prob, self.decide(prob), self.classes, reasons, top_k)
        _log.info("%s", count_line(found, time.perf_counter() - started))
        return found

    def probabilities(
        self, files: Sequence[GivenImage], on_model: OnModel = _no_listener
    ) -> NDArray[np.float64]:
        """(n, C) probabilities of the images, rows sum to 1.

        `on_model` is called with how many of `models` are done. ImageError where one cannot be
        read, RunFolderError where a member has predictions of the test set alone.
        """
        return self._of_given(files, on_model, None)

    def member_probabilities(
        self, files: Sequence[GivenImage], on_model: OnModel = _no_listener
    ) -> dict[str, NDArray[np.float64]]:
        """Name of each member that counts -> its (n, C) probabilities of the images.

        The geometric mean over its fold models, each at the member's temperature. Errors as in
        `probabilities`.
        """
        self._blend.require_models()
        shape = len(files), len(self.classes)
        found = {name_of(member): np.zeros(shape) for _, member in self._blend.counting}
        keys = [key for _, member in self._blend.counting for key in self._blend.keys_of(member)]
        with naming_plugins():
            for rows, take in self._given_batches(keys, files, on_model, None):
                for _, member in self._blend.counting:
                    found[name_of(member)][rows] = self._blend.of_member(member, take)
        return found

    def oof_probabilities(self, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, C) probabilities of rows of folds.csv, each by models that did not train on it.

        As the blend scored them, but for the views of `tta`: the fold's models of the first
        repeat. Errors as in `probabilities`, DataError where the training images are gone.
        """
        self._blend.require_models()
        manifest, prob = training_data(self.store), np.zeros((len(rows), len(self.classes)))
        fold_of = self.store.folds().fold[rows]
        for fold in np.unique(fold_of).tolist():
            mine = np.flatnonzero(fold_of == fold)
            prob[mine] = self._by_fold(fold, [manifest.file(int(row)) for row in rows[mine]])
        return prob

    def _by_fold(self, fold: int, files: Sequence[Path]) -> NDArray[np.float64]:
        """(n, C) by one fold's models alone."""
        prob = np.zeros((len(files), len(self.classes)))
        keys = self._blend.keys_of_fold(fold)
        with naming_plugins():
            for rows, take in self._given_batches(keys, files, _no_listener, None):
                prob[rows] = self._blend.of_one_fold(fold, take)
        return prob

    def fold_log_probabilities(
        self, files: Sequence[GivenImage], on_model: OnModel = _no_listener
    ) -> NDArray[np.float32]:
        """(K, n, C) log-probabilities of each fold's blend, before the blend's temperature.

        Errors as in `probabilities`.
        """
        self._blend.require_models()
        shape = self.store.folds().k, len(files), len(self.classes)
        found: NDArray[np.float32] = np.zeros(shape, dtype=np.float32)
        with naming_plugins():
            for rows, take in self._given_batches(self._blend.keys(), files, on_model, None):
                for fold, log_prob in enumerate(self._blend.of_folds(take)):
                    found[fold, rows] = log_prob
        return found

    def decide(self, prob: NDArray[np.float64]) -> NDArray[np.int64]:
        """The class (n,) of each row of these probabilities (n, C), by the blend's decision rule.

        The most probable one where the blend has no rule.
        """
        return decide(self.ensemble.rule, prob)

    def test_probabilities(
        self,
        test: ImageSet,
        on_model: OnModel = _no_listener,
        rows: NDArray[np.int64] | None = None,
    ) -> FoldMean:
        """Probabilities (n, C) of the run's test set, or of these n rows of it; they sum to 1.

        With the predictions that were made elsewhere, also those that no score backs; `log_z` is
        that of the blend without the latter. RunFolderError where some are missing, are of other
        ids, or are not those that were blended.
        """
        self.store.blend.check_added(self.ensemble)
        for _, member in self._blend.counting:
            if member.added:  # what is wrong with it is reported before the models run
                added_test(self.store, member.candidate, test.ids)
        rows = np.arange(len(test)) if rows is None else rows
        rest = 1.0 - sum(file.weight for file in self.ensemble.unvalidated)
        total: NDArray[np.float64] = np.zeros((len(rows), len(self.classes)))
        for file in self.ensemble.unvalidated:
            total += file.weight * normalise(added_test(self.store, file.name, test.ids)[rows])
        log_z = np.zeros(len(rows))
        if rest > 0:
            files = tuple(test.file(int(row)) for row in rows)
            blended = self._of_test_images(_TestImages(files, test.ids, rows), on_model)
            total, log_z = total + rest * blended.prob, blended.log_z
        return FoldMean(normalise(total), log_z)

    def _of_given(
        self,
        images: Sequence[GivenImage],
        on_model: OnModel,
        on_bad: Callable[[int, ImageError], object] | None,
    ) -> NDArray[np.float64]:
        """(n, C) probabilities; rows that `on_bad` is told of say nothing: 1/C each."""
        self._blend.require_models()
        prob = np.full((len(images), len(self.classes)), 1.0 / len(self.classes))
        with naming_plugins():
            for rows, take in self._given_batches(self._blend.keys(), images, on_model, on_bad):
                prob[rows] = self._blend.blended(take).prob
        return prob

    def _given_batches(
        self,
        keys: Sequence[FoldKey],
        images: Sequence[GivenImage],
        on_model: OnModel,
        on_bad: Callable[[int, ImageError], object] | None,
    ) -> Iterator[tuple[NDArray[np.int64], Take]]:
        sources: dict[tuple[int, str], ImageSource] = {}
        most = self.store.config().data.max_pixels

        def source_of(run: str, config: ModelConfig) -> ImageSource:
            cache = self._runs[run].store.config().cache
            kind = stored_side(config.image_size, cache), cache.format
            if kind not in sources:
                sources[kind] = GivenImages(images, config.image_size, cache, most)
            return sources[kind]

        progress = Progress(on_model, len(images))
        return self._models.batches(keys, source_of, len(images), progress, on_bad)

    def _of_test_images(self, images: _TestImages, on_model: OnModel) -> FoldMean:
        """The blend of the test set; what was kept of it is read, what is new is kept."""
        sources: dict[tuple[str, int], ImageSource] = {}

        def source_of(run: str, config: ModelConfig) -> ImageSource:
            if (run, config.image_size) not in sources:
                sources[run, config.image_size] = self._runs[run].images(
                    images.files, config, self._workers, images.session
                )
            return sources[run, config.image_size]

        def of_added(member: MemberRecord) -> NDArray[np.floating]:
            known = added_test(self.store, member.candidate, images.ids)[images.rows]
            return np.log(normalise(known))

        kept = {
            run: KeptPredictions(models.store, images.state, self._tta.name)
            for run, models in self._runs.items()
        }
        shape = len(images.files), len(self.classes)
        progress = Progress(on_model, shape[0])
        with naming_plugins():
            take = self._models.keeping(self._blend.keys(), source_of, shape, progress, kept)
            return self._blend.blended(take, of_added)


def _cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
