"""The sweep's demand for nodes, told to a cluster that adds and removes nodes by itself.

A sweep starts no more trials than fit, so that the autoscaler of Ray would see nobody wait.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import cycle, islice

from foldrace.config.schema import SweepConfig
from foldrace.scheduling.room import Room


@contextmanager
def room_for_trials(config: SweepConfig, room: Room, address: str | None) -> Iterator[None]:
    """Ask for as many nodes as the fold trials of a config could use, until the block ends.

    The cluster's own limits bound them. Nothing happens where no autoscaler runs, and nothing is
    asked for where the cluster is this machine's own (no `address`).
    """
    if address is None:
        yield
        return
    from ray.autoscaler.sdk import request_resources  # brings a launcher's modules

    resources, trials = config.resources, config.search.most_candidates * config.folds.trials
    trials = min(trials, config.search.fold_trials or trials, resources.max_concurrent or trials)
    places = map(room.place, config.search.backbones)
    needed = cycle([place.bundle(resources.cpus_per_trial) for place in places])
    request_resources(bundles=[*islice(needed, trials * resources.devices_per_trial)])
    try:
        yield
    finally:
        with suppress(Exception):  # the cluster may be gone: that is told elsewhere
            request_resources(bundles=[])
