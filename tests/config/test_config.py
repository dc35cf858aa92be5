"""The configuration: every problem at once, in the words of the person who wrote the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import pytest
import yaml

from foldrace.config.forms import RangeConfig
from foldrace.config.hyperparameters import KNOBS, Knob
from foldrace.config.key_hints import MISSING
from foldrace.config.load import (
    ParsedConfig,
    differing_keys,
    parse_config,
    to_public_yaml,
    to_yaml,
)
from foldrace.config.ranges import Choice, Float, Int, Name, Switch, Value
from foldrace.config.schema import SearchConfig, SweepConfig
from foldrace.core.errors import ConfigError
from foldrace.core.redaction import has_secret
from foldrace.core.synonyms import SYNONYMS, plain_name
from foldrace.ensemble.methods import METHODS
from foldrace.scheduling.search.samplers import SAMPLERS
from foldrace.trainables.data.augment import POLICIES
from foldrace.trainables.losses import LOSSES
from foldrace.trainables.schedules import SCHEDULES

MINIMAL = "data: {train: train.csv}\nsearch: {backbones: [timm/resnet18]}\n"


def write(folder: Path, text: str, name: str = "cars.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def parse(folder: Path, text: str, *overrides: str, smoke: bool = False) -> ParsedConfig:
    return parse_config(write(folder, text), overrides, smoke)


def test_minimal_config_takes_the_contract_s_defaults(tmp_path: Path) -> None:
    config = parse(tmp_path, MINIMAL).require()
    assert config.name == "cars"
    assert (config.folds.k, config.folds.seed) == (5, 42)
    assert (config.data.image_column, config.data.label_column) == ("image_path", "target")
    assert (config.search.sampler, config.ensemble.method) == ("tpe", "greedy")
    assert config.training.pretrained is True


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder, no config; `foldrace init` writes"):
        parse_config(tmp_path)


def test_every_problem_at_once_with_key_value_and_what_is_allowed(tmp_path: Path) -> None:
    found = parse(
        tmp_path,
        """
data: {train: train.csv, train_imges: x}
folds: {k: 0, valid_fraction: 0.7, test_fraction: 0.4}
search:
  backbones: [timm/resnet18]
  sampler: annealing
  space: {lr: null, dropout: {low: 0.1, lo: 0}, warmup: [1, 2], drop_path: {choices: []}}
