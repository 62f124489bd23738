"""The `gemma4::` ops: importing this registers them all, also where there is no GPU and no Triton."""

from .attention import attention
from .block_attention import block_attention
from .distributed.all_reduce_norm import all_reduce_norm
from .fusions.attention_qkv import attention_qkv
from .fusions.experts import experts
from .fusions.feed_forward_tail import (
    feed_forward_tail,
    feed_forward_tail_norm,
    moe_feed_forward_tail,
    moe_feed_forward_tail_norm,
)
from .fusions.geglu import geglu
from .fusions.linear import gate_up, linear, linear_pair, linear_triple
from .fusions.norm_linear import norm_gate_up, norm_linear, norm_linear_pair, norm_linear_triple
from .fusions.norm_ple import norm_ple
from .fusions.ple_inputs import ple_combine, ple_inputs
from .fusions.ple_tail import ple_tail, ple_tail_norm
from .fusions.post_attention_norms import post_attention_norm, post_attention_norms
from .fusions.qkv_norm_rope import q_norm_rope, qkv_norm_rope, qkv_norm_rope_2d, qkv_norm_rope_2d_clipped
from .fusions.route import route
from .library import OPS
from .rms_norm import rms_norm, rms_norm_noscale
from .rope import rope, rope_2d
from .sampling.ordered_argmax import ordered_argmax, ordered_scores
from .sampling.sample import sample
from .sampling.verify import draw_draft, verify
from .sampling.vocabulary import Vocabulary

__all__ = [
    "OPS",
    "Vocabulary",
    "all_reduce_norm",
    "attention",
    "attention_qkv",
    "block_attention",
    "draw_draft",
    "experts",
    "feed_forward_tail",
    "feed_forward_tail_norm",
    "gate_up",
    "geglu",
    "linear",
    "linear_pair",
    "linear_triple",
    "moe_feed_forward_tail",
    "moe_feed_forward_tail_norm",
    "norm_gate_up",
    "norm_linear",
    "norm_linear_pair",
    "norm_linear_triple",
    "norm_ple",
    "ordered_argmax",
    "ordered_scores",
    "ple_combine",
    "ple_inputs",
    "ple_tail",
    "ple_tail_norm",
    "post_attention_norm",
    "post_attention_norms",
    "q_norm_rope",
    "qkv_norm_rope",
    "qkv_norm_rope_2d",
    "qkv_norm_rope_2d_clipped",
    "rms_norm",
    "rms_norm_noscale",
    "rope",
    "rope_2d",
    "route",
    "sample",
    "verify",
]
