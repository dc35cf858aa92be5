"""From the config's words to what Optuna draws, and back."""

from __future__ import annotations

import json
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foldrace.config.hyperparameters import KNOBS, Knob, TrialParams
from foldrace.config.ranges import Choice, Float, Int, Name, Switch
from foldrace.config.schema import (
    AugmentConfig,
    DataConfig,
    SearchConfig,
    SweepConfig,
    TrainingConfig,
)
from foldrace.search_spaces.defaults import Situation, by_situation
from foldrace.search_spaces.space import SearchSpace, Setting, build_space
from tests.conftest import examples

A, B = "timm/a", "torchvision/b"


def search(**keys: Any) -> SearchConfig:
    return SearchConfig.model_validate_json(json.dumps({"backbones": [A, B], **keys}))


def sweep(searched: SearchConfig, **sections: Any) -> SweepConfig:
    return SweepConfig(name="s", data=DataConfig(train="t"), search=searched, **sections)


def space(training: TrainingConfig | None = None, **keys: Any) -> SearchSpace:
    config = sweep(search(**keys), training=training or TrainingConfig())
    built, problems = build_space(config, "")
    assert problems == []
    return built


def sampled(of: SearchSpace, n: int, seed: int = 0) -> list[tuple[str, TrialParams]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    drawn = []
    for i in range(n):
        backbone = of.backbones[i % len(of.backbones)]
        trial = study.ask(fixed_distributions=of.distributions(backbone))
        drawn.append((backbone, of.decode(backbone, trial.params)))
    return drawn


def test_nothing_given_means_the_situations_ranges_else_the_knobs_own() -> None:
    built = space()
    own = by_situation(Situation("cnn", pretrained=True))
    for backbone in (A, B):
        for name, knob in KNOBS.items():
            searched = knob.search if knob.searched_by_default else None
            default, searched = own.get(name, (knob.default, searched))
            assert built.settings[backbone][name] == Setting(name, default, searched)


def test_other_sections_give_defaults_of_their_knobs() -> None:
    training = TrainingConfig(epochs=3, image_size=64, loss="focal")
    config = sweep(search(), training=training, augment=AugmentConfig(policy="heavy"))
    built, _ = build_space(config, "")
    params = built.default(A)
    assert (params.epochs, params.image_size) == (3, 64)
    assert (params.loss, params.policy) == ("focal", "heavy")
    assert all((p.epochs, p.image_size) == (3, 64) for _, p in sampled(built, 5))


def test_fix_narrow_replace_and_search() -> None:
    built = space(
        space={
            "lr": 0.003,
            "dropout": {"high": 0.2},
            "weight_decay": {"low": 0.01, "high": 0.02, "log": False},
            "batch_size": {"choices": [16, 64]},
            "epochs": {"low": 5, "high": 10},
            "image_size": "search",
            "ema_epochs": {"low": 0.9},
        }
    )
    found = built.settings[A]
    assert found["lr"] == Setting("lr", 0.003, None)
    assert found["dropout"] == Setting("dropout", 0.1, Float(0.0, 0.2))
    assert found["weight_decay"] == Setting("weight_decay", 0.015, Float(0.01, 0.02))  # no edge
    assert found["batch_size"] == Setting("batch_size", 16, Choice((16, 64)))
    assert found["epochs"] == Setting("epochs", 8, Int(5, 10))  # 30 lies outside: the middle
    assert found["image_size"].range == KNOBS["image_size"].limits
    assert found["ema_epochs"].range == Float(0.9, 3.0, True)
    for _, params in sampled(built, 30):
        assert params.lr == 0.003
        assert params.dropout <= 0.2
        assert params.batch_size in (16, 64) and type(params.batch_size) is int
        assert 5 <= params.epochs <= 10 and type(params.epochs) is int


def test_a_log_range_stays_log_unless_said_otherwise_or_zero() -> None:
    usual = by_situation(Situation("cnn", pretrained=True))["lr"][1]
    assert isinstance(usual, Float)
    expected = Float(1e-5, usual.high, True)
    assert space(space={"lr": {"low": 1e-5}}).settings[A]["lr"].range == expected
    assert space(space={"weight_decay": {"low": 0}}).settings[A]["weight_decay"].range == Float(
        0, 0.2
    )


def test_a_backbone_of_its_own() -> None:
    built = space(
        space={"lr": 0.01, "dropout": {"high": 0.3}},
        per_backbone={B: {"lr": {"low": 1e-4, "high": 1e-3, "log": True}, "dropout": 0.05}},
    )
    assert built.settings[A]["lr"] == Setting("lr", 0.01, None)
    assert built.settings[B]["lr"].name == f"lr[{B}]"
    assert built.settings[B]["lr"].range == Float(1e-4, 1e-3, True)
    assert built.settings[B]["dropout"] == Setting(f"dropout[{B}]", 0.05, None)
    assert built.settings[A]["warmup"] == built.settings[B]["warmup"]
    drawn = sampled(built, 40)
    assert {b for b, _ in drawn} == {A, B}
    assert all(p.lr == 0.01 for b, p in drawn if b == A)
    assert all(1e-4 <= p.lr <= 1e-3 and p.dropout == 0.05 for b, p in drawn if b == B)


def test_the_first_candidate_has_the_defaults_where_the_space_holds_them() -> None:
    own = {name: value for name, (value, _) in by_situation(Situation("cnn", True)).items()}
    assert space().default(A) == TrialParams.from_dict(own)
    built = space(space={"lr": {"low": 2e-3, "high": 4e-3}, "dropout": 0.4})
    assert built.default(A).lr == pytest.approx((2e-3 * 4e-3) ** 0.5)  # the default's log scale
    assert built.default(A).dropout == 0.4


def test_every_problem_at_once() -> None:
    wrong = search(
        space={
            "learning_rate": 0.1,
            "drop_out": 0.1,
            "lr": 5.0,
            "dropout": {"low": 0.9, "high": 0.1},
            "warmup": {"high": 2.0},
            "batch_size": {"choices": [16, 16.5]},
            "epochs": {"choices": [3, 3]},
            "weight_decay": {"low": 0, "log": True},
            "image_size": {"low": 64.5},
            "drop_path": "serach",
            "optimizer": "search",
            "schedule": {"low": 1},
            "loss": 3,
            "head": {"choices": ["linear", 5]},
            "momentum": True,
            "compile": {"low": 0},
            "channels_last": {"choices": [True, 1]},
            "precision": "search",
        },
        per_backbone={"timm/c": {"lr": 1e-3}, B: {"mixup": 1, "lr": -1.0}},
    )
    built, problems = build_space(sweep(wrong), "cars.yaml")
    text = {p.where.removeprefix("cars.yaml: search."): p.message for p in problems}
    assert "unknown hyperparameter" in text["space.learning_rate"]
    assert "did you mean 'dropout'?" in text["space.drop_out"]
    assert text["space.lr"].startswith("got 5; allowed: 1e-07 to 1 (peak learning rate")
    assert "low 0.9 is above high 0.1" in text["space.dropout"]
    assert "got 2; allowed: 0 to 0.9" in text["space.warmup"]
    assert "got 16.5; allowed: whole numbers 1 to 65536" in text["space.batch_size"]
    assert "a choice twice" in text["space.epochs"]
    assert "a log range needs low above 0" in text["space.weight_decay"]
    assert "got 64.5; allowed: whole numbers" in text["space.image_size"]
    assert (
        "not among search.backbones; allowed: timm/a, torchvision/b"
        in (text["per_backbone.timm/c"])
    )
    assert "did you mean" in text[f"per_backbone.{B}.mixup"]
    assert "got -1; allowed" in text[f"per_backbone.{B}.lr"]
    assert text["space.drop_path"].startswith("got 'serach'; allowed: a number, 0 to 0.9; `search`")
    assert "is searched by {choices: [...]}" in text["space.optimizer"]
    assert "takes a name or {choices: [...]}" in text["space.schedule"]
    assert "got 3; allowed: a name" in text["space.loss"]
    assert "got 5; allowed: a name" in text["space.head"]
    assert text["space.momentum"].startswith("got true; allowed: a number, 0 to 0.9999; `search`")
    assert "takes true or false or {choices: [...]}" in text["space.compile"]
    assert text["space.channels_last"].startswith("got 1; allowed: true or false")
    assert "is searched by {choices: [...]}" in text["space.precision"]
    assert len(problems) == 21
    assert built.default(A).lr == Situation("cnn", True).lr  # a space for later checks all the same


def test_a_number_that_is_not_finite_is_a_problem_and_no_crash() -> None:
    config = SearchConfig.model_construct(
        backbones=(A,), space={"batch_size": float("inf"), "lr": float("nan")}, per_backbone={}
    )
    _, problems = build_space(sweep(config), "")
    assert len(problems) == 2


MIXED = {
    "batch_size": {"choices": [16, 32, 64]},
    "epochs": {"low": 2, "high": 50, "log": True},
    "dropout": 0.25,
    "ema_epochs": {"low": 0.9, "high": 1.5},
}


@settings(deadline=None, max_examples=examples(40))
@given(st.integers(0, 2**31 - 1))
def test_encode_and_decode_are_inverse(seed: int) -> None:
    """`enqueue_trial(encode(...))` draws exactly the same again."""
    built = space(space=MIXED, per_backbone={B: {"lr": {"low": 1e-6, "high": 1e-5}}})
    for backbone, params in sampled(built, 2, seed):
        encoded = built.encode(backbone, params)
        assert encoded is not None
        assert built.decode(backbone, encoded) == params
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        study.enqueue_trial(encoded)
        trial = study.ask(fixed_distributions=built.distributions(backbone))
        assert trial.params == encoded
        assert trial.distributions == built.distributions(backbone)


def test_a_frozen_trial_of_the_encoding_is_accepted_by_optuna() -> None:
    built = space(space=MIXED)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0, n_startup_trials=2))
    for backbone, params in sampled(built, 8):
        study.add_trial(
            optuna.trial.create_trial(
                value=1.0,
                params=built.encode(backbone, params) or {},
                distributions=built.distributions(backbone),
            )
        )
    trial = study.ask(fixed_distributions=built.distributions(A))
    assert built.encode(A, built.decode(A, trial.params)) == trial.params


