"""Validation of what a configuration file holds, and the words for everything that is wrong.

Takes the mapping of a file, gives a `SweepConfig` and the problems that name file, key, value and
what is allowed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from foldrace.config.forms import TAGS, RangeConfig
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem, did_you_mean, plain_name
from foldrace.core.redaction import without_secrets

_SHAPES = {  # in the words of YAML, where pydantic has those of JSON
    "tuple_type": "should be a list: [..., ...]",
    "dict_type": "should be a mapping: {<key>: <value>}",
    "model_type": "should be a mapping: {<key>: <value>}",
    "bool_type": "should be true or false",
    "string_type": "should be text",
}

ELSEWHERE = {
    "augmentation": "augment.policy", "augmentations": "augment.policy",
    "backbone": "search.backbones", "backbones": "search.backbones",
    "batchsize": "search.space.batch_size", "candidates": "search.candidates",
    "cutmix": "search.space.cutmix_alpha and search.space.cutmix_prob",
    "dropout": "search.space.dropout", "droppath": "search.space.drop_path",
    "ema": "search.space.ema_epochs", "emadecay": "search.space.ema_epochs",
    "epochs": "training.epochs", "head": "search.space.head",
    "imagesize": "training.image_size", "labelsmoothing": "search.space.label_smoothing",
    "learningrate": "search.space.lr", "lr": "search.space.lr",
    "mixup": "search.space.mixup_alpha and search.space.mixup_prob",
    "model": "search.backbones", "momentum": "search.space.momentum", "nfolds": "folds.k",
    "ntrials": "search.candidates", "optimizer": "search.space.optimizer",
    "schedule": "search.space.schedule", "scheduler": "search.space.schedule",
    "timebudget": "resources.time_budget", "trials": "search.candidates",
    "warmup": "search.space.warmup",
    "wd": "search.space.weight_decay", "weightdecay": "search.space.weight_decay",
}  # fmt: skip
"""A key that people look for elsewhere -> where it stands."""


def validate(raw: dict[str, Any], source: str) -> tuple[SweepConfig | None, list[Problem]]:
    """The config of a mapping, and the problems of its values.

    Where values are wrong, they are left out, to give later checks a config to work on; None where
    that is not enough. JSON mode: lists become tuples, strings are never numbers.
    """
    try:
        return SweepConfig.model_validate_json(json.dumps(raw, default=str)), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = [_describe(source, detail) for detail in details]
    for _ in range(8):  # a value that went may leave its section incomplete: prune that too
        raw = _pruned(raw, (_keys(detail["loc"]) for detail in details))
        try:
            return SweepConfig.model_validate_json(json.dumps(raw, default=str)), problems
        except ValidationError as error:
            details = error.errors(include_url=False)
    return None, problems


def _keys(loc: Iterable[int | str]) -> tuple[int | str, ...]:
    """An error's location as the user wrote it: without pydantic's union tags."""
    return tuple(part for part in loc if part not in TAGS)


def _describe(source: str, detail: Any) -> Problem:
    loc = _keys(detail["loc"])
    where = f"{source}: {_path(loc)}"
    kind, given = detail["type"], shown(detail.get("input"))
    if loc[:1] == ("notify",):  # it may be a webhook's URL, which is a secret
        given = "a value that is not shown here"
    context = detail.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(where, _unknown_key(loc))
    if kind == "missing":
        return Problem(where, "is missing; this key has no default")
    if kind == "literal_error":
        return Problem(where, f"got {given}; allowed: {context['expected']}")
    if kind == "hyperparameter":
        return Problem(where, context["problem"])
    if kind == "value_error":
        return Problem(where, f"{context['error']} (got {given})")
    expected = _SHAPES.get(kind) or detail["msg"].replace("Input should", "should")
    return Problem(where, f"got {given}; {expected}")


def _path(loc: tuple[int | str, ...]) -> str:
    """('search', 'points', 0, 'backbone') -> 'search.points[0].backbone'."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).removeprefix(".") or "top level"


def _unknown_key(loc: tuple[int | str, ...]) -> str:
    fields = sorted(_model_at(loc[:-1]).model_fields)
    name = str(loc[-1])
    meant = ELSEWHERE.get(plain_name(name))
    is_here = meant is None or meant.rpartition(".")[2] in fields
    hint = did_you_mean(name, fields) if is_here else f"did you mean {meant}? "
    return f"unknown key; {hint}allowed: {', '.join(fields)}"


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


def shown(value: object, limit: int = 80) -> str:
    """A value as a message shows it: as JSON, cut at `limit` characters."""
    if isinstance(value, str):
        value = without_secrets(value)
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pruned(raw: dict[str, Any], locations: Iterable[tuple[int | str, ...]]) -> dict[str, Any]:
    """A copy without the wrong values, so that their defaults stand in."""
    copy: dict[str, Any] = json.loads(json.dumps(raw, default=str))
    for loc in locations:
        target: Any = copy
        for i, part in enumerate(loc):
            inner = target.get(part) if isinstance(target, dict) else None
            if not isinstance(target, dict) or part not in target:
                break
            if i == len(loc) - 1 or not isinstance(inner, dict):
                del target[part]
                break
            target = inner
    return copy
