"""The fold models of one run folder, ready to be run as they were scored.

Takes a run folder and a device; gives a fold's model with its card and precision, and the images
that it sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from experiment.errors import RunFolderError
from experiment.records import TrialRecord
from experiment.store import RunStore, weights_name
from trainables.card import ModelCard
from trainables.classifier import Classifier
from trainables.losses import LOSSES
from trainables.pixel_cache import ImageSource, open_images
from trainables.predict import autocast_for, read_card, resolve_precision, unpack_classifier

BATCH = 64  # images; only speed depends on it
State = dict[str, torch.Tensor]

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


@dataclass(frozen=True, eq=False)
class FoldModel:
    """One fold's model of a member: in evaluation mode, on the device."""

    module: Classifier
    card: ModelCard
    autocast: torch.autocast


class RunModels:
    """The fold models of a run folder."""

    def __init__(self, store: RunStore, device: torch.device) -> None:
        self.store, self.device = store, device
        self._config, self._classes = store.config(), len(store.classes())

    def open(self, candidate: str, variant: str, fold: int) -> FoldModel:
        """RunFolderError where the weights are gone or damaged."""
        try:
            data = self.store.weights(candidate, fold, variant)
            card = read_card(data)
            module = unpack_classifier(data, card).to(self.device)
        except _UNREADABLE as error:
            raise self._unreadable(candidate, variant, fold, error) from error
        return FoldModel(module, card, self.autocast(candidate, fold))

    def state(self, candidate: str, variant: str, fold: int) -> State:
        """The weights alone, on the CPU; errors as in `open`."""
        try:
            return load(self.store.weights(candidate, fold, variant))
        except _UNREADABLE as error:
            raise self._unreadable(candidate, variant, fold, error) from error

    def card(self, trial: TrialRecord) -> ModelCard:
        """The card that lies in the trial's weights, without reading them: a weights file is read
        whole. The run's plugins must be loaded."""
        params = trial.params
        return ModelCard(
            trial.backbone,
            self._classes,
            int(params.get("image_size", 0)),
            str(params.get("head", "linear")),
            self._config.training.meta_features,
            LOSSES[str(params.get("loss", "cross_entropy"))].activation,
        )

    def precision(self, trial: TrialRecord | None) -> str:
        """What this device would have scored the trial's model in."""
        sam_rho = float(trial.params.get("sam_rho", 0.0)) if trial is not None else 0.0
        return resolve_precision(self.device, self._config.training.precision, sam_rho)

    def autocast(self, candidate: str, fold: int) -> torch.autocast:
        return autocast_for(self.device, self.precision(self.store.trial(candidate, fold)))

    def images(
        self, files: Sequence[Path], card: ModelCard, workers: int, session: str
    ) -> ImageSource:
        """As this run's trials saw theirs; `session` as in `open_images`."""
        return open_images(files, card.image_size, max(1, workers), self._config.cache, session)

    def _unreadable(
        self, candidate: str, variant: str, fold: int, error: Exception
    ) -> RunFolderError:
        return RunFolderError.single(
            f"{self.store.root}/{weights_name(candidate, fold, variant)}",
            f"cannot be read as weights: {error}; delete the folder of that fold and resume",
        )


def best_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
