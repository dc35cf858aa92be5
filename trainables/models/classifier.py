"""The whole classifier: backbone, meta features where there are some, head.

Takes a `ModelConfig`, which a weights file carries as JSON in its header, gives a module from
images in [0, 1] to logits; tells beforehand what a backbone refuses, whether it has stochastic
depth or gradient checkpointing, and how large it is, without its memory.
"""

from __future__ import annotations

import contextlib
import json
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from functools import cache

import torch
import torchvision
from timm.layers.drop import DropPath
from torch import Tensor, nn

from foldrace.config.hyperparameters import KNOBS, TrialParams
from foldrace.core.errors import Problem, UserError
from foldrace.core.plugin_files import error_line, place_of
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.run_folder.records import CandidateRecord, TrialRecord
from foldrace.trainables.data.meta_features import meta_width
from foldrace.trainables.losses import LOSSES
from foldrace.trainables.models.backbones import Pretrained, build_encoder
from foldrace.trainables.models.encoder import Encoder, drop_final_norm
from foldrace.trainables.models.heads import HEADS
from foldrace.trainables.models.stack import Stack, is_stack, members


@dataclass(frozen=True)
class ModelConfig:
    """A classifier's architecture, without what only training needs (dropout, stochastic depth)."""

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
    resize: str = "squash"
    """How an image becomes square: a value of `training.resize`."""


def trial_model_config(
    record: CandidateRecord | TrialRecord,
    classes: int,
    meta: tuple[str, ...],
    parts: Parts = NO_PARTS,
) -> ModelConfig:
    """The config of a candidate's classifier, by its own record or one of its trials."""
    known = {name: value for name, value in record.params.items() if name in KNOBS}
    params = TrialParams.from_dict(known)  # a newer version's have no part in the model
    activation = parts[LOSSES][params.loss].activation
    return ModelConfig(
        record.backbone, classes, params.image_size, params.head, meta, activation, params.resize
    )


def config_to_json(config: ModelConfig) -> str:
    """The text in the header of a weights file."""
    return json.dumps(asdict(config))


def config_from_json(text: str) -> ModelConfig:
    """The config that a text holds, also one of another version.

    What the text lacks has its default, what is not known is left out. Raises ValueError, KeyError
    or TypeError for anything that is no config.
    """
    given = json.loads(text)
    known = {field.name: given[field.name] for field in fields(ModelConfig) if field.name in given}
    return ModelConfig(**known | {"meta": tuple(known.get("meta", ()))})


_PIXELS = 224  # whether there are such blocks does not depend on it


@cache
def drops_paths(backbone: str, parts: Parts = NO_PARTS) -> bool:
    """True where `drop_path` does something to the backbone.

    Also where that cannot be told: the backbone needs memory, or another size.
    """
    try:
        with torch.device("meta"):
            module = build_encoder(backbone, _PIXELS, False, 0.5, parts).module
    except Exception:  # whatever its constructor raises: the checks of backbones tell
        return True
    kinds = (DropPath, torchvision.ops.StochasticDepth)
    return any(isinstance(block, kinds) for block in module.modules())


_WHERE = "training.gradient_checkpointing"


def checkpoint_gradients(module: nn.Module, backbone: str) -> None:
    """Switch on gradient checkpointing: less memory for about a third more time.

    Activations are computed anew in the backward pass instead of kept. Raises UserError where a
    backbone, or a stack's member, does not offer it; only timm's do, and not all of them. Chen et
    al., Training Deep Nets with Sublinear Memory Cost, 2016.
    """
    modules = list(module.members) if isinstance(module, Stack) else [module]
    for part, member in zip(modules, members(backbone), strict=True):
        try:
            part.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError) as error:  # timm asserts where it cannot
            raise UserError([_problem(member.backbone)]) from error


