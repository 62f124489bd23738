"""Every switch, each with its reason. Frozen: a compiled model never changes its mind."""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .passes import SWITCHES, Fusion

DISABLE_VARIABLE = "GEMMA4_COMPILE_DISABLE"


@dataclass(frozen=True)
class OptimizeConfig:
    """How `optimize` compiles a model.

    enable          fusions to switch on that are off by default, by name (`docs/fusions.md` says why they are off)
    disable         fusions, or the transform yoco, to switch off by name; also GEMMA4_COMPILE_DISABLE=name,... in the
                    environment
    device          "cpu" or "cuda": refuse a model that lies elsewhere. None takes the model's own
    cuda_graphs     replay packed steps as CUDA graphs: None or True; False, never. Inductor replays graphs of the whole model
                    with None for decode steps on a static cache, where shapes and addresses stay; with True always, captured
                    anew for each shape
    packed          run the calls that fit as packed steps, as Engine does; False: each as one graph of the whole model
    max_graphs      graphs of the whole model that one model may compile, at least 2 (prefill and decode); further kinds of
                    calls run uncompiled
    cache_dir       folder for the compiled pieces of packed steps; None puts them beside Inductor's cache
    fusions         Fusions of your own, looked for behind ours, whose ops are in the graph by then (examples/own_fusion.py)
    progress        show a progress bar on stderr while a graph compiles
    inductor        further Inductor options, such as {"max_autotune": True}

    Raises ValueError for an unknown fusion, one both enabled and disabled, two of one name, or a value out of range.
    """

    enable: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    device: Literal["cpu", "cuda"] | None = None
    cuda_graphs: bool | None = None
    packed: bool = True
    max_graphs: int = 32
    cache_dir: str | None = None
    fusions: tuple[Fusion, ...] = ()
    progress: bool = False
    inductor: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for option in ("enable", "disable"):
            value = getattr(self, option)
            if isinstance(value, str):
                raise ValueError(f"{option} must be a sequence of fusion names, got the string {value!r}; write ({value!r},)")
            object.__setattr__(self, option, tuple(value))
        check_names(self.enable, "enable")
        check_names(self.disable, "disable")
        object.__setattr__(self, "fusions", tuple(self.fusions))
        names = [*SWITCHES, *(fusion.name for fusion in self.fusions)]
        if taken := next((name for name in names if names.count(name) > 1), ""):
            raise ValueError(f"a fusion of your own must have a name of its own, got {taken!r}; choose another")
        if both := sorted(set(self.enable) & set(self.disable)):
            raise ValueError(f"a fusion is enabled or disabled, got both for {', '.join(both)}; name it once")
        if self.device not in (None, "cpu", "cuda"):
            raise ValueError(f'device must be "cpu", "cuda" or None, got {self.device!r}; leave it out to take the model\'s')
        if self.cuda_graphs not in (None, True, False):
            raise ValueError(
                f"cuda_graphs must be True, False or None, got {self.cuda_graphs!r}; leave it out to let the cache decide"
            )
        if not isinstance(self.max_graphs, int) or self.max_graphs < 2:
            raise ValueError(f"max_graphs must be an integer of at least 2 (prefill, decode), got {self.max_graphs!r}; use 32")

    def enabled(self) -> frozenset[str]:
        """The fusions that run: the defaults, with `enable`, without `disable` and GEMMA4_COMPILE_DISABLE."""
        disabled = {name.strip() for name in os.environ.get(DISABLE_VARIABLE, "").split(",")} - {""}
        check_names(sorted(disabled), DISABLE_VARIABLE)
        default = {name for name, fusion in SWITCHES.items() if fusion.on_by_default}
        return frozenset((default | set(self.enable)) - set(self.disable) - disabled)

    def why_off(self, name: str) -> str:
        """The reason, for the report, that a fusion is not in `enabled()`."""
        if name in self.disable:
            return "disabled in the config"
        if not SWITCHES[name].on_by_default and name not in self.enable:
            return f"off by default: {SWITCHES[name].why_off}, see docs/fusions.md"
        return f"disabled by {DISABLE_VARIABLE}"


