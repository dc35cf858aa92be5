"""Earlier run folders that a search learns from (`search.warm_start`).

Takes folders and the space, gives their candidates that fit it, or what is wrong with a folder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from foldrace.config.hyperparameters import KNOBS, TrialParams
from foldrace.core.errors import Problem, RunFolderError, UserError, listing
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.search.sampler_history import EarlierCandidate
from foldrace.search_spaces.space import SearchSpace

_REMOVE = (
    "put the folder back, or remove it from the list; a run that learnt from it goes on without it "
    "with `resume RUN --set search.warm_start=[]`"
)
_BEST = 2  # candidates of an earlier run that are tried first
_INSTRUCTIVE = ("complete", "stopped", "diverged")  # statuses that a sampler can learn from


def earlier_candidates(
    roots: Sequence[str], space: SearchSpace, folds_hash: str
) -> list[EarlierCandidate]:
    """Candidates of the folders that have ended and lie in the search space.

    Raises UserError for a folder that cannot be read.
    """
    return [
        _earlier(summary, run, space, folds_hash == store.folds().hash)
        for run, root in enumerate(roots, start=1)
        for store in [RunStore.open(root)]
        for summary in _usable(store, space)
    ]


def best_elsewhere(earlier: Sequence[EarlierCandidate]) -> list[tuple[str, TrialParams]]:
    """Backbone and hyperparameters of the `_BEST` complete candidates with the least loss a run.

    Of runs whose losses are not comparable with this one's, such as those on other data: the others
    guide the sampler, and a fold trial of theirs need not be trained again.
    """
    found: list[tuple[str, TrialParams]] = []
    for run in dict.fromkeys(e.run for e in earlier):
        complete = [
            (e.summary.pooled_calibrated(e.summary.best), e.summary)
            for e in earlier
            if e.run == run and not e.comparable
            if e.summary.status == "complete" and e.summary.best is not None
        ]
        ranked = sorted(complete, key=lambda one: (one[0], one[1].candidate.candidate))
        found += [(s.candidate.backbone, _params(s)) for _, s in ranked[:_BEST]]
    return found


def warm_start_problems(roots: Sequence[str], space: SearchSpace) -> Iterator[Problem]:
    """Problems of folders that are no run folders, or that nothing can be learnt from."""
    for i, root in enumerate(roots):
        where = f"search.warm_start[{i}]"
        try:
            store = RunStore.open(root)
            if _usable(store, space):
                continue
            summaries = store.summaries()
        except RunFolderError as error:
            yield from (Problem(where, f"{problem}; {_REMOVE}") for problem in error.problems)
        except (UserError, OSError) as error:
            yield Problem(where, f"{root} cannot be read: {error}; {_REMOVE}")
        else:
            yield Problem(where, _why_unusable(root, summaries, space))


def _usable(store: RunStore, space: SearchSpace) -> list[CandidateSummary]:
    return [
        summary
        for summary in store.summaries()
        if summary.status in _INSTRUCTIVE
        and summary.candidate.params.keys() <= KNOBS.keys()  # else it is of a newer version
        and space.place(summary.candidate.backbone, _params(summary)) is not None
    ]


def _earlier(
    summary: CandidateSummary, run: int, space: SearchSpace, same_folds: bool
) -> EarlierCandidate:
    comparable = same_folds and space.has_fixed_values(summary.candidate.backbone, _params(summary))
    return EarlierCandidate(summary, run, comparable)


def _why_unusable(root: str, summaries: Sequence[CandidateSummary], space: SearchSpace) -> str:
    ended = [s for s in summaries if s.status in _INSTRUCTIVE]
    if not ended:
        return f"{root} has no candidate that ended: nothing can be learnt from it; remove it"
    backbones = Counter(s.candidate.backbone for s in ended)
    others = [b for b in backbones if b not in space.backbones]
    if len(others) == len(backbones):
        return (
            f"{root} has candidates of {listing(others)} alone; none is in search.backbones "
            f"({listing(space.backbones)})"
        )
    return (
        f"{root} has {len(ended):,} candidates that ended, but each has a hyperparameter outside "
        "search.space; widen the ranges, or remove it"
    )


def _params(summary: CandidateSummary) -> TrialParams:
    return TrialParams.from_dict(summary.candidate.params)
