"""The whole compiler on one screen: what runs on the graph that Dynamo hands over, and why in this order.

    drop_unread -> shards -> functionalize -> raise -> yoco -> fuse -> lower

All of it works on Dynamo's graph, before AOT: there a norm is the same nine nodes in every dtype, a linear is one node, the
order is program order, and the passes run on each compile, also where Inductor's cache already holds the code.
"""

from collections.abc import Collection

from gemma4_compile.dynamo import own_state
from gemma4_compile.ops.library import register_fallbacks

from .base import Miss, Pass, PatternPass, Record, Site, run
from .drop_unread import DropUnread
from .experts import Experts
from .fuse import (
    FUSE_ALL_REDUCE_NORM,
    FUSE_ATTENTION_QKV,
    FUSE_FEED_FORWARD_TAIL,
    FUSE_GATE_UP,
    FUSE_LINEAR,
    FUSE_PLE_INPUTS,
    FUSE_PLE_TAIL,
    FUSE_POST_ATTENTION_NORMS,
    FUSE_QKV_NORM_ROPE,
)
from .lower import Lower
from .raise_ops import RAISE_GEGLU, RAISE_RMS_NORM, RAISE_ROPE, RAISE_ROUTE, Functionalize
from .shards import Shards
from .yoco import Yoco

__all__ = ["Miss", "Pass", "PatternPass", "Record", "Site", "pipeline", "prepare", "run"]

_FUSE = (
    FUSE_QKV_NORM_ROPE,
    FUSE_ATTENTION_QKV,  # behind qkv_norm_rope, whose op it takes into attention; YOCO is done with attention by now
    FUSE_POST_ATTENTION_NORMS,
    FUSE_PLE_INPUTS,
    FUSE_PLE_TAIL,  # before feed_forward_tail, whose scalar form it contains; takes the gate's geglu with it
    FUSE_FEED_FORWARD_TAIL,
    FUSE_ALL_REDUCE_NORM,  # behind the fusions of norms, whose ops it takes into the sum over the ranks
    FUSE_GATE_UP,
    FUSE_LINEAR,  # last: the products inside other patterns are theirs
)
YOCO = Yoco()
EXPERTS = Experts()
FUSED = frozenset(step.name for step in (*_FUSE, EXPERTS))
# Fusions that are one raised op: switched off, the op is lowered again.
RAISED_FUSIONS = ("route", "geglu")


def prepare() -> None:
    """Before a compilation: Inductor knows our ops, and all patterns are traced. Within it, capturing is nested and counted
    there."""
    register_fallbacks()
    with own_state():
        for step in pipeline(FUSED):
            if isinstance(step, PatternPass):
                for rewrite in step.rewrites():
                    _ = rewrite.searched, rewrite.replacement


def pipeline(enabled: Collection[str]) -> tuple[Pass, ...]:
    """The steps with the fusions in `enabled`; every other fusion's sites are left to Inductor."""
    return (
        DropUnread(),  # first: an unread view of shared keys is no reason to leave them out of a fusion
        Shards(),  # before fuse: a fused op stands before its first output, and its weights must be there
        Functionalize(),  # before raise: Hugging Face's in-place forms would need patterns of their own
        RAISE_RMS_NORM,
        RAISE_ROPE,
        RAISE_GEGLU,
        RAISE_ROUTE,
        # Before anything else looks at the experts: what is not fused carries a marker, which is no operation of the model.
        *((EXPERTS,) if EXPERTS.name in enabled else ()),
        # Behind raise, so that it knows each operation; before fuse, as a norm cannot join the layer before across a gather.
        *((YOCO,) if YOCO.name in enabled else ()),
        *(step for step in _FUSE if step.name in enabled),
        Lower(keep=frozenset(name for name in RAISED_FUSIONS if name in enabled)),  # last: no raised op is left as a wall
    )
