"""`check`, `split`, `run`, `resume`, `trial`: from a config to a finished run folder."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from commands.finish import cores, finish
from commands.terminal import log_folder, logging_to, only_our_output
from experiment.config import ParsedConfig, ResourcesConfig, SweepConfig, parse_config
from experiment.errors import (
    EnvironmentProblem,
    Interrupted,
    Problem,
    RunFailure,
    RunFolderError,
    UserError,
)
from experiment.folds import folds_csv, make_folds
from experiment.manifest import Manifest, read_manifest
from experiment.store import RunStore, differing_keys
from reporting.live import LiveView, print_leaderboard
from scheduling.cluster import (
    Node,
    alive_nodes,
    connect,
    this_machine,
    unreachable,
)
from scheduling.preflight import Plan, config_problems, preflight
from scheduling.tuner import SweepOutcome, run_sweep
from search_spaces.sampling import SearchSpace, build_space

if TYPE_CHECKING:
    from trainables.trial import EpochReport

# What `resume --set` may change: everything else would make old and new trials incomparable.
_EXTENDABLE = (
    "search.candidates",
    "search.backbones",
    "search.space",
    "search.per_backbone",
    "search.sampler",
    "resources.",
    "ensemble.",
)
_log = logging.getLogger("foldrace")


def check(config: Path, overrides: Sequence[str], console: Console) -> None:
    """Every problem of config and data, or what a run would do."""
    plan = preflight(parse_config(config, overrides), Path(), this_machine(), cores())
    _print_plan(plan, console)


def split(config: Path, overrides: Sequence[str], out: Path | None, console: Console) -> Path:
    """Write folds.csv alone; `out` None: beside the config."""
    parsed = parse_config(config, overrides).require()
    manifest = read_manifest(parsed.data, parsed.folds.column)
    target = out or config.resolve().parent / "folds.csv"
    if target.exists():
        raise RunFolderError.single(str(target), "exists; remove it or give another --out")
    text = folds_csv(manifest, make_folds(manifest, parsed.folds))
    RunStore(target.parent).files.write(target.name, text.encode())
    console.print(f"{target}: {len(manifest)} rows in {parsed.folds.k} folds")
    return target


def run(
    config: Path,
    out: str | None,
    overrides: Sequence[str],
    address: str | None,
    dry_run: bool,
    smoke: bool,
    console: Console,
) -> RunStore:
    """The main job. Raises UserError before anything is written, Interrupted on Ctrl-C."""
    parsed = parse_config(config, overrides, smoke)
    name = parsed.config.name if parsed.config else config.stem
    store = RunStore(out or f"runs/{name}")
    if store.exists:
        raise _exists(store, parsed)
    with _cluster_for_checks(parsed, address) as nodes:
        plan = preflight(parsed, _mounted(store), nodes, cores())
        _print_plan(plan, console)
        if not dry_run:
            text = folds_csv(plan.manifest, plan.fold)
            store.create(plan.config, text, plan.manifest.classes)
            _sweep_and_finish(store, plan.space, str(plan.manifest.image_root), address, console)
    return store


def resume(
    root: str, overrides: Sequence[str], retry_failed: bool, address: str | None, console: Console
) -> RunStore:
    """Go on with a run; finished fold trials are kept. Overrides may extend budget and space."""
    store = RunStore.open(root)
    parsed = _parse_stored(store, overrides)
    _refuse_other_changes(store, parsed)
    config = parsed.require()
    space, problems = build_space(config.search, config.training, f"{store.root}/sweep.yaml")
    manifest = _same_data(store, config)
    with _cluster_for_checks(parsed, address) as nodes:
        problems += config_problems(config, space, nodes)
        if problems:
            raise UserError(problems)
        store.save_config(config)
        if retry_failed:
            for (candidate, fold), trial in store.trials().items():
                if trial.status == "failed":
                    store.forget_trial(candidate, fold)
        _sweep_and_finish(store, space, str(manifest.image_root), address, console)
    return store


def trial(
    config: Path,
    backbone: str,
    fold: int,
    overrides: Sequence[str],
    out: Path | None,
    console: Console,
) -> Path:
    """One fold trial of a backbone's default configuration, in this process, without Ray."""
    from trainables.trial import TrialSpec, run_trial

    parsed = _only_backbone(parse_config(config, overrides), backbone)
    plan = preflight(parsed, None, this_machine(), cores())
    store = RunStore(out or tempfile.mkdtemp(prefix="foldrace-trial-"))
    if store.exists:
        raise _exists(store, parsed)
    if not 0 <= fold < plan.config.folds.k:
        allowed = f"0 to {plan.config.folds.k - 1}"
        raise UserError.single(f"--fold {fold}", f"no such fold; allowed: {allowed}")
    store.create(plan.config, folds_csv(plan.manifest, plan.fold), plan.manifest.classes)
    spec = TrialSpec(
        run=store.root,
        image_root=str(plan.manifest.image_root),
        candidate="c0000",
        backbone=backbone,
        params=plan.space.default(backbone),
        fold=fold,
        training=plan.config.training,
        augment=plan.config.augment,
        seed=plan.config.search.seed,
        cpus=plan.config.resources.cpus_per_trial,
        use_gpu=plan.config.resources.gpus_per_trial != 0,
    )
    record = run_trial(spec, _PrintEpochs(console))
    folder = Path(store.root) / store.trial_folder(record.candidate, record.fold)
    console.print(f"{record.status} after {record.seconds:.1f} s on {record.device}: {folder}")
    if record.status != "finished":
        raise RunFailure(record.error or record.status)
    return folder


