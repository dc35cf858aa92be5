"""Pretrained weights: from the user's own files, and from the hub."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from huggingface_hub import errors
from safetensors.torch import save_file

from foldrace.core.errors import EnvironmentProblem
from foldrace.trainables.models import backbones as timm_bodies
from foldrace.trainables.models.classifier import ModelConfig, build_classifier
from foldrace.trainables.models.weights import weights_file


def backbone_weights(name: str, image_size: int = 32) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model = build_classifier(ModelConfig(name, 2, image_size))
    weights = {k: v.clone() for k, v in model.body.state_dict().items()}
    return weights | {"fc.weight": torch.zeros(1000, 4)}  # the file's own classifier


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/mnasnet0_5"])
@pytest.mark.parametrize("as_folder", [False, True])
def test_weights_from_a_file_or_a_folder(tmp_path: Path, name: str, as_folder: bool) -> None:
    weights = backbone_weights(name)
    path = weights_file(str(tmp_path), name)
    assert path == tmp_path / f"{name.split('/')[1]}.safetensors"
    save_file(weights, path)
    model = build_classifier(
        ModelConfig(name, 3, 32), pretrained=str(tmp_path if as_folder else path)
    )
    for key, tensor in model.body.state_dict().items():
        torch.testing.assert_close(tensor, weights[key])


def test_files_that_do_not_fit_say_why(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file(backbone_weights("timm/test_resnet"), path)
    with pytest.raises(EnvironmentProblem, match="99 are missing: stem"):
        build_classifier(ModelConfig("timm/test_convnext", 2, 32), pretrained=str(path))
    save_file(backbone_weights("timm/test_vit", 64), path)
    with pytest.raises(EnvironmentProblem, match=r"pos_embed is .*another image size"):
        build_classifier(ModelConfig("timm/test_vit", 2, 32), pretrained=str(path))
    path.write_bytes(b"junk")
    with pytest.raises(EnvironmentProblem, match="cannot be read as safetensors"):
        build_classifier(ModelConfig("timm/test_resnet", 2, 32), pretrained=str(path))
    with pytest.raises(EnvironmentProblem, match=r"test_resnet\.safetensors"):
        build_classifier(ModelConfig("timm/test_resnet", 2, 32), pretrained=str(tmp_path))


def test_one_missing_weight_is_told_but_a_counter_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights = backbone_weights("timm/test_resnet")
    counters = [name for name in weights if name.endswith("num_batches_tracked")]
    whole = {name: tensor for name, tensor in weights.items() if name not in counters}
    save_file(whole, path)
    model = build_classifier(ModelConfig("timm/test_resnet", 2, 32), pretrained=str(path))
    for name, tensor in whole.items():
        if name != "fc.weight":  # the file's own classifier
            torch.testing.assert_close(model.body.state_dict()[name], tensor)
    del whole["layer3.0.bn1.running_var"]
    save_file(whole, path)
    with pytest.raises(EnvironmentProblem, match=r"1 are missing: layer3\.0\.bn1\.running_var"):
        build_classifier(ModelConfig("timm/test_resnet", 2, 32), pretrained=str(path))


def test_each_member_of_a_stack_has_its_own_file(tmp_path: Path) -> None:
    stack = ModelConfig("stack(timm/test_resnet,timm/test_vit@48)", 2, 32)
    members = {"test_resnet": backbone_weights("timm/test_resnet")}
    members["test_vit"] = backbone_weights("timm/test_vit", 48)
    for name, weights in members.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    state = build_classifier(stack, pretrained=str(tmp_path)).body.state_dict()
    for i, weights in enumerate(members.values()):
        for name in weights.keys() - {"fc.weight"}:
            torch.testing.assert_close(state[f"members.{i}.{name}"], weights[name])
    with pytest.raises(EnvironmentProblem, match=r"no folder.*<backbone>\.safetensors for each"):
        build_classifier(stack, pretrained=str(tmp_path / "test_vit.safetensors"))
    (tmp_path / "test_vit.safetensors").unlink()
    with pytest.raises(EnvironmentProblem, match=r"test_vit\.safetensors: cannot be read"):
        build_classifier(stack, pretrained=str(tmp_path))


@pytest.mark.parametrize("name", ["timm/test_resnet", "torchvision/shufflenet_v2_x0_5"])
def test_without_the_hub_the_error_comes_at_once_and_names_the_choices(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm_bodies, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(timm_bodies, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    started = time.monotonic()
    with pytest.raises(EnvironmentProblem) as error:
        build_classifier(ModelConfig(name, 2, 32), pretrained=True)
    assert time.monotonic() - started < 5
    (problem,) = error.value.problems
    assert problem.where == f"training.pretrained: {name}"
    for choice in ("true (", "false (", "path of a weights file", "no route to host"):
        assert choice in problem.message


def test_the_hub_is_asked_only_for_what_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("asked")

    monkeypatch.setattr(timm_bodies, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(timm_bodies, "try_to_load_from_cache", lambda repo, file: "/cache/file")
    timm_bodies._require_hub("timm/test_resnet.r160_in1k")


def test_an_answer_of_the_hub_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotFound(errors.HfHubHTTPError):
        def __init__(self) -> None:
            Exception.__init__(self, "404")

    def not_found(*args: object, **kwargs: object) -> None:
        raise NotFound

    monkeypatch.setattr(timm_bodies, "get_hf_file_metadata", not_found)
    monkeypatch.setattr(timm_bodies, "try_to_load_from_cache", lambda *args: None)
    timm_bodies._require_hub("timm/test_resnet.r160_in1k")


def test_torchvisions_pretrained_vit_takes_other_image_sizes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained = torchvision.models.get_model("vit_b_32", image_size=224).state_dict()
    weights = torchvision.models.ViT_B_32_Weights
    monkeypatch.setattr(weights, "get_state_dict", lambda self, **keys: dict(trained))
    model = build_classifier(ModelConfig("torchvision/vit_b_32", 2, 96), pretrained=True).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 96, 96)).shape == (1, 2)
    torch.testing.assert_close(model.body.conv_proj.weight, trained["conv_proj.weight"])


@pytest.mark.parametrize("before", ["module.", "model.", "module.model.backbone."])
def test_what_wrappers_put_before_the_names_is_left_out(tmp_path: Path, before: str) -> None:
    weights, path = backbone_weights("timm/test_resnet"), tmp_path / "w.safetensors"
    wrapped = {f"{before}{name}": tensor for name, tensor in weights.items()}
    average = {f"ema.{name}": tensor + 1 for name, tensor in list(weights.items())[:3]}
    save_file(wrapped | average, path)
    model = build_classifier(ModelConfig("timm/test_resnet", 2, 32), pretrained=str(path))
    for key, tensor in model.body.state_dict().items():
        torch.testing.assert_close(tensor, weights[key])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_told_with_the_command_that_converts_it(tmp_path: Path, zipped: bool) -> None:
    weights, path = backbone_weights("timm/test_resnet"), tmp_path / "w.pth"
    torch.save({"state_dict": weights}, path, _use_new_zipfile_serialization=zipped)
    config = ModelConfig("timm/test_resnet", 2, 32)
    with pytest.raises(EnvironmentProblem) as error:
        build_classifier(config, pretrained=str(path))
    command = str(error.value).partition("convert it once: python ")[2]
    subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path, check=True)
    model = build_classifier(config, pretrained=str(tmp_path / "w.safetensors"))
    for key, tensor in model.body.state_dict().items():
        torch.testing.assert_close(tensor, weights[key])
