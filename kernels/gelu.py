"""Bias + GELU (Hendrycks and Gimpel 2016, arXiv 1606.08415), forward and backward in one pass each.

    h = x + b
    "tanh":  u = sqrt(2/pi) (h + 0.044715 h^3)    s = sigmoid(2u) = (1 + tanh u) / 2
             y = h s                              dy/dh = s + 2 h s (1 - s) sqrt(2/pi) (1 + 3 * 0.044715 h^2)
    "none":  s = Phi(h) = (1 + erf(h / sqrt 2)) / 2
             y = h s                              dy/dh = s + h phi(h),   phi(h) = exp(-h^2 / 2) / sqrt(2 pi)

    dx = dy * dy/dh           db = sum_m dx

x, y, dy, dx: (M, N) in one dtype; b: (N,) in any; all arithmetic in float32.
Bytes that must cross memory: forward reads x and writes y; backward reads x and dy and writes dx. The backward works
from x, so the sum x + b is never stored; the bias gradient falls out of the pass that dx takes anyway.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._launch import as_rows, launch, sm_count
from ._linear import linear
from ._registry import Case, Draw, KernelSpec, register
from ._tables import choose
from ._triton import NAMESPACE, tl, triton
from .layer_norm import tile_ptrs

APPROXIMATIONS = ("tanh", "none")
# 256 columns make every access of a row whole 128-byte lines; 16 elements a thread.
_TILE = {"BLOCK_M": 16, "BLOCK_N": 256, "num_warps": 8}
_TILES = {"BLOCK_M": (8, 16), "BLOCK_N": (256, 512), "num_warps": (4, 8)}
# programs: of the backward kernel on a multiprocessor. In 16 bits its 80 registers a thread leave room for three at a
# time: as many begin, and they end together.
_BACKWARD, _BACKWARDS = {**_TILE, "programs": 3}, {**_TILES, "programs": (2, 3, 4, 6)}


@triton.jit
def _exp_minus_2u(h):
    """exp(-2u), as exp2: one instruction on the GPU."""
    return tl.exp2(-2.302208198144325 * (h + 0.044715 * h * h * h))


@triton.jit
def _gelu(h, TANH: tl.constexpr):
    """h * s."""
    if TANH:
        return h / (1.0 + _exp_minus_2u(h))
    return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def _gelu_gradient(h, TANH: tl.constexpr):
    """d(h * s) / dh."""
    if TANH:
        e = _exp_minus_2u(h)
        s = 1.0 / (1.0 + e)
        # 1 - s without cancellation: ten times less error than the difference where s is close to 1
        r = tl.where(h > 0, e * s, 1.0 - s)
        return s + h * s * r * (1.5957691216057308 + 0.2140644488 * h * h)
    return 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * h * h)


@triton.jit
def _bias_gelu_fwd_kernel(
    x_ptr, b_ptr, y_ptr, stride_x, M, N,  # x, y: (M, N)  b: (N,) or None
    TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_ptrs = tile_ptrs(x_ptr, stride_x, offs_m, offs_n)
    h = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N)
    if b_ptr is not None:
        h += tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    y = _gelu(h, TANH)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _bias_gelu_bwd_kernel(
    dy_ptr, x_ptr, b_ptr, dx_ptr, db_ptr,  # dy, x, dx: (M, N)  b: (N,) or None  db: (programs, N) float32 sums or None
    stride_dy, stride_x, M, N, TANH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    if b_ptr is not None:
        b = tl.load(b_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    db = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # Row tiles in steps of the grid: a fixed number of programs bounds the partial sums, and their order is fixed.
    offs_m = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    for _ in range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        x_ptrs = tile_ptrs(x_ptr, stride_x, offs_m, offs_n)
        dy_ptrs = tile_ptrs(dy_ptr, stride_dy, offs_m, offs_n)
        h = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_N), as are dy and dx
        dy = tl.load(dy_ptrs, mask=mask, other=0.0).to(tl.float32)  # 0 past M: such rows add nothing to db
        if b_ptr is not None:
            h += b[None, :]
        dx = dy * _gelu_gradient(h, TANH)
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if db_ptr is not None:
            db += dx
        offs_m += tl.num_programs(0) * BLOCK_M
    if db_ptr is not None:
        tl.store(db_ptr + pid.to(tl.int64) * N + offs_n, tl.sum(db, 0), mask=mask_n)


@torch.library.custom_op(f"{NAMESPACE}::bias_gelu_fwd", mutates_args=())
def bias_gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """x: (..., N) any strides -> y: (..., N) contiguous x.dtype."""
    rows = as_rows(x)
    M, N = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    options = choose("bias_gelu_fwd", _TILE, _TILES, x.device, dtype=x.dtype, N=N, approximate=approximate)
    launch(
        _bias_gelu_fwd_kernel, (triton.cdiv(M, options["BLOCK_M"]), triton.cdiv(N, options["BLOCK_N"])),
        rows,                                           # (M, N)
        None if bias is None else bias.contiguous(),    # (N,)
        y,                                              # (M, N)
        rows.stride(), M, N, TANH=approximate == "tanh", **options,
    )  # fmt: skip
    return y


@bias_gelu_fwd.register_fake
def _(x, bias, approximate):
    return x.new_empty(x.shape)


@torch.library.custom_op(f"{NAMESPACE}::bias_gelu_bwd", mutates_args=())
def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str, need_db: bool) -> tuple[Tensor, Tensor]:
    """dy, x: (..., N) any strides -> dx: (..., N) contiguous x.dtype, db: (N,) float32, (0,) if unneeded."""
    rows, dy_rows = as_rows(x), as_rows(dy)
    M, N = rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    key = {"dtype": x.dtype, "N": N, "approximate": approximate, "bias": need_db}
    options = {**choose("bias_gelu_bwd", _BACKWARD, _BACKWARDS, x.device, **key)}
    columns = triton.cdiv(N, options["BLOCK_N"])
    resident = options.pop("programs") * sm_count(x.device)
    programs = min(triton.cdiv(M, options["BLOCK_M"]), max(1, resident // max(1, columns)))
    db = torch.empty((programs, N if need_db else 0), dtype=torch.float32, device=x.device)
    launch(
        _bias_gelu_bwd_kernel, (programs, columns),
        dy_rows,                                        # (M, N)
        rows,                                           # (M, N)
        None if bias is None else bias.contiguous(),    # (N,)
        dx,                                             # (M, N)
        db if need_db else None,                        # (programs, N)
        dy_rows.stride(), rows.stride(), M, N, TANH=approximate == "tanh", **options,
    )  # fmt: skip
    return dx, db.sum(0)


@bias_gelu_bwd.register_fake
def _(dy, x, bias, approximate, need_db):
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if need_db else 0, dtype=torch.float32)


def _setup_context(ctx, inputs, output):
    x, bias, approximate = inputs
    ctx.save_for_backward(x, bias)
    ctx.approximate = approximate


def _backward(ctx, dy):
    x, bias = ctx.saved_tensors
    need_db = ctx.needs_input_grad[1]
    dx, db = bias_gelu_bwd(dy, x, bias, ctx.approximate, need_db)
    return dx, db.to(bias.dtype) if need_db else None, None


bias_gelu_fwd.register_autograd(_backward, setup_context=_setup_context)


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "tanh") -> Tensor:
    """y = gelu(x + bias). GPT-2 uses approximate="tanh" ("gelu_new"); "none" is the exact form with erf.

    x: (..., N), any strides, float32/float16/bfloat16; bias: (N,), any floating dtype -> y: (..., N) in x.dtype.
    ValueError for another approximation or a bias that is not (N,).
    """
    if approximate not in APPROXIMATIONS:
        raise ValueError(f'bias_gelu: approximate is "tanh" or "none", got {approximate!r}')
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias_gelu: x {tuple(x.shape)} needs a bias of ({x.shape[-1]},), got {tuple(bias.shape)}")
    if use_triton("bias_gelu", x, N=x.shape[-1], bias=bias is not None, approximate=approximate):
        return bias_gelu_fwd(x, bias, approximate)
    return F.gelu(x if bias is None else x + bias.to(x.dtype), approximate=approximate)


def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, approximate: str = "tanh", working: Tensor | None = None
) -> Tensor:
    """y = gelu(x @ weight.T + bias), the bias added where it costs least: in our GELU, or in PyTorch's product.

    x: (..., C), weight: (N, C), bias: (N,), both any floating dtype -> y: (..., N) in x.dtype. working: as in `linear`.
    """
    if use_triton("bias_gelu", x, N=weight.shape[0], bias=bias is not None, approximate=approximate):
        return bias_gelu(linear(x, weight, None, working), bias, approximate)
    return F.gelu(linear(x, weight, bias, working), approximate=approximate)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    M, N = case["M"], case["N"]
    x = draw.normal(M, N) * 2
    bias = draw.normal(N) if case.get("bias", True) else None
    return {"x": x, "bias": bias, "approximate": case.get("approximate", "tanh")}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    pass_bytes = case["M"] * case["N"] * dtype.itemsize
    return 2 * pass_bytes, 3 * pass_bytes


SPEC = register(
    KernelSpec(
        name="bias_gelu",
        fn=bias_gelu,
        make_inputs=_make_inputs,
        grads=("x", "bias"),
        cases=(
            {"M": 17, "N": 3072, "why": "GPT-2's width, several column tiles"},
            {"M": 1, "N": 1, "why": "one element"},
            {"M": 5, "N": 33, "why": "ragged in both directions"},
            {"M": 5, "N": 33, "approximate": "none", "why": "ragged, exact form"},
            {"M": 83, "N": 256, "why": "full width, several tiles a program"},
            {"M": 17, "N": 1023, "approximate": "none", "bias": False, "why": "exact form, no bias, one masked lane"},
        ),
        space={"M": range(80), "N": range(1, 700), "approximate": APPROXIMATIONS, "bias": (True, False)},
        bench_cases=tuple({"M": 65536 * 768 // C, "N": 4 * C} for C in (768, 1024, 1280, 1600)),
        bytes_moved=_bytes_moved,
    )
)
