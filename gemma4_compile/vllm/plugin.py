"""Where the passes meet vLLM: three functions of it are wrapped, nothing else is touched.

    CompilationConfig.init_backend   before a model is compiled: patterns are traced, and in modes without vLLM's backend our
                                     pass goes into Inductor's options
    VllmBackend.__call__             vLLM's own mode: the passes run on the whole graph of Dynamo, before vLLM splits it
    envs.compile_factors             of all its compile caches: what was compiled with these passes is never run without them

It owns which versions of vLLM are known, and which model's graphs are passed over. docs/vllm.md
"""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, GraphModule

from gemma4_compile import passes
from gemma4_compile.backend import uuid
from gemma4_compile.config import OptimizeConfig
from gemma4_compile.geometry import geometry
from gemma4_compile.passes import trace_patterns
from gemma4_compile.reporting import Report

from . import VARIABLE
from .constants import known
from .forms import FUSIONS, PRODUCTS, ROTARY, Norms, pipeline
from .norms import LowerNorms, RaiseNorms, Wanted
from .report import graph_report, lines, sites_in, write

# Those that the tests were run on; the releases between differ in what they trace.
SUPPORTED = ("0.26", "0.32")
PRE_GRAD = "pre_grad_custom_pass"  # of Inductor's options
# vLLM's names for the graphs of the model itself: whole, or in two for its fast prefill.
PARTS = ("backbone", "self_decoder", "cross_decoder")
OWN_OPS: Norms = (RaiseNorms(), LowerNorms())
_MARK = "gemma4_compile"


def install() -> None:
    """Wrap vLLM's functions, if its version is one that is known; a second call does nothing."""
    import vllm
    from vllm import envs
    from vllm.compilation.backends import VllmBackend
    from vllm.config import CompilationConfig
    from vllm.logger import init_logger

    logger = init_logger("vllm.gemma4_compile")
    if (switch := os.environ.get(VARIABLE)) != "1":
        logger.warning("%s must be 1 or 0, got %r; vLLM stays as it is", VARIABLE, switch)
        return
    if hasattr(VllmBackend.__call__, _MARK):
        return
    if not is_supported(vllm.__version__):
        text = "gemma4-compile knows vLLM %s, found %s; vLLM stays as it is (docs/vllm.md)"
        logger.warning(text, ", ".join(SUPPORTED), vllm.__version__)
        return
    plugin = Plugin(logger.info)
    CompilationConfig.init_backend = plugin.around_init_backend(CompilationConfig.init_backend)
    VllmBackend.__call__ = plugin.around_backend(VllmBackend.__call__)
    envs.compile_factors = plugin.around_factors(envs.compile_factors)


def is_supported(version: str) -> bool:
    """By the first two numbers of a version."""
    return ".".join(version.split("+")[0].split(".")[:2]) in SUPPORTED


