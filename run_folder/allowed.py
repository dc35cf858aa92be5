"""Run folders as the user allows them: whose plugins may run, and which ones a blend may read.

The one door for whatever runs code of a run folder or follows a name in it to another one. Takes
what the user said in this command; what was allowed before is `core/consent.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from foldrace.core.consent import allow_plugins, allow_run, allowed_plugins, is_allowed_run
from foldrace.core.errors import Problem, RunFolderError, UserError
from foldrace.run_folder.store import RunStore


def open_allowed(root: str | Path, trust_plugins: bool, runs: Sequence[str] = ()) -> RunStore:
    """A run folder whose plugins may run; `runs`: further folders that its blend may read.

    `trust_plugins` allows the plugins of all of them. RunFolderError where there is no run, or
    where plugins are not allowed.
    """
    store = RunStore.open(root)
    problems: list[Problem] = []
    opened = [store]
    for run in runs:
        try:
            other = RunStore.open(run)
        except UserError as error:
            problems += error.problems
            continue
        allow_run(store.root, other.root)
        opened.append(other)
    if trust_plugins:
        for each in (*opened, *_earlier_runs(store)):
            allow_plugins(each.plugins())
    for each in opened:
        try:
            allowed_plugins(each.plugins())
        except UserError as error:
            problems += error.problems
    if problems:
        raise RunFolderError(problems)
    return store


def is_run(root: str) -> bool:
    """True where there is a run folder."""
    try:
        return RunStore(root).exists
    except UserError:
        return False


def member_run(store: RunStore, run: str) -> RunStore:
    """The run folder `run` of a member of `store`'s blend; '' is the store itself.

    ensemble.json may come from anybody and name any folder or URL: nothing of it is touched unless
    the user has named it. RunFolderError where not, or where it is gone.
    """
    if not run:
        return store
    if not is_allowed_run(store.root, run):
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json",
            f"has members of another run folder, {run!r}, which you have not named; where you "
            "know and trust it, name it once: --run DIR",
        )
    return RunStore.open(run)


def _earlier_runs(store: RunStore) -> Iterator[RunStore]:
    """The further folders of the blend that is there, as far as the user has named them."""
    blend = store.blend.record()
    for run in {member.run for member in blend.members if member.run} if blend else ():
        if is_allowed_run(store.root, run):
            yield member_run(store, run)
