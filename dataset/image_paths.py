"""From what a table writes to the files that are meant.

Takes the cells of a column and a folder, gives the root and the paths that lead to files, with a
line for the user where they are not as written: they start from another folder, ids have no suffix
or another one, numbers no leading zeros, files lie in folders below.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from unicodedata import normalize

from foldrace.core.errors import Problem, listing
from foldrace.dataset.archive import archive_of, member_names, unpack
from foldrace.dataset.images import find_images, has_image_suffix
from foldrace.dataset.tables import Table, clean, inner_folder

_ROOT_SAMPLE = 50  # so many paths tell which folder they start from
_PLACED = 0.5  # at least this part of them leads to images from there

Place = tuple[Path, str]
"""A folder or zip, and the folder in it that paths start from ('' for itself)."""


class ImageIndex:
    """Images in a folder and in the zips that lie in it, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._by_name: dict[str, list[tuple[Path, str]]] = {}
        for path in find_images(folder):
            self._add(folder, path)
        for archive in sorted(folder.glob("*.[zZ][iI][pP]")):
            for path in filter(has_image_suffix, member_names(archive)):
                self._add(archive, path)

    def _add(self, home: Path, path: str) -> None:
        name = posixpath.basename(path)
        for key in {_folded(name), _folded_stem(name), _number(name)} - {""}:
            self._by_name.setdefault(key, []).append((home, path))

    def places(self, written: str, numbers: bool = False) -> Iterator[Place]:
        """The places from which a path, or an id without a suffix, leads to an image.

        `numbers`: 7 leads to 0007.jpg, too.
        """
        written = written.strip().replace("\\", "/")
        if written.startswith(("/", "../")) and os.path.exists(self.folder / written):
            yield self.folder, ""  # wherever the paths of a table start from
        parts = len(PurePosixPath(written.replace("../", "")).parts)
        for home, path in self._matches(written, numbers):
            yield home, "/".join(PurePosixPath(path).parts[:-parts])

    def ends(self, written: str) -> list[str]:
        """Paths below the folder of all images that a path is the end of."""
        return [path for home, path in self._matches(written, False) if home == self.folder]

    def _matches(self, written: str, numbers: bool) -> Iterator[tuple[Path, str]]:
        parent, name = posixpath.split(re.sub(r"^(\.\./)+", "", posixpath.normpath(written)))
        key = _number(name) if numbers else _folded(name)
        there = self._by_name.get(key) or self._by_name.get(_folded_stem(name), [])
        for home, path in there:
            folder, found = posixpath.split(path)
            same = _number(found) == key if numbers else _folded_stem(found) == _folded_stem(name)
            folder, wanted = _folded(folder), _folded(parent)
            if same and (folder == wanted or not wanted or folder.endswith(f"/{wanted}")):
                yield home, path


@dataclass(frozen=True)
class ImagePaths:
    """Where the images of a table lie."""

    root: Path
    paths: tuple[str, ...]
    """As written, but with `/`, and as the file is called: relative to `root`, or absolute."""
    notes: tuple[str, ...]
    """Lines for the user: what differs from what is written."""


def find_paths(
    table: Table, written: Sequence[str], folder: Path, role: str, problems: list[Problem]
) -> ImagePaths:
    """The files of a table's paths or ids, which start from `folder` or near it.

    `role` is train or test: a folder of that name wins where several hold images of these names.
    What leads nowhere stays as it is written. Problems: paths that lead out of an archive.
    """
    root = find_image_root(folder, written) or _root_elsewhere(table, written, folder, role)
    notes, head = [], 0
    if root is None:
        root, head = _root_without_head(written, folder) or (folder, 0)
    if head or not _is_wrapped(folder, root):
        start = "/".join(PurePosixPath(written[0]).parts[:head])
        lost = f", without {start}" if head else ""
        notes.append(f"{table.name}: the image paths start from {root}{lost}")
        written = ["/".join(PurePosixPath(p).parts[head:]) or p for p in written]
    paths = complete_paths(root, written)
    changed = [(old, new) for old, new in zip(written, paths, strict=True) if old != new]
    if changed:
        old, new = changed[0]
        notes.append(
            f"{table.name}: {len(changed):,} of {len(paths):,} images are called otherwise than "
            f"the files: {old} is {new}"
        )
    problems += _leading_out(table, root, paths)
    return ImagePaths(root, paths, tuple(notes))


def on_disk(root: Path, written: str) -> Path:
    """The file of that name, whichever Unicode form the disk has for each of its parts."""
    path = root / written
    if written.isascii() or os.path.exists(path):  # Path.exists raises for a name too long
        return path
    found = root
    for part in PurePosixPath(written).parts:
        forms = (part, normalize("NFC", part), normalize("NFD", part))
        found = next((found / f for f in forms if os.path.exists(found / f)), found / part)
    return found


def find_image_root(folder: Path, paths: Sequence[str]) -> Path | None:
    """`folder`, or one that is wrapped in it, from which paths lead to files; None where none.

    Ids without a suffix lead to the image of that name.
    """
    sample = _sample(paths)
    root: Path | None = folder
    while root is not None:
        if any(os.path.exists(on_disk(root, path)) for path in _by_name(root, sample)):
            return root
        root = inner_folder(root)
    return None


