"""`submit`: predict the test set with the blend; write the submission, its receipt and the log.

Takes a run folder and how it is to be done (`How`); `predict_test_set` is the same while a run
sweeps and at its end.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from foldrace.commands.moved_data import AS_STORED, DataOptions, use_data
from foldrace.commands.so_far import blend_so_far, require_complete
from foldrace.console.machine import cores, is_at_work, refuse_existing
from foldrace.console.warnings import warnings_shown
from foldrace.core.errors import DataError, Problem, RunFolderError, UserError, listing
from foldrace.core.files import Files, open_files
from foldrace.core.metrics import most_probable
from foldrace.core.plugins import naming_plugins
from foldrace.dataset.curation import split_merged
from foldrace.dataset.images import ImageError, image_fault
from foldrace.dataset.left_out import read_left_out
from foldrace.dataset.test_set import ImageSet, read_test_set
from foldrace.ensemble.fold_mean import FoldMean
from foldrace.inference.chosen_members import only_members, part_note
from foldrace.inference.class_prior import PriorShift, estimate_shift, shift_line
from foldrace.inference.engine.fold_models import OnModel
from foldrace.inference.plugins import run_parts
from foldrace.inference.predictor import Predictor
from foldrace.inference.submission import (
    NUMBERS,
    Manner,
    Receipt,
    check_float_format,
    receipt_name,
    write_submission,
    zip_name,
    zip_submission,
)
from foldrace.inference.submission_log import LOG, keep_edited, keep_submission, log_submission
from foldrace.inference.tta import find_tta
from foldrace.inference.tta_gain import AUTO, TtaGain, gain_lines, measure_gains, recommended
from foldrace.reporting.blend_lines import blend_lines
from foldrace.reporting.formats import counted
from foldrace.reporting.sentences import submitted_loss, what_is_submitted, with_error
from foldrace.run_folder.allowed import open_allowed
from foldrace.run_folder.belonging import require_own_trials, telling_where_data_lay
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore


@dataclass(frozen=True)
class How:
    """How a submission is made and written."""

    tta: str = "none"
    """A row of `TTAS`, a list of views, or `auto`."""
    members: str | None = None
    """How many of the strongest members, or their names; None: the blend."""
    max_memory: str | None = None
    zipped: bool = False
    float_format: str = NUMBERS
    prior_shift: str = "tell"
    """`tell` or `apply`: what is done with the test set's own class frequencies."""


PLAIN = How()
_PRIOR_SHIFTS = ("tell", "apply")


def submit(
    root: str,
    how: How,
    out: Path | None,
    console: Console,
    data: DataOptions = AS_STORED,
    trust_plugins: bool = False,
    runs: Sequence[str] = (),
) -> None:
    """Write the submission of a run folder to `out`, or to `submission.csv` and a numbered copy.

    While a sweep is at work, of what is complete by now, and on the CPU: the GPUs are the sweep's.
    `trust_plugins` and `runs`: see `open_allowed`. RunFolderError where nothing is, or where the
    submission of another test set would take the place of the sweep's own.
    """
    store = open_allowed(root, trust_plugins, runs)
    if out is not None:
        zips = (zip_name(out.name),) if how.zipped else ()
        refuse_existing(out, receipt_name(out.name), *zips)
    own = store.config().data.test
    use_data(store, data)
    _check(store, how)
    sweeps = is_at_work(store)
    if sweeps and out is None and own is not None and data.test is not None:
        raise RunFolderError.single(
            f"{store.root}/{store.submission_name}",
            "is of the test set of sweep.yaml, and the sweep goes on writing it; give --out FILE",
        )
    with warnings_shown(console):
        blend = store.blend.record()
        if blend is None or (sweeps and _has_more_candidates(store, blend)):
            require_own_trials(store, folds_alone=True)
            require_complete(store, sweeps)
            for line in blend_lines(blend_so_far(store)):
                console.print(line, soft_wrap=False)
        predict_test_set(store, how, out, console, on_cpu=sweeps)


def _has_more_candidates(store: RunStore, blend: EnsembleRecord) -> bool:
    """True where candidates are complete that the blend has not considered."""
    complete = sum(summary.is_member for summary in store.summaries())
    return complete > blend.candidates_considered


