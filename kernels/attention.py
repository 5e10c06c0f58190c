"""Causal multi-head attention on the packed projection, forward and backward, without the (T, T) matrix in memory.

    q, k, v = the H heads of qkv[..., :C], qkv[..., C:2C], qkv[..., 2C:],     C = H * D
    s_ij = sm_scale * q_i . k_j   for j <= i (and j in the document of i, where documents are given), else -inf
    lse_i = log sum_j exp(s_ij)              p_ij = exp(s_ij - lse_i)
    z_ij = keep_ij / (1 - dropout_p)         o_i = sum_j z_ij p_ij v_j

    delta_i = do_i . o_i                     ( = sum_j p_ij dp_ij )
    dp_ij = z_ij do_i . v_j                  ds_ij = p_ij (dp_ij - delta_i)
    dq_i = sm_scale sum_j ds_ij k_j          dk_j = sm_scale sum_i ds_ij q_i          dv_j = sum_i z_ij p_ij do_i

Forward: online softmax over key tiles (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv
2205.14135, algorithm 1); all in base 2, exp(x) = exp2(x log2 e), because the GPU has one instruction for exp2.
Backward: p is computed again from lse (Dao 2023, arXiv 2307.08691, algorithm 2), dk and dv by one program per key tile,
dq by one per query tile: each sum has one writer and one order, so a repeat is equal bit for bit, at the price of 7
matrix products in place of 5.

qkv, dqkv: (B, T, 3C); o, do: (B, T, C), in one dtype; lse, delta: (B, H, T) float32, lse in base 2. q, k and v are read
where the projection left them, and dq, dk, dv are written where its backward wants them: no transpose, no copy.
Bytes that must cross memory: forward 4 BTC elements; backward 8 BTC (qkv, o, do in, dqkv out).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._dispatch import use_triton
from ._dropout import dropout_keys, dropout_threshold, dropout_words, keep_mask, keep_tile, seed_tensor
from ._launch import arch_of, launch
from ._registry import Case, Draw, KernelSpec, register
from ._triton import tl, triton

MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)


def _tiles(head_dim: int, dtype: torch.dtype, arch: int, dropout: bool) -> dict[str, dict[str, int]]:
    """Tile sizes and launch options of each kernel, by padded head size, dtype and architecture.

    No GPU has timed them. They are what compiles best: without a spill, on the tensor cores, with two blocks or more
    on a multiprocessor (but for heads larger than 128), and then with the fewest instructions a score.
    `python -m bench static` shows it.
    """
    BLOCK_D = max(16, triton.next_power_of_2(head_dim))

    def tiles(fwd: tuple[int, ...], dkv: tuple[int, ...], dq: tuple[int, ...]) -> dict[str, dict[str, int]]:
        names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "BLOCK_D")
        chosen = {"fwd": fwd, "dkv": dkv, "dq": dq}
        delta = {"BLOCK_M": 1024 // BLOCK_D, "BLOCK_D": BLOCK_D}  # 8 elements a thread: 16 bytes of half precision
        return {"delta": delta} | {k: dict(zip(names, (*v, BLOCK_D), strict=True)) for k, v in chosen.items()}

    if dtype == torch.float32:  # full-precision products run on the ordinary float32 units, operands in registers
        if BLOCK_D <= 32:
            return tiles((64, 16, 4, 1), (16, 64, 4, 1), (32, 32, 4, 1))
        if BLOCK_D == 64:
            return tiles((32, 16, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1))
        return tiles((16, 16, 8, 1), (16, 16, 4, 2), (16, 16, 8, 2))
    if BLOCK_D > 128:
        return tiles((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 2))
    # Products of 64 rows by 4 warps are one instruction with operands in shared memory (wgmma, tcgen05): tiles may be
    # larger. The mask of dropout takes registers, of which the backward kernels have none left then.
    if arch in (90, 100, 103):
        if BLOCK_D <= 64:
            dkv = (32, 64, 4, 2) if dropout or BLOCK_D < 64 else (64, 64, 4, 3)
            return tiles((128, 64, 8, 3), dkv, (64, 64, 4, 3))
        return tiles((64, 64, 4, 2), (16, 64, 4, 2), (64, 32 if dropout else 64, 4, 2))
    # mma.sync, operands in registers; all fits the 99 KiB of shared memory of sm_86, 89 and 120
    if BLOCK_D <= 64:
        return tiles((64, 64, 4, 3), (32, 64, 4, 3), (64, 32, 4, 2))
    return tiles((64, 64, 4, 2), (16, 64, 4, 2), (64, 32, 4, 2))


@triton.jit
def _head_pointers(qkv_ptr, b, h, stride_b, stride_c, H, D: tl.constexpr):
    """Where the queries, keys and values of head h of sequence b begin in the packed projection. b: int64."""
    row_ptr = qkv_ptr + b * stride_b
    q_ptr = row_ptr + (h * D).to(tl.int64) * stride_c
    k_ptr = row_ptr + ((H + h) * D).to(tl.int64) * stride_c
    v_ptr = row_ptr + ((2 * H + h) * D).to(tl.int64) * stride_c
    return q_ptr, k_ptr, v_ptr


@triton.jit
def _first_keys(starts_ptr, row, start_m, offs_m, T, DOCUMENTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the key tiles of a query tile begin, and the first key that each of its queries sees. row: b * T."""
    begin, first = 0, offs_m * 0
    if DOCUMENTS:  # documents follow one another, so the first query's is the earliest
        begin = tl.load(starts_ptr + row + start_m) // BLOCK_N * BLOCK_N
        first = tl.load(starts_ptr + row + offs_m, mask=offs_m < T, other=0)
    return begin, first


