"""A look at each node of a connected cluster before the first trial.

Takes the run's store and the folder of its images, gives problems, which end the command, and
warnings. A node sees the run folder if it reads what the driver has just written there, and the
driver what the node writes; it sees the images if a few have the sizes that they have here.
"""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import ray

from foldrace.core.errors import Problem, RunFolderError, listing, message_line
from foldrace.core.files import Files, open_files
from foldrace.dataset.archive import cache_dir
from foldrace.dataset.image_paths import on_disk
from foldrace.run_folder.store import RunStore
from foldrace.scheduling.ray.cluster import NoAnswer, answers, on_node
from foldrace.scheduling.ray.node_watch import KIND
from foldrace.scheduling.ray.temp_folder import loader_folder_fault

TIME_LIMIT = 60.0  # seconds for all nodes together
_SAMPLED = 20  # images whose sizes are compared
_PACKAGES = ("accelerate", "numpy", "ray", "timm", "torch")
_SAME_MINOR = ("timm", "torch")  # they make the models that one node saves and another loads
_LEAST_DISK, _LEAST_SHM = 5e9, 1e9  # bytes
_FOLDER = "nodes"  # in the run folder, while nodes are asked
_PATIENCE = 5.0  # seconds; a machine that mounts a disk may not see a new file at once
_SHARED = (
    "put data and run folder on a disk that all nodes mount (zips are unpacked under "
    "FOLDRACE_CACHE, or ~/.cache/foldrace), or the run at s3://..."
)


@dataclass(frozen=True)
class Question:
    """What a node is asked; the driver's own state, to be compared with."""

    run: str
    secret: bytes
    """Content of the file that the driver has written into the run folder."""
    answer: str
    """Name of the file to write there with the same content."""
    image_root: str
    sizes: Mapping[str, int]
    """Image path -> bytes."""
    versions: Mapping[str, str]
    loaders: bool
    """True where trials have processes that load images."""


@dataclass(frozen=True)
class Findings:
    """Sentences about one node, without their subject."""

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    has_written: bool = False
    """True where it believes to have written into the run folder."""


def check_nodes(
    store: RunStore, image_root: str, loaders: bool, limit: float = TIME_LIMIT
) -> tuple[list[Problem], list[Problem]]:
    """Problems and warnings of the connected cluster's nodes; what several share is one line.

    `loaders`: trials have processes that load images; `limit`: seconds for all nodes together. A
    single node is this machine, of which nothing is asked through Ray.
    """
    nodes = {n["NodeID"]: n for n in ray.nodes() if n["Alive"]}  # type: ignore[no-untyped-call]
    if len(nodes) < 2:
        return _by_sentence({"this machine": _of_machine(loaders)})
    found = _ask(store, image_root, loaders, list(nodes), limit)
    problems, warnings = _by_sentence(
        {_name(nodes, node): findings for node, findings in found.items()}
    )
    return problems, [*warnings, *_mixed_devices(nodes)]


def _ask(
    store: RunStore, image_root: str, loaders: bool, nodes: list[str], limit: float
) -> dict[str, Findings]:
    """Findings of each node."""
    secret = secrets.token_bytes(64)
    sizes, versions = _sampled_sizes(store, Path(image_root)), _versions()
    look = ray.remote(num_cpus=0, max_retries=0)(look_at_node)
    store.files.write(f"{_FOLDER}/driver", secret)
    try:
        asked = {}
        for node in nodes:
            question = Question(store.root, secret, node, image_root, sizes, versions, loaders)
            asked[look.options(scheduling_strategy=on_node(node)).remote(question)] = node
        found = {
            node: _unseen(answer) if isinstance(answer, NoAnswer) else answer
            for node, answer in answers(asked, limit)
        }
        return _read_back(store.files, secret, found)
    finally:
        store.files.delete(_FOLDER)


def _unseen(given: NoAnswer) -> Findings:
    return Findings((given.reason if given.late else f"cannot run Foldrace: {given.reason}",))


def _read_back(files: Files, secret: bytes, found: dict[str, Findings]) -> dict[str, Findings]:
    """The findings, with a problem for each node that has written what does not arrive here."""
    end = time.monotonic() + _PATIENCE
    read = {}
    for node, findings in found.items():
        fault = _read_fault(files, node, secret, end) if findings.has_written else None
        if fault is not None:
            sentence = f"writes into a {files.root} that is not the driver's ({fault}); {_SHARED}"
            findings = replace(findings, problems=(*findings.problems, sentence))
        read[node] = findings
    return read


def look_at_node(question: Question) -> Findings:
    """Findings of the node that this runs on."""
    problems, warnings, versions = list[str](), list[str](), _versions()
    for name, theirs in question.versions.items():
        sentence, is_problem = _version_fault(name, theirs, versions.get(name))
        if sentence is not None:
            (problems if is_problem else warnings).append(sentence)
    unwritten, unseen = _run_folder_fault(question), _image_fault(question)
    problems += [fault for fault in (unwritten, unseen) if fault is not None]
    own = _of_machine(question.loaders)
    return Findings(
        (*problems, *own.problems), (*warnings, *own.warnings), has_written=unwritten is None
    )


