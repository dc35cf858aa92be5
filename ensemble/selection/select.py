"""The blend of a run: from the run folders' members to `ensemble.json`.

Takes a run folder, and in a `Request` further run folders and predictions made elsewhere; reports
everything that is wrong with what was asked for before an array is read; gives the `EnsembleRecord`
that it wrote. The methods themselves see only arrays.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import (
    ConfigError,
    DataError,
    Problem,
    RunFailure,
    RunFolderError,
    UserError,
)
from foldrace.core.metrics import (
    LOG_LOSS,
    METRICS,
    log_loss_of_true,
    order_problem,
    true_class_probability,
)
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.dataset.duplicates import near_duplicate_rows
from foldrace.ensemble.bounded import VISIBLE, fit_on, fit_within, supports_by_price
from foldrace.ensemble.calibration import choose_method, final_fit, methods_to_try
from foldrace.ensemble.limits import Limits
from foldrace.ensemble.metric_choice import pick_by_metric
from foldrace.ensemble.pool import Member, MemberRows, Pool
from foldrace.ensemble.pooling import Fit, Settings
from foldrace.ensemble.selection.eligible import (
    Prices,
    find_limits,
    included_members,
    wish_problems,
    without_excluded,
)
from foldrace.ensemble.selection.external import (
    NOTHING_ADDED,
    VARIANT,
    AddedPredictions,
    keep_only,
    save_added,
)
from foldrace.ensemble.selection.matrix import open_matrix
from foldrace.ensemble.selection.members import OofSource, other_runs, run_sources
from foldrace.ensemble.selection.outcome import (
    ChoiceCounts,
    ChosenBlend,
    half_logs,
    heaviest_first,
    record_of,
    trajectory,
)
from foldrace.run_folder.blend_records import SINGLE, CurvePoint, EnsembleRecord
from foldrace.run_folder.records import CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.variants import EMA, RAW

_log = logging.getLogger("foldrace")

_KINDS = (ConfigError, DataError, RunFolderError)
"""Errors of wrong settings, of predictions made elsewhere, of further run folders."""

_NAMED = 8
"""Candidates that a message names."""


@dataclass(frozen=True)
class Request:
    """The ingredients of a blend beside the run folder and its config."""

    prices: Callable[[Sequence[Member]], Prices]
    """Time and bytes of members; time has to be measured, so only those that matter are asked
    for."""
    runs: tuple[str, ...] = ()
    """Further run folders whose members take part."""
    added: AddedPredictions = NOTHING_ADDED
    """Predictions made elsewhere."""
    problems: tuple[Problem, ...] = ()
    """Problems of the added predictions: reported with all other wrong settings."""
    unread: tuple[Member, ...] = ()
    """Added members with problems: names may mean them."""
    parts: Parts = NO_PARTS
    """The run's own methods and metrics."""
    rival: EnsembleRecord | None = None
    """A blend that stays unless the new one is better, cross-fitted; None: it is replaced."""


def check_request(store: RunStore, config: EnsembleConfig, request: Request) -> None:
    """Check all that `blend_run` checks before it reads an array, before soups are made.

    Soups are no members yet, but names may exclude them. UserError with everything that cannot be
    met.
    """
    names = tuple(name for name in config.exclude if not name.endswith(" soup"))
    requested_sources(store, config.model_copy(update={"exclude": names}), request)


def requested_sources(store: RunStore, config: EnsembleConfig, request: Request) -> list[OofSource]:
    """Sources of all members; UserError with everything that cannot be met, no array read yet."""
    further, problems = _further(store, request.runs)
    own = run_sources(store)
    sources = [*own, *further, *request.added.sources]
    named = [*(s.member for s in sources), *request.unread]
    lost = _without_weights(store, [s.member for s in own])
    wishes = wish_problems(named, config, [*lost, *_incomplete(store)], request.parts)
    every = [*wishes, *request.problems, *problems]
    if every and (named or lost or request.problems or problems):  # else: nothing to blend
        raise _kind(wishes, request.problems, problems)(every)
    return sources


def _further(store: RunStore, runs: Sequence[str]) -> tuple[list[OofSource], tuple[Problem, ...]]:
    """Sources of further run folders, and what is wrong with these."""
    try:
        return other_runs(store, runs), ()
    except UserError as error:
        return [], error.problems


