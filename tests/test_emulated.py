"""The source of the CUDA kernel, run on a CPU by the emulator, against the model and against itself."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import emulated
import pytest
import torch

from flash_kda import model
from fuzz.cases.inputs import Inputs, make_inputs
from fuzz.cases.plain import PLAIN

PACKED = replace(PLAIN, seq_lens=(70,), packed=True, scale=0.25, seed=1)
ARGUMENTS = ("q", "k", "v", "g", "beta", "A_log", "dt_bias", "initial_state", "cu_seqlens")


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    return emulated.build(tmp_path_factory.mktemp("emulated"), compiler)


def run(kernel, inputs: Inputs, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and fp32 final state, poisoned before."""
    out = torch.full_like(inputs.v, torch.nan)
    sequences = inputs.q.shape[0] if inputs.cu_seqlens is None else len(inputs.cu_seqlens) - 1
    state = torch.full((sequences, *inputs.v.shape[2:3], 128, 128), torch.nan)
    tensors = {name: getattr(inputs, name) for name in ARGUMENTS}
    emulated.forward(
        kernel, **tensors, scale=inputs.scale, lower_bound=inputs.lower_bound, out=out, final_state=state, **options
    )
    return out, state


def from_model(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    return model.forward(
        **{name: getattr(inputs, name) for name in ARGUMENTS}, scale=inputs.scale, lower_bound=inputs.lower_bound
    )


def difference(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative RMS."""
    return ((result.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_agrees(results, expected, out: float, state: float) -> None:
    """Both have the same roundings. What the order of fp32 sums changes may move a rounding to bf16 or tf32 by a unit,
    which is seldom: a unit of bf16 is 2^-8, so one element of `out` in 5,000 comes to 5e-5 of the whole."""
    assert difference(results[0], expected[0]) < out
    assert difference(results[1], expected[1]) < state


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 128, 200])
def test_every_tail(kernel, tokens: int):
    inputs = make_inputs(replace(PACKED, seq_lens=(tokens,)))
    assert_agrees(run(kernel, inputs), from_model(inputs), 5e-4, 5e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"gates": "saturated_open", "keys": "equal"},
        {"lower_bound": 0.0},
        {"keys": "zero_rows", "queries": "tiny"},
        {"keys": "huge", "queries": "huge", "values": "large"},
        {"keys": "tiny", "states": "large"},
        {"betas": "infinite"},
        {"gates": "mixed_channels"},
        {"gates": "all_but_one_channel", "states": "huge"},
        {"gates": "cancelling", "keys": "mixed_norms"},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())),
)
def test_families(kernel, changes):
    inputs = make_inputs(replace(PACKED, **changes))
    assert_agrees(run(kernel, inputs), from_model(inputs), 3e-3, 3e-3)


@pytest.mark.parametrize("clusters", [1, 2, 3, 5])
def test_packed_sequences_over_clusters(kernel, clusters: int):
    """However the work is cut: the same bits."""
    inputs = make_inputs(replace(PACKED, seq_lens=(130, 0, 0, 64, 5, 1), heads=2))
    results = run(kernel, inputs, clusters=clusters, seed=clusters)
    assert_agrees(results, from_model(inputs), 5e-4, 5e-5)
    for one, other in zip(results, run(kernel, inputs), strict=True):
        assert torch.equal(one, other)


def test_no_order_of_threads_and_copies_changes_a_bit(kernel):
    inputs = make_inputs(replace(PACKED, seq_lens=(300,)))
    first, *others = (run(kernel, inputs, seed=seed) for seed in range(4))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other, strict=True))


def test_batch_rows_and_strides(kernel):
    batch = make_inputs(replace(PACKED, seq_lens=(70, 70), heads=2, packed=False, layout="strided"))
    assert not batch.q.is_contiguous()
    assert_agrees(run(kernel, batch), from_model(batch), 5e-4, 5e-5)


# Broken on purpose: the emulator must notice.


def broken(folder: Path, file: str, old: str, new: str):
    def change(sources: Path) -> None:
        text = (sources / "sm90" / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
        (sources / "sm90" / file).write_text(text.replace(old, new))

    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler here")
    return emulated.build(folder, compiler, change)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("keys.h", "if (n > 0) Barrier::wait(&s.bar_peer_done[Own(n - 1).stage], Own(n - 1).parity);", ""),
        ("keys.h", "      Barrier::wait(&s.bar_operands_ready[own.stage], own.parity);\n", ""),
        ("prepare.h", "      Barrier::wait(&s.bar_peer_done[before.stage], before.parity);\n", ""),
        ("prepare.h", "      Barrier::wait(&s.bar_own_done[before.stage], before.parity);\n", ""),
        (
            "prepare.h",
            "      Barrier::wait(&s.bar_rows_ready[own.stage], own.parity);\n      uint32_t",
            "      uint32_t",
        ),
        ("prepare.h", "if (at.valid < kChunk) Barrier::wait(&s.bar_rows_ready[own.stage], own.parity);", ""),
        ("prepare.h", "sync_threads(kBarrierPrepare, kPrepareWarps * kWarp);  // all columns", "// all columns"),
        ("prepare.h", "sync_threads(kBarrierPrepare, kPrepareWarps * kWarp);  // partial sums", "// partial sums"),
        ("prepare.h", "    sync_threads(kBarrierBlock + kBlockRow, 2 * kWarp);\n", ""),
        ("forward.h", "Barrier::init(&s.bar_rows_ready[i], 2);", "Barrier::init(&s.bar_rows_ready[i], 1);"),
        ("invert.h", "      Barrier::wait(&s.bar_LM_ready, n % 2);\n", ""),
        ("invert.h", "    sync();  // L21 is read\n", ""),
        ("load.h", "if (c >= kValueStages) Barrier::wait(&s.bar_v_done[stage], (c / kValueStages - 1) & 1);", ""),
        ("load.h", "      Barrier::wait(&s.bar_own_done[own.stage], own.parity ^ 1);\n", ""),
        ("load.h", "      Barrier::wait(&s.bar_peer_done[own.stage], own.parity ^ 1);\n", ""),
        ("recur.h", "Barrier::wait(&s.bar_received, n % 2);", ";"),
        ("recur.h", "    Barrier::wait(X_ready, X_parity);\n", ""),
    ],
    ids=[
        "sends over what the peer still reads",
        "sends what is not prepared",
        "works in what is still being sent",
        "works in what R still reads",
        "prepares before rows are known",
        "prepares before the tail is cleared",
        "partial sums over columns that are read",
        "columns over partial sums that are read",
        "adds sums that are not there",
        "rows of one tensor are enough",
        "inverts what is not there",
        "inverts over what is read",
        "loads over values that R still reads",
        "loads over what R still reads",
        "loads over what the peer still reads",
        "reads what has not come",
        "multiplies by what is not inverted",
    ],
)
def test_a_missing_wait_shows(tmp_path: Path, file: str, old: str, new: str):
    kernel = broken(tmp_path, file, old, new)
    inputs = make_inputs(replace(PACKED, seq_lens=(650,), gates="weak"))
    expected = from_model(inputs)
    for seed in range(40):
        try:
            results = run(kernel, inputs, seed=seed)
        except RuntimeError:
            return
        if not difference(results[0], expected[0]) < 5e-3:
            return
    pytest.fail("nothing was noticed")


def test_a_missing_arrival_is_a_deadlock(tmp_path: Path):
    kernel = broken(tmp_path, "prepare.h", "warp_arrive(&s.bar_LM_ready);", "if (block) warp_arrive(&s.bar_LM_ready);")
    with pytest.raises(RuntimeError, match="deadlock"):
        run(kernel, make_inputs(PACKED))


def test_numbers_that_say_nothing_of_the_order_of_starting_are_a_deadlock(tmp_path: Path):
    kernel = broken(tmp_path, "forward.h", "of_first_cta(&s.number) * kPair + rank", "blockIdx.x")
    with pytest.raises(RuntimeError, match="deadlock"):
        for seed in range(8):  # one of the two orders is right
            run(kernel, make_inputs(replace(PACKED, seq_lens=(300, 250, 180))), clusters=2, seed=seed)
