"""Fold 0 of a config in a new run folder, ready for `run_trial`.

Takes a parsed config and hyperparameters, gives a `TrialSpec`; and a monitor that wants nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.config.schema import SweepConfig
from foldrace.dataset.folds import folds_csv, make_folds
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.search_spaces.space import build_space
from foldrace.trainables.spec import EpochReport, TrialSpec, read_trial

FOLD = 0


class Silent:
    """A monitor that wants nothing and never stops the trial."""

    def report(self, epoch: EpochReport) -> None:
        """Ignore it: the log has it."""

    def stop_requested(self) -> bool:
        return False


def fold_spec(
    config: SweepConfig,
    folder: Path,
    backbone: str,
    knobs: Mapping[str, Value],
    seed: int = 0,
    cpus: int = 1,
) -> TrialSpec:
    """The config's default candidate with other `knobs`; the run folder lies in `folder`."""
    manifest = read_manifest(config.data)
    store = RunStore(tempfile.mkdtemp(dir=folder))
    search = config.search.model_copy(update={"seed": seed})
    config = config.model_copy(update={"search": search})
    store.create(config, folds_csv(manifest, make_folds(manifest, config.folds)), manifest.classes)
    params = build_space(config, "")[0].configured(backbone, knobs).as_dict()
    candidate = CandidateRecord(candidate="c0000", backbone=backbone, params=params)
    store.save_candidate(candidate)
    return TrialSpec(
        run=store.root,
        image_root=str(manifest.image_root),
        candidate=candidate.candidate,
        fold=FOLD,
        cpus=cpus,
    )


def params_of(spec: TrialSpec) -> TrialParams:
    """The hyperparameters that the trial trains with."""
    return read_trial(spec, RunStore.open(spec.run)).params
