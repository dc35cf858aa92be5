"""Fuzz targets of configs: YAML and JSON files, `--set`, search spaces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

from benchmarks.sides.fuzz_guard import Box, Call, Target, Wrong
from benchmarks.sides.fuzz_mutations import WORDS, changed, damaged, json_text, nested, value
from foldrace.config.hyperparameters import KNOBS
from foldrace.config.load import parse_config, parse_mapping, to_yaml
from foldrace.config.schema import SweepConfig
from foldrace.search_spaces.space import build_space

_SNIPPETS = (
    "!!bool x", "!!int ''", "!!float ''", "!!timestamp x", "!!set [a]", "!!omap [a]", "!!binary x",
    "!!pairs [a]", "!!null x", "!!python/object/apply:os.system [id]", "!!python/name:os.system ''",
    "&a [*a]", "&a {k: *a}", "*missing", "&a x", "59:" * 3_000 + "59", "190:20:30", "0o777", "0b2",
    "{<<: *a}", "{<<: [x]}", "{<<: {a: 1}}", "{? [a]: 1}", "{? {a: b}: 1}", "{1: 2, '1': 3}", "? x",
    "2001-13-45", "2001-12-14t21:59:43.10-05:00", "0x" + "f" * 4_000, "1" * 5_000, "1_0", "1e9999",
    ".inf", "-.inf", ".nan", "|\n  x\n", ">\n x", "'", '"\\ud800"', '"\\x00"', "@x", "%x", "`x`",
    "--- x\n--- y", "...", "\t- x", "[", "{", "]", "[[[]]]", "!x y", "!<tag:yaml.org,2002:str> x",
    "&l1 [x,x,x,x,x,x,x,x,x], b: &l2 [*l1,*l1,*l1,*l1,*l1,*l1,*l1], c: [*l2,*l2,*l2]",
)  # fmt: skip


def _laughs(rng: random.Random) -> str:
    """Anchors within anchors, up to what would fill all memory."""
    levels, merge = rng.choice((3, 6, 9, 12)), rng.random() < 0.3
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x, x, x]"]
    for i in range(1, levels * (2 if merge else 1)):
        refs = ", ".join([f"*a{i - 1}"] * (2 if merge else 9))
        lines.append(f"a{i}: &a{i} {{<<: [{refs}]}}" if merge else f"a{i}: &a{i} [{refs}]")
    return "\n".join(lines) + "\n"


def yaml_text(rng: random.Random, tree: Any) -> bytes:
    """The tree as YAML text, at times with what no tree has."""
    try:
        text = yaml.safe_dump(tree, allow_unicode=True, sort_keys=False)
    except (yaml.YAMLError, UnicodeError):
        text = "name: x\n"
    kind = rng.randrange(12)
    lines = text.splitlines()
    if kind < 3:
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(": ")
        lines[at] = f"{key}{colon or ': '}{rng.choice(_SNIPPETS)}"
        text = "\n".join(lines) + "\n"
    elif kind == 3:
        lines.insert(rng.randrange(len(lines)), rng.choice(lines))
        text = "\n".join(lines) + "\n"
    elif kind == 4 and rng.random() < 0.3:
        text += _laughs(rng)
    elif kind == 5 and rng.random() < 0.3:
        text = nested(rng, text)
    data = text.encode("utf-8", "surrogatepass")
    if rng.random() < 0.05:
        data = text.encode(rng.choice(("utf-16", "cp949", "utf-8-sig")), "replace")
    return damaged(rng, data) if kind > 8 else data


class ConfigTargets:
    """The targets, over the keys of a sound config."""

    def __init__(self, keys: dict[str, Any], folder: Path) -> None:
        self._keys, self._folder = keys, folder
        self._whole = parse_mapping(keys, "x", folder).require().model_dump(mode="json")
        self._dotted = [
            f"{s}.{k}" for s, v in self._whole.items() if isinstance(v, dict) for k in v
        ]

    def targets(self) -> tuple[Target, ...]:
        return (
            Target("configs", 90, self._config),
            Target("--set", 80, self._set),
            Target("search spaces", 40, self._space),
        )

    def _tree(self, rng: random.Random) -> Any:
        tree = changed(rng, self._whole if rng.random() < 0.4 else self._keys)
        if rng.random() < 0.2 and isinstance(tree, dict):
            tree["smoke"] = changed(rng, {"folds": {"k": 2}, "search": {"candidates": 1}})
        return tree

    def _config(self, rng: random.Random, box: Box) -> Call:
        tree, smoke = self._tree(rng), rng.random() < 0.2
        is_json = rng.random() < 0.4
        data = json_text(rng, tree) if is_json else yaml_text(rng, tree)
        path = box.write("sweep.json" if is_json else "sweep.yaml", data)

        def call() -> None:
            config = parse_config(path, smoke=smoke).require()
            again = box.out / "again.yaml"
            again.write_text(to_yaml(config), encoding="utf-8", errors="surrogateescape")
            if parse_config(again).require() != config:
                raise Wrong("a config is not read as it was written")

        return call

    def _set(self, rng: random.Random, box: Box) -> Call:
        overrides = []
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice((*self._dotted, rng.choice(WORDS), "search.space.lr", "folds", "name"))
            text = rng.choice((*_SNIPPETS, *WORDS, str(value(rng)), "1", "0.5", "auto", "null"))
            if rng.random() < 0.02:
                text = nested(rng, "0")
            overrides.append(f"{key}={text}" if rng.random() < 0.97 else f"{key}{text}")
        return lambda: parse_mapping(dict(self._keys), "x", self._folder, overrides).require()

    def _space(self, rng: random.Random, box: Box) -> Call:
        names = rng.sample(list(KNOBS), 4)
        forms = (
            "search", {"low": 1e-4, "high": 1e-2}, {"choices": [1, 2]}, {"low": 1, "high": 8},
            {"low": 0.0, "high": 1.0, "log": True}, {"choices": [True, False]}, 0.1, 1, "cosine",
        )  # fmt: skip
        space = {name: rng.choice(forms) for name in names}
        keys = dict(self._keys)
        backbones = list(keys["search"]["backbones"])
        keys["search"] = dict(keys["search"]) | {
            "space": changed(rng, space, rng.choice((0, 1, 2))),
            "per_backbone": changed(rng, {backbones[0]: dict(list(space.items())[:1])}, 1),
        }
        rows = rng.choice((None, 1, 12, 10**6))

        def call() -> None:
            config: SweepConfig = parse_mapping(keys, "x", self._folder).require()
            found, problems = build_space(config, "x", rows)
            for backbone in found.backbones:
                found.heaviest(backbone)
                default = found.default(backbone)
                found.distributions(backbone)
                for setting in found.settings[backbone].values():
                    _ = setting.values
                place = found.encode(backbone, default)
                if not problems and place is not None and found.decode(backbone, place) != default:
                    raise Wrong(f"{place} is not the default")

        return call
