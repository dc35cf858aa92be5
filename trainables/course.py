"""How a training went: the log, and each variant at its best epoch.

Takes the scores of each epoch, gives the variants that are written.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from torch import Tensor, nn

from experiment.records import Oof, VariantScore
from experiment.variants import RAW
from trainables.scoring import Scored
from trainables.spec import EpochReport


@dataclass(frozen=True)
class Kept:
    """A variant as it was at one epoch, on the CPU."""

    score: VariantScore
    oof: Oof
    state: dict[str, Tensor]


@dataclass
class Course:
    """`snapshots` further sets of raw weights are kept: the ends of the last cycles where
    `cycle_ends` gives some, else the next best epochs after the best one."""

    snapshots: int = 0
    cycle_ends: tuple[int, ...] = ()
    best: dict[str, Kept] = field(default_factory=dict)  # raw and ema at their best epochs
    further: list[Kept] = field(default_factory=list)
    log: list[EpochReport] = field(default_factory=list)
    diverged: bool = False

    def keep(self, models: Mapping[str, nn.Module], scored: Mapping[str, Scored]) -> None:
        """After an epoch that is in the log."""
        epoch = self.log[-1].epoch
        for name, model in models.items():
            new = scored[name]
            old = self.best.get(name)
            if old is None or new.logloss < old.score.val_logloss:
                self.best[name] = _kept(model, new, epoch)
                if name == RAW and old is not None and not self.cycle_ends:
                    self._keep_further(old)
            elif name == RAW and not self.cycle_ends and self._is_next_best(new):
                self._keep_further(_kept(model, new, epoch))
        if epoch in self.cycle_ends[-self.snapshots :] and self.snapshots:
            self.further.append(_kept(models[RAW], scored[RAW], epoch))

    def epochs_without_progress(self) -> int:
        return self.log[-1].epoch - max(kept.score.best_epoch for kept in self.best.values())

    def variants(self) -> dict[str, Kept]:
        """What is written; nothing of a training that diverged."""
        if self.diverged:
            return {}
        return self.best | {f"snap{i + 1}": kept for i, kept in enumerate(self.further)}

    def log_csv(self) -> str:
        """The text of train_log.csv."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [f.name for f in fields(EpochReport)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in self.log)
        return text.getvalue()

    def _is_next_best(self, new: Scored) -> bool:
        worst = self.further[-1].score.val_logloss if self.further else math.inf
        some_are_kept = self.snapshots > 0  # else every epoch would be copied for nothing
        return some_are_kept and (len(self.further) < self.snapshots or new.logloss < worst)

    def _keep_further(self, kept: Kept) -> None:
        self.further.append(kept)
        self.further.sort(key=lambda k: (k.score.val_logloss, k.score.best_epoch))
        del self.further[self.snapshots :]


def _kept(model: nn.Module, scored: Scored, epoch: int) -> Kept:
    state = {k: v.detach().to("cpu", copy=True) for k, v in model.state_dict().items()}
    return Kept(scored.at(epoch), scored.oof, state)
