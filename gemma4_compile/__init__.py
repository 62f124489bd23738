"""torch.compile passes and fused Triton ops that make Hugging Face Gemma-4 models fast and keep them correct."""

from .config import EngineConfig, OptimizeConfig
from .demo import demo_checkpoint
from .inductor import inductor_options
from .inspection import Inspection, inspect
from .optimize import optimize, restore
from .report import report
from .runtime.async_engine import AsyncEngine
from .runtime.engine import Engine
from .runtime.outputs import Chunk, RequestOutput
from .runtime.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = [
    "AsyncEngine", "Chunk", "Engine", "EngineConfig", "Inspection", "OptimizeConfig", "RequestOutput", "SamplingParams",
    "demo_checkpoint", "inductor_options", "inspect", "optimize", "report", "restore",
]  # fmt: skip
