"""Records of candidates, fold trials and race decisions: frozen, validated, JSON both ways.

`foldrace.run_folder.trials` reads and writes them; `CandidateSummary` is made of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from foldrace.config.hyperparameters import KNOBS
from foldrace.config.ranges import Value
from foldrace.run_folder.variants import RAW

TrialStatus = Literal["finished", "stopped", "diverged", "failed"]
"""`stopped`: in mid-training, by the epoch-level rule; it has no OOF rows."""
CandidateStatus = Literal[
    "complete", "running", "parked", "stopped", "unfinished", "diverged", "failed"
]
STATUSES: tuple[CandidateStatus, ...] = get_args(CandidateStatus)
"""In the order in which candidates are counted for people."""

RaceAction = Literal["continue", "park", "stop", "complete"]
ACTION_WORDS: dict[RaceAction, Literal["goes on", "parked", "stopped", "complete"]] = {
    "continue": "goes on",
    "park": "parked",
    "stop": "stopped",
    "complete": "complete",
}
"""Meaning of a decision for its candidate, in words for people."""


def _within_limits(params: dict[str, Value]) -> dict[str, Value]:
    for name, value in params.items():
        if name in KNOBS and not KNOBS[name].limits.contains(value):
            raise ValueError(f"{name}: got {value!r:.50}; allowed: {KNOBS[name].limits}")
    return params


# A record may come from anybody: what is read back is as narrow as what is written.
_PLAIN = "[A-Za-z0-9][A-Za-z0-9._-]{0,99}"
CandidateId = Annotated[str, Field(pattern="^c[0-9]{1,9}$")]
PlainName = Annotated[str, Field(pattern=f"^{_PLAIN}$")]
"""A name that may stand in a path: it never leads out of its folder."""
MemberName = Annotated[str, Field(pattern=f"^{_PLAIN} {_PLAIN}$")]
"""`c0003 ema`."""
Count = Annotated[int, Field(ge=0, le=10**15)]
Fold = Annotated[int, Field(ge=0, le=999)]
Seconds = Annotated[float, Field(ge=0, le=1e11)]
"""A time span, or a time since 1970: up to the year 5138."""
Fraction = Annotated[float, Field(ge=0, le=1 + 1e-6)]
"""A mean of numbers up to 1, as it was rounded."""
Logloss = Annotated[float, Field(ge=-1e12, le=1e12)]
"""Nats a row, or a difference of such."""
Params = Annotated[dict[str, Value], AfterValidator(_within_limits)]
"""Hyperparameter -> value, within its limits; of another version there may be unknown ones."""


class StoredRecord(BaseModel):
    """Base of what is written to the run folder as JSON."""

    # Unknown keys are ignored: a run folder of a newer version stays readable.
    # NaN is refused when a record is made: JSON cannot hold it, and it could not be read back.
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


TeacherName = Annotated[str, Field(pattern="^t[0-9a-f]{31}$")]
TeacherKind = Literal["blend", "best", "best-fold"]
"""`blend`: for each fold the blend of the models that were trained without it. `best`: its best
member alone. `best-fold`: one fold's model for all folds, which has seen their labels."""


class TeacherRef(StoredRecord):
    """The teacher that a student learns from."""

    digest: TeacherName
    """Folder in `teachers/`, and the digest of the record in it."""
    kind: TeacherKind
    unlabelled: Count = 0
    """Images without a label that the student learns from, too: by the teacher's word alone."""
    of_test_set: bool = False
    """True where these are the images of the run's test set."""

    @property
    def is_optimistic(self) -> bool:
        """True where the teacher has seen labels of the rows that score its students."""
        return self.kind == "best-fold"

    def __str__(self) -> str:
        """`blend + 120 unlabelled`, as tables show it."""
        marks = " (optimistic)" if self.is_optimistic else ""
        source = "test images" if self.of_test_set else "unlabelled"
        return f"{self.kind}{marks}" + (f" + {self.unlabelled} {source}" * (self.unlabelled > 0))


class CandidateRecord(StoredRecord):
    """One backbone with one set of hyperparameters, written when it is suggested."""

    candidate: CandidateId
    backbone: str
    params: Params
    """Hyperparameter -> value."""
    teacher: TeacherRef | None = None
    """The teacher of a student; None: it learns from labels alone."""

    @property
    def is_student(self) -> bool:
        """True where it learns from a teacher."""
        return self.teacher is not None

    @property
    def is_optimistic(self) -> bool:
        """True where its OOF rows are no honest score: it may not enter a blend."""
        return self.teacher is not None and self.teacher.is_optimistic


class VariantScore(StoredRecord):
    """One set of weights of a fold trial, scored on the fold's rows."""

    rows: Annotated[Count, Field(ge=1)]
    val_logloss: Logloss
    """Log loss of the probabilities as they are, in nats."""
    calibrated_logloss: Logloss
    """Log loss at the temperature fitted on these rows: what selects, since what is submitted is
    calibrated. At most `val_logloss`."""
    val_acc: Fraction
    epoch: Count
    """Epoch after which the weights were these, from 0."""
    ingredients: tuple[MemberName, ...] = ()
    """Members whose weights a soup averages, `c0003 ema`, the best first; empty for other variants.
    Several candidates are in a soup, so that it judges none of them."""


