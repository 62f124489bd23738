"""The matcher on small graphs: what it binds, what it refuses, and the words it refuses with."""

import operator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, Tracer

from gemma4_compile.patterns.functionalize import functionalize
from gemma4_compile.patterns.template import Match, Mismatch, find, instantiate, trace


def graph_of(function: Any) -> Graph:
    return Tracer().trace(function)


def last(graph: Graph) -> Any:
    return [node for node in graph.nodes if node.op != "output"][-1]


def scaled(x: Tensor, factor: float) -> Tensor:
    return x.relu() * factor


def test_binds_tensors_and_literals() -> None:
    graph = graph_of(lambda a: a.relu() * 0.5)
    match = find(trace(scaled), last(graph))
    assert isinstance(match, Match)
    assert match.binding["factor"] == 0.5 and match.binding["x"].name == "a"


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a: a.relu() * a, "factor must be a float"),
        (lambda a: a.relu() * 2, "factor must be a float"),
        (lambda a: a.sigmoid() * 0.5, "expected relu, found sigmoid"),
        (lambda a: a.relu() + 0.5, "expected mul, found add"),
    ],
)
def test_says_why_not(function: Any, reason: str) -> None:
    mismatch = find(trace(scaled), last(graph_of(function)))
    assert isinstance(mismatch, Mismatch) and reason in mismatch.reason


def test_an_inner_value_with_another_reader_is_refused() -> None:
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        inner = a.relu()
        return inner.sum(), inner * 0.5

    mismatch = find(trace(scaled), last(graph_of(function)))
    assert isinstance(mismatch, Mismatch) and "is also used by sum" in mismatch.reason and mismatch.missing == 0


def test_a_repeated_parameter_must_be_one_value() -> None:
    def twice(x: Tensor) -> Tensor:
        return x.relu() * x

    assert isinstance(find(trace(twice), last(graph_of(lambda a, b: a.relu() * a))), Match)
    mismatch = find(trace(twice), last(graph_of(lambda a, b: a.relu() * b)))
    assert isinstance(mismatch, Mismatch) and "both must be the same" in mismatch.reason


def test_several_outputs_are_found_through_their_common_input() -> None:
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        shared = x.relu()
        return shared + 1, shared.sigmoid()

    def function(a: Tensor) -> tuple[Tensor, ...]:
        shared = a.relu()
        return shared.sigmoid(), a.sigmoid(), shared + 1

    graph = graph_of(function)
    match = find(trace(two), last(graph))
    assert isinstance(match, Match)
    assert [node.name for node in match.outputs] == ["add", "sigmoid"]


def test_backtracks_over_candidates() -> None:
    """The first user that looks right is a dead end; the second one fits."""

    def chain(x: Tensor) -> tuple[Tensor, Tensor]:
        shared = x.relu()
        return shared + 1, shared.sigmoid().tanh()

    def function(a: Tensor) -> tuple[Tensor, ...]:
        shared = a.relu()
        dead_end = shared.sigmoid().exp()
        good = shared.sigmoid().tanh()
        return dead_end, good, shared + 1

    graph = graph_of(function)
    match = find(trace(chain), last(graph))
    # relu has a reader outside (the dead end), so the match as a whole is refused, for that reason
    assert isinstance(match, Mismatch) and "is also used by sigmoid" in match.reason


def test_any_takes_a_tuple_and_instantiate_puts_it_back() -> None:
    def viewed(x: Tensor, shape: Any) -> Tensor:
        return x.view(shape).relu()

    graph = graph_of(lambda a: a.view((2, -1)).relu())
    match = find(trace(viewed), last(graph))
    assert isinstance(match, Match) and match.binding["shape"] == (2, -1)
    new = Graph()
    a = new.placeholder("a")
    _, (output,) = instantiate(trace(viewed), {"x": a, "shape": (2, -1)}, new)
    view: Any = output.args[0]
    assert output.target == "relu" and view.args == (a, (2, -1))


def test_functions_may_be_called_by_position_or_by_name() -> None:
    def pattern(x: Tensor) -> Tensor:
        return torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32)

    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(torch.nn.functional.softmax, (x, -1, 3, torch.float32))
    assert isinstance(find(trace(pattern), node), Match)


def in_place(read_after: bool, view: bool = False) -> Graph:
    graph = Graph()
    x = graph.placeholder("x")
    value = graph.call_method("view", (x, -1)) if view else graph.call_function(operator.add, (x, 1))
    changed = graph.call_function(operator.imul, (value, 2.0))
    graph.output((changed, graph.call_method("relu", (value,))) if read_after else changed)
    return graph


def test_functionalize_fresh_values_only() -> None:
    assert functionalize(in_place(read_after=False)) == 1
    assert functionalize(in_place(read_after=True)) == 0
    assert functionalize(in_place(read_after=False, view=True)) == 0


def reduced_in_place(read_before: bool = False, view: bool = False, into_other: bool = False) -> Graph:
    """As Dynamo writes dist.all_reduce(part)."""
    graph = Graph()
    x = graph.placeholder("x")
    part = graph.call_method("view", (x, -1)) if view else graph.call_function(torch._C._nn.linear, (x, x))
    before = [graph.call_method("relu", (part,))] if read_before else []
    part = graph.call_method("view", (part, 4)) if into_other else part
    ops = torch.ops._c10d_functional
    total = graph.call_function(ops.wait_tensor, (graph.call_function(ops.all_reduce, (part, "sum", "0")),))
    graph.call_method("copy_", (x if into_other else part, total))
    graph.output((graph.call_method("exp", (part,)), *before))
    return graph


def test_functionalize_all_reduce() -> None:
    graph = reduced_in_place()
    assert functionalize(graph) == 1
    graph.lint()
    (exp,) = (node for node in graph.nodes if node.target == "exp")
    assert "wait_tensor" in str(exp.args[0]) and not any(node.target == "copy_" for node in graph.nodes)


def test_functionalize_leaves_an_all_reduce_that_others_see() -> None:
    """Of a view of an input, of a value that was read before (by what may be a view), into another tensor."""
    for graph in (reduced_in_place(view=True), reduced_in_place(read_before=True), reduced_in_place(into_other=True)):
        assert functionalize(graph) == 0
