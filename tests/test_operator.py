"""`torch.ops.flash_kda.fwd`: PyTorch's own checks of a registered operator, and torch.compile, on CPU tensors."""

from __future__ import annotations

import pytest
import torch
from test_arguments import legal_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import flash_kda

OPERATOR = torch.ops.flash_kda.fwd.default
POSITIONAL = (
    "q", "k", "v", "g", "beta", "scale", "out", "A_log", "dt_bias", "lower_bound", "initial_state", "final_state",
    "cu_seqlens",
)  # fmt: skip
VARIANTS = {
    "packed, both states": {},
    "no final state": {"final_state": None},
    "checkpoints": {
        "checkpoint_state": torch.zeros(2, 2, 3, 128, 128),
        "checkpoint_offsets": torch.tensor([[0, 0]] * 2),
    },
    "a pool": {"state_indices": torch.tensor([1, 0])},
    "no states, one sequence": {"initial_state": None, "final_state": None, "cu_seqlens": None},
}


def in_order(arguments: dict) -> tuple:
    return tuple(arguments[name] for name in POSITIONAL)


def by_name(arguments: dict) -> dict:
    return {name: x for name, x in arguments.items() if name not in POSITIONAL}


def results(function, **changes) -> tuple[torch.Tensor, torch.Tensor | None]:
    arguments = {**legal_arguments(), **changes}
    function(**arguments)
    return arguments["out"], arguments["final_state"]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_it_passes_the_checks_of_pytorch(changes):
    arguments = {**legal_arguments(), **changes}
    checked = torch.library.opcheck(OPERATOR, in_order(arguments), by_name(arguments))
    assert set(checked.values()) == {"SUCCESS"}


def test_fake_tensors_have_no_contents_to_check():
    """Without torch.compile, as torch.fx's tracers and memory estimates use them."""
    arguments = legal_arguments()
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        assert flash_kda.fwd(**fake) is None


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_trace_has_the_call_as_one_node(mode):
    def function(*tensors):
        flash_kda.fwd(**dict(zip(POSITIONAL, tensors, strict=True)))

    traced = make_fx(function, tracing_mode=mode)(*in_order(legal_arguments()))
    assert [node.target for node in traced.graph.nodes].count(OPERATOR) == 1
    arguments = in_order(legal_arguments())
    traced(*arguments)
    expected = results(flash_kda.fwd)
    mine = (arguments[POSITIONAL.index("out")], arguments[POSITIONAL.index("final_state")])
    assert all(torch.equal(x, y) for x, y in zip(mine, expected, strict=True))


def test_its_schema_says_what_is_written():
    written = {x.name for x in OPERATOR._schema.arguments if x.alias_info is not None and x.alias_info.is_write}
    assert written == {"out", "final_state", "workspace", "checkpoint_state"}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_compiled_call_is_one_graph_with_the_same_bits(changes):
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = results(torch.compile(flash_kda.fwd, fullgraph=True, backend=keep), **changes)
    assert [node.target for node in graphs[0].graph.nodes].count(OPERATOR) == 1 and len(graphs) == 1
    for mine, eager in zip(compiled, results(flash_kda.fwd, **changes), strict=True):
        assert (mine is None and eager is None) or torch.equal(mine, eager)


@pytest.mark.parametrize("in_place", [False, True])
def test_functionalised_graphs_write_the_callers_tensors(in_place):
    """aot_eager turns the writes into copies and back; a state that is both read and written survives that."""

    def step(arguments):
        out = torch.empty_like(arguments["v"])
        flash_kda.fwd(**{**arguments, "out": out})
        return out * 2

    def run(function):
        arguments = {name: x for name, x in legal_arguments().items() if name != "out"}
        if in_place:
            arguments["final_state"] = arguments["initial_state"]
        return function(arguments), arguments["final_state"]

    torch._dynamo.reset()
    compiled, eager = run(torch.compile(step, fullgraph=True, backend="aot_eager")), run(step)
    assert all(torch.equal(x, y) for x, y in zip(compiled, eager, strict=True))
    assert eager[1].isfinite().all()


def test_a_compiled_call_checks_its_arguments_when_it_runs():
    torch._dynamo.reset()
    compiled = torch.compile(flash_kda.fwd, fullgraph=True, backend="eager")
    with pytest.raises(ValueError, match=r"^cu_seqlens: expected entry 2 to be at most T = 6, got 7"):
        compiled(**{**legal_arguments(), "cu_seqlens": torch.tensor([0, 4, 7])})


def test_no_gradient_flows_and_autograd_knows_of_the_writes():
    arguments = legal_arguments()
    arguments["q"].requires_grad_()
    versions = [arguments[name]._version for name in ("out", "final_state")]
    flash_kda.fwd(**arguments)
    assert not arguments["out"].requires_grad
    assert all(arguments[n]._version > v for n, v in zip(("out", "final_state"), versions, strict=True))


def test_tensors_made_in_inference_mode_are_written_to_outside_it_too():
    with torch.inference_mode():
        arguments = legal_arguments()
    flash_kda.fwd(**arguments)
    expected = results(flash_kda.fwd)
    assert all(torch.equal(arguments[name], x) for name, x in zip(("out", "final_state"), expected, strict=True))


def test_inference_mode_changes_nothing():
    with torch.inference_mode():
        inside = results(flash_kda.fwd)
    assert all(torch.equal(x, y) for x, y in zip(inside, results(flash_kda.fwd), strict=True))
