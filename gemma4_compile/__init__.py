"""torch.compile passes and fused Triton ops that make Hugging Face Gemma-4 models fast and keep them correct."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig, OptimizeConfig
    from .demo import demo_checkpoint
    from .inductor import inductor_options
    from .inspection import Inspection, inspect
    from .optimized import optimize, restore
    from .reporting import Report, report
    from .runtime.async_engine import AsyncEngine
    from .runtime.engine import Engine
    from .runtime.outputs import Chunk, RequestOutput
    from .runtime.sampling_params import SamplingParams
    from .runtime.speculative.config import SpeculativeConfig

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine", "Chunk", "Engine", "EngineConfig", "Inspection", "OptimizeConfig", "Report", "RequestOutput",
    "SamplingParams", "SpeculativeConfig", "demo_checkpoint", "inductor_options", "inspect", "optimize", "report", "restore",
]  # fmt: skip

# Where each name lives. It is imported when it is first asked for: Inductor and transformers take seconds, which neither the
# command line's help nor who wants one name should wait for. No module is called as a name here: importing it would hide that.
_HOMES = {
    "AsyncEngine": "runtime.async_engine", "Chunk": "runtime.outputs", "Engine": "runtime.engine", "EngineConfig": "config",
    "Inspection": "inspection", "OptimizeConfig": "config", "Report": "reporting", "RequestOutput": "runtime.outputs",
    "SamplingParams": "runtime.sampling_params", "SpeculativeConfig": "runtime.speculative.config",
    "demo_checkpoint": "demo", "inductor_options": "inductor",
    "inspect": "inspection", "optimize": "optimized", "report": "reporting", "restore": "optimized",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
