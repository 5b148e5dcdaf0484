"""A case says exactly what it stands for, survives JSON, and refuses what it cannot stand for."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from fuzz.cases.case import Case
from fuzz.cases.inputs import make_inputs
from fuzz.cases.plain import PLAIN

CASE = replace(
    PLAIN,
    seq_lens=(5, 0, 17),
    heads=2,
    packed=True,
    initial_state="bf16",
    layout="strided",
    keys="collinear",
    values="one_hot",
    gates="switching",
    betas="infinite",
    states="structured",
    seed=2**64 - 1,
)


def test_counts_tokens_and_sequences():
    assert (CASE.tokens, CASE.n_seqs) == (22, 3)


def test_survives_json_exactly():
    for case in (CASE, replace(CASE, lower_bound=-1e-6, scale=-0.1, seed=0), replace(CASE, initial_state=None)):
        assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


def test_whole_numbers_in_json_pass_for_floats():
    case = Case.from_dict({**CASE.to_dict(), "lower_bound": 0, "scale": 1})
    assert (case.lower_bound, case.scale) == (0.0, 1.0)
    assert isinstance(case.lower_bound, float) and isinstance(case.scale, float)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_lens", ()),
        ("seq_lens", (3, -1)),
        ("seq_lens", (3, 1.0)),
        ("seq_lens", (True,)),
        ("seq_lens", [3]),
        ("heads", 0),
        ("heads", 1.0),
        ("heads", True),
        ("packed", 1),
        ("cu_seqlens_dtype", "int16"),
        ("lower_bound", -5.001),
        ("lower_bound", 1e-9),
        ("lower_bound", float("nan")),
        ("lower_bound", -1),
        ("scale", float("inf")),
        ("scale", float("nan")),
        ("scale", "1"),
        ("initial_state", "fp16"),
        ("initial_state", ["bf16"]),
        ("final_state", True),
        ("in_place", None),
        ("layout", "transposed"),
        ("values", None),
        ("betas", 3),
        ("seed", -1),
        ("seed", 2**64),
        ("seed", 1.0),
    ],
)
def test_refuses_a_bad_value_and_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"^case: {field}: expected [^\n]+, got [^\n]+$"):
        replace(CASE, **{field: value})


@pytest.mark.parametrize(
    ("field", "value"), [("queries", "nothing"), ("keys", "minus_infinity"), ("gates", ""), ("states", "weak")]
)
def test_an_unknown_family_matters_only_where_inputs_are_generated(field, value):
    case = replace(CASE, **{field: value})
    message = rf"^case: {field}: expected [^\n]+, got [^\n]+$"
    with pytest.raises(ValueError, match=message):
        make_inputs(case)
    with pytest.raises(ValueError, match=message):
        Case.from_dict(case.to_dict())
    assert Case.from_dict({**case.to_dict(), "version": 0}, inputs_saved=True) == case


def test_refuses_unequal_lengths_that_are_not_packed():
    with pytest.raises(ValueError, match=r"seq_lens: expected equal lengths, unless packed is true, got \(5, 0, 17\)"):
        replace(CASE, packed=False)
    assert replace(CASE, packed=False, seq_lens=(7, 7)).n_seqs == 2


@pytest.mark.parametrize("states", [("bf16", "fp32"), (None, "fp32"), ("fp32", None), (None, None)])
def test_refuses_in_place_without_two_equal_states(states):
    with pytest.raises(ValueError, match=r"in_place: expected two states of one dtype, got True with initial_state="):
        replace(CASE, initial_state=states[0], final_state=states[1], in_place=True)


@pytest.mark.parametrize("data", [None, [], "case", 3])
def test_refuses_what_is_no_json_object(data):
    with pytest.raises(ValueError, match=r"case: expected a JSON object, got a "):
        Case.from_dict(data)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_refuses_another_version(version):
    with pytest.raises(ValueError, match=r"case: version: expected 1, got "):
        Case.from_dict({**CASE.to_dict(), "version": version})


def test_refuses_unknown_and_missing_fields():
    with pytest.raises(ValueError, match=r"case: expected the fields seq_lens, heads.*, got head_dim"):
        Case.from_dict({**CASE.to_dict(), "head_dim": 128})
    for field in fields(Case):
        data = CASE.to_dict()
        del data[field.name]
        with pytest.raises(ValueError, match=f"got none for {field.name}"):
            Case.from_dict(data)


@pytest.mark.parametrize("value", [3, "5, 7", None, {"0": 5}, [[5]], [None]])
def test_refuses_lengths_of_another_type(value):
    with pytest.raises(ValueError, match="case: seq_lens: expected "):
        Case.from_dict({**CASE.to_dict(), "seq_lens": value})
