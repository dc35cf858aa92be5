"""What is exported: a run's blend with its fold models, or its heaviest members.

Takes a run folder, gives an `ExportedBlend`; refuses, with every reason at once, what cannot run
without Foldrace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.core.errors import Problem, RunFolderError, UserError, listing
from foldrace.core.metrics import normalise
from foldrace.core.temperature import at_temperature, fit_temperature
from foldrace.ensemble.fold_mean import fold_mean
from foldrace.ensemble.pooling import POOLINGS, Combiner, pool_terms
from foldrace.export.shipped.blend_images import META
from foldrace.inference.predictor import Predictor
from foldrace.inference.run_models import FoldModel, RunModels
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.blend_records import EnsembleRecord, MemberRecord
from foldrace.run_folder.oof import mean_log_prob
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.pixel_cache import stored_side
from foldrace.trainables.models.backbones import FAMILIES
from foldrace.trainables.models.classifier import ModelConfig
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.models.stack import members

LogProbs = NDArray[np.float32]
"""(M, F, n, C) natural-log probabilities of each member's fold models, uncalibrated."""


@dataclass(frozen=True)
class InputForm:
    """How an image becomes what some members see: one of the `inputs` of the JSON file."""

    size: int
    """Side of the square, in pixels."""
    resize: str
    shorter_side: int
    """Bound of the decoded image's shorter side, in pixels."""
    max_pixels: int
    meta: tuple[str, ...]


@dataclass(frozen=True)
class ExportedMember:
    """A member that counts, and how its models are opened."""

    record: MemberRecord
    models: RunModels
    model_config: ModelConfig
    form: InputForm

    @property
    def name(self) -> str:
        """Name in messages and of files: `c0007-ema`."""
        return f"{self.record.candidate}-{self.record.variant}"

    def weights(self, fold: int) -> bytes:
        """One fold's safetensors file; RunFolderError where it is gone."""
        return self.models.store.weights(self.record.candidate, fold, self.record.variant)

    def open(self, fold: int) -> FoldModel:
        """One fold's model."""
        return self.models.open(self.record.candidate, self.record.variant, fold)


