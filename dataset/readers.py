"""Files that hold tables: separated text in any encoding, JSON lines, Parquet.

Takes a file, gives its records as text with their lines, or adds problems to it. A new form is one
function and its row in `READERS`. The text reader is ours, not pandas': a message names the line
of the user's file, and names of images may hold bytes that are not UTF-8, which pandas cannot.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foldrace.config.texts import load_json
from foldrace.core.errors import Problem, cause
from foldrace.core.opening import GB, UnfitFile, open_regular, read_regular, unreadable

Records = list[tuple[int, list[str]]]
"""Line and cells of each record of a table, the header first."""

MOST_BYTES = 2 * GB
"""Size of the largest table that is read; 100,000 rows of 1,000 probabilities have 1 GB."""
MOST_CELLS = 120_000_000
"""Cells of the largest table."""
_FREE_CELLS, _CELLS_PER_BYTE = 10_000_000, 20  # beyond which a file is made to fill the memory
_TEXTS = ("string", "large_string", "binary", "large_binary")

_DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
_HEAD = 65_536  # characters that tell what stands between the cells
_MOST_LETTERS = 2_000  # letters beyond ASCII that tell the encoding
_WORDS = re.compile(r"[^\W\d_]+|[^\x00-\x7f]")
_TURNED = re.compile("[a-z\u00df-\u00f6\u00f8-\u00ff\u0430-\u044f\u03ac-\u03ce][A-Z]")
_LEAST_LIKENESS = 0.3  # below it the letters are those of no known encoding
_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    *((b"\xff\xfe\0\0", "utf-32"), (b"\0\0\xfe\xff", "utf-32")),
    *((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")),
)


@dataclass
class TableFile:
    """A file that is to be read, and what is found out on the way."""

    path: Path
    name: str
    """What messages call it."""
    encoding: str | None
    """The user's, for text that is not UTF-8; None: found by the letters."""
    problems: list[Problem]
    delimiter: str = ","
    """What stands between the cells, where it is text."""
    notes: list[str] = field(default_factory=list)
    """Lines for the user: what was taken for what."""

    def fault(self, message: str) -> None:
        """Add a problem of this file."""
        self.problems.append(Problem(self.name, message))


def _separated(file: TableFile) -> Records | None:
    text = _text(file)
    if text is None:
        return None
    file.delimiter = delimiter = _delimiter(text)
    if _too_many(file, text.count(delimiter), len(text)):
        return None
    if delimiter not in (",", "\t"):
        file.notes.append(f"{file.name}: {_DELIMITERS[delimiter]} between the cells")
    records: Records = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    start = 1
    try:
        for cells in reader:
            if cells:  # an empty line gives an empty record
                records.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        file.fault(f'line {start} is not valid CSV: {error}; put values with , or " in quotes')
        return None
    return records


def _delimiter(text: str) -> str:
    """What stands between the cells: the first that divides each line into as many."""
    header = []
    for delimiter in _DELIMITERS:
        counts = _cell_counts(text, delimiter)
        if counts and counts[0] > 1:
            header.append(delimiter)
            if len(set(counts)) == 1:
                return delimiter
    return header[0] if header else ","


def _cell_counts(text: str, delimiter: str) -> list[int]:
    head = text[:_HEAD]
    reader = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
    try:
        counts = [len(cells) for cells in reader if cells]
    except csv.Error:
        return []
    return counts[:-1] if len(text) > _HEAD and len(counts) > 1 else counts  # the last may be cut


