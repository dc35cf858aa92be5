"""A real HTTP server that takes a webhook's posts, and the events that a command has written."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SECRET = "T0P-s3cret"
"""Part of each server's URL."""


class Hook:
    """A server at `url`, and what was posted to it."""

    def __init__(self, status: int = 200, waits: float = 0.0) -> None:
        """It answers with `status` after so many seconds."""
        self.got: list[tuple[str, str, str]] = []  # path, content type, body
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                hook.got.append((self.path, self.headers["Content-Type"], body))
                time.sleep(waits)
                self.send_response(status, f"no {self.path}")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}"

    @property
    def events(self) -> list[Any]:
        """The events in the order in which they came."""
        return [json.loads(body) for *_, body in self.got]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def told_to(path: Path) -> list[Any]:
    """The events in a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
