"""LayerNorm over the last dimension (Ba, Kiros, Hinton 2016, arXiv 1607.06450), forward and backward.

    mean = sum_n x / N        rstd = 1 / sqrt(sum_n (x - mean)^2 / N + eps)
    xhat = (x - mean) * rstd                 y = xhat * w + b

    g  = dy * w               dx = rstd * (g - mean_n(g) - xhat * mean_n(g * xhat))
    dw = sum_m dy * xhat      db = sum_m dy

x, y, dy, dx: (M, N) in one dtype; w, b: (N,) in any; mean, rstd: (M,) float32; all arithmetic in float32.
Bytes that must cross memory: forward reads x and writes y; backward reads x and dy and writes dx.
The variance is the mean of squared differences, not E[x^2] - E[x]^2: that one cancels where |mean| >> std.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._launch import as_rows, launch, row_tile, sm_count
from ._registry import Case, Draw, KernelSpec, register
from ._tables import Options, choose
from ._triton import NAMESPACE, tl, triton

MAX_N = 32768  # one row is held in the registers of one program
FORWARD_SPACE = {"BLOCK_M": (1, 2, 4, 8), "num_warps": (4, 8, 16)}
BACKWARD_SPACE = {
    "BLOCK_M": (1, 2, 4), "num_warps": (4, 8, 16), "STAGES": (1, 2, 3), "programs_per_sm": (1, 2, 3, 4, 6),
}  # fmt: skip


def forward_options(kernel: str, x: Tensor) -> Options:
    """Launch table of a forward kernel over rows of x: (..., N)."""
    BLOCK_M, BLOCK_N, num_warps = row_tile(x.shape[-1], elements=4096)
    default = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps}
    return choose(kernel, default, FORWARD_SPACE, x.device, dtype=x.dtype, N=x.shape[-1])


def backward_options(kernel: str, x: Tensor, per_thread: int, programs_per_sm: int) -> tuple[int, Options]:
    """Grid and launch table of a backward kernel over rows of x: (..., N); per_thread as in `row_tile`.

    A fixed number of programs, whatever the rows, bounds the partial sums of the columns.
    """
    BLOCK_M, BLOCK_N, num_warps = row_tile(x.shape[-1], elements=2048, per_thread=per_thread)
    is_small = BLOCK_M * BLOCK_N * x.element_size() <= 8192  # two tiles ahead of up to three inputs: 48 KiB
    default = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "num_warps": num_warps, "STAGES": 3 if is_small else 1}
    default |= {"programs_per_sm": programs_per_sm}
    options = {**choose(kernel, default, BACKWARD_SPACE, x.device, dtype=x.dtype, N=x.shape[-1])}
    most = options.pop("programs_per_sm") * sm_count(x.device)
    return min(triton.cdiv(x.shape[:-1].numel(), options["BLOCK_M"]), most), options


@triton.jit
def tile_ptrs(x_ptr, stride_x, offs_m, offs_n):
    """(BLOCK_M, BLOCK_N) pointers into x: (M, N) with strides stride_x."""
    return x_ptr + offs_m[:, None] * stride_x[0] + offs_n[None, :] * stride_x[1]


@triton.jit
def normalize(x, mask_n, N, eps):
    """xhat, mean and rstd of a tile of rows. x: (BLOCK_M, BLOCK_N) float32, zero where mask_n (BLOCK_N,) is not set."""
    total = tl.sum(x, 1)  # (BLOCK_M,), as are mean and rstd
    mean = total / N
    # A GPU's division is off by 2 ulp, which counts in rows far from 0; its remainder makes it correctly rounded.
    mean += tl.fma(-mean, tl.cast(N, tl.float32), total) / N
    xc = tl.where(mask_n[None, :], x - mean[:, None], 0.0)  # masked lanes would hold -mean
    rstd = 1.0 / tl.sqrt(tl.sum(xc * xc, 1) / N + eps)
    return xc * rstd[:, None], mean, rstd


@triton.jit
def normalize_gradient(dy, x, w, mean, rstd, mask, N):
    """dx and xhat of a tile of rows. dy, x: (BLOCK_M, BLOCK_N) float32, dy zero where mask is not set."""
    xhat = tl.where(mask, (x - mean[:, None]) * rstd[:, None], 0.0)
    g = dy * w[None, :]
    c1 = tl.sum(g, 1) / N  # (BLOCK_M,), as is c2
    c2 = tl.sum(g * xhat, 1) / N
    return (g - c1[:, None] - xhat * c2[:, None]) * rstd[:, None], xhat


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, w_ptr, b_ptr, y_ptr, mean_ptr, rstd_ptr,  # x, y: (M, N)  w, b: (N,), b or None  mean, rstd: (M,)
    stride_x, M, N, eps, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    x_ptrs = tile_ptrs(x_ptr, stride_x, offs_m, offs_n)
    x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)  # (BLOCK_N,)

    xhat, mean, rstd = normalize(x, mask_n, N, eps)
    y = xhat * w[None, :]
    if b_ptr is not None:
        y += tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]

    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, x_ptr, w_ptr,  # dy, x: (M, N)  w: (N,)
    statistics,            # mean, rstd: (M,)
    gradients,             # dx: (M, N)  dw, db: (programs, N) float32 sums, or None
    stride_dy, stride_x, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    mean_ptr, rstd_ptr = statistics
    dx_ptr, dw_ptr, db_ptr = gradients
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N).to(tl.int64)
    mask_n = offs_n < N
    w = tl.load(w_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)  # (BLOCK_N,)
    dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Row tiles in steps of the grid: a fixed number of programs bounds the partial sums, and their order is fixed.
    offs_m = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    for _ in tl.range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        x_ptrs = tile_ptrs(x_ptr, stride_x, offs_m, offs_n)
        dy_ptrs = tile_ptrs(dy_ptr, stride_dy, offs_m, offs_n)
        x = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # like x, as are dx and xhat
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)  # (BLOCK_M,)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)  # 0 -> xhat = 0 on the rows past M

        dx, xhat = normalize_gradient(dy, x, w, mean, rstd, mask, N)
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if dw_ptr is not None:
            dw += dy * xhat
            db += dy
        offs_m += tl.num_programs(0) * BLOCK_M
    if dw_ptr is not None:
        tl.store(dw_ptr + pid.to(tl.int64) * N + offs_n, tl.sum(dw, 0), mask=mask_n)
        tl.store(db_ptr + pid.to(tl.int64) * N + offs_n, tl.sum(db, 0), mask=mask_n)


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_fwd", mutates_args=())
def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x: (..., N) any strides -> y: (..., N) contiguous x.dtype, mean: (M,) float32, rstd: (M,) float32."""
    rows = as_rows(x)
    M, N = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean = torch.empty(M, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    options = forward_options("layer_norm_fwd", rows)
    launch(
        _layer_norm_fwd_kernel, (triton.cdiv(M, options["BLOCK_M"]),),
        rows,                                           # (M, N)
        weight.contiguous(),                            # (N,)
        None if bias is None else bias.contiguous(),    # (N,)
        y,                                              # (M, N)
        mean,                                           # (M,)
        rstd,                                           # (M,)
        rows.stride(), M, N, eps, **options,
    )  # fmt: skip
    return y, mean, rstd


@layer_norm_fwd.register_fake
def _(x, weight, bias, eps):
    M = x.shape[:-1].numel()
    return x.new_empty(x.shape), *(x.new_empty(M, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op(f"{NAMESPACE}::layer_norm_bwd", mutates_args=())
def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, x: (..., N) any strides; mean, rstd: (M,) -> dx: like x, contiguous; dw, db: (N,) float32, or (0,)."""
    rows, dy_rows = as_rows(x), as_rows(dy)
    M, N = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs, options = backward_options("layer_norm_bwd", rows, per_thread=16, programs_per_sm=4)
    dw = torch.empty((programs, N if need_dw else 0), dtype=torch.float32, device=x.device)
    db = torch.empty_like(dw)
    launch(
        _layer_norm_bwd_kernel, (programs,),
        dy_rows,                # (M, N)
        rows,                   # (M, N)
        weight.contiguous(),    # (N,)
        (mean, rstd),           # (M,) each
        (dx, *((dw, db) if need_dw else (None, None))),  # (M, N), (programs, N) twice
        dy_rows.stride(), rows.stride(), M, N, **options,
    )  # fmt: skip
    return dx, dw.sum(0), db.sum(0)


@layer_norm_bwd.register_fake
def _(dy, x, weight, mean, rstd, need_dw):
    dw, db = (weight.new_empty(weight.shape if need_dw else 0, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), dw, db


def _setup_context(ctx, inputs, output):
    x, weight, bias, _ = inputs
    _, mean, rstd = output
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy, _dmean, _drstd):
    x, weight, mean, rstd = ctx.saved_tensors
    need_dw, need_db = ctx.needs_input_grad[1:3]
    dx, dw, db = layer_norm_bwd(dy, x, weight, mean, rstd, need_dw or need_db)
    return dx, dw.to(weight.dtype) if need_dw else None, db.to(ctx.bias_dtype) if need_db else None, None


layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)


def too_wide(x: Tensor) -> str | None:
    """Why rows of x do not fit the kernel, as a message, or None where they do."""
    return f"rows of {x.shape[-1]} are longer than the kernel's {MAX_N}" if x.shape[-1] > MAX_N else None


def check_affine(name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """ValueError, in the name of an operator, if weight or bias is not (N,) for x: (..., N)."""
    if weight.shape != x.shape[-1:] or (bias is not None and bias.shape != weight.shape):
        shapes = f"weight {tuple(weight.shape)}" + ("" if bias is None else f", bias {tuple(bias.shape)}")
        raise ValueError(f"{name}: x {tuple(x.shape)} needs weight and bias of ({x.shape[-1]},), got {shapes}")


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = (x - mean) * rstd * weight + bias over the last dimension.

    x: (..., N), any strides, float32/float16/bfloat16; weight, bias: (N,), any floating dtype -> y: (..., N), x.dtype.
    ValueError if weight or bias is not (N,). Ba et al. 2016, equation 3 and 4.
    """
    check_affine("layer_norm", x, weight, bias)
    if use_triton("layer_norm", x, too_wide(x), N=x.shape[-1], bias=bias is not None):
        return layer_norm_fwd(x, weight, bias, eps)[0]
    # PyTorch's operator wants one dtype
    return F.layer_norm(x, weight.shape, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    N, shape = case["N"], [case[name] for name in "BMN" if name in case]
    x = draw.normal(*shape) * 2 + case.get("mean", 0.5)
    return {"x": x, "weight": draw.normal(N) + 1, "bias": draw.normal(N) if case.get("bias", True) else None}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    pass_bytes = case["M"] * case["N"] * dtype.itemsize
    return 2 * pass_bytes, 3 * pass_bytes


SPEC = register(
    KernelSpec(
        name="layer_norm",
        fn=layer_norm,
        make_inputs=_make_inputs,
        grads=("x", "weight", "bias"),
        cases=(
            {"M": 17, "N": 768, "why": "GPT-2's width"},
            {"M": 1, "N": 1, "why": "one element: the variance is zero"},
            {"M": 5, "N": 33, "why": "ragged in both directions"},
            {"M": 67, "N": 64, "why": "full width, several tiles a program"},
            {"M": 9, "N": 1023, "bias": False, "why": "one masked lane, no bias"},
            {"M": 3, "N": 5000, "why": "one row a tile, many warps"},
            {"B": 2, "M": 3, "N": 20, "mean": 300.0, "why": "three dimensions, a variance that could cancel"},
        ),
        space={"M": range(80), "N": range(1, 1200), "bias": (True, False)},
        bench_cases=tuple({"M": 65536 * 768 // N, "N": N} for N in (768, 1024, 1280, 1600)),
        bytes_moved=_bytes_moved,
    )
)
