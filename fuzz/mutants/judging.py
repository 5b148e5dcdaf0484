"""Judging of mutants: each on one case after another, until a check fails that passes on the original.

A mutant may crash, hang or write anywhere. So `fuzz.mutants.pool` runs each in a process of its own.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from fuzz.cases.case import Case
from fuzz.cases.drawing import all_cases
from fuzz.cases.inputs import Inputs
from fuzz.judging.call import Outputs, bits, run_target
from fuzz.judging.judge import judge
from fuzz.judging.properties import choose
from fuzz.judging.sensitivity import Reference, reference
from fuzz.mutants import kernel
from fuzz.mutants.rules import MODEL, Mutant, text_of
from fuzz.mutants.special import SPECIAL_CASES, inputs_of
from fuzz.targets.adapter import writing
from fuzz.targets.registry import Target

KILLED, SURVIVED, EQUIVALENT, UNSEEN, INVALID = "killed", "survived", "equivalent", "unseen", "invalid"

SAME_CODE, SAME_GPU_CODE = "same code", "same GPU code"
"""Checks of an equivalent mutant that compiles to the bytes of the original: no case is needed."""

OTHER_GPU_CODE = "other GPU code"

SMALL_TOKENS = 160  # times heads, of a case for the emulator: a call takes a tenth of a second for 128
SMALL_SEQUENCES = 80

FIRST_SPECIAL, EACH_SPECIAL = 3, 60  # cases before the special ones come first, and until they come again
ORDERS = 6  # of threads and copies, in which the kernel has each: so it goes every way

SOME_ORDERS = "determinism"
"""The check that fails if some calls on the same inputs give other bits, as the judge's own call may not."""

ALL_CHECKED = 120
"""Cases on which everything is checked. On later ones only the bits are, and all else where they are others."""

NOT_ASKED = ("arguments", "wide_offsets")
"""Properties that are left out: no source here checks arguments, and the emulator takes too long for 2^31 elements."""


@dataclass(frozen=True)
class Baseline:
    """A case with what mutants are compared with. failed: the check that fails on the original; then no mutant is."""

    case: Case
    inputs: Inputs
    reference: Reference
    properties: tuple[str, ...]
    right: Outputs
    failed: str = ""


@dataclass(frozen=True)
class MutantResult:
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
    seed: int = -1  # that drew it; -1 in files of earlier versions

    @property
    def decided(self) -> bool:
        """Whether more cases cannot change it."""
        return self.outcome in (KILLED, UNSEEN, INVALID) or self.check in (SAME_CODE, SAME_GPU_CODE)


def result_of(mutant: Mutant, **found) -> MutantResult:
    told = {name: value for name, value in asdict(mutant).items() if name not in ("start", "end")}
    told |= {"id": mutant.id, "old": mutant.old[:120], "new": mutant.new[:120]}
    return MutantResult(**told, **found)


def drawn_cases(seed: int, count: int, emulated: bool) -> Iterator[Case]:
    """As a campaign of that seed draws them, for the emulator the small ones; and now and then the special ones."""
    given = 0
    for case in all_cases("cpu", seed):
        if given % EACH_SPECIAL == FIRST_SPECIAL:
            for special in list(SPECIAL_CASES)[: count - given]:
                given += 1
                yield special
        if given == count:
            return
        if not emulated or (case.tokens * case.heads <= SMALL_TOKENS and case.n_seqs <= SMALL_SEQUENCES):
            given += 1
            yield case


def baseline_of(target: Target, case: Case, properties: int) -> Baseline:
    inputs, asked = inputs_of(case), len(NOT_ASKED) + properties
    chosen = SPECIAL_CASES.get(case)
    if chosen is None:
        chosen = [each for each in choose(case, asked) if each not in NOT_ASKED][:properties]
    made = Baseline(case, inputs, reference(inputs, "cpu"), tuple(chosen), run_target(target, inputs))
    found = killed_by(target, made)[0]
    # What the reference has kept for this judgement cannot be sent to another process.
    return replace(made, failed=found[0] if found else "", reference=replace(made.reference))


