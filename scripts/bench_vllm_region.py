"""Time what vLLM compiles between two attention ops of Gemma 4, as vLLM writes it and with the plug-in's fusions.

    python scripts/bench_vllm_region.py [--models E2B,26B-A4B] [--tokens 1,8,64,512] [--out FILE]
    python scripts/bench_vllm_region.py --quick --device cpu        # small sizes: do both compute the same?

The region goes from attention's output to the next layer's Q, K and V; with experts it is the two regions around them. It is
plain torch code of vLLM's operations (norms as its IR's own implementation, gate and up as one matrix), compiled by Inductor
with static shapes, the best case for it. `norms` has the fusions of norms and per-layer inputs, products left to cuBLAS;
`all` has gate_up and linear too. The passes that find them are the plug-in's. Microseconds a region, medians over replays of
CUDA graphs of several layers' weights, more than the L2 holds; the three alternate.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # run as a script, this folder is no package

from torch._inductor.compile_fx import compile_fx

from gemma4_compile import ops as _ops  # noqa: F401
from gemma4_compile.dynamo import own_code
from gemma4_compile.hf.checkpoints import TEXT_CONFIGS
from gemma4_compile.passes import run, trace_patterns
from gemma4_compile.vllm.forms import FUSIONS, PRODUCTS, pipeline
from gemma4_compile.vllm.norms import RaiseNorms
from scripts.bench_ops import launches, microseconds

EPS = 1e-6
WEIGHTS_OF_A_GRAPH = 240e6  # bytes: more than four times an H200's L2
VARIANTS: dict[str, Collection[str]] = {"norms": FUSIONS.keys() - PRODUCTS, "all": FUSIONS.keys()}
Norm = Callable[[Tensor, "Tensor | None"], Tensor]


def as_vllm(x: Tensor, weight: Tensor | None) -> Tensor:
    """vLLM's IR op in plain operations: the mean square in fp32, rounded before the weight."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return (normed if weight is None else normed.to(weight.dtype) * weight).to(x.dtype)


def raised(x: Tensor, weight: Tensor | None) -> Tensor:
    """As the plug-in raises it."""
    return torch.ops.gemma4.rms_norm_noscale(x, EPS) if weight is None else torch.ops.gemma4.rms_norm(x, weight, EPS)


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    both = F.linear(x, gate_up, None)
    width = both.shape[-1] // 2
    return F.linear(F.gelu(both[..., :width], approximate="tanh") * both[..., width:], down, None)


