"""The race as the report shows it, against the records that went into the run folder."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import image
from matplotlib.colors import to_rgb
from numpy.typing import NDArray

from foldrace.config.schema import RaceConfig
from foldrace.reporting.charts import race as race_charts
from foldrace.reporting.charts.race import FOLD_STYLES, MOST_LANES, BlendPoint, Fold, Lane, State
from foldrace.reporting.context import ReportContext
from foldrace.reporting.report import write_report
from foldrace.reporting.sections import race as race_section
from foldrace.reporting.sections.race import (
    best_singles,
    blend_points,
    in_order,
    lane,
    most_telling,
    outcome_sentence,
    race,
    rule_sentence,
)
from foldrace.run_folder.records import CandidateSummary, RaceDecision
from foldrace.run_folder.store import RunStore
from foldrace.run_folder.tables import decisions_csv
from tests.reporting.pages import Page, html_of, table_of

MakeRun = Callable[..., Any]
MakeRace = Callable[..., list[CandidateSummary]]
_EPOCHS = 12
_LONG = "stack(timm/caformer_b36.sail_in22k_ft_in1k_384,timm/tf_efficientnetv2_xl.in21k_ft_in1k)"
_HANGUL = "나의_플러그인/한글이름이_아주_긴_백본_모델_이름_대형_384_사전학습"


def _save(store: RunStore, summaries: Sequence[CandidateSummary]) -> None:
    for summary in summaries:
        store.save_candidate(summary.candidate)
        for trial in summary.trials:
            store.save_trial(trial)
        for decision in summary.decisions:
            store.save_decision(decision)


def _run(make_run: MakeRun, make_race: MakeRace, **options: object) -> RunStore:
    """A run folder with nothing but a race."""
    store: RunStore = make_run(rows=30, complete=0, broken=False, blend=False).store
    _save(store, make_race(folds_hash=store.folds().hash, **options))
    return store


@pytest.fixture(scope="module")
def raced(make_run: MakeRun, make_race: MakeRace) -> RunStore:
    """Read only."""
    return _run(make_run, make_race, candidates=24)


def _decisions(summaries: Sequence[CandidateSummary]) -> list[RaceDecision]:
    return sorted((d for s in summaries for d in s.decisions), key=lambda d: d.number)


# -- the section


def test_decision_table_is_the_end_of_decisions_csv(raced: RunStore) -> None:
    written = list(csv.DictReader(io.StringIO(decisions_csv(raced.summaries()))))
    html = html_of(race(ReportContext(raced)))
    assert '<a href="../decisions.csv">' in html
    shown = table_of(html, "decision")
    assert len(written) > len(shown) == 20
    for mine, row in zip(shown, written[::-1], strict=False):
        assert (mine["decision"], mine["candidate"]) == (row["number"], row["candidate"])
        assert mine["reason"] == row["reason"]
        assert mine["complete"] == row["complete"]
        place = f"epoch {row['epoch']} of fold" if row["epoch"] else "fold"
        assert mine["after"] == f"{place} {row['fold']}"
        if row["gain"]:
            assert float(mine["gain"]) == pytest.approx(float(row["gain"]), rel=0.05, abs=6e-5)


def test_page_holds_the_race_with_its_charts_beside_it(raced: RunStore) -> None:
    document = raced.files.read(write_report(raced)).decode()
    assert {"race.png", "race_blend.png"} <= set(raced.files.names("report"))
    assert '<section id="race">' in document
    assert re.search(r'<img alt="The race of 24 candidates over 3 folds"', document)
    assert Page(document).open == []


def test_runs_without_decisions_say_so(make_run: MakeRun) -> None:
    old = ReportContext(make_run(rows=30, complete=1, blend=False).store)
    assert Page(html_of(race(old))).words == ["No decision of a race is recorded in this run."]
    assert old.charts == {}
    empty = make_run(rows=30, complete=0, broken=False, blend=False)
    assert race(ReportContext(empty.store)) == []


def test_without_a_race_every_lane_is_whole(make_run: MakeRun, make_race: MakeRace) -> None:
    ctx = ReportContext(_run(make_run, make_race, rule="none", accidents=False))
    assert race(ctx)
    assert list(ctx.charts) == ["race.png", "race_blend.png"]
    *whole, budget_ended = (lane(s, _EPOCHS) for s in ctx.store.summaries())
    assert {fold.state for one in whole for fold in one.folds} == {"goes on", "complete"}
    assert [fold.state for fold in budget_ended.folds] == ["goes on", "none", "none"]


def test_before_the_first_candidate_is_complete_there_is_no_blend(
    make_run: MakeRun, make_race: MakeRace
) -> None:
    ctx = ReportContext(_run(make_run, make_race, candidates=1))
    assert race(ctx)
    assert list(ctx.charts) == ["race.png"]


def test_more_candidates_than_lanes_are_told(
    make_run: MakeRun, make_race: MakeRace, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx = ReportContext(make_run(rows=30, complete=0, broken=False, blend=False).store)
    listed = make_race(candidates=60, k=5)
    ctx.summaries = listed
    monkeypatch.setattr(race_section, "MOST_LANES", 40)
    words = " ".join(Page(html_of(race(ctx))).words)
    assert "The 40 of 60 candidates with the most finished" in words
    shown = most_telling(listed, 40)
    least = min(len(s.finished) for s in shown)
    kept = {s.candidate.candidate for s in shown}
    assert all(len(s.finished) <= least for s in listed if s.candidate.candidate not in kept)
    assert [s.candidate.candidate for s in shown] == sorted(kept)


def test_lanes_are_in_the_order_of_start(make_race: MakeRace) -> None:
    [one] = make_race(candidates=1)
    names = [f"c{i:04d}" for i in (2, 10, 9998, 9999, 10000, 10001, 123456)]
    listed = [
        replace(one, candidate=one.candidate.model_copy(update={"candidate": name}))
        for name in names
    ]
    assert [s.candidate.candidate for s in in_order(listed[::-1])] == names


# -- the words


@pytest.mark.parametrize("seed", range(3))
def test_outcome_sentence_counts_every_candidate_once(seed: int, make_race: MakeRace) -> None:
    listed = make_race(candidates=50, k=4, seed=seed)
    sentence = outcome_sentence(listed, 99)
    outcomes, trained = sentence.split(". Trained: ")
    counts = [
        int(n)
        for n in re.findall(r"(\d+) (?:complete|stopped|parked|diverged|failed|unf)", outcomes)
    ]
    assert sum(counts) == 50
    places = re.search(r"\(([^)]*)\)", outcomes)
    assert places is not None
    stopped, parked = (sum(s.status == name for s in listed) for name in ("stopped", "parked"))
    assert f", {parked} parked" in outcomes and parked > 1
    assert sum(int(part.split()[0]) for part in places[1].split(", ")) == stopped
    finished = sum(t.status == "finished" for s in listed for t in s.trials)
    spent = sum(t.epochs_trained for s in listed for t in s.trials)
    whole = 50 * 4 * _EPOCHS  # the schedule stands in the hyperparameters
    assert trained == (
        f"{finished} of 50 × 4 fold trials ({100 * finished / 200:.1f}% of all folds) and "
        f"{spent:,} of the {whole:,} epochs ({100 * spent / whole:.1f}%) that all of them could "
        "take."
    )


def test_one_candidate_is_not_called_several(make_race: MakeRace) -> None:
    [alone] = make_race(candidates=1, k=1, accidents=False)
    assert outcome_sentence([alone], 9).startswith("1 candidate: 1 complete. Trained: 1 of 1 × 1 ")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (RaceConfig(z=1.5), "gain + 1.5 × standard error is above 0"),
        (RaceConfig(), "one in 2 of those whose first fold was measured, gets all its folds"),
        (RaceConfig(eta=7), "one in 7 of those whose first fold was measured, gets all its folds"),
        (RaceConfig(rule="forgiving"), "worst fold of the best complete candidate"),
        (RaceConfig(rule="none"), "every candidate gets all its folds"),
    ],
)
def test_rules_have_words(config: RaceConfig, expected: str) -> None:
    sentence = rule_sentence(config, 3)
    assert expected in sentence
    assert ("parked" in sentence) == (config.rule == "gain")


# -- the lanes


def test_lanes_follow_the_records(make_race: MakeRace) -> None:
    seen: set[str] = set()
    for summary in make_race(candidates=200, k=4):
        folds = lane(summary, 99).folds
        for k, fold in enumerate(folds):
            trial = next((t for t in summary.trials if t.fold == k), None)
            decision = next((d for d in summary.decisions if d.fold == k), None)
            in_training = decision is not None and decision.epoch is not None
            assert (fold.state == "none") == (trial is None and not in_training)
            assert (fold.state == "set aside") == (trial is None and in_training)
            assert fold.gain == (decision.gain if decision else None)
            if trial is not None and trial.status != "finished":
                assert fold.state == {"stopped": "cut"}.get(trial.status, trial.status)
            elif trial is not None and decision is not None:
                words = {
                    "continue": "goes on", "park": "parked", "stop": "stopped",
                    "complete": "complete",
                }  # fmt: skip
                assert fold.state == words[decision.action]
            if trial is not None and fold.state == "cut":
                assert fold.share == trial.epochs_trained / _EPOCHS
            if fold.state == "set aside":
                assert decision is not None and decision.epoch is not None
                assert fold.share == decision.epoch / _EPOCHS
            seen.add(fold.state)
        complete = [f.state for f in folds] == ["goes on"] * 3 + ["complete"]
        assert complete == (summary.status == "complete")
    assert seen == FOLD_STYLES.keys() - {"finished"}


def test_a_fold_that_nobody_has_judged_is_finished(make_race: MakeRace) -> None:
    [alone] = make_race(candidates=1, k=1, accidents=False)
    unjudged = CandidateSummary(alone.candidate, alone.status, alone.trials, 1)
    assert lane(unjudged, _EPOCHS).folds == (Fold("finished"),)


@pytest.mark.parametrize("state", ["cut", "set aside"])
def test_a_fold_trained_in_part_is_filled_in_part(state: State) -> None:
    """The legend's patch is the same in all three."""
    quarter, half, whole = (
        _coloured(
            race_charts.lanes([Lane("c0", "x", (Fold(state, share),))]), FOLD_STYLES[state].colour
        )
        for share in (0.25, 0.5, 1.0)
    )
    assert (half - quarter) / (whole - half) == pytest.approx(0.5, abs=0.02)


# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision
# Deficiency, IEEE TVCG 2009: linear RGB without red, and without green cones.
_VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}  # fmt: skip


@pytest.mark.parametrize("vision", _VISIONS)
def test_states_without_a_mark_are_apart_for_any_vision(vision: str) -> None:
    framed = ("cut", "set aside")  # these have a frame: they are to be apart from each other
    whole = [s.colour for state, s in FOLD_STYLES.items() if not s.mark and state not in framed]
    assert len(whole) == 6
    assert _nearest(whole, vision) > 0.15
    assert _nearest([FOLD_STYLES["cut"].colour, FOLD_STYLES["set aside"].colour], vision) > 0.15


def _nearest(colours: Sequence[str], vision: str) -> float:
    """Distance of the two colours that are most alike, as they are seen."""
    seen = [
        np.clip(np.array(_VISIONS[vision]) @ np.array(to_rgb(colour)) ** 2.2, 0, 1) ** (1 / 2.2)
        for colour in colours
    ]
    return min(float(np.linalg.norm(a - b)) for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("candidates", "k"), [(1, 1), (6, 5), (36, 10), (37, 2), (37, 20), (MOST_LANES, 5)]
)
def test_lanes_are_never_cut_and_never_huge(candidates: int, k: int, make_race: MakeRace) -> None:
    listed = make_race(candidates=candidates, k=k, backbones=(_LONG, _HANGUL, "timm/x"))
    pixels = _pixels(race_charts.lanes([lane(s, _EPOCHS) for s in listed]))
    _assert_uncut(pixels)
    assert max(pixels.shape) < 2000


