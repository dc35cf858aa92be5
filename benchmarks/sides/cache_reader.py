"""One trial's reader of the pixel cache, as a process: goes through it once, then says what it
holds in memory when it is asked.

Takes the list of files on its first line of input (JSON), gives one JSON line: kilobytes.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from trainables.pixel_cache import open_images


def _pixel_map() -> dict[str, int]:
    """Rss and Pss of the mapped pixels, in kB."""
    found: dict[str, int] = {}
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=8)
    for block in blocks:
        if block.partition("\n")[0].endswith("pixels.bin"):
            for name in ("Rss", "Pss"):
                match = re.search(rf"^{name}:\s+(\d+) kB", block, flags=re.MULTILINE)
                found[name] = found.get(name, 0) + int(match[1] if match else 0)
    return found


def _total_pss() -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    match = re.search(r"^Pss:\s+(\d+) kB", text, flags=re.MULTILINE)
    return int(match[1]) if match else 0


def main() -> None:
    given = json.loads(sys.stdin.readline())
    source = open_images([Path(file) for file in given["files"]], given["size"], 1)
    checksum = sum(int(source.image(row).sum()) for row in range(len(source)))
    print(checksum, flush=True)
    sys.stdin.readline()  # all have read
    pixels = _pixel_map()
    print(json.dumps({"rss": pixels["Rss"], "pss": pixels["Pss"], "total": _total_pss()}))
    sys.stdout.flush()
    sys.stdin.readline()  # all have looked


if __name__ == "__main__":
    main()
