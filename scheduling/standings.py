"""What is known of each candidate: its rungs, its gain over the blend, and what it promises.

Takes the state of the sweep, reads logs and columns from the run folder; orders the waiting and the
parked candidates by the highest plausible gain for a second of a device.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import fmean, stdev

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import RaceConfig
from foldrace.core.files import warn_ignored
from foldrace.ensemble.running_blend import Gain
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.gains import Better, Gains
from foldrace.scheduling.rules import RULES, Evidence
from foldrace.scheduling.rungs import Place, Rung, RungRecords, losses_of, rungs_of
from foldrace.scheduling.state import CandidateState, SweepState

_RECENT = 50
"""First folds by which the rise of a gain from a rung to the end is estimated."""
_LEAST_RISES = 3
_UNKNOWN_RISE = (0.0, 0.1)
"""Mean and standard deviation (nats per row) before there are so many."""


class Standings:
    """What is known of each candidate of a sweep."""

    def __init__(self, store: RunStore, config: RaceConfig, state: SweepState) -> None:
        self._store, self._config, self._state = store, config, state
        self._rule = RULES[config.rule]
        self.gains = Gains(store)
        self._rungs = RungRecords()
        self.measured: set[str] = set()
        """Candidates that have reached a rung or ended a fold."""
        self.rungs_of = lru_cache(None)(self._find_rungs)

    def measure(self, state: CandidateState) -> list[float]:
        """Record how far a candidate's first fold has come; its losses by epoch.

        None, and a warning, where the log is damaged.
        """
        losses = self._losses(state.name, first_fold(state))
        self.measured.add(state.name)
        self._rungs.add(state.name, first_fold(state), self.rungs_of(state.name), losses)
        return losses

    def remember(self, state: CandidateState) -> None:
        """Record what an earlier session has left of a candidate, if its first fold had begun.

        One that was interrupted after a rung has only its log.
        """
        if self._losses(state.name, first_fold(state)) or state.ended:
            self.measure(state)

    def place(self, state: CandidateState, rung: Rung) -> Place:
        """Where a candidate's first fold stands at a rung that it has reached."""
        reduction = self._config.reduction
        return self._rungs.place(state.name, first_fold(state), rung.fraction, reduction)

    def by_promise(self, least: float = 0.0) -> list[tuple[CandidateState, str]]:
        """Waiting and parked candidates by what they promise for a second of a device.

        With a blend that is the highest plausible gain, of a parked one as it is expected to be at
        the end of its fold, over the seconds until it is complete; those not above `least` are left
        out. Before there is one, it is the loss, and the parked ones come last.
        """
        if not self._rule.takes_turns:
            return []
        found: list[tuple[tuple[float, ...], CandidateState, str]] = []
        rises: dict[float, tuple[float, float]] = {}
        for state in self._state:
            if state.is_between_folds or state.parked_epoch is not None:
                order, reason = self._promise(state, rises)
                if not self.gains.has_members or order[0] > least:
                    found.append((order, state, reason))
        found.sort(key=lambda entry: (*entry[0], -entry[1].number))  # the older one on a tie
        return [(state, reason) for _, state, reason in reversed(found)]

    def _promise(
        self, state: CandidateState, rises: dict[float, tuple[float, float]]
    ) -> tuple[tuple[float, ...], str]:
        """Sort key of a waiting or parked candidate, the higher the better, and why."""
        z = self._config.z
        if state.parked_epoch is None:
            if not self.gains.has_members:
                loss = _mean_loss(state.summary)
                return (1.0, -math.inf if loss is None else -loss), "the least log loss"
            better = self.gains.of(state.summary)
            if better is None:  # nothing is held against rows that cannot be read
                return (math.inf,), "its gain is unknown"
            gain = better[1]
            bound = gain.mean + z * gain.se
            return (bound / self._seconds_to_go(state),), f"{gain_text(better)}, the most promising"
        rung, place = self.standing(state)
        if rung is None or place is None:  # the rungs are others than when it was parked
            return (math.inf,), "nothing is known of its rung"
        if not self.gains.has_members:
            return (0.0, rung.fraction, -place.rank), "the best of those parked"
        better = self.gains.at_rung(state.name, first_fold(state), rung.epoch)
        if better is None:
            return (math.inf,), "its gain is unknown"
        if rung.fraction not in rises:
            rises[rung.fraction] = self._rise(rung.fraction)
        mean, spread = rises[rung.fraction]
        gain = better[1]
        bound = gain.mean + mean + z * math.hypot(gain.se, spread)
        reason = f"gain {gain.mean + mean:+.4f} ± {math.hypot(gain.se, spread):.4f} expected"
        return (bound / self._seconds_to_go(state),), f"{reason}, the most promising"

    def _rise(self, fraction: float) -> tuple[float, float]:
        """Mean and standard deviation of the rise of a gain from a rung to the end of the fold."""
        rises: list[float] = []
        for state in reversed(list(self._state)):
            first = state.ended.get(first_fold(state))
            if first is None or first.status != "finished":
                continue
            rung = next((r for r in self.rungs_of(state.name) if r.fraction == fraction), None)
            if rung is None:
                continue
            before = self.gains.at_rung(state.name, first.fold, rung.epoch)
            after = self.gains.at_end(state.summary, first.fold)
            if before is not None and after is not None:
                rises.append(after[1].mean - before[1].mean)
            if len(rises) >= _RECENT:
                break
        return (fmean(rises), stdev(rises)) if len(rises) >= _LEAST_RISES else _UNKNOWN_RISE

    def standing(self, state: CandidateState) -> tuple[Rung | None, Place | None]:
        """The last rung that a candidate's first fold has reached, and its place there."""
        fold = first_fold(state)
        for rung in reversed(self.rungs_of(state.name)):
            if self._rungs.has(state.name, fold, rung.fraction):
                reduction = self._config.reduction
                return rung, self._rungs.place(state.name, fold, rung.fraction, reduction)
        return None, None

    def is_out(self, state: CandidateState) -> bool:
        """True where the rule stops it, as the blend is now."""
        better = self.gains.of(state.summary)
        return bool(state.ended) and self._rule.stops(self.evidence(state.summary, better))

    def is_plausible(self, gain: Gain) -> bool:
        """True where a gain is above zero with `z` standard errors added."""
        return gain.mean + self._config.z * gain.se > 0.0

    def evidence(self, summary: CandidateSummary, better: Better | None) -> Evidence:
        """What a rule decides by."""
        gain = better[1] if better else None
        worst = self._worst_fold_of_best() if self._rule.compares_losses else None
        return Evidence(gain, self._config.z, _mean_loss(summary), worst)

    def _worst_fold_of_best(self) -> float | None:
        complete = [s.summary for s in self._state if s.summary.is_member]
        known = [(s.pooled_calibrated(s.best), _fold_losses(s)) for s in complete if s.best]
        return max(min(known)[1]) if known else None

    def _losses(self, name: str, fold: int) -> list[float]:
        """Loss by epoch of a fold's stored log; none, and a warning, where that is damaged."""
        log = self._store.train_log(name, fold)
        try:
            return losses_of(log) if log is not None else []
        except ValueError as error:
            folder = f"{self._store.root}/{self._store.trial_folder(name, fold)}"
            warn_ignored(f"{folder}/train_log.csv", str(error))
            return []

    def _seconds_to_go(self, state: CandidateState) -> float:
        """Expected device-seconds until the candidate is complete, by its own folds so far."""
        latest, epoch = state.latest, state.parked_epoch
        devices = self._state.devices(state.record.backbone)
        if epoch and latest is not None:
            epochs = int(state.record.params["epochs"])
            whole = latest.seconds * epochs / epoch
            left = whole - latest.seconds + (state.folds - 1) * whole
        else:
            seconds = [trial.seconds for trial in state.summary.finished]
            left = len(state.waiting) * fmean(seconds or [0.0])
        return max(left * devices, 1e-9)

    def _find_rungs(self, name: str) -> tuple[Rung, ...]:
        params = TrialParams.from_dict(self._state[name].record.params)
        return rungs_of(self._config, params)


def first_fold(state: CandidateState) -> int:
    """The fold that a candidate begins with: the lowest of those that have begun, else 0."""
    return min((*state.ended, *state.running, *state.decisions), default=0)


def gain_text(better: Better) -> str:
    """The gain with its standard error, for people."""
    return f"gain {better[1].mean:+.4f} ± {better[1].se:.4f}"


def _fold_losses(summary: CandidateSummary) -> list[float]:
    """Fold losses of the better variant; empty where the folds have no variant in common."""
    best = summary.best
    return [t.variants[best].calibrated_logloss for t in summary.finished] if best else []


def _mean_loss(summary: CandidateSummary) -> float | None:
    losses = _fold_losses(summary)
    return fmean(losses) if losses else None
