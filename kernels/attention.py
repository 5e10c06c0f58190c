"""Causal multi-head attention on the packed projection, forward and backward, without the (T, T) matrix in memory.

    q, k, v = the H heads of qkv[..., :C], qkv[..., C:2C], qkv[..., 2C:],     C = H * D
    s_ij = sm_scale * q_i . k_j   for j <= i (and j in the document of i, where documents are given), else -inf
    lse_i = log sum_j exp(s_ij)              p_ij = exp(s_ij - lse_i)
    z_ij = keep_ij / (1 - dropout_p)         o_i = sum_j z_ij p_ij v_j          keep_ij: 0 or 1, the dropout mask

    delta_i = do_i . o_i                     ( = sum_j p_ij dp_ij )
    dp_ij = z_ij do_i . v_j                  ds_ij = p_ij (dp_ij - delta_i)
    dq_i = sm_scale sum_j ds_ij k_j          dk_j = sm_scale sum_i ds_ij q_i          dv_j = sum_i z_ij p_ij do_i

Forward: online softmax over key tiles (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv
2205.14135, algorithm 1); all in base 2, exp(x) = exp2(x log2 e): GPUs have an exp2 instruction.
Backward: p is recomputed from lse (Dao 2023, arXiv 2307.08691, algorithm 2), dk and dv by one program per key tile,
dq by one per query tile: each sum has one writer and one order, so a repeat is equal bit for bit, at the price of 7
matrix products in place of 5.

qkv, dqkv: (B, T, 3C); o, do: (B, T, C), in one dtype; lse, delta: (B, H, T) float32, lse in base 2. q, k and v are read
where the projection left them, and dq, dk, dv are written where its backward wants them: no transpose, no copy.
Minimum memory traffic, in elements: forward 4 BTC (qkv in, o out); backward 8 BTC (qkv, o, do in, dqkv out).
"""

import math
from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._dropout import dropout_hash, dropout_threshold, dropout_words, keep_mask, keep_tile, seed_tensor
from ._launch import arch_of, launch
from ._registry import Case, Draw, KernelSpec, register
from ._triton import NAMESPACE, tl, triton

MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)


# Tile sizes and options of a launch, and its compile-time constants.
Tile = namedtuple("Tile", "BLOCK_M BLOCK_N num_warps num_stages")
Meta = namedtuple("Meta", "D DOCUMENTS DROPOUT PRECISION BLOCK_M BLOCK_N BLOCK_D")


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _tiles(head_dim: int, dtype: torch.dtype, arch: int, dropout: bool) -> tuple[Tile, Tile, Tile]:
    """Tiles of the fwd, dkv and dq kernels by padded head size, dtype and architecture.

    Untimed, chosen from compiled code (`python -m bench static`): no spills, tensor cores, two blocks or more per
    multiprocessor (except for heads larger than 128), and then the fewest instructions per score.
    """
    BLOCK_D = _block_d(head_dim)
    if dtype == torch.float32:  # full-precision products run on the ordinary float32 units, operands in registers
        if BLOCK_D <= 32:
            return Tile(64, 16, 4, 1), Tile(16, 64, 4, 1), Tile(32, 32, 4, 1)
        if BLOCK_D == 64:
            return Tile(32, 16, 4, 1), Tile(16, 32, 4, 1), Tile(32, 32, 4, 1)
        return Tile(16, 16, 8, 1), Tile(16, 16, 4, 2), Tile(16, 16, 8, 2)
    if BLOCK_D > 128:
        return Tile(32, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 2)
    # Products of 64 rows by 4 warps are one instruction with operands in shared memory (wgmma, tcgen05): tiles may be
    # larger. The mask of dropout takes registers, of which the backward kernels have none left then.
    if arch in (90, 100, 103):
        if BLOCK_D <= 64:
            dkv = Tile(32, 64, 4, 2) if dropout or BLOCK_D < 64 else Tile(64, 64, 4, 3)
            return Tile(128, 64, 8, 3), dkv, Tile(64, 64, 4, 3)
        return Tile(64, 64, 4, 2), Tile(16, 64, 4, 2), Tile(64, 32 if dropout else 64, 4, 2)
    # mma.sync, operands in registers; all fits the 99 KiB of shared memory of sm_86, 89 and 120
    if BLOCK_D <= 64:
        return Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(64, 32, 4, 2)
    return Tile(64, 64, 4, 2), Tile(16, 64, 4, 2), Tile(64, 32, 4, 2)


