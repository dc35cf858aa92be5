"""The only reader of configuration files.

Takes a YAML or JSON file and `--set` overrides, gives a `SweepConfig` with absolute paths, or every
problem at once; writes a resolved config back as YAML.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foldrace.config.forms import SEARCH, RangeConfig
from foldrace.config.problems import shown, validate
from foldrace.config.schema import SMOKE, SweepConfig
from foldrace.config.texts import MOST_BYTES, load_json, load_yaml, yaml_text
from foldrace.core.errors import ConfigError, Problem, cause
from foldrace.core.opening import read_regular, unreadable
from foldrace.core.redaction import without_secrets


@dataclass(frozen=True)
class ParsedConfig:
    """A config file as read, with its problems."""

    source: str
    config: SweepConfig | None
    """Config with defaults in place of wrong values, for later checks; None where a required part
    is wrong."""
    problems: tuple[Problem, ...]

    def require(self) -> SweepConfig:
        """The config, or a ConfigError with every problem."""
        if self.problems or self.config is None:
            raise ConfigError(self.problems)
        return self.config


_SMOKE_DEFAULTS: dict[str, Any] = {
    "data": {"max_per_class": 8},
    "folds": {"k": 2},
    "search": {
        "candidates": 2,
        "per_backbone": {},
        "sampler": "tpe",
        "points": [],
        "warm_start": [],
        "storage": None,
    },
    "training": {"epochs": 1, "image_size": 32, "precision": "auto", "pretrained": False},
    "resources": {"cpus_per_trial": 1, "gpus_per_trial": None},
}
_SHOWN = 200  # characters of an override in a message
_NOT_IN_SMOKE = (
    "epochs", "image_size", "freeze_epochs", "unfreeze_epochs", "cycles", "snapshots", "precision",
    "pretrained",
)  # fmt: skip
"""Hyperparameters that only make sense at the config's own length and size, or on its devices."""


def parse_config(
    path: Path, overrides: Sequence[str] = (), smoke: bool = False, base: Path | None = None
) -> ParsedConfig:
    """Read `path` (YAML or JSON), lay smoke section and `key=value` overrides over it, validate.

    Relative paths are relative to `base`, by default the folder of `path`. Raises ConfigError only
    where there is nothing to validate.
    """
    raw = {"name": path.stem} | _read_mapping(path)
    return parse_mapping(raw, str(path), base or path.absolute().parent, overrides, smoke)


def parse_mapping(
    raw: dict[str, Any],
    source: str,
    base: Path,
    overrides: Sequence[str] = (),
    smoke: bool = False,
) -> ParsedConfig:
    """`parse_config` for keys that stand in no file; messages call them `source`."""
    raw, problems = _overridden(_smoke(raw) if smoke else raw, overrides)
    if smoke and isinstance(raw.get("name"), str):
        raw["name"] += SMOKE
    config, found = validate(raw, source)
    if config is not None:
        config = _absolute_paths(config, base)
    return ParsedConfig(source, config, (*problems, *found))


def override_keys(overrides: Sequence[str]) -> dict[str, Any]:
    """The keys that `key=value` overrides set, by section; those that cannot be read are left out.

    `parse_config` of the same overrides tells what is wrong with them.
    """
    return _overridden({}, overrides)[0]


def _overridden(
    raw: Mapping[str, Any], overrides: Sequence[str]
) -> tuple[dict[str, Any], list[Problem]]:
    """A copy with the overrides, and the problems of those that cannot be read."""
    changed = dict(raw)
    problems = (_apply_override(changed, override) for override in overrides)
    return changed, [problem for problem in problems if problem is not None]


def to_yaml(config: SweepConfig) -> str:
    """The resolved config as YAML; `parse_config` of it gives the same config."""
    return yaml_text(config.model_dump(mode="json"))


def to_public_yaml(config: SweepConfig) -> str:
    """The resolved config without secrets: for reports, which are shown to others."""
    return yaml_text(_without_secrets(config.model_dump(mode="json")))


def differing_keys(old: SweepConfig, new: SweepConfig) -> list[str]:
    """Dotted keys in which two configs differ, sorted."""
    left, right = dotted(old), dotted(new)
    return sorted(k for k in left.keys() | right.keys() if left.get(k) != right.get(k))


def dotted(config: SweepConfig) -> dict[str, Any]:
    """Dotted key -> its value as JSON has it: `{"folds.k": 5, ...}`."""
    return _flat(config.model_dump(mode="json"))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _without_secrets(tree: object) -> object:
    match tree:
        case dict():
            return {key: _without_secrets(value) for key, value in tree.items()}
        case list():
            return [_without_secrets(value) for value in tree]
        case str():
            return without_secrets(tree)
        case _:
            return tree


