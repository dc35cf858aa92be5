"""Files that are programs, under the names of images, are never run, and never opened as images."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import EpsImagePlugin, Image

from foldrace.dataset.images import ImageError, check_image, decode_rgb, pixel_size

EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    b"(marker) (w) file closefile showpage\n%%EOF\n"
)
PROGRAMS = {
    "EPS": EPS,
    "EPS in a DOS binary": b"\xc5\xd0\xd3\xc6\x1e\0\0\0" + len(EPS).to_bytes(4, "little")
    + bytes(18) + EPS,
    "PDF": b"%PDF-1.4\n1 0 obj<</Type/Catalog/OpenAction<</S/Launch>>>>endobj\n%%EOF\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'><script>x</script></svg>",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(40),
    "MPEG": b"\0\0\x01\xb3\x01\x00\x10\x13" + bytes(20),
}  # fmt: skip


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that is there once anything has started Ghostscript, or what else draws programs."""
    path = tmp_path / "marker"
    for name in ("gs", "inkscape", "convert", "rsvg-convert", "pdftoppm"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho 10.0 | tee -a {path}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # where it was, Pillow remembers
    return path


def test_pillow_alone_would_start_one(marker: Path) -> None:
    with pytest.raises(OSError):  # what it starts here draws nothing
        Image.open(io.BytesIO(EPS)).load()
    assert marker.exists()


@pytest.mark.parametrize("kind", sorted(PROGRAMS))
def test_files_that_are_programs_are_never_opened(kind: str, marker: Path, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(PROGRAMS[kind])
    for read in (check_image, decode_rgb):
        with pytest.raises(ImageError, match="is not an image of a supported kind"):
            read(PROGRAMS[kind], path)
    assert pixel_size(path) is None
    assert not marker.exists()
