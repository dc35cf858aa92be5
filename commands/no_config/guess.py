"""A config for data that nobody has written one for: `run FOLDER`, `check FOLDER`, `init FOLDER`.

Takes a folder, a zip or a table and the keys that the user has set, gives the config as keys and
as parsed, with lines that say what was chosen and why.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from foldrace.commands.no_config.guess_length import Basis, keys_of, spread, with_length
from foldrace.config.forms import SEARCH
from foldrace.config.load import ParsedConfig, override_keys, parse_config, parse_mapping
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import EnvironmentProblem, Problem, listing
from foldrace.core.plugins import check_plugins
from foldrace.dataset.guess import guess_data, is_data
from foldrace.dataset.images import pixel_size
from foldrace.dataset.manifest import Manifest, scan_manifest
from foldrace.reporting.formats import counted
from foldrace.scheduling.nodes import Node, this_machine
from foldrace.search_spaces.backbone_choice import BackboneChoice, Device, choose_backbones
from foldrace.trainables.models.hub import weights_at_hand

_SIZES = 200  # images whose size is asked
_CPUS_PER_GPU = 8  # that load and augment for one
_RECTANGULAR = 1.2  # from this median aspect on, how an image becomes a square is searched


@dataclass(frozen=True)
class SweepGuess:
    """A guessed config."""

    keys: Mapping[str, Any]
    """The keys that were chosen or given, by section."""
    parsed: ParsedConfig
    lines: tuple[str, ...]
    """What was taken for what, and what the sweep is expected to cost."""
    problems: tuple[Problem, ...] = ()
    """Problems of the training data, which the checks before a run tell, too."""


def parse_source(
    source: Path,
    overrides: Sequence[str],
    console: Console,
    smoke: bool = False,
    nodes: list[Node] | None = None,
    started: float | None = None,
) -> ParsedConfig:
    """Parse a config, or guess one for data and print what was chosen.

    `nodes`: those of the cluster, by default this machine; `started`: when the command did, by
    `time.monotonic`.
    """
    if not is_data(source):
        return parse_config(source, overrides, smoke)
    guess = guess_sweep(source, overrides, smoke, nodes, started)
    for line in guess.lines:
        console.print(line)
    return guess.parsed


def run_name(source: Path, overrides: Sequence[str]) -> str:
    """Name of the run of a folder, zip or table, unless the user gives one."""
    given = override_keys(overrides).get("name")
    if isinstance(given, str):
        return given
    path = source.resolve()
    return path.name if path.is_dir() else path.stem


def guess_sweep(
    source: Path,
    overrides: Sequence[str],
    smoke: bool = False,
    nodes: list[Node] | None = None,
    started: float | None = None,
) -> SweepGuess:
    """The config for a folder, zip or table; DataError where the data has several readings.

    Where other things are wrong with data or overrides, no speed is measured, and the problems are
    left to the checks.
    """
    started = time.monotonic() if started is None else started
    given = override_keys(overrides)
    column = keys_of(given, "folds")
    fold = {"fold_column": column["column"]} if "column" in column else {}
    found = guess_data(source, keys_of(given, "data") | fold)
    keys: dict[str, Any] = {
        "name": run_name(source, overrides),
        "data": found.data,
        "folds": found.folds,
        "search": {"backbones": ["timm/test_resnet"]},
    }
    parsed = _parse(keys, source, overrides, smoke)
    if parsed.problems or parsed.config is None:
        return SweepGuess(keys, parsed, tuple(found.notes))
    manifest, problems = scan_manifest(parsed.config.data, parsed.config.folds.column)
    if manifest is None or problems:
        return SweepGuess(keys, parsed, tuple(found.notes), tuple(problems))
    side, aspect = _shape(manifest)
    basis = Basis(given, parsed.config, manifest, side, aspect, nodes or this_machine())
    lines = [*found.notes, _data_line(basis)]
    keys = _with_backbones(keys, basis, smoke, lines)
    parsed = _parse(keys, source, overrides, smoke)
    if parsed.config is not None and not parsed.problems and not smoke:
        basis = replace(basis, config=parsed.config)
        keys = with_length(keys, found, basis, started, lines)
        parsed = _parse(keys, source, overrides, smoke)
    return SweepGuess(_laid_over(keys, given), parsed, tuple(lines))


def _parse(
    keys: dict[str, Any], source: Path, overrides: Sequence[str], smoke: bool
) -> ParsedConfig:
    return parse_mapping(keys, str(source), Path.cwd(), overrides, smoke)


def _with_backbones(
    keys: dict[str, Any], basis: Basis, smoke: bool, lines: list[str]
) -> dict[str, Any]:
    """The keys with image size, backbones, weights and cores of a trial."""
    search, training = basis.config.search, basis.config.training
    pretrained: bool | str = training.pretrained
    own = search.backbones if basis.sets("search", "backbones") else None
    if not basis.sets("training", "pretrained"):
        wanted = own or _choice(basis, pretrained=True).backbones
        pretrained = not smoke and weights_at_hand(wanted)
        if not pretrained and not smoke:
            lines.append(
                "from scratch: pretrained weights are in no cache here, and no hub answers "
                "(--set training.pretrained=FOLDER takes files of yours)"
            )
    choice = _choice(basis, bool(pretrained))
    backbones = own or choice.backbones
    if isinstance(pretrained, str) and own is None:
        backbones = _stored_backbones(pretrained, basis.config)
    training_keys = {"pretrained": pretrained, "image_size": choice.image_size}
    searched: dict[str, Any] = {"backbones": list(backbones)}
    if basis.aspect >= _RECTANGULAR and not basis.sets("training", "resize"):
        searched["space"] = {"resize": SEARCH}
        lines.append(
            f"sides of {basis.aspect:.2g} to 1 (median): squashing, padding and cropping "
            "to a square are all tried"
        )
    return {
        **keys,
        "search": searched,
        "training": {k: v for k, v in training_keys.items() if not basis.sets("training", k)},
        "resources": {"cpus_per_trial": _cpus_per_trial(basis)},
    }


def _choice(basis: Basis, pretrained: bool) -> BackboneChoice:
    device: Device = "gpu" if basis.has_gpu else "cpu"
    return choose_backbones(device, basis.side, len(basis.manifest), pretrained)


def _stored_backbones(folder: str, config: SweepConfig) -> tuple[str, ...]:
    """Backbones whose weights lie in a folder, the smallest file first."""
    path = Path(folder)
    files = sorted(path.glob("*.safetensors"), key=lambda file: (file.stat().st_size, file.name))
    if not files:
        message = "is no folder of <backbone name>.safetensors; give one, or search.backbones, too"
        raise EnvironmentProblem.single(f"training.pretrained: {folder}", message)
    from foldrace.trainables.models.backbones import FAMILIES, check_backbone  # torch: only here
    from foldrace.trainables.plugins import TRAINING_TABLES

    parts, _ = check_plugins(config.plugins, TRAINING_TABLES)
    forms = ([f"{family}/{file.stem}" for family in parts[FAMILIES]] for file in files)
    known = [[name for name in names if check_backbone(name, parts) is None] for names in forms]
    backbones = tuple(names[0] for names in known if names)
    if not backbones:
        stems = listing(file.stem for file in files)
        message = f"holds no weights of a known backbone: {stems}"
        raise EnvironmentProblem.single(f"training.pretrained: {folder}", message)
    return backbones


def _cpus_per_trial(basis: Basis) -> int:
    """One core beside other trials on the CPU; the cores that are there for each GPU."""
    if not basis.has_gpu:
        return 1
    shares = [node.cpus // node.gpus for node in basis.nodes if node.gpus]
    return int(max(1, min(_CPUS_PER_GPU, *shares)))


def _data_line(basis: Basis) -> str:
    images, classes = len(basis.manifest), len(basis.manifest.classes)
    device = "GPUs" if basis.has_gpu else "CPU"
    return (
        f"{counted(images, 'image')}, {classes} classes, shorter side {basis.side:.0f} px "
        f"(median); {device}"
    )


def _shape(manifest: Manifest) -> tuple[float, float]:
    """Medians of the images' shorter sides, in pixels, and of their aspects, at least 1."""
    rows = spread(len(manifest), _SIZES)
    sizes = [size for row in rows if (size := pixel_size(manifest.file(row))) is not None]
    if not sizes:
        return 64.0, 1.0
    shorter, longer = np.sort(sizes, axis=1).T
    return float(np.median(shorter)), float(np.median(longer / shorter))


def _laid_over(keys: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, with those that the user has given."""
    merged = dict(keys)
    for name, value in given.items():
        whole = not isinstance(value, Mapping)
        merged[name] = value if whole else _laid_over(keys_of(keys, name), value)
    return {name: value for name, value in merged.items() if value != {}}
