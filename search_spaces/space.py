"""The search space: which hyperparameters each backbone varies, from the config's search section.

Takes a `SweepConfig`, gives a `SearchSpace` that turns what Optuna draws into `TrialParams` and
back, or the problems in the config.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from foldrace.config.forms import SEARCH, KnobConfig, RangeConfig
from foldrace.config.hyperparameters import KNOBS, Knob, TrialParams
from foldrace.config.key_hints import unknown_name
from foldrace.config.ranges import Choice, Float, Int, Range, Value
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem
from foldrace.search_spaces.defaults import Situation, by_situation, family


@dataclass(frozen=True)
class Setting:
    """One hyperparameter for one backbone."""

    name: str
    """Optuna's parameter: shared by backbones with the same range, else the backbone's own."""
    default: Value
    range: Range | None
    """Range of the search, or None where it is fixed at the default."""
    key: str = field(default="", compare=False)
    """Key of the config that it comes from, for messages."""

    @property
    def values(self) -> tuple[Value, ...]:
        """Every value of a choice, the ends of a range, or the one fixed value."""
        match self.range:
            case None:
                return (self.default,)
            case Choice(values):
                return values
            case Float(low, high) | Int(low, high):
                return (low, high)


_WEIGHT: Mapping[str, Callable[[Any], float]] = {
    "batch_size": float,
    "image_size": float,
    "micro_batch": lambda images: images or math.inf,  # 0 is the whole batch
    "size_start": float,
    "gradient_checkpointing": operator.not_,
    "precision": lambda name: name == "fp32",
    "sam_rho": bool,
    "rdrop_alpha": bool,
    "ema_epochs": bool,
    "l2_sp": bool,
}
"""Hyperparameter -> what orders its values by the device memory that a trial takes."""


@dataclass(frozen=True)
class SearchSpace:
    """Search space of every backbone."""

    settings: Mapping[str, Mapping[str, Setting]]
    """Backbone -> hyperparameter -> setting."""
    situations: Mapping[str, Situation] = field(default_factory=dict)
    """Backbone -> what its defaults go by."""

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones, in the order of the config."""
        return tuple(self.settings)

    def default(self, backbone: str) -> TrialParams:
        """The configuration of a backbone's first candidate."""
        return TrialParams.from_dict(
            {knob: setting.default for knob, setting in self.settings[backbone].items()}
        )

    def heaviest(self, backbone: str, others: Iterable[TrialParams] = ()) -> TrialParams:
        """The configuration that takes the most memory of a device.

        Each hyperparameter that counts is at its heaviest value, of those that may be drawn and of
        these others.
        """
        settings, given = self.settings.get(backbone, {}), [params.as_dict() for params in others]
        chosen = self.default(backbone).as_dict() if settings else given[0]
        for name, weight in _WEIGHT.items():
            drawn = settings[name].values if settings else ()
            chosen[name] = max((*drawn, *(params[name] for params in given)), key=weight)
        return TrialParams.from_dict(chosen)

    def configured(self, backbone: str, given: Mapping[str, Value]) -> TrialParams:
        """The default configuration with some values given, inside the space or not."""
        own = {knob: KNOBS[knob].read(value) for knob, value in given.items()}
        return TrialParams.from_dict(self.default(backbone).as_dict() | own)

    def searched(self, backbone: str) -> dict[str, Range]:
        """Optuna's name -> range, for each hyperparameter that is searched for a backbone."""
        settings = self.settings[backbone].values()
        return {s.name: s.range for s in settings if s.range is not None}

    def decode(self, backbone: str, drawn: Mapping[str, Value]) -> TrialParams:
        """The configuration for Optuna's names and values."""
        return TrialParams.from_dict(
            {
                knob: setting.default if setting.range is None else drawn[setting.name]
                for knob, setting in self.settings[backbone].items()
            }
        )

    def encode(self, backbone: str, params: TrialParams) -> dict[str, Value] | None:
        """Optuna's names and values for a configuration; None where it lies outside this space.

        It may after `resume --set search.space...`, or as a point given by hand.
        """
        encoded = self.place(backbone, params)
        return encoded if encoded is not None and self.has_fixed_values(backbone, params) else None

    def place(self, backbone: str, params: TrialParams) -> dict[str, Value] | None:
        """Optuna's names and values, whatever is set for what is not searched; else None."""
        if backbone not in self.settings:
            return None
        values, encoded = params.as_dict(), dict[str, Value]()
        for knob, setting in self.settings[backbone].items():
            if setting.range is None:
                continue
            if not setting.range.contains(values[knob]):
                return None
            encoded[setting.name] = values[knob]
        return encoded

    def has_fixed_values(self, backbone: str, params: TrialParams) -> bool:
        """True where all that is not searched, but changes the result, has this space's values."""
        values = params.as_dict()
        fixed = {k: s for k, s in self.settings[backbone].items() if s.range is None}
        return all(values[k] == s.default for k, s in fixed.items() if KNOBS[k].changes_result)

    def distributions(self, backbone: str) -> dict[str, BaseDistribution]:
        """Optuna's distributions of what is searched for a backbone."""
        return {name: distribution(r) for name, r in self.searched(backbone).items()}


