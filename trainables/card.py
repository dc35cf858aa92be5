"""The one description of a classifier's architecture: what its weights file must say to rebuild it.

Takes and gives the JSON text that lies in the header of a weights file.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class ModelCard:
    """An architecture, without what only training needs (dropout, stochastic depth)."""

    backbone: str
    """`timm/<name>`, `torchvision/<name>` or `stack(<backbone>,<backbone>@<size>,...)`."""
    classes: int
    image_size: int
    """Side of the square images, in pixels."""
    head: str = "linear"
    """A row of `HEADS`."""
    meta: tuple[str, ...] = ()
    """Rows of `META_FEATURES`, in the order of their numbers."""
    activation: str = "softmax"
    """A row of `ACTIVATIONS`: how logits become probabilities."""


def card_to_json(card: ModelCard) -> str:
    return json.dumps(asdict(card))


def card_from_json(text: str) -> ModelCard:
    """Of an older version too: what it lacks has its default, what is not known is left out.
    Raises ValueError, KeyError or TypeError for anything that is no card."""
    given = json.loads(text)
    known = {field.name: given[field.name] for field in fields(ModelCard) if field.name in given}
    return ModelCard(**known | {"meta": tuple(known.get("meta", ()))})
