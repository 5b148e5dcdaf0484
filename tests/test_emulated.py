"""The source of the CUDA kernel, run on a CPU by the emulator, against the model and against itself."""

from __future__ import annotations

import math
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
SEEDS = 40  # orders of threads and copies
NOTICED = 5e-3  # difference of `out` from the model's that is no rounding, however long the sequence
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


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 200])
def test_every_tail(kernel, tokens: int):
    inputs = make_inputs(replace(PACKED, seq_lens=(tokens,)))
    # One element of M that is rounded the other way changes a row of `out` by up to a unit.
    assert_agrees(run(kernel, inputs), from_model(inputs), 5e-4 + 2**-8 / tokens**0.5, 5e-5)


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


SHORT = replace(PACKED, seq_lens=(16, 0, 1, 9), heads=2)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gates": "saturated_open", "keys": "equal"},
        {"keys": "zero_rows", "queries": "tiny"},
        {"keys": "huge", "queries": "huge", "values": "huge"},
        {"keys": "tiny", "states": "huge"},
        {"betas": "infinite"},
        {"gates": "cancelling", "keys": "mixed_norms"},
        {"initial_state": None},
        {"initial_state": "bf16"},
        {"packed": False, "seq_lens": (5, 5), "layout": "strided"},
    ],
    ids=lambda changes: ",".join(map(str, changes.values())) or "plain",
)
def test_short_sequences(kernel, changes):
    """Token by token in fp32: only the order of sums differs."""
    inputs = make_inputs(replace(SHORT, **changes))
    assert_agrees(run(kernel, inputs), from_model(inputs), 2e-4, 1e-6)


@pytest.mark.parametrize("clusters", [1, 2, 4])
def test_short_sequences_over_clusters(kernel, clusters: int):
    """However they are dealt out, and whether chunks leave room for them or not: the same bits, each once."""
    inputs = make_inputs(replace(PACKED, seq_lens=(*[1, 16, 7] * 9, 40, *[0, 2] * 9, 100, 3), heads=3))
    results = run(kernel, inputs, clusters=clusters, seed=clusters)
    assert_agrees(results, from_model(inputs), 5e-4, 5e-5)
    for one, other in zip(results, run(kernel, inputs), strict=True):
        assert torch.equal(one, other)


def test_sequences_without_work_between_short_ones(kernel):
    """Without a final state nothing is done for an empty sequence, and so no warp waits there for the others."""
    inputs = make_inputs(replace(PACKED, seq_lens=(16, 0) * 6, heads=1))
    tensors = {name: getattr(inputs, name) for name in ARGUMENTS}
    expected, _ = from_model(inputs)
    for seed in range(12):
        out = torch.full_like(inputs.v, torch.nan)
        emulated.forward(
            kernel, **tensors, scale=inputs.scale, lower_bound=inputs.lower_bound, out=out, final_state=None, seed=seed
        )
        assert difference(out, expected) < 2e-4


