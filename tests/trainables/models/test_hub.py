"""Whether pretrained weights can be had: from the caches, or of a hub that answers in time."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError

import huggingface_hub
import pytest

from foldrace.trainables.models.hub import weights_at_hand

TIMM, TORCHVISION = "timm/resnet18.a1_in1k", "torchvision/resnet18"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(urllib.request, "urlopen", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.parametrize("backbones", [[TIMM], [TORCHVISION], [TIMM, TORCHVISION], ["mine/net"]])
def test_nothing_here_and_no_answer(backbones: list[str]) -> None:
    assert not weights_at_hand(backbones)


def test_timms_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {("timm/resnet18.a1_in1k", "model.safetensors"): "/cache/model"}
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *k: known.get(k))
    assert weights_at_hand([TIMM])
    assert not weights_at_hand([TIMM, "timm/resnet34.a1_in1k"])


def test_torchvisions_cache(tmp_path: Path) -> None:
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "resnet18-f37072fd.pth").touch()
    assert weights_at_hand([TORCHVISION])
    assert not weights_at_hand(["torchvision/resnet50"])


def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: object())
    assert weights_at_hand([TIMM])
    assert not weights_at_hand([TIMM, TORCHVISION])


def test_a_refusal_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **_: object) -> None:
        raise HTTPError(url, 403, "no", None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    assert weights_at_hand([TORCHVISION])


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: end.wait())
    assert not weights_at_hand([TIMM], seconds=0.05)
    end.set()
