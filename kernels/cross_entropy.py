"""Softmax cross-entropy from logits, forward and backward, with no table of probabilities in memory.

    m_i = max_v x_iv        l_i = sum_v exp(x_iv - m_i)        ( lse_i = m_i + log l_i )
    loss_i = m_i - x_it + log l_i   for the target t = t_i,   0 where t_i = ignore_index
    loss = sum_i loss_i / count,    count = #{i: t_i != ignore_index}

    dx_iv = dloss / count * (p_iv - [v = t_i]),    p_iv = exp(x_iv - m_i) / l_i,    0 in ignored rows

Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) over tiles of the row, so rows may have any length. Each
lane j, a thread's share of the tiles, keeps sums of its own, which meet once, after the last tile:

    m_j = max_v x_iv        l_j = sum_v exp(x_iv - m_j)        over the v of lane j
    m_i = max_j m_j         l_i = sum_j l_j exp(m_j - m_i)

m and l are stored separately because their sum loses what is small next to a large m: p would be off by half an ulp of
m. For the same reason exponents are (x - m) log2 e and not the one instruction less of x log2 e - m log2 e.

logits x, dx: (M, V) in one dtype; targets t: (M,) int64; m, l: (M,) float32; all arithmetic in float32.
Bytes that must cross memory: forward reads x; backward reads x and writes dx.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._launch import launch
from ._registry import Case, Draw, KernelSpec, register
from ._tables import Options, choose
from ._triton import NAMESPACE, tl, triton

PADDING = tl.constexpr(64)  # a row in linear_cross_entropy.py is a multiple of so many elements
_SPACE = {"BLOCK_V": (4096, 8192, 16384), "num_warps": (8, 16, 32)}


def tile(kernel: str, x: Tensor) -> Options:
    """Launch options of a kernel over logits x, (M, V): several short rows a program, a long row in several tiles."""
    # A long row gets all threads of a program: of the two rows that a multiprocessor then works at, 26 MB on an H100,
    # L2 still holds what a second pass reads.
    V = x.shape[1]
    BLOCK_V = min(max(PADDING.value, triton.next_power_of_2(V)), 8192)
    BLOCK_M = max(1, 1024 // BLOCK_V)  # larger tiles of short rows at odd strides spill: an address an element
    default = {"BLOCK_M": BLOCK_M, "BLOCK_V": BLOCK_V, "num_warps": min(32, BLOCK_M * BLOCK_V // (32 * 8))}
    return choose(kernel, default, _SPACE if BLOCK_M == 1 else {}, x.device, dtype=x.dtype, V=V, vector=_vector(x))


def lanes(x: Tensor, options: Options) -> Options:
    """A thread's elements of a tile of logits, as Triton lays it out: WIDE neighbours in every LANES * WIDE."""
    if options["BLOCK_M"] > 1:
        return {"LANES": 1, "WIDE": options["BLOCK_V"]}
    LANES = 32 * options["num_warps"]
    return {"LANES": LANES, "WIDE": min(options["BLOCK_V"] // LANES, _vector(x))}


def _vector(x: Tensor) -> int:
    """Elements of a row that are loaded at once: 16 bytes, or one where rows do not begin at such addresses."""
    return 16 // x.element_size() if x.stride(1) == 1 and x.stride(0) % 16 == 0 else 1


@triton.jit
def _exp(x):
    """e^x by exp2, one instruction on the GPU: that of exp takes three more for results that round to 0 in p."""
    return tl.exp2(1.4426950408889634 * x)


@triton.jit
def _logits_tile(x_ptrs, stride_xv, mask_m, start, V_ROW, RAGGED: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_M, BLOCK_V) float32 logits from column `start` on, 0 in masked rows; RAGGED: and from V_ROW on."""
    offs_v = tl.arange(0, BLOCK_V)
    x_ptrs += tl.cast(start, tl.int64) * stride_xv
    mask = mask_m[:, None]
    if RAGGED:
        mask &= (start + offs_v < V_ROW)[None, :]
    return tl.load(x_ptrs[:, None] + offs_v.to(tl.int64)[None, :] * stride_xv, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _online(m_j, l_j, x, WIDE: tl.constexpr):
    """m, l of the lanes, (BLOCK_M, LANES), over one more tile x, (BLOCK_M, BLOCK_V)."""
    LANES: tl.constexpr = m_j.shape[1]
    x = tl.reshape(x, (x.shape[0], x.shape[1] // (LANES * WIDE), LANES, WIDE))
    m_new = tl.maximum(m_j, tl.max(tl.max(x, 3), 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no finite logit yet: exp(-inf - 0) = 0, not NaN
    return m_new, l_j * _exp(m_j - m_safe) + tl.sum(tl.sum(_exp(x - m_safe[:, None, :, None]), 3), 1)


@triton.jit
def _is_class(t, V):
    return (t >= 0) & (t < V)


@triton.jit
def _target_logits(x_ptrs, t, stride_xv, mask_m, V):
    """x_t: (BLOCK_M,) float32, 0 where the target is no class."""
    return tl.load(x_ptrs + t * stride_xv, mask=mask_m & _is_class(t, V), other=0.0).to(tl.float32)


@triton.jit
def rows_forward(
    x_ptrs, t_ptrs, stride_xv, mask_m, V, V_ROW, ignore_index,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """loss, m, l, t of the BLOCK_M rows that begin at x_ptrs. A target that is no class makes loss and l NaN.

    V_ROW >= V: elements of a row that may be read.
    """
    t = tl.load(t_ptrs, mask=mask_m, other=0)  # (BLOCK_M,), as are x_t, m_i, l_i and loss
    ignored = t == ignore_index
    mask_m &= t != ignore_index  # ignored rows are not read: zeros in their place
    x_t = _target_logits(x_ptrs, t, stride_xv, mask_m, V)

    m_j = tl.full((BLOCK_M, LANES), float("-inf"), tl.float32)
    l_j = tl.zeros((BLOCK_M, LANES), dtype=tl.float32)
    last = (V - 1) // BLOCK_V * BLOCK_V  # the one tile that may reach past V
    for start in range(0, last, BLOCK_V):
        x = _logits_tile(x_ptrs, stride_xv, mask_m, start, V_ROW, False, BLOCK_V)  # (BLOCK_M, BLOCK_V)
        m_j, l_j = _online(m_j, l_j, x, WIDE)
    x = _logits_tile(x_ptrs, stride_xv, mask_m, last, V_ROW, True, BLOCK_V)
    x = tl.where((last + tl.arange(0, BLOCK_V) < V)[None, :], x, float("-inf"))
    m_j, l_j = _online(m_j, l_j, x, WIDE)
    m_i = tl.max(m_j, 1)
    l_i = tl.sum(l_j * _exp(m_j - m_i[:, None]), 1)

    l_i = tl.where(_is_class(t, V) | ignored, l_i, float("nan"))
    loss = tl.where(ignored, 0.0, (m_i - x_t) + tl.log(l_i))
    return loss, m_i, l_i, t


@triton.jit
def _gradient_tile(
    x_ptrs, dx_ptrs, m_i, r_i, stride_xv, mask_m, counted, start, V_ROW, RAGGED: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """Writes r exp(x - m) from column `start` on; r = m = x = 0 where a row is not counted."""
    x = _logits_tile(x_ptrs, stride_xv, counted, start, V_ROW, RAGGED, BLOCK_V)  # (BLOCK_M, BLOCK_V), as is dx
    dx = _exp(x - m_i[:, None]) * r_i[:, None]
    offs_v = start + tl.arange(0, BLOCK_V)
    mask = mask_m[:, None]
    if RAGGED:
        mask &= (offs_v < V_ROW)[None, :]
    tl.store(dx_ptrs[:, None] + offs_v[None, :], dx.to(dx_ptrs.dtype.element_ty), mask=mask)


@triton.jit
def rows_backward(
    x_ptrs, dx_ptrs, t, m_i, l_i, scale, stride_xv, mask_m, widths, ignore_index,  # widths: V, V_ROW
    PADDED: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Writes scale * (p - [v = t]), 0 in ignored rows, to the contiguous rows at dx_ptrs, which may be x_ptrs.

    V_ROW: elements of a row that are written: V, or PADDED, up to V + PADDING - 1, with 0 from V on.
    """
    V, V_ROW = widths
    counted = mask_m & (t != ignore_index)
    x_t = _target_logits(x_ptrs, t, stride_xv, counted, V)
    tl.debug_barrier()  # every thread has read what another one may be about to overwrite
    r_i = tl.where(counted, scale / l_i, 0.0)
    last = (V - 1) // BLOCK_V * BLOCK_V
    for start in range(0, last, BLOCK_V):
        _gradient_tile(x_ptrs, dx_ptrs, m_i, r_i, stride_xv, mask_m, counted, start, V_ROW, False, BLOCK_V)
    _gradient_tile(x_ptrs, dx_ptrs, m_i, r_i, stride_xv, mask_m, counted, last, V_ROW, True, BLOCK_V)
    tl.debug_barrier()  # another thread has written the target's element as one of the others; it is written again
    dx_t = _exp(x_t - m_i) * r_i - scale
    tl.store(dx_ptrs + t, dx_t.to(dx_ptrs.dtype.element_ty), mask=counted & _is_class(t, V))
    if PADDED:  # by a store of its own: a mask in the last tile spills registers
        pad = V + tl.arange(0, PADDING)
        tl.store(dx_ptrs[:, None] + pad[None, :], 0.0, mask=mask_m[:, None] & (pad < V_ROW)[None, :])


@triton.jit
def _cross_entropy_fwd_kernel(
    x_ptr, t_ptr, loss_ptr, m_ptr, l_ptr,  # x: (M, V)  t, loss, m, l: (M,)
    shape_x, stride_x, ignore_index,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    M, V = shape_x
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    loss, m_i, l_i, _ = rows_forward(
        x_ptr + offs_m * stride_x[0], t_ptr + offs_m, stride_x[1], mask_m, V, V, ignore_index,
        BLOCK_M, BLOCK_V, LANES, WIDE,
    )  # fmt: skip
    tl.store(loss_ptr + offs_m, loss, mask=mask_m)
    tl.store(m_ptr + offs_m, m_i, mask=mask_m)
    tl.store(l_ptr + offs_m, l_i, mask=mask_m)


@triton.jit
def _cross_entropy_bwd_kernel(
    scale_ptr, x_ptr, t_ptr, m_ptr, l_ptr, dx_ptr,  # x, dx: (M, V)  t, m, l: (M,)  scale: ()
    stride_x, M, V, ignore_index, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    t = tl.load(t_ptr + offs_m, mask=mask_m, other=0)  # (BLOCK_M,), as are m_i and l_i
    m_i = tl.load(m_ptr + offs_m, mask=mask_m, other=0.0)
    l_i = tl.load(l_ptr + offs_m, mask=mask_m, other=1.0)
    rows_backward(
        x_ptr + offs_m * stride_x[0], dx_ptr + offs_m * V, t, m_i, l_i, tl.load(scale_ptr), stride_x[1], mask_m, (V, V),
        ignore_index, False, BLOCK_V,
    )  # fmt: skip


def target_count(targets: Tensor, ignore_index: int) -> Tensor:
    """() int64 on the device: how many targets the mean is over."""
    return (targets != ignore_index).sum()


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_fwd", mutates_args=())
def cross_entropy_fwd(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits: (M, V) any strides; targets: (M,) -> loss: () float32; m, l: (M,) float32."""
    M, V = logits.shape
    losses = torch.empty(M, dtype=torch.float32, device=logits.device)
    m, l = torch.empty_like(losses), torch.empty_like(losses)  # noqa: E741
    options = tile("cross_entropy_fwd", logits)
    launch(
        _cross_entropy_fwd_kernel, (triton.cdiv(M, options["BLOCK_M"]),),
        logits,                 # (M, V)
        targets.contiguous(),   # (M,)
        losses,                 # (M,)
        m,                      # (M,)
        l,                      # (M,)
        (M, V), logits.stride(), ignore_index, **options, **lanes(logits, options),
    )  # fmt: skip
    return losses.sum() / target_count(targets, ignore_index), m, l


@cross_entropy_fwd.register_fake
def _(logits, targets, ignore_index):
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in ((), targets.shape, targets.shape))


@torch.library.custom_op(f"{NAMESPACE}::cross_entropy_bwd", mutates_args=())
def cross_entropy_bwd(
    dloss: Tensor, logits: Tensor, targets: Tensor, m: Tensor, l: Tensor, ignore_index: int  # noqa: E741
) -> Tensor:  # fmt: skip
    """dloss: (); logits: (M, V) any strides; targets, m, l: (M,) -> dlogits: (M, V) contiguous, logits.dtype."""
    M, V = logits.shape
    dlogits = torch.empty((M, V), dtype=logits.dtype, device=logits.device)
    scale = dloss / target_count(targets, ignore_index)
    options = tile("cross_entropy_bwd", logits)
    launch(
        _cross_entropy_bwd_kernel, (triton.cdiv(M, options["BLOCK_M"]),),
        scale,                  # ()
        logits,                 # (M, V)
        targets.contiguous(),   # (M,)
        m,                      # (M,)
        l,                      # (M,)
        dlogits,                # (M, V)
        logits.stride(), M, V, ignore_index, **options,
    )  # fmt: skip
    return dlogits


@cross_entropy_bwd.register_fake
def _(dloss, logits, targets, m, l, ignore_index):  # noqa: E741
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, targets, ctx.ignore_index = inputs
    _, m, l = output  # noqa: E741
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(m, l)
    ctx.save_for_backward(logits, targets, m, l)


def _backward(ctx, dloss, _dm, _dl):
    return cross_entropy_bwd(dloss, *ctx.saved_tensors, ctx.ignore_index), None, None


cross_entropy_fwd.register_autograd(_backward, setup_context=_setup_context)


def check_targets(name: str, rows: Tensor, targets: Tensor) -> None:
    """ValueError unless targets is (M,) int64 for M rows."""
    if targets.shape != rows.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(
            f"{name}: {rows.shape[0]} rows need targets of ({rows.shape[0]},) in torch.int64, "
            f"got {tuple(targets.shape)} in {targets.dtype}"
        )


def cross_entropy_eager(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """PyTorch's operator, in float32 at least."""
    exact = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(exact), targets, ignore_index=ignore_index)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Mean of -log softmax(logits)[target] over the rows whose target is not ignore_index; NaN if there is none.

    logits: (M, V), V >= 1, any strides, float32/float16/bfloat16; targets: (M,) int64 -> () float32. An ignored row
    has a gradient of zero. A logit of -inf is an impossible class.
    ValueError if a shape or the targets' dtype does not fit. A target that is neither a class nor ignore_index raises
    an IndexError in eager PyTorch on a CPU; the kernel, which cannot raise, makes the loss and that row's gradient NaN.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"cross_entropy: logits must be (M, V) with V >= 1, got {tuple(logits.shape)}")
    check_targets("cross_entropy", logits, targets)
    if use_triton("cross_entropy", logits, V=logits.shape[1]):
        return cross_entropy_fwd(logits, targets, ignore_index)[0]
    return cross_entropy_eager(logits, targets, ignore_index)


def draw_targets(case: Case, draw: Draw) -> Tensor:
    """Targets of a case, a fraction `ignored` of them -100; not the first, because a mean over none is NaN."""
    M = case["M"]
    targets = draw.integers(0, case["V"], M)
    ignored = draw.integers(0, 100, M) < 100 * case.get("ignored", 0.0)
    ignored[:1] = False
    return targets.masked_fill(ignored, -100)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    return {"logits": draw.normal(case["M"], case["V"]) * 2, "targets": draw_targets(case, draw)}


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    pass_bytes = case["M"] * case["V"] * dtype.itemsize
    return pass_bytes, 2 * pass_bytes


SPEC = register(
    KernelSpec(
        name="cross_entropy",
        fn=cross_entropy,
        make_inputs=_make_inputs,
        grads=("logits",),
        outputs=("loss",),
        cases=(
            {"M": 17, "V": 300, "ignored": 0.3, "why": "several rows a program, some ignored"},
            {"M": 5, "V": 1, "why": "one class: the loss is zero"},
            {"M": 1, "V": 33, "why": "one row, ragged"},
            {"M": 67, "V": 64, "ignored": 0.5, "why": "full width, several programs"},
            {"M": 3, "V": 8192, "why": "exactly one tile of a long row"},
            {"M": 3, "V": 20011, "ignored": 0.3, "why": "several tiles a row, the last one ragged"},
        ),
        # M from 1: the mean over no rows is NaN, in eager as here, and no rule compares NaN
        space={"M": range(1, 40), "V": range(1, 300), "ignored": (0.0, 0.3, 1.0)},
        bench_cases=({"M": 16384, "V": 50304}, {"M": 16384, "V": 50257}),
        bytes_moved=_bytes_moved,
    )
)
