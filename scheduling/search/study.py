"""The search: which candidate comes next, and what the sampler learns from those that ended.

Takes a `SearchSpace`, candidates of earlier sessions and how candidates end; gives new candidates.
Everything is rebuilt from the run folder; `export` writes it for optuna-dashboard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

from foldrace.config.hyperparameters import TrialParams
from foldrace.config.ranges import Value
from foldrace.config.schema import SearchConfig, SweepConfig
from foldrace.run_folder.records import CandidateRecord, CandidateSummary
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.search.export import StudyExporter, open_exporter
from foldrace.scheduling.search.sampler_history import EarlierCandidate, SamplerHistory
from foldrace.scheduling.search.samplers import SAMPLERS, SuggestionRequest
from foldrace.scheduling.search.warm_start import earlier_candidates
from foldrace.search_spaces.space import SearchSpace

_Key = tuple[str, tuple[tuple[str, Value], ...]]


class CandidateStudy:
    """The search of one sweep: ask for the next candidate, tell how one ended."""

    def __init__(
        self,
        space: SearchSpace,
        search: SearchConfig,
        classes: int,
        exporter: StudyExporter | None = None,
        gains: Callable[[], Mapping[str, float]] = dict,
        earlier: Sequence[EarlierCandidate] = (),
    ) -> None:
        """Begin a search without candidates.

        `gains()`: candidate -> its gain over the race's blend as it is now, read at each ask where
        the gain is the objective; `earlier`: candidates of other run folders to learn from.
        """
        self._space, self._search, self._exporter = space, search, exporter
        self._sampler = SAMPLERS[search.sampler]
        objective = gains if search.objective == "gain" else None
        self._history = SamplerHistory(space, self._sampler, classes, objective, earlier)
        points = [(p.backbone, space.configured(p.backbone, p.params)) for p in search.points]
        self._points = {_key(*point): point for point in points}  # that no candidate has
        for backbone, params in points:
            self._expect(backbone, params)
        self._taken: set[_Key] = set()  # configurations that a candidate has
        self._begun: set[str] = set()  # backbones with a candidate

    def ask(self, number: int, backbone: str | None = None) -> CandidateRecord | None:
        """Candidate `number`, or None where every configuration is taken (the end of a grid).

        The next point given by hand, else the default configuration of a backbone without a
        candidate, else what the sampler proposes for `backbone` (None: one at random), or for the
        next backbone where every configuration of that one is taken.
        """
        if self._exporter is not None:
            self._exporter.write()  # what was replayed: the dashboard shows it from the start
        found = self._point() or self._default() or self._proposed(number, backbone)
        if found is None:
            return None
        candidate, (chosen, params) = f"c{number:04d}", found
        self._start(candidate, chosen, params)
        return CandidateRecord(candidate=candidate, backbone=chosen, params=params.as_dict())

    def replay(self, summary: CandidateSummary) -> None:
        """Add a candidate of an earlier session, settled or still to be continued.

        Whether or not the space still holds it, it is not run again.
        """
        record = summary.candidate
        self._start(record.candidate, record.backbone, TrialParams.from_dict(record.params))
        if summary.settled:
            self._history.end(summary)
            self._export(summary)

    def tell(self, summary: CandidateSummary) -> None:
        """Take in a candidate that is settled, or that the budget has left unfinished."""
        if summary.settled:
            self._history.end(summary)
        self._export(summary)
        if self._exporter is not None:
            self._exporter.write()

    def close(self) -> None:
        """Wait until every candidate is written where the dashboard reads it."""
        if self._exporter is not None:
            self._exporter.close()

    def _point(self) -> tuple[str, TrialParams] | None:
        return next(iter(self._points.values()), None)

    def _default(self) -> tuple[str, TrialParams] | None:
        if not self._sampler.starts_with_default:
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
        """The sampler's first proposal that no candidate has.

        What it proposed in vain is forgotten: the next ask sees candidates alone.
        """
        trials = self._history.trials(backbone)
        ask = SuggestionRequest(self._search.seed, number, self._space.searched(backbone), trials)
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
        self._history.start(candidate, backbone, params)

    def _expect(self, backbone: str, params: TrialParams) -> None:
        if self._exporter is not None:
            self._exporter.expect(backbone, params)

    def _export(self, summary: CandidateSummary) -> None:
        if self._exporter is not None:
            self._exporter.add(summary)


def open_study(
    store: RunStore,
    config: SweepConfig,
    space: SearchSpace,
    gains: Callable[[], Mapping[str, float]],
) -> CandidateStudy:
    """The study of a run folder, as its config says.

    Raises UserError where the database or a folder of `search.warm_start` cannot be read.
    """
    earlier = earlier_candidates(config.search.warm_start, space, store.folds().hash)
    exporter = open_exporter(store, config, space)
    return CandidateStudy(space, config.search, len(store.classes()), exporter, gains, earlier)


def _key(backbone: str, params: TrialParams) -> _Key:
    return backbone, tuple(params.as_dict().items())
