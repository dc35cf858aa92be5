"""The whole classifier: backbone, meta features where there are some, head.

Takes a `ModelCard`, gives a module from images in [0, 1] to logits; tells beforehand what a
backbone refuses and how large it is, without its memory.

The one description of a classifier's architecture: what its weights file must say to rebuild it.

Takes and gives the JSON text that lies in the header of a weights file.

Whether a backbone has stochastic depth, so that `drop_path` does something to it.

Takes a backbone's name; builds it without memory.

Gradient checkpointing: activations computed anew in the backward pass instead of kept, less
memory for about a third more time. (Chen et al., Training Deep Nets with Sublinear Memory Cost,
2016.)

Takes a backbone's body, switches it on; only timm's backbones have it, and not all of them.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cache

import torch
import torchvision
from timm.layers.drop import DropPath
from torch import Tensor, nn

from foldrace.core.errors import Problem, UserError
from foldrace.core.plugin_files import described, place_of
from foldrace.trainables.data.meta_features import meta_width
from foldrace.trainables.models.backbones import Pretrained, build_body
from foldrace.trainables.models.body import Body, drop_final_norm
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.models.stack import Stack, is_stack, members


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


_WHERE = "training.gradient_checkpointing"


def checkpoint_gradients(body: nn.Module, backbone: str) -> None:
    """The same outputs and gradients, with less memory. Raises UserError where a backbone, or a
    stack's member, does not offer it."""
    parts = list(body.members) if isinstance(body, Stack) else [body]
    for part, member in zip(parts, members(backbone), strict=True):
        try:
            part.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:  # timm asserts where it cannot
            raise UserError([_problem(member.backbone)]) from error


def check_gradient_checkpointing(backbone: str) -> Problem | None:
    """A problem where the backbone cannot; one that exists is expected. (Whether it can does not
    depend on the image size.)"""
    for member in members(backbone):
        if not member.backbone.startswith("timm/"):
            return _problem(member.backbone)
    try:
        with torch.device("meta"):
            checkpoint_gradients(build_body(backbone, 224, False, 0.0).module, backbone)
    except UserError as error:
        return error.problems[0]
    except (RuntimeError, NotImplementedError, AssertionError, ValueError):
        return None  # it needs real memory or another size to be built: the trial will tell
    return None


def _problem(backbone: str) -> Problem:
    return Problem(
        _WHERE,
        f"{backbone} does not offer it: torchvision's backbones do not, and most of timm's do; set "
        "it to false, or choose another backbone",
    )


class Classifier(nn.Module):
    """(B, 3, H, W) images in [0, 1] and, where built with them, (B, F) meta features ->
    (B, classes) logits."""

    def __init__(
        self, body: Body, head: nn.Module, meta_width: int, channels_last: bool = True
    ) -> None:
        """`channels_last`: images pass as loaders give them; else they are reordered at once, since
        layers would otherwise reorder their contiguous weights at every call."""
        super().__init__()
        self.normalise = body.normalise
        self.body = body.module
        self.head = head
        self._meta_width, self._channels_last = meta_width, channels_last

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        if not self._channels_last:
            images = images.contiguous()
        features = self.body(self.normalise(images))
        if self._meta_width:
            features = torch.cat([features, self._required(meta)], dim=1)
        return self.head(features)  # type: ignore[no-any-return]

    def _required(self, meta: Tensor | None) -> Tensor:
        if meta is None or meta.shape[1] != self._meta_width:
            got = "none" if meta is None else f"{meta.shape[1]}"
            raise ValueError(f"needs {self._meta_width} meta features an image, got {got}")
        return meta


def build_classifier(
    card: ModelCard,
    *,
    pretrained: Pretrained = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = True,
) -> Classifier:
    """`channels_last`: see `Classifier`. Raises EnvironmentProblem where pretrained weights cannot
    be had, and UserError where the backbone has no gradient checkpointing."""
    body = build_body(card.backbone, card.image_size, pretrained, drop_path)
    if gradient_checkpointing:
        checkpoint_gradients(body.module, card.backbone)
    head = HEADS[card.head]
    if head.norms_features and not is_stack(card.backbone):  # of a stack: members on one scale
        drop_final_norm(body.module)
    width = meta_width(card.meta)
    end = head.build(body.features + width, card.classes, dropout)
    return Classifier(body, end, width, channels_last)


def check_image_size(backbone: str, image_size: int) -> Problem | None:
    """A problem where the backbone, or a stack's member, cannot take images of this size; tried
    without memory."""
    for member in members(backbone):
        size = member.image_size or image_size
        message = refusal(member.backbone, size, size)
        if message is not None:
            by = f"{member.backbone} " if is_stack(backbone) else ""
            where = f"search.backbones: {backbone}"
            return Problem(where, f"{by}refuses {size} px: {message}")
    return None


def refusal(backbone: str, image_size: int, seen: int) -> str | None:
    """What a backbone built for `image_size` says of images of `seen` pixels, where it refuses
    them; tried without memory."""
    try:
        with torch.device("meta"), torch.no_grad():
            model = build_classifier(ModelCard(backbone, 2, image_size)).eval()
            model(torch.zeros(1, 3, seen, seen))
    except NotImplementedError:
        return None  # needs real memory to be built: the trial will tell
    except Exception as error:  # a plugin's backbone may raise anything
        if "meta tensor" in str(error):
            return None
        place = place_of(error)
        if place is not None:
            return f"plugin {place}: {described(error)}"
        if not isinstance(error, (RuntimeError, AssertionError, ValueError)):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def parameter_count(card: ModelCard) -> int:
    """Parameters of the classifier, without allocating them where the backbone allows it."""
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        return _parameters(build_classifier(card))
    return _parameters(build_classifier(card))


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
