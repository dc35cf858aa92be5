"""`trial`: one fold trial in this process, without Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from foldrace.checks.preflight import preflight
from foldrace.commands.check import already_exists
from foldrace.commands.plugins import parse_with_plugins
from foldrace.config.load import ParsedConfig
from foldrace.console.machine import cores
from foldrace.core.consent import allow_plugins
from foldrace.core.errors import RunFailure, UserError
from foldrace.dataset.folds import folds_csv
from foldrace.run_folder.records import CandidateRecord
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.nodes import this_machine
from foldrace.trainables.spec import EpochReport, TrialSpec
from foldrace.trainables.trial import run_trial


def trial(
    config: Path,
    backbone: str,
    fold: int,
    overrides: Sequence[str],
    out: Path | None,
    console: Console,
) -> Path:
    """Train one fold of a backbone's default configuration; gives the trial's folder."""
    parsed, parts = parse_with_plugins(config, overrides)
    parsed = _one_device(_only_backbone(parsed, backbone), console)
    plan = preflight(parsed, None, this_machine(), cores(), parts)
    store = RunStore(out or tempfile.mkdtemp(prefix="foldrace-trial-"))
    if store.exists:
        raise already_exists(store, parsed)
    if not 0 <= fold < plan.config.folds.trials:
        allowed = f"0 to {plan.config.folds.trials - 1}"
        raise UserError.single(f"--fold {fold}", f"no such fold; allowed: {allowed}")
    folds = folds_csv(plan.manifest, plan.fold)
    allow_plugins(parts.files)  # the user's own command has named them
    store.create(plan.config, folds, plan.manifest.classes, parts.files)
    params = plan.space.default(backbone).as_dict()
    candidate = CandidateRecord(candidate="c0000", backbone=backbone, params=params)
    store.save_candidate(candidate)
    spec = TrialSpec(
        run=store.root,
        image_root=str(plan.manifest.image_root),
        candidate=candidate.candidate,
        fold=fold,
        cpus=plan.config.resources.cpus_per_trial,
        use_gpu=plan.config.resources.gpus_per_trial != 0,
    )
    record = run_trial(spec, _PrintEpochs(console))
    folder = Path(store.root) / store.trial_folder(record.candidate, record.fold)
    console.print(f"{record.status} after {record.seconds:.1f} s on {record.device}: {folder}")
    if record.status != "finished":
        raise RunFailure(record.error or record.status)
    return folder


class _PrintEpochs:
    """A monitor that prints one line per epoch, and never stops."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def report(self, epoch: EpochReport) -> None:
        self._console.print(
            f"epoch {epoch.epoch}: train loss {epoch.train_loss:.4f}, val log loss "
            f"{epoch.val_calibrated_logloss:.4f} (EMA {epoch.ema_val_calibrated_logloss:.4f}; "
            f"uncalibrated {epoch.val_logloss:.4f}, EMA {epoch.ema_val_logloss:.4f}), accuracy "
            f"{epoch.val_acc:.4f} (EMA {epoch.ema_val_acc:.4f}), {epoch.seconds:.1f} s"
        )

    def stop_requested(self) -> bool:
        return False


def _only_backbone(parsed: ParsedConfig, backbone: str) -> ParsedConfig:
    """The config with this backbone alone, which it need not list."""
    if parsed.config is None:
        return parsed
    search = parsed.config.search
    own = {name: knobs for name, knobs in search.per_backbone.items() if name == backbone}
    search = search.model_copy(update={"backbones": (backbone,), "per_backbone": own})
    return replace(parsed, config=parsed.config.model_copy(update={"search": search}))


def _one_device(parsed: ParsedConfig, console: Console) -> ParsedConfig:
    """The config with one device, as only `run` trains on several."""
    if parsed.config is None or parsed.config.resources.devices_per_trial == 1:
        return parsed
    asked = parsed.config.resources.devices_per_trial
    console.print(f"resources.devices_per_trial {asked} is left out: `trial` uses one device")
    resources = parsed.config.resources.model_copy(update={"devices_per_trial": 1})
    return replace(parsed, config=parsed.config.model_copy(update={"resources": resources}))