@triton.jit
def _program(T, H, BLOCK: tl.constexpr):
    """Which head of which sequence this program works on, as bh, b (int64) and h, which tile of it, and of how many."""
    tiles = tl.cdiv(T, BLOCK)
    pid = tl.program_id(0)
    bh = pid // tiles
    return bh, (bh // H).to(tl.int64), bh % H, pid % tiles, tiles


@triton.jit
def _head(x_ptr, stride, b, h, D: tl.constexpr):
    """Where head h of sequence b begins in x: (B, T, heads * D). stride: of b, t, c; b: int64."""
    return x_ptr + b * stride[0] + (h * D).to(tl.int64) * stride[2]


@triton.jit
def _qkv_heads(qkv_ptr, stride, b, h, H, D: tl.constexpr):
    """Where the queries, keys and values of head h begin."""
    q_ptr = _head(qkv_ptr, stride, b, h, D)
    k_ptr = _head(qkv_ptr, stride, b, H + h, D)
    v_ptr = _head(qkv_ptr, stride, b, 2 * H + h, D)
    return q_ptr, k_ptr, v_ptr


@triton.jit
def _load_tile(x_ptr, offs_t, offs_d, stride, T, CHECK_BOUNDS: tl.constexpr, META: tl.constexpr):
    """Elements (offs_t, offs_d) of a head, 0 outside (T, D). Only diagonal tiles reach past T: CHECK_BOUNDS."""
    x_ptrs = x_ptr + offs_t.to(tl.int64) * stride[1] + offs_d * stride[2]
    if CHECK_BOUNDS:
        x = tl.load(x_ptrs, mask=(offs_t < T) & (offs_d < META.D), other=0.0)
    elif META.D == META.BLOCK_D:
        x = tl.load(x_ptrs)
    else:
        x = tl.load(x_ptrs, mask=offs_d < META.D, other=0.0)
    return x


@triton.jit
def _query_rows(doc_start_ptr, seed_ptr, b, bh, start_m, offs_m, T, META: tl.constexpr):
    """For a query tile: begin of its keys; first_key and row_hash, (BLOCK_M,); s1, the seed of the columns."""
    row_hash, s1 = offs_m, 0
    if META.DROPOUT:
        s0, s1 = dropout_words(tl.load(seed_ptr), bh)
        row_hash = dropout_hash(s0, offs_m)  # (BLOCK_M,)
    begin, first_key = 0, offs_m * 0
    if META.DOCUMENTS:  # documents follow one another, so the first query's is the earliest
        doc_start_ptr += b * T
        begin = tl.load(doc_start_ptr + start_m) // META.BLOCK_N * META.BLOCK_N
        first_key = tl.load(doc_start_ptr + offs_m, mask=offs_m < T, other=0)  # (BLOCK_M,)
    return begin, first_key, row_hash, s1


@triton.jit
def _attn_fwd_inner(
    state, q, kv,  # acc: (BLOCK_M, BLOCK_D), m_i, l_i: (BLOCK_M,); (BLOCK_M, BLOCK_D); k_ptr, v_ptr, their stride
    start, stop, T, qk_scale, rows, keep_args,  # offs_m, first_key: (BLOCK_M,); row_hash: (BLOCK_M,), s1, threshold
    DIAGONAL: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles in [start, stop). DIAGONAL: keys may follow the query."""
    acc, m_i, l_i = state
    k_ptr, v_ptr, stride = kv
    offs_m, first_key = rows
    row_hash, s1, threshold = keep_args
    offs_n = start + tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D).to(tl.int64)
    for _ in range(start, stop, META.BLOCK_N):
        kT = _load_tile(k_ptr, offs_n[None, :], offs_d[:, None], stride, T, DIAGONAL, META)  # (BLOCK_D, BLOCK_N)
        s = tl.dot(q, kT, input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_N)
        if DIAGONAL:
            s = tl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))
        if META.DOCUMENTS:
            s = tl.where(first_key[:, None] <= offs_n[None, :], s, float("-inf"))

        # The maximum is of the raw products, so that scaling and subtracting are one fused multiply-add per score.
        m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)  # (BLOCK_M,)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no finite score yet: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s * qk_scale - m_safe[:, None])  # (BLOCK_M, BLOCK_N)
        alpha = tl.exp2(m_i - m_safe)  # (BLOCK_M,)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        m_i = m_new
        if META.DROPOUT:  # after the sum: dropout acts on the normalised probabilities
            col_hash = dropout_hash(s1, offs_n)  # (BLOCK_N,)
            p = tl.where(keep_tile(row_hash[:, None], col_hash[None, :], threshold), p, 0.0)

        v = _load_tile(v_ptr, offs_n[:, None], offs_d[None, :], stride, T, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_D)
        offs_n += META.BLOCK_N
    return acc, m_i, l_i


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, stride_qkv,  # (B, T, 3C)
    doc_start_ptr,  # (B, T) or None
    o_ptr, lse_ptr,  # (B, T, C), (B, H, T)
    T, H, qk_scale, dropout,  # dropout: seed_ptr, () or None, threshold, z
    META: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = META.D
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_D: tl.constexpr = META.BLOCK_D
    bh, b, h, tile, tiles = _program(T, H, BLOCK_M)
    start_m = (tiles - 1 - tile) * BLOCK_M  # later query tiles see more keys: start them first
    q_ptr, k_ptr, v_ptr = _qkv_heads(qkv_ptr, stride_qkv, b, h, H, D)
    kv = (k_ptr, v_ptr, stride_qkv)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    q = _load_tile(q_ptr, offs_m[:, None], offs_d[None, :], stride_qkv, T, True, META)
    seed_ptr, threshold, z = dropout
    begin, first_key, row_hash, s1 = _query_rows(doc_start_ptr, seed_ptr, b, bh, start_m, offs_m, T, META)
    rows, keep_args = (offs_m, first_key), (row_hash, s1, threshold)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    m_i, l_i = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32), tl.zeros((BLOCK_M,), dtype=tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N
    state = _attn_fwd_inner((acc, m_i, l_i), q, kv, begin, diagonal, T, qk_scale, rows, keep_args, False, META)
    end = tl.minimum(start_m + BLOCK_M, T)
    acc, m_i, l_i = _attn_fwd_inner(state, q, kv, diagonal, end, T, qk_scale, rows, keep_args, True, META)

    o_ptrs = o_ptr + (b * T + offs_m)[:, None] * (H * D) + h * D + offs_d[None, :]
    o = acc * (z / l_i)[:, None]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=(offs_m < T)[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, m_i + tl.log2(l_i), mask=offs_m < T)


@triton.jit
def _attention_delta_kernel(
    do_ptr, stride_do, o_ptr, delta_ptr,  # do, o: (B, T, C)  delta: (B, H, T)
    T, H, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bh, b, h, tile, _ = _program(T, H, BLOCK_M)
    offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (offs_m < T)[:, None] & (offs_d < D)[None, :]
    do_ptrs = do_ptr + b * stride_do[0] + offs_m[:, None] * stride_do[1] + (h * D + offs_d)[None, :] * stride_do[2]
    o_ptrs = o_ptr + (b * T + offs_m)[:, None] * (H * D) + (h * D + offs_d)[None, :]
    do = tl.load(do_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_D)
    o = tl.load(o_ptrs, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_M, BLOCK_D)
    tl.store(delta_ptr + bh.to(tl.int64) * T + offs_m, tl.sum(do * o, 1), mask=offs_m < T)


@triton.jit
def _attn_bwd_dkv_inner(
    grads, k, v,  # dk, dv; k; v: (BLOCK_N, BLOCK_D)
    queries,  # q_ptr, do_ptr, their strides, lse_ptr, delta_ptr, doc_start_ptr
    start, stop, T, qk_scale,
    offs_n, keep_args,  # (BLOCK_N,); col_hash: (BLOCK_N,), s0, threshold, z
    DIAGONAL: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Adds the query tiles in [start, stop) to dk and dv. All score tiles are transposed, (BLOCK_N, BLOCK_M)."""
    dk, dv = grads
    q_ptr, do_ptr, stride_q, stride_do, lse_ptr, delta_ptr, doc_start_ptr = queries
    col_hash, s0, threshold, z = keep_args
    offs_m = start + tl.arange(0, META.BLOCK_M)
    offs_d = tl.arange(0, META.BLOCK_D).to(tl.int64)
    for _ in range(start, stop, META.BLOCK_M):
        mask_m = offs_m < T
        q = _load_tile(q_ptr, offs_m[:, None], offs_d[None, :], stride_q, T, True, META)  # (BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))  # (BLOCK_M,), makes p = 0 past T
        sT = tl.dot(k, tl.trans(q), input_precision=META.PRECISION)  # (BLOCK_N, BLOCK_M)
        if DIAGONAL:
            sT = tl.where(offs_m[None, :] >= offs_n[:, None], sT, float("-inf"))
        if META.DOCUMENTS:
            first_key = tl.load(doc_start_ptr + offs_m, mask=mask_m, other=0)  # (BLOCK_M,)
            sT = tl.where(first_key[None, :] <= offs_n[:, None], sT, float("-inf"))
        pT = tl.exp2(sT * qk_scale - lse[None, :])  # (BLOCK_N, BLOCK_M)

        do = _load_tile(do_ptr, offs_m[:, None], offs_d[None, :], stride_do, T, True, META)  # (BLOCK_M, BLOCK_D)
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)  # (BLOCK_M,)
        dpT = tl.dot(v, tl.trans(do), input_precision=META.PRECISION)  # (BLOCK_N, BLOCK_M)
        if META.DROPOUT:
            row_hash = dropout_hash(s0, offs_m)  # (BLOCK_M,)
            zT = tl.where(keep_tile(row_hash[None, :], col_hash[:, None], threshold), z, 0.0)  # (BLOCK_N, BLOCK_M)
            dpT = dpT * zT
            dv = tl.dot((pT * zT).to(do.dtype), do, dv, input_precision=META.PRECISION)  # (BLOCK_N, BLOCK_D)
        else:
            dv = tl.dot(pT.to(do.dtype), do, dv, input_precision=META.PRECISION)  # (BLOCK_N, BLOCK_D)
        dsT = pT * (dpT - delta[None, :])  # (BLOCK_N, BLOCK_M)
        dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision=META.PRECISION)  # (BLOCK_N, BLOCK_D)
        offs_m += META.BLOCK_M
    return dk, dv


