"""Started as a process of its own: a cluster of Foldrace's, and a trial on two devices in it.

Prints as JSON what listened meanwhile, and the cluster's addresses; then waits for the end of its
input. Arguments: run folder, folder of the images, candidate.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress

import psutil
import ray
from ray.train import UserCallback

from foldrace.config.schema import ResourcesConfig
from foldrace.scheduling.ray import device_group
from foldrace.scheduling.ray.cluster import connect
from foldrace.trainables.spec import TrialSpec


def listening() -> set[tuple[str, str]]:
    """(process, address) of each socket of this process and all below that takes connections."""
    found = set()
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            name = process.name()
            for connection in process.net_connections("inet"):
                if not connection.raddr:  # UDP too
                    found.add((name, connection.laddr.ip))
    return found


def main(run: str, images: str, candidate: str) -> None:
    seen: set[tuple[str, str]] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.2):
            seen.update(listening())

    with connect(None, ResourcesConfig()) as cluster:
        spec = TrialSpec(run=run, image_root=images, candidate=candidate, fold=0, use_gpu=False)
        looking = threading.Thread(target=look)
        looking.start()
        try:
            device_group._train(spec, 2, UserCallback())
        finally:
            over.set()
            looking.join()
        node = ray.worker.global_worker.node
        print(
            json.dumps(
                {
                    "seen": sorted(seen),
                    "gcs": node.gcs_address,
                    "dashboard": cluster.dashboard,
                    "session": node.get_session_dir_path(),
                }
            ),
            flush=True,
        )
        sys.stdin.read()


if __name__ == "__main__":
    os.umask(0o022)
    main(*sys.argv[1:])