def _only_backbone(parsed: ParsedConfig, backbone: str) -> ParsedConfig:
    """The config with this backbone alone, which it need not list."""
    if parsed.config is None:
        return parsed
    search = parsed.config.search
    own = {name: knobs for name, knobs in search.per_backbone.items() if name == backbone}
    search = search.model_copy(update={"backbones": (backbone,), "per_backbone": own})
    return replace(parsed, config=parsed.config.model_copy(update={"search": search}))


class _PrintEpochs:
    """A monitor that prints one line an epoch."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def report(self, epoch: EpochReport) -> None:
        self._console.print(
            f"epoch {epoch.epoch}: train loss {epoch.train_loss:.4f}, val log loss "
            f"{epoch.val_logloss:.4f} (EMA {epoch.ema_val_logloss:.4f}), accuracy "
            f"{epoch.val_acc:.4f} (EMA {epoch.ema_val_acc:.4f}), {epoch.seconds:.1f} s"
        )

    def stop_requested(self) -> bool:
        return False


@contextlib.contextmanager
def _cluster_for_checks(parsed: ParsedConfig, address: str | None) -> Iterator[list[Node]]:
    """What the run will have. A cluster that runs must be asked, and stays connected; this
    machine is known without starting Ray, so that a typo costs no start."""
    if address is None:
        yield this_machine()
        return
    resources = parsed.config.resources if parsed.config else ResourcesConfig()
    with connect(address, resources):
        yield alive_nodes()


def _sweep_and_finish(
    store: RunStore, space: SearchSpace, image_root: str, address: str | None, console: Console
) -> None:
    config = store.config()
    folder = log_folder(store)
    with logging_to(folder), only_our_output(folder / "ray.log", console) as screen:
        _log.info("Ray: starting")
        with connect(address, config.resources) as cluster:
            problems = unreachable(_local_folders(store, image_root))
            if problems:
                raise EnvironmentProblem(problems)
            screen.print(
                f"{cluster.slots()} fold trials at a time; Ray dashboard: {cluster.dashboard}"
            )
            _log.info("sweep: begins, %d fold trials at a time", cluster.slots())
            with LiveView(screen) as view:
                outcome = run_sweep(store, config, space, image_root, cluster, view.update)
            _log.info("sweep: ended after %.1f s", outcome.seconds)
        _log.info("Ray: stopped")
        if outcome.interrupted:
            raise Interrupted(f"interrupted; go on with: foldrace resume {store.root}")
        print_leaderboard(screen, outcome.summaries, limit=10)
        _print_trouble(outcome, screen)
        finished = finish(store, screen)
        screen.print(f"Report: {store.root}/{finished.report}")
        _log.info("run: blend and report written")


def _print_plan(plan: Plan, console: Console) -> None:
    config = plan.config
    for warning in plan.warnings:
        console.print(f"[yellow]warning[/yellow] {warning}", highlight=False)
    trials = config.search.candidates * config.folds.k
    test = f", {len(plan.test)} test images" if plan.test else ""
    console.print(
        f"{config.name}: {len(plan.manifest)} images, {len(plan.manifest.classes)} classes{test}; "
        f"{config.search.candidates} candidates × {config.folds.k} folds = {trials} fold trials "
        f"of {len(config.search.backbones)} backbones; at most {plan.disk_bytes / 1e9:.2f} GB"
    )


def _print_trouble(outcome: SweepOutcome, console: Console) -> None:
    """One line for each candidate that will not be in the blend."""
    if outcome.out_of_time:
        console.print("[yellow]warning[/yellow] the time budget ended the sweep")
    for summary in outcome.summaries:
        if summary.status == "complete":
            continue
        errors = [t.error for t in summary.trials if t.error]
        reason = errors[0].strip().splitlines()[-1] if errors else "not all folds were trained"
        console.print(
            f"[yellow]warning[/yellow] {summary.candidate.candidate} {summary.status}: {reason}",
            highlight=False,
        )


def _exists(store: RunStore, parsed: ParsedConfig) -> RunFolderError:
    """Same sweep: `resume` goes on with it. Another: name the keys that differ."""
    keys = differing_keys(store.config(), parsed.config) if parsed.config else []
    message = f"exists already; go on with `foldrace resume {store.root}`, or give --out"
    if keys:
        listed = ", ".join(keys[:8]) + (", …" if len(keys) > 8 else "")
        message = (
            f"is the run folder of another config (it differs in {listed}); give another --out, "
            f"or go on with that run: `foldrace resume {store.root}`"
        )
    return RunFolderError([*parsed.problems, Problem(store.root, message)])


def _parse_stored(store: RunStore, overrides: Sequence[str]) -> ParsedConfig:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "sweep.yaml"
        copy.write_bytes(store.files.read("sweep.yaml"))
        parsed = parse_config(copy, overrides)
    return replace(parsed, source=f"{store.root}/sweep.yaml")


def _refuse_other_changes(store: RunStore, parsed: ParsedConfig) -> None:
    if parsed.config is None:
        return
    keys = differing_keys(store.config(), parsed.config)
    refused = [key for key in keys if not key.startswith(_EXTENDABLE)]
    if refused:
        allowed = ", ".join(f"{prefix}*" for prefix in _EXTENDABLE)
        raise RunFolderError(
            [
                Problem(f"--set {key}", f"cannot change in a run that exists; allowed: {allowed}")
                for key in refused
            ]
        )


def _same_data(store: RunStore, config: SweepConfig) -> Manifest:
    """The data as it was; fold numbers belong to the rows of folds.csv."""
    manifest = read_manifest(config.data, config.folds.column)
    if manifest.image_paths != store.folds().image_paths:
        raise RunFolderError.single(
            f"{store.root}/folds.csv",
            f"lists {len(store.folds().image_paths)} images, but {config.data.train} now gives "
            f"{len(manifest)} or others; put the data back, or start a new run",
        )
    return manifest


def _local_folders(store: RunStore, image_root: str) -> list[str]:
    return [path for path in (store.root, image_root) if "://" not in path]


def _mounted(store: RunStore) -> Path | None:
    return None if "://" in store.root else Path(store.root)
