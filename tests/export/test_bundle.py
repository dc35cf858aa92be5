"""Bundles run without Foldrace as the run's own blend does, and what was changed is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foldrace.export.blend import open_blend
from foldrace.export.bundle import write_bundle
from foldrace.export.folder import new_folder, write_sums
from foldrace.export.parity import Parity
from foldrace.export.shipped.blend_io import DamagedExport, main
from foldrace.export.shipped.bundle_predict import Blend
from foldrace.inference.predictor import Predictor
from foldrace.run_folder.store import RunStore
from tests.export.exported_runs import FORBIDDEN, MadeModel, make_run, noisy_images, run_without

MODELS = (
    MadeModel("timm/test_resnet", 0.3, 0.6),
    MadeModel("timm/test_convnext", 0.25, 1.4, image_size=48, head="layernorm", loss="bce"),
    MadeModel("stack(timm/test_efficientnet,timm/test_vit@48)", 0.2, head="mlp", resize="pad"),
    MadeModel("torchvision/shufflenet_v2_x0_5", 0.25, image_size=48, resize="crop"),
)
META = ("mean_colour", "aspect_ratio")
SEEN = 0.01
"""Probabilities of models with 4 times the logits, where a pixel may be off by 1 of 255."""


class Exported:
    """A run, its bundle, and some images."""

    def __init__(self, root: Path, images: Path) -> None:
        self.store: RunStore = make_run(
            root / "run", images, MODELS, meta=META, blend_temperature=0.8
        )
        self.folder = root / "bundle"
        with new_folder(self.folder) as part:
            self.parity: Parity = write_bundle(open_blend(self.store), part, 1)
        self.images = root / "images"
        self.names = noisy_images(self.images)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_images: Path) -> Iterator[Exported]:
    root = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRACE_CACHE", str(root / "cache"))
        yield Exported(root, tiny_images)


def by_the_run(exported: Exported) -> NDArray[np.float64]:
    readable = [exported.images / name for name in exported.names if "사진" in name]
    return Predictor(exported.store, device="cpu").probabilities(readable)


def test_the_code_itself_gives_the_same_probabilities(exported: Exported) -> None:
    assert exported.parity.images == 60
    assert exported.parity.max_difference < 1e-6
    assert exported.parity.max_pixel_difference <= 1
    assert exported.parity.max_difference_from_files < SEEN


def test_it_runs_from_another_folder_without_foldrace(exported: Exported) -> None:
    code = f"""
import json, sys
sys.path.insert(0, {str(exported.folder)!r})
from predict import Blend
blend = Blend({str(exported.folder)!r})
found = blend({exported.names!r})
print(json.dumps([[p.path, p.label, p.error, None if p.error else p.probabilities.tolist()]
                  for p in found]))