def _read_mapping(path: Path) -> dict[str, Any]:
    if path.is_dir():
        advice = "`foldrace init` writes a config for the images in one"
        raise ConfigError.single(str(path), f"is a folder, no config; {advice}")
    try:
        text = read_regular(path, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError.single(str(path), unreadable(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError.single(str(path), f"cannot be read: {cause(error)}") from error
    form = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        raw = load_json(text) if form == "JSON" else load_yaml(text)
    except ValueError as error:
        tab = r"'\t' that cannot start any token" in str(error)
        advice = "use spaces, not tabs: " if tab else ""
        raise ConfigError.single(str(path), f"is not valid {form}: {advice}{error}") from error
    if not isinstance(raw, dict):
        fault = "is empty" if raw is None else f"holds no keys, only {shown(raw)}"
        raise ConfigError.single(str(path), f"{fault}; it should hold data:, search: and so on")
    return raw


def _smoke(raw: dict[str, Any]) -> dict[str, Any]:
    """The config with generic small values and its own smoke section laid over it.

    The techniques of its search space stay on: they are what a smoke run tries.
    """
    defaults, own = dict(_SMOKE_DEFAULTS), raw.get("smoke")
    folds = raw.get("folds")
    if isinstance(folds, dict) and (folds.get("column") is not None or folds.get("k") == 1):
        del defaults["folds"]  # the column says how many folds there are; a fixed split stays one
    elif isinstance(folds, dict) and folds.get("repeats", 1) != 1:
        defaults["folds"] = {"k": 2, "repeats": _few(folds["repeats"])}
    # A smoke section that is no mapping is left to the validation.
    return _merge(_merge(_without_length(raw), defaults), own if isinstance(own, dict) else {})


def _few(repeats: object) -> object:
    """Two of several repeats; a wrong value is left to the validation."""
    return min(repeats, 2) if isinstance(repeats, int) else repeats


def _without_length(raw: dict[str, Any]) -> dict[str, Any]:
    """The config without `_NOT_IN_SMOKE`, wherever they are fixed or searched."""
    found = dict(raw)
    if isinstance(raw.get("training"), dict):
        found["training"] = _others(raw["training"])
    search = raw.get("search")
    if isinstance(search, dict) and isinstance(search.get("space"), dict):
        found["search"] = search | {"space": _others(search["space"])}
    return found


def _others(given: dict[str, Any]) -> dict[str, Any]:
    return {name: form for name, form in given.items() if name not in _NOT_IN_SMOKE}


def _merge(base: Mapping[str, Any], over: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    """`base` with `over` laid over it, key by key.

    The range of a hyperparameter and `per_backbone` are replaced whole.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        whole = within == "space" or key == "per_backbone"
        if isinstance(old, dict) and isinstance(value, dict) and not whole:
            value = _merge(old, value, key)
        merged[key] = value
    return merged


def _apply_override(raw: dict[str, Any], override: str) -> Problem | None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    where = f"--set {override if len(override) <= _SHOWN else override[:_SHOWN] + '…'}"
    if not equals or not all(parts):
        return Problem(where, "should look like search.candidates=80")
    try:
        value = load_yaml(text)
    except ValueError as error:
        return Problem(where, f"the value is not valid YAML: {error}")
    target = raw
    for part in parts[:-1]:
        child = target.get(part)
        child = dict(child) if isinstance(child, dict) else {}
        target[part] = child
        target = child
    target[parts[-1]] = value
    return None


def _absolute_paths(config: SweepConfig, base: Path) -> SweepConfig:
    data = config.data
    absolute = {key: _absolute(path, base) for key, path in data.places.items()}
    update: dict[str, Any] = {
        "data": data.model_copy(update=absolute),
        "plugins": tuple(_absolute(path, base) for path in config.plugins),
    }
    search = config.search
    runs = tuple(r if "://" in r else _absolute(r, base) for r in search.warm_start)
    own = {name: _absolute_weights(forms, base) for name, forms in search.per_backbone.items()}
    points = tuple(
        p.model_copy(update={"params": _absolute_weights(p.params, base)}) for p in search.points
    )
    space = _absolute_weights(search.space, base)
    update["search"] = search.model_copy(
        update={"warm_start": runs, "space": space, "per_backbone": own, "points": points}
    )
    pretrained = {"pretrained": _absolute_path(config.training.pretrained, base)}
    update["training"] = config.training.model_copy(update=pretrained)
    return config.model_copy(update=update)


def _absolute_weights(forms: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """The hyperparameters with absolute paths of pretrained weights."""
    found = dict(forms)
    form = found.get("pretrained")
    if isinstance(form, RangeConfig) and form.choices is not None:
        choices = tuple(_absolute_path(choice, base) for choice in form.choices)
        found["pretrained"] = form.model_copy(update={"choices": choices})
    elif form is not None and form != SEARCH:
        found["pretrained"] = _absolute_path(form, base)
    return found


def _absolute_path(value: Any, base: Path) -> Any:
    """The absolute path where the value is one: no switch and no range."""
    return _absolute(value, base) if isinstance(value, str) else value


def _absolute(path: str, base: Path) -> str:
    """The absolute path; symbolic links stay, since their targets may have other names."""
    return os.path.abspath(base / os.path.expanduser(path))
