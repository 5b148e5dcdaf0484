"""Judging of mutants: each on one case after another, until a check fails that passes on the original.

Every mutant runs in a process of its own, forked from one that has the cases, the oracle's results and what the
original makes of them. A mutant may crash, hang or write anywhere.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fuzz.cases.case import Case
from fuzz.cases.drawing import all_cases
from fuzz.cases.inputs import Inputs, make_inputs
from fuzz.cases.plain import PLAIN
from fuzz.judging.call import Outputs, bits, run_target
from fuzz.judging.judge import judge
from fuzz.judging.properties import choose
from fuzz.judging.sensitivity import Reference, reference
from fuzz.mutants import kernel
from fuzz.mutants.rules import MODEL, ROOT, Mutant
from fuzz.targets.adapter import writing
from fuzz.targets.registry import Target

KILLED, SURVIVED, EQUIVALENT, INVALID = "killed", "survived", "equivalent", "invalid"

SMALL_TOKENS = 160  # times heads, of a case for the emulator: a call takes a tenth of a second for 32
LONG = replace(PLAIN, seq_lens=(650,), packed=True, scale=0.25, seed=1, gates="weak")
"""The case in which a missing wait has to show: every stage of every pipeline is used again and again."""

ORDERS = 6  # of threads and copies, in which it is tried


@dataclass(frozen=True)
class Known:
    """A case with what mutants are compared with."""

    case: Case
    inputs: Inputs
    reference: Reference
    properties: tuple[str, ...]
    right: Outputs


@dataclass(frozen=True)
class Result:
    """What became of one mutant. check, cases: what killed it, and after how many cases (cases judged, otherwise)."""

    id: str
    file: str
    line: int
    rule: str
    old: str
    new: str
    outcome: str
    check: str = ""
    cases: int = 0
    detail: str = ""


def cases(seed: int, count: int, emulated: bool) -> Iterator[Case]:
    """As a campaign of that seed draws them; for the emulator the small ones, and the long one after ten of these."""
    given = 0
    for case in all_cases("cpu", seed):
        if given == count:
            return
        if emulated and given == min(10, count - 1):
            given += 1
            yield LONG
        elif not emulated or (0 < case.tokens * case.heads <= SMALL_TOKENS and case.n_seqs <= 8):
            given += 1
            yield case


def known(target: Target, drawn: Iterator[Case], properties: int) -> Iterator[Known]:
    for case in drawn:
        inputs = make_inputs(case)
        # The emulator takes too long for some properties, and 2^31 elements.
        chosen = () if case == LONG else tuple(each for each in choose(case, properties) if each != "wide_offsets")
        yield Known(case, inputs, reference(inputs, "cpu"), chosen, run_target(target, inputs))


def model_with(mutant: Mutant | None) -> Target:
    """The model from its source, behind the checks of arguments. Raises SyntaxError or what the module raises."""
    from flash_kda.arguments import check_arguments

    text = (ROOT / MODEL).read_text()
    module = types.ModuleType("flash_kda_mutant")
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(compile(mutant.apply(text) if mutant else text, MODEL, "exec"), vars(module))
    return Target("mutant", writing(module.forward, check_arguments), "cpu")


def original(emulated: bool, folder: Path) -> Target:
    return kernel.target("original", kernel.build(folder, None)) if emulated else model_with(None)


def judged(mutant: Mutant, known_cases: list[Known], seconds: float) -> Result:
    """One mutant. It is killed as well by an exception, a crash, a deadlock, and by running out of time."""
    told = {name: value for name, value in asdict(mutant).items() if name not in ("start", "end")}
    told |= {"id": mutant.id, "old": mutant.old[:120], "new": mutant.new[:120]}
    receiving, sending = multiprocessing.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        try:
            made = model_with(mutant) if mutant.file == MODEL else kernel.build(Path(folder), mutant)
        except (subprocess.CalledProcessError, SyntaxError, TypeError, NameError) as error:
            return Result(**told, outcome=INVALID, detail=f"{type(error).__name__}: does not compile"[:200])
    process = multiprocessing.get_context("fork").Process(
        target=judge_all, args=(mutant, made, known_cases, sending), daemon=True
    )
    process.start()
    sending.close()
    progress: dict[str, Any] = {"outcome": EQUIVALENT, "cases": 0}
    end, ended = time.monotonic() + seconds, False
    while not ended:
        if not receiving.poll(max(0.0, end - time.monotonic())):
            progress |= {"outcome": KILLED, "check": "timeout", "cases": progress["cases"] + 1}
            break
        try:
            progress |= receiving.recv()
        except EOFError:
            process.join()
            if process.exitcode:
                progress |= {"outcome": KILLED, "check": "died", "cases": progress["cases"] + 1}
            ended = True
    process.kill()
    process.join()
    return Result(**told, **progress)


def judge_all(mutant: Mutant, made, known_cases: list[Known], sending) -> None:
    torch.set_num_threads(1)
    target = made if isinstance(made, Target) else kernel.target("mutant", made)
    outcome = EQUIVALENT
    for number, each in enumerate(known_cases, 1):
        check, changed = killed_by(target, each)
        if changed and outcome == EQUIVALENT:
            outcome = SURVIVED
        if check is not None:
            sending.send({"outcome": KILLED, "check": check[0], "cases": number, "detail": check[1][:200]})
            return
        sending.send({"outcome": outcome, "cases": number})


def killed_by(target: Target, each: Known) -> tuple[tuple[str, str] | None, bool]:
    """The check that fails with its detail, if one does, and whether any bit of the results is another one."""
    try:
        for _ in range(ORDERS if each.case == LONG else 1):
            outputs = run_target(target, each.inputs)
            changed = any(
                x is not None and not torch.equal(bits(x), bits(y))
                for x, y in ((outputs.out, each.right.out), (outputs.final_state, each.right.final_state))
            )
            if changed and each.case == LONG:
                break
        if each.case == LONG and not changed:
            return None, False
        verdict = judge(target, each.case, each.inputs, each.reference, each.properties)
    except Exception as error:
        what = "deadlock" if "deadlock" in str(error) or "no end" in str(error) else "raised"
        return (what, f"{type(error).__name__}: {error}"), True
    failed = verdict.failed
    return ((failed[0].name, failed[0].detail) if failed else None), changed
