"""Run the pipeline over a function's Dynamo graph, without Inductor: fast, and the graph is there to be looked at."""

from collections import Counter
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, Gemma4TextModel

import gemma4_compile.ops  # noqa: F401
from gemma4_compile import OptimizeConfig, optimize
from gemma4_compile.dynamo import own_code
from gemma4_compile.optimized import state_of
from gemma4_compile.passes import Record, pipeline, prepare, run
from tests.models import DEVICE, prompt, tiny


@dataclass
class Run:
    """What came out: the graph after the passes, their record, and the compiled function."""

    call: Callable[..., Any]
    graphs: list[Graph]
    records: list[Record]

    @property
    def ops(self) -> Counter[str]:
        """gemma4 ops left in the (only) graph."""
        (graph,) = self.graphs
        return Counter(str(n.target).split(".")[-1] for n in graph.nodes if "gemma4." in str(n.target))


def compile_passes(function: Callable[..., Any], enabled: Collection[str]) -> Run:
    """The function under torch.compile with the pipeline and no code generation."""
    prepare()
    graphs: list[Graph] = []
    records: list[Record] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        records.append(run(pipeline(enabled), gm.graph))
        gm.recompile()
        graphs.append(gm.graph)
        return gm.forward

    return Run(torch.compile(own_code(function), backend=backend, fullgraph=True), graphs, records)


def passes_only(model: Any, config: OptimizeConfig | None = None) -> Any:
    """A model optimized without code generation: the graph after the passes runs as it is."""
    optimize(model, config)
    backend = state_of(model).backend
    backend.compile = lambda gm, inputs, config_patches: gm.forward
    backend.compile_piece = lambda gm, inputs, **options: gm.forward
    if (encoder := state_of(model).encoder) is not None:
        encoder.backend.compile = backend.compile
    return model


def assert_same(actual: Any, expected: Any) -> None:
    """Bit-equal on the CPU, where each reference rounds as Hugging Face does. On a GPU the kernels sum in another order."""
    actual, expected = (value if isinstance(value, tuple) else (value,) for value in (actual, expected))
    for mine, other in zip(actual, expected, strict=True):
        if DEVICE == "cpu" or not other.is_floating_point():
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
            continue
        assert mine.dtype == other.dtype and mine.shape == other.shape
        difference = (mine.double() - other.double()).square().mean().sqrt() / other.double().square().mean().sqrt()
        assert difference <= (1e-5 if other.dtype != torch.bfloat16 else 2e-2), f"relative rms difference {difference:.2g}"


def assert_missed(function: Callable[..., Any], inputs: tuple[Tensor, ...], fusion: str, reason: str = "") -> None:
    """The fusion leaves the function alone, says why, and nothing changes in the result."""
    done = compile_passes(function, {fusion})
    with torch.no_grad():
        expected, actual = function(*inputs), done.call(*inputs)
    assert_same(actual, expected)
    (record,) = done.records
    assert record.matched(fusion) == [] or fusion in ("geglu", "route") and not done.ops[fusion]
    reasons = [miss.reason for miss in record.misses if miss.fusion == fusion]
    assert any(reason in r for r in reasons), f"expected a reason with {reason!r}, got {reasons}"


def norm(width: int = 16, scale: bool = True, seed: int = 3) -> Any:
    """Hugging Face's RMSNorm with weights that are not 1."""
    module = Gemma4RMSNorm(width, with_scale=scale).requires_grad_(False)
    if scale:
        module.weight.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(seed))
    return module.to(DEVICE)


def rows(*shape: int, seed: int = 5) -> Tensor:
    """Random activations."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def at_yoco_boundary(usual: str, at_boundary: str) -> dict[str, int]:
    """Forms in the four layers of the tiny E model. transformers 5.2x slices the hidden states between the last layer that owns
    KV and the first that shares it, so that the next norm cannot join there."""
    slices = hasattr(Gemma4TextModel, "_maybe_slice_kv_shared_inputs")
    return {usual: 3, at_boundary: 1} if slices else {usual: 4}


@cache
def _traced(kind: str, dtype: torch.dtype) -> tuple[GraphModule, tuple[Any, ...], Tensor]:
    """Dynamo's graph of a tiny model, which is the same for all fusions; what it is called with; the plain model's logits."""
    model, ids = tiny(kind, dtype).requires_grad_(False), prompt(2, 6)
    calls: list[tuple[GraphModule, tuple[Any, ...]]] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append((gm, args))
            return gm.forward(*args)

        return call

    prepare()
    with torch.no_grad():
        torch.compile(own_code(lambda ids: model(ids, use_cache=False).logits), backend=backend, fullgraph=True)(ids)
        expected = model(ids, use_cache=False).logits
    ((gm, args),) = calls
    return gm, args, expected


def _alone(
    kind: str, fusion: str, dtype: torch.dtype = torch.float32, on: Collection[str] = ()
) -> tuple[Graph, Record, Tensor, Tensor]:
    """A tiny model with this fusion only, and those that it stands on: the graph and the record, its logits and the plain
    ones."""
    gm, args, expected = _traced(kind, dtype)
    graph = deepcopy(gm.graph)
    record = run(pipeline({fusion, *on}), graph)
    with torch.no_grad():
        (logits,) = GraphModule(gm, graph)(*args)
    return graph, record, logits, expected


def forms(kind: str, fusion: str, on: Collection[str] = ()) -> Counter[str]:
    """How often each form of one fusion fires in a tiny model, alone or with those that it stands on."""
    _, record, _, _ = _alone(kind, fusion, on=on)
    return Counter(site.rewrite for site in record.matched(fusion))


def assert_equal_alone(kind: str, fusion: str, dtype: torch.dtype, on: Collection[str] = ()) -> None:
    """With this fusion only, and those that it stands on, the CPU references give the very numbers of the plain model."""
    graph, record, actual, expected = _alone(kind, fusion, dtype, on)
    assert record.matched(fusion)
    assert not any("gemma4.rms_norm" in str(n.target) or "gemma4.rope" in str(n.target) for n in graph.nodes)
    assert_same(actual, expected)


def assert_dynamic(kind: str, fusion: str, on: Collection[str] = ()) -> None:
    """One graph with the fusion in it serves several lengths."""
    model = tiny(kind).requires_grad_(False)
    done = compile_passes(lambda ids: model(ids, use_cache=False).logits, {fusion, *on})
    for tokens in (6, 9, 3):
        ids = prompt(2, tokens)
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad():
            assert_same(done.call(ids), model(ids, use_cache=False).logits)
    assert len(done.graphs) == 1
    assert done.records[0].matched(fusion)