@triton.jit
def _fwd_tiles(
    acc, m_i, l_i, q, k_ptr, v_ptr, stride_t, stride_c, start, stop, T, qk_scale,
    offs_m, first, row_keys, s1, threshold,
    D: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles in [start, stop). MASKED: on the diagonal, where keys may follow the query."""
    offs_n = start + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_d = cols < D
    for _ in range(start, stop, BLOCK_N):
        keys = offs_n.to(tl.int64)
        k_ptrs = k_ptr + keys[None, :] * stride_t + cols[:, None] * stride_c
        v_ptrs = v_ptr + keys[:, None] * stride_t + cols[None, :] * stride_c
        if MASKED:  # only here can a tile reach past T
            k = tl.load(k_ptrs, mask=(offs_n < T)[None, :] & mask_d[:, None], other=0.0)
        elif D == BLOCK_D:
            k = tl.load(k_ptrs)
        else:
            k = tl.load(k_ptrs, mask=mask_d[:, None], other=0.0)
        s = tl.dot(q, k, input_precision=PRECISION)
        if MASKED:
            s = tl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))
        if DOCUMENTS:
            s = tl.where(first[:, None] <= offs_n[None, :], s, float("-inf"))

        # The maximum is of the raw products, so that scaling and subtracting are one fused multiply-add per score.
        m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # no finite score yet: exp2(-inf - 0) = 0, not NaN
        p = tl.exp2(s * qk_scale - m_safe[:, None])
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        m_i = m_new
        if DROPOUT:  # after the sum: dropout acts on the normalised probabilities
            column_keys = dropout_keys(s1, offs_n)
            p = tl.where(keep_tile(row_keys[:, None], column_keys[None, :], threshold), p, 0.0)

        if MASKED:
            v = tl.load(v_ptrs, mask=(offs_n < T)[:, None] & mask_d[None, :], other=0.0)
        elif D == BLOCK_D:
            v = tl.load(v_ptrs)
        else:
            v = tl.load(v_ptrs, mask=mask_d[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        offs_n += BLOCK_N
    return acc, m_i, l_i


@triton.jit
def _attention_fwd_kernel(
    qkv_ptr, o_ptr, lse_ptr, seed_ptr, starts_ptr,  # qkv: (B, T, 3C)  o: (B, T, C)  lse: (B, H, T)  starts: (B, T)
    stride_b, stride_t, stride_c, T, H, qk_scale, threshold, z,
    D: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // tiles
    start_m = (tiles - 1 - pid % tiles) * BLOCK_M  # the longest rows of a head start first: they end last
    b, h = (bh // H).to(tl.int64), bh % H
    C = H * D
    q_ptr, k_ptr, v_ptr = _head_pointers(qkv_ptr, b, h, stride_b, stride_c, H, D)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (offs_m < T)[:, None] & (offs_d < D)[None, :]
    q = tl.load(q_ptr + offs_m.to(tl.int64)[:, None] * stride_t + offs_d[None, :] * stride_c, mask=mask, other=0.0)
    row_keys, s1 = offs_m, 0
    if DROPOUT:
        s0, s1 = dropout_words(tl.load(seed_ptr), bh)
        row_keys = dropout_keys(s0, offs_m)

    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    m_i = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    l_i = tl.zeros((BLOCK_M,), dtype=tl.float32)
    begin, first = _first_keys(starts_ptr, b * T, start_m, offs_m, T, DOCUMENTS, BLOCK_N)
    diagonal = start_m // BLOCK_N * BLOCK_N
    acc, m_i, l_i = _fwd_tiles(
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_t, stride_c, begin, diagonal, T, qk_scale,
        offs_m, first, row_keys, s1, threshold, D, False, DOCUMENTS, DROPOUT, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m_i, l_i = _fwd_tiles(
        acc, m_i, l_i, q, k_ptr, v_ptr, stride_t, stride_c,
        diagonal, tl.minimum(start_m + BLOCK_M, T), T, qk_scale,
        offs_m, first, row_keys, s1, threshold, D, True, DOCUMENTS, DROPOUT, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    o = acc * (z / l_i)[:, None]
    o_ptrs = o_ptr + (b * T + offs_m)[:, None] * C + h * D + offs_d[None, :]
    tl.store(o_ptrs, o.to(o_ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, m_i + tl.log2(l_i), mask=offs_m < T)


@triton.jit
def _attention_delta_kernel(
    do_ptr, o_ptr, delta_ptr,  # do, o: (B, T, C)  delta: (B, H, T)
    stride_dob, stride_dot, stride_doc, T, H, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // tiles
    b, h = (bh // H).to(tl.int64), bh % H
    offs_m = (pid % tiles) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (offs_m < T)[:, None] & (offs_d < D)[None, :]
    do_ptrs = do_ptr + b * stride_dob + offs_m[:, None] * stride_dot + (h * D + offs_d)[None, :] * stride_doc
    do = tl.load(do_ptrs, mask=mask, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + (b * T + offs_m)[:, None] * (H * D) + (h * D + offs_d)[None, :], mask=mask, other=0.0)
    tl.store(delta_ptr + bh.to(tl.int64) * T + offs_m, tl.sum(do * o.to(tl.float32), 1), mask=offs_m < T)


@triton.jit
def _dkv_tiles(
    dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, starts_ptr, stride_t, stride_c, stride_dot, stride_doc,
    start, stop, T, qk_scale, offs_n, column_keys, s0, threshold, z,
    D: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the query tiles in [start, stop) to dk and dv. All score tiles are transposed, (BLOCK_N, BLOCK_M)."""
    offs_m = start + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    for _ in range(start, stop, BLOCK_M):
        rows, mask_m = offs_m.to(tl.int64), offs_m < T
        mask = mask_m[:, None] & (cols < D)[None, :]
        q = tl.load(q_ptr + rows[:, None] * stride_t + cols[None, :] * stride_c, mask=mask, other=0.0)
        # lse = inf makes p = 0 on the rows past T
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
        sT = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if MASKED:
            sT = tl.where(offs_m[None, :] >= offs_n[:, None], sT, float("-inf"))
        if DOCUMENTS:
            first = tl.load(starts_ptr + offs_m, mask=mask_m, other=0)
            sT = tl.where(first[None, :] <= offs_n[:, None], sT, float("-inf"))
        pT = tl.exp2(sT * qk_scale - lse[None, :])

        do = tl.load(do_ptr + rows[:, None] * stride_dot + cols[None, :] * stride_doc, mask=mask, other=0.0)
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
        dpT = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        if DROPOUT:
            row_keys = dropout_keys(s0, offs_m)
            zT = tl.where(keep_tile(row_keys[None, :], column_keys[:, None], threshold), z, 0.0)
            dpT = dpT * zT
            dv = tl.dot((pT * zT).to(do.dtype), do, dv, input_precision=PRECISION)
        else:
            dv = tl.dot(pT.to(do.dtype), do, dv, input_precision=PRECISION)
        dsT = pT * (dpT - delta[None, :])
        dk = tl.dot(dsT.to(q.dtype), q, dk, input_precision=PRECISION)
        offs_m += BLOCK_M
    return dk, dv


@triton.jit
def _attention_dkv_kernel(
    qkv_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr,  # qkv, dqkv: (B, T, 3C)  lse, delta: (B, H, T)
    starts_ptr, stops_ptr,  # (B, T)
    stride_b, stride_t, stride_c, stride_dob, stride_dot, stride_doc, T, H, sm_scale, qk_scale, threshold, z,
    D: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    bh = pid // tiles
    start_n = (pid % tiles) * BLOCK_N  # the first keys are seen by the most queries: they start first
    b, h = (bh // H).to(tl.int64), bh % H
    C = H * D
    q_ptr, k_ptr, v_ptr = _head_pointers(qkv_ptr, b, h, stride_b, stride_c, H, D)
    do_ptr += b * stride_dob + (h * D).to(tl.int64) * stride_doc
    lse_ptr += bh.to(tl.int64) * T
    delta_ptr += bh.to(tl.int64) * T

    offs_n = start_n + tl.arange(0, BLOCK_N)
    keys = offs_n.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask = (offs_n < T)[:, None] & (offs_d < D)[None, :]
    k = tl.load(k_ptr + keys[:, None] * stride_t + offs_d[None, :] * stride_c, mask=mask, other=0.0)
    v = tl.load(v_ptr + keys[:, None] * stride_t + offs_d[None, :] * stride_c, mask=mask, other=0.0)
    column_keys, s0 = offs_n, 0
    if DROPOUT:
        s0, s1 = dropout_words(tl.load(seed_ptr), bh)
        column_keys = dropout_keys(s1, offs_n)

    dk = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    diagonal = start_n // BLOCK_M * BLOCK_M
    full = tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M  # from here on every query sees every key of the tile
    end = T
    if DOCUMENTS:  # documents follow one another, so the last key's is the latest
        starts_ptr += b * T
        end = tl.load(stops_ptr + b * T + tl.minimum(start_n + BLOCK_N, T) - 1)
    dk, dv = _dkv_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, starts_ptr, stride_t, stride_c, stride_dot, stride_doc,
        diagonal, tl.minimum(full, end), T, qk_scale, offs_n, column_keys, s0, threshold, z,
        D, True, DOCUMENTS, DROPOUT, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dk, dv = _dkv_tiles(
        dk, dv, k, v, q_ptr, do_ptr, lse_ptr, delta_ptr, starts_ptr, stride_t, stride_c, stride_dot, stride_doc,
        full, end, T, qk_scale, offs_n, column_keys, s0, threshold, z,
        D, False, DOCUMENTS, DROPOUT, PRECISION, BLOCK_M, BLOCK_D,
    )  # fmt: skip

    dk_ptrs = dqkv_ptr + (b * T + keys)[:, None] * (3 * C) + C + h * D + offs_d[None, :]
    tl.store(dk_ptrs, (dk * sm_scale).to(dqkv_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptrs + C, dv.to(dqkv_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, k_ptr, v_ptr, stride_t, stride_c, start, stop, T,
    qk_scale, offs_m, first, row_keys, s1, threshold, z,
    D: tl.constexpr, MASKED: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles in [start, stop) to dq."""
    offs_n = start + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_D).to(tl.int64)
    for _ in range(start, stop, BLOCK_N):
        mask = (offs_n < T)[:, None] & (cols < D)[None, :]
        offsets = offs_n.to(tl.int64)[:, None] * stride_t + cols[None, :] * stride_c
        k = tl.load(k_ptr + offsets, mask=mask, other=0.0)
        v = tl.load(v_ptr + offsets, mask=mask, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            s = tl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))
        if DOCUMENTS:
            s = tl.where(first[:, None] <= offs_n[None, :], s, float("-inf"))
        p = tl.exp2(s * qk_scale - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            column_keys = dropout_keys(s1, offs_n)
            dp = dp * tl.where(keep_tile(row_keys[:, None], column_keys[None, :], threshold), z, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        offs_n += BLOCK_N
    return dq


@triton.jit
def _attention_dq_kernel(
    qkv_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr, seed_ptr,  # qkv, dqkv: (B, T, 3C)  lse, delta: (B, H, T)
    starts_ptr, stops_ptr,  # (B, T)
    stride_b, stride_t, stride_c, stride_dob, stride_dot, stride_doc, T, H, sm_scale, qk_scale, threshold, z,
    D: tl.constexpr, DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    bh = pid // tiles
    start_m = (tiles - 1 - pid % tiles) * BLOCK_M  # the longest rows of a head start first: they end last
    b, h = (bh // H).to(tl.int64), bh % H
    C = H * D
    q_ptr, k_ptr, v_ptr = _head_pointers(qkv_ptr, b, h, stride_b, stride_c, H, D)
    do_ptr += b * stride_dob + (h * D).to(tl.int64) * stride_doc

    offs_m = start_m + tl.arange(0, BLOCK_M)
    rows = offs_m.to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    mask_m = offs_m < T
    mask = mask_m[:, None] & (offs_d < D)[None, :]
    q = tl.load(q_ptr + rows[:, None] * stride_t + offs_d[None, :] * stride_c, mask=mask, other=0.0)
    do = tl.load(do_ptr + rows[:, None] * stride_dot + offs_d[None, :] * stride_doc, mask=mask, other=0.0)
    lse = tl.load(lse_ptr + bh.to(tl.int64) * T + rows, mask=mask_m, other=float("inf"))
    delta = tl.load(delta_ptr + bh.to(tl.int64) * T + rows, mask=mask_m, other=0.0)
    row_keys, s1 = offs_m, 0
    if DROPOUT:
        s0, s1 = dropout_words(tl.load(seed_ptr), bh)
        row_keys = dropout_keys(s0, offs_m)

    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    begin, first = _first_keys(starts_ptr, b * T, start_m, offs_m, T, DOCUMENTS, BLOCK_N)
    diagonal = start_m // BLOCK_N * BLOCK_N
    dq = _dq_tiles(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_t, stride_c, begin, diagonal, T,
        qk_scale, offs_m, first, row_keys, s1, threshold, z,
        D, False, DOCUMENTS, DROPOUT, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, k_ptr, v_ptr, stride_t, stride_c, diagonal, tl.minimum(start_m + BLOCK_M, T), T,
        qk_scale, offs_m, first, row_keys, s1, threshold, z,
        D, True, DOCUMENTS, DROPOUT, PRECISION, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    dq_ptrs = dqkv_ptr + (b * T + rows)[:, None] * (3 * C) + h * D + offs_d[None, :]
    tl.store(dq_ptrs, (dq * sm_scale).to(dqkv_ptr.dtype.element_ty), mask=mask)


def _precision() -> str:
    """How float32 products are taken: as torch.set_float32_matmul_precision says ("highest" is the default)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _scales(sm_scale: float, dropout_p: float) -> tuple[float, int, float]:
    """(qk_scale, threshold, z) as the kernels take them."""
    return sm_scale * _LOG2_E, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)


def _document_bounds(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """documents: (B, T) -> the first position of each position's document and the one past its last: (B, T) int32."""
    if documents is None:
        return None, None
    T = documents.shape[1]
    position = torch.arange(T, device=documents.device, dtype=torch.int32).expand(documents.shape)
    differs = documents[:, 1:] != documents[:, :-1]
    starts = F.pad(position[:, 1:].where(differs, 0), (1, 0)).cummax(1).values
    stops = F.pad(position[:, 1:].where(differs, T), (0, 1), value=T).flip(1).cummin(1).values.flip(1)
    return starts.contiguous(), stops.contiguous()


@torch.library.custom_op("gpt2::attention_fwd", mutates_args=())
def attention_fwd(
    qkv: Tensor, seed: Tensor | None, documents: Tensor | None, n_head: int, dropout_p: float, sm_scale: float
) -> tuple[Tensor, Tensor]:
    """qkv: (B, T, 3C) any strides; seed: () int64, for dropout; documents: (B, T) integers
    -> o: (B, T, C) contiguous, lse: (B, H, T) float32, base 2.
    """
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    D = C // n_head
    o = torch.empty((B, T, C), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, n_head, T), dtype=torch.float32, device=qkv.device)
    tile = _tiles(D, qkv.dtype, arch_of(qkv.device), seed is not None)["fwd"]
    qk_scale, threshold, z = _scales(sm_scale, dropout_p)
    starts, _ = _document_bounds(documents)
    launch(
        _attention_fwd_kernel, (B * n_head * triton.cdiv(T, tile["BLOCK_M"]),),
        qkv, o, lse, seed, starts, *qkv.stride(), T, n_head, qk_scale, threshold, z,
        D=D, DOCUMENTS=starts is not None, DROPOUT=seed is not None, PRECISION=_precision(), **tile,
    )  # fmt: skip
    return o, lse


@attention_fwd.register_fake
def _(qkv, seed, documents, n_head, dropout_p, sm_scale):
    B, T, C = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    return qkv.new_empty((B, T, C)), qkv.new_empty((B, n_head, T), dtype=torch.float32)


@torch.library.custom_op("gpt2::attention_bwd", mutates_args=())
def attention_bwd(
    do: Tensor, qkv: Tensor, o: Tensor, lse: Tensor, seed: Tensor | None, documents: Tensor | None,
    n_head: int, dropout_p: float, sm_scale: float,
) -> Tensor:  # fmt: skip
    """do: (B, T, C), qkv: (B, T, 3C), any strides; o, lse: of the forward -> dqkv: (B, T, 3C) contiguous."""
    B, T, C = o.shape
    D = C // n_head
    dqkv = torch.empty((B, T, 3 * C), dtype=qkv.dtype, device=qkv.device)
    delta = torch.empty_like(lse)
    tiles = _tiles(D, qkv.dtype, arch_of(qkv.device), seed is not None)
    qk_scale, threshold, z = _scales(sm_scale, dropout_p)
    programs = B * n_head
    launch(
        _attention_delta_kernel, (programs * triton.cdiv(T, tiles["delta"]["BLOCK_M"]),),
        do, o, delta, *do.stride(), T, n_head, D=D, **tiles["delta"],
    )  # fmt: skip
    starts, stops = _document_bounds(documents)
    tensors = (qkv, do, lse, delta, dqkv, seed, starts, stops)
    args = (*tensors, *qkv.stride(), *do.stride(), T, n_head, sm_scale, qk_scale, threshold, z)
    meta = {"D": D, "DOCUMENTS": starts is not None, "DROPOUT": seed is not None, "PRECISION": _precision()}
    dkv, dq = tiles["dkv"], tiles["dq"]
    launch(_attention_dkv_kernel, (programs * triton.cdiv(T, dkv["BLOCK_N"]),), *args, **meta, **dkv)
    launch(_attention_dq_kernel, (programs * triton.cdiv(T, dq["BLOCK_M"]),), *args, **meta, **dq)
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


def head_too_wide(head_dim: int) -> str | None:
    """Why heads of this size do not fit the kernels, in words, or None where they do."""
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

    documents: (B, T) integers; neighbours with one number are one document, and attention stays inside a document, so
    that several can be packed into a row. Key tiles of other documents are skipped.
    ValueError if 3 * n_head does not divide the last dimension, a shape does not fit or a number is out of range.
    """
    if qkv.ndim != 3 or n_head < 1 or qkv.shape[-1] % (3 * n_head) or qkv.shape[-1] == 0:
        raise ValueError(
            f"causal_attention: qkv must be (B, T, 3 * n_head * D), got {tuple(qkv.shape)}, n_head {n_head}"
        )
    D = qkv.shape[-1] // (3 * n_head)
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"causal_attention: dropout_p must be in [0, 1), got {dropout_p}")
    if not sm_scale > 0.0:
        raise ValueError(f"causal_attention: sm_scale must be positive, got {sm_scale}")
    if documents is not None and (documents.shape != qkv.shape[:2] or documents.is_floating_point()):
        raise ValueError(
            f"causal_attention: documents must be integers of {tuple(qkv.shape[:2])}, got {documents.dtype} "
            f"{tuple(documents.shape)}"
        )
    if use_triton("causal_attention", qkv, head_too_wide(D), H=n_head, D=D, dropout_p=0.5 if dropout_p else 0.0):
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


def _bytes_moved(case: Case, dtype: torch.dtype) -> tuple[int, int]:
    btc = case["B"] * case["T"] * case["H"] * case["D"] * dtype.itemsize
    return 4 * btc, 8 * btc


def _flops(case: Case) -> tuple[int, int]:
    """Two products forward, five backward (a recomputed one is not counted), half of each masked away."""
    product = case["B"] * case["H"] * case["T"] ** 2 * case["D"]
    return 2 * product, 5 * product


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
            {"B": 1, "H": 1, "T": 128, "D": 64, "why": "exactly one tile, one head"},
            {"B": 2, "H": 1, "T": 129, "D": 64, "why": "one row past a tile"},
            {"B": 1, "H": 2, "T": 257, "D": 40, "why": "full and diagonal tiles, head size not a power of two"},
            {"B": 1, "H": 1, "T": 200, "D": 128, "why": "wide head"},
            {"B": 1, "H": 1, "T": 97, "D": 200, "why": "widest tile, masked in both directions"},
        ),
        space={
            "B": range(3),
            "H": range(1, 4),
            "T": range(150),
            "D": range(1, 80),
            "dropout_p": (0.0, 0.3),
            "documents": range(4),
        },
        bench_cases=tuple({"B": 65536 // T, "H": 12, "T": T, "D": 64} for T in (512, 1024, 2048, 4096)),
        bytes_moved=_bytes_moved,
        flops=_flops,
        large=1.5,  # scores grow with the square; near-ties between large ones are rounding luck, in eager as here
    )
)