def _kind(
    wishes: Sequence[Problem], added: Sequence[Problem], runs: Sequence[Problem]
) -> type[UserError]:
    """The class of an error with all of the problems."""
    kinds = [k for k, found in zip(_KINDS, (wishes, added, runs), strict=True) if found]
    return kinds[0] if len(kinds) == 1 else UserError


def _without_weights(store: RunStore, members: Sequence[Member]) -> list[Member]:
    """Members of complete candidates that are not among these."""
    there = {(m.candidate, m.variant) for m in members}
    return [
        Member(s.candidate.candidate, variant, s.candidate.backbone)
        for s in store.summaries()
        if s.is_member
        for variant in s.variants
        if (s.candidate.candidate, variant) not in there
    ]


def _incomplete(store: RunStore) -> list[Member]:
    """Members that candidates would have given, had all their folds ended."""
    return [
        Member(s.candidate.candidate, variant, s.candidate.backbone)
        for s in store.summaries()
        if s.status != "complete"
        for variant in (RAW, EMA)
    ]


def count_considered(store: RunStore, sources: Sequence[OofSource]) -> ChoiceCounts:
    """Count what stands to choose from; RunFailure where there is nothing to blend."""
    own = [s.member for s in sources if not s.member.run and s.member.variant != VARIANT]
    lost = _without_weights(store, own)
    summaries = store.summaries()
    if not sources:
        raise _nothing_to_blend(store, summaries, without_weights=len(lost))
    complete = sum(1 for s in summaries if s.is_member)
    further = {(s.member.run, s.member.candidate) for s in sources if s.member.run}
    return ChoiceCounts(complete + len(further), len(lost))


def _nothing_to_blend(
    store: RunStore, summaries: Sequence[CandidateSummary], without_weights: int
) -> RunFailure:
    if without_weights:
        return RunFailure(
            f"no member to blend: the weights of all {without_weights} are gone from "
            f"{store.root}/trials; delete a candidate's fold folders there and `resume "
            f"{store.root}` to train it again"
        )
    named = [f"{s.candidate.candidate} {s.status}" for s in summaries[:_NAMED]]
    if len(summaries) > _NAMED:
        named.append(f"{len(summaries) - _NAMED} more")
    if any(s.status in ("failed", "diverged") for s in summaries):
        advice = (
            f"see {store.root}/logs, then `resume {store.root}`, with --retry-failed where trials "
            "failed"
        )
    else:
        advice = (
            f"`resume {store.root}` goes on; where a limit ended the sweep, raise it: --set with "
            "search.candidates, search.fold_trials, resources.gpu_hours or resources.time_budget"
        )
    return RunFailure(
        f"no complete candidate to blend (candidates: {', '.join(named) or 'none'}); {advice}"
    )


def blend_run(store: RunStore, config: EnsembleConfig, request: Request) -> EnsembleRecord:
    """Check, choose, certify, cross-fit and write the blend, where it is to replace another.

    Among members whose weights are there: it is to predict. Raises RunFailure where no candidate is
    complete, UserError for wrong arrays, names and limits.
    """
    sources = requested_sources(store, config, request)
    considered = count_considered(store, sources)
    kept = without_excluded([s.member for s in sources], config.exclude)
    rows = open_matrix(store, [sources[i] for i in kept], calibrate=config.calibrate)
    order = order_problem(config.metric, store.classes(), request.parts)
    if order is not None:
        _log.warning("%s", order)
    blended, curve = choose_blend(rows, config, request)
    record = record_of(
        blended,
        considered,
        k=store.folds().k,
        folds_hash=store.folds().hash,
        near=_near_duplicates(store),
        duplicates=rows.duplicates,
        curve=curve,
        unvalidated=request.added.unvalidated,
    )
    rival = request.rival
    if rival is not None and not record.is_better_than(rival):
        return rival
    return _write(store, record, blended, request.added)


