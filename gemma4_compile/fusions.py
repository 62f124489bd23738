"""The fusions and graph transforms by name: what each does, and whether it is on by default, as measured."""

from dataclasses import dataclass

from .ops.measured import FUSIONS as MEASURED


@dataclass(frozen=True)
class Fusion:
    """on_by_default: only where it beats Inductor's own code on the GPU, see docs/fusions.md."""

    replaces: str
    on_by_default: bool
    why_off: str = ""


_REPLACES = {
    "qkv_norm_rope": "Q, K and V head norms + RoPE",
    "attention_qkv": "qkv_norm_rope + attention's write of K and V into pages; in packed steps",
    "post_attention_norms": "post-attention norm + residual + the norms that read it",
    "gate_up": "gate and up projections + gelu_tanh(gate) * up",
    "geglu": "gelu_tanh(gate) * up",
    "route": "softmax, top-k, renormalize, per-expert scale",
    "experts": "the routed experts: both products, gelu_tanh(gate) * up, weighted sum",
    "feed_forward_tail": "post-FF norms + residual [* scalar] [+ the next layer's norm]",
    "ple_inputs": "per-layer embedding gather + projection norm + combine",
    "ple_tail": "PLE gate, projection, norm, residual, scalar [+ the next layer's norm]",
    "linear": "projections of few tokens, those of one input in one launch",
    "all_reduce_norm": "the sum over the ranks in front of the norms; tensor parallel",
}
FUSIONS: dict[str, Fusion] = {
    name: Fusion(text, MEASURED[name].on_by_default, MEASURED[name].why_off) for name, text in _REPLACES.items()
}

# Rewrites of the whole graph, with a switch like a fusion's.
TRANSFORMS: dict[str, Fusion] = {
    "yoco": Fusion("behind the last layer that owns KV, only the rows whose logits are wanted", True),
}
SWITCHES = FUSIONS | TRANSFORMS

# Kernel launches that a site of a rewrite saves against Inductor on the GPU, where it saves any (docs/fusions.md, "launches").
LAUNCHES_SAVED = {"route": 3, "qkv_norm_rope": 2, "kv_norm_rope": 1, "ple_tail": 1, "ple_tail_norm": 1}
LAUNCHES_SAVED |= {"attention_qkv": 1, "attention_qkv_unmasked": 1}  # beside qkv_norm_rope's
LAUNCHES_SAVED |= {"gate_up": 2, "linear_triple": 2, "linear_pair": 1}  # of up to 32 rows
