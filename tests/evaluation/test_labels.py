"""`labels`: what it finds, and its page in a real browser: page -> tables -> what a run reads."""

from __future__ import annotations

import csv
import html.parser
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from foldrace.commands.labels import PAGE, labels
from foldrace.commands.moved_data import AS_STORED
from foldrace.config.schema import DataConfig
from foldrace.console.terminal import Terminal
from foldrace.core.errors import UserError
from foldrace.dataset.manifest import read_manifest
from foldrace.run_folder.store import RunStore
from tests.conftest import write_tiny_run
from tests.evaluation.chromium import browser
from tests.evaluation.conftest import WRONG, OofRun, write_oof

HOSTILE = '</script><img src=x onerror=alert(1)>, "q" <!-- \'é.png'


def run(store: RunStore, most: int = 1000) -> Path:
    return Path(labels(store.root, None, most, Terminal(quiet=True), AS_STORED))


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def copied_images(tiny_images: Path, tmp_path: Path) -> Path:
    """The tiny images, one file renamed to a hostile name."""
    root = tmp_path / "images"
    for file in sorted(tiny_images.rglob("*.png")):
        (root / file.parent.name).mkdir(parents=True, exist_ok=True)
        (root / file.parent.name / file.name).write_bytes(file.read_bytes())
    return root


def test_what_every_member_disagrees_with_is_found(oof_run: OofRun) -> None:
    folder = run(oof_run.store)
    rows, classes = table(folder / "labels.csv"), oof_run.store.classes()
    paths = oof_run.store.folds().image_paths
    assert {row["image_path"] for row in rows} == {paths[i] for i in WRONG}
    for row in rows:
        i = paths.index(row["image_path"])
        assert row["label"] == classes[oof_run.labels[i]]
        assert row["suggested"] == classes[(oof_run.labels[i] + 1) % 3]
        assert (row["members"], row["votes_suggested"]) == ("2", "2")
    about = json.loads((folder / "metadata.json").read_text())["labels"]
    assert about["wrong_share"] == pytest.approx(len(WRONG) / 60, abs=0.02)
    assert about["ceiling_accuracy"] == 1 - about["wrong_share"]


def test_equal_images_with_different_labels(copied_images: Path, tmp_path: Path) -> None:
    (copied_images / "red" / "3.png").write_bytes((copied_images / "blue" / "5.png").read_bytes())
    shapes = Image.linear_gradient("L").rotate(30, fillcolor=200).convert("RGB")
    shapes.save(copied_images / "green" / "7.png")
    shapes.resize((64, 64)).save(copied_images / "blue" / "9.png")
    store = write_tiny_run(tmp_path / "run", copied_images).store
    write_oof(store)
    folder = run(store)
    found = {
        (row["image_path"], row["other"], row["kind"]) for row in table(folder / "conflicts.csv")
    }
    assert found == {
        ("blue/5.png", "red/3.png", "identical"),
        ("blue/9.png", "green/7.png", "near"),
    }
    items = content(folder)["items"]
    assert [item["path"] for item in items[:2]] == ["blue/5.png", "red/3.png"]
    assert [item["suggested"] for item in items[:2]] == ["blue", "red"]  # as the models say
    assert items[0]["twin"] and "red/3.png, which has the label red" in items[0]["reason"]