def check_gradient_checkpointing(backbone: str, parts: Parts = NO_PARTS) -> Problem | None:
    """A problem where the backbone has no gradient checkpointing; it must be one that exists."""
    for member in members(backbone):
        if not member.backbone.startswith("timm/"):
            return _problem(member.backbone)
    try:
        with torch.device("meta"):
            encoder = build_encoder(backbone, _PIXELS, False, 0.0, parts)
            checkpoint_gradients(encoder.module, backbone)
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
    """A module from images to logits.

    (B, 3, H, W) images in [0, 1] and, where built with them, (B, F) meta features -> (B, classes)
    logits. The encoder's attribute is `body`: weights files have that name in their keys.
    """

    def __init__(
        self, encoder: Encoder, head: nn.Module, meta_width: int, channels_last: bool = True
    ) -> None:
        """`channels_last`: images pass as loaders give them; else they are reordered at once.

        Layers would otherwise reorder their contiguous weights at every call.
        """
        super().__init__()
        self.normalise = encoder.normalise
        self.body = encoder.module
        self.head = head
        self.meta_width, self._channels_last = meta_width, channels_last

    def forward(self, images: Tensor, meta: Tensor | None = None) -> Tensor:
        """(B, classes) logits, in float32 at least."""
        if not self._channels_last:
            images = images.contiguous()
        features = self.body(self.normalise(images))
        if self.meta_width:
            features = torch.cat([features, self._required(meta)], dim=1)
        # In mixed precision too: a logit of bfloat16 has 8 bits, and log loss is made of them.
        with _full_precision(features.device.type):
            wide = torch.promote_types(features.dtype, torch.float32)
            return self.head(features.to(wide))  # type: ignore[no-any-return]

    def _required(self, meta: Tensor | None) -> Tensor:
        if meta is None or meta.shape[1] != self.meta_width:
            got = "none" if meta is None else f"{meta.shape[1]}"
            raise ValueError(f"needs {self.meta_width} meta features an image, got {got}")
        return meta


def _full_precision(device_type: str) -> AbstractContextManager[object]:
    """A context without autocast; nothing for devices that have none, such as `meta`."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def build_classifier(
    config: ModelConfig,
    *,
    pretrained: Pretrained = False,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    gradient_checkpointing: bool = False,
    channels_last: bool = True,
    parts: Parts = NO_PARTS,
) -> Classifier:
    """The classifier of a config, in training mode; `channels_last`: see `Classifier`.

    Raises EnvironmentProblem where pretrained weights cannot be had, and UserError where the
    backbone has no gradient checkpointing.
    """
    encoder = build_encoder(config.backbone, config.image_size, pretrained, drop_path, parts)
    if gradient_checkpointing:
        checkpoint_gradients(encoder.module, config.backbone)
    head = parts[HEADS][config.head]
    if head.norms_features and not is_stack(config.backbone):  # of a stack: members on one scale
        drop_final_norm(encoder.module)
    width = meta_width(config.meta, parts)
    end = head.build(encoder.features + width, config.classes, dropout)
    return Classifier(encoder, end, width, channels_last)


def check_image_size(backbone: str, image_size: int, parts: Parts = NO_PARTS) -> Problem | None:
    """A problem where the backbone, or a stack's member, cannot take images of this size.

    Tried without memory.
    """
    for member in members(backbone):
        size = member.image_size or image_size
        message = refusal(member.backbone, size, size, parts)
        if message is not None:
            by = f"{member.backbone} " if is_stack(backbone) else ""
            where = f"search.backbones: {backbone}"
            return Problem(where, f"{by}refuses {size} px: {message}")
    return None


@cache
def refusal(backbone: str, image_size: int, seen: int, parts: Parts = NO_PARTS) -> str | None:
    """The reason why a backbone built for `image_size` refuses images of `seen` pixels, or None.

    Tried without memory.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            model = build_classifier(ModelConfig(backbone, 2, image_size), parts=parts).eval()
            model(torch.zeros(1, 3, seen, seen))
    except NotImplementedError:
        return None  # needs real memory to be built: the trial will tell
    except Exception as error:  # a plugin's backbone may raise anything
        if "meta tensor" in str(error):
            return None
        place = place_of(error)
        if place is not None:
            return f"plugin {place}: {error_line(error)}"
        if not isinstance(error, (RuntimeError, AssertionError, ValueError)):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def parameter_count(config: ModelConfig, parts: Parts = NO_PARTS) -> int:
    """Number of parameters, found without allocating them where the backbone allows it."""
    with contextlib.suppress(RuntimeError, NotImplementedError), torch.device("meta"):
        return _parameters(build_classifier(config, parts=parts))
    return _parameters(build_classifier(config, parts=parts))


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
