"""The end of a sweep by a signal or with its cluster, in order where that works, else by force.

A dead Ray answers no call, and Python hears no signal while it waits in one: a thread hears it at
once, says how to go on, and ends the process where an orderly end takes too long.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

_FORCED_AFTER = 20.0  # seconds from a signal; Slurm kills after 30
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_INTERRUPTED = 130
_log = logging.getLogger("foldrace")


class Ending:
    """Hears Ctrl-C, SIGTERM and a closed terminal for a block.

    The first asks the sweep to end in order, a second Ctrl-C ends the process at once.
    """

    def __init__(self, say: Callable[[str], None], go_on: str) -> None:
        """`say` prints a line on the terminal, from any thread; `go_on` tells how to resume."""
        self._say, self._go_on = say, go_on
        self.interrupted = False
        """True once a signal has come."""
        self._forced: threading.Timer | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> Ending:
        self._stack = contextlib.ExitStack()
        ours, theirs = socket.socketpair()
        ours.setblocking(False)  # Python writes into it from its signal handler
        self._stack.callback(theirs.close)
        self._stack.callback(ours.close)
        before = signal.set_wakeup_fd(ours.fileno(), warn_on_full_buffer=False)
        self._stack.callback(signal.set_wakeup_fd, before)
        for number in _SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) is not signal.SIG_DFL:
                continue  # nohup
            self._stack.callback(signal.signal, number, signal.signal(number, self._handle))
        threading.Thread(target=self._listen, args=(theirs,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._forced is not None:
                self._forced.cancel()
        self._stack.close()

    def force_within(self, seconds: float, exit_code: int, text: str) -> None:
        """End the process after so many seconds, unless the block has been left by then."""
        with self._lock:
            if self._forced is None:
                self._forced = threading.Timer(seconds, self._force, (exit_code, text))
                self._forced.daemon = True
                self._forced.start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._hear(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _listen(self, heard: socket.socket) -> None:
        while numbers := heard.recv(64):
            for number in numbers:
                if number in _SIGNALS:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        with self._lock:
            if self.interrupted:
                return
            self.interrupted = True
        name = signal.Signals(number).name
        _log.warning("interrupted by %s: ending the running trials", name)
        self._say(f"interrupted: ending the running trials; {self._go_on}")
        self.force_within(_FORCED_AFTER, _INTERRUPTED, f"interrupted; {self._go_on}")

    def _force(self, exit_code: int, text: str) -> None:
        _log.error("the orderly end took too long: the process is ended")
        faulthandler.dump_traceback()  # to ray.log: where it hangs
        self._say(text)
        os._exit(exit_code)
