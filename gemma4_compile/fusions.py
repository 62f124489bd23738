"""The fusions by name: what each replaces, and whether it is on by default."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fusion:
    """on_by_default: only where it beats Inductor's own code on the GPU, see docs/fusions.md."""

    replaces: str
    on_by_default: bool = True


FUSIONS: dict[str, Fusion] = {
    "qkv_norm_rope": Fusion("Q, K and V head norms + RoPE"),
    "post_attention_norms": Fusion("post-attention norm + residual + the norms that read it"),
    "geglu": Fusion("gelu_tanh(gate) * up", on_by_default=False),
    "route": Fusion("softmax, top-k, renormalize, per-expert scale"),
    "feed_forward_tail": Fusion("post-FF norms + residual [* scalar] [+ the next layer's norm]"),
    "ple_inputs": Fusion("per-layer embedding gather + projection norm + combine"),
    "ple_tail": Fusion("PLE gate, projection, norm, residual, scalar [+ the next layer's norm]"),
}
