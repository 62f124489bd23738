"""Our experts op behind transformers' experts interface: what a model's experts call while their graph is traced.

Hugging Face writes the experts as one of several subgraphs, which differ between its releases; the interface does not. An
implementation of ours stands for one of Hugging Face's, which is in its name and runs where the op may not. Those who compile
the model themselves (inductor_options) call `model.set_experts_implementation("gemma4_compile:grouped_mm")`.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextExperts

from gemma4_compile.ops.library import op
from gemma4_compile.patterns.template import source_of

PREFIX = "gemma4_compile:"
# Both compute the same and round alike. What else a user sets is a choice of other numbers or another library, and is kept.
REPLACED = ("grouped_mm", "batched_mm")


def experts_forward(
    plain: Callable[..., Tensor], module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """One layer's routed experts, as Gemma4TextExperts calls them; Dynamo traces through it.

    plain            Hugging Face's implementation, for experts that the op does not compute
    hidden_states    [T, H]; top_k_index and top_k_weights [T, k]
    """
    reason = objection(module, hidden_states)
    if reason:
        return plain(module, torch.ops.gemma4.leave_experts(hidden_states, reason), top_k_index, top_k_weights)
    return torch.ops.gemma4.experts(hidden_states, top_k_index, top_k_weights, module.gate_up_proj, module.down_proj)


def objection(module: Any, hidden_states: Tensor) -> str:
    """Why the op may not stand for these experts; empty if it may. Hooks of the experts themselves run around either."""
    if type(module) is not Gemma4TextExperts:
        return f"the op computes Gemma4TextExperts, found {type(module).__name__}"
    config: Any = module.config
    activation = config.hidden_activation
    if type(module.act_fn) is not GELUTanh or activation != "gelu_pytorch_tanh":
        return f"the activation must be gelu_pytorch_tanh, found {activation} as {type(module.act_fn).__name__}"
    if module.act_fn._forward_hooks or module.act_fn._forward_pre_hooks:
        return "act_fn has hooks, which the op would not call"
    for weight in (module.gate_up_proj, module.down_proj):
        if type(weight) not in (Tensor, nn.Parameter):
            return f"the weights must be plain tensors, found {type(weight).__name__}"
        if weight.dtype != hidden_states.dtype:
            return f"dtypes differ: hidden states {hidden_states.dtype}, weights {weight.dtype}"
    if hidden_states.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {hidden_states.dtype}"
    return ""


SOURCE = f"gemma4_compile/{source_of(experts_forward)}"
for name in REPLACED:
    ExpertsInterface.register(PREFIX + name, partial(experts_forward, ALL_EXPERTS_FUNCTIONS[name]))


def _unchanged(x: Tensor, reason: str) -> Tensor:
    return x.clone()  # an op may not return its input


@op(launch=_unchanged)
def leave_experts(x: Tensor, reason: str) -> Tensor:
    """x, with the reason in the graph why the op is not there; the pass `experts` takes it away again."""
    return _unchanged(x, reason)


_LOCK = threading.Lock()
_USERS: dict[int, int] = {}  # id of a config -> calls under way that have switched it


@contextmanager
def fused_experts(config: Any, enabled: bool) -> Iterator[None]:
    """Within it the experts of the model with this config are ours, if `enabled` and its implementation is one of REPLACED.

    Only while a graph is traced or called: otherwise the config says what the user chose, also in copies of the model. Counted,
    as several threads may call one model."""
    if not enabled or not _enter(config):
        yield
        return
    try:
        yield
    finally:
        _leave(config)


def _enter(config: Any) -> bool:
    with _LOCK:
        users = _USERS.get(id(config), 0)
        if not users:
            name = config._experts_implementation
            if name not in REPLACED:
                return False
            config._experts_implementation = PREFIX + name
        _USERS[id(config)] = users + 1
        return True


def _leave(config: Any) -> None:
    with _LOCK:
        _USERS[id(config)] -= 1
        if not _USERS[id(config)]:
            del _USERS[id(config)]
            config._experts_implementation = config._experts_implementation.removeprefix(PREFIX)