training: {epochs: "ten", pretrained: 3, precision: int8}
resources: {gpus_per_trial: 1.5, time_budget: 90x}
colour: red
""",
    )
    text = {p.where.split(": ")[1]: p.message for p in found.problems}
    assert "did you mean 'train_images'?" in text["data.train_imges"]
    assert text["folds.k"] == "got 0; should be greater than or equal to 1"
    assert "'tpe', 'random'" in text["search.sampler"] and '"annealing"' in text["search.sampler"]
    assert text["search.space.lr"].startswith("got null; should be a number, true or false")
    assert "allowed: choices, high, log, low" in text["search.space.dropout.lo"]
    assert "should be a number" in text["search.space.warmup"]
    assert "at least 1 item" in text["search.space.drop_path.choices"]
    assert text["training.epochs"].startswith("got 'ten'; allowed: a number, whole numbers 1 to")
    assert text["training.pretrained"].startswith("got 3; allowed: true, false or the path")
    assert text["training.precision"].startswith("got int8; allowed: one of auto, fp32, bf16")
    assert "such as 90m" in text["resources.time_budget"]
    assert "unknown key" in text["colour"]
    assert all(p.where.startswith(str(tmp_path / "cars.yaml")) for p in found.problems)
    with pytest.raises(ConfigError) as error:
        found.require()
    assert len(error.value.problems) == len(found.problems) == 12
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        ("folds: {valid_fraction: 0.7, test_fraction: 0.4}", "folds", "leaves no training rows"),
        ("resources: {gpus_per_trial: 1.5}", "resources", "no whole number"),
        ("resources: {gpus_per_trial: all}", "resources.gpus_per_trial", '(got "all")'),
        ("resources: {gpus_per_trial: -1}", "resources.gpus_per_trial", "auto, or null (got -1)"),
        ("resources: {gpus_per_trial: .inf}", "resources.gpus_per_trial", "of at least 0, auto"),
        (
            "resources: {gpus_per_trial: auto, devices_per_trial: 2}",
            "resources",
            "gpus_per_trial auto with devices_per_trial 2: each of several devices is one whole "
            "GPU or none; allowed are 1, 0 and null",
        ),
        ("training: {clip_grad: .inf}", "training.clip_grad", "got inf; allowed: 0 to 1e+06"),
        ("training: {image_size: 8}", "training.image_size", "allowed: whole numbers 16 to 2048"),
        ("training: {compile: 1}", "training.compile", "got 1; allowed: true or false"),
        ("training: {epochs: null}", "training.epochs", "got null; allowed: a number"),
        ("training: {lr: [1]}", "training.lr", "got [1]; allowed: a number"),
        ("training: {policy: none}", "training.policy", "unknown key"),
        ("augment: {lr: 0.1}", "augment.lr", "unknown key; did you mean search.space.lr?"),
        ("augment: {policy: 3}", "augment.policy", "got 3; allowed: a name"),
        ("augment: {mixup_prob: 2}", "augment.mixup_prob", "got 2; allowed: 0 to 1"),
        ("folds: 5", "folds", "got 5; should be a mapping"),
        ("race: none", "race", 'got "none"; should be a mapping'),
        ("race: {epoch_stopping: maybe}", "race.epoch_stopping", "should be true or false"),
        ("race: {grace: 1}", "race.grace", "should be less than 1"),
        ("race: {rule: none, epoch_stopping: true}", "race", "goes with rule: gain"),
        ("plugins: part.py", "plugins", 'got "part.py"; should be a list'),
        ("plugins: [1]", "plugins[0]", "got 1; should be text"),
        ("training: {pretrained: null}", "training.pretrained", "true, false or the path"),
    ],
)
def test_checks_of_one_section(tmp_path: Path, section: str, key: str, message: str) -> None:
    (problem,) = parse(tmp_path, MINIMAL + section).problems
    assert problem.where.endswith(f": {key}")
    assert message in problem.message


def test_whole_numbers_may_name_classes(tmp_path: Path) -> None:
    text = "data: {train: t, merge_classes: {0: [1, '02', '3'], b: [x, y]}}\n"
    config = parse(tmp_path, text + "search: {backbones: [a]}").require()
    assert config.data.merge_classes == {"0": ("1", "02", "3"), "b": ("x", "y")}


@pytest.mark.parametrize(
    ("data", "key", "message"),
    [
        ("on_bad_image: skip", "on_bad_image", "'stop' or 'drop'"),
        ("on_bad_test_image: drop", "on_bad_test_image", "'stop' or 'prior'"),
        ("duplicates: keep", "duplicates", "'report', 'group' or 'drop'"),
        ("merge_classes: {a: b}", "merge_classes.a", "should be a list"),
        ("merge_classes: {a: []}", "merge_classes.a", "at least 1"),
        ("merge_classes: {a: [1, yes]}", "merge_classes.a[1]", "got true; should be text"),
    ],
)
def test_policies_of_the_data(tmp_path: Path, data: str, key: str, message: str) -> None:
    text = f"data: {{train: t, {data}}}\nsearch: {{backbones: [a]}}"
    (problem,) = parse(tmp_path, text).problems
    assert problem.where.endswith(f": data.{key}")
    assert message in problem.message


@pytest.mark.parametrize("form", ["{low: 1, choices: [1]}", "{log: true}"])
def test_a_range_has_one_form(tmp_path: Path, form: str) -> None:
    text = f"data: {{train: t}}\nsearch: {{backbones: [a], space: {{lr: {form}}}}}"
    (problem,) = parse(tmp_path, text).problems
    assert problem.where.endswith("search.space.lr")
    assert "low" in problem.message and "choices" in problem.message


def test_missing_required_keys_leave_no_config(tmp_path: Path) -> None:
    found = parse(tmp_path, "name: x\nsearch: {}")
    assert found.config is None
    assert {p.where.split(": ")[1] for p in found.problems} == {"data", "search.backbones"}
    assert all("no default" in p.message for p in found.problems)


def test_wrong_values_leave_a_config_with_defaults_for_later_checks(tmp_path: Path) -> None:
    found = parse(tmp_path, MINIMAL + "training: {epochs: -1, image_size: 64}\nfolds: {kk: 3}")
    assert len(found.problems) == 2
    assert found.config is not None
    assert (found.config.training.epochs, found.config.training.image_size) == (30, 64)


def test_set_overrides_any_key_and_wins_over_smoke(tmp_path: Path) -> None:
    overrides = (
        "search.candidates=80",
        "search.space.lr={low: 1e-5, high: 1e-3}",
        "training.pretrained=false",
        "folds.k=4",
        "search.backbones=[timm/a, timm/b]",
    )
    config = parse(tmp_path, MINIMAL, *overrides, smoke=True).require()
    assert config.search.candidates == 80
    assert config.search.space["lr"] == RangeConfig(low=1e-5, high=1e-3)
    assert config.training.pretrained is False
    assert config.folds.k == 4
    assert config.search.backbones == ("timm/a", "timm/b")


@pytest.mark.parametrize("bad", ["search.candidates", "=3", "search..x=3", "search.seed=[1"])
def test_a_bad_set_is_one_problem_beside_the_others(tmp_path: Path, bad: str) -> None:
    found = parse(tmp_path, MINIMAL, bad, "folds.k=0")
    assert found.problems[0].where == f"--set {bad}"
    assert found.problems[1].where.endswith("folds.k")


def test_set_of_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    (problem,) = parse(tmp_path, MINIMAL, "search.candidate=3").problems
    assert "did you mean 'candidates'?" in problem.message


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("search.lr", "did you mean search.space.lr? allowed: backbones"),
        ("training.learning_rate", "did you mean 'lr'? allowed: batch_size"),
        ("augment.mixup", "did you mean 'mixup_alpha' and 'mixup_prob'?"),
        ("training.mixup", "did you mean search.space.mixup_alpha and search.space.mixup_prob?"),
        ("training.img_size", "did you mean 'image_size'?"),
        ("epochs", "did you mean training.epochs?"),
        ("folds.n_splits", "did you mean 'k'?"),
        ("search.models", "did you mean 'backbones'?"),
        ("training.epoch", "did you mean 'epochs'?"),
        (
            "cache.longer_side",
            "stored images are bounded by their shorter side: set cache.shorter_side",
        ),
        ("learning_rate", "did you mean search.space.lr? allowed: augment"),
        ("seed", "did you mean folds.seed or search.seed?"),
        ("folds.group_column", "did you mean data.group_column?"),
        ("data.target", "did you mean 'label_column'?"),
        ("search.max_trials", "did you mean 'candidates'?"),
        ("search.timeout", "did you mean resources.time_budget?"),
        ("training.amp", "did you mean 'precision'?"),
        ("search.space.lr.min", "did you mean 'low'?"),
        ("metric", "did you mean ensemble.metric?"),
        ("scoring", "did you mean ensemble.metric?"),
        ("training.patience", "no trial stops early by itself: all folds of a candidate keep"),
        ("search.early_stopping", "no trial stops early by itself"),
    ],
)
def test_a_key_of_another_section_or_tool_is_led_to_ours(
    tmp_path: Path, key: str, hint: str
) -> None:
    (problem,) = parse(tmp_path, MINIMAL, f"{key}=3").problems
    assert problem.message.startswith(f"unknown key; {hint}")


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [
        ("search.sampler", "bayesian", "tpe"),
        ("race.rule", "ASHA", "gain"),
        ("training.precision", "float16", "fp16"),
        ("training.resize", "letterbox", "pad"),
        ("cache.format", "jpg", "jpeg"),
    ],
)
def test_a_value_of_another_tool_is_led_to_ours(
    tmp_path: Path, key: str, value: str, meant: str
) -> None:
    (problem,) = parse(tmp_path, MINIMAL, f"{key}={value}").problems
    assert f"{value}" in problem.message and f"; did you mean {meant!r}? allowed: " in str(problem)


@pytest.mark.parametrize("key", ["ensemble", "search.space", "race", "smoke"])
def test_a_section_whose_keys_are_all_comments_is_as_none(tmp_path: Path, key: str) -> None:
    found = parse(tmp_path, MINIMAL, f"{key}=")
    assert found.problems == () and found.config == parse(tmp_path, MINIMAL).config
    (problem,) = parse(tmp_path, MINIMAL, "data=").problems
    assert problem.where.endswith("data") and problem.message.startswith("is missing")


@pytest.mark.parametrize("key", ["<b>x</b>", "<<", "<range>", "[/]", "é", "1", "~"])
@pytest.mark.parametrize("section", ["", "folds.", "search.space.lr."])
def test_a_key_of_any_letters_is_named(tmp_path: Path, section: str, key: str) -> None:
    problems = parse(tmp_path, MINIMAL, f"{section}{key}=3").problems
    assert any(key in str(problem) for problem in problems), problems


def test_names_of_other_tools_lead_to_names_that_exist() -> None:
    sections = [f.annotation for f in SweepConfig.model_fields.values()]
    models = [s for s in (RangeConfig, *sections) if hasattr(s, "model_fields")]
    fields = {name: field for model in models for name, field in model.model_fields.items()}
    limits = [knob.limits for knob in KNOBS.values()]
    names = {
        *(*fields, *KNOBS, *LOSSES, *SCHEDULES, *SAMPLERS, *METHODS, *POLICIES),
        *(value for field in fields.values() for value in get_args(field.annotation)),
        *(value for limit in limits if isinstance(limit, Choice) for value in limit.values),
    }
    assert {ours for found in SYNONYMS.values() for ours in found} <= names
    assert all(plain_name(name) == name for name in (*SYNONYMS, *MISSING))
    assert not MISSING.keys() & fields.keys()


@pytest.mark.parametrize("text", ["data:\n\ttrain: x", "data: {\n\ttrain: x}", "data:\tx"])
def test_a_tab_in_yaml_is_told_as_such(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not valid YAML: use spaces, not tabs: [\s\S]*line"):
        parse(tmp_path, text)


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", "1.0e-3", "0.001", "1_0e-4"])
def test_every_spelling_of_a_float_is_a_number(tmp_path: Path, number: str) -> None:
    config = parse(tmp_path, MINIMAL, f"search.space.lr={number}").require()
    assert config.search.space["lr"] == pytest.approx(1e-3)


def test_a_key_given_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"line 3, column 15: key 'k' is given twice"):
        parse(tmp_path, MINIMAL + "folds: {k: 3, k: 4}")
    path = write(tmp_path, '{"data": {"train": "a", "train": "b"}}', "c.json")
    with pytest.raises(ConfigError, match="not valid JSON: key 'train' is given twice"):
        parse_config(path)


def test_anchors_and_merge_keys_work(tmp_path: Path) -> None:
    text = MINIMAL + "smoke:\n  a: &base {x: 1, y: 2}\n  b: {<<: *base, y: 3}\n"
    assert parse(tmp_path, text).require().smoke["b"] == {"x": 1, "y": 3}


def test_byte_order_mark_and_korean(tmp_path: Path) -> None:
    path = tmp_path / "자동차.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("train.csv", "학습.csv").encode())
    config = parse_config(path).require()
    assert config.name == "자동차"
    assert config.data.train == str(tmp_path / "학습.csv")


def test_json_gives_the_same_config_as_yaml(tmp_path: Path) -> None:
    yaml_path = write(tmp_path, MINIMAL)
    json_path = write(tmp_path, json.dumps(yaml.safe_load(MINIMAL)), "cars.json")
    assert parse_config(json_path).require() == parse_config(yaml_path).require()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n- b", "holds no keys"),
        ("just words", "holds no keys"),
        ("a: [1", "is not valid YAML"),
        ("a: !!python/object:os.system x", "is not valid YAML"),
    ],
)
def test_what_is_no_config(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(tmp_path, text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_config(tmp_path / "none.yaml").require()
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_config(tmp_path / "binary.yaml").require()


@pytest.mark.parametrize(
    ("budget", "seconds"),
    [("90", 90), ("45s", 45), ("90m", 5400), ("1.5h", 5400), ("2d", 172_800), (" 2 h ", 7200)],
)
def test_time_budget_in_its_forms(tmp_path: Path, budget: str, seconds: float) -> None:
    config = parse(tmp_path, MINIMAL, f"resources.time_budget={budget}").require()
    assert config.resources.time_budget == seconds


@pytest.mark.parametrize("budget", ["90x", "-5m", "0", "1h30m", "true", ".nan"])
def test_bad_time_budgets(tmp_path: Path, budget: str) -> None:
    (problem,) = parse(tmp_path, MINIMAL, f"resources.time_budget={budget}").problems
    assert problem.where.endswith("resources.time_budget")


def test_paths_are_relative_to_the_config_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    text = "data: {train: ../d/train.csv, test: /abs/test.csv}\nsearch: {backbones: [a]}\n"
    path = write(tmp_path / "configs", text + "training: {pretrained: w/}\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given in (path, Path("../configs/cars.yaml")):
        config = parse_config(given).require()
        assert config.data.train == str(tmp_path / "d" / "train.csv")
        assert config.data.test == "/abs/test.csv"
        assert config.data.train_images is None
        assert config.training.pretrained == str(tmp_path / "configs" / "w")


def test_a_linked_table_keeps_its_own_name_and_folder(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("x")
    (tmp_path / "train.csv").symlink_to(tmp_path / "blob")
    assert parse(tmp_path, MINIMAL).require().data.train == str(tmp_path / "train.csv")


def test_to_yaml_gives_the_same_config_again(tmp_path: Path) -> None:
    text = """