def build_space(
    config: SweepConfig, source: str, rows: int | None = None
) -> tuple[SearchSpace, list[Problem]]:
    """The space, with defaults in place of wrong settings, and the problems of these.

    `rows`: labelled images; None: not known. What the config does not name goes by each backbone's
    situation (`search_spaces.defaults`).
    """
    search, problems = config.search, list[Problem]()
    for backbone in search.per_backbone:
        if backbone not in search.backbones:
            where = f"{source}: search.per_backbone.{backbone}"
            allowed = ", ".join(search.backbones)
            problems.append(Problem(where, f"is not among search.backbones; allowed: {allowed}"))
    situations = {b: _situation(config, b, rows) for b in search.backbones}
    unlike = _unlike(situations.values())
    settings: dict[str, Mapping[str, Setting]] = {}
    for i, (backbone, situation) in enumerate(situations.items()):
        bases = _bases(situation, unlike)
        unnamed = {
            name: _unnamed(base, config.fixed.get(name), KNOBS[name])
            for name, base in bases.items()
        }
        found = problems if i == 0 else []  # those of the space are the same for every backbone
        shared = unnamed | _settings(
            search.space, unnamed, bases, source, "search.space", "", found
        )
        settings[backbone] = shared | _settings(
            search.per_backbone.get(backbone, {}),
            shared,
            bases,
            source,
            f"search.per_backbone.{backbone}",
            f"[{backbone}]",
            problems,
        )
    return SearchSpace(settings, situations), problems


