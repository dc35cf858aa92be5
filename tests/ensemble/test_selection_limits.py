"""The blend of a run folder within limits, against all supports that meet them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import ConfigError
from foldrace.ensemble import optimal
from foldrace.ensemble.pool import Member
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.select import Request, blend_run
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore
from tests.ensemble.selection_runs import add, make_store, true_column

MS = (8.0, 5.0, 3.0, 2.0, 1.0)
BYTES = (100, 400, 200, 300, 500)
OPTIMAL = EnsembleConfig(method="optimal", calibrate=False)


@dataclass
class Run:
    store: RunStore
    true: NDArray[np.float64]
    """(M, ROWS), the dear members the better ones."""
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def blend(self, config: EnsembleConfig, **changes: object) -> EnsembleRecord:
        request = Request(self._prices)
        return blend_run(self.store, config.model_copy(update=changes), request)

    def _prices(self, members: Sequence[Member]) -> Prices:
        self.asked.append(tuple(m.candidate for m in members))
        numbers = {m: int(m.candidate[1:]) for m in members}
        return Prices(
            {m: MS[i] for m, i in numbers.items()},
            {m: BYTES[i] for m, i in numbers.items()},
            "abacus",
        )

    def least(self, ms: float = np.inf, size: float = np.inf) -> float:
        """Of all supports within the limits."""
        return min(
            optimal(self.true[list(support)], tolerance=1e-8).loss
            for support in supports(len(self.true))
            if sum(MS[i] for i in support) <= ms and sum(BYTES[i] for i in support) <= size
        )


def supports(count: int) -> Iterator[tuple[int, ...]]:
    for size in range(1, count + 1):
        yield from combinations(range(count), size)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    store = make_store(tmp_path / "run")
    columns = [true_column(add(store, i, 0.9 + 0.15 * i)["raw"]) for i in range(len(MS))]
    return Run(store, np.stack(columns))


@pytest.mark.parametrize("most", [1.0, 4.0, 7.5, 11.0, 19.0])
def test_time(run: Run, most: float) -> None:
    record = run.blend(OPTIMAL, max_ms_per_image=most)
    assert record.ms_per_image == sum(MS[int(m.candidate[1:])] for m in record.members)
    assert record.ms_per_image <= most
    assert record.device == "abacus"
    assert record.mixture_logloss == pytest.approx(run.least(ms=most), abs=1e-5)


@pytest.mark.parametrize("most", [100, 550, 1000])
def test_bytes(run: Run, most: int) -> None:
    record = run.blend(OPTIMAL, max_bytes=most)
    assert record.weight_bytes == sum(BYTES[int(m.candidate[1:])] for m in record.members)
    assert record.weight_bytes <= most
    assert record.mixture_logloss == pytest.approx(run.least(size=most), abs=1e-5)
    assert record.curve == ()


def test_time_and_bytes(run: Run) -> None:
    record = run.blend(OPTIMAL, max_ms_per_image=9.0, max_bytes=600)
    assert record.mixture_logloss == pytest.approx(run.least(9.0, 600), abs=1e-5)


def test_the_certificate_compares_with_all_members(run: Run) -> None:
    """The price of the limit is in it."""
    record = run.blend(OPTIMAL, max_ms_per_image=4.0)
    assert record.mixture_logloss is not None and record.certificate is not None
    assert record.mixture_logloss - record.certificate <= run.least() + 1e-7
    assert record.certificate > 1e-4


@pytest.mark.parametrize("calibrate", [True, False])
@pytest.mark.parametrize("method", ["greedy", "optimal", "uniform", "stacking"])
def test_the_curve_falls_with_time(run: Run, method: str, calibrate: bool) -> None:
    config = EnsembleConfig(method=method, calibrate=calibrate)
    record = run.blend(config, max_ms_per_image=6.0)
    times = [point.ms_per_image for point in record.curve]
    losses = [point.oof_logloss for point in record.curve]
    assert len(record.curve) > 1
    assert all(a < b for a, b in pairwise(times))
    assert all(a * (1 - 1e-4) > b for a, b in pairwise(losses))  # four digits tell them apart
    assert times[0] < 6.0
    within = [loss for ms, loss in zip(times, losses, strict=True) if ms <= 6.0]
    assert within[-1] * (1 - 1e-4) <= record.oof_logloss
    if method in ("greedy", "optimal"):  # the others' members are chosen for the best weights
        assert within[-1] == pytest.approx(record.oof_logloss, abs=1e-4)
        assert losses[-1] < record.oof_logloss and times[-1] > 6.0  # what more time would give


def test_the_curve_is_the_optimum_at_each_time(run: Run) -> None:
    for point in run.blend(OPTIMAL, max_ms_per_image=6.0).curve:
        assert point.oof_logloss == pytest.approx(run.least(ms=point.ms_per_image), abs=1e-4)


@pytest.mark.parametrize("method", ["greedy", "optimal", "uniform", "top-k", "geometric", "auto"])
def test_a_limit_that_the_blend_meets_changes_nothing(run: Run, method: str) -> None:
    free = run.blend(EnsembleConfig(method=method))
    for limit in ({"max_members": 5}, {"max_bytes": sum(BYTES)}, {"max_ms_per_image": sum(MS)}):
        bounded = run.blend(EnsembleConfig(method=method), **limit)
        assert bounded.model_copy(update={"curve": ()}) == free


def test_only_members_that_matter_are_measured(run: Run) -> None:
    record = run.blend(EnsembleConfig())
    assert run.asked == [tuple(sorted(m.candidate for m in record.members))]
    run.blend(EnsembleConfig(), max_bytes=600)
    assert run.asked[1:] == [tuple(f"c{i:04d}" for i in range(5))]


def test_forced_members_count(run: Run) -> None:
    """The dearest is in, and what fits beside it."""
    record = run.blend(OPTIMAL, max_ms_per_image=9.0, include=("c0000",))
    assert "c0000" in {m.candidate for m in record.members}
    assert record.ms_per_image is not None and record.ms_per_image <= 9.0


def test_all_limits_that_nothing_meets_are_told(run: Run) -> None:
    with pytest.raises(ConfigError) as caught:
        run.blend(EnsembleConfig(), max_ms_per_image=0.5, max_bytes=99)
    assert [str(p) for p in caught.value.problems] == [
        "ensemble.max_ms_per_image: is 0.5; the cheapest member, c0004 raw, needs 1 ms per image",
        "ensemble.max_bytes: is 99; the cheapest member, c0000 raw, needs 100 bytes",
    ]
    with pytest.raises(ConfigError) as caught:
        run.blend(EnsembleConfig(), max_ms_per_image=7.0, max_members=1, include=("c0000", "c0004"))
    assert [str(p) for p in caught.value.problems] == [
        "ensemble.max_ms_per_image: is 7; ensemble.include (c0000 raw, c0004 raw) needs 9 ms per "
        "image",
        "ensemble.max_members: is 1, but ensemble.include forces 2 in; raise it, or shorten the "
        "list",
    ]
    assert run.store.blend.record() is None


def test_a_price_that_nobody_knows(run: Run) -> None:
    """A limit cannot be held with it; without a limit its sum is unknown."""
    request = Request(lambda members: Prices(dict.fromkeys(members[1:], 1.0), {}))
    with pytest.raises(ConfigError, match="cannot hold: c0000 raw could not be measured; exclude"):
        blend_run(run.store, EnsembleConfig(max_ms_per_image=5.0), request)
    record = blend_run(run.store, EnsembleConfig(), request)
    assert (record.ms_per_image, record.weight_bytes) == (None, None)
