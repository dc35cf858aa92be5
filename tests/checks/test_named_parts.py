"""Every hyperparameter that is a name has its table."""

from __future__ import annotations

import pytest

from foldrace.checks.search import NAME_KNOBS, TABLES, check_part
from foldrace.config.hyperparameters import KNOBS


def test_every_name_is_looked_up_somewhere() -> None:
    assert set(NAME_KNOBS) == {knob.name for knob in KNOBS.values() if knob.named}


@pytest.mark.parametrize("knob", NAME_KNOBS)
def test_defaults_are_rows(knob: str) -> None:
    assert check_part(knob, "here", str(KNOBS[knob].default)) is None


@pytest.mark.parametrize("knob", TABLES)
def test_every_row_is_known_and_a_misspelt_one_told(knob: str) -> None:
    for name in TABLES[knob]:
        assert check_part(knob, "here", name) is None
        problem = check_part(knob, "here", name + "x")
        assert problem is not None and problem.where == "here"
        assert f"did you mean {name!r}?" in problem.message
        assert problem.message.endswith(f"allowed: {', '.join(TABLES[knob])}")
