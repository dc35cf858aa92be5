"""The search: which candidate comes next.

Takes a `SearchSpace` and the events of the sweep; gives new candidates. What it gives follows from
what it was told, in any order of the candidates: a resumed sweep tells it the stored events.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.config.schema import SearchConfig, SweepConfig
from foldrace.run_folder.records import (
    CandidateRecord,
    CandidateSummary,
    RaceDecision,
    TeacherRef,
    TrialRecord,
)
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.events import SweepListener
from foldrace.scheduling.search.sampler_history import EarlierCandidate, SamplerHistory
from foldrace.scheduling.search.samplers import SAMPLERS, SuggestionRequest
from foldrace.scheduling.search.warm_start import best_elsewhere, earlier_candidates
from foldrace.search_spaces.portfolio import first_candidates
from foldrace.search_spaces.space import SearchSpace

_PORTFOLIO_PART = 2  # at most one candidate in this many is of the portfolio, but one a backbone
_Key = tuple[str, tuple[tuple[str, Value], ...]]


class CandidateStudy(SweepListener):
    """The search of one sweep, which listens to what becomes of its candidates."""

    def __init__(
        self,
        space: SearchSpace,
        search: SearchConfig,
        classes: int,
        earlier: Sequence[EarlierCandidate] = (),
        teacher: TeacherRef | None = None,
    ) -> None:
        """Begin a search without candidates; `earlier`: those of other runs, to learn from.

        `teacher`: whom candidates with a `distill_alpha` learn from.
        """
        self._teacher = teacher
        self._space, self._search = space, search
        self._sampler = SAMPLERS[search.sampler]
        by_gain = search.objective == "gain"
        self._history = SamplerHistory(space, self._sampler, classes, by_gain, earlier)
        first = [(p.backbone, space.configured(p.backbone, p.params)) for p in search.points]
        if self._sampler.starts_with_portfolio:
            most = search.candidates // _PORTFOLIO_PART
            first += first_candidates(space, most, best_elsewhere(earlier))
        self._first = {_key(*one): one for one in first}  # that no candidate has
        self._taken: set[_Key] = set()  # configurations that a candidate has

    @property
    def upcoming(self) -> str | None:
        """The backbone of the next candidate, where it is given by hand or by the portfolio."""
        return next((backbone for backbone, _ in self._first.values()), None)

    def ask(self, number: int, backbone: str | None = None) -> CandidateRecord | None:
        """Candidate `number`, or None where every configuration is taken (the end of a grid).

        The next point given by hand, else the next of the portfolio, else what the sampler proposes
        for `backbone` (None: one at random), or for the next backbone where every configuration of
        that one is taken. It counts once `candidate_started` has been called with it.
        """
        found = next(iter(self._first.values()), None) or self._proposed(number, backbone)
        if found is None:
            return None
        chosen, params = found
        return CandidateRecord(
            candidate=f"c{number:04d}",
            backbone=chosen,
            params=params.as_dict(),
            teacher=self._teacher if params.distill_alpha > 0 else None,
        )

    def candidate_started(self, candidate: CandidateRecord) -> None:
        """Take its configuration; it is not given again, though the space no longer holds it."""
        key = _key(candidate.backbone, TrialParams.from_dict(candidate.params))
        self._taken.add(key)
        self._first.pop(key, None)
        self._history.start(candidate)

    def trial_ended(self, record: TrialRecord, summary: CandidateSummary) -> None:
        """Learn from its finished folds."""
        self._history.update(summary)

    def decided(self, decision: RaceDecision, summary: CandidateSummary) -> None:
        """Learn from its score in mid-training, or its gain."""
        self._history.update(summary)

    def settled(self, summary: CandidateSummary) -> None:
        """Learn from how it ended."""
        self._history.update(summary)

    def _proposed(self, number: int, backbone: str | None) -> tuple[str, TrialParams] | None:
        backbones = list(self._space.backbones)
        generator = random.Random(f"{self._search.seed}/{number}")
        first = backbones.index(backbone) if backbone else generator.randrange(len(backbones))
        tried = (self._free(number, b) for b in backbones[first:] + backbones[:first])
        return next((found for found in tried if found is not None), None)

    def _free(self, number: int, backbone: str) -> tuple[str, TrialParams] | None:
        """The sampler's first proposal that no candidate has."""
        ranges, trials = self._space.searched(backbone), self._history.trials(backbone)
        request = SuggestionRequest(self._search.seed, number, ranges, trials)
        for drawn in self._sampler.propose(request):
            params = self._space.decode(backbone, drawn)
            if _key(backbone, params) not in self._taken:
                return backbone, params
        return None


def open_study(store: RunStore, config: SweepConfig, space: SearchSpace) -> CandidateStudy:
    """The study of a run folder, as its config says, without candidates yet.

    Raises UserError where a folder of `search.warm_start` or the teacher cannot be read.
    """
    earlier = earlier_candidates(config.search.warm_start, space, store.folds().hash)
    name = config.search.teacher
    teacher = None if name is None else store.teachers.record(name).reference
    return CandidateStudy(space, config.search, len(store.classes()), earlier, teacher)


def _key(backbone: str, params: TrialParams) -> _Key:
    return backbone, tuple(params.as_dict().items())
