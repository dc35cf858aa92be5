"""A user's Python files as modules, wherever their source comes from.

Takes paths or sources, gives `PluginFile`s; `import_plugins` runs them under names that hold a
digest of all files of the run, so that runs with other versions of a file live in one process.
Knows nothing of what is in them.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import keyword
import linecache
import re
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from foldrace.core.errors import Problem, message_line
from foldrace.core.opening import MB, read_regular, unreadable

_FOLDRACE = Path(__file__).resolve().parents[1]
_MOST_BYTES = 10 * MB
_MARK = "plugin "
"""Before the path in the file name of a plugin's code: any error tells which frames are its own."""


@dataclass(frozen=True)
class PluginFile:
    """One plugin file; equal files are the same plugin, wherever they lie."""

    module: str
    """Name in `import` statements: the file's name without `.py`."""
    source: bytes
    path: str = field(compare=False)
    """Path or place in an object store, for messages."""

    def at(self, line: int) -> str:
        """The `where` of a problem in that line."""
        return f"{self.path} line {line}"


def read_plugins(paths: Sequence[str]) -> tuple[tuple[PluginFile, ...], list[Problem]]:
    """The files that may be imported, by name, and the problems of the rest."""
    found: dict[str, PluginFile] = {}
    problems: list[Problem] = []
    for path in map(Path, dict.fromkeys(paths)):
        try:
            file = PluginFile(path.stem, read_regular(path, _MOST_BYTES), str(path))
        except OSError as error:
            problems.append(Problem(str(path), f"the plugin {unreadable(error)}"))
            continue
        problem = _name_problem(path, found.get(file.module))
        if problem is not None:
            problems.append(Problem(str(path), problem))
        else:
            found[file.module] = file
    for file in found.values():
        problems += _import_problems(file, found)
    return tuple(found[name] for name in sorted(found)), problems


def import_plugins(files: Sequence[PluginFile]) -> dict[PluginFile, ModuleType | Problem]:
    """Run the files; one that cannot be run gives a problem instead of a module.

    Files that ran in this process, together and with these sources, do not run again.
    """
    modules = _Modules(files)
    found: dict[PluginFile, ModuleType | Problem] = {}
    for file in files:
        try:
            found[file] = modules.get(file.module)
        except (Exception, SystemExit) as error:  # a user's file may raise anything
            where = place_of(error) or file.path
            found[file] = Problem(where, f"the plugin cannot be imported: {error_line(error)}")
    return found


class _Modules:
    """The modules of a run's plugin files, in `sys.modules` under names of their own."""

    _running = threading.RLock()  # of all: another thread waits for a module that is not whole

    def __init__(self, files: Sequence[PluginFile]) -> None:
        self._files = {file.module: file for file in files}
        sources = repr(sorted((file.module, file.source) for file in files))
        self._digest = hashlib.sha256(sources.encode()).hexdigest()[:12]

    def get(self, name: str) -> ModuleType:
        """The module of a file, which runs at the first call; raises what it raises."""
        file, full_name = self._files[name], f"{name}_{self._digest}"
        with self._running:
            if full_name in sys.modules:
                return sys.modules[full_name]
            code_name = _MARK + file.path
            code = compile(file.source, code_name, "exec", dont_inherit=True)
            # Source for tracebacks and `inspect`: the file itself may be on another machine.
            lines = decode_source(file.source).splitlines(keepends=True)
            linecache.cache[code_name] = (len(file.source), None, lines, code_name)
            module = ModuleType(full_name)
            module.__spec__ = ModuleSpec(full_name, None, origin=file.path)
            vars(module)["__builtins__"] = vars(builtins) | {"__import__": self._import}
            sys.modules[full_name] = module
            try:
                exec(code, vars(module))
            except BaseException:
                del sys.modules[full_name]
                raise
            return module

    def _import(self, name: str, *arguments: Any, **options: Any) -> Any:
        """What `import` calls in a plugin: the other files of the list come first."""
        return self.get(name) if name in self._files else __import__(name, *arguments, **options)


def place_of(error: BaseException) -> str | None:
    """The innermost line of a plugin that an error came through, or None.

    It is found also where another process sent the error as text.
    """
    if isinstance(error, SyntaxError) and (error.filename or "").startswith(_MARK):
        return f"{str(error.filename).removeprefix(_MARK)} line {error.lineno}"
    steps = traceback.walk_tb(error.__traceback__)
    places = [(frame.f_code.co_filename, line) for frame, line in steps]
    places = [(file.removeprefix(_MARK), line) for file, line in places if file.startswith(_MARK)]
    places = places or re.findall(rf'File "{_MARK}(.+)", line (\d+)', str(error))
    if places:
        file, line = places[-1]
        return f"{file} line {line}"
    return None if error.__cause__ is None else place_of(error.__cause__)


def error_line(error: BaseException) -> str:
    """Type and message of an error in one line, see `message_line`."""
    text = message_line(error.msg if isinstance(error, SyntaxError) else str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_with_place(error: BaseException) -> str:
    """The error in one line, with the line of the plugin that it came through, if any."""
    place = place_of(error)
    return error_line(error) if place is None else f"plugin {place}: {error_line(error)}"


def _name_problem(path: Path, other: PluginFile | None) -> str | None:
    """The reason why a file may not be imported under its name, or None."""
    name = path.stem
    if path.suffix != ".py" or not name.isidentifier() or keyword.iskeyword(name):
        return "is no name of a plugin; allowed: letters, digits and _, ending in .py"
    if other is not None:
        return f"has the name of {other.path}; plugins are imported by name, so rename one"
    if _exists_elsewhere(name, path.parent):
        return f"would hide the Python module {name!r}; rename the file"
    return None


def _exists_elsewhere(name: str, folder: Path) -> bool:
    """True where `import name` finds what is neither a plugin nor in this folder."""
    if name in sys.stdlib_module_names or (_FOLDRACE / name / "__init__.py").exists():
        return True
    try:
        spec = find_spec(name)
    except ValueError:  # a module without a spec, such as __main__
        return True
    if spec is None or spec.origin is None:
        return False
    lies_in = Path(spec.origin).resolve().parent
    lies_in = lies_in.parent if spec.submodule_search_locations is not None else lies_in
    return lies_in not in (folder.resolve(), Path.cwd())


def _import_problems(file: PluginFile, listed: dict[str, PluginFile]) -> Iterator[Problem]:
    """Imports that would work on this machine at best."""
    try:
        tree = ast.parse(file.source, file.path)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: it is too deep
        return  # importing the file will tell
    folder = Path(file.path).parent
    for line, name in sorted(_imports(tree)):
        if not name:
            message = "a relative import; plugins import each other by name: from other import X"
            yield Problem(file.at(line), message)
        elif name not in listed and _lies_beside(name, folder):
            yield Problem(
                file.at(line),
                f"imports {name!r}, which lies beside the plugin and would be missing elsewhere: "
                f"only listed files are shipped. Add {name}.py to plugins, or install it as a "
                "package on every machine",
            )


def _imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, top-level name) of every import; '' for a relative one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "" if node.level else (node.module or "").split(".")[0]


def _lies_beside(name: str, folder: Path) -> bool:
    beside = (folder / f"{name}.py").is_file() or (folder / name).is_dir()
    return beside and not _exists_elsewhere(name, folder)
