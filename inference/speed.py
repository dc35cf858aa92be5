"""The time that members take: milliseconds of forward pass per image, on this machine.

Takes a run folder and members, gives `Speeds`. One model of each architecture is timed; what was
measured on a device lies in `ensemble/speed.json`, and costs nothing the next time if it is sure.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from foldrace.core.errors import RunFolderError, listing
from foldrace.core.files import Files, warn_ignored
from foldrace.core.plugins import naming_plugins
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.external import VARIANT
from foldrace.inference.run_models import BATCH, FoldModel, RunModels, best_device
from foldrace.inference.tta import AveragedViews, find_tta
from foldrace.run_folder.allowed import member_run
from foldrace.run_folder.store import RunStore
from foldrace.trainables.data.loader import Batch
from foldrace.trainables.models.classifier import config_to_json
from foldrace.trainables.predict import log_probabilities

_FILE = "ensemble/speed.json"
_CAP = 0.5  # seconds a model, beyond the least number of batches
_LEAST, _MOST = 5, 20  # batches
_CPU_BATCH = 0.5  # seconds at most; on a CPU an image takes as long in any batch
_TRIES = 3  # of one image, to size the batch
_LONGEST = 1e9  # ms per image
_SURE = 1.5
"""The median batch takes at most this many times the fastest: else other work disturbs the machine,
and the next blend measures anew; the lower time counts."""
_log = logging.getLogger("foldrace")


@dataclass(frozen=True)
class Speeds:
    """Measured times, and the device they were measured on."""

    device: str
    ms_per_image: Mapping[Member, float | None]
    """Times of all fold models of a member together; None for predictions made elsewhere, and where
    the weights cannot be read."""


@dataclass(frozen=True)
class Timing:
    """Milliseconds of forward pass per image of one model; ValueError where they are no time."""

    ms_per_image: float
    """Time in the fastest batch: whatever else the machine does only adds to it."""
    is_sure: bool

    def __post_init__(self) -> None:
        if not 0 < self.ms_per_image < _LONGEST:  # NaN is not, either
            raise ValueError(f"got {self.ms_per_image} ms per image; allowed: up to {_LONGEST:g}")

    def merged(self, other: Timing) -> Timing:
        """The lower time of both, sure if either is."""
        least = min(self.ms_per_image, other.ms_per_image)
        return Timing(least, self.is_sure or other.is_sure)


@dataclass(frozen=True)
class _Subject:
    """A member with what decides how long its models take."""

    member: Member
    models: RunModels
    key: str

    def open(self) -> FoldModel:
        return self.models.open(self.member.candidate, self.member.variant, 0)


def measure_speed(store: RunStore, members: Sequence[Member]) -> Speeds:
    """Time forward passes as `Predictor` runs them, without test-time augmentation.

    Neither reading nor decoding images counts. One warning names the members whose weights cannot
    be read.
    """
    device = best_device()
    name = device_name(device)
    cached = _cached(store.files)
    known = cached.setdefault(name, {})
    before = dict(known)
    with naming_plugins():
        found = _measured(_subjects(store, members, device), known)
    if known != before:
        store.files.write(_FILE, _to_json(cached))
    return Speeds(name, {member: found.get(member) for member in members})


def member_prices(store: RunStore, members: Sequence[Member]) -> Prices:
    """Bytes on disk, and milliseconds per image on this machine."""
    stores = {run: member_run(store, run) for run in {m.run for m in members}}
    stored = [m for m in members if m.variant != VARIANT]
    sizes = {m: stores[m.run].weight_bytes(m.candidate, m.variant) for m in stored}
    speeds = measure_speed(store, members)
    known = {m: ms for m, ms in speeds.ms_per_image.items() if ms is not None}
    return Prices(known, sizes, speeds.device)


def time_model(model: FoldModel, device: torch.device) -> Timing:
    """Time some batches of a model, after a warm-up."""
    _seconds(model, device, 1)  # what is set up at the first call
    images = BATCH
    if device.type == "cpu":
        one = min(_seconds(model, device, 1) for _ in range(_TRIES))
        images = max(1, min(BATCH, int(_CPU_BATCH / one)))
    _seconds(model, device, images)
    times: list[float] = []
    while len(times) < _LEAST or (sum(times) < _CAP and len(times) < _MOST):
        times.append(_seconds(model, device, images))
    return Timing(1000.0 * min(times) / images, median(times) <= _SURE * min(times))


def device_name(device: torch.device) -> str:
    """Name of the device that a time belongs to."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def _subjects(store: RunStore, members: Sequence[Member], device: torch.device) -> list[_Subject]:
    """The members that a run has trained."""
    subjects = []
    for root in sorted({member.run for member in members}):
        models = RunModels(member_run(store, root), device)
        of_run = [member for member in members if member.run == root]
        keys = _keys(models, sorted({member.candidate for member in of_run}))
        subjects += [_Subject(m, models, keys[m.candidate]) for m in of_run if m.candidate in keys]
    return subjects


