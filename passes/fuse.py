"""fuse: compositions of raised ops become one op with a kernel. What each one looks like is in patterns/."""

from gemma4_compile.patterns import (
    all_reduce_norm,
    attention_qkv,
    feed_forward_tail,
    gate_up,
    linear,
    ple_inputs,
    ple_tail,
    post_attention_norms,
    qkv_norm_rope,
)

from .base import PatternPass

FUSE_QKV_NORM_ROPE = PatternPass("qkv_norm_rope", qkv_norm_rope.rewrites)
FUSE_ATTENTION_QKV = PatternPass("attention_qkv", attention_qkv.rewrites)
FUSE_POST_ATTENTION_NORMS = PatternPass("post_attention_norms", post_attention_norms.rewrites)
FUSE_PLE_INPUTS = PatternPass("ple_inputs", ple_inputs.rewrites)
FUSE_PLE_TAIL = PatternPass("ple_tail", ple_tail.rewrites)
FUSE_GATE_UP = PatternPass("gate_up", gate_up.rewrites)
FUSE_LINEAR = PatternPass("linear", linear.rewrites)
FUSE_FEED_FORWARD_TAIL = PatternPass("feed_forward_tail", feed_forward_tail.rewrites)
FUSE_ALL_REDUCE_NORM = PatternPass("all_reduce_norm", all_reduce_norm.rewrites)
