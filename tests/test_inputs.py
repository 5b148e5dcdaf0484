"""Inputs have the same bits everywhere, the structure their families promise, and come back from disk exactly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fuzz.cases.case import Case
from fuzz.cases.families import FAMILIES, PUBLISHED, STATES
from fuzz.cases.inputs import TENSORS, load_inputs, make_inputs, save_inputs
from fuzz.cases.noise import Noise
from fuzz.cases.plain import PLAIN

CASE = replace(
    PLAIN, seq_lens=(70, 0, 5, 17), heads=3, packed=True, cu_seqlens_dtype="int32", final_state="bf16", seed=7
)
EVERY_FAMILY = [
    pytest.param(replace(CASE, **{field: name}), id=f"{field}-{name}")
    for field, names in FAMILIES.items()
    for name in names
]


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


# Computed once; a change of any of them means that saved cases no longer stand for what failed.
DIGESTS = {
    "plain": "ae05309a186b6883",
    "batch": "c4598f98775fb2b6",
    "bf16 state": "e4b3f0ed5ffe7888",
    "no tokens": "870cec9953ba995b",
    "published random": "a33897ec8cd9d2d9",
    "published weak": "d1cea47f2cc6657b",
    "published collinear": "99750b8998108e4e",
    "published collinear_strong": "4fb17e10f7c69284",
    "published equal": "bb934ba0eba97fa7",
}
EVERY_FAMILY_DIGEST = "02541f264ad4fcb5"


def digest_cases() -> dict[str, Case]:
    ordinary = replace(CASE, packed=False, seq_lens=(33, 33), heads=2, initial_state=None, final_state=None)
    return {
        "plain": replace(CASE, seed=0),
        "batch": replace(ordinary, seed=1),
        "bf16 state": replace(CASE, initial_state="bf16", cu_seqlens_dtype="int64", states="structured", seed=2**63),
        "no tokens": replace(CASE, seq_lens=(0, 0)),
        **{f"published {name}": replace(ordinary, **families) for name, families in PUBLISHED.items()},
    }


def test_digests_are_pinned():
    assert {name: make_inputs(case).digest()[:16] for name, case in digest_cases().items()} == DIGESTS


def test_digest_of_every_family_is_pinned():
    """One digest over all of them, so that no family changes unseen."""
    whole = hashlib.sha256(
        "".join(make_inputs(case).digest() for (case,) in (param.values for param in EVERY_FAMILY)).encode()
    )
    assert whole.hexdigest()[:16] == EVERY_FAMILY_DIGEST


def test_noise_is_made_of_raw_philox_words():
    """Worked out here from the words alone, with Python's integers."""
    key = np.array([7, crc32(b"keys")], dtype=np.uint64)
    stream = np.random.Philox(counter=np.array([0, 2, 1, 0], dtype=np.uint64), key=key)
    words = [int(word) for word in stream.random_raw(5 * 128)]
    noise = Noise(7, (3, 5), 4)
    assert noise.words("keys", 128)[3:, 2].ravel().tolist() == words

    sums = [16 * sum(word >> 10 * lane & 1023 for lane in range(6)) + (word >> 60) for word in words]
    normal = [np.float32(2 * total - 98223) * np.float32(1 / 23170.465791606348) for total in sums]
    assert noise.normal("keys", 128)[3:, 2].ravel().tolist() == normal
    assert noise.uniform("keys", 128)[3:, 2].ravel().tolist() == [(word >> 40) / 2**24 for word in words]
    assert noise.integers("keys", 128, 61)[3:, 2].ravel().tolist() == [(word >> 32) * 61 >> 32 for word in words]


def test_noise_has_the_moments_it_promises():
    noise = Noise(1, (1000,), 2)
    normal = noise.normal("x", 128).astype(np.float64)
    assert abs(normal.mean()) < 0.01 and abs(normal.std() - 1) < 0.01 and np.abs(normal).max() < 4.25
    assert abs((normal**4).mean() - 2.8) < 0.05  # Irwin-Hall of six: 3 - 6/5/6
    uniform = noise.uniform("x", 128)
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert np.bincount(noise.integers("x", 128, 5).ravel(), minlength=5).min() > 50_000
    # Streams of other names, heads, sequences and seeds have nothing in common.
    others = [Noise(1, (1000,), 2).normal("y", 128)[:, 0], normal[:, 1], Noise(2, (1000,), 2).normal("x", 128)[:, 0]]
    for other in [*others, Noise(1, (0, 1000), 2).normal("x", 128)[:, 0]]:
        assert abs((normal[:, 0] * other).mean()) < 0.01


