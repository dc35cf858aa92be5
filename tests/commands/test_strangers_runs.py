"""Run folders that came from somebody else: they are data, whatever they hold."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

from foldrace.core import consent
from foldrace.core.consent import plugins_digest
from foldrace.core.errors import RunFolderError
from foldrace.inference.predictor import Predictor
from foldrace.run_folder.oof import digest
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.notify import notifying
from foldrace.trainables.predict import pack_weights
from tests.commands.strangers_run import CARD, K, add_blend, edit, typed

MakeRun = Callable[..., Any]
_events: list[tuple[str, str]] | None = None


def _heard(event: str, arguments: tuple[object, ...]) -> None:
    if _events is not None and event in ("open", "socket.connect", "socket.getaddrinfo"):
        _events.append((event, str(arguments[1 if event == "socket.connect" else 0])))


sys.addaudithook(_heard)


@pytest.fixture
def events() -> Iterator[list[tuple[str, str]]]:
    """Every file that Python opens and every address that it asks for, from now on."""
    global _events
    _events = []
    yield _events
    _events = None


def network(events: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [event for event in events if event[0].startswith("socket")]


@pytest.fixture(autouse=True)
def nothing_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(consent, "_given", set())


@pytest.fixture
def store(make_tiny_run: MakeRun) -> RunStore:
    return add_blend(make_tiny_run("theirs", k=K).store)


@pytest.fixture
def image(tiny_images: Path) -> Path:
    return tiny_images / "blue" / "0.png"


def put_plugin(store: RunStore) -> Path:
    """Code in a run folder; the file that it writes when it runs."""
    ran = Path(store.root).parent / f"{Path(store.root).name} ran"
    source = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nPARTS = []\n"
    store.files.write("plugins/theirs.py", source.encode())
    return ran


@pytest.mark.parametrize("command", ["predict", "submit", "ensemble", "resume"])
def test_no_command_runs_a_strangers_plugins(store: RunStore, image: Path, command: str) -> None:
    ran = put_plugin(store)
    done = typed(command, store.root, *([image] if command == "predict" else []))
    assert done.exit_code == 2 and not ran.exists(), done.output
    said = f"{store.root}/plugins/theirs.py: is code"
    assert said in done.stderr and "--trust-plugins" in done.stderr
    assert plugins_digest(store.plugins()) in done.stderr


def test_resume_runs_no_command_of_a_strangers_config(store: RunStore, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    config = store.config()
    notify = config.notify.model_copy(update={"command": f"touch {ran}"})
    store.save_config(config.model_copy(update={"notify": notify}))
    done = typed("resume", store.root)
    assert done.exit_code == 2 and not ran.exists(), done.output
    assert f"{store.root}/sweep.yaml: notify.command: is a shell command" in done.stderr
    assert f"touch {ran}" in done.stderr and "--trust-plugins" in done.stderr
    with pytest.raises(RunFolderError, match="is a shell command"), notifying(store):
        pass
    assert not ran.exists()


@pytest.mark.parametrize("command", ["status", "report"])
def test_looking_at_a_run_runs_no_plugins(store: RunStore, command: str) -> None:
    ran = put_plugin(store)
    done = typed(command, store.root)
    assert done.exit_code == 0 and not ran.exists(), done.output


def test_trusted_plugins_run_until_they_change(
    store: RunStore, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = put_plugin(store)
    assert typed("predict", store.root, image, "--trust-plugins").exit_code == 0
    assert ran.exists()
    monkeypatch.setattr(consent, "_given", set())  # a later command
    assert typed("predict", store.root, image).exit_code == 0
    store.files.write("plugins/theirs.py", store.plugins()[0].source + b"# more\n")
    assert typed("predict", store.root, image).exit_code == 2


def other_run(make_tiny_run: MakeRun, folder: str = "other") -> tuple[RunStore, Path]:
    """A run of the same folds beside the stranger's, with a plugin of its own."""
    other = add_blend(make_tiny_run(folder, k=K).store)
    return other, put_plugin(other)


@pytest.mark.parametrize("way", ["absolute", "above", "by a link", "of a link"])
@pytest.mark.parametrize("command", ["predict", "submit", "report"])
def test_a_blend_reads_no_run_that_was_not_named(
    store: RunStore,
    image: Path,
    make_tiny_run: MakeRun,
    events: list[tuple[str, str]],
    way: str,
    command: str,
) -> None:
    other, ran = other_run(make_tiny_run)
    link = Path(store.root) / "link"
    link.symlink_to(other.root)
    names = {
        "absolute": other.root, "above": f"{store.root}/../other", "by a link": str(link),
        "of a link": f"{link}/../other",
    }  # fmt: skip
    edit(Path(store.root) / "ensemble/ensemble.json", members__0__run=names[way])
    events.clear()
    test = ("--test", image.parent)
    options = {"predict": (image,), "submit": test, "report": ()}[command]
    done = typed(command, store.root, *options)
    assert not ran.exists()
    assert not [path for _, path in events if "/other/" in path or "/link/" in path]
    if command != "report":  # which shows what it can
        assert done.exit_code == 2, done.output
        assert repr(names[way]) in done.stderr and "--run DIR" in done.stderr


