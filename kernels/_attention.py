"""The Triton kernels of attention: forward, dq with delta, dk and dv. Formulas and shapes are those of attention.py.

A tile of q, k, v or do is read in one of two ways. As a tensor descriptor (B, T, H, D), where hardware copies whole
tiles and fills what lies outside with zeros, so that nothing of the next sequence comes in; for compute capability 9.0
and newer. Or through pointers, which take any strides. The argument x of a kernel is a descriptor or a pointer by
META.DESCRIPTORS; its stride: of b, t, h, d. Descriptors cannot be in tuples, all else that belongs together is.
"""

from collections import namedtuple

from ._dropout import dropout_hash, dropout_words, keep_tile
from ._triton import tl, triton

# Compile-time constants of a launch.
Meta = namedtuple("Meta", "D DOCUMENTS DROPOUT PRECISION DESCRIPTORS BLOCK_M BLOCK_N BLOCK_D")


@triton.jit
def _program(T, H, BLOCK: tl.constexpr):
    """Which head of which sequence this program works on, as bh, b and h, which tile of it, and of how many."""
    tiles = tl.cdiv(T, BLOCK)
    pid = tl.program_id(0)
    bh = pid // tiles
    return bh, bh // H, bh % H, pid % tiles, tiles


@triton.jit
def _head(x, stride, b, h, META: tl.constexpr):
    """Head h of sequence b of x: (B, T, H, D), as _load_tile takes it."""
    if not META.DESCRIPTORS:
        x += b.to(tl.int64) * stride[0] + h.to(tl.int64) * stride[2]
    return x, stride, b, h


@triton.jit
def _load_tile(head, t, T, BLOCK_T: tl.constexpr, CHECK_BOUNDS: tl.constexpr, META: tl.constexpr):
    """Positions t to t + BLOCK_T of a head, (BLOCK_T, BLOCK_D); 0 outside (T, D). CHECK_BOUNDS: if some may be."""
    x, stride, b, h = head
    if META.DESCRIPTORS:
        tile = x.load([b, t, h, 0]).reshape(BLOCK_T, META.BLOCK_D)
    else:
        offs_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)
        offs_d = tl.arange(0, META.BLOCK_D).to(tl.int64)
        x_ptrs = x + offs_t[:, None] * stride[1] + offs_d[None, :] * stride[3]
        if CHECK_BOUNDS:
            tile = tl.load(x_ptrs, mask=(offs_t < T)[:, None] & (offs_d < META.D)[None, :], other=0.0)
        elif META.D == META.BLOCK_D:
            tile = tl.load(x_ptrs)
        else:
            tile = tl.load(x_ptrs, mask=(offs_d < META.D)[None, :], other=0.0)
    return tile


@triton.jit
def _store_tile(x_ptr, x, stride, b, t, h, T, BLOCK_T: tl.constexpr, META: tl.constexpr):
    """The reverse of _load_tile, through pointers. x: (BLOCK_T, BLOCK_D); stride: of b, t, h, and 1."""
    offs_t, offs_d = t + tl.arange(0, BLOCK_T).to(tl.int64), tl.arange(0, META.BLOCK_D)
    x_ptr += b.to(tl.int64) * stride[0] + h.to(tl.int64) * stride[2]
    x_ptrs = x_ptr + offs_t[:, None] * stride[1] + offs_d[None, :]
    tl.store(x_ptrs, x.to(x_ptr.dtype.element_ty), mask=(offs_t < T)[:, None] & (offs_d < META.D)[None, :])


@triton.jit
def _query_rows(doc_ptr, seed_ptr, b, bh, start_m, offs_m, T, META: tl.constexpr):
    """For a query tile: begin of its keys; first_key and row_hash, (BLOCK_M,); s1, the seed of the columns."""
    row_hash, s1 = offs_m, 0
    if META.DROPOUT:
        s0, s1 = dropout_words(tl.load(seed_ptr), bh)
        row_hash = dropout_hash(s0, offs_m)  # (BLOCK_M,)
    begin, first_key = 0, offs_m * 0
    if META.DOCUMENTS:  # documents follow one another, so the first query's is the earliest
        doc_ptr += 2 * b.to(tl.int64) * T
        begin = tl.load(doc_ptr + start_m) // META.BLOCK_N * META.BLOCK_N
        first_key = tl.load(doc_ptr + offs_m, mask=offs_m < T, other=0)  # (BLOCK_M,)
    return begin, first_key, row_hash, s1


