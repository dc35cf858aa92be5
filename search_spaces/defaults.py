"""Where a hyperparameter starts and is searched if the config does not say: by what is trained.

Takes a `Situation` (weights, kind of backbone, length), gives default and range of each
hyperparameter that depends on it. The evidence is in docs/defaults.md.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from foldrace.config.hyperparameters import KNOBS
from foldrace.config.ranges import Float, Range, Value

Family = Literal["cnn", "hybrid", "transformer"]
Start = Literal["scratch", "pretrained"]

_HYBRID = re.compile(
    r"coat|convit|maxvit|maxxvit|mobilevit|levit|efficientformer|efficientvit|edgenext|fastvit"
    r"|tiny_vit|poolformer|caformer|convformer|nextvit|gcvit|mvit|hybrid|vitamin"
    r"|convnext|mambaout|focalnet|inception_next|hornet|metanext|starnet"
)
_TRANSFORMER = re.compile(
    r"vit|deit|beit|eva|swin|cait|xcit|(^|_)pit_|tnt_|volo|twins|pvt|hiera|nest_|mixer|resmlp|gmlp"
)
USUAL_BATCH = 32
"""Images an update that the usual rates are for."""
SHORT = 300
"""Updates below which MixUp and CutMix are not tried: a mixed batch teaches more slowly."""
_USUAL_UPDATES = 1000  # that the rates from pretrained weights are for


def family(backbone: str) -> Family:
    """The kind of a backbone, by its name.

    ConvNeXt and its like count as hybrids: convolutions that are trained like a transformer.
    """
    name = backbone.rpartition("/")[2].lower()
    if _HYBRID.search(name):
        return "hybrid"
    return "transformer" if _TRANSFORMER.search(name) else "cnn"


@dataclass(frozen=True)
class Situation:
    """What the candidates of one backbone have in common."""

    family: Family
    pretrained: bool
    optimizer: str = "adamw"
    batch_size: int | None = USUAL_BATCH
    """Images an update; None: it is searched, and the rate follows it."""
    updates: int | None = None
    """Optimiser steps of a fold trial; None: not known."""

    @property
    def name(self) -> str:
        """Text that tells situations with unlike ranges apart."""
        return f"{self.family} {self.start} {self.lr:g}"

    @property
    def start(self) -> Start:
        """What the training begins with."""
        return "pretrained" if self.pretrained else "scratch"

    @property
    def lr(self) -> float:
        """The usual peak learning rate, to two digits.

        From scratch: small networks want a high one. From pretrained weights by 1 / updates, so
        that Adam's steps, each about as long as the rate, together go as far: published fine-tuning
        has 2e-5 to 1e-4 for thousands of updates, 120 updates want 3e-3. Adam's rate goes by the
        square root of the batch (Malladi et al., NeurIPS 2022), SGD's by the batch (Goyal et al.,
        2017).
        """
        rate = _RATES[self.pretrained, self.family]
        if self.pretrained and self.updates is not None:
            rate *= min(max(_USUAL_UPDATES / max(self.updates, 1), 0.5), 8.0)
        relative = (self.batch_size or USUAL_BATCH) / USUAL_BATCH
        sgd = self.optimizer == "sgd"
        return _rounded(rate * (_SGD * relative if sgd else math.sqrt(relative)))


_RATES: dict[tuple[bool, Family], float] = {
    (False, "cnn"): 8e-3,
    (False, "hybrid"): 2e-3,
    (False, "transformer"): 1e-3,
    (True, "cnn"): 4e-4,
    (True, "hybrid"): 1e-4,
    (True, "transformer"): 5e-5,
}
_LAYERS: dict[Family, tuple[float, float]] = {  # layer_decay, head_lr from pretrained weights
    "cnn": (1.0, 1.0),
    "hybrid": (0.9, 3.0),
    "transformer": (0.9, 3.0),
}
_SGD = 20.0  # its rate relative to AdamW's
_BELOW, _ABOVE = 8.0, 5.0  # the range of the rate: its usual value divided and multiplied by these


def by_situation(given: Situation) -> dict[str, tuple[Value, Range | None]]:
    """Hyperparameter -> default, and range of the search or None; those that depend on it."""
    lr = given.lr
    found: dict[str, tuple[Value, Range | None]] = {
        "lr": (lr, Float(_rounded(lr / _BELOW), _rounded(lr * _ABOVE), log=True)),
        "mixup_prob": (0.0, KNOBS["mixup_prob"].search),
        "layer_decay": (1.0, None),
        "head_lr": (1.0, None),
        "lr_batch": (0 if given.batch_size else USUAL_BATCH, None),
    }
    if given.pretrained:
        layer_decay, head_lr = _LAYERS[given.family]
        found |= {
            "layer_decay": (layer_decay, Float(0.6, 1.0)),
            "head_lr": (head_lr, KNOBS["head_lr"].search),
        }
    if given.updates is not None and given.updates < SHORT:
        found |= {"mixup_prob": (0.0, None), "cutmix_prob": (0.0, None)}
    return found


def _rounded(value: float) -> float:
    return float(f"{value:.2g}")
