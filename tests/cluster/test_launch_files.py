"""The files of `cluster/`: what Ray, Kubernetes, Docker and Foldrace themselves say of them."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from tests.cluster.launch_files import (
    FILES,
    FOLDER,
    ROOT,
    calls_of,
    header,
    header_command,
    installed_packages,
    parsed,
    run_or_resume,
    text_of,
)

DOCKERFILES = [name for name in FILES if name.startswith("Dockerfile")]
SCRIPTS = [name for name in FILES if name.endswith(".sh")]
with (ROOT / "pyproject.toml").open("rb") as file:
    PROJECT = tomllib.load(file)["project"]
PINNED = dict(
    line.lower().split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


@pytest.mark.parametrize("name", sorted({*FILES} - {"grafana.json", "prometheus.yml"}))
def test_a_file_says_what_it_is_for_and_its_command_and_what_to_change(name: str) -> None:
    purpose, command, *rest = header(name).split("\n\n")
    assert len(purpose.split()) > 15
    assert command == header_command(name)
    assert name in command
    assert rest[-1].startswith("Change:")
    assert f"cluster/{name}" in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- commands in the files


def shell_texts() -> Iterator[tuple[str, str]]:
    """(file, text for a shell): headers, scripts, the commands in YAML, those in the docs."""
    for name in FILES:
        yield name, header_command(name)
        if name.endswith(".sh"):
            yield name, text_of(name)
        elif name.endswith(".yaml"):
            config = yaml.safe_load(text_of(name))
            lists = (value for key, value in config.items() if key.endswith("_commands"))
            yield name, "\n".join([config.get("spec", {}).get("entrypoint", ""), *chain(*lists)])
    docs = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")
    yield "docs/cluster.md", "\n".join(re.findall(r"```bash\n(.*?)```", docs, re.DOTALL))


def test_ray_knows_the_options_of_its_commands() -> None:
    from ray.scripts.scripts import cli

    seen = set()
    for name, text in shell_texts():
        for words in calls_of("ray", text):
            if not words:  # the name of the Python package
                continue
            command: Any = cli
            while isinstance(command, click.Group):
                command = command.commands[words.pop(0)]
            known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
            own = takewhile(lambda word: word != "--", words)
            options = {word.partition("=")[0] for word in own if word.startswith("--")}
            assert options <= known, (name, command.name)
            seen.add(command.name)
    assert {"start", "up", "exec", "submit", "status", "stop"} <= seen


def test_foldrace_knows_the_options_of_its_commands(tmp_path: Path) -> None:
    calls = [
        (name, words)
        for name, text in shell_texts()
        for program in ("run-or-resume", "run-or-resume.sh")
        for words in calls_of(program, text)
    ]
    assert {name for name, _ in calls} >= {"aws.yaml", "kuberay.yaml", "own-machines.yaml"}
    for _, words in calls:
        first, again = (parsed(command) for command in run_or_resume(tmp_path, words))
        assert first["config"].name == "cars.yaml"
        assert first["out"] == again["folder"]
        assert first["address"] == again["address"] == "auto"


def test_foldrace_knows_the_commands_in_the_docs() -> None:
    text = dict(shell_texts())["docs/cluster.md"]
    calls = calls_of("foldrace", text) + calls_of("foldrace.sweep", text)
    assert len(calls) >= 2
    for words in calls:
        assert parsed(words)["address"] == "auto"


# ---------------------------------------------------------------- Ray's launcher, Kubernetes


def prepared(name: str) -> dict[str, Any]:
    """A file of Ray's cluster launcher, as Ray completes and checks it."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config: dict[str, Any] = prepare_config(yaml.safe_load(text_of(name)))
    validate_config(config)
    return config


def test_workers_in_the_cloud_are_spot_machines_that_come_and_go() -> None:
    config = prepared("aws.yaml")
    head, workers = (config["available_node_types"][kind] for kind in ("head", "gpu"))
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert workers["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (head["max_workers"], workers["min_workers"], workers["max_workers"]) == (0, 1, 8)


def test_all_of_ones_own_machines_join() -> None:
    config = prepared("own-machines.yaml")
    [kind] = config["available_node_types"].values()
    assert kind["min_workers"] == len(config["provider"]["worker_ips"])


@pytest.fixture(scope="module")
def ray_job() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load(text_of("kuberay.yaml"))
    return job


SCHEMA = json.loads(Path(__file__).with_name("rayjob_schema.json").read_text(encoding="utf-8"))


def test_kuberay_knows_the_fields_of_the_job(ray_job: dict[str, Any]) -> None:
    jsonschema.validate(ray_job, SCHEMA)
    ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"] = 8
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(ray_job, SCHEMA)
    del ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplica"]


def test_the_pods_fit_together(ray_job: dict[str, Any]) -> None:
    cluster = ray_job["spec"]["rayClusterSpec"]
    [workers] = cluster["workerGroupSpecs"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], workers)]
    for pod in pods:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        [container] = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        paths = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert volumes[paths["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert paths["/shared"] == "shared"
        assert container["resources"]["requests"] == container["resources"]["limits"]
    assert len({pod["containers"][0]["image"] for pod in pods}) == 1
    assert cluster["rayVersion"] == PINNED["ray"]
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]


# ---------------------------------------------------------------- images


def instructions(name: str) -> list[list[str]]:
    """Words of each line of a Dockerfile; those of RUN as a shell sees them."""
    lines = re.sub(r"(?m)^#.*\n", "", text_of(name)).replace("\\\n", " ").splitlines()
    return [line.split() for line in lines if line]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_copies_is_there(name: str) -> None:
    stages = {words[-1] for words in instructions(name) if "AS" in words}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    copied = [words[1:-1] for words in instructions(name) if words[0] == "COPY"]
    assert copied
    for words in copied:
        stage = next((w.removeprefix("--from=") for w in words if w.startswith("--from=")), None)
        if stage is not None:
            assert stage in stages
            continue
        for source in (word for word in words if not word.startswith("--")):
            assert (ROOT / source).exists()
            assert not any(fnmatch.fnmatch(source, pattern) for pattern in ignored)


@pytest.mark.parametrize("name", DOCKERFILES)
def test_what_an_image_installs_is_known_to_the_project(name: str) -> None:
    extras = re.findall(r"\.whl\)\[(\w+)\]", text_of(name))
    assert set(extras) <= PROJECT["optional-dependencies"].keys()
    assert set(installed_packages(name)) <= PINNED.keys()
    assert text_of(name).count("--constraint /constraints.txt") == 1
    pythons = re.findall(r"FROM python:(3\.\d+)-slim", text_of(name))
    assert {f">={python}" for python in pythons} == {PROJECT["requires-python"]}


# ---------------------------------------------------------------- scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_sound(name: str) -> None:
    subprocess.run(["bash", "-n", FOLDER / name], check=True)
    checker = Path(sys.executable).with_name("shellcheck")
    if not checker.exists():
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([checker, FOLDER / name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
