"""An exported folder: written aside, its files summed, and put in its place as a whole.

Takes a function that fills a folder; a folder that exists is never written into.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from foldrace.core.errors import UserError
from foldrace.export.blend import ExportedBlend
from foldrace.export.licenses import WeightsLicense, weights_license
from foldrace.export.shipped import blend_io
from foldrace.trainables.models.stack import members

_SHIPPED = Path(blend_io.__file__).parent
_PACKAGE = "foldrace.export.shipped."


def refuse_existing_folder(out: Path) -> None:
    """UserError where there is anything at `out`, or no folder to make it in."""
    if os.path.lexists(out):
        raise UserError.single(f"OUT {out}", "exists; remove it or give another name")
    parent = out.absolute().parent
    nearest = next(path for path in (parent, *parent.parents) if os.path.lexists(path))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError.single(f"OUT {out}", f"cannot be made: {nearest} is no writable folder")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` at the end; nothing is left where that fails."""
    refuse_existing_folder(out)
    parent = out.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=parent))
    except OSError as error:
        raise UserError.single(f"OUT {out}", f"cannot be made: {error}") from error
    try:
        yield part
        refuse_existing_folder(out)
        part.chmod(0o755)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def copy_code(folder: Path, predict: str | None, others: Iterable[str]) -> None:
    """Copy code that runs without Foldrace: `predict` becomes predict.py."""
    for name, target in ((predict, "predict"), *((other, other) for other in others)):
        if name is None:
            continue
        source = (_SHIPPED / f"{name}.py").read_text(encoding="utf-8")
        text = source.replace(f"from {_PACKAGE}", "from ")
        (folder / f"{target}.py").write_text(text, encoding="utf-8")


def write_json(folder: Path, name: str, about: Mapping[str, object]) -> None:
    """Write a JSON file of the folder."""
    text = json.dumps(about, indent=1, ensure_ascii=False)
    (folder / name).write_text(text + "\n", encoding="utf-8", errors="surrogateescape")


def write_requirements(folder: Path, packages: Iterable[str]) -> None:
    """Write the versions that the export was made and tried with."""
    lines = [f"{name}=={metadata.version(name).partition('+')[0]}\n" for name in packages]
    (folder / "requirements.txt").write_text("".join(lines), encoding="utf-8")


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of every file, last of all."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{_sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / blend_io.SUMS).write_text("".join(lines), encoding="utf-8")


def about_blend(blend: ExportedBlend, packages: Iterable[str]) -> dict[str, object]:
    """What both forms' JSON files say of the blend."""
    record, store = blend.record, blend.store
    rule = record.rule
    return {
        "version": blend_io.VERSION,
        "run": store.config().name,
        "folds_hash": record.folds_hash,
        "classes": list(store.classes()),
        "merged_classes": store.merged(),
        "inputs": [asdict(form) for form in blend.forms],
        "decision_rule": None if rule is None else rule.model_dump(mode="json"),
        "scores": {
            "oof_logloss": blend.oof_logloss,
            "crossfit_logloss_of_the_runs_blend": record.crossfit_logloss,
            "members": len(blend.members),
            "members_of_the_runs_blend": blend.considered,
        },
        "made_with": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "licenses": [asdict(each) for each in licenses(blend)],
    }


def licenses(blend: ExportedBlend) -> list[WeightsLicense]:
    """The licence of each backbone's first weights."""
    found = {
        (part.backbone, member.models.store.config().training.pretrained)
        for member in blend.members
        for part in members(member.model_config.backbone)
    }
    return [weights_license(*each) for each in sorted(found, key=str)]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
