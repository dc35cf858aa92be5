"""Ray's own autoscaler follows a sweep's demand; its nodes are processes on this machine."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.scheduling.ray.running_cluster import DEADLINE, running_cluster

_WORKERS = 3
_KINDS = {
    "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "gpu": {
        "resources": {"CPU": 1, "GPU": 1}, "node_config": {}, "min_workers": 0,
        "max_workers": _WORKERS,
    },
}  # fmt: skip
_DRIVER = """
import sys, time
from foldrace.config.schema import SweepConfig
from foldrace.scheduling.ray.autoscaling import room_for_trials
from foldrace.scheduling.ray.cluster import alive_nodes, connect
from foldrace.scheduling.room import Place, Room

config = SweepConfig.model_validate_json(sys.argv[2])

def until_there_are(count):
    while len(alive_nodes()) != count:
        time.sleep(0.1)

with connect(sys.argv[1], config.resources):
    assert len(alive_nodes()) == 1
    with room_for_trials(config, Room(lambda: 1, Place(1.0)), sys.argv[1]):
        until_there_are(3)
        time.sleep(3)  # three rounds of the autoscaler
        assert len(alive_nodes()) == 3
    until_there_are(1)
print("done")
"""


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.full
def test_nodes_come_for_the_trials_that_may_run_and_go_after_them() -> None:
    config = {
        "name": "x",
        "data": {"train": "train.csv"},
        "search": {"backbones": ["timm/test_vit"]},
        "resources": {"max_concurrent": 2},
    }
    lists = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands")
    commands = ("setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    launcher = {
        "cluster_name": "test", "max_workers": _WORKERS, "upscaling_speed": 100,
        "idle_timeout_minutes": 0.05, "auth": {}, "docker": {}, "file_mounts": {},
        "head_node_type": "ray.head.default",
        "available_node_types": _KINDS, **{name: [] for name in lists},
        **{f"{name}_commands": [] for name in commands},
    }  # fmt: skip
    variables = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    with running_cluster(**variables) as cluster:
        launcher["provider"] = {
            "type": "fake_multinode",
            "gcs_address": cluster.address,
            "disable_node_updaters": True,  # nobody to reach by ssh
            "disable_launch_config_check": True,
            "use_node_id_as_ip": True,
        }
        file = cluster.folder / "launcher.json"
        file.write_text(json.dumps(launcher))
        cluster.start_head(0, 0, f"--autoscaling-config={file}")
        done = subprocess.run(
            [sys.executable, "-c", _DRIVER, cluster.address, json.dumps(config)],
            env=cluster.environment, capture_output=True, text=True, timeout=DEADLINE,
        )  # fmt: skip
        assert done.stdout == "done\n", done.stderr
