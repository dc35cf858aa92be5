"""The blend of what is complete while a sweep goes on, by a method that is quick.

Takes a run folder, writes `ensemble/`, where nothing better lies there. Updates of the sweep and
the user's `submit` share it.
"""

from __future__ import annotations

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import RunFolderError
from foldrace.core.plugins import naming_plugins
from foldrace.ensemble.methods import METHODS
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.members import is_named, run_sources
from foldrace.ensemble.selection.select import Request, blend_run
from foldrace.inference.plugins import run_parts
from foldrace.inference.speed import member_prices
from foldrace.reporting.formats import counted
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore

_QUICK = "greedy"
"""Method in place of one that tries many, or averages weights first."""


@naming_plugins()
def blend_so_far(store: RunStore) -> EnsembleRecord:
    """Blend the complete candidates by the config's settings; a better blend stays."""
    parts = run_parts(store)
    members = [source.member for source in run_sources(store)]
    config = _settings(store.config().ensemble, members)
    method = parts[METHODS].get(config.method)
    if method is None or method.needs_soups:
        config = config.model_copy(update={"method": _QUICK})
    bounded = config.max_ms_per_image is not None or config.max_bytes is not None
    return blend_run(
        store,
        config,
        Request(
            prices=lambda m: member_prices(store, m) if bounded else Prices({}, {}),
            parts=parts,
            rival=store.blend.record(),
        ),
    )


def _settings(config: EnsembleConfig, members: list[Member]) -> EnsembleConfig:
    """The settings without names of what is not complete yet."""
    known = {
        key: tuple(name for name in names if any(is_named(member, name) for member in members))
        for key, names in (("exclude", config.exclude), ("include", config.include))
    }
    return config.model_copy(update=known)


def require_complete(store: RunStore, at_work: bool) -> None:
    """Raise RunFolderError, which says how far the sweep is, where no candidate is complete."""
    summaries = store.summaries(running=at_work)
    if any(summary.status == "complete" for summary in summaries):
        return
    advice = (
        f"the sweep goes on, try again later (`foldrace status {store.root}`)"
        if at_work
        else f"`foldrace resume {store.root}` goes on"
    )
    raise RunFolderError.single(
        store.root, f"has no complete candidate to blend yet: {_how_far(summaries)}; {advice}"
    )


def _how_far(summaries: list[CandidateSummary]) -> str:
    """Counts in words: `3 fold trials of 2 candidates have ended, c0001 is ahead with 2 of 5`."""
    ended = sum(len(summary.trials) for summary in summaries)
    trials = f"{counted(ended, 'fold trial')} of {counted(len(summaries), 'candidate')} ended"
    open_ones = [s for s in summaries if not s.settled and s.finished]
    if not open_ones:
        return trials
    first = max(open_ones, key=lambda s: len(s.finished))
    name, folds = first.candidate.candidate, len(first.finished)
    return f"{trials}, {name} is ahead with {folds} of its {first.folds} folds"
