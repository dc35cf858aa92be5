"""`ensemble DIR`, and the blend at the end of a sweep: soups, prices, the blend.

Takes a run folder and the config's wishes; writes `ensemble/` and tells what was chosen.

What the terminal says of a blend: one line a figure, then its members and what to know.

Takes the `EnsembleRecord`, gives lines for rich.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console
from rich.markup import escape

from foldrace.commands.terminal import cores
from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import ConfigError, DataError, Problem
from foldrace.core.metrics import MetricScore, accuracy, all_metrics, log_loss, log_loss_of_true
from foldrace.core.plugins import naming_plugins
from foldrace.dataset.folds import HELD_OUT
from foldrace.dataset.manifest import read_manifest
from foldrace.dataset.test_set import read_test_set
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.external import VARIANT, Added, add_sources, parse_adds
from foldrace.ensemble.selection.select import Request, blend_run, check_request
from foldrace.inference.plugins import use_run_plugins
from foldrace.inference.predictor import Predictor
from foldrace.inference.soups import Soup, make_soups
from foldrace.inference.speed import measure_speed
from foldrace.run_folder.blend_records import EnsembleRecord, HeldOutScore, MemberRecord
from foldrace.run_folder.store import RunStore

_IN_WORDS = ("log_loss", "accuracy")
_WIDTH = 16  # of the names of figures


def blend_lines(ensemble: EnsembleRecord) -> Iterator[str]:
    """Figures, members, remarks."""
    yield (
        f"[bold]Blend[/bold] of {count_members(len(ensemble.members))} ({ensemble.method}): "
        f"OOF log loss [bold]{ensemble.oof_logloss:.4f}[/bold]"
    )
    for name, text in _figures(ensemble):
        yield f"  {name:{_WIDTH}} {text}"
    yield from _warnings(ensemble)
    for member in ensemble.members:
        yield f"  {member.weight:.3f}  {member.candidate} {member.variant}{_of(member)}"
    yield from _remarks(ensemble)


def not_chosen(ensemble: EnsembleRecord, added: Added) -> Iterator[str]:
    """Each member that was made elsewhere and got no weight."""
    names = {member.candidate for member in ensemble.members if member.added}
    for one in added.members:
        if one.true_prob is not None and one.record.name not in names:
            loss = log_loss_of_true(one.true_prob)
            yield f"{one.record.name}: own OOF log loss {loss:.4f}, not chosen"


def count_members(count: int) -> str:
    return f"{count} member{'' if count == 1 else 's'}"


def _figures(ensemble: EnsembleRecord) -> Iterator[tuple[str, str]]:
    single = f"{ensemble.best_single_oof_logloss:.4f}  {escape(ensemble.best_single)}"
    yield "best single", single
    if ensemble.best_single_calibrated_logloss is not None:
        # so that calibration is not taken for blending
        loss = ensemble.best_single_calibrated_logloss
        yield "", f"{loss:.4f}  at best, with a temperature of its own"
    yield "against it", _against(ensemble.fair_single_logloss - ensemble.oof_logloss)
    yield "cross-fitted", f"{ensemble.crossfit_logloss:.4f} ± {ensemble.crossfit_se:.4f}"
    yield "on the last fold", f"{ensemble.last_fold_logloss:.4f}"
    yield "weights", _distance(ensemble)
    yield "OOF accuracy", f"{ensemble.oof_accuracy:.4f}"
    for metric in ensemble.metrics:
        if metric.name not in _IN_WORDS:
            yield f"OOF {metric.name}", f"{metric.value:.4f}"
    if ensemble.ms_per_image is not None:
        yield "ms per image", f"{ensemble.ms_per_image:.3g} on {ensemble.device}"


def _against(gain: float) -> str:
    """In the places that are shown, so that no zero has a sign."""
    text = f"{abs(gain):.4f}"
    return f"{text} {'better' if gain >= 0 or float(text) == 0 else 'worse'}"


def _distance(ensemble: EnsembleRecord) -> str:
    if ensemble.certificate is None:
        return f"no certificate ({ensemble.pooling} pooling)"
    return f"at most {ensemble.certificate:.1e} above the best possible ones"


def _warnings(ensemble: EnsembleRecord) -> Iterator[str]:
    if ensemble.members_considered < 2:
        return
    if ensemble.crossfit_logloss > ensemble.fair_single_logloss:
        yield (
            "[yellow]warning[/yellow] the cross-fitted log loss is not below that of the best "
            "single member: blending may gain nothing on new images"
        )


def _of(member: MemberRecord) -> str:
    warm = f", temperature {member.temperature:.3f}" if member.temperature != 1 else ""
    return f"{warm}{f', of {escape(member.run)}' if member.run else ''}"


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
        same = escape("; ".join(" = ".join(names) for names in ensemble.duplicates))
        yield f"Same predictions, so only the first was considered: {same}"
    if ensemble.members_without_weights:
        left = count_members(ensemble.members_without_weights)
        yield f"Left out, since their weights are not there: {left}"
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


_NOTHING = Request(lambda members: Prices({}, {}))


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
        """The config with the changes. ConfigError with every value that is not allowed."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        asked = {key: value for key, value in given.items() if value not in (None, ())}
        try:
            return EnsembleConfig.model_validate({**config.model_dump(), **asked})
        except ValidationError as error:
            raise ConfigError([_wrong_option(d) for d in error.errors()]) from error


def _wrong_option(detail: ErrorDetails) -> Problem:
    option = f"--{str(detail['loc'][0]).replace('_', '-')}"
    rule = detail["msg"].replace("Input should be", "allowed:")
    return Problem(option, f"got {detail['input']}; {rule}; leave it out for no limit")


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
    request = replace(added, prices=lambda m: _prices(store, m), runs=tuple(runs))
    if config.method == "soup":
        check_request(store, config, request)
        _soups(store, console)
    ensemble = blend_run(store, config, request)
    ensemble = _with_held_out_score(store, ensemble)
    for line in (*blend_lines(ensemble), *not_chosen(ensemble, request.added)):
        console.print(line)
    return ensemble


def _added(store: RunStore, texts: Sequence[str]) -> Request:
    """Of the request what the option `--add` says, with all that is wrong in its files."""
    if not texts:
        return _NOTHING
    try:
        specs = parse_adds(texts)
        test = read_test_set(store.config().data, store.classes())
        return replace(_NOTHING, added=add_sources(store, specs, test))
    except (ConfigError, DataError) as error:
        unread = tuple(Member(text.partition("=")[0], VARIANT) for text in texts)
        return replace(_NOTHING, problems=error.problems, unread=unread)


def _soups(store: RunStore, console: Console) -> None:
    """Models with averaged weights become members before the choice."""
    with console.status("Averaging weights (soups)") as status:
        soups = make_soups(store, cores(), lambda text: status.update(f"Soups: {text}"))
    for soup in soups:
        console.print(_tasted(soup))
    if not soups:
        console.print("No soup: no two members that are there have the same architecture")


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
