"""optimize(model): a Hugging Face Gemma-4 in, the same model out, compiled. restore(model) takes it back.

The model is not edited: a compiled callable is put where nn.Module.compile() puts its own, and taken away again.
"""

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from . import ops  # noqa: F401  (registers the ops)
from .backend import Backend
from .calls.cache_views import release_cache
from .calls.kv_memory import Unfit
from .calls.route import PACKED, UNCOMPILED, WHOLE, MultimodalCalls, PackedRoute, Ways, arguments, uses_cache
from .calls.whole_graph import Uncompiled, WholeGraph
from .config import OptimizeConfig
from .dynamo import switched_off
from .geometry import Geometry, geometry
from .hf.families import CAUSAL, MULTIMODAL, TEXT
from .hf.parallel import check_kv_heads, division_of, local_parts
from .hf.step_cache import UnsupportedCache, take_cache
from .hf.vision import VisionPart, tower_of
from .packed.compile import FIRST_CALL, FirstCall, open_program, program_folder
from .packed.program import Program, fingerprint, weights_of
from .passes import prepare
from .progress import compiling
from .vision.encoder import EncoderCalls
from .vision.tower import open_tower


def optimize(model: nn.Module, config: OptimizeConfig | None = None) -> nn.Module:
    """Compile a Gemma-4 in place and return it; `model(...)` and `model.generate(...)` work as before, faster.

    model     Gemma4ForCausalLM, Gemma4TextModel, or Gemma4ForConditionalGeneration (then its text part and the encoder of its
              vision tower are compiled); in eval mode, fp32, fp16 or bf16
    config    OptimizeConfig; the default enables each fusion that was measured to pay

    Compilation happens at the first call: one packed step for prompts and decode, of any length and batch, which a second
    process loads. A call that does not fit one runs as a graph of the whole model, what this cannot trace runs uncompiled;
    `report` says which and why. Optimizing twice is harmless, with another config it starts anew. Gradients are refused when
    the model is called, not here: parameters as from_pretrained leaves them are fine under torch.no_grad() or inference_mode().

    Raises TypeError for another model, ValueError for training mode, experts that cannot be traced, or a device other than
    config.device. The model is then as it was.
    """
    config = config or OptimizeConfig()
    target = compiled_part(model)
    check_model(target, config)
    enabled = config.enabled()
    previous = existing_state(target)
    if previous is not None and (previous.backend.config, previous.backend.enabled) == (config, enabled):
        return model
    prepare(config.fusions)
    if reason := switched_off():
        warnings.warn(f"gemma4_compile leaves the model plain: {reason}", stacklevel=2)
    restore(model)
    CompiledModel(target, Backend(config, enabled)).install(model)
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo `optimize`; harmless for a model that was not optimized. Returns the model."""
    state = existing_state(compiled_part(model))
    if state is not None:
        state.uninstall()
    return model


def state_of(model: nn.Module) -> "CompiledModel":
    """What `optimize` keeps for a model. Raises ValueError for a model that was not optimized."""
    state = existing_state(compiled_part(model))
    if state is None:
        raise ValueError(f"the model must be optimized first, got a plain {type(model).__name__}; call optimize(model)")
    return state


def existing_state(target: nn.Module) -> "CompiledModel | None":
    """What `optimize` keeps for a module, or None. It lives where the compiled callable does, and goes when the module goes."""
    installed = target.__dict__.get("_compiled_call_impl")
    return installed if isinstance(installed, CompiledModel) else None


def compiled_part(model: nn.Module) -> Any:
    """The module that is compiled: the model itself, or the text part of a multimodal one."""
    if isinstance(model, (*CAUSAL, *TEXT)):
        return model
    if isinstance(model, MULTIMODAL):
        return model.model.language_model
    raise TypeError(
        "optimize() takes Gemma4ForCausalLM, Gemma4TextModel or Gemma4ForConditionalGeneration, or these of Gemma4Unified, "
        f"got {type(model).__name__}; load a Gemma-4 checkpoint with AutoModelForCausalLM"
    )


def check_model(target: Any, config: OptimizeConfig) -> None:
    """Raises ValueError for training mode, experts that cannot be traced, a device other than config.device, or parts of KV
    heads (tensor parallel)."""
    if target.training:
        raise ValueError("the model must be in eval mode, got training mode; call model.eval() first")
    experts = getattr(target.config, "_experts_implementation", None)
    if getattr(target.config, "enable_moe_block", False) and experts == "eager":
        raise ValueError(
            "the experts must be traceable as one graph, got experts_implementation='eager'; "
            "call model.set_experts_implementation('grouped_mm')"
        )
    device = next(target.parameters()).device.type
    if config.device not in (None, device):
        raise ValueError(
            f"the model must be on {config.device}, as the config asks, got {device}; call model.to({config.device!r})"
        )
    check_kv_heads(target)


class CompiledModel:
    """One optimized model: the compiled step, and what the host does around it."""

    def __init__(self, module: Any, backend: Backend):
        self.backend = backend
        if backend.config.progress:
            backend.progress = compiling
        self.division = division_of(module)
        self.geometry: Geometry = geometry(module.config, self.division.ranks)
        self.signature = inspect.signature(module.forward)
        self.ways = Ways()
        self.why_whole = ""  # why the call at hand is no packed step
        self.programs: list[Program] = []  # packed steps, of calls and of PackedModel
        self.image_programs: list[Program] = []  # those of prompts with images
        self.tower_programs: list[Program] = []  # of the vision part
        self._route: PackedRoute | None = None
        self.whole = WholeGraph(module, backend, self.geometry)
        self._module_ref: Any = module
        self.encoder: EncoderCalls | None = None  # of the vision tower
        self._outer: nn.Module | None = None
        self._layer_types: list[tuple[Any, set[str]]] = []

    def install(self, outer: nn.Module) -> None:
        """Take the module's calls."""
        self._module_ref._compiled_call_impl = self
        # Hugging Face computes RoPE in the order of a set of strings, which differs between processes: half of them would not
        # find their graph in Inductor's cache. The same names in one order give one graph.
        for part in self._module_ref.modules():
            if isinstance(kinds := part.__dict__.get("unique_layer_types"), set):
                self._layer_types.append((part, kinds))
                part.unique_layer_types = dict.fromkeys(sorted(kinds))
        self._outer = outer
        if not self.backend.config.packed:
            self.why_whole = "OptimizeConfig(packed=False)"
        elif self.division.ranks > 1:
            self.why_whole = "the model is divided between ranks"
        elif isinstance(outer, CAUSAL):
            self._route = PackedRoute(self, outer)
        elif isinstance(outer, MULTIMODAL):
            self._route = PackedRoute(self, outer)
            outer._compiled_call_impl = MultimodalCalls(outer, self, self._route)  # type: ignore[assignment]
        else:
            self.why_whole = "a model without a head"
        if (tower := tower_of(outer)) is not None:
            self.encoder = EncoderCalls(tower.encoder, self.backend)
            self.encoder.install()
        _compile_no_more(type(outer))

    def uninstall(self) -> None:
        """Give the calls back."""
        for part, kinds in self._layer_types:
            part.unique_layer_types = kinds
        # The class has the default. A copy or an unpickled model has lost ours already.
        self._module_ref.__dict__.pop("_compiled_call_impl", None)
        if self.encoder is not None:
            self.encoder.uninstall()
        if self._outer is not None:
            self._outer.__dict__.pop("_compiled_call_impl", None)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module_ref
        if torch.compiler.is_compiling():  # the user compiles something around us: let it see the plain model
            return module._call_impl(*args, **kwargs)
        if reason := switched_off():  # optimize() has said so
            self.ways.note(UNCOMPILED, reason, quiet=True)
            return module._call_impl(*args, **kwargs)
        inputs = arguments(self.signature, args, kwargs)
        self.check_call(module)
        tokens = inputs.get("inputs_embeds") if inputs.get("input_ids") is None else inputs["input_ids"]
        if not isinstance(tokens, Tensor):  # Hugging Face says what is wrong
            return module._call_impl(*args, **kwargs)
        cache = None
        try:
            cache = take_cache(inputs, self.signature.parameters)
            if cache is None and uses_cache(inputs, module.config):
                cache = DynamicCache(config=module.config)
            if self._route is not None and self._outer is module:
                try:
                    output = self._route(inputs, cache)
                    self.ways.note(PACKED)
                    return output if self._returns_dict(inputs) else output.to_tuple()
                except Unfit as unfit:
                    self.why_whole = str(unfit)
            release_cache(cache)
            output = self.whole(dict(inputs), tokens, cache)
            self.ways.note(WHOLE, self.why_whole, quiet=self._route is None)
            return output if self._returns_dict(inputs) else output.to_tuple()
        except UnsupportedCache as error:
            reason, lasting = f"it does not know {error}", False
        except Uncompiled as error:
            reason, lasting = str(error), error.lasting
        if not lasting:
            self.ways.note(UNCOMPILED, reason)
            return module._call_impl(*args, **kwargs)
        output = module._call_impl(*args, **kwargs)  # if the call was wrong, Hugging Face says so here, and nothing is broken
        self.whole.broken = reason
        self.ways.note(UNCOMPILED, reason)
        return output

    def packed_program(self, model: Any, first: FirstCall = FIRST_CALL, images: bool = False) -> Program:
        """The packed step of the model, or of its text part, over the weights that it has now; compiled or loaded once.

        images   that of prompts with images"""
        programs = self.image_programs if images else self.programs

        def open_anew() -> Program:
            folder = program_folder(model, self.backend, self.division, model.device, "images" if images else "")
            return open_program(model, self.backend, self.geometry, folder, first, images)

        with local_parts(model):
            return _known(programs, model, open_anew)

    def tower_program(self, part: VisionPart) -> Program:
        """The vision part beside this text model as one packed program, over the weights that it has now."""
        return _known(self.tower_programs, part, lambda: open_tower(part, self.backend))

    @property
    def eager_reason(self) -> str:
        """Why a call ran uncompiled, empty if none did."""
        return next(reversed(self.ways.reasons[UNCOMPILED]), "")

    @property
    def cache_memory(self) -> int:
        """Bytes that are kept for the caches of packed calls, in use or not."""
        return 0 if self._route is None else self._route.cache_memory

    def _returns_dict(self, inputs: dict[str, Any]) -> bool:
        given = inputs.get("return_dict")
        return self._module_ref.config.return_dict if given is None else given

    def check_call(self, module: nn.Module) -> None:
        if module.training:
            raise ValueError(
                "an optimized model is for inference, got training mode; call model.eval(), or restore(model) to train"
            )
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            raise ValueError(
                "an optimized model computes no gradients, got enabled gradients and parameters that require them; "
                "call it under torch.inference_mode(), or model.requires_grad_(False)"
            )


def _known(programs: list[Program], module: Any, open_anew: Callable[[], Program]) -> Program:
    """The program of a module among these, over its weights; a new one, which is added, if it is not there."""
    weights, known = weights_of(module), fingerprint(module)
    for index, program in enumerate(programs):
        if known and program.spec.model == known:
            programs[index] = program.with_weights(weights)
            return programs[index]
    programs.append(open_anew())
    return programs[-1]


def _compile_no_more(kind: Any) -> None:
    """Have generate() of a class of models not compile those that are optimized, as it does for static caches. It asks a
    method; a switch in generation_config would be saved with the model, and go where another config is set or passed."""
    asks = getattr(kind, "_valid_auto_compile_criteria", None)
    if asks is None or getattr(asks, "asks_for_optimized", False):
        return

    @wraps(asks)
    def criteria(self: Any, *args: Any, **kwargs: Any) -> bool:
        return existing_state(compiled_part(self)) is None and asks(self, *args, **kwargs)

    criteria.asks_for_optimized = True  # type: ignore[attr-defined]
    kind._valid_auto_compile_criteria = criteria


assert tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 17), "pyproject.toml asks for 5.17"
