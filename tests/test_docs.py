"""The tables in the documentation are those of the code. To write them anew:
`python tests/test_docs.py`."""

from __future__ import annotations

import inspect
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from foldrace.config.hyperparameters import KNOBS, Knob  # noqa: E402
from foldrace.config.load import parse_config  # noqa: E402  (also run as a script)
from foldrace.config.ranges import shown  # noqa: E402
from foldrace.config.schema import SweepConfig  # noqa: E402  (also run as a script)
from foldrace.run_folder.tables import DECISIONS  # noqa: E402
from foldrace.scheduling.rules import RULES  # noqa: E402
from foldrace.scheduling.search.samplers import SAMPLERS  # noqa: E402
from foldrace.search_spaces.backbone_choice import CHOICES  # noqa: E402
from foldrace.trainables.data.augment import POLICIES  # noqa: E402
from foldrace.trainables.data.custom_transforms import CUSTOM  # noqa: E402

GUIDE = ROOT / "docs" / "configuration.md"
TECHNIQUES = ROOT / "docs" / "techniques.md"
BLENDING = ROOT / "docs" / "blending.md"
RACE = ROOT / "docs" / "race.md"
SEARCH = ROOT / "docs" / "search.md"
SECURITY = ROOT / "SECURITY.md"


def knob_table() -> str:
    rows = [
        f"| `{k.name}` | {k.section} | {shown(k.default)} | {_varied(k)} | {k.search or '–'} | "
        f"{k.limits} | {k.unit} | {k.doc} |"
        for k in KNOBS.values()
    ]
    head = (
        "| name | section | default | varied | range | allowed | unit | what |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])


def _varied(knob: Knob) -> str:
    return "yes" if knob.searched_by_default else "if asked"


def policy_table() -> str:
    rows = [f"| `{p.name}` | {p.doc} |" for p in POLICIES.values()]
    return "\n".join(["| policy | what |\n|---|---|", *rows])


def choice_table() -> str:
    rows = [
        f"| {row.device.upper()} | {'pretrained' if row.pretrained else 'from scratch'} | "
        f"{_limit(row.most_side)} | {row.least_images or 1:,} | {row.image_size} | "
        f"{', '.join(f'`{name}`' for name in row.backbones)} |"
        for row in CHOICES
    ]
    head = (
        "| device | weights | side up to (px) | images from | image size (px) | backbones |\n"
        "|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])


def _limit(value: float) -> str:
    return "any" if math.isinf(value) else f"{value:g}"


def custom_table() -> str:
    rows = [f"| `{c.name}` | {_arguments(c.make)} | {c.doc} |" for c in CUSTOM.values()]
    return "\n".join(["| transform | arguments | what |\n|---|---|---|", *rows])


def _arguments(make: Callable[..., object]) -> str:
    return ", ".join(
        f"`{p.name}: {p.default}`" for p in inspect.signature(make).parameters.values()
    )


def ablation_table() -> str:
    """Of the committed run of benchmarks/ablation.py."""
    run = json.loads((ROOT / "benchmarks" / "results" / "ablation.json").read_text())
    rows = [
        f"| {row['part']} | {row['arm']} | {row['seeds']} | {row['logloss']:.4f} | "
        f"{_change(row['change'], row['se'])} | {row['accuracy']:.4f} | "
        f"{row['seconds_ratio']:.2f} |"
        for row in run["rows"]
    ]
    head = (
        "| images, backbone | arm | seeds | calibrated log loss | change | accuracy | "
        "seconds, relative |\n|---|---|---|---|---|---|---|"
    )
    return "\n".join([head, *rows])


def _change(mean: float, error: float) -> str:
    return f"{mean:+.4f} ± {error:.4f}" if mean or error else ""


def generalisation_table() -> str:
    """Of the committed run of benchmarks/generalisation.py: a row a method, a column a draw."""
    run = json.loads((ROOT / "benchmarks" / "results" / "generalisation.json").read_text())
    rows = [row for row in run["rows"] if "method" in row]
    parts = list(dict.fromkeys(row["part"] for row in rows))
    found = {(row["method"], row["part"]): row for row in rows}
    titles = [part.rsplit(",", 1)[0] for part in parts]
    lines = [
        f"| {method} | "
        + " | ".join(_held_out(found.get((method, part))) for part in parts)
        + f" | {found[method, parts[-1]]['members']:.0f} |"
        for method in dict.fromkeys(row["method"] for row in rows)
        if (method, parts[-1]) in found
    ]
    head = f"| method | {' | '.join(titles)} | members |\n|---|{'---|' * len(titles)}---|"
    return "\n".join([head, *lines])


def _held_out(row: dict[str, float] | None) -> str:
    """Loss, and the difference to greedy with its standard error."""
    if row is None:
        return ""
    change, error = row["from_greedy"], row["se"]
    return f"{row['kept']:.4f}" + (f" ({change:+.4f} ± {error:.4f})" if change or error else "")


TABLES = {
    "knobs": (GUIDE, knob_table),
    "backbone choices": (GUIDE, choice_table),
    "policies": (GUIDE, policy_table),
    "custom transforms": (GUIDE, custom_table),
    "ablation": (TECHNIQUES, ablation_table),
    "generalisation": (BLENDING, generalisation_table),
}


def written(text: str, name: str) -> str:
    """The guide's text with table `name` after its marker."""
    marker = f"<!-- {name}: written by tests/test_docs.py -->"
    pattern = re.escape(marker) + r"\n(?:\n(?:\|.*\n)+)?"
    return re.sub(pattern, lambda _: f"{marker}\n\n{TABLES[name][1]()}\n", text)


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_current(name: str) -> None:
    text = TABLES[name][0].read_text(encoding="utf-8")
    assert f"<!-- {name}: written by" in text
    assert written(text, name) == text, "run: python tests/test_docs.py"


def test_the_guides_skeleton_is_every_key_with_its_default() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    skeleton = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    for section, field in SweepConfig.model_fields.items():
        keys = getattr(field.annotation, "model_fields", None)
        if keys is None:
            continue
        if section in ("training", "augment"):  # the table of hyperparameters has all of them
            others = {key: info for key, info in keys.items() if key not in KNOBS}
            given = {key: info for key, info in keys.items() if key in skeleton[section]}
            assert skeleton[section].keys() == given.keys() >= others.keys(), section
            keys = given
        else:
            assert list(skeleton[section]) == list(keys), section
        for key, info in keys.items():
            if section in ("data", "search") and key in skeleton[section]:
                continue  # examples
            default = list(info.default) if isinstance(info.default, tuple) else info.default
            assert skeleton[section][key] == default, f"{section}.{key}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_configs_are_valid_and_say_how_to_run_them(path: Path) -> None:
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# foldrace run configs/{path.name}")
    assert parse_config(path).problems == ()


def technique_rows() -> list[list[str]]:
    text = TECHNIQUES.read_text(encoding="utf-8")
    table = text.split("| technique |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", technique_rows(), ids=lambda row: row[0])
def test_techniques_are_where_the_guide_says(row: list[str]) -> None:
    for file in re.findall(r"`([^`]+)`", row[2]):
        assert (ROOT / file).is_file(), file
    tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[4])
    assert tests
    for name, function in tests:
        [path] = ROOT.glob(f"tests/**/{name}")
        assert f"def {function}(" in path.read_text(encoding="utf-8"), f"{name}::{function}"


def test_every_hyperparameter_of_a_technique_is_in_the_guide() -> None:
    named = set(re.findall(r"\w+", " ".join(row[1] for row in technique_rows())))
    plain = {"lr", "batch_size", "image_size", "epochs", "pretrained"}
    assert KNOBS.keys() - named == plain


def security_rows() -> list[list[str]]:
    table = SECURITY.read_text(encoding="utf-8").split("\n| who |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]


def test_every_promise_of_security_names_a_test_that_is_there_or_is_not_kept() -> None:
    for _, _, promise, test, today in security_rows():
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", test)
        assert named or test == "as above" or "not yet" in today or promise.startswith("none"), test
        for path, function in named:
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), function


def first_cells(guide: Path, head: str) -> list[str]:
    """The names in the first cells of the guide's table under this first heading, in its order."""
    table = guide.read_text(encoding="utf-8").split(f"\n| {head} |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


@pytest.mark.parametrize(
    ("guide", "head", "names"),
    [
        (RACE, "column", DECISIONS),
        (RACE, "rule", RULES),
        (SEARCH, "sampler", SAMPLERS),
    ],
    ids=["decisions.csv", "rules", "samplers"],
)
def test_every_name_of_race_and_search_is_in_its_guide(
    guide: Path, head: str, names: Iterable[str]
) -> None:
    assert first_cells(guide, head) == list(names)


if __name__ == "__main__":
    for table, (guide, _) in TABLES.items():
        guide.write_text(written(guide.read_text(encoding="utf-8"), table), encoding="utf-8")