@pytest.mark.parametrize("case", EVERY_FAMILY)
def test_every_family_has_the_shapes_and_dtypes_of_the_operator(case):
    inputs = make_inputs(case)
    tokens, heads, n = case.tokens, case.heads, case.n_seqs
    shapes = {
        "q": (1, tokens, heads, 128),
        "k": (1, tokens, heads, 128),
        "v": (1, tokens, heads, 128),
        "g": (1, tokens, heads, 128),
        "beta": (1, tokens, heads),
        "A_log": (heads,),
        "dt_bias": (heads, 128),
        "initial_state": (n, heads, 128, 128),
        "cu_seqlens": (n + 1,),
    }
    dtypes = dict.fromkeys(("q", "k", "v", "g", "beta"), torch.bfloat16) | {"cu_seqlens": torch.int32}
    for name in TENSORS:
        tensor = getattr(inputs, name)
        assert tuple(tensor.shape) == shapes[name]
        assert tensor.dtype == dtypes.get(name, torch.float32)
        assert not tensor.isnan().any()
        assert name in ("g", "beta") or tensor.isfinite().all()
    assert inputs.cu_seqlens.tolist() == [0, 70, 70, 75, 92]
    assert inputs.seq_ranges() == [(0, 70), (70, 70), (70, 75), (75, 92)]
    assert (inputs.final_state_dtype, inputs.in_place) == (torch.bfloat16, False)


def test_batch_form_holds_the_same_numbers_as_the_packed_form():
    packed = make_inputs(replace(CASE, seq_lens=(21, 21)))
    batch = make_inputs(replace(CASE, seq_lens=(21, 21), packed=False))
    assert batch.cu_seqlens is None and batch.seq_ranges() == packed.seq_ranges() == [(0, 21), (21, 42)]
    for name in ("q", "k", "v", "g", "beta"):
        assert same_bits(getattr(batch, name).flatten(0, 1), getattr(packed, name).flatten(0, 1))


@pytest.mark.parametrize("case", EVERY_FAMILY)
def test_what_remains_of_a_case_keeps_its_numbers(case):
    """Without later sequences, later tokens of the last one and later heads, the rest is as it was."""
    whole, part = make_inputs(case), make_inputs(replace(case, seq_lens=(70, 0, 3), heads=2))
    for name in ("q", "k", "v", "g", "beta"):
        assert same_bits(getattr(whole, name)[:, :73, :2], getattr(part, name)), name
    assert same_bits(whole.initial_state[:3, :2], part.initial_state)
    assert same_bits(whole.A_log[:2], part.A_log) and same_bits(whole.dt_bias[:2], part.dt_bias)


def test_published_families_are_what_was_published():
    """The random parts taken away, the five families differ from normal noise as the published comparison says."""
    plain = replace(CASE, seq_lens=(256,), heads=4)
    made = {name: make_inputs(replace(plain, **families)) for name, families in PUBLISHED.items()}
    noise = Noise(7, (256,), 4)
    k, k0 = noise.normal("keys", 128), noise.per_sequence().normal("keys.base", 128)
    g, beta = noise.normal("gates", 128), noise.normal("betas", 1)[..., 0]
    expected = {
        "random": (k, g, beta),
        "weak": (k, g - 6, beta),
        "collinear": (3 * k0 + k, g - 8, beta + 3),
        "collinear_strong": (10 * k0 + k, g - 12, beta + 5),
        "equal": (0 * k + k0, 0 * g - 20, 0 * beta + 6),
    }
    assert set(made) == set(expected)
    for name, inputs in made.items():
        for tensor, values in zip((inputs.k, inputs.g, inputs.beta), expected[name], strict=True):
            assert same_bits(tensor[0], torch.from_numpy(values.astype(np.float32)).bfloat16()), name
        rates = torch.cat((inputs.A_log, inputs.dt_bias.flatten()))
        if name == "equal":
            assert not rates.any()
        else:
            assert 0 <= rates.min() < 0.1 and 0.9 < rates.max() < 1
        assert 0.099 < inputs.initial_state.std() < 0.101


