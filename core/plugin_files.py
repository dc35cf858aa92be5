"""A user's Python files as modules of this process, wherever their source comes from.

Takes paths or sources, gives `PluginFile`s; `import_plugins` makes exactly those files importable
by their names, from the sources in memory. Knows nothing of what is in them.
"""

from __future__ import annotations

import ast
import importlib
import keyword
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import decode_source, find_spec, spec_from_loader
from pathlib import Path
from types import CodeType, ModuleType

from foldrace.core.errors import Problem, message_line

_FOLDRACE = Path(__file__).resolve().parents[1]


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
            file = PluginFile(path.stem, path.read_bytes(), str(path))
        except OSError as error:
            reason = error.strerror or type(error).__name__
            problems.append(Problem(str(path), f"the plugin cannot be read: {reason}"))
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

    Modules that an earlier call imported and that are not among `files` are dropped.
    """
    _finder.replace(files)
    found: dict[PluginFile, ModuleType | Problem] = {}
    for file in files:
        try:
            found[file] = importlib.import_module(file.module)
        except (Exception, SystemExit) as error:  # a user's file may raise anything
            where = place_of(error) or file.path
            found[file] = Problem(where, f"the plugin cannot be imported: {error_line(error)}")
    return found


def place_of(error: BaseException) -> str | None:
    """The innermost line of an imported plugin that an error came through, or None.

    It is found also where another process sent the error as text.
    """
    paths = {file.path for file in _finder.files.values()}
    if isinstance(error, SyntaxError) and error.filename in paths:
        return f"{error.filename} line {error.lineno}"
    place = None
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename in paths:
            place = f"{step.tb_frame.f_code.co_filename} line {step.tb_lineno}"
        step = step.tb_next
    if place is None:
        frames = re.findall(r'File "(.+)", line (\d+)', str(error))
        place = next((f"{p} line {line}" for p, line in reversed(frames) if p in paths), None)
    if place is None and error.__cause__ is not None:
        return place_of(error.__cause__)
    return place


def error_line(error: BaseException) -> str:
    """Type and message of an error in one line, see `message_line`."""
    text = message_line(error.msg if isinstance(error, SyntaxError) else str(error))
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def error_with_place(error: BaseException) -> str:
    """The error in one line, with the line of the plugin that it came through, if any."""
    place = place_of(error)
    return error_line(error) if place is None else f"plugin {place}: {error_line(error)}"


class _Finder(MetaPathFinder, InspectLoader):
    """Import hook that finds and loads the plugins of this process, and no others."""

    def __init__(self) -> None:
        self.files: dict[str, PluginFile] = {}

    def replace(self, files: Sequence[PluginFile]) -> None:
        """Make exactly these files importable."""
        if self not in sys.meta_path:
            sys.meta_path.insert(0, self)  # first: a node may have another file of that name
        # An import of one's own may have found that other file already, or may have stayed.
        for module in (*self.files, *(file.module for file in files)):
            sys.modules.pop(module, None)
        self.files = {file.module: file for file in files}

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Import spec of a plugin; None for any other module."""
        file = self.files.get(fullname)
        return None if file is None else spec_from_loader(fullname, self, origin=file.path)

    def get_source(self, fullname: str) -> str:
        """Source for tracebacks and `inspect`: the file itself may be on another machine."""
        return decode_source(self.files[fullname].source)

    def get_code(self, fullname: str) -> CodeType:
        """Compiled source of a plugin."""
        file = self.files[fullname]
        code: CodeType = compile(file.source, file.path, "exec", dont_inherit=True)
        return code


_finder = _Finder()


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
    if spec is None or spec.loader is _finder or spec.origin is None:
        return False
    lies_in = Path(spec.origin).resolve().parent
    lies_in = lies_in.parent if spec.submodule_search_locations is not None else lies_in
    return lies_in not in (folder.resolve(), Path.cwd())


def _import_problems(file: PluginFile, listed: dict[str, PluginFile]) -> Iterator[Problem]:
    """Imports that would work on this machine at best."""
    try:
        tree = ast.parse(file.source, file.path)
    except (SyntaxError, ValueError):
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
