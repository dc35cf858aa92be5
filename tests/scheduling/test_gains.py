"""What candidates add to the blend, against the blend and the gain by their definitions."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from foldrace.scheduling.gains import Gains
from tests.ensemble.made_runs import rewrite
from tests.scheduling.raced_runs import RacedRun, gain_by_definition, optimal_mix

CLOSE = 2e-3
"""The race's blend is optimal to 1e-5 nats, which leaves its weights that uncertain."""


@pytest.fixture
def run(tmp_path: Path) -> RacedRun:
    return RacedRun.make(tmp_path / "run")


def complete(run: RacedRun, number: int, skill: float = 1.0) -> None:
    """All folds of a candidate with two variants."""
    models = {"raw": run.model(number, skill), "ema": run.model(number + 100, skill)}
    for fold in range(run.store.fold_count):
        run.finish(f"c{number:04d}", fold, models)


def blended(run: RacedRun, *numbers: int) -> Gains:
    gains = Gains(run.store)
    for number in numbers:
        complete(run, number)
    gains.join([run.summary(f"c{number:04d}") for number in numbers])
    return gains


def reference_blend(run: RacedRun, *numbers: int) -> np.ndarray:
    seeds = [*numbers, *(number + 100 for number in numbers)]
    return optimal_mix(np.array([run.calibrated(run.model(s, 1.0), 0, 1, 2) for s in seeds]))


@pytest.mark.parametrize("folds", [(1,), (0, 2)])
def test_the_gain_is_that_of_the_better_variant_over_the_optimal_blend(
    run: RacedRun, folds: tuple[int, ...]
) -> None:
    gains = blended(run, 0, 1)
    models = {"raw": run.model(7, 0.3), "ema": run.model(8, 1.2)}
    for fold in folds:
        run.finish("c0002", fold, models)
    found = gains.of(run.summary("c0002"))
    q = reference_blend(run, 0, 1)
    mean, se = gain_by_definition(run.calibrated(models["ema"], *folds), q[run.rows(*folds)])
    assert found is not None and found[0] == "ema"
    assert (found[1].mean, found[1].se) == pytest.approx((mean, se), abs=CLOSE)
    assert found[1].rows == run.rows(*folds).sum()
    assert gains.blend_loss == pytest.approx(float(-np.log(q).mean()), abs=2e-5)


def test_the_gain_at_a_rung_is_that_of_its_columns_on_the_rows_of_the_fold(run: RacedRun) -> None:
    gains = blended(run, 0, 1)
    columns = {v: run.calibrated(run.model(s, 1.0), 1) for v, s in (("raw", 20), ("ema", 21))}
    stored = {variant: column.astype(np.float32) for variant, column in columns.items()}
    run.store.save_rung("c0002", 1, 3, "", stored)
    q = reference_blend(run, 0, 1)[run.rows(1)]
    expected = {variant: gain_by_definition(t, q) for variant, t in columns.items()}
    better = max(expected, key=lambda variant: expected[variant][0])
    found = gains.at_rung("c0002", 1, 3)
    assert found is not None and found[0] == better
    assert (found[1].mean, found[1].se) == pytest.approx(expected[better], abs=CLOSE)
    assert gains.at_rung("c0002", 1, 4) is None and gains.at_rung("c0003", 1, 3) is None


def test_the_gain_at_the_end_of_a_fold_is_that_on_its_rows_alone(run: RacedRun) -> None:
    """Of a complete candidate too, whose rows the blend was fitted on."""
    gains, q = blended(run, 0, 1), reference_blend(run, 0, 1)
    for name, fold, seed in (("c0002", 0, 5), ("c0002", 2, 5)):
        run.finish(name, fold, {"raw": run.model(seed, 0.8)})
    own = run.calibrated(run.model(5, 0.8), 2)
    found = gains.at_end(run.summary("c0002"), 2)
    assert found is not None
    assert found[1].mean == pytest.approx(gain_by_definition(own, q[run.rows(2)])[0], abs=CLOSE)
    done = [gain_by_definition(run.calibrated(run.model(s, 1.0), 1), q[run.rows(1)])
            for s in (0, 100)]  # fmt: skip
    found = gains.at_end(run.summary("c0000"), 1)
    assert found is not None and found[1].mean == pytest.approx(max(done)[0], abs=CLOSE)


def test_gains_follow_the_blend_as_it_grows(run: RacedRun) -> None:
    gains = blended(run, 0)
    model = run.model(3, 1.2)
    run.finish("c0009", 1, {"raw": model})
    run.store.save_rung("c0008", 1, 2, "", {"raw": run.calibrated(model, 1).astype(np.float32)})
    for number in (1, 2):
        q = reference_blend(run, *range(number))
        expected = gain_by_definition(run.calibrated(model, 1), q[run.rows(1)])[0]
        summary = run.summary("c0009")
        for found in (
            gains.of(summary), gains.at_rung("c0008", 1, 2), gains.at_end(summary, 1),
        ):  # fmt: skip
            assert found is not None and found[1].mean == pytest.approx(expected, abs=CLOSE)
        complete(run, number)
        gains.join([run.summary(f"c{number:04d}")])


