"""timm's backbones: their names, and one without its classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import timm
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from trainables.body import Body, Normalise

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_HUB_SECONDS = 10.0  # for the hub's first answer


def timm_names() -> Sequence[str]:
    return timm.list_models()


def timm_body(name: str, pretrained: bool, drop_path: float, image_size: int) -> Body:
    # Also where it is 0: some backbones have another default.
    options: dict[str, Any] = {"drop_path_rate": drop_path}
    config = timm.get_pretrained_cfg(name)
    if config is not None and config.fixed_input_size:
        options["img_size"] = image_size
    if pretrained and config is not None and config.hf_hub_id:
        _require_hub(config.hf_hub_id)
    try:
        module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except TypeError:  # a backbone without stochastic depth
        del options["drop_path_rate"]
        module = timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    attributes: Any = module  # timm's models share no typed base class
    features = getattr(module, "head_hidden_size", None) or attributes.num_features
    used = attributes.pretrained_cfg
    return Body(module, features, Normalise(used["mean"], used["std"]))


def _require_hub(repo: str) -> None:
    """Raises where the weights are not on this machine and the hub is out of reach: one request,
    since the hub's client would try for 47 s."""
    cached = (try_to_load_from_cache(repo, file) for file in _HUB_FILES)
    if any(isinstance(path, str) for path in cached):
        return
    with contextlib.suppress(HfHubHTTPError):  # an answer: timm knows the file's other names
        get_hf_file_metadata(hf_hub_url(repo, _HUB_FILES[0]), timeout=_HUB_SECONDS)
