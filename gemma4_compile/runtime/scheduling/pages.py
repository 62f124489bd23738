"""Who owns which page of the KV pools: allocation, prefix caching, sliding pages that are freed behind the window.

Layers of a kind have one page table, so a page here is one page of each layer of the kind. Nothing here touches a tensor.
"""

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

FREED = -1  # in a sequence's list: a page that has left the window


class PagePool:
    """Pages of one kind of layer. A free page may still cache a prefix; the least recently used one is allocated first."""

    def __init__(self, kind: str, pages: int):
        self.kind, self.pages = kind, pages
        self.ref_counts = [0] * pages
        self._blank = deque(range(pages))
        self._idle: OrderedDict[int, None] = OrderedDict()  # free, with contents that a request may reuse
        self._key_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._idle)

    @property
    def in_use(self) -> int:
        return self.pages - self.free

    def allocate(self) -> int:
        """A free page, whose contents are forgotten. Raises IndexError if there is none."""
        if self._blank:
            page = self._blank.popleft()
        elif self._idle:
            page, _ = self._idle.popitem(last=False)
            del self._page_of[self._key_of.pop(page)]
        else:
            raise IndexError(f"no free page in the pool of {self.kind}")
        self.ref_counts[page] = 1
        return page

    def find(self, key: bytes) -> int | None:
        """The page that holds this prefix's last page."""
        return self._page_of.get(key)

    def is_free(self, page: int) -> bool:
        return self.ref_counts[page] == 0

    def incref(self, page: int) -> None:
        """One more owner of a page that was found."""
        if self.ref_counts[page] == 0:
            del self._idle[page]
        self.ref_counts[page] += 1

    def decref(self, page: int) -> None:
        """One owner fewer. The last one leaves a free page."""
        self.ref_counts[page] -= 1
        if self.ref_counts[page] == 0:
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def cache(self, page: int, key: bytes) -> None:
        """The page is full and holds this; what another page holds already is not held twice."""
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def reset(self) -> None:
        """No page's contents are to be trusted any more."""
        self._blank.extend(self._idle)
        for table in (self._idle, self._key_of, self._page_of):
            table.clear()

    def check(self, held: Mapping[int, int]) -> None:
        """Raises AssertionError unless pages in use are exactly those held (page -> owners), and all others are free."""
        assert all(0 <= page < self.pages for page in held), f"{self.kind}: page out of range in {held}"
        assert self.ref_counts == [held.get(page, 0) for page in range(self.pages)], f"{self.kind}: owners differ from holders"
        free = [*self._blank, *self._idle]
        assert len(free) == len(set(free)) and len(free) + len(held) == self.pages, f"{self.kind}: in use + free must be all"
        assert not set(free) & set(held), f"{self.kind}: a page is free and in use"
        assert {self._page_of[key] for key in self._page_of} == set(self._key_of), f"{self.kind}: prefixes and pages differ"
        assert set(self._idle) <= set(self._key_of), f"{self.kind}: an idle page holds nothing"


@dataclass
class Allocation:
    """What one running sequence holds: for each kind its pages in order of position, FREED for those behind the window."""

    row: int  # of the page tables
    capacity: int  # tokens that its pages have room for
    pages: dict[str, list[int]]
    first: dict[str, int] = field(default_factory=dict)  # index of the first page that is not FREED
    keys: list[bytes] = field(default_factory=list)  # of its full pages, as far as computed
    cached: int = 0


