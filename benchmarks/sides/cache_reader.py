"""A process that reads the whole pixel cache once, then says what it holds in memory when it is
asked. Without files it opens no image source: what such a process weighs by itself.

Takes the list of files on its first line of input (JSON), gives one JSON line: kilobytes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from foldrace.trainables.data.pixel_cache import open_images


def _mapped_pixels() -> int:
    """Resident kB of the map of the pixels."""
    blocks = re.split(
        r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.M
    )
    maps = [block for block in blocks if block.partition("\n")[0].endswith("pixels.bin")]
    return sum(int(kb) for block in maps for kb in re.findall(r"^Rss:\s+(\d+) kB", block, re.M))


def _total_pss() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    match = re.search(r"^Pss:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(match[1]) if match else 0


def main() -> None:
    given = json.loads(sys.stdin.readline())
    checksum = 0
    if given["files"]:
        source = open_images([Path(file) for file in given["files"]], given["size"], 1)
        checksum = sum(int(source.image(row).sum()) for row in range(len(source)))
    print(checksum, flush=True)
    sys.stdin.readline()  # all have read
    print(json.dumps({"mapped": _mapped_pixels(), "pss": _total_pss()}), flush=True)
    sys.stdin.readline()  # all have looked


if __name__ == "__main__":
    main()
