"""Every row of the table of samplers, and what is particular to each."""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import get_args

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from foldrace.config.ranges import Choice, Float, Int, Range, Value
from foldrace.config.schema import SearchConfig
from foldrace.scheduling.search.samplers import (
    GRID_POINTS,
    SAMPLERS,
    Grid,
    SuggestionRequest,
    coarse_grid,
    full_grid,
)
from foldrace.search_spaces.space import distribution

RANGES: dict[str, Range] = {
    "lr": Float(1e-5, 1e-1, log=True),
    "dropout": Float(0.0, 0.5),
    "epochs": Int(2, 40),
    "batch_size": Choice((16, 32, 64)),
    "loss": Choice(("focal", "cross_entropy")),
}
DRAWING = [name for name, row in SAMPLERS.items() if row.starts_with_portfolio]
LEARNING = [name for name, row in SAMPLERS.items() if row.most_trials]


def trial(
    params: dict[str, Value],
    ranges: dict[str, Range],
    value: float | None,
    state: TrialState = TrialState.COMPLETE,
) -> FrozenTrial:
    return create_trial(
        state=state,
        value=value if state == TrialState.COMPLETE else None,
        params=params,
        distributions={name: distribution(ranges[name]) for name in params},
        intermediate_values={1: value} if value and state == TrialState.PRUNED else {},
    )


def proposed(name: str, ask: SuggestionRequest) -> dict[str, Value]:
    return dict(next(SAMPLERS[name].propose(ask)))


def minimise(
    name: str,
    loss: Callable[[dict[str, Value]], float],
    ranges: dict[str, Range],
    asks: int,
    seed: int = 0,
    parallel: int = 1,
) -> list[float]:
    """Losses of `asks` candidates, each told when `parallel` - 1 later ones have been asked for."""
    asked: list[dict[str, Value]] = []
    found: list[float] = []
    for number in range(asks):
        told = number + 1 - parallel
        known = [
            trial(params, ranges, found[i])
            if i < told
            else trial(params, ranges, None, TrialState.RUNNING)
            for i, params in enumerate(asked)
        ]
        asked.append(proposed(name, SuggestionRequest(seed, number, ranges, known)))
        found.append(loss(asked[-1]))
    return found


