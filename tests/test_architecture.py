"""The house's walls: who may import whom, what is packaged, and how soon `--help` answers."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(
    path.parent.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*/__init__.py"), *ROOT.glob("*/*/__init__.py"))
)
_DATA = {"core", "config", "dataset", "run_folder"}

# A room's files may import these rooms; `scheduling/ray` is a room of its own within `scheduling`.
MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "config": {"core"},
    "dataset": {"core", "config"},
    "run_folder": {"core", "config", "dataset"},
    "search_spaces": {"core", "config"},
    "trainables": {*_DATA, "search_spaces"},
    "ensemble": _DATA,
    "scheduling": {*_DATA, "search_spaces", "trainables", "ensemble"},
    "scheduling/ray": {*_DATA, "search_spaces", "trainables", "ensemble", "scheduling"},
    "checks": {*_DATA, "search_spaces", "trainables", "ensemble", "scheduling"},
    "inference": {*_DATA, "trainables", "ensemble"},
    "export": {*_DATA, "trainables", "ensemble", "inference"},
    "reporting": _DATA,
    "comparison": {*_DATA, "ensemble", "reporting"},
    "evaluation": {*_DATA, "ensemble", "trainables", "inference", "reporting"},
    "console": {"core", "run_folder"},
    "commands": {
        *_DATA, "search_spaces", "trainables", "ensemble", "scheduling", "scheduling/ray", "checks",
        "inference", "export", "reporting", "comparison", "evaluation", "console",
    },
    "sweep": {"commands", "console"},
    "api": {"commands", "console", "core", "run_folder"},
    "parts": {"core", "trainables", "ensemble", "inference"},
    "__init__": {"api", "ensemble", "inference"},
}  # fmt: skip
_TORCH = {"torch", "torchvision", "timm"}
NEVER: dict[str, set[str]] = {
    **{
        room: {*_TORCH, "ray", "optuna"}
        for room in (*_DATA, "ensemble", "reporting", "comparison", "console")
    },
    "search_spaces": {*_TORCH, "ray"},
    "trainables": {"ray", "optuna"},
    "scheduling": {"ray"},
    "scheduling/ray": set(),
    "checks": {"ray"},
    "inference": {"ray", "optuna"},
    "evaluation": {"ray", "optuna"},
    "export": {"ray", "optuna"},
    "commands": {"ray"},
    "sweep": {*_TORCH, "ray", "optuna", "numpy", "pandas", "sklearn"},
    "api": {*_TORCH, "ray", "optuna"},
    "parts": {*_TORCH, "ray", "optuna", "numpy", "pandas", "sklearn"},
    "__init__": {*_TORCH, "ray", "optuna", "numpy", "pandas", "sklearn"},
}
HEAVY = ("torch", "ray", "pandas", "optuna", "sklearn", "matplotlib", "numpy", "scipy")


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it and for whatever reason."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} line {node.lineno}: a relative import"
            yield node.module or ""
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            argument = node.args[0]
            yield argument.value if isinstance(argument, ast.Constant) else "?"


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def room_of(path: Path) -> str:
    """The room of a file or module, given as a path below the root."""
    if path.parts[:2] == ("scheduling", "ray"):
        return "scheduling/ray"
    return path.parts[0].removesuffix(".py")


def files_of(room: str) -> list[Path]:
    if (ROOT / f"{room}.py").exists():
        return [ROOT / f"{room}.py"]
    return [f for f in sorted((ROOT / room).rglob("*.py")) if room_of(f.relative_to(ROOT)) == room]


def test_every_room_has_its_rule() -> None:
    rooms = {room_of(Path(package)) for package in PACKAGES}
    modules = {path.stem for path in ROOT.glob("*.py")}
    assert rooms | modules == MAY_IMPORT.keys() == NEVER.keys()


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_who_imports_whom(room: str) -> None:
    for file in files_of(room):
        for module in imported(file):
            first, *rest = module.split(".")
            where = f"{file.relative_to(ROOT)} imports {module}"
            assert first not in NEVER[room], where
            assert not (ROOT / first / "__init__.py").exists(), f"{where} outside of foldrace"
            if first == "foldrace" and rest:
                other = room_of(Path(*rest))
                assert other == room or other in MAY_IMPORT[room], where


def test_every_package_is_packaged_and_says_what_it_is() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    assert setuptools["package-dir"] == {"foldrace": "."}
    names = ["foldrace", *(f"foldrace.{package.replace('/', '.')}" for package in PACKAGES)]
    assert sorted(setuptools["packages"]) == sorted(names)
    for package in PACKAGES:
        assert ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text())), package


def test_every_file_says_what_it_owns() -> None:
    for room in MAY_IMPORT:
        for file in files_of(room):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            assert ast.get_docstring(tree), f"{file.relative_to(ROOT)} has no docstring"


def test_whoever_takes_a_runs_parts_is_given_them() -> None:
    """Without them a run's own losses, heads and metrics would not be there."""
    trees = {
        file: ast.parse(file.read_text(encoding="utf-8"))
        for room in MAY_IMPORT
        for file in files_of(room)
    }
    every = {name for tree in trees.values() for name in _takers_of_parts(tree)}
    public = {name for name in every if not name.startswith("_")}
    assert {"build_classifier", "Transforms", "all_metrics", "preflight"} <= public
    for file, tree in trees.items():
        takers = public | set(_takers_of_parts(tree))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            name = ast.unparse(call.args[0]) if name == "partial" else name
            given = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(call)}
            if name in takers and ast.unparse(call) != "find_tta('none')":
                assert given & {"parts", "_parts", "run_parts"}, f"{file} line {call.lineno}"


