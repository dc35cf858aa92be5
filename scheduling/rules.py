"""The rules by which a candidate that has some folds is judged: one row a rule of `race.rule`.

Takes what is known of a candidate (`Evidence`), says whether it is to have further folds. Pure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from foldrace.ensemble.running_blend import Gain


@dataclass(frozen=True)
class Evidence:
    """Evidence about a candidate after some of its folds, by which a rule decides."""

    gain: Gain | None
    """Gain over the blend of the complete candidates; None while that has no members, or where the
    candidate's rows cannot be read."""
    z: float
    """Standard errors that the gain may lie below zero."""
    mean_loss: float | None
    """Mean calibrated log loss of the better variant over its finished folds; None where they have
    no variant in common."""
    worst_loss: float | None
    """Highest fold loss of the best complete candidate; None while there is none."""

    @property
    def gain_text(self) -> str:
        """The gain with its standard error, for people."""
        return f"gain {self.gain.mean:+.4f} ± {self.gain.se:.4f}" if self.gain else "gain unknown"


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules."""

    name: str
    stops: Callable[[Evidence], bool]
    explain: Callable[[Evidence], str]
    takes_turns: bool = False
    """True where a candidate waits for its turn after the first fold; else all get all folds,
    until they are stopped."""
    one_by_one: bool = False
    """True where a candidate's next fold waits for the one before it."""
    compares_losses: bool = False
    """True where it goes by `mean_loss` and `worst_loss`."""


def _adds_nothing(evidence: Evidence) -> bool:
    """True where the gain is not above zero even with `z` standard errors added."""
    gain = evidence.gain
    return gain is not None and gain.mean + evidence.z * gain.se <= 0.0


def _worse_than_the_worst_fold(evidence: Evidence) -> bool:
    """The forgiving rule of Bergman, Purucker and Hutter.

    Don't Waste Your Time: Early Stopping Cross-Validation, 2024, arXiv 2405.03389.
    """
    mean, worst = evidence.mean_loss, evidence.worst_loss
    return mean is not None and worst is not None and mean > worst


def _losses_text(evidence: Evidence) -> str:
    if evidence.mean_loss is None or evidence.worst_loss is None:
        return "no log loss to compare"
    return (
        f"mean log loss {evidence.mean_loss:.4f}, worst fold of the best complete candidate "
        f"{evidence.worst_loss:.4f}"
    )


_ROWS = (
    Rule("gain", _adds_nothing, lambda evidence: evidence.gain_text, takes_turns=True),
    Rule(
        "forgiving",
        _worse_than_the_worst_fold,
        _losses_text,
        one_by_one=True,
        compares_losses=True,
    ),
    Rule("none", lambda _: False, lambda _: "every candidate gets all folds"),
)
RULES = {rule.name: rule for rule in _ROWS}
