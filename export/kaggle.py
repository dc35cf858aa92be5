"""What turns an exported folder into a data set for a Kaggle notebook without internet.

Takes a folder and a blend, adds wheels of what the notebook's image may lack, the form of the
submission, and a notebook that predicts the hidden test set.
"""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np

from foldrace.core.errors import EnvironmentProblem, UserError
from foldrace.dataset.submission_form import SubmissionForm
from foldrace.dataset.test_set import ImageSet, read_test_set
from foldrace.export.blend import ExportedBlend
from foldrace.export.folder import copy_code, write_json
from foldrace.run_folder.belonging import telling_where_data_lay

WHEELS = {"bundle": ("timm", "safetensors"), "onnx": ("onnxruntime", "flatbuffers")}
"""Form of the export -> packages that the image of Kaggle's notebooks lacks, or has in another
version."""
_PYTHONS = ("3.11", "3.12")  # those of the image, before and after its last change
_GLIBC = ("manylinux_2_17", "manylinux2014", "manylinux_2_27", "manylinux_2_28")
_SECONDS = 300.0

_FIND = """\
import os, subprocess, sys
from importlib import metadata
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
found = [p for d in range(5) for p in sorted(INPUT.glob("*/" * d + "submission_form.json"))]
assert found, f"{INPUT} has no exported blend: attach its data set to this notebook"
BLEND = found[0].parent"""
_INSTALL = """\
def installed(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None

wanted = {wanted!r}
missing = [f"{{p}}=={{v}}" for p, v in wanted.items() if installed(p) != v]
if missing:
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--find-links"]
    subprocess.run([*pip, str(BLEND / "wheels"), *missing], check=True)"""
_PREDICT = """\
sys.path.insert(0, str(BLEND))
from kaggle_submission import write_submission
from predict import Blend

print(write_submission(INPUT, Blend(BLEND), WORKING / "submission.csv"))"""


def require_test_set(blend: ExportedBlend) -> ImageSet:
    """The run's test set, whose form the submission has; UserError where it has none."""
    with telling_where_data_lay(blend.store):
        test = read_test_set(blend.store.config().data, blend.store.own_classes())
    if test is None:
        raise UserError.single(
            "--kaggle", "the run has no data.test, so that the form of a submission is not known"
        )
    return test


def download_wheels(folder: Path, form: str) -> None:
    """Fill `wheels/` in the folder; EnvironmentProblem where the network or the index fails."""
    wanted = [f"{name}=={metadata.version(name)}" for name in WHEELS[form]]
    platforms = [f"--platform={glibc}_x86_64" for glibc in _GLIBC]
    for python in _PYTHONS:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", "--only-binary=:all:", f"--python-version={python}", *platforms),
            *("--dest", str(folder / "wheels"), *wanted),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
            fault = "" if done.returncode == 0 else _fault(done.stderr)
        except subprocess.TimeoutExpired:
            fault = f"no answer in {_SECONDS:.0f} s"
        if fault:
            raise EnvironmentProblem.single(
                "--kaggle",
                f"the wheels of {', '.join(wanted)} for Python {python} cannot be downloaded: "
                f"{fault}. Is the package index within reach? Nothing was written",
            )


def write_kaggle(blend: ExportedBlend, test: ImageSet, folder: Path, form: str) -> None:
    """Add the form of the submission, the notebook, and the code that they call."""
    write_json(folder, "submission_form.json", _form(blend, test))
    write_json(folder, "submission.ipynb", _notebook(blend, form))
    name = blend.store.config().name
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    write_json(
        folder,
        "dataset-metadata.json",
        {
            "title": f"{name} blend"[:50],
            "id": f"INSERT_YOUR_USER_NAME_HERE/{slug}-blend"[:76],
            "licenses": [{"name": "other"}],
        },
    )
    copy_code(folder, None, ("kaggle_submission",))


def _form(blend: ExportedBlend, test: ImageSet) -> dict[str, object]:
    data, form = blend.store.config().data, test.form
    table = Path(test.table).name if test.table else None
    counts = np.bincount(blend.store.labels(), minlength=len(blend.store.classes()))
    return {
        "sample": Path(data.sample_submission or "sample_submission.csv").name,
        "kind": form.kind,
        "of": form.of,
        "delimiter": form.delimiter,
        "id_at": form.id_at,
        "value_at": form.value_at,
        "class_at": _class_at(form),
        "class_columns": form.class_columns,
        "id_column": test.id_column,
        "test_table": table,
        "image_column": data.test_image_column or data.image_column,
        "merged": blend.store.merged(),
        "class_frequencies": dict(
            zip(blend.store.classes(), (counts / counts.sum()).tolist(), strict=True)
        ),
    }


def _class_at(form: SubmissionForm) -> int | None:
    """Long form: position of the column that names the class; None where the id ends with it."""
    others = [i for i in range(form.id_at + 1, len(form.header)) if i != form.value_at]
    return others[0] if form.kind == "long" and others else None


def _notebook(blend: ExportedBlend, form: str) -> dict[str, object]:
    wanted = {name: metadata.version(name) for name in WHEELS[form]}
    record, name = blend.record, blend.store.config().name
    text = (
        f"# {name}: {len(blend.members)} members, {blend.folds} fold models each\n\n"
        f"Log loss {blend.oof_logloss:.4f} out of fold; {record.crossfit_logloss:.4f} "
        "cross-fitted, of the run's whole blend. Attach this data set and the competition; "
        "internet may be off."
    )
    cells = [_cell("markdown", text)]
    cells += [_cell("code", code) for code in (_FIND, _INSTALL.format(wanted=wanted), _PREDICT)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return {
        "nbformat": 4,
        "nbformat_minor": 5,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "cells": [cell | {"id": f"cell-{i}"} for i, cell in enumerate(cells)],
    }


def _cell(kind: str, text: str) -> dict[str, object]:
    cell: dict[str, object] = {
        "cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)
    }  # fmt: skip
    return cell | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def _fault(stderr: str) -> str:
    """The line of pip's messages that says most."""
    lines = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if "ERROR" in line]
    return (lines or stderr.splitlines()[-1:] or ["pip said nothing"])[-1]
