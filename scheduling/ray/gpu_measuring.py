"""`gpus_per_trial: auto`: what each backbone takes of each kind of GPU, measured before the sweep.

Takes the run's store and a connected cluster, gives the room that its GPUs have for fold trials. A
backbone is measured by a task of its own that has a whole GPU, on a node of each kind; what the run
folder knows of a kind is not measured again.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.core.errors import EnvironmentProblem, listing, message_line
from foldrace.run_folder.gpu_memory import GpuKind, GpuMemory, GpuReading
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.trial_record import candidate_params
from foldrace.scheduling.gpu_shares import fit_problems, places, share_lines
from foldrace.scheduling.nodes import Node
from foldrace.scheduling.ray.cluster import Cluster
from foldrace.scheduling.ray.node_watch import KIND
from foldrace.scheduling.room import Room, SharedRoom
from foldrace.search_spaces.space import SearchSpace

TIME_LIMIT = 180.0  # seconds for a backbone, of which the imports of its process take ten
_BUDGET_PART = 0.1  # of the time budget, for all of them

Params = Mapping[str, Value]
Measure = Callable[[str, str | None, Params], GpuReading]
"""Measures in a process that has a GPU to itself: run folder, backbone (None: the GPU's memory
alone), hyperparameters."""


def measure_trial(run: str, backbone: str | None, params: Params) -> GpuReading:
    """The product's own `Measure`."""
    from foldrace.trainables.step_timing import trial_memory  # heavy; the worker's

    return trial_memory(run, backbone, params)


def shared_room(
    store: RunStore,
    space: SearchSpace,
    cluster: Cluster,
    say: Callable[[str], None],
    measure: Measure = measure_trial,
    limit: float = TIME_LIMIT,
) -> Room:
    """The room of the cluster's GPUs, with a share of them for each backbone; `say`s what it is.

    The cluster's own room where it has no GPUs. `limit`: seconds for a backbone. EnvironmentProblem
    with every backbone that fits on none of the GPUs.
    """
    nodes = [node for node in cluster.watch.nodes if node.gpus >= 1]
    if not nodes:
        return cluster.room
    wanted, config = _heaviest(store, space), store.config()
    # A node's address says nothing of its GPUs: there may be another machine by now.
    kinds = {k.kind: k for k in store.gpu_memory().kinds if k.kind.startswith(KIND)}
    asked = [*_questions(wanted, nodes, kinds)]
    if asked:
        say(_announcement(asked))
        on_node = Counter(question.node for question in asked)
        seconds = limit * max(math.ceil(n / int(node.gpus)) for node, n in on_node.items())
        if config.resources.time_budget is not None:
            seconds = min(seconds, _BUDGET_PART * config.resources.time_budget)
        for line in _ask(store.root, asked, measure, config.resources.cpus_per_trial, seconds):
            say(line)
        _learn(kinds, asked)
        found = tuple(kind for kind in kinds.values() if kind.memory)
        store.save_gpu_memory(GpuMemory(kinds=found))
    there = {node.kind for node in nodes}
    known = [kind for kind in kinds.values() if kind.kind in there]
    problems = fit_problems(wanted, known)
    if problems:
        raise EnvironmentProblem(problems)
    cpus = config.resources.cpus_per_trial
    for line in share_lines(wanted, known, nodes, cpus):
        say(line)
    return SharedRoom(
        lambda: cluster.watch.nodes, config.resources, places(wanted, known, nodes, cpus)
    )


def _heaviest(store: RunStore, space: SearchSpace) -> dict[str, dict[str, Value]]:
    """Backbone -> the hyperparameters that take the most memory of all that its trials may have."""
    given: defaultdict[str, list[TrialParams]] = defaultdict(list)
    for point in store.config().search.points:
        given[point.backbone].append(space.configured(point.backbone, point.params))
    for candidate in store.candidates():  # of earlier sessions, perhaps of another space
        given[candidate.backbone].append(candidate_params(store, candidate))
    backbones = dict.fromkeys((*space.backbones, *given))
    return {name: space.heaviest(name, given[name]).as_dict() for name in backbones}


@dataclass
class _Question:
    """One measurement on one node."""

    node: Node
    backbone: str | None
    """None: the GPU's memory alone."""
    params: Params = field(default_factory=dict)
    answer: GpuReading | None = None


def _questions(
    wanted: Mapping[str, Params], nodes: Sequence[Node], known: Mapping[str, GpuKind]
) -> Iterator[_Question]:
    """What is not known yet: backbones spread over the nodes of a kind, each node once at least.

    GPUs of one name may have memories of several sizes.
    """
    by_kind: defaultdict[str, list[Node]] = defaultdict(list)
    for node in nodes:
        by_kind[node.kind].append(node)
    for kind, own in by_kind.items():
        before = known[kind].backbones if kind in known else {}
        missing: list[str | None] = [
            name
            for name, params in wanted.items()
            if name not in before or before[name].params != params
        ]
        if kind not in known:
            missing += [None] * (len(own) - len(missing))
        for i, backbone in enumerate(missing):
            params = {} if backbone is None else wanted[backbone]
            yield _Question(own[i % len(own)], backbone, params)


def _ask(
    run: str, asked: Sequence[_Question], measure: Measure, cpus: int, limit: float
) -> Iterator[str]:
    """Have all measured within `limit` seconds; a line for each that could not be."""
    ends = time.monotonic() + limit
    tasks = {}
    for question in asked:
        task = ray.remote(num_gpus=1, max_calls=1, max_retries=0)(measure).options(
            num_cpus=min(cpus, question.node.cpus),
            scheduling_strategy=NodeAffinitySchedulingStrategy(question.node.name, soft=False),
        )
        tasks[task.remote(run, question.backbone, dict(question.params))] = question
    waiting = list(tasks)
    while waiting:
        left = max(0.0, ends - time.monotonic())
        ready, waiting = ray.wait(waiting, timeout=left)
        for answer in ready:
            try:
                tasks[answer].answer = ray.get(answer)
            except RayError as error:  # whatever a backbone does; a process that died
                cause = getattr(error, "cause", None) or error  # without Ray's frame around it
                yield _unmeasured(tasks[answer], message_line(str(cause)) or type(cause).__name__)
        if not ready:
            for answer in waiting:
                ray.cancel(answer, force=True)
                yield _unmeasured(tasks[answer], f"not within {limit:.0f} s")
            return


def _unmeasured(question: _Question, reason: str) -> str:
    what = "its memory" if question.backbone is None else question.backbone
    return f"{_name(question.node.kind)}: {what} could not be measured: {reason}"


def _learn(kinds: dict[str, GpuKind], asked: Sequence[_Question]) -> None:
    """Put the answers to what is known; a kind of which nothing is known has no memory."""
    for question in asked:
        name, answer = question.node.kind, question.answer
        if answer is None:
            kinds.setdefault(name, GpuKind(kind=name, memory=0))
            continue
        known = kinds.get(name)
        memory = answer.memory if known is None or not known.memory else known.memory
        backbones = {} if known is None else dict(known.backbones)
        if question.backbone is not None and answer.trial is not None:
            backbones[question.backbone] = answer.trial
        kinds[name] = GpuKind(kind=name, memory=min(memory, answer.memory), backbones=backbones)


def _announcement(asked: Sequence[_Question]) -> str:
    kinds = dict.fromkeys(_name(question.node.kind) for question in asked)
    names = dict.fromkeys(q.backbone or "the memory of GPUs" for q in asked)
    return f"Measuring on {', '.join(kinds)}: {listing(names)}"


def _name(kind: str) -> str:
    return GpuKind(kind=kind, memory=0).name