def test_each_short_sequence_is_worked_on_once(kernel):
    """In place, where a second time would begin with the state of the first."""
    inputs = make_inputs(replace(PACKED, seq_lens=(1, 16, 7, 40, 0, 2, 3, 1), heads=3))
    tensors = {name: getattr(inputs, name) for name in ARGUMENTS} | {"initial_state": inputs.initial_state.clone()}
    out, state = torch.full_like(inputs.v, torch.nan), tensors["initial_state"]
    emulated.forward(
        kernel, **tensors, scale=inputs.scale, lower_bound=inputs.lower_bound, out=out, final_state=state, clusters=4
    )
    assert_agrees((out, state), from_model(inputs), 5e-4, 5e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gap", [0, 2])
def test_states_of_short_sequences_may_lie_anywhere(kernel, dtype, gap: int):
    """Four elements are read and written at a time where that may be, else two: the same bits."""
    inputs = make_inputs(SHORT)
    initial = torch.randn(4, 2, 128, 128 + gap).to(dtype)[..., :128]
    final = torch.full((4, 2, 128, 128 + gap), torch.nan).to(dtype)
    out = torch.full_like(inputs.v, torch.nan)
    tensors = {name: getattr(inputs, name) for name in ARGUMENTS} | {"initial_state": initial}
    options = {"scale": inputs.scale, "lower_bound": inputs.lower_bound}
    emulated.forward(kernel, **tensors, **options, out=out, final_state=final[..., :128])
    expected = model.forward(**tensors, **options)
    assert difference(out, expected[0]) < 2e-4
    assert difference(final[..., :128], expected[1].to(dtype)) < (1e-6 if dtype == torch.float32 else 1e-4)
    assert final[..., 128:].isnan().all()


def test_no_order_of_threads_and_copies_changes_a_bit(kernel):
    """The orders in which a missing wait has to show, too."""
    inputs = make_inputs(replace(PACKED, seq_lens=(650,), gates="weak"))
    first = run(kernel, inputs, seed=0)
    assert difference(first[0], from_model(inputs)[0]) < NOTICED
    for seed in range(1, SEEDS):
        assert all(torch.equal(x, y) for x, y in zip(first, run(kernel, inputs, seed=seed), strict=True))


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


# What the emulator cannot notice is left out: a `__syncwarp` beside an instruction that all lanes do together, and what
# passes between clusters, which run one after the other here. So are the barriers of `List`: without them,
# sequences lie at wild addresses, and this process ends.
UNUSUAL = 2.0**58  # what keys are multiplied by: their squares then are worked out twice
WAITS = {
    "P prepares what is not loaded": (
        "prepare.h",
        "    Barrier::wait(&s.bar_loaded[own.parity][own.stage], own.team_parity);\n",
        "",
    ),
    "P adds squares that are not there": ("prepare.h", "  sync_team();  // squares of all warps\n", ""),
    "P overwrites squares that are still read": (
        "prepare.h",
        "      sync_team();  // the first ones are read\n",
        "",
        UNUSUAL,
    ),
    "P adds squares of scaled rows that are not there": (
        "prepare.h",
        "      give_squares(x, tensor);\n      sync_team();\n",
        "      give_squares(x, tensor);\n",
        UNUSUAL,
    ),
    "P adds sums of the first round that are not there": (
        "prepare.h",
        "    sync_team();\n#pragma unroll\n    for (int i = 0; i < kPieces; ++i) {\n      const float4 y",
        "#pragma unroll\n    for (int i = 0; i < kPieces; ++i) {\n      const float4 y",
    ),
    "P adds sums of the second round that are not there": (
        "prepare.h",
        "    sync_team();\n#pragma unroll\n    for (int i = 0; i < kPieces; i += 2) {\n",
        "#pragma unroll\n    for (int i = 0; i < kPieces; i += 2) {\n",
    ),
    "X inverts what is not there": (
        "invert.h",
        "      Barrier::wait(&s.bar_L_ready[own.parity][own.stage], own.team_parity);\n",
        "",
    ),
    "X inverts what half of a team has not stored": (
        "forward.h",
        "Barrier::init(&s.bar_L_ready[parity][i], kTeamWarps * kWarp);",
        "Barrier::init(&s.bar_L_ready[parity][i], kTeamWarps * kWarp / 2);",
    ),
    "X overwrites rows of L that its lanes still read": ("invert.h", "      __syncwarp();  // the rows are read\n", ""),
    "X multiplies by what its lanes have not solved": ("invert.h", "    }\n    __syncwarp();\n  }\n", "    }\n  }\n"),
    "what is not prepared is copied": (
        "pair.h",
        "      Barrier::wait(&s.bar_prepared[own.stage], own.parity);\n",
        "",
    ),
    "a chunk is copied over what the peer still reads": (
        "pair.h",
        "if (n >= kReceivedStages) Barrier::wait(&s.bar_used[to], there.parity ^ 1);",
        "",
    ),
    "values are loaded over those that R still reads": (
        "load.h",
        "      Barrier::wait(&s.bar_v_used[stage], (c / kValueStages - 1) & 1);\n",
        "",
    ),
    "a stage is loaded over what R still reads": (
        "load.h",
        "      Barrier::wait(&s.bar_used[own.stage], own.parity ^ 1);\n",
        "",
    ),
    "a stage is loaded over what the peer has no copy of": (
        "load.h",
        "      Barrier::wait(&s.bar_copied[own.stage], own.parity ^ 1);\n",
        "",
    ),
    "R reads values that are not loaded": (
        "recur.h",
        "      Barrier::wait(&s.bar_v_loaded[c % kValueStages], c / kValueStages % 2);\n",
        "",
    ),
    "R multiplies by what is not prepared": (
        "pair.h",
        "  Barrier::wait(&s.bar_prepared[at.stage()], at.parity());\n",
        "",
    ),
    "R gives back what its other warps still read": (
        "forward.h",
        "Barrier::init(&s.bar_used[i], kRecurWarps);",
        "Barrier::init(&s.bar_used[i], kRecurWarps / 2);",
    ),
    "short sequences begin with tokens that are not there": (
        "short.h",
        "        sync_threads(kBarrierShort + group, kShortWarps * kWarp);\n",
        "",
    ),
    "chunks are loaded over tokens of short sequences": (
        "forward.h",
        "    __syncthreads();  // its memory is free\n",
        "",
    ),
    "roles begin before M is zero": ("forward.h", "  fence_async();\n  __syncthreads();\n", "  fence_async();\n"),
    "the peer is not there yet": (
        "forward.h",
        "  sync_cluster();  // the peer's barriers are ready as well\n",
        "  __syncthreads();\n",
    ),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_missing_wait_shows(tmp_path: Path, name: str):
    file, old, new, *factors = WAITS[name]
    kernel = broken(tmp_path, file, old, new)
    inputs = make_inputs(replace(PACKED, seq_lens=(650, 16, 16, 16, 16, 16), gates="weak"))
    inputs.k.mul_(math.prod(factors))
    expected = from_model(inputs)
    for seed in range(SEEDS):
        try:
            results = run(kernel, inputs, seed=seed)
        except RuntimeError:
            return
        if not difference(results[0], expected[0]) < NOTICED:
            return
    pytest.fail("nothing was noticed")


def test_a_missing_arrival_is_a_deadlock(tmp_path: Path):
    arrival = "  fence_async();\n  Barrier::arrive(&s.bar_L_ready[own.parity][own.stage]);"
    kernel = broken(tmp_path, "prepare.h", arrival, arrival.replace("Barrier", "if (quarter > 0) Barrier"))
    with pytest.raises(RuntimeError, match="deadlock"):
        run(kernel, make_inputs(PACKED))


@pytest.mark.parametrize(
    ("file", "part", "nothing"),
    [
        ("invert.h", "pack_bf16(z.x - taken.x, z.y - taken.y)", "0"),
        ("prepare.h", "low[r] = pack_fp16(x - x_high, y - y_high);", "low[r] = 0;"),
    ],
    ids=["X b", "gates"],
)
def test_a_part_left_out_shows(tmp_path: Path, file: str, part: str, nothing: str):
    """The second of two numbers is small: a result that is right but for it must not pass for the model's."""
    kernel = broken(tmp_path, file, part, nothing)
    inputs = make_inputs(replace(PACKED, seq_lens=(200,)))
    results, expected = run(kernel, inputs), from_model(inputs)
    assert difference(results[0], expected[0]) > 5e-4
    assert difference(results[1], expected[1]) > 5e-5


def test_numbers_that_say_nothing_of_the_order_of_starting_are_a_deadlock(tmp_path: Path):
    kernel = broken(tmp_path, "forward.h", "of_first_cta(&s.number) * kPair + rank_now", "blockIdx.x")
    with pytest.raises(RuntimeError, match="deadlock"):
        for seed in range(8):  # one of the two orders is right
            run(kernel, make_inputs(replace(PACKED, seq_lens=(300, 250, 180))), clusters=2, seed=seed)
