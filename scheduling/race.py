"""The race: the one place that says which fold trial runs next, who is parked and who is stopped.

Takes the state of the sweep and what each candidate adds to the blend; gives `Move`s and
`RaceDecision`s. A candidate's first fold is judged at its rungs, then at its end. One in `eta` of
those that were measured gets all its folds, the most promising first, each while a gain is
plausible. The others wait, parked with their saved state or between two folds, until nothing else
promises more. At the end those are stopped for good whose gain is not plausible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any, Literal

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.schema import RaceConfig
from foldrace.core.files import warn_ignored
from foldrace.ensemble.running_blend import Gain
from foldrace.run_folder.records import CandidateSummary, RaceAction, RaceDecision
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.gains import Better, Gains
from foldrace.scheduling.rungs import Place, Rung, RungRecords, losses_of, rungs_of, seconds_of
from foldrace.scheduling.state import CandidateState, SweepState

_RECENT = 50
"""First folds by which the rise of a gain from a rung to the end is estimated."""
_LEAST_RISES = 3
_UNKNOWN_RISE = (0.0, 0.1)
"""Mean and standard deviation (nats per row) before there are so many."""


@dataclass(frozen=True)
class Evidence:
    """Evidence about a candidate after some of its folds, by which a rule decides."""

    gain: Gain | None
    """Gain over the blend of the complete candidates; None while that has no members, or where the
    candidate's rows cannot be read."""
    z: float
    """Standard errors that the gain may lie below zero."""
    mean_loss: float | None
    """Mean calibrated log loss of the better variant over its finished folds; None where they have
    no variant in common."""
    worst_loss: float | None
    """Highest fold loss of the best complete candidate; None while there is none."""

    @property
    def gain_text(self) -> str:
        """The gain with its standard error, for people."""
        return f"gain {self.gain.mean:+.4f} ± {self.gain.se:.4f}" if self.gain else "gain unknown"


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules."""

    name: str
    stops: Callable[[Evidence], bool]
    explain: Callable[[Evidence], str]
    takes_turns: bool = False
    """True where a candidate waits for its turn after the first fold; else all get all folds,
    until they are stopped."""
    one_by_one: bool = False
    """True where a candidate's next fold waits for the one before it."""
    compares_losses: bool = False
    """True where it goes by `mean_loss` and `worst_loss`."""


def _adds_nothing(evidence: Evidence) -> bool:
    """True where the gain is not above zero even with `z` standard errors added."""
    gain = evidence.gain
    return gain is not None and gain.mean + evidence.z * gain.se <= 0.0


def _worse_than_the_worst_fold(evidence: Evidence) -> bool:
    """The forgiving rule of Bergman, Purucker and Hutter.

    Don't Waste Your Time: Early Stopping Cross-Validation, 2024, arXiv 2405.03389.
    """
    mean, worst = evidence.mean_loss, evidence.worst_loss
    return mean is not None and worst is not None and mean > worst


def _losses_text(evidence: Evidence) -> str:
    if evidence.mean_loss is None or evidence.worst_loss is None:
        return "no log loss to compare"
    return (
        f"mean log loss {evidence.mean_loss:.4f}, worst fold of the best complete candidate "
        f"{evidence.worst_loss:.4f}"
    )


_ROWS = (
    Rule("gain", _adds_nothing, lambda evidence: evidence.gain_text, takes_turns=True),
    Rule(
        "forgiving",
        _worse_than_the_worst_fold,
        _losses_text,
        one_by_one=True,
        compares_losses=True,
    ),
    Rule("none", lambda _: False, lambda _: "every candidate gets all folds"),
)
RULES = {rule.name: rule for rule in _ROWS}


@dataclass(frozen=True)
class Move:
    """Something that could run now."""

    kind: Literal["fold", "grant", "return", "new"]
    """`fold`: the next one of a candidate that may have it. `grant`: all folds of one. `return`:
    the rest of a parked fold. `new`: a new candidate."""
    state: CandidateState | None = None
    """None for a new candidate."""
    reason: str = ""


