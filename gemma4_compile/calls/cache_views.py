"""Hugging Face's cache layers over leased memory: `keys` and `values` are views of what the packed step writes in place.

A layer that a packed step has filled gets a subclass of its own class, whose tensors and lengths are the lease's. All else that
transformers does to a layer reads them and assigns new ones (crop, reorder_cache, batch_select_indices, its own update). The
first such assignment gives all layers of the cache their own class back, with the views as plain tensors; the next packed step
takes them in again, and copies only what is not in the lease's memory already.
"""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from .kv_memory import Kind, KVMemory, Lease, Unfit

PLAIN = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_LEASE, _KIND, _PLACE, _OWN = "_leased", "_leased_kind", "_leased_place", "_leased_from"


def _tensors(which: int, name: str) -> property:
    """A layer's keys or values: a view, until another tensor is assigned."""

    def put(layer: Any, value: Any) -> None:
        release(layer)
        setattr(layer, name, value)

    return property(lambda layer: _view(layer, which), put)


def _reduce(layer: Any, protocol: Any) -> Any:
    """A copy is a layer of the own class, with memory of its own."""
    state = {name: value for name, value in layer.__dict__.items() if name not in (_LEASE, _KIND, _PLACE)}
    own = {name: value.clone() if isinstance(value, Tensor) else value for name, value in _own_state(layer).items()}
    return _rebuilt, (_own_class(layer), state | own)


def _rebuilt(own: Any, state: dict[str, Any]) -> Any:
    layer = own.__new__(own)
    layer.__dict__.update(state)
    return layer


def _length(name: str) -> property:
    """A number that is the lease's, until another is assigned."""

    def put(layer: Any, value: Any) -> None:
        release(layer)
        setattr(layer, name, value)

    return property(lambda layer: layer.__dict__[_LEASE].length, put)


def _counter(layer: Any) -> Tensor:
    """A static layer's tensor, which whoever has it may count on."""
    release(layer)
    return layer.cumulative_length


def _released(name: str) -> Any:
    """A method that may change a layer's tensors in place, as its own class has it."""

    def method(layer: Any, *args: Any, **kwargs: Any) -> Any:
        release(layer)
        return getattr(layer, name)(*args, **kwargs)

    return method


@cache
def _leased_class(own: type) -> type:
    """The class of leased layers of one of PLAIN. It has that one as its only base: objects can then change between the two."""
    members: dict[str, Any] = {
        "__slots__": (), _OWN: own, "keys": _tensors(0, "keys"), "values": _tensors(1, "values"), "__reduce_ex__": _reduce,
        "get_seq_length": lambda layer: layer.__dict__[_LEASE].length,
        # What generate() asks before it makes the masks of a static cache itself: a packed step wants the plain one.
        "is_compileable": False,
    }  # fmt: skip
    if own is DynamicSlidingWindowLayer:
        members["cumulative_length"] = _length("cumulative_length")
    if own is StaticSlidingWindowLayer:
        members["cumulative_length_int"] = _length("cumulative_length_int")
    if issubclass(own, StaticLayer):
        members["cumulative_length"] = property(_counter)
    for name in ("update", "reset", "crop", "offload", "prefetch", "lazy_initialization"):
        if hasattr(own, name):
            members[name] = _released(name)
    return type(f"Leased{own.__name__}", (own,), members)


def _own_class(layer: Any) -> Any:
    """Of a leased layer; None for any other."""
    return getattr(type(layer), _OWN, None)


def _view(layer: Any, which: int) -> Tensor:
    state = layer.__dict__
    lease: Lease = state[_LEASE]
    kind: Kind = state[_KIND]
    begin, end = lease.kept[kind.name], lease.length
    if isinstance(layer, StaticLayer):
        begin = max(0, end - layer.max_cache_len)
        end = begin + layer.max_cache_len
    elif not keeps_all(layer):
        begin = max(begin, end - kind.window + 1)
    return lease.tokens(kind.name, begin, end)[state[_PLACE], which].transpose(1, 2)


