"""The last product of a language model and its cross-entropy, without the (M, V) logits in memory.

    x_iv = sum_c h_ic w_vc              loss, m, l, p and count of the logits x as in cross_entropy.py
    g_iv = p_iv - [v = t_i], 0 in ignored rows
    dh = dloss / count * (g w)          dw = dloss / count * (g^T h)

h and w are the function's x and weight. Rows go in chunks: a product writes the chunk's logits into a scratch buffer, a
kernel computes the loss from them and overwrites them with g, two products turn g into the gradients. The gradients are
ready when the forward pass ends (the idea of Liger-Kernel, arXiv 2410.10989); the backward pass only scales them. g has
no factor 1 / count: in float16 most of it would be zero. On a CPU PyTorch's operators take the kernel's place in the
same loop, except in float64: a chunk of logits stays in the cache.

h: (M, C), its products in its dtype; w: (V, C) any floating dtype; t: (M,) int64; sums over chunks (dw) in float32.
Work: 2MCV forward and 4MCV for both gradients. Bytes that must cross memory: h and w, and dh and dw.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import TRITON_DTYPES, use_triton
from ._launch import launch, recording
from ._registry import Case, Draw, KernelSpec, register
from ._triton import NAMESPACE, tl, triton
from .cross_entropy import (
    PADDING,
    check_targets,
    cross_entropy_eager,
    draw_targets,
    lanes,
    rows_backward,
    rows_forward,
    target_count,
    tile,
)

SCRATCH_BYTES = 2**30  # of logits at once on a GPU: thousands of rows, enough for products at full speed
_SCALE_BLOCK = 4096


@triton.jit
def _loss_kernel(
    x_ptr, t_ptr, loss_ptr,  # x: (M, V) in rows of stride_xm elements, overwritten with g  t, loss: (M,)
    stride_xm, M, V, ignore_index, GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    x_ptrs = x_ptr + offs_m * stride_xm
    # Masks at the end of the padded row, a multiple of 64, leave loads and stores 16 bytes wide; V need not be even.
    loss, m_i, l_i, t = rows_forward(
        x_ptrs, t_ptr + offs_m, 1, mask_m, V, stride_xm, ignore_index, BLOCK_M, BLOCK_V, LANES, WIDE
    )
    tl.store(loss_ptr + offs_m, loss, mask=mask_m)
    if GRADIENT:
        rows_backward(x_ptrs, x_ptrs, t, m_i, l_i, 1.0, 1, mask_m, (V, stride_xm), ignore_index, True, BLOCK_V)


@triton.jit
def _scale_kernel(scale_ptr, g_ptr, y_ptr, N, BLOCK_N: tl.constexpr):  # g, y: N elements  scale: () float32
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.load(g_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(y_ptr + offs_n, y.to(y_ptr.dtype.element_ty), mask=offs_n < N)


def chunk_rows(M: int, row_bytes: int, device: torch.device) -> int:
    """Rows of logits at a time: a multiple of 64, chunks of about one size, as few as fit (128 rows always do).

    It depends on the device's total memory and not on what is free: chunks are the order of a float32 sum, and the bits
    of a gradient must not depend on what else runs.
    """
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    most = max(128, min(SCRATCH_BYTES, total // 64) // row_bytes // 64 * 64)
    chunks = max(1, triton.cdiv(M, most))
    return max(1, triton.cdiv(M, 64 * chunks)) * 64


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, beta: float | None = None) -> None:
    """out = a @ b; with a beta, out = beta * out + a @ b in float32, where 0 does not read out.

    Skipped while launches are only recorded: quick at any width.
    """
    if recording():
        return
    # PyTorch 2.13's float16 product on a CPU is wrong where an offset into an operand is beyond int32.
    a, b = (
        t.contiguous() if sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) >= 2**31 else t
        for t in (a, b)
    )
    if beta is None:
        torch.mm(a, b, out=out)
    elif a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, beta=beta, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float(), beta=beta)


def _with_rows(weight: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """weight: (V, C) -> (rows, C) contiguous in dtype, zeros from V on; without a copy where it is that."""
    if rows == weight.shape[0]:
        return weight.to(dtype)
    w = torch.empty((rows, weight.shape[1]), dtype=dtype, device=weight.device)
    w[: weight.shape[0]].copy_(weight)
    w[weight.shape[0] :].zero_()
    return w


def _loss_eager(g: Tensor, targets: Tensor, losses: Tensor, ignore_index: int, gradient: bool) -> None:
    """What `_loss_kernel` does, by PyTorch: g: (m, V) logits, overwritten with their gradient; losses: (m,)."""
    log_p = torch.log_softmax(g, 1, dtype=torch.float32)
    losses.copy_(F.nll_loss(log_p, targets, ignore_index=ignore_index, reduction="none"))
    if gradient:
        is_counted = (targets != ignore_index)[:, None]
        t = targets[:, None].where(is_counted, 0)
        p = log_p.exp_()
        torch.mul(p.scatter_add_(1, t, p.new_full(t.shape, -1.0)), is_counted, out=g)


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_fwd", mutates_args=())
def linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, need_dx: bool, need_dw: bool, eager: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (M, C), weight: (V, C), targets: (M,) -> loss: () float32; the gradients for dloss = count, (0,) if unneeded:
    dx: (M, C) contiguous x.dtype, dw: (V, C) float32. eager: by PyTorch's operators in place of the kernel.
    """
    (M, C), V = x.shape, weight.shape[0]
    # 50,257 columns are odd, and fast products need rows that are multiples of 16 bytes long: the kernel's have zeros
    # from V on, in w, g and dw.
    V_ROW = V if eager else triton.cdiv(V, PADDING.value) * PADDING.value
    w, targets = _with_rows(weight, V_ROW, x.dtype), targets.contiguous()
    dx = torch.empty((M, C) if need_dx else 0, dtype=x.dtype, device=x.device)
    dw = (torch.empty if M else torch.zeros)((V_ROW, C) if need_dw else 0, dtype=torch.float32, device=x.device)
    losses = torch.empty(M, dtype=torch.float32, device=x.device)
    rows = chunk_rows(M, V_ROW * x.element_size(), x.device)
    scratch = torch.empty((min(rows, M), V_ROW), dtype=x.dtype, device=x.device)
    options = {} if eager else tile("loss", scratch[:, :V])
    for start in range(0, M, rows):
        chunk = slice(start, min(start + rows, M))
        m = chunk.stop - start
        g = scratch[:m]
        _multiply(x[chunk], w.T, g)
        if eager:
            _loss_eager(g, targets[chunk], losses[chunk], ignore_index, need_dx or need_dw)
        else:
            launch(
                _loss_kernel, (triton.cdiv(m, options["BLOCK_M"]),),
                g,                  # (m, V_ROW)
                targets[chunk],     # (m,)
                losses[chunk],      # (m,)
                V_ROW, m, V, ignore_index,
                GRADIENT=need_dx or need_dw, **options, **lanes(scratch, options),
            )  # fmt: skip
        if need_dx:
            _multiply(g, w, dx[chunk])
        if need_dw:
            _multiply(g.T, x[chunk], dw, beta=float(start > 0))
    return losses.sum() / target_count(targets, ignore_index), dx, dw[:V]


