"""Every hyperparameter, once: name, type, default, limits, default search range, unit, meaning.

`TrialParams` is what a trial trains with; `KNOBS` is the same list as a table, for the search
space, the documentation and the error messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from search_spaces.ranges import Float, Int, Range


@dataclass(frozen=True)
class Knob:
    """One hyperparameter. `limits` is what anybody may ask for, `search` what is varied by
    default; a knob without `search` keeps its default unless the config varies it."""

    name: str
    default: float
    limits: Float | Int
    search: Range | None
    unit: str
    doc: str

    @property
    def whole(self) -> bool:
        """True where only whole numbers make sense."""
        return isinstance(self.limits, Int)


def _knob(default: float, limits: Float | Int, search: Range | None, unit: str, doc: str) -> Any:
    record = {"limits": limits, "search": search, "unit": unit, "doc": doc}
    return field(default=default, metadata=record)


@dataclass(frozen=True)
class TrialParams:
    """The hyperparameters of one candidate."""

    lr: float = _knob(
        1e-3, Float(1e-7, 1.0), Float(1e-4, 5e-3, log=True), "per update",
        "peak learning rate of AdamW",
    )  # fmt: skip
    weight_decay: float = _knob(
        0.02, Float(0.0, 1.0), Float(1e-3, 0.2, log=True), "per update",
        "decoupled weight decay; biases and norms have none",
    )  # fmt: skip
    warmup: float = _knob(
        0.1, Float(0.0, 0.9), Float(0.0, 0.3), "fraction of all updates",
        "linear learning-rate warm-up before the cosine",
    )  # fmt: skip
    batch_size: int = _knob(
        32, Int(1, 65_536), None, "images per update",
        "effective batch size, whatever the micro-batch",
    )  # fmt: skip
    dropout: float = _knob(
        0.1, Float(0.0, 0.95), Float(0.0, 0.5), "probability",
        "dropout in front of the classifier",
    )  # fmt: skip
    drop_path: float = _knob(
        0.0, Float(0.0, 0.9), Float(0.0, 0.2), "probability",
        "stochastic depth of the last block, rising linearly; backbones without it ignore this",
    )  # fmt: skip
    mixup_alpha: float = _knob(
        0.2, Float(0.0, 10.0), Float(0.1, 1.0), "of Beta(alpha, alpha)",
        "MixUp strength; 0 turns it off",
    )  # fmt: skip
    mixup_prob: float = _knob(
        0.5, Float(0.0, 1.0), Float(0.0, 1.0), "probability per batch",
        "how often a batch is mixed",
    )  # fmt: skip
    label_smoothing: float = _knob(
        0.0, Float(0.0, 0.9), Float(0.0, 0.1), "probability mass",
        "mass moved from the true class to all classes evenly",
    )  # fmt: skip
    ema_decay: float = _knob(
        0.99, Float(0.0, 0.999999), None, "per update",
        "decay of the weight average, warmed up; 0 turns the EMA variant off",
    )  # fmt: skip
    image_size: int = _knob(
        224, Int(16, 2048), None, "pixels",
        "side of the square image that the model sees",
    )  # fmt: skip
    epochs: int = _knob(
        30, Int(1, 10_000), None, "passes over the training folds",
        "length of the learning-rate schedule",
    )  # fmt: skip

    def as_dict(self) -> dict[str, float]:
        """Knob name -> value, in the order of the fields."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, float]) -> TrialParams:
        """From knob name -> value; knobs that are not given take their defaults."""
        cast = {n: int(v) if KNOBS[n].whole else float(v) for n, v in values.items()}
        return cls(**cast)  # type: ignore[arg-type]  # cast holds an int for each whole knob


KNOBS: dict[str, Knob] = {
    f.name: Knob(name=f.name, default=f.default, **f.metadata)  # type: ignore[arg-type]
    for f in fields(TrialParams)
}
