"""Probabilities of a run's blend for any images.

Takes a run folder and image files, gives an (n, C) array: per member the mean over its K fold
models, then the weighted mean over the members. Only the selected checkpoints are read.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError

from experiment.errors import RunFolderError
from experiment.metrics import normalise
from experiment.plugins import naming_plugins
from experiment.records import MemberRecord
from experiment.store import RunStore, weights_name
from inference.plugins import use_run_plugins
from inference.tta import AveragedViews, find_tta
from trainables.card import ModelCard
from trainables.classifier import Classifier
from trainables.data import loader_settings
from trainables.pixel_cache import ImageSource, open_images
from trainables.predict import (
    autocast_for,
    log_probabilities,
    read_card,
    resolve_precision,
    scoring_loader,
    unpack_classifier,
)

_BATCH = 64  # images; only speed depends on it


class Predictor:
    """The blend of one run folder.

    >>> Predictor(RunStore.open("runs/cars")).probabilities([Path("car.jpg")])  # (1, C)
    """

    def __init__(self, store: RunStore, workers: int = 1, tta: str = "none") -> None:
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
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        config = store.config()
        self._cache = config.cache
        self._precision = config.training.precision

    @property
    def models(self) -> int:
        """Fold models that a prediction runs."""
        return len(self.ensemble.members) * self.store.fold_count

    def probabilities(
        self, files: Sequence[Path], on_model: Callable[[int], None] = lambda done: None
    ) -> NDArray[np.float64]:
        """(n, C), rows sum to 1. `on_model` hears how many of `models` are done."""
        use_run_plugins(self.store)  # another run's may have been loaded since
        with naming_plugins():
            return self._blended(files, on_model)

    def _blended(
        self, files: Sequence[Path], on_model: Callable[[int], None]
    ) -> NDArray[np.float64]:
        total: NDArray[np.float64] = np.zeros((len(files), len(self.classes)))
        done, session = 0, uuid.uuid4().hex  # of the pixel cache: the files are looked at once
        for member in self.ensemble.members:
            mean: NDArray[np.float64] = np.zeros_like(total)
            for fold in range(self.store.fold_count):
                found = self._fold_probabilities(member, fold, files, session)
                mean += found / self.store.fold_count
                done += 1
                on_model(done)
            total += member.weight * normalise(mean)
        return normalise(total)

    def _fold_probabilities(
        self, member: MemberRecord, fold: int, files: Sequence[Path], session: str
    ) -> NDArray[np.float64]:
        model, card = self._classifier(member, fold)
        source: ImageSource = open_images(
            files, card.image_size, max(1, self._workers), self._cache, session
        )
        settings = loader_settings(self._workers, self._device.type)
        loader = scoring_loader(source, np.arange(len(files)), card, _BATCH, settings)
        seen = AveragedViews(model, self._tta, card.activation)
        # Averaged log-probabilities: softmax leaves them as they are.
        autocast = self._autocast(member, fold)
        log_prob, _ = log_probabilities(seen, loader, self._device, autocast, "softmax")
        return normalise(np.exp(log_prob.astype(np.float64)))

    def _autocast(self, member: MemberRecord, fold: int) -> torch.autocast:
        """The precision that this device would have scored the model in."""
        trial = self.store.trial(member.candidate, fold)
        sam_rho = float(trial.params.get("sam_rho", 0.0)) if trial is not None else 0.0
        return autocast_for(self._device, resolve_precision(self._device, self._precision, sam_rho))

    def _classifier(self, member: MemberRecord, fold: int) -> tuple[Classifier, ModelCard]:
        """A fold's model, on the device."""
        try:
            data = self.store.weights(member.candidate, fold, member.variant)
            card = read_card(data)
            return unpack_classifier(data, card).to(self._device), card
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            name = weights_name(member.candidate, fold, member.variant)
            raise RunFolderError.single(
                f"{self.store.root}/{name}",
                f"cannot be read as weights: {error}; delete the folder of that fold and resume",
            ) from error
