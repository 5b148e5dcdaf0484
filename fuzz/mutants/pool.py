"""Tasks side by side, each in a process forked from this one: it has all that this one has, and may crash or hang."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from fuzz.processes import die_with_parent

ENDED, DIED, SILENT, STOPPED = "ended", "died", "timeout", "stopped"

Work = Callable[[Callable[[Any], None]], None]
"""What a task does. It is given a function that sends a message, anything that can be pickled."""


@dataclass
class Child:
    key: Any
    process: Any
    receiving: Connection
    heard: float  # when
    messages: list = field(default_factory=list)


def side_by_side(
    tasks: Iterable[tuple[Any, Work]], jobs: int, silence: float, until: float
) -> Iterator[tuple[Any, list, str]]:
    """For each task, as it ends: its key, its messages, and how it ended.

    silence: seconds without a message until a task is killed. until: the time, of `time.monotonic`, at which all are.
    No task begins after that.
    """
    gc.collect()
    gc.freeze()  # a collection in a child would copy the pages of all that it shares
    waiting, running = iter(tasks), {}
    try:
        while True:
            while len(running) < jobs and time.monotonic() < until and (task := next(waiting, None)):
                child = start(*task)
                running[child.receiving] = child
            if not running:
                return
            last = min(min(child.heard for child in running.values()) + silence, until)
            ready = wait(list(running), max(0.0, last - time.monotonic()))
            now = time.monotonic()
            for child in list(running.values()):
                how = heard(child, now) if child.receiving in ready else None
                if how is None and now >= until:
                    how = STOPPED
                if how is None and now >= child.heard + silence:
                    how = SILENT
                if how is not None:
                    del running[child.receiving]
                    end(child)
                    yield child.key, child.messages, how
    finally:
        for child in running.values():
            end(child)
        gc.unfreeze()


def start(key, work: Work) -> Child:
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=do, args=(work, sending, os.getpid()), daemon=True)
    process.start()
    sending.close()
    return Child(key, process, receiving, time.monotonic())


def do(work: Work, sending: Connection, parent: int) -> None:
    die_with_parent(parent)
    # By value: what multiprocessing makes of tensors keeps a file open for each.
    work(lambda message: sending.send_bytes(pickle.dumps(message)))


def heard(child: Child, now: float) -> str | None:
    """Takes one message. How the child ended, if it did."""
    try:
        child.messages.append(pickle.loads(child.receiving.recv_bytes()))
        child.heard = now
        return None
    except EOFError:
        child.process.join()
        return DIED if child.process.exitcode else ENDED


def end(child: Child) -> None:
    child.process.kill()
    child.process.join()
    child.receiving.close()
