"""What is written about candidates, fold trials and blends: frozen, validated, JSON both ways.

Everybody reads and writes these through `foldrace.run_folder.store`.

The variants of a fold trial that every part knows by name; snapshots and soups have their own.

Imports nothing: the blend uses it without the records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from foldrace.core.metrics import MetricScore

RAW = "raw"
"""The weights as they were trained."""
EMA = "ema"
"""Their exponential moving average."""


TrialStatus = Literal["finished", "stopped", "diverged", "failed"]
"""`stopped`: in mid-training, by the epoch-level rule; it has no OOF rows."""
CandidateStatus = Literal["complete", "running", "stopped", "unfinished", "diverged", "failed"]
STATUSES: tuple[CandidateStatus, ...] = get_args(CandidateStatus)
"""In the order in which candidates are counted for people."""

RaceAction = Literal["continue", "stop", "complete"]
ACTION_WORDS: dict[RaceAction, Literal["goes on", "stopped", "complete"]] = {
    "continue": "goes on",
    "stop": "stopped",
    "complete": "complete",
}
"""What a decision means for its candidate, in words for people."""


class _Record(BaseModel):
    # Unknown keys are ignored: a run folder of a newer version stays readable.
    # NaN is refused when a record is made: JSON cannot hold it, and it could not be read back.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class CandidateRecord(_Record):
    """One backbone with one set of hyperparameters, written when it is suggested."""

    candidate: str
    backbone: str
    params: dict[str, int | float | str]


class VariantScore(_Record):
    """One set of weights of a fold trial, scored on the fold's rows."""

    rows: int
    val_logloss: float
    val_acc: float
    best_epoch: int
    ingredients: tuple[str, ...] = ()
    """Of a soup: the members whose weights were averaged, `c0003 ema`, the best first. Several
    candidates are in it, so it judges none of them."""


class TrialRecord(_Record):
    """The truth about one fold trial; written last, so that its files are whole."""

    candidate: str
    fold: int
    status: TrialStatus
    backbone: str
    params: dict[str, int | float | str]
    folds_hash: str
    seed: int
    variants: dict[str, VariantScore] = {}
    epochs_trained: int = 0
    seconds: float = 0.0
    """Wall seconds of the fold trial, from its first line to its written record."""
    node: str = ""
    device: str = ""
    accelerators: tuple[str, ...] = ()
    """Device ids that the scheduler gave to this trial."""
    micro_batch: int = 0
    error: str | None = None
    notes: tuple[str, ...] = ()
    """What it warned of, each text once."""

    @property
    def best(self) -> str | None:
        """The variant with the lower log loss, soups left out; raw on a tie."""
        own = [name for name, score in self.variants.items() if not score.ingredients]
        return min(own, key=lambda v: (self.variants[v].val_logloss, v != RAW, v), default=None)


class RaceDecision(_Record):
    """What the race decided after a fold of a candidate, or at an epoch of its first fold, and the
    numbers that it went by. A fold has one: of several the last."""

    number: int
    """Of the decision in its sweep: they are in the order in which they were made."""
    candidate: str
    fold: int
    epoch: int | None = None
    """Epochs trained of that fold, for a decision in mid-training; None after a whole fold."""
    rule: str
    """`gain`, `forgiving`, `none`, or `epoch` for one in mid-training."""
    action: RaceAction
    """`complete`: the candidate's last fold has ended well, and it joins the race's blend."""
    variant: str | None = None
    """The better one, which decided."""
    folds_done: int
    rows: int
    """Rows that it was judged on: those of its finished folds, or of the running one."""
    gain: float | None = None
    """Bounded gain over the race's blend on those rows, in nats a row; None where there was none
    yet or the rows cannot be read. Of `complete`: over the blend without the candidate."""
    gain_se: float | None = None
    z: float | None = None
    score: float | None = None
    """`forgiving`: the candidate's mean log loss. `epoch`: the log loss at that epoch."""
    limit: float | None = None
    """What `score` was compared with: the worst fold of the best complete candidate, or the rung's
    cut."""
    complete: int
    """Complete candidates by then; of a decision `complete`, the candidate itself among them."""
    blend_logloss: float | None = None
    """Of the race's blend of these on all rows; None while it has no members."""
    epochs_trained: int
    """Epochs of all fold trials of the sweep that have ended by then, stopped ones included."""
    reason: str
    """In one line, for people."""

    @property
    def line(self) -> str:
        """For the log: `c0012 stopped after fold 1: gain -0.0031 ± 0.0009`."""
        place = f"after fold {self.fold}"
        if self.epoch is not None:
            place = f"after epoch {self.epoch} of fold {self.fold}"
        return f"{self.candidate} {ACTION_WORDS[self.action]} {place}: {self.reason}"