@linear_cross_entropy_fwd.register_fake
def _(x, weight, targets, ignore_index, need_dx, need_dw, eager=False):
    dx = x.new_empty(x.shape if need_dx else 0)
    dw = x.new_empty(weight.shape if need_dw else 0, dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dw


@torch.library.custom_op(f"{NAMESPACE}::linear_cross_entropy_bwd", mutates_args=())
def linear_cross_entropy_bwd(
    dloss: Tensor, targets: Tensor, ignore_index: int, dx: Tensor, dw: Tensor, eager: bool = False
) -> tuple[Tensor, Tensor]:
    """dloss: (); dx, dw: of the forward, as they are (0,) or not -> the same, times dloss / count."""
    # Without a target the gradients are zero, and stay so.
    scale = dloss / target_count(targets, ignore_index).clamp(min=1)
    if eager:
        return (dx.float() * scale).to(dx.dtype), dw * scale
    scaled = torch.empty_like(dx), torch.empty_like(dw)
    for g, y in zip((dx, dw), scaled, strict=True):
        # One pass in float32: PyTorch would round the factor to dx.dtype first, where float16 has no 1 / 65536.
        launch(
            _scale_kernel, (triton.cdiv(g.numel(), _SCALE_BLOCK),),
            scale,              # ()
            g,                  # (M, C) or (V, C)
            y,                  # like g
            g.numel(),
            BLOCK_N=_SCALE_BLOCK, num_warps=8,
        )  # fmt: skip
    return scaled


@linear_cross_entropy_bwd.register_fake
def _(dloss, targets, ignore_index, dx, dw, eager=False):
    return torch.empty_like(dx), torch.empty_like(dw)


def _setup_context(ctx, inputs, output):
    _, weight, targets, ctx.ignore_index, ctx.need_dx, ctx.need_dw, ctx.eager = inputs
    _, dx, dw = output
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(dx, dw)
    ctx.save_for_backward(targets, dx, dw)
    ctx.weight_dtype = weight.dtype


def _backward(ctx, dloss, _ddx, _ddw):
    targets, dx, dw = ctx.saved_tensors
    dx, dw = linear_cross_entropy_bwd(dloss, targets, ctx.ignore_index, dx, dw, ctx.eager)
    gradients = dx if ctx.need_dx else None, dw.to(ctx.weight_dtype) if ctx.need_dw else None
    return *gradients, None, None, None, None, None


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


def lm_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: (..., C), (V, C) any floating dtype -> (..., V) in x.dtype; it may be a view of wider rows."""
    weight, (V, C) = weight.to(x.dtype), weight.shape
    if not x.is_cuda or x.numel() < 512 * C:
        return F.linear(x, weight)  # no gain on a CPU; for a few rows the padded copy costs more than the product
    # Rows of zeros up to a multiple of 128: 50,257 columns are odd, and the tensor cores' fast tiles need aligned rows
    # of logits. The crop keeps the padding out of the softmax.
    return F.linear(x, F.pad(weight, (0, 0, 0, -V % 128)))[..., :V]


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """cross_entropy(x @ weight.T, targets, ignore_index) with a bounded part of the logits in memory at a time.

    x: (M, C), any strides, float32/float16/bfloat16, the dtype of the products; weight: (V, C), V >= 1, any floating
    dtype; targets: (M,) int64 -> () float32. Targets as in `cross_entropy`: ignored rows, NaN for what is no class.
    The kernel's gradients are computed in the forward pass, where they are asked for: a loss whose backward pass is not
    run belongs under torch.no_grad().
    ValueError if a shape or the targets' dtype does not fit.
    """
    if x.ndim != 2 or weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"linear_cross_entropy: x must be (M, C) and weight (V, C) with V >= 1, "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    check_targets("linear_cross_entropy", x, targets)
    eager = not use_triton("linear_cross_entropy", x, C=x.shape[1], V=weight.shape[0])
    if not eager or (x.device.type == "cpu" and x.dtype in TRITON_DTYPES):  # chunks that stay in a CPU's cache
        need_dx, need_dw = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
        return linear_cross_entropy_fwd(x, weight, targets, ignore_index, need_dx, need_dw, eager)[0]
    return _whole(x, weight, targets, ignore_index)


def _whole(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """The same by PyTorch alone, with all logits in memory."""
    return cross_entropy_eager(lm_logits(x, weight), targets, ignore_index)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    weight = draw.normal(case["V"], case["C"]) * (2 * case["C"] ** -0.5)  # logits of about 2
    return {"x": draw.normal(case["M"], case["C"]), "weight": weight, "targets": draw_targets(case, draw)}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    forward = (case["M"] + case["V"]) * case["C"] * dtype.itemsize
    return forward, 2 * forward


def _flops(case: Case) -> tuple[int, int]:
    product = 2 * case["M"] * case["C"] * case["V"]
    return product, 2 * product


SPEC = register(
    KernelSpec(
        name="linear_cross_entropy",
        fn=linear_cross_entropy,
        reference=_whole,
        make_inputs=_make_inputs,
        grads=("x", "weight"),
        outputs=("loss",),
        cases=(
            {"M": 300, "C": 24, "V": 70, "ignored": 0.3, "why": "several chunks on a CPU, a padded row, some ignored"},
            {"M": 5, "C": 1, "V": 1, "why": "one class: loss and gradients are zero"},
            {"M": 3, "C": 33, "V": 17, "why": "ragged in all directions"},
            {"M": 128, "C": 16, "V": 64, "why": "exactly one chunk, no padding"},
            {"M": 7, "C": 8, "V": 9001, "ignored": 0.3, "why": "several tiles a row, the last one ragged"},
        ),
        # M from 1: the mean over no rows is NaN, in eager as here, and no rule compares NaN
        space={"M": range(1, 40), "C": range(1, 100), "V": range(1, 300), "ignored": (0.0, 0.3, 1.0)},
        bench_cases=({"M": 65536, "C": 768, "V": 50304}, {"M": 65536, "C": 768, "V": 50257}),
        bytes_moved=_bytes_moved,
        flops=_flops,
    )
)
