"""The recipes in `configs/`, each by the very commands at its top, from another folder: to a
submission in smoke form; and wrong values in them."""

from __future__ import annotations

import csv
import hashlib
import json
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from foldrace.config.load import parse_config
from tests.conftest import REAL_IN_FULL
from tests.end_to_end.recipe_data import cars, image_types, sketch_folders, sketches

Cli = Callable[..., Result]
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Recipe:
    """One row of the table: what data it gets here, and what must lie in its first fold trial."""

    name: str
    write_data: Callable[[Path], None]
    left_behind: str = "oof.npy"
    tta: str = "none"


RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("used_cars_convnext", lambda p: cars(p, 99, 2), "oof_ema.npy", tta="flip-rotate"),
        Recipe("used_cars_b5_meta", lambda p: cars(p, 12, 5)),
        Recipe("sketch_stack", sketches, "oof_snap1.npy"),
        Recipe("imagenet_sketch", sketch_folders),
        Recipe("image_type", image_types),
    )
}


def commands(name: str, data: Path) -> list[list[str]]:
    """The command lines at the top of a recipe, with the user's PATH filled in."""
    lines = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = "\n".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    found = [
        shlex.split(line.removeprefix("foldrace "))
        for line in comment.replace("\\\n", "").splitlines()
        if line.startswith("foldrace ")
    ]
    return [[_filled_in(word, data) for word in words] for words in found]


