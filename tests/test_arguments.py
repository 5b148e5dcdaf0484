"""Every bad argument raises before anything is written; the message names it, what was expected and what it got."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import flash_kda
from flash_kda.arguments import check_arguments

B, T, H, N, D = 1, 6, 3, 2, 128
OPTIONAL = ("initial_state", "final_state", "cu_seqlens")
SHAPES = {
    "q": (B, T, H, D),
    "k": (B, T, H, D),
    "v": (B, T, H, D),
    "g": (B, T, H, D),
    "beta": (B, T, H),
    "out": (B, T, H, D),
    "A_log": (H,),
    "dt_bias": (H, D),
    "initial_state": (N, H, D, D),
    "final_state": (N, H, D, D),
    "cu_seqlens": (N + 1,),
}
ACCEPTED_DTYPES = {
    **dict.fromkeys(("q", "k", "v", "g", "beta", "out"), (torch.bfloat16,)),
    **dict.fromkeys(("A_log", "dt_bias"), (torch.float32,)),
    **dict.fromkeys(("initial_state", "final_state"), (torch.bfloat16, torch.float32)),
    "cu_seqlens": (torch.int32, torch.int64),
}
ALL_DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
WRITTEN = ("out", "final_state")


def legal_arguments() -> dict:
    """A packed call of two sequences, 4 and 2 tokens, with both states; its outputs are poisoned with NaN."""
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in drawn_arguments().items()}


@cache
def drawn_arguments() -> dict:
    generator = torch.Generator().manual_seed(0)
    arguments = {
        name: torch.randn(shape, generator=generator).to(ACCEPTED_DTYPES[name][0]) for name, shape in SHAPES.items()
    }
    arguments |= {name: torch.full_like(arguments[name], math.nan) for name in WRITTEN}
    return {**arguments, "scale": D**-0.5, "lower_bound": -5.0, "cu_seqlens": torch.tensor([0, 4, T])}


def as_float(number) -> str:
    try:
        return str(float(number))
    except OverflowError:
        return "inf"


def run(**changes) -> dict:
    arguments = {**legal_arguments(), **changes}
    flash_kda.fwd(**arguments)
    return arguments


def all_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The whole storage of a tensor, beyond its own elements too."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def assert_refused(error: type[Exception], name: str, *said: str, **changes) -> None:
    """The call raises `error`, the message starts with the argument's name and says each of `said`; no byte moved."""
    arguments = {**legal_arguments(), **changes}
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    memory = [x for x in tensors if x.layout == torch.strided and not x.is_nested and x.device.type == "cpu"]
    before = [all_bytes(x).clone() for x in memory]
    with pytest.raises(error) as caught:
        flash_kda.fwd(**arguments)
    assert type(caught.value) is error
    message = str(caught.value)
    assert message.startswith(f"{name}: ")
    for part in (*said, "expected ", ", got ", "FLA_FLASH_KDA=0"):
        assert part in message, message
    assert all(torch.equal(all_bytes(x), y) for x, y in zip(memory, before, strict=True))


def test_the_legal_arguments_run():
    arguments = run()
    assert arguments["out"].isfinite().all()
    assert arguments["final_state"].isfinite().all()


