"""Compilation of a packed step: from a model to a Program, or from the file of one that was compiled before.

trace      Dynamo makes one graph of the whole step, for any number of tokens, requests and wanted rows
passes     raise, yoco, fuse, lower
split      at attention; equal pieces are compiled once
"""

import hashlib
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch._inductor
from torch import SymInt, Tensor
from torch._guards import TracingContext
from torch._inductor import standalone_compile
from torch._inductor.async_compile import maybe_warm_pool
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch._subclasses.fake_tensor import disable_fake_tensor_cache
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from gemma4_compile.backend import Backend, uuid
from gemma4_compile.dynamo import own_code, own_state
from gemma4_compile.garbage import without_collection
from gemma4_compile.geometry import Geometry
from gemma4_compile.hf.experts import fused_experts
from gemma4_compile.passes import pipeline, prepare, run

from .attention import NAME
from .inputs import KINDS, OPTIONAL, STEP_INPUTS, PlainKV, Request, check_inputs, image_inputs, step_input, varying_dim
from .program import Call, Check, Program, ProgramSpec, Reference, fingerprint, load, weights_of
from .split import Piece, split, split_point_of
from .warm_up import WarmUp

# What the step is traced with. Sizes are symbols; these are the hints that Inductor and measured token counts go by.
_TRACED_REQUESTS, _TRACED_TOKENS = 8, 32
_PAGE = 64  # of the usual size
_PRODUCTS = (torch._C._nn.linear, torch.ops.gemma4.linear)  # of rows and a weight, as the passes leave them


class FirstCall(NamedTuple):
    """The call that a program is compiled for: the kernels that it needs, and those of the decode steps behind it, are compiled
    meanwhile.

    pages   columns of its tables: how attention divides its work depends on them
    masked  it has an attention mask
    """

    requests: int = 1
    tokens: int = 256
    rows: int = 1
    pages: int = 64
    masked: bool = False


FIRST_CALL = FirstCall()


def compile_program(
    module: Any, backend: Backend, model_geometry: Geometry, first: FirstCall = FIRST_CALL, images: bool = False
) -> Program:  # fmt: skip
    """Trace a model's packed step and compile its unique pieces.

    module      Gemma4ForCausalLM in eval mode
    backend     says which passes are enabled, and has Inductor's options
    images      the step of prompts with images, which reads their embeddings
    """
    kv = PlainKV(model_geometry, _TRACED_REQUESTS, _TRACED_TOKENS, module.dtype, module.device)
    inputs = kv.inputs([Request([0] * _TRACED_TOKENS)] * _TRACED_REQUESTS)
    inputs["visible"] = torch.ones((_TRACED_REQUESTS, _TRACED_TOKENS), dtype=torch.bool, device=module.device)
    inputs |= {name: step_input(inputs, name) for name in OPTIONAL}
    step = make_step(module, model_geometry, images)
    warmed = []
    if module.device.type == "cuda":
        decode = FIRST_CALL._replace(requests=first.requests, tokens=1, masked=first.masked)
        warmed = [_paged(module, model_geometry, call) for call in ((first,) if images else (first, decode))]
    varying = (*STEP_INPUTS, *OPTIONAL)
    if images:
        varying += image_inputs(module.config)
        inputs |= no_images(module, inputs)
        warmed = [call | no_images(module, call) for call in warmed]
    return compile_step(module, step, inputs, varying, backend, [module], module.lm_head.weight, warmed=warmed)


