"""Memory behind the caches of Hugging Face's calls: pages of all layers of a kind in one tensor, handed out in runs.

    Slab    one pool a kind of layer; CUDA graphs keep its addresses
    Run     consecutive pages of a pool, as many for each sequence of a batch: Hugging Face's [batch, heads, tokens, dim] is a
            view of them, and the packed step finds them by page tables
    Lease   the runs of one cache, and how far they are filled

The pages of a run go back to their pool when neither its lease nor any tensor that views it is left, so nothing that somebody
holds is ever given to another cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.borrowed import Borrowed
from gemma4_compile.geometry import Geometry, LayerGeometry

PAGE = 64  # tokens
SLACK = 256  # tokens that a run has room for beyond what is needed, at least
_GROWTH = 8  # a run of all tokens has room for an 8th more
_LEAST = 4096  # tokens of a slab's pool for layers that see all, so that short calls share one


class Unfit(Exception):
    """Why a call cannot run as packed steps."""


@dataclass(frozen=True)
class Kind:
    """The layers of one kind that own keys and values, and the window that they see, 0 for all."""

    name: str
    layers: tuple[int, ...]
    heads: int
    dim: int
    window: int


def kinds_of(model_geometry: Geometry, window: int) -> tuple[Kind, ...]:
    """Raises Unfit where layers of one kind differ in the size of a token."""
    found: dict[str, list[LayerGeometry]] = {}
    for layer in model_geometry.layers:
        if not layer.shares_kv:
            found.setdefault(layer.kind, []).append(layer)
    kinds = []
    for name, layers in found.items():
        sizes = {(layer.kv_heads, layer.head_dim) for layer in layers}
        if len(sizes) > 1:
            raise Unfit(f"layers of {name} have keys of several sizes, {sorted(sizes)}")
        sliding = window if name == "sliding_attention" else 0
        kinds.append(Kind(name, tuple(layer.index for layer in layers), *sizes.pop(), sliding))
    return tuple(kinds)


class Pool:
    """Pages of one kind of layer: data is [layers, 2, pages, PAGE, heads, dim]."""

    def __init__(self, kind: Kind, pages: int, dtype: torch.dtype, device: torch.device):
        self.kind, self.pages = kind, pages
        # Zeros: a masked key has the weight 0, and 0 times whatever was there before must be 0.
        shape = (len(kind.layers), 2, pages, PAGE, kind.heads, kind.dim)
        self.data = torch.zeros(shape, dtype=dtype, device=device)
        self._free = [(0, pages)]  # (first page, number of pages), ascending, no two of them touching

    def take(self, batch: int, pages: int) -> Run | None:
        """So many consecutive pages for each sequence, or None if there are none."""
        wanted = batch * pages
        for index, (start, length) in enumerate(self._free):
            if length >= wanted:
                self._free[index : index + 1] = [(start + wanted, length - wanted)] if length > wanted else []
                return Run(self, start, batch, pages)
        return None

    def fits(self, pages: int) -> bool:
        return any(length >= pages for _, length in self._free)

    def give(self, start: int, pages: int) -> None:
        joined: list[tuple[int, int]] = []
        for first, length in sorted([*self._free, (start, pages)]):
            if joined and sum(joined[-1]) == first:
                joined[-1] = (joined[-1][0], joined[-1][1] + length)
            else:
                joined.append((first, length))
        self._free = joined

    @property
    def empty(self) -> bool:
        return self._free == [(0, self.pages)]

    def memory(self) -> Iterator[tuple[str, Tensor]]:
        """The inputs of a packed step that are this pool's, by name."""
        for place, layer in enumerate(self.kind.layers):
            yield f"keys.{layer}", self.data[place, 0]
            yield f"values.{layer}", self.data[place, 1]


