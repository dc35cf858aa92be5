"""The exception tree: its exit codes, its text, and what a message shows of many."""

from __future__ import annotations

from typing import assert_type

import pytest

from foldrace.core import errors
from foldrace.core.errors import (
    DataError,
    FoldraceError,
    Problem,
    UserError,
    check_name,
    listing,
    message_line,
)


def test_single_gives_the_class_it_is_called_on() -> None:
    error = assert_type(DataError.single("train.csv", "has no rows"), DataError)
    assert type(error) is DataError
    assert error.problems == (Problem("train.csv", "has no rows"),)
    assert str(error) == "train.csv: has no rows"


def test_every_problem_is_shown() -> None:
    assert str(UserError([Problem("a", "x"), Problem("b", "y")])) == "a: x\nb: y"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *(("FoldraceError", 1), ("RunFailure", 1), ("Interrupted", 130), ("UserError", 2)),
        *(("ConfigError", 2), ("DataError", 2), ("EnvironmentProblem", 2), ("RunFolderError", 2)),
    ],
)
def test_exit_codes(name: str, code: int) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, FoldraceError)
    assert kind.exit_code == code


def test_listing() -> None:
    assert listing([]) == ""
    assert listing(range(3)) == "0, 1, 2"
    assert listing(range(1333), 2) == "0, 1 and 1,331 more"


LOSSES = ("cross_entropy", "focal", "bce", "kl", "ldam")
KNOBS = ("lr", "lr_factor", "mixup_alpha", "mixup_prob", "dropout")


@pytest.mark.parametrize(
    ("name", "table", "hint"),
    [
        ("ce", LOSSES, "did you mean 'cross_entropy'? "),
        ("CrossEntropyLoss", LOSSES, "did you mean 'cross_entropy'? "),
        ("focall", LOSSES, "did you mean 'focal'? "),
        ("hinge", LOSSES, ""),
        ("learning_rate", KNOBS, "did you mean 'lr'? "),
        ("mixup", KNOBS, "did you mean 'mixup_alpha' and 'mixup_prob'? "),
        ("learning_rate", LOSSES, ""),
    ],
)
def test_an_unknown_name_is_led_to_the_one_that_was_meant(
    name: str, table: tuple[str, ...], hint: str
) -> None:
    problem = check_name("search.space.loss", name, table)
    assert problem is not None
    assert problem.message == f"got {name!r}; {hint}allowed: {', '.join(table)}"
    assert check_name("x", table[0], table) is None


@pytest.mark.parametrize(
    "text",
    [
        "KeyError: 1",
        "\nKeyError: 1\n  found: nothing\n",
        "Traceback (most recent call last):\n  File 'a', line 1\n    x\n    ^\nKeyError: 1\nhelp\n",
        "Traceback (most recent call last):\n  a\nOSError: 2\n\nDuring handling of the above "
        "exception:\n\nTraceback (most recent call last):\n  b\nKeyError: 1\n",
    ],
)
def test_the_line_of_an_error_that_says_what_went_wrong(text: str) -> None:
    assert message_line(text) == "KeyError: 1"


def test_an_error_without_text_has_no_line() -> None:
    assert message_line("") == message_line("\n \n") == ""