def no_images(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a step with images reads of them, for one that has none."""
    positions = inputs["positions"]
    found = {
        "image_tokens": torch.zeros_like(positions, dtype=torch.bool),
        "images": torch.zeros((len(positions), module.config.hidden_size), dtype=module.dtype, device=positions.device),
        "until": positions.int(),
    }
    return {name: found[name] for name in image_inputs(module.config)}


def _paged(module: Any, model_geometry: Geometry, call: FirstCall) -> dict[str, Tensor]:
    """The step of a call over pages of the usual size."""
    pages = -(-call.tokens // _PAGE)
    kv = PlainKV(model_geometry, call.requests, pages * _PAGE, module.dtype, module.device)
    rows = range(call.tokens - min(call.rows, call.tokens), call.tokens)
    inputs = kv.inputs([Request([0] * call.tokens, rows=rows)] * call.requests)
    for name, tensor in kv.tensors.items():
        inputs[name] = tensor.view(-1, _PAGE, *tensor.shape[2:])
    column = torch.arange(call.pages, dtype=torch.int32, device=module.device).clamp(max=pages - 1)
    first = torch.arange(call.requests, dtype=torch.int32, device=module.device)[:, None] * pages
    inputs |= {f"table.{kind}": first + column for kind in KINDS}
    if call.masked and call.tokens == 1:
        inputs["visible"] = torch.ones((call.requests, call.pages * _PAGE), dtype=torch.bool, device=module.device)
    return inputs | {name: step_input(inputs, name) for name in OPTIONAL}


def compile_step(
    module: Any, step: Callable[..., Any], inputs: dict[str, Tensor], varying: Iterable[str], backend: Backend,
    attending: Sequence[Any], head: Tensor | None = None, check: Check = check_inputs,
    warmed: Sequence[dict[str, Tensor]] = (), attention: str = NAME,
) -> Program:  # fmt: skip
    """Trace any packed step and compile its unique pieces.

    module      holds every weight that the step reads, and a config
    step        of a dict of inputs: logits, whose `hidden` is what `head` multiplies; without `head` a pair (result, hidden)
    inputs      examples, with keys and values
    varying     names of those whose number of tokens, rows or requests varies
    attending   the models that it calls, whose attention is ours for the time
    check       of the inputs of each run
    warmed      inputs of steps whose kernels of ours are compiled meanwhile, on a GPU
    attention   the name of ours in transformers' attention interface
    """
    weights = weights_of(module)
    if any(weight.is_cuda for weight in weights.values()):
        maybe_warm_pool()  # Inductor's workers start while Dynamo traces; C++ takes none
    prepare(backend.config.fusions)
    start = time.perf_counter()
    inputs = {name: t.clone() for name, t in inputs.items()}  # Dynamo makes one input of a tensor that has two names
    for name in varying:
        torch._dynamo.mark_dynamic(inputs[name], varying_dim(name))
    names = {id(tensor): ("input", name) for name, tensor in inputs.items()}
    names |= {id(tensor): ("weight", name) for name, tensor in weights.items()}
    made: list[Program] = []
    model = fingerprint(module)  # before the switches below: it asks for what the user chose

    def compile_graph(gm: GraphModule, examples: Sequence[Any]) -> NoReturn:
        traced = time.perf_counter() - start
        spec, pieces = _compile(gm, examples, names, backend, head, warmed)
        spec.seconds["trace"] = traced
        spec.model = model
        made.append(Program(spec, pieces, weights, len(pieces), check))
        raise _Compiled

    with ExitStack() as switches:
        switches.enter_context(own_state())
        # What tracing makes lives until its end: looking for garbage in it, again and again, is a tenth of the time.
        switches.enter_context(without_collection())
        switches.enter_context(torch._dynamo.config.patch(run_gc_after_compile=False))
        switches.enter_context(suppress(_Compiled))
        for part in attending:
            switches.enter_context(own_attention(part, attention))
            switches.enter_context(fused_experts(part.config, "experts" in backend.enabled))
        torch.compile(own_code(step), backend=compile_graph, fullgraph=True)(inputs)
    (program,) = made
    return program


class _Compiled(BaseException):
    """Ends a trace once its graph is compiled: Dynamo would make guards and code of it, a second or two, that nobody runs. No
    Exception, which Dynamo would take for an error of the backend."""


def make_step(module: Any, model_geometry: Geometry, images: bool = False) -> Callable[..., Any]:
    owners = tuple(layer.kv_from for layer in model_geometry.layers)

    def step(inputs: dict[str, Tensor]) -> Tensor:
        torch._check(inputs["positions"].shape[0] == inputs["input_ids"].shape[1])  # nothing else says so to YOCO
        return module._call_impl(
            **(_merged(module, inputs) if images else {"input_ids": inputs["input_ids"]}),
            position_ids=step_input(inputs, "position_ids")[None],
            attention_mask=dict.fromkeys(KINDS),  # the op masks, by positions and `visible`
            use_cache=False,
            logits_to_keep=inputs["rows"],
            packed=inputs,
            owners=owners,
        ).logits

    return step


def _merged(module: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text model's arguments where some tokens are of images, as Gemma4Model.forward makes them: per-layer inputs are those
    of the pad token there."""
    ids, text = inputs["input_ids"], module.model
    for name in image_inputs(module.config):
        torch._check(inputs[name].shape[0] == ids.shape[1])
    embedded = text.embed_tokens(ids)
    merged = {"inputs_embeds": torch.where(inputs["image_tokens"][None, :, None], inputs["images"][None], embedded)}
    if getattr(module.config, "hidden_size_per_layer_input", 0):
        merged["per_layer_inputs"] = text.get_per_layer_inputs(ids, embedded)
    return merged


@contextmanager
def own_attention(module: Any, name: str = NAME) -> Any:
    """The model's attention is ours while its step is traced; its own calls go on with what it was loaded with."""
    before = module.config._attn_implementation
    module.config._attn_implementation = name
    try:
        yield
    finally:
        module.config._attn_implementation = before


def _compile(
    gm: GraphModule,
    examples: Sequence[Any],
    names: dict[int, Reference],
    backend: Backend,
    head: Tensor | None,
    warmed: Sequence[dict[str, Tensor]] = (),
) -> tuple[ProgramSpec, dict[str, Any]]:
    """What a program of this graph does, and its unique pieces, compiled."""
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    record = run(pipeline(backend.enabled, backend.config.fusions), gm.graph)
    if head is not None:
        _add_hidden(gm, examples, head)
    parts = split(gm.graph)
    seconds["passes"] = time.perf_counter() - start
    references = _references(gm, examples, names)
    warm_up = WarmUp(gm, examples, names, warmed) if warmed else None
    unique: dict[str, Piece] = {part.key: part for part in parts if isinstance(part, Piece)}
    start = time.perf_counter()
    compiled = {}
    # For graphs as small as pieces, PyTorch's cache of what an operation makes of shapes takes longer than computing it.
    fake_mode = TracingContext.get().fake_mode
    with nullcontext() if fake_mode is None else disable_fake_tensor_cache(fake_mode):
        for number, (key, piece) in enumerate(unique.items(), 1):
            with backend.progress(f"compiling piece {number} of {len(unique)}"):
                compiled[key] = _compile_piece(piece, backend)
    seconds["compile"] = time.perf_counter() - start
    if warm_up is not None:
        warm_up.join()
        seconds["kernels"] = time.perf_counter() - start

    values: dict[Node, Reference] = {}

    def refer(value: Any) -> Reference:
        if not isinstance(value, Node):
            return ("constant", value)
        if value in references:
            return references[value]
        return values.setdefault(value, ("value", len(values)))

    calls = []
    for part in parts:
        if isinstance(part, Piece):
            arguments, results = tuple(map(refer, part.inputs)), tuple(refer(node)[1] for node in part.outputs)
            calls.append(Call(part.key, "", arguments, results, _on_host(part)))
        else:
            calls.append(Call("", split_point_of(part), tuple(map(refer, part.args)), (refer(part)[1],)))
    result, hidden = map(refer, _outputs(gm))
    return ProgramSpec(calls, result, hidden, record, limits=_limits(unique.values(), references), seconds=seconds), compiled


def _outputs(gm: GraphModule) -> tuple[Any, ...]:
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    return tuple(output.args[0])


def _add_hidden(gm: GraphModule, examples: Sequence[Any], head: Tensor) -> None:
    """Give the graph a second result, [1, N, H]: what its head multiplies. A tied weight is read by the embedding too, so what
    counts is the product.

    Raises ValueError for a graph that has not one such product."""
    placeholders = (node for node in gm.graph.nodes if node.op == "placeholder")
    weights = {node for node, example in zip(placeholders, examples, strict=True) if example is head}
    products = [node for node in gm.graph.nodes if node.target in _PRODUCTS and len(node.args) > 1 and node.args[1] in weights]
    if len(products) != 1:
        raise ValueError(f"a step must multiply by its head's weight once, got {len(products)} products; report the model")
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    output.args = ((*output.args[0], products[0].args[0]),)


def _references(gm: GraphModule, examples: Sequence[Any], names: dict[int, Reference]) -> dict[Node, Reference]:
    """Where each placeholder's value comes from."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    found: dict[Node, Reference] = {}
    sizes: dict[Any, Reference] = {}
    for node, example in zip(placeholders, examples, strict=True):
        if isinstance(example, Tensor):
            if id(example) not in names:
                raise ValueError(f"a step may read its inputs and the model's weights, got {node.target}; report the model")
            found[node] = names[id(example)]
            if found[node][0] == "input":
                for dim, size in enumerate(node.meta["example_value"].shape):
                    if isinstance(size, SymInt):
                        sizes.setdefault(size.node.expr, ("size", found[node][1], dim))
    for node in placeholders:
        if isinstance(node.meta.get("example_value"), SymInt):
            found[node] = sizes[node.meta["example_value"].node.expr]
    return found


def _on_host(piece: Piece) -> str:
    """What of a piece a CUDA graph could not hold: values on the CPU, and sizes that only a value tells."""
    nodes = [(node, node.meta.get("example_value")) for node in piece.module.graph.nodes]
    tensors = [(node, value) for node, value in nodes if isinstance(value, Tensor)]
    on_gpu = any(value.device.type == "cuda" for _, value in tensors)
    for node, value in tensors:
        if on_gpu and value.device.type == "cpu":
            return f"{node.name} ({node.target}), which is on the CPU"
        if free_unbacked_symbols(value):
            return f"{node.name} ({node.target}), whose size depends on values"
    return ""


def _limits(pieces: Iterable[Piece], references: dict[Node, Reference]) -> dict[str, int]:
    """How many tokens and wanted rows keep each tensor within 32-bit offsets: Inductor's kernels count so, for the sizes that
    it was shown. It makes a guard of that, but a program has no guards."""
    names = {n.meta["example_value"].node.expr: r[1] for n, r in references.items() if r[0] == "size"}
    widest: dict[str, int] = {}
    for piece in pieces:
        for node in piece.module.graph.nodes:
            value = node.meta.get("example_value")
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                count = tensor.numel() if isinstance(tensor, Tensor) else 0
                symbols = count.node.expr.free_symbols if isinstance(count, SymInt) else ()
                if len(symbols) == 1 and (symbol := next(iter(symbols))) in names:
                    width = int(count.node.expr.subs(symbol, 1))  # type: ignore[union-attr]
                    widest[names[symbol]] = max(widest.get(names[symbol], 1), width)
    return {name: (2**31 - 1) // width for name, width in widest.items()}


def _compile_piece(piece: Piece, backend: Backend) -> Any:
    examples = [node.meta["example_value"] for node in piece.inputs]
    options = {"config_patches": dict(backend.config.inductor)}
    with backend.cache_key():
        return backend.compile_piece(piece.module, examples, dynamic_shapes="from_tracing_context", options=options)


def open_program(
    module: Any, backend: Backend, model_geometry: Geometry, folder: Path | None, first: FirstCall = FIRST_CALL,
    images: bool = False,
) -> Program:  # fmt: skip
    """The program of `folder` if it is there, else a new one, which is then saved there."""
    return open_step(module, backend, folder, lambda: compile_program(module, backend, model_geometry, first, images))


def open_step(
    module: Any, backend: Backend, folder: Path | None, compile_anew: Callable[[], Program], check: Check = check_inputs
) -> Program:
    """As open_program, of any packed step."""
    if folder is not None and folder.exists():
        try:
            with backend.progress("loading compiled pieces"):
                return load(folder, module, check)
        except ValueError as error:
            warnings.warn(f"gemma4_compile compiles anew: {error}", stacklevel=2)
            shutil.rmtree(folder, ignore_errors=True)
    program = compile_anew()
    if folder is not None:
        try:
            program.save(folder)
        except (OSError, RuntimeError) as error:  # a full disk; a piece that torch cannot serialize
            warnings.warn(f"gemma4_compile could not save the compiled program: {error}", stacklevel=2)
    return program


def program_folder(model: Any, backend: Backend, division: Any, device: torch.device, purpose: str = "") -> Path | None:
    """Where a module's program is kept: a name for everything that it depends on. None where torch's caches are off, and for
    a module that cannot be known again.

    backend, division   of the optimized model that it belongs to
    purpose             tells the programs of one module apart
    """
    config = backend.config
    if backend.compile_piece is not standalone_compile:  # what else compiles is not torch's to save
        return None
    if torch._inductor.config.force_disable_caches or not torch._inductor.config.fx_graph_cache:
        return None
    known = fingerprint(model)
    if not known:
        return None
    machine = torch.cuda.get_device_properties(device).name if device.type == "cuda" else "cpu"
    inductor = repr(sorted(torch._inductor.config.save_config_portable().items()))
    parts = (uuid(config, backend.enabled), machine, inductor, known, division, *([purpose] if purpose else []))
    name = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    return Path(config.cache_dir or Path(cache_dir()) / "gemma4_compile") / name
