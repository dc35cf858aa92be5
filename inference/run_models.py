"""The fold models of one run folder, ready to be run as they were scored.

Takes a run folder, gives a `FoldModel` of a candidate's weights, built by its trial's record: the
header of a weights file only has to agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from foldrace.core.errors import RunFolderError, UserError, message_line
from foldrace.inference.plugins import run_parts
from foldrace.run_folder.records import TrialRecord
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trials import weights_name
from foldrace.trainables.data.pixel_cache import ImageSource, open_images
from foldrace.trainables.models.classifier import Classifier, ModelConfig, trial_model_config
from foldrace.trainables.predict import autocast_for, resolve_precision, unpack_classifier

BATCH = 64  # images; only speed depends on it
State = dict[str, torch.Tensor]

_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, RuntimeError, MemoryError),
    *(SafetensorError, UserError),
)


@dataclass(frozen=True, eq=False)
class FoldModel:
    """One fold's model of a member: in evaluation mode, on the device."""

    module: Classifier
    model_config: ModelConfig
    autocast: torch.autocast
    precision: str = "fp32"
    """What `autocast` is of."""


class RunModels:
    """The fold models of a run folder."""

    def __init__(self, store: RunStore, device: torch.device) -> None:
        self.store, self.device = store, device
        self._config, self._classes = store.config(), len(store.classes())
        self.parts = run_parts(store)

    def open(self, candidate: str, variant: str, fold: int) -> FoldModel:
        """The model of the trial's record.

        RunFolderError where the weights are gone, damaged or of another model.
        """
        trial = self.store.trial(candidate, fold)
        try:
            if trial is None:
                raise ValueError("there is no trial.json that says what they are of")
            model_config = self.model_config(trial)
            data = self.store.weights(candidate, fold, variant)
            module = unpack_classifier(data, model_config, self.parts).to(self.device)
        except _UNREADABLE as error:
            raise self._unreadable(candidate, variant, fold, error) from error
        precision = self.precision(trial)
        return FoldModel(module, model_config, autocast_for(self.device, precision), precision)

    def state(self, candidate: str, variant: str, fold: int) -> State:
        """The weights alone, on the CPU; errors as in `open`."""
        try:
            return load(self.store.weights(candidate, fold, variant))
        except _UNREADABLE as error:
            raise self._unreadable(candidate, variant, fold, error) from error

    def model_config(self, trial: TrialRecord) -> ModelConfig:
        """The config that lies in the trial's weights, without reading them.

        A weights file is read whole.
        """
        meta = self._config.training.meta_features
        return trial_model_config(trial, self._classes, meta, self.parts)

    def precision(self, trial: TrialRecord | None) -> str:
        """The precision in which this device would have scored the trial's model."""
        params = self._config.fixed | (trial.params if trial is not None else {})
        return resolve_precision(self.device, str(params["precision"]), float(params["sam_rho"]))

    def autocast(self, candidate: str, fold: int) -> torch.autocast:
        """The context in which the fold model is run."""
        return autocast_for(self.device, self.precision(self.store.trial(candidate, fold)))

    def images(
        self, files: Sequence[Path], model_config: ModelConfig, workers: int, session: str
    ) -> ImageSource:
        """The images as this run's trials saw theirs; `session` as in `open_images`."""
        return open_images(
            files, model_config.image_size, max(1, workers), self._config.cache, session
        )

    def _unreadable(
        self, candidate: str, variant: str, fold: int, error: Exception
    ) -> RunFolderError:
        return RunFolderError.single(
            f"{self.store.root}/{weights_name(candidate, fold, variant)}",
            f"cannot be read as weights: {message_line(str(error))}; delete the folder of that "
            "fold and resume",
        )


def best_device() -> torch.device:
    """The GPU where there is one, NVIDIA's or Apple's."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
