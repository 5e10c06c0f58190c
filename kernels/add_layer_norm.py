"""Dropout, residual add and LayerNorm in one pass, forward and backward: the step between two sub-layers.

    z_mn = keep_mn / (1 - dropout_p)         h = residual + z (x + c)
    y = layer_norm(h) as in layer_norm.py, with its mean and rstd

    dresidual = dh + d layer_norm(dy)        dx = z dresidual
    dw = sum_m dy * hhat                     db = sum_m dy           dc = sum_m dx

x, residual, h, y, and the gradients of each: (M, N) in one dtype; w, b, c: (N,) in any; all arithmetic in float32. The
statistics are those of h as it is stored, so y is bit for bit layer_norm(h). c is the bias of the linear layer that
made x: added here it is rounded once with the sum, and its gradient needs no pass over dx of its own.
Bytes that must cross memory: forward reads x and residual and writes h and y; backward reads dy, dh and h and writes
dresidual, and dx where there is dropout (without, the two are one tensor).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._dropout import dropout_hash, dropout_threshold, dropout_words, keep_mask, keep_tile, seed_tensor
from ._launch import as_rows, launch
from ._linear import linear
from ._registry import Case, Draw, KernelSpec, register
from ._triton import NAMESPACE, tl, triton
from .layer_norm import (
    backward_options,
    check_affine,
    forward_options,
    layer_norm,
    normalize,
    normalize_gradient,
    tile_ptrs,
    too_wide,
)

STREAM = tl.constexpr(2**31 - 1)  # attention counts its streams, one a head, from 0


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr, residual_ptr,  # (M, N)
    vectors,              # w, b, c: (N,), b and c or None
    outputs,              # h, y: (M, N)  mean, rstd: (M,)
    stride_x, stride_residual, M, N, eps,
    dropout,              # seed: () or None, threshold, z
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    w_ptr, b_ptr, c_ptr = vectors
    h_ptr, y_ptr, mean_ptr, rstd_ptr = outputs
    seed_ptr, threshold, z = dropout
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    residual_ptrs = tile_ptrs(residual_ptr, stride_residual, offs_m, offs_n)
    x_ptrs = tile_ptrs(x_ptr, stride_x, offs_m, offs_n)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)  # like x
    w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)  # (BLOCK_N,)

    if c_ptr is not None:
        x += tl.load(c_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if seed_ptr is not None:
        s0, s1 = dropout_words(tl.load(seed_ptr), STREAM)
        row_hash = dropout_hash(s0, offs_m.to(tl.int32))
        col_hash = dropout_hash(s1, offs_n.to(tl.int32))
        x = tl.where(keep_tile(row_hash[:, None], col_hash[None, :], threshold), x * z, 0.0)
    h = (residual + x).to(h_ptr.dtype.element_ty)
    hhat, mean, rstd = normalize(h.to(tl.float32), mask_n, N, eps)
    y = hhat * w[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    tl.store(h_ptr + offs_m[:, None] * N + offs_n[None, :], h, mask=mask)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def _add_layer_norm_bwd_kernel(
    incoming,             # dy, dh: (M, N)
    saved,                # h: (M, N)  w: (N,)  mean, rstd: (M,)
    gradients,            # dresidual, dx: (M, N)  sums: (programs, SUMS, N) float32, of dw, db and dc
    stride_dy, stride_dh, M, N,
    dropout,              # seed: () or None, threshold, z
    SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    dy_ptr, dh_ptr = incoming
    h_ptr, w_ptr, mean_ptr, rstd_ptr = saved
    dresidual_ptr, dx_ptr, sums_ptr = gradients
    seed_ptr, threshold, z = dropout
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    if seed_ptr is not None:
        s0, s1 = dropout_words(tl.load(seed_ptr), STREAM)
        col_hash = dropout_hash(s1, offs_n.to(tl.int32))
    dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    dc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Row tiles in steps of the grid: a fixed number of programs bounds the partial sums, and their order is fixed.
    offs_m = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    for _ in tl.range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        dense = offs_m[:, None] * N + offs_n[None, :]  # h, dresidual and dx are ours: contiguous
        dy_ptrs = tile_ptrs(dy_ptr, stride_dy, offs_m, offs_n)
        dh_ptrs = tile_ptrs(dh_ptr, stride_dh, offs_m, offs_n)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
        dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)  # like dy, as are h and dresidual
        h = tl.load(h_ptr + dense, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)  # from L1 each time: registers are short
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)  # (BLOCK_M,), as is rstd
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)

        dresidual, hhat = normalize_gradient(dy, h, w, mean, rstd, mask, N)
        dresidual += dh
        tl.store(dresidual_ptr + dense, dresidual.to(dresidual_ptr.dtype.element_ty), mask=mask)
        dx = dresidual
        if seed_ptr is not None:
            row_hash = dropout_hash(s0, offs_m.to(tl.int32))
            keep = keep_tile(row_hash[:, None], col_hash[None, :], threshold)
            dx = tl.where(keep, dresidual * z, 0.0)
            tl.store(dx_ptr + dense, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if SUMS:
            dw += dy * hhat
            db += dy
        if SUMS == 3:
            dc += dx
        offs_m += tl.num_programs(0) * BLOCK_M
    if SUMS:
        sums_ptrs = sums_ptr + pid.to(tl.int64) * SUMS * N + offs_n
        tl.store(sums_ptrs, tl.sum(dw, 0), mask=mask_n)
        tl.store(sums_ptrs + N, tl.sum(db, 0), mask=mask_n)
        if SUMS == 3:
            tl.store(sums_ptrs + 2 * N, tl.sum(dc, 0), mask=mask_n)


@torch.library.custom_op(f"{NAMESPACE}::add_layer_norm_fwd", mutates_args=())
def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, x_bias: Tensor | None, seed: Tensor | None,
    eps: float, dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x, residual: (..., N) any strides -> y, h: (..., N) contiguous x.dtype; mean, rstd: (M,) float32."""
    rows, residual_rows = as_rows(x), as_rows(residual)
    M, N = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    h = torch.empty_like(y)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    options = forward_options("add_layer_norm_fwd", rows)
    launch(
        _add_layer_norm_fwd_kernel, (triton.cdiv(M, options["BLOCK_M"]),),
        rows,                                                                   # (M, N)
        residual_rows,                                                          # (M, N)
        tuple(None if t is None else t.contiguous() for t in (weight, bias, x_bias)),  # (N,) each
        (h, y, mean, rstd),                                                     # (M, N) twice, (M,) twice
        rows.stride(), residual_rows.stride(), M, N, eps,
        (seed, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)),          # seed: ()
        **options,
    )  # fmt: skip
    return y, h, mean, rstd