def _of_machine(loaders: bool) -> Findings:
    """Findings of this machine alone: folder for temporary files, room for decoded images."""
    problems, warnings = list[str](), list[str]()
    cache = cache_dir()
    free = shutil.disk_usage(next(p for p in (cache, *cache.parents) if p.exists())).free
    if free < _LEAST_DISK:
        warnings.append(
            f"has {free / 1e9:.1f} GB free for decoded images in {cache}; where there is no room "
            "each image is decoded anew in each epoch: set FOLDRACE_CACHE to a larger disk"
        )
    if loaders:
        fault = loader_folder_fault()
        problems += [] if fault is None else [f"has a folder for temporary files, {fault}"]
        shared = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
        if shared < _LEAST_SHM:
            warnings.append(
                f"has a /dev/shm of {shared / 1e9:.2f} GB, through which the processes that load "
                "images hand them over; give it 1 GB or more (docker run --shm-size=8g)"
            )
    return Findings(tuple(problems), tuple(warnings))


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that nodes must share; without those not installed."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _version_fault(name: str, theirs: str, own: str | None) -> tuple[str | None, bool]:
    """A sentence where this node's version is not the driver's, and whether it is a problem."""
    if own is None:
        return f"has no {name}; the driver has {theirs}: install it in Ray's Python there", True
    if own == theirs:
        return None, False
    differs = own.split(".")[:2] != theirs.split(".")[:2]
    advice = "; install the same on all nodes" if name in _SAME_MINOR and differs else ""
    return f"has {name} {own}, the driver {theirs}{advice}", bool(advice)


def _run_folder_fault(question: Question) -> str | None:
    """Read the driver's file and write one; a sentence where that fails."""
    try:
        files = open_files(question.run)
        end = time.monotonic() + _PATIENCE
        fault = _read_fault(files, "driver", question.secret, end)
        if fault is not None:
            remote = "give it the driver's AWS_* variables, or a role that may read and write there"
            return f"does not see {question.run} ({fault}); " + (
                remote if "://" in question.run else _SHARED
            )
        files.write(f"{_FOLDER}/{question.answer}", question.secret)
    except (OSError, RunFolderError) as error:
        return f"cannot write into {question.run}: {message_line(str(error))}"
    return None


def _read_fault(files: Files, name: str, expected: bytes, end: float) -> str | None:
    """Why a file in `nodes/` does not have the content that it must have at `end`, or None."""
    while True:
        try:
            if files.read(f"{_FOLDER}/{name}") == expected:
                return None
            fault = f"{_FOLDER}/{name} has another content"
        except OSError as error:
            fault = message_line(str(error))
        if time.monotonic() > end:
            return fault
        time.sleep(0.2)


def _sampled_sizes(store: RunStore, root: Path) -> dict[str, int]:
    """Sizes of some images, spread over the table."""
    paths = store.folds().image_paths
    step = -(-len(paths) // _SAMPLED)
    sizes = {path: _size(root, path) for path in paths[::step]}
    return {path: size for path, size in sizes.items() if size is not None}


def _image_fault(question: Question) -> str | None:
    root = Path(question.image_root)
    if not root.is_dir():
        return f"does not see {root}; {_SHARED}"
    others = [
        f"{path} is missing" if own is None else f"{path} has {own:,} bytes, not {size:,}"
        for path, size in question.sizes.items()
        if (own := _size(root, path)) != size
    ]
    if not others:
        return None
    return f"has other images in {root} than the driver: {listing(others, 3)}; {_SHARED}"


def _size(root: Path, path: str) -> int | None:
    """Bytes of an image; None where there is none."""
    try:
        return os.path.getsize(on_disk(root, path))
    except OSError:
        return None


def _mixed_devices(nodes: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Iterator[Problem]:
    """A warning where the cluster's GPUs are of several kinds."""
    kinds = defaultdict[str, list[str]](list)
    for node, info in nodes.items():
        for resource in info["Resources"]:
            if resource.startswith(KIND):
                kinds[resource.removeprefix(KIND)].append(_name(nodes, node))
    if len(kinds) > 1:
        listed = "; ".join(f"{kind} ({listing(names, 3)})" for kind, names in sorted(kinds.items()))
        yield Problem(
            "GPUs of the cluster",
            f"are of {len(kinds)} kinds: {listed}. A trial that fits on one may not fit on "
            "another, and times that are measured on one are expected on all",
        )


def _name(nodes: Mapping[str, Mapping[str, object]], node: str) -> str:
    """The node's address, with its number in Ray where others have the same."""
    address = str(nodes[node]["NodeManagerAddress"])
    same = sum(str(info["NodeManagerAddress"]) == address for info in nodes.values())
    return f"node {address}" if same == 1 else f"node {address} ({node[:6]})"


def _by_sentence(found: Mapping[str, Findings]) -> tuple[list[Problem], list[Problem]]:
    problems = ((n, sentence) for n, f in found.items() for sentence in f.problems)
    warnings = ((n, sentence) for n, f in found.items() for sentence in f.warnings)
    return _grouped(problems), _grouped(warnings)


def _grouped(sentences: Iterable[tuple[str, str]]) -> list[Problem]:
    """One problem for each sentence; its place names the nodes."""
    names = defaultdict[str, list[str]](list)
    for name, sentence in sentences:
        names[sentence].append(name)
    return [Problem(listing(sorted(of), 8), sentence) for sentence, of in names.items()]