def test_without_members_there_are_no_gains(run: RacedRun) -> None:
    gains = Gains(run.store)
    run.finish("c0000", 0, {"raw": run.model(0, 1.0)})
    run.store.save_rung("c0000", 0, 2, "", {"raw": np.full(80, 0.5, dtype=np.float32)})
    summary = run.summary("c0000")
    assert not gains.has_members and gains.blend_loss is None
    assert gains.of(summary) is gains.at_rung("c0000", 0, 2) is gains.at_end(summary, 0) is None


def test_one_after_another_or_all_at_once_the_blend_is_the_same(run: RacedRun) -> None:
    """As in a session and in the next one."""
    at_once = blended(run, 0, 1, 2)
    in_turn = Gains(run.store)
    for number in range(3):
        in_turn.join([run.summary(f"c{number:04d}")])
    assert in_turn.blend_loss == pytest.approx(at_once.blend_loss, abs=2e-5)
    expected = float(-np.log(reference_blend(run, 0, 1, 2)).mean())
    assert at_once.blend_loss == pytest.approx(expected, abs=2e-5)


def test_a_soup_has_no_part_in_it(run: RacedRun) -> None:
    gains = blended(run, 0)
    models = {"raw": run.model(7, -2.0), "soup": run.model(8, 3.0)}
    run.finish("c0002", 0, models, soups=("soup",))
    found = gains.of(run.summary("c0002"))
    end = gains.at_end(run.summary("c0002"), 0)
    assert found is not None and end is not None
    assert (found[0], end[0]) == ("raw", "raw") and found[1].mean < 0


def test_rows_that_cannot_be_read_are_named_once(
    run: RacedRun, caplog: pytest.LogCaptureFixture
) -> None:
    gains = blended(run, 0)
    run.finish("c0002", 0, {"raw": run.model(7, 1.0)})
    run.store.files.write("trials/c0002/fold0/oof.npy", b"half")
    with caplog.at_level(logging.WARNING, "foldrace"):
        for number in (1, 2):
            summary = run.summary("c0002")
            assert gains.of(summary) is None and gains.at_end(summary, 0) is None
            complete(run, number + 2)
            gains.join([run.summary(f"c{number + 2:04d}")])
    assert [r.getMessage().count("c0002/fold0/oof.npy") for r in caplog.records] == [1]


def test_rows_that_are_no_probabilities_are_named(
    run: RacedRun, caplog: pytest.LogCaptureFixture
) -> None:
    gains = blended(run, 0)
    run.finish("c0002", 0, {"ema": run.model(7, 1.0)})
    rewrite(run.store, "c0002", 0, "oof_ema.npy", np.full((80, 3), np.nan))
    with caplog.at_level(logging.WARNING, "foldrace"):
        assert gains.of(run.summary("c0002")) is None
    [line] = [record.getMessage() for record in caplog.records]
    assert "/trials/c0002/*/oof_ema.npy" in line and "no probabilities" in line


def test_columns_of_complete_candidates_are_kept_in_the_run_folder(run: RacedRun) -> None:
    first = blended(run, 0)
    run.store.files.delete("trials/c0000/fold1/oof.npy")  # it is not read again
    again = Gains(run.store)
    again.join([run.summary("c0000")])
    assert again.blend_loss == first.blend_loss
    expected = float(-np.log(reference_blend(run, 0)).mean())
    assert again.blend_loss == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("damage", ["torn", "of another trial", "of other variants", "no numbers"])
def test_kept_columns_that_do_not_fit_are_fitted_anew(run: RacedRun, damage: str) -> None:
    blended(run, 0)
    name, summary = "trials/c0000/race.safetensors", run.summary("c0000")
    kept = run.store.files.read(name)
    seeds = [(0, 100)] * 3
    if damage == "torn":
        run.store.files.write(name, kept[: len(kept) // 2])
    elif damage == "of another trial":
        run.finish("c0000", 1, {"raw": run.model(5, 1.0), "ema": run.model(6, 1.0)})
        seeds[1] = (5, 6)
    elif damage == "of other variants":
        run.store.save_calibrated(summary, {"raw": np.full(240, 0.5, dtype=np.float32)})
    else:
        wrong = {v: np.full(240, np.nan, dtype=np.float32) for v in ("raw", "ema")}
        run.store.save_calibrated(summary, wrong)
    again = Gains(run.store)
    again.join([run.summary("c0000")])
    columns = []
    for variant in range(2):
        model = np.zeros((240, 3))
        for fold in range(3):
            model[run.rows(fold)] = run.model(seeds[fold][variant], 1.0)[run.rows(fold)]
        columns.append(run.calibrated(model, 0, 1, 2))
    expected = float(-np.log(optimal_mix(np.array(columns))).mean())
    assert again.blend_loss == pytest.approx(expected, abs=2e-5)
    assert run.store.calibrated(run.summary("c0000")) is not None
