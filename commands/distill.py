"""`distill`: students of a run's blend, searched by the run's own sweep, and one for deployment.

Takes a run folder with a blend; makes the teacher (`inference/teachers.py`), goes on with the run
as `resume` does, with students as its further candidates, and with `--refit` trains the best of
them on all images. Everything that can be wrong is told before a model runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from rich.console import Console

from foldrace.commands.moved_data import moved
from foldrace.commands.resume import parse_stored, resume
from foldrace.config.load import ParsedConfig
from foldrace.config.ranges import Value
from foldrace.config.schema import SweepConfig
from foldrace.console.machine import cores, only_driver
from foldrace.console.warnings import warnings_shown
from foldrace.core.errors import Problem, RunFailure, RunFolderError, UserError, listing
from foldrace.core.synonyms import did_you_mean
from foldrace.reporting.formats import counted
from foldrace.run_folder.allowed import open_allowed
from foldrace.run_folder.belonging import require_own_trials, training_data
from foldrace.run_folder.records import CandidateSummary, TeacherKind, TeacherRef
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.tables import ranked

if TYPE_CHECKING:
    from foldrace.inference.teachers import Unlabelled

KINDS: tuple[str, ...] = get_args(TeacherKind)
_SAMPLER = "tpe"  # in place of one that draws from a list that is at its end


@dataclass(frozen=True)
class Wish:
    """What the user asks of the students."""

    backbones: tuple[str, ...] = ()
    """Empty: that of the best candidate."""
    candidates: int = 4
    """Number of students; 0: none, to refit one that is there."""
    teacher: str = "blend"
    unlabelled: str | None = None
    """Folder or zip of images without labels."""
    test: bool = False
    """Learn from the test images, too."""
    refit: bool = False


def distill(
    root: str,
    wish: Wish,
    overrides: Sequence[str],
    address: str | None,
    console: Console,
    started: float | None = None,
    data_root: str | None = None,
    trust_plugins: bool = False,
) -> RunStore:
    """Make the teacher, train students, refit one where asked.

    `overrides`, `started`, `data_root` and `trust_plugins` are those of `resume`. UserError with
    everything that is wrong, before anything is written.
    """
    started = time.monotonic() if started is None else started
    store = open_allowed(root, trust_plugins)
    _check_wish(wish)
    if wish.candidates:
        with only_driver(store, "distill"), warnings_shown(console):
            changes = _prepared(store, wish, overrides, console, data_root)
        resume(root, changes, False, address, console, started, data_root, trust_plugins)
        _print_students(store, console)
    if wish.refit:
        with only_driver(store, "distill"), warnings_shown(console):
            _refit(store, console, data_root)
    return store


def _check_wish(wish: Wish) -> None:
    problems = []
    if wish.teacher not in KINDS:
        hint = did_you_mean(wish.teacher, KINDS)
        message = f"got {wish.teacher!r}; {hint}allowed: {', '.join(KINDS)}"
        problems.append(Problem("--teacher", message))
    if wish.unlabelled is not None and wish.test:
        message = "goes with --test as two runs of the command, not with it"
        problems.append(Problem("--unlabelled", message))
    if not wish.candidates and not wish.refit:
        message = "0 leaves nothing to do; allowed: 1 or more, or 0 with --refit"
        problems.append(Problem("--candidates", message))
    if problems:
        raise UserError(problems)


def _prepared(
    store: RunStore,
    wish: Wish,
    overrides: Sequence[str],
    console: Console,
    data_root: str | None,
) -> list[str]:
    """Check everything, make the teacher; the overrides with which the run goes on."""
    summaries = store.summaries(stored=require_own_trials(store))
    if store.blend.record() is None:
        message = "has no blend to learn from yet; first `foldrace resume DIR` or `ensemble DIR`"
        raise RunFolderError.single(store.root, message)
    config = store.config()
    unknown = f"t{'0' * 31}"  # the teacher's name is not known before it is made
    planned = [*_changes(store, config, summaries, wish, unknown), *overrides]
    parsed = parse_stored(store, planned, data_root)
    _check(store, parsed, console)
    store.use_data(moved(config.data, data_root))
    teacher = _teacher(store, wish, console)
    return [*_changes(store, config, summaries, wish, teacher.digest), *overrides]


def _changes(
    store: RunStore,
    config: SweepConfig,
    summaries: Sequence[CandidateSummary],
    wish: Wish,
    teacher: str,
) -> list[str]:
    """What of the config the students change, as `--set` has it.

    A backbone that has a complete candidate takes over the best one's hyperparameters: of its
    students only what belongs to the teacher is searched. Others have their whole space.
    """
    best = {
        s.candidate.backbone: s
        for s in reversed(ranked(summaries))
        if s.is_member and not s.candidate.is_student
    }
    first = next((s.candidate.backbone for s in ranked(summaries) if s.is_member), None)
    backbones = wish.backbones or ((first,) if first else config.search.backbones)
    fixed = {b: _best_values(config, best[b]) for b in backbones if b in best}
    per_backbone = {b: v for b, v in fixed.items() if v}
    count = len(store.candidates()) + wish.candidates
    changes = [
        f"search.teacher={teacher}",
        f"search.candidates={count}",
        f"search.backbones={json.dumps(backbones)}",
        f"search.per_backbone={json.dumps(per_backbone)}",
        "search.points=[]",
        "search.space.distill_alpha=search",
        "search.space.distill_temperature=search",
    ]
    if config.search.fold_trials is not None:
        more = wish.candidates * store.fold_count
        changes.append(f"search.fold_trials={config.search.fold_trials + more}")
    if config.search.sampler in ("list", "grid"):
        changes.append(f"search.sampler={_SAMPLER}")
    return changes


def _best_values(config: SweepConfig, summary: CandidateSummary) -> dict[str, Value]:
    """The hyperparameters that the config would search, at the values of a candidate."""
    from foldrace.search_spaces.space import build_space

    backbone = summary.candidate.backbone
    search = config.search.model_copy(update={"backbones": (backbone,), "per_backbone": {}})
    space, _ = build_space(config.model_copy(update={"search": search}), "")
    params = summary.candidate.params
    settings = space.settings[backbone]
    return {name: params[name] for name, s in settings.items() if s.range and name in params} | {
        name: value
        for name, value in params.items()
        if name in settings
        and settings[name].range is None
        and value != settings[name].default
        and not name.startswith("distill_")
    }


def _check(store: RunStore, parsed: ParsedConfig, console: Console) -> None:
    from foldrace.checks.config import config_problems
    from foldrace.commands.plugins import open_run
    from foldrace.scheduling.nodes import this_machine
    from foldrace.search_spaces.space import build_space

    config = parsed.require()
    _, parts = open_run(store.root, console)
    space, problems = build_space(config, f"{store.root}/sweep.yaml", len(store.folds().targets))
    alpha = {b: space.settings[b]["distill_alpha"] for b in space.backbones}
    problems += [
        Problem(setting.key, f"is 0 for {backbone}: such a candidate learns nothing of a teacher")
        for backbone, setting in alpha.items()
        if setting.range is None and setting.default == 0
    ]
    earlier = {c.candidate: c.backbone for c in store.candidates()}
    problems += config_problems(config, space, this_machine(), earlier, parts)
    if problems:
        raise UserError(problems)


def _teacher(store: RunStore, wish: Wish, console: Console) -> TeacherRef:
    from foldrace.inference.teachers import make_teacher

    manifest = training_data(store)
    files = [manifest.file(row) for row in range(len(manifest))]
    unlabelled = _unlabelled(store, wish, console)
    began, total = time.monotonic(), store.fold_count
    with console.status("Teacher: choosing members, weights and temperatures") as status:
        teacher = make_teacher(
            store,
            files,
            cast("TeacherKind", wish.teacher),
            cores(),
            unlabelled,
            lambda fold: status.update(f"Teacher: soft labels, fold {fold + 1} of {total}"),
        )
    for line in _teacher_lines(store, teacher):
        console.print(line, soft_wrap=False)
    console.print(f"Teacher {teacher.digest[:8]}: {time.monotonic() - began:.0f} s")
    return teacher


def _teacher_lines(store: RunStore, teacher: TeacherRef) -> list[str]:
    record = store.teachers.record(teacher.digest)
    lines = [f"Teacher {teacher.digest[:8]}: {teacher}"]
    for fold in record.folds:
        shares = listing([f"{m.candidate} {m.variant} {m.weight:.2f}" for m in fold.models], 6)
        models = {m.fold for m in fold.models}
        seen = "" if models == {fold.fold} else f", models of fold {min(models)}"
        chosen = f"chosen on {counted(fold.chosen_on, 'row')}" if fold.chosen_on else "all alike"
        lines.append(f"  fold {fold.fold}: {shares} ({fold.method}, {chosen}{seen})")
    if teacher.is_optimistic:
        lines.append(
            "warning its models have seen labels of the rows that score the students: they are "
            "marked optimistic, and no blend takes them"
        )
    return lines


def _unlabelled(store: RunStore, wish: Wish, console: Console) -> Unlabelled:
    """The images without labels; those that cannot be read are left out, with a warning."""
    from foldrace.inference.teachers import Unlabelled

    if wish.test:
        test = _test_files(store)
        return Unlabelled(_readable(store, test, console), of_test_set=True)
    if wish.unlabelled is None:
        return Unlabelled()
    return Unlabelled(_readable(store, _folder_files(wish.unlabelled), console))


def _test_files(store: RunStore) -> list[Path]:
    from foldrace.dataset.test_set import read_test_set

    test = read_test_set(store.config().data, store.own_classes())
    if test is None:
        raise UserError.single("--test", "the run has no data.test; --unlabelled FOLDER names one")
    return [test.file(row) for row in range(len(test))]


def _folder_files(given: str) -> list[Path]:
    from foldrace.dataset.archive import unpack
    from foldrace.dataset.images import find_files

    path = Path(given).expanduser().absolute()
    if path.suffix.lower() == ".zip" and path.is_file():
        path = unpack(path)
    if not path.is_dir():
        what = "is no folder and no zip" if path.exists() else "does not exist"
        raise UserError.single(f"--unlabelled {given}", f"{what}; allowed: a folder or zip")
    found = [path / name for name in find_files(path).images]
    if not found:
        raise UserError.single(f"--unlabelled {given}", "holds no image")
    return found


def _readable(store: RunStore, files: Sequence[Path], console: Console) -> tuple[Path, ...]:
    from foldrace.dataset.images import ImageError, read_rgb

    good, bad = list[Path](), list[str]()
    for file in files:
        try:
            read_rgb(file, max_pixels=store.config().data.max_pixels)
            good.append(file.absolute())
        except ImageError as error:
            bad.append(f"{file}: {error}")
    for line in bad[:5]:
        console.print(f"warning left out, {line}")
    if len(bad) > 5:
        console.print(f"warning left out, and {len(bad) - 5} more unreadable images")
    if not good:
        raise UserError.single("--test / --unlabelled", "none of the images can be read")
    return tuple(good)


def _students(store: RunStore) -> list[CandidateSummary]:
    """Complete students, the best first, honest ones before optimistic ones."""
    complete = [s for s in ranked(store.summaries()) if s.status == "complete" and s.best]
    students = [s for s in complete if s.candidate.is_student]
    return sorted(students, key=lambda s: s.candidate.is_optimistic)


def _print_students(store: RunStore, console: Console) -> None:
    for summary in _students(store)[:5]:
        params, best = summary.candidate.params, summary.best
        assert best is not None
        console.print(
            f"Student {summary.candidate.candidate} of {summary.candidate.teacher}: "
            f"{summary.candidate.backbone}, alpha {params['distill_alpha']:.2g}, temperature "
            f"{params['distill_temperature']:.2g}: OOF log loss "
            f"{summary.pooled_calibrated(best):.4f}, accuracy {summary.pooled_accuracy(best):.4f}"
        )
    labels = (s for s in ranked(store.summaries()) if s.is_member and not s.candidate.is_student)
    alone, blend = next(labels, None), store.blend.record()
    if alone is not None and alone.best is not None:
        console.print(
            f"Without a teacher {alone.candidate.candidate}, {alone.candidate.backbone}: OOF log "
            f"loss {alone.pooled_calibrated(alone.best):.4f}"
        )
    if blend is not None:
        console.print(f"Blend: cross-fitted log loss {blend.crossfit_logloss:.4f}")


def _refit(store: RunStore, console: Console, data_root: str | None) -> None:
    from foldrace.trainables.refit import refit

    students = _students(store)
    if not students:
        message = "has no complete student to refit; first `foldrace distill DIR` without it"
        raise RunFailure(f"{store.root} {message}")
    store.use_data(moved(store.config().data, data_root))
    root = str(training_data(store).image_root)
    record = refit(store, students[0], root, cores(), lambda line: console.print(line))
    console.print(
        f"{store.root}/refit/{record.candidate}/model.safetensors: {record.backbone} trained on "
        f"{record.rows:,} labelled and {record.unlabelled:,} unlabelled images; expected log loss "
        f"{record.oof_calibrated_logloss:.4f}, that of its folds' students"
    )
