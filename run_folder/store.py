"""The run folder: the only code that knows its files.

Takes and gives records and arrays. `RunStore` has the run as a whole (config, classes, plugins,
tables), `TrialFiles` its candidates and fold trials, `EnsembleFolder` its blend.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foldrace.config.load import to_public_yaml, to_yaml
from foldrace.config.schema import DataConfig, SweepConfig
from foldrace.config.texts import load_json, load_yaml
from foldrace.core.errors import RunFolderError, cause, listing
from foldrace.core.files import (
    LocalFiles,
    read_text,
    record_json,
    sound_record,
    to_bytes,
    warn_ignored,
)
from foldrace.core.plugin_files import PluginFile
from foldrace.dataset.curation import MERGED, Merged, own_classes, read_merged
from foldrace.dataset.manifest import ordered_classes
from foldrace.run_folder.blend_records import ResultUpdate, SubmissionNote
from foldrace.run_folder.candidates import FOLDS
from foldrace.run_folder.claims import Claims
from foldrace.run_folder.ensemble_folder import EnsembleFolder
from foldrace.run_folder.gpu_memory import GpuMemory
from foldrace.run_folder.progress import RunningNow
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.tables import decisions_csv, leaderboard_csv, trials_csv
from foldrace.run_folder.teachers import TeacherFiles
from foldrace.run_folder.trials import TrialFiles

_CONFIG, _CLASSES, _PLUGINS = "sweep.yaml", "classes.json", "plugins"
_UPDATE = "ensemble/update.json"
_RUNNING, _GPUS = "logs/running.json", "logs/gpu_memory.json"


class RunStore(TrialFiles):
    """One run folder: a local path, or a URL such as s3://bucket/run."""

    _parsed: tuple[str, SweepConfig] | None = None
    """The text of sweep.yaml and what it holds: to parse it takes 10 ms."""
    _data: DataConfig | None = None

    @property
    def exists(self) -> bool:
        """True where the folder holds a run."""
        return self.files.exists(_CONFIG)

    @property
    def drivers(self) -> Claims:
        """Who sweeps into the folder."""
        return Claims(self.files, "logs/driver")

    @property
    def blend(self) -> EnsembleFolder:
        """The files of the blend."""
        return EnsembleFolder(self.files)

    @property
    def teachers(self) -> TeacherFiles:
        """The files of the teachers of students."""
        return TeacherFiles(self.files)

    def create(
        self,
        config: SweepConfig,
        folds: str,
        classes: Sequence[str],
        plugins: Sequence[PluginFile] = (),
        others: Mapping[str, bytes] | None = None,
    ) -> None:
        """Lay the folder out. `folds` is the text of folds.csv, `others` further files by name.

        sweep.yaml comes last, so that a folder with it is a run. RunFolderError where nothing can
        be written.
        """
        try:
            self.files.delete(_PLUGINS)  # of a run that was not made
            for file in plugins:
                self.files.write(f"{_PLUGINS}/{file.module}.py", file.source)
            self.files.write(FOLDS, to_bytes(folds))
            self._save_classes(classes)
            for name, data in (others or {}).items():
                self.files.write(name, data)
            self.save_config(config)
        except OSError as error:
            raise RunFolderError.single(self.root, f"cannot be written: {error}") from error
        self._folds = None

    @classmethod
    def open(cls, root: str | Path) -> RunStore:
        """An existing run; RunFolderError where there is none."""
        store = cls(root)
        if not store.exists:
            raise RunFolderError.single(
                store.root, f"is no run folder (it has no {_CONFIG}); `run CONFIG` makes one"
            )
        return store

    def config(self) -> SweepConfig:
        """The resolved config that the run was made with; RunFolderError where it is damaged."""
        text = read_text(self.files, _CONFIG)
        if self._parsed is None or self._parsed[0] != text:
            try:
                config = SweepConfig.model_validate_json(json.dumps(load_yaml(text), default=str))
            except ValueError as error:
                raise RunFolderError.single(
                    f"{self.root}/{_CONFIG}", f"is damaged, or of another version: {cause(error)}"
                ) from error
            self._parsed = text, config
        config = self._parsed[1]
        return config if self._data is None else config.model_copy(update={"data": self._data})

    def use_data(self, data: DataConfig) -> None:
        """Let `config` say that the data lie there; sweep.yaml stays as it is."""
        self._data = data

    def save_config(self, config: SweepConfig) -> None:
        """Write sweep.yaml; where it has a password, for this user alone."""
        text = to_yaml(config)
        write = self.files.write if text == to_public_yaml(config) else self.files.write_private
        write(_CONFIG, to_bytes(text))

    def plugins(self) -> tuple[PluginFile, ...]:
        """The run's own copies of its plugins, in the order of their names."""
        names = [name for name in self.files.names(_PLUGINS) if name.endswith(".py")]
        return tuple(
            PluginFile(
                name.removesuffix(".py"),
                self.files.read(f"{_PLUGINS}/{name}"),
                f"{self.root}/{_PLUGINS}/{name}",
            )
            for name in sorted(names)
        )

    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of every array's columns.

        Where classes.json is damaged, those of folds.csv, with a warning in the log; RunFolderError
        where fold trials were trained on another one.
        """
        names = self._stored_classes()
        return self._classes_of_folds() if names is None else names

    def merged(self) -> Merged:
        """The classes that are made of others; RunFolderError where the file is damaged."""
        if not self.files.exists(MERGED):
            return {}
        try:
            return read_merged(self.files.read(MERGED))
        except (ValueError, RecursionError) as error:
            raise RunFolderError.single(
                f"{self.root}/{MERGED}", f"is damaged: {error}; put a copy back"
            ) from error

    def own_classes(self) -> tuple[str, ...]:
        """The classes of a submission: a merged class's own in its place."""
        return own_classes(self.classes(), self.merged())

    def mend(self) -> None:
        """See `CandidateFiles.mend`."""
        super().mend()
        if self._stored_classes() is None:
            self._save_classes(self._classes_of_folds())

    def _save_classes(self, classes: Sequence[str]) -> None:
        self.files.write(_CLASSES, to_bytes(json.dumps(list(classes), ensure_ascii=False)))

    def _stored_classes(self) -> tuple[str, ...] | None:
        """What classes.json holds; None where that is no list of different names."""
        try:
            names = load_json(self.files.read(_CLASSES).decode(errors="surrogateescape"))
        except (FileNotFoundError, ValueError):
            return None
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        return tuple(names) if is_list and len(set(names)) == len(names) > 1 else None

    def _classes_of_folds(self) -> tuple[str, ...]:
        """The classes as `create` had them: folds.csv has the label of every row."""
        where, own = f"{self.root}/{_CLASSES}", self.folds().hash
        if any(record.folds_hash != own for record in self.stored_trials().values()):
            raise RunFolderError.single(
                where,
                f"is damaged, and {FOLDS}, which would tell its classes, is not the one that fold "
                "trials were trained on; put copies of both back, or start a new run",
            )
        warn_ignored(where, f"it is damaged; the classes are those of {FOLDS}")
        return ordered_classes(self.folds().targets)

    def labels(self) -> NDArray[np.int64]:
        """(n,) class index of every row of folds.csv; RunFolderError where it is of no class."""
        index = {name: i for i, name in enumerate(self.classes())}
        targets = self.folds().targets
        strange = [i for i, target in enumerate(targets) if target not in index]
        if strange:
            first = f"line {strange[0] + 2} has the target {targets[strange[0]]!r}"
            raise RunFolderError.single(
                f"{self.root}/{FOLDS}",
                f"{len(strange):,} rows are of no class of {_CLASSES}, for example {first}; "
                f"allowed: {listing(index)}",
            )
        return np.array([index[target] for target in targets], dtype=np.int64)

    def write_tables(self, summaries: Iterable[CandidateSummary]) -> None:
        """Write leaderboard.csv, trials.csv and decisions.csv."""
        listed = list(summaries)
        self.files.write("leaderboard.csv", to_bytes(leaderboard_csv(listed)))
        self.files.write("trials.csv", to_bytes(trials_csv(listed)))
        self.files.write("decisions.csv", to_bytes(decisions_csv(listed)))

    @property
    def submission_name(self) -> str:
        """File of the newest submission; a smoke run's says what it is."""
        return "submission.smoke.csv" if self.config().is_smoke else "submission.csv"

    def submission(self) -> SubmissionNote | None:
        """What is known of the newest submission, from its receipt; None where there is none."""
        receipt = f"{self.submission_name.removesuffix('.csv')}.receipt.json"
        return sound_record(self.files, receipt, SubmissionNote)

    def last_update(self) -> ResultUpdate | None:
        """The last update of the result while a sweep ran; None where there was none."""
        return sound_record(self.files, _UPDATE, ResultUpdate)

    def save_update(self, update: ResultUpdate) -> None:
        """Write what `last_update` gives."""
        self.files.write(_UPDATE, record_json(update))

    def save_running(self, running: RunningNow) -> None:
        """Write what runs, for `status`."""
        self.files.write(_RUNNING, record_json(running))

    def running(self) -> RunningNow | None:
        """What ran when the sweep last wrote it down; None where none is at work."""
        return sound_record(self.files, _RUNNING, RunningNow)

    def forget_running(self) -> None:
        """Nothing runs any more."""
        self.files.delete(_RUNNING)

    def gpu_memory(self) -> GpuMemory:
        """What an earlier session has measured of GPUs."""
        return sound_record(self.files, _GPUS, GpuMemory) or GpuMemory()

    def save_gpu_memory(self, memory: GpuMemory) -> None:
        """Write what `gpu_memory` gives."""
        self.files.write(_GPUS, record_json(memory))

    def log_folder(self) -> Path | None:
        """Folder of log files, or None: only a mounted folder can be appended to.

        RunFolderError where a link in it leads out of the run folder.
        """
        if not isinstance(self.files, LocalFiles):
            return None
        for name in self.files.names("logs"):
            self.files.place(f"logs/{name}")
        return self.files.place("logs")
