"""The whole compiler on one screen: what runs on the graph that Dynamo hands over, and why in this order.

    drop_unread -> shards -> functionalize -> raise -> experts -> yoco -> fuse -> lower

All of it works on Dynamo's graph, before AOT: there a norm is the same nine nodes in every dtype, a linear is one node, the
order is program order, and the passes run on each compile, also where Inductor's cache already holds the code.
"""

from collections.abc import Collection, Iterable

from gemma4_compile.dynamo import own_state
from gemma4_compile.ops.library import register_fallbacks
from gemma4_compile.patterns import (
    all_reduce_norm,
    attention_qkv,
    feed_forward_tail,
    gate_up,
    geglu,
    linear,
    norm_gate_up,
    norm_linear,
    norm_ple,
    ple_inputs,
    ple_tail,
    post_attention_norms,
    qkv_norm_rope,
    route,
)
from gemma4_compile.patterns.fusion import Fusion

from . import experts, yoco
from .base import Miss, Pass, PatternPass, Record, Site, run
from .drop_unread import DropUnread
from .experts import Experts
from .lower import Lower
from .raise_ops import RAISE_GEGLU, RAISE_RMS_NORM, RAISE_ROPE, RAISE_ROUTE, Functionalize
from .shards import Shards
from .yoco import Yoco

__all__ = [
    "FUSIONS",
    "SWITCHES",
    "Fusion",
    "Miss",
    "Pass",
    "PatternPass",
    "Record",
    "Site",
    "pipeline",
    "prepare",
    "run",
    "trace_patterns",
]

# Fusions that are one raised op: switched off, the op is lowered again.
_RAISED = (geglu.FUSION, route.FUSION)
# Compositions of raised ops that become one op with a kernel, in the order in which they are looked for.
_FUSED = (
    qkv_norm_rope.FUSION,
    attention_qkv.FUSION,  # behind qkv_norm_rope, whose op it takes into attention; YOCO is done with attention by now
    post_attention_norms.FUSION,
    ple_inputs.FUSION,
    ple_tail.FUSION,  # before feed_forward_tail, whose scalar form it contains; takes the gate's geglu with it
    feed_forward_tail.FUSION,
    all_reduce_norm.FUSION,  # behind the fusions of norms, whose ops it takes into the sum over the ranks
    gate_up.FUSION,
    linear.FUSION,  # behind these: the products inside other patterns are theirs
    norm_gate_up.FUSION,  # these behind the fusions of norms and of products, of whose ops they make one
    norm_ple.FUSION,
    norm_linear.FUSION,  # behind norm_ple, which leaves it the tail of a layer with PLE
)
FUSIONS: dict[str, Fusion] = {fusion.name: fusion for fusion in (*_RAISED, experts.FUSION, *_FUSED)}
# Rewrites of the whole graph have a switch too.
SWITCHES: dict[str, Fusion] = FUSIONS | {yoco.FUSION.name: yoco.FUSION}


def prepare(own: Iterable[Fusion] = ()) -> None:
    """Before a compilation: Inductor knows our ops, and all patterns are traced. Within it, capturing is nested and counted
    there.

    own  fusions of the user's"""
    trace_patterns(pipeline(FUSIONS, own))


def trace_patterns(steps: Iterable[Pass]) -> None:
    """`prepare` for a pipeline of one's own."""
    register_fallbacks()
    with own_state():
        for step in steps:
            if isinstance(step, PatternPass):
                for rewrite in step.rewrites():
                    _ = rewrite.searched, rewrite.replacement


def pipeline(enabled: Collection[str], own: Iterable[Fusion] = ()) -> tuple[Pass, ...]:
    """The steps with the fusions in `enabled`, and behind them the user's own; every other fusion's sites are left to
    Inductor."""
    return (
        DropUnread(),  # first: an unread view of shared keys is no reason to leave them out of a fusion
        Shards(),  # before fuse: a fused op stands before its first output, and its weights must be there
        Functionalize(),  # before raise: Hugging Face's in-place forms would need patterns of their own
        RAISE_RMS_NORM,
        RAISE_ROPE,
        RAISE_GEGLU,
        RAISE_ROUTE,
        # Before anything else looks at the experts: what is not fused carries a marker, which is no operation of the model.
        *((Experts(),) if experts.FUSION.name in enabled else ()),
        # Behind raise, so that it knows each operation; before fuse, as a norm cannot join the layer before across a gather.
        *((Yoco(),) if yoco.FUSION.name in enabled else ()),
        *(PatternPass(fusion.name, fusion.rewrites) for fusion in _FUSED if fusion.name in enabled),
        *(PatternPass(fusion.name, fusion.rewrites) for fusion in own),
        # Last: no raised op is left as a wall.
        Lower(keep=frozenset(fusion.name for fusion in _RAISED if fusion.name in enabled)),
    )
