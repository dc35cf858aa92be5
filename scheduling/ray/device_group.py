"""One fold trial on several devices, data parallel: Ray Train starts a process for each.

Takes a `TrialSpec` and the number of devices; the trial writes its own result. Called from within
a Tune trial, which itself holds no device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback, WorkerGroupError
from ray.tune.integration.ray_train import TuneReportCallback

from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.private_cluster import on_loopback
from foldrace.trainables.spec import (
    EpochReport,
    Pace,
    TrialSpec,
    TrialStopped,
    first_micro_batch,
    read_trial,
)

NO_DEVICE = {"memory": 1.0}
"""Tune refuses a trial without any resource; cores and GPUs belong to the group's processes."""

_ASK_EVERY = 0.2  # seconds between questions whether to stop
_LEAVE_WITHIN = 1.5  # seconds for the group's end; Tune waits 2 s before it gives up a process
_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # an epoch's report waits for the next look
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # to hear of a stop while devices are awaited
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process more; a lost node is a failed trial
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # of a group whose other process has failed
}


def run_on_devices(
    spec: TrialSpec, devices: int, stop_requested: Callable[[], bool], name: str = ""
) -> None:
    """Train on `devices` devices, on one node where it has room; epochs are reported to Tune.

    Each device has `spec.cpus` cores and, where `spec.use_gpu`, one GPU. `name`: the trial's, for
    people. Raises TrialStopped when asked to stop, and whatever ended the group.
    """
    # A task of its own, since only what runs in a main thread can be interrupted in good order:
    # the trainer then ends its processes and gives their resources back.
    task = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": _SETTINGS})(_train)
    epochs_to_tune = TuneReportCallback()  # type: ignore[no-untyped-call]
    group = task.options(name=f"{name} on {devices} devices").remote(spec, devices, epochs_to_tune)
    while not ray.wait([group], timeout=_ASK_EVERY)[0]:
        if stop_requested():
            ray.cancel(group, recursive=False)
            ray.wait([group], timeout=_LEAVE_WITHIN)
            raise TrialStopped
    ray.get(group)


def _train(spec: TrialSpec, devices: int, epochs_to_tune: UserCallback) -> None:
    """Train in the task's process, again with smaller micro-batches where a memory is full.

    A device whose memory is full cannot make its step again while the others wait for its
    gradients: all start again.
    """
    while True:
        try:
            _fit(spec, devices, epochs_to_tune)
            return
        except WorkerGroupError as error:
            smaller = _smaller(spec, devices) if _memory_is_full(error) else None
            if smaller is None:
                raise
            spec = smaller


def _fit(spec: TrialSpec, devices: int, epochs_to_tune: UserCallback) -> None:
    from ray.train.torch import TorchTrainer

    from foldrace.scheduling.ray.local_group import LocalGroup

    device = {"CPU": spec.cpus} | ({"GPU": 1} if spec.use_gpu else {})
    with tempfile.TemporaryDirectory(prefix="foldrace-train-") as scratch:
        TorchTrainer(
            _one_device,
            train_loop_config={"spec": spec},
            torch_config=(
                LocalGroup(meeting=f"{scratch}/meeting", use_gpu=spec.use_gpu)
                if on_loopback()
                else None
            ),
            scaling_config=ScalingConfig(
                num_workers=devices,
                use_gpu=spec.use_gpu,
                resources_per_worker=device,
                placement_strategy="PACK",
            ),
            run_config=RunConfig(
                name="trial",
                storage_path=scratch,
                callbacks=[epochs_to_tune],  # type: ignore[list-item]  # an older Train's types
                # The sweep counts failures and starts trials anew.
                failure_config=FailureConfig(max_failures=0, max_preemption_failures=0),  # type: ignore[call-arg]
            ),
        ).fit()


def _one_device(config: dict[str, Any]) -> None:
    """Train in the process of one device, whose process group is up."""
    import torch.distributed

    from foldrace.trainables.trial import run_trial

    spec = config["spec"]
    own = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    all_ids: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(all_ids, own)
    accelerators = tuple(device_id for ids in all_ids for device_id in ids)
    run_trial(replace(spec, accelerators=accelerators), _GroupMonitor())


class _GroupMonitor:
    """Reports epochs to the trainer, which waits for all devices; a stop ends the processes."""

    def __init__(self) -> None:
        self._pace: dict[str, float] = {}

    def pace(self, pace: Pace) -> None:
        self._pace = asdict(pace)

    def report(self, epoch: EpochReport) -> None:
        ray.train.report(asdict(epoch) | self._pace)

    def stop_requested(self) -> bool:
        return False


def _memory_is_full(error: WorkerGroupError) -> bool:
    """True where a device's memory was full; a plugin's failure has its cause as text alone."""
    from foldrace.core.plugins import PluginFailure
    from foldrace.trainables.memory import is_out_of_memory

    for failure in error.worker_failures.values():
        cause = RuntimeError(str(failure)) if isinstance(failure, PluginFailure) else failure
        if isinstance(cause, RuntimeError) and is_out_of_memory(cause):
            return True
    return False


def _smaller(spec: TrialSpec, devices: int) -> TrialSpec | None:
    """The same trial with half as many images on a device at once; None at one."""
    size = first_micro_batch(read_trial(spec, RunStore.open(spec.run)), devices)
    if size == 1:
        return None
    half = -(-size // 2)
    note = f"out of device memory: starting again in micro-batches of {half}"
    return replace(spec, micro_batch=half, notes=(*spec.notes, note))