@triton.jit
def _fwd_inner(
    state, q, k_head, v_head,  # acc: (BLOCK_M, BLOCK_D), m_i, l_i: (BLOCK_M,); (BLOCK_M, BLOCK_D)
    start, stop, T, qk_scale, rows, keep_args,  # offs_m, first_key: (BLOCK_M,); row_hash: (BLOCK_M,), s1, threshold
    DIAGONAL: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Online softmax over the key tiles in [start, stop). DIAGONAL: keys may follow the query."""
    acc, m_i, l_i = state
    offs_m, first_key = rows
    row_hash, s1, threshold = keep_args
    for n in range(start, stop, META.BLOCK_N):
        offs_n = n + tl.arange(0, META.BLOCK_N)
        k = _load_tile(k_head, n, T, META.BLOCK_N, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)
        s = tl.dot(q, tl.trans(k), input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_N)
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

        v = _load_tile(v_head, n, T, META.BLOCK_N, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_D)
    return acc, m_i, l_i


@triton.jit
def attention_fwd_kernel(
    q, k, v,  # (B, T, H, D) each
    strides,  # of q, k, v, o
    o_ptr, stats,  # (B, T, H, D); lse_ptr: (B, H, T), doc_ptr: (B, 2, T) or None
    T, H, numbers, META: tl.constexpr,  # sm_scale, qk_scale, seed_ptr: () or None, threshold, z
):  # fmt: skip
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_D: tl.constexpr = META.BLOCK_D
    bh, b, h, tile, tiles = _program(T, H, BLOCK_M)
    start_m = (tiles - 1 - tile) * BLOCK_M  # later query tiles see more keys: start them first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = _load_tile(_head(q, strides[0], b, h, META), start_m, T, BLOCK_M, True, META)
    k_head, v_head = _head(k, strides[1], b, h, META), _head(v, strides[2], b, h, META)
    lse_ptr, doc_ptr = stats
    _, qk_scale, seed_ptr, threshold, z = numbers
    begin, first_key, row_hash, s1 = _query_rows(doc_ptr, seed_ptr, b, bh, start_m, offs_m, T, META)
    rows, keep_args = (offs_m, first_key), (row_hash, s1, threshold)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    m_i, l_i = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32), tl.zeros((BLOCK_M,), dtype=tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N
    state = (acc, m_i, l_i)
    state = _fwd_inner(state, q_tile, k_head, v_head, begin, diagonal, T, qk_scale, rows, keep_args, False, META)
    end = tl.minimum(start_m + BLOCK_M, T)
    state = _fwd_inner(state, q_tile, k_head, v_head, diagonal, end, T, qk_scale, rows, keep_args, True, META)
    acc, m_i, l_i = state

    _store_tile(o_ptr, acc * (z / l_i)[:, None], strides[3], b, start_m, h, T, BLOCK_M, META)
    tl.store(lse_ptr + bh.to(tl.int64) * T + offs_m, m_i + tl.log2(l_i), mask=offs_m < T)


@triton.jit
def _dq_inner(
    dq, q, do, heads,  # (BLOCK_M, BLOCK_D) each; k_head, v_head
    start, stop, T, qk_scale,
    rows, keep_args,  # offs_m, first_key, lse, delta: (BLOCK_M,); row_hash: (BLOCK_M,), s1, threshold, z
    DIAGONAL: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Adds the key tiles in [start, stop) to dq."""
    k_head, v_head = heads
    offs_m, first_key, lse, delta = rows
    row_hash, s1, threshold, z = keep_args
    for n in range(start, stop, META.BLOCK_N):
        offs_n = n + tl.arange(0, META.BLOCK_N)
        k = _load_tile(k_head, n, T, META.BLOCK_N, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)
        v = _load_tile(v_head, n, T, META.BLOCK_N, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)
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
    return dq


@triton.jit
def attention_dq_kernel(
    q, k, v, do,  # (B, T, H, D) each
    strides,  # of q, k, v, do, o, and of a gradient
    o_ptr, stats,  # (B, T, H, D); lse_ptr, delta_ptr, which is written: (B, H, T), doc_ptr: (B, 2, T) or None
    grads,  # dq_ptr, dk_ptr, dv_ptr: (B, T, H, D)
    T, H, numbers, META: tl.constexpr,  # sm_scale, qk_scale, seed_ptr: () or None, threshold, z
):  # fmt: skip
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_D: tl.constexpr = META.BLOCK_D
    bh, b, h, tile, tiles = _program(T, H, BLOCK_M)
    start_m = (tiles - 1 - tile) * BLOCK_M  # later query tiles see more keys: start them first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = _load_tile(_head(q, strides[0], b, h, META), start_m, T, BLOCK_M, True, META)
    do_tile = _load_tile(_head(do, strides[3], b, h, META), start_m, T, BLOCK_M, True, META)
    heads = (_head(k, strides[1], b, h, META), _head(v, strides[2], b, h, META))

    offs_d, stride_o = tl.arange(0, BLOCK_D), strides[4]
    o_ptr += b.to(tl.int64) * stride_o[0] + h * stride_o[2]
    o_ptrs = o_ptr + offs_m.to(tl.int64)[:, None] * stride_o[1] + offs_d[None, :]
    o = tl.load(o_ptrs, mask=(offs_m < T)[:, None] & (offs_d < META.D)[None, :], other=0.0)  # (BLOCK_M, BLOCK_D)
    delta = tl.sum(do_tile.to(tl.float32) * o.to(tl.float32), 1)  # (BLOCK_M,)
    lse_ptr, delta_ptr, doc_ptr = stats
    rows = bh.to(tl.int64) * T + offs_m
    tl.store(delta_ptr + rows, delta, mask=offs_m < T)
    lse = tl.load(lse_ptr + rows, mask=offs_m < T, other=0.0)  # past T q = do = 0, so that p = 1 and ds = 0

    sm_scale, qk_scale, seed_ptr, threshold, z = numbers
    begin, first_key, row_hash, s1 = _query_rows(doc_ptr, seed_ptr, b, bh, start_m, offs_m, T, META)
    rows, keep_args = (offs_m, first_key, lse, delta), (row_hash, s1, threshold, z)
    dq = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N
    dq = _dq_inner(dq, q_tile, do_tile, heads, begin, diagonal, T, qk_scale, rows, keep_args, False, META)
    end = tl.minimum(start_m + BLOCK_M, T)
    dq = _dq_inner(dq, q_tile, do_tile, heads, diagonal, end, T, qk_scale, rows, keep_args, True, META)
    _store_tile(grads[0], dq * sm_scale, strides[5], b, start_m, h, T, BLOCK_M, META)


@triton.jit
def _dkv_inner(
    grads, k, v,  # dk, dv; k; v: (BLOCK_N, BLOCK_D)
    queries,  # q_head, do_head; lse_ptr, delta_ptr, doc_ptr: of this head, (T,) each
    start, stop, T, qk_scale,
    offs_n, keep_args,  # (BLOCK_N,); col_hash: (BLOCK_N,), s0, threshold, z
    DIAGONAL: tl.constexpr, META: tl.constexpr,
):  # fmt: skip
    """Adds the query tiles in [start, stop) to dk and dv. All score tiles are transposed, (BLOCK_N, BLOCK_M)."""
    dk, dv = grads
    q_head, do_head, lse_ptr, delta_ptr, doc_ptr = queries
    col_hash, s0, threshold, z = keep_args
    for m in range(start, stop, META.BLOCK_M):
        offs_m = m + tl.arange(0, META.BLOCK_M)
        mask_m = offs_m < T
        q = _load_tile(q_head, m, T, META.BLOCK_M, True, META)  # (BLOCK_M, BLOCK_D)
        # past T q = do = lse = delta = 0, so that p = 1, dp = ds = 0, and nothing is added
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0)  # (BLOCK_M,)
        sT = tl.dot(k, tl.trans(q), input_precision=META.PRECISION)  # (BLOCK_N, BLOCK_M)
        if DIAGONAL:
            sT = tl.where(offs_m[None, :] >= offs_n[:, None], sT, float("-inf"))
        if META.DOCUMENTS:
            first_key = tl.load(doc_ptr + offs_m, mask=mask_m, other=0)  # (BLOCK_M,)
            sT = tl.where(first_key[None, :] <= offs_n[:, None], sT, float("-inf"))
        pT = tl.exp2(sT * qk_scale - lse[None, :])  # (BLOCK_N, BLOCK_M)

        do = _load_tile(do_head, m, T, META.BLOCK_M, True, META)  # (BLOCK_M, BLOCK_D)
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
    return dk, dv