@naming_plugins()
def predict_test_set(
    store: RunStore,
    how: How,
    out: Path | None,
    console: Console,
    on_cpu: bool = False,
    workers: int | None = None,
    is_interim: bool = False,
) -> Receipt:
    """Write the submission and its receipt; RunFolderError where the config has no test set.

    `workers` None: as many as there are cores; `is_interim`: a better one is to follow, so that no
    copy of this one is kept.
    """
    _check(store, how)
    with telling_where_data_lay(store):
        test = read_test_set(store.config().data, store.own_classes())
    assert test is not None
    workers, device = workers or cores(), "cpu" if on_cpu else None
    ensemble = _ensemble(store, how)
    gains = _gains(store, how, workers, device, ensemble, console)
    best = recommended(gains)
    tta = how.tta if how.tta != AUTO else "none" if best is None else best.tta
    predictor = Predictor(store, workers, tta, device, max_memory=how.max_memory, ensemble=ensemble)
    with console.status(f"Predicting {len(test)} test images") as status:
        found, bad = _probabilities(
            store,
            test,
            predictor,
            lambda done: status.update(
                f"Predicting {len(test)} test images: model {done} of {predictor.models}"
            ),
        )
    found, shift = _with_prior(store, found, bad, how, console)
    decided = _decided(store, predictor, found.prob, bad)
    prob = split_merged(found.prob, store.classes(), store.merged())
    files, name = _target(store, out)
    # File and receipt are one; elsewhere nobody else writes, and the run folder may be read-only.
    with store.blend.only_writer() if out is None else nullcontext():
        edited = keep_edited(files, name) if out is None else None
        receipt = write_submission(
            files,
            name,
            test,
            store.own_classes(),
            prob,
            predictor.ensemble,
            tta,
            [test.ids[row] for row in bad],
            decided,
            found.log_z,
            _manner(store, how, predictor.ensemble, gains, shift),
        )
        kept = keep_submission(files, receipt) if out is None and not is_interim else None
        zipped = zip_submission(files, name) if how.zipped else None
    if edited is not None:
        console.print(f"{name} had been changed by hand; as it was: {store.root}/{edited}")
    if kept is not None:
        console.print(f"kept as {store.root}/{kept}; {LOG} has a place for its score")
    if zipped is not None:
        console.print(f"zipped as {files.root}/{zipped}")
    if out is not None:
        _log_elsewhere(store, receipt, out, console)
    _print_receipt(receipt, predictor.ensemble.k, test, console)
    return receipt


def _ensemble(store: RunStore, how: How) -> EnsembleRecord | None:
    """The blend of the members that are asked for; None: the stored one, or none."""
    whole = store.blend.record()
    return (
        whole if whole is None or how.members is None else only_members(store, whole, how.members)
    )


def _gains(
    store: RunStore,
    how: How,
    workers: int,
    device: str | None,
    ensemble: EnsembleRecord | None,
    console: Console,
) -> tuple[TtaGain, ...]:
    """What each row of views gains on OOF rows, for `--tta auto`; printed."""
    if how.tta != AUTO:
        return ()
    with console.status("Measuring test-time views on OOF rows") as status:
        gains = measure_gains(
            store,
            workers,
            device,
            ensemble,
            lambda name: status.update(f"Measuring test-time views on OOF rows: {name}"),
        )
    for line in gain_lines(gains):
        console.print(line)
    return gains


def _with_prior(
    store: RunStore, found: FoldMean, bad: Sequence[int], how: How, console: Console
) -> tuple[FoldMean, PriorShift | None]:
    """The probabilities with the test set's own class frequencies, where that is asked for.

    The frequencies are told where they differ beyond chance; else None.
    """
    good = np.setdiff1d(np.arange(len(found.prob)), np.array(bad, dtype=np.int64))
    counts = np.bincount(store.labels(), minlength=len(store.classes()))
    shift = estimate_shift(found.prob[good], counts)
    applied = how.prior_shift == "apply"
    line = shift_line(shift, store.classes(), applied)
    if line is None:
        if applied:
            console.print("--prior-shift: no class's frequency differs beyond chance; not applied")
        return found, None
    console.print(line)
    if not applied:
        return found, shift
    prob = found.prob.copy()
    prob[good] = shift.applied(prob[good])
    return FoldMean(prob, found.log_z), shift


def _manner(
    store: RunStore,
    how: How,
    ensemble: EnsembleRecord,
    gains: Sequence[TtaGain],
    shift: PriorShift | None,
) -> Manner:
    """What the receipt says beyond the blend and its views."""
    whole = store.blend.record()
    part = "" if how.members is None or whole is None else part_note(whole, ensemble)
    told: dict[str, object] | None = None
    if shift is not None:
        by_class = dict(zip(store.classes(), shift.estimated.tolist(), strict=True))
        applied = how.prior_shift == "apply"
        told = {"applied": applied, "p_value": shift.p_value, "estimated": by_class}
    return Manner(how.float_format, part, tuple(asdict(gain) for gain in gains), told)


def _probabilities(
    store: RunStore, test: ImageSet, predictor: Predictor, on_model: OnModel
) -> tuple[FoldMean, list[int]]:
    """Probabilities (n, C) of the test set, log Z of the rows that can be read, and the others.

    Those whose image cannot be read have the class frequencies where `data.on_bad_test_image` says
    so; else DataError.
    """
    data = store.config().data
    may_be_bad, most = data.on_bad_test_image == "prior", data.max_pixels
    left_out = read_left_out(store.files) if may_be_bad else ()
    known = {one.image_path for one in left_out if one.data == "test"}
    bad = [row for row, path in enumerate(test.image_paths) if path in known]
    bad = [row for row in bad if image_fault(test.file(row), most) is not None]
    try:
        return _with_frequencies(store, test, predictor, on_model, bad), bad
    except (ImageError, RuntimeError) as error:
        # torch gives an error of a loader's process another type.
        if "ImageError" not in f"{type(error).__name__} {error}":
            raise
        failure = error
    with ThreadPoolExecutor(cores()) as pool:  # since the run began: one more look at all of them
        faults = list(pool.map(lambda row: image_fault(test.file(row), most), range(len(test))))
    bad = [row for row, fault in enumerate(faults) if fault is not None]
    if not bad:
        raise failure
    if not may_be_bad or len(bad) == len(test):
        raise DataError([_bad_image(test, row, faults[row]) for row in bad])
    return _with_frequencies(store, test, predictor, on_model, bad), bad