def _keys(models: RunModels, candidates: Sequence[str]) -> dict[str, str]:
    """Candidate -> what a time is remembered by; without those that have no trial."""
    trials = ((candidate, models.store.trial(candidate, 0)) for candidate in candidates)
    return {
        candidate: f"{config_to_json(models.model_config(trial))} {models.precision(trial)}"
        for candidate, trial in trials
        if trial is not None
    }


def _measured(subjects: Sequence[_Subject], known: dict[str, Timing]) -> dict[Member, float]:
    """`known`, the times of one model by key, grows and falls."""
    gone: dict[str, str] = {}
    done = {key for key, timing in known.items() if timing.is_sure}
    for subject in subjects:
        if subject.key in done:
            continue
        try:
            model = subject.open()
        except RunFolderError as error:
            gone[f"{subject.member.candidate} {subject.member.variant}"] = str(error)
            continue
        timing = time_model(model, subject.models.device)
        known[subject.key] = timing.merged(known.get(subject.key, timing))
        done.add(subject.key)
    unknown = [s for s in subjects if s.key not in known]
    if unknown:
        _log.warning(
            "the speed of %s is not known: %s",
            listing(f"{s.member.candidate} {s.member.variant}" for s in unknown),
            next(iter(gone.values())),
        )
    return {
        s.member: s.models.store.fold_count * known[s.key].ms_per_image
        for s in subjects
        if s.key in known
    }


def _seconds(model: FoldModel, device: torch.device, images: int) -> float:
    """Seconds of one batch, from pixels in memory to probabilities in memory."""
    model_config = model.model_config
    generator = torch.Generator().manual_seed(0)
    shape = (images, model_config.image_size, model_config.image_size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    batch = Batch(pixels, torch.arange(images), torch.zeros(images, model.module.meta_width))
    seen = AveragedViews(model.module, find_tta("none"), model_config.activation)
    started = time.perf_counter()
    log_probabilities(seen, [batch], device, model.autocast, "softmax")
    return time.perf_counter() - started


def _cached(files: Files) -> dict[str, dict[str, Timing]]:
    """Device -> key -> the time of one model; empty where the file is none of ours."""
    try:
        stored = json.loads(files.read(_FILE))
        return {
            str(device): {
                str(key): Timing(float(found["ms_per_image"]), bool(found["is_sure"]))
                for key, found in times.items()
            }
            for device, times in stored.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        warn_ignored(f"{files.root}/{_FILE}", f"it holds no measured times: {error!r}")
        return {}


def _to_json(times: Mapping[str, Mapping[str, Timing]]) -> bytes:
    """The inverse of `_cached`."""
    plain = {
        device: {key: asdict(timing) for key, timing in of_one.items()}
        for device, of_one in times.items()
    }
    return json.dumps(plain, indent=1).encode()


def _processor() -> str:
    """Model of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
