"""How many fold trials fit, and what does not fit at all."""

from __future__ import annotations

import pytest

from foldrace.config.schema import DataConfig, ResourcesConfig, SearchConfig, SweepConfig
from foldrace.core.errors import EnvironmentProblem
from foldrace.scheduling.nodes import Node, resource_problems, slots
from foldrace.scheduling.ray.cluster import connect, nodes_for_checks


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "limit", "expected"),
    [
        ([Node(2, 0)], 1, 0, None, 2),
        ([Node(8, 2)], 4, 1, None, 2),
        ([Node(8, 2)], 1, 0.5, None, 4),
        ([Node(8, 2)], 1, 0.3, None, 6),  # three a device, not six of two devices' sum
        ([Node(8, 1)], 1, 0.1, None, 8),  # the cores end first
        ([Node(8, 4), Node(8, 2)], 1, 2, None, 3),  # none spans nodes
        ([Node(8, 1), Node(8, 1)], 1, 2, None, 0),
        ([Node(64, 8)], 4, 1, 3, 3),
    ],
)
def test_slots(nodes: list[Node], cpus: int, gpus: float, limit: int | None, expected: int) -> None:
    resources = ResourcesConfig(cpus_per_trial=cpus, max_concurrent=limit)
    assert slots(nodes, resources, gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "devices", "expected"),
    [
        ([Node(2, 0)], 1, 0, 2, 1),
        ([Node(32, 8)], 4, 1, 4, 2),
        ([Node(32, 8)], 8, 1, 2, 2),  # each device takes its cores
        ([Node(8, 1), Node(8, 3)], 1, 1, 2, 2),  # one of them spans both nodes
        ([Node(8, 1), Node(8, 2)], 1, 1, 4, 0),
    ],
)
def test_slots_of_several_devices(
    nodes: list[Node], cpus: int, gpus: float, devices: int, expected: int
) -> None:
    resources = ResourcesConfig(cpus_per_trial=cpus, devices_per_trial=devices)
    assert slots(nodes, resources, gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "gpus", "devices", "problem"),
    [
        ([Node(8, 2), Node(8, 1)], 1.0, 3, None),
        ([Node(2, 0)], None, 2, None),
        (
            [Node(8, 2), Node(8, 1)],
            None,  # one GPU each, as the cluster has some
            4,
            "resources.devices_per_trial: got 4, but the cluster has room for 3 devices with "
            "cpus_per_trial and gpus_per_trial each; allowed: at most 3",
        ),
        (
            [Node(8, 2)],
            0.5,
            2,
            "resources.gpus_per_trial: got 0.5 with devices_per_trial 2; each of several devices "
            "is one whole GPU or none: allowed are 1 and 0",
        ),
        (
            [Node(8, 4)],
            2.0,
            2,
            "resources.gpus_per_trial: got 2 with devices_per_trial 2; each of several devices is "
            "one whole GPU or none: allowed are 1 and 0",
        ),
    ],
)
def test_what_does_not_fit_of_several_devices(
    nodes: list[Node], gpus: float | None, devices: int, problem: str | None
) -> None:
    resources = ResourcesConfig(gpus_per_trial=gpus, devices_per_trial=devices)
    expected = [] if problem is None else [problem]
    assert [str(p) for p in resource_problems(nodes, resources)] == expected


def test_too_many_gpus_names_what_is_allowed() -> None:
    resources = ResourcesConfig(gpus_per_trial=4.0, cpus_per_trial=99)
    problems = [str(p) for p in resource_problems([Node(8, 2), Node(8, 1)], resources)]
    assert problems == [
        "resources.cpus_per_trial: got 99, but the largest node of the cluster has 8 CPUs; "
        "allowed: at most 8",
        "resources.gpus_per_trial: got 4, but the largest node of the cluster has 2 GPUs; "
        "allowed: at most 2",
    ]


def test_cores_and_gpus_on_different_nodes() -> None:
    resources = ResourcesConfig(gpus_per_trial=1.0, cpus_per_trial=8)
    assert resource_problems([Node(8, 0), Node(2, 4)], resources)


@pytest.mark.parametrize("address", ["ray://localhost:10001", "127.0.0.1:1"])
def test_addresses_that_cannot_work(address: str) -> None:
    with pytest.raises(EnvironmentProblem, match="--address"), connect(address, ResourcesConfig()):
        pass


def test_a_python_whose_path_has_a_blank_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's command for a worker is one text, which a shell takes apart."""
    search = SearchConfig(backbones=("timm/test_vit",))
    config = SweepConfig(name="x", data=DataConfig(train="train.csv"), search=search)
    monkeypatch.setattr("sys.executable", "/home/me/my project/.venv/bin/python")
    with (
        pytest.raises(EnvironmentProblem, match=r"my project/.venv/bin/python: .* has a blank"),
        nodes_for_checks(config, None, sweep=True),
    ):
        pass
    with nodes_for_checks(config, None, sweep=False) as nodes:  # `check` needs no worker
        assert len(nodes) == 1
