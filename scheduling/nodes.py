"""The cores and GPUs of a cluster's nodes, and how many fold trials they can run at a time.

Takes nodes and the config's resources, gives numbers and problems; knows no Ray.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from foldrace.config.schema import ResourcesConfig
from foldrace.core.errors import Problem

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, ROCm, WSL


@dataclass(frozen=True)
class Node:
    """The cores and GPUs of one machine."""

    cpus: float
    gpus: float
    name: str = ""
    """Its id in Ray."""
    kind: str = ""
    """Name of Ray's resource that only nodes with such GPUs have; empty without GPUs."""


def slots(nodes: list[Node], resources: ResourcesConfig, gpus_per_trial: float) -> int:
    """Fold trials that fit at a time.

    A device lies within one node, and fractions of a GPU within one GPU; the devices of a trial may
    lie on several nodes.
    """
    devices = sum(_devices(node, resources.cpus_per_trial, gpus_per_trial) for node in nodes)
    fitting = devices // resources.devices_per_trial
    limit = resources.max_concurrent
    return fitting if limit is None else min(fitting, limit)


def _devices(node: Node, cpus: int, gpus: float) -> int:
    by_cpu = int(node.cpus // cpus)
    if gpus == 0:
        return by_cpu
    if gpus >= 1:
        return min(by_cpu, int(node.gpus // gpus))
    return min(by_cpu, int(node.gpus) * int(1 / gpus + 1e-9))


def default_gpus(nodes: list[Node], resources: ResourcesConfig) -> float:
    """GPUs of each device: as the config says, else one where the cluster has any.

    `auto` is one at most (`gpu_shares`).
    """
    if isinstance(resources.gpus_per_trial, int | float):
        return resources.gpus_per_trial
    return 1.0 if any(node.gpus for node in nodes) else 0.0


def resource_problems(nodes: list[Node], resources: ResourcesConfig) -> list[Problem]:
    """Problems of the config's resources with these nodes."""
    problems: list[Problem] = []
    most_cpus = max(node.cpus for node in nodes)
    most_gpus = max(node.gpus for node in nodes)
    gpus = default_gpus(nodes, resources)
    if resources.cpus_per_trial > most_cpus:
        problems.append(_too_many("cpus_per_trial", resources.cpus_per_trial, most_cpus, "CPUs"))
    if gpus > most_gpus:
        problems.append(_too_many("gpus_per_trial", gpus, most_gpus, "GPUs"))
    devices = sum(_devices(node, resources.cpus_per_trial, gpus) for node in nodes)
    if not problems and devices == 0:
        where = "resources.cpus_per_trial, resources.gpus_per_trial"
        problems.append(Problem(where, "no single node has both the CPUs and the GPUs"))
    if resources.devices_per_trial > 1:
        problems += _group_problems(resources.devices_per_trial, devices, gpus)
    return problems


def _group_problems(asked: int, devices: int, gpus: float) -> Iterator[Problem]:
    """Problems of several devices a trial."""
    if gpus not in (0, 1):
        yield Problem(
            "resources.gpus_per_trial",
            f"got {gpus:g} with devices_per_trial {asked}; each of several devices is one whole "
            "GPU or none: allowed are 1 and 0",
        )
    elif 0 < devices < asked:
        yield Problem(
            "resources.devices_per_trial",
            f"got {asked}, but the cluster has room for {devices} devices with cpus_per_trial and "
            f"gpus_per_trial each; allowed: at most {devices}",
        )


def this_machine() -> list[Node]:
    """The one node of a cluster that is started here."""
    return [Node(len(os.sched_getaffinity(0)), _gpus())]


def _gpus() -> int:
    """Count the GPUs of this machine.

    torch, which takes seconds to import, is asked only where a GPU's driver is loaded.
    """
    if not has_gpu_driver():
        return 0
    import torch

    return torch.cuda.device_count()


def has_gpu_driver() -> bool:
    """True where the driver of a GPU is loaded."""
    return any(Path(device).exists() for device in _GPU_DRIVERS)


def _too_many(key: str, asked: float, most: float, unit: str) -> Problem:
    return Problem(
        f"resources.{key}",
        f"got {asked:g}, but the largest node of the cluster has {most:g} {unit}; allowed: at "
        f"most {most:g}",
    )
