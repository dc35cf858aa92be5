"""The Slurm script, run with stand-ins for what Slurm brings: `srun` and `scontrol`."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.cluster.launch_files import FOLDER, executable, parsed

DEADLINE = 120.0  # seconds
# Trains until it is told to end; then it leaves a run folder, as an interrupted sweep does.
SWEEP = """
if [[ $1 = status ]]; then [[ -e $2/sweep.yaml ]]; exit; fi
printf '%s\\n' "$@" > "$FOLDER/sweep.txt"
touch "$FOLDER/started"
trap 'mkdir -p "$FOLDER/run"; touch "$FOLDER/run/sweep.yaml"; sleep 0.3; exit "$ENDS_WITH"' TERM
while [[ $ENDS_WITH != 0 ]]; do sleep 0.1; done
"""


@dataclass
class Job:
    """A run of the script as Slurm would start it."""

    folder: Path
    nodes: int
    id: int

    def start(self, ends_with: int = 130) -> subprocess.Popen[str]:
        """`ends_with`: exit code of the sweep when it is told to end; 0: it ends at once."""
        environment = dict(
            os.environ,
            VENV=str(self.folder / "venv"),
            FOLDER=str(self.folder),
            ENDS_WITH=str(ends_with),
            SLURM_JOB_ID=str(self.id),
            SLURM_JOB_NODELIST="node[1-2]",
            SLURM_NNODES=str(self.nodes),
            SLURM_CPUS_PER_TASK="1",
        )
        with (self.folder / "slurm.out").open("a") as out:
            return subprocess.Popen(
                [FOLDER / "slurm.sh", "cars.yaml", self.folder / "run", "--set", "race.z=2"],
                env=environment, stdout=out, stderr=out, text=True, cwd=self.folder,
            )  # fmt: skip

    def signalled(self, number: signal.Signals, ends_with: int = 130) -> int:
        """Exit code of a run that gets a signal once its sweep has begun."""
        (self.folder / "started").unlink(missing_ok=True)
        process = self.start(ends_with)
        end = time.monotonic() + DEADLINE
        while not (self.folder / "started").exists():
            assert process.poll() is None and time.monotonic() < end, self.output()
            time.sleep(0.05)
        process.send_signal(number)
        return process.wait(DEADLINE)

    def sweep(self) -> list[str]:
        """Arguments of the last `foldrace`."""
        return (self.folder / "sweep.txt").read_text().splitlines()

    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()

    def output(self) -> str:
        return (self.folder / "slurm.out").read_text()


def free_job_id() -> int:
    """A job number whose two ports are free."""
    for number in range(os.getpid() % 5000, 10_000):
        with contextlib.suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("", 20_000 + number))
            other.bind(("", 30_000 + number))
            return number
    raise AssertionError("no free ports")


def job(folder: Path, nodes: int, **commands: str) -> Job:
    """A virtual environment whose commands come before the tests' own."""
    (folder / "venv" / "bin").mkdir(parents=True)
    scripts = {
        "scontrol": '[[ $1 = show ]] && echo 127.0.0.1 || echo "$2" > "$FOLDER/$1d"',
        # Slurm sends the options to itself, the rest to the other nodes.
        "srun": 'echo "$@" > "$FOLDER/srun"; while [[ $1 = --* ]]; do shift; done; exec "$@"',
        "foldrace": SWEEP,
        **commands,
    }
    for name, script in scripts.items():
        executable(folder / "venv" / "bin" / name, script)
    own = Path(sys.executable).parent
    (folder / "venv" / "bin" / "activate").write_text(f'PATH="$VENV/bin:{own}:$PATH"\n')
    return Job(folder, nodes, free_job_id())


@pytest.fixture
def quick(tmp_path: Path) -> Job:
    """A job without a real Ray."""
    return job(
        tmp_path, 1, ray="exit 0", python='[[ $1 = -c ]] && echo secret || cat > "$FOLDER/py"'
    )


@pytest.fixture
def two_nodes(tmp_path: Path) -> Iterator[Job]:
    """A job with Ray's head and one node, both on this machine."""
    found = job(tmp_path, 2)
    try:
        yield found
    finally:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("FOLDER") == str(tmp_path):
                    process.kill()
        shutil.rmtree(f"/tmp/ray-{found.id}", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.full
def test_a_job_starts_ray_on_its_nodes_and_comes_back_before_its_time_is_over(
    two_nodes: Job,
) -> None:
    assert two_nodes.signalled(signal.SIGUSR1) == 130, two_nodes.output()
    assert "2 of 2 nodes have joined" in two_nodes.output()
    first = parsed(two_nodes.sweep())
    assert first["address"] == f"127.0.0.1:{20_000 + two_nodes.id % 10_000}"
    assert (str(first["config"]), first["set_"]) == ("cars.yaml", ["race.z=2"])
    assert first["out"] == str(two_nodes.folder / "run")
    assert two_nodes.requeued()
    srun = (two_nodes.folder / "srun").read_text()
    assert "--nodes=1 --ntasks=1 --exclude=127.0.0.1 ray start" in srun


def test_the_next_round_goes_on_in_the_run_folder(quick: Job) -> None:
    assert quick.signalled(signal.SIGUSR1) == 130
    assert quick.sweep()[0] == "run"
    assert quick.signalled(signal.SIGUSR1) == 130
    assert quick.sweep()[:2] == ["resume", str(quick.folder / "run")]
    assert parsed(quick.sweep())["set_"] == ["race.z=2"]


def test_a_job_that_is_cancelled_does_not_come_back(quick: Job) -> None:
    assert quick.signalled(signal.SIGTERM) == 130
    assert (quick.folder / "run" / "sweep.yaml").exists()  # the sweep has had its time to end
    assert not quick.requeued()


def test_a_sweep_that_is_done_does_not_come_back(quick: Job) -> None:
    assert quick.start(ends_with=0).wait(DEADLINE) == 0
    assert not quick.requeued()


def test_a_sweep_that_fails_does_not_come_back(quick: Job) -> None:
    executable(quick.folder / "venv" / "bin" / "foldrace", "exit 2")
    assert quick.start().wait(DEADLINE) == 2
    assert not quick.requeued()


def test_a_job_without_a_config_says_what_it_needs(tmp_path: Path) -> None:
    done = subprocess.run([FOLDER / "slurm.sh"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "CONFIG RUN_FOLDER" in done.stderr
