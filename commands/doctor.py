"""`doctor`: what a sweep would find on this machine, or on each node of a cluster, in one table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from foldrace.checks.machine import Finding, machine_findings
from foldrace.config.schema import ResourcesConfig
from foldrace.core.errors import EnvironmentProblem, Problem
from foldrace.scheduling.ray.cluster import (
    NoAnswer,
    connect,
    on_each_node,
    open_ports,
    require_startable_python,
)
from foldrace.scheduling.ray.node_watch import alive_nodes

_HERE = "this machine"


def doctor(address: str | None, console: Console) -> None:
    """Print the table; EnvironmentProblem with all that forbids every sweep."""
    findings = [(_HERE, finding) for finding in machine_findings()]
    if not any(finding.forbids for _, finding in findings):
        findings += _ray(address)
    console.print(_table(findings, several=len({where for where, _ in findings}) > 1))
    problems = [
        Problem(f"{where}, {finding.what}" if where != _HERE else finding.what, finding.advice)
        for where, finding in findings
        if finding.forbids
    ]
    if problems:
        raise EnvironmentProblem(problems)


def _ray(address: str | None) -> Iterator[tuple[str, Finding]]:
    """The start of Ray here, or each node of the cluster that runs already."""
    began = time.monotonic()
    try:
        require_startable_python()
        with connect(address, ResourcesConfig()):
            nodes = alive_nodes()
            cores, gpus = sum(n.cpus for n in nodes), sum(n.gpus for n in nodes)
            took = (
                f"{'starts' if address is None else 'answers'} in {time.monotonic() - began:.0f} s"
            )
            yield _HERE, Finding("Ray", f"{took}; {cores:g} cores, {gpus:g} GPUs for trials")
            if address is None:
                yield _HERE, _ports()
            else:
                for node, found in on_each_node(_node_findings):
                    if isinstance(found, NoAnswer):
                        yield f"node {node}", Finding("Ray", "-", found.reason, forbids=True)
                    else:
                        yield from ((f"node {node}", finding) for finding in found)
    except EnvironmentProblem as error:
        for problem in error.problems:
            yield _HERE, Finding("Ray", problem.where, problem.message, forbids=True)
    except (OSError, RuntimeError, ValueError) as error:
        yield _HERE, Finding("Ray", "does not start", str(error), forbids=True)


def _node_findings() -> list[Finding]:
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs of a task that asks for none
    return machine_findings()


def _ports() -> Finding:
    """Whether other machines can use what Ray has started here."""
    ports = open_ports()
    if not ports:
        return Finding("Ray's ports", "open to this machine alone")
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":  # Ray sets it where nobody has
        return Finding("Ray's ports", f"{len(ports)} open to others, who need its token")
    return Finding(
        "Ray's ports",
        ", ".join(ports),
        "other machines can reach them while a sweep runs, and run code here: let a firewall close "
        "them, or set RAY_AUTH_MODE=token",
    )


def _table(findings: list[tuple[str, Finding]], several: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    if several:
        table.add_column("where", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for where, finding in findings:
        state = Text("ok", style="green")
        if finding.advice:
            state = Text("error", "red") if finding.forbids else Text("warning", "yellow")
        cells: list[Text | str] = [finding.what, state, finding.value, finding.advice]
        table.add_row(*([where] if several else []), *cells)
    return table