@dataclass(frozen=True)
class Oof:
    """Probabilities of one variant on the rows of one fold."""

    log_prob: NDArray[np.float16]  # (n, C) natural log
    true_prob: NDArray[np.float32]  # (n,) from the float32 softmax


class MemberRecord(_Record):
    """One member of a blend. `temperature` 1 means uncalibrated."""

    candidate: str
    variant: str
    weight: float
    temperature: float = 1.0
    run: str = ""
    """The run folder that holds it; empty: this one."""
    added: bool = False
    """Predictions made elsewhere (`ensemble --add`): `ensemble/added/<candidate>/` holds them."""
    oof_logloss: float | None = None
    """Of the member alone, uncalibrated; None in the records of a version that kept none."""
    gain: float | None = None
    """How much the OOF log loss rises without it, in nats. Where the method fits the weights: the
    least loss that a mixture of the members can have. Where it gives all the same (`uniform`,
    `top-k`, `soft-vote`, `snapshot`): the loss of their mean, which may fall. None where the blend
    is no mixture, and beyond the 50 heaviest members."""
    ms_per_image: float | None = None
    """Of all its fold models together; None where it was not measured."""
    weight_bytes: int | None = None


class ReliabilityBin(_Record):
    """Rows whose highest probability lies in one of equally wide bins of [0, 1]."""

    rows: int
    confidence: float
    """Mean of the highest probability."""
    accuracy: float


class Reliability(_Record):
    """How honest the confidence is: cross-fitted predictions."""

    ece: float
    """Expected calibration error: mean over rows of |confidence - accuracy| of their bin."""
    bins: tuple[ReliabilityBin, ...]


class CalibrationTrial(_Record):
    """One way to calibrate, cross-fitted."""

    members: bool
    blend: bool
    crossfit_logloss: float
    crossfit_se: float


class Calibration(_Record):
    """Which temperatures were kept, and why."""

    members: bool
    blend: bool
    tried: tuple[CalibrationTrial, ...]
    before: Reliability
    """Without any temperature."""
    after: Reliability
    """With those that were kept."""


class MethodTrial(_Record):
    """One method that `ensemble.method: auto` tried, with the temperatures that suit it."""

    method: str
    crossfit_logloss: float
    crossfit_se: float


class CurvePoint(_Record):
    """The best blend found within a limit of time."""

    ms_per_image: float
    oof_logloss: float
    members: int


class NearDuplicates(_Record):
    """Rows that resemble an image of another fold or of the test set."""

    rows: int
    oof_logloss_without: float | None
    """Of the blend on the other rows; None where there are none."""


class UnvalidatedRecord(_Record):
    """Test predictions without OOF rows: averaged into the submission, backed by no score."""

    name: str
    weight: float


class HeldOutScore(_Record):
    """With `k: 1` and a `test_fraction`: the blend on rows that no trial and no choice has seen."""

    rows: int
    logloss: float
    accuracy: float
    metrics: tuple[MetricScore, ...] = ()