@triton.jit
def attention_dkv_kernel(
    q, k, v, do,  # (B, T, H, D) each
    strides,  # of q, k, v, do, o, and of a gradient
    stats, grads,  # lse_ptr, delta_ptr: (B, H, T), doc_ptr: (B, 2, T) or None; dq_ptr, dk_ptr, dv_ptr: (B, T, H, D)
    T, H, numbers, META: tl.constexpr,  # sm_scale, qk_scale, seed_ptr: () or None, threshold, z
):  # fmt: skip
    BLOCK_M: tl.constexpr = META.BLOCK_M
    BLOCK_N: tl.constexpr = META.BLOCK_N
    BLOCK_D: tl.constexpr = META.BLOCK_D
    bh, b, h, tile, _ = _program(T, H, BLOCK_N)
    start_n = tile * BLOCK_N  # earlier key tiles are seen by more queries: start them first
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k_tile = _load_tile(_head(k, strides[1], b, h, META), start_n, T, BLOCK_N, True, META)
    v_tile = _load_tile(_head(v, strides[2], b, h, META), start_n, T, BLOCK_N, True, META)
    lse_ptr, delta_ptr, doc_ptr = stats
    lse_ptr += bh.to(tl.int64) * T
    delta_ptr += bh.to(tl.int64) * T
    end = T
    if META.DOCUMENTS:  # documents follow one another, so the last key's is the latest
        doc_ptr += 2 * b.to(tl.int64) * T
        end = tl.load(doc_ptr + T + tl.minimum(start_n + BLOCK_N, T) - 1)
    q_head, do_head = _head(q, strides[0], b, h, META), _head(do, strides[3], b, h, META)
    queries = (q_head, do_head, lse_ptr, delta_ptr, doc_ptr)
    sm_scale, qk_scale, seed_ptr, threshold, z = numbers
    col_hash, s0 = offs_n, 0
    if META.DROPOUT:
        s0, s1 = dropout_words(tl.load(seed_ptr), bh)
        col_hash = dropout_hash(s1, offs_n)
    keep_args = (col_hash, s0, threshold, z)
    dkv = (tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32), tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32))
    diagonal = start_n // BLOCK_M * BLOCK_M
    full = tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M  # from here on every query sees every key
    stop = tl.minimum(full, end)
    dkv = _dkv_inner(dkv, k_tile, v_tile, queries, diagonal, stop, T, qk_scale, offs_n, keep_args, True, META)
    dk, dv = _dkv_inner(dkv, k_tile, v_tile, queries, full, end, T, qk_scale, offs_n, keep_args, False, META)
    _store_tile(grads[1], dk * sm_scale, strides[5], b, start_n, h, T, BLOCK_N, META)
    _store_tile(grads[2], dv, strides[5], b, start_n, h, T, BLOCK_N, META)
