"""The `gemma4::` ops: importing this registers them all, also where there is no GPU and no Triton."""

from .all_reduce_norm import all_reduce_norm
from .attention import attention
from .attention_qkv import attention_qkv
from .experts import experts
from .feed_forward_tail import (
    feed_forward_tail,
    feed_forward_tail_norm,
    moe_feed_forward_tail,
    moe_feed_forward_tail_norm,
)
from .geglu import geglu
from .library import OPS
from .linear import gate_up, linear, linear_pair, linear_triple
from .ordered_argmax import ordered_argmax, ordered_scores
from .ple_inputs import ple_combine, ple_inputs
from .ple_tail import ple_tail, ple_tail_norm
from .post_attention_norms import post_attention_norm, post_attention_norms
from .qkv_norm_rope import q_norm_rope, qkv_norm_rope
from .rms_norm import rms_norm, rms_norm_noscale
from .rope import rope
from .route import route
from .sample import sample
from .verify import draw_draft, verify
from .vocabulary import Vocabulary

__all__ = [
    "OPS",
    "Vocabulary",
    "all_reduce_norm",
    "attention",
    "attention_qkv",
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
    "rms_norm",
    "rms_norm_noscale",
    "rope",
    "route",
    "sample",
    "verify",
]
