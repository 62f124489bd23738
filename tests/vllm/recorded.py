"""Graphs of vLLM's Gemma 4 as files: what a backend is given, without the model and without vLLM.

`encode` writes one (scripts/record_vllm_graph.py), `load` builds it again with fake values, ops of vLLM standing in for
themselves where vLLM is not installed: its norms compute, its attention and experts give what their input is.
"""

import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from gemma4_compile.ops.rms_norm import normalize

GRAPHS = Path(__file__).parent / "graphs"
# Buffers that hold a number of the config, by how their names end; the hidden size is that of scripts/record_vllm_graph.py.
NUMBERS = {"root_size": 64**-0.5, "per_layer_projection_scale": 64**-0.5, "per_layer_input_scale": 2**-0.5}
_LIBRARIES: list[torch.library.Library] = []


def encode(graph: Graph, versions: dict[str, str]) -> str:
    """A node a line."""
    schemas = {}
    for node in graph.nodes:
        target = getattr(node.target, "default", node.target)
        if node.op == "call_function" and isinstance(target, torch._ops.OpOverload):
            schemas[target.name().removesuffix(".default")] = str(target._schema)
    lines = [json.dumps({"versions": versions, "schemas": schemas})]
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        value = node.meta.get("example_value")
        line = [
            node.name,
            node.op,
            _target(node),
            _plain(node.args),
            _plain(node.kwargs),
            _value(value),
            stack[-1][0] if stack else "",
        ]
        lines.append(json.dumps(line))
    return "\n".join(lines) + "\n"


def _target(node: Node) -> str:
    if node.op != "call_function":
        return str(node.target)
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return f"torch.ops.{node.target}"
    name = getattr(node.target, "__name__", "")
    for prefix, home in _HOMES.items():
        if getattr(home, name, None) is node.target:
            return f"{prefix}.{name}"
    raise ValueError(f"no name for {node.target!r} of {node.name}")


_HOMES: dict[str, Any] = {
    "operator": operator, "torch._C._nn": torch._C._nn, "torch.nn.functional": torch.nn.functional, "torch": torch,
    "torch._C._autograd": torch._C._autograd, "math": math, "torch.sym": torch,
}  # fmt: skip


def _plain(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value] if isinstance(value, list) else {"tuple": [_plain(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: _plain(v) for k, v in value.items()}}
    if isinstance(value, slice):
        return {"slice": [_plain(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, EllipsisType):
        return {"ellipsis": True}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {"object": type(value).__name__}


def _value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), [size if isinstance(size, int) else str(size) for size in value.shape]]
    return str(value) if isinstance(value, torch.SymInt) else None


@dataclass
class Recorded:
    """versions  of vLLM, torch and transformers that made the graph
    graph     with fake values, `tokens` of them symbolic"""

    versions: dict[str, str]
    module: GraphModule

    @property
    def graph(self) -> Graph:
        return self.module.graph

    def inputs(self, tokens: int, dtype: torch.dtype) -> list[Any]:
        """Random tensors for each input, weights of norms about 1, where the graph is bf16 of the dtype given."""
        generator = torch.Generator().manual_seed(0)
        return [_drawn(node, tokens, dtype, generator) for node in self.graph.find_nodes(op="placeholder")]


def load(name: str, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> Recorded:
    """A graph of GRAPHS; its bf16 tensors become those of `dtype`, and what it makes itself lies on `device`."""
    first, *lines = (GRAPHS / f"{name}.json").read_text().splitlines()
    header = json.loads(first)
    for op, schema in header["schemas"].items():
        _define(op, schema)
    shape_env = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)
    graph, nodes, sizes = Graph(), dict[str, Node](), dict[str, Any]()
    for line in lines:
        name, op, target, args, kwargs, value, path = json.loads(line)
        node = graph.create_node(
            op, _found(op, target), _made(args, nodes, dtype, device), _made(kwargs, nodes, dtype, device), name
        )
        nodes[name] = node
        if path:
            node.meta["nn_module_stack"] = {path: (path, object)}
        with fake_mode:
            node.meta["example_value"] = _faked(value, sizes, shape_env, dtype, device)
    return Recorded(header["versions"], GraphModule({}, graph))


def _define(op: str, schema: str) -> None:
    """An op that is not there, as vLLM is not: its schema, and a stand-in."""
    namespace, name = op.split("::")
    name, _, overload = name.partition(".")
    if hasattr(getattr(getattr(torch.ops, namespace), name, None), overload or "default"):
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    library.define(schema.split("::", 1)[1].replace("PyObject", "str"))
    library.impl(name + (f".{overload}" if overload else ""), _STAND_INS[name], "CompositeExplicitAutograd")


def vllm_ir(name: str) -> Any:
    """An op of vLLM's IR, also of what is not in a release yet; `name.overload` for another overload. And vLLM's all-reduce."""
    for schema in _SCHEMAS:
        op = schema.partition("(")[0]
        _define(op.replace(".", "::", 1) if "::" not in op else op, schema)
    name, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.vllm if name == "all_reduce" else torch.ops.vllm_ir, name), overload or "default")


