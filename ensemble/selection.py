"""The blend of a run: from the store's complete candidates to `ensemble.json`.

Takes a run folder, further run folders and predictions made elsewhere; gives the `EnsembleRecord`
that it wrote. The methods themselves see only arrays.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from ensemble.added import Added, keep_only, save_added
from ensemble.automatic import choose_method, methods_to_try
from ensemble.bounded import fit_on, fit_within, supports_by_price
from ensemble.calibration import final_fit
from ensemble.eligible import (
    Prices,
    find_limits,
    forced_members,
    without_excluded,
)
from ensemble.fit import Fit, Settings
from ensemble.limits import Limits
from ensemble.matrix import Matrix, open_matrix
from ensemble.outcome import (
    Blended,
    half_logs,
    heaviest_first,
    record_of,
    trajectory,
)
from ensemble.pool import MemberRows, Pool
from ensemble.request import Request, count_considered, requested_sources
from ensemble.trade_off import VISIBLE
from experiment.config import EnsembleConfig
from experiment.metrics import log_loss_of_true, true_class_probability
from experiment.near_duplicates import near_duplicate_rows
from experiment.records import CurvePoint, EnsembleRecord
from experiment.store import RunStore


def blend_run(store: RunStore, config: EnsembleConfig, request: Request) -> EnsembleRecord:
    """Check, choose, certify, cross-fit and write the blend, among members whose weights are there:
    it is to predict. Raises RunFailure where no candidate is complete, UserError for wrong arrays,
    names and limits."""
    sources = requested_sources(store, config, request)
    considered = count_considered(store, sources)
    kept = without_excluded([s.member for s in sources], config.exclude)
    matrix = open_matrix(store, [sources[i] for i in kept], calibrate=config.calibrate)
    blended, curve = _choose(matrix, config, request)
    record = record_of(
        blended,
        considered,
        folds=store.folds().fold[store.scored_rows()],
        folds_hash=store.folds().hash,
        near=_near_duplicates(store),
        duplicates=matrix.duplicates,
        curve=curve,
        unvalidated=request.added.unvalidated,
    )
    return _write(store, record, blended, request.added)


def _choose(
    matrix: Matrix, config: EnsembleConfig, request: Request
) -> tuple[Blended, list[CurvePoint]]:
    """Method, temperatures and members; with a limit of time, the loss at other limits too."""
    rows = matrix.rows
    losses = np.array([log_loss_of_true(column) for column in rows.raw])
    forced = forced_members(rows.members, losses, config.include, matrix.duplicates)
    bounded = config.max_ms_per_image is not None or config.max_bytes is not None
    prices = request.prices(rows.members) if bounded else Prices({}, {})
    limits = find_limits(rows.members, prices, config, forced)
    settings = Settings(max_rounds=config.max_rounds, bags=config.bags, forced=forced)

    def within(method: str, pool: Pool) -> Fit:
        return fit_within(method, pool, settings, limits)

    choice = choose_method(rows, methods_to_try(config.method), within, config.calibrate)
    chosen, temperature, prob = final_fit(rows, partial(within, choice.method), choice.calibration)
    blended = Blended(
        method=choice.method,
        methods_tried=choice.tried,
        rows=rows,
        fit=chosen,
        choice=choice.calibration,
        temperature=temperature,
        prob=prob,
        losses=losses,
        prices=prices if bounded else request.prices([rows.members[i] for i in chosen.used]),
    )
    timed = config.max_ms_per_image is not None
    return blended, _curve(blended, settings, limits) if timed else []


def _write(
    store: RunStore, record: EnsembleRecord, blended: Blended, added: Added
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
    """`keep: blend`: remove the weights of complete candidates that are not in the blend; how many
    members lost theirs. Other candidates may still become complete, and need theirs then."""
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


def _curve(blended: Blended, settings: Settings, limits: Limits) -> list[CurvePoint]:
    """Loss against time: the blend, and what the same method and calibration give at other limits
    of time; what is not visibly better than something faster is left out."""
    rows, choice = blended.rows, blended.choice
    found = [_point(rows, limits, blended.fit, blended.prob)]
    pool = rows.pool(choice.members)
    for support in supports_by_price(blended.method, pool, settings, limits, 0):
        fit = partial(fit_on, blended.method, settings=settings, support=support)
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