@pytest.mark.parametrize(
    ("backbone", "changes"),
    [("timm/gone", {}), (A, {"lr": 0.9}), (A, {"batch_size": 48}), (A, {"dropout": 0.3})],
)
def test_what_lies_outside_the_space_has_no_encoding(
    backbone: str, changes: dict[str, float]
) -> None:
    built = space(space=MIXED)
    inside = built.default(A)
    assert built.encode(A, inside) is not None
    assert built.encode(backbone, TrialParams.from_dict(inside.as_dict() | changes)) is None


def test_a_fixed_knob_with_another_value_can_be_placed_all_the_same() -> None:
    built = space(space=MIXED)
    other = TrialParams.from_dict(built.default(A).as_dict() | {"dropout": 0.3})
    assert built.place(A, other) == built.encode(A, built.default(A))
    assert not built.has_fixed_values(A, other)
    assert built.place("timm/gone", other) is None


def test_a_configuration_given_by_hand_may_lie_outside() -> None:
    built = space(space=MIXED, per_backbone={B: {"lr": {"low": 1e-6, "high": 1e-5}}})
    params = built.configured(B, {"lr": 0.5, "batch_size": 48.0})
    default = built.default(B)
    assert (params.lr, params.batch_size, type(params.batch_size)) == (0.5, 48, int)
    assert params.as_dict() | {"lr": default.lr, "batch_size": default.batch_size} == (
        default.as_dict()
    )


