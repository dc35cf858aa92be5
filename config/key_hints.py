"""What an unknown key of the config was meant to be, wherever that key stands.

Takes the key's name and where it was given, gives the words of a hint.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import get_args

from pydantic import BaseModel

from foldrace.config.forms import RangeConfig
from foldrace.config.hyperparameters import KNOBS
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import listing
from foldrace.core.synonyms import did_you_mean, meant, plain_name

_NO_EARLY_STOPPING = (
    "no trial stops early by itself: all folds of a candidate keep the last epoch, and the race "
    "sets poor candidates aside; "
)
_TRACKERS = "there is no key for a tracker; "
MISSING = {
    "device": "where there are GPUs they are used (resources.gpus_per_trial: 0: the CPU alone); ",
    "earlystopping": _NO_EARLY_STOPPING,
    "logger": _TRACKERS,
    "longerside": "stored images are bounded by their shorter side: set cache.shorter_side; ",
    "mlflow": _TRACKERS,
    "out": "the run folder is named by the option --out; ",
    "output": "the run folder is named by the option --out; ",
    "outputdir": "the run folder is named by the option --out; ",
    "patience": _NO_EARLY_STOPPING,
    "stratify": "folds are always stratified; ",
    "stratified": "folds are always stratified; ",
    "tensorboard": _TRACKERS,
    "tta": "images are turned at prediction only, by the option --tta of predict and submit; ",
    "wandb": _TRACKERS,
}
"""Name that there is nothing for -> why."""


_MOST = 20


def unknown_key(loc: Sequence[int | str]) -> str:
    """The problem of a key at its location in the config, with what is allowed there."""
    return unknown_name("key", str(loc[-1]), sorted(_model_at(loc[:-1]).model_fields))


def unknown_name(kind: str, name: str, allowed: Collection[str]) -> str:
    """The problem of a name: what it was meant to be, else all that are allowed there.

    That may be one of these, other tools' word for one of these or for a key elsewhere, or
    something that there is nothing for.
    """
    hint = _hint(name, allowed)
    return f"unknown {kind}; {hint}allowed: {listing(allowed, _MOST if hint else len(allowed))}"


def _hint(name: str, allowed: Collection[str]) -> str:
    if plain_name(name) in MISSING:
        return MISSING[plain_name(name)]
    if not meant(name, allowed):
        places = _places()
        keys = meant(name, places)
        if keys:
            return f"did you mean {' and '.join(' or '.join(places[key]) for key in keys)}? "
    return did_you_mean(name, allowed)


def _places() -> dict[str, list[str]]:
    """Each key and where it stands; a hyperparameter in the search space."""
    found: dict[str, list[str]] = {}
    for section in SweepConfig.model_fields:
        model = _model_at((section,))
        for key in model.model_fields if model is not SweepConfig else ():
            if key not in KNOBS or key in _NOT_SEARCHED:
                found.setdefault(key, []).append(f"{section}.{key}")
    return found | {name: [f"search.space.{name}"] for name in KNOBS if name not in _NOT_SEARCHED}


_NOT_SEARCHED = ("epochs", "image_size", "precision", "pretrained", "policy")
"""Hyperparameters that people look for to set them to one value."""


def _model_at(loc: Iterable[int | str]) -> type[BaseModel]:
    model: type[BaseModel] = SweepConfig
    for part in loc:
        field = model.model_fields.get(str(part))
        if field is None:
            return RangeConfig  # below search.space and search.per_backbone
        options = (field.annotation, *get_args(field.annotation))
        model = next((o for o in options if _is_model(o)), model)
    return model


def _is_model(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
