"""Tasks side by side, each in a process forked from this one: it has all that this one has, and may crash or hang."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fuzz.processes import die_with_parent

ENDED, DIED, SILENT, STOPPED = "ended", "died", "timeout", "stopped"

LOOK = 0.5  # seconds between two looks at all tasks

Work = Callable[[Callable[[Any], None]], None]
"""What a task does. It is given a function that sends a message, anything that can be pickled."""


WAITS = 10  # times the CPU time of a task that is silent, in which it may wait for a CPU or for another process


@dataclass
class Child:
    """heard: when it sent the last message, and what CPU time it had used then."""

    key: Any
    process: Any
    receiving: Connection
    heard: tuple[float, float]
    messages: list = field(default_factory=list)

    def is_silent(self, silence: float, now: float) -> bool:
        """A busy machine makes a task slow, not wrong: so its CPU time counts."""
        when, used = self.heard
        return now - when >= silence and (
            cpu_seconds(self.process.pid) - used >= silence or now - when >= WAITS * silence
        )


def cpu_seconds(pid: int) -> float:
    """That a process and those that it has waited for have used; infinite where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.inf
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def side_by_side(
    tasks: Iterable[tuple[Any, Work]], jobs: int, silence: float, until: float
) -> Iterator[tuple[Any, list, str]]:
    """For each task, as it ends: its key, its messages, and how it ended.

    silence: seconds of CPU time without a message until a task is killed, or `WAITS` times as many of any time. until:
    the time, of `time.monotonic`, at which all are. No task begins after that.
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
            ready = wait(list(running), max(0.0, min(LOOK, until - time.monotonic())))
            now = time.monotonic()
            for child in list(running.values()):
                how = heard(child, now) if child.receiving in ready else None
                if how is None and now >= until:
                    how = STOPPED
                if how is None and child.is_silent(silence, now):
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
    return Child(key, process, receiving, (time.monotonic(), 0.0))


def do(work: Work, sending: Connection, parent: int) -> None:
    die_with_parent(parent)
    # By value: what multiprocessing makes of tensors keeps a file open for each.
    work(lambda message: sending.send_bytes(pickle.dumps(message)))


def heard(child: Child, now: float) -> str | None:
    """Takes one message. How the child ended, if it did."""
    try:
        child.messages.append(pickle.loads(child.receiving.recv_bytes()))
        child.heard = now, cpu_seconds(child.process.pid)
        return None
    except EOFError:
        child.process.join()
        return DIED if child.process.exitcode else ENDED


def end(child: Child) -> None:
    child.process.kill()
    child.process.join()
    child.receiving.close()
