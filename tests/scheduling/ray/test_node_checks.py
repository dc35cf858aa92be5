"""What is said of a node before the first trial: two nodes, of which one is in a bad way.

The second node has its own view of the file system (`unshare --mount`), where folders are hidden
or other ones, and its own environment.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from foldrace.run_folder.store import RunStore
from tests.conftest import write_tiny_run
from tests.scheduling.ray.running_cluster import DEADLINE, running_cluster

ROOT = Path(__file__).resolve().parents[3]
DRIVER = """
import json, os, signal, sys, time
from foldrace.config.schema import ResourcesConfig
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.cluster import alive_nodes, connect
from foldrace.scheduling.ray.node_checks import check_nodes

def ask(run, images, **more):
    store, start = RunStore.open(run), time.perf_counter()
    found = check_nodes(store, images, True, **more)
    seconds = time.perf_counter() - start
    problems, warnings = ([str(line) for line in lines] for lines in found)
    print(json.dumps([problems, warnings, seconds, store.files.names()]), flush=True)

address, seen, hidden, remote, images, others = sys.argv[1:]
with connect(address, ResourcesConfig()):
    ask(seen, images)
    raylet = int(input())
    while len(alive_nodes()) < 2:
        time.sleep(0.05)
    ask(seen, images)
    ask(hidden, others)
    ask(remote, images)
    os.kill(raylet, signal.SIGSTOP)
    ask(seen, images, limit=2)
    os.kill(raylet, signal.SIGCONT)