def _own_state(layer: Any) -> dict[str, Any]:
    """What the layer's own class would hold."""
    lease: Lease = layer.__dict__[_LEASE]
    found: dict[str, Any] = {"keys": _view(layer, 0), "values": _view(layer, 1)}
    if isinstance(layer, StaticLayer):
        counted = min(lease.length, layer.max_cache_len)  # transformers counts a window in its tensor until it is full
        found["cumulative_length"] = torch.tensor(counted, device=found["keys"].device)
        if isinstance(layer, StaticSlidingWindowLayer):
            found["cumulative_length_int"] = lease.length
    elif isinstance(layer, DynamicSlidingWindowLayer):
        found["cumulative_length"] = lease.length
    return found


def release(layer: Any) -> None:
    """Give all layers of this one's lease their own class back, with views of the lease's memory as their tensors."""
    lease: Lease = layer.__dict__[_LEASE]
    layers = [found for reference in lease.layers if (found := reference()) is not None]
    states = [_own_state(leased) for leased in layers]
    for leased, state in zip(layers, states, strict=True):
        leased.__class__ = _own_class(leased)
        leased.__dict__.update(state)
    lease.layers = []


def release_cache(cache: Any) -> None:
    """As `release`, of whatever layers of a cache are leased."""
    for layer in getattr(cache, "layers", ()):
        if _own_class(layer) is not None:
            release(layer)


def lease_of(cache: Any, owners: int) -> Lease | None:
    """The lease that all layers of a cache are on, each in its place; None if not."""
    layers = cache.layers
    if len(layers) < owners or _own_class(layers[0]) is None:
        return None
    lease: Lease = layers[0].__dict__[_LEASE]
    if len(lease.layers) != owners:
        return None
    for reference, layer in zip(lease.layers, layers, strict=False):  # a reference each: 1 us in all
        if reference() is not layer:
            return None
    return lease


def attach(cache: Any, lease: Lease, kinds: tuple[Kind, ...]) -> None:
    """Put a cache's layers on a lease. Their own tensors are dropped."""
    places = {layer: (kind, place) for kind in kinds for place, layer in enumerate(kind.layers)}
    for index, (kind, place) in sorted(places.items()):
        layer: Any = cache.layers[index]
        state = layer.__dict__
        if not layer.is_initialized:  # as lazy_initialization does, which allocates too
            data = lease.slab.pools[kind.name].data
            state |= {"device": data.device, "dtype": data.dtype, "is_initialized": True}
            if isinstance(layer, StaticLayer):
                state |= {"batch_size": lease.batch, "num_heads": kind.heads, "k_head_dim": kind.dim, "v_head_dim": kind.dim}
        for name in ("keys", "values", "cumulative_length", "cumulative_length_int"):
            state.pop(name, None)
        state |= {_LEASE: lease, _KIND: kind, _PLACE: place}
        if isinstance(layer, StaticLayer) and not layer.is_sliding:
            lease.limit = min(lease.limit, layer.max_cache_len)
        own: Any = type(layer)
        layer.__class__ = _leased_class(own)
        lease.layers.append(weakref.ref(layer))


def keeps_all(layer: Any) -> bool:
    """Whether a layer keeps every token, as all do that have no window, and one whose past may be asked for again."""
    if isinstance(layer, DynamicSlidingWindowLayer):
        return bool(layer.record_past)
    return not isinstance(layer, StaticSlidingWindowLayer)


