"""The passes on recorded graphs of each supported vLLM: exact counts, numerics, dynamic shapes, what is lowered."""

import copy
import operator
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node

from gemma4_compile.passes import Record, run, trace_patterns
from gemma4_compile.passes.base import compute, fake_mode_of
from gemma4_compile.vllm.constants import FoldConstants
from gemma4_compile.vllm.forms import FUSIONS, pipeline
from gemma4_compile.vllm.norms import LowerNorms, RaiseNorms, Wanted, op_name
from gemma4_compile.vllm.plugin import SUPPORTED
from tests.vllm.recorded import GRAPHS, NUMBERS, Recorded, load, vllm_ir

NORMS = (RaiseNorms(), LowerNorms())
NAMES = sorted(path.stem for path in GRAPHS.glob("*.json"))
# Three layers, of which the last of e shares its keys; the norm behind a layer is the next one's or the model's last.
FORMS = {
    "e": {
        "qkv_norm_rope": 2, "q_norm_rope": 1, "post_attention_norm": 3, "ple_inputs": 1, "ple_tail_norm": 3,
        "feed_forward_tail": 3, "gate_up": 3,
        "linear": 3 + 3 + 3 + 1,  # qkv or q, o and down of each layer, and the projection to the per-layer inputs
    },
    "moe": {
        "qkv_norm_rope": 3, "post_attention_norms": 3, "moe_feed_forward_tail_norm": 3, "gate_up": 3, "linear": 3 + 3 + 3 + 3,
    },
    "dense": {"qkv_norm_rope": 3, "post_attention_norm": 3, "feed_forward_tail_norm": 3, "gate_up": 3, "linear": 3 + 3 + 3},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def traced() -> None:
    trace_patterns(pipeline(FUSIONS, {}, NORMS))


def passed(recorded: Recorded, enabled: Any = FUSIONS, wanted: Wanted | None = None) -> Record:
    norms = (RaiseNorms(wanted or Wanted()), LowerNorms())
    record = run(pipeline(enabled, NUMBERS, norms), recorded.graph)
    recorded.module.recompile()
    return record


def fused(record: Record) -> Counter[str]:
    return Counter(site.rewrite for site in record.sites if site.fusion in FUSIONS)


def outputs(module: GraphModule, inputs: list[Any]) -> list[Tensor]:
    with torch.no_grad():
        result = Interpreter(module).run(*(i.clone() if isinstance(i, Tensor) else i for i in inputs))
    return [value for value in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(value, Tensor)]


def test_each_supported_version_is_recorded() -> None:
    assert {name.split("-")[0] for name in NAMES} == set(SUPPORTED)
    for name in NAMES:
        assert load(name).versions["vllm"].startswith(f"{name.split('-')[0]}.")


@pytest.mark.parametrize("name", NAMES)
def test_exact_count(name: str) -> None:
    recorded = load(name)
    assert fused(passed(recorded)) == FORMS[name.split("-")[1]]
    recorded.graph.lint()


# vLLM 0.26 also rotates a K that its layers with shared keys do not have.
@pytest.mark.parametrize("name", [name for name in NAMES if name != "0.26-e"])
def test_angles_are_looked_up_once_for_a_kind_of_layer(name: str) -> None:
    """Layers 1 and 2 are of one kind, and have one table."""
    recorded = load(name)
    assert len(recorded.graph.find_nodes(op="call_method", target="index_select")) == 3
    passed(recorded)
    assert len(recorded.graph.find_nodes(op="call_method", target="index_select")) == 2
    left = load(name)
    passed(left, enabled=FUSIONS.keys() - {"qkv_norm_rope"})
    assert len(left.graph.find_nodes(op="call_method", target="index_select")) == 3


@pytest.mark.parametrize("tokens", [1, 6])
@pytest.mark.parametrize("name", NAMES)
def test_equals_unfused(name: str, tokens: int) -> None:
    recorded = load(name, torch.float32)
    inputs = recorded.inputs(tokens, torch.float32)
    expected = outputs(copy.deepcopy(recorded.module), inputs)
    assert fused(passed(recorded)) == FORMS[name.split("-")[1]]
    actual = outputs(recorded.module, inputs)
    assert len(actual) == len(expected) > 0
    for mine, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith("-moe")])
