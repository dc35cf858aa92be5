"""Wishes for a blend that are known to fail before any trial starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from foldrace.checks.ensemble import ensemble_problems
from foldrace.config.schema import DataConfig, EnsembleConfig, SearchConfig, SweepConfig
from foldrace.search_spaces.space import build_space

BOTH = ("timm/resnet18", "timm/vgg11")


def found(
    earlier: Mapping[str, str] | None = None, space: Mapping[str, Any] | None = None, **wishes: Any
) -> list[str]:
    config = SweepConfig(
        name="test",
        data=DataConfig(train="/data/train.csv"),
        search=SearchConfig(backbones=BOTH, candidates=10, space=dict(space or {})),
        ensemble=EnsembleConfig(**wishes),
    )
    built, problems = build_space(config, "sweep.yaml")
    assert not problems
    return [str(p) for p in ensemble_problems(config, built, earlier)]


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"exclude": ("c0001", "c0002 ema", "timm/vgg11"), "include": (":c0009", "c0002 raw")},
        {"include": ("c0001", "c0001 ema", "timm/vgg11"), "max_members": 1},
        {"include": ("c0001 snap2",), "exclude": ("c0001 raw",)},
        {"method": "soup"},
    ],
)
def test_what_may_be_met(wishes: dict[str, Any]) -> None:
    assert found(**wishes) == []


def test_every_problem_at_once() -> None:
    texts = found(
        method="snapshot",
        exclude=(*BOTH, "c0002", "c0010"),
        include=("c0002 ema", "c0003", "timm/x", "c0004 emma"),
        max_members=1,
    )
    allowed = (
        "allowed: c0000 to c0009, each also with a variant (`c0000 ema`), or a backbone: "
        "timm/resnet18, timm/vgg11"
    )
    neither = "is neither a candidate nor a backbone of the search"
    assert texts == [
        f"ensemble.exclude: 'c0010' {neither}; {allowed}",
        f"ensemble.include: 'timm/x' {neither}; {allowed}",
        f"ensemble.include: 'c0004 emma' {neither}; {allowed}",
        "ensemble.include: 'c0002 ema' is excluded by ensemble.exclude ('c0002'); leave it out of "
        "one of the two",
        "ensemble.exclude: excludes every backbone of the search, so that nothing is left to "
        "blend; leave one in: timm/resnet18, timm/vgg11",
        "ensemble.max_members: is 1, but ensemble.include forces 2 in; raise it, or shorten the "
        "list",
        "ensemble.include: the method 'snapshot' can force none in; empty the list or use another "
        "method",
        "ensemble.method: 'snapshot' needs snapshots, and no trial keeps one; set `snapshots: 3` "
        "in search.space, or use another method",
    ]


def test_the_method() -> None:
    (problem,) = found(method="gredy")
    assert problem.startswith("ensemble.method: got 'gredy'; did you mean 'greedy'?")
    assert found(method="snapshot", space={"snapshots": 2, "epochs": 5}) == []


def test_a_run_that_goes_on_knows_its_candidates() -> None:
    """Also those of backbones that the search has left."""
    earlier = {"c0000": "timm/vgg11", "c0012": "timm/old"}
    assert found(earlier, include=("c0012", "timm/old", "c0009"), exclude=BOTH) == []
    assert len(found(earlier, include=("c0013",))) == 1
    (problem,) = found(earlier, exclude=(*BOTH, "timm/old"))
    assert "excludes every backbone" in problem
