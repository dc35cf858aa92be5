"""The history of a training: scores of each epoch, the log, and the checkpoints to write.

Takes a model and the trial's data, gives `FoldScore`, the same on every device of the trial; takes
the scores of each epoch, gives the checkpoints that are written.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from foldrace.config.hyperparameters import TrialParams
from foldrace.core.metrics import log_loss_of_true
from foldrace.core.temperature import calibrated_log_loss
from foldrace.run_folder.records import Oof, VariantScore
from foldrace.run_folder.variants import RAW
from foldrace.trainables.data.loader import Batch
from foldrace.trainables.data.mixing import soft_targets
from foldrace.trainables.data.trial_data import TrialData
from foldrace.trainables.devices import precision_of
from foldrace.trainables.losses import log_probs
from foldrace.trainables.predict import all_logits, autocast_for
from foldrace.trainables.schedules import cycle_ends
from foldrace.trainables.spec import EpochReport, FoldTrial
from foldrace.trainables.state import TrainState


@dataclass(frozen=True)
class FoldScore:
    """A variant's probabilities on the fold's rows, and how good they are."""

    loss: float
    """The training loss on these rows."""
    accuracy: float
    logloss: float
    """Log loss of the probabilities as they are; NaN where one is not finite."""
    calibrated: float
    """Log loss at the temperature fitted on these rows, which every choice goes by; NaN alike."""
    oof: Oof

    def at(self, epoch: int) -> VariantScore:
        """The score as the trial's record has it."""
        return VariantScore(
            rows=len(self.oof.true_prob),
            val_logloss=self.logloss,
            calibrated_logloss=self.calibrated,
            val_acc=self.accuracy,
            epoch=epoch,
        )


def score_fold(
    train_state: TrainState, data: TrialData, trial: FoldTrial, batches: Iterable[Batch]
) -> dict[str, FoldScore]:
    """Variant -> score on the fold's rows; `batches`, read once, are those of `data.scoring`."""
    autocast = autocast_for(train_state.device, precision_of(trial, train_state.device))
    variants = train_state.variants()
    logits, rows = all_logits([*variants.values()], batches, train_state.device, autocast)
    found = zip(variants, logits, strict=True)
    return {name: _score(own, rows, train_state, data, trial) for name, own in found}


def _score(
    logits: Tensor,
    rows: NDArray[np.int64],
    train_state: TrainState,
    data: TrialData,
    trial: FoldTrial,
) -> FoldScore:
    """The score of (n, C) logits of these rows, this device's share of the fold's."""
    if train_state.accelerator.num_processes > 1:
        logits, rows = _gathered(logits, rows)
    if not np.array_equal(rows, data.rows):
        raise RuntimeError(f"scored rows {rows[:5]}... are not the fold's, each once")
    labels = data.labels[rows]
    on_device = torch.from_numpy(labels).to(logits.device)
    targets = soft_targets(on_device, data.classes, trial.params.label_smoothing)
    loss = train_state.criterion(logits, targets)
    log_prob = log_probs(logits, data.model_config.activation).cpu().numpy()
    oof = oof_of(log_prob, labels)
    finite = bool(np.isfinite(log_prob).all())
    logloss = log_loss_of_true(oof.true_prob) if finite else math.nan
    calibrated = calibrated_log_loss(log_prob, labels, oof.true_prob)
    # Every device has these rows, but the last bit may differ between kinds of CPU, and devices
    # that disagree on whether to train on would wait for each other for ever.
    logloss, calibrated = broadcast_object_list([logloss, calibrated])
    accuracy = float((log_prob.argmax(1) == labels).mean())
    return FoldScore(float(loss), accuracy, logloss, calibrated, oof)


def oof_of(log_prob: NDArray[np.float32], labels: NDArray[np.int64]) -> Oof:
    """The form in which the run folder has (n, C) log-probabilities for (n,) labels."""
    true_log_prob = log_prob[np.arange(len(labels)), labels]
    true_prob = np.minimum(np.exp(true_log_prob), np.float32(1))  # rounding may lift it above
    return Oof(np.maximum(log_prob, np.finfo(np.float16).min).astype(np.float16), true_prob)


def _gathered(logits: Tensor, rows: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
    """Logits and rows of all devices, in the order of the rows."""
    shares = gather_object([(logits.cpu(), rows)])
    all_rows = np.concatenate([share[1] for share in shares])
    order = np.argsort(all_rows)
    together = torch.cat([share[0] for share in shares])[order]
    return together.to(logits.device), all_rows[order]


@dataclass(frozen=True)
class Checkpoint:
    """A variant's weights and scores at one epoch, on the CPU."""

    score: VariantScore
    oof: Oof
    weights: dict[str, Tensor]


@dataclass
class History:
    """The log of a training and the weights that it writes, above all those after its last epoch.

    A fold's own best epoch would be chosen on the rows that score it, and differ between folds.
    Snapshots are raw weights of fixed epochs: with warm restarts the ends of the last cycles but
    the last one (Huang et al., Snapshot Ensembles, ICLR 2017), else the epochs right before the
    last one.
    """

    last: int
    """The last epoch, from 0."""
    snapshots: tuple[int, ...] = ()
    """Earlier epochs whose raw weights are kept, in their order."""
    kept: dict[str, Checkpoint] = field(default_factory=dict)
    """Variant -> its checkpoint, once its epoch is over."""
    log: list[EpochReport] = field(default_factory=list)
    diverged: bool = False

    @classmethod
    def of(cls, params: TrialParams) -> History:
        """An empty history of a trial with these hyperparameters."""
        ends: Sequence[int] = range(params.epochs)
        if params.cycles > 1:
            ends = cycle_ends(params.epochs, params.cycles)
        *earlier, last = ends
        return cls(last, tuple(earlier[-params.snapshots :] if params.snapshots else ()))

    def keep(self, models: Mapping[str, nn.Module], scores: Mapping[str, FoldScore]) -> None:
        """Copy the models that are written, after an epoch that is in the log."""
        epoch = self.log[-1].epoch
        if epoch == self.last:
            ended = {
                name: _checkpoint(model, scores[name], epoch) for name, model in models.items()
            }
            self.kept = ended | self.kept
        elif epoch in self.snapshots:
            name = f"snap{self.snapshots.index(epoch) + 1}"
            self.kept[name] = _checkpoint(models[RAW], scores[RAW], epoch)

    def variants(self) -> dict[str, Checkpoint]:
        """Variant -> the checkpoint that is written; none of a training that diverged."""
        return {} if self.diverged else self.kept

    def log_csv(self) -> str:
        """The text of train_log.csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(EpochReport)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in self.log)
        return text.getvalue()


def _checkpoint(model: nn.Module, score: FoldScore, epoch: int) -> Checkpoint:
    weights = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
    return Checkpoint(score.at(epoch), score.oof, weights)
