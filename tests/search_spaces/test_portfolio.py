"""The first candidates: recorded configurations, brought into the user's space."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.config.hyperparameters import KNOBS, TrialParams
from foldrace.config.schema import SweepConfig
from foldrace.search_spaces.defaults import Situation
from foldrace.search_spaces.portfolio import Entry, Portfolio, first_candidates, recorded
from foldrace.search_spaces.space import SearchSpace, build_space
from tests.conftest import examples

R, B, V = "timm/test_resnet", "timm/test_byobnet", "timm/test_vit"
TABLE: Portfolio = {
    "scratch": [
        Entry(R, {"lr": 2.0, "policy": "heavy", "flip": 0.5}),
        Entry(R, {"lr": 1.0, "policy": "none", "dropout": 0.3}),
        Entry(B, {"lr": 0.5, "policy": "light"}),
    ],
    "pretrained": [Entry("timm/other", {"lr": 1.5, "layer_decay": 0.7})],
}


def space(backbones: list[str], pretrained: bool = False, **search: Any) -> SearchSpace:
    raw = {
        "name": "s",
        "data": {"train": "t"},
        "training": {"pretrained": pretrained},
        "search": {"backbones": backbones, **search},
    }
    built, problems = build_space(SweepConfig.model_validate_json(json.dumps(raw)), "")
    assert problems == []
    return built


def firsts(
    of: SearchSpace, most: int, earlier: list[tuple[str, TrialParams]] | None = None
) -> list[tuple[str, float, str]]:
    found = first_candidates(of, most, earlier or [], TABLE)
    return [(backbone, params.lr, params.policy) for backbone, params in found]


def test_entries_of_the_backbone_come_first_then_those_of_others() -> None:
    lr = Situation("cnn", False).lr
    assert firsts(space([R, B]), 10) == [
        (R, 2 * lr, "heavy"), (R, lr, "none"), (B, lr / 2, "light"),
        (B, 2 * lr, "heavy"), (R, lr / 2, "light"), (B, lr, "none"),
    ]  # fmt: skip


def test_an_unrecorded_backbone_gets_the_entries_relative_to_its_own_rate() -> None:
    built = space([V])
    lr = Situation("transformer", False).lr
    assert [rate for _, rate, _ in firsts(built, 2)] == [2 * lr, lr]
    pretrained = space([V, B], pretrained=True)
    (_, other), (_, like) = first_candidates(pretrained, 2, portfolio=TABLE)
    assert other.lr == float(f"{1.5 * Situation('transformer', True).lr:.3g}")
    assert like.lr == float(f"{1.5 * Situation('cnn', True).lr:.3g}")
    assert (like.layer_decay, like.head_lr) == (0.7, 1.0)
    assert (other.layer_decay, other.head_lr) == (0.9, 3.0)  # those of a transformer


def test_every_backbone_has_one_however_few_are_wanted() -> None:
    assert [b for b, _, _ in firsts(space([V, B, R]), 0)] == [R, B, V]
    assert [b for b, _, _ in firsts(space([V, B, R]), 4)] == [R, R, B, V]


def test_what_the_config_fixes_or_searches_elsewhere_wins() -> None:
    ranges = {
        "lr": {"low": 1e-6, "high": 1e-5, "log": True},
        "policy": "medium",
        "dropout": {"high": 0.2},
    }
    built = space([R], space=ranges)
    for _, params in first_candidates(built, 5, portfolio=TABLE):
        assert params.policy == "medium" and params.lr == built.default(R).lr
        assert 1e-6 < params.lr < 1e-5 and params.dropout < 0.2


def test_the_users_own_earlier_runs_come_before_all() -> None:
    built = space([R, B])
    own = TrialParams.from_dict(built.default(B).as_dict() | {"lr": 0.0123, "batch_size": 512})
    gone = ("timm/gone", own)
    (backbone, params), *_ = first_candidates(built, 3, [gone, (B, own)], TABLE)
    assert (backbone, params.lr, params.batch_size) == (B, 0.0123, 32)  # not searched: as set


def test_without_entries_every_backbone_starts_with_its_default() -> None:
    built = space([R, V])
    empty: Portfolio = {"scratch": [], "pretrained": []}
    found = first_candidates(built, 1, portfolio=empty)
    assert found == [(R, built.default(R)), (V, built.default(V))]


@settings(deadline=None, max_examples=examples(20))
@given(
    backbones=st.lists(st.sampled_from([R, B, V, "timm/resnet18"]), min_size=1, unique=True),
    pretrained=st.booleans(),
    most=st.integers(0, 12),
)
def test_the_products_own_table_lies_in_the_default_space(
    backbones: list[str], pretrained: bool, most: int
) -> None:
    built = space(backbones, pretrained)
    found = first_candidates(built, most)
    assert len(found) <= max(most, len(backbones)) and len(set(found)) == len(found)
    assert {backbone for backbone, _ in found} == set(backbones)
    for backbone, params in found:
        assert built.encode(backbone, params) is not None
    for entries in recorded().values():
        for entry in entries:
            assert entry.params.keys() <= KNOBS.keys()