name: "1e3"
data: {train: 학습 데이터.csv, label_column: "yes", group_column: "0123"}
search:
  backbones: [timm/a, "stack(timm/a,torchvision/b)"]
  space: {lr: {low: 1e-5, high: 3.0e-3, log: true}, dropout: search, warmup: 0.1}
  per_backbone: {timm/a: {dropout: {choices: [0, 0.5]}}}
training: {pretrained: weights/}
resources: {time_budget: 1.5h}
smoke: {training: {epochs: 2}}
"""
    config = parse(tmp_path, text).require()
    again = parse_config(write(tmp_path, to_yaml(config), "sweep.yaml")).require()
    assert again == config
    assert to_yaml(again) == to_yaml(config)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cret@host:5432/x",
        "postgresql+psycopg://me@corp:s3cret@host/x",
        "postgresql://me:s3cret@s3cret@host/x",
        "postgresql://me:s3cret/with s3cret@host/x",
        "postgresql://host/x?user=me&password=s3cret&sslmode=require",
        "nothing://me:s3cret@host:port/x",
    ],
)
def test_what_is_shown_to_others_has_no_password(tmp_path: Path, url: str) -> None:
    other = json.dumps({"search": {"storage": url}})
    config = parse(tmp_path, f"{MINIMAL}smoke: {other}\n", f"search.storage={url}").require()
    assert config.search.storage == url and has_secret(url)
    text = to_public_yaml(config)
    assert "s3cret" not in text and text.count("***") >= 2 and "host" in text
    plain = config.model_copy(update={"search": SearchConfig(backbones=("b",)), "smoke": {}})
    assert to_public_yaml(plain) == to_yaml(plain)


@pytest.mark.parametrize("value", [".nan", "[{x: -.inf}]", "{a: {b: [1, .inf]}}"])
def test_smoke_holds_what_json_can(tmp_path: Path, value: str) -> None:
    (problem,) = parse(tmp_path, f"{MINIMAL}smoke: {{training: {{lr: {value}}}}}\n").problems
    assert problem.where.endswith("smoke") and "no .nan and no .inf" in problem.message


def test_smoke_lays_small_values_and_then_its_own_section_over(tmp_path: Path) -> None:
    text = """
