"""Probabilities of a run's blend for any images.

Takes a run folder and image files, gives an (n, C) array: per fold the members at their
temperatures, combined; then the geometric mean over the folds, at the blend's temperature. Where
there are repeats, a member's prediction of a fold is the mean over that of each repeat, as its OOF
rows are, to which temperatures and weights were fitted. Only the selected checkpoints are read,
each once; what they say of the test set is kept beside them, so that each predicts it once for all
blends.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError, listing
from foldrace.core.metrics import normalise
from foldrace.core.plugins import naming_plugins
from foldrace.core.temperature import at_temperature
from foldrace.dataset.test_set import ImageSet
from foldrace.ensemble.decisions import decide
from foldrace.ensemble.fold_mean import FoldMean, fold_mean
from foldrace.ensemble.pool import Member
from foldrace.ensemble.pooling import POOLINGS, Combiner, pool_terms
from foldrace.ensemble.selection.external import added_test
from foldrace.ensemble.selection.members import member_name
from foldrace.inference.plugins import run_parts
from foldrace.inference.run_models import BATCH, RunModels, best_device
from foldrace.inference.tta import AveragedViews, find_tta
from foldrace.run_folder.allowed import member_run, open_allowed
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.kept_predictions import KeptPredictions
from foldrace.run_folder.oof import mean_log_prob
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.cache_build import scan
from foldrace.trainables.data.loader import loader_settings
from foldrace.trainables.predict import log_probabilities, scoring_loader

OnModel = Callable[[int], None]


def _no_listener(done: int) -> None:
    """Ignore the progress."""


@dataclass(frozen=True)
class _Images:
    """The images of one prediction."""

    files: tuple[Path, ...]
    ids: tuple[str, ...] | None = None
    """Ids of the whole test set, where these are its images."""
    rows: NDArray[np.int64] | None = None
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

    >>> Predictor("runs/cars").probabilities([Path("car.jpg")])  # (1, C)
    """

    def __init__(
        self,
        run: RunStore | str | Path,
        workers: int = 1,
        tta: str = "none",
        device: str | None = None,
        trust_plugins: bool = False,
        runs: Sequence[str] = (),
    ) -> None:
        """Open the blend of a run; `tta` is a row of `TTAS`, or of the run's plugins.

        `device`: `cpu` or `cuda`, None: the GPU where there is one. `trust_plugins` lets the run's
        plugins run, `runs` are the further run folders of its blend: once said, both are
        remembered. RunFolderError where the run has no blend, where plugins or a member's own run
        folder are not allowed, or where that is gone or has other folds.
        """
        store = run if isinstance(run, RunStore) else open_allowed(run, trust_plugins, runs)
        self._tta = find_tta(tta, run_parts(store))
        ensemble = store.blend.record()
        if ensemble is None:
            raise RunFolderError.single(
                store.root, "has no blend yet; `ensemble DIR` makes one from complete candidates"
            )
        self.store, self.ensemble = store, ensemble
        self.classes = store.classes()
        self._workers = workers
        self._device = best_device() if device is None else torch.device(device)
        self._combiner = _combiner(store, ensemble)
        _check_rule(store, ensemble)
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
        self, files: Sequence[Path], on_model: OnModel = _no_listener
    ) -> NDArray[np.float64]:
        """(n, C) probabilities of the images, rows sum to 1.

        `on_model` is called with how many of `models` are done. RunFolderError where a member has
        predictions of the test set alone.
        """
        self._require_models()
        return self._blended(_Images(tuple(files)), on_model).prob

    def member_probabilities(
        self, files: Sequence[Path], on_model: OnModel = _no_listener
    ) -> dict[str, NDArray[np.float64]]:
        """Name of each member that counts -> its (n, C) probabilities of the images.

        The geometric mean over its fold models, each at the member's temperature. RunFolderError
        where a member has predictions of the test set alone.
        """
        self._require_models()
        images, count_model, found = _Images(tuple(files)), _counter(on_model), {}
        k = self.store.folds().k
        with naming_plugins():
            for _, member in self._counting:
                folds = (range(fold, self.store.fold_count, k) for fold in range(k))
                logs = (self._mean_log_prob(member, of, images, count_model) for of in folds)
                tempered = (at_temperature(log_prob, member.temperature) for log_prob in logs)
                found[_name(member)] = fold_mean(tempered).prob
        return found

    def fold_log_probabilities(
        self, files: Sequence[Path], on_model: OnModel = _no_listener
    ) -> Iterator[NDArray[np.float64]]:
        """(n, C) log-probabilities of each fold's blend, before the blend's temperature."""
        self._require_models()
        return self._of_folds(_Images(tuple(files)), on_model)

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
        for _, member in self._counting:
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
            blended = self._blended(_Images(files, test.ids, rows), on_model)
            total, log_z = total + rest * blended.prob, blended.log_z
        return FoldMean(normalise(total), log_z)

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

    def _blended(self, images: _Images, on_model: OnModel) -> FoldMean:
        """The geometric mean over the folds, at the blend's temperature.

        The temperatures are fitted to single folds' models. The arithmetic mean over folds is
        flatter than each of them, and would want a temperature of its own.
        """
        return fold_mean(self._of_folds(images, on_model), self.ensemble.blend_temperature)

    def _of_folds(self, images: _Images, on_model: OnModel) -> Iterator[NDArray[np.float64]]:
        """(n, C) log-probabilities of each fold's models, before the blend's temperature."""
        count_model = _counter(on_model)
        with naming_plugins():
            for fold in range(self.store.folds().k):
                pooled = pool_terms(self._combiner, self._members(fold, images, count_model))
                yield np.log(normalise(pooled))

    def _members(
        self, fold: int, images: _Images, count_model: Callable[[], None]
    ) -> Iterator[tuple[int, NDArray[np.floating]]]:
        """(member, its calibrated log-probabilities (n, C)), one in memory at a time.

        `fold` is the number within a repeat.
        """
        folds = range(fold, self.store.fold_count, self.store.folds().k)
        for number, member in self._counting:
            if member.added and images.ids is not None:
                known = added_test(self.store, member.candidate, images.ids)[images.rows]
                log_prob: NDArray[np.floating] = np.log(normalise(known))
            else:
                log_prob = self._mean_log_prob(member, folds, images, count_model)
            yield number, at_temperature(log_prob, member.temperature)

    def _mean_log_prob(
        self,
        member: MemberRecord,
        folds: Iterable[int],
        images: _Images,
        count_model: Callable[[], None],
    ) -> NDArray[np.float32]:
        """(n, C) of the mean over these fold models, uncalibrated."""
        found = []
        for fold in folds:
            found.append(self._fold_log_prob(member, fold, images))
            count_model()
        return mean_log_prob(found)

    def _fold_log_prob(
        self, member: MemberRecord, fold: int, images: _Images
    ) -> NDArray[np.float32]:
        """(n, C) of one fold model, uncalibrated; of the test set as it is kept, in float16."""
        if images.ids is None:
            return self._predicted(member, fold, images)
        run = self._runs[member.run]
        kept = KeptPredictions(run.store, images.state, self._tta.name)
        shape = len(images.files), len(self.classes)
        log_prob = kept.read(member.candidate, member.variant, fold, shape)
        if log_prob is None:
            log_prob = self._predicted(member, fold, images).astype(np.float16)
            kept.write(member.candidate, member.variant, fold, log_prob)
        return log_prob.astype(np.float32)

    def _predicted(self, member: MemberRecord, fold: int, images: _Images) -> NDArray[np.float32]:
        """(n, C) of one fold model that is opened and run."""
        run = self._runs[member.run]
        model = run.open(member.candidate, member.variant, fold)
        source = run.images(images.files, model.model_config, self._workers, images.session)
        settings = loader_settings(self._workers, self._device.type)
        loader = scoring_loader(
            source, np.arange(len(source)), model.model_config, BATCH, settings, run.parts
        )
        seen = AveragedViews(model.module, self._tta, model.model_config.activation)
        # Averaged log-probabilities: softmax leaves them as they are.
        return log_probabilities(seen, loader, self._device, model.autocast, "softmax")[0]


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


def _name(member: MemberRecord) -> str:
    """The name in messages: `c0003 ema`, of another run `c0003 ema of RUN`."""
    return member_name(Member(member.candidate, member.variant, run=member.run))


def _check_rule(store: RunStore, ensemble: EnsembleRecord) -> None:
    try:
        decide(ensemble.rule, np.full((1, len(store.classes())), 1.0))
    except ValueError as error:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json", f"{error}; blend again: `ensemble {store.root}`"
        ) from error


def _run_of(store: RunStore, ensemble: EnsembleRecord, run: str) -> RunStore:
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


def _counter(on_model: OnModel) -> Callable[[], None]:
    """A function that calls `on_model` with 1, 2, 3, ..."""
    done = 0

    def count_model() -> None:
        nonlocal done
        done += 1
        on_model(done)

    return count_model
