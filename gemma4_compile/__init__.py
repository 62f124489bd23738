"""torch.compile passes and fused Triton ops that make Hugging Face Gemma-4 models fast and keep them correct."""

from .config import OptimizeConfig
from .demo import demo_checkpoint
from .inductor import inductor_options
from .inspection import Inspection, inspect
from .optimize import optimize, restore
from .report import report

__version__ = "0.1.0"
__all__ = ["Inspection", "OptimizeConfig", "demo_checkpoint", "inductor_options", "inspect", "optimize", "report", "restore"]
