"""The contract of every hyperparameter: a new field of TrialParams joins by itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields

import pytest

from foldrace.config.hyperparameters import KNOBS, Knob, TrialParams, fold_trial_seed
from foldrace.config.ranges import Choice, Float, Int, Name, Seconds, Switch, Value


def allowed_values(knob: Knob) -> tuple[Value, ...]:
    """The ends of the limits, every choice, both positions of a switch, or some name."""
    match knob.limits:
        case Name():
            return ("other",)
        case Choice(values):
            return values
        case Switch(or_path):
            return (True, False, "/weights") if or_path else (True, False)
        case Int(low, high) | Float(low, high):
            return (low, high)


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
    kinds = {Int: int, Float: float, Seconds: float, Name: str, Choice: str, Switch: bool}
    kind = kinds[type(knob.limits)]
    assert type(knob.default) is type(getattr(TrialParams(), knob.name)) is kind


@each_knob
def test_survives_json(knob: Knob) -> None:
    for value in allowed_values(knob):
        params = TrialParams.from_dict({knob.name: value})
        again = TrialParams.from_dict(json.loads(json.dumps(params.as_dict())))
        assert again == params
        assert getattr(again, knob.name) == value
        assert type(getattr(again, knob.name)) is type(value)


def test_the_table_has_every_field_in_order() -> None:
    assert list(KNOBS) == [f.name for f in fields(TrialParams)] == list(TrialParams().as_dict())


def test_whole_numbers_come_back_whole_from_floats() -> None:
    params = TrialParams.from_dict({"batch_size": 64.0, "lr": 1})
    assert (params.batch_size, type(params.batch_size)) == (64, int)
    assert type(params.lr) is float
    assert params.epochs == TrialParams().epochs


@each_knob
@pytest.mark.parametrize(
    "wrong", ["no such value", [1], {}, float("nan"), float("inf"), -1e9, None]
)
def test_what_is_not_allowed_says_what_was_given_and_what_is(knob: Knob, wrong: object) -> None:
    if (wrong is None and knob.null is not None) or knob.limits.contains(wrong):  # type: ignore[arg-type]
        assert knob.read(wrong) == (knob.null if wrong is None else wrong)
        return
    with pytest.raises(ValueError, match=r"^got .*; allowed: ") as error:
        knob.read(wrong)
    assert str(knob.limits) in str(error.value) and knob.doc in str(error.value)


@each_knob
def test_a_switch_is_no_number_and_a_number_no_switch(knob: Knob) -> None:
    switch = isinstance(knob.limits, Switch)
    for value in (True, False):
        assert knob.limits.contains(value) is switch
    if switch:
        assert not knob.limits.contains(1) and not knob.limits.contains(0.0)


def test_null_of_clipping_and_micro_batches_is_none_of_them() -> None:
    assert {k.name: k.read(None) for k in KNOBS.values() if k.null is not None} == {
        "clip_grad": 0.0,
        "micro_batch": 0,
    }


@pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("5m", 300), ("1.5h", 5400), ("7", 7)])
def test_a_time_may_be_a_text(text: str, expected: float) -> None:
    assert KNOBS["save_every"].read(text) == expected
    with pytest.raises(ValueError, match=r"got '9 weeks'; allowed: a number.*or a text such as"):
        KNOBS["save_every"].read("9 weeks")
    with pytest.raises(ValueError, match="got '90s'"):
        KNOBS["epochs"].read("90s")


def expected_seed(seed: int, backbone: str, changed: str, fold: int) -> int:
    """By hand: the first 31 bits of the digest of what is trained."""
    text = f'[{seed}, "{backbone}", {changed}, {fold}]'
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) // 2


@pytest.mark.parametrize(
    ("given", "changed"),
    [
        ({}, "{}"),
        ({"lr": 0.002, "epochs": 5}, '{"epochs": 5, "lr": 0.002}'),
        ({"compile": True, "loss": "focal", "dropout": 0.1}, '{"loss": "focal"}'),
    ],
)
def test_a_seed_is_of_what_differs_from_the_defaults(given: dict[str, Value], changed: str) -> None:
    params = TrialParams.from_dict(given)
    assert fold_trial_seed(7, "timm/a", params, 2) == expected_seed(7, "timm/a", changed, 2)


@each_knob
def test_a_hyperparameter_at_its_default_changes_no_seed(knob: Knob) -> None:
    """As if it had just been added to the list: with it and without it the seed is the same.

    Another value changes it where that changes what is learnt, and not only how it is computed.
    """
    others = {"lr": 0.003, "policy": "none"}
    params = TrialParams.from_dict(others | {knob.name: knob.default})
    left = {name: value for name, value in others.items() if name != knob.name}
    assert fold_trial_seed(0, "b", params, 0) == expected_seed(0, "b", json.dumps(left), 0)
    another = next(v for v in (*allowed_values(knob), "b") if v != knob.default)
    changed = TrialParams.from_dict(left | {knob.name: another})
    differs = fold_trial_seed(0, "b", changed, 0) != fold_trial_seed(0, "b", params, 0)
    computing = ("micro_batch", "gradient_checkpointing", "channels_last", "compile", "save_every")
    assert differs is (knob.name not in computing)
