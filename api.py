"""Foldrace as Python code: start or resume a sweep, and read what a run folder holds.

Takes what the commands take, gives a `Run`; errors are the exceptions of `foldrace.core.errors`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from foldrace.console.terminal import Terminal
from foldrace.core.errors import RunFolderError, listing
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.tables import leaderboard_csv

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray


class Run:
    """A run folder's results as DataFrames; reads only, also while the sweep still writes."""

    def __init__(self, store: RunStore) -> None:
        self._store = store

    def __repr__(self) -> str:
        return f"Run({self.folder!r})"

    @property
    def folder(self) -> str:
        """Path or URL of the run folder."""
        return self._store.root

    def leaderboard(self) -> pd.DataFrame:
        """One row per candidate, best first; the columns of leaderboard.csv."""
        import pandas as pd

        return pd.read_csv(io.StringIO(leaderboard_csv(self._store.summaries(running=True))))

    def oof(
        self, candidate: str | None = None, variant: str | None = None, repeat: int | None = None
    ) -> pd.DataFrame:
        """Out-of-fold probabilities of the blend, or of a complete candidate's variant.

        One row per scored training image: `image_path`, `target`, `fold`, one column per class.
        `variant` None is the candidate's best one. With `folds.repeats` further columns `fold_r1`,
        ... follow `fold`, and the probabilities of a candidate, which may be stopped, too, are the
        mean over the repeats that are complete, or those of `repeat` (from 0) alone. Raises
        RunFolderError where there is no such blend, candidate, variant or repeat.
        """
        import pandas as pd

        folds, rows = self._store.folds(), self._store.scored_rows()
        table = pd.DataFrame(
            {
                "image_path": np.array(folds.image_paths, object)[rows],
                "target": np.array(folds.targets, object)[rows],
                "fold": folds.fold[rows],
                **{f"fold_r{i}": split[rows] for i, split in enumerate(folds.later, 1)},
            }
        )
        found = self._prob(candidate, variant, repeat)
        prob = pd.DataFrame(found, columns=list(self._store.classes()))
        return pd.concat([table, prob], axis=1)

    def _prob(
        self, candidate: str | None, variant: str | None, repeat: int | None
    ) -> NDArray[np.float32]:
        """(N, C) probabilities on the scored rows."""
        if candidate is None:
            if repeat is not None:
                message = f"a blend is of all repeats; give a candidate for repeat {repeat}"
                raise RunFolderError.single(self.folder, message)
            return self._store.blend.oof()
        complete = {s.candidate.candidate: s for s in self._store.summaries() if s.best is not None}
        summary = complete.get(candidate)
        repeats = summary.complete_repeats if summary is not None and summary.repeats > 1 else ()
        if summary is None or (summary.status != "complete" and not repeats):
            raise RunFolderError.single(
                self.folder, f"has no complete candidate {candidate!r}; see leaderboard()"
            )
        variants = summary.own_variants
        if variant is not None and variant not in variants:
            raise RunFolderError.single(
                self.folder,
                f"{candidate} has no variant {variant!r}; it has {', '.join(variants)}",
            )
        known = repeats or (0,)
        if repeat is not None and repeat not in known:
            message = f"{candidate} has no complete repeat {repeat}; it has {listing(known)}"
            raise RunFolderError.single(self.folder, message)
        wanted = known if repeat is None else (repeat,)
        return self._store.oof(candidate, variant or summary.best or variants[0], wanted)


def open_run(folder: str | Path) -> Run:
    """Open a run folder, a path or `s3://...`. Raises RunFolderError where there is none."""
    return Run(RunStore.open(folder))


def run(
    config: str | Path,
    out: str | None = None,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    smoke: bool = False,
) -> Run:
    """Sweep, blend, submission and report, as `foldrace run CONFIG` does.

    `config` may be a folder, zip or table of images instead. `overrides` are those of `--set`, such
    as `["training.epochs=3"]`. Raises UserError with every problem before anything is written,
    Interrupted on Ctrl-C.
    """
    from foldrace.commands.run import run as command

    return Run(command(Path(config), out, overrides, address, False, smoke, Terminal()))


def resume(
    folder: str | Path,
    *,
    overrides: Sequence[str] = (),
    address: str | None = None,
    retry_failed: bool = False,
    data_root: str | None = None,
    trust_plugins: bool = False,
) -> Run:
    """Go on with a run after any interruption, or extend it, as `foldrace resume DIR` does.

    `data_root` is the folder where all data lie now, after they have moved; `trust_plugins` lets
    the run's plugins run, where another user or machine has begun it.
    """
    from foldrace.commands.resume import resume as command

    return Run(
        command(
            str(folder),
            overrides,
            retry_failed,
            address,
            Terminal(),
            data_root=data_root,
            trust_plugins=trust_plugins,
        )
    )