_SCHEMAS = (
    "vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor",
    "vllm_ir::fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None) "
    "-> (Tensor, Tensor)",
    "vllm_ir::fused_add_rms_norm.maybe_inplace(Tensor(a!) x, Tensor(b!) x_residual, Tensor? weight, float epsilon, "
    "int? variance_size=None) -> (Tensor, Tensor)",
    "vllm_ir::rms_norm_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, Tensor? weight_residual, float epsilon) "
    "-> (Tensor, Tensor)",
    "vllm::all_reduce(Tensor tensor, str group_name) -> Tensor",
)


def _norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return normalize(x, weight, epsilon)


def _add_norm(x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float, size: Any = None) -> tuple[Tensor, Tensor]:
    total = x + residual
    return normalize(total, weight, epsilon), total


def _norm_add_norm(x: Tensor, residual: Tensor, weight: Any, next_weight: Any, epsilon: float) -> tuple[Tensor, Tensor]:
    return _add_norm(normalize(x, weight, epsilon), residual, next_weight, epsilon)


def _attention(query: Tensor, key: Any, value: Any, output: Tensor, *args: Any, **kwargs: Any) -> None:
    output.copy_(query.reshape(output.shape))


def _experts(output: Tensor, x: Tensor, *args: Any) -> None:
    output.copy_(x)


def _update(key: Tensor, value: Tensor, *args: Any) -> Tensor:
    return key.new_empty(0)


_STAND_INS: dict[str, Any] = {
    "rms_norm": _norm, "fused_add_rms_norm": _add_norm, "rms_norm_add_rms_norm": _norm_add_norm, "all_reduce": torch.clone,
    "unified_attention_with_output": _attention, "unified_kv_cache_update": _update, "cpu_fused_moe": _experts,
}  # fmt: skip


def _found(op: str, target: str) -> Any:
    if op != "call_function":
        return target
    root, *rest = target.split(".")
    found: Any = {"torch": torch, "operator": operator, "math": math}[root]
    for part in rest:
        found = getattr(found, part)
    return found


def _made(value: Any, nodes: dict[str, Node], dtype: torch.dtype, device: str) -> Any:
    if isinstance(value, list):
        return [_made(v, nodes, dtype, device) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "dict":
        return {k: _made(v, nodes, dtype, device) for k, v in content.items()}
    if kind in ("tuple", "slice"):
        items = [_made(v, nodes, dtype, device) for v in content]
        return tuple(items) if kind == "tuple" else slice(*items)
    if kind == "dtype":
        return _dtype(content, dtype)
    return {"ellipsis": ..., "device": torch.device(device), "object": content}[kind]


def _dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return dtype if name == "bfloat16" else getattr(torch, name)


def _faked(value: Any, sizes: dict[str, Any], shape_env: ShapeEnv, dtype: torch.dtype, device: str) -> Any:
    def size(text: Any) -> Any:
        if isinstance(text, int):
            return text
        known = {name: made for name, made in sizes.items() if name in text}
        if not known:
            symbol = shape_env.create_symbol(6, ConstantSource(text), DimDynamic.DYNAMIC)
            sizes[text] = shape_env.create_symintnode(symbol, hint=6)
            return sizes[text]
        return eval(text, {}, known)  # products of the symbol

    if isinstance(value, str):
        return size(value)
    return None if value is None else torch.empty([size(s) for s in value[1]], dtype=_dtype(value[0], dtype), device=device)


def _drawn(node: Node, tokens: int, dtype: torch.dtype, generator: torch.Generator) -> Any:
    value = node.meta["example_value"]
    if value is None:
        return "layer"
    if isinstance(value, torch.SymInt):
        return tokens
    number = next((number for end, number in NUMBERS.items() if str(node.target).strip("_").endswith(end)), None)
    if number is not None:
        return torch.tensor(number).to(value.dtype)
    shape = [size if isinstance(size, int) else tokens for size in value.shape]
    if not value.is_floating_point():
        return torch.randint(0, 100, shape, generator=generator, dtype=value.dtype)
    if "norm" in node.name or len(shape) < 2:
        return (torch.rand(shape, generator=generator) + 0.5).to(value.dtype)
    return torch.randn(shape, generator=generator).to(value.dtype) / max(shape[-1], 1) ** 0.5
