"""Length of a sweep that nobody has written a config for: folds, epochs, candidates.

Takes the measured speed of each backbone and the time, gives a `SweepLength`; knows no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from foldrace.config.schema import RaceConfig

_FIRST_PART = 1 / 10  # of the time: the first candidate's folds, so that there soon is a blend
_PART = 1 / 6  # of the time: the folds of each later candidate
_LARGE_PART = 0.3  # of the time, where with less they would have too few epochs to learn
_ENOUGH = {False: 30, True: 20}  # pretrained -> epochs that are not too few: docs/defaults.md
_FIRST_SHARE = 1 / 3  # of the epochs, in the first candidate of a sweep without a time
_ABOUT_ALL = 0.75  # of the epochs: who has so many may have them all
_SEVERAL = 4  # candidates of which the first may be short
_ABOUT_AS_FAST = 2.0  # times the seconds of the fastest backbone: the first such one leads
_SLOW_PART = 1 / 4  # of the time: a backbone whose candidate takes longer is left out, but for
_SLOWER = 1.2  # those that take at most so many times as long as the leading one
_STARTED = 4  # candidates started, at most, per candidate that could be complete
_MOST_EPOCHS = {False: 60, True: 20}  # pretrained -> epochs
_DEFAULT_EPOCHS = {False: 30, True: 10}  # without a time
_DEFAULT_CANDIDATES = 20
_MOST_CANDIDATES = 1000  # what a sweep is built for
_LEAST_CANDIDATES = 2
_FEW_FOLDS, _MANY_FOLDS = 3, 5


@dataclass(frozen=True)
class Speed:
    """Seconds of one backbone on one slot, at its image size and batch size."""

    train: float
    """Seconds per training image and epoch, loading and augmentation included."""
    score: float
    """Seconds per scored image, all variants together."""
    start: float = 0.0
    """Seconds of a fold trial before its first step."""
    weights: int = 0
    """Number of the model's weights."""

    def slower(self, factor: float) -> Speed:
        """The speed where everything takes that many times as long."""
        return replace(
            self,
            train=factor * self.train,
            score=factor * self.score,
            start=factor * self.start,
        )

    def fold_seconds(self, images: int, folds: int, epochs: int) -> float:
        """Seconds of a fold trial."""
        scored = images / folds
        return self.start + epochs * ((images - scored) * self.train + scored * self.score)

    def candidate_seconds(
        self, images: int, folds: int, epochs: int, slots: int, repeats: int = 1
    ) -> float:
        """Wall seconds of a candidate's folds, in rounds of as many as there are slots."""
        return self.fold_seconds(images, folds, epochs) * math.ceil(repeats * folds / slots)


@dataclass(frozen=True)
class Work:
    """What is to be trained, on what, and in what time."""

    speeds: Mapping[str, Speed]
    """Backbone -> speed; empty where none could be measured."""
    images: int
    slots: int
    """Fold trials that run at a time."""
    pretrained: bool
    seconds: float | None
    """Seconds for fold trials, or None: as long as it takes."""
    folds: int | None = None
    """Number of folds where that is decided already."""
    most_folds: int = 5
    """Largest number of folds that every class has images for."""
    repeats: int = 1
    """Number of splits into so many folds."""
    has_gpu: bool = False
    epochs: int | None = None
    """Number of epochs where that is decided already."""
    candidates: int | None = None
    """Number of candidates where that is decided already."""
    most_candidates: int = _MOST_CANDIDATES
    """Candidates that the disk has room for."""


@dataclass(frozen=True)
class SweepLength:
    """Numbers of a sweep's config, and what they are expected to cost."""

    folds: int
    epochs: int
    first_epochs: int
    """Epochs of the first candidate, which is of `first_backbone`: as many, or fewer."""
    first_backbone: str
    """The leading backbone, whose candidates the time is divided for: the first in their order that
    is about as fast as the fastest one; empty where no speed is known."""
    backbones: tuple[str, ...]
    """Backbones fast enough for the time, in their order."""
    candidates: int
    fold_trials: float
    """Fold trials that are expected to be trained whole, of all candidates together."""
    slot_seconds: float
    """Seconds of all fold trials together."""
    first_seconds: float
    """Wall seconds until the first candidate is complete."""