def take_in(cache: Any, memory: KVMemory, batch: int, more: int) -> Lease:
    """A lease with a cache's contents, which its layers are then on; with room for so many tokens more if it is a new one.

    Raises Unfit for a cache of another kind, batch or model, or whose layers are not equally full."""
    if not isinstance(cache, Cache) or getattr(cache, "offloading", False):
        raise Unfit(f"the cache is a {type(cache).__name__}")
    release_cache(cache)
    places = {layer: (kind, place) for kind in memory.kinds for place, layer in enumerate(kind.layers)}
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while replicate is not None and len(cache.layers) < len(places):
        cache.layers.append(replicate())
    if len(cache.layers) < len(places):
        raise Unfit(f"the cache has {len(cache.layers)} layers, the model {len(places)} that own keys")
    contents = [_contents(cache.layers[index], kind, memory) for index, (kind, _) in sorted(places.items())]
    lengths = {held.length for held in contents}
    batches = {held.keys.shape[0] for held in contents if held.keys is not None}
    if len(lengths) > 1 or batches - {batch}:
        raise Unfit(
            f"the cache has layers of {sorted(lengths)} tokens and batches of {sorted(batches)}, the call one of {batch}"
        )
    length = lengths.pop()

    layers: list[Any] = cache.layers
    lent = layers[0].__dict__.get(_LEASE)
    lent = lent if isinstance(lent, Lease) and lent.batch == batch and lent.slab in memory.slabs else None
    same = lent is not None and all(
        layers[index].__dict__.get(_LEASE) is lent and _is_in_place(held, lent, *places[index])
        for index, held in enumerate(contents)
    )
    if not length:  # give its memory back first: the new lease is likely to get it again
        for index in places:
            layers[index].keys = layers[index].values = None
            layers[index].is_initialized = False
    lease = lent if same and lent is not None else memory.open(batch, length + more)
    for kind in memory.kinds:
        lease.kept[kind.name] = max(contents[layer].begin for layer in kind.layers)
    if not same and length:
        for kind in memory.kinds:  # all before anything is copied: one may move the others
            memory.reserve(lease, kind, length, keep=False)
        for index, (kind, place) in sorted(places.items()):
            begin, item = lease.kept[kind.name], contents[index]
            target = lease.tokens(kind.name, begin, length)[place]
            for which, rows in enumerate((item.keys, item.values)):
                target[which].copy_(rows[:, :, begin - item.begin : length - item.begin].transpose(1, 2))
    lease.length = length
    attach(cache, lease, memory.kinds)
    return lease


class _Held(NamedTuple):
    """What one layer holds: keys and values [batch, heads, tokens, dim] of the tokens from `begin` to `length`."""

    begin: int
    length: int
    keys: Any = None
    values: Any = None


def _contents(layer: Any, kind: Kind, memory: KVMemory) -> _Held:
    own = type(layer)
    if own not in PLAIN:
        raise Unfit(f"the cache has {own.__name__} layers")
    sliding = own in (DynamicSlidingWindowLayer, StaticSlidingWindowLayer)
    window = getattr(layer, "sliding_window", layer.max_cache_len if own is StaticSlidingWindowLayer else 0) if sliding else 0
    if sliding and (not kind.window or window > kind.window or window < kind.window and own is DynamicSlidingWindowLayer):
        raise Unfit(f"the cache has a window of {window}, layers of {kind.name} one of {kind.window}")
    if not layer.is_initialized or layer.keys is None or not layer.keys.numel():  # a static one has its batch from the start
        return _Held(0, 0)
    keys, values = layer.keys, layer.values
    sizes = (keys.shape[1], keys.shape[3], keys.dtype, keys.device)
    if sizes != (kind.heads, kind.dim, memory.dtype, memory.device) or values.shape != keys.shape:
        raise Unfit(f"the cache has keys of {list(keys.shape)} {keys.dtype} on {keys.device}, the model others")
    if own is StaticSlidingWindowLayer:
        length = layer.cumulative_length_int
        begin = max(0, length - window)
    elif own is StaticLayer:
        begin, length = 0, int(layer.cumulative_length)
    elif own is DynamicSlidingWindowLayer:
        length = int(layer.cumulative_length)  # a tensor, where transformers 5.17 was told in one how much to crop
        begin = length - keys.shape[2]
        if keys.shape[2] < min(length, window - 1) or begin < 0:
            raise Unfit(f"the cache has {keys.shape[2]} of the last {min(length, window - 1)} tokens of a window")
    else:
        begin, length = 0, keys.shape[2]
    return _Held(begin, length, keys[:, :, : length - begin], values[:, :, : length - begin])


def _is_in_place(held: _Held, lease: Lease, kind: Kind, place: int) -> bool:
    """Whether a layer's tensors are those rows of the lease's memory that they would be copied to."""
    region = lease.regions[kind.name]
    if held.begin < region.first or held.length > region.end or not held.length:
        return False
    rows = lease.tokens(kind.name, held.begin, held.length)[place].transpose(2, 3)
    return all(
        (given.data_ptr(), given.shape, given.stride()) == (own.data_ptr(), own.shape, own.stride())
        for given, own in zip((held.keys, held.values), rows, strict=True)
    )
