"""Promises: a target is held to what it declares, what it does not promise is measured, and nonsense is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import right_targets
import torch
from judged_targets import a_case
from test_properties import checked, nudge

import flash_kda
from fuzz.campaign.job import Job, WorkerError
from fuzz.campaign.worker import judge_job, ready_worker
from fuzz.cases.drawing import all_cases
from fuzz.cases.inputs import make_inputs
from fuzz.cases.plain import PLAIN
from fuzz.judging.judge import judge
from fuzz.judging.properties import PROPERTIES, applicable
from fuzz.judging.sensitivity import reference
from fuzz.judging.verdict import NOT_PROMISED
from fuzz.targets.promises import BITS, PromiseError, Promises
from fuzz.targets.registry import BUILTIN, Target, TargetError, load_target

pytestmark = pytest.mark.usefixtures("one_thread")

RIGHT = ("float64", "heads_differ", "packed_int64")


def small_cases():
    """Of a campaign, those that take little time here."""
    return (case for case in all_cases("cpu", 7) if case.tokens * case.heads <= 250 and case.n_seqs <= 6)


def verdict(target, case, names=None):
    inputs = make_inputs(case)
    names = [
        name
        for name in (PROPERTIES if names is None else names)
        if name not in target.exempt and name != "wide_offsets"
    ]
    names = [name for name in names if applicable(name, case)]
    return judge(target, case, inputs, reference(inputs, "cpu"), names)


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_that_promises_less_is_green(name):
    target = load_target(f"right_targets:{name}")
    judged = 0
    for case in small_cases():
        if target.reach(case) is None:
            found = verdict(target, case)
            assert found.passed, (case, found.failed)
            judged += 1
            if judged == 12:
                return


@pytest.mark.parametrize(
    ("name", "fails"), [("float64", "chunk_continuation"), ("heads_differ", "heads"), ("packed_int64", "batch_form")]
)
def test_the_same_kernel_fails_where_it_promises_everything(name, fails):
    target = Target("any", getattr(right_targets, name), "cpu")
    case = a_case((70, 130), 3, gates="weak_8")
    if name == "packed_int64":
        with pytest.raises(AttributeError):  # it looks for offsets that are not there
            verdict(target, case, [fails])
    else:
        assert {check.name for check in verdict(target, case, [fails]).failed} == {fails}


@pytest.mark.parametrize(("name", "right"), [("fp32", True), ("wrong_u_in_bf16", False), ("wrong_q_too_large", False)])
def test_a_kernel_that_is_declared_to_be_fp32_is_held_to_its_bounds(name, right):
    """Measured as a new user: both wrong ones passed 300 of 300 cases, judged as bf16."""
    target = load_target(f"right_targets:{name}")
    as_bf16 = replace(target, promises=Promises(arguments=False, chunk=None))
    cases = [case for case in itertools.islice(small_cases(), 40) if case.tokens > 2][:20]
    failed = [case for case in cases if "accuracy" in {check.name for check in verdict(target, case, ()).failed}]
    assert not failed if right else len(failed) > len(cases) / 2
    assert right or not any("accuracy" in {c.name for c in verdict(as_bf16, case, ()).failed} for case in failed[:5])


class Nudged:
    """The operator, with one unit in the last place more in all calls but the first; or twice as much."""

    def __init__(self, how):
        self.calls = itertools.count()
        self.how = how

    def __call__(self, *args, **kwargs):
        flash_kda.fwd(*args, **kwargs)
        if next(self.calls):
            self.how(args[6])


@pytest.mark.parametrize("name", [*BITS, "chunk_continuation"])
def test_bits_that_are_not_promised_are_measured_and_results_are_held_to_the_bounds(name):
    given_up = {"chunk": None} if name == "chunk_continuation" else {name: False}
    case = a_case((90, 90), 2, packed=False)
    answers = []
    for how in (lambda out: None, nudge, lambda out: out.mul_(2)):
        for promises in (Promises(), Promises(**given_up)):
            answers.append(checked(name, Target("nudged", Nudged(how), "cpu", promises=promises), case))
    assert [check.passed for check in answers] == [True, True, False, True, False, False]
    assert answers[1].detail == f"{NOT_PROMISED}the same bits"
    assert "no bit may differ" in answers[2].detail
    assert answers[3].detail.startswith(NOT_PROMISED) and "elements differ" in answers[3].detail
    assert "allowed" in answers[5].detail and "bits are not promised" in answers[5].detail


def test_the_chunk_that_is_promised_is_where_runs_are_cut():
    """The model has chunks of 32 tokens: a run that is cut elsewhere has other bits."""
    case = a_case((130,), 1, gates="weak_8")
    for chunk, passed in ((32, True), (64, True), (24, False)):
        target = Target("model", flash_kda.fwd, "cpu", promises=Promises(chunk=chunk))
        found = checked("chunk_continuation", target, case)
        assert found.passed == passed and ("cut at" in found.detail) != passed
    target = Target("model", flash_kda.fwd, "cpu", promises=Promises(chunk=128))
    assert "after a chunk of 128" in checked("chunk_continuation", target, a_case((100,))).detail


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"head": False}, "promises: expected names among packing, heads, .*, got head"),
        ({"heads": "no"}, "promises: heads: expected True or False, got 'no'"),
        ({"operands": "fp8"}, "promises: operands: expected one of bf16, fp16, fp32, got 'fp8'"),
        ({"inverse": "tf32"}, "promises: inverse: expected one of bf16, fp16, fp32, got 'tf32'"),
        ({"operands": torch.float32}, "promises: operands: expected one of .*, got torch.float32"),
        ({"state": "fp64"}, "promises: state: expected one of float32, float64, got 'fp64'"),
        ({"chunk": 0}, "promises: chunk: expected a number of tokens from 1 to 1024, or None, got 0"),
        ({"chunk": True}, "promises: chunk: expected a number"),
        ({"reach": "packed"}, "promises: reach: expected a function of a Case, or a mapping .*, got 'packed'"),
        ({"reach": {"pakced": True}}, "promises: reach: expected fields of a case, got pakced"),
        (
            {"reach": {"cu_seqlens_dtype": "int46"}},
            "promises: reach: cu_seqlens_dtype: expected among 'int32', 'int64', got",
        ),
        ({"reach": {"heads": ()}}, "promises: reach: heads: expected one value or more"),
        ("fp32", "promises: expected Promises or a mapping from their names, got 'fp32'"),
    ],
)
def test_promises_that_make_no_sense_are_refused(given, message):
    with pytest.raises(PromiseError, match=message):
        Promises.of(given)
    with pytest.raises(TargetError, match=f"target 'theirs': {message}"):
        Target("theirs", flash_kda.fwd, "cpu", promises=given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"device": "gpu"}, "device: expected cpu, cuda or cuda:N, got 'gpu'"),
        ({"exempt": {"head": "it has one"}}, "exempt: expected one of packing, .*, got 'head'"),
        ({"exempt": {"heads": ""}}, "exempt: heads: expected a reason"),
        ({"reach": {"packed": True}}, "reach: expected a function of a Case"),
    ],
)
def test_a_target_that_makes_no_sense_is_refused(given, message):
    with pytest.raises(TargetError, match=f"target 'theirs': {message}"):
        Target(**{"name": "theirs", "fwd": flash_kda.fwd, "device": "cpu", **given})


def test_a_reach_must_answer_with_a_reason():
    answers = iter([None, "too long", False, True, "", 3, ZeroDivisionError()])

    def reach(case):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    target = Target("theirs", flash_kda.fwd, "cpu", reach=reach)
    assert target.reach(PLAIN) is None and target.reach(PLAIN) == "too long"
    for got in ("False", "True", "''", "3"):
        with pytest.raises(TargetError, match=f"target 'theirs': reach: expected None .* or a reason .*, got {got}"):
            target.reach(PLAIN)
    with pytest.raises(TargetError, match="target 'theirs': reach raised ZeroDivisionError"):
        target.reach(PLAIN)


def test_a_reach_by_fields_says_what_is_taken():
    target = load_target("right_targets:packed_int64")
    packed = replace(PLAIN, packed=True)
    assert target.reach(packed) is None
    assert target.reach(PLAIN) == "takes packed True only"
    assert target.reach(replace(packed, initial_state="bf16")) == "takes initial_state None or fp32 only"


def test_words_of_the_command_line_are_promises_of_that_target():
    target = load_target("flash_kda:fwd,heads=no,chunk=none,operands=fp32,arguments=no,inverse=bf16")
    assert target.name == "flash_kda:fwd,heads=no,chunk=none,operands=fp32,arguments=no,inverse=bf16"
    assert target.promises == Promises(heads=False, chunk=None, operands="fp32", arguments=False, inverse="bf16")
    assert list(target.exempt) == ["arguments"]
    assert load_target("right_targets:float64,state=float32").promises.bitwise_chunk == 64
    for words, message in (
        ("heads=maybe", "heads: expected yes or no, got 'maybe'"),
        ("chunk=few", "chunk: expected a number"),
        ("speed=fast", "got speed"),
        ("heads", "heads: expected yes or no, got ''"),
        ("reach=mine", "reach: expected a function"),
    ):
        with pytest.raises(TargetError, match=message):
            load_target(f"flash_kda:fwd,{words}")
    with pytest.raises(TargetError, match="model is built in"):
        load_target("model,heads=no")


def test_built_in_targets_declare_what_they_are():
    found = {name: load_target(name).promises for name in BUILTIN}
    assert found["flash_kda"] == found["model"] == Promises()
    for name in ("fla.recurrent", "fla.naive"):
        assert (found[name].operands, found[name].chunk, found[name].arguments) == ("fp32", None, False)
    assert found["fla.chunk"].chunk == 64


def test_an_answer_without_sense_ends_the_run_with_one_line(tmp_path, monkeypatch):
    source = """
from fuzz.targets.registry import Target
import flash_kda
late = Target("", flash_kda.fwd, "cpu", reach=lambda case: False if case.tokens > 9 else None)
def fwd(*args, **kwargs):
    flash_kda.fwd(*args, **kwargs)
fwd.promises = {"reach": lambda case: not case.packed}
"""
    (tmp_path / "odd_reach.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TargetError, match="target 'odd_reach:fwd': reach: expected None"):
        load_target("odd_reach:fwd")
    case = replace(PLAIN, seq_lens=(10,))
    with (
        ready_worker(("odd_reach:late",), time_limit=10.0, threads=1) as worker,
        pytest.raises(WorkerError, match=r"odd_reach:late.* got False"),
    ):
        judge_job(worker, Job(case, worker.targets))
