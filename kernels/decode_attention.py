"""Attention of one new token per sequence over a cache of keys and values, split over the keys (Flash-Decoding).

    s_j = sm_scale * q . k_j   for j < length            sm_scale = 1 / sqrt(D)
    lse = log sum_j exp(s_j)                             o = sum_j exp(s_j - lse) v_j

over a part of the keys; then the parts i = 1..splits of a query are merged:

    lse = log sum_i exp(lse_i)                           o = sum_i exp(lse_i - lse) o_i

One query cannot fill a GPU, but its keys can: each program takes one part (Dao, Haziza, Massa, Sizov 2023,
"Flash-Decoding for long-context inference"). The number of parts follows from shapes and device alone. The lengths stay
on the device, where each program finds its keys by them, so one CUDA graph fits every step; what lies past a length is
never read.
The products are those of a matrix and one vector, which tensor cores would not speed up: float32 on the ordinary units.
All in base 2, exp(x) = exp2(x log2 e), because the GPU has one instruction for exp2.

q, o: (B, H, D), k, v: (B, H, S, D), in one dtype; lengths: (B,). Of several parts: o_i: (B, H, splits, D), lse_i:
(B, H, splits), float32, lse_i in base 2; with one part o is written at once. For inference: there is no backward.
Bytes that must cross memory: the keys and values below the lengths; q and o are small compared with them.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._launch import launch, sm_count
from ._registry import Case, Draw, KernelSpec, register
from ._tables import Options, choose
from ._triton import NAMESPACE, tl, triton
from .attention import why_unsupported

MAX_SPLITS = 32  # one program merges them, in registers
_SPACE = {"BLOCK_N": (16, 32, 64), "num_warps": (2, 4), "programs_per_sm": (4, 8, 12)}


class Meta(NamedTuple):
    """Compile-time constants of one launch."""

    D: int
    SPLIT: bool
    BLOCK_N: int
    BLOCK_D: int


def _options(D: int, BLOCK_D: int, q: Tensor) -> Options:
    """Launch table: tiles of 2,048 elements, with 4 warps 16 a thread of each of k, v and acc; of 8 programs on a
    multiprocessor there are enough loads in flight to keep the memory busy.
    """
    default = {"BLOCK_N": min(128, 2048 // BLOCK_D), "num_warps": 4, "programs_per_sm": 8}
    return choose("decode_attention", default, _SPACE, q.device, dtype=q.dtype, D=D)


@triton.jit
def _merge(acc, m_i, l_i):
    """Rows of softmax sums with their maxima -> (o, lse) of all of them together; (0, -inf) where no row has a key.

    acc: (N, BLOCK_D), unnormalised; m_i: (N,), base 2; l_i: (N,).
    """
    m = tl.max(m_i, 0)
    weight = tl.exp2(m_i - tl.where(m == float("-inf"), 0.0, m))
    total = tl.sum(l_i * weight, 0)
    o = tl.sum(acc * weight[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    return o, m + tl.log2(total)


@triton.jit
def _decode_attention_kernel(
    q_ptr, stride_q,  # (B, H, D)
    k_ptr, stride_k, v_ptr, stride_v,  # (B, H, S, D)
    lengths,  # lengths_ptr: (B,), its stride
    parts,  # o_ptr: (B, H, splits, D), lse_ptr: (B, H, splits), or None with one split
    H, S, qk_scale,
    META: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = META.D
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_D: tl.constexpr = META.BLOCK_D
    lengths_ptr, stride_l = lengths
    o_ptr, lse_ptr = parts
    bh, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    # Whole tiles of the keys that are there, in equal shares: whatever the length, as many programs as can have work.
    length = tl.minimum(tl.load(lengths_ptr + b * stride_l), S).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, BLOCK_N), splits) * BLOCK_N
    start = split * share
    stop = tl.minimum(start + share, length)

    offs_d = tl.arange(0, BLOCK_D)
    cols, mask_d = offs_d.to(tl.int64), offs_d < D
    offs_n = start + tl.arange(0, BLOCK_N)
    k_ptr += b * stride_k[0] + h * stride_k[1]
    v_ptr += b * stride_v[0] + h * stride_v[1]
    q = tl.load(q_ptr + b * stride_q[0] + h * stride_q[1] + cols * stride_q[2], mask=mask_d, other=0.0).to(tl.float32)

    # Each row of the tile has its own online softmax over every BLOCK_N-th key; they are merged once, after the loop.
    acc = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    m_i = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    l_i = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for _ in range(start, stop, BLOCK_N):
        mask_n = offs_n < stop
        mask = mask_n[:, None] & mask_d[None, :]
        rows = offs_n.to(tl.int64)  # and no tile of pointers kept from turn to turn: it would fill the registers
        k_ptrs = k_ptr + rows[:, None] * stride_k[2] + cols[None, :] * stride_k[3]
        v_ptrs = v_ptr + rows[:, None] * stride_v[2] + cols[None, :] * stride_v[3]
        k = tl.load(k_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_N, BLOCK_D)
        s = tl.sum(k * q[None, :], 1)  # (BLOCK_N,)
        s = tl.where(mask_n, s, float("-inf"))
        m_new = tl.maximum(m_i, s * qk_scale)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no finite score yet: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s * qk_scale - m_safe)  # (BLOCK_N,)
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + p
        acc = acc * alpha[:, None] + p[:, None] * v
        m_i = m_new
        offs_n += BLOCK_N

    o, lse = _merge(acc, m_i, l_i)
    part = bh.to(tl.int64) * splits + split
    tl.store(o_ptr + part * D + cols, o.to(o_ptr.dtype.element_ty), mask=mask_d)
    if META.SPLIT:
        tl.store(lse_ptr + part, lse)


@triton.jit
def _decode_attention_merge_kernel(
    parts_ptr, lse_ptr, o_ptr,  # parts: (B, H, splits, D)  lse: (B, H, splits)  o: (B, H, D)
    splits, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    rows = bh * splits + offs_s
    lse = tl.load(lse_ptr + rows, mask=offs_s < splits, other=float("-inf"))
    mask = (offs_s < splits)[:, None] & (offs_d < D)[None, :]
    parts = tl.load(parts_ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    # A part is normalised, so its sum is 1 at the maximum lse; a part without keys has the weight exp2(-inf).
    o, _ = _merge(parts, lse, tl.full((BLOCK_S,), 1.0, dtype=tl.float32))
    tl.store(o_ptr + bh * D + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < D)


@torch.library.custom_op(f"{NAMESPACE}::decode_attention_fwd", mutates_args=())
def decode_attention_fwd(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """q: (B, H, D), k_cache, v_cache: (B, H, S, D), lengths: (B,) integers, any strides -> o: (B, H, D) contiguous."""
    B, H, S, D = k_cache.shape
    BLOCK_D = max(16, triton.next_power_of_2(D))
    options = _options(D, BLOCK_D, q)
    BLOCK_N = options["BLOCK_N"]
    wanted = triton.cdiv(options["programs_per_sm"] * sm_count(q.device), max(1, B * H))
    splits = max(1, min(wanted, triton.cdiv(S, BLOCK_N), MAX_SPLITS))
    o = torch.empty((B, H, D), dtype=q.dtype, device=q.device)
    parts, lse = o, None
    if splits > 1:
        parts = torch.empty((B, H, splits, D), dtype=torch.float32, device=q.device)
        lse = torch.empty((B, H, splits), dtype=torch.float32, device=q.device)
    launch(
        _decode_attention_kernel,
        (B * H, splits),
        q,  # (B, H, D)
        q.stride(),
        k_cache,  # (B, H, S, D)
        k_cache.stride(),
        v_cache,  # (B, H, S, D)
        v_cache.stride(),
        (lengths, lengths.stride(0)),  # (B,)
        (parts, lse),  # (B, H, splits, D), (B, H, splits)
        H,
        S,
        D**-0.5 * math.log2(math.e),
        META=Meta(D, splits > 1, BLOCK_N, BLOCK_D),
        num_warps=options["num_warps"],
    )
    if splits > 1:
        launch(
            _decode_attention_merge_kernel,
            (B * H,),
            parts,  # (B, H, splits, D)
            lse,  # (B, H, splits)
            o,  # (B, H, D)
            splits,
            D=D,
            BLOCK_S=MAX_SPLITS,
            BLOCK_D=BLOCK_D,
            num_warps=4,
        )
    return o


@decode_attention_fwd.register_fake
def _(q, k_cache, v_cache, lengths):
    return q.new_empty(q.shape)


def _eager(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """PyTorch's own attention under a mask made of the lengths."""
    if not lengths.is_cuda:  # the host reads them without waiting: no look at what no sequence has filled
        counts = lengths.tolist()
        k_cache, v_cache = (x[:, :, : max([0, *counts])] for x in (k_cache, v_cache))
        is_clean = all(math.isfinite(x[:, :, min(counts, default=0) :].sum().item()) for x in (k_cache, v_cache))
    seen = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]  # (B, S)
    if lengths.is_cuda or not is_clean:  # a masked place has weight 0, and 0 * NaN = NaN: make it 0 * 0
        k_cache, v_cache = (x.where(seen[:, None, :, None], 0.0) for x in (k_cache, v_cache))
    o = F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=seen[:, None, None])[:, :, 0]
    return o.where(lengths[:, None, None] > 0, 0.0)  # not every backend of it gives zeros where all is masked


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """softmax(q . k / sqrt(D)) v of one query per sequence and head, over the first `length` places of its cache.

    q: (B, H, D); k_cache, v_cache: (B, H, S, D), in q's dtype; any strides, float32/float16/bfloat16, D 1 to 256.
    lengths: (B,) int64 or int32, on the device of q, where they stay: 0 to S, less counts as 0 and more as S.
    -> (B, H, D) in q.dtype, zeros for a sequence of length 0. What the cache holds past a length does not matter, not
    even NaN. For inference: the kernel has no gradient, and PyTorch raises its own error where one is asked for.
    ValueError for shapes and dtypes that do not fit. Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    B, H, D = q.shape if q.ndim == 3 else (-1, -1, -1)
    if k_cache.ndim != 4 or (*k_cache.shape[:2], k_cache.shape[3]) != (B, H, D) or v_cache.shape != k_cache.shape:
        raise ValueError(
            "decode_attention: q must be (B, H, D) and k_cache and v_cache (B, H, S, D), "
            f"got {tuple(q.shape)}, {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if not q.dtype == k_cache.dtype == v_cache.dtype:
        raise ValueError(
            "decode_attention: q, k_cache and v_cache must be of one dtype, "
            f"got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if lengths.shape != (B,) or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"decode_attention: lengths must be ({B},) int64 or int32, got {tuple(lengths.shape)} {lengths.dtype}"
        )
    if use_triton("decode_attention", q, why_unsupported(D), H=H, D=D, S=k_cache.shape[2]):
        return decode_attention_fwd(q, k_cache, v_cache, lengths)
    return _eager(q, k_cache, v_cache, lengths)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    B, H, S, D = (case[name] for name in "BHSD")
    lengths = draw.integers(0, S + 1, B)
    if case.get("full"):
        lengths[:] = S
    elif B > 3:
        lengths[1], lengths[2], lengths[3] = 0, min(1, S), S
    return {
        "q": draw.normal(B, H, D),
        "k_cache": draw.normal(B, H, S, D),
        "v_cache": draw.normal(B, H, S, D),
        "lengths": lengths,
    }


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    """Keys and values of full caches, and q and o."""
    return 2 * case["B"] * case["H"] * (case["S"] + 1) * case["D"] * dtype.itemsize, 0


SPEC = register(
    KernelSpec(
        name="decode_attention",
        fn=decode_attention,
        make_inputs=_make_inputs,
        grads=(),
        cases=(
            {"B": 1, "H": 2, "S": 300, "D": 64, "full": True, "why": "GPT-2's head, several splits of several tiles"},
            {"B": 5, "H": 1, "S": 150, "D": 64, "why": "splits past the lengths 0 and 1"},
            {"B": 5, "H": 4, "S": 70, "D": 40, "why": "one split of several tiles, head size not a power of two"},
            {"B": 1, "H": 1, "S": 1, "D": 1, "why": "one key, head size 1"},
            {"B": 2, "H": 1, "S": 0, "D": 8, "why": "an empty cache"},
            {"B": 3, "H": 1, "S": 45, "D": 200, "why": "widest tile, masked in both directions"},
        ),
        space={"B": range(6), "H": range(1, 4), "S": range(300), "D": range(1, 80), "full": (False, True)},
        bench_cases=tuple({"B": B, "H": 12, "S": 1024, "D": 64, "full": True} for B in (1, 8, 64)),
        bytes_moved=_bytes_moved,
        large=1.5,  # as in causal_attention: near-ties between large scores are rounding luck, in eager as here
    )
)
