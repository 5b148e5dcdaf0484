"""What serving engines ask for: checkpoints, pools of states, rows of nobody, and parameters as models keep them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from test_arguments import assert_refused, legal_arguments, run

import flash_kda
from fuzz.cases.families import FAMILIES
from fuzz.cases.inputs import make_inputs
from fuzz.cases.plain import PLAIN
from oracle import recurrent_kda

H, D = 2, 128
LENS = (112, 0, 70, 16, 33)
OFFSETS = torch.tensor([[16, 48, 64], [16, -1, 0], [64, 80, 71], [16, 32, 0], [0, 32, -5]])
INSIDE = {(0, 0), (0, 1), (0, 2), (2, 0), (3, 0), (4, 1)}
CASE = replace(PLAIN, seq_lens=LENS, heads=H, packed=True, scale=1.0)
WAY_BACK = "For a call through fla, FLA_FLASH_KDA=0 selects fla's own kernels."


def call(inputs, tokens=slice(None), **changes) -> dict:
    """One call on these rows; what is written starts as NaN."""
    given = {name: getattr(inputs, name)[:, tokens] for name in ("q", "k", "v", "g", "beta")}
    given |= {name: getattr(inputs, name) for name in ("A_log", "dt_bias", "scale", "lower_bound", "initial_state")}
    given["out"] = torch.full_like(given["v"], math.nan)
    given |= changes
    flash_kda.fwd(**given)
    return given


def states(*shape: int, heads: int = H, dtype=torch.float32) -> torch.Tensor:
    return torch.full((*shape, heads, D, D), math.nan, dtype=dtype)


@pytest.mark.parametrize("number", range(max(map(len, FAMILIES.values()))))
def test_a_checkpoint_is_the_final_state_of_the_prefix(number):
    """Each family of every kind comes up once."""
    inputs = make_inputs(
        replace(CASE, heads=1, **{kind: names[number % len(names)] for kind, names in FAMILIES.items()})
    )
    dtype = (torch.bfloat16, torch.float32)[number % 2]
    checkpoints = states(5, 3, heads=1, dtype=dtype)
    offsets = {"cu_seqlens": inputs.cu_seqlens}
    result = call(
        inputs, **offsets, final_state=states(5, heads=1), checkpoint_state=checkpoints, checkpoint_offsets=OFFSETS
    )
    plain = call(inputs, **offsets, final_state=states(5, heads=1))
    assert torch.equal(result["out"], plain["out"]) and torch.equal(result["final_state"], plain["final_state"])
    for n, start in enumerate(inputs.cu_seqlens[:-1].tolist()):
        for c in range(3):
            if (n, c) not in INSIDE:
                assert checkpoints[n, c].isnan().all()
                continue
            prefix = slice(start, start + int(OFFSETS[n, c]))
            state = states(1, heads=1, dtype=dtype)
            call(inputs, prefix, initial_state=inputs.initial_state[n : n + 1], final_state=state)
            assert torch.equal(checkpoints[n, c], state[0]), (n, c)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_checkpoints_agree_with_the_oracle_in_every_form(dtype):
    inputs = make_inputs(replace(CASE, seq_lens=(40, 40, 40), packed=False))
    offsets = torch.tensor([16, 32, 41], dtype=dtype)
    given = {name: getattr(inputs, name) for name in ("q", "k", "v", "g", "beta", "scale", "A_log", "dt_bias")}
    given |= {"lower_bound": inputs.lower_bound, "initial_state": inputs.initial_state}
    *_, exact = recurrent_kda(**given, checkpoint_offsets=offsets)
    for several in (False, True):
        where = torch.stack([offsets, offsets * 0], 1)[:, 0:1] if several else offsets
        checkpoints = states(3, 1) if several else states(3)
        call(inputs, checkpoint_state=checkpoints, checkpoint_offsets=where)
        found = checkpoints[:, 0] if several else checkpoints
        assert torch.equal(found.isnan(), exact.isnan()) and found[2].isnan().all()
        assert (found - exact)[:2].norm() < 0.01 * exact[:2].norm()


@pytest.mark.parametrize("in_place", [False, True])
def test_rows_of_a_pool_are_read_and_written_and_no_others(in_place):
    inputs = make_inputs(CASE)
    layers = torch.randn(7, 3, H, D, D + 4)[..., :D]  # strided by layer, and between rows of a state
    pool = layers[:, 1]
    rows = torch.tensor([6, 2, -1, 0, -3], dtype=torch.int32)
    before, all_before = pool.clone(), layers.clone()
    final = pool if in_place else torch.randn(9, H, D, D).bfloat16()
    final_before = final.clone()
    result = call(inputs, cu_seqlens=inputs.cu_seqlens, initial_state=pool, final_state=final, state_indices=rows)
    initial = torch.stack([before[n] if n >= 0 else torch.zeros(H, D, D) for n in rows])
    copied = states(5, dtype=final.dtype)
    plain = call(inputs, cu_seqlens=inputs.cu_seqlens, initial_state=initial, final_state=copied)
    assert torch.equal(result["out"], plain["out"])
    for row in range(len(final)):
        n = rows.tolist().index(row) if row in rows else None
        assert torch.equal(final[row], final_before[row] if n is None else copied[n])
    assert torch.equal(layers[:, ::2], all_before[:, ::2])


def test_rows_behind_the_end_are_nobodys():
    inputs = make_inputs(CASE)
    end, tokens = 215, sum(LENS)
    ends = inputs.cu_seqlens.clamp(max=end)
    beyond = replace(inputs, **{name: getattr(inputs, name).clone() for name in ("q", "k", "v", "g", "beta")})
    for name in ("q", "k", "v", "g", "beta"):
        getattr(beyond, name)[:, end:] = math.nan
    mine = call(beyond, cu_seqlens=ends, final_state=states(5), out=torch.full_like(inputs.v, 7.0))
    short = call(inputs, slice(end), cu_seqlens=ends, final_state=states(5))
    assert tokens > end and mine["out"][:, end:].eq(7).all()
    assert torch.equal(mine["out"][:, :end], short["out"]) and torch.equal(mine["final_state"], short["final_state"])
    nothing = call(beyond, cu_seqlens=ends * 0, final_state=states(5), out=torch.full_like(inputs.v, 7.0))
    assert nothing["out"].eq(7).all() and torch.equal(nothing["final_state"], inputs.initial_state)


LEGAL_SHAPES = {
    "A_log [1, 1, H, 1]": lambda given: {"A_log": given["A_log"].view(1, 1, 3, 1)},
    "A_log [H, 1]": lambda given: {"A_log": given["A_log"][:, None]},
    "dt_bias [H * K]": lambda given: {"dt_bias": given["dt_bias"].flatten()},
    "beta, heads first": lambda given: {"beta": given["beta"].transpose(1, 2).contiguous().transpose(1, 2)},
    "beta, every second": lambda given: {"beta": torch.stack([given["beta"]] * 2, -1)[..., 1]},
}


@pytest.mark.parametrize("change", LEGAL_SHAPES.values(), ids=LEGAL_SHAPES)
def test_parameters_as_models_keep_them(change):
    result, plain = run(**change(legal_arguments())), run()
    assert torch.equal(result["out"], plain["out"]) and torch.equal(result["final_state"], plain["final_state"])


def test_a_rate_without_axes():
    inputs = make_inputs(replace(CASE, heads=1))
    result = call(inputs, cu_seqlens=inputs.cu_seqlens, A_log=inputs.A_log[0])
    assert torch.equal(result["out"], call(inputs, cu_seqlens=inputs.cu_seqlens)["out"])


def test_what_is_still_refused_names_the_way_back():
    given = legal_arguments()
    assert_refused(ValueError, "A_log", "[4]", "3 elements", WAY_BACK, A_log=torch.zeros(4))
    assert_refused(ValueError, "dt_bias", "[385]", "[384]", WAY_BACK, dt_bias=torch.zeros(385))
    assert_refused(ValueError, "k", "stride 2", WAY_BACK, k=torch.stack([given["k"]] * 2, -1)[..., 0])
    assert_refused(ValueError, "v", "[1, 6, 6, 128]", WAY_BACK, v=torch.cat([given["v"]] * 2, 2))


STATES = torch.zeros(2, 3, D, D)
BAD = {
    "indices, shape": (ValueError, "state_indices", ("[2]", "[3]"), {"state_indices": torch.tensor([0, 1, -1])}),
    "indices, dtype": (TypeError, "state_indices", ("torch.float32",), {"state_indices": torch.zeros(2)}),
    "indices, device": (ValueError, "state_indices", ("meta",), {"state_indices": torch.zeros(2).long().to("meta")}),
    "indices, list": (TypeError, "state_indices", ("list",), {"state_indices": [0, 1]}),
    "past the pool": (
        ValueError,
        "state_indices",
        ("entry 1", "P = 2", "got 2"),
        {"state_indices": torch.tensor([0, 2])},
    ),
    "pool, axes": (
        ValueError,
        "initial_state",
        ("[P, 3, 128, 128]", "[3, 128, 128]"),
        {"state_indices": torch.tensor([0, 1]), "initial_state": STATES[0]},
    ),
    "row twice": (ValueError, "state_indices", ("row 1 at entries 0 and 1",), {"state_indices": torch.tensor([1, 1])}),
    "state alone": (TypeError, "checkpoint_offsets", ("NoneType",), {"checkpoint_state": STATES}),
    "offsets alone": (TypeError, "checkpoint_state", ("NoneType",), {"checkpoint_offsets": torch.tensor([0, 0])}),
    "offsets, shape": (
        ValueError,
        "checkpoint_offsets",
        ("N = 2", "[3]"),
        {"checkpoint_state": STATES, "checkpoint_offsets": torch.tensor([0, 0, 0])},
    ),
    "offsets, axes": (
        ValueError,
        "checkpoint_state",
        ("[2, 1, 3, 128, 128]", "[2, 3, 128, 128]"),
        {"checkpoint_state": STATES, "checkpoint_offsets": torch.tensor([[0], [0]])},
    ),
    "offsets, dtype": (
        TypeError,
        "checkpoint_offsets",
        ("torch.int16",),
        {"checkpoint_state": STATES, "checkpoint_offsets": torch.tensor([0, 0]).short()},
    ),
    "state, dtype": (
        TypeError,
        "checkpoint_state",
        ("torch.float16",),
        {"checkpoint_state": STATES.half(), "checkpoint_offsets": torch.tensor([0, 0])},
    ),
    "state, stride": (
        ValueError,
        "checkpoint_state",
        ("stride 2",),
        {"checkpoint_state": torch.stack([STATES] * 2, -1)[..., 0], "checkpoint_offsets": torch.tensor([0, 0])},
    ),
    "no multiple of 16": (
        ValueError,
        "checkpoint_offsets",
        ("entry 0", "multiple of 16", "got 3"),
        {"checkpoint_state": STATES, "checkpoint_offsets": torch.tensor([3, 0])},
    ),
}


@pytest.mark.parametrize(("error", "name", "said", "changes"), BAD.values(), ids=BAD)
def test_a_bad_argument_is_refused(error, name, said, changes):
    assert_refused(error, name, *said, **changes)


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([[16, 16], [0, 0]], ["entry [0, 1]", "above the offset before it, 16, got 16"]),
        ([[0, 64], [32, 16]], ["entry [1, 1]", "above the offset before it, 32, got 16"]),
        ([[0, 63], [17, 64]], ["entry [0, 1]", "multiple of 16, got 63"]),
    ],
)
def test_offsets_that_do_not_increase(offsets, said):
    inputs = make_inputs(replace(CASE, seq_lens=(64, 64)))
    with pytest.raises(ValueError, match=r"^checkpoint_offsets: expected ") as raised:
        call(
            inputs,
            cu_seqlens=inputs.cu_seqlens,
            checkpoint_state=states(2, 2),
            checkpoint_offsets=torch.tensor(offsets),
        )
    assert all(part in str(raised.value) for part in said)


@pytest.mark.parametrize("name", ["out", "initial_state", "final_state", "dt_bias"])
def test_checkpoints_over_another_argument_are_refused(name):
    given = legal_arguments()
    memory = torch.zeros(2 * 3 * D * D + given[name].nbytes // 4 + 4)
    size = given[name].numel() * given[name].element_size() // 4
    other = memory[-size:].view(given[name].dtype)[: given[name].numel()].view(given[name].shape)
    changes = {name: other, "checkpoint_state": memory[8 : 8 + STATES.numel()].view(STATES.shape)}
    assert_refused(
        ValueError, "checkpoint_state", f"overlaps {name}", **changes, checkpoint_offsets=torch.tensor([0, 0])
    )