def _json_lines(file: TableFile) -> Records | None:
    text = _text(file)
    if text is None:
        return None
    rows: list[tuple[int, dict[str, object]]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = load_json(line)
        except ValueError as error:
            file.fault(f"line {number} is not valid JSON: {error}; needed: one object a line")
            return None
        if not isinstance(row, dict):
            file.fault(f"line {number} holds {type(row).__name__}; needed: one object a line")
            return None
        rows.append((number, row))
    header = list(dict.fromkeys(key for _, row in rows for key in row))
    if _too_many(file, len(header) * len(rows), len(text)):
        return None
    body = [(number, [_cell(row.get(key)) for key in header]) for number, row in rows]
    return [(0, header), *body]


def _cell(value: object) -> str:
    """A value as text; '' where it is missing."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _parquet(file: TableFile) -> Records | None:
    import pyarrow.parquet  # takes a quarter of a second

    try:
        with open_regular(file.path, MOST_BYTES) as opened:
            size = os.fstat(opened.fileno()).st_size
            found = pyarrow.parquet.read_metadata(opened)
            groups = [found.row_group(i) for i in range(found.num_row_groups)]
            values = sum(g.column(i).num_values for g in groups for i in range(g.num_columns))
            if _too_many(file, max(values, found.num_rows), size):
                return None
            # A text that is there a million times stands in the file once, and does so here.
            texts = [f.name for f in found.schema.to_arrow_schema() if _is_text(f.type)]
            opened.seek(0)
            table = pyarrow.parquet.ParquetFile(opened, read_dictionary=texts).read()
        names = [str(name) for name in table.column_names]
        columns = [_column_cells(column) for column in table.columns]
    except UnfitFile as error:
        file.fault(unreadable(error))
        return None
    except Exception as error:  # whatever its parser stumbles over
        file.fault(f"cannot be read as Parquet: {cause(error)}")
        return None
    rows = zip(*columns, strict=True)
    return [(0, names), *((number, list(row)) for number, row in enumerate(rows, start=1))]


def _too_many(file: TableFile, cells: int, size: int) -> bool:
    """True, with a fault, where `size` bytes stand for more cells than are read of so many."""
    most = min(MOST_CELLS, max(_FREE_CELLS, _CELLS_PER_BYTE * size))
    if cells > most:
        file.fault(f"has {cells:,} cells in {size:,} bytes; allowed: {most:,}")
    return cells > most


def _is_text(kind: Any) -> bool:
    import pyarrow

    return any(getattr(pyarrow.types, f"is_{name}")(kind) for name in _TEXTS)


def _column_cells(column: Any) -> list[str]:
    """A column as texts; ValueError for pictures that are stored in the table itself."""
    cells: list[str] = []
    for chunk in column.chunks:
        words = getattr(chunk, "dictionary", chunk).to_pylist()
        if any(isinstance(v, bytes) or (isinstance(v, dict) and "bytes" in v) for v in words[:20]):
            raise ValueError(
                "it holds the pictures themselves; write them to files and a column of their paths"
            )
        words = [_cell(word) for word in words]
        if hasattr(chunk, "dictionary"):
            words = ["" if i is None else words[i] for i in chunk.indices.to_pylist()]
        cells += words
    return cells


READERS: dict[str, Callable[[TableFile], Records | None]] = {
    ".csv": _separated,
    ".tsv": _separated,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
}
"""Readers of users' tables by suffix; one that fails adds problems and gives None."""

TABLE_KINDS = ", ".join(READERS)


def read_records(file: TableFile) -> Records | None:
    """The records of a file by its reader; of a file with another suffix, as separated text."""
    return READERS.get(file.path.suffix.lower(), _separated)(file)


def is_table(path: Path) -> bool:
    """True for the name of a file that `read_records` reads."""
    return path.suffix.lower() in READERS


def _text(file: TableFile) -> str | None:
    try:
        data = read_regular(file.path, MOST_BYTES)
    except OSError as error:
        file.fault(unreadable(error))
        return None
    encoding = _sure_encoding(data) or file.encoding
    if encoding is None:
        encoding = likely_encoding(data)
        if encoding is not None:
            file.notes.append(
                f"{file.name}: read as {encoding}, by its letters; data.encoding names another"
            )
    if encoding is None:
        file.fault(
            "is text in no encoding that is known by its letters; name it: data.encoding: cp1252, "
            "or save the table as UTF-8"
        )
        return None
    try:
        return data.decode(encoding)
    except UnicodeError as error:
        file.fault(f"is not text in {encoding}: {error}; set data.encoding, or save it as UTF-8")
        return None


def _sure_encoding(data: bytes) -> str | None:
    """The encoding that the bytes themselves give away, or None."""
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return encoding
    if b"\0" in data[:_HEAD]:  # every second byte of UTF-16 is one where letters are ASCII
        even, odd = data[:_HEAD:2].count(0), data[1:_HEAD:2].count(0)
        wide = "utf-16-be" if even > odd else "utf-16-le"
        return wide if max(even, odd) > 8 * min(even, odd) else None
    try:
        data.decode()
    except UnicodeDecodeError:
        return None
    return "utf-8"


def likely_encoding(data: bytes) -> str | None:
    """The older encoding whose usual letters the bytes are best read as, or None.

    Statistics of whole texts (chardet, charset_normalizer) fail on tables: a few names in words
    of other alphabets. Here a letter counts that its alphabet uses often, beside its own kind.
    """
    best, found = _LEAST_LIKENESS, None
    if b"\0" in data:  # no text
        return None
    for encoding, weight, own_words in _ALPHABETS:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        likeness = _likeness(text, weight, own_words)
        if likeness > best:
            best, found = likeness, encoding
    return found


def _likeness(text: str, weight: Callable[[str], float], own_words: bool) -> float:
    """Mean weight of the letters beyond ASCII, from -1 to 1; 0 where there are none."""
    weights: list[float] = []
    for match in _WORDS.finditer(text):
        word = match[0]
        if word.isascii():
            continue
        ascii_letters = sum(letter.isascii() for letter in word)
        # An é stands among ASCII letters; a ж, a 猫 does not.
        odd = bool(ascii_letters) if own_words else len(word) > 2 * ascii_letters + 1
        turned = _TURNED.search(word) is not None
        turned = turned or (word[-1].isupper() and not word.isupper())
        for letter in word:
            if not letter.isascii():
                weights.append(-0.5 if odd or turned else weight(letter))
        if len(weights) > _MOST_LETTERS:
            break
    return sum(weights) / len(weights) if weights else 0.0


def _hangul(letter: str) -> float:
    code = ord(letter) - 0xAC00
    if not 0 <= code < 11_172:
        return 0.0 if "\u4e00" <= letter <= "\u9fff" else -0.5
    try:
        letter.encode("euc_kr")  # the 2,350 syllables that are in use
    except UnicodeEncodeError:
        return -0.5
    vowel, final = code // 28 % 21, code % 28
    often = (vowel in (0, 1, 4, 5, 6, 8, 13, 18, 20), final in (0, 1, 4, 8, 16, 17, 19, 21))
    return 0.4 + 0.3 * sum(often)


def _japanese(encoding: str, common: range) -> Callable[[str], float]:
    kanji = _by_lead_byte(encoding, common, 0.8)
    return lambda letter: 1.0 if "\u3041" <= letter <= "\u30ff" else kanji(letter)


def _by_lead_byte(encoding: str, common: range, most: float) -> Callable[[str], float]:
    """Weights of ideographs, of which each encoding has the common ones in front."""

    def weight(letter: str) -> float:
        if not "\u4e00" <= letter <= "\u9fff":
            return 0.0 if "\u3000" <= letter <= "\u303f" or "\uff01" <= letter <= "\uff5e" else -0.5
        return most if letter.encode(encoding)[0] in common else 0.1

    return weight


def _letters(often: str, others: str) -> Callable[[str], float]:
    """Weights of an alphabet: letters used often, the others; capitals count a little less."""

    def weight(letter: str) -> float:
        small = letter.lower()
        value = 1.0 if small in often else 0.5 if small in others else -0.5
        return value - 0.2 if letter != small else value

    return weight


_CYRILLIC = _letters("оеаинтсрвлкмдпу", "бгжзйфхцчшщъыьэюяёіїєґ")
_GREEK = _letters("αοιετσςνηυρπκμλάέήίόύώ", "βγδζθξφχψω")
_WESTERN = _letters("äöüéèàçñáíóúâêîôûåæøßãõ", "ëïìòùœý¿¡")
_CENTRAL = _letters("áéíóúýčěřšžůąęłśżźćńőű", "ďťňľĺŕäöüôđăâîșțşţ")
_TURKISH = _letters("çğıöşüİ", "âîû")
_HEBREW = _letters("אבדהוילמנרשת", "גזחטכסעפצקםןץףך")
_ARABIC = _letters("ابةتدرسعفقكلمنهوي", "ثجحخذزشصضطظغىأإآءپچژگؤئ")
_THAI = _letters("กคงดตทนปมรลวสอหาิีุเแไั่้", "".join(map(chr, range(0x0E01, 0x0E5C))))

_ALPHABETS: tuple[tuple[str, Callable[[str], float], bool], ...] = (
    ("cp949", _hangul, True),
    ("cp932", _japanese("cp932", range(0x88, 0x98)), True),
    ("gb18030", _by_lead_byte("gb18030", range(0xB0, 0xD8), 0.85), True),
    ("big5", _by_lead_byte("big5", range(0xA4, 0xC7), 0.85), True),
    ("euc_jp", _japanese("euc_jp", range(0xB0, 0xD0)), True),
    ("cp1252", _WESTERN, False),
    ("cp1251", _CYRILLIC, True),
    ("cp866", _CYRILLIC, True),
    ("koi8-r", _CYRILLIC, True),
    ("cp1253", _GREEK, True),
    ("cp737", _GREEK, True),
    ("cp1250", _CENTRAL, False),
    ("cp1254", _TURKISH, False),
    ("cp850", _WESTERN, False),
    ("cp1255", _HEBREW, True),
    ("cp1256", _ARABIC, True),
    ("cp874", _THAI, True),
)
"""Encoding, the weight of its letters, and whether its words hold no ASCII letters."""