@dataclass(frozen=True, eq=False)
class ExportedBlend:
    """A blend as it is exported."""

    store: RunStore
    record: EnsembleRecord
    members: tuple[ExportedMember, ...]
    combiner: Combiner
    """Of these members alone."""
    temperature: float
    """The blend's own."""
    oof_logloss: float
    """Log loss on the OOF rows of these members, each at its temperature, in nats."""
    considered: int
    """Members with a weight that the blend has in the run folder."""

    @cached_property
    def forms(self) -> tuple[InputForm, ...]:
        """The different inputs, in the order of the members."""
        return tuple(dict.fromkeys(member.form for member in self.members))

    @property
    def folds(self) -> int:
        """Number F of fold models of each member."""
        return self.store.fold_count

    def pooled(self, log_probs: Sequence[NDArray[np.floating]]) -> NDArray[np.float64]:
        """(n, C) probabilities of one fold of these M members' log-probabilities (n, C)."""
        calibrated = (
            (i, at_temperature(each, member.record.temperature))
            for i, (each, member) in enumerate(zip(log_probs, self.members, strict=True))
        )
        return normalise(pool_terms(self.combiner, calibrated))

    def of_all_folds(self, log_probs: LogProbs) -> NDArray[np.float64]:
        """(n, C) probabilities of the whole blend."""
        k = self.store.folds().k
        repeats = [[each[fold::k] for each in log_probs] for fold in range(k)]
        pooled = (self.pooled([mean_log_prob([*m]) for m in of_fold]) for of_fold in repeats)
        return fold_mean((np.log(p) for p in pooled), self.temperature).prob

    def of_own_folds(self, log_probs: LogProbs, rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """(n, C) OOF probabilities of these rows of folds.csv.

        Each is predicted by the models alone that have not seen it, as its stored OOF row was.
        """
        own = self.store.folds().by_repeat[:, rows]  # (R, n), numbered through
        places = np.arange(len(rows))
        held_out = [mean_log_prob([of_all[fold, places] for fold in own]) for of_all in log_probs]
        return fold_mean([np.log(self.pooled(held_out))], self.temperature).prob


def open_blend(store: RunStore, most: int | None = None, code_free: bool = True) -> ExportedBlend:
    """The blend of a run with at most its `most` heaviest members, of new weights then.

    `code_free`: refuse what a plugin's code builds, since it would have to go with the weights.
    RunFolderError where there is no sound blend, as for `Predictor`; UserError with all that cannot
    be exported.
    """
    record = Predictor(store, device="cpu").ensemble
    counting = [i for i, member in enumerate(record.members) if member.weight]
    _refuse_predictions(store, record, [record.members[i] for i in counting])
    opened = _Members(store)
    found = {i: opened.of(record.members[i]) for i in counting}
    problems = [p for member in found.values() for p in _problems(member, code_free)]
    if problems:
        raise UserError([*dict.fromkeys(problems)])
    chosen = sorted(sorted(counting, key=lambda i: -record.members[i].weight)[:most])
    whole = POOLINGS[record.pooling](
        np.array([member.weight for member in record.members]), store.blend.combiner_arrays(record)
    )
    combiner = whole if len(chosen) == len(counting) else _lighter(whole, counting, chosen)
    blend = ExportedBlend(
        store, record, tuple(found[i] for i in chosen), combiner.take(np.array(chosen)),
        record.blend_temperature, record.oof_logloss, len(counting),
    )  # fmt: skip
    return blend if len(chosen) == len(counting) else _refitted(blend)


class _Members:
    """The members of a blend by their records; each run folder is opened once."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._runs: dict[str, RunModels] = {}

    def of(self, record: MemberRecord) -> ExportedMember:
        """The member; RunFolderError where its first trial is gone."""
        models = self._models(record.run)
        trial = models.store.trial(record.candidate, 0)
        if trial is None:
            name = f"{models.store.root}/trials/{record.candidate}/fold0"
            raise RunFolderError.single(name, "has no trial.json; blend again: `ensemble DIR`")
        config, run = models.model_config(trial), models.store.config()
        side = stored_side(config.image_size, run.cache)
        form = InputForm(config.image_size, config.resize, side, run.data.max_pixels, config.meta)
        return ExportedMember(record, models, config, form)

    def _models(self, run: str) -> RunModels:
        if run not in self._runs:
            self._runs[run] = RunModels(member_run(self._store, run), torch.device("cpu"))
        return self._runs[run]


def _refuse_predictions(
    store: RunStore, record: EnsembleRecord, counting: Sequence[MemberRecord]
) -> None:
    names = [member.candidate for member in counting if member.added]
    names += [file.name for file in record.unvalidated]
    if names:
        raise RunFolderError.single(
            f"{store.root}/ensemble/ensemble.json",
            f"has members that were predicted elsewhere ({listing(names)}): there is no model of "
            "them to export; blend again without them: `ensemble DIR` without --add",
        )


def _problems(member: ExportedMember, code_free: bool) -> list[Problem]:
    """Parts of the model that only a plugin's code can build, or compute of an image."""
    config, where = member.model_config, f"export of {member.name}"
    own = [name for name in config.meta if name not in META]
    found = [
        Problem(where, f"meta feature {name!r} is a plugin's: its code would have to run on each "
        f"image, and it needs Foldrace; allowed: {listing(META)}")
        for name in own
    ]  # fmt: skip
    if not code_free:
        return found
    bodies = [part.backbone for part in members(config.backbone)]
    plugged = [name for name in bodies if name.partition("/")[0] not in FAMILIES]
    plugged += [f"head {config.head}"] if config.head not in HEADS else []
    return found + [
        Problem(where, f"{name} is a plugin's: its code imports foldrace.parts, which a bundle "
        "has not; `--format onnx` exports the model itself, without any code")
        for name in plugged
    ]  # fmt: skip


def _lighter(whole: Combiner, counting: Sequence[int], chosen: Sequence[int]) -> Combiner:
    """The combiner without the other members; the weights keep their sum."""
    if whole.pooling == "stacking":
        raise UserError.single(
            "--members",
            "a stacked blend's coefficients hold for its members together; blend again with fewer: "
            "`ensemble DIR --max-members N`",
        )
    weights = np.zeros(len(whole.weights))
    weights[list(chosen)] = whole.weights[list(chosen)]
    weights *= whole.weights[list(counting)].sum() / weights.sum()
    return POOLINGS[whole.pooling](weights, whole.arrays())


def _refitted(blend: ExportedBlend) -> ExportedBlend:
    """With a temperature of its own where the blend has one, and its own loss on the OOF rows."""
    store = blend.store
    labels = store.labels()[store.scored_rows()]
    stored = [
        m.models.store.oof_log_prob(m.record.candidate, m.record.variant) for m in blend.members
    ]
    logs = np.log(blend.pooled(stored))
    fitted = fit_temperature(logs, labels) if blend.record.blend_temperature != 1.0 else 1.0
    prob = fold_mean([logs], fitted).prob
    loss = -float(np.log(prob[np.arange(len(labels)), labels]).mean())
    return replace(blend, temperature=fitted, oof_logloss=loss)
