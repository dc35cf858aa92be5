"""The contract of every hyperparameter: a new field of TrialParams joins by itself."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest

from foldrace.search_spaces.hyperparameters import KNOBS, Knob, TrialParams
from foldrace.search_spaces.ranges import Choice, Name

each_knob = pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)


@each_knob
def test_default_and_search_range_lie_within_the_limits(knob: Knob) -> None:
    assert knob.limits.contains(knob.default)
    if knob.search is None:
        return
    ends = (
        knob.search.values
        if isinstance(knob.search, Choice)
        else (knob.search.low, knob.search.high)
    )
    assert all(knob.limits.contains(end) for end in ends)


@each_knob
def test_says_what_it_is(knob: Knob) -> None:
    assert knob.name == next(f.name for f in fields(TrialParams) if f.name == knob.name)
    assert len(knob.doc) > 10 and not knob.doc.endswith(".")
    assert knob.unit


@each_knob
def test_type_follows_the_limits(knob: Knob) -> None:
    kind = str if knob.named else int if knob.whole else float
    assert type(knob.default) is type(getattr(TrialParams(), knob.name)) is kind


@each_knob
def test_survives_json(knob: Knob) -> None:
    value = "other" if isinstance(knob.limits, Name) else knob.limits.high
    params = TrialParams.from_dict({knob.name: value})
    again = TrialParams.from_dict(json.loads(json.dumps(params.as_dict())))
    assert again == params
    assert getattr(again, knob.name) == value


def test_the_table_has_every_field_in_order() -> None:
    assert list(KNOBS) == [f.name for f in fields(TrialParams)] == list(TrialParams().as_dict())


def test_whole_numbers_come_back_whole_from_floats() -> None:
    params = TrialParams.from_dict({"batch_size": 64.0, "lr": 1})
    assert (params.batch_size, type(params.batch_size)) == (64, int)
    assert type(params.lr) is float
    assert params.epochs == TrialParams().epochs
