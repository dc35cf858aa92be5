"""Shares of GPUs by measured memory, and the room that they leave: the arithmetic without Ray."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.config.schema import ResourcesConfig
from foldrace.run_folder.gpu_memory import GpuKind, TrialMemory
from foldrace.scheduling.gpu_shares import (
    MARGIN,
    MOST,
    fit_problems,
    places,
    share_lines,
    share_of,
    trials_on_a_gpu,
)
from foldrace.scheduling.nodes import Node
from foldrace.scheduling.room import Place, Room, SharedRoom
from foldrace.scheduling.sweep import FINISHED
from tests.conftest import examples
from tests.scheduling.pretend_workers import K, PretendWorkers, sweep_config

GB = 10**9
SMALL, LARGE = "accelerator_type:T4", "accelerator_type:A100"


def taken(gb: float | None, whole: bool = True) -> TrialMemory:
    params: dict[str, Any] = {"batch_size": 64, "image_size": 224}
    return TrialMemory(params=params, bytes=None if gb is None else round(gb * GB), whole=whole)


def kind(name: str, gb: float, **backbones: TrialMemory) -> GpuKind:
    return GpuKind(kind=name, memory=round(gb * GB), backbones=backbones)


# -- how many share a GPU

BYTES = st.floats(1e8, 2e11)


@given(BYTES, BYTES, st.floats(0.1, 64))
def test_trials_on_a_gpu_have_memory_and_cores(need: float, memory: float, cores: float) -> None:
    count = trials_on_a_gpu(need, memory, cores)
    assert 1 <= count <= MOST
    if count > 1:
        assert count * need * (1 + MARGIN) <= memory * (1 + 1e-12) and count <= cores


@given(BYTES, BYTES, st.floats(1, 64), st.floats(1, 4))
def test_more_memory_never_means_fewer_trials(
    need: float, memory: float, cores: float, factor: float
) -> None:
    count = trials_on_a_gpu(need, memory, cores)
    assert trials_on_a_gpu(need, memory * factor, cores) >= count
    assert trials_on_a_gpu(need, memory, cores * factor) >= count
    assert trials_on_a_gpu(need * factor, memory, cores) <= count


def test_as_many_as_fit_and_no_fewer() -> None:
    assert [trials_on_a_gpu(10, memory, 64) for memory in (5, 11, 21.9, 22, 32.9, 33)] == [
        1, 1, 1, 2, 2, 3,
    ]  # fmt: skip
    assert trials_on_a_gpu(10, 1e6, 64) == MOST
    assert trials_on_a_gpu(10, 1e6, 3.5) == 3


@given(st.lists(st.integers(1, MOST), min_size=1, max_size=MOST))
def test_shares_that_ray_puts_on_one_gpu_fit_into_its_memory(trials: list[int]) -> None:
    """Ray counts whole parts of 1/10,000; memory is shared in exact fractions."""
    together = sum(round(share_of(n) * 10_000) for n in trials)
    assert all(n * share_of(n) <= 1 for n in trials)
    if together <= 10_000:
        assert sum(1 / n for n in trials) <= 1 + 1e-9


# -- which GPUs a backbone may have


def test_each_backbone_has_its_share_of_each_kind_of_gpu() -> None:
    kinds = [
        kind(LARGE, 80, a=taken(3), b=taken(20), c=taken(15.5)),
        kind(SMALL, 16, a=taken(3), b=taken(14, whole=False), c=taken(15.5)),
    ]
    nodes = [Node(32, 2, "x", SMALL), Node(12, 2, "y", LARGE)]
    assert places("abc", kinds, nodes, 1) == {
        "a": (Place(0.25, SMALL, 0.25), Place(0.1666, LARGE, 0.1666)),  # six cores a large GPU
        "b": (Place(0.3333, LARGE, 0.3333),),  # in parts on the small ones
        "c": (Place(1.0, SMALL, 1.0), Place(0.25, LARGE, 0.25)),  # without the margin, but alone
    }
    assert places("a", kinds, nodes, 16)["a"] == (Place(1.0, SMALL, 1.0), Place(1.0, LARGE, 1.0))
    assert [*share_lines("ab", kinds, nodes, 1)] == [
        "a: 3.0 of the 16.0 GB of T4 with 64 images of 224 px, 4 trials share one; 3.0 of the "
        "80.0 GB of A100 with 64 images of 224 px, 6 trials share one",
        "b: 20.0 of the 80.0 GB of A100 with 64 images of 224 px, 3 trials share one",
    ]


def test_what_was_not_measured_or_fits_in_parts_alone_has_whole_gpus() -> None:
    kinds = [kind(SMALL, 16, parts=taken(15, whole=False), never=taken(None), odd=taken(1))]
    nodes = [Node(8, 1, "x", SMALL)]
    whole = (Place(1.0, SMALL, 1.0),)
    assert places(("parts", "unknown"), kinds, nodes, 1) == {"parts": whole, "unknown": whole}
    smaller = [kinds[0].model_copy(update={"memory": GB // 2})]  # another node's
    assert places(("odd",), smaller, nodes, 1) == {"odd": whole}
    assert [*share_lines(("parts", "unknown"), kinds, nodes, 1)] == [
        "parts: 15.0 of the 16.0 GB of T4 with 64 images of 224 px in parts, a whole GPU each",
        "unknown: not measured on T4, a whole GPU each",
    ]


def test_all_that_fit_nowhere_are_named_at_once() -> None:
    kinds = [
        kind(SMALL, 16, a=taken(None), b=taken(None), c=taken(None)),
        kind(LARGE, 80, a=taken(None), b=taken(30, whole=False), c=taken(None)),
    ]
    found = [str(problem) for problem in fit_problems("abc", kinds)]
    assert [line.split(":")[1].split()[0] for line in found] == ["a", "c"]
    assert all(line.startswith("search.backbones: ") for line in found)
    assert "T4 (16.0 GB), A100 (80.0 GB)" in found[0] and "one image of 224 px" in found[0]
    # Where it was not measured it may fit.
    assert not fit_problems("a", [kinds[0], kind(LARGE, 80)])


# -- the room that is left


def shared(nodes: list[Node], limit: int | None = None, **own: tuple[Place, ...]) -> SharedRoom:
    return SharedRoom(lambda: nodes, ResourcesConfig(max_concurrent=limit), own)


def part(trials: int, name: str = SMALL) -> Place:
    return Place(share_of(trials), name, share_of(trials))


def test_trials_that_are_all_alike_are_counted() -> None:
    room = Room(lambda: 2, Place(0.5, devices=0.5))
    assert (room.slots("a"), room.most, room.devices("a")) == (2, 2, 0.5)
    vacancy = room.vacancy([Place(0.5)])
    assert not vacancy.is_full and vacancy.take("a") == Place(0.5, devices=0.5)
    assert room.vacancy([Place(0.5)] * 2).is_full


def test_each_goes_to_the_fullest_gpu_that_has_room() -> None:
    room = shared([Node(8, 2, "x", SMALL)], a=(part(1),), b=(part(2),), c=(part(4),))
    running: list[Place] = []
    for backbone, number in (("c", 0), ("b", 0), ("c", 0), ("b", 1), ("a", None), ("c", 1)):
        place = room.vacancy(running).take(backbone)
        assert (None if place is None or place.gpu is None else place.gpu[1]) == number
        running += [] if place is None else [place]
    assert (room.slots("a"), room.slots("b"), room.slots("c"), room.most) == (2, 4, 8, 8)
    assert room.slots() == 5  # on average
    assert room.devices() == pytest.approx((1 + 0.5 + 0.25) / 3)


def test_who_is_refused_keeps_the_gpus_that_it_waits_for() -> None:
    nodes = [Node(8, 1, "x", SMALL), Node(8, 1, "y", LARGE)]
    room = shared(nodes, big=(part(1, LARGE),), small=(part(4), part(8, LARGE)))
    first = room.vacancy([]).take("small")
    assert first is not None and first.gpu == ("x", 0)
    on_large = Place(share_of(8), LARGE, gpu=("y", 0))
    vacancy = room.vacancy([on_large])
    assert vacancy.take("big") is None and vacancy.waiting
    there = [vacancy.take("small"), room.vacancy([on_large, *[first] * 4]).take("small")]
    assert [None if place is None else place.gpu for place in there] == [("x", 0), ("y", 0)]
    full = room.vacancy([on_large, *[first] * 4])
    assert full.take("big") is None and full.take("small") is None and not full.is_full


def test_an_update_of_the_result_takes_as_much_as_the_largest_trial() -> None:
    room = shared([Node(8, 1, "x", SMALL)], a=(part(2),), b=(part(4),))
    update = room.vacancy([]).take(None)
    assert update is not None and update.units == 5_000
    quarter = Place(share_of(4), SMALL, gpu=("x", 0))
    vacancy = room.vacancy([quarter] * 3)
    assert vacancy.take(None) is None and vacancy.take("b") is None  # until there is room for it


def test_limits_other_than_gpus() -> None:
    nodes = [Node(2, 1, "x", SMALL)]
    eighth = Place(share_of(8), SMALL, gpu=("x", 0))
    room = shared(nodes, a=(part(8),))
    assert room.slots("a") == 2 and room.vacancy([eighth] * 2).is_full  # two cores
    limited = shared(nodes, limit=1, a=(part(8),))
    assert limited.slots("a") == limited.most == 1 and limited.vacancy([eighth]).is_full
    assert not limited.vacancy([]).is_full
    nodes.clear()  # the node has gone
    assert room.slots() == 0 and room.vacancy([]).is_full


NEEDS = st.lists(st.floats(0.5, 60), min_size=1, max_size=4)
NODES = st.lists(
    st.tuples(st.integers(1, 16), st.integers(1, 4), st.booleans()), min_size=1, max_size=3
)


@given(NEEDS, NODES, st.integers(1, 4), st.randoms(use_true_random=False))
@settings(max_examples=examples(200), deadline=None)
def test_never_more_than_a_gpus_memory_or_a_nodes_cores(
    needs: list[float], listed: list[tuple[int, int, bool]], cpus: int, rng: random.Random
) -> None:
    """Trials come and go; what they take of each GPU is summed up anew."""
    memory = {SMALL: 16.0, LARGE: 80.0}
    nodes = [
        Node(max(cores, cpus), gpus, f"n{i}", LARGE if is_large else SMALL)
        for i, (cores, gpus, is_large) in enumerate(listed)
    ]
    backbones = {f"b{i}": need for i, need in enumerate(needs)}
    kinds = [
        kind(name, gb, **{b: taken(min(n, 0.99 * gb), whole=n < gb) for b, n in backbones.items()})
        for name, gb in memory.items()
        if any(node.kind == name for node in nodes)
    ]
    resources = ResourcesConfig(cpus_per_trial=cpus)
    room = SharedRoom(lambda: nodes, resources, places(backbones, kinds, nodes, cpus))
    running: list[tuple[str, Place]] = []
    for _ in range(60):
        if running and rng.random() < 0.4:
            running.pop(rng.randrange(len(running)))
            continue
        backbone = rng.choice([*backbones])
        vacancy = room.vacancy([place for _, place in running])
        place = vacancy.take(backbone)
        assert (place is None) == vacancy.waiting and not (place and vacancy.is_full)
        if not running:
            assert place is not None, "with nothing running everything fits"
        if place is None:
            continue
        assert place.gpu is not None
        running.append((backbone, place))
        used, cores = defaultdict[tuple[str, int], list[str]](list), Counter[str]()
        for name, at in running:
            assert at.gpu is not None
            used[at.gpu].append(name)
            cores[at.gpu[0]] += cpus
        there = {node.name: node for node in nodes}
        for (node, number), names in used.items():
            assert number < there[node].gpus
            if len(names) > 1:
                assert sum(map(backbones.__getitem__, names)) * 1.1 <= memory[there[node].kind]
        assert all(cores[name] <= there[name].cpus for name in cores)
    assert len(running) <= room.most


# -- a sweep with shares


VIT, RESNET = "timm/test_vit", "timm/test_resnet"


def shared_workers(
    folder: Path, nodes: list[Node], own: dict[str, tuple[Place, ...]], **more: Any
) -> PretendWorkers:
    room = SharedRoom(lambda: nodes, ResourcesConfig(), own)
    return PretendWorkers(folder, sweep_config(**more), slots=room.most, room=room)


@pytest.mark.parametrize("rule", ["none", "gain"])
def test_a_sweep_fills_the_gpus_and_charges_shares(tmp_path: Path, rule: str) -> None:
    """One GPU; a vit takes a quarter, a resnet all of it: neither starves, neither is too many."""
    own = {VIT: (part(4),), RESNET: (part(1),)}
    workers = shared_workers(tmp_path, [Node(8, 1, "x", SMALL)], own, rule=rule, candidates=8)
    seen = set()
    while not workers.fill():
        running = [fold.place.units for fold in workers.sweep.running.values()]
        assert sum(running) <= 10_000
        seen.add(tuple(running))
        for trial in list(workers.live):
            workers.train(trial)
    assert {(10_000,), (2_500,) * 4} <= seen
    summaries = workers.store.summaries()
    ended = [trial for summary in summaries for trial in summary.trials]
    charged = sum(t.seconds * (0.25 if t.backbone == VIT else 1.0) for t in ended)
    assert workers.sweep.spending.usage.device_seconds == pytest.approx(charged)
    if rule == "none":
        assert [s.status for s in summaries] == ["complete"] * 8
        assert len(ended) == 8 * K


def test_a_record_is_charged_with_the_share_that_it_had(tmp_path: Path) -> None:
    """As after a `resume` on other GPUs."""
    own = {VIT: (part(4),), RESNET: (part(1),)}
    nodes = [Node(8, 1, "x", SMALL)]
    workers = shared_workers(tmp_path, nodes, own, rule="none", candidates=1)
    workers.run()
    for trial in workers.store.trials().values():
        workers.store.forget_trial(trial.candidate, trial.fold)
        workers.store.save_trial(trial.model_copy(update={"devices": 0.125, "seconds": 8.0}))
    workers.begin()
    assert workers.sweep.spending.usage.device_seconds == K * 1.0


def test_a_backbone_without_a_node_waits_while_others_train(tmp_path: Path) -> None:
    """The vits go on without the resnets' node, until the others of the sweep are the resnets'."""
    nodes = [Node(8, 1, "x", SMALL)]
    own = {VIT: (part(2),), RESNET: (part(1, LARGE),)}
    workers = shared_workers(tmp_path, nodes, own, rule="none", candidates=5, sampler="grid")
    while workers.ask() is not None or workers.live:
        for trial in list(workers.live):
            workers.train(trial)
    assert workers.sweep.waits_for_room
    ended = [(s.candidate.backbone, s.status) for s in workers.store.summaries()]
    least = math.floor(workers.config.search.min_share * 5 / 2)
    assert ended == [(VIT, "complete")] * (5 - least) and 1 <= least < 5
    nodes[:] = [Node(8, 1, "y", LARGE)]
    ended = [(s.candidate.backbone, s.status) for s in workers.run()]
    assert sorted(ended)[:least] == [(RESNET, "complete")] * least and len(ended) == 5
    assert workers.sweep.suggest("end") == FINISHED and not workers.sweep.waits_for_room


def test_folds_that_wait_for_their_node_are_not_given_up(tmp_path: Path) -> None:
    small, large = Node(8, 1, "x", SMALL), Node(8, 1, "y", LARGE)
    nodes = [small, large]
    own = {VIT: (part(2, LARGE),), RESNET: (part(1),)}
    workers = shared_workers(tmp_path, nodes, own, rule="none", candidates=1)
    workers.ask()
    [trial] = workers.live
    nodes.remove(large)
    workers.end(trial, "vanish")
    assert workers.ask() is None and workers.sweep.waits_for_room and not workers.live
    nodes.append(Node(8, 1, "z", LARGE))
    assert [s.status for s in workers.run()] == ["complete"]