data: {train: train.csv}
folds: {k: 5, seed: 7}
search:
  backbones: [timm/big]
  candidates: 40
  space: {lr: {low: 1e-3, high: 1e-2}, sam_rho: 0.05, dropout: 0.4, epochs: 50, freeze_epochs: 9}
  per_backbone: {timm/big: {}}
training: {epochs: 60, image_size: 224, lr_patience: 20, precision: bf16}
resources: {cpus_per_trial: 8, gpus_per_trial: 1}
smoke:
  search: {backbones: [timm/small], space: {dropout: 0.2, lr: {choices: [1e-3]}}}
  training: {epochs: 3}
"""
    plain = parse(tmp_path, text).require()
    assert (plain.training.epochs, plain.search.candidates) == (60, 40)
    config = parse(tmp_path, text, smoke=True).require()
    assert (config.folds.k, config.folds.seed, config.search.candidates) == (2, 7, 2)
    assert config.search.backbones == ("timm/small",)
    lr = RangeConfig(choices=(1e-3,))
    assert config.search.space == {"lr": lr, "sam_rho": 0.05, "dropout": 0.2}
    assert config.search.per_backbone == {}
    assert (plain.is_smoke, config.is_smoke, config.name) == (False, True, f"{plain.name}-smoke")
    training = config.training
    assert (training.epochs, training.image_size, training.lr_patience) == (3, 32, 20)
    assert (training.pretrained, training.precision) == (False, "auto")
    assert (config.resources.cpus_per_trial, config.resources.gpus_per_trial) == (1, None)


@pytest.mark.parametrize(("folds", "k"), [("{k: 5, column: fold}", 5), ("{k: 1}", 1)])
def test_smoke_leaves_given_folds_and_a_fixed_split_alone(
    tmp_path: Path, folds: str, k: int
) -> None:
    text = MINIMAL + f"folds: {folds}\n"
    assert parse(tmp_path, text, smoke=True).require().folds.k == k


def test_a_smoke_section_of_the_wrong_kind_is_a_problem(tmp_path: Path) -> None:
    (problem,) = parse(tmp_path, MINIMAL + "smoke: 3", smoke=True).problems
    assert problem.where.endswith("smoke")


def test_differing_keys(tmp_path: Path) -> None:
    old = parse(tmp_path, MINIMAL).require()
    new = old.model_copy(
        update={
            "search": old.search.model_copy(update={"space": {"lr": 0.1}, "candidates": 7}),
            "name": "b",
        }
    )
    assert differing_keys(old, new) == ["name", "search.candidates", "search.space.lr"]
    assert differing_keys(old, old) == []


def value_of(knob: Knob) -> Value:
    """An allowed value that is not the default."""
    match knob.limits:
        case Name():
            return "another"
        case Choice(values):
            return next(value for value in values if value != knob.default)
        case Switch():
            return not knob.default
        case Int(low, high) | Float(low, high):
            return low if low != knob.default else high


@pytest.mark.parametrize("knob", KNOBS.values(), ids=KNOBS)
def test_every_hyperparameter_is_fixed_by_its_section(tmp_path: Path, knob: Knob) -> None:
    value = value_of(knob)
    config = parse(tmp_path, MINIMAL + yaml.dump({knob.section: {knob.name: value}})).require()
    assert config.fixed[knob.name] == value and type(config.fixed[knob.name]) is type(value)
    defaults = parse(tmp_path, MINIMAL).require().fixed
    assert (knob.name in defaults) is not knob.left_open
    assert defaults.get(knob.name, knob.default) == knob.default
    again = parse_config(write(tmp_path, to_yaml(config), "sweep.yaml")).require()
    assert again == config and again.fixed == config.fixed


def test_null_turns_clipping_off_and_takes_the_whole_batch(tmp_path: Path) -> None:
    text = MINIMAL + "training: {clip_grad: null, micro_batch: null, lr: null, save_every: 5m}"
    fixed = parse(tmp_path, text).require().fixed
    assert (fixed["clip_grad"], fixed["micro_batch"], fixed["save_every"]) == (0.0, 0, 300.0)
    assert "lr" not in fixed  # searched, as without the key


def test_paths_of_weights_are_relative_to_the_config_wherever_they_stand(tmp_path: Path) -> None:
    text = """