class EnsembleRecord(_Record):
    """`ensemble.json`: the blend and what is known about it."""

    method: str
    members: tuple[MemberRecord, ...]
    oof_logloss: float
    crossfit_logloss: float
    crossfit_se: float
    certificate: float | None
    """Upper bound on `mixture_logloss` minus the least loss that any weights could have; None where
    the blend is no weighted mean of probabilities."""
    best_single_oof_logloss: float
    best_single: str
    best_single_calibrated_logloss: float | None = None
    """The least OOF loss of one member at a temperature of its own: what of the blend's gain is
    calibration; None without calibration."""
    oof_accuracy: float
    last_fold_logloss: float
    members_considered: int
    candidates_considered: int
    members_without_weights: int = 0
    """Left out, since their weights are not there any more (`ensemble.keep: blend`)."""
    folds_hash: str
    metrics: tuple[MetricScore, ...] = ()
    """Every metric of the table, of the blend's OOF probabilities."""
    held_out: HeldOutScore | None = None
    pooling: str = "arithmetic"
    """`arithmetic`, `geometric`, `votes` or `stacking`: how members are combined."""
    mixture_logloss: float | None = None
    """Before the temperature of the blend."""
    blend_temperature: float = 1.0
    calibration: Calibration | None = None
    methods_tried: tuple[MethodTrial, ...] = ()
    """With `ensemble.method: auto`: `method` is the one of these with the least loss."""
    ms_per_image: float | None = None
    """Of all fold models; None where a member's was not measured."""
    device: str = ""
    """What `ms_per_image` was measured on."""
    weight_bytes: int | None = None
    curve: tuple[CurvePoint, ...] = ()
    """With a limit of time: loss against time."""
    duplicates: tuple[tuple[str, ...], ...] = ()
    """Members with the same probabilities: only the first of each was considered."""
    near_duplicates: NearDuplicates | None = None
    unvalidated: tuple[UnvalidatedRecord, ...] = ()
    combiner: str = "combiner.safetensors"
    """The file in `ensemble/` with what the combiner knows beyond the weights; empty: nothing."""
    digests: dict[str, str] = {}
    """File in `ensemble/` -> blake2b of its bytes: only a file that has it is of this blend.
    Empty in those of a version that wrote none."""

    @property
    def fair_single_logloss(self) -> float:
        """The best single member treated as the blend is: calibrated where the blend is."""
        calibrated = self.best_single_calibrated_logloss
        return self.best_single_oof_logloss if calibrated is None else calibrated


@dataclass(frozen=True)
class CandidateSummary:
    """One row of the leaderboard, from a candidate and its trials."""

    candidate: CandidateRecord
    status: CandidateStatus
    trials: tuple[TrialRecord, ...]  # by fold
    folds: int
    decisions: tuple[RaceDecision, ...] = ()  # by number

    @property
    def settled(self) -> bool:
        """Whether no further fold of the candidate is trained."""
        return self.status not in ("running", "unfinished")

    @property
    def gain(self) -> float | None:
        """Of the latest decision that knew one."""
        known = [d for d in self.decisions if d.gain is not None]
        return known[-1].gain if known else None

    @property
    def gain_se(self) -> float | None:
        """Standard error of `gain`."""
        known = [d for d in self.decisions if d.gain is not None]
        return known[-1].gain_se if known else None

    @cached_property
    def finished(self) -> tuple[TrialRecord, ...]:
        return tuple(t for t in self.trials if t.status == "finished")

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """Variants that every finished fold has, raw first."""
        if not self.finished:
            return ()
        shared = set.intersection(*(set(t.variants) for t in self.finished))
        return tuple(sorted(shared, key=lambda v: (v != RAW, v)))

    def pooled_logloss(self, variant: str) -> float:
        """Mean over all rows of the finished folds, not mean of fold means."""
        scores = [t.variants[variant] for t in self.finished]
        return math.fsum(s.rows * s.val_logloss for s in scores) / sum(s.rows for s in scores)

    def pooled_accuracy(self, variant: str) -> float:
        scores = [t.variants[variant] for t in self.finished]
        return math.fsum(s.rows * s.val_acc for s in scores) / sum(s.rows for s in scores)

    @cached_property
    def own_variants(self) -> tuple[str, ...]:
        """`variants` without soups, in which there are several candidates."""
        return tuple(
            v for v in self.variants if not any(t.variants[v].ingredients for t in self.finished)
        )

    @cached_property
    def best(self) -> str | None:
        """The variant with the lower pooled log loss, soups left out; raw on a tie."""
        return min(self.own_variants, key=self.pooled_logloss, default=None)

    @property
    def last_fold_logloss(self) -> float | None:
        """Of the better variant on the last fold, where that has been trained."""
        last = [t for t in self.finished if t.fold == self.folds - 1]
        return last[0].variants[self.best].val_logloss if last and self.best else None
