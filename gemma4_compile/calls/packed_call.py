"""A call of a Hugging Face model as steps of its packed program: which calls fit, and how their inputs become a step's.

A call's batch of equal rows is packed, one sequence after the other, padding tokens included: what a mask hides is hidden from
attention, and stands in the cache where transformers would have it. Prompts run in chunks; a token for each sequence is a CUDA
graph on a GPU.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_compile.graphs.buckets import Buckets, fitting
from gemma4_compile.graphs.checks import CaptureRefused, check_host
from gemma4_compile.graphs.dispatch import GraphRunner
from gemma4_compile.graphs.recorder import CudaRecorder, Recorder
from gemma4_compile.hf.watch import Watch, has_hooks, is_foreign
from gemma4_compile.packed.inputs import KINDS
from gemma4_compile.packed.program import Program, weights_of

from .cache_views import keeps_all, lease_of, take_in
from .decode_graphs import BATCHES, DecodeGraphs
from .kv_memory import PAGE, SLACK, Kind, KVMemory, Lease, Region, Unfit
from .masks import padding_of

CHUNK = 8192  # tokens of a step
_OFTEN = 3  # times that prompts of a size come before they are captured, which takes as long as some ten of them
_READ = ("input_ids", "attention_mask", "position_ids", "logits_to_keep", "use_cache", "return_dict")


class PackedCalls:
    """Runs the calls of one optimized model that fit, over caches whose memory is its own.

    model      Gemma4ForCausalLM; of a multimodal model its text part as one
    compiled   gives the program of that model, as its weights are now
    replaced   token ids that are embedded as another, by id
    recorder   captures steps; CUDA graphs on a GPU unless given, none on a CPU or without `graphs`

    Raises Unfit where no call of the model can run so."""

    def __init__(
        self, model: Any, compiled: Callable[[], Program], memory: KVMemory, replaced: Mapping[int, int],
        recorder: Recorder | None = None, graphs: bool = True,
    ):  # fmt: skip
        self.model, self.memory, self._compiled = model, memory, compiled
        self._replaced = dict(replaced)
        self._lock = threading.RLock()
        self._stream: Any = None
        self._seen: Watch | None = None
        self.program: Any = None
        self._recorder = recorder
        self._width = 16 + int(model.config.max_position_embeddings * 9 / 8) // PAGE  # regions have room for an 8th more
        if recorder is None and graphs and memory.device.type == "cuda":
            self._recorder = CudaRecorder(memory.device)
        self.check_model()

    def _bind(self) -> None:
        """Take the program over the weights as they are; graphs of another one go."""
        program = self._compiled()
        if program is self.program:
            return
        self.program = program
        self.graphs: DecodeGraphs | None = None
        self.prompts: GraphRunner | None = None
        self._uses: Counter[tuple[int, int]] = Counter()
        if self._recorder is not None:
            try:
                check_host(program)
                self.graphs = graphs = DecodeGraphs(program, self._recorder, self._clean)
                self.memory.dropped = lambda: graphs.forget(self.memory.slabs)
            except CaptureRefused:
                self._recorder = None  # a piece works on the host

    def check_model(self) -> None:
        """Take in what has changed of the model: tensors, attributes, config. Raises Unfit for a model that does what no graph
        would see."""
        if self._seen is not None and self._seen.is_unchanged():
            return
        self._seen = None
        for module in self.model.modules():
            name = type(module).__name__
            if is_foreign(module):
                raise Unfit(f"the model has a module of {type(module).__module__}.{name}")
            if has_hooks(module):
                raise Unfit(f"hooks on a {name}")
            if "forward" in module.__dict__:
                raise Unfit(f"a forward of its own on a {name}")
        for name, tensor in weights_of(self.model).items():
            if type(tensor) not in (Tensor, nn.Parameter):
                raise Unfit(f"the weight {name} is a {type(tensor).__name__}")
            if tensor.device != self.memory.device:
                raise Unfit(f"the weight {name} is on {tensor.device}")
        self._bind()
        self._seen = Watch(self.model)

    def __call__(self, inputs: Mapping[str, Any], cache: Any) -> Tensor:
        """Logits [batch, wanted tokens, vocabulary]. The cache has the new tokens then, if there is one.

        Raises Unfit, with the cache as it was, for what does not run so."""
        # Normal tensors in the caller's inference mode too: memory and buffers outlive it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            return self._run(inputs, cache)

    def _run(self, inputs: Mapping[str, Any], cache: Any) -> Tensor:
        ids: Tensor = inputs["input_ids"].long()
        batch, tokens = ids.shape
        if tokens > 1:
            self.check_model()
        lease = None if cache is None else lease_of(cache, self._owners)
        if lease is not None and lease.batch != batch:
            raise Unfit(f"the cache has a batch of {lease.batch}, the call one of {batch}")
        if lease is None:
            lease = self.memory.open(batch, tokens) if cache is None else take_in(cache, self.memory, batch, tokens)
        if lease.length + tokens > lease.limit:
            raise Unfit(f"the cache has room for {lease.limit} tokens, got {lease.length} and {tokens} more")
        self._order()
        places = _places(inputs.get("position_ids"), batch, tokens)
        mask = self._mask(inputs.get("attention_mask"), lease, tokens, cache)
        if tokens == 1 and self.graphs is not None:
            self._forget(lease, cache)
            for kind in self.memory.kinds:
                self.memory.reserve(lease, kind, lease.length + 1)
            logits = self.graphs.step(lease, ids, places, mask)
            if logits is not None:
                lease.length += 1
                return logits
            mask = None if mask is None else mask != 0
        return self._prompt(lease, ids, places, mask, inputs.get("logits_to_keep", 0), cache)

    @property
    def _owners(self) -> int:
        return sum(len(kind.layers) for kind in self.memory.kinds)

    def _order(self) -> None:
        """Behind what an earlier call runs on another stream: they share buffers."""
        if self.memory.device.type == "cuda":
            stream = torch.cuda.current_stream(self.memory.device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
            self._stream = stream

    def _forget(self, lease: Lease, cache: Any) -> None:
        """Tokens that have left the window, where the cache does not keep them."""
        for kind in self.memory.kinds:
            if not _keeps_all(kind, cache):
                lease.kept[kind.name] = max(lease.kept[kind.name], lease.length - kind.window)

    def _mask(self, given: Any, lease: Lease, tokens: int, cache: Any) -> Tensor | None:
        """[batch, keys] bool, or None where all may be seen; a decode step's is not looked at, which would wait for the GPU."""
        if given is None:
            return None
        shape = (lease.batch, lease.length + tokens)
        if isinstance(given, Mapping):
            try:
                given = padding_of(given, (lease.batch, tokens), shape[1], self.model.config, self.memory.dtype, cache)
            except ValueError as error:
                raise Unfit(str(error)) from None
            if given is None:
                return None
        if given.dim() != 2 or given.shape != shape:
            raise Unfit(f"the mask is {list(given.shape)}, the tokens {list(shape)}")
        if given.device != self.memory.device:
            raise Unfit(f"the mask is on {given.device}, the model on {self.memory.device}")
        if tokens == 1 and self.graphs is not None:
            return given  # copied as bool
        mask = given if given.dtype == torch.bool else given != 0
        return None if bool(mask.all()) else mask

    def _prompt(
        self, lease: Lease, ids: Tensor, places: Tensor | None, mask: Tensor | None, keep: int | Tensor, cache: Any
    ) -> Tensor:  # fmt: skip
        batch, tokens = ids.shape
        first, order = _wanted(keep, tokens)
        everything = order is None and first < tokens - 1
        most = min(CHUNK, self.program.spec.limits.get("rows", CHUNK)) if everything else CHUNK
        size = max(1, most // batch)
        if order is not None and tokens > size:
            raise Unfit(f"logits_to_keep names tokens of a prompt of {tokens} that runs in chunks of {size}")
        begin_length = lease.length
        found = []
        for begin in range(0, tokens, size):
            end = min(begin + size, tokens)
            wanted = order if order is not None else range(max(first, begin) - begin, end - begin)
            chosen = None if places is None else places[:, begin:end]
            visible = None if mask is None else mask[:, : begin_length + end]
            logits = self._chunk(lease, ids[:, begin:end], chosen, visible, wanted, cache)
            if logits is not None:
                found.append(logits)
        return found[0] if len(found) == 1 else torch.cat(found, 1)

    def _chunk(
        self, lease: Lease, ids: Tensor, places: Tensor | None, visible: Tensor | None, wanted: Any, cache: Any
    ) -> Tensor | None:  # fmt: skip
        """Logits [batch, wanted, vocabulary] of some tokens behind those of the cache; None if none are wanted."""
        device, (batch, tokens) = ids.device, ids.shape
        length, end = lease.length, lease.length + ids.shape[1]
        order = torch.arange(batch, device=device)[:, None]
        if isinstance(wanted, Tensor):
            ascending, back = torch.sort(wanted)
            rows = order * tokens + ascending
        else:
            chosen = wanted or range(tokens - 1, tokens)  # a step makes logits of one token at least
            rows, back = order * tokens + torch.arange(chosen.start, chosen.stop, device=device), None
        row = torch.arange(length, end, device=device)
        self._forget(lease, cache)
        # A long chunk's keys go to scratch memory where the cache would leave most of them behind.
        own = [kind for kind in self.memory.kinds if tokens <= SLACK or _keeps_all(kind, cache)]
        for kind in own:
            self.memory.reserve(lease, kind, end)  # which may move all of them: no region is looked at before
        regions: dict[str, Region] = {}
        memory: dict[str, Tensor] = {}
        for kind in self.memory.kinds:
            region = lease.regions[kind.name] if kind in own else self.memory.scratch(lease, kind, end)
            regions[kind.name] = region
            memory |= self._memory(lease, kind, region)
        width = max(-(-end // PAGE), *(region.end // PAGE for region in regions.values()))
        step = memory | {
            "input_ids": self._clean(ids).reshape(1, -1), "positions": row.repeat(batch), "rows": rows.reshape(-1),
            "starts": torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens,
        }  # fmt: skip
        for name in KINDS:
            if name in regions:
                step[f"slots.{name}"] = (regions[name].base()[:, None] + row).reshape(-1)
                step[f"table.{name}"] = regions[name].table(width)
            else:
                step[f"slots.{name}"] = torch.full((batch * tokens,), -1, device=device)
                step[f"table.{name}"] = torch.zeros((batch, 1), dtype=torch.int32, device=device)
        if places is not None:
            step["position_ids"] = places.contiguous().view(-1)
        if visible is not None:
            step["visible"] = visible
        logits = self._run_step(step)
        lease.length = end
        for kind in self.memory.kinds:
            if regions[kind.name].run is None:
                self._keep(lease, kind, regions[kind.name])
        if not isinstance(wanted, Tensor) and not wanted:
            return None
        logits = logits.view(batch, -1, logits.shape[-1])
        if back is None:
            return logits
        return torch.empty_like(logits).index_copy_(1, back, logits)

    def _run_step(self, step: dict[str, Tensor]) -> Tensor:
        """Logits [1, wanted, vocabulary], the caller's to keep; from graphs once a size has come often enough."""
        graphs, tokens, rows = self.prompts, step["input_ids"].shape[1], step["rows"].shape[0]
        requests, width = step[f"table.{KINDS[1]}"].shape
        size = fitting(Buckets().tokens, tokens), fitting(Buckets().rows, rows)
        if self._recorder is None or not all(size) or requests > BATCHES[-1] or width > self._width:
            return self.program(step)
        self._uses[size] += 1
        if self._uses[size] < _OFTEN:
            return self.program(step)
        if graphs is None:
            tables = {
                f"table.{kind}": torch.zeros((1, self._width), dtype=torch.int32, device=step["rows"].device) for kind in KINDS
            }
            self.prompts = graphs = GraphRunner(
                self.program, step | tables, BATCHES[-1], Buckets(decode=()), self._recorder, own_memory=False
            )
        return graphs(step).clone()

    def _memory(self, lease: Lease, kind: Kind, region: Region) -> dict[str, Tensor]:
        if region.run is not None:
            return dict(lease.slab.pools[kind.name].memory())
        pages = region.data.flatten(2, 3).unflatten(2, (-1, PAGE))
        found: dict[str, Tensor] = {}
        for place, layer in enumerate(kind.layers):
            found |= {f"keys.{layer}": pages[place, 0], f"values.{layer}": pages[place, 1]}
        return found

    def _keep(self, lease: Lease, kind: Kind, region: Region) -> None:
        """Take the window out of scratch memory."""
        lease.kept[kind.name] = begin = max(lease.kept[kind.name], lease.length - kind.window)
        self.memory.reserve(lease, kind, lease.length, keep=False)
        rows = region.data[:, :, :, begin - region.first : lease.length - region.first]
        lease.tokens(kind.name, begin, lease.length).copy_(rows)

    def _clean(self, ids: Tensor) -> Tensor:
        for token, other in self._replaced.items():
            ids = torch.where(ids == token, other, ids)
        return ids


def _keeps_all(kind: Kind, cache: Any) -> bool:
    """Whether a cache keeps all tokens of these layers; a call without one keeps what its windows need."""
    return not kind.window or cache is not None and keeps_all(cache.layers[kind.layers[0]])


def objection(inputs: Mapping[str, Any], cache_name: str) -> str:
    """Why the arguments of a call cannot be a packed step's; empty if they can."""
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor):
        return "inputs_embeds in place of input_ids"
    if ids.dim() != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        return f"input_ids are {list(ids.shape)} {ids.dtype}"
    for name, value in inputs.items():
        unset = value is None or value is False or isinstance(value, Mapping) and not value
        if name not in _READ and name != cache_name and not unset:
            return f"the argument {name}"
    return ""


def _places(given: Any, batch: int, tokens: int) -> Tensor | None:
    if given is None:
        return None
    if given.dim() != 2 or given.shape[0] not in (1, batch) or given.shape[1] != tokens:
        raise Unfit(f"position_ids are {list(given.shape)}, the tokens {[batch, tokens]}")
    return given.long().expand(batch, tokens)


def _wanted(keep: int | Tensor, tokens: int) -> tuple[int, Tensor | None]:
    """The first of the tokens whose logits are wanted, or which tokens."""
    if isinstance(keep, Tensor):
        if keep.dim() != 1 or not keep.numel() or keep.dtype not in (torch.int32, torch.int64):
            raise Unfit(f"logits_to_keep is {list(keep.shape)} {keep.dtype}")
        return 0, keep.long() % tokens
    return (max(tokens - keep, 0) if keep else 0), None
