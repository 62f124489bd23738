"""Training loop of a demo target model."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scripts._demo_data import Batches, log
from scripts._demo_models import use_dense_experts

BALANCE = 0.01  # weight of the load-balance loss of the experts


def optimizer_for(model: nn.Module, rate: float, decay: float, device: str) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms, scales and embeddings alone."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, value in model.named_parameters():
        (matrices if value.ndim >= 2 and "embed" not in name else rest).append(value)
    groups = [{"params": matrices, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97), eps=1e-8, fused=device == "cuda")


def schedule(step: int, steps: int, warmup: int = 100) -> float:
    """Linear warm-up, then a cosine to 2% of the rate."""
    if step < (warmup := min(warmup, steps // 10 + 1)):
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def balance_loss(probabilities: list[Tensor], top_k: int) -> Tensor:
    """experts * sum(share of tokens * mean probability), 1 at perfect balance; probabilities [T, E] a layer."""
    losses = []
    for p in probabilities:
        p = p.flatten(0, -2)
        chosen = torch.zeros_like(p).scatter(1, p.topk(top_k, dim=-1).indices, 1.0 / top_k).mean(0)
        losses.append(p.shape[-1] * (chosen * p.mean(0)).sum())
    return torch.stack(losses).mean()


def run_steps(
    model: nn.Module,
    loss_of: Callable[[], Tensor],
    steps: int,
    rate: float,
    device: str,
    label: str,
    decay: float = 0.3,
    watch: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """Train `model` on `loss_of()` for `steps` steps; returns seconds and the mean of the last losses.

    watch  logged every 500 steps, e.g. a held-out loss
    """
    optimizer = optimizer_for(model, rate, decay, device)
    began, recent = time.perf_counter(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, steps)
        loss = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(loss.detach())
        if step % 100 == 0 or step + 1 == steps:
            mean = torch.stack(recent[-50:]).mean().item()
            took = time.perf_counter() - began
            log(f"{label} step {step + 1}/{steps} loss {mean:.4f} {took:.0f} s {1000 * took / (step + 1):.0f} ms/step")
        if watch and (step + 1) % 500 == 0:
            log(f"{label} step {step + 1}  held-out {watch():.4f}")
    return {"steps": steps, "seconds": round(time.perf_counter() - began, 1), "train_loss": round(mean, 4)}


def train_target(
    model: Any,
    batches: Batches,
    steps: int,
    rate: float,
    device: str,
    label: str,
    compiled: bool,
    watch: Callable[[], float],
) -> dict[str, Any]:
    """Next-token cross-entropy under bf16 autocast with fp32 weights."""
    model.to(device).train()
    use_dense_experts(model)
    config = model.config
    probabilities: list[Tensor] = []  # of each router in this step; 5.17 returns none from the model
    for layer in model.model.layers:
        if config.enable_moe_block:
            layer.router.register_forward_hook(lambda _module, _inputs, out: probabilities.append(out[0]))
    forward = torch.compile(model) if compiled else model

    def loss_of() -> Tensor:
        rows = batches.next()
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = forward(rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        if config.enable_moe_block:
            loss = loss + BALANCE * balance_loss(probabilities, config.top_k_experts)
            probabilities.clear()
        return loss

    report = run_steps(model, loss_of, steps, rate, device, label, watch=watch)
    return {**report, "tokens": steps * batches.batch * batches.length}
