"""`ensemble DIR`, and the blend at the end of a sweep: soups, prices, the blend.

Takes a run folder and the config's wishes; writes `ensemble/` and tells what was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console

from commands.blend_lines import blend_lines, not_chosen
from commands.machine import cores
from ensemble.add_spec import parse_adds
from ensemble.added import VARIANT, add_sources
from ensemble.eligible import Prices
from ensemble.pool import Member
from ensemble.request import Request, check_request
from ensemble.selection import blend_run
from experiment.config import EnsembleConfig
from experiment.errors import ConfigError, DataError, Problem
from experiment.folds import HELD_OUT
from experiment.manifest import read_manifest
from experiment.metrics import accuracy, all_metrics, log_loss
from experiment.plugins import naming_plugins
from experiment.records import EnsembleRecord, HeldOutScore
from experiment.store import RunStore
from experiment.test_set import read_test_set
from inference.plugins import use_run_plugins
from inference.predictor import Predictor
from inference.soup import make_soups
from inference.soup_files import Soup
from inference.speed import measure_speed

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