def test_no_url_in_a_blend_is_asked(store: RunStore, image: Path) -> None:
    """pyarrow's own connections are no events of Python: a server says whether one came."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        came: list[object] = []
        thread = threading.Thread(target=lambda: came.append(_accepted(server)))
        thread.start()
        where = f"127.0.0.1:{server.getsockname()[1]}"
        url = f"s3://theirs/run?endpoint_override={where}&scheme=http"
        edit(Path(store.root) / "ensemble/ensemble.json", members__0__run=url)
        done = typed("predict", store.root, image)
        with socket.create_connection(server.getsockname()):  # the first one that comes is ours
            thread.join(timeout=60)
    assert done.exit_code == 2 and "you have not named" in done.stderr
    assert came == [b""]


def _accepted(server: socket.socket) -> bytes:
    with server.accept()[0] as one:
        one.settimeout(0.5)
        try:
            return one.recv(1)
        except OSError:
            return b""


def test_a_run_that_is_named_is_read_and_remembered(
    store: RunStore, image: Path, make_tiny_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, ran = other_run(make_tiny_run)
    edit(Path(store.root) / "ensemble/ensemble.json", members__0__run=other.root)
    done = typed("predict", store.root, image, "--run", other.root)
    assert done.exit_code == 2 and not ran.exists()
    assert f"{other.root}/plugins/theirs.py: is code" in done.stderr
    done = typed("predict", store.root, image, "--run", other.root, "--trust-plugins")
    assert done.exit_code == 0 and ran.exists(), done.output
    monkeypatch.setattr(consent, "_given", set())
    assert typed("predict", store.root, image).exit_code == 0
    assert len(Predictor(store.root).probabilities([image])) == 1


HEADERS = {
    "a hub": {"backbone": "timm/hf-hub:evil/x"},
    "a folder": {"backbone": "timm/local-dir:/etc"},
    "a giant": {"backbone": "timm/vit_giant_patch14_224"},
    "no family": {"backbone": "evil/x"},
    "more classes": {"classes": 10**12},
    "a huge image": {"image_size": 10**9},
    "a text": {"image_size": "32"},
    "another head": {"head": "cosine"},
    "meta features": {"meta": ("size",)},
}


def with_header(store: RunStore, card: Any) -> None:
    """Weights whose header says something else, with the digest that they then have."""
    for fold in range(K):
        name = f"trials/c0000/fold{fold}/best.safetensors"
        data = pack_weights(load(store.files.read(name)), card)
        store.files.write(name, data)
        trial = Path(store.root) / f"trials/c0000/fold{fold}/trial.json"
        edit(trial, **{"digests__best.safetensors": digest(data)})


@pytest.mark.parametrize("header", HEADERS)
def test_weights_of_another_model_than_the_trials_are_refused(
    store: RunStore, image: Path, events: list[tuple[str, str]], header: str
) -> None:
    card = replace(CARD, **HEADERS[header])
    with_header(store, card)
    events.clear()
    done = typed("predict", store.root, image)
    assert done.exit_code == 2, done.output
    [(name, value)] = HEADERS[header].items()
    assert f"{name} {value!r:.80}, not {getattr(CARD, name)!r}" in done.stderr
    assert "fold0/best.safetensors" in done.stderr and "trial.json" in done.stderr
    assert network(events) == []


@pytest.mark.parametrize("backbone", ["timm/hf-hub:evil/x", "timm/local-dir:/etc", "evil/x"])
def test_no_name_of_a_model_reaches_a_hub_or_another_folder(
    store: RunStore, image: Path, events: list[tuple[str, str]], backbone: str
) -> None:
    """Where the record agrees with the header."""
    with_header(store, replace(CARD, backbone=backbone))
    for fold in range(K):
        edit(Path(store.root) / f"trials/c0000/fold{fold}/trial.json", backbone=backbone)
    events.clear()
    done = typed("predict", store.root, image)
    assert done.exit_code == 2 and backbone in done.stderr, done.output
    assert network(events) == []
    assert not [path for _, path in events if path.startswith("/etc/config")]


def test_the_same_weights_predict_where_the_header_agrees(store: RunStore, image: Path) -> None:
    with_header(store, CARD)
    assert typed("predict", store.root, image).exit_code == 0


TRIAL, BLEND = "trials/c0000/fold0/trial.json", "ensemble/ensemble.json"
HUGE = 10**30
DAMAGES: list[tuple[str, dict[str, Any]]] = [
    *((TRIAL, {key: value}) for key, value in (
        ("candidate", "../../outside"), ("candidate", "c0001"), ("fold", 10**9), ("fold", "0"),
        ("fold", -1), ("seconds", -1.0), ("seconds", "1"), ("seed", HUGE), ("started_at", 1e300),
        ("params__image_size", 10**9), ("params__image_size", "32"), ("params__image_size", -1),
        ("params", {"epochs": 1e300}), ("variants__raw__rows", 0), ("variants__raw__rows", HUGE),
        ("variants__raw__val_acc", 7), ("variants", {"../x": {}}),
        ("variants__raw__ingredients", ["../../../etc x"]), ("devices", -1),
    )),
    *((BLEND, {key: value}) for key, value in (
        ("members", []), ("members__0__weight", 0.0), ("members__0__weight", -1.0),
        ("members__0__weight", 1e308), ("members__0__weight", "1"),
        ("members__0__candidate", "../../plain/trials/c0000"), ("members__0__variant", "../x"),
        ("members__0__temperature", 0.0), ("blend_temperature", 0.0), ("blend_temperature", -1.0),
        ("combiner", "../../../etc/passwd"), ("digests", {"added/../../x": ""}),
        ("unvalidated", [{"name": "../x", "weight": 0.5}]),
        ("unvalidated", [{"name": "x", "weight": 7}]), ("members_considered", -1),
        ("pooling", "stacking"), ("pooling", "votes"), ("pooling", 7),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("file", "values"), DAMAGES)
def test_a_value_out_of_range_is_named(
    store: RunStore, image: Path, file: str, values: dict[str, Any]
) -> None:
    edit(Path(store.root) / file, **values)
    done = typed("predict", store.root, image)
    assert done.exit_code == 2 and "Traceback" not in done.output, done.output
    assert isinstance(done.exception, SystemExit)
    assert store.root in done.stderr
    for command in ("status", "report"):  # a trial counts as none, a blend is named
        done = typed(command, store.root)
        assert isinstance(done.exception, SystemExit | None), done.output
        assert done.exit_code in (0, 2)


TEXTS = ["", "[", "[[1]]", "[" * 5000, '{"a": NaN}', "\xff", "null"]


@pytest.mark.parametrize(
    ("file", "command"),
    [
        *((file, "predict") for file in (TRIAL, BLEND, "classes.json", "ensemble/trajectory.csv")),
        *((file, "status") for file in (
            TRIAL, BLEND, "trials/c0000/candidate.json", "trials/c0000/fold0/decision.json",
            "submission.receipt.json", "logs/running.json", "logs/driver/x.json",
            "trials/c0000/fold0/train_log.csv",
        )),
        *((file, "report") for file in (
            "ensemble/trajectory.csv", "ensemble/soups.json", "ensemble/update.json",
            "merged_classes.json", "trials/c0000/fold0/train_log.csv",
        )),
    ],
)  # fmt: skip
def test_a_damaged_file_is_no_traceback(
    store: RunStore, image: Path, file: str, command: str
) -> None:
    for text in TEXTS:
        store.files.write(file, text.encode("latin-1"))
        done = typed(command, store.root, *([image] if command == "predict" else []))
        assert isinstance(done.exception, SystemExit | None), f"{text[:9]}: {done.exception!r}"
        assert done.exit_code in (0, 2), done.output


@pytest.mark.parametrize("fold", ["999999999", "-3", "1" * 5000, "9" * 19, "x", ""], ids=range(6))
def test_folds_are_few(store: RunStore, image: Path, fold: str) -> None:
    text = store.files.read("folds.csv").decode()
    first, second, *rest = text.splitlines()
    changed = [first, second.rpartition(",")[0] + f",{fold}", *rest]
    store.files.write("folds.csv", "\n".join(changed).encode())
    for command in (("predict", store.root, image), ("status", store.root)):
        done = typed(*command)
        assert done.exit_code == 2 and "folds.csv" in done.stderr, done.output


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
@pytest.mark.parametrize("shape", [(10**9, 10**9), (10**10,), (-1, 3), (True, 2)])
def test_an_array_takes_no_more_than_its_file(store: RunStore, shape: tuple[int, ...]) -> None:
    head = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    data = b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head.encode() + bytes(64)
    store.files.write("trials/c0000/fold0/true_prob.npy", data)
    edit(Path(store.root) / TRIAL, **{"digests__true_prob.npy": digest(data)})
    before = _pages()
    done = typed("ensemble", store.root)
    assert done.exit_code == 2 and "true_prob.npy" in done.stderr, done.output
    assert _pages() - before < 2 * 10**9 / os.sysconf("SC_PAGE_SIZE")


def _pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0])
