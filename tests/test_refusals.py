"""Bad arguments: refused by `flash_kda`, and found where a target does not refuse them."""

from __future__ import annotations

import inspect

import pytest
import torch
from judged_targets import CORRECT, recurrence
from test_ladder import ROWS, SPECIFICATION

import flash_kda
from fuzz.cases.inputs import make_inputs
from fuzz.conformance.ladder import packed
from fuzz.judging.call import run_target
from fuzz.judging.checks import CHECKS
from fuzz.judging.refusals import REFUSALS
from fuzz.judging.verdict import NOT_CHECKED, Check
from fuzz.targets.registry import Target

BAD_CALLS = {row.checks[0]: row.cases[0] for row in ROWS if row.rung == "arguments"}


def refused(name: str, fwd) -> Check:
    """What the ladder's row says of a function."""
    case = BAD_CALLS[name]
    return REFUSALS[name](Target("theirs", fwd, "cpu"), case, make_inputs(case))


@pytest.mark.parametrize("name", REFUSALS)
def test_flash_kda_refuses(name):
    check = refused(name, flash_kda.fwd)
    assert check.passed and check.name == name and not check.detail


def ignores(*args, **kwargs):
    """Whatever it is given."""


def refuses_all(**given):
    raise TypeError("q k v g beta out A_log dt_bias initial_state final_state cu_seqlens scale lower_bound")


def writes_first(**given):
    if isinstance(given["k"], torch.Tensor):
        given["k"].view(-1)[0] = 1
    flash_kda.fwd(**given)


def writes_beside(**given):
    out = given["out"]
    out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(0)
    flash_kda.fwd(**given)


def names_nothing(**given):
    try:
        flash_kda.fwd(**given)
    except (TypeError, ValueError) as error:
        raise type(error)("bad argument") from None


@pytest.mark.parametrize(
    ("fwd", "name", "said"),
    [
        (ignores, "scale-nan", "nothing was raised; documented is a ValueError that names scale"),
        (refuses_all, "scale-nan", "TypeError: q k v g beta"),
        (refuses_all, "q-dtype", None),
        (
            writes_first,
            "scale-nan",
            "ValueError: scale: expected a number that is finite in fp32, got nan. Pass another value. For a call ",
        ),
        (writes_beside, "beta-shape", "only after out had changed"),
        (
            names_nothing,
            "lower_bound-too-low",
            "ValueError: bad argument; documented is a message that names lower_bound",
        ),
    ],
)
def test_a_refusal_has_to_be_the_documented_one_and_come_before_writing(fwd, name, said):
    check = refused(f"arguments.{name}", fwd)
    assert check.passed == (said is None)
    assert said is None or said in check.detail, check.detail


def test_every_refusal_fails_for_a_target_that_refuses_nothing():
    assert not [name for name in REFUSALS if refused(name, ignores).passed]


def test_known_failures_are_asked_of_everybody():
    """The two rows of the specification's table that are about arguments."""
    known = {row.id.partition("/")[2] for row in ROWS if row.known}
    assert known == {
        *(f"cu_seqlens-{what}" for what in ("start", "negative", "decreasing", "past-the-end", "late")),
        *(f"lower_bound-{what}" for what in ("nan", "infinite", "too-low", "positive")),
    }
    assert (
        "`cu_seqlens` contents never checked" in SPECIFICATION
        and "`lower_bound` outside the safe range accepted" in SPECIFICATION
    )


def test_each_argument_of_the_specification_can_be_wrong_in_every_way():
    for name in ("q", "k", "v", "g", "beta", "out", "A_log", "dt_bias", "initial_state", "final_state", "cu_seqlens"):
        for kind in ("type", "dtype", "shape", "axes", "device", "stride"):
            legal = (name, kind) in (("beta", "stride"), ("A_log", "axes"))
            assert (f"arguments.{name}-{kind}" in REFUSALS) != legal


def test_32_bit_offsets_are_found():
    def wraps(*args, **kwargs):
        """Reads rows as a kernel does whose offsets have 32 bits: from somewhere before the tensor, here zeros."""
        given = inspect.signature(recurrence).bind(*args, **kwargs).arguments
        for name, axis in (("q", 1), ("initial_state", 0)):
            rows = given[name].movedim(axis, 0)
            beyond = torch.arange(len(rows)) * rows.stride(0) >= 2**31
            given[name] = rows.masked_fill(beyond.view(-1, *[1] * (rows.dim() - 1)), 0).movedim(0, axis)
        recurrence(**given)

    case = packed(7, 0, 9)
    data = make_inputs(case)
    for target, passed in ((CORRECT, True), (Target("wraps", wraps, "cpu"), False)):
        check = CHECKS["wide_offsets"](target, case, data, run_target(target, data))
        assert check.passed == passed, check.detail
        assert not check.detail.startswith(NOT_CHECKED)
    assert "out: " in check.detail and "final_state: " in check.detail
