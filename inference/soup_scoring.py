"""Several checkpoints' mean weights, scored on each fold's own validation images.

Takes a run's members of one architecture; gives what a fold trial would have written had it ended
with these weights.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.core.metrics import log_loss_of_true
from foldrace.core.temperature import calibrated_log_loss
from foldrace.inference.run_models import BATCH, RunModels, State
from foldrace.run_folder.belonging import training_data
from foldrace.run_folder.records import Oof, VariantScore
from foldrace.trainables.data.loader import loader_settings
from foldrace.trainables.history import oof_of
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.models.weights import load_tensors
from foldrace.trainables.predict import log_probabilities, scoring_loader


@dataclass(frozen=True)
class Ingredient:
    """A member that a soup may be made of."""

    candidate: str
    variant: str
    calibrated_logloss: float
    """Pooled calibrated log loss in its trials' records, in nats."""

    @property
    def name(self) -> str:
        """Name in records and messages: `c0003 ema`."""
        return f"{self.candidate} {self.variant}"


@dataclass(frozen=True, eq=False)
class AveragedModel:
    """The mean of some members' weights, fold by fold."""

    ingredients: tuple[Ingredient, ...]
    folds: tuple[Oof, ...]
    accuracies: tuple[float, ...]
    calibrated: tuple[float, ...]
    """Calibrated log loss of each fold, in nats; NaN where a probability is no number."""

    @property
    def oof_calibrated_logloss(self) -> float:
        """Pooled over all rows, calibrated by fold; infinite where a probability is no number."""
        rows = [len(oof.true_prob) for oof in self.folds]
        loss = float(np.average(self.calibrated, weights=rows))
        return loss if math.isfinite(loss) else math.inf

    @property
    def oof_logloss(self) -> float:
        """Uncalibrated, pooled over all rows; infinite where a probability is no number."""
        true_prob = np.concatenate([oof.true_prob for oof in self.folds])
        return log_loss_of_true(true_prob) if np.isfinite(true_prob).all() else math.inf

    def score(self, fold: int, epoch: int) -> VariantScore:
        """For the fold trial's record."""
        oof = self.folds[fold]
        return VariantScore(
            rows=len(oof.true_prob),
            val_logloss=log_loss_of_true(oof.true_prob),
            calibrated_logloss=self.calibrated[fold],
            val_acc=self.accuracies[fold],
            epoch=epoch,
            ingredients=tuple(ingredient.name for ingredient in self.ingredients),
        )


class Scorer:
    """Scores as fold trials do, on this process's device."""

    def __init__(self, models: RunModels, workers: int) -> None:
        self.models, self._workers = models, workers
        self._session = uuid.uuid4().hex  # of the pixel cache: the files are looked at once

    def average(
        self, ingredients: Sequence[Ingredient], model_config: ModelConfig
    ) -> AveragedModel:
        """The mean of the ingredients' weights, for each fold of that fold's checkpoints."""
        folds, accuracies, calibrated = [], [], []
        for fold in range(self.models.store.fold_count):
            rows, labels = self._rows(fold)
            log_prob = self._log_prob(ingredients, model_config, fold, rows)
            folds.append(oof_of(log_prob, labels))
            accuracies.append(float((log_prob.argmax(axis=1) == labels).mean()))
            calibrated.append(calibrated_log_loss(log_prob, labels, folds[-1].true_prob))
        return AveragedModel(tuple(ingredients), tuple(folds), tuple(accuracies), tuple(calibrated))

    def weights(self, ingredients: Sequence[Ingredient], fold: int) -> State:
        """The mean of one fold's checkpoints, on the CPU."""
        return averaged(self.models.state(i.candidate, i.variant, fold) for i in ingredients)

    def _log_prob(
        self,
        ingredients: Sequence[Ingredient],
        model_config: ModelConfig,
        fold: int,
        rows: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        models = self.models
        module = build_classifier(model_config, parts=models.parts)
        load_tensors(module, self.weights(ingredients, fold))
        source = models.images(self._files, model_config, self._workers, self._session)
        settings = loader_settings(self._workers, models.device.type)
        loader = scoring_loader(source, rows, model_config, BATCH, settings, models.parts)
        autocast = models.autocast(ingredients[0].candidate, fold)
        module = module.to(models.device)
        return log_probabilities(module, loader, models.device, autocast, model_config.activation)[
            0
        ]

    def _rows(self, fold: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(n,) rows of the fold, and their labels."""
        rows = self.models.store.folds().rows_of(fold)
        return rows, self.models.store.labels()[rows]

    @cached_property
    def _files(self) -> list[Path]:
        """Of every row, as the trials listed them: they share one entry of the pixel cache."""
        manifest = training_data(self.models.store)
        return [manifest.file(row) for row in range(len(manifest))]


def averaged(states: Iterable[State]) -> State:
    """The mean of equally shaped weights, two of them in memory at a time.

    Floating tensors are summed in float32, also the running statistics of batch norms (a mean of
    statistics, not those of the mean weights, which would need a pass over training images);
    whatever counts in integers is the first one's. ValueError on other names or shapes.
    """
    first: State = {}
    total: State = {}
    count = 0
    for state in states:
        count += 1
        if count == 1:
            first = state
            total = {n: t.float().clone() for n, t in state.items() if t.is_floating_point()}
            continue
        _require_equal_shapes(first, state)
        for name, tensor in total.items():
            tensor += state[name].float()
    mean = {name: (tensor / count).to(first[name].dtype) for name, tensor in total.items()}
    return first | mean


def _require_equal_shapes(first: State, other: State) -> None:
    if {n: t.shape for n, t in first.items()} != {n: t.shape for n, t in other.items()}:
        raise ValueError("weights of other names or shapes cannot be averaged")
