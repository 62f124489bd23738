"""the sum of a product over the ranks + the fused op that reads it      HF: RowwiseParallel, MoeExpertsParallel

all_reduce + wait_tensor in front of one of the ops that post_attention_norms and feed_forward_tail put there, or of a norm that
stands alone. In a layer with experts three sums: that of attention, which both others depend on, and those of the dense and of
the expert branch. Each of the two goes through a norm of its own, so they cannot be one sum; they can be sent at once."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

import gemma4_compile.ops  # noqa: F401  (the schemas that the templates are made of)
from gemma4_compile.ops.distributed.all_reduce_norm import FORMS, PREFIX
from gemma4_compile.ops.examples import SMALL, example

from .fusion import Fusion, every_layer
from .rewrite import Guard, Rewrite, all_guards, same_dtype, vectors_of_last_dim
from .template import Match, Template, from_graph, source_of

GROUP = "group"
SHAPE = "rows_of_experts"  # Hugging Face's experts work on flat rows, and their sum is reshaped


def template(op: str, fused: bool) -> Template:
    """search: op(wait_tensor(all_reduce(x, "sum", group)), ...); replace: all_reduce_op(x, ..., group)."""
    graph, parameters = Graph(), {}
    kinds = {"Tensor": Tensor, "float": float}
    inputs: list[Node] = []
    for argument in getattr(torch.ops.gemma4, op).default._schema.arguments:
        parameters[argument.name] = kinds.get(str(argument.type), Any)
        inputs.append(graph.placeholder(argument.name))
    sums = FORMS[op].sums
    for name in (GROUP, SHAPE)[:sums]:
        parameters[name] = Any
    group, *shapes = (graph.placeholder(name) for name in (GROUP, SHAPE)[:sums])
    if fused:
        result = graph.call_function(getattr(torch.ops.gemma4, PREFIX + op), (*inputs, group))
    else:
        collectives = torch.ops._c10d_functional
        totals = []
        for part, shape in zip(inputs, (None, *shapes), strict=False):
            reduced = graph.call_function(collectives.all_reduce, (part, "sum", group))
            total = graph.call_function(collectives.wait_tensor, (reduced,))
            totals.append(total if shape is None else graph.call_method("reshape", (total, shape)))
        result = graph.call_function(getattr(torch.ops.gemma4, op), (*totals, *inputs[sums:]))
    graph.output(result)
    return from_graph(graph, parameters, source_of(template))


def inputs(op: str) -> dict[str, Any]:
    """Of a process alone in the default group, as the test of all rewrites makes one."""
    names = [argument.name for argument in getattr(torch.ops.gemma4, op).default._schema.arguments]
    values = dict(zip(names, example(op, SMALL, 3, torch.float32, batch=2), strict=True))
    return values | {GROUP: "0"} | ({SHAPE: values["residual"].shape} if FORMS[op].sums == 2 else {})


def same_on_all_ranks(match: Match) -> str | None:
    """The residual must not be made of the rank's own part of the sum: each rank would go on with another hidden state."""
    residual = match.binding.get("residual")
    parts = {match.binding[name] for name in ("x", "dense", "experts") if name in match.binding}
    pending, seen = [residual] if isinstance(residual, Node) else [], set()
    while pending:
        node = pending.pop()
        if node in parts:
            return f"the residual is computed from {node.name}, this rank's part of the sum"
        # Whoever stands before all parts is computed from none; a sum over the ranks is the same on all of them.
        if node not in seen and any(part < node for part in parts) and "wait_tensor" not in str(node.target):
            seen.add(node)
            pending += node.all_input_nodes
    return None


def of_known_group(match: Match) -> str | None:
    group = match.binding[GROUP]
    return None if isinstance(group, str) and group else f"the process group must be named, found {group!r}"


@cache
def rewrites() -> tuple[Rewrite, ...]:
    if not torch.distributed.is_available():
        return ()
    alone: Guard = all_guards(same_dtype("x", "weight"), vectors_of_last_dim("x", "weight"))
    return tuple(
        Rewrite(
            PREFIX + op, template(op, fused=False), template(op, fused=True), lambda op=op: inputs(op),  # type: ignore[misc]
            all_guards(of_known_group, same_on_all_ranks, *([alone] if op == "rms_norm" else [])),
        )
        for op in FORMS
    )  # fmt: skip


# The op chooses between its own kernel and NCCL by the size of the message (plans.one_shot_pays).
FUSION = Fusion(
    "all_reduce_norm", "the sum over the ranks in front of the norms; tensor parallel",
    lambda geometry: every_layer(geometry) if geometry.ranks > 1 else (), rewrites,
)  # fmt: skip
