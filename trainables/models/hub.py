"""Whether pretrained weights can be had, without fetching them and without torch.

Takes names of backbones, looks into the caches of this machine, then asks the hubs once.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Thread
from urllib.error import HTTPError

_TORCH_HUB = "https://download.pytorch.org"
_FILES = ("model.safetensors", "pytorch_model.bin")


def weights_at_hand(backbones: Sequence[str], seconds: float = 3.0) -> bool:
    """True where every backbone's weights lie in a cache here, or its hub answers in time."""
    missing = [name for name in backbones if not _is_cached(name)]
    families = {name.partition("/")[0] for name in missing}
    return all(hub_answers(family, seconds) for family in sorted(families))


def hub_answers(family: str, seconds: float) -> bool:
    """True where the hub of `timm` or `torchvision` answers in time; False for another family."""
    ask = {"torchvision": _torch_hub_answers, "timm": _face_hub_answers}.get(family)
    return ask is not None and _in_time(ask, seconds)


def _is_cached(backbone: str) -> bool:
    """True where the weights' file lies in the cache of its library."""
    family, _, name = backbone.partition("/")
    if family == "torchvision":  # files are named after the backbone and a part of their hash
        home = Path(os.path.expanduser(os.environ.get("TORCH_HOME", "~/.cache/torch")))
        return any((home / "hub" / "checkpoints").glob(f"{name}-*.pth"))
    from huggingface_hub import try_to_load_from_cache

    found = (try_to_load_from_cache(f"timm/{name}", file) for file in _FILES)
    return any(isinstance(path, str) for path in found)


def _face_hub_answers() -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    get_hf_file_metadata(hf_hub_url("timm/resnet18.a1_in1k", _FILES[0]), timeout=5.0)


def _torch_hub_answers() -> None:
    try:
        urllib.request.urlopen(_TORCH_HUB, timeout=5.0).close()
    except HTTPError:
        return  # an answer


def _in_time(ask: Callable[[], None], seconds: float) -> bool:
    """True where `ask` returns in time; a name that cannot be resolved may take far longer."""
    answered: list[bool] = []

    def asked() -> None:
        try:
            ask()
        except Exception:  # the hub's client raises whatever its network library does
            return
        answered.append(True)

    thread = Thread(target=asked, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered)
