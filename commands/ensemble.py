"""`ensemble DIR`, and the blend at the end of a sweep: soups, prices, the blend, its lines.

Takes a run folder and the config's settings, changed by options; writes `ensemble/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from rich.console import Console
from rich.text import Text

from foldrace.commands.moved_data import AS_STORED, DataOptions, use_data
from foldrace.commands.so_far import require_complete
from foldrace.config.schema import EnsembleConfig
from foldrace.console.machine import cores, is_at_work
from foldrace.console.warnings import warnings_shown
from foldrace.core.errors import ConfigError, DataError, Problem
from foldrace.core.metrics import METRICS, MetricScore, accuracy, log_loss, log_loss_of_true
from foldrace.core.plugins import Parts, naming_plugins
from foldrace.core.standard_errors import all_metrics, measure
from foldrace.dataset.folds import HELD_OUT
from foldrace.dataset.test_set import read_test_set
from foldrace.ensemble.decisions import decide
from foldrace.ensemble.methods import METHODS
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.external import VARIANT, AddedPredictions, add_sources, parse_adds
from foldrace.ensemble.selection.select import Request, blend_run, check_request
from foldrace.inference.plugins import run_parts
from foldrace.inference.predictor import Predictor
from foldrace.inference.soups import Soup, make_soups
from foldrace.inference.speed import member_prices
from foldrace.reporting.blend_lines import blend_lines
from foldrace.run_folder.allowed import is_run, open_allowed
from foldrace.run_folder.belonging import (
    require_own_trials,
    telling_where_data_lay,
    training_data,
)
from foldrace.run_folder.blend_records import EnsembleRecord, HeldOutScore
from foldrace.run_folder.store import RunStore

_NO_WISHES = Request(lambda members: Prices({}, {}))


@dataclass(frozen=True)
class Changes:
    """Options of `ensemble DIR` that replace the config's; None or empty: as the config says."""

    method: str | None = None
    metric: str | None = None
    max_members: int | None = None
    max_ms_per_image: float | None = None
    max_bytes: int | None = None
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()

    def applied_to(self, config: EnsembleConfig) -> EnsembleConfig:
        """The config with the changes; ConfigError with every value that is not allowed."""
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
    root: str,
    changes: Changes,
    add: Sequence[str],
    runs: Sequence[str],
    console: Console,
    data: DataOptions = AS_STORED,
    trust_plugins: bool = False,
) -> None:
    """Blend a run folder again, with other settings than the config's where given.

    `trust_plugins` and `runs`: see `open_allowed`.
    """
    known = [run for run in runs if is_run(run)]  # what the others are is told with all wishes
    store = open_allowed(root, trust_plugins, known)
    use_data(store, data)
    with warnings_shown(console):
        require_own_trials(store, folds_alone=True)
        if not add and not runs and is_at_work(store):
            require_complete(store, at_work=True)
        blend(store, changes.applied_to(store.config().ensemble), console, add, runs)


@naming_plugins()
def blend(
    store: RunStore,
    config: EnsembleConfig,
    console: Console,
    add: Sequence[str] = (),
    runs: Sequence[str] = (),
) -> EnsembleRecord:
    """Choose a blend, write `ensemble/` and print it."""
    parts, added = run_parts(store), _added(store, add)
    request = replace(
        added, prices=lambda m: member_prices(store, m), runs=tuple(runs), parts=parts
    )
    method = parts[METHODS].get(config.method)
    if method is not None and method.needs_soups:
        check_request(store, config, request)
        _soups(store, console)
    ensemble = blend_run(store, config, request)
    ensemble = _with_held_out_score(store, ensemble, parts)
    for line in (*blend_lines(ensemble), *unchosen_lines(ensemble, request.added)):
        console.print(line, soft_wrap=False)
    return ensemble


def unchosen_lines(ensemble: EnsembleRecord, added: AddedPredictions) -> Iterator[str]:
    """Name each of the added predictions that got no weight."""
    names = {member.candidate for member in ensemble.members if member.added}
    for one in added.members:
        if one.true_prob is not None and one.record.name not in names:
            loss = log_loss_of_true(one.true_prob)
            yield f"{one.record.name}: own OOF log loss {loss:.4f}, not chosen"


def _added(store: RunStore, texts: Sequence[str]) -> Request:
    """The request that `--add` makes, with every problem of its files."""
    if not texts:
        return _NO_WISHES
    try:
        specs = parse_adds(texts)
        with telling_where_data_lay(store):
            test = read_test_set(store.config().data, store.own_classes())
        return replace(_NO_WISHES, added=add_sources(store, specs, test))
    except (ConfigError, DataError) as error:
        unread = tuple(Member(text.partition("=")[0], VARIANT) for text in texts)
        return replace(_NO_WISHES, problems=error.problems, unread=unread)


def _soups(store: RunStore, console: Console) -> None:
    """Average weights of alike models, so that the results can be chosen as members."""
    with console.status("Averaging weights (soups)") as status:
        soups = make_soups(store, cores(), lambda text: status.update(Text(f"Soups: {text}")))
    for soup in soups:
        console.print(_soup_line(soup))
    if not soups:
        console.print("No soup: no two members that are there have the same architecture")


def _soup_line(soup: Soup) -> str:
    """The soup of one backbone in words."""
    if not soup.kept:
        return f"No soup of {soup.backbone} beats its best model, {soup.ingredients[0]}"
    return (
        f"Soup of {soup.backbone}: {' + '.join(soup.ingredients)}, OOF log loss "
        f"{soup.oof_calibrated_logloss:.4f} (best alone "
        f"{soup.best_single_oof_calibrated_logloss:.4f})"
    )


def _with_held_out_score(store: RunStore, ensemble: EnsembleRecord, parts: Parts) -> EnsembleRecord:
    """The record with a score on the held-out rows, where there are any.

    Only `k: 1` with a `test_fraction` has them; predictions made elsewhere do not cover them.
    """
    rows = np.flatnonzero(store.folds().fold == HELD_OUT)
    if len(rows) == 0 or any(member.added for member in ensemble.members):
        return ensemble
    manifest = training_data(store)
    files = [manifest.file(int(row)) for row in rows]
    prob = Predictor(store, workers=cores()).probabilities(files)
    labels = store.labels()[rows]
    chosen = "" if ensemble.choice is None else ensemble.choice.metric
    scored = HeldOutScore(
        rows=len(rows),
        logloss=log_loss(prob, labels),
        accuracy=accuracy(prob, labels),
        metrics=all_metrics(prob, labels, parts, chosen),
        decided=_decided_score(ensemble, prob, labels, parts),
    )
    ensemble = ensemble.model_copy(update={"held_out": scored})
    store.blend.update(ensemble)
    return ensemble


def _decided_score(
    ensemble: EnsembleRecord, prob: NDArray[np.float64], labels: NDArray[np.int64], parts: Parts
) -> MetricScore | None:
    """The user's own metric of the classes that the decision rule gives; None without a rule."""
    choice = ensemble.choice
    if choice is None or choice.rule is None:
        return None
    metric, decided = parts[METRICS][choice.metric], decide(choice.rule, prob)
    return measure(metric, decided, labels, prob.shape[1]).score
