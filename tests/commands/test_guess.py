"""The config that data without one gets: what is chosen by device, weights, speed and time; what
the user sets stays; and the file of `init` says the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from foldrace.commands.no_config import guess as guessing
from foldrace.commands.no_config import guess_length
from foldrace.commands.no_config.guess import SweepGuess, guess_sweep
from foldrace.config.load import parse_config, to_yaml
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import DataError, EnvironmentProblem
from foldrace.scheduling.nodes import Node
from foldrace.search_spaces.backbone_choice import choose_backbones
from foldrace.search_spaces.defaults import Situation
from foldrace.search_spaces.portfolio import recorded
from foldrace.search_spaces.sweep_length import Speed
from foldrace.sweep import app
from foldrace.trainables.speeds import MeasuredSpeeds, TimingRequest

CPU, GPU = [Node(2, 0)], [Node(16, 2)]
QUICK = Speed(0.001, 0.0005, 1.0, 1000)
_SMALL = choose_backbones("cpu", 20, 60, pretrained=False).backbones


class Measuring:
    """In place of the process that measures: every backbone is quick but those said otherwise."""

    def __init__(self) -> None:
        self.requests: list[TimingRequest] = []
        self.slow: dict[str, Speed] = {}
        self.errors: dict[str, str] = {}

    def __call__(self, request: TimingRequest) -> MeasuredSpeeds:
        self.requests.append(request)
        names = SweepConfig.model_validate_json(request.config).search.backbones
        speeds = {n: self.slow.get(n, QUICK) for n in names if n not in self.errors}
        return MeasuredSpeeds(speeds, {n: e for n, e in self.errors.items() if n in names})


@pytest.fixture
def measuring(monkeypatch: pytest.MonkeyPatch) -> Measuring:
    found = Measuring()
    monkeypatch.setattr(guess_length, "measure_speeds", found)
    monkeypatch.setattr(guess_length, "this_machine", lambda: GPU)
    return found


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def answers(at_hand: bool) -> None:
        monkeypatch.setattr(guessing, "weights_at_hand", lambda _: at_hand)

    answers(False)
    return answers


def guessed(
    source: Path, *overrides: str, nodes: list[Node] = CPU, smoke: bool = False
) -> SweepGuess:
    return guess_sweep(source, overrides, smoke, nodes)


def config(guess: SweepGuess) -> SweepConfig:
    return guess.parsed.require()


@pytest.mark.usefixtures("measuring")
def test_small_images_on_a_cpu(tiny_images: Path) -> None:
    found = config(guessed(tiny_images, "resources.time_budget=10m"))
    choice = choose_backbones("cpu", 20, 60, pretrained=False)
    assert found.name == tiny_images.name
    assert found.search.backbones == choice.backbones
    assert found.training.image_size == choice.image_size
    assert (found.training.pretrained, found.training.epochs, found.folds.k) == (False, 60, 3)
    assert found.resources.time_budget == 600
    assert found.resources.cpus_per_trial == 1


@pytest.mark.usefixtures("measuring")
def test_pretrained_weights_where_the_hub_answers(
    tiny_images: Path, hub: Callable[[bool], None]
) -> None:
    hub(True)
    found = config(guessed(tiny_images, nodes=GPU))
    assert found.training.pretrained is True
    assert found.search.backbones == choose_backbones("gpu", 20, 60, True).backbones
    assert (found.training.epochs, found.folds.k, found.search.candidates) == (10, 5, 20)
    assert found.resources.cpus_per_trial == 8


@pytest.mark.parametrize("time", [(), ("resources.time_budget=1h",)])
def test_what_it_says(time: tuple[str, ...], tiny_images: Path, measuring: Measuring) -> None:
    measuring.slow["timm/resnet10t"] = Speed(5.0, 1.0, 1.0, 1000)
    said = "\n".join(guessed(tiny_images, *time).lines)
    assert "60 images, 3 classes" in said
    assert "from scratch: pretrained weights are in no cache here" in said
    assert "3 folds, 2 fold trials at a time, at most" in said
    assert " device-hours; the first candidate is complete after about " in said
    assert ("timm/resnet10t: about" in said) and (("left out: too slow" in said) == bool(time))


def test_what_is_measured(tiny_images: Path, measuring: Measuring) -> None:
    guessed(tiny_images, "resources.time_budget=100s", "training.batch_size=7")
    [request] = measuring.requests
    assert (request.rows, request.classes, request.use_gpu) == (60, 3, False)
    assert request.seconds == 2.0
    assert all(Path(file).is_file() for file in request.files)
    assert SweepConfig.model_validate_json(request.config).training.batch_size == 7


@pytest.mark.usefixtures("measuring")
def test_what_the_user_sets_stays(tiny_images: Path) -> None:
    found = config(
        guessed(
            tiny_images,
            "name=mine",
            "folds.k=4",
            "search.backbones=[timm/test_vit]",
            "search.candidates=3",
            "search.space.image_size={choices: [24, 32]}",
            "training.epochs=2",
            "resources.cpus_per_trial=2",
            "resources.time_budget=1h",
        )
    )
    assert (found.name, found.folds.k, found.search.candidates) == ("mine", 4, 3)
    assert found.search.backbones == ("timm/test_vit",)
    assert (found.training.epochs, found.resources.cpus_per_trial) == (2, 2)
    assert "image_size" not in found.training.model_fields_set


@pytest.fixture
def wide_images(tmp_path: Path) -> Path:
    """Ten photos of 3 to 2, upright and lying, and two squares, in two classes."""
    folder = tmp_path / "wide"
    for i in range(12):
        path = folder / ("cat", "dog")[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = (30, 30) if i < 2 else ((30, 20), (20, 30))[i // 2 % 2]
        Image.new("RGB", size, (20 * i, 0, 0)).save(path)
    return folder


@pytest.mark.usefixtures("measuring")
def test_how_photos_that_are_not_square_become_so_is_searched(
    wide_images: Path, tiny_images: Path
) -> None:
    guess = guessed(wide_images, "search.space.flip=0.5")
    space = config(guess).search.space
    assert space == {"resize": "search", "flip": 0.5}
    assert any("sides of 1.5 to 1 (median)" in line for line in guess.lines)
    assert guess.keys["search"]["space"] == {"resize": "search", "flip": 0.5}
    assert config(guessed(wide_images, "training.resize=pad")).search.space == {}
    assert config(guessed(tiny_images)).search.space == {}


def test_the_first_candidate_is_short_where_time_is(
    tiny_images: Path, measuring: Measuring
) -> None:
    """60 images in 3 folds: 40 x 0.04 + 20 x 0.02 = 2 s an epoch, a quarter more beside another, a
    fold trial on each of 2 slots, then the third: 5 s. Three tenths of 540 s are enough for the 30
    epochs that networks from scratch are to have."""
    measuring.slow = {name: Speed(0.04, 0.02, 0.0, 1000) for name in _SMALL}
    guess = guessed(tiny_images, "resources.time_budget=10m")
    found = config(guess)
    [point] = found.search.points
    assert point.backbone in found.search.backbones
    assert found.training.epochs == 30
    assert point.params["epochs"] * 5 == pytest.approx(540 / 10, abs=8)
    said = f"{found.training.epochs} epochs ({point.params['epochs']:g} of the first candidate)"
    assert any(said in line for line in guess.lines)
    assert not config(guessed(tiny_images, "training.epochs=20")).search.points
    own = "search.points=[{backbone: timm/test_resnet, params: {lr: 0.1}}]"
    [kept] = config(guessed(tiny_images, own)).search.points
    assert kept.params == {"lr": 0.1}


def test_the_rate_of_the_short_candidate_is_that_of_so_few_updates(
    tiny_images: Path, measuring: Measuring
) -> None:
    """From pretrained weights it goes by 1 / updates: 40 images in batches of 2 are 20 an epoch."""
    backbone = "timm/test_resnet"
    measuring.slow = {backbone: Speed(0.16, 0.08, 0.0, 1000)}
    settings = (f"search.backbones=[{backbone}]", "training.pretrained=true")
    small = "training.batch_size=2"
    found = config(guessed(tiny_images, "resources.time_budget=30m", small, *settings))
    [point] = found.search.points
    epochs, usual = point.params["epochs"], Situation("cnn", True, "adamw", 2, 1000).lr
    assert 20 * 20 > 20 * float(epochs) > 125  # within the rate's bounds
    share = point.params["lr"] / (usual * 1000 / (20 * float(epochs)))
    assert share == pytest.approx(recorded()["pretrained"][0].params["lr"], rel=0.05)


def test_a_backbone_that_cannot_train_is_left_out(tiny_images: Path, measuring: Measuring) -> None:
    measuring.errors["timm/test_resnet"] = "RuntimeError: too small"
    guess = guessed(tiny_images)
    assert "timm/test_resnet" not in config(guess).search.backbones
    assert "timm/test_resnet cannot train here: RuntimeError: too small" in guess.lines
    with pytest.raises(EnvironmentProblem, match="none of them can train: RuntimeError"):
        guessed(tiny_images, "search.backbones=[timm/test_resnet]")


def test_a_cluster_with_gpus_is_not_measured_on_a_machine_without(
    tiny_images: Path, measuring: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guess_length, "this_machine", lambda: CPU)
    guess = guessed(tiny_images, "resources.time_budget=1h", nodes=GPU)
    assert measuring.requests == []
    assert config(guess).training.epochs == 30
    assert any("the cluster has GPUs, this machine has none" in line for line in guess.lines)


@pytest.mark.usefixtures("measuring")
def test_weights_of_the_users_own(tiny_images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, size in (("resnet18", 30), ("test_vit", 10), ("no_such_net", 5), ("alexnet", 50)):
        (folder / f"{name}.safetensors").write_bytes(b"x" * size)
    found = config(guessed(tiny_images, f"training.pretrained={folder}"))
    assert found.search.backbones == ("timm/test_vit", "timm/resnet18", "torchvision/alexnet")
    assert found.training.pretrained == str(folder)
    with pytest.raises(EnvironmentProblem, match=r"no folder of <backbone name>.safetensors"):
        guessed(tiny_images, f"training.pretrained={tmp_path}")


@pytest.mark.usefixtures("measuring")
def test_folds_fit_the_rarest_class(tiny_images: Path, tmp_path: Path) -> None:
    for kind, count in (("blue", 20), ("red", 2)):
        (tmp_path / "d" / kind).mkdir(parents=True)
        for path in sorted((tiny_images / kind).iterdir())[:count]:
            (tmp_path / "d" / kind / path.name).write_bytes(path.read_bytes())
    assert config(guessed(tmp_path / "d")).folds.k == 2


@pytest.mark.usefixtures("measuring")
def test_folds_of_a_column(tiny_images: Path, tmp_path: Path) -> None:
    paths = sorted(tiny_images.rglob("*.png"))
    rows = "".join(f"{p},{p.parent.name},{i % 4}\n" for i, p in enumerate(paths))
    (tmp_path / "t.csv").write_text(f"path,kind,fold\n{rows}")
    found = guessed(tmp_path / "t.csv")
    assert (found.parsed.require().folds.k, found.parsed.require().folds.column) == (4, "fold")


def test_wrong_overrides_are_told_before_anything_is_measured(
    tiny_images: Path, measuring: Measuring
) -> None:
    guess = guessed(tiny_images, "training.epochs=none", "resources.time_budget=soon")
    assert [p.where.rpartition(": ")[2] for p in guess.parsed.problems] == [
        "training.epochs",
        "resources.time_budget",
    ]
    assert measuring.requests == []


def test_all_that_is_wrong_with_the_data_is_told_at_once(
    tmp_path: Path, tiny_images: Path, measuring: Measuring
) -> None:
    """The labels of the training images, and test images that are none."""
    names = [f"red/{i}.png" for i in range(6)]
    (tmp_path / "red").symlink_to(tiny_images / "red")
    (tmp_path / "train.csv").write_text("id,target\n" + "".join(f"{n},a\n" for n in names))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.png").write_bytes(b"none")
    checked = CliRunner().invoke(app, ["check", str(tmp_path)])
    assert checked.exit_code == 2
    assert "holds only the class 'a'" in checked.output
    assert "x.png: unreadable" in checked.output
    made = CliRunner().invoke(app, ["init", str(tmp_path), "--out", str(tmp_path / "a.yaml")])
    assert (made.exit_code, (tmp_path / "a.yaml").exists()) == (2, False)
    assert "holds only the class 'a'" in made.output
    assert measuring.requests == []


def test_one_class_is_told_as_ever(tiny_images: Path, measuring: Measuring) -> None:
    with pytest.raises(DataError, match="holds no labelled images"):
        guessed(tiny_images / "red")
    assert measuring.requests == []


def test_a_smoke_run_measures_nothing(tiny_images: Path, measuring: Measuring) -> None:
    found = config(guessed(tiny_images, smoke=True))
    assert measuring.requests == []
    assert (found.training.epochs, found.search.candidates, found.folds.k) == (1, 2, 2)
    assert found.training.pretrained is False


@pytest.mark.usefixtures("measuring")
@pytest.mark.parametrize("inside", [True, False])
def test_init_writes_the_same_config(inside: bool, tiny_images: Path, tmp_path: Path) -> None:
    out = (tiny_images.parent if inside else tmp_path) / f"{tmp_path.name}.yaml"
    arguments = ["init", str(tiny_images), "--out", str(out), "--time", "1h"]
    arguments += ["--set", "search.space.lr={low: 1e-4, high: 1e-2}", "--set", "race.z=2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    text = out.read_text(encoding="utf-8")
    train = tiny_images.name if inside else str(tiny_images)
    assert f"train: {train} " in text or f"train: {train}\n" in text
    assert "time_budget: 1h" in text
    overrides = ("resources.time_budget=1h", "search.space.lr={low: 1e-4, high: 1e-2}", "race.z=2")
    guess = guess_sweep(tiny_images, overrides)
    assert to_yaml(parse_config(out).require()) == to_yaml(config(guess))
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, "exists" in again.output) == (2, True)


def test_init_of_a_config_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path / "a.yaml")])
    assert done.exit_code == 2
    assert "is no data to write a config for" in done.output


@pytest.mark.usefixtures("measuring")
def test_check_and_dry_run_without_a_config(
    tiny_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guess_length, "this_machine", lambda: CPU)
    for command in (["check"], ["run", "--dry-run"], ["run", "--dry-run", "--smoke"]):
        done = CliRunner().invoke(app, [*command, str(tiny_images), "--time", "1h"])
        assert done.exit_code == 0, done.output
        smoke = "-smoke" if "--smoke" in command else ""
        assert f"{tiny_images.name}{smoke}: " in done.output
    assert not (tmp_path / "runs").exists()


def test_time_goes_with_a_config_too(tmp_path: Path, tiny_images: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"data: {{train: {tiny_images}}}\nsearch: {{backbones: [timm/test_vit]}}\n")
    done = CliRunner().invoke(app, ["check", str(path), "--time", "soon"])
    assert done.exit_code == 2
    assert "resources.time_budget: should be seconds" in done.output


def test_a_run_folder_that_exists_is_told_before_anything_is_measured(
    tiny_images: Path, measuring: Measuring, make_tiny_run: Any
) -> None:
    root = make_tiny_run().store.root
    done = CliRunner().invoke(app, ["run", str(tiny_images), "--out", root])
    assert done.exit_code == 2
    assert "exists already; go on with" in done.output
    assert measuring.requests == []


def test_console_is_told(tiny_images: Path, measuring: Measuring) -> None:
    console = Console(width=200)
    with console.capture() as capture:
        guessing.parse_source(tiny_images, (), console, nodes=CPU)
    assert "training images: " in capture.get()
