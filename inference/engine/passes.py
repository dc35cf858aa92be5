"""Which fold models lie in memory together.

Takes the sizes of their weights and a limit, gives passes over the images: one where all fit, else
as many as are needed, one model at a time at the least.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from foldrace.core.errors import UserError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_PART = 0.5
"""Of the free memory, where no limit is given: activations and decoded images need theirs."""


class FoldKey(NamedTuple):
    """One fold model of a member."""

    run: str
    """The run folder that holds it; empty: the blend's own."""
    candidate: str
    variant: str
    fold: int


def passes(
    keys: Sequence[FoldKey], bytes_of: Mapping[FoldKey, int], most: int
) -> list[tuple[FoldKey, ...]]:
    """The keys in their order, cut where the next would take more than `most` bytes together."""
    found: list[list[FoldKey]] = []
    used = 0
    for key in keys:
        if not found or used + bytes_of[key] > most:
            found.append([])
            used = 0
        found[-1].append(key)
        used += bytes_of[key]
    return [tuple(one) for one in found]


def memory_limit(asked: int | str | None, device: torch.device) -> int:
    """Bytes that models and their predictions may take; None: half of what is free now.

    `asked` is a number of bytes or a text such as `2GB`. UserError where it is neither.
    """
    if asked is None:
        free = _free_memory()
        if device.type == "cuda":
            free = min(free, torch.cuda.mem_get_info(device)[0])
        return int(_PART * free)
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B)?\s*", str(asked).upper())
    if match is None or float(match[1]) == 0:
        raise UserError.single(
            "--max-memory", f"got {asked!r}; allowed: a size above 0 such as 2GB, 800MB or bytes"
        )
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _free_memory() -> int:
    """Bytes that this process may still take; within a container's limit, where there is one."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = _CONTAINER.read_text().strip()
    except OSError:
        return free
    if not limit.isdigit():  # `max`
        return free
    return max(0, min(free, int(limit) - int(psutil.Process().memory_info().rss)))
