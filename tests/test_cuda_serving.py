"""What serving engines ask for, by the kernel on a GPU: checkpoints, pools of states, rows behind the end, graphs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from on_gpu import arguments_of, assert_same_bits, hopper, on_gpu, run  # noqa: F401

import flash_kda
from flash_kda import forward, native, ordinary
from fuzz.cases.families import FAMILIES
from fuzz.cases.inputs import Inputs

pytestmark = pytest.mark.gpu
LENS = (1300, 0, 547, 2048, 16, 33)
D = 128


def call(inputs: Inputs, **changes) -> dict:
    arguments = arguments_of(inputs) | changes
    flash_kda.fwd(**arguments)
    return arguments


def states(*shape: int, heads: int, dtype=torch.float32) -> torch.Tensor:
    return torch.full((*shape, heads, D, D), 7.0, dtype=dtype, device="cuda")


def drawn_offsets(count: int, step: int, seed: int) -> torch.Tensor:
    """Increasing multiples of `step` inside each sequence, then offsets that mean none."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for length in LENS:
        multiples = step * torch.arange(1, length // step + 1)
        chosen = multiples[torch.randperm(len(multiples), generator=random)[:count]].sort().values.tolist()
        rows.append((chosen + [0, -1, length + 1] * count)[:count])
    return torch.tensor(rows, dtype=torch.int32, device="cuda")


def prefix(inputs: Inputs, n: int, tokens: int) -> Inputs:
    start = int(inputs.cu_seqlens[n])
    changed = {name: getattr(inputs, name)[:, start : start + tokens] for name in ("q", "k", "v", "g", "beta")}
    state = None if inputs.initial_state is None else inputs.initial_state[n : n + 1]
    offsets = torch.tensor([0, tokens], dtype=torch.int32, device="cuda")
    return replace(inputs, **changed, initial_state=state, cu_seqlens=offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 3, 15])
@pytest.mark.parametrize("step", [16, 64])
def test_checkpoints_are_final_states_of_prefixes_and_change_nothing_else(count, step, dtype):
    for number in range(max(map(len, FAMILIES.values()))):
        kinds = {kind: names[number % len(names)] for kind, names in FAMILIES.items()}
        inputs = on_gpu(seq_lens=LENS, heads=2, lower_bound=-0.05, **kinds)
        offsets = drawn_offsets(count, step, number)
        checkpoints = states(len(LENS), count, heads=2, dtype=dtype)
        result = call(inputs, checkpoint_state=checkpoints, checkpoint_offsets=offsets)
        assert_same_bits((result["out"], result["final_state"]), run(inputs))
        table = offsets.tolist()
        for n, length in enumerate(LENS):
            for c, tokens in enumerate(table[n]):
                if not 0 < tokens <= length:
                    assert checkpoints[n, c].eq(7).all()
                elif (n + c + number) % 5 == 0 or count == 1:
                    state = states(1, heads=2, dtype=dtype)
                    call(prefix(inputs, n, tokens), final_state=state)
                    assert torch.equal(checkpoints[n, c], state[0]), (kinds, n, c, tokens)


@pytest.mark.parametrize("validated", [False, True])
def test_wrong_contents_touch_no_memory_outside(validated):
    """Run it under compute-sanitizer memcheck, too."""
    inputs = on_gpu(seq_lens=LENS, heads=2)
    wild = torch.tensor(
        [[5, 5, 3], [1, 2**40, 1], [70, 69, 2**62], [-(2**62), 33, 34], [31, 17, 47], [2**31, 2**32, 16]], device="cuda"
    )
    rows = torch.tensor([2**40, -(2**40), 8, 9, 2**31, 1], device="cuda")
    memory, pool = states(8, 3, heads=2), states(9, heads=2)
    given = {"checkpoint_state": memory[1:7], "checkpoint_offsets": wild, "state_indices": rows}
    given |= {"initial_state": pool, "final_state": pool}
    if validated:
        with pytest.raises(ValueError, match=r"^state_indices: expected entry 0 to be less than P = 9"):
            call(inputs, **given, validate=True)
        with pytest.raises(ValueError, match=r"^checkpoint_offsets: expected entry \[0, 0\] to be a multiple of 16"):
            call(inputs, **given | {"state_indices": rows.clamp(max=-1)}, validate=True)
        assert pool.eq(7).all() and memory.eq(7).all()
        return
    call(inputs, **given)
    torch.cuda.synchronize()
    assert memory[0].eq(7).all() and memory[7].eq(7).all()
    assert pool.eq(7).flatten(1).all(1).tolist() == [True, False] + [True] * 6 + [False]