@pytest.mark.parametrize("gain", [1e-9, -0.5, 25.0])
def test_numbers_stay_in_their_fields(gain: float) -> None:
    """Left of the first field and right of the last one nothing is written over."""
    folds = tuple(Fold("stopped", 1.0, gain, abs(gain)) for _ in range(5))
    with_numbers = _pixels(race_charts.lanes([Lane("c0", "x", folds)]))
    without = _pixels(race_charts.lanes([Lane("c0", "x", tuple(Fold("stopped") for _ in folds))]))
    colour = np.round(255 * np.array(to_rgb(FOLD_STYLES["stopped"].colour)))
    outside = np.abs(255 * without - colour).max(axis=2) > 2
    assert (with_numbers[outside] == without[outside]).all()


# -- the blend's loss


def test_the_blend_falls_where_a_candidate_joins(make_race: MakeRace) -> None:
    """The dice lower it by 7 % with each of the first candidates, and with nothing else."""
    decisions = _decisions(make_race(candidates=60, k=3))
    points = blend_points(decisions)
    assert [p.epochs for p in points] == sorted(p.epochs for p in points)
    losses, before = [p.logloss for p in points], 0.9
    for point in points:
        assert point.logloss == pytest.approx(before * (0.93 if point.joined else 1.0))
        before = point.logloss
    assert sum(p.joined for p in points) == sum(d.action == "complete" for d in decisions) > 5
    assert losses == sorted(losses, reverse=True)


def test_best_singles_are_the_running_minimum(make_race: MakeRace) -> None:
    listed = make_race(candidates=60, k=3)
    by_name = {s.candidate.candidate: s for s in listed}
    joined = [d for d in _decisions(listed) if d.action == "complete"]
    losses = [by_name[d.candidate].pooled_calibrated("raw") for d in joined]
    least = np.minimum.accumulate(losses)
    expected = [
        (d.epochs_trained, loss)
        for d, loss, before in zip(joined, least, [np.inf, *least[:-1]], strict=True)
        if loss < before
    ]
    assert best_singles(listed, _decisions(listed)) == expected


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 300])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_blend_chart_is_never_cut(n: int, scale: float) -> None:
    points = [BlendPoint(10 * i, scale * 2.3 * 0.97**i, i % 2 == 0) for i in range(1, n + 1)]
    singles = [(10, 3.0 * scale)]
    _assert_uncut(_pixels(race_charts.blend_loss(points, singles)))
    _assert_uncut(_pixels(race_charts.blend_loss(points, [])))


def _pixels(png: bytes) -> NDArray[np.float32]:
    """(height, width, 3) in [0, 1]."""
    found: NDArray[np.float32] = image.imread(io.BytesIO(png))[..., :3]
    return found


def _coloured(png: bytes, colour: str) -> int:
    """Pixels."""
    return int((np.abs(_pixels(png) - np.array(to_rgb(colour))).max(axis=2) < 0.01).sum())


def _assert_uncut(pixels: NDArray[np.float32]) -> None:
    """Nothing is drawn on the outermost pixels: what is cut off would be."""
    edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
    assert all((edge == 1.0).all() for edge in edges)
    assert (pixels < 1.0).any()