class Script(html.parser.HTMLParser):
    """What a browser takes for the page's scripts, images and links."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or "" if tag == "script" else ""

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def content(folder: Path) -> dict[str, Any]:
    parser = Script()
    parser.feed((folder / PAGE).read_text(encoding="utf-8"))
    return dict(json.loads(parser.texts["content"]))


def test_the_page_loads_nothing_and_is_bounded(oof_run: OofRun) -> None:
    folder = run(oof_run.store, most=2)
    parser = Script()
    text = (folder / PAGE).read_text(encoding="utf-8")
    parser.feed(text)
    assert len(content(folder)["items"]) == 2
    assert "2 images of 5 suspects and pairs" in text
    assert not any("src" in attrs or "href" in attrs for _, attrs in parser.tags)
    assert "default-src 'none'" in text


def test_images_that_have_gone(copied_images: Path, tmp_path: Path) -> None:
    store = write_tiny_run(tmp_path / "run", copied_images).store
    write_oof(store)
    copied_images.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="--data-root"):
        run(store)


@pytest.mark.parametrize("hostile", [False, True])
def test_keep_relabel_drop_and_back_into_a_run(
    copied_images: Path, tmp_path: Path, hostile: bool
) -> None:
    paths = read_manifest(DataConfig(train=str(copied_images))).image_paths
    if hostile:  # the name of a suspect, `/` being the one character that no file name has
        old = copied_images / paths[WRONG[0]]
        old.rename(old.with_name(HOSTILE.replace("/", "\u2215")))
        other = copied_images / paths[WRONG[2]]
        os.rename(other, os.fsencode(other.parent) + b"/\xff\xc3 caf\xe9 \xf0\x9f\x93\x80.png")
    store = write_tiny_run(tmp_path / "run", copied_images).store
    write_oof(store)
    folder = run(store)
    items = content(folder)["items"]
    assert len(items) == len(WRONG)
    with browser(tmp_path / "profile") as page:
        page.open(folder / PAGE, tmp_path)
        assert page.value("document.querySelectorAll('img[src^=\"data:image/jpeg\"]').length") > 0
        for key in ("r", "d", "k", "2", "d", "u", "r"):
            page.press(key)
        state = page.value("[...decisions.values()].map((d) => d.kind).join()")
        assert page.value("current") == 4, state
        assert state == "relabel,drop,keep,relabel,relabel"
        assert "1 kept, 3 relabelled, 1 dropped" in page.value("at('count').textContent")
        page.press("s")
        page.press("x")
        for name in ("fixes.csv", "exclude.csv"):
            _wait_for(tmp_path / name)
    chosen = {
        items[0]["path"]: items[0]["suggested"],
        items[3]["path"]: items[3]["guesses"][1]["name"],
        items[4]["path"]: items[4]["suggested"],
    }
    data = DataConfig(
        train=str(copied_images), fixes=str(tmp_path / "fixes.csv"),
        exclude=str(tmp_path / "exclude.csv"),
    )  # fmt: skip
    now = read_manifest(data)
    before = read_manifest(DataConfig(train=str(copied_images)))
    assert [one.image_path for one in now.left_out] == [items[1]["path"]]
    names = dict(zip(before.image_paths, np.array(before.classes)[before.labels], strict=True))
    del names[items[1]["path"]]
    assert dict(zip(now.image_paths, np.array(now.classes)[now.labels], strict=True)) == (
        names | chosen
    )


def _wait_for(file: Path) -> None:
    import time

    end = time.monotonic() + 60
    while not (file.is_file() and file.stat().st_size):
        assert time.monotonic() < end, f"{file.name} has not been downloaded"
        time.sleep(0.05)


def test_earlier_changes_stay(copied_images: Path, tmp_path: Path, make_fixed: Any) -> None:
    store = make_fixed(copied_images)
    earlier = content(run(store))["earlier"]
    assert earlier == {"fixes": [["blue/0.png", "red"]], "dropped": ["blue/1.png"]}


@pytest.fixture
def make_fixed(tmp_path: Path) -> Callable[[Path], RunStore]:
    """A run whose own lists have changed two rows."""

    def make(images: Path) -> RunStore:
        from foldrace.config.schema import FoldsConfig, SearchConfig, SweepConfig
        from foldrace.dataset.folds import folds_csv, make_folds
        from foldrace.dataset.left_out import left_out_csv

        (tmp_path / "old.csv").write_text("image_path,target\nblue/0.png,red\n")
        (tmp_path / "out.csv").write_text("image_path\nblue/1.png\n")
        config = SweepConfig(
            name="fixed",
            data=DataConfig(train=str(images), fixes=str(tmp_path / "old.csv"),
                            exclude=str(tmp_path / "out.csv")),
            folds=FoldsConfig(k=3),
            search=SearchConfig(backbones=("timm/test_vit",)),
        )  # fmt: skip
        manifest = read_manifest(config.data)
        store = RunStore(tmp_path / "fixed")
        folds = folds_csv(manifest, make_folds(manifest, config.folds))
        others = {"left_out.csv": left_out_csv(manifest.left_out)}
        store.create(config, folds, manifest.classes, others=others)
        write_oof(store)
        return store

    return make
