"""Vectors of tokens plus vectors of their positions, gathered, added and cast in one pass, and the gradients of both.

    y_bt = E[i_bt] + P_bt          dE[v] = sum of dy_bt over i_bt = v          dP = sum of dy over what P repeats

y, dy: (B, T, C) in one dtype; i: (B, T); E: (V, C), P: (T, C) or (B, 1, C), in any dtype; all sums in float32. A token
that E has no row for gives a row of NaN, and no gradient: a GPU cannot raise an error without the host waiting for it,
and a loss of NaN is seen.
The gradient of E takes the rows of dy in the order of their tokens: one program adds those of one token, in their order
in the text, and writes one row, zeros where there are none. So nothing is added atomically, and the bits repeat.
Bytes that must cross memory: forward reads E and P and writes y; backward reads dy and writes dE, and reads dy again
for dP, which PyTorch adds up.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._launch import as_rows, launch
from ._registry import Case, Draw, KernelSpec, register
from ._tables import choose
from ._triton import NAMESPACE, tl, triton
from .layer_norm import tile_ptrs

# 256 columns make every access of a row whole 128-byte lines.
_FORWARD = {"BLOCK_M": 8, "BLOCK_C": 256, "num_warps": 4}
_BACKWARD = {"BLOCK_M": 16, "BLOCK_C": 256, "num_warps": 4, "STAGES": 3}
_FORWARD_SPACE = {"BLOCK_M": (4, 8, 16), "BLOCK_C": (256, 512), "num_warps": (4, 8)}
_BACKWARD_SPACE = {"BLOCK_M": (8, 16, 32), "BLOCK_C": (256, 512), "num_warps": (4, 8), "STAGES": (1, 2, 3)}


@triton.jit
def _embedding_fwd_kernel(
    idx_ptr, stride_idx,  # (B, T)
    wte_ptr, stride_wte,  # (V, C)
    wpe_ptr, stride_wpe,  # (B, T, C), with strides of 0
    y_ptr,                # (M, C)
    sizes,                # M = B T, T, V, C
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    M, T, V, C = sizes
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    b, t = offs_m // T, offs_m % T
    v = tl.load(idx_ptr + b * stride_idx[0] + t * stride_idx[1], mask=mask_m, other=0).to(tl.int64)
    is_token = (v >= 0) & (v < V)
    wte_ptrs = tile_ptrs(wte_ptr, stride_wte, v, offs_c)
    x = tl.load(wte_ptrs, mask=mask & is_token[:, None], other=float("nan")).to(tl.float32)  # (BLOCK_M, BLOCK_C)
    wpe_ptrs = tile_ptrs(wpe_ptr, (stride_wpe[1], stride_wpe[2]), t, offs_c) + (b * stride_wpe[0])[:, None]
    y = x + tl.load(wpe_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs_m[:, None] * C + offs_c[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _embedding_bwd_kernel(
    dy_ptr, stride_dy,     # (M, C)
    order_ptr, start_ptr,  # (M,): rows of dy in the order of their tokens  (V + 1,): the first of each token's
    dwte_ptr,              # (V, C) float32
    C, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    v = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    start, stop = tl.load(start_ptr + v), tl.load(start_ptr + v + 1)
    dwte = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for first in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask_m = offs_m < stop
        rows = tl.load(order_ptr + offs_m, mask=mask_m, other=0)
        dy_ptrs = tile_ptrs(dy_ptr, stride_dy, rows, offs_c)
        dwte += tl.load(dy_ptrs, mask=mask_m[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    tl.store(dwte_ptr + v * C + offs_c, tl.sum(dwte, 0), mask=mask_c)


@torch.library.custom_op(f"{NAMESPACE}::embedding_fwd", mutates_args=())
def embedding_fwd(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype) -> Tensor:
    """idx: (B, T), wte: (V, C), wpe: (T, C) or (B, 1, C), any strides -> y: (B, T, C) contiguous in dtype."""
    (B, T), (V, C) = idx.shape, wte.shape
    y = torch.empty((B, T, C), dtype=dtype, device=wte.device)
    options = choose("embedding_fwd", _FORWARD, _FORWARD_SPACE, wte.device, dtype=dtype, C=C)
    wpe = wpe.expand(B, T, C)
    launch(
        _embedding_fwd_kernel, (triton.cdiv(B * T, options["BLOCK_M"]), triton.cdiv(C, options["BLOCK_C"])),
        idx, idx.stride(),  # (B, T)
        wte, wte.stride(),  # (V, C)
        wpe, wpe.stride(),  # (B, T, C)
        y,                  # (B T, C)
        (B * T, T, V, C), **options,
    )  # fmt: skip
    return y


@embedding_fwd.register_fake
def _(idx, wte, wpe, dtype):
    return wte.new_empty((*idx.shape, wte.shape[1]), dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::embedding_bwd", mutates_args=())
def embedding_bwd(dy: Tensor, idx: Tensor, V: int) -> Tensor:
    """dy: (B, T, C) any strides, idx: (B, T) -> dwte: (V, C) float32."""
    rows = as_rows(dy)
    C = rows.shape[1]
    dwte = torch.empty((V, C), dtype=torch.float32, device=dy.device)
    ids, order = idx.flatten().sort(stable=True)
    start = torch.searchsorted(ids, torch.arange(V + 1, dtype=idx.dtype, device=idx.device))
    options = choose("embedding_bwd", _BACKWARD, _BACKWARD_SPACE, dy.device, dtype=dy.dtype, C=C)
    launch(
        _embedding_bwd_kernel, (V, triton.cdiv(C, options["BLOCK_C"])),
        rows, rows.stride(),    # (M, C)
        order, start,           # (M,), (V + 1,)
        dwte,                   # (V, C)
        C, **options,
    )  # fmt: skip
    return dwte


@embedding_bwd.register_fake
def _(dy, idx, V):
    return dy.new_empty((V, dy.shape[-1]), dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    idx, wte, wpe, _ = inputs
    ctx.save_for_backward(idx)
    ctx.V, ctx.dtypes, ctx.repeated = wte.shape[0], (wte.dtype, wpe.dtype), 1 if wpe.ndim == 3 else 0


def _backward(ctx, dy):
    _, need_dwte, need_dwpe, _ = ctx.needs_input_grad
    dwte = embedding_bwd(dy, *ctx.saved_tensors, ctx.V).to(ctx.dtypes[0]) if need_dwte else None
    dwpe = dy.sum(ctx.repeated, keepdim=ctx.repeated == 1, dtype=torch.float32) if need_dwpe else None
    return None, dwte, None if dwpe is None else dwpe.to(ctx.dtypes[1]), None


embedding_fwd.register_autograd(_backward, setup_context=_setup_context)


def embedding(idx: Tensor, wte: Tensor, wpe: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """y = (wte[idx] + wpe).to(dtype), added in float32 and rounded once.

    idx: (B, T) int64 or int32; wte: (V, C); wpe: (T, C), or (B, 1, C) for one position of each sequence; any strides,
    float32/float16/bfloat16 -> (B, T, C) in dtype, wte's by default, and float64 where wte is. An id outside [0, V) is
    an IndexError on a CPU, and on a GPU a row of NaN (PyTorch's operator ends the process there).
    ValueError if a shape or the dtype of idx does not fit.
    """
    (B, T), C = idx.shape if idx.ndim == 2 else (-1, -1), wte.shape[-1]
    if idx.ndim != 2 or wpe.shape not in ((T, C), (B, 1, C)) or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            "embedding: idx must be (B, T) int64 or int32, wte (V, C) and wpe (T, C) or (B, 1, C), "
            f"got {tuple(idx.shape)} {idx.dtype}, {tuple(wte.shape)} and {tuple(wpe.shape)}"
        )
    dtype = wte.dtype if dtype is None or wte.dtype == torch.float64 else dtype
    if use_triton("embedding", wte, V=wte.shape[0], C=C, out_dtype=dtype):
        return embedding_fwd(idx, wte, wpe, dtype)
    return (F.embedding(idx, wte) + wpe).to(dtype)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    B, T, V, C = (case[name] for name in "BTVC")
    wte, wpe = draw.normal(V, C), draw.normal(B, 1, C) if case.get("single") else draw.normal(T, C)
    if case.get("wide"):
        wte, wpe = wte.float(), wpe.float()
    return {"idx": draw.integers(0, V, B, T), "wte": wte, "wpe": wpe, "dtype": case.get("out_dtype", draw.dtype)}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """A row of a table once for each token that is there, at most; the gradient of a table in float32."""
    y, C = case["B"] * case["T"] * case["C"] * dtype.itemsize, case["C"]
    tables = (min(case["V"], case["B"] * case["T"]) + case["T"]) * C * (4 if case.get("wide") else dtype.itemsize)
    return y + tables, 2 * y + (case["V"] + case["T"]) * C * 4


SPEC = register(
    KernelSpec(
        name="embedding",
        fn=embedding,
        make_inputs=_make_inputs,
        grads=("wte", "wpe"),
        cases=(
            {"B": 3, "T": 30, "V": 12, "C": 768, "wide": True, "why": "GPT-2's width, float32 tables, tokens repeat"},
            {"B": 1, "T": 1, "V": 1, "C": 1, "why": "one token"},
            {"B": 2, "T": 7, "V": 40, "C": 33, "why": "most tokens are absent, ragged in all directions"},
            {"B": 5, "T": 1, "V": 11, "C": 40, "single": True, "why": "one position of each sequence"},
            {"B": 2, "T": 60, "V": 2, "C": 300, "why": "many tiles of one token, several tiles of columns"},
        ),
        space={
            "B": range(1, 6),
            "T": range(1, 50),
            "V": range(1, 40),
            "C": range(1, 400),
            "wide": (False, True),
        },
        bench_cases=tuple({"B": 64, "T": 1024, "V": 50257, "C": C, "wide": True} for C in (768, 1600)),
        bytes_moved=_bytes_moved,
    )
)
