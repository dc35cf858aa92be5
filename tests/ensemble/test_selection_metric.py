"""`ensemble.metric` of a run: what ensemble.json says, which names are refused, what is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score
from typer.testing import CliRunner

from foldrace.config.schema import EnsembleConfig
from foldrace.core.errors import ConfigError
from foldrace.core.metrics import Metric
from foldrace.core.plugins import Part, Parts
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.select import Request, blend_run
from foldrace.reporting.blend_lines import blend_lines
from foldrace.run_folder.blend_records import SINGLE, EnsembleRecord
from foldrace.run_folder.store import RunStore
from foldrace.sweep import app
from tests.ensemble.selection_runs import LABELS, add, blend, make_store


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = make_store(tmp_path / "run")
    for number in range(3):
        add(store, number, 0.8 + 0.2 * number)
    return store


def request(*metrics: Metric, rival: EnsembleRecord | None = None) -> Request:
    parts = Parts(own=tuple(Part(metric, "my_parts.py line 1") for metric in metrics))
    return Request(lambda members: Prices({}, {}), parts=parts, rival=rival)


def test_the_log_loss_alone_leaves_no_choice(store: RunStore) -> None:
    record = blend(store, EnsembleConfig())
    assert record.choice is None and record.rule is None
    names = [score.name for score in record.metrics]
    assert names == ["log_loss", "accuracy", "macro_f1", "balanced_accuracy"]
    best = store.blend.oof().argmax(axis=1)
    share = accuracy_score(LABELS, best)
    found = record.metric("accuracy")
    assert found is not None and found.value == pytest.approx(share)
    assert found.se == pytest.approx(np.sqrt(share * (1 - share) / (len(LABELS) - 1)))
    assert all(score.se is not None and score.se > 0 for score in record.metrics)


def test_the_choice_is_in_the_record_and_told(store: RunStore) -> None:
    record = blend(store, EnsembleConfig(method="auto", metric="macro_f1"))
    assert store.blend.record() == record
    choice = record.choice
    assert choice is not None and choice.metric == "macro_f1"
    kept = choice.tried[choice.kept]
    assert kept.method == record.method
    lines = [*blend_lines(record)]
    assert any(line.startswith("Chosen by macro_f1: ") for line in lines)
    assert any(line.startswith("Labels are ") for line in lines)
    if choice.rule is None:
        best = store.blend.oof().argmax(axis=1)
        metric = record.metric("macro_f1")
        assert metric is not None
        assert metric.value == pytest.approx(f1_score(LABELS, best, average="macro"))


def test_a_name_of_no_metric_is_refused_with_all_others(store: RunStore) -> None:
    done = CliRunner().invoke(
        app, ["ensemble", store.root, "--metric", "macro-f1", "--method", "gredy"]
    )
    assert done.exit_code == 2 and "2 problems:" in done.stderr
    assert "ensemble.metric: got 'macro-f1'; did you mean 'macro_f1'?" in done.stderr
    assert store.blend.record() is None


def test_the_option_is_the_key(store: RunStore) -> None:
    done = CliRunner().invoke(app, ["ensemble", store.root, "--metric", "qwk"])
    assert done.exit_code == 0, done.stderr
    record = store.blend.record()
    assert record is not None and record.choice is not None and record.choice.metric == "qwk"
    assert "OOF qwk" in done.stdout
    told = " ".join((done.stdout + done.stderr).split())
    assert "qwk takes the classes in the order of their names, a < b < c" in told


def test_a_plugins_metric_chooses(store: RunStore) -> None:
    """Only the most vague member is liked: no blend has so little to say."""
    vague = Metric("vague", "least certainty", lambda prob, labels: -prob.max(axis=1).mean(), True)
    config = EnsembleConfig(calibrate=False, metric="vague")
    record = blend_run(store, config, request(vague))
    assert record.choice is not None and record.choice.rule_gain is None
    values = {t.method: t.value for t in record.choice.tried}
    best = max(values, key=lambda method: values[method])
    assert record.method == best and values[best] - values["greedy"] >= 0
    assert record.method in (SINGLE, "greedy")


@pytest.mark.parametrize("value", [float("inf"), None, "much"])
def test_a_plugins_metric_that_gives_no_number_is_an_error(store: RunStore, value: object) -> None:
    bad = Metric("bad", "", lambda prob, labels: value, True)  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match=r"'bad' gives .+, should be a finite"):
        blend_run(store, EnsembleConfig(metric="bad"), request(bad))


def test_members_within_the_limits_stand_alone(store: RunStore) -> None:
    """A forced member leaves no other to stand alone, two of them none."""
    forced = blend(store, EnsembleConfig(metric="accuracy", include=("c0002",)))
    assert any(m.candidate == "c0002" for m in forced.members)
    two = blend(store, EnsembleConfig(metric="accuracy", include=("c0001", "c0002")))
    assert two.choice is not None
    assert SINGLE not in [trial.method for trial in two.choice.tried]


def test_a_better_blend_is_better_by_the_own_metric(store: RunStore) -> None:
    record = blend(store, EnsembleConfig(metric="accuracy"))
    assert record.choice is not None
    ahead = record.choice.model_copy(update={"value": record.choice.value + 0.01})
    better = record.model_copy(
        update={"choice": ahead, "crossfit_logloss": record.crossfit_logloss + 1}
    )
    assert better.is_better_than(record) and not record.is_better_than(better)
    by_loss = record.model_copy(update={"choice": None})
    assert not better.is_better_than(by_loss) and by_loss.is_better_than(better)
    assert blend_run(store, EnsembleConfig(metric="accuracy"), request(rival=better)) == better
