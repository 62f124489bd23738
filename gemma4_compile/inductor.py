"""The same passes as plain options for torch.compile, for those who bring their own model call, cache or engine."""

from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from . import ops  # noqa: F401  (registers the ops)
from .backend import uuid
from .config import OptimizeConfig
from .passes import Record, pipeline, prepare, run


class Gemma4Pass(CustomGraphPass):
    """Raise, fuse and lower as one Inductor pass over Dynamo's graph.

    records    one Record for each graph it ran on. Inductor asks its cache first: a graph found there is not passed over again
    """

    def __init__(self, config: OptimizeConfig):
        self.config, self.enabled = config, config.enabled()
        self.records: list[Record] = []
        self._uuid = uuid(config, self.enabled)

    def __call__(self, graph: Graph) -> None:
        self.records.append(run(pipeline(self.enabled, self.config.fusions), graph))

    def uuid(self) -> str:
        """Part of Inductor's cache key: sources, enabled fusions, options and versions."""
        return self._uuid


def inductor_options(config: OptimizeConfig | None = None) -> dict[str, Any]:
    """Options with which `torch.compile(model, options=inductor_options())` runs the fusion passes in plain Inductor.

    config    OptimizeConfig; `inductor` and `cuda_graphs` go into the options, the other fields do not apply

    Run the compiled model under torch.no_grad() or inference_mode(). Raises ValueError as OptimizeConfig does.
    """
    config = config or OptimizeConfig()
    prepare(config.fusions)
    options: dict[str, Any] = dict(config.inductor) | {"pre_grad_custom_pass": Gemma4Pass(config)}
    if config.cuda_graphs:
        options["triton.cudagraphs"] = True
    return options