def family(**fields) -> torch.Tensor:
    """The tensor that the one given field decides, float32, tokens first."""
    (field,) = fields
    inputs = make_inputs(replace(CASE, **fields))
    name = {"queries": "q", "keys": "k", "values": "v", "gates": "g", "betas": "beta", "states": "initial_state"}[field]
    tensor = getattr(inputs, name).float()
    return tensor if field == "states" else tensor[0]


def test_keys_are_what_their_names_say():
    equal, opposite = family(keys="equal"), family(keys="opposite")
    assert (equal[:70] == equal[0]).all() and not torch.equal(equal[70], equal[0])
    assert not torch.equal(equal[0, 0], equal[0, 1])
    assert (opposite.abs() == opposite[[0] * 70 + [70] * 5 + [75] * 17].abs()).all()
    assert {1.0, -1.0} == set((opposite[:70, 0, 0] / opposite[0, 0, 0]).tolist())
    repeated = family(keys="repeated")
    assert any(torch.equal(repeated[period:70], repeated[: 70 - period]) for period in (2, 3, 5, 8, 16, 17, 48, 64))
    norms = family(keys="zero_rows").norm(dim=-1)
    assert 0.1 < (norms == 0).float().mean() < 0.4
    assert (family(keys="one_hot").sort(dim=-1).values == torch.eye(128)[127]).all()
    assert family(keys="huge").abs().max() > 1e12
    assert 0 < family(keys="tiny").norm(dim=-1).max() < 1e-7
    near_epsilon = family(keys="near_epsilon").square().sum(dim=-1)
    assert near_epsilon.min() < 1e-7 and near_epsilon.max() > 1e-5 and ((near_epsilon / 1e-6 - 1).abs() < 0.9).any()
    mixed = family(keys="mixed_norms").norm(dim=-1).log2()
    assert mixed.min() < -20 and mixed.max() > 20


def test_queries_can_equal_the_keys():
    inputs = make_inputs(replace(CASE, queries="equal_to_keys", keys="collinear"))
    assert same_bits(inputs.q, inputs.k)


def test_values_are_what_their_names_say():
    assert not family(values="zero").any()
    assert (family(values="one_hot").sum(dim=-1) == 1).all()
    assert (family(values="powers_of_two").abs().log2() % 1 == 0).all()
    assert 1e4 < family(values="large").abs().max() < 1e5
    assert 1e30 < family(values="huge").abs().max() < 1e31
    assert 0 < family(values="tiny").abs().max() < 1e-11
    spikes = family(values="spiky").norm(dim=-1) > 1e4
    assert 0 < spikes.float().mean() < 0.2


def decay(gates: str, lower_bound: float = -5.0) -> torch.Tensor:
    """The log-decay a of operator.md, in float64."""
    inputs = make_inputs(replace(CASE, gates=gates))
    x = inputs.A_log.double().exp()[:, None] * (inputs.g[0].double() + inputs.dt_bias.double())
    return lower_bound * torch.sigmoid(x)


def test_gates_are_what_their_names_say():
    assert decay("saturated_open").min() > -1e-30 and decay("saturated_closed").max() < -5 * (1 - 1e-12)
    assert (decay("minus_infinity") == 0).all() and (decay("plus_infinity") == -5).all()
    assert set(decay("exact_bounds").unique().tolist()) == {0.0, -5.0}
    mixed = decay("mixed_channels").mean(dim=0)
    assert (mixed > -1e-3).any() and (mixed < -4.9).any() and ((mixed > -4) & (mixed < -2)).any()
    assert ((decay("one_channel") < -1).sum(dim=-1) == 1).all()
    assert ((decay("all_but_one_channel") > -1).sum(dim=-1) == 1).all()
    closed = decay("switching")[:70, :, 0] < -4
    assert closed.any() and not closed.all() and ((closed[1:] != closed[:-1]).sum(dim=0) >= 1).all()
    resets = (decay("resets") < -4.9).all(dim=-1)
    assert 0 < resets.float().mean() < 0.1
    steep = decay("steep")
    assert ((steep > -0.01) | (steep < -4.99)).float().mean() > 0.9
    assert (decay("flat") + 2.5).abs().max() < 1e-6
    cancelling = decay("cancelling")
    assert cancelling.std() > 1 and -4.5 < cancelling.mean() < -0.5