"""
# What the second node does not see, sees otherwise, and has too little of.
OWN_VIEW = """
mount -t tmpfs none "$1"
mount -t tmpfs none "$2" && cp -r "$3/." "$2" && truncate -s 7 "$2"/green/* && rm -r "$2/red"
mount -t tmpfs -o size=1m none "$FOLDRACE_CACHE"
mount -t tmpfs -o size=64m none /dev/shm
shift 3
exec "$@"
"""


@dataclass(frozen=True)
class Asked:
    """One call of `check_nodes`."""

    problems: list[str]
    warnings: list[str]
    seconds: float
    left: list[str]
    """Names in the run folder afterwards."""


@dataclass(frozen=True)
class TwoNodes:
    """What was found of one node, and of two with several run folders and images."""

    alone: Asked
    seen: Asked
    hidden: Asked
    remote: Asked
    stopped: Asked
    folder: Path
    sessions: list[str]
    """Names of Ray's folders."""


@pytest.fixture(scope="module")
def two_nodes(
    tmp_path_factory: pytest.TempPathFactory, tiny_images: Path, s3_endpoint: str
) -> Iterator[TwoNodes]:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("a node with its own view of the disk needs the right to mount")
    root = tmp_path_factory.mktemp("nodes")
    packages, cache, temporary = root / "packages", root / "cache", root / ("t" * 80)
    for name, number in {"timm": "0.9.1", "numpy": "2.4.0"}.items():
        folder = packages / f"{name}-{number}.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
        )
    cache.mkdir()
    temporary.mkdir()
    others = root / "others"
    shutil.copytree(tiny_images, others)
    seen = write_tiny_run(root / "seen", tiny_images).store
    hidden = write_tiny_run(root / "folder" / "hidden", tiny_images).store
    access = {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    remote = f"s3://runs/nodes?endpoint_override={s3_endpoint}&scheme=http"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in access.items():
            patch.setenv(name, value)
        text = (root / "seen" / "folds.csv").read_text()
        RunStore(remote).create(seen.config(), text, seen.classes())
    with running_cluster(FOLDRACE_CACHE=str(cache), **access) as cluster:
        cluster.start_head(1, 1, "--resources", '{"accelerator_type:A100": 1}')
        with subprocess.Popen(
            [sys.executable, "-c", DRIVER, cluster.address, seen.root, hidden.root, remote,
             tiny_images, others],
            env=cluster.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as driver:  # fmt: skip
            assert driver.stdin is not None and driver.stdout is not None
            alone = driver.stdout.readline()
            assert alone, "the driver has failed"
            view = "unshare", "--mount", "sh", "-ec", OWN_VIEW, "sh"
            node = cluster.add_node(
                1, 1, "--resources", '{"accelerator_type:T4": 1}',
                within=(*view, str(root / "folder"), str(others), str(tiny_images)),
                TMPDIR=str(temporary), PYTHONPATH=str(packages),
            )  # fmt: skip
            print(_raylet(node).pid, file=driver.stdin, flush=True)
            lines = driver.stdout.readlines()
            assert driver.wait(DEADLINE) == 0
        sessions = [path.name for path in cluster.folder.glob("session_2*")]
        yield TwoNodes(*(Asked(*json.loads(line)) for line in (alone, *lines)), root, sessions)


def _raylet(node: psutil.Process) -> psutil.Process:
    [found] = [child for child in node.children(recursive=True) if child.name() == "raylet"]
    return found


def sentences(lines: list[str]) -> list[str]:
    """The lines without the node's name, which all must have."""
    found = [re.fullmatch(r"node [\d.:]+ \([0-9a-f]{6}\): (.+)", line) for line in lines]
    assert all(found), lines
    return [match[1] for match in found if match]


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_alone_is_looked_at_in_no_time(two_nodes: TwoNodes) -> None:
    assert (two_nodes.alone.problems, two_nodes.alone.warnings) == ([], [])
    assert two_nodes.alone.seconds < 0.2


@pytest.mark.slow
@pytest.mark.ray
def test_packages_and_folders_of_a_node(two_nodes: TwoNodes) -> None:
    packages, folder = sentences(two_nodes.seen.problems)
    assert packages == (
        f"has timm 0.9.1, the driver {version('timm')}; install the same on all nodes"
    )
    assert folder.startswith(f"has a folder for temporary files, TMPDIR={two_nodes.folder}/ttt")
    assert f" is {len(str(two_nodes.folder)) + 81} bytes long; allowed: at most 75" in folder
    [session] = two_nodes.sessions  # the lengths of the names in the driver's check are right
    assert re.fullmatch(r"session_\d{4}(-\d\d){2}_\d\d(-\d\d){2}_\d{6}_\d+", session)
    *own, kinds = two_nodes.seen.warnings
    other, disk, shared = sentences(own)
    assert other == f"has numpy 2.4.0, the driver {version('numpy')}"
    assert disk.startswith(f"has 0.0 GB free for decoded images in {two_nodes.folder}/cache; ")
    assert shared.startswith("has a /dev/shm of 0.07 GB")
    assert re.match(r"GPUs of the cluster: are of 2 kinds: A100 \(node .+\); T4 \(node ", kinds)


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_folder_and_images_that_a_node_does_not_see(
    two_nodes: TwoNodes, tiny_images: Path
) -> None:
    of_run, of_images, *others = sentences(two_nodes.hidden.problems)[1:]
    assert of_run.startswith(f"does not see {two_nodes.folder}/folder/hidden (")
    assert "on a disk that all nodes mount" in of_run
    paths = RunStore.open(two_nodes.folder / "seen").folds().image_paths[::3]
    wrong = sum(path.startswith(("green", "red")) for path in paths)
    start = re.escape(f"has other images in {two_nodes.folder}/others than the driver: ")
    one = r"green/\d+\.png has 7 bytes, not [\d,]+"
    assert re.match(f"{start}{one}, {one}, {one} and {wrong - 3} more; ", of_images)
    assert len(others) == 1  # TMPDIR


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_in_an_object_store_is_seen_by_all(two_nodes: TwoNodes) -> None:
    assert two_nodes.remote.problems == two_nodes.seen.problems


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_that_does_not_answer(two_nodes: TwoNodes) -> None:
    assert sentences(two_nodes.stopped.problems) == ["did not answer within 2 s"]
    assert 2 <= two_nodes.stopped.seconds < 12


@pytest.mark.slow
@pytest.mark.ray
def test_nothing_is_left_in_the_run_folder(two_nodes: TwoNodes) -> None:
    for asked in (two_nodes.seen, two_nodes.hidden, two_nodes.remote):
        assert "nodes" not in asked.left and "sweep.yaml" in asked.left
