"""The rules of the race: when a candidate gets no further folds.

Takes the evidence about one candidate, says whether to stop it and why. `RULES` is the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ensemble.gain import Gain


@dataclass(frozen=True)
class Evidence:
    """What is known of a candidate after some of its folds."""

    gain: Gain | None
    """Over the blend of the complete candidates; None while that has no members, or where the
    candidate's rows cannot be read."""
    z: float
    mean_loss: float | None
    """Of its finished folds, each counting the same; the better variant. None where its folds have
    no variant in common."""
    worst_loss: float | None
    """The highest fold loss of the best complete candidate; None while there is none."""

    @property
    def gain_text(self) -> str:
        return f"gain {self.gain.mean:+.4f} ± {self.gain.se:.4f}" if self.gain else "gain unknown"


@dataclass(frozen=True)
class Rule:
    """One row of the table."""

    name: str
    stops: Callable[[Evidence], bool]
    explain: Callable[[Evidence], str]
    compares_losses: bool = False
    """Whether it goes by `mean_loss` and `worst_loss`."""
    stops_nobody: bool = False


def _adds_nothing(evidence: Evidence) -> bool:
    """Not even `z` standard errors above its mean gain."""
    gain = evidence.gain
    return gain is not None and gain.mean + evidence.z * gain.se <= 0.0


def _worse_than_the_worst_fold(evidence: Evidence) -> bool:
    """Bergman, Purucker and Hutter, Don't Waste Your Time: Early Stopping Cross-Validation, 2024
    (arXiv 2405.03389), the forgiving rule."""
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
    Rule("gain", _adds_nothing, lambda evidence: evidence.gain_text),
    Rule("forgiving", _worse_than_the_worst_fold, _losses_text, compares_losses=True),
    Rule("none", lambda _: False, lambda _: "every candidate gets all folds", stops_nobody=True),
)
RULES = {rule.name: rule for rule in _ROWS}