def dense_region(norm: Norm, attended: Tensor, residual: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    hidden = norm(F.linear(attended, w["o"], None), w["post_attention"]) + residual
    hidden = norm(mlp(norm(hidden, w["pre_ff"]), w["gate_up"], w["down"]), w["post_ff"]) + hidden
    if "ple_gate" in w:
        gated = F.gelu(F.linear(hidden, w["ple_gate"], None), approximate="tanh") * w["ple_input"]
        hidden = hidden + norm(F.linear(gated, w["ple_projection"], None), w["post_ple"])
    hidden = hidden * w["scalar"]
    return hidden, F.linear(norm(hidden, w["next_input"]), w["qkv"], None)


def before_experts(norm: Norm, attended: Tensor, residual: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, ...]:
    hidden = norm(F.linear(attended, w["o"], None), w["post_attention"]) + residual
    dense = mlp(norm(hidden, w["pre_ff"]), w["gate_up"], w["down"])
    router_in = norm(hidden, None) * hidden.shape[-1] ** -0.5 * w["router_scale"]
    return hidden, dense, norm(hidden, w["pre_ff_2"]), F.linear(router_in, w["router"], None)


def behind_experts(norm: Norm, experts: Tensor, residual: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    branches = norm(w["dense"], w["post_ff_1"]) + norm(experts, w["post_ff_2"])
    hidden = (norm(branches, w["post_ff"]) + residual) * w["scalar"]
    return hidden, F.linear(norm(hidden, w["next_input"]), w["qkv"], None)


REGIONS: dict[str, Callable[..., Any]] = {
    "layer": dense_region, "before the experts": before_experts, "behind the experts": behind_experts,
}  # fmt: skip


def arguments(region: str, config: dict[str, Any], tokens: int, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Inputs and weights of one region; per-layer inputs and the dense branch's output count as weights."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"] * config["head_dim"]
    kv = 2 * config["num_key_value_heads"] * config["head_dim"]
    per_layer, inner = config["hidden_size_per_layer_input"], config["intermediate_size"]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=device, dtype=dtype)

    def matrix(*size: int) -> Tensor:
        return normal(*size) / size[-1] ** 0.5

    norms = ["post_ff", "next_input"]
    norms += ["post_ff_1", "post_ff_2"] if region == "behind the experts" else ["post_attention", "pre_ff"]
    w = {name: 1 + 0.1 * normal(hidden) for name in norms} | {"scalar": torch.ones(1, device=device, dtype=dtype)}
    if region != "before the experts":
        w["qkv"] = matrix(heads + kv, hidden)
    if region == "behind the experts":
        return normal(tokens, hidden), normal(tokens, hidden), w | {"dense": normal(tokens, hidden)}
    w |= {"o": matrix(hidden, heads), "gate_up": matrix(2 * inner, hidden), "down": matrix(hidden, inner)}
    if region == "before the experts":
        w |= {"router_scale": 1 + 0.1 * normal(hidden), "pre_ff_2": 1 + 0.1 * normal(hidden)}
        w["router"] = matrix(config["num_experts"], hidden)
    elif per_layer:
        w |= {"ple_gate": matrix(per_layer, hidden), "ple_projection": matrix(hidden, per_layer)}
        w |= {"ple_input": normal(tokens, per_layer), "post_ple": 1 + 0.1 * normal(hidden)}
    return normal(tokens, heads), normal(tokens, hidden), w


def compiled(region: Callable[..., Any], enabled: Collection[str] | None) -> tuple[Callable[..., Any], list[str]]:
    """The region through Inductor, and the names of the fusions' forms that will be found; `enabled` None: as vLLM has it."""
    found: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        if enabled is not None:
            record = run(pipeline(enabled, {}, (RaiseNorms(), RaiseNorms())), gm.graph)
            gm.recompile()
            found.extend(site.rewrite for site in record.sites if site.fusion in FUSIONS)
        return compile_fx(gm, inputs)

    def call(x: Tensor, residual: Tensor, w: dict[str, Tensor]) -> Any:
        return region(x, residual, w)

    return torch.compile(own_code(call), backend=backend, dynamic=False, fullgraph=True), found


def measure(model: str, config: dict[str, Any], region: str, tokens: int, device: str) -> dict[str, Any]:
    torch._dynamo.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    first = arguments(region, config, tokens, device, dtype)
    size = sum(t.numel() * t.element_size() for t in first[2].values())
    count = max(2, int(-(-WEIGHTS_OF_A_GRAPH // size))) if device == "cuda" else 1
    sets = [first, *(arguments(region, config, tokens, device, dtype) for _ in range(min(count, 64) - 1))]
    functions = {"vllm": compiled(partial(REGIONS[region], as_vllm), None)}
    functions |= {name: compiled(partial(REGIONS[region], raised), enabled) for name, enabled in VARIANTS.items()}
    row: dict[str, Any] = {"model": model, "region": region, "tokens": tokens, "instances": len(sets)}
    with torch.no_grad():
        plain, *ours = (function(*first) for function, _ in functions.values())
        for outputs in ours:  # rounding differs in bf16; a wrong site would differ by all of it
            for mine, other in zip(outputs, plain, strict=True):
                error = (mine.double() - other.double()).square().mean().sqrt() / other.double().square().mean().sqrt()
                if not error < (0.03 if dtype == torch.bfloat16 else 1e-4):
                    raise ValueError(f"{region} of {model} at {tokens} tokens differs from vLLM's by {float(error):.2g}")
        row["fused"] = {name: functions[name][1] for name in VARIANTS}
        if device == "cuda":
            times = microseconds([function for function, _ in functions.values()], sets)
            row["us"] = {name: round(time, 2) for name, time in zip(functions, times, strict=True)}
            row["launches"] = {name: launches(function, first) for name, (function, _) in functions.items()}
    return row


def line(row: dict[str, Any]) -> str:
    text = f"{row['model']:8} {row['region']:18} {row['tokens']:5} tokens  "
    if "us" not in row:
        return text + f"equal; {', '.join(row['fused']['all'])}"
    us, count = row["us"], row["launches"]
    cells = [f"{name} {us[name]:8.2f} us ({count[name]})" for name in us]
    return text + "  ".join(cells) + f"  x{us['vllm'] / us['norms']:.2f} x{us['vllm'] / us['all']:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(TEXT_CONFIGS))
    parser.add_argument("--tokens", default="1,8,64,512")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes, two token counts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1}
    trace_patterns(pipeline(FUSIONS, {}, (RaiseNorms(), RaiseNorms())))
    rows = []
    for model in options.models.split(","):
        config = TEXT_CONFIGS[model]
        if options.quick:
            config = config | small | {"hidden_size_per_layer_input": 16 if config["hidden_size_per_layer_input"] else 0}
        for region in list(REGIONS)[1:] if config.get("num_experts") else ["layer"]:
            for tokens in (1, 8) if options.quick else map(int, options.tokens.split(",")):
                rows.append(measure(model, config, region, tokens, options.device))
                print(line(rows[-1]), flush=True)
    if options.out:
        gpu = torch.cuda.get_device_name() if options.device == "cuda" else "none"
        result = {"gpu": gpu, "torch": torch.__version__, "command": "python scripts/bench_vllm_region.py", "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