def test_the_optuna_names_of_what_is_searched() -> None:
    built = space(space=MIXED, per_backbone={B: {"lr": {"low": 1e-6, "high": 1e-5}}})
    assert built.searched(A)["lr"] == by_situation(Situation("cnn", True))["lr"][1]
    assert built.searched(B)[f"lr[{B}]"] == Float(1e-6, 1e-5, log=True)
    assert "dropout" not in built.searched(A) and "lr" not in built.searched(B)


def forms_of(knob: Knob) -> list[Any]:
    """What the config may say to search this one."""
    match knob.limits:
        case Name():
            return [{"choices": ["a", "b"]}]
        case Choice(values):
            return [{"choices": list(values)}]
        case Switch(or_path):
            return ["search", {"choices": [True, False]}] + [{"choices": [True, "/w"]}] * or_path
        case Int(low, high) | Float(low, high):
            return ["search", {"low": low, "high": high}, {"choices": [low, high]}]


@pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)
def test_every_hyperparameter_is_searched_by_the_space_whatever_its_section_fixes(
    knob: Knob,
) -> None:
    sections = {"training": TrainingConfig(), "augment": AugmentConfig()}
    fixed = sections[knob.section].model_copy(update={knob.name: knob.default})
    config = sweep(search(), **sections | {knob.section: fixed})
    built, problems = build_space(config, "")
    key = f"{knob.section}.{knob.name}"
    assert not problems and built.settings[A][knob.name].key == key
    assert built.settings[A][knob.name] == Setting(knob.name, knob.default, None)
    for form in forms_of(knob):
        for where in ("space", "per_backbone"):
            given = {knob.name: form} if where == "space" else {B: {knob.name: form}}
            config = sweep(search(**{where: given}), **sections | {knob.section: fixed})
            built, problems = build_space(config, "")
            setting = built.settings[B][knob.name]
            assert problems == [] and setting.range is not None
            assert setting.key.startswith(f"search.{where}") and setting.key.endswith(knob.name)
            assert (built.settings[A][knob.name].range is None) is (where == "per_backbone")
            assert setting.range.contains(setting.default)
            ends = (getattr(setting.range, "low", None), getattr(setting.range, "high", None))
            inside = setting.range.contains(knob.default) and knob.default not in ends
            assert not inside or setting.default == knob.default
            for backbone, params in sampled(built, 6):
                encoded = built.encode(backbone, params)
                assert encoded is not None and built.decode(backbone, encoded) == params
                assert KNOBS[knob.name].limits.contains(getattr(params, knob.name))


