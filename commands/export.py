"""`export`: the blend as a folder that runs without Foldrace, as weights or as ONNX.

Takes a run folder and a new folder's path; prints how near the export is to the run's own models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from foldrace.commands.moved_data import AS_STORED, DataOptions, use_data
from foldrace.console.machine import cores
from foldrace.console.warnings import warnings_shown
from foldrace.core.errors import Problem, UserError, check_name
from foldrace.core.plugins import naming_plugins
from foldrace.export.blend import ExportedBlend, open_blend
from foldrace.export.bundle import write_bundle
from foldrace.export.folder import licenses, new_folder, refuse_existing_folder
from foldrace.export.kaggle import download_wheels, require_test_set, write_kaggle
from foldrace.export.onnx_graph import require_onnx
from foldrace.export.parity import Measured, Parity
from foldrace.run_folder.allowed import open_allowed

FORMS = ("bundle", "onnx")


@dataclass(frozen=True)
class ExportOptions:
    """What is written."""

    form: str = "bundle"
    """A row of FORMS."""
    members: int | None = None
    """Number of members at most, the heaviest; None: all."""
    fp16: bool = False
    int8: bool = False
    kaggle: bool = False


@naming_plugins()
def export(
    root: str,
    out: Path,
    options: ExportOptions,
    console: Console,
    data: DataOptions = AS_STORED,
    trust_plugins: bool = False,
    runs: Sequence[str] = (),
) -> None:
    """Write the folder `out`, whole or not at all.

    `trust_plugins` and `runs`: see `open_allowed`. UserError for what cannot be exported, and where
    `out` exists; RunFailure where the export is not what the run's models are.
    """
    _check(options)
    store = open_allowed(root, trust_plugins, runs)
    use_data(store, data)
    refuse_existing_folder(out)
    is_onnx = options.form == "onnx"
    if is_onnx:
        require_onnx()
    with warnings_shown(console):
        blend = open_blend(store, options.members, code_free=not is_onnx)
        test = require_test_set(blend) if options.kaggle else None
        with new_folder(out) as folder:
            if test is not None:
                download_wheels(folder, options.form)
                write_kaggle(blend, test, folder, options.form)
            measured: list[Measured] = []
            if is_onnx:
                from foldrace.export.onnx_folder import write_onnx

                parity, measured = write_onnx(blend, folder, options.fp16, options.int8, cores())
            else:
                parity = write_bundle(blend, folder, cores())
    for line in _lines(blend, parity, out):
        console.print(line)
    if measured:
        console.print(_table(measured))
    for line in _what_next(blend, out, options):
        console.print(line)


def _check(options: ExportOptions) -> None:
    problem = check_name("--format", options.form, FORMS)
    problems = [] if problem is None else [problem]
    if problem is None and options.form != "onnx":
        message = "makes a smaller ONNX graph; give --format onnx, too"
        asked = {"--fp16": options.fp16, "--int8": options.int8}
        problems += [Problem(name, message) for name, is_asked in asked.items() if is_asked]
    if problems:
        raise UserError(problems)


def _lines(blend: ExportedBlend, parity: Parity, out: Path) -> Iterator[str]:
    count, models = len(blend.members), len(blend.members) * blend.folds
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    of = "" if count == blend.considered else f" of {blend.considered}"
    noun = "member" if count == 1 and not of else "members"
    yield f"{out}: {count}{of} {noun}, {models} fold models, {size / 1e6:,.1f} MB"
    if of:
        yield (
            f"OOF log loss with these members {blend.oof_logloss:.5f}, with all "
            f"{blend.record.oof_logloss:.5f}"
        )
    yield (
        f"Parity on {parity.images} OOF images: probabilities differ by at most "
        f"{parity.max_difference:.1e} on the same pixels, {parity.max_difference_from_files:.1e} "
        f"from the files (pixels by at most {parity.max_pixel_difference} of 255)"
    )
    yield (
        f"Log loss of these images: {parity.oof_logloss:.6f} by the run's models, "
        f"{parity.exported_oof_logloss:.6f} by the export"
    )


def _table(measured: Sequence[Measured]) -> Table:
    title = f"{measured[0].rows} OOF images, each by the models that have not seen it; on the CPU"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for name in ("file", "MB", "log loss", "change", "accuracy", "ms/image"):
        table.add_column(name, justify="left" if name == "file" else "right", no_wrap=True)
    for row in measured:
        table.add_row(
            row.file, f"{row.bytes / 1e6:.1f}", f"{row.oof_logloss:.5f}",
            f"{row.change:+.5f} ± {row.change_se:.5f}", f"{row.accuracy:.4f}",
            f"{row.ms_per_image:.2f}",
        )  # fmt: skip
    return table


def _what_next(blend: ExportedBlend, out: Path, options: ExportOptions) -> Iterator[str]:
    listed = "; ".join(f"{each.backbone}: {each.license}" for each in licenses(blend))
    yield f"Licences of the first weights: {listed}"
    yield f"Next: python {out}/predict.py IMAGE ..."
    if options.kaggle:
        yield f"Kaggle: attach {out} as a data set, and run its submission.ipynb"
