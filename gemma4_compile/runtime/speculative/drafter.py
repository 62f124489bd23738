"""Draft tokens of a Gemma-4 assistant, which reads the keys and values that the target has stored, and stores none.

    step    cat([embed(token), hidden]) -> pre_projection -> layers with queries only -> norm -> token;
            post_projection -> the next step's hidden

The embedding is the target's, scaled as it scales. Layers attend to the keys at positions 0 to p of the target's last layer of
their type that owns some, through the page table of that type. All steps of a round have the same positions: the keys of the
tokens that are drafted exist only when the target has verified them.
"""

import copy
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gemma4_compile.geometry import Geometry, geometry
from gemma4_compile.graphs.buckets import Buckets, fitting
from gemma4_compile.graphs.checks import check_host, difference
from gemma4_compile.graphs.recorder import CudaRecorder, Recorder
from gemma4_compile.hf.assistant import load_assistant
from gemma4_compile.hf.families import ASSISTANT, CAUSAL
from gemma4_compile.hf.parallel import local_parts
from gemma4_compile.ops import draw_draft, ordered_argmax, ordered_scores
from gemma4_compile.optimized import state_of
from gemma4_compile.packed.compile import compile_step, open_step, program_folder
from gemma4_compile.packed.inputs import KINDS, PlainKV, require
from gemma4_compile.packed.program import Program

from .verification import Drafted, fill_rows

_INPUTS = {"tokens": torch.int64, "hidden": None, "positions": torch.int64, "starts": torch.int32} | {
    f"table.{kind}": torch.int32 for kind in KINDS
}
_DRAWS = {"temperature": torch.float32, "seeds": torch.int64, "offsets": torch.int64}
_TRACED_REQUESTS = 8