def _takers_of_parts(tree: ast.Module) -> Iterator[str]:
    """Names of functions, and of classes whose constructor is one, with an argument `parts`."""
    for node in ast.walk(tree):
        functions = [(node, getattr(node, "name", ""))]
        if isinstance(node, ast.ClassDef):
            functions = [(f, node.name) for f in node.body if getattr(f, "name", "") == "__init__"]
        for function, name in functions:
            if isinstance(function, ast.FunctionDef) and name != "__init__":
                arguments = (*function.args.args, *function.args.kwonlyargs)
                if any(argument.arg == "parts" for argument in arguments):
                    yield name


def test_what_is_exported_runs_without_the_rest() -> None:
    """Its files import each other alone, and packages that such a folder needs."""
    allowed = {*sys.stdlib_module_names, "numpy", "PIL", "torch", "torchvision", "timm"}
    for file in (ROOT / "export" / "shipped").glob("*.py"):
        for module in imported(file):
            own = module.startswith("foldrace.export.shipped.")
            others = {*allowed, "safetensors", "onnxruntime"}
            assert own or module.split(".")[0] in others, f"{file} imports {module}"


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["no-such-command"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom foldrace import sweep\n"
        f"sys.argv = ['foldrace', *{arguments!r}]\n"
        "try:\n    sweep.main()\n"
        "except SystemExit:\n    pass\n"
        f"print('heavy:', [m for m in {HEAVY!r} if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stdout + done.stderr


# Where files are opened other than through `core/opening.py`, and which: our own, and the system's.
OPENS_ITSELF = {
    "core/opening.py": "the one place",
    "core/files.py": "writes",
    "checks/machine.py": "/proc",
    "run_folder/claims.py": "/proc",
    "inference/speed.py": "/proc",
    "inference/engine/passes.py": "/sys",
    "console/process_list.py": "/proc",
    "console/terminal.py": "/dev/null",
    "console/machine.py": "writes logs",
    "commands/demo.py": "the demo's own labels",
    "dataset/demo.py": "writes",
    "dataset/archive.py": "what `open_regular` has opened; writes",
    "inference/submission.py": "a zip in memory",
    "dataset/images.py": "what `open_regular` has opened",
    "dataset/predictions_file.py": "what `open_regular` has opened",
    "dataset/readers.py": "what `open_regular` has opened",
    "trainables/models/weights.py": "what `open_regular` has opened",
    "config/texts.py": "texts",
    "api.py": "a text",
    "ensemble/solvers/log_linear.py": "memory of its own",
    "search_spaces/portfolio.py": "a file of the package",
    "scheduling/ray/private_cluster.py": "writes",
    "scheduling/ray/tune_adapter.py": "Ray's file",
    "ensemble/selection/matrix_folder.py": "the cache",
    "dataset/unpacked.py": "the cache",
    "export/folder.py": "files of the package, and what it has written itself",
    "export/shipped/blend_images.py": "runs without us",
    "export/shipped/blend_io.py": "runs without us",
    "export/shipped/bundle_predict.py": "runs without us",
    "export/shipped/kaggle_submission.py": "runs without us",
    "trainables/data/cache_build.py": "the cache",
    "trainables/data/cache_entry.py": "the cache",
    "trainables/data/cache_folder.py": "the cache",
    "trainables/data/pixel_cache.py": "the cache",
}
_OPENING = {
    *("read_text", "read_bytes", "read_csv", "read_table", "ParquetFile", "ZipFile", "fromfile"),
    *("loadtxt", "genfromtxt", "safe_open", "load_file", "safe_load", "imread", "memmap"),
}


def _opens(call: ast.Call) -> bool:
    """True for what opens a file, or reads one by its name."""
    name, text = _called(call), ast.unparse(call.func)
    if name != "open":
        return name in _OPENING or text in ("np.load", "yaml.load", "np.lib.format.read_array")
    modes = [a for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return text in ("open", "os.open", "io.open", "Image.open") or bool(
        modes or any(keyword.arg in ("mode", "encoding") for keyword in call.keywords)
    )


def test_users_files_are_opened_in_one_place() -> None:
    found = set()
    for room in MAY_IMPORT:
        for file in files_of(room):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            ours = {  # `read_table`, `read_bytes`, ...
                alias.name
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("foldrace.")
                for alias in node.names
            } | {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                by_name = isinstance(call.func, ast.Name) and call.func.id in ours
                if _opens(call) and not by_name:
                    found.add(str(file.relative_to(ROOT)))
    assert found == OPENS_ITSELF.keys(), (found - OPENS_ITSELF.keys(), OPENS_ITSELF.keys() - found)


def test_there_is_one_kind_of_console() -> None:
    for room in MAY_IMPORT:
        for file in files_of(room):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
                where = f"{file.relative_to(ROOT)} line {call.lineno}"
                assert _called(call) not in ("Console", "from_markup", "escape"), where
