"""`evaluate`: a row an image, the mistakes, metrics, and pictures of what the models looked at.

Takes a run folder, and where asked labelled images; gives a folder `evaluations/run_<time>_<id>/`.
Of the stored OOF rows alone it needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from foldrace.commands.moved_data import DataOptions, use_data
from foldrace.console.machine import cores
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.evaluation import tables
from foldrace.evaluation.confusion_charts import confusion_png, pairs_png
from foldrace.evaluation.folder import EvaluationFiles, target, write
from foldrace.evaluation.rows import EvaluatedRows, oof_rows, require_blend
from foldrace.evaluation.scores import Scores, scores
from foldrace.reporting.formats import counted, number
from foldrace.run_folder.allowed import open_allowed
from foldrace.run_folder.belonging import training_data
from foldrace.run_folder.store import RunStore

_SHOWN = ("log_loss", "accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall")


@dataclass(frozen=True)
class Asked:
    """What one `evaluate` is to do beyond the stored OOF rows."""

    data: Path | None = None
    """Labelled images."""
    train: bool = False
    """Run the models on the images that they were trained on, too."""
    explain: int = 0
    """Number of images of the highest loss to draw activation maps of."""
    out: Path | None = None


def evaluate(
    root: str,
    asked: Asked,
    console: Console,
    places: DataOptions,
    trust_plugins: bool = False,
    runs: Sequence[str] = (),
) -> str:
    """Write the evaluation and print its figures; gives the folder.

    `trust_plugins` and `runs`: see `open_allowed`; `places`: where the training images lie now.
    RunFolderError without a blend; DataError for labels that are no class of the run.
    """
    started = datetime.now(UTC)
    store = open_allowed(root, trust_plugins, runs)
    use_data(store, places)
    where = target(store, asked.out, started)
    blend, parts = require_blend(store), _parts(store)
    files, sets = EvaluationFiles(), dict[str, Scores]()
    chosen = store.config().ensemble.metric
    found, images = oof_rows(store), list[Path]()
    sets["oof"] = scores(found, parts, chosen)
    files.add("oof_predictions.csv", tables.predictions_csv(found))
    files.add("wrong_valid.csv", tables.mistakes_csv(found))
    _add_set(files, sets["oof"], "")
    if asked.data is not None:
        found, images = _labelled(store, asked.data, files, console)
        sets["data"] = scores(found, parts, chosen)
        _add_set(files, sets["data"], "data_")
    if asked.train:
        trained = _trained(store, console)
        sets["train"] = scores(trained, parts, chosen)
        files.add("wrong_train.csv", tables.mistakes_csv(trained))
    if asked.explain:
        data = training_data(store) if asked.data is None else None
        if data is not None:
            images = [data.file(int(row)) for row in store.scored_rows()]
        _explain(store, asked.explain, found, images, files, console)
    files.add("metrics.csv", tables.metrics_csv(sets))
    files.about["metrics"] = {
        name: {m.name: {"value": m.value, "se": m.se} for m in of.metrics}
        for name, of in sets.items()
    }
    folder = write(store, blend, files, where, started)
    for name, of in sets.items():
        console.print(_line(name, of))
    if blend.ms_per_image is not None:
        on = f" on {blend.device}" if blend.device else ""
        console.print(f"stored speed: {number(blend.ms_per_image, 2)} ms an image{on}")
    if blend.rule is not None:
        console.print("labels by the blend's decision rule, not by the most probable class")
    console.print(f"Evaluation: {folder}")
    return folder


def _parts(store: RunStore) -> Parts:
    """The run's own parts; torch is imported only where there are any."""
    if not store.plugins():
        return NO_PARTS
    from foldrace.inference.plugins import run_parts

    return run_parts(store)


def _add_set(files: EvaluationFiles, of: Scores, prefix: str) -> None:
    """Classes and confusions of one set of rows."""
    names = tuple(row.name for row in of.classes)
    files.add(f"{prefix}classes.csv", tables.classes_csv(of))
    files.add(f"{prefix}confusion.csv", tables.confusion_csv(of.confusion, names))
    files.add(f"{prefix}confused_pairs.csv", tables.pairs_csv(of))
    files.add(f"{prefix}confusion.png", confusion_png(of.confusion, names))
    pairs = pairs_png(of.confusion, names)
    if pairs is not None:
        files.add(f"{prefix}confused_pairs.png", pairs)


def _labelled(
    store: RunStore, source: Path, files: EvaluationFiles, console: Console
) -> tuple[EvaluatedRows, list[Path]]:
    """The rows of `--data` with their image files; their tables are added to `files`."""
    from foldrace.evaluation.labelled import read_labelled
    from foldrace.evaluation.models import labelled_rows
    from foldrace.inference.predictor import Predictor

    images = read_labelled(store, source, cores())
    for note in images.notes:
        console.print(note)
    predictor = Predictor(store, cores())
    with _models_shown(console, f"Predicting {len(images.files):,} images", predictor.models) as on:
        found, seconds = labelled_rows(predictor, images, on)
    files.add("inference_results.csv", tables.inference_csv(found, images.unread))
    files.add("wrong_test.csv", tables.mistakes_csv(found))
    for name in found.members:
        files.add(f"output_{_file_name(name)}.csv", tables.member_csv(found, name))
    speed = 1000 * seconds / len(found)
    files.about["data"] = {
        "path": str(source.resolve()),
        "images": len(found),
        "unreadable": len(images.unread),
        "ms_per_image": round(speed, 3),
    }
    unread = f", {len(images.unread):,} unreadable" if images.unread else ""
    console.print(f"{source}: {counted(len(found), 'image')}{unread}, {number(speed, 2)} ms each")
    return found, list(images.files)


def _trained(store: RunStore, console: Console) -> EvaluatedRows:
    from foldrace.evaluation.models import trained_rows
    from foldrace.inference.predictor import Predictor

    data, predictor = training_data(store), Predictor(store, cores())
    title = f"Predicting {len(data):,} training images"
    with _models_shown(console, title, predictor.models) as on_model:
        return trained_rows(predictor, data, on_model)


def _explain(
    store: RunStore,
    count: int,
    found: EvaluatedRows,
    images: Sequence[Path],
    files: EvaluationFiles,
    console: Console,
) -> None:
    """Activation maps of the rows of the highest loss: of `--data`, else of the OOF rows."""
    from foldrace.evaluation.explain import explain

    with console.status("Drawing activation maps"):
        for name, png in explain(store, found, images, count, cores()):
            files.add(f"explain/{name}", png)


@contextmanager
def _models_shown(console: Console, title: str, models: int) -> Iterator[Callable[[int], None]]:
    """Give a function that shows how many models are done."""
    with console.status(title) as status:
        yield lambda done: status.update(f"{title}: model {done} of {models}")


def _file_name(member: str) -> str:
    """A member's name as part of a file's: `c0003_ema`, of another run with that folder's name."""
    own, of, run = member.partition(" of ")
    tail = f" {run.rstrip('/').rpartition('/')[2]}" if of else ""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", f"{own}{tail}")


def _line(name: str, of: Scores) -> str:
    words = {"oof": "out of fold", "data": "--data", "train": "trained on"}
    shown = []
    for metric in _SHOWN:
        score = of.metric(metric)
        se = "" if score.se is None else f" ± {number(score.se)}"
        shown.append(f"{metric} {number(score.value)}{se}")
    rows = sum(row.rows for row in of.classes)
    return f"{words[name]} ({counted(rows, 'row')}): {', '.join(shown)}"
