"""Weights in fewer bits for inference: what decoding reads from memory for each token, it reads faster.

    model = prepare(model, "int8")      # in place; the model cannot be trained or saved any more

    float32             as trained; on a CPU stored by columns where that is faster
    bfloat16, float16   weights, activations and logits in 16 bits
    int8                weights only: W[n, k] = q[n, k] * scale[n],  q = round(W / scale) in -127 .. 127,
                        scale[n] = max_k |W[n, k]| / 127, a float32 per output channel (per token in the embedding)

The matrices are those of the blocks and the tied output head, in GPT-2 124M the largest of all. LayerNorms stay
float32. With int8, activations are float32 on a CPU and bfloat16 on a GPU.

On a CPU the products are oneDNN's, of weights that are packed once, here. Its int8 product takes integers on both
sides, so each row x of the activations is written as two digits of 8 bits, with r = max |x| / 32512:

    x = r * (256 h + l) + e,  |e| <= r / 2       x @ W.T = r * scale * (256 (h @ q.T) + l @ q.T) + e @ W.T

Both digits go through one product of integers, which is exact and reads the weights once. A CPU without the
instructions for that, and a GPU, take the plain way: the weights are widened where they are used, which saves memory
and on a CPU no time.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cli import UserError
from model.gpt import GPT, IGNORE_INDEX, Linear, Sum, TiedEmbedding

Weights = Literal["float32", "bfloat16", "float16", "int8"]

PART = 1 << 18  # weights that are widened at a time on a CPU: 1 MiB in float32, which stays in its cache
MAX_LOGITS = 1 << 25  # in the loss: 128 MiB in float32
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Product = Callable[[Tensor], Tensor]  # x: (..., K) -> x @ W.T + bias, (..., N) in x.dtype


@torch.no_grad()
def prepare(model: GPT, weights: Weights | None = None) -> GPT:
    """Put the matrices of `model` into the form `weights` for decoding, in place -> model.

    weights: None for that of the model's dtype, in PyTorch's own layouts, so that state_dict() stays whole. In the
    forms below float32 the matrices may be in neither parameters() nor state_dict(): save a model before, and convert
    it once. ValueError for a model that is converted already, UserError for int8 of weights that are not finite.
    """
    wte = model.transformer.wte
    if not isinstance(wte, TiedEmbedding):
        raise ValueError("the weights of this model have been converted: load it again")
    if weights is not None:
        device = wte.weight.device
        model.dtype = _activations(weights, device)
        if weights == "int8" or (weights != "float32" and device.type == "cpu"):
            for parent in [*model.modules()]:
                for name, module in [*parent.named_children()]:
                    if isinstance(module, Linear | TiedEmbedding):
                        setattr(parent, name, _convert(module, weights, model.dtype))
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight.data.to(model.dtype)  # here, and not at each use
            n_out, n_in = weight.shape
            # On a CPU, of one row of x, a sum of columns is up to twice as fast as a dot product per row (LOG.md).
            if weight.device.type == "cpu" and n_out >= n_in and module is not model.transformer.wpe:
                weight = weight.t().contiguous().t()
            module.weight.data = weight
    return model


def weight_bytes(model: GPT) -> int:
    """What the weights of a prepared model take, packed copies included."""
    own = sum(p.nbytes for p in model.parameters())
    return own + sum(m.nbytes for m in model.modules() if isinstance(m, LowPrecisionLinear | LowPrecisionEmbedding))


def avoid_amx() -> None:
    """Call this before the first product of a process that decodes with int8 on a CPU: without AMX it is faster.

    oneDNN takes AMX wherever it is, and a token's two rows leave its tiles nearly empty (LOG.md). It reads the variable
    once, at its first product; a value of the user's own stays, and a CPU without AMX is not concerned.
    """
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: (N, K) -> q: (N, K) int8, scale: (N,) float32; q * scale is within scale / 2 of weight.

    A row of zeros has scale 0. UserError for weights that are not finite.
    """
    weight = weight.float()
    scale = weight.abs().amax(1) / 127
    if not scale.isfinite().all():
        raise UserError("the model has weights that are not finite, which int8 cannot hold: use another checkpoint")
    q = (weight / scale.where(scale > 0, 1.0)[:, None]).round_().clamp_(-127, 127)  # clamped for a subnormal scale
    return q.to(torch.int8), scale


class LowPrecisionLinear(nn.Module):
    """Takes the place of a Linear. nbytes: of its weight, which `product` holds."""

    def __init__(self, product: Product, nbytes: int) -> None:
        super().__init__()
        self.product, self.nbytes = product, nbytes

    def forward(self, x: Tensor, into: Sum | None = None) -> Any:
        """(..., in) -> (..., out); with a sum, the two tensors that come of that."""
        y = self.product(x)
        return y if into is None else into.of(y)

    def gelu(self, x: Tensor, approximate: str) -> Tensor:  # (..., in) -> (..., out)
        return F.gelu(self(x), approximate=approximate)


