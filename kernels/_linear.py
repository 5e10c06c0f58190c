"""A linear layer whose weights are kept wider than it computes: float32 parameters, products in 16 bits.

    y = x W^T + b          dx = dy W          dW = dy^T x          db = sum_m dy

x, y, dx, dy: (M, K) or (M, N) in one dtype, in which W and b are used; W, dW: (N, K), b, db: (N,) as they are stored.
The tensor cores add in float32. On a GPU dW and db leave them as they are: PyTorch's own gradients are those of the
16-bit copies of W and b, rounded to 16 bits and cast to float32 in another pass.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _Float32Gradients(torch.autograd.Function):
    """working: weight in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, working: Tensor) -> Tensor:
        ctx.save_for_backward(x, working)
        return F.linear(x, working, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, working = ctx.saved_tensors
        need_dx, need_dw, need_db, _ = ctx.needs_input_grad
        dx = dy @ working if need_dx else None
        dw = product_float32(dy.flatten(0, -2).T, x.flatten(0, -2)) if need_dw else None
        return dx, dw, dy.flatten(0, -2).sum(0, dtype=torch.float32) if need_db else None, None


def product_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of 16 bits as its float32 sums: (N, M), (M, K) -> (N, K). A CPU has none, and widens both first."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _CachedCast(torch.autograd.Function):
    """weight.to(working.dtype), whose result `working` is already known; the gradient goes to weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, working: Tensor) -> Tensor:
        return working.view_as(working)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.float(), None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, working: Tensor | None = None) -> Tensor:
    """y = x @ weight.T + bias, computed in x.dtype.

    x: (..., K), two dimensions or more; weight: (N, K), bias: (N,), both any floating dtype -> (..., N) in x.dtype.
    working: weight in x.dtype, where the caller keeps it from one update to the next.
    """
    if x.is_cuda and weight.dtype == torch.float32 != x.dtype and weight.requires_grad:
        return _Float32Gradients.apply(x, weight, bias, weight.detach().to(x.dtype) if working is None else working)
    weight = weight.to(x.dtype) if working is None else _CachedCast.apply(weight, working)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))