@pytest.mark.parametrize(
    "value",
    [[[1.0]], (1, 2), 3, 0.5, "q", None, np.zeros((2, 2), np.float32), torch.nn.Identity()],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("name", SHAPES)
def test_what_is_no_tensor_is_a_type_error(name, value):
    if value is None and name in OPTIONAL:
        if name == "cu_seqlens":  # then there is one sequence, and the states have to be of one
            run(cu_seqlens=None, initial_state=None, final_state=None)
        else:
            run(**{name: None})
        return
    dtypes = [str(dtype) for dtype in ACCEPTED_DTYPES[name]]
    assert_refused(TypeError, name, type(value).__name__, "torch.Tensor", *dtypes, **{name: value})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_dtype_that_fla_hands_over_is_refused_with_the_way_back_to_fla(device):
    given = legal_arguments()
    given["beta"] = given["beta"].float()
    mode, where = FakeTensorMode(), torch.device(device)  # tensors on a GPU, wherever this runs
    fake = {name: FakeTensor(mode, x.to("meta"), where) for name, x in given.items() if isinstance(x, torch.Tensor)}
    with mode, pytest.raises(TypeError, match=r"^beta: expected dtype torch\.bfloat16, got torch\.float32\.") as raised:
        check_arguments(**(given | fake))
    assert "FLA_FLASH_KDA=0" in str(raised.value)


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_dtypes(name, dtype):
    accepted = ACCEPTED_DTYPES[name]
    changed = {name: legal_arguments()[name].to(dtype)}
    if dtype in accepted:
        run(**changed)
    else:
        assert_refused(TypeError, name, str(dtype), *map(str, accepted), **changed)


def resized(name: str, axis: int, change: int) -> torch.Tensor:
    shape = list(SHAPES[name])
    shape[axis] += change
    return torch.zeros(shape, dtype=ACCEPTED_DTYPES[name][0])


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(
    ("name", "axis"),
    [(name, axis) for name in SHAPES if name not in ("q", "cu_seqlens") for axis in range(len(SHAPES[name]))],
)
def test_a_wrong_size_along_any_axis_is_a_value_error(name, axis, change):
    wrong = resized(name, axis, change)
    assert_refused(ValueError, name, str(list(wrong.shape)), str(list(SHAPES[name])), **{name: wrong})


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize(
    ("axis", "name", "said"),
    [(0, "cu_seqlens", "B = "), (1, "k", "[1, 6, 3, 128]"), (2, "k", "[1, 6, 3, 128]"), (3, "q", "[B, T, H, 128]")],
)
def test_the_sizes_follow_from_q(axis, name, said, change):
    assert_refused(ValueError, name, said, q=resized("q", axis, change))


@pytest.mark.parametrize("change", [-1, 1])
def test_the_number_of_states_follows_from_cu_seqlens(change):
    states = str([N + change, H, D, D])
    assert_refused(ValueError, "initial_state", states, cu_seqlens=resized("cu_seqlens", 0, change))
    assert_refused(ValueError, "final_state", states, cu_seqlens=resized("cu_seqlens", 0, change), initial_state=None)


@pytest.mark.parametrize("name", SHAPES)
def test_a_wrong_number_of_axes_is_a_value_error(name):
    tensor = legal_arguments()[name]
    flat = tensor.flatten() if tensor.dim() > 1 else tensor[:, None]
    for wrong in (tensor[0], tensor[None], flat):
        if (name == "A_log" and wrong.numel() == H) or (name == "dt_bias" and wrong is flat):
            continue  # legal: tests/test_serving.py
        assert_refused(ValueError, name, str(list(wrong.shape)), **{name: wrong})


@pytest.mark.parametrize("name", SHAPES)
def test_another_device_is_a_value_error(name):
    changed = {name: legal_arguments()[name].to("meta")}
    assert_refused(ValueError, name, "meta", "cpu", **changed)


@pytest.mark.parametrize("name", SHAPES)
def test_another_layout_is_a_value_error(name):
    tensor = legal_arguments()[name]
    assert_refused(ValueError, name, "torch.sparse_coo", "torch.strided", **{name: tensor.to_sparse()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors of this layout call themselves a prototype
        nested = torch.nested.as_nested_tensor([tensor, tensor])
    assert_refused(ValueError, name, "nested", "torch.strided", **{name: nested})


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "beta"])
def test_a_last_dimension_that_is_not_dense_is_a_value_error(name):
    tensor = legal_arguments()[name]
    strided = torch.stack([tensor, tensor], -1)[..., 0]
    assert_refused(ValueError, name, "stride 2", "1", **{name: strided})


@pytest.mark.parametrize("name", [name for name in SHAPES if name != "beta"])
def test_a_broadcast_last_dimension_is_a_value_error(name):
    tensor = torch.zeros(1, dtype=ACCEPTED_DTYPES[name][0]).expand(SHAPES[name])
    assert_refused(ValueError, name, "stride 0", "1", **{name: tensor})


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 1e39, -1e39, 10**400, np.float64(math.nan), np.float16(math.inf)]
)
def test_scale_that_is_not_finite_is_a_value_error(value):
    assert_refused(ValueError, "scale", as_float(value), "finite", scale=value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -5.0000001, 1e-30, 1, -6, 10**400, np.float32(0.5)])
