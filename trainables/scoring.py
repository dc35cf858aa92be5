"""A variant's probabilities on the fold's rows, and how good they are.

Takes a model and the trial's data, gives `Scored`: the same on every device of the trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from experiment.metrics import log_loss_of_true
from experiment.records import Oof, VariantScore
from trainables.activations import log_probs
from trainables.data import Batch
from trainables.devices import precision_of
from trainables.learner import Learner
from trainables.mixing import soft_targets
from trainables.predict import all_logits, autocast_for
from trainables.spec import TrialSpec
from trainables.trial_data import TrialData


@dataclass(frozen=True)
class Scored:
    """`loss` is the training loss, `logloss` the score: NaN where a probability is not finite."""

    loss: float
    accuracy: float
    logloss: float
    oof: Oof

    def at(self, epoch: int) -> VariantScore:
        """For the trial's record."""
        return VariantScore(
            rows=len(self.oof.true_prob),
            val_logloss=self.logloss,
            val_acc=self.accuracy,
            best_epoch=epoch,
        )


def score(
    model: nn.Module, learner: Learner, data: TrialData, spec: TrialSpec, batches: Iterable[Batch]
) -> Scored:
    """`batches` are those of `data.scoring`."""
    autocast = autocast_for(learner.device, precision_of(spec, learner.device))
    logits, rows = all_logits(model, batches, learner.device, autocast)
    if learner.accelerator.num_processes > 1:
        logits, rows = _gathered(logits, rows)
    if not np.array_equal(rows, data.rows):
        raise RuntimeError(f"scored rows {rows[:5]}... are not the fold's, each once")
    labels = data.labels[rows]
    on_device = torch.from_numpy(labels).to(logits.device)
    targets = soft_targets(on_device, data.classes, spec.params.label_smoothing)
    loss = learner.criterion(logits, targets)
    log_prob = log_probs(logits, data.card.activation).cpu().numpy()
    oof = oof_of(log_prob, labels)
    finite = bool(np.isfinite(log_prob).all())
    return Scored(
        float(loss),
        float((log_prob.argmax(1) == labels).mean()),
        log_loss_of_true(oof.true_prob) if finite else math.nan,
        oof,
    )


def oof_of(log_prob: NDArray[np.float32], labels: NDArray[np.int64]) -> Oof:
    """What the run folder keeps of log-probabilities (n, C) for labels (n,)."""
    true_log_prob = log_prob[np.arange(len(labels)), labels]
    true_prob = np.minimum(np.exp(true_log_prob), np.float32(1))  # rounding may lift it above
    return Oof(np.maximum(log_prob, np.finfo(np.float16).min).astype(np.float16), true_prob)


def _gathered(logits: Tensor, rows: NDArray[np.int64]) -> tuple[Tensor, NDArray[np.int64]]:
    """Every device's rows, in the order of the rows."""
    shares = gather_object([(logits.cpu(), rows)])
    all_rows = np.concatenate([share[1] for share in shares])
    order = np.argsort(all_rows)
    together = torch.cat([share[0] for share in shares])[order]
    return together.to(logits.device), all_rows[order]
