"""A teacher of students: the soft labels that a run's blend gives to each fold's training images.

Takes a run folder with a blend, writes `teachers/<digest>/`. The models of fold k, which were
trained without fold k, look at the images that fold k's students train on; how they are combined is
chosen on the other folds' rows (`ensemble/selection/without_fold.py`).
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.core.errors import RunFolderError
from foldrace.core.plugins import naming_plugins
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.members import OofSource, other_runs, run_sources
from foldrace.ensemble.selection.without_fold import FoldBlend, fold_blends
from foldrace.inference.run_models import BATCH, RunModels, best_device
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.oof import digest
from foldrace.run_folder.records import TeacherKind, TeacherRef
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.teachers import FoldTeacher, TeacherModel, TeacherRecord, rows_digest
from foldrace.trainables.data.loader import loader_settings
from foldrace.trainables.predict import log_probabilities, scoring_loader

_SOUP = "soup"  # its ingredients were chosen by the labels of all folds


@dataclass(frozen=True)
class Unlabelled:
    """Images that students learn from by the teacher's word alone."""

    files: tuple[Path, ...] = ()
    of_test_set: bool = False


def make_teacher(
    store: RunStore,
    files: Sequence[Path],
    kind: TeacherKind,
    workers: int = 1,
    unlabelled: Unlabelled = Unlabelled(),
    on_fold: Callable[[int], None] = lambda fold: None,
) -> TeacherRef:
    """The teacher of a run's students; one that is there already is not made again.

    `files` (n,) are the images of folds.csv, `on_fold` is called with each fold that begins.
    RunFolderError without a blend, or where models or OOF rows cannot be read.
    """
    ensemble = store.blend.record()
    if ensemble is None:
        raise RunFolderError.single(
            store.root,
            "has no blend to learn from yet; `foldrace ensemble DIR` makes one from complete "
            "candidates",
        )
    with naming_plugins():
        maker = _Maker(store, ensemble, (*files, *unlabelled.files), workers)
        config = store.config().ensemble.model_copy(update={"method": _method(store)})
        parts = maker.run("").parts
        blends = list(fold_blends(store, config, maker.sources, kind, parts))
        record = TeacherRecord(
            kind=kind,
            folds_hash=store.folds().hash,
            folds=tuple(maker.record(blend, len(unlabelled.files)) for blend in blends),
            unlabelled=len(unlabelled.files),
            of_test_set=unlabelled.of_test_set,
        )
        images = [str(file) for file in unlabelled.files]
        known = store.teachers.find(record, images)
        if known is not None and not store.teachers.problems(known.digest, store.folds()):
            return known
        arrays = {}
        for blend in blends:
            on_fold(blend.fold)
            arrays[blend.fold] = maker.log_prob(blend)
        return store.teachers.save(record, arrays, images)


def _method(store: RunStore) -> str:
    """The config's method; greedy in place of one that takes soups or snapshots alone."""
    asked = store.config().ensemble.method
    return "greedy" if asked in (_SOUP, "snapshot") else asked


class _Maker:
    """Everything that is run to make one teacher."""

    def __init__(
        self, store: RunStore, ensemble: EnsembleRecord, files: Sequence[Path], workers: int
    ) -> None:
        self._store, self._files, self._workers = store, tuple(files), workers
        self._device = best_device()
        self._session = uuid.uuid4().hex
        names = sorted({m.run for m in ensemble.members if m.run and not m.added})
        self._runs = {name: member_run(store, name) for name in names} | {"": store}
        self._models: dict[str, RunModels] = {}
        further = other_runs(store, names) if names else []
        every = [*run_sources(store), *further]
        self.sources: list[OofSource] = [s for s in every if self._may_teach(s.member)]

    def run(self, name: str) -> RunModels:
        """The models of a run folder."""
        if name not in self._models:
            self._models[name] = RunModels(self._runs[name], self._device)
        return self._models[name]

    def _may_teach(self, member: Member) -> bool:
        """Students do not teach: so a teacher stays the same while it has students."""
        of_soup = member.variant == _SOUP
        return not of_soup and not self._runs[member.run].candidate(member.candidate).is_student

    def record(self, blend: FoldBlend, unlabelled: int) -> FoldTeacher:
        """Who took part; the array's digest is still to come."""
        models = [
            TeacherModel(
                candidate=member.candidate,
                variant=member.variant,
                run=member.run,
                fold=blend.model_fold,
                weight=float(weight),
                temperature=temperature,
                weights_digest=self._weights_digest(member, blend.model_fold),
            )
            for member, weight, temperature in zip(
                blend.members, blend.combiner.weights, blend.temperatures, strict=True
            )
        ]
        return FoldTeacher(
            fold=blend.fold,
            models=tuple(models),
            method=blend.method,
            blend_temperature=blend.blend_temperature,
            chosen_on=blend.chosen_on,
            rows_digest=rows_digest(self._store.folds(), blend.fold, unlabelled),
            array_digest="",
        )

    def _weights_digest(self, member: Member, fold: int) -> str:
        try:
            return digest(self._runs[member.run].weights(member.candidate, fold, member.variant))
        except ValueError:  # told by name where the model is opened
            return ""

    def log_prob(self, blend: FoldBlend) -> NDArray[np.float16]:
        """(m + u, C) of the fold's training rows, then of the unlabelled images."""
        table = self._store.folds()
        extra = np.arange(len(table.fold), len(self._files))
        rows = np.concatenate([table.training_rows(blend.fold), extra])
        return blend.log_prob(
            [self._predicted(member, blend.model_fold, rows) for member in blend.members]
        )

    def _predicted(self, member: Member, fold: int, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        run = self.run(member.run)
        model = run.open(member.candidate, member.variant, fold)
        source = run.images(self._files, model.model_config, self._workers, self._session)
        settings = loader_settings(self._workers, self._device.type)
        loader = scoring_loader(source, rows, model.model_config, BATCH, settings, run.parts)
        found = log_probabilities(
            model.module, loader, self._device, model.autocast, model.model_config.activation
        )[0]
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return found
