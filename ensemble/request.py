"""Who takes part in a blend: the run's members, those of further runs, predictions made elsewhere.

Takes a `Request`, gives the members' sources, or everything that is wrong with what was asked for
before an array is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ensemble.added import NOTHING_ADDED, VARIANT, Added
from ensemble.eligible import Prices, wish_problems
from ensemble.oof_source import OofSource
from ensemble.outcome import Considered
from ensemble.pool import Member
from ensemble.sources import other_runs, run_sources
from experiment.config import EnsembleConfig
from experiment.errors import (
    ConfigError,
    DataError,
    Problem,
    RunFailure,
    RunFolderError,
    UserError,
)
from experiment.records import CandidateSummary
from experiment.store import RunStore
from experiment.variants import EMA, RAW

_KINDS = (ConfigError, DataError, RunFolderError)
"""Of wrong wishes, of predictions made elsewhere, of further run folders."""

_NAMED = 8
"""Candidates that a message names."""


@dataclass(frozen=True)
class Request:
    """What a blend is made of beside the run folder and its config."""

    prices: Callable[[Sequence[Member]], Prices]
    """Time and bytes of members; time has to be measured, so only those that matter are asked
    for."""
    runs: tuple[str, ...] = ()
    """Further run folders whose members take part."""
    added: Added = NOTHING_ADDED
    """Predictions made elsewhere."""
    problems: tuple[Problem, ...] = ()
    """What is known to be wrong with them: told with all other wrong wishes."""
    unread: tuple[Member, ...] = ()
    """Those with problems: names may mean them."""


def check_request(store: RunStore, config: EnsembleConfig, request: Request) -> None:
    """What `blend_run` checks before it reads an array, before soups are made: these are no members
    yet, but names may exclude them. UserError with every wish that cannot be met."""
    names = tuple(name for name in config.exclude if not name.endswith(" soup"))
    requested_sources(store, config.model_copy(update={"exclude": names}), request)


def requested_sources(store: RunStore, config: EnsembleConfig, request: Request) -> list[OofSource]:
    """Of all members; UserError with every wish that cannot be met: no array has been read yet."""
    further, problems = _further(store, request.runs)
    own = run_sources(store)
    sources = [*own, *further, *request.added.sources]
    named = [*(s.member for s in sources), *request.unread]
    lost = _without_weights(store, [s.member for s in own])
    wishes = wish_problems(named, config, [*lost, *_incomplete(store)])
    told = [*wishes, *request.problems, *problems]
    if told and (named or lost or request.problems or problems):  # else: nothing to blend
        raise _kind(wishes, request.problems, problems)(told)
    return sources


def _further(store: RunStore, runs: Sequence[str]) -> tuple[list[OofSource], tuple[Problem, ...]]:
    """Of further run folders, and what is wrong with these."""
    try:
        return other_runs(store, runs), ()
    except UserError as error:
        return [], error.problems


def _kind(
    wishes: Sequence[Problem], added: Sequence[Problem], runs: Sequence[Problem]
) -> type[UserError]:
    """The class of an error with all of them."""
    kinds = [k for k, found in zip(_KINDS, (wishes, added, runs), strict=True) if found]
    return kinds[0] if len(kinds) == 1 else UserError


def _without_weights(store: RunStore, members: Sequence[Member]) -> list[Member]:
    """Members of complete candidates that are not among these."""
    there = {(m.candidate, m.variant) for m in members}
    return [
        Member(s.candidate.candidate, variant, s.candidate.backbone)
        for s in store.summaries()
        if s.status == "complete"
        for variant in s.variants
        if (s.candidate.candidate, variant) not in there
    ]


def _incomplete(store: RunStore) -> list[Member]:
    """What candidates would have given, had all their folds ended."""
    return [
        Member(s.candidate.candidate, variant, s.candidate.backbone)
        for s in store.summaries()
        if s.status != "complete"
        for variant in (RAW, EMA)
    ]


def count_considered(store: RunStore, sources: Sequence[OofSource]) -> Considered:
    """What stands to choose from; RunFailure where there is nothing to blend."""
    own = [s.member for s in sources if not s.member.run and s.member.variant != VARIANT]
    lost = _without_weights(store, own)
    summaries = store.summaries()
    if not sources:
        raise _nothing_to_blend(store, summaries, without_weights=len(lost))
    complete = sum(1 for s in summaries if s.status == "complete")
    further = {(s.member.run, s.member.candidate) for s in sources if s.member.run}
    return Considered(complete + len(further), len(lost))


def _nothing_to_blend(
    store: RunStore, summaries: Sequence[CandidateSummary], without_weights: int
) -> RunFailure:
    if without_weights:
        return RunFailure(
            f"no member to blend: the weights of all {without_weights} are gone from "
            f"{store.root}/trials; delete a candidate's fold folders there and `resume "
            f"{store.root}` to train it anew"
        )
    named = [f"{s.candidate.candidate} {s.status}" for s in summaries[:_NAMED]]
    if len(summaries) > _NAMED:
        named.append(f"{len(summaries) - _NAMED} more")
    if any(s.status in ("failed", "diverged") for s in summaries):
        advice = (
            f"see {store.root}/logs, then `resume {store.root}`, with --retry-failed where trials "
            "failed"
        )
    else:
        advice = (
            f"`resume {store.root}` goes on; where a limit ended the sweep, raise it: --set with "
            "search.candidates, search.fold_trials, resources.gpu_hours or resources.time_budget"
        )
    return RunFailure(
        f"no complete candidate to blend (candidates: {', '.join(named) or 'none'}); {advice}"
    )