def test_betas_are_what_their_names_say():
    assert (family(betas="zero_logits") == 0).all() and (family(betas="constant_6") == 6).all()
    assert family(betas="near_zero").sigmoid().max() < 0.05 and family(betas="near_one").sigmoid().min() > 0.95
    assert (family(betas="minus_infinity") == -torch.inf).all() and (family(betas="plus_infinity") == torch.inf).all()
    infinite = family(betas="infinite")
    for kind in (infinite == torch.inf, infinite == -torch.inf, infinite.isfinite()):
        assert 0.2 < kind.float().mean() < 0.5


def test_states_are_what_their_names_say():
    assert not family(states="zero").any()
    assert 1e3 < family(states="large").abs().max() < 1e4 and 1e30 < family(states="huge").abs().max() < 1e31


def test_structured_states_tell_every_index_apart():
    few = torch.from_numpy(STATES["structured"](Noise(0, (1,) * 3, 96)))
    many = torch.from_numpy(STATES["structured"](Noise(0, (1,) * 128, 2)))
    assert same_bits(few.bfloat16().float(), few)
    for line in (many[:, 1, 5, 7], few[2, :, 5, 7], few[2, 3, :, 7], few[2, 3, 5, :]):
        assert line.unique().numel() == line.numel()
    assert (few[0, 0] == few[0, 0].T).float().mean() < 0.03


# All of q, k, v, g and beta in one tensor: interleaved or not, aligned or not; and each in a tensor of its own.
FUSED = [replace(CASE, layout="strided", seed=seed) for seed in (4, 1, 2, 7)]
APART = [replace(CASE, layout="strided", seed=seed) for seed in (0, 3)]
STRIDED = [*FUSED, *APART]


@pytest.mark.parametrize(
    "case",
    [*STRIDED, replace(STRIDED[3], seq_lens=(1,), heads=1, packed=False)],
    ids=lambda case: f"{case.layout}-{case.seed}-{case.tokens}",
)
def test_strided_inputs_are_slices_of_one_tensor_with_the_same_values(case):
    strided, contiguous = make_inputs(case), make_inputs(replace(case, layout="contiguous"))
    names = ("q", "k", "v", "g", "beta")
    fused = case.seed % 3 > 0
    assert len({getattr(strided, name).untyped_storage().data_ptr() for name in names}) == (1 if fused else len(names))
    for name in TENSORS:
        assert same_bits(getattr(strided, name), getattr(contiguous, name))
    assert strided.digest() == contiguous.digest()
    for name in names:
        tensor = getattr(strided, name)
        assert tensor.stride(-1) == 1 and tensor.storage_offset() > 0
        assert case.tokens == 1 or not tensor.is_contiguous()
        whole = torch.empty(0, dtype=torch.bfloat16).set_(tensor.untyped_storage())
        covered = sum(getattr(strided, other).numel() for other in (names if fused else (name,)))
        assert whole.isnan().sum() == whole.numel() - covered > 0
    for name in ("A_log", "dt_bias", "initial_state", "cu_seqlens"):
        tensor = getattr(strided, name)
        assert tensor is None or (tensor.storage_offset() > 0 and tensor.stride(-1) == 1)


def test_no_stride_follows_from_a_shape_or_another_tensor():
    for seed in (0, 1, 2, 3):
        made = make_inputs(replace(CASE, packed=False, seq_lens=(5, 5), layout="strided", seed=seed))
        for tensor in (made.q, made.k, made.v, made.g, made.beta):
            assert tensor.stride(0) > tensor.shape[1] * tensor.stride(1)
        if seed in (0, 3):
            assert len({tensor.stride()[1:] for tensor in (made.q, made.k, made.v, made.g)}) == 4
        assert made.dt_bias.stride(0) > made.dt_bias.shape[1]
        state = made.initial_state
        for axis in range(3):
            assert state.stride(axis) > state.shape[axis + 1] * state.stride(axis + 1)


