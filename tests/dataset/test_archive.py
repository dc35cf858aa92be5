"""Archives made by hand: hostile ones are refused whole, odd but honest ones are unpacked."""

from __future__ import annotations

import os
import shutil
import stat
import struct
import threading
import time
import unicodedata
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from foldrace.core.errors import DataError, EnvironmentProblem
from foldrace.dataset import archive
from foldrace.dataset.archive import cache_dir, member_names, name_notes, unpack


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FOLDRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return path


def make_raw_named_zip(path: Path, names: list[bytes]) -> Path:
    """As Windows' own zip folder writes them: names in the local code page, no UTF-8 flag."""
    stand_ins = ["ABCDEFGH"[i] * len(name) for i, name in enumerate(names)]
    make_zip(path, dict.fromkeys(stand_ins, b"data"))
    data = path.read_bytes()
    for stand_in, name in zip(stand_ins, names, strict=True):
        data = data.replace(stand_in.encode(), name)
    path.write_bytes(data)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def leftovers(cache: Path) -> list[Path]:
    """What lies in the cache, but for locks and notes."""
    folder = cache / "unpacked"
    found = list(folder.iterdir()) if folder.exists() else []
    return [path for path in found if path.suffix not in (".lock", ".json")]


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOLDRACE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/foldrace")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/foldrace")


def test_unpacks_once_and_leaves_out_litter(tmp_path: Path, cache: Path) -> None:
    members = {
        "a/1.txt": b"one",
        "empty/": b"",
        "win\\2.txt": b"two",
        "__MACOSX/a/._1.txt": b"x",
        "a/.DS_Store": b"x",
        "a/Thumbs.db": b"x",
    }
    folder = unpack(make_zip(tmp_path / "x.zip", members))
    assert contents(folder) == {"a/1.txt": b"one", "win/2.txt": b"two"}
    assert (folder / "empty").is_dir()
    assert leftovers(cache) == [folder]
    stamp = folder.stat().st_mtime_ns
    copy = make_zip(tmp_path / "same content.zip", members)
    assert unpack(copy) == folder
    assert folder.stat().st_mtime_ns == stamp
    other = unpack(make_zip(tmp_path / "y.zip", members | {"a/1.txt": b"two"}))
    assert other != folder


def _with_crc_of(data: bytes, wanted: bytes) -> bytes:
    """The data and four bytes with which the whole has the CRC of `wanted`."""
    table = [zlib.crc32(bytes([i])) ^ zlib.crc32(b"\0") for i in range(256)]
    by_top = {entry >> 24: i for i, entry in enumerate(table)}
    state = zlib.crc32(wanted) ^ 0xFFFFFFFF
    for _ in range(4):
        i = by_top[state >> 24]
        state = (state ^ table[i]) << 8 | i
    return data + (state ^ zlib.crc32(data) ^ 0xFFFFFFFF).to_bytes(4, "little")