def _situation(config: SweepConfig, backbone: str, rows: int | None) -> Situation:
    """By the values that the config gives; where one is searched, by the list's own default."""
    search = config.search

    given = search.space | search.per_backbone.get(backbone, {})

    def value(name: str) -> Value:
        if name not in given:
            return config.fixed.get(name, KNOBS[name].default)
        with contextlib.suppress(ValueError):  # a wrong value is told where the settings are made
            if not _searches(given[name]):
                return KNOBS[name].read(given[name])
        return KNOBS[name].default

    searched = "batch_size" in given and _searches(given["batch_size"])
    batch, epochs, k = int(value("batch_size")), int(value("epochs")), config.folds.k
    updates = None
    if rows is not None:
        part = 1 - config.folds.valid_fraction if k == 1 else (k - 1) / k
        updates = max(int(rows * part) // batch, 1) * epochs
    return Situation(
        family=family(backbone),
        pretrained=value("pretrained") is not False,
        optimizer=str(value("optimizer")),
        batch_size=None if searched else batch,
        updates=updates,
    )


def _searches(form: KnobConfig) -> bool:
    return isinstance(form, RangeConfig) or form == SEARCH


@dataclass(frozen=True)
class _Base:
    """What a hyperparameter is for a backbone, before the config's words."""

    default: Value
    searched: Range | None
    """Range where the config does not name it; None: it is not searched then."""
    usual: Range | None
    """Range of `search`, and of an end that a range of the config leaves out."""
    suffix: str
    """What tells its range from those of other situations."""


def _bases(situation: Situation, unlike: Collection[str]) -> dict[str, _Base]:
    own = by_situation(situation)
    found = {}
    for name, knob in KNOBS.items():
        if name in own:
            default, searched = own[name]
            suffix = f"[{situation.name}]" if name in unlike else ""
            found[name] = _Base(default, searched, searched or knob.search, suffix)
        else:
            searched = knob.search if knob.searched_by_default else None
            found[name] = _Base(knob.default, searched, knob.search, "")
    return found


def _unlike(situations: Iterable[Situation]) -> set[str]:
    """Hyperparameters with several defaults or ranges among these."""
    every = [by_situation(situation) for situation in situations]
    names = {name for found in every for name in found}
    return {name for name in names if any(f.get(name) != every[0].get(name) for f in every)}


def _unnamed(base: _Base, fixed: Value | None, knob: Knob) -> Setting:
    """The setting of a hyperparameter that the search does not name."""
    if fixed is not None:
        return Setting(knob.name, fixed, None, f"{knob.section}.{knob.name}")
    default = _inside(knob, base.default, base.searched)
    suffix = base.suffix if base.searched is not None else ""
    return Setting(knob.name + suffix, default, base.searched, f"search.space.{knob.name}")


def _settings(
    given: Mapping[str, KnobConfig],
    others: Mapping[str, Setting],
    bases: Mapping[str, _Base],
    source: str,
    section: str,
    suffix: str,
    problems: list[Problem],
) -> dict[str, Setting]:
    """The settings of the hyperparameters that are given; `others` have their defaults."""
    found: dict[str, Setting] = {}
    for name, form in given.items():
        key = f"{section}.{name}"
        if name not in KNOBS:
            text = unknown_name("hyperparameter", name, KNOBS)
            problems.append(Problem(f"{source}: {key}", text))
            continue
        default, base = others[name].default, bases[name]
        own = suffix or ("" if isinstance(form, RangeConfig) and _is_whole(form) else base.suffix)
        try:
            default, chosen = _default_and_range(KNOBS[name], base, form, default)
        except ValueError as error:
            problems.append(Problem(f"{source}: {key}", str(error)))
            chosen = None
        found[name] = Setting(name + (own if chosen or suffix else ""), default, chosen, key)
    return found


def _is_whole(form: RangeConfig) -> bool:
    """True where no end of the range comes from elsewhere."""
    return form.choices is not None or None not in (form.low, form.high)


def _default_and_range(
    knob: Knob, base: _Base, form: KnobConfig, default: Value
) -> tuple[Value, Range | None]:
    if isinstance(form, RangeConfig):
        chosen = _range(knob, base, form)
    elif form == SEARCH:
        chosen = _searched(knob, base)
    else:
        return _read(knob, form), None
    return _inside(knob, default, chosen), chosen


def _searched(knob: Knob, base: _Base) -> Range:
    """The range where the config says `search`."""
    if base.usual is not None:
        return base.usual
    if isinstance(knob.limits, (Float, Int)):
        return knob.limits
    raise ValueError(f"is searched by {{choices: [...]}}: {knob.doc}")


def _inside(knob: Knob, default: Value, chosen: Range | None) -> Value:
    """The default where the range holds it and not at its edge, else the middle of the range.

    An end at which the hyperparameter has no effect, such as a probability of 0, is no edge.
    """
    if chosen is None or (chosen.contains(default) and not _at_edge(knob, default, chosen)):
        return default
    return chosen.middle()


def _at_edge(knob: Knob, value: Value, chosen: Range) -> bool:
    if not isinstance(chosen, Float) or not isinstance(knob.limits, Float):
        return False
    ends = (chosen.low, chosen.high)
    return value in ends and value not in (knob.limits.low, knob.limits.high)


def _range(knob: Knob, base: _Base, form: RangeConfig) -> Range:
    if form.choices is not None:
        return Choice(tuple(_read(knob, value) for value in form.choices))
    if not isinstance(knob.limits, (Float, Int)):
        takes = "a name" if knob.named else str(knob.limits)
        raise ValueError(f"takes {takes} or {{choices: [...]}}, no low and high: {knob.doc}")
    usual = base.usual if isinstance(base.usual, (Float, Int)) else knob.limits
    low = usual.low if form.low is None else form.low
    high = usual.high if form.high is None else form.high
    log = form.log if form.log is not None else usual.log and low > 0
    _read(knob, low)
    _read(knob, high)
    return Int(int(low), int(high), log) if knob.whole else Float(low, high, log)


def _read(knob: Knob, value: Value) -> Value:
    return knob.read(value, "; `search`, {low, high[, log]} or {choices: [...]}")


def distribution(chosen: Range) -> BaseDistribution:
    """The range in Optuna's form."""
    match chosen:
        case Float(low, high, log):
            return FloatDistribution(low, high, log=log)
        case Int(low, high, log):
            return IntDistribution(low, high, log=log)
        case Choice(values):
            return CategoricalDistribution(list(values))