data: {train: t}
search:
  backbones: [a, b]
  space: {pretrained: {choices: [true, w]}}
  per_backbone: {a: {pretrained: w/a}, b: {pretrained: false}}
  points: [{backbone: a, params: {pretrained: ../w, compile: true}}]
training: {pretrained: search}
"""
    search = parse(tmp_path, text).require().search
    assert search.space["pretrained"] == RangeConfig(choices=(True, str(tmp_path / "w")))
    assert search.per_backbone["a"] == {"pretrained": str(tmp_path / "w" / "a")}
    assert search.per_backbone["b"] == {"pretrained": False}
    params = {"pretrained": str(tmp_path.parent / "w"), "compile": True}
    assert search.points[0].params == params


def test_smoke_leaves_out_what_needs_the_config_s_own_devices_and_length(tmp_path: Path) -> None:
    text = """
data: {train: t}
search:
  backbones: [a]
  space: {precision: {choices: [bf16]}, pretrained: true, cycles: 3, compile: search}
training: {snapshots: 4, precision: bf16, clip_grad: 2}
"""
    config = parse(tmp_path, text, smoke=True).require()
    assert config.search.space == {"compile": "search"}
    training = config.training
    assert (training.snapshots, training.precision, training.clip_grad) == (0, "auto", 2.0)
