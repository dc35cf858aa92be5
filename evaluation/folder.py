"""The folder of one evaluation, `evaluations/run_<time>_<id>/`, or of one review of labels.

Takes texts, pictures and what they were made of; gives the name of the folder. Each call has a new
one; metadata.json comes last, so that a folder with it is whole.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import foldrace
from foldrace.core.errors import UserError
from foldrace.core.files import Files, open_files, to_bytes
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore

EVALUATIONS, LABELS = "evaluations", "labels"
METADATA = "metadata.json"


@dataclass
class EvaluationFiles:
    """The files of an evaluation, by their names in its folder."""

    contents: dict[str, bytes] = field(default_factory=dict)
    about: dict[str, object] = field(default_factory=dict)
    """What metadata.json says beyond run and blend."""

    def add(self, name: str, content: str | bytes) -> None:
        """Add a file."""
        self.contents[name] = to_bytes(content) if isinstance(content, str) else content


def target(
    store: RunStore, out: Path | None, started: datetime, kind: str = EVALUATIONS
) -> tuple[Files, str]:
    """Where an evaluation or a review of labels goes: its files, and the folder in them.

    `out` is a new or empty folder that the user names; UserError where there is something in it.
    """
    if out is None:
        name = f"run_{started:%Y%m%d_%H%M%S}_{uuid.uuid4().hex[:8]}"
        return store.files, f"{kind}/{name}/"
    if out.is_dir() and any(out.iterdir()):
        raise UserError.single(
            f"--out {out}", "is not empty; name a new folder, or leave --out away"
        )
    if out.exists() and not out.is_dir():
        raise UserError.single(f"--out {out}", "is a file; name a new folder")
    return open_files(out.resolve()), ""


def write(
    store: RunStore,
    blend: EnsembleRecord,
    files: EvaluationFiles,
    where: tuple[Files, str],
    started: datetime,
) -> str:
    """Write the files and metadata.json; gives the folder's path. UserError where that fails."""
    place, folder = where
    try:
        for name, data in files.contents.items():
            place.write(f"{folder}{name}", data)
        text = json.dumps(_metadata(store, blend, files, started), indent=1, ensure_ascii=False)
        place.write(f"{folder}{METADATA}", to_bytes(f"{text}\n"))
    except OSError as error:
        raise UserError.single(
            f"{place.root}/{folder}", f"cannot be written: {error}; --out names another folder"
        ) from error
    return f"{place.root}/{folder}".rstrip("/")


def _metadata(
    store: RunStore, blend: EnsembleRecord, files: EvaluationFiles, started: datetime
) -> Mapping[str, object]:
    return {
        "foldrace": foldrace.__version__,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - started).total_seconds(), 2),
        "run": store.root,
        "folds_hash": blend.folds_hash,
        "blend": {
            "method": blend.method,
            "members": [
                {"candidate": m.candidate, "variant": m.variant, "run": m.run, "weight": m.weight}
                for m in blend.members
            ],
            "oof_logloss": blend.oof_logloss,
            "crossfit_logloss": blend.crossfit_logloss,
            "decision_rule": blend.rule is not None,
            "ms_per_image": blend.ms_per_image,
            "device": blend.device,
        },
        **files.about,
        "files": sorted(files.contents),
    }
