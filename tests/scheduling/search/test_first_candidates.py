"""A search begins with the recorded configurations that the product comes with."""

from __future__ import annotations

from foldrace.scheduling.search.study import CandidateStudy
from foldrace.search_spaces.portfolio import first_candidates, recorded
from tests.scheduling.search.searches import BACKBONES, space_of, sweep


def test_the_recorded_ones_come_first_and_the_sampler_has_the_other_half() -> None:
    config = sweep(candidates=8)
    space = space_of(config)
    study = CandidateStudy(space, config.search, 3)
    found = []
    for number in range(8):
        record = study.ask(number)
        assert record is not None
        study.candidate_started(record)
        found.append((record.backbone, record.params))
    expected = [(b, params.as_dict()) for b, params in first_candidates(space, 4)]
    assert len(expected) == 4 and found[:4] == expected
    assert {backbone for backbone, _ in found[:4]} == set(BACKBONES)
    assert recorded()["pretrained"] and not any(one in expected for one in found[4:])