@dataclass
class Plugin:
    """The wrappers. `say` is given each line of a report."""

    say: Callable[..., None]

    @functools.cached_property
    def enabled(self) -> frozenset[str]:
        """The fusions that are switched on, resolved once: GEMMA4_COMPILE_DISABLE is heeded."""
        return OptimizeConfig().enabled() & FUSIONS.keys()

    @functools.cached_property
    def uuid(self) -> str:
        return uuid(OptimizeConfig(), self.enabled)

    def around_factors(self, factors: Callable[[], dict[str, object]]) -> Callable[[], dict[str, object]]:
        @functools.wraps(factors)
        def with_ours() -> dict[str, object]:
            return factors() | {VARIABLE: self.uuid}

        return with_ours

    def around_init_backend(self, init_backend: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(init_backend)
        def prepared(compilation: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
            backend = init_backend(compilation, vllm_config, *args, **kwargs)
            if is_gemma4(vllm_config):
                self._prepare(compilation, vllm_config, backend)
            return backend

        return prepared

    def _prepare(self, compilation: Any, vllm_config: Any, backend: Any) -> None:
        """Trace the patterns: within a compilation it would be nested. Without vLLM's backend, Inductor is to call our pass."""
        from . import native

        norms: Norms = OWN_OPS
        if backend == "inductor":
            norms = (native.RAISE, native.LOWER)
            options = compilation.inductor_compile_config
            options.setdefault(PRE_GRAD, InductorPass(Run(self, vllm_config, norms, "backbone")))
            if not isinstance(options[PRE_GRAD], InductorPass):
                self.say("%s is taken already; the graph stays as it is", PRE_GRAD)
        trace_patterns(pipeline(FUSIONS, {}, norms))

    def around_backend(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def passed(backend: Any, graph: GraphModule, example_inputs: Sequence[Any]) -> Any:
            config = backend.vllm_config
            if not is_gemma4(config) or backend.is_encoder:
                return call(backend, graph, example_inputs)
            self._separate(config.compilation_config)
            if is_fused(graph.graph):  # loaded from vLLM's cache
                return call(backend, graph, example_inputs)
            run = Run(self, config, OWN_OPS, backend.prefix)
            report = run(graph.graph, example_inputs)
            graph.recompile()
            result = call(backend, graph, example_inputs)  # chooses the folder
            run.tell(report)
            return result

        setattr(passed, _MARK, True)
        return passed

    def _separate(self, compilation: Any) -> None:
        """A folder that the user has chosen is not for both: vLLM puts no key of its own below it."""
        chosen, tail = Path(compilation.cache_dir or ""), f"{_MARK}-{self.uuid[:10]}"
        if compilation.cache_dir and chosen.name != tail and chosen.parent.name != "torch_compile_cache":
            compilation.cache_dir = str(chosen / tail)


@dataclass(frozen=True)
class Run:
    """The pipeline over one graph of one model, and what is told of it.

    norms   the steps that raise and lower vLLM's norms
    graph   vLLM's name of the part that is compiled: `backbone` is the model, others are drafters and encoders"""

    plugin: Plugin
    config: Any
    norms: Norms
    graph: str

    def __call__(self, graph: Graph, given: Sequence[Any] = ()) -> Report:
        model = geometry(self.config.model_config.hf_text_config)
        raised, lowered = self.norms
        if isinstance(raised, RaiseNorms):
            raised = RaiseNorms(wanted(self.config))
        enabled = self.plugin.enabled - taken(self.config)
        sites = sites_in(graph, model) if self.graph in PARTS else {}
        record = passes.run(pipeline(enabled, known(model), (raised, lowered), given), graph)
        return graph_report(record, enabled, sites)

    def tell(self, report: Report) -> None:
        """To vLLM's log, and beside what vLLM keeps of the compiled graph."""
        for line in lines(self.graph, report):
            self.plugin.say(line)
        if folder := self.config.compilation_config.local_cache_dir:
            write(Path(folder), self.graph, report)


class InductorPass(CustomGraphPass):
    """Run, as Inductor calls a pass. A graph that Inductor's cache holds is not passed over again."""

    def __init__(self, run: Run):
        self._run = run

    def __call__(self, graph: Graph) -> None:
        self._run.tell(self._run(graph))

    def uuid(self) -> str:
        return self._run.plugin.uuid


def is_gemma4(vllm_config: Any) -> bool:
    model = vllm_config.model_config
    return model is not None and getattr(model.hf_text_config, "model_type", "") == "gemma4_text"


def wanted(vllm_config: Any) -> Wanted:
    """Which norms vLLM's own passes are to take, by its config."""
    switched = vllm_config.compilation_config.pass_config
    return Wanted(
        before_quantization=vllm_config.quant_config is not None and bool(switched.fuse_norm_quant),
        behind_all_reduce=bool(switched.fuse_allreduce_rms or getattr(switched, "enable_sp", False)),
    )


def taken(vllm_config: Any) -> frozenset[str]:
    """The fusions in whose place vLLM has its own, by its config."""
    switched = vllm_config.compilation_config.pass_config
    rotary = ("enable_qk_norm_rope_fusion", "fuse_qk_norm_rope_kvcache", "fuse_rope_kvcache")
    products = PRODUCTS if vllm_config.quant_config is not None else frozenset()
    return products | (ROTARY if any(getattr(switched, name, False) for name in rotary) else frozenset())


def is_fused(graph: Graph) -> bool:
    return any(str(node.target).startswith("gemma4.") for node in graph.nodes)