def test_as_accurate_in_bfloat16(name: str) -> None:
    """Against the graph in fp32 on the same numbers. Without experts: a route may turn on the last bit."""
    recorded, exact = load(name), load(name, torch.float32)
    inputs = recorded.inputs(6, torch.bfloat16)
    wide = [i.float() if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
    (true,), (plain,) = outputs(exact.module, wide), outputs(copy.deepcopy(recorded.module), inputs)
    passed(recorded)
    (ours,) = outputs(recorded.module, inputs)
    error, other = ((value.float() - true).square().mean() for value in (ours, plain))
    assert error <= 1.5**2 * other


@pytest.mark.parametrize("name", NAMES)
def test_no_length_is_assumed(name: str) -> None:
    recorded = load(name)
    shape_env = fake_mode_of(recorded.graph.find_nodes(op="placeholder")[1]).shape_env
    before = len(shape_env.guards)
    passed(recorded)
    assert len(shape_env.guards) == before
    for node in recorded.graph.nodes:  # what later steps of vLLM read
        if node.op not in ("placeholder", "output") and "gemma4." in str(node.target):
            assert node.meta["example_value"] is not None


@pytest.mark.parametrize("name", NAMES)
def test_nothing_raised_is_left(name: str) -> None:
    """Heads keep their norms, which are vLLM's op again; with all fusions off the graph computes by the operations it had."""
    before = Counter(map(op_name, load(name).graph.nodes))
    recorded = load(name)
    record = passed(recorded)
    assert not any(str(node.target).startswith(("gemma4.rms_norm", "gemma4.geglu")) for node in recorded.graph.nodes)
    norms = {
        "post_attention_norm": 2, "post_attention_norms": 4, "ple_tail_norm": 2, "feed_forward_tail": 1, "ple_inputs": 1,
        "moe_feed_forward_tail_norm": 4, "feed_forward_tail_norm": 2, "qkv_norm_rope": 3, "q_norm_rope": 1,
    }  # fmt: skip
    taken = sum(norms.get(form, 0) * count for form, count in fused(record).items())
    assert Counter(map(op_name, recorded.graph.nodes))["rms_norm"] == before["rms_norm"] - taken > 0

    recorded = load(name)
    passed(recorded, enabled=())
    assert written(recorded.graph) == written(load(name).graph)


def written(graph: Graph) -> Counter[int]:
    """Each operation with all that it is computed of, but for casts, `.data`, and inputs that a number stands for."""
    made, counted = dict[Node, int](), Counter[int]()
    for node in graph.nodes:
        target = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
        if node.op == "placeholder":
            made[node] = hash("number" if node.name.strip("_").endswith(tuple(NUMBERS)) else node.name)
        elif target in ("_get_data_attr", "to") and _same_dtype(node):
            made[node] = made[node.args[0]]
        else:
            operands = [made[a] if isinstance(a, Node) else hash("number" if isinstance(a, float) else "") for a in node.args]
            made[node] = hash((target, *operands))
            counted[made[node]] += 1
    return counted


def _same_dtype(node: Node) -> bool:
    return node.meta["example_value"].dtype == node.all_input_nodes[0].meta["example_value"].dtype


def test_a_buffer_that_holds_another_number_stays() -> None:
    recorded = load("0.32-e")
    given = [torch.tensor(3.0) if i.op == "placeholder" else None for i in recorded.graph.find_nodes(op="placeholder")]
    FoldConstants(NUMBERS, given)(recorded.graph, Record())
    assert not any(isinstance(a, float) for node in recorded.graph.nodes if node.target is operator.mul for a in node.args)


def residual_norms(graph: Graph, name: str) -> int:
    """Make vLLM's ops of norms with a residual, as changes to its Gemma 4 that are under review do."""
    made = 0
    for total in graph.find_nodes(op="call_function", target=operator.add):
        first, residual = total.args
        readers = [user for user in total.users if op_name(user) == "rms_norm"]
        if (
            op_name(first) != "rms_norm"
            or len(readers) != 1
            or op_name(residual) == "rms_norm"
            or first.args[0].target is operator.mul
        ):
            continue
        norm = readers[0]
        if norm.args[1] is not None and not norm.args[1] < total:
            total.prepend(norm.args[1])
        both = (first.args[0], residual, first.args[1], norm.args[1], 1e-6)
        arguments = (first, residual, norm.args[1], 1e-6, None) if name != "rms_norm_add_rms_norm" else both
        with graph.inserting_before(total):
            pair = graph.call_function(vllm_ir(name), arguments)
            items = [graph.call_function(operator.getitem, (pair, i)) for i in (0, 1)]
        pair.meta["example_value"] = compute(pair, fake_mode_of(total))
        for old, new in ((norm, items[0]), (total, items[1])):
            new.meta.update(old.meta)
            old.replace_all_uses_with(new)
            graph.erase_node(old)
        if name == "rms_norm_add_rms_norm":
            graph.erase_node(first)
        made += 1
    return made


@pytest.mark.parametrize("name", ["fused_add_rms_norm", "fused_add_rms_norm.maybe_inplace", "rms_norm_add_rms_norm"])
def test_norms_with_a_residual(name: str) -> None:
    """Both forms fuse as the plain one does, compute the same, and are themselves again where nothing fused them."""
    recorded = load("0.32-e", torch.float32)
    inputs = recorded.inputs(6, torch.float32)
    expected = outputs(copy.deepcopy(recorded.module), inputs)
    assert residual_norms(recorded.graph, name) == 3
    plain = copy.deepcopy(recorded.graph)
    assert fused(passed(recorded)) == FORMS["e"]
    assert not any("add_rms_norm" in str(node.target) for node in recorded.graph.nodes)
    torch.testing.assert_close(outputs(recorded.module, inputs), expected, rtol=1e-4, atol=1e-5)

    left = Recorded({}, GraphModule({}, plain))
    passed(left, enabled=())
    names = Counter(map(op_name, left.graph.nodes))
    assert names[name.split(".")[0]] == 3
    assert names["rms_norm"] == Counter(map(op_name, plain.nodes))["rms_norm"]
    torch.testing.assert_close(outputs(left.module, inputs), expected, rtol=1e-4, atol=1e-5)


def reduced(graph: Graph, node: Node) -> None:
    """Put a sum over the ranks behind a node."""
    with graph.inserting_after(node):
        total = graph.call_function(vllm_ir("all_reduce"), (node, "tp:0"))
    total.meta.update(node.meta)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (Wanted(), {"post_attention_norm": 3, "feed_forward_tail": 3, "ple_tail_norm": 3}),
        # The norm in front of each MLP stays with its quantization; what comes before it fuses without.
        (Wanted(before_quantization=True), {"feed_forward_tail": 6, "ple_tail_norm": 3}),
        (Wanted(behind_all_reduce=True), {"feed_forward_tail": 3, "ple_tail_norm": 3}),
    ],
)
def test_norms_that_vllm_wants_stay(wanted: Wanted, expected: dict[str, int]) -> None:
    """Quantized MLPs, and attention whose parts are summed over the ranks."""
    recorded = load("0.32-e")
    graph = recorded.graph
    for norm in [n for n in graph.nodes if op_name(n) == "rms_norm"]:
        path = list(norm.meta["nn_module_stack"])[-1]
        if path.endswith("pre_feedforward_layernorm"):
            (product,) = norm.users
            with graph.inserting_before(product):
                cast = graph.call_method("to", (norm, torch.float8_e4m3fn))
                back = graph.call_method("to", (cast, torch.bfloat16))
            cast.meta["example_value"] = norm.meta["example_value"].to(torch.float8_e4m3fn)
            back.meta["example_value"] = norm.meta["example_value"]
            product.replace_input_with(norm, back)
        if path.endswith("post_attention_layernorm"):
            reduced(graph, norm.args[0])
    record = passed(recorded, enabled={"post_attention_norms", "ple_inputs", "feed_forward_tail", "ple_tail"}, wanted=wanted)
    assert fused(record) - Counter(["ple_inputs"]) == expected


@pytest.mark.parametrize(
    ("weight", "size"), [(torch.float32, None), (torch.bfloat16, 8)], ids=["weight of another dtype", "mean of a part"]
)
def test_norms_that_ours_is_not(weight: torch.dtype, size: int | None) -> None:
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    x.meta["example_value"], w.meta["example_value"] = torch.empty(3, 16, dtype=torch.bfloat16), torch.empty(16, dtype=weight)
    norm = graph.call_function(vllm_ir("rms_norm"), (x, w, 1e-6, size))
    graph.output(norm)
    RaiseNorms()(graph, Record())
    assert op_name(norm) == "rms_norm" and norm.args[-1] is size
