"""linear(x, weight) -> gemma4::linear, and two or three of one x in one launch      HF: each nn.Linear without a bias"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fusion import Fusion, every_layer
from .rewrite import Guard, Rewrite, all_guards, same_dtype
from .template import Match, value_of

ops = torch.ops.gemma4


def search(x: Tensor, first: Tensor) -> Tensor:
    return F.linear(x, first, None)


def replace(x: Tensor, first: Tensor) -> Tensor:
    return ops.linear(x, first)


def search_pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return F.linear(x, first, None), F.linear(x, second, None)


def replace_pair(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    one, two = ops.linear_pair(x, first, second)
    return one, two


def search_triple(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return F.linear(x, first, None), F.linear(x, second, None), F.linear(x, third, None)


def replace_triple(x: Tensor, first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = ops.linear_triple(x, first, second, third)
    return one, two, three


def inputs(*names: str) -> dict[str, Any]:
    return {"x": torch.randn(2, 3, 16)} | {name: torch.randn(8, 16) for name in names}


def matrices(*names: str) -> Guard:
    """Each named tensor is [N, K], and x [..., K]."""

    def guard(match: Match) -> str | None:
        x = value_of(match.binding["x"])
        for name in names:
            weight = value_of(match.binding[name])
            if x is None or weight is None or weight.dim() != 2 or x.dim() < 2 or weight.shape[1] != x.shape[-1]:
                return f"{name} must be [N, K] and x [..., K]"
        return None

    return guard


def _guard(*names: str) -> Guard:
    return all_guards(same_dtype("x", *names), matrices(*names))


@cache
def rewrites() -> tuple[Rewrite, ...]:
    two, three = ("first", "second"), ("first", "second", "third")
    return (
        Rewrite("linear_triple", search_triple, replace_triple, lambda: inputs(*three), _guard(*three)),
        Rewrite("linear_pair", search_pair, replace_pair, lambda: inputs(*two), _guard(*two)),
        Rewrite("linear", search, replace, lambda: inputs("first"), _guard("first")),
    )


# With more rows than pay (plans.product_plan), the op's products are cuBLAS's, as Inductor's are.
FUSION = Fusion(
    "linear", "projections of few tokens, those of one input in one launch", every_layer, rewrites,
    ops=("linear", "linear_pair", "linear_triple"), launches_saved={"linear_triple": 2, "linear_pair": 1},  # of up to 32 rows
)  # fmt: skip
