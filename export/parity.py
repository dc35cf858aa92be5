"""How near an exported blend is to the run's own, measured on OOF rows.

Takes an `ExportedBlend` and a function that runs the export, gives `Parity` and `Measured`. A row's
loss is that of the models alone that have not seen it, though the export has all of them.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from foldrace.core.errors import RunFailure
from foldrace.core.metrics import true_class_probability
from foldrace.ensemble.uncertainty import standard_error
from foldrace.export.blend import ExportedBlend, ExportedMember, InputForm, LogProbs
from foldrace.export.shipped.blend_images import model_inputs, read_bytes
from foldrace.run_folder.belonging import training_data
from foldrace.trainables.data.loader import Batch, loader_settings
from foldrace.trainables.predict import log_probabilities, scoring_loader

PARITY_ROWS = 64
TOLERANCE = 1e-3
"""Largest difference of a probability between the run's models and the export on the same pixels;
rounding in another order makes 1e-6 to 1e-4 of it."""
_BATCH = 16

Squares = list[NDArray[np.uint8]]
Metas = list[NDArray[np.float32]]
RunExport = Callable[[Squares, Metas], tuple[NDArray[np.floating], LogProbs]]
"""Inputs of each form -> probabilities (n, C) and the fold models' log-probabilities."""


@dataclass(frozen=True, eq=False)
class OofSample:
    """Some scored rows, as the run's models see them, and what they say of them."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    squares: Squares
    """(n, S, S, 3) of each form."""
    metas: Metas
    """(n, F) of each form."""
    from_files: tuple[Squares, Metas]
    """The same by the code that is exported."""
    log_probs: LogProbs
    prob: NDArray[np.float64]
    """(n, C) of the whole blend."""

    def part(self, rows: slice) -> OofSample:
        """Some of the rows."""
        return OofSample(
            self.rows[rows], self.labels[rows],
            [s[rows] for s in self.squares], [m[rows] for m in self.metas],
            ([s[rows] for s in self.from_files[0]], [m[rows] for m in self.from_files[1]]),
            self.log_probs[:, :, rows], self.prob[rows],
        )  # fmt: skip

    def batches(self) -> Iterator[tuple[Squares, Metas]]:
        """The images as the models see them, a batch at a time."""
        return _batches(self.squares, self.metas)


@dataclass(frozen=True)
class Parity:
    """The run's blend and the export on the same images."""

    images: int
    max_difference: float
    """Largest difference of a probability, on the same pixels."""
    max_difference_from_files: float
    """The same where the export decodes and resizes the files itself."""
    max_pixel_difference: int
    """Largest difference of a pixel between both ways, of 255."""
    oof_logloss: float
    """Of these rows, by the run's models, in nats."""
    exported_oof_logloss: float
    """By the export, from the files."""


@dataclass(frozen=True)
class Measured:
    """One form of the export."""

    file: str
    bytes: int
    rows: int
    """OOF rows that the losses are of."""
    oof_logloss: float
    change: float
    """Rise of the loss over that of the run's models, in nats."""
    change_se: float
    """Standard error of that difference, row by row."""
    accuracy: float
    ms_per_image: float
    """Time of all models together in the fastest batch, without decoding."""


def draw_sample(blend: ExportedBlend, count: int, workers: int) -> OofSample:
    """`count` scored rows, drawn by a fixed seed; all where there are fewer.

    DataError or RunFolderError where the training images are not those of the run.
    """
    scored = blend.store.scored_rows()
    rows = np.random.default_rng(0).permutation(scored)[:count]
    manifest = training_data(blend.store)
    files = [manifest.file(int(row)) for row in rows]
    seen = [_seen(blend, form, files, workers) for form in blend.forms]
    squares, metas = [s for s, _ in seen], [m for _, m in seen]
    log_probs = np.stack([_of_member(blend, m, squares, metas) for m in blend.members])
    forms = [asdict(form) for form in blend.forms]
    own = [model_inputs(read_bytes(file), forms) for file in files]
    from_files = (
        [np.stack([image[form][0] for image in own]) for form in range(len(forms))],
        [np.stack([image[form][1] for image in own]) for form in range(len(forms))],
    )
    return OofSample(
        rows, blend.store.labels()[rows], squares, metas, from_files, log_probs,
        blend.of_all_folds(log_probs),
    )  # fmt: skip


