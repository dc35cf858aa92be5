"""What `doctor` looks at on a machine: devices, packages, disks, limits, the hubs.

Takes nothing, gives a `Finding` a line of the table; those that forbid every sweep say so.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path

from packaging.requirements import Requirement

from foldrace.core.errors import message_line
from foldrace.dataset.archive import cache_dir
from foldrace.scheduling.nodes import has_gpu_driver
from foldrace.trainables.models.hub import hub_answers

_PACKAGES = (
    "torch", "torchvision", "timm", "accelerate", "ray", "optuna", "albumentations", "pandas",
)  # fmt: skip
_IMPORTED = ("torch", "torchvision", "timm")
"""Packages that are compiled for one another, which their versions do not tell."""
_GB = 1e9
_LEAST_DISK, _LEAST_SHARED = 10.0, 1.0  # 10^9 bytes
_LEAST_FILES = 4096  # open files: Ray warns below it
_HUB_SECONDS = 2.0
_HUBS = {"timm": "huggingface.co", "torchvision": "download.pytorch.org"}
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
_SOCKET_LIMIT = 107  # bytes of a Unix socket's path
_RAY_SOCKET = "ray/session_2026-12-31_23-59-59_999999_4194304/sockets/plasma_store"


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    what: str
    value: str
    advice: str = ""
    """What is wrong and what to do; empty where all is well."""
    forbids: bool = False
    """True where no sweep can run."""


def machine_findings() -> list[Finding]:
    """All of this machine, in the order of the table."""
    return [*_devices(), *_packages(), *_disks(), *_limits(), *_hubs()]


def _devices() -> Iterator[Finding]:
    yield Finding("CPU cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")
    try:
        import torch
    except Exception:  # told with the packages
        return
    count = torch.cuda.device_count()
    if count == 0:
        advice = ""
        if has_gpu_driver():
            built = torch.version.cuda or torch.version.hip
            advice = f"a driver is loaded, but torch sees no GPU: {_gpu_advice(built)}"
        yield Finding("GPUs", "none", advice)
        return
    yield Finding("GPUs", f"{count}; driver {_driver()}, torch for CUDA {torch.version.cuda}")
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        with torch.cuda.device(i):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        memory = f"{properties.total_memory / _GB:.1f} GB"
        yield Finding(f"GPU {i}", f"{properties.name}, {memory}, bf16: {'yes' if bf16 else 'no'}")


def _gpu_advice(built: str | None) -> str:
    if built is None:
        return "this torch is built for CPUs; install one for CUDA (pytorch.org has the command)"
    return (
        f"this torch is built for {built}; update the driver, or install a torch for an older CUDA "
        "(and look at CUDA_VISIBLE_DEVICES)"
    )


def _driver() -> str:
    """Version of NVIDIA's driver."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "unknown"
    found = re.search(r"\b\d+\.\d+(\.\d+)?\b", text)
    return found[0] if found else "unknown"


def _packages() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    wanted = _requirements()
    for name in _PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "missing", f"pip install '{wanted.get(name, name)}'", forbids=True)
            continue
        requirement = wanted.get(name)
        fits = requirement is None or requirement.specifier.contains(version, prereleases=True)
        if not fits:
            yield Finding(name, version, f"pip install '{requirement}'")
            continue
        error = _import_error(name) if name in _IMPORTED else None
        yield Finding(
            name, version, f"{error}; install it anew" if error else "", error is not None
        )
    if any(d.name == "albumentationsx" for d in metadata.distributions()):
        yield Finding(
            "albumentationsx",
            metadata.version("albumentationsx"),
            "takes the import name of albumentations (AGPL): pip uninstall albumentationsx && "
            "pip install --force-reinstall albumentations==2.0.8",
            forbids=True,
        )


def _requirements() -> dict[str, Requirement]:
    """Package -> what this package asks of it; empty on a node that has it from the driver."""
    try:
        texts = metadata.requires("foldrace") or []
    except metadata.PackageNotFoundError:
        return {}
    found = [Requirement(text) for text in texts]
    return {r.name: r for r in found if r.marker is None}


def _import_error(package: str) -> str | None:
    try:
        import_module(package)
    except Exception as error:  # a library that does not fit raises whatever it likes
        return f"cannot be imported ({message_line(str(error)) or type(error).__name__})"
    return None


def _disks() -> Iterator[Finding]:
    folder = cache_dir()
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, used = shutil.disk_usage(existing).free / _GB, _size(folder) / _GB
    advice = ""
    if not os.access(existing, os.W_OK | os.X_OK):
        advice = "cannot be written, so images are decoded at each use: set FOLDRACE_CACHE"
    elif free < _LEAST_DISK:
        advice = "little room for decoded images: set FOLDRACE_CACHE to a folder on a larger disk"
    yield Finding("cache", f"{folder}: {used:.1f} GB, {free:.1f} GB free", advice)
    yield _shared_memory()
    yield _temporary_folder()


def _size(folder: Path) -> int:
    """Bytes of all files below a folder; those that vanish meanwhile are left out."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(place, name)).st_size
            except OSError:
                continue
    return total


def _shared_memory() -> Finding:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return Finding("/dev/shm", "missing", "loader processes and Ray share memory there")
    value = f"{usage.free / _GB:.1f} GB free of {usage.total / _GB:.1f} GB"
    if usage.free >= _LEAST_SHARED * _GB:
        return Finding("/dev/shm", value)
    advice = "loader processes hand over batches there and may die: docker run --shm-size=8g"
    return Finding("/dev/shm", value, advice)


def _temporary_folder() -> Finding:
    """Where Ray, started here, makes its sockets."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    length = len(os.fsencode(os.path.join(folder, _RAY_SOCKET)))
    value = f"{folder}: Ray's sockets have paths of {length} bytes"
    if length > _SOCKET_LIMIT:
        advice = f"Linux allows {_SOCKET_LIMIT}, so Ray cannot start: export RAY_TMPDIR=/tmp"
        return Finding("temporary folder", value, advice, forbids=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        advice = "cannot be written: export RAY_TMPDIR to a folder that can"
        return Finding("temporary folder", value, advice, forbids=True)
    return Finding("temporary folder", value)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{_limit(soft)}, at most {_limit(hard)} (ulimit -n)"
    few = hard != resource.RLIM_INFINITY and hard < _LEAST_FILES
    advice = "Ray raises it to the largest, which is too low for many trials: ulimit -Hn 65536"
    yield Finding("open files", value, advice if few else "")


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value}"


def _hubs() -> Iterator[Finding]:
    offline = [
        name for name in _OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
    ]
    for family, host in _HUBS.items():
        if offline and family == "timm":
            yield Finding(host, f"not asked: {offline[0]} is set")
        elif hub_answers(family, _HUB_SECONDS):
            yield Finding(host, "answers")
        else:
            advice = (
                f"pretrained weights of {family}/... come from the caches of this machine alone: "
                "set training.pretrained to a path, or to false"
            )
            yield Finding(host, f"no answer within {_HUB_SECONDS:.0f} s", advice)