@triton.jit
def _attention_dkv_kernel(
    qkv_ptr, stride_qkv, do_ptr, stride_do,  # (B, T, 3C), (B, T, C)
    stats, documents,  # lse_ptr, delta_ptr: (B, H, T); doc_start_ptr, doc_end_ptr: (B, T) or None
    dqkv_ptr, T, H,  # dqkv: (B, T, 3C)
    scales, dropout, META: tl.constexpr,  # sm_scale, qk_scale; seed_ptr: () or None, threshold, z
):  # fmt: skip
    D: tl.constexpr = META.D
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_D: tl.constexpr = META.BLOCK_D
    bh, b, h, tile, _ = _program(T, H, BLOCK_N)
    start_n = tile * BLOCK_N  # earlier key tiles are seen by more queries: start them first
    lse_ptr, delta_ptr = stats
    doc_start_ptr, doc_end_ptr = documents
    if META.DOCUMENTS:
        doc_start_ptr += b * T
    q_ptr, k_ptr, v_ptr = _qkv_heads(qkv_ptr, stride_qkv, b, h, H, D)
    do_ptr = _head(do_ptr, stride_do, b, h, D)
    lse_ptr += bh.to(tl.int64) * T
    delta_ptr += bh.to(tl.int64) * T
    queries = (q_ptr, do_ptr, stride_qkv, stride_do, lse_ptr, delta_ptr, doc_start_ptr)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    k = _load_tile(k_ptr, offs_n[:, None], offs_d[None, :], stride_qkv, T, True, META)
    v = _load_tile(v_ptr, offs_n[:, None], offs_d[None, :], stride_qkv, T, True, META)
    seed_ptr, threshold, z = dropout
    col_hash, s0 = offs_n, 0
    if META.DROPOUT:
        s0, s1 = dropout_words(tl.load(seed_ptr), bh)
        col_hash = dropout_hash(s1, offs_n)
    keep_args = (col_hash, s0, threshold, z)
    sm_scale, qk_scale = scales
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32), tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    diagonal = start_n // BLOCK_M * BLOCK_M
    full = tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M  # from here on every query sees every key
    end = T
    if META.DOCUMENTS:  # documents follow one another, so the last key's is the latest
        end = tl.load(doc_end_ptr + b * T + tl.minimum(start_n + BLOCK_N, T) - 1)
    stop = tl.minimum(full, end)
    grads = _attn_bwd_dkv_inner((dk, dv), k, v, queries, diagonal, stop, T, qk_scale, offs_n, keep_args, True, META)
    dk, dv = _attn_bwd_dkv_inner(grads, k, v, queries, full, end, T, qk_scale, offs_n, keep_args, False, META)

    C, inside = H * D, (offs_n < T)[:, None] & (offs_d < D)[None, :]
    dk_ptrs = dqkv_ptr + (b * T + offs_n)[:, None] * (3 * C) + C + h * D + offs_d[None, :]
    tl.store(dk_ptrs, (dk * sm_scale).to(dqkv_ptr.dtype.element_ty), mask=inside)
    tl.store(dk_ptrs + C, dv.to(dqkv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attn_bwd_dq_inner(
    dq, q, do, kv,  # (BLOCK_M, BLOCK_D) each; k_ptr, v_ptr, their stride
    start, stop, T, qk_scale,
    rows, keep_args,  # offs_m, first_key, lse, delta: (BLOCK_M,); row_hash: (BLOCK_M,), s1, threshold, z
    DIAGONAL: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles in [start, stop) to dq."""
    k_ptr, v_ptr, stride = kv
    offs_m, first_key, lse, delta = rows
    row_hash, s1, threshold, z = keep_args
    offs_n = start + tl.arange(0, META.BLOCK_N)
    offs_d = tl.arange(0, META.BLOCK_D).to(tl.int64)
    for _ in range(start, stop, META.BLOCK_N):
        mask = (offs_n < T)[:, None] & (offs_d < META.D)[None, :]  # (BLOCK_N, BLOCK_D)
        offsets = offs_n.to(tl.int64)[:, None] * stride[1] + offs_d[None, :] * stride[2]  # (BLOCK_N, BLOCK_D)
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)  # (BLOCK_N, BLOCK_D)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_N)
        if DIAGONAL:
            s = tl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))
        if META.DOCUMENTS:
            s = tl.where(first_key[:, None] <= offs_n[None, :], s, float("-inf"))
        p = tl.exp2(s * qk_scale - lse[:, None])  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(do, tl.trans(v), input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_N)
        if META.DROPOUT:
            col_hash = dropout_hash(s1, offs_n)  # (BLOCK_N,)
            dp = dp * tl.where(keep_tile(row_hash[:, None], col_hash[None, :], threshold), z, 0.0)
        ds = p * (dp - delta[:, None])  # (BLOCK_M, BLOCK_N)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_D)
        offs_n += META.BLOCK_N
    return dq


@triton.jit
def _attention_dq_kernel(
    qkv_ptr, stride_qkv, do_ptr, stride_do,  # (B, T, 3C), (B, T, C)
    stats, documents,  # lse_ptr, delta_ptr: (B, H, T); doc_start_ptr, doc_end_ptr: (B, T) or None
    dqkv_ptr, T, H,  # dqkv: (B, T, 3C)
    scales, dropout, META: tl.constexpr,  # sm_scale, qk_scale; seed_ptr: () or None, threshold, z
):  # fmt: skip
    D: tl.constexpr = META.D
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_D: tl.constexpr = META.BLOCK_D
    bh, b, h, tile, tiles = _program(T, H, BLOCK_M)
    start_m = (tiles - 1 - tile) * BLOCK_M  # later query tiles see more keys: start them first
    q_ptr, k_ptr, v_ptr = _qkv_heads(qkv_ptr, stride_qkv, b, h, H, D)
    kv = (k_ptr, v_ptr, stride_qkv)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    q = _load_tile(q_ptr, offs_m[:, None], offs_d[None, :], stride_qkv, T, True, META)
    do = _load_tile(_head(do_ptr, stride_do, b, h, D), offs_m[:, None], offs_d[None, :], stride_do, T, True, META)
    lse_ptr, delta_ptr = stats
    lse = tl.load(lse_ptr + bh.to(tl.int64) * T + offs_m.to(tl.int64), mask=offs_m < T, other=float("inf"))
    delta = tl.load(delta_ptr + bh.to(tl.int64) * T + offs_m.to(tl.int64), mask=offs_m < T, other=0.0)
    seed_ptr, threshold, z = dropout
    begin, first_key, row_hash, s1 = _query_rows(documents[0], seed_ptr, b, bh, start_m, offs_m, T, META)
    rows, keep_args = (offs_m, first_key, lse, delta), (row_hash, s1, threshold, z)
    sm_scale, qk_scale = scales
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N
    dq = _attn_bwd_dq_inner(dq, q, do, kv, begin, diagonal, T, qk_scale, rows, keep_args, False, META)
    end = tl.minimum(start_m + BLOCK_M, T)
    dq = _attn_bwd_dq_inner(dq, q, do, kv, diagonal, end, T, qk_scale, rows, keep_args, True, META)

    dq_ptrs = dqkv_ptr + (b * T + offs_m)[:, None] * (3 * H * D) + h * D + offs_d[None, :]
    tl.store(dq_ptrs, (dq * sm_scale).to(dqkv_ptr.dtype.element_ty), mask=(offs_m < T)[:, None] & (offs_d < D)[None, :])


def _options(tile: Tile, D: int, documents: Tensor | None, seed: Tensor | None) -> dict[str, Any]:
    """The constants and options of a launch."""
    BLOCK_M, BLOCK_N, num_warps, num_stages = tile
    # of float32 products: PyTorch's own setting, by the name that its older and newer functions both answer to
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    meta = Meta(D, documents is not None, seed is not None, precision, BLOCK_M, BLOCK_N, _block_d(D))
    return {"META": meta, "num_warps": num_warps, "num_stages": num_stages}


def _document_bounds(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """documents: (B, T) -> the first position of each position's document and the one past its last: (B, T) int32."""
    if documents is None:
        return None, None
    T = documents.shape[1]
    position = torch.arange(T, device=documents.device, dtype=torch.int32).expand(documents.shape)
    differs = documents[:, 1:] != documents[:, :-1]
    doc_start = F.pad(position[:, 1:].where(differs, 0), (1, 0)).cummax(1).values
    doc_end = F.pad(position[:, 1:].where(differs, T), (0, 1), value=T).flip(1).cummin(1).values.flip(1)
    return doc_start.contiguous(), doc_end.contiguous()


@torch.library.custom_op(f"{NAMESPACE}::attention_fwd", mutates_args=())
def attention_fwd(
    qkv: Tensor, seed: Tensor | None, documents: Tensor | None, n_head: int, dropout_p: float, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """qkv: (B, T, 3C), any strides; seed: () int64; documents: (B, T) -> o: (B, T, C), lse: (B, H, T) in base 2."""
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // n_head
    o = torch.empty((B, T, C), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, n_head, T), dtype=torch.float32, device=qkv.device)
    tile, _, _ = _tiles(D, qkv.dtype, arch_of(qkv.device), seed is not None)
    launch(
        _attention_fwd_kernel,
        (B * n_head * triton.cdiv(T, tile.BLOCK_M),),
        qkv,  # (B, T, 3C)
        qkv.stride(),
        _document_bounds(documents)[0],  # (B, T)
        o,  # (B, T, C)
        lse,  # (B, H, T)
        T, n_head, sm_scale * _LOG2_E, (seed, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)),
        **_options(tile, D, documents, seed),
    )  # fmt: skip
    return o, lse


@attention_fwd.register_fake
def _(qkv, seed, documents, n_head, dropout_p, sm_scale):
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty((B, T, C)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention_bwd", mutates_args=())
def attention_bwd(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None, documents: Tensor | None,
    n_head: int, dropout_p: float, sm_scale: float,
) -> Tensor:  # fmt: skip
    """do: (B, T, C), qkv: (B, T, 3C), any strides; o, lse: of the forward -> dqkv: (B, T, 3C) contiguous."""
    B, T, C = o.shape
    D, BLOCK_D = C // n_head, _block_d(C // n_head)
    dqkv = torch.empty((B, T, 3 * C), dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    BLOCK_M = 1024 // BLOCK_D  # 8 elements a thread: 16 bytes of half precision
    launch(
        _attention_delta_kernel,
        (B * n_head * triton.cdiv(T, BLOCK_M),),
        do,  # (B, T, C)
        do.stride(),
        o,  # (B, T, C)
        delta,  # (B, H, T)
        T, n_head, D=D, BLOCK_M=BLOCK_M, BLOCK_D=BLOCK_D,
    )  # fmt: skip
    args = (
        qkv,  # (B, T, 3C)
        qkv.stride(),
        do,  # (B, T, C)
        do.stride(),
        (lse, delta),  # (B, H, T)
        _document_bounds(documents),  # (B, T)
        dqkv,  # (B, T, 3C)
        T, n_head, (sm_scale, sm_scale * _LOG2_E), (seed, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)),
    )  # fmt: skip
    _, dkv, dq = _tiles(D, qkv.dtype, arch_of(qkv.device), seed is not None)
    for kernel, tile, block in ((_attention_dkv_kernel, dkv, dkv.BLOCK_N), (_attention_dq_kernel, dq, dq.BLOCK_M)):
        launch(kernel, (B * n_head * triton.cdiv(T, block),), *args, **_options(tile, D, documents, seed))
    return dqkv


@attention_bwd.register_fake
def _(do, qkv, o, lse, seed, documents, n_head, dropout_p, sm_scale):
    return qkv.new_empty(qkv.shape)


def _setup_context(ctx, inputs, output):
    qkv, seed, documents, ctx.n_head, ctx.dropout_p, ctx.sm_scale = inputs
    o, lse = output
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, o, lse, seed, documents)


def _backward(ctx, do, _dlse):
    qkv, o, lse, seed, documents = ctx.saved_tensors
    dqkv = attention_bwd(do, qkv, o, lse, seed, documents, ctx.n_head, ctx.dropout_p, ctx.sm_scale)
    return dqkv, None, None, None, None, None


attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def _eager(
    qkv: Tensor, n_head: int, dropout_p: float, seed: int | Tensor | None, sm_scale: float, documents: Tensor | None
) -> Tensor:
    """PyTorch's own attention; with dropout and a seed the probabilities are written out, to take the kernel's mask."""
    # each (B, H, T, D), strided view; three chunks and not one permuted view, whose gradient would be copied once more
    q, k, v = (x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
    B, H, T, _ = q.shape
    if documents is None and (dropout_p == 0.0 or seed is None):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p, scale=sm_scale)
        return o.transpose(1, 2).flatten(2)  # (B, T, C)
    visible = torch.ones((T, T), dtype=torch.bool, device=qkv.device).tril()
    if documents is not None:
        count = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0)).cumsum(1)  # (B, T), the documents begun before
        visible = visible & (count[:, None, :, None] == count[:, None, None, :])
    if dropout_p == 0.0 or seed is None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=sm_scale)
    else:
        keep = attention_dropout_mask(B, H, T, dropout_p, seed, qkv.device)
        p = (q @ k.mT * sm_scale).masked_fill(~visible, -math.inf).softmax(-1)
        o = p.where(keep, 0.0) / (1.0 - dropout_p) @ v
    return o.transpose(1, 2).flatten(2)  # (B, T, C)