class Race:
    """The rules of the race over one sweep's state."""

    def __init__(self, store: RunStore, config: RaceConfig, state: SweepState) -> None:
        self._store, self._config, self._rule = store, config, RULES[config.rule]
        self._state = state
        self._gains = Gains(store)
        self._rungs = RungRecords()
        self._measured: set[str] = set()  # candidates that reached a rung or ended a fold
        self._next_number = 0
        self._rungs_of = lru_cache(None)(self._find_rungs)

    @property
    def blend_loss(self) -> float | None:
        """Log loss of the blend of the complete candidates; None while it has no members."""
        return self._gains.blend_loss

    # -- what happens

    def replay(self) -> None:
        """Take in the state that earlier sessions left: logs, decisions, complete candidates.

        A candidate with a finished fold that no decision has seen (`is_decided`) is judged later.
        """
        numbers = [d.number for s in self._state for d in s.decisions.values()]
        self._next_number = max(numbers, default=-1) + 1
        for state in self._state:
            losses = self._losses(state.name, _first_fold(state))
            # One that was interrupted after a rung has only the losses.
            if losses or state.ended or state.parked_epoch is not None:
                self._measure(state, losses)
        complete = (s.summary for s in self._state if s.summary.status == "complete")
        self._gains.join([summary for summary in complete if is_decided(summary)])

    def fold_ended(self, name: str) -> None:
        """Take in a fold trial that ended in some way."""
        state = self._state[name]
        self._measure(state, self._losses(name, _first_fold(state)))

    def is_judged_at_rungs(self, state: CandidateState) -> bool:
        """True where the fold that starts now is the candidate's first and may be parked."""
        return self._config.stops_epochs and not state.ended and not self.is_granted(state)

    def reach(self, name: str, fold: int, epoch: int, more: bool) -> RaceDecision | None:
        """The decision to park a running first fold after so many epochs; None: it goes on.

        It is parked where its loss is not among the best 1/reduction of its rung and, once there is
        a blend, a gain over that is not plausible either; but not where it would be the next to go
        on. `more`: see `moves`.
        """
        state, losses = self._state[name], self._losses(name, fold)
        self._measure(state, losses)
        rung = next((r for r in self._rungs_of(name) if r.epoch == epoch), None)
        others = state.running - {fold}
        if rung is None or len(losses) < epoch or others or not self.is_judged_at_rungs(state):
            return None
        place = self._rungs.place(name, fold, rung.fraction, self._config.reduction)
        better = self._gains.at_rung(name, fold, epoch)
        if place.is_among_best or (better is not None and self._is_plausible(better[1])):
            return None
        reason = (
            f"log loss {place.loss:.4f} is above {place.cut:.4f}, the cut for the best "
            f"1/{self._config.reduction} of {place.count} trials at {rung.fraction:.0%} of their "
            "epochs"
        )
        if better is not None:
            reason = f"{_gain_text(better)}, and {reason}"
        log = self._store.train_log(name, fold)
        decision = self._decision(
            state, "park", reason, better, fold=fold, rung=rung, place=place,
            seconds=seconds_of(log) if log else 0.0,
        )  # fmt: skip
        return None if self._is_next_after(decision, more) else decision

    def _is_next_after(self, park: RaceDecision, more: bool) -> bool:
        """True where a trial that is parked now would be the next one to run."""
        state = self._state[park.candidate]
        before = state.decisions.copy(), state.running.copy()
        state.decisions[park.fold] = park
        state.running.discard(park.fold)
        state.changed()
        first = next(self.moves(more), None)
        state.decisions, state.running = before
        state.changed()
        return first is not None and first.state is state

    def judge(self, name: str, fold: int | None = None) -> RaceDecision:
        """The decision after a fold that ended well; a complete candidate joins the blend.

        `fold`: the one that ended; None: whichever has no decision yet.

        Its gain is over the blend without it, the blend's loss in the decision is with it.
        """
        state = self._state[name]
        summary = state.summary
        better = self._gains.of(summary)
        evidence = self._evidence(summary, better)
        if len(summary.finished) == summary.folds:
            reason = evidence.gain_text if self._gains.has_members else "the first of the blend"
            self._gains.join([summary])
            return self._decision(state, "complete", reason, better, fold=fold)
        reason = self._rule.explain(evidence)
        if self._rule.takes_turns:
            if self._rule.stops(evidence):
                return self._decision(state, "park", reason, better, fold=fold)
            if state.granted:
                return self._decision(state, "continue", reason, better, fold=fold)
            if not self._gains.has_members:
                reason = "nothing is complete yet"
            reason = f"{reason}; waits for its turn"
            return self._decision(state, "park", reason, better, fold=fold)
        if not self._rule.stops(evidence):
            return self._decision(state, "continue", reason, better, fold=fold)
        if not state.running:
            return self._decision(state, "stop", reason, better, fold=fold)
        reason = f"{reason}; not stopped while another of its folds is running"
        return self._decision(state, "continue", reason, better, fold=fold)

    def verdicts(self) -> Iterator[RaceDecision]:
        """Decisions about candidates that may have further folds, but no longer have merit.

        The blend has changed since, or another of their folds was running. They are parked, or
        stopped where nobody takes turns.
        """
        for state in self._state:
            may_run = state.ended and state.waiting and self.is_granted(state)
            if may_run and not state.running and self._is_out(state):
                better = self._gains.of(state.summary)
                reason = self._rule.explain(self._evidence(state.summary, better))
                action: RaceAction = "park" if self._rule.takes_turns else "stop"
                yield self._decision(state, action, reason, better)

    def grant_first(self, state: CandidateState) -> RaceDecision | None:
        """The decision that the first candidate of a sweep gets all its folds; None with others.

        So a sweep has a blend as soon as any can have one.
        """
        if not self._rule.takes_turns or len(self._state) > 1:
            return None
        reason = "the first candidate gets all its folds, so that there is a blend"
        return self._decision(state, "continue", reason, None)

    def accept(self, move: Move) -> RaceDecision | None:
        """The decision that a move stands for; None where it needs none."""
        state = move.state
        if state is None or move.kind == "fold":
            return None
        latest = state.latest
        if move.kind == "grant":
            better = self._gains.of(state.summary)
            return self._decision(state, "continue", move.reason, better)
        assert latest is not None  # it is parked by a decision
        copied = {"action": "continue", "reason": move.reason} | self._sums()
        return latest.model_copy(update=copied)

    def give_up(self, state: CandidateState, reason: str) -> RaceDecision:
        """The decision that a waiting or parked candidate is stopped for good."""
        latest = state.latest
        if latest is not None and state.parked_epoch is not None:
            return latest.model_copy(update={"action": "stop", "reason": reason} | self._sums())
        return self._decision(state, "stop", reason, self._gains.of(state.summary))

    # -- what runs next

    def moves(self, more: bool) -> Iterator[Move]:
        """What could run now, the best first. `more`: there are further candidates to suggest."""
        yield from self._begun()
        if self._owes_a_grant():
            yield from self._grants()
        yield from self._returning()
        if more:
            yield Move("new")
        yield from (move for _, move in self._by_promise())
        yield from self._spare()

    def parked(self) -> list[CandidateState]:
        """The candidates parked in mid-training, the least promising first."""
        ranked = [m.state for _, m in self._by_promise(least=-math.inf) if m.kind == "return"]
        return [state for state in reversed(ranked) if state is not None]

    def is_granted(self, state: CandidateState) -> bool:
        """True where all folds of a candidate may run."""
        return not self._rule.takes_turns or state.granted

    def _begun(self) -> Iterator[Move]:
        """First folds that were interrupted, then folds of those that may have them all."""
        yield from (Move("fold", state) for state in self._state if state.is_new)
        for state in self._state:
            if not state.waiting or state.leaving or not self.is_granted(state):
                continue
            if state.running and (self._rule.one_by_one or self._is_out(state)):
                continue
            yield Move("fold", state)

    def _owes_a_grant(self) -> bool:
        granted = sum(state.was_granted for state in self._state)
        return granted < math.ceil(len(self._measured) / self._config.eta)

    def _grants(self) -> Iterator[Move]:
        for _, move in self._by_promise():
            if move.kind == "grant":
                yield move

    def _returning(self) -> Iterator[Move]:
        """Parked trials that are among the best of their rung by now, the furthest first."""
        found = []
        for state in self._state:
            if state.parked_epoch is None:
                continue
            rung, place = self._standing(state)
            if rung is not None and place is not None and place.is_among_best:
                reason = f"among the best 1/{self._config.reduction} of its rung by now"
                found.append(
                    (-rung.fraction, place.loss, state.number, Move("return", state, reason))
                )
        yield from (move for *_, move in sorted(found, key=lambda f: f[:3]))

    def _by_promise(self, least: float = 0.0) -> list[tuple[float, Move]]:
        """Waiting and parked candidates by what they promise for a second of a slot.

        With a blend that is the highest plausible gain, of a parked one as it is expected to be at
        the end of its fold, over the seconds until it is complete; those not above `least` are left
        out. Before there is one, it is the loss, and the parked ones come last.
        """
        if not self._rule.takes_turns:
            return []
        found: list[tuple[tuple[float, ...], Move]] = []
        rises: dict[float, tuple[float, float]] = {}
        for state in self._state:
            if state.is_between_folds:
                kind: Literal["grant", "return"] = "grant"
            elif state.parked_epoch is not None:
                kind = "return"
            else:
                continue
            order, reason = self._promise(state, rises)
            if not self._gains.has_members or order[0] > least:
                found.append((order, Move(kind, state, reason)))
        found.sort(key=lambda pair: (*pair[0], -(pair[1].state.number if pair[1].state else 0)))
        return [(order[0], move) for order, move in reversed(found)]

    def _promise(
        self, state: CandidateState, rises: dict[float, tuple[float, float]]
    ) -> tuple[tuple[float, ...], str]:
        """Sort key of a waiting or parked candidate, the higher the better, and why."""
        z = self._config.z
        if state.parked_epoch is None:
            if not self._gains.has_members:
                loss = _mean_loss(state.summary)
                return (1.0, -math.inf if loss is None else -loss), "the least log loss"
            better = self._gains.of(state.summary)
            if better is None:  # nothing is held against rows that cannot be read
                return (math.inf,), "its gain is unknown"
            gain = better[1]
            bound = gain.mean + z * gain.se
            return (bound / _seconds_to_go(state),), f"{_gain_text(better)}, the most promising"
        rung, place = self._standing(state)
        if rung is None or place is None:  # the rungs are others than when it was parked
            return (math.inf,), "nothing is known of its rung"
        if not self._gains.has_members:
            return (0.0, rung.fraction, -place.rank), "the best of those parked"
        better = self._gains.at_rung(state.name, _first_fold(state), rung.epoch)
        if better is None:
            return (math.inf,), "its gain is unknown"
        if rung.fraction not in rises:
            rises[rung.fraction] = self._rise(rung.fraction)
        mean, spread = rises[rung.fraction]
        gain = better[1]
        bound = gain.mean + mean + z * math.hypot(gain.se, spread)
        reason = f"gain {gain.mean + mean:+.4f} ± {math.hypot(gain.se, spread):.4f} expected"
        return (bound / _seconds_to_go(state),), f"{reason}, the most promising"

    def _rise(self, fraction: float) -> tuple[float, float]:
        """Mean and standard deviation of the rise of a gain from a rung to the end of the fold."""
        rises: list[float] = []
        for state in reversed(list(self._state)):
            first = state.ended.get(_first_fold(state))
            if first is None or first.status != "finished":
                continue
            rung = next((r for r in self._rungs_of(state.name) if r.fraction == fraction), None)
            if rung is None:
                continue
            before = self._gains.at_rung(state.name, first.fold, rung.epoch)
            after = self._gains.at_end(state.summary, first.fold)
            if before is not None and after is not None:
                rises.append(after[1].mean - before[1].mean)
            if len(rises) >= _RECENT:
                break
        return (fmean(rises), stdev(rises)) if len(rises) >= _LEAST_RISES else _UNKNOWN_RISE

    def _spare(self) -> Iterator[Move]:
        """Further folds of candidates whose first one is still running, for slots left idle."""
        if not self._rule.takes_turns:
            if self._rule.one_by_one:
                yield from (Move("fold", s) for s in self._state if s.running and s.waiting)
            return
        found = []
        for state in self._state:
            if not state.running or state.leaving or state.granted or not state.waiting:
                continue
            _, place = self._standing(state)
            promising = place.is_among_best if place else not self._config.stops_epochs
            if promising and not self._is_out(state):
                found.append((place.rank if place else 0.5, state.number, state))
        for _, _, state in sorted(found, key=lambda f: f[:2]):
            yield Move("grant", state, "a slot is idle")

    # -- what is known of a candidate

    def _standing(self, state: CandidateState) -> tuple[Rung | None, Place | None]:
        """The last rung that a candidate's first fold has reached, and its place there."""
        fold = _first_fold(state)
        for rung in reversed(self._rungs_of(state.name)):
            if self._rungs.has(state.name, fold, rung.fraction):
                reduction = self._config.reduction
                return rung, self._rungs.place(state.name, fold, rung.fraction, reduction)
        return None, None

    def _is_out(self, state: CandidateState) -> bool:
        """True where the rule stops it, as the blend is now."""
        better = self._gains.of(state.summary)
        return bool(state.ended) and self._rule.stops(self._evidence(state.summary, better))

    def _is_plausible(self, gain: Gain) -> bool:
        return gain.mean + self._config.z * gain.se > 0.0

    def _evidence(self, summary: CandidateSummary, better: Better | None) -> Evidence:
        gain = better[1] if better else None
        worst = self._worst_fold_of_best() if self._rule.compares_losses else None
        return Evidence(gain, self._config.z, _mean_loss(summary), worst)

    def _worst_fold_of_best(self) -> float | None:
        complete = [s.summary for s in self._state if s.summary.status == "complete"]
        known = [(s.pooled_calibrated(s.best), _fold_losses(s)) for s in complete if s.best]
        return max(min(known)[1]) if known else None

    def _measure(self, state: CandidateState, losses: list[float]) -> None:
        self._measured.add(state.name)
        self._rungs.add(state.name, _first_fold(state), self._rungs_of(state.name), losses)

    def _losses(self, name: str, fold: int) -> list[float]:
        """Loss by epoch of a fold's stored log; none, and a warning, where that is damaged."""
        log = self._store.train_log(name, fold)
        try:
            return losses_of(log) if log is not None else []
        except ValueError as error:
            folder = f"{self._store.root}/{self._store.trial_folder(name, fold)}"
            warn_ignored(f"{folder}/train_log.csv", str(error))
            return []

    def _find_rungs(self, name: str) -> tuple[Rung, ...]:
        params = TrialParams.from_dict(self._state[name].record.params)
        return rungs_of(self._config, params)

    # -- decisions

    def _decision(
        self,
        state: CandidateState,
        action: RaceAction,
        reason: str,
        better: Better | None,
        *,
        fold: int | None = None,
        rung: Rung | None = None,
        place: Place | None = None,
        seconds: float = 0.0,
    ) -> RaceDecision:
        """The one maker of decisions; of `rung` and `place` for one in mid-training."""
        summary, by_losses = state.summary, self._rule.compares_losses
        evidence = self._evidence(summary, better)
        score, limit = (evidence.mean_loss, evidence.worst_loss) if by_losses else (None, None)
        if place is not None:
            score, limit = place.loss, place.cut
        gain = better[1] if better else None
        return RaceDecision(
            candidate=state.name,
            fold=_judged_fold(state) if fold is None else fold,
            epoch=rung.epoch if rung else None,
            rule="epoch" if rung else self._rule.name,
            action=action,
            variant=better[0] if better else summary.best,
            folds_done=len(summary.finished),
            rows=gain.rows if gain else _rows(summary),
            seconds=seconds,
            gain=gain.mean if gain else None,
            gain_se=gain.se if gain else None,
            z=self._config.z if self._rule.takes_turns else None,
            score=score,
            limit=limit,
            reason=reason,
            **self._sums(),
        )

    def _sums(self) -> dict[str, Any]:
        """The part of a decision that is of the whole sweep."""
        self._next_number += 1
        return {
            "number": self._next_number - 1,
            "complete": self._state.complete,
            "blend_logloss": self._gains.blend_loss,
            "epochs_trained": self._state.epochs_trained,
        }