def complete_paths(root: Path, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths; where one leads to no file but to exactly one of nearly that name, that one's.

    Nearly: with a suffix or with another one, with other capitals, a number with leading zeros.
    Where most lead nowhere, the files may lie in any folder below. No two paths get one file.
    """
    found = _by_name(root, paths)
    if sum(_is_there(root, path) for path in _sample(found)) < _PLACED * len(_sample(found)):
        index = ImageIndex(root)
        deep = [_only_place(index, path) for path in paths]
        found = [new or old for new, old in zip(deep, found, strict=True)]
    counts = Counter(new for _, new in set(zip(paths, found, strict=True)))
    return tuple(new if counts[new] == 1 else old for old, new in zip(paths, found, strict=True))


def preferred(places: Sequence[Place], role: str, folder: Path) -> list[Place]:
    """The places that suit the table best; several where nothing tells them apart."""
    other = {"train": "test", "test": "train"}[role]

    def rank(place: Place) -> tuple[bool, bool, bool]:
        home, root = place
        path = f"{home.name if home != folder else ''}/{root}".casefold()
        return role not in path, other in path, home != folder  # a folder before its own zip

    best = min(map(rank, places))
    return sorted(place for place in places if rank(place) == best)


def _root_elsewhere(table: Table, written: Sequence[str], folder: Path, role: str) -> Path | None:
    """The folder that paths start from, where it is not the one that they should."""
    first = {PurePosixPath(path).parts[:1] for path in written}
    if first == {(folder.name,)} and find_image_root(folder.parent, written):
        return folder.parent
    if folder != table.folder and find_image_root(table.folder, written):
        return find_image_root(table.folder, written)
    sample, index = _sample(written), ImageIndex(folder)
    places = Counter(place for path in sample for place in set(index.places(path)))
    most = max(places.values(), default=0)
    if most < _PLACED * len(sample) or most == 0:
        return None
    likely = preferred([place for place, n in places.items() if n == most], role, folder)
    if len(likely) > 1:
        return None
    [(home, inner)] = likely
    return (home if home.is_dir() else unpack(home)) / inner


def _root_without_head(written: Sequence[str], folder: Path) -> tuple[Path, int] | None:
    """The folder that paths start from, and how many parts they have in front of it.

    As written on another machine: ../input/pets/train/1.jpg, C:/pets/train/1.jpg.
    """
    sample = [PurePosixPath(path).parts for path in _sample(written)]
    for count in range(1, min(map(len, sample), default=1)):
        if len({parts[:count] for parts in sample}) > 1:
            return None
        root = find_image_root(folder, ["/".join(parts[count:]) for parts in sample])
        if root is not None:
            return root, count
    return None


def _is_wrapped(folder: Path, root: Path) -> bool:
    """True where `root` is the only folder in `folder`, or the only one in that, and so on."""
    inner: Path | None = folder
    while inner is not None and inner != root:
        inner = inner_folder(inner)
    return inner == root


def _sample(paths: Sequence[str]) -> Sequence[str]:
    return paths[:: len(paths) // _ROOT_SAMPLE + 1]


def _is_there(root: Path, path: str) -> bool:
    return os.path.exists(on_disk(root, path))


def _by_name(root: Path, paths: Sequence[str]) -> list[str]:
    """The paths with the names of the files that are meant, as far as these lie beside them."""
    folders: dict[str, _Names] = {}
    found = []
    for path in paths:
        parent, name = posixpath.split(path)
        if parent not in folders:
            folders[parent] = _Names(on_disk(root, parent))
        new = folders[parent].meant(name)
        found.append(path if new is None else posixpath.join(parent, new))
    return found


class _Names:
    """The files of one folder, by their names and by what a table may write for them."""

    def __init__(self, folder: Path) -> None:
        self._all = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        self._whole = set(map(clean, self._all))
        self._keyed: dict[Callable[[str], str], dict[str, list[str]]] = {}

    def meant(self, name: str) -> str | None:
        """The file's name where another one is written for it; None where it is as written."""
        if not self._all or clean(name) in self._whole:
            return None if name == name.strip() else name.strip()
        for key in (_folded, _stem, _folded_stem, _number):
            names = self._by(key).get(key(name), []) if key(name) else []
            if names:
                return names[0] if len(names) == 1 else None
        return None

    def _by(self, key: Callable[[str], str]) -> dict[str, list[str]]:
        if key not in self._keyed:
            found: dict[str, list[str]] = {}
            for name in filter(has_image_suffix, self._all):
                found.setdefault(key(name), []).append(name)
            self._keyed[key] = found
        return self._keyed[key]


def _folded(name: str) -> str:
    return clean(name).casefold()


def _stem(name: str) -> str:
    """A name without the suffix of an image; a dot may belong to the name."""
    name = clean(name)
    return posixpath.splitext(name)[0] if has_image_suffix(name) else name


def _folded_stem(name: str) -> str:
    return _stem(name).casefold()


def _number(name: str) -> str:
    """A number without leading zeros; '' where the name is none."""
    stem = _stem(name)
    return stem.lstrip("0") or "0" if stem.isascii() and stem.isdigit() else ""


def _only_place(index: ImageIndex, path: str) -> str | None:
    """The one image below a folder that a path is the end of."""
    found = index.ends(path)
    return found[0] if len(found) == 1 else None


def _leading_out(table: Table, root: Path, paths: Sequence[str]) -> Iterator[Problem]:
    """What is in an archive may not name files beyond it."""
    home = archive_of(root) or (root if archive_of(table.folder) else None)
    if home is None:
        return
    outside = [
        f"line {line}: {path}"
        for line, path in zip(table.lines, paths, strict=True)
        if not posixpath.isabs(path)
        and not PurePosixPath(posixpath.normpath(root / path)).is_relative_to(home)
    ]
    if outside:
        advice = "unpack it and name the folder"
        message = f"paths lead out of the archive: {listing(outside)}; {advice}"
        yield Problem(table.name, message)
