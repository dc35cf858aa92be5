"""Folds, epochs and candidates by measured speed and time, against their arithmetic."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foldrace.search_spaces.sweep_length import Speed, Work, sweep_length

QUICK, SLOW = Speed(0.001, 0.0005, 1.0), Speed(0.02, 0.01, 1.0)
HOUR = Work({"quick": QUICK}, images=3000, slots=2, pretrained=False, seconds=3600.0)
seconds = st.floats(1.0, 1e6)
works = st.builds(
    Work,
    speeds=st.dictionaries(
        st.sampled_from("abcd"),
        st.builds(Speed, st.floats(1e-6, 1.0), st.floats(1e-6, 1.0), st.floats(0.0, 10.0)),
        min_size=1,
    ),
    images=st.integers(10, 10**6),
    slots=st.integers(1, 64),
    pretrained=st.booleans(),
    seconds=seconds,
    most_folds=st.integers(2, 10),
    has_gpu=st.booleans(),
)


def test_seconds_of_a_fold_trial() -> None:
    """3,000 images in 3 folds: 2,000 trained at 1 ms and 1,000 scored at 0.5 ms, 10 times."""
    assert QUICK.fold_seconds(3000, 3, 10) == pytest.approx(1 + 10 * (2.0 + 0.5))
    assert QUICK.candidate_seconds(3000, 3, 10, slots=2) == pytest.approx(2 * 26)
    assert QUICK.candidate_seconds(3000, 3, 10, slots=8) == pytest.approx(26)
    assert QUICK.candidate_seconds(3000, 3, 10, slots=2, repeats=3) == pytest.approx(5 * 26)


def test_a_slower_speed() -> None:
    slower = QUICK.slower(2)
    assert slower.fold_seconds(3000, 3, 10) == 2 * QUICK.fold_seconds(3000, 3, 10)


def test_a_candidate_takes_a_sixth_of_the_time_and_the_first_one_a_tenth() -> None:
    """200 s of 1,200, for 2 rounds of 1 s + 2.5 s an epoch: (200 / 2 - 1) / 2.5 epochs."""
    length = sweep_length(replace(HOUR, seconds=1200.0))
    assert length.epochs == math.floor((200 / 2 - 1) / 2.5) == 39
    assert length.first_epochs == math.floor((120 / 2 - 1) / 2.5) == 23
    assert (length.folds, length.first_backbone) == (3, "quick")
    assert length.first_seconds == pytest.approx(2 * (1 + 23 * 2.5))
    assert length.fold_trials == pytest.approx(1200 * 2 / (1 + 39 * 2.5))
    assert length.candidates == math.ceil(4 * length.fold_trials / 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 7200.0},  # 60 epochs in a tenth of it
        {"seconds": 1200.0, "epochs": 39},
        {"seconds": 1200.0, "candidates": 3},
        {"seconds": None, "speeds": {}},
    ],
)
def test_no_shorter_first_candidate(changes: dict[str, Any]) -> None:
    length = sweep_length(replace(HOUR, **changes))
    assert length.first_epochs == length.epochs


def test_the_first_candidate_of_a_sweep_without_a_time_has_a_third_of_the_epochs() -> None:
    length = sweep_length(replace(HOUR, seconds=None))
    assert (length.epochs, length.first_epochs) == (30, 10)


@pytest.mark.parametrize(
    ("time", "epochs"),
    [
        (1.0, 1),
        (60.0, math.floor((18 / 2 - 1) / 2.5)),  # 0.3 of it, as 30 are enough
        (120.0, math.floor((36 / 2 - 1) / 2.5)),
        (600.0, 30),
        (3600.0, 60),
    ],
)
def test_epochs_have_bounds(time: float, epochs: int) -> None:
    assert sweep_length(replace(HOUR, seconds=time)).epochs == epochs


@pytest.mark.parametrize(("time", "epochs"), [(80.0, 4), (240.0, 14), (3600.0, 20)])
def test_pretrained_backbones_need_fewer(time: float, epochs: int) -> None:
    assert sweep_length(replace(HOUR, seconds=time, pretrained=True)).epochs == epochs


@pytest.mark.parametrize(("pretrained", "epochs"), [(False, 30), (True, 10)])
@pytest.mark.parametrize(("has_gpu", "folds"), [(False, 3), (True, 5)])
def test_without_a_time(pretrained: bool, epochs: int, has_gpu: bool, folds: int) -> None:
    work = replace(HOUR, seconds=None, pretrained=pretrained, has_gpu=has_gpu)
    length = sweep_length(work)
    assert (length.folds, length.epochs, length.candidates) == (folds, epochs, 20)
    trials = 20 * (1 + (folds - 1) / {3: 2, 5: 4}[folds])  # one in so many gets all its folds
    assert length.slot_seconds == pytest.approx(trials * QUICK.fold_seconds(3000, folds, epochs))


@pytest.mark.parametrize("seconds", [None, 240.0])
def test_repeats_multiply_the_fold_trials(seconds: float | None) -> None:
    single = sweep_length(replace(HOUR, seconds=seconds))
    length = sweep_length(replace(HOUR, seconds=seconds, repeats=4))
    assert length.folds == single.folds == 3
    if seconds is None:
        assert length.fold_trials == 20 * (1 + (4 * 3 - 1) / 4)
        assert length.first_seconds == 3 * single.first_seconds  # 6 rounds on 2 slots, for 2
    else:
        assert length.epochs < single.epochs  # as all folds of a candidate are to fit
        assert length.candidates < single.candidates * 2


def test_without_a_speed() -> None:
    length = sweep_length(replace(HOUR, speeds={}))
    assert (length.folds, length.epochs, length.candidates) == (3, 30, 20)
    assert length.backbones == ()
    assert math.isnan(length.slot_seconds)


def test_a_backbone_too_slow_for_the_time_is_left_out() -> None:
    work = replace(HOUR, speeds={"quick": QUICK, "slow": SLOW}, seconds=1200.0)
    length = sweep_length(work)
    assert SLOW.candidate_seconds(3000, 3, length.epochs, 2) > 300
    assert length.backbones == ("quick",)
    assert sweep_length(replace(work, seconds=36000.0)).backbones == ("quick", "slow")
    assert sweep_length(replace(work, speeds={"slow": SLOW}, seconds=10.0)).backbones == ("slow",)


def test_a_backbone_nearly_as_fast_is_kept_where_all_are_slow() -> None:
    speeds = {"slow": SLOW, "slower": SLOW.slower(1.1), "slowest": SLOW.slower(1.3)}
    length = sweep_length(replace(HOUR, speeds=speeds, seconds=60.0))
    assert (length.epochs, length.backbones) == (1, ("slow", "slower"))
    assert length.first_backbone == "slow"


@pytest.mark.parametrize(
    ("order", "lead"),
    [
        (("quick", "half"), "quick"),
        (("half", "quick"), "half"),  # of two that are about as fast the first one counts
        (("slow", "half", "quick"), "half"),
    ],
)
def test_the_time_is_divided_for_the_first_backbone_that_is_fast(
    order: tuple[str, ...], lead: str
) -> None:
    speeds = {"quick": QUICK, "half": QUICK.slower(1.9), "slow": SLOW}
    work = replace(HOUR, speeds={name: speeds[name] for name in order})
    alone = replace(work, speeds={lead: speeds[lead]})
    length = sweep_length(work)
    assert (length.first_backbone, length.epochs) == (lead, sweep_length(alone).epochs)
    assert {"quick", "half"} <= set(length.backbones)


def test_what_is_decided_stays() -> None:
    length = sweep_length(replace(HOUR, folds=7, epochs=11, candidates=3))
    assert (length.folds, length.epochs, length.candidates) == (7, 11, 3)


@given(works, seconds)
def test_more_time_never_means_less(work: Work, more: float) -> None:
    now, later = sweep_length(work), sweep_length(replace(work, seconds=work.seconds + more))  # type: ignore[operator]
    assert later.epochs >= now.epochs
    assert later.folds >= now.folds
    assert 1 <= now.first_epochs <= now.epochs


@given(works, st.floats(1.0, 10.0))
def test_a_faster_machine_never_means_fewer_epochs(work: Work, factor: float) -> None:
    faster = {
        name: Speed(s.train / factor, s.score / factor, s.start / factor)
        for name, s in work.speeds.items()
    }
    assert sweep_length(replace(work, speeds=faster)).epochs >= sweep_length(work).epochs


@given(works)
def test_whatever_is_measured_gives_a_sweep(work: Work) -> None:
    length = sweep_length(work)
    assert 2 <= length.folds <= min(5, work.most_folds)
    assert set(length.backbones) <= set(work.speeds)
    assert length.backbones
    assert 2 <= length.candidates <= 1000
    assert 0 < length.slot_seconds <= work.seconds * work.slots * (1 + 1e-9)  # type: ignore[operator]