class TrialRecord(StoredRecord):
    """Result of one fold trial; written last, so that its files are whole."""

    candidate: CandidateId
    fold: Fold
    status: TrialStatus
    backbone: str
    params: Params
    teacher: TeacherRef | None = None
    folds_hash: str
    seed: Count
    variants: dict[PlainName, VariantScore] = {}
    epochs_trained: Count = 0
    seconds: Seconds = 0.0
    """Wall seconds of the fold trial, from its first line to its written record."""
    started_at: Seconds = 0.0
    """Unix time (s) at which its first attempt began; 0 where it is not known."""
    ended_at: Seconds = 0.0
    """Unix time (s) at which it ended."""
    node: str = ""
    device: str = ""
    accelerators: tuple[str, ...] = ()
    """Ids of the devices that the scheduler gave to this trial."""
    devices: Annotated[float, Field(ge=0, le=1e6)] | None = None
    """Devices that its seconds are multiplied by, shares of a GPU included; None where it was
    stopped while it was parked, or in records of an older version."""
    micro_batch: Count = 0
    error: str | None = None
    notes: tuple[str, ...] = ()
    """Warnings of the trial, each text once."""
    settings: dict[str, JsonValue] = {}
    """What `resume` may not change of the config that it was trained with, by dotted key; empty in
    records of an older version."""
    attempt: str = ""
    """Name of the attempt that wrote it; empty where the driver did, or an older version."""
    digests: dict[str, str] = {}
    """File beside it -> SHA-256 of its bytes: only a file that has it is of this trial."""

    @property
    def best(self) -> str | None:
        """The variant with the lowest calibrated log loss, soups left out; raw on a tie."""

        def order(variant: str) -> tuple[float, bool, str]:
            return self.variants[variant].calibrated_logloss, variant != RAW, variant

        return min(self.own_variants, key=order, default=None)

    @property
    def own_variants(self) -> tuple[str, ...]:
        """The variants without soups, in which there are several candidates."""
        return tuple(name for name, score in self.variants.items() if not score.ingredients)


class RaceDecision(StoredRecord):
    """Decision of the race after a fold of a candidate, or at an epoch of its first fold.

    Holds the numbers behind the decision. Each fold keeps its latest decision only.
    """

    number: Count
    """Place of the decision among all of its sweep, in the order in which they were made."""
    candidate: CandidateId
    fold: Fold
    epoch: Count | None = None
    """Epochs trained of that fold, for a decision in mid-training; None after a whole fold."""
    rule: str
    """`gain`, `forgiving`, `none`, or `epoch` for one in mid-training."""
    action: RaceAction
    """`continue`: the next fold, or of one in mid-training the next epoch, may run. `park`: it
    waits, and goes on when nothing else promises more. `complete`: the candidate's last fold has
    ended well, and it joins the race's blend."""
    variant: PlainName | None = None
    """The better variant, which decided."""
    folds_done: Count
    rows: Count
    """Number of rows that it was judged on: of its finished folds, or of the running one."""
    seconds: Seconds = 0.0
    """Seconds that this fold had trained, for a decision in mid-training."""
    gain: Logloss | None = None
    """Bounded gain over the race's blend on those rows, in nats per row; None where there was none
    yet or the rows cannot be read. Of `complete`: over the blend without the candidate."""
    gain_se: Logloss | None = None
    """Standard error of `gain`."""
    z: float | None = None
    score: Logloss | None = None
    """Mean log loss of the candidate (rule `forgiving`), or its log loss at that epoch."""
    limit: Logloss | None = None
    """Value that `score` was compared with: the worst fold of the best complete candidate, or the
    rung's cut."""
    complete: Count
    """Number of complete candidates by then, with the candidate itself for `complete`."""
    blend_logloss: Logloss | None = None
    """Log loss of the race's blend of these on all rows; None while it has no members."""
    epochs_trained: Count
    """Epochs of all fold trials of the sweep that have ended by then, stopped ones included."""
    reason: str
    """Reason in one line, for people."""

    @property
    def grants(self) -> bool:
        """True where it lets the candidate have all its folds."""
        return self.action == "continue" and self.epoch is None

    @property
    def line(self) -> str:
        """The decision for the log: `c0012 stopped after fold 1: gain -0.0031 ± 0.0009`."""
        place = f"after fold {self.fold}"
        if not self.folds_done and self.epoch is None:
            place = "before its first fold has ended"
        if self.epoch is not None:
            place = f"after epoch {self.epoch} of fold {self.fold}"
        return f"{self.candidate} {ACTION_WORDS[self.action]} {place}: {self.reason}"