class KVPages:
    """The pools of a model, and the page tables of its running sequences.

    pools      kind -> pages
    windows    kind -> sliding window in tokens, 0 for all
    page_size  tokens
    rows       running sequences at most
    width      pages of the longest sequence
    """

    def __init__(self, pools: Mapping[str, int], windows: Mapping[str, int], page_size: int, rows: int, width: int):
        self.pools = {kind: PagePool(kind, pages) for kind, pages in pools.items()}
        self.windows, self.page_size = dict(windows), page_size
        self.tables = {kind: np.zeros((rows, width), np.int32) for kind in pools}
        self.free_rows = list(reversed(range(rows)))
        self.allocations: dict[int, Allocation] = {}

    def keys(self, tokens: Sequence[int], known: Sequence[bytes] = ()) -> list[bytes]:
        """A key for each full page of tokens: of the page and all before it. `known` are those computed already."""
        found, size = list(known), self.page_size
        parent = found[-1] if found else b""
        for start in range(len(found) * size, len(tokens) - size + 1, size):
            page = np.asarray(tokens[start : start + size], np.int64).tobytes()
            parent = blake2b(parent + page, digest_size=16).digest()
            found.append(parent)
        return found

    def match(self, keys: Sequence[bytes]) -> int:
        """How many pages of a prefix can be reused: all of them where a layer sees everything, the window's where not."""
        usable = len(keys)
        for kind, pool in self.pools.items():
            if not self.windows[kind]:
                usable = next((i for i in range(usable) if pool.find(keys[i]) is None), usable)
        changed = True
        while changed and usable:
            changed = False
            for kind, pool in self.pools.items():
                first = self.first_needed(kind, usable * self.page_size)
                missing = next((i for i in range(usable - 1, first - 1, -1) if pool.find(keys[i]) is None), None)
                if missing is not None:  # every longer prefix of this many needs that page too
                    usable, changed = missing, True
        return usable

    def first_needed(self, kind: str, position: int) -> int:
        """The first page that a query at this position sees."""
        window = self.windows[kind]
        return max(0, position - window + 1) // self.page_size if window else 0

    def free_for(self, keys: Sequence[bytes], reused: int) -> dict[str, int]:
        """Free pages of each kind once a prefix of so many pages is held."""
        free = {}
        for kind, pool in self.pools.items():
            first = self.first_needed(kind, reused * self.page_size)
            idle = sum(pool.is_free(pool.find(key)) for key in keys[first:reused])  # type: ignore[arg-type]
            free[kind] = pool.free - idle
        return free

    def allocate(self, keys: Sequence[bytes], reused: int) -> Allocation:
        """A row of the tables and `reused` pages of a prefix that was matched."""
        allocation = Allocation(self.free_rows.pop(), reused * self.page_size, {}, keys=list(keys[:reused]), cached=reused)
        for kind, pool in self.pools.items():
            first = self.first_needed(kind, reused * self.page_size)
            shared = [pool.find(key) for key in keys[first:reused]]
            for page in shared:
                assert page is not None, "a prefix is opened as it was matched"
                pool.incref(page)
            allocation.pages[kind] = [FREED] * first + shared  # type: ignore[operator]
            allocation.first[kind] = first
            self.tables[kind][allocation.row, : len(allocation.pages[kind])] = np.maximum(allocation.pages[kind], 0)
        self.allocations[allocation.row] = allocation
        return allocation

    def available_tokens(self, allocation: Allocation, computed: int) -> int:
        """Tokens that can follow `computed` ones with the pages that are free now; gives back what has left the window."""
        self._leave_window(allocation, computed)
        pages = min(len(allocation.pages[kind]) + pool.free for kind, pool in self.pools.items())
        return pages * self.page_size - computed

    def extend(self, allocation: Allocation, length: int) -> None:
        """Pages for positions below `length`; there must be room."""
        wanted = -(-length // self.page_size)
        for kind, pool in self.pools.items():
            pages, table = allocation.pages[kind], self.tables[kind]
            while len(pages) < wanted:
                page = pool.allocate()
                table[allocation.row, len(pages)] = page
                pages.append(page)
        allocation.capacity = max(allocation.capacity, wanted * self.page_size)

    def _leave_window(self, allocation: Allocation, computed: int) -> None:
        for kind, pool in self.pools.items():
            pages = allocation.pages[kind]
            first = self.first_needed(kind, computed)
            for index in range(allocation.first[kind], min(first, len(pages))):
                pool.decref(pages[index])
                pages[index] = FREED
            allocation.first[kind] = max(first, allocation.first[kind])

    def cache(self, allocation: Allocation, tokens: Sequence[int], computed: int) -> None:
        """Pages of these tokens that are full by now can be reused by others from the next kernel on."""
        full = min(len(tokens), computed) // self.page_size
        if full <= allocation.cached:
            return
        allocation.keys = self.keys(tokens[: full * self.page_size], allocation.keys)
        for kind, pool in self.pools.items():
            for index in range(max(allocation.cached, allocation.first[kind]), full):
                pool.cache(allocation.pages[kind][index], allocation.keys[index])
        allocation.cached = full

    def free(self, allocation: Allocation) -> None:
        """Give back everything. The end of a prefix goes first: without its beginning it is of no use."""
        for kind, pool in self.pools.items():
            for page in reversed(allocation.pages[kind][allocation.first[kind] :]):
                pool.decref(page)
        del self.allocations[allocation.row]
        self.free_rows.append(allocation.row)

    def reset(self) -> None:
        for pool in self.pools.values():
            pool.reset()

    def check(self) -> None:
        """Raises AssertionError unless pages in use + free = all, each page has the owners that hold it, and tables agree."""
        for kind, pool in self.pools.items():
            held: dict[int, int] = {}
            for row, allocation in self.allocations.items():
                pages, first = allocation.pages[kind], allocation.first[kind]
                assert all(page == FREED for page in pages[:first]), f"{kind}: row {row} holds pages behind its window"
                live = pages[first:]
                assert len(pages) * self.page_size == allocation.capacity, f"{kind}: row {row} has room for another length"
                assert list(self.tables[kind][row, first : len(pages)]) == live, f"{kind}: table row {row} differs"
                for page in live:
                    held[page] = held.get(page, 0) + 1
            pool.check(held)
        rows = [*self.free_rows, *self.allocations]
        assert sorted(rows) == list(range(len(rows))), "each row of the tables is free or held"
