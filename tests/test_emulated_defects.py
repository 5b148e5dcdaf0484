"""The defects of device code, in the emulator: each compiles, and is found by a check that should find it."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import shutil
import sys

import emulated
import pytest
import torch
from judged_targets import a_case

from flash_kda.arguments import check_arguments
from flash_kda.workspace import is_reachable
from fuzz.cases.case import Case
from fuzz.cases.inputs import make_inputs
from fuzz.defects.defect import Given
from fuzz.defects.device import DEVICE
from fuzz.judging.judge import judge
from fuzz.judging.properties import applicable
from fuzz.judging.sensitivity import reference
from fuzz.targets.registry import Target

pytestmark = pytest.mark.usefixtures("one_thread")


# What the emulator does not know: the proxies of the memory model, and clusters that run at the same time.
HARDWARE = ("device_missing_proxy_fence", "device_state_taken_over_too_soon")

# What a case needs for a defect to show; the plainest of them has one sequence, and a tail.
SHOWS: dict[str, Case] = {
    "device_sums_overwritten_too_soon": a_case((300,), 1),
    "device_sent_too_soon": a_case((300,), 1),
    "device_stage_loaded_too_soon": a_case((300,), 1),
    "device_ring_flag_missed": a_case((300,), 1),
    "device_ring_place_overwritten": a_case((400,), 1),
    "device_ring_ready_too_soon": a_case((300,), 1),
    "device_stale_stage": a_case((200,), 1),
    "device_offset_of_32_bits": a_case((20, 20), 1),
    "device_missed_last_chunk": a_case((70, 20), 1),
    "device_anchor_of_a_later_row": a_case((32,), 1),
    "device_short_state_before_last_update": a_case((5, 16), 1),
    "device_short_state_of_first_head": a_case((5, 16), 2),
    "device_short_tokens_too_soon": a_case((16,), 1),
    "device_short_sequence_left_out": a_case((3, 1, 9, 16), 3),
    "device_state_not_recalled": a_case((70, 50), 1, seed=24, lower_bound=-0.05),
    "device_first_checkpoint_alone": a_case((70, 50), 1, seed=24, lower_bound=-0.05),
    "device_negative_index_is_row_0": a_case((20, 1, 30), 1, seed=2),
}


def target(name: str | None, folder) -> Target:
    """The emulated kernel, with the defect if there is one. Each call is cut for another number of clusters, and every
    second one goes through the ring, if it has few heads."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    patches = DEVICE[name].make.patches if name else ()
    kernel = emulated.build(folder, compiler, lambda sources: [patch.apply(sources.parent) for patch in patches])
    calls = itertools.count()

    def fwd(*args, **kwargs):
        given = vars(Given.of(*args, **kwargs))
        check_arguments(**given)
        for each in ("q", "k", "v", "g"):  # what the workspace is for
            if not is_reachable(given[each]):
                given[each] = given[each].clone(memory_format=torch.contiguous_format)
        call = next(calls)
        del given["validate"], given["workspace"]
        offsets = given["cu_seqlens"]
        items = given["q"].shape[2] * (given["q"].shape[0] if offsets is None else len(offsets) - 1)
        way = {"clusters": 1 + call % 3}
        if call % 2 and 0 < items <= 2:
            way = {"clusters": items + 1, "ring_slots": emulated.LEAST_SLOTS * items}
        emulated.forward(kernel, **given, **way, seed=call)

    return Target(name or "emulated", fwd, "cpu")


def failed(found: Target, case: Case, properties) -> set[str]:
    inputs = make_inputs(case)
    try:
        verdict = judge(found, case, inputs, reference(inputs, "cpu"), [p for p in properties if applicable(p, case)])
    except RuntimeError as error:  # a deadlock, which on a GPU is the time limit's
        return {"timeout", str(error)}
    return {check.name for check in verdict.failed}


PROPERTIES = ("determinism", "causality", "packing", "wide_offsets", "checkpoints", "state_pool")


@pytest.mark.parametrize("name", [name for name in DEVICE if name not in HARDWARE])
def test_a_defect_of_device_code_is_found(name, tmp_path):
    case, expected = SHOWS.get(name, a_case((21, 30), 1)), set(DEVICE[name].expected)
    wrong = target(name, tmp_path)

    def judged() -> None:
        found = failed(wrong, case, [each for each in PROPERTIES if each in expected])
        sys.exit(0 if found & expected else str(found))

    # In a process of its own, which a wild address ends.
    process = multiprocessing.get_context("fork").Process(target=judged)
    process.start()
    process.join()
    assert process.exitcode == 0 or (process.exitcode < 0 and "died" in expected)


def test_the_kernel_itself_is_not(tmp_path):
    right = target(None, tmp_path)
    assert not failed(right, a_case((21, 30), 1), PROPERTIES)
    for case in SHOWS.values():
        assert not failed(right, case, ())
