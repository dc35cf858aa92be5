"""`ensemble DIR`, and the blend at the end of a sweep: soups, prices, the blend, what to print.

Takes a run folder and the config's wishes; writes `ensemble/` and tells what was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from rich.console import Console

from commands.machine import cores
from ensemble.add_spec import parse_adds
from ensemble.added import NOTHING_ADDED, VARIANT, Added, add_sources
from ensemble.eligible import Prices
from ensemble.pool import Member
from ensemble.selection import Request, blend_run
from experiment.config import EnsembleConfig
from experiment.folds import HELD_OUT
from experiment.manifest import read_manifest
from experiment.metrics import MetricScore, accuracy, all_metrics, log_loss
from experiment.plugins import naming_plugins
from experiment.records import EnsembleRecord, HeldOutScore, MemberRecord
from experiment.store import RunStore
from experiment.test_set import read_test_set
from inference.plugins import use_run_plugins
from inference.predictor import Predictor
from inference.soup import make_soups
from inference.soup_files import Soup
from inference.speed import measure_speed

_IN_WORDS = ("log_loss", "accuracy")


@dataclass(frozen=True)
class Changes:
    """What `ensemble DIR` asks for beside the config; None or empty: as the config says."""

    method: str | None = None
    max_members: int | None = None
    max_ms_per_image: float | None = None
    max_bytes: int | None = None
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    def of(self, config: EnsembleConfig) -> EnsembleConfig:
        """The config with the changes. Raises ConfigError."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return config.model_copy(update={key: value for key, value in given.items() if value})


def reblend(
    root: str, changes: Changes, add: Sequence[str], runs: Sequence[str], console: Console
) -> None:
    """`ensemble DIR`: with other settings than the config's, where given."""
    store = RunStore.open(root)
    blend(store, changes.of(store.config().ensemble), console, add, runs)


@naming_plugins()
def blend(
    store: RunStore,
    config: EnsembleConfig,
    console: Console,
    add: Sequence[str] = (),
    runs: Sequence[str] = (),
) -> EnsembleRecord:
    """Write `ensemble/` and print what was chosen."""
    use_run_plugins(store)
    added = _added(store, add)
    if config.method == "soup":
        _soups(store, console)
    ensemble = blend_run(store, config, Request(lambda m: _prices(store, m), tuple(runs), added))
    ensemble = _with_held_out_score(store, ensemble)
    _print(ensemble, console)
    return ensemble


def _added(store: RunStore, texts: Sequence[str]) -> Added:
    if not texts:
        return NOTHING_ADDED
    specs = parse_adds(texts)
    return add_sources(store, specs, read_test_set(store.config().data, store.classes()))


def _soups(store: RunStore, console: Console) -> None:
    """Models with averaged weights become members before the choice."""
    with console.status("Averaging weights (soups)") as status:
        soups = make_soups(store, cores(), lambda text: status.update(f"Soups: {text}"))
    for soup in soups:
        console.print(_tasted(soup))


def _tasted(soup: Soup) -> str:
    """What came of one architecture."""
    if not soup.kept:
        return f"No soup of {soup.backbone} beats its best model, {soup.ingredients[0]}"
    return (
        f"Soup of {soup.backbone}: {' + '.join(soup.ingredients)}, OOF log loss "
        f"{soup.oof_logloss:.4f} (best alone {soup.best_single_oof_logloss:.4f})"
    )


def _prices(store: RunStore, members: Sequence[Member]) -> Prices:
    """Bytes on the disk, and seconds as this machine predicts."""
    stores = {run: RunStore.open(run) if run else store for run in {m.run for m in members}}
    stored = [m for m in members if m.variant != VARIANT]
    sizes = {m: stores[m.run].weight_bytes(m.candidate, m.variant) for m in stored}
    speeds = measure_speed(store, members)
    known = {m: ms for m, ms in speeds.ms_per_image.items() if ms is not None}
    return Prices(known, sizes, speeds.device)


def _print(ensemble: EnsembleRecord, console: Console) -> None:
    gain = ensemble.fair_single_logloss - ensemble.oof_logloss
    console.print(
        f"[bold]Blend[/bold] of {count_members(len(ensemble.members))} ({ensemble.method}): OOF "
        f"log loss [bold]{ensemble.oof_logloss:.4f}[/bold], best single {ensemble.best_single} "
        f"{ensemble.best_single_oof_logloss:.4f}{_calibrated(ensemble)} ({gain:+.4f} better); "
        "cross-fitted "
        f"{ensemble.crossfit_logloss:.4f} ± {ensemble.crossfit_se:.4f}, on the last fold "
        f"{ensemble.last_fold_logloss:.4f}; {_distance(ensemble)}; OOF accuracy "
        f"{ensemble.oof_accuracy:.4f}{_further(ensemble.metrics)}{_price(ensemble)}"
    )
    for member in ensemble.members:
        console.print(f"  {member.weight:.3f}  {member.candidate} {member.variant}{_of(member)}")
    for line in _remarks(ensemble):
        console.print(line)


