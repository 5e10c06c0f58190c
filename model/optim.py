"""AdamW with decay groups, and the learning rate as a pure function of the step.

    m = beta1 * m + (1 - beta1) * g            v = beta2 * v + (1 - beta2) * g**2
    w = w - lr * (weight_decay * w + m_hat / (sqrt(v_hat) + eps))        hats: divided by 1 - beta**t

Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices (linear weights, embeddings) decay; vectors (biases, LayerNorm) do not. A tied weight counts once."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """PyTorch's fused AdamW over `parameter_groups`: one pass over each tensor, on the CPU as on CUDA.

    It also follows the protocol of torch.amp.GradScaler: while `optimizer.found_inf` is a tensor that holds 1.0,
    `step()` leaves parameters and state as they are, and the host need not look at the gradients.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=lr, betas=betas, fused=True)


def lr_at(step: int, *, lr: float, min_lr: float, warmup_steps: int, steps: int) -> float:
    """Learning rate of update `step` (0-based): linear warm-up to `lr`, then half a cosine down to `min_lr`.

    The first update already moves: lr / (warmup_steps + 1). At `steps` and beyond the rate stays at `min_lr`.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    if step >= steps:
        return min_lr
    progress = (step - warmup_steps) / (steps - warmup_steps)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (lr - min_lr)