def sweep_length(work: Work) -> SweepLength:
    """Folds, epochs, backbones and candidates that suit the time.

    More time never means fewer epochs or folds. Without a speed they are those of a sweep without
    a time, and what it takes is not a number.
    """
    if not work.speeds:
        work = replace(work, seconds=None)
    folds, epochs = _folds_and_epochs(work)
    first_epochs = _first_epochs(work, folds, epochs)
    seconds = {
        name: speed.candidate_seconds(work.images, folds, epochs, work.slots, work.repeats)
        for name, speed in work.speeds.items()
    }
    lead = _lead(work)
    usual = _SLOWER * seconds.get(lead, 0.0)
    limit = math.inf if work.seconds is None else max(work.seconds * _SLOW_PART, usual)
    kept = tuple(name for name, cost in seconds.items() if cost <= limit)
    first = (
        work.speeds[lead].candidate_seconds(
            work.images, folds, first_epochs, work.slots, work.repeats
        )
        if lead
        else math.nan
    )
    of_kept = [work.speeds[name].fold_seconds(work.images, folds, epochs) for name in kept]
    fold_seconds = sum(of_kept) / len(of_kept) if of_kept else math.nan
    whole = folds * work.repeats
    complete = 1 + (whole - 1) / RaceConfig().one_in(whole)  # fold trials of a candidate, about
    if work.seconds is None:
        candidates = work.candidates or min(_DEFAULT_CANDIDATES, work.most_candidates)
        trials = candidates * complete
    else:
        trials = work.seconds * work.slots / fold_seconds
        bound = min(math.ceil(_STARTED * trials / whole), work.most_candidates, _MOST_CANDIDATES)
        candidates = work.candidates or max(_LEAST_CANDIDATES, bound)
        trials = min(trials, candidates * whole)
    return SweepLength(
        folds=folds,
        epochs=epochs,
        first_epochs=first_epochs,
        first_backbone=lead,
        backbones=kept,
        candidates=candidates,
        fold_trials=trials,
        slot_seconds=trials * fold_seconds,
        first_seconds=first,
    )


def _folds_and_epochs(work: Work) -> tuple[int, int]:
    """Few folds, until with many the epochs are as many as they may be."""
    few, many = (min(folds, work.most_folds) for folds in (_FEW_FOLDS, _MANY_FOLDS))
    folds = work.folds or few
    if work.folds is None and work.has_gpu:
        wanted = work.epochs or _MOST_EPOCHS[work.pretrained]
        if work.seconds is None or _fitting(work, many) >= wanted:
            folds = many
    if work.epochs is not None:
        return folds, work.epochs
    if work.seconds is None:
        return folds, _DEFAULT_EPOCHS[work.pretrained]
    enough = min(_ENOUGH[work.pretrained], _fitting(work, folds, _LARGE_PART))
    fitting = max(1, enough, _fitting(work, folds))
    return folds, int(min(fitting, _MOST_EPOCHS[work.pretrained]))


def _first_epochs(work: Work, folds: int, epochs: int) -> int:
    """All epochs where the user has said how many, or where they fit; else fewer."""
    few = work.candidates is not None and work.candidates < _SEVERAL
    if work.epochs is not None or not work.speeds or few:
        return epochs
    soon = epochs * _FIRST_SHARE if work.seconds is None else _fitting(work, folds, _FIRST_PART)
    return epochs if soon >= _ABOUT_ALL * epochs else max(1, int(soon))


def _fitting(work: Work, folds: int, of_time: float = _PART) -> float:
    """Epochs with which a candidate of the leading backbone takes this part of the time."""
    part, speed = (work.seconds or math.inf) * of_time, work.speeds[_lead(work)]
    start = speed.candidate_seconds(work.images, folds, 0, work.slots, work.repeats)
    one = speed.candidate_seconds(work.images, folds, 1, work.slots, work.repeats) - start
    return (part - start) / one if one > 0 else math.inf


def _lead(work: Work) -> str:
    """The first backbone that is about as fast as the fastest one; empty where there is none."""
    epoch = {
        name: replace(speed, start=0.0).fold_seconds(work.images, _FEW_FOLDS, 1)
        for name, speed in work.speeds.items()
    }
    limit = _ABOUT_AS_FAST * min(epoch.values(), default=0.0)
    return next((name for name, seconds in epoch.items() if seconds <= limit), "")