def count_members(count: int) -> str:
    return f"{count} member{'' if count == 1 else 's'}"


def _distance(ensemble: EnsembleRecord) -> str:
    if ensemble.certificate is None:
        return f"no certificate ({ensemble.pooling} pooling)"
    return f"at most {ensemble.certificate:.1e} above the best possible weights"


def _calibrated(ensemble: EnsembleRecord) -> str:
    """Beside the best single's loss, so that calibration is not taken for blending."""
    loss = ensemble.best_single_calibrated_logloss
    return "" if loss is None else f", at best {loss:.4f} with a temperature of its own"


def _price(ensemble: EnsembleRecord) -> str:
    """', 12.3 ms per image on cpu': nothing where it was not measured."""
    if ensemble.ms_per_image is None:
        return ""
    return f"; {ensemble.ms_per_image:.3g} ms per image on {ensemble.device}"


def _of(member: MemberRecord) -> str:
    warm = f", temperature {member.temperature:.3f}" if member.temperature != 1 else ""
    return f"{warm}{f', of {member.run}' if member.run else ''}"


def _further(metrics: Iterable[MetricScore]) -> str:
    """', macro_f1 0.9012, ...': the metrics beside the two that have their own words."""
    return "".join(f", {m.name} {m.value:.4f}" for m in metrics if m.name not in _IN_WORDS)


def _remarks(ensemble: EnsembleRecord) -> Iterator[str]:
    """What a user should know beside the figures."""
    if ensemble.methods_tried:
        tried = (f"{t.method} {t.crossfit_logloss:.4f}" for t in ensemble.methods_tried)
        yield f"Method {ensemble.method}, of the least cross-fitted loss: {', '.join(tried)}"
    calibration = ensemble.calibration
    if calibration is not None and (calibration.members or calibration.blend):
        kept = [
            *(["one temperature a member"] if calibration.members else []),
            *([f"temperature {ensemble.blend_temperature:.3f} of the blend"] * calibration.blend),
        ]
        yield (
            f"Calibrated: {' and '.join(kept)}; expected calibration error "
            f"{calibration.before.ece:.4f} -> {calibration.after.ece:.4f}"
        )
    if ensemble.duplicates:
        same = "; ".join(" = ".join(names) for names in ensemble.duplicates)
        yield f"Same predictions, so only the first was considered: {same}"
    if ensemble.members_without_weights:
        yield (
            "Left out, since their weights were removed (ensemble.keep: blend): "
            f"{count_members(ensemble.members_without_weights)}"
        )
    near = ensemble.near_duplicates
    if near is not None and near.rows:
        without = near.oof_logloss_without
        rest = "" if without is None else f"; without them the OOF log loss is {without:.4f}"
        yield f"{near.rows} rows resemble an image of another fold or of the test set{rest}"
    for point in ensemble.curve:
        yield (
            f"  {point.ms_per_image:9.3f} ms per image: {point.oof_logloss:.4f} with "
            f"{count_members(point.members)}"
        )
    for unvalidated in ensemble.unvalidated:
        yield (
            f"[bold]Unvalidated[/bold]: {unvalidated.name} has no OOF predictions; it gets "
            f"{unvalidated.weight:.3f} of the submission, and no figure here covers it"
        )
    held_out = ensemble.held_out
    if held_out is not None:
        yield (
            f"Held-out rows ({held_out.rows}, seen by no trial): log loss {held_out.logloss:.4f}, "
            f"accuracy {held_out.accuracy:.4f}{_further(held_out.metrics)}"
        )


def _with_held_out_score(store: RunStore, ensemble: EnsembleRecord) -> EnsembleRecord:
    """With k: 1 and a test_fraction: the blend on the rows that nothing has seen. Predictions made
    elsewhere do not cover them."""
    rows = np.flatnonzero(store.folds().fold == HELD_OUT)
    if len(rows) == 0 or any(member.added for member in ensemble.members):
        return ensemble
    manifest = read_manifest(store.config().data, store.config().folds.column)
    files = [manifest.file(int(row)) for row in rows]
    prob = Predictor(store, workers=cores()).probabilities(files)
    labels = store.labels()[rows]
    scored = HeldOutScore(
        rows=len(rows),
        logloss=log_loss(prob, labels),
        accuracy=accuracy(prob, labels),
        metrics=all_metrics(prob, labels),
    )
    ensemble = ensemble.model_copy(update={"held_out": scored})
    store.blend.update(ensemble)
    return ensemble
