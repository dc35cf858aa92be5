"""The forms of a hyperparameter in the configuration: a value, `search`, a range, a section's key.

Takes the list of hyperparameters, gives the types that `foldrace.config.schema` is made of.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from foldrace.config.hyperparameters import KNOBS, Knob, Section
from foldrace.config.ranges import Value


class ConfigSection(BaseModel):
    """Base of the sections: frozen, without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


TAGS = _BOOL, _NUMBER, _TEXT, _RANGE = "\0bool", "\0number", "\0text", "\0range"
"""Names of a union's branches in the locations of errors: no key that is read has a NUL."""


def _form(value: object) -> str | None:
    """The branch of a union that a value is meant for, so that it gets that branch's message."""
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, (int, float)):
        return _NUMBER
    if isinstance(value, str):
        return _TEXT
    return _RANGE if isinstance(value, (dict, BaseModel)) else None


_Value = Annotated[bool, Tag(_BOOL)] | Annotated[float, Tag(_NUMBER)] | Annotated[str, Tag(_TEXT)]
ValueConfig = Annotated[
    _Value,
    Discriminator(
        _form,
        custom_error_type="form",
        custom_error_message="should be a number, true or false, or a name",
    ),
]


class RangeConfig(ConfigSection):
    """Values of a hyperparameter in the search: low/high (with `log`), or `choices`."""

    low: float | None = None
    high: float | None = None
    log: bool | None = None
    choices: Annotated[tuple[ValueConfig, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> RangeConfig:
        bounds = (self.low is not None) + (self.high is not None)
        if self.choices is not None and bounds:
            raise ValueError("takes low and high, or choices, not both")
        if self.choices is None and bounds == 0:
            raise ValueError("needs low and/or high, or choices")
        return self


SEARCH = "search"
KnobConfig = Annotated[
    _Value | Annotated[RangeConfig, Tag(_RANGE)],
    Discriminator(
        _form,
        custom_error_type="form",
        custom_error_message=(
            "should be a number, true or false, a name, `search`, {low, high[, log]} or "
            "{choices: [...]}, as the hyperparameter asks"
        ),
    ),
]


def fixed_values(section: Section) -> type[ConfigSection]:
    """A model with one key for each hyperparameter of the section; null: it is left open."""

    def reader(knob: Knob) -> BeforeValidator:
        def read(value: object) -> Value | None:
            if value is None and knob.left_open:
                return None
            try:
                return knob.read(value)
            except ValueError as error:
                problem = {"problem": str(error)}
                raise PydanticCustomError("hyperparameter", "{problem}", problem) from error

        return BeforeValidator(read)

    fields: dict[str, Any] = {
        knob.name: (
            Annotated[Any, reader(knob)],
            None if knob.left_open else knob.default,
        )
        for knob in KNOBS.values()
        if knob.section == section
    }
    return create_model(f"_{section.title()}", __base__=ConfigSection, **fields)