def test_an_archive_is_known_by_its_content_not_by_its_checksums(tmp_path: Path) -> None:
    """Two with the same names, sizes and CRCs: the second must not get what the first holds."""
    good = b"a.jpg,cat\nb.jpg,dog\n    "
    bad = _with_crc_of(b"a.jpg,dog\nb.jpg,cat\n", good)
    assert (zlib.crc32(bad), len(bad)) == (zlib.crc32(good), len(good)) and bad != good
    for name, data in (("bad", bad), ("good", good)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", zipfile.ZIP_STORED) as file:
            file.writestr(zipfile.ZipInfo("train.csv"), data)
    unpack(tmp_path / "bad.zip")
    assert contents(unpack(tmp_path / "good.zip")) == {"train.csv": good}


def test_a_changed_archive_at_the_same_path_is_unpacked_anew(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a.txt": b"one"})
    unpack(path)
    make_zip(path, {"a.txt": b"two"})
    assert contents(unpack(path)) == {"a.txt": b"two"}


def test_the_cache_is_closed_to_others(tmp_path: Path, cache: Path) -> None:
    (cache / "unpacked").mkdir(parents=True, mode=0o777)
    (cache / "unpacked").chmod(0o777)
    unpack(make_zip(tmp_path / "x.zip", {"a.txt": b"one"}))
    assert stat.S_IMODE((cache / "unpacked").stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder to another user")
@pytest.mark.parametrize("linked", [False, True])
def test_a_cache_of_another_user_is_refused(tmp_path: Path, cache: Path, linked: bool) -> None:
    theirs = cache / "unpacked"
    cache.mkdir()
    if linked:  # to a folder of ours, which they may turn to one of theirs later
        theirs.symlink_to(tmp_path)
    else:
        theirs.mkdir()
    os.chown(theirs, 65534, 65534, follow_symlinks=False)
    path = make_zip(tmp_path / "x.zip", {"a.txt": b"one"})
    with pytest.raises(EnvironmentProblem, match=r"not yours .*set FOLDRACE_CACHE to a folder"):
        unpack(path)


def test_a_half_unpacked_archive_never_counts(tmp_path: Path, cache: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a.txt": b"A" * 100, "b.txt": b"B" * 100})
    data = bytearray(path.read_bytes())
    data[data.index(b"b.txt") + 5] ^= 0xFF  # the first compressed byte of b
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.zip: is not a sound zip archive: .+"):
        unpack(path)
    assert leftovers(cache) == []


def test_two_at_once(tmp_path: Path, cache: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {f"{i}.txt": bytes([i]) * 1000 for i in range(50)})
    found: list[Path] = []
    barrier = threading.Barrier(4)

    def work() -> None:
        barrier.wait()
        found.append(unpack(path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert leftovers(cache) == [found[0]]
    assert len(contents(found[0])) == 50


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "have an absolute path"),
        ("C:/x.txt", "have an absolute path"),
        ("c:\\x.txt", "have an absolute path"),
        ("../x.txt", "lead outside of the archive"),
        ("a/../../x.txt", "lead outside of the archive"),
        ("a\\..\\..\\x.txt", "lead outside of the archive"),
        (".", "have no valid name"),
    ],
)
def test_escaping_names_are_refused(tmp_path: Path, cache: Path, name: str, reason: str) -> None:
    path = make_zip(tmp_path / "x.zip", {"good.txt": b"", name: b"evil"})
    with pytest.raises(DataError, match=reason) as error:
        unpack(path)
    assert str(path) in str(error.value)
    assert "pack the archive again" in str(error.value)
    assert leftovers(cache) == []
    assert not list(tmp_path.rglob("x.txt"))


def test_all_bad_members_are_named_at_once(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        link = zipfile.ZipInfo("link")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        file.writestr(link, "/etc/passwd")
        for i in range(25):
            file.writestr(f"../{i}", b"")
        file.writestr("a.txt", b"1")
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("a.txt", b"2")
    with pytest.raises(DataError) as error:
        unpack(tmp_path / "x.zip")
    text = str(error.value)
    assert len(error.value.problems) == 3
    assert "are links or devices, not files: 'link'" in text
    assert "'../19' and 5 more" in text
    assert "are there twice: 'a.txt'" in text


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"a.txt": b"secret"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"are encrypted: 'a\.txt'"):
        unpack(path)


def test_declared_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "RATIO_FREE_BYTES", 10**6)
    path = make_zip(tmp_path / "x.zip", {"zeros": bytes(2 * 10**6)})
    with pytest.raises(DataError, match=r"times its size; allowed: 200 times"):
        unpack(path)


def test_highly_packed_but_small_is_no_bomb(tmp_path: Path) -> None:
    folder = unpack(make_zip(tmp_path / "x.zip", {"zeros": bytes(2 * 10**6)}))
    assert (folder / "zeros").stat().st_size == 2 * 10**6


def test_too_many_members_and_too_little_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zip(tmp_path / "x.zip", {f"{i}": b"12345" for i in range(4)})
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(archive, "MAX_MEMBERS", 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataError) as error:
        unpack(path)
    assert "holds 4 members; allowed: 3" in str(error.value)
    assert "set FOLDRACE_CACHE to a folder on a larger disk" in str(error.value)


def test_as_many_files_as_the_disk_has_room_for(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_zip(tmp_path / "x.zip", {f"{i}": b"" for i in range(4)})
    real = os.statvfs(tmp_path)
    for room, fits in ((3, False), (4, True)):
        values = {name: getattr(real, name) for name in dir(real) if name.startswith("f_")}
        disk = SimpleNamespace(**values | {"f_files": 100, "f_favail": room})
        monkeypatch.setattr(os, "statvfs", lambda _, disk=disk: disk)
        if fits:
            assert len(list(unpack(path).iterdir())) == 4
            continue
        with pytest.raises(DataError, match=r"holds 4 members, but .* has room for 3 files"):
            unpack(path)


@pytest.mark.parametrize("depth", [51, 5_000])
def test_folders_very_deep_within_each_other_are_refused(
    depth: int, tmp_path: Path, cache: Path
) -> None:
    path = make_zip(tmp_path / "x.zip", {"d/" * depth + "x": b"", "a" + "/b" * 50: b""})
    with pytest.raises(DataError, match="members that lie more than 50 folders deep") as error:
        unpack(path)
    assert "a/b" not in str(error.value)
    assert leftovers(cache) == []


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_damaged_byte_of_a_member_is_told_or_changes_nothing(
    method: int, tmp_path: Path, cache: Path
) -> None:
    path, content = tmp_path / "x.zip", bytes(range(256))
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x", content)
    sound, told = path.read_bytes(), 0
    for at in range(31, sound.index(b"PK\x01\x02"), 7):  # behind the header and the name
        path.write_bytes(sound[:at] + bytes([sound[at] ^ 0xFF]) + sound[at + 1 :])
        try:
            assert (unpack(path) / "x").read_bytes() == content
        except DataError as error:
            assert error.problems[0].where == str(path)
            told += 1
    assert told > 5
    assert not [folder for folder in leftovers(cache) if folder.name.startswith(".part")]


def test_a_member_larger_than_declared_is_stopped(tmp_path: Path, cache: Path) -> None:
    path = make_zip(tmp_path / "x.zip", {"zeros": bytes(10**6)})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.index(signature) + offset, 100)
    path.write_bytes(data)
    with pytest.raises(DataError, match="is not a sound zip archive"):
        unpack(path)
    assert leftovers(cache) == []


def test_not_a_zip_and_truncated(tmp_path: Path) -> None:
    (tmp_path / "no.zip").write_bytes(b"I am no archive")
    path = make_zip(tmp_path / "cut.zip", {"a": b"1" * 1000})
    path.write_bytes(path.read_bytes()[:-30])
    for name in ("no.zip", "cut.zip"):
        with pytest.raises(DataError, match=rf"{name}: is not a sound zip archive"):
            unpack(tmp_path / name)


def test_names_in_cp949_utf8_and_nfd(tmp_path: Path) -> None:
    utf8, nfd = "강아지.jpg", unicodedata.normalize("NFD", "토끼.jpg")
    names = ["고양이.jpg".encode("cp949"), utf8.encode(), nfd.encode(), b"caf\x82.jpg"]
    folder = unpack(make_raw_named_zip(tmp_path / "x.zip", names))
    assert set(contents(folder)) == {"고양이.jpg", utf8, nfd, "café.jpg"}


@pytest.mark.parametrize(
    ("encoding", "names"),
    [
        ("cp949", ["사진/고양이 1.jpg", "사진/강아지.jpg"]),
        ("cp932", ["写真/ネコ.jpg", "写真/イヌ.jpg"]),
        ("gb18030", ["老虎/1.jpg", "狮子/2.jpg", "大象/3.jpg"]),
        ("cp866", ["Кошка/1.jpg", "Собака/2.jpg"]),
        ("cp850", ["Bär/1.jpg", "Löwe/2.jpg"]),
        ("cp1253", ["γάτα/1.jpg", "σκύλος/2.jpg"]),
    ],
)
def test_names_in_the_encoding_of_any_region(
    encoding: str, names: list[str], tmp_path: Path
) -> None:
    path = make_raw_named_zip(tmp_path / "x.zip", [name.encode(encoding) for name in names])
    folder = unpack(path)
    assert set(contents(folder)) == set(names) == set(member_names(path))
    [note] = name_notes(folder / names[0].split("/")[0], "x.zip")
    assert note.startswith(f"x.zip: names read as {encoding}, by their letters")
    assert set(contents(unpack(path, encoding))) == set(names)
    assert set(contents(unpack(path, "latin-1"))) != set(names)


def test_unicode_names_need_no_word(tmp_path: Path) -> None:
    folder = unpack(make_raw_named_zip(tmp_path / "x.zip", ["고양이.jpg".encode(), b"a.jpg"]))
    assert name_notes(folder, "x.zip") == []


def test_the_name_that_info_zip_writes_beside_an_older_one(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for old, name, of in (("A__.jpg", "Ägypten.jpg", "A__.jpg"), ("b.jpg", "x.jpg", "y")):
            info = zipfile.ZipInfo(old)
            field = b"\x01" + struct.pack("<L", zlib.crc32(of.encode())) + name.encode()
            info.extra = struct.pack("<HH", 0x7075, len(field)) + field
            file.writestr(info, "x")
    assert set(contents(unpack(tmp_path / "x.zip"))) == {"Ägypten.jpg", "b.jpg"}


def test_flagged_utf8_names(tmp_path: Path) -> None:
    folder = unpack(make_zip(tmp_path / "한글 이름.zip", {"사진 1/고양이.jpg": b"x"}))
    assert contents(folder) == {"사진 1/고양이.jpg": b"x"}


DAY = 24 * 3600


def part(cache: Path, name: str, age: float) -> Path:
    """A folder as a process that was killed leaves it, not touched for `age` seconds."""
    folder = cache / "unpacked" / name
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_bytes(b"half")
    os.utime(folder, times=(time.time() - age,) * 2)
    return folder


def age(folder: Path) -> float:
    return time.time() - folder.stat().st_mtime


def test_what_a_killed_unpack_left_is_removed_after_a_day(tmp_path: Path, cache: Path) -> None:
    part(cache, ".part-dead", DAY + 60)
    young = part(cache, ".part-live", DAY - 60)
    old = part(cache, "0123abcd", 9 * DAY)
    folder = unpack(make_zip(tmp_path / "x.zip", {"a.txt": b"one"}))
    assert sorted(leftovers(cache)) == sorted([young, old, folder])


def test_a_long_unpack_keeps_its_folder_young(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = archive._extract
    ages: list[float] = []

    def slow(file: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path, is_dir: bool) -> None:
        extract(file, info, path, is_dir)
        (aside,) = (cache / "unpacked").glob(".part-*")
        ages.append(age(aside))
        os.utime(aside, times=(time.time() - 2 * DAY,) * 2)

    monkeypatch.setattr(archive, "_extract", slow)
    rename = Path.rename

    def publish(part: Path, target: Path) -> Path:
        ages.append(age(part))
        return rename(part, target)

    monkeypatch.setattr(Path, "rename", publish)
    unpack(make_zip(tmp_path / "x.zip", {f"a/{i}.txt": b"one" for i in range(3)}))
    assert len(ages) == 4
    assert max(ages[1:]) < DAY / 2


def test_stale_folders_of_others_do_not_stop_an_unpack(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part(cache, ".part-dead", 2 * DAY)

    def gone(*_: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "lstat", gone)  # another process removes them at the same time
    assert unpack(make_zip(tmp_path / "x.zip", {"a.txt": b"one"})).is_dir()