def choose_blend(
    rows: MemberRows, config: EnsembleConfig, request: Request
) -> tuple[ChosenBlend, list[CurvePoint]]:
    """Choose method, temperatures and members; with a limit of time, score other limits too."""
    losses = np.array([log_loss_of_true(column) for column in rows.raw])
    forced = included_members(rows.members, losses, config.include, rows.duplicates)
    bounded = config.max_ms_per_image is not None or config.max_bytes is not None
    prices = request.prices(rows.members) if bounded else Prices({}, {})
    parts = request.parts
    limits = find_limits(rows.members, prices, config, forced, parts)
    settings = Settings(max_rounds=config.max_rounds, bags=config.bags, forced=forced)

    def within(method: str, pool: Pool) -> Fit:
        return fit_within(method, pool, settings, limits, parts)

    choice = choose_method(rows, methods_to_try(config.method, parts), within, config.calibrate)
    pick = None
    fit: Callable[[Pool], Fit] = partial(within, choice.method)
    method, calibration = choice.method, choice.calibration
    if config.metric != LOG_LOSS:
        metric = parts[METRICS][config.metric]
        alone = [m for m in range(len(rows.members)) if {*forced} <= {m} and limits.admit((m,))]
        pick = pick_by_metric(rows, choice, within, metric, alone, config.calibrate, rows.groups)
        fit, method, calibration = pick.fit, pick.method, pick.calibration
    same = method == choice.method and calibration is choice.calibration
    chosen, temperature, prob = final_fit(rows, fit, calibration)
    blended = ChosenBlend(
        method=method,
        methods_tried=choice.tried,
        rows=rows,
        fit=chosen,
        choice=calibration,
        crossfit=choice.crossfit if same else calibration.crossfit,
        metric_choice=None if pick is None else pick.final_record(prob, rows.labels),
        temperature=temperature,
        prob=prob,
        losses=losses,
        prices=prices if bounded else request.prices([rows.members[i] for i in chosen.used]),
        parts=parts,
    )
    timed = config.max_ms_per_image is not None and method != SINGLE
    return blended, _curve(blended, settings, limits) if timed else []


def _write(
    store: RunStore, record: EnsembleRecord, blended: ChosenBlend, added: AddedPredictions
) -> EnsembleRecord:
    """The record as it was written, with the digests of what belongs to it."""
    arrays = blended.fit.combiner.take(heaviest_first(blended.fit)).arrays()
    names = {m.candidate for m in record.members if m.added} | set(added.unvalidated)
    rounds, oof = trajectory(blended.rows.members, blended.fit), half_logs(blended.prob)
    with store.blend.only_writer():  # the added members must be those of the record at its end
        save_added(store, added, names)
        written = store.blend.save(record, rounds, oof, arrays, names)
        keep_only(store, names)
    return written


def remove_unused_weights(store: RunStore, blend: EnsembleRecord) -> int:
    """Remove the weights that `keep: blend` needs not; gives how many members lost theirs.

    Those of complete candidates that are not in the blend. Other candidates may still become
    complete, and need theirs then.
    """
    complete = [s for s in store.summaries() if s.status == "complete"]
    used = {(member.candidate, member.variant) for member in blend.members if not member.run}
    every = {(t.candidate, v) for s in complete for t in s.trials for v in t.variants}
    unused = sorted(every - used)  # also variants that not all folds have
    there = [member for member in unused if store.has_weights(*member)]
    for member in unused:
        store.remove_weights(*member)
    return len(there)


def _near_duplicates(store: RunStore) -> NDArray[np.int64] | None:
    """Indices into the scored rows; None where the images were never compared."""
    rows = near_duplicate_rows(store.files, store.folds())
    return None if rows is None else np.flatnonzero(np.isin(store.scored_rows(), rows))


def _curve(blended: ChosenBlend, settings: Settings, limits: Limits) -> list[CurvePoint]:
    """Loss against time: the blend, and the same method and calibration at other limits of time.

    A point that is not visibly better than something faster is left out.
    """
    rows, choice, parts = blended.rows, blended.choice, blended.parts
    found = [_point(rows, limits, blended.fit, blended.prob)]
    pool = rows.pool(choice.members)
    for support in supports_by_price(blended.method, pool, settings, limits, 0, parts):
        fit = partial(fit_on, blended.method, settings=settings, support=support, parts=parts)
        chosen, _, prob = final_fit(rows, fit, choice)
        found.append(_point(rows, limits, chosen, prob))
    kept: list[CurvePoint] = []
    for point in sorted(found, key=lambda point: (point.ms_per_image, point.oof_logloss)):
        if not kept or point.oof_logloss < kept[-1].oof_logloss * (1.0 - VISIBLE):
            kept.append(point)
    return kept


def _point(rows: MemberRows, limits: Limits, fit: Fit, prob: NDArray[np.float64]) -> CurvePoint:
    return CurvePoint(
        ms_per_image=float(limits.costs[0, fit.used].sum()),
        oof_logloss=log_loss_of_true(true_class_probability(prob, rows.labels)),
        members=len(fit.used),
    )
