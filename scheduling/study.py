"""Optuna's side of the sweep: asks for candidates, is told their pooled OOF log loss.

Takes a `SearchSpace` and finished candidates, gives new candidates. The sampler's own study lives
in memory and is rebuilt from the run folder; `study.journal` is its mirror for optuna-dashboard.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from pathlib import Path

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from experiment.config import SearchConfig
from experiment.records import CandidateRecord, CandidateSummary
from search_spaces.params import TrialParams
from search_spaces.sampling import SearchSpace

optuna.logging.set_verbosity(optuna.logging.WARNING)


class CandidateStudy:
    """Ask for the next candidate, tell how one ended."""

    def __init__(
        self, space: SearchSpace, search: SearchConfig, classes: int, journal: Path | None
    ) -> None:
        self._space, self._search = space, search
        # Worse than chance, and finite, so that the sampler learns where training diverges.
        self._penalty = 2.0 * math.log(classes)
        self._study = optuna.create_study(sampler=RandomSampler(seed=search.seed))
        self._asked: dict[str, Trial] = {}
        self._tried: set[str] = set()  # backbones with a candidate
        self._mirror = _open_mirror(journal) if journal is not None else None

    def ask(self, number: int) -> CandidateRecord:
        """Candidate `number`: the default configuration of a backbone without a candidate, else
        the sampler's choice. The sampler is seeded by the number, so that a resumed sweep does
        not depend on a generator's lost state."""
        untried = [b for b in self._space.backbones if b not in self._tried]
        if untried:
            default = self._space.default(untried[0])
            return self._ask_for(number, untried[0], default)
        self._study.sampler = _sampler(self._search.sampler, self._search.seed, number)
        return self._record(number, self._study.ask())

    def replay(self, summary: CandidateSummary) -> None:
        """A candidate of an earlier session: settled, or still to be continued."""
        record = summary.candidate
        params = TrialParams.from_dict(record.params)
        self._tried.add(record.backbone)
        if self._space.encode(record.backbone, params) is None:
            return  # outside a space that was changed on resume: the sampler cannot place it
        if summary.status in ("running", "unfinished"):
            self._ask_for(int(record.candidate[1:]), record.backbone, params)
            return
        trial = self._frozen(summary)
        self._study.add_trial(trial)
        self._reflect(trial)

    def tell(self, summary: CandidateSummary) -> None:
        """A candidate is settled."""
        trial = self._asked.pop(summary.candidate.candidate, None)
        frozen = self._frozen(summary)
        if trial is not None:
            self._study.tell(trial, frozen.value, state=frozen.state)
        self._reflect(frozen)

    @property
    def running(self) -> int:
        """Candidates asked for and not told."""
        return len(self._asked)

    def _ask_for(self, number: int, backbone: str, params: TrialParams) -> CandidateRecord:
        encoded = self._space.encode(backbone, params)
        if encoded is None:
            raise ValueError(f"{params} lies outside the search space of {backbone}")
        self._study.enqueue_trial(encoded)
        return self._record(number, self._study.ask())

    def _record(self, number: int, trial: Trial) -> CandidateRecord:
        backbone, params = self._space.sample(trial)
        candidate = f"c{number:04d}"
        trial.set_user_attr("candidate", candidate)
        self._asked[candidate] = trial
        self._tried.add(backbone)
        return CandidateRecord(candidate=candidate, backbone=backbone, params=params.as_dict())

    def _frozen(self, summary: CandidateSummary) -> FrozenTrial:
        """A settled candidate as Optuna sees it: diverged ones count as bad, failed ones not."""
        record = summary.candidate
        params = TrialParams.from_dict(record.params)
        encoded = self._space.encode(record.backbone, params)
        known = encoded is not None
        value = {
            "complete": summary.pooled_logloss(summary.best) if summary.best else None,
            "diverged": self._penalty,
        }.get(summary.status)
        return create_trial(
            state=TrialState.FAIL if value is None else TrialState.COMPLETE,
            value=value,
            params=encoded or {},
            distributions=self._space.distributions(record.backbone) if known else {},
            user_attrs={"candidate": record.candidate, "status": summary.status},
        )

    def _reflect(self, trial: FrozenTrial) -> None:
        if self._mirror is not None:
            self._mirror.add_trial(trial)


def _open_mirror(path: Path) -> optuna.Study:
    """Anew each time: a line torn by a kill would break later reads, and a stale lock would be
    waited for. The path is absolute, as the lock's needs to be."""
    for old in (path, path.with_name(path.name + ".lock")):
        old.unlink(missing_ok=True)
    storage = JournalStorage(JournalFileBackend(str(path.resolve())))
    return optuna.create_study(storage=storage, study_name="foldrace")


def _sampler(name: str, seed: int, number: int) -> BaseSampler:
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    own_seed = int.from_bytes(digest[:4])
    if name == "random":
        return RandomSampler(seed=own_seed)
    with warnings.catch_warnings():  # `group` and `constant_liar` are called experimental
        warnings.simplefilter("ignore", ExperimentalWarning)
        return TPESampler(seed=own_seed, multivariate=True, group=True, constant_liar=True)
