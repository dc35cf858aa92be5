"""YAML and JSON within bounds: what would take all time or memory is refused before it does."""

from __future__ import annotations

import json
import time
import tracemalloc

import pytest

from foldrace.config.texts import load_json, load_yaml, yaml_text

LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
)
MERGES = "\n".join(
    ["m0: &m0 {k: 1}"] + [f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}" for i in range(1, 40)]
)
LONG_TEXT = f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]"

BOMBS = {
    "laughs": (LAUGHS, "with what its aliases stand for"),
    "merges": (MERGES, "with what its aliases stand for"),
    "long text": (LONG_TEXT, "with what its aliases stand for"),
    "many keys": ("\n".join(f"k{i}: 1" for i in range(80_000)), "holds more than 2,000,000"),
    "list in itself": ("x: &a [*a]", "line 1, column 8: *a stands within what it stands for"),
    "deep list": ("[" * 3000, "more than 50 levels"),
    "deep mapping": ("{a: " * 3000, "more than 50 levels"),
    "deep block": ("- " * 3000, "more than 50 levels"),
    "long number": ("x: " + "9" * 5000, "a number of 5,000 characters"),
    "hexadecimal": ("x: 0x" + "f" * 5000, "a number of 5,002 characters"),
    "sexagesimal": ("x: " + ":".join(["59"] * 300_000), "a number of 899,999 characters"),
    "a wrong date": ("x: 2001-13-45", "month must be in 1..12"),
    "NUL": (r'x: "a\0b"', "a text with a NUL character"),
    "half a character": (r'x: "a\ud800b"', r"a text with half a character, '\ud800'"),
    "twice": ("a: 1\nb: {c: 1, c: 2}", "line 2, column 11: key 'c' is given twice"),
    "no boolean": ("x: !!bool x", "KeyError"),
    "no number": ("x: !!int ''", "IndexError"),
    "no fraction": ("x: !!float ''", "IndexError"),
    "no time": ("x: !!timestamp x", "AttributeError"),
    "no set": ("x: !!set [a]", "TypeError"),
    "an object": ("x: !!python/object/apply:os.system [true]", "could not determine a constructor"),
    "no alias": ("x: *nothing", "undefined alias"),
    "unclosed": ("data: [train", "expected ',' or ']'"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_it_is_refused_in_one_line_before_it_is_expanded(case: str) -> None:
    text, reason = BOMBS[case]
    tracemalloc.start()
    began = time.thread_time()
    try:
        with pytest.raises(ValueError) as refused:
            load_yaml(text)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert peak < 400 * 2**20  # of the text itself: 80,000 keys are 1 MB and as many objects
    assert time.thread_time() - began < 60


def test_what_people_write_is_read() -> None:
    text = """
base: &base {lr: 1e-3, name: "1e-3", steps: [1, 2]}
other:
  <<: *base
  lr: 0.5
also: [*base, *base]
"""
    found = load_yaml(text)
    assert found["base"] == {"lr": 1e-3, "name": "1e-3", "steps": [1, 2]}
    assert found["other"] == {"lr": 0.5, "name": "1e-3", "steps": [1, 2]}
    assert found["also"] == [found["base"], found["base"]]
    assert load_yaml(yaml_text(found)) == found


def test_many_aliases_of_little_are_read() -> None:
    text = "a: &a [1, 2]\n" + "".join(f"k{i}: *a\n" for i in range(1000))
    assert load_yaml(text)["k999"] == [1, 2]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 200_000, "nested too deeply"),
        ("[" * 51 + "]" * 51, "more than 50 levels"),
        ('{"a":' * 400 + "1" + "}" * 400, "more than 50 levels"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is given twice"),
        ("9" * 5000, "4300 digits"),
        ('{"a": ["b\\u0000"]}', "a text with a NUL character"),
        ('{"a\\u0000": 1}', "a text with a NUL character"),
        ('{"a": ["b\\ud800"]}', "a text with half a character"),
        ('{"a": 1,}', "line 1"),
    ],
)
def test_json_is_bounded_alike(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refused:
        load_json(text)
    assert "\n" not in str(refused.value)


def test_json_with_many_keys_is_read_in_time() -> None:
    tree = {f"key {i}": i for i in range(50_000)}
    began = time.thread_time()
    assert load_json(json.dumps(tree)) == tree
    assert time.thread_time() - began < 10
