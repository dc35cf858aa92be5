"""The race: the one place that says which fold trial runs next, who is parked and who is stopped.

Takes the state of the sweep and what each candidate adds to the blend; gives `Move`s and
`RaceDecision`s. A candidate's first fold is judged at its rungs, then at its end. One in `eta` of
those that were measured gets all its folds, the most promising first, each while a gain is
plausible. The others wait, parked with their saved state or between two folds, until nothing else
promises more. At the end those are stopped for good whose gain is not plausible.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from foldrace.config.schema import RaceConfig
from foldrace.run_folder.records import CandidateSummary, RaceAction, RaceDecision
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.gains import Better
from foldrace.scheduling.rules import RULES
from foldrace.scheduling.rungs import Place, Rung, seconds_of
from foldrace.scheduling.standings import Standings, first_fold, gain_text
from foldrace.scheduling.state import CandidateState, SweepState

_STUDENT = (
    "a student gets all its folds: it imitates the blend, so that a gain over it is not its purpose"
)


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
        self._known = Standings(store, config, state)
        self._next_number = 0

    @property
    def blend_loss(self) -> float | None:
        """Log loss of the blend of the complete candidates; None while it has no members."""
        return self._known.gains.blend_loss

    # -- what happens

    def replay(self) -> None:
        """Take in the state that earlier sessions left: logs, decisions, complete candidates.

        A candidate with a finished fold that no decision has seen (`is_decided`) is judged later.
        """
        numbers = [d.number for s in self._state for d in s.decisions.values()]
        self._next_number = max(numbers, default=-1) + 1
        for state in self._state:
            self._known.remember(state)
        complete = (s.summary for s in self._state if s.summary.status == "complete")
        self._known.gains.join([summary for summary in complete if is_decided(summary)])

    def fold_ended(self, name: str) -> None:
        """Take in a fold trial that ended in some way."""
        self._known.measure(self._state[name])

    def is_judged_at_rungs(self, state: CandidateState) -> bool:
        """True where the fold that starts now is the candidate's first and may be parked."""
        return self._config.stops_epochs and not state.ended and not self.is_granted(state)

    def reach(self, name: str, fold: int, epoch: int, more: bool) -> RaceDecision | None:
        """The decision to park a running first fold after so many epochs; None: it goes on.

        It is parked where its loss is not among the best 1/reduction of its rung and, once there is
        a blend, a gain over that is not plausible either; but not where it would be the next to go
        on. `more`: see `moves`.
        """
        state = self._state[name]
        losses = self._known.measure(state)
        rung = next((r for r in self._known.rungs_of(name) if r.epoch == epoch), None)
        others = state.running - {fold}
        if rung is None or len(losses) < epoch or others or not self.is_judged_at_rungs(state):
            return None
        place = self._known.place(state, rung)
        better = self._known.gains.at_rung(name, fold, epoch)
        if place.is_among_best or (better is not None and self._known.is_plausible(better[1])):
            return None
        reason = (
            f"log loss {place.loss:.4f} is above {place.cut:.4f}, the cut for the best "
            f"1/{self._config.reduction} of {place.count} trials at {rung.fraction:.0%} of their "
            "epochs"
        )
        if better is not None:
            reason = f"{gain_text(better)}, and {reason}"
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
        better = self._known.gains.of(summary)
        evidence = self._known.evidence(summary, better)
        if len(summary.finished) == summary.folds:
            reason = (
                evidence.gain_text if self._known.gains.has_members else "the first of the blend"
            )
            self._known.gains.join([summary])
            return self._decision(state, "complete", reason, better, fold=fold)
        if state.record.is_student:
            return self._decision(state, "continue", _STUDENT, better, fold=fold)
        reason = self._rule.explain(evidence)
        if self._rule.takes_turns:
            if self._rule.stops(evidence):
                return self._decision(state, "park", reason, better, fold=fold)
            if state.granted:
                return self._decision(state, "continue", reason, better, fold=fold)
            if not self._known.gains.has_members:
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
            if state.record.is_student:
                continue
            if may_run and not state.running and self._known.is_out(state):
                better = self._known.gains.of(state.summary)
                reason = self._rule.explain(self._known.evidence(state.summary, better))
                action: RaceAction = "park" if self._rule.takes_turns else "stop"
                yield self._decision(state, action, reason, better)

    def grant_first(self, state: CandidateState) -> RaceDecision | None:
        """The decision that a student, or the first candidate of a sweep, gets all its folds.

        None with others. So a sweep has a blend as soon as any can have one.
        """
        if not self._rule.takes_turns:
            return None
        if state.record.is_student:
            return self._decision(state, "continue", _STUDENT, None)
        if len(self._state) > 1:
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
            better = self._known.gains.of(state.summary)
            return self._decision(state, "continue", move.reason, better)
        assert latest is not None  # it is parked by a decision
        copied = {"action": "continue", "reason": move.reason} | self._sums()
        return latest.model_copy(update=copied)

    def give_up(self, state: CandidateState, reason: str) -> RaceDecision:
        """The decision that a waiting or parked candidate is stopped for good."""
        latest = state.latest
        if latest is not None and state.parked_epoch is not None:
            return latest.model_copy(update={"action": "stop", "reason": reason} | self._sums())
        return self._decision(state, "stop", reason, self._known.gains.of(state.summary))

    # -- what runs next

    def moves(self, more: bool) -> Iterator[Move]:
        """What could run now, the best first. `more`: there are further candidates to suggest."""
        yield from self._begun()
        if self._owes_a_grant():
            yield from self._grants()
        yield from self._returning()
        if more:
            yield Move("new")
        for state, reason in self._known.by_promise():
            yield Move("grant" if state.is_between_folds else "return", state, reason)
        yield from self._spare()

    def parked(self) -> list[CandidateState]:
        """The candidates parked in mid-training, the least promising first."""
        ranked = [state for state, _ in self._known.by_promise(least=-math.inf)]
        return [state for state in reversed(ranked) if state.parked_epoch is not None]

    def is_granted(self, state: CandidateState) -> bool:
        """True where all folds of a candidate may run."""
        return not self._rule.takes_turns or state.granted

    def _begun(self) -> Iterator[Move]:
        """First folds that were interrupted, then folds of those that may have them all."""
        yield from (Move("fold", state) for state in self._state if state.is_new)
        for state in self._state:
            if not state.waiting or state.leaving or not self.is_granted(state):
                continue
            if state.running and (self._rule.one_by_one or self._known.is_out(state)):
                continue
            yield Move("fold", state)

    def _owes_a_grant(self) -> bool:
        # One that can no longer be complete makes room for another.
        short = self._short_first()
        granted = sum(s.was_granted and not s.hopeless and s is not short for s in self._state)
        measured = self._known.measured - {short.name if short else ""}
        folds = max((state.folds for state in self._state), default=0)
        return granted < math.ceil(len(measured) / self._config.one_in(folds))

    def _short_first(self) -> CandidateState | None:
        """The first candidate where it is shorter than others: it is there for an early result."""
        first = next(iter(self._state), None)
        longest = max((_epochs(state) for state in self._state), default=0)
        return None if first is None or _epochs(first) >= longest else first

    def _grants(self) -> Iterator[Move]:
        for state, reason in self._known.by_promise():
            if state.is_between_folds:
                yield Move("grant", state, reason)

    def _returning(self) -> Iterator[Move]:
        """Parked trials that are among the best of their rung by now, the furthest first."""
        found = []
        for state in self._state:
            if state.parked_epoch is None:
                continue
            rung, place = self._known.standing(state)
            if rung is not None and place is not None and place.is_among_best:
                reason = f"among the best 1/{self._config.reduction} of its rung by now"
                found.append(
                    (-rung.fraction, place.loss, state.number, Move("return", state, reason))
                )
        yield from (move for *_, move in sorted(found, key=lambda f: f[:3]))

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
            _, place = self._known.standing(state)
            promising = place.is_among_best if place else not self._config.stops_epochs
            if promising and not self._known.is_out(state):
                found.append((place.rank if place else 0.5, state.number, state))
        for _, _, state in sorted(found, key=lambda f: f[:2]):
            yield Move("grant", state, "a slot is idle")

    # -- what is known of a candidate

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
        evidence = self._known.evidence(summary, better)
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
            "blend_logloss": self._known.gains.blend_loss,
            "epochs_trained": self._state.epochs_trained,
        }


def is_decided(summary: CandidateSummary) -> bool:
    """True where the race has judged all of the candidate's finished folds.

    Not so after a kill between a trial's record and the decision, or where that is torn.
    """
    judged = max((d.folds_done for d in summary.decisions), default=0)
    return judged >= len(summary.finished)


def _epochs(state: CandidateState) -> int:
    return int(state.record.params.get("epochs", 0))


def _judged_fold(state: CandidateState) -> int:
    """The finished fold without a decision; when judged again, the one of the latest decision."""
    new = [trial.fold for trial in state.summary.finished if trial.fold not in state.decisions]
    if new:
        return new[-1]
    latest = state.latest
    return first_fold(state) if latest is None else latest.fold


def _rows(summary: CandidateSummary) -> int:
    best = summary.best
    return sum(t.variants[best].rows for t in summary.counted) if best else 0
