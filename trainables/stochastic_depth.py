"""Whether a backbone has stochastic depth, so that `drop_path` does something to it.

Takes a backbone's name; builds it without memory.
"""

from __future__ import annotations

from functools import cache

import torch
import torchvision
from timm.layers.drop import DropPath

from trainables.backbones import build_body

_PIXELS = 224  # whether there are such blocks does not depend on it


@cache
def drops_paths(backbone: str) -> bool:
    """True also where it cannot be told: the backbone needs memory, or another size."""
    try:
        with torch.device("meta"):
            module = build_body(backbone, _PIXELS, False, drop_path=0.5).module
    except Exception:  # whatever its constructor raises: the checks of backbones tell
        return True
    kinds = (DropPath, torchvision.ops.StochasticDepth)
    return any(isinstance(block, kinds) for block in module.modules())
