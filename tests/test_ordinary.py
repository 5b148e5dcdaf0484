"""The short way of a call: it takes nothing that the checks refuse, and gives the kernel what the long way gives it."""

from __future__ import annotations

import contextlib
import ctypes
import math
from unittest import mock

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_arguments import legal_arguments

from flash_kda import arguments, library, native, ordinary
from flash_kda.workspace import is_reachable

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
]

D = 128
TOKENS = ("q", "k", "v", "g", "out")
STATES = ("initial_state", "final_state")
WIDE_STATES = (*STATES, "checkpoint_state")
INDICES = ("cu_seqlens", "state_indices", "checkpoint_offsets")
PARAMETERS = ("q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound", *STATES, "cu_seqlens",
              "validate", "workspace", "state_indices", "checkpoint_state", "checkpoint_offsets")  # fmt: skip
SCRATCH = torch.zeros(64, dtype=torch.uint8)


# ------------------------------------------------------------------------------------------- what is ordinary


def examine(**call) -> tuple[tuple, tuple] | None:
    """What `ordinary.examine` says; `native.cpp` says the same, where it serves."""
    fields = ordinary.examine(**call)
    if native.examined is not None:
        memory = call.get("workspace")
        scratch = (0, 0) if fields is None or memory is None else (memory.data_ptr(), memory.nbytes)
        expected = None if fields is None else (*fields[0], *scratch, *fields[1])
        packed = native.examined(*(call.get(name) for name in PARAMETERS))
        assert (packed and library.PACKED.unpack(packed)) == (expected and rounded(expected))
    return fields


def rounded(fields: tuple) -> tuple:
    """As C holds them."""
    return library.PACKED.unpack(library.PACKED.pack(*fields))


def is_refused(call: dict) -> bool:
    """By the full checks, those of contents left out as they are on a GPU."""
    with contextlib.ExitStack() as patches:
        for name in INDICES:
            patches.enter_context(mock.patch.object(arguments, f"check_{name}"))
        try:
            arguments.check_arguments(**call)
        except Exception:
            return True
    return False


AXES = {"sequence": 0, "batch": 0, "token": 1, "head": -3, "value": -2}  # that a stride is of


def facts(packed: ctypes.Structure, call: dict, of: str | None = None) -> dict:
    """All that the kernel is told, but for strides of dimensions of size 1, which it never uses."""
    result, x = {}, call.get(of)
    for name, *_ in packed._fields_:
        value = getattr(packed, name)
        if isinstance(value, ctypes.Structure):
            result |= facts(value, call, name if name in call else of)
            continue
        axis = AXES.get(name.removeprefix("stride_")) if name.startswith("stride") else None
        if isinstance(packed, library.Tokens) and name == "stride_head":
            axis = 2
        is_unused = axis is not None and (x is None or x.shape[axis] == 1)
        result[f"{of}.{name}"] = None if is_unused else value
    return result


def assert_packed_alike(fields: tuple[tuple, tuple], call: dict) -> None:
    short = library.Arguments.from_buffer_copy(
        library.PACKED.pack(*fields[0], SCRATCH.data_ptr(), SCRATCH.nbytes, *fields[1])
    )
    tensors = {name: x for name, x in call.items() if name not in ("validate", "workspace")}
    long = library.pack(**tensors, scratch=SCRATCH)
    assert facts(short, call) == facts(long, call)


class Subclass(torch.Tensor):
    pass


MEMORY = 2**22  # bytes of the buffer that tensors are placed in
ODDITIES = {
    "none": lambda x: None,
    "list": lambda x: [0.0],
    "float64": lambda x: x.double(),
    "float16": lambda x: x.half(),
    "int32": lambda x: x.to(torch.int32),
    "float32": lambda x: x.float(),
    "bfloat16": lambda x: x.bfloat16(),
    "meta": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([torch.zeros(2, 2)]),
    "an axis more": lambda x: x[None],
    "an axis less": lambda x: x[0],
    "no axes": lambda x: x.flatten()[0],
    "an axis of one": lambda x: x[..., None],
    "narrower": lambda x: x[..., :-1],
    "empty": lambda x: x[:0],
    "doubled": lambda x: torch.cat([x, x]),
    "transposed": lambda x: x.transpose(0, -1),
    "spread": lambda x: torch.stack([x, x], -1)[..., 0],
    "copied": lambda x: x.clone(memory_format=torch.contiguous_format),
    "expanded": lambda x: x[..., :1].expand(x.shape),
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "negative": torch._neg_view,
    "of zeros": lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    "functional": torch._to_functional_tensor,
}
NUMBERS = [0, -1, -5, -6, 10**400, 0.0, -0.0, True, "0", None, math.nan, math.inf, -5.1, 1e39, -1e39, -2.5]