@add_layer_norm_fwd.register_fake
def _(x, residual, weight, bias, x_bias, seed, eps, dropout_p):
    M = x.shape[:-1].numel()
    y, h = (x.new_empty(x.shape) for _ in range(2))
    return y, h, *(x.new_empty(M, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op(f"{NAMESPACE}::add_layer_norm_bwd", mutates_args=())
def add_layer_norm_bwd(
    dy: Tensor, dh: Tensor, h: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor,
    seed: Tensor | None, dropout_p: float, n_sums: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dy, dh: (..., N) any strides -> dresidual: (..., N) contiguous; dx: alike, or (0,) if no dropout; sums:
    (n_sums, N) float32, dw, db and dc, or the first two, or none.
    """
    dy_rows, dh_rows = as_rows(dy), as_rows(dh)
    M, N = dy_rows.shape
    dresidual = torch.empty(h.shape, dtype=h.dtype, device=h.device)
    dx = torch.empty(h.shape if seed is not None else (0,), dtype=h.dtype, device=h.device)
    programs, options = backward_options("add_layer_norm_bwd", dy_rows, per_thread=8, programs_per_sm=2)
    sums = torch.empty((programs, n_sums, N), dtype=torch.float32, device=h.device)
    launch(
        _add_layer_norm_bwd_kernel, (programs,),
        (dy_rows, dh_rows),                                             # (M, N) twice
        (h, weight.contiguous(), mean, rstd),                           # (M, N), (N,), (M,), (M,)
        (dresidual, dx, sums),                                          # (M, N) twice, (programs, n_sums, N)
        dy_rows.stride(), dh_rows.stride(), M, N,
        (seed, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)),  # seed: ()
        SUMS=n_sums, **options,
    )  # fmt: skip
    return dresidual, dx, sums.sum(0)


@add_layer_norm_bwd.register_fake
def _(dy, dh, h, weight, mean, rstd, seed, dropout_p, n_sums):
    sums = weight.new_empty((n_sums, *weight.shape), dtype=torch.float32)
    return h.new_empty(h.shape), h.new_empty(h.shape if seed is not None else (0,)), sums


def _setup_context(ctx, inputs, output):
    _, _, weight, bias, x_bias, seed, _, ctx.dropout_p = inputs
    _, h, mean, rstd = output
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(h, weight, mean, rstd, seed)
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias, x_bias)]


def _backward(ctx, dy, dh, _dmean, _drstd):
    h, weight, mean, rstd, seed = ctx.saved_tensors
    # Only one of them is used at the ends of a model: a row of zeros stands for the other.
    dy, dh = (h.new_zeros(1, h.shape[-1]).expand_as(h) if g is None else g for g in (dy, dh))
    need = ctx.needs_input_grad[2:5]
    n_sums = 0 if not any(need) else 2 if ctx.dtypes[2] is None else 3
    dresidual, dx, sums = add_layer_norm_bwd(dy, dh, h, weight, mean, rstd, seed, ctx.dropout_p, n_sums)
    dvectors = (sums[i].to(ctx.dtypes[i]) if needed else None for i, needed in enumerate(need))
    return dresidual if seed is None else dx, dresidual, *dvectors, None, None, None


add_layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def residual_dropout_mask(
    shape: tuple[int, ...], dropout_p: float, seed: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask that add_layer_norm applies to an x of this shape under a seed: bool, True where an element is kept."""
    stream = torch.full((), STREAM.value, device=device)  # by a kernel: torch.tensor would copy from the host's memory
    rows = torch.Size(shape[:-1]).numel()
    return keep_mask(seed_tensor(seed, stream.device), dropout_p, rows, shape[-1], stream).view(shape)


def _runs_triton(x: Tensor, x_bias: Tensor | None, dropout_p: float) -> bool:
    options = {"dropout_p": dropout_p, "x_bias": x_bias is not None}
    return use_triton("add_layer_norm", x, too_wide(x), N=x.shape[-1], **options)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h = residual + dropout(x + x_bias); returns (layer_norm(h), h). Pre-LayerNorm blocks (Xiong et al. 2020) chain
    on it.

    x, residual: (..., N), one shape and dtype, any strides, float32/float16/bfloat16; weight, bias, x_bias: (N,), any
    floating dtype -> two (..., N) in x.dtype. dropout_p in [0, 1). A seed (int or () int64 tensor) fixes the mask, the
    same one on every backend; `residual_dropout_mask` shows it. Without a seed the mask follows torch.manual_seed.
    ValueError if shapes or dtypes do not fit or dropout_p is out of range.
    """
    if x.shape != residual.shape or x.dtype != residual.dtype:
        raise ValueError(
            f"add_layer_norm: x and residual must be alike, got {x.dtype} {tuple(x.shape)} and "
            f"{residual.dtype} {tuple(residual.shape)}"
        )
    check_affine("add_layer_norm", x, weight, bias)
    if x_bias is not None and x_bias.shape != weight.shape:
        raise ValueError(f"add_layer_norm: x_bias must be {tuple(weight.shape)}, got {tuple(x_bias.shape)}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"add_layer_norm: dropout_p must be in [0, 1), got {dropout_p}")
    if _runs_triton(x, x_bias, dropout_p):
        seed = seed_tensor(seed, x.device) if dropout_p else None
        return add_layer_norm_fwd(x, residual, weight, bias, x_bias, seed, eps, dropout_p)[:2]
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if dropout_p and seed is not None:
        keep = residual_dropout_mask(x.shape, dropout_p, seed, x.device)
        x = torch.where(keep, x, 0.0) / (1.0 - dropout_p)
    else:
        x = F.dropout(x, dropout_p)
    h = residual + x
    return layer_norm(h, weight, bias, eps), h


def linear_add_layer_norm(
    x: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    working: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """add_layer_norm of x @ linear_weight.T + linear_bias, which is added where it costs least: in our kernel, or in
    PyTorch's product.

    x: (..., K), linear_weight: (N, K), linear_bias: (N,), both any floating dtype; working: as in `linear`; the rest
    as in add_layer_norm.
    """
    if _runs_triton(residual, linear_bias, dropout_p):
        y, x_bias = linear(x, linear_weight, None, working), linear_bias
    else:
        y, x_bias = linear(x, linear_weight, linear_bias, working), None
    return add_layer_norm(y, residual, weight, bias, eps, x_bias=x_bias, dropout_p=dropout_p, seed=seed)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    M, N = case["M"], case["N"]
    inputs: dict[str, Any] = {
        "x": draw.normal(M, N) + 0.5, "residual": draw.normal(M, N) * 2, "weight": draw.normal(N) + 1,
        "bias": draw.normal(N) if case.get("bias", True) else None,
        "x_bias": draw.normal(N) if case.get("x_bias") else None,
    }  # fmt: skip
    if case.get("dropout_p"):
        inputs |= {"dropout_p": case["dropout_p"], "seed": 0x1234_5678_9ABC}
    return inputs


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    pass_bytes = case["M"] * case["N"] * dtype.itemsize
    return 4 * pass_bytes, (5 if case.get("dropout_p") else 4) * pass_bytes


SPEC = register(
    KernelSpec(
        name="add_layer_norm",
        fn=add_layer_norm,
        make_inputs=_make_inputs,
        outputs=("y", "h"),
        grads=("x", "residual", "weight", "bias", "x_bias"),
        cases=(
            {"M": 17, "N": 768, "dropout_p": 0.5, "x_bias": True, "why": "GPT-2's width, dropout, a bias of x"},
            {"M": 1, "N": 1, "why": "one element: the variance is zero"},
            {"M": 5, "N": 33, "dropout_p": 0.5, "why": "ragged in both directions"},
            {"M": 67, "N": 64, "x_bias": True, "why": "full width, several tiles a program, a bias of x"},
            {"M": 9, "N": 1023, "bias": False, "why": "one masked lane, no bias"},
            {"M": 3, "N": 4000, "why": "one row a tile, many warps"},
        ),
        space={
            "M": range(80),
            "N": range(1, 1200),
            "bias": (True, False),
            "dropout_p": (0.0, 0.3),
            "x_bias": (True, False),
        },
        bench_cases=(
            *({"M": 65536 * 768 // N, "N": N} for N in (768, 1024, 1280, 1600)),
            *({"M": 65536 * 768 // N, "N": N, "x_bias": True} for N in (768, 1600)),
        ),
        bytes_moved=_bytes_moved,
    )
)
