"""How a training went: the log, and each variant at its best epoch.

Takes the scores of each epoch, gives the variants that are written.

A variant's probabilities on the fold's rows, and how good they are.

Takes a model and the trial's data, gives `Scored`: the same on every device of the trial.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from foldrace.core.metrics import log_loss_of_true
from foldrace.run_folder.records import RAW, Oof, VariantScore
from foldrace.trainables.data.loader import Batch
from foldrace.trainables.data.mixing import soft_targets
from foldrace.trainables.data.trial_data import TrialData
from foldrace.trainables.devices import precision_of
from foldrace.trainables.losses import log_probs
from foldrace.trainables.predict import all_logits, autocast_for
from foldrace.trainables.spec import EpochReport, TrialSpec
from foldrace.trainables.state import Learner


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


@dataclass(frozen=True)
class Kept:
    """A variant as it was at one epoch, on the CPU."""

    score: VariantScore
    oof: Oof
    state: dict[str, Tensor]


@dataclass
class Course:
    """`snapshots` further sets of raw weights are kept: the ends of the last cycles where
    `cycle_ends` gives some, else the next best epochs after the best one."""

    snapshots: int = 0
    cycle_ends: tuple[int, ...] = ()
    best: dict[str, Kept] = field(default_factory=dict)  # raw and ema at their best epochs
    further: list[Kept] = field(default_factory=list)
    log: list[EpochReport] = field(default_factory=list)
    diverged: bool = False

    def keep(self, models: Mapping[str, nn.Module], scored: Mapping[str, Scored]) -> None:
        """After an epoch that is in the log."""
        epoch = self.log[-1].epoch
        for name, model in models.items():
            new = scored[name]
            old = self.best.get(name)
            if old is None or new.logloss < old.score.val_logloss:
                self.best[name] = _kept(model, new, epoch)
                if name == RAW and old is not None and not self.cycle_ends:
                    self._keep_further(old)
            elif name == RAW and not self.cycle_ends and self._is_next_best(new):
                self._keep_further(_kept(model, new, epoch))
        if epoch in self.cycle_ends[-self.snapshots :] and self.snapshots:
            self.further.append(_kept(models[RAW], scored[RAW], epoch))

    def epochs_without_progress(self) -> int:
        return self.log[-1].epoch - max(kept.score.best_epoch for kept in self.best.values())

    def variants(self) -> dict[str, Kept]:
        """What is written; nothing of a training that diverged."""
        if self.diverged:
            return {}
        return self.best | {f"snap{i + 1}": kept for i, kept in enumerate(self.further)}

    def log_csv(self) -> str:
        """The text of train_log.csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(EpochReport)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in self.log)
        return text.getvalue()

    def _is_next_best(self, new: Scored) -> bool:
        worst = self.further[-1].score.val_logloss if self.further else math.inf
        some_are_kept = self.snapshots > 0  # else every epoch would be copied for nothing
        return some_are_kept and (len(self.further) < self.snapshots or new.logloss < worst)

    def _keep_further(self, kept: Kept) -> None:
        self.further.append(kept)
        self.further.sort(key=lambda k: (k.score.val_logloss, k.score.best_epoch))
        del self.further[self.snapshots :]


def _kept(model: nn.Module, scored: Scored, epoch: int) -> Kept:
    state = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
    return Kept(scored.at(epoch), scored.oof, state)