def _filled_in(word: str, data: Path) -> str:
    return word.replace("=PATH/", f"={data}/").replace("configs/", f"{ROOT}/configs/")


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("recipes")
        patch.setenv("FOLDRACE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def data_of(home: Path) -> Callable[[str], Path]:
    """The folder of a recipe's data, written once."""

    def data(name: str) -> Path:
        folder = home / name
        if not folder.exists():
            RECIPES[name].write_data(folder)
        return folder

    return data


FIRST = ("imagenet_sketch", "image_type")
"""The recipes whose commands `make test` runs; the others' are run by `make test-full`."""
CLUSTERS = [
    *(
        pytest.param(name, "pretended", marks=[] if name in FIRST else pytest.mark.full)
        for name in RECIPES
    ),
    *(pytest.param(name, *REAL_IN_FULL.values, marks=REAL_IN_FULL.marks) for name in RECIPES),
]


@pytest.mark.parametrize(("name", "any_ray"), CLUSTERS, indirect=["any_ray"])
def test_its_own_commands_lead_to_a_submission(
    name: str,
    any_ray: object,
    data_of: Any,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    launch, *after = commands(name, data_of(name))
    assert launch[0] == "run"
    run = tmp_path / "runs" / f"{name}-smoke"
    for words in ([*launch, "--smoke"], *after):
        result = cli(*(word.replace(f"runs/{name}", f"runs/{name}-smoke") for word in words))
        assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    check_submission(run, data_of(name), RECIPES[name].tta)
    assert (run / "report" / "index.html").stat().st_size > 10_000
    check_techniques(run, name)
    assert (run / "trials" / "c0000" / "fold0" / RECIPES[name].left_behind).exists()


def check_submission(run: Path, data: Path, tta: str) -> None:
    """Ids, order and columns of the sample; probabilities; a receipt of this very file."""
    sample, rows = table(data / "sample_submission.csv"), table(run / "submission.smoke.csv")
    assert rows[0] == sample[0]
    assert [row[0] for row in rows] == [row[0] for row in sample]
    prob = np.array([row[1:] for row in rows[1:]], float)
    assert prob.min() >= 0
    np.testing.assert_allclose(prob.sum(axis=1), 1.0, atol=1e-6)
    receipt = json.loads((run / "submission.smoke.receipt.json").read_text(encoding="utf-8"))
    data_sent = (run / "submission.smoke.csv").read_bytes()
    assert receipt["sha256"] == hashlib.sha256(data_sent).hexdigest()
    assert receipt["tta"] == tta


def check_techniques(run: Path, name: str) -> None:
    """Every listed backbone of the smoke form was trained, with what the recipe fixes."""
    smoke = parse_config(ROOT / "configs" / f"{name}.yaml", smoke=True).require()
    fixed = {k: v for k, v in smoke.search.space.items() if isinstance(v, (int, float, str))}
    records = [json.loads(p.read_text(encoding="utf-8")) for p in run.glob("trials/*/*/trial.json")]
    assert {record["backbone"] for record in records} == set(smoke.search.backbones)
    for record in records:
        assert record["status"] == "finished"
        assert {knob: record["params"][knob] for knob in fixed} == fixed


def table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_itself_can_start(name: str, data_of: Any, cli: Cli) -> None:
    """Its real backbones, sizes and transforms. Weights come from a hub, and this machine may have
    less than the recipe asks for, free disk too: one candidate's checkpoints of two folds."""
    data = data_of("used_cars_b5_meta" if name.startswith("used_cars") else name)
    [_, config, *options] = commands(name, data)[0]
    own = options[options.index("--set") :]  # `check` has no --out
    here = (
        *("training.pretrained=false", "resources.cpus_per_trial=1", "resources.gpus_per_trial=0"),
        *("search.candidates=1", "folds.k=2"),
    )
    result = cli("check", config, *own, *(word for key in here for word in ("--set", key)))
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"


def transform(entry: str) -> str:
    return f"augment.transforms=[{entry}]"


# Two or three a recipe, of different kinds; each message has its own test where it is written.
WRONG: list[tuple[str, tuple[str, ...], tuple[tuple[str, ...], ...]]] = [
    # recipe, what is set, what the message of each problem holds
    (
        "used_cars_convnext",
        ("search.space.sam_rho=-1", "search.space.dropout=0", "search.space.drop_path=0"),
        (
            ("sam_rho", "got -1", "0 to 2"),
            ("search.space.rdrop_alpha", "two passes", "dropout 0"),
        ),
    ),
    (
        "used_cars_b5_meta",
        ("training.meta_features=[mean_color]",),
        (("training.meta_features", "'mean_color'", "did you mean 'mean_colour'?"),),
    ),
    (
        "used_cars_b5_meta",
        ("search.backbones=[timm/tf_efficientnet_b5.ns_jft_in2k]",),
        (("timm/tf_efficientnet_b5.ns_jft_in2k", "did you mean", "b5.ns_jft_in1k"),),
    ),
    (
        "sketch_stack",
        ("search.backbones=['stack(timm/eva02_tiny_patch14_224@28,timm/convnextv2_ato@32)']",),
        (("timm/convnextv2_ato: unknown backbone", "timm/convnextv2_atto"),),
    ),
    (
        "sketch_stack",
        ("search.space.cutmix_prob=0.8", "search.space.snapshots=2"),
        (
            ("cutmix_prob", "0.25", "0.8", "at most"),
            ("snapshots", "2 epochs", "at most 1"),
        ),
    ),
    (
        "imagenet_sketch",
        (
            "search.space.loss=foacl",
            transform("{albumentations.CoarseDropout: {max_holes: 8}}"),
        ),
        (
            ("loss", "'foacl'", "did you mean 'focal'?"),
            ("albumentations.CoarseDropout", "'max_holes' is gone", "num_holes_range"),
        ),
    ),
    (
        "image_type",
        ("search.space.freeze_epochs=5",),
        (("freeze_epochs", "more than the 3 epochs"),),
    ),
    (
        "image_type",
        ("folds.valid_fraction=0.9",),
        (("valid_fraction", "leaves no training rows"),),
    ),
    (
        "image_type",
        (transform("{torchvision.RandomRotation: {degree: 15}}"),),
        (("torchvision.RandomRotation", "'degree'", "did you mean 'degrees'?"),),
    ),
]


@pytest.mark.parametrize(
    ("name", "overrides", "problems"), WRONG, ids=[f"{name} {' '.join(o)}" for name, o, _ in WRONG]
)
def test_each_wrong_value_is_one_message(
    name: str,
    overrides: tuple[str, ...],
    problems: tuple[tuple[str, ...], ...],
    data_of: Any,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for override in overrides for word in ("--set", override)]
    result = cli(*commands(name, data_of(name))[0], "--smoke", *words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    count, *messages = result.stderr.splitlines()
    assert count == f"{len(problems)} problem{'s' if len(problems) > 1 else ''}:"
    assert len(messages) == len(problems)
    for texts in problems:
        assert sum(all(text in message for text in texts) for message in messages) == 1
    assert list(tmp_path.iterdir()) == []
