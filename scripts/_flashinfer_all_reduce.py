"""FlashInfer's `trtllm` all-reduce in front of our fused ops, measured beside the one-shot launch and NCCL.

Nothing chooses it, as it wins nowhere but on four GPUs at 128 tokens and more (docs/tensor_parallel.md): who wants it calls
by_flashinfer. FlashInfer is an extra, imported at the first call.

Each rank writes its part into the memory of all, and reads its own until no -0 is left there: -0 is what the memory holds
before a part has come, and parts are sent without it. No meeting is needed, and the sum is a launch of its own: the norm that
FlashInfer fuses behind it is norm(sum + residual), where Gemma's is norm(sum) + residual. Its other backends, `mnnvl` and what
`auto` may choose, set NVLink multicast up; this one does not, with on_all_ranks having told torch's symmetric memory not to.

Source: https://github.com/flashinfer-ai/flashinfer/blob/beabf5004585b03da60e927bbb803acbaa62fe36/flashinfer/comm/trtllm_ar.py
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemma4_compile.ops.distributed.all_reduce_norm import FORMS, ranks_in
from gemma4_compile.ops.distributed.symmetric import MOST_ROWS, on_all_ranks
from gemma4_compile.ops.library import OPS, fresh

_RANKS = (2, 4, 8, 16)  # what its kernels are made for


@dataclass(frozen=True)
class _Space:
    """FlashInfer's memory of a group for up to MOST_ROWS rows of one width, and what it wants to be told with each launch."""

    pointers: Tensor
    handles: list[list[int]]  # by whose identity FlashInfer keeps the memory
    about: dict[str, Any]


_SPACES: dict[tuple[str, int, int, bool], _Space | None] = {}


def installed() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def by_flashinfer(op: str, *arguments: Any) -> Any:
    """FlashInfer's sum of each summed input, then the op; arguments and results are those of by_one_shot and by_nccl.

    The parts are added in fp32 in the order of the ranks and rounded once: the same bits on all ranks. A zero loses its sign.

    None without FlashInfer, for more rows than the memory has, rows that are no multiple of 16 bytes, another number of ranks
    than 2, 4, 8 or 16, ranks on several hosts, and in a CUDA graph's capture if there was no call before it. The first call is
    collective, and compiles FlashInfer's module where that has not been done: half an hour on two cores.
    """
    *rest, group = arguments
    x, sums = rest[0], FORMS[op].sums
    width = x.shape[-1]
    fits = x.numel() <= MOST_ROWS * width and width * x.element_size() % 16 == 0 and ranks_in(group) in _RANKS
    space = _space(group, x) if fits and installed() else None
    if space is None:
        return None
    return OPS[op].launch(*(_total(space, part) for part in rest[:sums]), *rest[sums:])


def _total(space: _Space, part: Tensor) -> Tensor:
    """The sum of all ranks' parts."""
    from flashinfer.comm import AllReduceFusionPattern, trtllm_allreduce_fusion

    total, width = fresh(part), part.shape[-1]
    trtllm_allreduce_fusion(
        allreduce_in=part.contiguous().view(-1, width),
        allreduce_out=total.view(-1, width),
        pattern_code=AllReduceFusionPattern.kAllReduce,
        token_num=part.numel() // width,
        hidden_dim=width,
        world_size=space.about["tp_size"],
        world_rank=space.about["tp_rank"],
        workspace_ptrs=space.pointers,
        metadata=space.about,
        use_oneshot=True,
        fp32_acc=True,
        launch_with_pdl=True,  # its kernel waits for the one before it ere it reads
        trigger_completion_at_end=True,
        residual_in=None, residual_out=None, norm_out=None, quant_out=None, scale_out=None,
        rms_gamma=None, rms_eps=None, scale_factor=None, layout_code=None,
    )  # fmt: skip
    return total


def _space(group: str, x: Tensor) -> _Space | None:
    """Made at first use by all ranks together, as symmetric.workspace is."""
    key = (group, x.get_device(), x.shape[-1], x.dtype == torch.float32)  # both halves have one pattern of -0
    if key not in _SPACES and not torch.cuda.is_current_stream_capturing():
        _SPACES[key] = on_all_ranks(group, _RANKS[-1], lambda: _make(group, x))
    return _SPACES.get(key)


def _make(group: str, x: Tensor) -> _Space:
    from flashinfer.comm import trtllm_ar

    trtllm_ar.get_trtllm_comm_module()  # compiled before ranks wait for each other
    processes = torch.distributed.distributed_c10d._resolve_process_group(group)  # type: ignore[arg-type]
    # Over torch's symmetric memory. The API that is to replace this call shares memory by handles of its own.
    handles, pointers, about = trtllm_ar.trtllm_create_ipc_workspace_for_all_reduce_fusion(
        processes.rank(), processes.size(), MOST_ROWS, x.shape[-1], x.dtype == torch.float32, processes, create_metadata=True
    )
    torch.cuda.synchronize(x.device)
    return _Space(pointers, handles, about)


def forget() -> None:
    """Give the memory back, before its process group is destroyed."""
    for space in _SPACES.values():
        if space is not None:
            from flashinfer.comm import trtllm_destroy_ipc_workspace_for_all_reduce_fusion

            trtllm_destroy_ipc_workspace_for_all_reduce_fusion(space.handles)
    _SPACES.clear()
