"""Saves a finding in processes that are killed, at every step of the way and at random moments; reports what is left.

`python killed_writer.py FOLDER`: one line of JSON for each kill. A writer kills itself before a line of
`fuzz.campaign.findings` is run and before the operating system is asked for anything to do with files, at the first of
these moments, at the second, and so on; or it writes again and again until it is killed from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fuzz.campaign import findings
from fuzz.campaign.findings import Failure
from fuzz.cases import inputs
from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES

TARGET = "wrong_targets:last_row_dropped"
FILES = {"case.json", "original.json", "inputs.safetensors", "finding.json", "repro.py"}
NAME = "a-finding"


def a_case(tokens: int) -> Case:
    return Case(
        seq_lens=(tokens,),
        heads=1,
        packed=False,
        cu_seqlens_dtype="int64",
        lower_bound=-5.0,
        scale=1.0,
        initial_state=None,
        final_state=None,
        in_place=False,
        layout="contiguous",
        seed=1,
        **{name: families[0] for name, families in FAMILIES.items()},
    )


CASES = {"first": a_case(5), "second": a_case(3)}
INPUTS = {name: inputs.make_inputs(case) for name, case in CASES.items()}


def save(folder: Path, which: str) -> None:
    check = {"name": "accuracy", "passed": False, "errors": {"out": 1.0}, "bounds": {"out": 0.1}, "detail": which}
    failure = Failure(CASES[which], TARGET, check, ())
    findings.save(
        folder,
        failure,
        CASES["first"],
        environment={},
        state="shrunk" if which == "second" else "waiting",
        write_inputs=lambda path: inputs.save_inputs(path, INPUTS[which]),
    )


def die_at(moment: int) -> None:
    """Has this process kill itself at that moment from now on, counted from 0."""
    left = moment

    def count() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame, event, argument):
        if frame.f_code.co_filename != findings.__file__:
            return None
        if event == "line":
            count()
        return trace

    def audit(event: str, arguments: tuple) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            count()

    sys.addaudithook(audit)
    sys.settrace(trace)


def in_child(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def was_killed(child: int) -> bool:
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def left_behind(root: Path) -> str:
    """ "nothing", "first" or "second" when that finding is there and whole, or what is wrong."""
    findings.recover(root)
    folder = root / NAME
    if not folder.exists():
        return "nothing"
    try:
        (saved,) = findings.find(root)
        (which,) = [name for name, case in CASES.items() if case == saved.case]
        assert saved.path == folder and {path.name for path in folder.iterdir()} == FILES
        assert saved.finding["detail"] == which and saved.finding["shrunk"] == (which == "second")
        assert findings.load_case_file(folder / "original.json").case == CASES["first"]
        assert inputs.load_inputs(saved.inputs).digest() == INPUTS[which].digest()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return which


def fresh(root: Path, before: str) -> None:
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    if before != "nothing":
        save(root / NAME, before)


def every_moment(root: Path, before: str):
    """Kills at every moment of saving the second finding over the first, or the first where there is none."""
    moment = 0
    killed = True
    while killed:
        fresh(root, before)
        which = "second" if before == "first" else "first"

        def body(moment=moment, which=which) -> None:
            die_at(moment)
            save(root / NAME, which)

        killed = was_killed(in_child(body))
        yield {"before": before, "moment": moment if killed else None, "after": left_behind(root)}
        moment += 1


def random_moments(root: Path, count: int):
    """Kills while the two findings are written one over the other, again and again: after none, one or two of them, and
    a moment more, so that a busy machine, which may not get far in a moment, shows the same.
    """
    fresh(root, "first")
    began = time.monotonic()
    save(root / NAME, "first")
    longest = 3 * (time.monotonic() - began)  # after that, each moment is as likely as any other
    draw = random.Random(0)

    written, write = os.pipe()

    def body() -> None:
        while True:
            for which in ("second", "first"):
                save(root / NAME, which)
                os.write(write, b".")

    for _ in range(count):
        child = in_child(body)
        for _ in range(draw.randrange(3)):
            os.read(written, 1)
        time.sleep(draw.uniform(0.0, longest))
        os.kill(child, signal.SIGKILL)
        assert was_killed(child)
        os.set_blocking(written, False)
        with contextlib.suppress(BlockingIOError):
            os.read(written, 1 << 16)  # of this child
        os.set_blocking(written, True)
        yield {"before": "either", "moment": "random", "after": left_behind(root)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    root, survivors = folder / "findings", folder / "survivors"
    survivors.mkdir(parents=True)
    for results in (every_moment(root, "nothing"), every_moment(root, "first"), random_moments(root, 60)):
        for result in results:
            print(json.dumps(result))
            kept = survivors / f"{result['before']}-{result['after']}"
            if result["after"] in CASES and not kept.exists():
                shutil.copytree(root / NAME, kept)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