def attention_dropout_mask(
    B: int, H: int, T: int, dropout_p: float, seed: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask that causal_attention applies under a seed: (B, H, T, T) bool, True where a probability is kept."""
    bh = torch.arange(B * H, device=device).view(B, H)
    return keep_mask(seed_tensor(seed, bh.device), dropout_p, T, T, bh)


def why_unsupported(head_dim: int) -> str | None:
    """Why heads of this size do not fit the kernels, or None if they do."""
    return f"the head size {head_dim} is larger than the kernel's {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else None


def causal_attention(
    qkv: Tensor,
    n_head: int,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sm_scale: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """Multi-head self-attention in which position i sees the positions j <= i.

    qkv: (B, T, 3C), any strides, float32/float16/bfloat16: queries, keys, values side by side, C = n_head * head size
    (1 to 256). sm_scale: > 0, default 1/sqrt(head size). -> (B, T, C) in qkv.dtype.

    dropout_p in [0, 1) drops probabilities after the softmax. A seed (int or () int64 tensor) fixes the mask, the same
    one on every backend; `attention_dropout_mask` shows it. Without a seed the mask follows torch.manual_seed.

    documents: (B, T) integers; consecutive equal numbers are one document, and attention stays inside it. Key
    tiles of other documents are skipped.
    ValueError if 3 * n_head does not divide the last dimension, a shape does not fit or a number is out of range.
    """
    shape = tuple(qkv.shape)
    if qkv.ndim != 3 or n_head < 1 or shape[-1] % (3 * n_head) or shape[-1] == 0:
        raise ValueError(f"causal_attention: qkv must be (B, T, 3 * n_head * D), got {shape}, n_head {n_head}")
    D = qkv.shape[-1] // (3 * n_head)
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"causal_attention: dropout_p must be in [0, 1), got {dropout_p}")
    if not sm_scale > 0.0:
        raise ValueError(f"causal_attention: sm_scale must be positive, got {sm_scale}")
    if documents is not None and (documents.shape != shape[:2] or documents.is_floating_point()):
        got = f"{documents.dtype} {tuple(documents.shape)}"
        raise ValueError(f"causal_attention: documents must be integers of {shape[:2]}, got {got}")
    if use_triton("causal_attention", qkv, why_unsupported(D), H=n_head, D=D, dropout_p=0.5 if dropout_p else 0.0):
        seed = seed_tensor(seed, qkv.device) if dropout_p else None
        return attention_fwd(qkv, seed, documents, n_head, dropout_p, sm_scale)[0]
    return _eager(qkv, n_head, dropout_p, seed, sm_scale, documents)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    B, H, T, D = (case[name] for name in "BHTD")
    inputs: dict[str, Any] = {"qkv": draw.normal(B, T, 3 * H * D), "n_head": H}
    if case.get("dropout_p"):
        inputs |= {"dropout_p": case["dropout_p"], "seed": 0x1234_5678_9ABC}
    if case.get("documents"):
        inputs["documents"] = draw.integers(0, case["documents"], B, T).sort(1).values
    return inputs


SPEC = register(
    KernelSpec(
        name="causal_attention",
        fn=causal_attention,
        make_inputs=_make_inputs,
        grads=("qkv",),
        cases=(
            {"B": 1, "H": 2, "T": 97, "D": 32, "dropout_p": 0.2, "why": "dropout over several tiles"},
            {"B": 2, "H": 3, "T": 1, "D": 16, "why": "one position sees itself"},
            {"B": 2, "H": 2, "T": 200, "D": 24, "documents": 4, "why": "documents that end inside tiles"},
            {"B": 1, "H": 2, "T": 17, "D": 1, "why": "head size 1, one ragged tile"},
            {"B": 1, "H": 1, "T": 128, "D": 64, "why": "T a multiple of every tile, one head"},
            {"B": 2, "H": 1, "T": 129, "D": 64, "why": "one row past a tile"},
            {"B": 1, "H": 2, "T": 257, "D": 40, "why": "full and diagonal tiles, head size not a power of two"},
            {"B": 1, "H": 1, "T": 200, "D": 128, "why": "wide head"},
            {"B": 1, "H": 1, "T": 97, "D": 200, "why": "widest tile, masked in both directions"},
        ),
        space={"B": range(3), "H": range(1, 4), "T": range(150), "D": range(1, 80), "dropout_p": (0.0, 0.3),
               "documents": range(4)},
        bench_cases=tuple({"B": 65536 // T, "H": 12, "T": T, "D": 64} for T in (512, 1024, 2048, 4096)),
        bytes_moved=lambda case, dtype: tuple(n * math.prod(case[i] for i in "BTHD") * dtype.itemsize for n in (4, 8)),
        # 2 products forward, 5 backward (those that dq computes again are not counted); half of each is masked
        flops=lambda case: tuple(n * math.prod(case[i] for i in "BTTHD") for n in (2, 5)),
        large=1.5,  # scores grow with the square: rounding decides near-ties of large ones, in eager too
    )
)  # fmt: skip