def test_strides_are_aligned_or_odd_by_seed():
    for case in STRIDED:
        tensors = [getattr(make_inputs(case), name) for name in ("q", "k", "v", "g")]
        steps = [step * 2 for t in tensors for step in (*t.stride()[:-1], t.storage_offset())]
        if case.seed // 2 % 2 == 0:
            assert all(step % 16 == 0 for step in steps)
        elif case in FUSED:
            assert all(t.stride(1) % 2 == 1 and t.storage_offset() % 2 == 1 for t in tensors)
        else:
            assert any(t.stride(2) % 2 == 1 for t in tensors)
        assert case in APART or all((t.stride(2) == 128) == (case.seed % 2 == 1) for t in tensors)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        *STRIDED,
        replace(CASE, initial_state=None, final_state=None, packed=False, seq_lens=(4, 4)),
        replace(CASE, initial_state="bf16", in_place=True, cu_seqlens_dtype="int64", states="huge"),
        replace(CASE, seq_lens=(0,), layout="strided", final_state="fp32"),
        replace(FUSED[3], seq_lens=(1,), heads=1, packed=False),
        replace(CASE, gates="exact_bounds", betas="infinite", values="huge"),
    ],
    ids=lambda case: f"{case.layout}-{case.seed}-{case.tokens}",
)
def test_saved_inputs_come_back_exactly(case, tmp_path):
    made = make_inputs(case)
    save_inputs(tmp_path / "inputs.safetensors", made)
    loaded = load_inputs(tmp_path / "inputs.safetensors")
    for name in TENSORS:
        before, after = getattr(made, name), getattr(loaded, name)
        assert same_bits(before, after), name
        if before is not None and before.numel():
            assert (before.stride(), before.storage_offset()) == (after.stride(), after.storage_offset()), name
    for name in ("scale", "lower_bound", "final_state_dtype", "in_place"):
        assert getattr(made, name) == getattr(loaded, name)
    if case.layout == "strided" and case.tokens and case.seed % 3:
        assert loaded.q.untyped_storage().data_ptr() == loaded.beta.untyped_storage().data_ptr()


def test_moving_keeps_layouts():
    made = make_inputs(STRIDED[2])
    moved = made.to("meta")
    assert moved.q.device.type == "meta" and moved.cu_seqlens.device.type == "meta"
    for name in TENSORS:
        before, after = getattr(made, name), getattr(moved, name)
        assert (before.stride(), before.storage_offset()) == (after.stride(), after.storage_offset()), name
    assert made.to("cpu").q is made.q


@pytest.mark.gpu
def test_inputs_have_the_same_bits_on_a_gpu():
    for case in (CASE, *STRIDED):
        made, moved = make_inputs(case), make_inputs(case, "cuda")
        assert moved.q.is_cuda and moved.q.stride() == made.q.stride()
        assert moved.beta.untyped_storage().data_ptr() == moved.q.untyped_storage().data_ptr() or case not in FUSED
        assert moved.digest() == made.digest()


def damage(path, **metadata) -> None:
    """The same tensors under other metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        metadata = {**file.metadata(), **metadata}
    save_file(tensors, path, metadata)


def test_refuses_damaged_and_foreign_files_in_one_line(tmp_path):
    path = tmp_path / "inputs.safetensors"

    def refused(reason: str) -> None:
        with pytest.raises(ValueError, match=reason) as caught:
            load_inputs(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        save_inputs(path, make_inputs(CASE))

    path.write_text("not tensors at all")
    refused("expected a safetensors file")
    path.write_bytes(path.read_bytes()[:-100])
    refused("expected a safetensors file")
    path.write_bytes(b"")
    refused("expected a safetensors file")
    save_file({"x": torch.zeros(3)}, path)
    refused("expected saved inputs")
    damage(path, version="2")
    refused("version '1', got '2'")

    flipped = bytearray(path.read_bytes())
    flipped[-1000] ^= 1
    path.write_bytes(flipped)
    refused("got damaged ones.*digest")
    scalars = {"scale": 2.0, "lower_bound": -5.0, "final_state_dtype": None, "in_place": False}
    damage(path, scalars=json.dumps(scalars))
    refused("got damaged ones.*digest")
    damage(path, scalars="[]")
    refused("got damaged ones")
    damage(path, scalars="{")
    refused("got damaged ones")
    damage(path, layout=json.dumps({"q": {"base": 0, "size": 3, "stride": [1, 1, 1, 1], "offset": 9}}))
    refused("got damaged ones")
    load_inputs(path)

    save_file({"q": torch.zeros(3)}, path, {"format": "flash-kda inputs", "version": "1"})
    refused("got damaged ones")
    with pytest.raises(FileNotFoundError):
        load_inputs(tmp_path / "nothing.safetensors")