def check_parity(blend: ExportedBlend, sample: OofSample, run: RunExport) -> Parity:
    """Both on at most 64 of the rows; RunFailure where they differ by more than TOLERANCE."""
    sample = sample.part(slice(PARITY_ROWS))
    same, _ = _in_batches(run, sample.squares, sample.metas)
    prob, log_probs = _in_batches(run, *sample.from_files)
    pixels = zip(sample.squares, sample.from_files[0], strict=True)
    parity = Parity(
        len(prob),
        float(np.abs(same - sample.prob).max()),
        float(np.abs(prob - sample.prob).max()),
        max(int(np.abs(a.astype(int) - b).max()) for a, b in pixels),
        float(_losses(blend, sample, sample.log_probs).mean()),
        float(_losses(blend, sample, log_probs).mean()),
    )
    if not parity.max_difference <= TOLERANCE:
        raise RunFailure(
            f"the export differs from the run's blend by {parity.max_difference:.2g} in a "
            f"probability, on the same pixels of {parity.images} OOF images; allowed: {TOLERANCE:g}"
            ". Nothing was written; `--format` has another form"
        )
    return parity


def measure(
    blend: ExportedBlend, sample: OofSample, run: RunExport, file: str, size: int
) -> Measured | None:
    """Loss, accuracy and time of one form of the export, on all rows of the sample.

    None where a probability is not finite: a model may need numbers beyond those of float16.
    """
    found: list[LogProbs] = []
    fastest = float("inf")
    for squares, metas in sample.batches():
        start = time.perf_counter()
        found.append(run(squares, metas)[1])
        fastest = min(fastest, (time.perf_counter() - start) / len(squares[0]))
    log_probs = np.concatenate(found, axis=2)
    if not np.isfinite(log_probs).all():
        return None
    losses = _losses(blend, sample, log_probs)
    change = losses - _losses(blend, sample, sample.log_probs)
    numbers = blend.store.folds().group_numbers
    groups = None if numbers is None else numbers[sample.rows]
    prob = blend.of_own_folds(log_probs, sample.rows)
    return Measured(
        file, size, len(losses), float(losses.mean()), float(change.mean()),
        standard_error(change, groups) if len(change) > 1 and change.any() else 0.0,
        float((prob.argmax(axis=1) == sample.labels).mean()), 1000 * fastest,
    )  # fmt: skip


def _seen(
    blend: ExportedBlend, form: InputForm, files: Sequence[Path], workers: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(n, S, S, 3) and (n, F) as the run's own trials saw them."""
    member = next(m for m in blend.members if m.form == form)
    models, config = member.models, member.model_config
    source = models.images(files, config, workers, uuid.uuid4().hex)
    settings = loader_settings(workers, "cpu")
    every = np.arange(len(files))
    loader = scoring_loader(source, every, config, _BATCH, settings, models.parts)
    batches = [(batch.images.numpy(), batch.meta.numpy()) for batch in loader]
    return np.concatenate([b[0] for b in batches]), np.concatenate([b[1] for b in batches])


def _of_member(
    blend: ExportedBlend, member: ExportedMember, squares: Squares, metas: Metas
) -> NDArray[np.float32]:
    """(F, n, C) of the run's own fold models."""
    form = blend.forms.index(member.form)
    images, meta = torch.from_numpy(squares[form]), torch.from_numpy(metas[form])
    parts = (slice(start, start + _BATCH) for start in range(0, len(images), _BATCH))
    rows = torch.arange(len(images))
    batches = [Batch(images[part], rows[part], meta[part]) for part in parts]
    device = torch.device("cpu")
    found = []
    for fold in range(blend.folds):
        model = member.open(fold)
        activation = model.model_config.activation
        found.append(
            log_probabilities(model.module, batches, device, model.autocast, activation)[0]
        )
    return np.stack(found)


def _losses(blend: ExportedBlend, sample: OofSample, log_probs: LogProbs) -> NDArray[np.float64]:
    """(n,) each row's own loss, by the models that have not seen it."""
    prob = blend.of_own_folds(log_probs, sample.rows)
    return -np.log(true_class_probability(prob, sample.labels))


def _in_batches(
    run: RunExport, squares: Squares, metas: Metas
) -> tuple[NDArray[np.float64], LogProbs]:
    found = [run(*batch) for batch in _batches(squares, metas)]
    prob = np.concatenate([np.asarray(prob, np.float64) for prob, _ in found])
    return prob, np.concatenate([log_prob for _, log_prob in found], axis=2)


def _batches(squares: Squares, metas: Metas) -> Iterator[tuple[Squares, Metas]]:
    for start in range(0, len(squares[0]), _BATCH):
        part = slice(start, start + _BATCH)
        yield [s[part] for s in squares], [m[part] for m in metas]