def is_decided(summary: CandidateSummary) -> bool:
    """True where the race has judged all of the candidate's finished folds.

    Not so after a kill between a trial's record and the decision, or where that is torn.
    """
    judged = max((d.folds_done for d in summary.decisions), default=0)
    return judged >= len(summary.finished)


def _first_fold(state: CandidateState) -> int:
    """The fold that a candidate begins with: the lowest of those that have begun, else 0."""
    return min((*state.ended, *state.running, *state.decisions), default=0)


def _judged_fold(state: CandidateState) -> int:
    """The finished fold without a decision; when judged again, the one of the latest decision."""
    new = [trial.fold for trial in state.summary.finished if trial.fold not in state.decisions]
    if new:
        return new[-1]
    latest = state.latest
    return _first_fold(state) if latest is None else latest.fold


def _seconds_to_go(state: CandidateState) -> float:
    """Expected seconds of a slot until the candidate is complete, by its own folds so far."""
    latest, epoch = state.latest, state.parked_epoch
    if epoch and latest is not None:
        epochs = int(state.record.params["epochs"])
        whole = latest.seconds * epochs / epoch
        return max(whole - latest.seconds + (state.folds - 1) * whole, 1e-9)
    seconds = [trial.seconds for trial in state.summary.finished]
    return max(len(state.waiting) * fmean(seconds or [0.0]), 1e-9)


def _gain_text(better: Better) -> str:
    return f"gain {better[1].mean:+.4f} ± {better[1].se:.4f}"


def _fold_losses(summary: CandidateSummary) -> list[float]:
    """Fold losses of the better variant; empty where the folds have no variant in common."""
    best = summary.best
    return [t.variants[best].calibrated_logloss for t in summary.finished] if best else []


def _mean_loss(summary: CandidateSummary) -> float | None:
    losses = _fold_losses(summary)
    return fmean(losses) if losses else None


def _rows(summary: CandidateSummary) -> int:
    best = summary.best
    return sum(t.variants[best].rows for t in summary.finished) if best else 0
