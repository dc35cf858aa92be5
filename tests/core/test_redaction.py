"""No password or key of a URL is shown, in a value alone or in a message around it."""

from __future__ import annotations

import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from foldrace.core.errors import Problem, RunFailure
from foldrace.core.redaction import has_secret, starred, without_secrets

SECRET = "HUNTER2"
LEAKS = [
    "postgresql://u:HUNTER2@h/d",
    # nine that a list of what is hidden has missed
    "postgresql://h/d?sslpassword=HUNTER2",
    "postgresql://h/d?passwd=HUNTER2",
    "postgresql://h/d;password=HUNTER2",
    "postgresql://h/d?options=-c password=HUNTER2",
    "postgresql://h/d?%70assword=HUNTER2",
    "user:HUNTER2@host",
    "postgresql://us/er:HUNTER2@h/d",
    "s3://b/run?secret_key=HUNTER2",
    "s3://b/run?session_token=HUNTER2",
    # and more
    "postgresql//u:HUNTER2@h",
    "postgresql://me@corp:HUNTER2@h/d",
    "postgresql://u:a?b&HUNTER2@h/d",
    "postgresql://h/d?mail=a@b&password=HUNTER2",
    "host=h password=HUNTER2 dbname=d",
    "s3://b/run?region=eu&HUNTER2",
    "postgresql://u:with blank HUNTER2@h/d",
    "s3://HUNTER2:x@b/run",
]
HARMLESS = [
    "s3://bucket/run?endpoint_override=127.0.0.1:9000&scheme=http&region=us-east-1",
    "s3://bucket/a@b/run",
    "postgresql://h:5432/d",
    "sqlite:////data/study.db",
    "/data/cars & more/a;b=1/train.csv",
    "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
    "train.csv:12: what is this? a = b",
]


@pytest.mark.parametrize("value", LEAKS)
def test_a_secret_is_starred(value: str) -> None:
    assert SECRET not in without_secrets(value) and "***" in without_secrets(value)
    assert has_secret(value)
    for text in (f"got {value}, which is wrong; put", f"got {value!r}; see", f'["{value}"]'):
        assert SECRET not in starred(text)
        assert SECRET not in str(Problem(f"where {value}", text))
        assert SECRET not in str(RunFailure(text))
    around = starred(f"{value} is wrong (see docs)")
    assert around.endswith("wrong (see docs)")


@pytest.mark.parametrize("value", HARMLESS)
def test_what_is_harmless_is_shown(value: str) -> None:
    assert without_secrets(value) == value
    assert starred(f"got {value}; see") == f"got {value}; see"
    assert not has_secret(value)


def test_a_name_alone_is_starred_but_is_no_secret() -> None:
    assert without_secrets("postgresql://anna@h:5432/d") == "postgresql://***@h:5432/d"
    assert not has_secret("postgresql://anna@h:5432/d")


PARTS = st.text(string.ascii_letters + string.digits + "/?&;=@: '\"%", max_size=6)


@example("", ":@", "", "password")  # the @ of a key in the query is no end of a user's password
@given(PARTS, PARTS, PARTS, st.sampled_from(["password", "key", "a b", "%70w", "x"]))
def test_no_secret_survives_whatever_is_around_it(
    name: str, before: str, after: str, key: str
) -> None:
    for url in (
        f"db://{name}:{before}{SECRET}{after}@host/d",
        f"db://host/d?x=1&{key}={before}{SECRET}{after}",
        f"{name}:{before}{SECRET}{after}@host",
    ):
        assert SECRET not in without_secrets(url)
