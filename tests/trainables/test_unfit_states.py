"""Saved states that a fold trial cannot go on from: damaged ones, unfit ones, those of another
trial. It starts again and says so."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from foldrace.core.plugin_files import PluginFile
from foldrace.run_folder.store import RunStore
from foldrace.trainables.resume_state import fingerprint, from_bytes, to_bytes
from foldrace.trainables.spec import EpochReport, TrialSpec
from foldrace.trainables.trial import run_trial
from tests.conftest import write_tiny_run
from tests.trainables.resumed_trials import (
    Watcher,
    assert_same_results,
    folder_of,
    interrupted,
    log_without_times,
    spec_for,
)
from tests.trainables.written_trials import another, read

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Interrupted:
    """A trial that was interrupted, its state then, and one alike that was not."""

    spec: TrialSpec
    undisturbed: TrialSpec
    state: bytes

    def leave_behind(self, state: bytes | memoryview) -> None:
        """That state alone, whatever became of the trial since."""
        shutil.rmtree(folder_of(self.spec))
        RunStore.open(self.spec.run).save_resume_state(self.spec.candidate, self.spec.fold, state)
        assert [p.name for p in folder_of(self.spec).iterdir()] == ["resume.pt"]


@pytest.fixture(scope="module")
def after_two(tiny_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """After two epochs of three."""
    folder = tmp_path_factory.mktemp("after-two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOLDRACE_CACHE", str(folder / "cache"))
        undisturbed = spec_for(write_tiny_run(folder / "run", tiny_images), "c0000", epochs=3)
        run_trial(undisturbed, Watcher())
        spec = another(undisturbed, "c0001")
        interrupted(spec, 2)
    return Interrupted(spec, undisturbed, (folder_of(spec) / "resume.pt").read_bytes())


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "pickle"])
def test_a_damaged_state_is_none(
    after_two: Interrupted, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = bytearray(after_two.state)
    if damage == "torn":
        del whole[len(whole) // 2 :]
    elif damage == "flipped":
        whole[-1] ^= 255
    else:
        whole = bytearray(b"\x80\x05." if damage == "pickle" else b"")
    after_two.leave_behind(bytes(whole))
    first = _starts_anew(after_two.spec, "cannot be read", caplog)
    expected = log_without_times(after_two.undisturbed)[0]
    for column in ("train_loss", "val_logloss", "ema_val_logloss"):
        assert getattr(first, column) == float(expected[column])


@pytest.mark.parametrize("part", ["optimizer", "schedule", "history"])
def test_a_state_that_does_not_fit_is_none(
    after_two: Interrupted, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Found out when some of it is in the new state already: a new one gives the same bits."""
    state = from_bytes(after_two.state)
    if part == "history":
        state["history"]["log"][0]["a further column"] = 1.0
    else:
        state["train_state"][part] = {"of": "another kind"}
    after_two.leave_behind(to_bytes(state))
    _starts_anew(after_two.spec, "does not fit", caplog)
    run_trial(after_two.spec, Watcher())
    assert_same_results(after_two.spec, after_two.undisturbed)
    assert not (folder_of(after_two.spec) / "resume.pt").exists()


@pytest.mark.parametrize("other", [{"seed": 1}, {"lr": 1e-3}, {"dropout": 0.2}, {"fold": 1}])
def test_the_state_of_another_trial_is_none(
    after_two: Interrupted, tiny_run: Any, other: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    digest, saved = tiny_run.store.folds().hash, from_bytes(after_two.state)["fingerprint"]
    alike = read(spec_for(tiny_run, "c0000", epochs=3))
    assert fingerprint(alike, digest, ()) == saved
    assert fingerprint(alike, "other folds", ()) != saved
    spec = spec_for(tiny_run, "c0001", epochs=3, **other)
    assert fingerprint(read(spec), digest, ()) != saved
    tiny_run.store.save_resume_state("c0001", spec.fold, after_two.state)
    _starts_anew(spec, "of another config or version", caplog)


def test_plugins_are_part_of_the_fingerprint_wherever_they_lie(tiny_run: Any) -> None:
    trial = read(spec_for(tiny_run, "c0000"))
    own = PluginFile("own_parts", b"PARTS = []", "/gone/own_parts.py")
    variants = ((), (own,), (replace(own, source=b"PARTS = list()"),))
    found = {fingerprint(trial, "folds", plugins) for plugins in variants}
    moved = replace(own, path="/elsewhere/own_parts.py")
    assert len(found) == 3 and fingerprint(trial, "folds", (moved,)) in found


def _starts_anew(spec: TrialSpec, reason: str, caplog: pytest.LogCaptureFixture) -> EpochReport:
    """The report of its first epoch, after which it has a state of its own."""
    caplog.clear()
    (first,) = interrupted(spec, 1).reports
    assert first.epoch == 0
    lines = [r.getMessage() for r in caplog.records if "saved state" in r.getMessage()]
    assert len(lines) == 1 and reason in lines[0]
    assert lines[0].startswith(f"{spec.candidate} fold{spec.fold}: starts again")
    own = from_bytes((folder_of(spec) / "resume.pt").read_bytes())
    assert len(own["history"]["log"]) == 1
    return first


def test_a_full_disk_does_not_end_a_training(
    tiny_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: object, *arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tiny_run.store), "save_resume_state", full)
    assert run_trial(spec_for(tiny_run, "c0000", epochs=2), Watcher()).status == "finished"
    assert "No space left" in caplog.text
