"""The fold models of a blend, run in as few passes over the images as memory allows.

Takes keys of fold models and sources of images, gives a function from a key to log-probabilities:
batch by batch where all models lie in memory together, else of all images, pass by pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.dataset.images import ImageError
from foldrace.inference.engine.passes import FoldKey, passes
from foldrace.inference.engine.together import Seat, run_together
from foldrace.inference.run_models import FoldModel, RunModels
from foldrace.inference.tta import TTA
from foldrace.run_folder.kept_predictions import KeptPredictions
from foldrace.run_folder.trials import weights_name
from foldrace.trainables.data.pixel_cache import ImageSource
from foldrace.trainables.models.classifier import ModelConfig

OnModel = Callable[[int], None]
Take = Callable[[FoldKey], NDArray[np.float32]]
"""Fold model -> its (n, C) uncalibrated log-probabilities; each is asked for once."""
SourceOf = Callable[[str, ModelConfig], ImageSource]
"""Run folder and a model's config -> the images as that model's trial saw its own."""
OnBad = Callable[[int, ImageError], object]


class Progress:
    """Tells how many models are done, where some have seen a part of the images."""

    def __init__(self, on_model: OnModel, images: int) -> None:
        self._on_model, self._images = on_model, images
        self._seen = self._told = 0

    def add(self, models: int, images: int) -> None:
        """So many models have seen so many images more."""
        self._seen += models * images
        while (self._told + 1) * self._images <= self._seen:
            self._told += 1
            self._on_model(self._told)


class FoldModels:
    """Fold models of one or more run folders on one device."""

    def __init__(
        self,
        runs: Mapping[str, RunModels],
        device: torch.device,
        tta: TTA,
        threads: int,
        most_bytes: int,
    ) -> None:
        """`runs` by the name that keys have; `threads` decode; see `memory_limit`."""
        self._runs, self._device, self._tta = runs, device, tta
        self._threads, self._most = threads, most_bytes
        self._open: dict[FoldKey, FoldModel] = {}

    def batches(
        self,
        keys: Sequence[FoldKey],
        source_of: SourceOf,
        images: int,
        progress: Progress,
        on_bad: OnBad | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], Take]]:
        """Rows (b,), and what each model says of them: one batch or all images at a time.

        Models stay open where all fit. Rows whose image cannot be read are told to `on_bad`, and
        what the models say of them counts nothing; without it ImageError.
        """
        if images == 0:
            return
        rows = np.arange(images)
        self._open = {key: model for key, model in self._open.items() if key in keys}
        if len(self._passes(keys, 0)) <= 1:
            self._open |= {key: self._opened(key) for key in keys if key not in self._open}
            for found_rows, found in self._run(keys, source_of, rows, progress, on_bad):
                yield found_rows, found.__getitem__
        else:
            shape = images, len(self._classes)
            yield rows, self._by_pass(keys, source_of, shape, np.float32, progress, on_bad).take

    def keeping(
        self,
        keys: Sequence[FoldKey],
        source_of: SourceOf,
        shape: tuple[int, int],
        progress: Progress,
        kept: Mapping[str, KeptPredictions],
    ) -> Take:
        """What the models say of all (n, C), of which only those run that have kept nothing.

        `kept` by run folder; in float16, as it is kept.
        """
        new = [key for key in keys if not kept[key.run].has(*key[1:])]
        outputs = self._by_pass(new, source_of, shape, np.float16, progress, None)

        def take(key: FoldKey) -> NDArray[np.float32]:
            known = kept[key.run].read(*key[1:], shape)
            if known is not None and not outputs.is_of(key):
                progress.add(1, shape[0])
            if known is None:
                known = outputs.take(key)
                kept[key.run].write(*key[1:], known)
            return known.astype(np.float32)

        return take

    def _run(
        self,
        keys: Sequence[FoldKey],
        source_of: SourceOf,
        rows: NDArray[np.int64],
        progress: Progress,
        on_bad: OnBad | None,
    ) -> Iterator[tuple[NDArray[np.int64], dict[FoldKey, NDArray[np.float32]]]]:
        """One pass: each batch's rows, and what each model says of them."""

        def skip(row: int, error: ImageError) -> None:
            progress.add(len(keys), 1)
            if on_bad is not None:
                on_bad(row, error)

        seats = [self._seat(key, source_of) for key in keys]
        told = None if on_bad is None else skip
        together = run_together(seats, rows, self._tta, self._device, self._threads, told)
        for batch in together:
            yield batch.rows, dict(zip(keys, batch.log_prob, strict=True))
            progress.add(len(keys), len(batch.rows))

    def _by_pass(
        self,
        keys: Sequence[FoldKey],
        source_of: SourceOf,
        shape: tuple[int, int],
        dtype: type[np.floating],
        progress: Progress,
        on_bad: OnBad | None,
    ) -> _PassOutputs:
        def run(chosen: Sequence[FoldKey]) -> dict[FoldKey, NDArray[np.floating]]:
            found = {key: np.zeros(shape, dtype) for key in chosen}
            everything = np.arange(shape[0])
            for rows, outputs in self._run(chosen, source_of, everything, progress, on_bad):
                for key, log_prob in outputs.items():
                    found[key][rows] = log_prob
            return found

        each = shape[0] * shape[1] * np.dtype(dtype).itemsize
        return _PassOutputs(self._passes(keys, each), run)

    def _passes(self, keys: Sequence[FoldKey], more: int) -> list[tuple[FoldKey, ...]]:
        """`more` bytes beside each model."""
        return passes(keys, {key: self._bytes(key) + more for key in keys}, self._most)

    def _bytes(self, key: FoldKey) -> int:
        if key in self._open:
            return 0
        try:
            return self._runs[key.run].store.files.size(
                weights_name(key.candidate, key.fold, key.variant)
            )
        except OSError:
            return 0  # which opening it tells

    def _seat(self, key: FoldKey, source_of: SourceOf) -> Seat:
        model = self._open.get(key) or self._opened(key)
        return Seat(model, source_of(key.run, model.model_config), self._runs[key.run].parts)

    def _opened(self, key: FoldKey) -> FoldModel:
        return self._runs[key.run].open(key.candidate, key.variant, key.fold)

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return next(iter(self._runs.values())).store.classes()


class _PassOutputs:
    """What the models of each pass say of all images; a pass runs when one of its is asked for."""

    def __init__(
        self,
        planned: Sequence[tuple[FoldKey, ...]],
        run: Callable[[Sequence[FoldKey]], dict[FoldKey, NDArray[np.floating]]],
    ) -> None:
        self._pass_of = {key: one for one in planned for key in one}
        self._run = run
        self._found: dict[FoldKey, NDArray[np.floating]] = {}

    def is_of(self, key: FoldKey) -> bool:
        """True where a pass has the model."""
        return key in self._pass_of

    def take(self, key: FoldKey) -> NDArray[np.floating]:
        """(n, C); each model is asked for once."""
        if key not in self._found:
            self._found |= self._run(self._pass_of.get(key, (key,)))
        return self._found.pop(key)
