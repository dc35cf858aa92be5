"""A candidate as a finished Optuna trial: what optuna-dashboard shows of it.

Takes candidates' summaries, gives `FrozenTrial`s: pooled OOF log loss (whatever the objective), one
intermediate value a fold, hyperparameters, status and gain.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from foldrace.run_folder.records import CandidateSummary
from foldrace.scheduling.search.study_view import diverged_value, last_value
from foldrace.search_spaces.hyperparameters import KNOBS, TrialParams
from foldrace.search_spaces.ranges import Choice, Float, Int, Range, Value
from foldrace.search_spaces.space import SearchSpace, distribution

BACKBONE, CANDIDATE = "backbone", "candidate"


class MirrorSpace:
    """The search space, widened to hold candidates outside it: points given by hand, and those
    from before a `resume --set search.space`. Optuna wants one list of choices a study."""

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._backbones = list(space.backbones)
        self._ranges = {n: r for b in space.backbones for n, r in space.searched(b).items()}

    def hold(self, backbone: str, params: TrialParams) -> None:
        """Make room for a configuration."""
        if backbone not in self._backbones:
            self._backbones.append(backbone)
        for name, value in self._searched(backbone, params).items():
            self._ranges[name] = _widened(self._ranges[name], value)

    def encode(self, backbone: str, params: TrialParams) -> dict[str, Value]:
        """Optuna's names and values, backbone first."""
        return {BACKBONE: backbone} | self._searched(backbone, params)

    def distributions(self, names: dict[str, Value]) -> dict[str, BaseDistribution]:
        """Of what `encode` gives."""
        found: dict[str, BaseDistribution] = {BACKBONE: CategoricalDistribution(self._backbones)}
        return found | {n: distribution(self._ranges[n]) for n in names if n != BACKBONE}

    def _searched(self, backbone: str, params: TrialParams) -> dict[str, Value]:
        values, settings = params.as_dict(), self._space.settings.get(backbone, {})
        return {s.name: values[knob] for knob, s in settings.items() if s.range is not None}


def mirror_trial(summary: CandidateSummary, space: MirrorSpace, classes: int) -> FrozenTrial:
    """PRUNED: stopped by the race, or unfinished with a fold to show. A diverged one is COMPLETE
    with a loss worse than chance, a failed one FAIL."""
    record = summary.candidate
    params = TrialParams.from_dict(record.params)
    encoded, steps = space.encode(record.backbone, params), _steps(summary)
    state = _state(summary, steps)
    now = datetime.now()
    return FrozenTrial(
        number=-1,  # the study gives it one
        trial_id=-1,
        state=state,
        value=_value(summary, classes) if state == TrialState.COMPLETE else None,
        datetime_start=now - timedelta(seconds=sum(t.seconds for t in summary.trials)),
        datetime_complete=now,
        params=encoded,
        distributions=space.distributions(encoded),
        user_attrs=_attributes(summary, encoded),
        system_attrs={},
        intermediate_values=steps,
    )


def _state(summary: CandidateSummary, steps: dict[int, float]) -> TrialState:
    if summary.status in ("complete", "diverged"):
        return TrialState.COMPLETE
    pruned = summary.status == "stopped" or (summary.status != "failed" and steps)
    return TrialState.PRUNED if pruned else TrialState.FAIL


def _value(summary: CandidateSummary, classes: int) -> float | None:
    return diverged_value(classes) if summary.status == "diverged" else last_value(summary)


def _steps(summary: CandidateSummary) -> dict[int, float]:
    """Number of folds -> pooled log loss of the first so many; 0 -> the score of a first fold that
    was stopped in mid-training."""
    best, last = summary.best, last_value(summary)
    if best is None:
        return {} if last is None else {0: last}
    rows = loss = 0.0
    steps: dict[int, float] = {}
    for folds, trial in enumerate(summary.finished, start=1):
        score = trial.variants[best]
        rows, loss = rows + score.rows, loss + score.rows * score.val_logloss
        steps[folds] = loss / rows
    return steps


def _attributes(summary: CandidateSummary, encoded: dict[str, Value]) -> dict[str, Value]:
    """What else there is to know; hyperparameters that are neither searched nor at their default
    among it."""
    found: dict[str, Value] = {
        CANDIDATE: summary.candidate.candidate,
        "status": summary.status,
        "folds": len(summary.finished),
    }
    if summary.gain is not None:
        found["gain"] = summary.gain
    names = {name.split("[")[0] for name in encoded}  # without the backbone of one of its own
    given = summary.candidate.params.items()
    return found | {k: v for k, v in given if k not in names and v != KNOBS[k].default}


def _widened(chosen: Range, value: Value) -> Range:
    if chosen.contains(value):
        return chosen
    match chosen:
        case Choice(values):
            return Choice((*values, value))
        case Float(low, high, log):
            low, high = min(low, float(value)), max(high, float(value))
            return Float(low, high, log and low > 0)
        case Int(low, high, log):
            least, most = min(low, int(value)), max(high, int(value))
            return Int(least, most, log and least > 0)
