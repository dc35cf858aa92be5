"""Checks of hyperparameters that make no sense together.

Takes what each backbone may vary, gives a problem for each combination that a trial could draw,
with the reason and what to change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from foldrace.config.ranges import Choice, Float, Int, Value, shown
from foldrace.core.errors import Problem
from foldrace.core.plugins import NO_PARTS, Parts
from foldrace.search_spaces.space import Setting
from foldrace.trainables.losses import LOSSES, Loss


@dataclass(frozen=True)
class _TrialSettings:
    """The values that a trial of one backbone may draw."""

    backbone: str
    settings: Mapping[str, Setting]
    drops_paths: Callable[[str], bool]
    losses: Mapping[str, Loss]
    has_teacher: bool = False

    def least(self, knob: str) -> float:
        return min(float(value) for value in self.settings[knob].values)

    def most(self, knob: str) -> float:
        return max(float(value) for value in self.settings[knob].values)

    def may_be_zero(self, knob: str) -> bool:
        """True where 0 may be drawn.

        A float range draws its lower end with probability 0; the first candidate of a backbone has
        the defaults.
        """
        setting = self.settings[knob]
        if isinstance(setting.range, Float):
            return setting.range.high == 0 or setting.default == 0
        return 0 in setting.values

    def names(self, knob: str) -> tuple[Value, ...]:
        return self.settings[knob].values

    def problem(self, knob: str, message: str) -> Problem:
        """Problem at the key of the config that the knob comes from."""
        return Problem(self.settings[knob].key, message)


Rule = Callable[[_TrialSettings], Iterator[Problem]]


def check_combinations(
    settings: Mapping[str, Mapping[str, Setting]],
    drops_paths: Callable[[str], bool],
    parts: Parts = NO_PARTS,
    has_teacher: bool = False,
) -> list[Problem]:
    """Problems of all combinations; one that several backbones share is given once.

    `settings`: backbone -> knob -> setting, of a `SearchSpace`; `drops_paths` tells whether a
    backbone has stochastic depth. Names in no table are left to the checks of their tables.
    """
    found = [
        problem
        for backbone, own in settings.items()
        for rule in _RULES
        for problem in rule(_TrialSettings(backbone, own, drops_paths, parts[LOSSES], has_teacher))
    ]
    return list(dict.fromkeys(found))


def _student_without_teacher(trial: _TrialSettings) -> Iterator[Problem]:
    if trial.most("distill_alpha") > 0 and not trial.has_teacher:
        yield trial.problem(
            "distill_alpha",
            f"is up to {trial.most('distill_alpha'):g}, but nothing is there to learn from: "
            "`foldrace distill DIR` makes a teacher of a run's blend and sets this itself; else "
            "set it to 0",
        )


def _sam_in_fp16(trial: _TrialSettings) -> Iterator[Problem]:
    if trial.most("sam_rho") > 0 and "fp16" in trial.names("precision"):
        yield trial.problem(
            "sam_rho",
            "SAM needs unscaled gradients twice in an update, and fp16 scales them; "
            "set precision to bf16 or fp32 (auto: where the GPU has bf16), or sam_rho 0",
        )


def _rdrop_without_noise(trial: _TrialSettings) -> Iterator[Problem]:
    if trial.most("rdrop_alpha") == 0 or not trial.may_be_zero("dropout"):
        return
    if trial.may_be_zero("drop_path"):
        yield trial.problem(
            "rdrop_alpha",
            "R-Drop compares two passes that drop other units, and with dropout 0 and drop_path 0 "
            "they are the same; keep dropout or drop_path above 0, or set rdrop_alpha 0",
        )
    elif not trial.drops_paths(trial.backbone):
        yield trial.problem(
            "rdrop_alpha",
            "R-Drop compares two passes that drop other units, and with dropout 0 they are the "
            f"same: {trial.backbone} has no stochastic depth for drop_path to act on; keep "
            "dropout above 0, or set rdrop_alpha 0",
        )


def _soft_targets_for_a_hard_loss(trial: _TrialSettings) -> Iterator[Problem]:
    losses = trial.losses
    hard = [name for name in trial.names("loss") if name in losses and losses[str(name)].hard]
    if not hard:
        return
    for knob, technique in (
        ("label_smoothing", "label smoothing"),
        ("mixup_prob", "MixUp"),
        ("cutmix_prob", "CutMix"),
    ):
        if _softens(trial, knob):
            yield trial.problem(
                knob,
                f"{technique} makes soft targets, and the loss {hard[0]} takes one class an image; "
                f"set {knob} 0, or take another loss",
            )


def _softens(trial: _TrialSettings, knob: str) -> bool:
    """True where the technique of the knob may be on."""
    alpha = {"mixup_prob": "mixup_alpha", "cutmix_prob": "cutmix_alpha"}.get(knob)
    return trial.most(knob) > 0 and (alpha is None or trial.most(alpha) > 0)


def _more_than_every_batch(trial: _TrialSettings) -> Iterator[Problem]:
    """MixUp and CutMix on more than all batches.

    Ranges that only may add up to more are fine: CutMix then takes what MixUp leaves.
    """
    mixup, cutmix = trial.least("mixup_prob"), trial.least("cutmix_prob")
    both_on = trial.least("mixup_alpha") > 0 and trial.least("cutmix_alpha") > 0
    if both_on and mixup + cutmix > 1:
        yield trial.problem(
            "cutmix_prob",
            f"MixUp on {shown(mixup)} and CutMix on {shown(cutmix)} of the batches are more than "
            "all, and no batch gets both; lower one, to a sum of 1 at most",
        )


def _snapshots(trial: _TrialSettings) -> Iterator[Problem]:
    snapshots, epochs = trial.most("snapshots"), trial.least("epochs")
    fewest = _fewest_cycles_above_one(trial.settings["cycles"])
    if 0 < epochs <= snapshots:
        yield trial.problem(
            "snapshots",
            f"up to {shown(snapshots)} snapshots before the last epoch, but a trial may have "
            f"{shown(epochs)} epochs; at most {shown(epochs - 1)}",
        )
    if fewest is not None and snapshots >= fewest:
        yield trial.problem(
            "snapshots",
            f"a snapshot is the end of a cycle before the last one: up to {shown(snapshots)} "
            f"snapshots, but a trial may have {shown(fewest)} cycles; raise cycles or lower "
            "snapshots",
        )


def _fewest_cycles_above_one(cycles: Setting) -> float | None:
    """The least number of cycles above one that may be drawn, or None.

    With one cycle the snapshots are the epochs before the last one instead.
    """
    match cycles.range:
        case Int(low, high) if high > 1:
            return max(low, 2)
        case Choice() | None:
            return min((float(value) for value in cycles.values if float(value) > 1), default=None)
        case _:
            return None


def _cycles(trial: _TrialSettings) -> Iterator[Problem]:
    cycles, epochs = trial.most("cycles"), trial.least("epochs")
    others = [name for name in trial.names("schedule") if name != "cosine"]
    if cycles > epochs:
        yield trial.problem(
            "cycles",
            f"a cycle has at least one epoch: up to {shown(cycles)} cycles, but a trial may have "
            f"{shown(epochs)} epochs",
        )
    if cycles > 1 and others:
        yield trial.problem(
            "cycles",
            f"only the schedule cosine has cycles, and {others[0]} may be drawn; "
            "set cycles 1 or schedule cosine",
        )


def _freezing(trial: _TrialSettings) -> Iterator[Problem]:
    freeze, unfreeze = trial.most("freeze_epochs"), trial.most("unfreeze_epochs")
    epochs = trial.least("epochs")
    if freeze + unfreeze > epochs:
        yield trial.problem(
            "freeze_epochs" if freeze else "unfreeze_epochs",
            f"freeze_epochs up to {shown(freeze)} and unfreeze_epochs up to {shown(unfreeze)} are "
            f"more than the {shown(epochs)} epochs that a trial may have",
        )


def _nothing_to_pull_to(trial: _TrialSettings) -> Iterator[Problem]:
    if trial.most("l2_sp") > 0 and False in trial.names("pretrained"):
        yield trial.problem(
            "l2_sp",
            "pulls the backbone to its pretrained weights, and there are none with pretrained "
            "false; set l2_sp 0 or pretrained true",
        )


_RULES: tuple[Rule, ...] = (
    _student_without_teacher,
    _sam_in_fp16,
    _rdrop_without_noise,
    _soft_targets_for_a_hard_loss,
    _more_than_every_batch,
    _snapshots,
    _cycles,
    _freezing,
    _nothing_to_pull_to,
)
