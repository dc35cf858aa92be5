"""Foldrace as Python code: start or resume a sweep, and read what a run folder holds.

Takes what the commands take, gives a `Run`; errors are the exceptions of `foldrace.core.errors`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from foldrace.commands.terminal import Terminal
from foldrace.core.errors import RunFolderError
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

    def oof(self, candidate: str | None = None, variant: str | None = None) -> pd.DataFrame:
        """Out-of-fold probabilities of the blend, or of a complete candidate's variant.

        One row per scored training image: `image_path`, `target`, `fold`, one column per class.
        `variant` None is the candidate's best one. Raises RunFolderError where there is no such
        blend, candidate or variant.
        """
        import pandas as pd

        folds, rows = self._store.folds(), self._store.scored_rows()
        table = pd.DataFrame(
            {
                "image_path": np.array(folds.image_paths, object)[rows],
                "target": np.array(folds.targets, object)[rows],
                "fold": folds.fold[rows],
            }
        )
        prob = pd.DataFrame(self._prob(candidate, variant), columns=list(self._store.classes()))
        return pd.concat([table, prob], axis=1)

    def _prob(self, candidate: str | None, variant: str | None) -> NDArray[np.float32]:
        """(N, C) probabilities on the scored rows."""
        if candidate is None:
            return self._store.blend.oof()
        complete = {s.candidate.candidate: s for s in self._store.summaries() if s.best is not None}
        summary = complete.get(candidate)
        if summary is None or summary.status != "complete":
            raise RunFolderError.single(
                self.folder, f"has no complete candidate {candidate!r}; see leaderboard()"
            )
        variants = summary.own_variants
        if variant is not None and variant not in variants:
            raise RunFolderError.single(
                self.folder,
                f"{candidate} has no variant {variant!r}; it has {', '.join(variants)}",
            )
        return self._store.oof(candidate, variant or summary.best or variants[0])


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