class Run:
    """Consecutive pages of a pool: `data` is [layers, 2, batch, tokens, heads, dim], a view of the pool's memory in which each
    sequence has as many pages, one sequence after the other."""

    def __init__(self, pool: Pool, start: int, batch: int, pages: int):
        self.start = start
        shape = (*pool.data.shape[:2], batch, pages * PAGE, *pool.data.shape[4:])
        strides = pool.data.stride()
        lender = Borrowed(pool.data.data_ptr(), pool.data.untyped_storage().nbytes(), pool.data.device, pool.data)
        weakref.finalize(lender, pool.give, start, batch * pages).atexit = False
        with torch.inference_mode(False):
            memory = lender.tensor().view(pool.data.dtype)
            self.data = memory.as_strided(shape, (*strides[:2], pages * strides[2], *strides[3:]), start * strides[2])
        del memory
        self._uses = self._count()

    def is_viewed(self) -> bool:
        """Whether anybody but this run has a tensor of it, and must not see it change."""
        return self._count() != self._uses

    def _count(self) -> int:
        return torch._C._storage_Use_Count(self.data.untyped_storage()._cdata)


class Slab:
    """One pool for each kind of layer."""

    def __init__(self, kinds: Sequence[Kind], pages: Mapping[str, int], dtype: torch.dtype, device: torch.device):
        with torch.inference_mode(False):
            self.pools = {kind.name: Pool(kind, pages[kind.name], dtype, device) for kind in kinds}
            self.memory = {name: tensor for pool in self.pools.values() for name, tensor in pool.memory()}

    @property
    def empty(self) -> bool:
        return all(pool.empty for pool in self.pools.values())

    @property
    def nbytes(self) -> int:
        return sum(pool.data.nbytes for pool in self.pools.values())


class Region:
    """Where the tokens of one kind lie: data [layers, 2, batch, capacity, heads, dim], from the token `first` of each sequence
    on, which is a multiple of PAGE; `page` is its first page in the memory that the step is given."""

    def __init__(self, data: Tensor, first: int, page: int, run: Run | None = None):
        self.data, self.first, self.page, self.run = data, first, page, run

    @property
    def pages(self) -> int:
        """Of each sequence."""
        return self.data.shape[3] // PAGE

    @property
    def end(self) -> int:
        """The first token that there is no room for."""
        return self.first + self.data.shape[3]

    def table(self, width: int) -> Tensor:
        """[batch, width] int32: the pages of each sequence; those before the region are never read."""
        index = torch.arange(width, dtype=torch.int32, device=self.data.device) - self.first // PAGE
        rows = torch.arange(self.data.shape[2], dtype=torch.int32, device=self.data.device)[:, None] * self.pages + self.page
        return rows + index.clamp(0, self.pages - 1)

    def base(self) -> Tensor:
        """[batch] int64: the slot of each sequence's token 0, were it here."""
        batch, capacity = self.data.shape[2:4]
        return torch.arange(batch, device=self.data.device) * capacity + (self.page * PAGE - self.first)


class Lease:
    """Keys and values of one cache: `length` tokens of each of `batch` sequences.

    kept      kind -> the first token whose keys the cache still has
    limit     tokens that the cache may hold
    version   changes whenever a region moves
    layers    the cache's layers, see cache_views.py
    """

    def __init__(self, slab: Slab, batch: int):
        self.slab, self.batch, self.length, self.version = slab, batch, 0, 0
        self.limit = 2**62
        self.regions: dict[str, Region] = {}
        self.kept = dict.fromkeys(slab.pools, 0)
        self.layers: list[weakref.ref[Any]] = []

    def __reduce__(self) -> Any:  # a copy of a cache has memory of its own
        return type(None), ()

    def __deepcopy__(self, memo: Any) -> None:
        return None

    def tokens(self, kind: str, begin: int, end: int) -> Tensor:
        """[layers, 2, batch, end - begin, heads, dim], a view."""
        region = self.regions[kind]
        return region.data[:, :, :, begin - region.first : end - region.first]


