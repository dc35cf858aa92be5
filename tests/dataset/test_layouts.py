"""Data sets as competitions and tools hand them out are read with no key but the paths, and with
none at all where the folder is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from foldrace.config.load import parse_mapping
from foldrace.config.schema import DataConfig
from foldrace.dataset.guess import guess_data
from foldrace.dataset.manifest import read_manifest
from foldrace.dataset.test_set import read_test_set
from tests.dataset.layouts import LAYOUTS, Layout


def data_of(folder: Path, keys: dict[str, object]) -> DataConfig:
    raw = {"name": "a", "data": keys, "search": {"backbones": ["timm/test_resnet"]}}
    return parse_mapping(raw, "c.yaml", folder).require().data


def whole(data: DataConfig, layout: Layout) -> list[str]:
    """Checks that every row has its image; gives what is told."""
    rows = read_manifest(data)
    assert (rows.classes, len(rows)) == (layout.classes, layout.images)
    training = {rows.file(row).resolve() for row in range(len(rows))}
    found = read_test_set(data, rows.classes)
    assert found is not None and len(found) == layout.tests
    tested = {found.file(row).resolve() for row in range(len(found))}
    assert all(file.is_file() for file in training | tested) and not training & tested
    assert str(found.form).startswith(layout.form)
    return [*rows.readings, *found.readings, str(found.form)]


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_key_but_the_paths(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    whole(data_of(tmp_path, dict(layout.paths)), layout)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_folder_alone(name: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    layout.write(tmp_path)
    whole(data_of(tmp_path, guess_data(tmp_path, {}).data), layout)
