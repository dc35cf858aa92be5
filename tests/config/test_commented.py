"""A config with a comment at each line, read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from foldrace.config.commented import commented_yaml
from foldrace.config.hyperparameters import KNOBS
from foldrace.config.load import parse_config
from foldrace.config.schema import SweepConfig

KEYS: dict[str, Any] = {
    "training": {"epochs": 7, "pretrained": False, "clip_grad": 0.5},
    "name": "1e3",
    "data": {"train": "my: photos # 2", "label_column": "no", "train_images": "파일/" + "x" * 80},
    "search": {"backbones": ["timm/resnet18"], "space": {"lr": {"low": 1e-4, "high": 0.01}}},
    "resources": {"time_budget": "30m"},
}


def test_it_is_read_back_as_it_was(tmp_path: Path) -> None:
    text = commented_yaml(KEYS, ["foldrace run it", "", "what: [was] chosen"])
    assert yaml.safe_load(text) == KEYS
    path = tmp_path / "sweep.yaml"
    path.write_text(text, encoding="utf-8")
    config = parse_config(path).require()
    assert (config.name, config.training.epochs) == ("1e3", 7)
    assert config.resources.time_budget == 1800
    assert text.startswith("# foldrace run it\n#\n# what: [was] chosen\nname:")


def test_every_key_has_its_comment() -> None:
    lines = commented_yaml(KEYS).splitlines()
    for i, line in enumerate(lines):
        if line.startswith("  ") and not line.strip().startswith("#"):
            assert "  # " in line or lines[i - 1].strip().startswith("# "), line
    assert "  clip_grad: 0.5" in "\n".join(lines)
    assert "# largest global gradient norm" in "\n".join(lines)


@pytest.mark.parametrize("section", ["data", "folds", "search", "training", "resources"])
def test_a_comment_is_short_and_ends_well(section: str) -> None:
    """Of every key that has a docstring in the schema or the list of hyperparameters."""
    model: Any = SweepConfig.model_fields[section].annotation
    documented = [n for n, f in model.model_fields.items() if f.description or n in KNOBS]
    assert len(documented) >= 3
    for name in documented:
        [comment] = [
            part.strip()
            for line in commented_yaml({section: {name: 1}}).splitlines()[1:]
            for part in line.split("# ")[1:]
        ]
        assert 3 < len(comment) <= 90, name
        assert comment[-1] not in ",:(.", name
        assert comment.count("(") == comment.count(")"), name
