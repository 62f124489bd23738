"""raise: Hugging Face's subgraphs become one op each, the vocabulary that fusions are written in."""

from torch.fx import Graph

from gemma4_compile.patterns import geglu, rms_norm, rope, route
from gemma4_compile.patterns.functionalize import functionalize

from .base import PatternPass, Record


class Functionalize:
    """In-place arithmetic becomes plain, so that each pattern needs one form only."""

    name = "functionalize"

    def __call__(self, graph: Graph, record: Record) -> None:
        functionalize(graph)


RAISE_RMS_NORM = PatternPass("rms_norm", rms_norm.rewrites, lowered=True)
RAISE_ROPE = PatternPass("rope", rope.rewrites, lowered=True)
RAISE_GEGLU = PatternPass("geglu", geglu.rewrites)
RAISE_ROUTE = PatternPass("route", route.rewrites)
