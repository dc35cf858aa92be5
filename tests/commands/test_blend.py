"""`ensemble DIR` without a model: what its options may say, and what the terminal tells."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from foldrace.commands.ensemble import Changes, unchosen_lines
from foldrace.config.schema import EnsembleConfig
from foldrace.console.terminal import Terminal
from foldrace.core.errors import ConfigError
from foldrace.ensemble.selection.eligible import Prices
from foldrace.ensemble.selection.external import AddSpec, add_sources
from foldrace.ensemble.selection.select import Request, blend_run
from foldrace.reporting.blend_lines import blend_lines
from foldrace.run_folder.blend_records import EnsembleRecord
from foldrace.run_folder.store import RunStore
from foldrace.sweep import app
from tests.ensemble.selection_runs import LABELS, add, blend, make_store


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    store = make_store(tmp_path / "run")
    for number in range(3):
        add(store, number, 0.8 + 0.2 * number)
    return store


def shown(record: EnsembleRecord) -> list[str]:
    console = Terminal(width=80)
    with console.capture() as capture:
        for line in blend_lines(record):
            console.print(line, soft_wrap=False)
    return capture.get().splitlines()


def test_only_what_is_asked_changes() -> None:
    config = EnsembleConfig(max_members=3, exclude=("c0001",), max_bytes=7)
    assert Changes().applied_to(config) == config
    changed = Changes(method="optimal", max_ms_per_image=0.5, exclude=("c0002",)).applied_to(config)
    expected = {"method": "optimal", "max_ms_per_image": 0.5, "exclude": ("c0002",)}
    assert changed == config.model_copy(update=expected)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Changes(max_ms_per_image=value, max_members=0).applied_to(EnsembleConfig())
    members, time = map(str, caught.value.problems)
    assert members.startswith("--max-members: got 0; allowed: greater than or equal to 1")
    assert time.startswith(f"--max-ms-per-image: got {value}; allowed: ")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_exit_code_2(store: RunStore, value: str) -> None:
    done = CliRunner().invoke(app, ["ensemble", store.root, f"--max-ms-per-image={value}"])
    assert done.exit_code == 2 and "--max-ms-per-image: got " in done.stderr
    assert store.blend.record() is None


def test_wishes_runs_and_files_are_one_message(store: RunStore, tmp_path: Path) -> None:
    """A name of a file that cannot be read is a name."""
    asked = ["--method", "gredy", "--exclude", "c0009", "--include", "mine", "--run", "/no/run"]
    adds = ["--add", f"mine={tmp_path}/absent.npy"]
    done = CliRunner().invoke(app, ["ensemble", store.root, *asked, *adds])
    assert done.exit_code == 2 and "4 problems:" in done.stderr
    for text in ("'gredy'", "'c0009' names no member", "absent.npy: does not exist", "/no/run: "):
        assert text in done.stderr


def test_wrong_wishes_are_told_before_soups_are_made(store: RunStore) -> None:
    """A soup may be excluded before it is there. The weights here are none, so soups fail."""
    soup = ["ensemble", store.root, "--method", "soup", "--exclude", "c0001 soup"]
    done = CliRunner().invoke(app, [*soup, "--exclude", "c0009"])
    assert done.exit_code == 2 and "1 problem:" in done.stderr
    assert "'c0009' names no member" in done.stderr
    assert "names no member" not in CliRunner().invoke(app, soup).stderr


def test_ctrl_c_leaves_the_old_blend(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foldrace.commands.ensemble.reblend", interrupted)
    done = CliRunner().invoke(app, ["ensemble", store.root])
    assert done.exit_code == 130 and done.stderr == "interrupted; the old blend is unchanged\n"


def test_one_line_a_figure(store: RunStore) -> None:
    record = blend(store, EnsembleConfig(calibrate=False))
    lines = shown(record)
    candidate, variant = record.best_single.split()
    loss, single = record.oof_logloss, record.best_single_oof_logloss
    fair, gain = record.single_crossfit_logloss, record.gain_over_single
    count = len(record.members)
    assert lines[0] == f"Blend of {count} members (greedy): OOF log loss {loss:.4f}"
    assert f"  best single model      {single:.4f}  {candidate} ({variant} weights)" in lines
    assert f"  best one, cross-fitted {fair:.4f}" in lines
    error = f"{record.gain_over_single_se:.4f}  (both cross-fitted)"
    name = "blend is better by" if gain >= 0 else "blend is worse by"
    assert f"  {name:22} {abs(gain):.4f} ± {error}" in lines
    figure = f"{record.crossfit_logloss:.4f} ± {record.crossfit_se:.4f}  (cross-fitted)"
    assert f"  one fold's models      {figure}" in lines
    assert "  mean of 3 folds        lower; the test images tell, once they are predicted" in lines
    alone = shown(record.model_copy(update={"k": 1}))
    assert not any("mean of" in line for line in alone)
    assert f"  {record.members[0].weight:.3f}  c0000 raw" in lines
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("gain", "text"),
    [
        (-0.0206, "worse by      0.0206"),
        (0.0206, "better by     0.0206"),
        (-1e-9, "better by     0.0000"),
    ],
)
def test_better_or_worse(store: RunStore, gain: float, text: str) -> None:
    record = blend(store, EnsembleConfig(calibrate=False))
    loss = record.single_crossfit_logloss - gain
    changes = {"crossfit_logloss": loss, "gain_over_single_se": 0.0123}
    lines = shown(record.model_copy(update=changes))
    assert f"  blend is {text} ± 0.0123  (both cross-fitted)" in lines


def test_a_blend_that_may_gain_nothing_is_warned_of(store: RunStore) -> None:
    record = blend(store, EnsembleConfig(calibrate=False))
    for change, warned in ((1e-3, True), (-1e-3, False)):
        loss = record.single_crossfit_logloss + change
        text = " ".join(shown(record.model_copy(update={"crossfit_logloss": loss})))
        assert ("warning The cross-fitted log loss of the blend" in text) == warned
        assert ("blending may gain nothing on new images" in text) == warned


def test_run_folders_are_no_markup(store: RunStore) -> None:
    record = blend(store, EnsembleConfig(calibrate=False))
    member = record.members[0].model_copy(update={"run": "runs/[old]"})
    changed = record.model_copy(update={"members": (member,), "members_without_weights": 2})
    lines = shown(changed)
    assert f"  {member.weight:.3f}  c0000 raw, of runs/[old]" in lines
    assert "Left out, as their weight files are not there: 2 members" in lines


def test_a_member_from_elsewhere_that_is_unchosen_lines(store: RunStore, tmp_path: Path) -> None:
    wrong = np.eye(3)[(LABELS + 1) % 3] * 0.97 + 0.01
    for name, prob in (("bad", wrong), ("good", np.eye(3)[LABELS] * 0.97 + 0.01)):
        np.save(tmp_path / f"{name}.npy", prob)
    specs = [AddSpec(name, tmp_path / f"{name}.npy", None) for name in ("bad", "good")]
    request = Request(lambda members: Prices({}, {}), added=add_sources(store, specs, None))
    record = blend_run(store, EnsembleConfig(), request)
    expected = f"bad: own OOF log loss {-np.log(0.01):.4f}, not chosen"
    assert list(unchosen_lines(record, request.added)) == [expected]
    assert not list(unchosen_lines(record, replace(request.added, members=())))