class Drafter:
    """Drafts the tokens that a target will probably choose next, greedily.

    model               the optimized Gemma4ForCausalLM whose keys and values are read
    assistant           Gemma4AssistantForCausalLM in eval mode, or its folder
    speculative_tokens  K, the drafts of a round: 1 or more
    kv                  keys.N and values.N, [pages, page size, Hk, D], of the target's layers that own them; graphs keep them
    draws               whether drafts can be drawn from the assistant's distribution too, for rejection sampling
    recorder            captures the K steps of a bucket of requests as one graph. Unless given, CUDA graphs
                        on a GPU, in a memory pool of their own, and none on a CPU
    width               pages that a request may have at most; as many as the model's context needs unless given
    sizes               buckets, in requests, ascending; a larger batch runs without graphs
    agree               as of GraphRunner

    `refused` says why a bucket runs without a graph. Raises TypeError for a model of another class, ValueError for an assistant
    that does not fit the target, CaptureRefused where graphs are wanted and the step works on the host.
    """

    def __init__(
        self, model: nn.Module, assistant: nn.Module | str | Path, speculative_tokens: int, kv: dict[str, Tensor],
        recorder: Recorder | None = None, width: int | None = None,
        sizes: Sequence[int] = Buckets().decode, draws: bool = False, agree: Callable[[bool], bool] | None = None,
    ):  # fmt: skip
        self._agree = agree
        state = state_of(model)
        if not isinstance(model, CAUSAL):
            raise TypeError(f"a drafter drafts for Gemma4ForCausalLM, got {type(model).__name__}; load its text part")
        target: Any = model
        if isinstance(assistant, (str, Path)):
            assistant = load_assistant(assistant, dtype=target.dtype).to(target.device).eval().requires_grad_(False)
        if not isinstance(assistant, ASSISTANT):
            raise TypeError(f"a drafter takes Gemma4AssistantForCausalLM, got {type(assistant).__name__}; load an assistant")
        if speculative_tokens < 1:
            raise ValueError(
                f"speculative_tokens must be 1 or more, got {speculative_tokens}; run without an assistant for none"
            )
        owned = check_fit(target, assistant, state.geometry)
        self.speculative_tokens = speculative_tokens
        self._device, self._dtype, self._hidden = target.device, target.dtype, state.geometry.hidden
        self._rows = torch.arange(257, dtype=torch.int32, device=target.device)
        names = [f"{name}.{owner}" for owner in sorted(set(owned)) for name in ("keys", "values")]
        require(kv, names)
        self._kv = {name: kv[name] for name in names}

        self._assistant = assistant
        traced = PlainKV(state.geometry, _TRACED_REQUESTS, 32, target.dtype, target.device).tensors
        buffers = self._buffers(_TRACED_REQUESTS, 1)
        examples = {name: buffers[name] for name in _INPUTS} | {name: traced[name] for name in names}

        def program(ends: str) -> Program:
            module = _DraftModule(target.model.embed_tokens, assistant, owned, ends)
            step = _make_step(module, owned, ends)
            return open_step(
                module, state.backend, program_folder(module, state.backend, state.division, target.device),
                lambda: compile_step(module, step, examples, _INPUTS, state.backend, [assistant.model], check=self._check),
                self._check,
            )  # fmt: skip

        with local_parts(target, assistant):
            self.program = program("tokens")
            self._drawing = program("states") if draws else None

        self.recorder = CudaRecorder(target.device) if recorder is None and target.device.type == "cuda" else recorder
        self.refused: dict[int, str] = {}
        self._graphs: dict[tuple[int, int, bool], tuple[Callable[[], None], list[Tensor]]] = {}
        self._sizes: tuple[int, ...] = ()
        self._width = width or -(-int(target.config.max_position_embeddings) // self._kv[names[0]].shape[1])
        if self.recorder is not None:
            check_host(self.program)
            self._sizes = tuple(sizes)
            self._static = self._buffers(max(self._sizes, default=1), self._width)

    @property
    def draws(self) -> bool:
        """Whether drafts can be drawn."""
        return self._drawing is not None

    @torch.no_grad()
    def draft(
        self, tokens: Tensor, hidden: Tensor, positions: Tensor, tables: dict[str, Tensor], drafts: int | None = None
    ) -> Tensor:  # fmt: skip
        """Draft tokens [R, drafts] int64, without waiting for the GPU. From a graph they are valid until the next call.

        tokens     [R] int64    the token chosen last, whose own key is not stored yet
        hidden     [R, H]       the target's final-normed state at the position before it, p
        positions  [R] int64    p: keys at positions 0 to p are read
        tables     kind -> [R, pages] int32: the pages of each request in the pool of that kind
        drafts     1 to K; K unless given

        Raises ValueError for shapes and dtypes that do not fit; values stay unread.
        """
        require({f"table.{kind}": table for kind, table in tables.items()}, (f"table.{kind}" for kind in KINDS))
        count = tokens.shape[0]
        inputs = {"tokens": tokens, "hidden": hidden, "positions": positions, "starts": self._starts(count)}
        inputs |= {f"table.{kind}": tables[kind] for kind in KINDS}
        self._check(inputs)
        size = fitting(self._sizes, count)
        if size == 0 or size in self.refused:
            return self._steps(inputs, drafts or self.speculative_tokens)[1]
        self._check_width(inputs)
        return self.draft_from(count, lambda views: _fill(views, inputs), drafts).tokens

    @torch.no_grad()
    def draft_from(
        self, count: int, fill: Callable[[dict[str, Tensor]], None], drafts: int | None = None, draws: bool = False
    ) -> Drafted:  # fmt: skip
        """So many drafts, K unless given, of each of so many requests. From a graph they are valid until the next call.

        fill   writes their inputs to buffers of R rows or more: tokens, hidden, positions and the tables, as of `draft`. What
               is behind the R requests must read pages that exist. It may be called more than once
        draws  whether drafts are drawn: then there are buffers, too, for temperature [R] fp32, seeds and offsets [R] int64, as
               of draw_draft; temperature 0 is greedy
        """
        size, drafts = fitting(self._sizes, count), drafts or self.speculative_tokens
        if size and size not in self.refused:
            try:
                return self._replayed(size, count, fill, drafts, draws)
            except RuntimeError as error:
                if self._agree is not None:
                    raise
                self._give_up(size, f"its capture failed: {error}")
        inputs = self._buffers(count, self._width)
        fill(inputs)
        return Drafted(*self._steps(inputs, drafts, draws)[1:])

    def _steps(self, inputs: dict[str, Tensor], drafts: int, draws: bool = False, recorded: bool = False) -> list[Tensor]:
        """The states [R, H] that the first step passes on, by which a replay is compared; the drafts [R, drafts]; where they
        are drawn also scores and, unless they are the vocabulary, candidates [R, drafts, C].

        recorded: as a CUDA graph holds them."""
        inputs = inputs | self._kv
        program = self.program if self._drawing is None or not draws else self._drawing
        passed, found = [], []
        for index in range(drafts):
            token, hidden = (program.run_recorded if recorded else program.run)(inputs)
            drawn = [token]
            if draws:
                scores, candidates = self._scores(token)
                greedy = ~(inputs["temperature"] > 0)
                scores = scores / torch.where(greedy, 1.0, inputs["temperature"])[:, None]
                token = draw_draft(scores, candidates, inputs["seeds"], inputs["offsets"], index, greedy)
                drawn = [token, scores] if candidates is None else [token, scores, candidates]
            inputs |= {"tokens": token, "hidden": hidden}
            passed.append(hidden)
            found.append(drawn)
        return [passed[0], *(torch.stack(each, 1) for each in zip(*found, strict=True))]

    def _scores(self, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits [R, C] fp32 of the candidates, and their tokens; None: C is the vocabulary."""
        embedder, head = self._assistant.masked_embedding, self._assistant.lm_head
        if embedder is None:
            return head(states).float(), None
        top_k = embedder.centroid_intermediate_top_k
        return ordered_scores(states, embedder.centroids(states), embedder.token_ordering, head.weight, top_k)

    def _replayed(
        self, size: int, count: int, fill: Callable[[dict[str, Tensor]], None], drafts: int, draws: bool
    ) -> Drafted:  # fmt: skip
        views = {name: buffer[: size + (name == "starts")] for name, buffer in self._static.items()}
        key = size, drafts, draws
        first = key not in self._graphs
        if first:
            _fill(views, {})  # padding alone: what a graph keeps of its capture shows in the comparison
            assert self.recorder is not None
            self.recorder.warm_up(lambda: self._steps(views, drafts, draws, recorded=True))
            self._graphs[key] = self.recorder.record(lambda: self._steps(views, drafts, draws, recorded=True))
        replay, (passed, *found) = self._graphs[key]
        fill(views)
        replay()
        if first:
            states, *expected = self._steps(views, drafts, draws, recorded=True)
            wrong = difference(passed[:count], states[:count])
            if wrong if self._agree is None else self._agree(bool(wrong)):
                self._give_up(size, f"a replay gave other states than the program ({wrong or 'on another rank'})")
                return Drafted(*(each[:count] for each in expected))
        return Drafted(*(each[:count] for each in found))

    def _give_up(self, size: int, reason: str) -> None:
        self.refused[size] = reason
        self._graphs = {key: graph for key, graph in self._graphs.items() if key[0] != size}
        warnings.warn(f"gemma4_compile drafts for {size} requests without CUDA graphs: {reason}", stacklevel=4)

    def _starts(self, count: int) -> Tensor:
        """One row a request."""
        if count >= len(self._rows):
            self._rows = torch.arange(2 * count + 1, dtype=torch.int32, device=self._device)
        return self._rows[: count + 1]

    def _buffers(self, count: int, width: int) -> dict[str, Tensor]:
        device = self._device
        sizes: dict[str, tuple[int, ...]] = {"tokens": (count,), "positions": (count,)}
        sizes |= {f"table.{kind}": (count, width) for kind in KINDS}
        sizes |= dict.fromkeys(_DRAWS, (count,))
        buffers = {name: torch.zeros(size, dtype=(_INPUTS | _DRAWS)[name], device=device) for name, size in sizes.items()}
        hidden = torch.zeros((count, self._hidden), dtype=self._dtype, device=device)
        return buffers | {"hidden": hidden, "starts": self._starts(count)}

    def _check(self, inputs: dict[str, Tensor]) -> None:
        require(inputs, _INPUTS)
        count = inputs["tokens"].shape[0]
        for name, dtype in _INPUTS.items():
            tensor, wanted = inputs[name], dtype or self._dtype
            if tensor.dtype != wanted:
                raise ValueError(f"{name} must have dtype {wanted}, got {tensor.dtype}; convert it")
            if tensor.shape[0] != count + (name == "starts"):
                raise ValueError(f"{name} must have one entry for each of {count} tokens, got {tensor.shape[0]}")
        if inputs["hidden"].shape[1:] != (self._hidden,):
            got = list(inputs["hidden"].shape)
            raise ValueError(f"hidden must be [{count}, {self._hidden}], the target's final-normed states, got {got}")

    def _check_width(self, inputs: dict[str, Tensor]) -> None:
        for kind in KINDS:
            pages, most = inputs[f"table.{kind}"].shape[1], self._static[f"table.{kind}"].shape[1]
            if pages > most:
                raise ValueError(f"a request may have {most} pages here, got a table.{kind} of {pages}; raise width")


class _DraftModule(nn.Module):
    """Every weight that a draft step reads; its config is what a saved program is known by."""

    def __init__(self, embed_tokens: nn.Module, assistant: Any, owned: tuple[int, ...], ends: str):
        super().__init__()
        self.embed_tokens, self.assistant = embed_tokens, assistant
        self.config = copy.deepcopy(assistant.config)
        self.config.draft_step = {"owned": list(owned), "ends": ends}


def _make_step(module: Any, owned: tuple[int, ...], ends: str) -> Callable[..., Any]:
    embed_tokens, assistant = module.embed_tokens, module.assistant
    kinds = dict(zip(assistant.model.config.layer_types, owned, strict=True))

    def step(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Draft tokens [R], or the final-normed states [R, H] that they follow from; and what the next step takes as hidden,
        [1, R, H]."""
        positions = inputs["positions"]
        states = assistant.model(
            inputs_embeds=assistant.pre_projection(
                torch.cat([embed_tokens(inputs["tokens"][None]), inputs["hidden"][None]], dim=-1)
            ),
            position_ids=positions[None],  # as in vLLM and SGLang; p + 1, as in transformers, gets no more drafts accepted
            attention_mask=dict.fromkeys(KINDS),  # the op masks by positions
            shared_kv_states={kind: (inputs[f"keys.{i}"], inputs[f"values.{i}"]) for kind, i in kinds.items()},  # unread
            use_cache=False,
            logits_to_keep=None,  # for a number transformers would cut per-layer inputs, of which there are none
            packed=inputs | {f"slots.{kind}": positions for kind in KINDS},  # unread: no layer writes
            owners=owned,
        ).last_hidden_state
        if ends == "states":
            return states[0], assistant.post_projection(states)
        if assistant.masked_embedding is None:
            tokens = assistant.lm_head(states)[0].argmax(-1)
        else:
            embedder = assistant.masked_embedding
            tokens = ordered_argmax(
                states[0], embedder.centroids(states[0]), embedder.token_ordering, assistant.lm_head.weight,
                embedder.centroid_intermediate_top_k,
            )  # fmt: skip
        return tokens, assistant.post_projection(states)

    return step


def candidates_of(assistant: Any) -> tuple[int, bool]:
    """How many tokens a draft is chosen from, and whether that is the vocabulary."""
    embedder, vocabulary = assistant.masked_embedding, assistant.config.get_text_config().vocab_size
    if embedder is None:
        return vocabulary, True
    return embedder.centroid_intermediate_top_k * (vocabulary // embedder.num_centroids), False


def check_fit(target: Any, assistant: Any, target_geometry: Geometry) -> tuple[int, ...]:
    """For each layer of the assistant the target's layer whose keys and values it reads: the last of its type that owns some.

    Raises ValueError for an assistant of another target."""
    text = assistant.config.get_text_config()
    equal = [
        ("backbone_hidden_size", assistant.config.backbone_hidden_size, "hidden size", target_geometry.hidden),
        ("vocab_size", text.vocab_size, "vocabulary", target.config.vocab_size),
        ("dtype", assistant.dtype, "dtype", target.dtype),
        ("device", assistant.device, "device", target.device),
    ]
    for name, got, what, wanted in equal:
        if got != wanted:
            raise ValueError(f"the assistant's {name} must be the target's {what}, {wanted}, got {got}; use its own assistant")
    if text.num_kv_shared_layers != text.num_hidden_layers:
        own = text.num_hidden_layers - text.num_kv_shared_layers
        raise ValueError(f"an assistant's layers must all read the target's keys, got {own} with keys of their own; check it")
    if assistant.training:
        raise ValueError("the assistant must be in eval mode, got training mode; call assistant.eval() first")
    found = []
    for layer in geometry(text, target_geometry.ranks).layers:
        candidates = target_geometry.kv_owners(layer.kind)
        if not candidates:
            raise ValueError(f"the target must own keys of each layer type of the assistant, got {layer.kind}; use its own")
        owner = candidates[-1]
        wanted, got = (owner.kv_heads, owner.head_dim), (layer.kv_heads, layer.head_dim)
        if wanted != got:
            raise ValueError(
                f"the assistant's {layer.kind} must have the target's KV heads and head dim, {wanted}, got {got}; "
                "use the target's own assistant"
            )
        if layer.kind == "sliding_attention" and text.sliding_window > target.config.sliding_window:
            raise ValueError(
                f"the assistant's window must be within the target's, {target.config.sliding_window}, whose pages are freed, "
                f"got {text.sliding_window}; use the target's own assistant"
            )
        found.append(owner.index)
    return tuple(found)


def _fill(views: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Copy requests to static buffers."""
    for name, view in views.items():
        if name != "starts":
            fill_rows(view, inputs.get(name, view[:0]))
