"""How long the members take: milliseconds of forward pass per image, on this machine.

Takes a run folder and members, gives `Speeds`. One model of each architecture is timed; what was
measured on a device lies in `ensemble/speed.json` and costs nothing the next time.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from ensemble.pool import Member
from experiment.errors import RunFolderError, listing
from experiment.files import Files
from experiment.plugins import naming_plugins
from experiment.store import RunStore
from inference.fold_model import BATCH, FoldModel, RunModels, best_device
from inference.plugins import use_run_plugins
from inference.tta import AveragedViews, find_tta
from trainables.card import card_to_json
from trainables.data import Batch
from trainables.meta_features import meta_width
from trainables.predict import log_probabilities

_FILE = "ensemble/speed.json"
_CAP = 0.5  # seconds a model, beyond the least number of batches
_LEAST, _MOST = 3, 20  # batches
_CPU_BATCH = 1.0  # seconds at most; on a CPU an image takes as long in any batch
_log = logging.getLogger("foldrace")


@dataclass(frozen=True)
class Speeds:
    """What was measured, and on what."""

    device: str
    ms_per_image: Mapping[Member, float | None]
    """Of all fold models of the member together; None for predictions made elsewhere, and where
    the weights cannot be read."""


@dataclass(frozen=True)
class _Subject:
    """A member with what decides how long its models take."""

    member: Member
    models: RunModels
    key: str

    def open(self) -> FoldModel:
        use_run_plugins(self.models.store)
        return self.models.open(self.member.candidate, self.member.variant, 0)


def measure_speed(store: RunStore, members: Sequence[Member]) -> Speeds:
    """Forward passes as `Predictor` runs them without test-time augmentation; neither reading nor
    decoding images. One warning names the members whose weights cannot be read."""
    device = best_device()
    name = device_name(device)
    cached = _cached(store.files)
    known, before = cached.setdefault(name, {}), json.dumps(cached)
    try:
        with naming_plugins():
            found = _measured(_subjects(store, members, device), known)
    finally:
        use_run_plugins(store)  # the last member may have been of another run
    if json.dumps(cached) != before:
        store.files.write(_FILE, json.dumps(cached, indent=1).encode())
    return Speeds(name, {member: found.get(member) for member in members})


def ms_per_image(model: FoldModel, device: torch.device) -> float:
    """Median over some batches, after a warm-up."""
    _seconds(model, device, 1)  # what is set up at the first call
    images = BATCH
    if device.type == "cpu":
        images = max(1, min(BATCH, int(_CPU_BATCH / _seconds(model, device, 1))))
    _seconds(model, device, images)
    times: list[float] = []
    while len(times) < _LEAST or (sum(times) < _CAP and len(times) < _MOST):
        times.append(_seconds(model, device, images))
    return 1000.0 * median(times) / images


def device_name(device: torch.device) -> str:
    """What a time belongs to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _subjects(store: RunStore, members: Sequence[Member], device: torch.device) -> list[_Subject]:
    """The members that a run has trained."""
    subjects = []
    for root in sorted({member.run for member in members}):
        models = RunModels(RunStore.open(root) if root else store, device)
        use_run_plugins(models.store)
        of_run = [member for member in members if member.run == root]
        keys = _keys(models, sorted({member.candidate for member in of_run}))
        subjects += [_Subject(m, models, keys[m.candidate]) for m in of_run if m.candidate in keys]
    return subjects


def _keys(models: RunModels, candidates: Sequence[str]) -> dict[str, str]:
    """Candidate -> what a time is remembered by; without those that have no trial."""
    trials = ((candidate, models.store.trial(candidate, 0)) for candidate in candidates)
    return {
        candidate: f"{card_to_json(models.card(trial))} {models.precision(trial)}"
        for candidate, trial in trials
        if trial is not None
    }


def _measured(subjects: Sequence[_Subject], known: dict[str, float]) -> dict[Member, float]:
    """`known`, milliseconds of one model by key, grows."""
    gone: dict[str, str] = {}
    for subject in subjects:
        if subject.key in known:
            continue
        try:
            model = subject.open()
        except RunFolderError as error:
            gone[f"{subject.member.candidate} {subject.member.variant}"] = str(error)
            continue
        known[subject.key] = ms_per_image(model, subject.models.device)
    unknown = [s for s in subjects if s.key not in known]
    if unknown:
        _log.warning(
            "the speed of %s is not known: %s",
            listing(f"{s.member.candidate} {s.member.variant}" for s in unknown),
            next(iter(gone.values())),
        )
    return {s.member: s.models.store.fold_count * known[s.key] for s in subjects if s.key in known}


def _seconds(model: FoldModel, device: torch.device, images: int) -> float:
    """Of one batch, from pixels in memory to probabilities in memory."""
    card = model.card
    generator = torch.Generator().manual_seed(0)
    shape = (images, card.image_size, card.image_size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, torch.arange(images), torch.zeros(images, meta_width(card.meta)))
    seen = AveragedViews(model.module, find_tta("none"), card.activation)
    started = time.perf_counter()
    log_probabilities(seen, [batch], device, model.autocast, "softmax")
    return time.perf_counter() - started


def _cached(files: Files) -> dict[str, dict[str, float]]:
    """Device -> key -> milliseconds of one model; empty where the file is none of ours."""
    try:
        stored = json.loads(files.read(_FILE))
        return {
            str(device): {str(key): float(ms) for key, ms in times.items()}
            for device, times in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _processor() -> str:
    """Its model, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
