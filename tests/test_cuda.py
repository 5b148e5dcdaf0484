"""The CUDA kernel: right, bit for bit the same in every form of a call, and well behaved as a citizen of PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from on_gpu import (
    arguments_of,
    assert_as_right_as_the_model,
    assert_same_bits,
    hopper,  # noqa: F401 - a fixture of every test
    on_gpu,
    outputs_for,
    run,
    spread,
)

import flash_kda
from flash_kda import library

pytestmark = pytest.mark.gpu

CASES = {
    "plain": {},
    "int32": {"cu_seqlens_dtype": "int32"},
    **{f"one of {n}": {"seq_lens": (n,), "packed": False} for n in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300)},
    "batch": {"seq_lens": (70,) * 3, "packed": False},
    "more sequences than processors": {"seq_lens": tuple(n % 37 for n in range(400)), "heads": 2},
    "more heads than processors": {"seq_lens": (33, 70), "heads": 200},
    "no decay": {"lower_bound": 0.0},
    "half the bound": {"lower_bound": -2.5},
    "large scale": {"scale": 3.0},
    "strided": {"layout": "strided"},
}

STATES = list(itertools.product((None, "bf16", "fp32"), repeat=2))

WRONG_OFFSETS = {
    "starts late": [3, 64, 128],
    "starts below zero": [-7, 64, 128],
    "decreases": [0, 100, 50, 128],
    "ends early": [0, 64, 100],
    "ends late": [0, 64, 200],
    "leaves and comes back": [0, 5000, 128],
    "far out": [0, 2**40, 2**41],
    "far below": [-(2**62), 0, 128],
    "largest": [0, 2**63 - 1, 128],
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_against_the_oracle_and_the_model(changes):
    inputs = on_gpu(**changes)
    assert_as_right_as_the_model(inputs, *run(inputs))


@pytest.mark.parametrize(("initial", "final"), STATES)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_every_pair_of_states(initial, final, dtype):
    inputs = on_gpu(initial_state=initial, final_state=final, cu_seqlens_dtype=dtype)
    assert_as_right_as_the_model(inputs, *run(inputs))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_state_is_updated_in_place(dtype):
    apart = run(on_gpu(initial_state=dtype, final_state=dtype))
    assert_same_bits(run(on_gpu(initial_state=dtype, final_state=dtype, in_place=True)), apart)


@pytest.mark.parametrize("initial", [None, "bf16", "fp32"])
@pytest.mark.parametrize("form", [{"packed": True}, {"packed": False}], ids=["packed", "batch"])
def test_without_tokens_the_state_passes_through(initial, form):
    inputs = on_gpu(seq_lens=(0, 0, 0), initial_state=initial, **form)
    out, final_state = run(inputs)
    assert out.numel() == 0
    before = torch.zeros_like(final_state) if initial is None else inputs.initial_state.float()
    assert torch.equal(final_state, before)


def test_empty_sequences_among_others_pass_their_state_through():
    inputs = on_gpu(seq_lens=(0, 65, 0, 0, 3, 0))
    out, final_state = run(inputs)
    assert torch.equal(final_state[[0, 2, 3, 5]], inputs.initial_state[[0, 2, 3, 5]])
    assert out.isfinite().all()


def test_without_heads_nothing_happens():
    inputs = on_gpu(seq_lens=(5,), packed=False)
    none = {name: getattr(inputs, name)[:, :, :0] for name in ("q", "k", "v", "g", "beta")}
    states = inputs.initial_state[:, :0]
    few = replace(inputs, **none, A_log=inputs.A_log[:0], dt_bias=inputs.dt_bias[:0], initial_state=states)
    assert run(few)[0].numel() == 0


@pytest.mark.parametrize("heads", [8, 70])
def test_a_long_sequence_is_its_two_halves(heads):
    """64 chunks: stages and phases come round many times, and 70 heads are cut into a piece for each pair of CTAs."""
    whole = on_gpu(seq_lens=(4096,), heads=heads, packed=False, gates="weak")
    expected = run(whole)
    read = ("q", "k", "v", "g", "beta")
    state, halves = whole.initial_state, []
    for rows in (slice(0, 2048), slice(2048, 4096)):
        part = {name: getattr(whole, name)[:, rows].contiguous() for name in read}
        out, state = run(replace(whole, **part, initial_state=state))
        halves.append(out)
    assert_same_bits((torch.cat(halves, 1), state), expected)
    few = {name: getattr(whole, name)[:, :, -1:].contiguous() for name in read}
    few |= {"A_log": whole.A_log[-1:], "dt_bias": whole.dt_bias[-1:], "initial_state": whole.initial_state[:, -1:]}
    last = expected[0][:, :, -1:], expected[1][:, -1:]
    assert_as_right_as_the_model(replace(whole, **few), *last)


@pytest.mark.gpu(gib=40)
def test_states_of_more_than_2_to_31_elements():
    """1,400 sequences of 96 heads: the last state begins beyond 2^31 elements. In place, and read from there."""
    heads = 96
    one = on_gpu(seq_lens=(1,) * 1400, heads=1, initial_state="bf16", final_state="bf16")
    read = {name: getattr(one, name).repeat_interleave(heads, 2) for name in ("q", "k", "v", "g", "beta")}
    read |= {"A_log": one.A_log.repeat(heads), "dt_bias": one.dt_bias.repeat(heads, 1)}
    states = one.initial_state.repeat_interleave(heads, 1)
    assert states[-1].storage_offset() > 2**31
    out, final_state = run(replace(one, **read, initial_state=states, in_place=True))
    expected = run(one)
    for head in (0, heads - 1):
        assert_same_bits((out[:, :, head : head + 1], final_state[:, head : head + 1]), expected)


def test_thousands_of_sequences():
    inputs = on_gpu(seq_lens=tuple(n % 3 for n in range(20_000)), heads=1, final_state="bf16", initial_state=None)
    out, final_state = run(inputs)
    assert out.isfinite().all()
    for n in (0, 1, 10_001, 19_999):  # by itself
        first = int(inputs.cu_seqlens[n])
        rows = slice(first, int(inputs.cu_seqlens[n + 1]))
        alone = {name: getattr(inputs, name)[:, rows] for name in ("q", "k", "v", "g", "beta")}
        one = replace(inputs, **alone, cu_seqlens=None)
        assert_same_bits(run(one), (out[:, rows], final_state[n : n + 1]))
    assert (final_state[inputs.cu_seqlens.diff() == 0] == 0).all()


def test_strided_inputs_give_the_bits_of_contiguous_ones():
    strided = on_gpu(layout="strided")
    whole = {name: getattr(strided, name).contiguous() for name in ("q", "k", "v", "g", "beta")}
    assert not strided.q.is_contiguous()
    assert_same_bits(run(strided), run(replace(strided, **whole)))


def test_inputs_with_heads_before_tokens_in_memory():
    whole = on_gpu()
    turned = {name: getattr(whole, name).transpose(1, 2).contiguous().transpose(1, 2) for name in ("q", "k", "v", "g")}
    assert turned["q"].stride(2) > turned["q"].stride(1)
    assert_same_bits(run(replace(whole, **turned)), run(whole))


def untouched(x: torch.Tensor) -> bool:
    """Whether the memory around the elements of what `spread` made holds what it held."""
    memory = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).clone()
    memory.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(77.0)
    return bool((memory == 77.0).all())


@pytest.mark.parametrize("own_memory", [False, True], ids=["allocator", "workspace"])
@pytest.mark.parametrize(("offset", "gap"), [(8, 8), (1, 0), (0, 1), (2, 2), (3, 5)])
def test_any_alignment_gives_the_same_bits(offset, gap, own_memory):
    plain = on_gpu()
    expected = run(plain)
    names = ("q", "k", "v", "g", "initial_state", "dt_bias")
    moved = replace(plain, **{name: spread(getattr(plain, name), offset, gap) for name in names})
    moved.beta = spread(plain.beta, offset, gap)
    written = {name: spread(torch.full_like(x, torch.nan), offset, gap) for name, x in outputs_for(plain).items()}
    size = flash_kda.get_workspace_size(
        moved.q, moved.k, moved.v, moved.g, written["out"], moved.initial_state, written["final_state"]
    )
    copies = 0 if (offset, gap) == (8, 8) else 5 * plain.q.numel() * 2  # states are never copied
    assert size == library.scratch_bytes(0) + copies
    workspace = torch.full((size + 64,), 77, dtype=torch.uint8, device="cuda") if own_memory else None
    memory = None if workspace is None else workspace[:size]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    run(moved, **written, workspace=memory)
    if own_memory:
        assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert_same_bits(written.values(), expected)
    assert all(untouched(x) for x in written.values())
    assert workspace is None or (workspace[size:] == 77).all()


def test_an_unaligned_state_is_updated_in_place():
    apart = run(on_gpu())
    inputs = on_gpu(in_place=True)
    inputs.initial_state = spread(inputs.initial_state, 1, 1)
    assert_same_bits(run(inputs), apart)
    assert untouched(inputs.initial_state)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda size: torch.empty(size - 1, dtype=torch.uint8, device="cuda"),
            r"ValueError: workspace: expected shape",
        ),
        (
            lambda size: torch.empty(size + 1, dtype=torch.uint8, device="cuda")[1:],
            r"ValueError: workspace: expected an address",
        ),
        (lambda size: torch.empty(size, dtype=torch.int8, device="cuda"), r"TypeError: workspace: expected dtype"),
        (
            lambda size: torch.empty(size, dtype=torch.uint8),
            r"ValueError: workspace: expected a tensor on cuda:0, where q is, got one on cpu",
        ),
    ],
)
def test_a_wrong_workspace_is_refused(wrong, said):
    inputs = on_gpu()
    inputs.q = spread(inputs.q, 1, 0)
    size = library.scratch_bytes(0) + inputs.q.numel() * 2
    kind, message = said.split(": ", 1)
    with pytest.raises({"ValueError": ValueError, "TypeError": TypeError}[kind], match=f"^{message}"):
        run(inputs, workspace=wrong(size))
    assert_same_bits(run(inputs, workspace=torch.empty(size, dtype=torch.uint8, device="cuda")), run(inputs))


@pytest.mark.gpu(gib=40)
def test_offsets_beyond_32_bits():
    """Tokens 2^29 elements apart: the last of them starts beyond 2^31 elements, and beyond 2^32 bytes."""
    near = on_gpu(seq_lens=(6,), packed=False, heads=2, initial_state=None)
    far, step = {}, 2**29
    memory = torch.empty(5 * step + 4096, dtype=torch.bfloat16, device="cuda")
    for i, name in enumerate(("q", "k", "v", "g")):
        far[name] = memory.as_strided((1, 6, 2, 128), (8, step, 128, 1), 256 * i).copy_(getattr(near, name))
    far["beta"] = memory.as_strided((1, 6, 2), (8, step, 1), 2048).copy_(near.beta)
    out = torch.empty(5 * step + 4096, dtype=torch.bfloat16, device="cuda")
    out = out.as_strided((1, 6, 2, 128), (8, step, 128, 1)).fill_(torch.nan)
    state = torch.empty(2**31 + 2**15, device="cuda").as_strided((1, 2, 128, 128), (8, 2**31, 128, 1))
    state.fill_(torch.nan)
    size = flash_kda.get_workspace_size(far["q"], far["k"], far["v"], far["g"], out, None, state)
    assert size == library.scratch_bytes(0)  # nothing is copied
    assert_same_bits(run(replace(near, **far), out=out, final_state=state), run(near))


def wrong_offsets(offsets: list[int], dtype: torch.dtype) -> torch.Tensor:
    limits = torch.iinfo(dtype)
    return torch.tensor([min(max(x, limits.min), limits.max) for x in offsets], dtype=dtype, device="cuda")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("offsets", WRONG_OFFSETS.values(), ids=WRONG_OFFSETS)
def test_wrong_offsets_touch_no_memory_outside(offsets, dtype):
    """Nobody says what is computed; but the call ends, nothing outside is written, and the next call is right."""
    right = on_gpu(seq_lens=(64, 64), heads=2)
    expected = run(right)
    states = right.initial_state[:1].repeat(len(offsets) - 1, 1, 1, 1)
    wrong = replace(right, cu_seqlens=wrong_offsets(offsets, dtype), initial_state=states)
    around = 256 * wrong.v[0, 0].numel()  # more than the right tokens on either side
    written = {name: spread(x, around, 0, guard=around) for name, x in outputs_for(wrong).items()}
    run(wrong, **written)
    torch.cuda.synchronize()
    assert all(untouched(x) for x in written.values())
    assert_same_bits(run(right), expected)


@pytest.mark.parametrize("by_environment", [False, True])
@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([3, 64, 128], "entry 0 to be 0, got 3"),
        ([0, 100, 50, 128], "entry 2 to be at least entry 1, 100, got 50"),
        ([0, 64, 200], "entry 2 to be at most T = 128, got 200"),
    ],
)
def test_validation_names_the_first_wrong_entry(offsets, said, by_environment, monkeypatch):
    right = on_gpu(seq_lens=(64, 64), heads=2)
    states = right.initial_state[:1].repeat(len(offsets) - 1, 1, 1, 1)
    wrong = replace(right, cu_seqlens=wrong_offsets(offsets, torch.int64), initial_state=states)
    written = outputs_for(wrong)
    if by_environment:
        monkeypatch.setenv("FLASH_KDA_VALIDATE", "1")
    with pytest.raises(ValueError, match=f"^cu_seqlens: expected {said}"):
        run(wrong, **written, **({} if by_environment else {"validate": True}))
    assert all(x.isnan().all() for x in written.values())


@pytest.mark.parametrize("name", ["k", "out", "A_log", "initial_state", "cu_seqlens"])
def test_a_tensor_on_another_device_is_refused(name):
    inputs = on_gpu()
    arguments = arguments_of(inputs)
    with pytest.raises(ValueError, match=f"^{name}: expected a tensor on cuda:0, where q is, got one on cpu"):
        flash_kda.fwd(**{**arguments, name: arguments[name].cpu()})