class Call(dict):
    def __repr__(self) -> str:
        def told(x) -> str:
            if not isinstance(x, torch.Tensor):
                return repr(x)
            is_dense = type(x) is torch.Tensor and not x.is_nested and x.layout == torch.strided
            return f"{list(x.shape)} {x.stride()} {x.dtype} {x.data_ptr():#x}" if is_dense else f"a {type(x).__name__}"

        return "\n".join(f"{name}: {told(x)}" for name, x in self.items())


Kinds = dict[str, tuple[tuple[int, ...], torch.dtype, list[int]]]  # shape, dtype and strides of each tensor


@st.composite
def kinds_of_a_call(draw) -> Kinds:
    """Mostly contiguous; slices of something wider, and odder strides. One in two has arguments of serving engines."""
    packed = draw(st.booleans())
    batch = 1 if packed else draw(st.sampled_from([1, 2]))
    tokens, heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    sequences = draw(st.sampled_from([1, 2])) if packed else batch
    row, state = (batch, tokens, heads, D), (sequences, heads, D, D)
    bf16, fp32 = torch.bfloat16, torch.float32
    kinds = dict.fromkeys(TOKENS, (row, bf16))
    kinds |= {"beta": (row[:3], bf16), "A_log": ((heads,), fp32), "dt_bias": ((heads, D), fp32)}
    integers = st.sampled_from([torch.int32, torch.int64])
    pool = serving = draw(st.booleans())
    if pool := serving and draw(st.booleans()):
        kinds["state_indices"] = ((sequences,), draw(integers))
    for name in STATES:
        if draw(st.booleans()):
            rows = draw(st.sampled_from([1, 3])) if pool else sequences
            kinds[name] = ((rows, *state[1:]), draw(st.sampled_from([bf16, fp32])))
    if packed:
        kinds["cu_seqlens"] = ((sequences + 1,), draw(integers))
    if serving and draw(st.booleans()):
        offsets = draw(st.sampled_from([(sequences,), (sequences, 1), (sequences, 2)]))
        kinds["checkpoint_offsets"] = (offsets, draw(integers))
        kinds["checkpoint_state"] = ((*offsets, *state[1:]), draw(st.sampled_from([bf16, fp32])))
    if draw(st.booleans()):
        kinds["workspace"] = ((80,), torch.uint8)
    for name, (shape, dtype) in kinds.items():
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if name in (*TOKENS, "beta", *WIDE_STATES) and draw(st.integers(0, 4)) == 0:
            wider, axis = draw(st.sampled_from([D, D, 8, 8, 4])), len(shape) - 2 if name in WIDE_STATES else 2
            strides = [x + wider * x // strides[axis] for x in strides[: axis + 1]] + strides[axis + 1 :]
            if draw(st.integers(0, 3)) == 0:
                strides[draw(st.integers(0, len(strides) - 1))] = draw(st.sampled_from([0, 1, 2, 8, 64]))
        if name in ("state_indices", "checkpoint_offsets") and draw(st.booleans()):
            strides = [draw(st.sampled_from([0, 1, 5])) for _ in shape]
        kinds[name] = (shape, dtype, strides)
    return kinds


def placed(draw, kinds: Kinds) -> Call:
    """In one buffer, side by side; or one of them over the one before, or unaligned."""
    buffer, end, call = torch.zeros(MEMORY, dtype=torch.uint8), 0, Call()
    misplaced = draw(st.sampled_from([None, None, *kinds]))
    for name in draw(st.permutations(list(kinds))):
        shape, dtype, strides = kinds[name]
        start = -(-end // 16) * 16
        if name == misplaced:
            gap = draw(st.sampled_from([-16, -2, -4, -(2**12), 2, 4, 8]))
            start = max(0, start + gap) // dtype.itemsize * dtype.itemsize
        call[name] = buffer.view(dtype).as_strided(shape, strides, start // dtype.itemsize)
        end = max(end, start + (1 + sum((n - 1) * x for n, x in zip(shape, strides, strict=True))) * dtype.itemsize)
    if len(STATES) == sum(name in call for name in STATES) and draw(st.booleans()):
        state = call["initial_state"]
        call["final_state"] = draw(st.sampled_from([state, state.view(state.shape)]))
    return Call({**dict.fromkeys((*STATES, "cu_seqlens")), **call, "scale": D**-0.5, "lower_bound": -5.0})


def with_oddities(draw, call: Call) -> Call:
    """None to two."""
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        name = draw(st.sampled_from(sorted(call)))
        if isinstance(call[name], torch.Tensor):
            oddity = draw(st.sampled_from(sorted(ODDITIES)))
            with contextlib.suppress(RuntimeError, NotImplementedError, IndexError):  # what this tensor cannot be
                call[name] = ODDITIES[oddity](call[name])
        elif name in ("scale", "lower_bound"):
            call[name] = draw(st.sampled_from(NUMBERS))
    return call


@st.composite
def calls(draw) -> Call:
    """Arguments of `flash_kda.fwd`."""
    return with_oddities(draw, placed(draw, draw(kinds_of_a_call())))


@settings(max_examples=500)
@given(calls())
def test_what_is_ordinary_is_refused_by_no_check_and_packed_alike(call):
    fields = examine(**call)
    kind = "with serving" if call.keys() & {"state_indices", "checkpoint_state"} else "without"
    event(f"{'not ordinary' if fields is None else 'ordinary'}, {kind}")
    if fields is None:
        return
    assert not is_refused(call)
    assert all(is_reachable(call[name]) for name in TOKENS)
    assert not any(x.is_neg() for x in call.values() if isinstance(x, torch.Tensor))
    assert_packed_alike(fields, call)


def aligned(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)  # from PyTorch's allocator


def projected(parts: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """Slices of a fused projection."""
    return aligned((*shape[:-1], parts * shape[-1])).split(shape[-1], -1)


def usual(**changes) -> dict:
    return {**legal_arguments(), **changes}


def pools(**changes) -> dict:
    """Both sequences have rows of their own in pools of 5 and 4."""
    states = {"initial_state": aligned((5, 3, D, D)), "final_state": aligned((4, 3, D, D), torch.float32)}
    return {"state_indices": torch.tensor([3, -1]), **states, **changes}


def checkpoints(*shape: int) -> dict:
    return {"checkpoint_state": aligned((*shape, 3, D, D)), "checkpoint_offsets": torch.zeros(shape, dtype=torch.int64)}


Q = (1, 6, 3, D)
ORDINARY = {
    "packed, both states": lambda: usual(),
    "int32 offsets": lambda: usual(cu_seqlens=torch.tensor([0, 4, 6], dtype=torch.int32)),
    "no states": lambda: usual(initial_state=None, final_state=None),
    "no initial state": lambda: usual(initial_state=None),
    "no final state": lambda: usual(final_state=None),
    "fp32 states": lambda: usual(**{name: aligned((2, 3, D, D), torch.float32) for name in STATES}),
    "bf16 and fp32": lambda: usual(final_state=aligned((2, 3, D, D), torch.float32)),
    "in place": lambda: usual(final_state=(state := aligned((2, 3, D, D))), initial_state=state),
    "one sequence": lambda: usual(cu_seqlens=None, initial_state=None, final_state=None),
    "a batch": lambda: usual(
        **{name: aligned((2, *Q[1:])) for name in TOKENS}, beta=aligned((2, 6, 3)), cu_seqlens=None
    ),
    "a fused projection": lambda: usual(**dict(zip("qkv", projected(3, Q), strict=True))),
    "the first tokens of buffers": lambda: usual(**{name: aligned((1, 9, 3, D))[:, :6] for name in TOKENS}),
    "beta of a fused projection": lambda: usual(beta=aligned((1, 6, 9))[..., 3:6]),
    "parameters": lambda: usual(
        A_log=torch.nn.Parameter(torch.zeros(3)), dt_bias=torch.nn.Parameter(torch.zeros(3, D))
    ),
    "gradients asked for": lambda: usual(q=aligned(Q).requires_grad_()),
    "one k and v": lambda: usual(k=(x := aligned(Q)), v=x),
    "whole numbers": lambda: usual(scale=1, lower_bound=-5),
    "beta that is head-major": lambda: usual(beta=aligned((1, 3, 6)).transpose(1, 2)),
    "parameters as models keep them": lambda: usual(A_log=torch.zeros(1, 1, 3, 1), dt_bias=torch.zeros(3 * D)),
    "a pool": lambda: usual(**pools()),
    "a pool in place": lambda: usual(**pools(**dict.fromkeys(STATES, aligned((5, 3, D, D))))),
    "a layer of a pool": lambda: usual(**pools(**dict.fromkeys(STATES, aligned((5, 2, 3, D, D + 1))[:, 1, ..., :D]))),
    "a pool without a final state": lambda: usual(**pools(final_state=None)),
    "a column of indices": lambda: usual(state_indices=torch.tensor([[0, 5], [1, 5]], dtype=torch.int32)[:, 0]),
    "checkpoints": lambda: usual(**checkpoints(2, 4)),
    "checkpoints, one for each": lambda: usual(**checkpoints(2)),
    "checkpoints, strided": lambda: usual(
        checkpoint_state=aligned((2, 6, 3, D, D + 3))[:, ::2, ..., :D], checkpoint_offsets=torch.zeros(3, 2).int().T
    ),
    "a pool and checkpoints": lambda: usual(**pools(), **checkpoints(2, 4)),
    "unaligned states": lambda: usual(final_state=off(aligned((2, 3, D, D)))),
    "its own workspace": lambda: usual(workspace=torch.zeros(80, dtype=torch.uint8)),
}


@pytest.mark.parametrize("make", ORDINARY.values(), ids=ORDINARY)
def test_what_models_call_is_ordinary(make):
    call = make()
    fields = examine(**call)
    assert fields is not None
    assert not is_refused(call)
    assert_packed_alike(fields, call)


def assert_no_looser_than_the_checks(call: dict) -> None:
    fields = examine(**call)
    assert fields is None or not is_refused(call)


TENSORS = (*TOKENS, "beta", "A_log", "dt_bias", *STATES, "checkpoint_state", *INDICES, "workspace")


def with_all() -> dict:
    """Every optional tensor is there."""
    return usual(**pools(), **checkpoints(2, 4), workspace=torch.zeros(80, dtype=torch.uint8))


@pytest.mark.parametrize("oddity", ODDITIES)
@pytest.mark.parametrize("name", TENSORS)
def test_one_odd_tensor(name, oddity):
    for states in ({}, dict.fromkeys(STATES, None)):
        call = with_all() | states
        if call[name] is None:
            continue
        try:
            call[name] = ODDITIES[oddity](call[name])
        except (RuntimeError, NotImplementedError):
            continue
        assert_no_looser_than_the_checks(call)
        if oddity in ("subclass", "negative", "of zeros", "functional") and name != "workspace":
            assert examine(**call) is None  # for PyTorch to make sense of


@pytest.mark.parametrize("value", NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["scale", "lower_bound"])
def test_one_odd_number(name, value):
    assert_no_looser_than_the_checks(usual(**{name: value}))


@pytest.mark.parametrize(
    ("written", "name", "batch"),
    [
        (written, name, batch)
        for written in ("out", "final_state", "checkpoint_state", "workspace")
        for name in TENSORS
        for batch in (1, 2)
        if name != written and (name, batch) != ("cu_seqlens", 2)
    ],
)
def test_memory_of_two(written, name, batch):
    """From a little before to a little past each other, and neither."""
    call = with_all()
    if batch == 2:
        call |= {x: torch.cat([call[x]] * 2) for x in (*TOKENS, "beta")} | {"cu_seqlens": None}
    first, second = call[written], call[name]
    middle = 4 * second.nbytes // 16 * 16 + 64
    answers = set()
    for start in (-second.nbytes, -second.nbytes + 8, 0, first.nbytes - 8, first.nbytes):
        buffer = torch.zeros(middle + first.nbytes + 4 * second.nbytes + 64, dtype=torch.uint8)
        for x, tensor, at in ((written, first, middle), (name, second, middle + start // 8 * 8)):
            part = buffer[at : at + tensor.nbytes]
            call[x] = part.view(tensor.dtype).view(tensor.shape)
        assert_no_looser_than_the_checks(call)
        answers.add(is_refused(call))
    assert answers == {False, True}


def test_a_workspace_must_be_large_enough(monkeypatch):
    """On a GPU, where some is needed."""
    monkeypatch.setattr(library, "scratch_bytes", lambda index: 80)
    asked = mock.PropertyMock(return_value=True)
    memory = torch.zeros(96, dtype=torch.uint8)
    with mock.patch.object(torch.Tensor, "is_cuda", asked):
        assert ordinary.examine(**usual(workspace=memory[:80])) is not None
        assert ordinary.examine(**usual(workspace=memory[:79])) is None


# What is not, one property each. A step of 1 in a size that is 1 would be no step at all, so sizes are at least 2.
def rows(strides: tuple[int, ...], start: int = 0) -> torch.Tensor:
    """`[2, 6, 3, 128]` of these strides, from an element on."""
    last = sum((n - 1) * x for n, x in zip((2, 6, 3, D), strides, strict=True))
    return torch.zeros(start + last + 1, dtype=torch.bfloat16).as_strided((2, 6, 3, D), strides, start)


def off(x: torch.Tensor, elements: int = 1) -> torch.Tensor:
    """The same values so many elements beside an aligned address."""
    return torch.cat([x.new_zeros(elements), x.flatten()])[elements:].view(x.shape)


def batch_of_two(**changes) -> dict:
    made = {name: aligned((2, *Q[1:])) for name in TOKENS}
    return usual(**made, beta=aligned((2, 6, 3)), cu_seqlens=None) | changes


NOT_ORDINARY = {
    "unaligned q": lambda: usual(q=off(usual()["q"])),
    "q at 8 bytes": lambda: usual(q=off(usual()["q"], 4)),
    "unaligned out": lambda: usual(out=off(usual()["out"])),
    "heads of a state over each other": lambda: usual(
        initial_state=torch.zeros(2**18, dtype=torch.bfloat16).as_strided((2, 3, D, D), (3 * D * D, 64, D, 1))
    ),
    "rows of a pool over each other": lambda: usual(
        **pools() | {"final_state": aligned((1, 3, D, D)).expand(4, -1, -1, -1)}
    ),
    "indices of other sequences": lambda: usual(**pools(state_indices=torch.zeros(3, dtype=torch.int64))),
    "checkpoints without offsets": lambda: usual(**checkpoints(2) | {"checkpoint_offsets": None}),
    "offsets without checkpoints": lambda: usual(**checkpoints(2) | {"checkpoint_state": None}),
    "fewer offsets than checkpoints": lambda: usual(
        **checkpoints(2, 4) | {"checkpoint_offsets": torch.zeros(2, 3).int()}
    ),
    "no checkpoints for each": lambda: usual(**checkpoints(2, 0)),
    "unaligned workspace": lambda: usual(workspace=torch.zeros(96, dtype=torch.uint8)[8:]),
    "expanded tokens": lambda: batch_of_two(k=rows((384, 0, D, 1))),
    "expanded heads": lambda: batch_of_two(k=rows((6 * D, D, 0, 1))),
    "expanded batch": lambda: batch_of_two(k=rows((0, 384, D, 1))),
    "odd heads": lambda: batch_of_two(v=rows((6 * 396, 396, 132, 1))),
    "odd tokens": lambda: batch_of_two(v=rows((6 * 388, 388, D, 1))),
    "odd batch": lambda: batch_of_two(v=rows((2308, 384, D, 1))),
    "sparse channels": lambda: batch_of_two(v=rows((12 * 384, 768, 2 * D, 2))),
    "out over itself": lambda: batch_of_two(out=rows((1024, 136, 8, 1))),
    "offsets and a batch": lambda: batch_of_two(cu_seqlens=torch.tensor([0, 4, 6])),
    "one offset": lambda: usual(cu_seqlens=torch.tensor([0]), initial_state=None, final_state=None),
    "64 channels": lambda: usual(**{name: aligned((*Q[:-1], 64)) for name in TOKENS}),
    "no tokens": lambda: usual(
        **{name: aligned((1, 0, 3, D)) for name in TOKENS}, beta=aligned((1, 0, 3)), cu_seqlens=torch.tensor([0, 0, 0])
    ),
}


@pytest.mark.parametrize("make", NOT_ORDINARY.values(), ids=NOT_ORDINARY)
def test_what_is_not_ordinary(make):
    assert examine(**batch_of_two()) is not None
    assert examine(**make()) is None


@pytest.mark.parametrize("name", TENSORS)
def test_all_tensors_are_on_the_device_of_q(name):
    """Told by `device` alone, as of two GPUs."""
    call = with_all()
    of = torch.Tensor.device.__get__
    moved = property(lambda x: torch.device("cuda", 1) if x is call[name] else of(x))
    with mock.patch.object(torch.Tensor, "device", moved):
        assert ordinary.examine(**call) is None
