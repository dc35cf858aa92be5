"""The process group of devices that all belong to this machine: it listens on loopback alone.

By itself torch lets the processes meet at a port that is open on all of the machine's addresses and
asks nobody for a password; here they meet in a file of a private folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import torch.distributed
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend


@dataclass
class LocalGroup(TorchConfig):
    """Ray Train's configuration of such a group."""

    meeting: str = ""
    """Path of a file that does not exist yet."""
    use_gpu: bool = False

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """See `TorchConfig.backend_cls`."""
        return _LocalBackend


class _LocalBackend(_TorchBackend):
    """Starts the group; Ray's own class ends it."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        size = len(worker_group)
        ray.get(
            [
                worker_group.execute_single_async(rank, _meet, backend_config, rank, size)
                for rank in range(size)
            ]
        )


def _meet(config: LocalGroup, rank: int, size: int) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group(
        backend="nccl" if config.use_gpu else "gloo",
        init_method=f"file://{config.meeting}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=config.timeout_s),
    )