def test_a_value_of_the_space_wins_over_that_of_a_section() -> None:
    training = TrainingConfig(lr=0.02, compile=True, lr_patience=3)
    built = space(training, space={"lr": 0.01, "lr_patience": {"low": 2, "high": 9}}, per_backbone={
        B: {"compile": False, "lr_patience": {"low": 5, "high": 9}}
    })  # fmt: skip
    first, other = built.default(A), built.default(B)
    assert (first.lr, first.compile, first.lr_patience) == (0.01, True, 3)
    assert (other.lr, other.compile, other.lr_patience) == (0.01, False, 7)


def test_a_switch_that_is_searched_stays_one() -> None:
    built = space(space={"compile": "search", "pretrained": {"choices": [False, True, "/w"]}})
    drawn = {(p.compile, p.pretrained) for _, p in sampled(built, 60)}
    assert {type(on) for on, _ in drawn} == {bool}
    assert {pretrained for _, pretrained in drawn} == {False, True, "/w"}
    assert built.default(A).pretrained is True and built.default(A).compile is False


def test_how_a_trial_is_computed_does_not_tell_it_from_others() -> None:
    built = space()
    values = built.default(A).as_dict()
    for name, knob in KNOBS.items():
        if built.settings[A][name].range is None and knob.numeric:
            assert isinstance(knob.limits, (Int, Float))
            other = next(v for v in (knob.limits.low, knob.limits.high) if v != values[name])
            changed = TrialParams.from_dict(values | {name: other})
            assert built.has_fixed_values(A, changed) is not knob.changes_result, name


def test_names_are_searched_like_numbers() -> None:
    built = space(space={"loss": {"choices": ["focal", "cross_entropy"]}, "head": "layernorm"})
    assert built.settings[A]["loss"].range == Choice(("focal", "cross_entropy"))
    assert built.default(A).head == "layernorm"
    drawn = sampled(built, 20)
    assert {p.loss for _, p in drawn} == {"focal", "cross_entropy"}
    for backbone, params in drawn:
        encoded = built.encode(backbone, params)
        assert encoded is not None and encoded["loss"] == params.loss


def test_the_heaviest_configuration_of_a_space_and_of_others() -> None:
    searched = space(
        TrainingConfig.model_validate({"gradient_checkpointing": True, "micro_batch": 8}),
        space={
            "batch_size": {"choices": [16, 64, 32]},
            "image_size": {"choices": [192, 224]},
            "sam_rho": {"choices": [0.0, 0.05]},
            "precision": {"choices": ["fp32", "bf16"]},
            "ema_epochs": 0,
            "size_start": {"low": 0.5, "high": 0.8},
        },
        per_backbone={B: {"batch_size": 8}},
    )
    heavy = searched.heaviest(A)
    usual = searched.default(A).as_dict()
    assert {k: v for k, v in heavy.as_dict().items() if v != usual[k]}.keys() <= {
        "batch_size", "image_size", "sam_rho", "precision", "size_start",
    }  # fmt: skip
    assert (heavy.batch_size, heavy.image_size, heavy.precision) == (64, 224, "fp32")
    assert (heavy.sam_rho, heavy.size_start, heavy.ema_epochs) == (0.05, 0.8, 0.0)
    assert heavy.gradient_checkpointing and heavy.micro_batch == 8
    assert searched.heaviest(B).batch_size == 8
    given = searched.configured(A, {"batch_size": 100, "micro_batch": 0, "ema_epochs": 1.0})
    others = searched.heaviest(A, [given])
    assert (others.batch_size, others.micro_batch, others.ema_epochs) == (100, 0, 1.0)
    assert others.image_size == 224
    assert searched.heaviest("timm/of_an_earlier_session", [given]) == given
