"""Fusion: all that is known of one fusion, beside its pattern. passes/__init__.py lists them in the order in which they run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from gemma4_compile.geometry import Geometry

from .rewrite import Rewrite

Sites = Callable[[Geometry], tuple[str, ...]]


def every_layer(geometry: Geometry) -> tuple[str, ...]:
    return tuple(layer.site for layer in geometry.layers)


def layers_with_experts(geometry: Geometry) -> tuple[str, ...]:
    return every_layer(geometry) if geometry.experts else ()


def layers_without_experts(geometry: Geometry) -> tuple[str, ...]:
    """None where the model is divided: the sum over the ranks takes the norms there."""
    return () if geometry.experts or geometry.ranks > 1 else every_layer(geometry)


def layers_with_ple(geometry: Geometry) -> tuple[str, ...]:
    return every_layer(geometry) if geometry.per_layer_input else ()


@dataclass(frozen=True)
class Fusion:
    """One fusion, or one rewrite of the whole graph, which has a switch like a fusion's.

    name            of the switch, of the sites in a Record, and of the row in docs/fusions.md
    replaces        what it takes the place of, in a few words
    sites           where it should match in a model: "layers.N", or "model"
    rewrites        its forms, each before those that it contains; none where no pattern finds it
    ops             names of the gemma4 ops that it leaves in a graph
    packed          whether only the graph of a packed step has its sites
    promised        whether a matched site, by its module's path, is one of `sites`
    on_by_default   only where it beats Inductor's own code on the GPU, as docs/fusions.md shows; `why_off` says so if not
    launches_saved  kernel launches that a site saves against Inductor on the GPU, by the name of its rewrite; 0 unless given
    """

    name: str
    replaces: str
    sites: Sites
    rewrites: Callable[[], Sequence[Rewrite]] = tuple
    ops: tuple[str, ...] = ()
    packed: bool = False
    promised: Callable[[str], bool] = lambda path: True
    on_by_default: bool = True
    why_off: str = "no faster than Inductor"
    launches_saved: Mapping[str, int] = field(default_factory=dict)
