"""The Dynamo backend: the passes, then Inductor. Keeps what the passes did to each graph, for `report`.

The passes run on each compilation before Inductor looks into its cache, so what is reported is true on a warm cache too.
"""

import hashlib
import inspect
import platform
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config as compiler_config
import transformers
from torch._inductor import standalone_compile
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from . import passes, patterns
from .config import OptimizeConfig
from .passes import Fusion, Record, pipeline, run

_SOURCES = (Path(__file__).parent, Path(passes.__file__).parent, Path(patterns.__file__).parent)


@cache
def _source_digest() -> str:
    """Of every file that can change what is compiled: the whole package, not a list kept by hand."""
    digest = hashlib.sha256()
    for folder in _SOURCES:
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    versions = (torch.__version__, transformers.__version__, platform.python_version())
    return hashlib.sha256(digest.digest() + repr(versions).encode()).hexdigest()


def _files_of(fusion: Fusion) -> str:
    """A digest of the files that a fusion and its patterns are written in; of one typed in, another each time, so that no cache
    knows it."""
    parts = [fusion.rewrites, *(part for rewrite in fusion.rewrites() for part in (rewrite.search, rewrite.replace))]
    functions = [inspect.unwrap(part) for part in parts if callable(part)]
    try:
        files = sorted({inspect.getfile(function) for function in functions})
        return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()
    except (TypeError, OSError):
        return secrets.token_hex()


def uuid(config: OptimizeConfig, enabled: frozenset[str]) -> str:
    """Changes with any source file of the package, the enabled fusions, the files of the user's own, the options and the
    versions of what compiles."""
    own = [(fusion.name, _files_of(fusion)) for fusion in config.fusions]
    options = (sorted(enabled), own, config.cuda_graphs, sorted(config.inductor.items(), key=repr))
    return hashlib.sha256(f"{_source_digest()} {options!r}".encode()).hexdigest()


@dataclass
class Backend:
    """Callable as torch.compile(backend=...).

    enabled     the fusions, resolved once: a change of the environment does not reach a model already optimized
    compile, compile_piece   Inductor, for a graph of the whole model and for a piece of a packed step
    records     one Record for each graph compiled, in order
    progress    entered with a title while a graph compiles
    cuda_graph  whether the step that is about to run, and so a graph compiled for it, is replayed as a CUDA graph
    """

    config: OptimizeConfig
    enabled: frozenset[str]
    compile: Callable[..., Any] = compile_fx
    compile_piece: Callable[..., Any] = standalone_compile
    records: list[Record] = field(default_factory=list)
    progress: Callable[[str], AbstractContextManager[Any]] = lambda title: nullcontext()

    cuda_graph: bool = False

    def __call__(self, gm: GraphModule, example_inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        record = run(pipeline(self.enabled, self.config.fusions), gm.graph)
        gm.recompile()
        self.records.append(record)
        title = f"compiling graph {len(self.records)} ({len(gm.graph.nodes)} nodes)"
        with self.cache_key(), self.progress(title):
            return self.compile(gm, example_inputs, config_patches=self._options())

    def cache_key(self) -> AbstractContextManager[Any]:
        """Inductor's caches ask for these sources, fusions and options too."""
        return compiler_config.patch(cache_key_tag=uuid(self.config, self.enabled))  # type: ignore[attr-defined]

    def _options(self) -> dict[str, Any]:
        options = dict(self.config.inductor)
        if self.cuda_graph:
            options["triton.cudagraphs"] = True
        return options