@dataclass(frozen=True)
class EngineConfig:
    """How an `Engine` serves a model.

    max_model_len         tokens of the longest request, None: the model's context, or what the pools hold if that is less
    max_requests          sequences that run at a time
    max_batched_tokens    tokens of a step: long prompts are cut into chunks of this
    page_size             tokens of a page, a multiple of 16
    expected_tokens       length of a usual request; with the geometry it says how memory is split between the pools. None: 4096
    kv_dtype              "auto" (the weights') or "fp8" (e4m3: half the bytes, rounded)
    kv_bytes              memory of the KV pools; None: what memory_fraction leaves on a GPU, 1 GiB on a CPU
    memory_fraction       share of the GPU's memory that the engine may take
    prefix_caching        prompts reuse the pages of a prefix that earlier requests have computed
    overlap               plan a step while the one before runs. None: on a GPU
    cuda_graphs           None: on a GPU
    capture_at_start      capture all graphs when the engine is made, not at first use
    text_only             True: images are refused, and of a checkpoint the text part alone is read. False: all is ready for
                          images when the engine is made. None: what they take is read and compiled once the first one comes
    image_bytes           of an image's file at most
    image_pixels          of an image at most, width times height: a small file may hold a huge one
    image_urls            whether images may be fetched from http addresses in prompts
    image_cache_bytes     of embeddings that are kept for images that come again
    chat                  text prompts go through the chat template, where the tokenizer has one
    seed                  of requests that have none of their own
    device, dtype         of a checkpoint that the engine loads; None: the GPU if there is one, and the checkpoint's own
    progress              show progress bars on stderr
    step_timeout          seconds that a step of several ranks may take before the run ends with an error on all of them; first
                          steps compile kernels and capture graphs
    optimize              OptimizeConfig of a model that is not optimized yet

    Raises ValueError for a value out of range.
    """

    max_model_len: int | None = None
    max_requests: int = 256
    max_batched_tokens: int = 8192
    page_size: int = 64
    expected_tokens: int | None = None
    kv_dtype: Literal["auto", "fp8"] = "auto"
    kv_bytes: int | None = None
    memory_fraction: float = 0.9
    prefix_caching: bool = True
    overlap: bool | None = None
    cuda_graphs: bool | None = None
    capture_at_start: bool = True
    text_only: bool | None = None
    image_bytes: int = 32 << 20
    image_pixels: int = 64_000_000
    image_urls: bool = False
    image_cache_bytes: int = 256 << 20
    chat: bool = True
    seed: int = 0
    device: str | None = None
    dtype: Any = None
    progress: bool = False
    step_timeout: float = 300.0
    optimize: OptimizeConfig = field(default_factory=OptimizeConfig)

    def __post_init__(self) -> None:
        sizes = ("max_model_len", "max_requests", "max_batched_tokens", "page_size", "expected_tokens", "kv_bytes")
        for name in (*sizes, "image_bytes", "image_pixels", "image_cache_bytes"):
            value = getattr(self, name)
            if value is None and name in ("max_model_len", "expected_tokens", "kv_bytes"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}; see EngineConfig")
        if self.page_size % 16:
            raise ValueError(f"page_size must be a multiple of 16, got {self.page_size}; use 64")
        if self.max_batched_tokens < self.max_requests:
            raise ValueError(
                f"max_batched_tokens must be at least max_requests, a token for each, got {self.max_batched_tokens} and "
                f"{self.max_requests}; lower max_requests"
            )
        if self.kv_dtype not in ("auto", "fp8"):
            raise ValueError(f'kv_dtype must be "auto" or "fp8", got {self.kv_dtype!r}; use "auto"')
        if not 0 < self.memory_fraction <= 1:
            raise ValueError(f"memory_fraction must be over 0 and at most 1, got {self.memory_fraction}; use 0.9")
        if not self.step_timeout > 0:
            raise ValueError(f"step_timeout must be positive seconds, got {self.step_timeout}; use 300")


def check_names(names: Iterable[str], where: str) -> None:
    """Raises ValueError for a name that is no fusion, with the nearest one that is."""
    for name in names:
        if name not in SWITCHES:
            near = difflib.get_close_matches(str(name), SWITCHES, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SWITCHES)}"
            raise ValueError(f"{where} must name fusions, got {name!r}; {hint}")