@pytest.mark.parametrize("odd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_pool_is_neither_gathered_nor_copied(dtype, odd):
    inputs = on_gpu(seq_lens=LENS, heads=2)
    layers = torch.randn(40, 2, 2, D, D + 3 * odd, device="cuda").to(dtype)[..., :D]
    pool, before, other = layers[:, 1], layers[:, 1].clone(), layers[:, 0].clone()
    rows = torch.tensor([38, -1, 0, 5, 17, 3], dtype=torch.int32, device="cuda")
    given = {"initial_state": pool, "final_state": pool, "state_indices": rows}
    call(inputs, **given | {"initial_state": before.clone(), "final_state": before.clone()})  # loads the kernel
    arguments = arguments_of(inputs) | given
    size = flash_kda.get_workspace_size(sum(LENS), 2, len(LENS))
    arguments["workspace"] = torch.empty(size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    flash_kda.fwd(**arguments)
    assert torch.cuda.max_memory_allocated() == allocated
    initial = before[rows.clamp(min=0)]
    initial[1] = 0
    plain = call(inputs, initial_state=initial, final_state=states(6, heads=2, dtype=dtype))
    expected = before.clone()
    for n, row in enumerate(rows.tolist()):
        if row >= 0:
            expected[row] = plain["final_state"][n]
    assert torch.equal(arguments["out"], plain["out"])
    assert torch.equal(pool, expected) and torch.equal(layers[:, 0], other)


def test_every_way_gives_the_same_bits(monkeypatch):
    """The short ones, in C++ and in Python, and the long one."""
    inputs = on_gpu(seq_lens=LENS, heads=2)
    rows = torch.tensor([7, -1, 0, 5, 3, 8], dtype=torch.int32, device="cuda")
    offsets = drawn_offsets(3, 16, 0)
    pool = torch.randn(9, 2, D, D, device="cuda")
    results = []
    for others in ((), (native,), (native, ordinary)):
        for other in others:
            monkeypatch.setattr(other, "run", lambda *arguments: False)
        if len(others) < 2:
            monkeypatch.setattr(forward, "_long_way", lambda *arguments: pytest.fail("not ordinary"))
        if not others and native.examined is not None:
            monkeypatch.setattr(ordinary, "run", lambda *arguments: pytest.fail("not native"))
        given = dict.fromkeys(("initial_state", "final_state"), pool.clone())
        given |= {"checkpoint_state": states(6, 3, heads=2), "checkpoint_offsets": offsets, "state_indices": rows}
        results.append(call(inputs, **given))
        monkeypatch.undo()
    for name in ("out", "final_state", "checkpoint_state"):
        assert all(torch.equal(result[name], results[0][name]) for result in results), name


def test_a_row_named_twice_is_refused_with_validation():
    inputs = on_gpu(seq_lens=(5, 6), heads=2)
    rows = torch.tensor([1, 1], device="cuda")
    with pytest.raises(ValueError, match=r"^state_indices: expected a row of its own .* row 1 at entries 0 and 1"):
        call(inputs, state_indices=rows, validate=True)


@pytest.mark.parametrize("gap", [0, 1], ids=["in reach", "copied"])
def test_rows_behind_the_end_are_nobodys(gap):
    inputs = on_gpu(seq_lens=LENS, heads=2)
    tokens = sum(LENS)
    behind = 70
    changed = {}
    for name in ("q", "k", "v", "g", "beta"):
        x = getattr(inputs, name)
        changed[name] = torch.cat([x, torch.full_like(x[:, :behind], math.nan)], 1)
    out = torch.full((1, tokens + behind, 2, D + gap), 7.0, dtype=torch.bfloat16, device="cuda")[..., :D]
    result = call(replace(inputs, **changed), out=out)
    expected = run(inputs)
    assert out[:, tokens:].eq(7).all()
    assert_same_bits((out[:, :tokens], result["final_state"]), expected)


def test_a_captured_call_replays_with_other_checkpoints_and_rows():
    inputs = on_gpu(seq_lens=LENS, heads=2)
    pool, offsets = states(9, heads=2), drawn_offsets(3, 16, 0)
    rows = torch.tensor([0, 1, 2, 3, 4, -1], device="cuda")
    checkpoints = states(6, 3, heads=2)
    given = {"initial_state": pool, "final_state": pool, "state_indices": rows}
    given |= {"checkpoint_state": checkpoints, "checkpoint_offsets": offsets}
    arguments = arguments_of(inputs) | given
    flash_kda.fwd(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flash_kda.fwd(**arguments)
    for seed in (1, 2):
        offsets.copy_(drawn_offsets(3, 16, seed))
        rows.copy_(torch.randperm(9)[:6])
        pool.copy_(torch.randn(pool.shape))
        checkpoints.fill_(7)
        fresh = {name: x.clone() for name, x in given.items()}
        fresh["final_state"] = fresh["initial_state"]
        expected = call(inputs, **fresh)
        graph.replay()
        for name in ("out", "final_state", "checkpoint_state"):
            assert torch.equal(arguments[name], expected[name]), name


def test_a_graph_captured_through_fla_replays_with_other_lengths():
    """`chunk_kda(use_graph=True)`: offsets may end before T, and empty sequences stand at the end."""
    chunk_kda = pytest.importorskip("fla.ops.kda").chunk_kda
    inputs = on_gpu(seq_lens=(256,), heads=2)
    offsets = torch.tensor([0, 100, 256, 256, 256], device="cuda")
    initial = torch.randn(4, 2, D, D, device="cuda")

    def step():
        return chunk_kda(
            inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta, scale=D**-0.5, A_log=inputs.A_log,
            dt_bias=inputs.dt_bias.flatten(), lower_bound=-5.0, initial_state=initial, output_final_state=True,
            cu_seqlens=offsets, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
            safe_gate=True, state_v_first=True, use_graph=True, max_num_seqs=4,
        )  # fmt: skip

    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, state = step()
    for lengths in ([30, 70, 1, 0], [200, 0, 0, 0], [64, 64, 64, 64]):
        offsets[1:].copy_(torch.tensor(lengths).cumsum(0))
        graph.replay()
        plain = replace(inputs, cu_seqlens=offsets.clone(), initial_state=initial, scale=D**-0.5, lower_bound=-5.0)
        expected = run(plain)
        end = sum(lengths)
        assert torch.equal(out[:, :end], expected[0][:, :end]) and torch.equal(state, expected[1])