def median_of_the_last(losses: list[float]) -> float:
    return statistics.median(losses[-len(losses) // 4 :])


def bowl(params: dict[str, Value]) -> float:
    """Least at lr 1e-3, dropout 0.35, epochs 10, where each adds 0."""
    logarithm = np.log10(float(params["lr"])) + 3
    rest = (float(params["dropout"]) - 0.35) / 0.5, (float(params.get("epochs", 10)) - 10) / 38
    wrong = 0.5 * (params.get("loss", "focal") != "focal")
    return float((logarithm / 4) ** 2 + sum(x**2 for x in rest) + wrong)


def test_every_sampler_of_the_config_has_a_row() -> None:
    assert get_args(SearchConfig.model_fields["sampler"].annotation) == tuple(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_seed_and_the_number_decide(name: str) -> None:
    rng = np.random.default_rng(0)
    known = [
        trial(proposed("random", SuggestionRequest(0, i, RANGES, ())), RANGES, float(rng.random()))
        for i in range(1, 16)
    ]
    ask = SuggestionRequest(3, 20, RANGES, known)
    count = 1 if name == "gp" else 2  # it takes a second for each
    first = list(itertools.islice(SAMPLERS[name].propose(ask), count))
    assert first == list(itertools.islice(SAMPLERS[name].propose(ask), count))
    for params in first:
        assert params.keys() == RANGES.keys()
        assert all(RANGES[knob].contains(value) for knob, value in params.items())
    others = [SuggestionRequest(3, 21, RANGES, known), SuggestionRequest(4, 20, RANGES, known)]
    differ = [first[:1] != list(itertools.islice(SAMPLERS[name].propose(o), 1)) for o in others]
    assert all(differ) or name == "list"


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_space_of_one_configuration(name: str) -> None:
    found = list(SAMPLERS[name].propose(SuggestionRequest(0, 1, {}, ())))
    assert all(params == {} for params in found)
    assert bool(found) == (name != "list")


@pytest.mark.parametrize("name", DRAWING)
def test_in_a_finite_space_everything_is_proposed_at_last(name: str) -> None:
    ranges: dict[str, Range] = {"a": Int(1, 3), "b": Choice(("x", "y")), "c": Float(0.5, 0.5)}
    found = {tuple(p.values()) for p in SAMPLERS[name].propose(SuggestionRequest(0, 1, ranges, ()))}
    assert found == set(itertools.product((1, 2, 3), ("x", "y"), (0.5,)))


@pytest.mark.parametrize(
    ("name", "asks", "knobs"),
    [
        ("tpe", 60, ("lr", "dropout", "epochs", "loss")),
        ("gp", 18, ("lr", "dropout")),  # a quarter of a second each
    ],
)
def test_a_sampler_that_learns_beats_chance(name: str, asks: int, knobs: tuple[str, ...]) -> None:
    ranges = {knob: RANGES[knob] for knob in knobs}
    ours = median_of_the_last(minimise(name, bowl, ranges, asks, parallel=4))
    chance = statistics.median(minimise("random", bowl, ranges, 200))
    assert ours < 0.5 * chance


@pytest.mark.parametrize("name", LEARNING)
def test_what_other_backbones_have_is_no_hindrance(name: str) -> None:
    """Trials with some of the knobs, and with others'."""
    rng = np.random.default_rng(0)
    other = RANGES | {"mixup[b]": Float(0.0, 1.0)}
    some = {"dropout", "epochs", "mixup[b]"}
    known = [
        trial(
            {
                k: v
                for k, v in proposed("random", SuggestionRequest(0, i, other, ())).items()
                if k in some
            },
            other,
            float(rng.random()),
        )
        for i in range(1, 25)
    ]
    params = proposed(name, SuggestionRequest(0, 30, RANGES, known))
    assert params.keys() == RANGES.keys()


def test_tpe_is_optunas_own_with_all_that_it_can() -> None:
    """The same suggestion as a plain study with the same sampler and the same trials gives."""
    rng = np.random.default_rng(1)
    study = optuna.create_study()
    for number in range(30):
        params = proposed("random", SuggestionRequest(0, number, RANGES, ()))
        state = TrialState.PRUNED if number % 3 == 0 else TrialState.COMPLETE
        study.add_trial(trial(params, RANGES, float(rng.random()), state))
    ask = SuggestionRequest(0, 31, RANGES, study.trials)
    study.sampler = TPESampler(
        seed=ask.seed_of(0), multivariate=True, group=True, constant_liar=True
    )
    expected = study.ask({name: distribution(r) for name, r in RANGES.items()}).params
    assert proposed("tpe", ask) == expected


def test_parallel_asks_keep_away_from_each_other() -> None:
    """The constant liar: a running trial is taken for a bad one."""
    ranges: dict[str, Range] = {"lr": Float(0.0, 1.0)}
    known = [trial({"lr": i / 30}, ranges, abs(i / 30 - 0.5)) for i in range(1, 31)]
    near = [trial({"lr": 0.5 + i / 1000}, ranges, None, TrialState.RUNNING) for i in range(8)]

    def distance(trials: list[FrozenTrial]) -> float:
        asked = [
            proposed("tpe", SuggestionRequest(0, n, ranges, trials))["lr"] for n in range(60, 90)
        ]
        return statistics.mean(abs(float(lr) - 0.5) for lr in asked)

    assert distance(known + near) > distance(known)


def test_a_refused_proposal_is_not_made_again() -> None:
    """It stays a running trial, so TPE's own next ones lie elsewhere."""
    ranges: dict[str, Range] = {"epochs": Int(1, 30)}
    known = [trial({"epochs": i}, ranges, abs(i - 15.0)) for i in (2, 9, 13, 15, 17, 22, 28) * 2]
    found = []
    for number in range(30):
        request = SuggestionRequest(0, number, ranges, known)
        found.append([p["epochs"] for p in itertools.islice(SAMPLERS["tpe"].propose(request), 3)])
    assert sum(len(set(three)) == 3 for three in found) > sum(len(set(t)) < 3 for t in found)


def test_the_grid_is_the_product_of_choices_and_points_of_ranges() -> None:
    axes = [r.grid(GRID_POINTS) for r in RANGES.values()]
    grid = coarse_grid(RANGES)
    assert grid.size == len(list(itertools.product(*axes))) == 5 * 5 * 5 * 3 * 2
    found = [tuple(grid.at(i).values()) for i in range(grid.size)]
    assert sorted(map(str, found)) == sorted(map(str, itertools.product(*axes)))
    walked = {
        tuple(p.values()) for p in SAMPLERS["grid"].propose(SuggestionRequest(0, 1, RANGES, ()))
    }
    assert walked == set(found)


def test_a_grid_larger_than_memory_is_walked() -> None:
    grid = Grid({str(i): range(1000) for i in range(30)})
    assert grid.size == 10**90
    first = list(itertools.islice(grid.walk(0), 50))
    assert all(v in range(1000) for p in first for v in p.values())
    assert full_grid({"a": Int(0, 9), "b": Float(0.0, 1.0)}) is None


def test_other_threads_numbers_are_left_alone() -> None:
    """No global randomness: a fresh process gives the same suggestions, whatever was drawn."""
    code = (
        "import random, numpy; random.seed(5); numpy.random.seed(5)\n"
        "from foldrace.scheduling.search.samplers import SAMPLERS, SuggestionRequest\n"
        "from foldrace.config.ranges import Float\n"
        "r = {'a': Float(0.0, 1.0), 'b': Float(0.0, 1.0)}\n"
        "request = SuggestionRequest(0, 3, r, ())\n"
        f"print([dict(next(SAMPLERS[n].propose(request))) for n in {DRAWING}])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ranges: dict[str, Range] = {"a": Float(0.0, 1.0), "b": Float(0.0, 1.0)}
    assert done.stdout.strip() == str(
        [proposed(n, SuggestionRequest(0, 3, ranges, ())) for n in DRAWING]
    )
