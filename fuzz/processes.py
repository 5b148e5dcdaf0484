"""Signals, and processes that end with their parent."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts(stop: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `stop`; a second one acts as it would anywhere."""

    def handle(number: int, frame) -> None:
        if stop.is_set():
            signal.signal(number, before[number])
            signal.raise_signal(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def die_with_parent(parent: int) -> None:
    """Asks Linux to kill this process when its parent dies, so that `kill -9` of a campaign leaves no worker behind.

    parent: the id of the process that started this one. Where that process is gone already, this one ends at once:
    call this function before any slow import.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