class LowPrecisionEmbedding(nn.Module):
    """Takes the place of the TiedEmbedding. weight: (V, C) in 8 or 16 bits; scale: (V,) float32 of 8 bits.

    nbytes: of the weight, and of the copy that `product` has packed.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None, product: Product, nbytes: int) -> None:
        super().__init__()
        self.weight, self.scale, self.product, self.nbytes = weight, scale, product, nbytes

    def forward(self, idx: Tensor, positions: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """As TiedEmbedding's."""
        x = F.embedding(idx, self.weight)
        x = x if self.scale is None else x * self.scale[idx][..., None]
        return x if positions is None else (x + positions).to(dtype)

    def logits(self, x: Tensor) -> Tensor:  # (..., C) -> (..., V)
        return self.product(x)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x: (M, C), targets: (M,) -> (), as TiedEmbedding's, with MAX_LOGITS in memory at a time."""
        rows = max(1, MAX_LOGITS // len(self.weight))
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        for part, wanted in zip(x.split(rows), targets.split(rows), strict=True):
            total += F.cross_entropy(self.product(part).float(), wanted, ignore_index=IGNORE_INDEX, reduction="sum")
        return (total / (targets != IGNORE_INDEX).sum()).float()


def _activations(weights: Weights, device: torch.device) -> torch.dtype:
    """The dtype that activations have under weights of this form."""
    if weights == "int8":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = _DTYPES[weights]
    return dtype if device.type != "cpu" or _multiplies(dtype) else torch.float32


@functools.cache
def _multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN's product of this dtype, 16 bits or int8, is right and fast on this CPU."""
    try:
        if dtype == torch.int8:
            return _int8_is_exact()
        if dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN has no such operators
        return False


def _int8_is_exact() -> bool:
    """Compare the largest sums with what they should be: an x86 CPU without VNNI cuts them off at 16 bits."""
    q = torch.full((16, 64), 127, dtype=torch.int8)
    got = packed_int8(q, torch.full((16,), 1 / 127), None)(torch.ones(1, 64))
    return bool(((got - 64).abs() < 1e-3).all())


def _convert(module: Linear | TiedEmbedding, weights: Weights, dtype: torch.dtype) -> nn.Module:
    """The module in few bits. dtype: of the activations."""
    on_cpu = module.weight.device.type == "cpu"
    bias = getattr(module, "bias", None)
    bias = None if bias is None else bias.detach().to(dtype)
    if weights == "int8":
        weight, scale = quantize(module.weight.detach())
        is_packed = on_cpu and _multiplies(torch.int8)
        product = (packed_int8 if is_packed else widened)(weight, scale, bias)
    else:
        weight, scale = module.weight.detach().to(_DTYPES[weights]), None
        is_packed = dtype == weight.dtype
        product = packed(weight, bias) if is_packed else widened(weight, scale, bias)
    nbytes = weight.nbytes + (0 if scale is None else scale.nbytes)
    if isinstance(module, Linear):
        return LowPrecisionLinear(product, nbytes)
    return LowPrecisionEmbedding(weight, scale, product, nbytes * (2 if is_packed else 1))


def packed(weight: Tensor, bias: Tensor | None) -> Product:
    """oneDNN's product of 16 bits. weight: (N, K), bias: (N,), both in the dtype of x."""
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 8)  # 8: rows of x to lay it out for
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, weight, bias, "none", [], "")


def packed_int8(q: Tensor, scale: Tensor, bias: Tensor | None) -> Product:
    """oneDNN's product of integers, see the top of the file. q: (N, K) int8, scale: (N,), bias: (N,) float32."""
    N, K = q.shape
    weight = torch.ops.onednn.qlinear_prepack(q.contiguous(), [2, K])  # for two rows: one of x
    linear = torch.ops.onednn.qlinear_pointwise.default
    zeros = torch.zeros(N, dtype=torch.int32)
    start = torch.zeros(()) if bias is None else bias
    # A digit d is stored as d + 128, in an unsigned byte. From 2**23 on, a float32 is a whole number and its lowest 23
    # bits are what exceeds 2**23: the sum below rounds, and its first two bytes are l + 128 and h + 128.
    offset = torch.tensor(float(2**23 + 256 * 128 + 128))

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, K)
        top = rows.abs().amax(1, keepdim=True)  # (M, 1); where it is 0, so is y * top, whatever digits 0 / 0 has
        both = torch.addcdiv(offset, rows, top, value=32512)  # (M, K), 2**23 + 256 (h + 128) + l + 128
        digits = torch.as_strided_copy(both.view(torch.uint8), (2, len(rows), K), (1, 4 * K, 4))  # l, h
        y = linear(digits, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")  # (2, M, N)
        low, high = y.unbind()
        return torch.addcmul(start, low.add_(high, alpha=256), top, value=1 / 32512).view(*x.shape[:-1], N)

    return product


def widened(weight: Tensor, scale: Tensor | None, bias: Tensor | None) -> Product:
    """PyTorch's product of weights that are cast to the dtype of x, on a CPU a part of them at a time.

    weight: (N, K) int8 or 16 bits, which bfloat16 and float32 hold exactly; scale: (N,) float32; bias: (N,).
    """
    rows = max(1, PART // weight.shape[1]) if weight.device.type == "cpu" else len(weight)

    def product(x: Tensor) -> Tensor:
        y = torch.cat([F.linear(x, part.to(x.dtype)) for part in weight.split(rows)], -1)
        y = y if scale is None else y * scale
        return (y if bias is None else y + bias).to(x.dtype)

    return product