"""
    done = run_without(FORBIDDEN, code, exported.images)
    found = json.loads(done.stdout)
    assert [row[0] for row in found] == exported.names
    errors = {row[0]: row[2] for row in found if row[1] == "ERROR"}
    assert errors["missing.png"] == "does not exist" and "is no image" in errors["bad.png"]
    prob = np.array([row[3] for row in found if row[1] != "ERROR"])
    expected = by_the_run(exported)
    np.testing.assert_allclose(prob, expected, atol=SEEN)
    labels = [row[1] for row in found if row[1] != "ERROR"]
    assert labels == [exported.store.classes()[i] for i in expected.argmax(axis=1)]
    assert np.ptp(expected, axis=0).max() > 0.1  # the images do differ


def test_what_the_json_says(exported: Exported) -> None:
    about = json.loads((exported.folder / "bundle.json").read_text())
    assert about["classes"] == ["blue", "green", "red"]
    assert [member["weight"] for member in about["members"]] == [0.3, 0.25, 0.2, 0.25]
    assert about["inputs"][2] == {
        "size": 32, "resize": "pad", "shorter_side": 48, "max_pixels": 100_000_000,
        "meta": list(META),
    }  # fmt: skip
    licenses = {row["backbone"]: row for row in about["licenses"]}
    assert licenses["timm/test_vit"]["license"] == "apache-2.0"
    assert licenses["timm/test_vit"]["weights"].startswith("timm/test_vit")
    assert "BSD-3-Clause" in licenses["torchvision/shufflenet_v2_x0_5"]["license"]


def _flip_a_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def _first(folder: Path) -> Path:
    return sorted(folder.glob("models/*.safetensors"))[0]


def _change_json(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """With the sums of the changed file, as somebody would who means it."""
    about = json.loads((folder / "bundle.json").read_text())
    change(about)
    (folder / "bundle.json").write_text(json.dumps(about))
    _sum_again(folder)


def _sum_again(folder: Path) -> None:
    (folder / "SHA256SUMS").unlink()
    write_sums(folder)


def _pickle(folder: Path) -> None:
    torch.save({"body.x": torch.zeros(2)}, _first(folder))
    _sum_again(folder)


TAMPERED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a byte of weights": (lambda f: _flip_a_byte(_first(f)), "fold0.safetensors: was changed"),
    "a byte of the JSON": (lambda f: _flip_a_byte(f / "bundle.json"), "bundle.json: was changed"),
    "a file is gone": (lambda f: _first(f).unlink(), "0-c0000-raw-fold0.safetensors: is missing"),
    "a pickle": (_pickle, "fold0.safetensors: cannot be read as safetensors"),
    "another version": (
        lambda f: _change_json(f, lambda about: about.update(version=2)),
        "bundle.json: is of format version 2; this code reads version 1",
    ),
    "no sums": (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS: does not exist"),
    "a path that leads out": (
        lambda f: (f / "SHA256SUMS").write_text(f"{'0' * 64}  ../other.json\n"),
        "SHA256SUMS line 1: is no line of sha256sum",
    ),
    "a name that would fetch": (
        lambda f: _change_json(
            f, lambda a: a["members"][0]["backbones"][0].update(name="timm/hf-hub:who/what")
        ),
        "'timm/hf-hub:who/what' is no backbone's name",
    ),
    "another backbone": (
        lambda f: _change_json(
            f, lambda a: a["members"][0]["backbones"][0].update(name="timm/test_vit")
        ),
        "does not fit bundle.json",
    ),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_what_was_changed_is_refused_by_name(exported: Exported, tmp_path: Path, how: str) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(exported.folder, folder)
    change, message = TAMPERED[how]
    change(folder)
    with pytest.raises(DamagedExport) as raised:
        Blend(folder, "cpu")
    assert message in str(raised.value)


def test_all_changed_files_are_named_at_once(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "changed"
    shutil.copytree(exported.folder, folder)
    for file in folder.glob("models/*fold1*"):
        file.unlink()
    monkeypatch.setattr("sys.argv", ["predict.py", "a.png"])
    assert main(lambda _: Blend(folder, "cpu")) == 2
    assert capsys.readouterr().err.count("is missing") == len(MODELS)
    monkeypatch.setattr("sys.argv", ["predict.py"])
    assert main(Blend) == 2 and "usage: python predict.py IMAGE" in capsys.readouterr().err


def test_the_command_prints_a_table(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(exported.images / name) for name in ("bad.png", "사진 0.png")]
    monkeypatch.setattr("sys.argv", ["predict.py", *paths])
    assert main(lambda _: Blend(exported.folder, "cpu")) == 0
    header, bad, good = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["image_path", "class", "confidence", "blue", "green", "red", "error"]
    assert bad[:6] == [paths[0], "ERROR", "", "", "", ""] and "is no image" in bad[6]
    assert good[0] == paths[1] and float(good[2]) == max(map(float, good[3:6]))
    monkeypatch.setattr("sys.argv", ["predict.py", paths[0]])
    assert main(lambda _: Blend(exported.folder, "cpu")) == 1


def test_the_sums_are_those_of_sha256sum(exported: Exported) -> None:
    import subprocess

    done = subprocess.run(
        ["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=exported.folder, check=False
    )
    assert done.returncode == 0