def model_with(mutant: Mutant | None) -> Target:
    """The model from its source, behind the checks of arguments. Raises SyntaxError or what the module raises."""
    from flash_kda.arguments import check_arguments

    text = text_of(MODEL)
    module = types.ModuleType("flash_kda_mutant")
    sys.modules[module.__name__] = module  # dataclasses look it up
    exec(compile(mutant.apply(text) if mutant else text, MODEL, "exec"), vars(module))
    module._HEADS_TIMES_CHUNKS = 8  # of 512: small cases, too, are computed part by part
    return Target("mutant", writing(module.forward, check_arguments), "cpu")


def built(mutant: Mutant | None, folder: Path, kind: str) -> tuple[Target, str]:
    """A mutant or the original of "model" or "kernel", and a digest of its machine code ("" of the model).

    folder: where it is compiled, unless it was. Raises subprocess.CalledProcessError if it does not compile, and what
    the model raises when it is imported.
    """
    if kind == "model":
        return model_with(mutant), ""
    made = kernel.build(folder, mutant)
    digest = hashlib.sha256(kernel.library(folder).read_bytes()).hexdigest()
    return kernel.target(made, kernel.RING_EACH[kernel.is_of_ring(mutant)]), digest


def judge_mutant(
    mutant: Mutant,
    before: MutantResult | None,
    baselines: Sequence[Baseline],
    right: str,
    folder: Path,
    send: Callable,
    right_gpu_code: str = "",
) -> None:
    """Sends a MutantResult again and again: when it is compiled, and after each case. The last one counts.

    before: what was found on earlier cases. right, right_gpu_code: digests of the original; without the latter one
    nothing is compiled for a GPU. An exception and a deadlock kill it.
    """
    torch.set_num_threads(1)
    try:
        target, code = built(mutant, folder, "model" if mutant.file == MODEL else "kernel")
    except Exception as error:
        send(result_of(mutant, outcome=INVALID, detail=f"{type(error).__name__}: does not compile"))
        return
    unseen = mutant.rule.endswith("removed") and any(word in mutant.old for word in kernel.WITHOUT_EFFECT)
    if code and (unseen or code == right):
        found = result_of(mutant, outcome=UNSEEN if unseen else EQUIVALENT, check=SAME_CODE)
        send(found)
        if unseen and right_gpu_code:
            same = right_gpu_code == kernel.gpu_code(folder / "gpu", mutant, lambda: send(found))
            outcome, check = (EQUIVALENT, SAME_GPU_CODE) if same else (UNSEEN, OTHER_GPU_CODE)
            send(result_of(mutant, outcome=outcome, check=check))
        return
    begun, outcome = (before.cases, before.outcome) if before else (0, EQUIVALENT)
    send(result_of(mutant, outcome=outcome, cases=begun))
    for number, each in enumerate(baselines, begun + 1):
        check, changed = (None, False) if each.failed else killed_by(target, each, number <= ALL_CHECKED)
        if check is not None:
            send(result_of(mutant, outcome=KILLED, check=check[0], cases=number, detail=check[1][:200]))
            return
        outcome = SURVIVED if changed else outcome
        send(result_of(mutant, outcome=outcome, cases=number))


def killed_by(target: Target, each: Baseline, checked: bool = True) -> tuple[tuple[str, str] | None, bool]:
    """The check that fails with its detail, if one does, and whether any bit of the results is another one.

    checked: whether the case is judged where no bit is another one.
    """
    try:
        differs = []
        for _ in range(ORDERS if each.case in SPECIAL_CASES else 1):
            outputs = run_target(target, each.inputs)
            differs.append(
                any(
                    x is not None and not torch.equal(bits(x), bits(y))
                    for x, y in ((outputs.out, each.right.out), (outputs.final_state, each.right.final_state))
                )
            )
        changed = any(differs)
        if changed and not all(differs):
            return (SOME_ORDERS, f"other bits in {sum(differs)} of {len(differs)} calls"), True
        if not changed and not checked:
            return None, False
        verdict = judge(target, each.case, each.inputs, each.reference, each.properties)
    except Exception as error:
        what = "deadlock" if "deadlock" in str(error) or "no end" in str(error) else "raised"
        return (what, f"{type(error).__name__}: {error}"), True
    failed = verdict.failed
    return ((failed[0].name, failed[0].detail) if failed else None), changed
