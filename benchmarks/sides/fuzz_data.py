"""Fuzz targets of what users give as data: tables, submissions, images, archives, predictions."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import stat
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.sides.fuzz_guard import Box, Call, Target, Wrong
from benchmarks.sides.fuzz_mutations import WORDS, damaged, npy, value
from benchmarks.sides.fuzz_scene import CLASSES, Examples
from foldrace.config.schema import DataConfig, FoldsConfig
from foldrace.core.errors import DataError, FoldraceError
from foldrace.core.redaction import starred
from foldrace.dataset.archive import unpack
from foldrace.dataset.folds import folds_csv, make_folds, read_folds
from foldrace.dataset.images import ImageError, check_image, decode_rgb, find_files
from foldrace.dataset.manifest import read_manifest
from foldrace.dataset.predictions_file import ExpectedRows, read_predictions
from foldrace.dataset.test_set import read_test_set
from foldrace.ensemble.selection.external import parse_adds
from foldrace.inference.submission import check_submission, submission_csv

_ENCODINGS = (
    "utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp949", "cp1252",
    "cp932", "gb18030", "koi8-r", "latin-1",
)  # fmt: skip
_SUFFIXES = (".csv", ".csv", ".csv", ".tsv", ".jsonl", ".ndjson", ".parquet", ".txt", "", ".CSV")
_NO_IMAGES = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file closefile\nshowpage\n",
    b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"icns\0\0\0\x10ic07\0\0\0\x08", b"SIMPLE  =                    T", b"GIF89a", b"BM", b"II*\0",
    b"8BPS\0\1", b"\0\0\1\0\1\0", b"\x01\xda\x01\x01", b"\0\0\0\x0cftypheic", b"", b"P6 9 9 255\n",
    b"P6 99999999 99999999 255\n", b"P7\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
)  # fmt: skip


def _cell(rng: random.Random, usual: Sequence[str]) -> str:
    return rng.choice(usual) if rng.random() < 0.9 else rng.choice(WORDS)


def table_bytes(rng: random.Random, rows: Sequence[Sequence[str]], suffix: str) -> bytes:
    """Rows of texts, the first of them the header, in one of the forms that tables have."""
    if suffix in (".jsonl", ".ndjson"):
        names = rows[0]
        lines = [json.dumps(dict(zip(names, row, strict=False))) for row in rows[1:]]
        if lines and rng.random() < 0.2:
            lines[rng.randrange(len(lines))] = json.dumps(value(rng))
        return "\n".join(lines).encode()
    if suffix == ".parquet":
        width = min(map(len, rows))
        columns = [[row[i].encode("utf-8", "replace").decode() for row in rows[1:]]
                   for i in range(width)]  # fmt: skip
        names = [f"{name.encode('utf-8', 'replace').decode()}" for name in rows[0][:width]]
        arrays = [
            pa.array(column)
            if rng.random() < 0.9
            else pa.array([rng.random() if rng.random() < 0.9 else None for _ in column])
            for column in columns
        ]
        file = io.BytesIO()
        pq.write_table(pa.Table.from_arrays(arrays, names=names), file)
        return file.getvalue()
    text = io.StringIO()
    delimiter = "\t" if suffix == ".tsv" else rng.choice((",", ",", ",", ";", "|", "\t"))
    ends = rng.choice(("\n", "\n", "\r\n", "\r"))
    quoting = rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONE))
    writer = csv.writer(
        text, delimiter=delimiter, lineterminator=ends, quoting=quoting, escapechar="\\"
    )
    with suppress(csv.Error):  # an empty cell alone, without quotes
        writer.writerows(rows)
    return text.getvalue().encode(rng.choice(_ENCODINGS), "replace")


def _write_table(rng: random.Random, box: Box, rows: Sequence[Sequence[str]]) -> str:
    suffix = rng.choice(_SUFFIXES)
    data = table_bytes(rng, rows, suffix)
    name = f"table{rng.randrange(100)}{suffix}"
    return str(box.write(name, damaged(rng, data) if rng.random() < 0.4 else data))


class DataTargets:
    """The targets, over examples that are sound."""

    def __init__(self, examples: Examples, folder: Path) -> None:
        """`folder`: where the examples' data lie, which no case changes."""
        self._examples, self._folder = examples, folder
        with (folder / "train.csv").open(encoding="utf-8") as file:
            self._rows = list(csv.reader(file))
        self._paths = [row[0] for row in self._rows[1:]]
        self._images = list(examples.images.values())

    def targets(self) -> tuple[Target, ...]:
        return (
            Target("tables", 130, self._table),
            Target("lists", 50, self._lists),
            Target("submissions", 70, self._submission),
            Target("images", 150, self._image, (ImageError,)),
            Target("archives", 70, self._archive),
            Target("predictions", 60, self._predictions),
            Target("--add", 40, self._add),
            Target("secrets", 40, self._secret),
        )

    def _train_rows(self, rng: random.Random) -> list[list[str]]:
        rows = [
            [
                _cell(rng, self._paths),
                _cell(rng, CLASSES),
                _cell(rng, ("g0", "g1", "g2")),
                _cell(rng, ("0", "1")),
            ]
            for _ in range(rng.choice((0, 1, 8, 12, 30)))
        ]
        if rng.random() < 0.6:  # each image once
            rows = [
                [p, CLASSES[i % 3], f"g{i // 2}", str(i % 2)] for i, p in enumerate(self._paths)
            ]
            for _ in range(rng.choice((0, 0, 1, 2))):
                rng.choice(rows)[rng.randrange(4)] = rng.choice(WORDS)
        header = ["image_path", "label", "group", "fold"]
        if rng.random() < 0.1:
            header[rng.randrange(4)] = rng.choice((*WORDS, "label"))
        return [header, *rows]

    def _config(self, rng: random.Random, train: str) -> DataConfig:
        return DataConfig(
            train=train,
            train_images=str(self._folder) if rng.random() < 0.9 else None,
            label_column="label",
            group_column=rng.choice((None, "group")),
            duplicates=rng.choice(("report", "drop")),
            max_per_class=rng.choice((None, None, 2)),
            encoding=rng.choice((None, None, None, "cp949", "utf-16", "cp1252")),
        )

    def _table(self, rng: random.Random, box: Box) -> Call:
        data = self._config(rng, _write_table(rng, box, self._train_rows(rng)))
        folds = FoldsConfig(k=rng.choice((1, 2, 3)), column=rng.choice((None, None, "fold")))

        def call() -> None:
            manifest = read_manifest(data, folds.column)
            fold = make_folds(manifest, folds)
            again = read_folds(folds_csv(manifest, fold))
            same = (
                again.image_paths == manifest.image_paths
                and again.fold.tolist() == fold.tolist()
                and list(again.targets) == [manifest.classes[i] for i in manifest.labels]
            )
            if not same:
                raise Wrong("folds.csv does not give back what was written")

        return call

    def _lists(self, rng: random.Random, box: Box) -> Call:
        paths = [*self._paths, self._paths[0].removesuffix(".jpg")]
        excluded = [["image_path"], *([_cell(rng, paths)] for _ in range(rng.randrange(4)))]
        fixed = [["image_path", "label"]]
        fixed += [[_cell(rng, paths), _cell(rng, CLASSES)] for _ in range(rng.randrange(4))]
        merged = rng.choice(({}, {}, {"pet": ("cat", "dog")}, {"cat": ("cat", "가")}))
        if rng.random() < 0.1:
            merged = {rng.choice(WORDS): (rng.choice((*WORDS, *CLASSES)), "cat")}
        places: dict[str, Any] = {}
        if rng.random() < 0.7:
            places["exclude"] = _write_table(rng, box, excluded)
        if rng.random() < 0.7:
            places["fixes"] = _write_table(rng, box, fixed)
        train = str(self._folder / "train.csv")
        data = self._config(rng, train).model_copy(
            update={**places, "merge_classes": merged, "encoding": None}
        )
        return lambda: read_manifest(data)

    def _submission(self, rng: random.Random, box: Box) -> Call:
        ids = [f"t{i}" for i in range(4)]
        tests = [["id", "image_path"], *([i, f"test/{i}.png"] for i in ids)]
        kind = rng.randrange(5)
        numbers = ("0.3", "0", "1", "0.5")
        if kind == 0:
            sample = [["id", "label"], *([i, _cell(rng, CLASSES)] for i in ids)]
        elif kind == 1:
            pairs = itertools.product(ids, CLASSES)
            sample = [["id", "class", "p"], *([i, c, _cell(rng, numbers)] for i, c in pairs)]
        else:
            columns = rng.sample(CLASSES, 3)
            sample = [["id", *columns], *([i, *(_cell(rng, numbers) for _ in "abc")] for i in ids)]
        for rows in (tests, sample):
            for _ in range(rng.choice((0, 0, 0, 1, 2))):
                row = rng.choice(rows)
                row[rng.randrange(len(row))] = rng.choice(WORDS)
            if rng.random() < 0.2:
                rows.insert(1, rows.pop(rng.randrange(len(rows))))
            if rng.random() < 0.05:
                rng.choice(rows).append(rng.choice(WORDS))
        sound = rng.random() < 0.4
        suffix = ".csv" if sound else rng.choice(_SUFFIXES)
        sample_path = box.write(f"sample{suffix}", table_bytes(rng, sample, suffix))
        test = str(self._folder / "test") if rng.random() < 0.3 else None
        data = DataConfig(
            train="unused",
            test=test or (str(box.write("test.csv", table_bytes(rng, tests, ".csv")))),
            test_images=str(self._folder) if test is None else None,
            sample_submission=str(sample_path) if rng.random() < 0.9 else None,
            submission=rng.choice((None, None, None, "labels", "probabilities")),
        )

        def call() -> None:
            found = read_test_set(data, CLASSES)
            assert found is not None
            prob = np.random.default_rng(0).dirichlet(np.ones(len(CLASSES)), len(found))
            check_submission(submission_csv(found, CLASSES, prob), found)

        return call

    def _image(self, rng: random.Random, box: Box) -> Call:
        data = rng.choice((*self._images, *self._images, *_NO_IMAGES))
        if rng.random() < 0.97:
            data = damaged(rng, data, self._images)
        path, side = box.data / "image.jpg", rng.choice((None, 8, 32))

        def call() -> None:
            try:
                checked = check_image(data, path)
            except ImageError:
                checked = None
            try:
                image = decode_rgb(data, path, side)
            except ImageError:
                if checked is not None:
                    raise Wrong("checked as sound, but not read") from None
                raise
            if image.mode != "RGB" or min(image.size) < 1:
                raise Wrong(f"an image of mode {image.mode} and size {image.size}")

        return call

    def _archive(self, rng: random.Random, box: Box) -> Call:
        packed = io.BytesIO()
        methods = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        with zipfile.ZipFile(packed, "w") as archive:
            for _ in range(rng.choice((0, 1, 3, 8))):
                name = rng.choice(("cat/1.png", "dog/2.png", "a.csv", "cat/", *WORDS))
                if rng.random() < 0.2:
                    name = "/".join((name, rng.choice(WORDS)))
                if rng.random() < 0.01:
                    name = "d/" * rng.choice((100, 1_200, 5_000)) + "x"
                info = zipfile.ZipInfo("x")
                info.filename = name.encode("utf-8", "replace").decode()[:20_000]
                info.compress_type = rng.choice(methods)
                kind = rng.choice((0, 0, 0, stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO, stat.S_ISUID))
                info.external_attr = (kind | 0o777) << 16
                content = rng.choice((b"", b"../../outside", bytes(100_000), self._images[0]))
                archive.writestr(info, content)
        data = packed.getvalue() if rng.random() < 0.7 else self._examples.data["data.zip"]
        if rng.random() < 0.6:
            data = damaged(rng, data, [self._examples.data["data.zip"]])
        path = box.write("data.zip", data)

        def call() -> None:
            folder = unpack(path, rng.choice((None, None, "cp949")))
            if not folder.resolve().is_relative_to(box.cache):
                raise Wrong(f"unpacked to {folder}")
            for entry in folder.rglob("*"):
                if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
                    raise Wrong(f"{entry} is no file")
                if entry.stat().st_mode & (stat.S_ISUID | stat.S_ISGID):
                    raise Wrong(f"{entry} changes its user")
            find_files(folder)

        return call

    def _predictions(self, rng: random.Random, box: Box) -> Call:
        ids = tuple(f"{i}.png" for i in range(8))
        expected = ExpectedRows("row", ids, ("id", "image_path"), "folds.csv", CLASSES)
        prob = np.random.default_rng(rng.randrange(1000)).dirichlet(np.ones(3), 8)
        if rng.random() < 0.5:
            file = io.BytesIO()
            np.save(file, prob.astype(rng.choice((np.float16, np.float32, np.float64))))
            data = file.getvalue()
            path = box.write("p.npy", npy(rng, data) if rng.random() < 0.9 else data)
        else:
            rows = [["id", *CLASSES]]
            rows += [[i, *map(str, row)] for i, row in zip(ids, prob.tolist(), strict=True)]
            for _ in range(rng.choice((0, 0, 1, 3))):
                row = rng.choice(rows)
                row[rng.randrange(4)] = rng.choice(WORDS)
            path = Path(_write_table(rng, box, rows))

        def call() -> None:
            problems: list[Any] = []
            found = read_predictions(path, expected, problems)
            if (found is None) != bool(problems):
                raise Wrong(f"{len(problems)} problems, and {found is not None}")
            if problems:
                raise DataError(problems)
            if found is None or found.shape != (8, 3) or not np.allclose(found.sum(axis=1), 1):
                raise Wrong("no probabilities")

        return call

    def _add(self, rng: random.Random, box: Box) -> Call:
        pieces = ("name", "=", ":", ".csv", ".npy", "/", "~", "a.csv", "=a.csv:b.csv", *WORDS)
        sound = ("one=a.csv", "two=b/c.npy:d.csv", "three=:e.parquet")
        texts = [
            rng.choice(sound)
            if rng.random() < 0.6
            else "".join(rng.choices(pieces, k=rng.randrange(1, 6)))
            for _ in range(rng.choice((1, 2)))
        ]
        return lambda: parse_adds(texts)

    def _secret(self, rng: random.Random, box: Box) -> Call:
        """A password in one of the places that a URL has for it must be in no message."""
        secret = rng.choice(("HUNTER2", "HUNTER2/x", "HUN:TER2", "HUNTER2 y", "HUNTER2@z"))
        given = quote(secret, safe="") if rng.random() < 0.5 else secret
        host = rng.choice(("h", "h:5432", "127.0.0.1:9000", "[::1]:1", "bucket.example.com"))
        key = rng.choice(("password", "sslpassword", "secret_key", "PassWord", "pw", "%70assword"))
        scheme = rng.choice(("postgresql", "s3", "postgresql+psycopg", "ftp", "mysql", "S3"))
        if any(letter in given for letter in "@ :/"):  # only in front of the @ can these be told
            url = f"{scheme}://user:{given}@{host}/db"
        else:
            url = rng.choice(
                (
                    f"{scheme}://user:{given}@{host}/db",
                    f"{scheme}://{given}@{host}/db",
                    f"{scheme}://{host}/db?{key}={given}",
                    f"{scheme}://{host}/db?region=x&{key}={given}",
                    f"{scheme}://{host}/db?a=b;{key}={given}",
                )
            )
        before, after = rng.choice(
            (("", ""), ("'", "'"), ("got ", "; x"), ("(", ")"), ('["', '"]'))
        )
        text = f"{before}{url}{after}"

        def call() -> None:
            error = FoldraceError(text)
            if "HUNTER2" in str(error) or "HUNTER2" in starred(text) or "TER2" in str(error):
                raise Wrong(f"shown: {error}")

        return call