@dataclass(frozen=True)
class Oof:
    """Probabilities of one variant on the rows of one fold."""

    log_prob: NDArray[np.float16]  # (n, C) natural log
    true_prob: NDArray[np.float32]  # (n,) from the float32 softmax


@dataclass(frozen=True)
class CandidateSummary:
    """One row of the leaderboard, from a candidate and its trials."""

    candidate: CandidateRecord
    status: CandidateStatus
    trials: tuple[TrialRecord, ...]  # by fold
    folds: int
    """Fold trials of a complete candidate, of all repeats."""
    decisions: tuple[RaceDecision, ...] = ()  # by number
    repeats: int = 1

    @property
    def settled(self) -> bool:
        """True where no further fold of the candidate is trained."""
        return self.status not in ("running", "parked", "unfinished")

    @property
    def gain(self) -> float | None:
        """Gain in the latest decision that has one, in nats per row."""
        known = [d for d in self.decisions if d.gain is not None]
        return known[-1].gain if known else None

    @property
    def gain_se(self) -> float | None:
        """Standard error of `gain`."""
        known = [d for d in self.decisions if d.gain is not None]
        return known[-1].gain_se if known else None

    @cached_property
    def finished(self) -> tuple[TrialRecord, ...]:
        """The fold trials that ended well."""
        return tuple(t for t in self.trials if t.status == "finished")

    @cached_property
    def complete_repeats(self) -> tuple[int, ...]:
        """The repeats whose folds all ended well."""
        per_repeat = self.folds // self.repeats
        done = Counter(t.fold // per_repeat for t in self.finished)
        return tuple(repeat for repeat in sorted(done) if done[repeat] == per_repeat)

    @cached_property
    def counted(self) -> tuple[TrialRecord, ...]:
        """The finished fold trials by which it is scored: each row of them counts alike.

        Those of the complete repeats; while there is none, those of the repeat that has most.
        """
        if self.repeats == 1:
            return self.finished
        per_repeat = self.folds // self.repeats
        done = Counter(t.fold // per_repeat for t in self.finished)
        of = self.complete_repeats or sorted(done, key=lambda r: (-done[r], r))[:1]
        return tuple(t for t in self.finished if t.fold // per_repeat in of)

    @property
    def is_member(self) -> bool:
        """True where a blend may have it: complete, and scored by rows that it had no part in."""
        return self.status == "complete" and not self.candidate.is_optimistic

    @cached_property
    def variants(self) -> tuple[str, ...]:
        """The variants that every finished fold has, raw first."""
        if not self.finished:
            return ()
        shared = set.intersection(*(set(t.variants) for t in self.finished))
        return tuple(sorted(shared, key=lambda v: (v != RAW, v)))

    def pooled_calibrated(self, variant: str) -> float:
        """The loss that selects: mean over all rows of the finished folds, calibrated by fold.

        Of several repeats it is the mean of the repeats' losses, not the loss of their mean: so
        candidates with fewer of them compare.
        """
        return self._pooled(variant, lambda score: score.calibrated_logloss)

    def pooled_logloss(self, variant: str) -> float:
        """Uncalibrated log loss: mean over all rows of the finished folds, not of fold means."""
        return self._pooled(variant, lambda score: score.val_logloss)

    def pooled_accuracy(self, variant: str) -> float:
        """Share of the rows of all finished folds whose class is right."""
        return self._pooled(variant, lambda score: score.val_acc)

    def _pooled(self, variant: str, value: Callable[[VariantScore], float]) -> float:
        scores = [t.variants[variant] for t in self.counted]
        return math.fsum(s.rows * value(s) for s in scores) / sum(s.rows for s in scores)

    @cached_property
    def own_variants(self) -> tuple[str, ...]:
        """The variants without soups, in which there are several candidates."""
        return tuple(
            v for v in self.variants if not any(t.variants[v].ingredients for t in self.finished)
        )

    @cached_property
    def best(self) -> str | None:
        """The variant with the lowest pooled calibrated loss, soups left out; raw on a tie."""
        return min(self.own_variants, key=self.pooled_calibrated, default=None)


def summarise(
    candidate: CandidateRecord,
    trials: Sequence[TrialRecord],
    folds: int,
    running: bool,
    decisions: Sequence[RaceDecision] = (),
    repeats: int = 1,
) -> CandidateSummary:
    """Summary of a candidate with its one status: complete means that all its folds ended well.

    `folds`: how many it has in all `repeats` together.

    A decision to stop holds for ever, whatever else is there: another fold that was running,
    another rule.
    """
    statuses = {trial.status for trial in trials}
    status: CandidateStatus
    if "stopped" in statuses or any(d.action == "stop" for d in decisions):
        status = "stopped"
    elif "diverged" in statuses:
        status = "diverged"
    elif "failed" in statuses:
        status = "failed"
    elif len(trials) == folds:
        status = "complete"
    elif decisions and decisions[-1].action == "park":
        status = "parked"
    else:
        status = "running" if running else "unfinished"
    return CandidateSummary(candidate, status, tuple(trials), folds, tuple(decisions), repeats)
