"""The search: which candidate comes next, and what the sampler learns from those that ended.

Takes a `SearchSpace`, candidates of earlier sessions and how candidates end; gives new candidates.
Everything is rebuilt from the run folder; `study_mirror` shows it to optuna-dashboard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from foldrace.config.schema import SearchConfig, SweepConfig
from foldrace.run_folder.records import CandidateRecord, CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.search.samplers import SAMPLERS, Ask
from foldrace.scheduling.search.study_mirror import StudyMirror, open_mirror
from foldrace.scheduling.search.study_view import EarlierCandidate, StudyView
from foldrace.scheduling.search.warm_start import earlier_candidates
from foldrace.search_spaces.hyperparameters import TrialParams
from foldrace.search_spaces.ranges import Value
from foldrace.search_spaces.space import SearchSpace

_Key = tuple[str, tuple[tuple[str, Value], ...]]


class CandidateStudy:
    """Ask for the next candidate, tell how one ended.

    `gains()`: candidate -> its gain over the race's blend as it is now; read at each ask where the
    gain is the objective. `earlier`: candidates of other run folders to learn from.
    """

    def __init__(
        self,
        space: SearchSpace,
        search: SearchConfig,
        classes: int,
        mirror: StudyMirror | None = None,
        gains: Callable[[], Mapping[str, float]] = dict,
        earlier: Sequence[EarlierCandidate] = (),
    ) -> None:
        self._space, self._search, self._mirror = space, search, mirror
        self._sampler = SAMPLERS[search.sampler]
        objective = gains if search.objective == "gain" else None
        self._view = StudyView(space, self._sampler, classes, objective, earlier)
        points = [(p.backbone, space.configured(p.backbone, p.params)) for p in search.points]
        self._points = {_key(*point): point for point in points}  # that no candidate has
        for backbone, params in points:
            self._expect(backbone, params)
        self._taken: set[_Key] = set()  # configurations that a candidate has
        self._begun: set[str] = set()  # backbones with a candidate

    def ask(self, number: int, backbone: str | None = None) -> CandidateRecord | None:
        """Candidate `number`: the next point given by hand, else the default configuration of a
        backbone without a candidate, else what the sampler proposes for `backbone` (None: one at
        random). Where every configuration of that backbone is taken, the next backbone's; None
        where all are, as at the end of a grid or a list."""
        if self._mirror is not None:
            self._mirror.write()  # what was replayed: the dashboard shows it from the start
        found = self._point() or self._default() or self._proposed(number, backbone)
        if found is None:
            return None
        candidate, (chosen, params) = f"c{number:04d}", found
        self._start(candidate, chosen, params)
        return CandidateRecord(candidate=candidate, backbone=chosen, params=params.as_dict())

    def replay(self, summary: CandidateSummary) -> None:
        """A candidate of an earlier session: settled, or still to be continued. Whether or not
        the space still holds it, it is not run again."""
        record = summary.candidate
        self._start(record.candidate, record.backbone, TrialParams.from_dict(record.params))
        if summary.settled:
            self._view.end(summary)
            self._reflect(summary)

    def tell(self, summary: CandidateSummary) -> None:
        """A candidate is settled, or the budget has ended before it was."""
        if summary.settled:
            self._view.end(summary)
        self._reflect(summary)
        if self._mirror is not None:
            self._mirror.write()

    def close(self) -> None:
        """Wait until what was told is written where the dashboard reads it."""
        if self._mirror is not None:
            self._mirror.close()

    def _point(self) -> tuple[str, TrialParams] | None:
        return next(iter(self._points.values()), None)

    def _default(self) -> tuple[str, TrialParams] | None:
        if not self._sampler.defaults:
            return None
        left = (b for b in self._space.backbones if b not in self._begun)
        backbone = next(left, None)
        return None if backbone is None else (backbone, self._space.default(backbone))

    def _proposed(self, number: int, backbone: str | None) -> tuple[str, TrialParams] | None:
        backbones = list(self._space.backbones)
        generator = random.Random(f"{self._search.seed}/{number}")
        first = backbones.index(backbone) if backbone else generator.randrange(len(backbones))
        tried = (self._free(number, b) for b in backbones[first:] + backbones[:first])
        return next((found for found in tried if found is not None), None)

    def _free(self, number: int, backbone: str) -> tuple[str, TrialParams] | None:
        """The sampler's first proposal that no candidate has. What it proposed in vain is
        forgotten: the next ask sees candidates alone."""
        trials = self._view.trials(backbone)
        ask = Ask(self._search.seed, number, self._space.searched(backbone), trials)
        for drawn in self._sampler.propose(ask):
            params = self._space.decode(backbone, drawn)
            if _key(backbone, params) not in self._taken:
                return backbone, params
        return None

    def _start(self, candidate: str, backbone: str, params: TrialParams) -> None:
        self._begun.add(backbone)
        key = _key(backbone, params)
        self._taken.add(key)
        self._points.pop(key, None)
        self._expect(backbone, params)
        self._view.start(candidate, backbone, params)

    def _expect(self, backbone: str, params: TrialParams) -> None:
        if self._mirror is not None:
            self._mirror.expect(backbone, params)

    def _reflect(self, summary: CandidateSummary) -> None:
        if self._mirror is not None:
            self._mirror.add(summary)


def open_study(
    store: RunStore,
    config: SweepConfig,
    space: SearchSpace,
    gains: Callable[[], Mapping[str, float]],
) -> CandidateStudy:
    """The study of a run folder, as its config says. Raises UserError where the database or a
    folder of `search.warm_start` cannot be read."""
    earlier = earlier_candidates(config.search.warm_start, space, store.folds().hash)
    mirror = open_mirror(store, config, space)
    return CandidateStudy(space, config.search, len(store.classes()), mirror, gains, earlier)


def _key(backbone: str, params: TrialParams) -> _Key:
    return backbone, tuple(params.as_dict().items())