def test_lower_bound_outside_its_range_is_a_value_error(value):
    assert_refused(ValueError, "lower_bound", as_float(value), "[-5, 0]", lower_bound=value)


@pytest.mark.parametrize(
    "value", [None, "0", b"0", [0.0], (), 1j, True, np.array([0.0]), torch.tensor(0.0)], ids=lambda v: type(v).__name__
)
@pytest.mark.parametrize("name", ["scale", "lower_bound"])
def test_what_is_no_number_is_a_type_error(name, value):
    assert_refused(TypeError, name, type(value).__name__, "number", **{name: value})


@pytest.mark.parametrize("value", [0, -5, -0.0, np.float32(-2.5), np.float64(-2.5), np.int64(-1), Fraction(-1, 2)])
def test_every_kind_of_real_number_is_accepted(value):
    by_value = run(lower_bound=value, scale=-value)
    by_float = run(lower_bound=float(value), scale=-float(value))
    assert torch.equal(by_value["out"], by_float["out"])
    assert torch.equal(by_value["final_state"], by_float["final_state"])


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([1, 4, 6], ["entry 0 to be 0, got 1"]),
        ([-1, 4, 6], ["entry 0 to be 0, got -1"]),
        ([0, 7, 6], ["entry 1 to be at most T = 6, got 7"]),
        ([0, 5, 4, 6], ["entry 2 to be at least entry 1, 5, got 4"]),
        ([0, -1, 6], ["entry 1 to be at least entry 0, 0, got -1"]),
        ([0, 4, 7], ["entry 2 to be at most T = 6, got 7"]),
        ([0, 2**31 - 1, 6], ["entry 1 to be at most T = 6, got 2147483647"]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("validate", [None, False, True])
def test_contents_of_cu_seqlens_are_checked_always_on_a_cpu(offsets, said, dtype, validate):
    state = torch.zeros(len(offsets) - 1, H, D, D)
    changed = {"cu_seqlens": torch.tensor(offsets, dtype=dtype), "initial_state": None, "final_state": state}
    assert_refused(ValueError, "cu_seqlens", *said, validate=validate, **changed)


def test_offsets_beyond_32_bits_are_not_wrapped():
    assert_refused(
        ValueError,
        "cu_seqlens",
        "entry 1 to be at most T = 6, got 4294967300",
        cu_seqlens=torch.tensor([0, 2**32 + 4, T]),
    )


@pytest.mark.parametrize("entries", [0, 1])
def test_too_few_offsets_are_a_value_error(entries):
    cu_seqlens = torch.zeros(entries, dtype=torch.int64)
    assert_refused(ValueError, "cu_seqlens", str([entries]), "at least 2", cu_seqlens=cu_seqlens)


def test_offsets_with_a_batch_are_a_value_error():
    batch = {
        name: torch.cat([x, x]) for name, x in legal_arguments().items() if name in ("q", "k", "v", "g", "beta", "out")
    }
    assert_refused(ValueError, "cu_seqlens", "B = 2", "B = 1", **batch)


def shifted(size: int, shape: tuple[int, ...], first: int, second: int, dtype: torch.dtype = torch.bfloat16):
    """Two tensors of `shape` in one buffer of `size` elements, from elements `first` and `second` on."""
    buffer = torch.zeros(size, dtype=dtype)
    elements = math.prod(shape)
    return buffer[first:][:elements].view(shape), buffer[second:][:elements].view(shape)


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
@pytest.mark.parametrize("shift", [0, 1, -1, T * H * D - 1, -T * H * D + 1])
def test_out_over_an_input_is_a_value_error(name, shift):
    rows = T * H * D
    out, tensor = shifted(3 * rows, SHAPES["out"], rows, rows + shift)
    assert_refused(ValueError, "out", f"overlaps {name}", out=out, **{name: tensor})


@pytest.mark.parametrize("name", ["q", "k", "v", "g"])
@pytest.mark.parametrize("shift", [T * H * D, -T * H * D])
def test_out_beside_an_input_in_one_buffer_is_legal(name, shift):
    rows = T * H * D
    out, tensor = shifted(3 * rows, SHAPES["out"], rows, rows + shift)
    tensor.copy_(legal_arguments()[name])
    assert torch.equal(run(out=out, **{name: tensor})["out"], run()["out"])


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("name", ["beta", "A_log", "dt_bias", "initial_state", "cu_seqlens"])
def test_outputs_over_the_small_inputs_are_a_value_error(written, name):
    dtype, shape = ACCEPTED_DTYPES[written][-1], SHAPES[written]
    buffer = torch.zeros(math.prod(shape) + math.prod(SHAPES["initial_state"]), dtype=dtype)
    output = buffer[: math.prod(shape)].view(shape)
    inside = buffer[math.prod(shape) - 2 :].view(ACCEPTED_DTYPES[name][0])  # begins in the last elements of the output
    tensor = inside[: math.prod(SHAPES[name])].view(SHAPES[name])
    assert_refused(ValueError, written, f"overlaps {name}", **{written: output, name: tensor})


def test_the_outputs_over_each_other_are_a_value_error():
    state = torch.zeros(SHAPES["final_state"])
    out = state.view(torch.bfloat16).flatten()[-T * H * D :].view(SHAPES["out"])
    assert_refused(ValueError, "final_state", "overlaps out", final_state=state, out=out)


@pytest.mark.parametrize("name", WRITTEN)
def test_an_output_whose_elements_share_memory_is_a_value_error(name):
    shape, dtype = SHAPES[name], ACCEPTED_DTYPES[name][0]
    strides = torch.empty(shape).stride()
    buffer = torch.zeros(math.prod(shape), dtype=dtype)
    broadcast = buffer[:D].expand(shape)
    assert_refused(ValueError, name, "share memory", str(broadcast.stride()), **{name: broadcast})
    close = buffer.as_strided(shape, (*strides[:-2], D - 1, 1))
    assert_refused(ValueError, name, "share memory", str(close.stride()), **{name: close})


def test_inputs_may_share_memory():
    shared = legal_arguments()["q"]
    expanded = shared[:, :, :1].expand(SHAPES["q"])
    together = run(q=expanded, k=expanded, v=expanded, g=expanded)
    apart = run(**{name: expanded.clone() for name in ("q", "k", "v", "g")})
    assert torch.equal(together["out"], apart["out"])
    assert torch.equal(together["final_state"], apart["final_state"])


def test_out_may_be_a_slice_between_the_inputs_of_one_buffer():
    names = ("q", "k", "out", "v", "g")
    arguments = legal_arguments()
    fused = torch.cat([arguments[name] for name in names], -1)
    slices = dict(zip(names, fused.split(D, -1), strict=True))
    inputs_before = {name: x.clone() for name, x in slices.items() if name != "out"}
    assert torch.equal(run(**slices)["out"], run()["out"])
    for name, before in inputs_before.items():
        assert torch.equal(slices[name], before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_state_may_be_updated_in_place(dtype):
    start = legal_arguments()["initial_state"].to(dtype)
    apart = run(initial_state=start.clone(), final_state=torch.full_like(start, math.nan))
    same, view = start.clone(), start.clone()
    assert torch.equal(run(initial_state=same, final_state=same)["out"], apart["out"])
    assert torch.equal(same, apart["final_state"])
    run(initial_state=view, final_state=view.view(SHAPES["final_state"]))
    assert torch.equal(view, apart["final_state"])


def test_the_state_in_place_with_another_order_or_place_is_a_value_error():
    first, second = shifted(3 * N * H * D * D, SHAPES["final_state"], 0, D, torch.float32)
    assert_refused(ValueError, "final_state", "overlaps initial_state", initial_state=first, final_state=second)
    swapped = first.transpose(0, 1).contiguous().transpose(0, 1)  # the same shape, other strides
    same_memory = swapped.as_strided(SHAPES["final_state"], torch.empty(SHAPES["final_state"]).stride())
    assert_refused(ValueError, "final_state", "overlaps initial_state", initial_state=swapped, final_state=same_memory)


@pytest.mark.parametrize("initial", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("final", [None, torch.bfloat16, torch.float32], ids=str)
def test_every_pair_of_state_dtypes(initial, final):
    start = legal_arguments()["initial_state"].bfloat16()
    exact = run(
        initial_state=None if initial is None else start.float(), final_state=torch.empty(SHAPES["final_state"])
    )
    arguments = run(
        initial_state=None if initial is None else start.to(initial),
        final_state=None if final is None else torch.full(SHAPES["final_state"], math.nan, dtype=final),
    )
    assert torch.equal(arguments["out"], exact["out"])
    if final is not None:
        assert torch.equal(arguments["final_state"], exact["final_state"].to(final))


def test_nothing_but_the_outputs_is_written_and_nothing_is_returned():
    arguments = legal_arguments()
    before = {name: x.clone() for name, x in arguments.items() if isinstance(x, torch.Tensor) and name not in WRITTEN}
    assert flash_kda.fwd(**arguments) is None
    for name, x in before.items():
        assert torch.equal(arguments[name], x), name


@pytest.mark.parametrize(
    ("batch", "tokens", "heads"), [(0, 5, 2), (2, 0, 2), (0, 0, 2), (2, 5, 0), (1, 0, 1)], ids=lambda n: str(n)
)
def test_empty_problems(batch, tokens, heads):
    row = torch.zeros(batch, tokens, heads, D, dtype=torch.bfloat16)
    start = torch.randn(batch, heads, D, D)
    final = torch.full_like(start, math.nan)
    arguments = {name: row.clone() for name in ("q", "k", "v", "g", "out")}
    arguments |= {"beta": row[..., 0].clone(), "A_log": torch.zeros(heads), "dt_bias": torch.zeros(heads, D)}
    flash_kda.fwd(**arguments, scale=1.0, lower_bound=-5.0, initial_state=start, final_state=final)
    if tokens == 0:
        assert torch.equal(final, start)
        flash_kda.fwd(**arguments, scale=1.0, lower_bound=-5.0, final_state=final)
        assert torch.equal(final, torch.zeros_like(final))


@pytest.mark.parametrize("value", [64, [0], np.zeros(64, np.uint8), True], ids=lambda value: type(value).__name__)
def test_a_workspace_that_is_no_tensor_is_a_type_error(value):
    assert_refused(TypeError, "workspace", type(value).__name__, "torch.uint8", workspace=value)


def test_a_wrong_workspace():  # one that is too small: tests/test_cuda.py, for none is needed on a CPU
    memory = torch.zeros(80, dtype=torch.uint8)
    assert_refused(TypeError, "workspace", "torch.int8", "torch.uint8", workspace=memory.view(torch.int8))
    assert_refused(ValueError, "workspace", "[1, 80]", "[n]", workspace=memory[None])
    assert_refused(ValueError, "workspace", "meta", "cpu", workspace=memory.to("meta"))
    assert_refused(ValueError, "workspace", "address", "multiple of 16", workspace=memory[1:])
    assert_refused(ValueError, "workspace", "stride 2", workspace=memory[::2])
    assert_refused(ValueError, "workspace", "torch.sparse_coo", "torch.strided", workspace=memory.to_sparse())


@pytest.mark.parametrize("name", ["q", "final_state", "out", "k"])
def test_a_workspace_over_another_argument_is_a_value_error(name):
    tensor = legal_arguments()[name]
    memory = all_bytes(tensor)
    assert_refused(ValueError, "workspace", f"overlaps {name}", **{name: tensor}, workspace=memory[-16:])


def test_a_workspace_changes_nothing():
    with_workspace, without = run(workspace=torch.full((80,), 77, dtype=torch.uint8)), run()
    for name in WRITTEN:
        assert torch.equal(with_workspace[name], without[name])
