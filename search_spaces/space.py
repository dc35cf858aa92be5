"""The search space: which hyperparameters each backbone varies, from the config's search section.

Takes a `SweepConfig`, gives a `SearchSpace` that turns what Optuna draws into `TrialParams` and
back, or the problems in the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from foldrace.config.forms import SEARCH, KnobConfig, RangeConfig
from foldrace.config.hyperparameters import KNOBS, Knob, TrialParams
from foldrace.config.ranges import Choice, Float, Int, Range, Value
from foldrace.config.schema import SweepConfig
from foldrace.core.errors import Problem, did_you_mean


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


@dataclass(frozen=True)
class SearchSpace:
    """Search space of every backbone."""

    settings: Mapping[str, Mapping[str, Setting]]
    """Backbone -> hyperparameter -> setting."""

    @property
    def backbones(self) -> tuple[str, ...]:
        """Names of the backbones, in the order of the config."""
        return tuple(self.settings)

    def default(self, backbone: str) -> TrialParams:
        """The configuration of a backbone's first candidate."""
        return TrialParams.from_dict(
            {knob: setting.default for knob, setting in self.settings[backbone].items()}
        )

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


def build_space(config: SweepConfig, source: str) -> tuple[SearchSpace, list[Problem]]:
    """The space, with defaults in place of wrong settings, and the problems of these."""
    search, problems = config.search, list[Problem]()
    unnamed = {name: _unnamed(knob, config.fixed.get(name)) for name, knob in KNOBS.items()}
    shared = unnamed | _settings(search.space, unnamed, source, "search.space", "", problems)
    for backbone in search.per_backbone:
        if backbone not in search.backbones:
            where = f"{source}: search.per_backbone.{backbone}"
            allowed = ", ".join(search.backbones)
            problems.append(Problem(where, f"is not among search.backbones; allowed: {allowed}"))
    per_backbone = {
        backbone: shared | _settings(
            search.per_backbone.get(backbone, {}),
            shared,
            source,
            f"search.per_backbone.{backbone}",
            f"[{backbone}]",
            problems,
        )
        for backbone in search.backbones
    }  # fmt: skip
    return SearchSpace(per_backbone), problems


def _unnamed(knob: Knob, fixed: Value | None) -> Setting:
    """The setting of a hyperparameter that the search does not name."""
    if fixed is not None:
        return Setting(knob.name, fixed, None, f"{knob.section}.{knob.name}")
    chosen = knob.search if knob.searched_by_default else None
    return Setting(knob.name, _inside(knob.default, chosen), chosen, f"search.space.{knob.name}")


def _settings(
    given: Mapping[str, KnobConfig],
    others: Mapping[str, Setting],
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
            hint = did_you_mean(name, KNOBS)
            text = f"unknown hyperparameter; {hint}allowed: {', '.join(KNOBS)}"
            problems.append(Problem(f"{source}: {key}", text))
            continue
        default = others[name].default
        try:
            default, chosen = _default_and_range(KNOBS[name], form, default)
        except ValueError as error:
            problems.append(Problem(f"{source}: {key}", str(error)))
            chosen = None
        found[name] = Setting(name + suffix, default, chosen, key)
    return found


def _default_and_range(knob: Knob, form: KnobConfig, default: Value) -> tuple[Value, Range | None]:
    if isinstance(form, RangeConfig):
        chosen = _range(knob, form)
    elif form == SEARCH:
        chosen = _searched(knob)
    else:
        return _read(knob, form), None
    return _inside(default, chosen), chosen


def _searched(knob: Knob) -> Range:
    """The range where the config says `search`."""
    if knob.search is not None:
        return knob.search
    if isinstance(knob.limits, (Float, Int)):
        return knob.limits
    raise ValueError(f"is searched by {{choices: [...]}}: {knob.doc}")


def _inside(default: Value, chosen: Range | None) -> Value:
    """The default where the range holds it, else the middle of the range."""
    return default if chosen is None or chosen.contains(default) else chosen.middle()


def _range(knob: Knob, form: RangeConfig) -> Range:
    if form.choices is not None:
        return Choice(tuple(_read(knob, value) for value in form.choices))
    if not isinstance(knob.limits, (Float, Int)):
        takes = "a name" if knob.named else str(knob.limits)
        raise ValueError(f"takes {takes} or {{choices: [...]}}, no low and high: {knob.doc}")
    base = knob.search if isinstance(knob.search, (Float, Int)) else knob.limits
    low = base.low if form.low is None else form.low
    high = base.high if form.high is None else form.high
    log = form.log if form.log is not None else base.log and low > 0
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
