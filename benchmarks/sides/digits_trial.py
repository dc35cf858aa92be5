"""One fold trial on the demo's digits, by `run_trial` and by the bare loop, with where the time
went.

Takes the demo's config, gives `TrialRun`s. Images are decoded, and the bare loop's normalised,
before the clock starts.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sides.fold_spec import FOLD, fold_spec, params_of
from sides.plain_loop import Settings, train

from foldrace.config.load import parse_config
from foldrace.config.ranges import Value
from foldrace.config.schema import AugmentConfig
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.augment import POLICIES
from foldrace.trainables.data.framing import resize
from foldrace.trainables.data.loader import BatchDataset, ShuffledBatchSampler, build_loader
from foldrace.trainables.data.pixel_cache import open_images
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.spec import EpochReport, TrialSpec
from foldrace.trainables.state import ema_decay
from foldrace.trainables.trial import run_trial


@dataclass
class _Marks:
    """A monitor that only looks at the clock: it is asked before every batch."""

    scored: int
    """Batches that one variant is scored in."""
    asked: list[float] = field(default_factory=list)
    splits: list[tuple[float, float, float]] = field(default_factory=list)
    """Of each epoch: its first batch, its first scored batch, its end."""

    def stop_requested(self) -> bool:
        self.asked.append(time.perf_counter())
        return False

    def report(self, epoch: EpochReport) -> None:
        self.splits.append((self.asked[0], self.asked[-2 * self.scored], time.perf_counter()))
        self.asked.clear()


@dataclass(frozen=True)
class TrialRun:
    """One fold trial on one side."""

    wall: float
    cpu: float
    logloss: float
    pieces: dict[str, float]


class Digits:
    """The demo's data set and config, ready for both sides."""

    def __init__(self, config: Path, epochs: int) -> None:
        self._folder = config.parent
        self._config = parse_config(config, [f"training.epochs={epochs}"]).require()

    def _spec(self, backbone: str, knobs: Mapping[str, Value]) -> TrialSpec:
        return fold_spec(self._config, self._folder, backbone, knobs)

    def ours(self, backbone: str, **knobs: Value) -> TrialRun:
        spec = self._spec(backbone, knobs)
        params = params_of(spec)
        rows = int((RunStore.open(spec.run).folds().fold == FOLD).sum())
        marks = _Marks(scored=-(-rows // (2 * params.batch_size)))
        started, cpu = time.perf_counter(), time.process_time()
        record = run_trial(spec, marks)
        ended, used = time.perf_counter(), time.process_time() - cpu
        data = self._seconds_of_batches(spec)
        train_s = sum(scoring - first for first, scoring, _ in marks.splits)
        pieces = {
            "setup": marks.splits[0][0] - started,
            "data": data,
            "step": train_s - data,
            "evaluate": sum(end - scoring for _, scoring, end in marks.splits),
            "write": ended - marks.splits[-1][2],
        }
        loss = min(score.val_logloss for score in record.variants.values())
        return TrialRun(ended - started, used, loss, pieces)

    def _seconds_of_batches(self, spec: TrialSpec) -> float:
        """Making all training batches of a trial, on its own and after the trial: from outside,
        the trial's own batches cannot be told from its steps."""
        store, params = RunStore.open(spec.run), params_of(spec)
        files = [Path(spec.image_root) / path for path in store.folds().image_paths]
        source = open_images(files, params.image_size, 1)
        rows = (store.folds().fold != FOLD).nonzero()[0]
        batches = ShuffledBatchSampler(rows, params.batch_size, 0)
        augment = AugmentConfig(policy=params.policy, flip=params.flip)
        dataset = BatchDataset(source, params.image_size, augment)
        loader = build_loader(dataset, batches, 0, False)
        started = time.perf_counter()
        for epoch in range(params.epochs):
            batches.epoch = epoch
            for _ in loader:
                pass
        return time.perf_counter() - started

    def plain(self, backbone: str) -> TrialRun:
        spec = self._spec(backbone, {})
        params = params_of(spec)
        policy = POLICIES[params.policy]
        store = RunStore.open(spec.run)
        files = [Path(spec.image_root) / path for path in store.folds().image_paths]
        source = open_images(files, params.image_size, 1)
        pixels = resize([source.image(row) for row in range(len(files))], params.image_size)
        normalise = build_classifier(ModelConfig(backbone, 2, params.image_size)).normalise
        images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        fold = torch.from_numpy(store.folds().fold)
        train_rows, val_rows = (fold != FOLD).nonzero()[:, 0], (fold == FOLD).nonzero()[:, 0]
        settings = Settings(
            backbone=backbone.partition("/")[2],
            epochs=params.epochs,
            lr=params.lr,
            weight_decay=params.weight_decay,
            warmup=params.warmup,
            batch_size=params.batch_size,
            dropout=params.dropout,
            mixup_alpha=params.mixup_alpha,
            mixup_prob=params.mixup_prob,
            ema_decay=ema_decay(params.ema_epochs, len(train_rows) // params.batch_size),
            clip_grad=params.clip_grad,
            rotate=policy.rotate,
            zoom=policy.zoom,
            shift=policy.shift,
            threads=1,
        )
        labels = torch.from_numpy(store.labels())
        started, cpu = time.perf_counter(), time.process_time()
        losses, seconds = train(images, labels, train_rows, val_rows, settings)
        wall, used = time.perf_counter() - started, time.process_time() - cpu
        return TrialRun(wall, used, min(losses.values()), dataclasses.asdict(seconds))
