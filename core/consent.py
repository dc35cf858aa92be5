"""What this user has allowed: code of run folders, and further run folders that a blend reads.

A run folder is data, whoever made it: what it names is neither run nor read until the user has said
so, in a command. Each permission is a small file of the user's own, which says in words what it
allows; to take it back is to delete that file.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from foldrace.core.errors import RunFolderError, UserError, listing
from foldrace.core.files import atomic_write
from foldrace.core.plugin_files import PluginFile
from foldrace.core.private_folder import private_folder

_given: set[str] = set()
"""Permissions of this process, which hold also where no file can be written."""
_log = logging.getLogger("foldrace")


def consent_folder() -> Path:
    """The folder of the permissions: `foldrace/allowed` in $XDG_CONFIG_HOME or ~/.config."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "foldrace" / "allowed"


def plugins_digest(files: Sequence[PluginFile]) -> str:
    """SHA-256 of the names and contents of a run's plugin files, in hex."""
    named = sorted((file.module, hashlib.sha256(file.source).hexdigest()) for file in files)
    return hashlib.sha256(repr(named).encode()).hexdigest()


def allow_plugins(files: Sequence[PluginFile], remember: bool = True) -> None:
    """Let exactly these plugin files run, now and, where it is to be remembered, from now on."""
    if files:
        note = "these plugins run:\n" + "".join(f"{file.path}\n" for file in files)
        _give(f"plugins-{plugins_digest(files)}", note, remember)


def allowed_plugins(files: Sequence[PluginFile]) -> Sequence[PluginFile]:
    """The same files; RunFolderError unless the user has allowed them."""
    digest = plugins_digest(files)
    if files and not _is_given(f"plugins-{digest}"):
        raise RunFolderError.single(
            listing(file.path for file in files),
            "is code, which would run with your rights (SHA-256 of the run's plugins: "
            f"{digest}); read it, and where you trust it, say so once: --trust-plugins",
        )
    return files


def allow_command(command: str | None) -> None:
    """Let a sweep run this shell command of its config (`notify.command`), from now on."""
    if command is not None:
        _give(_command_name(command), f"sweeps run the shell command\n{command}\n", True)


def allowed_command(command: str | None, where: str) -> str | None:
    """The same command; RunFolderError, which names the file `where`, unless it is allowed."""
    if command is not None and not _is_given(_command_name(command)):
        raise RunFolderError.single(
            f"{where}: notify.command",
            f"is a shell command, which would run with your rights: {command!r:.300}; where you "
            "trust it, say so once: --trust-plugins; or leave it out: --set notify.command=null",
        )
    return command


def allow_run(root: str, other: str) -> None:
    """Let a blend of the run folder `root` have members of `other`, now and from now on."""
    _give(_run_name(root, other), f"a blend in\n{root}\nreads the run folder\n{other}\n", True)


def is_allowed_run(root: str, other: str) -> bool:
    """True where the user has named the run folder `other` for a blend of `root`."""
    return _is_given(_run_name(root, other))


def _command_name(command: str) -> str:
    return f"command-{hashlib.sha256(command.encode(errors='surrogateescape')).hexdigest()}"


def _run_name(root: str, other: str) -> str:
    text = f"{root}\0{other}".encode(errors="surrogateescape")
    return f"run-{hashlib.sha256(text).hexdigest()}"


def _give(name: str, note: str, remember: bool) -> None:
    _given.add(name)
    if not remember:
        return
    try:
        folder = private_folder(consent_folder(), "set XDG_CONFIG_HOME to a folder of your own")
        with atomic_write(folder / name, 0o600) as file:
            file.write(note.encode(errors="surrogateescape"))
    except (OSError, UserError) as error:  # it holds for this command
        _log.warning("what you allowed cannot be remembered: %s", error)


def _is_given(name: str) -> bool:
    if name in _given:
        return True
    folder = consent_folder()
    try:
        found = os.lstat(folder / name)
    except OSError:
        return False
    private_folder(folder, "set XDG_CONFIG_HOME to a folder of your own")
    return found.st_uid == os.geteuid()