def _decided(
    store: RunStore, predictor: Predictor, prob: NDArray[np.float64], bad: Sequence[int]
) -> NDArray[np.int64] | None:
    """(n,) places in `own_classes` by the blend's decision rule; None where it has none.

    Of a merged class the most frequent part; in the bad rows the most frequent class.
    """
    if predictor.ensemble.rule is None:
        return None
    classes = predictor.decide(prob)
    classes[bad] = prob[bad].argmax(axis=1)
    alone = np.zeros_like(prob)
    alone[np.arange(len(prob)), classes] = 1.0
    return most_probable(split_merged(alone, store.classes(), store.merged()))


def _with_frequencies(
    store: RunStore, test: ImageSet, predictor: Predictor, on_model: OnModel, bad: Sequence[int]
) -> FoldMean:
    """Probabilities (n, C): the class frequencies of the training images in the bad rows."""
    good = np.setdiff1d(np.arange(len(test)), np.array(bad, dtype=np.int64))
    counts = np.bincount(store.labels(), minlength=len(store.classes()))
    prob = np.tile(counts / counts.sum(), (len(test), 1))
    found = predictor.test_probabilities(test, on_model, good)
    prob[good] = found.prob
    return FoldMean(prob, found.log_z)


def _bad_image(test: ImageSet, row: int, fault: str | None) -> Problem:
    where = f"test images in {test.image_root}"
    if test.lines is not None:
        where = f"{test.table} line {test.lines[row]}"
    advice = "put the file right, or go on without it: --set data.on_bad_test_image=prior"
    return Problem(where, f"{test.image_paths[row]}: it {fault}; {advice}")


def _check(store: RunStore, how: How) -> None:
    """Raise UserError for wrong options or no test set, before anything is read or blended."""
    if how.tta != AUTO:
        find_tta(how.tta, run_parts(store))
    check_float_format(how.float_format)
    if how.prior_shift not in _PRIOR_SHIFTS:
        raise UserError.single(
            "--prior-shift", f"got {how.prior_shift!r}; allowed: {', '.join(_PRIOR_SHIFTS)}"
        )
    if store.config().data.test is None:
        raise RunFolderError.single(
            f"{store.root}/sweep.yaml", "data.test is not set: `submit --test T` names a test set"
        )


def _log_elsewhere(store: RunStore, receipt: Receipt, out: Path, console: Console) -> None:
    """Log a submission that lies outside of the run folder, where that can be written."""
    try:
        with store.blend.only_writer():
            log_submission(store.files, receipt, str(out.resolve()))
    except (OSError, RunFolderError) as error:
        console.print(f"not in {store.root}/{LOG}: {error}")


def _target(store: RunStore, out: Path | None) -> tuple[Files, str]:
    if out is None:
        return store.files, store.submission_name
    return open_files(out.resolve().parent), out.name


def _print_receipt(receipt: Receipt, k: int, test: ImageSet, console: Console) -> None:
    console.print(
        f"{receipt.file}: {receipt.rows} test images, "
        f"{len(receipt.checks)} checks passed, sha256 {receipt.sha256[:12]}…"
    )
    console.print(f"form: {test.form}")
    one_fold = with_error(receipt.crossfit_logloss, receipt.crossfit_se)
    loss = submitted_loss(receipt.submitted_logloss, receipt.submitted_se, receipt.submitted_note)
    console.print(f"expected log loss of one fold's models: {one_fold}")
    console.print(f"expected log loss of the submission, {what_is_submitted(k)}: {loss}")
    if receipt.part_of_blend:
        console.print(f"warning {receipt.part_of_blend}")
    if receipt.rule is not None:
        metric = "" if receipt.chosen_metric is None else f" of {receipt.chosen_metric.name}"
        console.print(
            f"labels by the blend's decision rule{metric}, not by the most probable class"
        )
    if receipt.without_image:
        count, names = len(receipt.without_image), listing(receipt.without_image, 5)
        console.print(
            f"warning {counted(count, 'row')} without a readable image, filled "
            f"with the class frequencies of the training images: {names}"
        )
    if receipt.unvalidated:
        shares = ", ".join(f"{u.name} ({u.share:.3f} of each row)" for u in receipt.unvalidated)
        console.print(f"Unvalidated predictions in it, backed by no score: {shares}")
