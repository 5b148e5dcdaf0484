"""The judge: one call of a target, its comparison with the oracle, and the properties; errors and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fuzz.cases.inputs import Inputs
from fuzz.judging.accuracy import accuracy, written
from fuzz.judging.call import out_of_memory, run_target, untouched, within
from fuzz.judging.checks import CHECKS
from fuzz.judging.gains import gain
from fuzz.judging.sensitivity import Reference
from fuzz.judging.verdict import NOT_CHECKED, Check, Verdict


def judge(
    target, case, inputs: Inputs, reference: Reference | None, properties: Sequence[str], operands: str | None = None
) -> Verdict:
    """Runs `target` on `inputs` (on its device), checks it and each of `properties` (names in `fuzz.judging.checks`).

    reference: None where the oracle is too slow. Then only the properties are checked. operands: one of
    `bounds.OPERANDS`, in the place of the format that the target promises. What the target raises passes through.
    """
    if operands is not None:
        target = replace(target, promises=replace(target.promises, operands=operands))
    outputs = run_target(target, inputs)
    checks = [untouched(outputs), within(outputs)]
    if reference is not None:
        operands, inverse = target.promises.operands, target.promises.inverse
        checks += [
            written(outputs, reference),
            accuracy(outputs, inputs, reference, operands=operands, inverse=inverse),
            gain(outputs, inputs, reference, operands, inverse=inverse),
        ]
    for name in properties:
        try:
            checks.append(CHECKS[name](target, case, inputs, outputs, reference))
        except Exception as error:
            # Without this a case too large for a property would hide what was found before.
            if not out_of_memory(error) or all(check.passed for check in checks):
                raise
            checks.append(Check(name, True, detail=f"{NOT_CHECKED}out of memory"))
    return Verdict(tuple(checks))