class KVMemory:
    """All slabs of one model.

    Raises Unfit for a model whose layers of a kind differ."""

    def __init__(self, model_geometry: Geometry, window: int, dtype: torch.dtype, device: torch.device):
        self.kinds = kinds_of(model_geometry, window)
        self.dtype, self.device = dtype, device
        self.slabs: list[Slab] = []
        self.dropped: Callable[[], None] = lambda: None  # called when slabs have gone, for those who keep their addresses

    def open(self, batch: int, length: int) -> Lease:
        """A lease with room for so many tokens of each sequence, and some more."""
        pages = {kind.name: self._pages(kind, kind.window or length) for kind in self.kinds}
        lease = Lease(self._slab({name: batch * count for name, count in pages.items()}), batch)
        for kind in self.kinds:
            self._move(lease, kind, 0, pages[kind.name])
        return lease

    def reserve(self, lease: Lease, kind: Kind, end: int, keep: bool = True) -> None:
        """Room for tokens up to `end`. What the cache has kept may move, or is left behind (not `keep`)."""
        region, first = lease.regions[kind.name], lease.kept[kind.name] // PAGE * PAGE
        if region.first <= first and end <= region.end:
            return
        assert region.run is not None
        if first + region.pages * PAGE >= end and not region.run.is_viewed():
            begin = lease.kept[kind.name]
            rows = lease.tokens(kind.name, begin, lease.length).clone() if keep else None
            region.first = first
            if rows is not None:
                lease.tokens(kind.name, begin, lease.length).copy_(rows)
            lease.version += 1
        else:
            self._move(lease, kind, first, self._pages(kind, end - first), keep)

    def _move(self, lease: Lease, kind: Kind, first: int, pages: int, keep: bool = True) -> None:
        """Give a kind another region, of so many pages for each sequence; in another slab if there is no room in this one."""
        run = lease.slab.pools[kind.name].take(lease.batch, pages)
        if run is None:
            sizes = {name: region.pages for name, region in lease.regions.items()} | {kind.name: pages}
            lease.slab = self._slab({name: lease.batch * count for name, count in sizes.items()}, but=lease.slab)
            for other in self.kinds:
                if other is not kind and other.name in lease.regions:
                    self._move(lease, other, lease.regions[other.name].first, sizes[other.name])
            run = lease.slab.pools[kind.name].take(lease.batch, pages)
            assert run is not None, "a slab has room for what it was chosen for"
        begin, old = lease.kept[kind.name], lease.regions.get(kind.name)
        lease.regions[kind.name] = Region(run.data, first, run.start, run)
        if keep and old is not None and lease.length > begin:
            rows = old.data[:, :, :, begin - old.first : lease.length - old.first]
            lease.tokens(kind.name, begin, lease.length).copy_(rows)
        lease.version += 1

    def scratch(self, lease: Lease, kind: Kind, end: int) -> Region:
        """Memory for a long chunk up to `end`, with what the cache has kept in it; nobody's once the chunk is done."""
        begin = lease.kept[kind.name]
        first = begin // PAGE * PAGE
        shape = (len(kind.layers), 2, lease.batch, -(-(end - first) // PAGE) * PAGE, kind.heads, kind.dim)
        region = Region(torch.zeros(shape, dtype=self.dtype, device=self.device), first, 0)
        region.data[:, :, :, begin - first : lease.length - first] = lease.tokens(kind.name, begin, lease.length)
        return region

    def table_width(self, length: int) -> int:
        """Pages of a sequence in a cache that a prompt of so many tokens opens."""
        return max(self._pages(kind, kind.window or length) for kind in self.kinds)

    def _pages(self, kind: Kind, tokens: int) -> int:
        more = SLACK if kind.window else max(SLACK, tokens // _GROWTH)
        return -(-(tokens + more) // PAGE)

    def _slab(self, pages: Mapping[str, int], but: Slab | None = None) -> Slab:
        """One with room for such runs. Those that hold nothing and are too small go."""
        for slab in self.slabs:
            if slab is not but and all(slab.pools[name].fits(count) for name, count in pages.items()):
                return slab
        self.slabs = [slab for slab in self.slabs if not slab.empty]
        self.dropped()
        held = {name: sum(slab.pools[name].pages for slab in self.slabs) for name in pages}
        least = {kind.name: 0 if kind.window else _LEAST // PAGE for kind in self.kinds}
        sizes = {name: max(count, held[name], least[name]) for name, count in pages.items()}
        self.slabs.append(Slab(self.kinds, sizes, self.dtype, self.device))
        return self.slabs[-1]
