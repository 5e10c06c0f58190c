"""python tests/mutants.py: breaks every kernel by hand, one line at a time, and sees the suite turn red.

A mutant that survives is a hole in the suite. Each runs in a copy of the repository of its own.
"""

import argparse
import concurrent.futures
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
COPIED = ("kernels", "model", "bench", "tests", "pyproject.toml")
SUITE = (
    "test_kernels.py",
    "test_attention.py",
    "test_losses.py",
    "test_decode.py",
    "test_properties.py",
    "test_addresses.py",
    "test_linear.py",
    "test_embedding.py",
)
# The tests that concern a file of kernels/, as pytest's -k takes them.
CONCERNS = {
    "_dropout": "dropout or causal_attention or add_layer_norm",
    "_linear": "float32_parameters or needs_no_gradient",
    "_launch": "layer_norm or gelu or rowwise",
    "_attention": "(attention or dropout or document or future or scores) and not decode and not layer_norm",
    "add_layer_norm": "add_layer_norm or residual or added or bias_before",
    "attention": "(attention or dropout or document or future or scores) and not decode and not layer_norm",
    "attention_qkv": "attention_qkv or three_tensors",
    "cross_entropy": "(losses or cross_entropy) and not linear",
    "decode_attention": "decode",
    "embedding": "embedding",
    "gelu": "gelu or rowwise or empty_rows or float32_weights",
    "layer_norm": "(layer_norm or rowwise or empty_rows or float32_weights) and not add_layer_norm",
    "linear_cross_entropy": "linear or losses",
}
MINUTES = 20  # a mutant that still runs then is taken for one that never ends


@dataclass(frozen=True)
class Mutant:
    """One wrong line. op: a file of kernels/, without its ending; old: occurs in it once; new: in its place."""

    name: str
    op: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The text with the line changed. ValueError if there is not exactly one place for it."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {text.count(self.old)} times in kernels/{self.op}.py")
        return text.replace(self.old, self.new)

    def text(self) -> str:
        """The changed file."""
        return self.applied((ROOT / "kernels" / f"{self.op}.py").read_text())

    @property
    def concern(self) -> str:
        """The tests that can see it; of a short address those of long ones alone, which others would only delay."""
        return f"({CONCERNS[self.op]}) and (addresses or far)" if self.name.startswith("int32") else CONCERNS[self.op]


MUTANTS = (
    # --- attention, forward
    Mutant("the diagonal is masked", "_attention",
           "        if DIAGONAL:\n"
           '            s = tl.where(offs_m[:, None] >= offs_n[None, :], s, float("-inf"))\n'
           "        if META.DOCUMENTS:\n"
           '            s = tl.where(first_key[:, None] <= offs_n[None, :], s, float("-inf"))\n\n',
           "        if DIAGONAL:\n"
           '            s = tl.where(offs_m[:, None] > offs_n[None, :], s, float("-inf"))\n'
           "        if META.DOCUMENTS:\n"
           '            s = tl.where(first_key[:, None] <= offs_n[None, :], s, float("-inf"))\n\n'),
    Mutant("one key past the text", "_attention",
           "v = _load_tile(v_head, n, T, META.BLOCK_N, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)\n        acc",
           "v = _load_tile(v_head, n, T + 1, META.BLOCK_N, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)\n        acc"),
    Mutant("the sum is not rescaled", "_attention", "l_i = l_i * alpha + tl.sum(p, 1)", "l_i = l_i + tl.sum(p, 1)"),
    Mutant("no guard where no score is finite", "_attention", 'tl.where(m_new == float("-inf"), 0.0, m_new)', "m_new"),
    Mutant("the maximum is not scaled", "_attention", "tl.max(s, 1) * qk_scale", "tl.max(s, 1)"),
    Mutant("lse without the sum", "_attention", "m_i + tl.log2(l_i), mask", "m_i, mask"),
    Mutant("kept probabilities are not scaled up", "_attention", "acc * (z / l_i)[:, None]",
           "acc * (1.0 / l_i)[:, None]"),
    Mutant("the document's first key is skipped", "_attention",
           's = tl.where(first_key[:, None] <= offs_n[None, :], s, float("-inf"))\n\n        # The maximum',
           's = tl.where(first_key[:, None] < offs_n[None, :], s, float("-inf"))\n\n        # The maximum'),
    Mutant("documents begin a tile late", "_attention",
           "tl.load(doc_ptr + start_m) // META.BLOCK_N * META.BLOCK_N",
           "tl.load(doc_ptr + start_m) // META.BLOCK_N * META.BLOCK_N + META.BLOCK_N"),
    Mutant("documents of the first sequence", "_attention", "        doc_ptr += 2 * b.to(tl.int64) * T\n        begin",
           "        begin"),
    Mutant("pointers to the next head", "_attention", "x += b.to(tl.int64) * stride[0] + h.to(tl.int64) * stride[2]",
           "x += b.to(tl.int64) * stride[0] + (h + 1).to(tl.int64) * stride[2]"),
    Mutant("descriptors of the next head", "_attention", "x.load([b, t, h, 0])", "x.load([b, t, h + 1, 0])"),
    Mutant("descriptors of the first sequence", "_attention", "x.load([b, t, h, 0])", "x.load([b * 0, t, h, 0])"),
    Mutant("int32 rows of the output and the gradients", "_attention",
           "offs_t, offs_d = t + tl.arange(0, BLOCK_T).to(tl.int64), tl.arange(0, META.BLOCK_D)",
           "offs_t, offs_d = t + tl.arange(0, BLOCK_T), tl.arange(0, META.BLOCK_D)"),
    Mutant("int32 steps through the sequence", "_attention", "offs_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)",
           "offs_t = t + tl.arange(0, BLOCK_T)"),
    Mutant("values take the keys' place", "attention", "return q.chunk(3, 2) if",
           "return [q.chunk(3, 2)[i] for i in (0, 1, 1)] if"),
    Mutant("descriptors of unaligned rows", "attention", "step % 16 == 0 for step in steps)",
           "step % 4 == 0 for step in steps)"),
    Mutant("the last document ends early", "attention", "(0, 1), value=T)", "(0, 1), value=T - 1)"),
    Mutant("the values are the keys", "attention_qkv", "attention_fwd(q, k, v, seed", "attention_fwd(q, k, k, seed"),
    # --- attention, backward
    Mutant("delta in half precision", "_attention", "tl.sum(do_tile.to(tl.float32) * o.to(tl.float32), 1)",
           "tl.sum((do_tile * o).to(tl.float16).to(tl.float32), 1)"),
    Mutant("delta skips a column", "_attention", "o = tl.load(o_ptrs, mask=(offs_m < T)[:, None] & (offs_d < META.D)",
           "o = tl.load(o_ptrs, mask=(offs_m < T)[:, None] & (offs_d < META.D - 1)"),
    Mutant("int32 rows under delta", "_attention", "o_ptr + offs_m.to(tl.int64)[:, None] * stride_o[1]",
           "o_ptr + offs_m[:, None] * stride_o[1]"),
    Mutant("delta is not kept", "_attention", "    tl.store(delta_ptr + rows, delta, mask=offs_m < T)\n", ""),
    Mutant("dk without delta", "_attention", "dsT = pT * (dpT - delta[None, :])", "dsT = pT * dpT"),
    Mutant("dk without sm_scale", "_attention", "grads[1], dk * sm_scale,", "grads[1], dk,"),
    Mutant("dk sees the future", "_attention", "sT = tl.where(offs_m[None, :] >= offs_n[:, None]",
           "sT = tl.where(offs_m[None, :] + 1 >= offs_n[:, None]"),
    Mutant("dv without the dropout mask", "_attention", "(pT * zT).to(do.dtype)", "pT.to(do.dtype)"),
    Mutant("dk reads one document more", "_attention",
           "end = tl.load(doc_ptr + T + tl.minimum(start_n + BLOCK_N, T) - 1)", "end = tl.load(doc_ptr + T + start_n)"),
    Mutant("dk and dv change places", "_attention", "_store_tile(grads[1], dk * sm_scale,",
           "dk, dv = dv, dk\n    _store_tile(grads[1], dk * sm_scale,"),
    Mutant("dq without delta", "_attention", "ds = p * (dp - delta[:, None])", "ds = p * dp"),
    Mutant("dq 1 % too large", "_attention", "grads[0], dq * sm_scale,", "grads[0], dq * 1.01 * sm_scale,"),
    Mutant("dq drops other elements", "_attention",
           "dp = dp * tl.where(keep_tile(row_hash[:, None], col_hash[None, :], threshold), z, 0.0)",
           "dp = dp * tl.where(keep_tile(row_hash[:, None], col_hash[None, :] + 1, threshold), z, 0.0)"),
    # --- dropout
    Mutant("the seed's upper half is lost", "_dropout", "tl.philox(seed, stream, 0, 0, 0)",
           "tl.philox(seed.to(tl.int32), stream, 0, 0, 0)"),
    Mutant("every head has one mask", "_dropout", "tl.philox(seed, stream, 0, 0, 0)", "tl.philox(seed, 0, 0, 0, 0)"),
    Mutant("rows have one key", "_dropout", "_mix(row_hash ^ col_hash)", "_mix(row_hash * 0 ^ col_hash)"),
    Mutant("the complement is kept", "_dropout", ">= threshold\n", "< threshold\n"),
    # --- rows
    Mutant("rows in another order", "_launch", "    return x.reshape(-1, x.shape[-1]) if",
           "    x = x.transpose(0, -2) if x.ndim > 2 else x\n    return x.reshape(-1, x.shape[-1]) if"),
    Mutant("the last row is not launched", "_launch", "    if 0 in grid:\n        return\n",
           "    if 0 in grid:\n        return\n    grid = (max(1, grid[0] - 1), *grid[1:])\n"),
    # --- layer_norm
    Mutant("eps is dropped", "layer_norm", "tl.sqrt(tl.sum(xc * xc, 1) / N + eps)",
           "tl.sqrt(tl.sum(xc * xc, 1) / N + 0.0 * eps)"),
    Mutant("masked lanes hold -mean", "layer_norm", "xc = tl.where(mask_n[None, :], x - mean[:, None], 0.0)",
           "xc = x - mean[:, None]"),
    Mutant("statistics in half precision", "layer_norm", "mask_n[None, :], x - mean[:, None], 0.0)  # masked",
           "mask_n[None, :], x - mean.to(tl.float16)[:, None], 0.0)  # masked"),
    Mutant("dx without the xhat term", "layer_norm", "(g - c1[:, None] - xhat * c2[:, None])", "(g - c1[:, None])"),
    Mutant("dx without the mean of g", "layer_norm", "(g - c1[:, None] - xhat", "(g - xhat"),
    Mutant("db sums every other row tile", "layer_norm", "        db += dy\n", "        db = dy\n"),
    Mutant("strides swapped", "layer_norm", "offs_m[:, None] * stride_x[0] + offs_n[None, :] * stride_x[1]",
           "offs_m[:, None] * stride_x[1] + offs_n[None, :] * stride_x[0]"),
    Mutant("int32 rows, forward", "layer_norm", "offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M",
           "offs_m = tl.program_id(0) * BLOCK_M"),
    Mutant("int32 rows, backward", "layer_norm", "offs_m = pid.to(tl.int64) * BLOCK_M", "offs_m = pid * BLOCK_M"),
    Mutant("partial sums are written to one place", "layer_norm", "db_ptr + pid.to(tl.int64) * N", "db_ptr + 0 * pid"),
    Mutant("a store past the last row", "layer_norm", "tl.store(mean_ptr + offs_m, mean, mask=mask_m)",
           "tl.store(mean_ptr + offs_m, mean)"),
    # --- add_layer_norm
    Mutant("statistics of the sum before it is rounded", "add_layer_norm", "normalize(h.to(tl.float32), mask_n",
           "normalize(residual + x, mask_n"),
    Mutant("dh is left out", "add_layer_norm", "        dresidual += dh\n", ""),
    Mutant("dx is not scaled up", "add_layer_norm", "tl.where(keep, dresidual * z, 0.0)",
           "tl.where(keep, dresidual, 0.0)"),
    Mutant("backward drops other elements", "add_layer_norm",
           "row_hash = dropout_hash(s0, offs_m.to(tl.int32))\n            keep",
           "row_hash = dropout_hash(s0, offs_m.to(tl.int32) + 1)\n            keep"),
    Mutant("the residual is read by x's stride", "add_layer_norm", "tile_ptrs(residual_ptr, stride_residual,",
           "tile_ptrs(residual_ptr, stride_x,"),
    Mutant("the bias of x is dropped too late", "add_layer_norm", "    h = (residual + x).to(",
           "    if c_ptr is not None and seed_ptr is not None:\n"
           "        x += 0.1 * tl.load(c_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]\n"
           "    h = (residual + x).to("),
    Mutant("dc sums what was dropped too", "add_layer_norm", "            dc += dx\n", "            dc += dresidual\n"),
    Mutant("dc lies where db is", "add_layer_norm", "tl.store(sums_ptrs + 2 * N,", "tl.store(sums_ptrs + N,"),
    Mutant("programs share their sums", "add_layer_norm", "sums_ptr + pid.to(tl.int64) * SUMS * N",
           "sums_ptr + pid.to(tl.int64) * 0 * N"),
    Mutant("the input is overwritten", "add_layer_norm", "    h = torch.empty_like(y)\n    mean",
           "    h = residual\n    mean"),
    Mutant("int32 rows of h", "add_layer_norm", "tl.store(h_ptr + offs_m[:, None] * N",
           "tl.store(h_ptr + offs_m.to(tl.int32)[:, None] * N"),
    Mutant("int32 rows of dresidual", "add_layer_norm", "dense = offs_m[:, None] * N",
           "dense = offs_m.to(tl.int32)[:, None] * N"),
    Mutant("the bias before is added twice", "add_layer_norm", "linear(x, linear_weight, None, working), linear_bias",
           "linear(x, linear_weight, linear_bias, working), linear_bias"),
    # --- a linear layer in 16 bits
    Mutant("dw is rounded to 16 bits", "_linear", "else a.float() @ b.float()", "else (a @ b).float()"),
    Mutant("db is rounded to 16 bits", "_linear", ".sum(0, dtype=torch.float32)", ".sum(0).float()"),
    Mutant("dx twice as large", "_linear", "dx = dy @ working if need_dx else None",
           "dx = 2 * (dy @ working) if need_dx else None"),
    # --- embedding
    Mutant("the position before", "embedding", "(stride_wpe[1], stride_wpe[2]), t, offs_c)",
           "(stride_wpe[1], stride_wpe[2]), tl.maximum(t - 1, 0), offs_c)"),
    Mutant("the position of the first sequence", "embedding", " + (b * stride_wpe[0])[:, None]", ""),
    Mutant("rounded before the sum", "embedding", "    y = x + tl.load(wpe_ptrs",
           "    y = x.to(y_ptr.dtype.element_ty).to(tl.float32) + tl.load(wpe_ptrs"),
    Mutant("another token's row is read", "embedding", "is_token = (v >= 0) & (v < V)", "is_token = v >= 0"),
    Mutant("ids by the row's stride", "embedding", "b * stride_idx[0] + t * stride_idx[1]", "offs_m * stride_idx[1]"),
    Mutant("a token's last tile is left out", "embedding", "tl.range(start, stop, BLOCK_M,",
           "tl.range(start, stop - BLOCK_M, BLOCK_M,"),
    Mutant("the next token's rows are added", "embedding", "mask_m = offs_m < stop", "mask_m = offs_m < stop + 1"),
    Mutant("the last tile alone", "embedding", "dwte += tl.load(dy_ptrs", "dwte = tl.load(dy_ptrs"),
    Mutant("absent tokens keep what was there", "embedding", "tl.sum(dwte, 0), mask=mask_c)",
           "tl.sum(dwte, 0), mask=mask_c & (start < stop))"),
    Mutant("int32 rows of y", "embedding", "tl.store(y_ptr + offs_m[:, None] * C",
           "tl.store(y_ptr + offs_m.to(tl.int32)[:, None] * C"),
    Mutant("int32 tokens", "embedding", "other=0).to(tl.int64)\n    is_token", "other=0).to(tl.int32)\n    is_token"),
    Mutant("int32 rows of dwte", "embedding", "v = tl.program_id(0).to(tl.int64)", "v = tl.program_id(0)"),
    # --- gelu
    Mutant("a constant of tanh, 0.1 % off", "gelu", "tl.exp2(-2.302208198144325 *", "tl.exp2(-2.3045 *"),
    Mutant("the gradient of tanh without h^2", "gelu", " + 0.2140644488 * h * h)", ")"),
    Mutant("erf without its factor", "gelu", "return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))",
           "return 0.5 * h * (1.0 + tl.erf(h))"),
    Mutant("the gradient of erf without phi", "gelu",
           " + h * 0.3989422804014327 * tl.exp2(-0.7213475204444817 * h * h)", ""),
    Mutant("the bias is not added again", "gelu", "            h += b[None, :]\n",
           "            h += 0.0 * b[None, :]\n"),
    Mutant("the last column is not written", "gelu",
           "mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]\n    x_ptrs =",
           "mask = (offs_m < M)[:, None] & (offs_n < N - 1)[None, :]\n    x_ptrs ="),
    Mutant("columns in half the tile", "gelu", "(offs_m < M)[:, None] & mask_n[None, :]",
           "(offs_m < M)[:, None] & (mask_n & (offs_n % BLOCK_N < BLOCK_N // 2))[None, :]"),
    Mutant("int32 rows of y", "gelu", "tl.store(y_ptr + offs_m[:, None] * N",
           "tl.store(y_ptr + offs_m.to(tl.int32)[:, None] * N"),
    Mutant("int32 rows of dx", "gelu", "tl.store(dx_ptr + offs_m[:, None] * N",
           "tl.store(dx_ptr + offs_m.to(tl.int32)[:, None] * N"),
    # --- cross_entropy
    Mutant("the sum is not rescaled", "cross_entropy", "l_j * _exp(m_j - m_safe) + tl.sum", "l_j + tl.sum"),
    Mutant("no guard where no logit is finite", "cross_entropy", 'tl.where(m_new == float("-inf"), 0.0, m_new)',
           "m_new"),
    Mutant("lanes weigh the same", "cross_entropy", "l_j * _exp(m_j - m_i[:, None])", "l_j"),
    Mutant("exp of another base", "cross_entropy", "tl.exp2(1.4426950408889634 * x)", "tl.exp2(1.4412 * x)"),
    Mutant("exponents of large logits are rounded", "cross_entropy", "_exp(x - m_i[:, None]) * r_i[:, None]",
           "tl.exp2(1.4426950408889634 * x - 1.4426950408889634 * m_i[:, None]) * r_i[:, None]"),
    Mutant("lanes past V count", "cross_entropy",
           'tl.where((last + tl.arange(0, BLOCK_V) < V)[None, :], x, float("-inf"))', "x"),
    Mutant("the last tile is read as a full one", "cross_entropy", "mask_m, last, V_ROW, True, BLOCK_V)\n    x =",
           "mask_m, last, V_ROW - 1, True, BLOCK_V)\n    x ="),
    Mutant("only the last tile has a gradient", "cross_entropy",
           "range(0, last, BLOCK_V):\n        _gradient", "range(0, 0, BLOCK_V):\n        _gradient"),
    Mutant("ignored rows have a loss", "cross_entropy", "loss = tl.where(ignored, 0.0,",
           "loss = tl.where(ignored, 1.0,"),
    Mutant("ignored rows are read", "cross_entropy", "    mask_m &= t != ignore_index", "    mask_m &= t == t"),
    Mutant("ignored rows have a gradient", "cross_entropy", "tl.where(counted, scale / l_i, 0.0)", "scale / l_i"),
    Mutant("an ignored class has a gradient", "cross_entropy", "mask=counted & _is_class(t, V))",
           "mask=mask_m & _is_class(t, V))"),
    Mutant("the class before the target", "cross_entropy", "tl.store(dx_ptrs + t, dx_t",
           "tl.store(dx_ptrs + tl.maximum(t - 1, 0), dx_t"),
    Mutant("no target in the gradient", "cross_entropy", "_exp(x_t - m_i) * r_i - scale", "_exp(x_t - m_i) * r_i"),
    Mutant("the mean over all rows", "cross_entropy", "return (targets != ignore_index).sum()",
           "return (targets == targets).sum()"),
    Mutant("the incoming gradient is forgotten", "cross_entropy", "scale = dloss / target_count",
           "scale = 1.0 / target_count"),
    Mutant("a target beyond the row is read", "cross_entropy", "return (t >= 0) & (t < V)",
           "return t < V + 2**40"),
    Mutant("int32 rows of dlogits", "cross_entropy", "dx_ptr + offs_m * V", "dx_ptr + offs_m.to(tl.int32) * V"),
    Mutant("int32 columns of a tile", "cross_entropy", "offs_v.to(tl.int64)[None, :] * stride_xv",
           "offs_v[None, :] * stride_xv"),
    Mutant("int32 tiles", "cross_entropy", "tl.cast(start, tl.int64) * stride_xv", "start * stride_xv"),
    # --- linear_cross_entropy
    Mutant("the last chunk is forgotten", "linear_cross_entropy", "for start in range(0, M, rows):",
           "for start in range(0, max(rows, M // rows * rows), rows):"),
    Mutant("dw of the last chunk alone", "linear_cross_entropy", "b.float(), beta=beta)",
           "b.float(), beta=0.0)"),
    Mutant("dw begins with what was there", "linear_cross_entropy", "beta=float(start > 0)", "beta=1.0"),
    Mutant("targets of the first chunk", "linear_cross_entropy", "            targets[chunk], ",
           "            targets[: chunk.stop - chunk.start], "),
    Mutant("no division by the count", "linear_cross_entropy",
           "scale = dloss / target_count(targets, ignore_index).clamp(min=1)", "scale = dloss.clone()"),
    Mutant("float16 under 1 / count", "linear_cross_entropy", "* tl.load(scale_ptr)\n",
           "* tl.load(scale_ptr).to(y_ptr.dtype.element_ty).to(tl.float32)\n"),
    Mutant("int32 elements of dw", "linear_cross_entropy", "offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N",
           "offs_n = tl.program_id(0) * BLOCK_N"),
    # --- decode_attention
    Mutant("one key less", "decode_attention", "stop = tl.minimum(start + share, length)",
           "stop = tl.minimum(start + share, length - 1)"),
    Mutant("one key more", "decode_attention", "stop = tl.minimum(start + share, length)",
           "stop = tl.minimum(start + share, length + 1)"),
    Mutant("splits overlap by a key", "decode_attention", "    start = split * share\n",
           "    start = tl.maximum(split * share - 1, 0)\n"),
    Mutant("parts weigh the same", "decode_attention", 'weight = tl.exp2(m_i - tl.where(m == float("-inf"), 0.0, m))',
           'weight = tl.where(m_i == float("-inf"), 0.0, 1.0)'),
    Mutant("the output is not rescaled", "decode_attention", "acc = acc * alpha[:, None] + p", "acc = acc + p"),
    Mutant("lengths are read without their stride", "decode_attention", "lengths_ptr + b * stride_l",
           "lengths_ptr + b"),
    Mutant("values by the keys' stride", "decode_attention", "v_ptr + rows[:, None] * stride_v[2]",
           "v_ptr + rows[:, None] * stride_k[2]"),
    Mutant("int32 rows of the cache", "decode_attention", "rows = offs_n.to(tl.int64)", "rows = offs_n"),
    Mutant("int32 batches and heads", "decode_attention", "b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)",
           "b, h = bh // H, bh % H"),
)  # fmt: skip


def _pytest(folder: Path, concern: str, marks: str = "not long and not slow") -> tuple[int | None, str]:
    """Exit code, None where the time ran out, and the line that says which test failed."""
    files = [f"tests/{name}" for name in SUITE]
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", marks, "-k", concern]
    command = [sys.executable, "-m", "pytest", *options, *files]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        return None, f"still running after {MINUTES} minutes"
    lines = (done.stdout + done.stderr).splitlines()
    failed = [line.split(" ")[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    return done.returncode, (failed or lines[-1:] or [""])[0].removeprefix("tests/")


def _run(mutant: Mutant | None, op: str) -> tuple[bool, str, float]:
    """(red, by what, seconds) of the tests that concern a file, in a copy with the mutant; None: as it is."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as name:
        folder = Path(name)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / part, folder)
        if mutant is not None:
            (folder / "kernels" / f"{op}.py").write_text(mutant.text())
        code, what = _pytest(folder, CONCERNS[op] if mutant is None else mutant.concern)
        if mutant is not None and code == 0:  # make test does not see it: make slow has to
            slow, what = _pytest(folder, mutant.concern, "slow and not long")
            code = slow if slow == 1 else 0
    # A crash or an endless loop is red too; a file that does not import, or no test at all, proves nothing.
    if code not in (None, 0, 1) and code > 0:
        raise RuntimeError(f"{mutant.name if mutant else 'unchanged'}: pytest ended with {code}: {what}")
    return code != 0, what if code is None or code >= 0 else f"a crash, signal {-code}", time.perf_counter() - started


def main() -> int:
    """The command line; returns the exit code: 1 if a mutant survives or the suite is red without one."""
    parser = argparse.ArgumentParser(prog="python tests/mutants.py", description=__doc__)
    parser.add_argument("--op", nargs="+", choices=list(CONCERNS), default=list(CONCERNS), help="files to break")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="mutants at a time (default: 2)")
    args = parser.parse_args()
    mutants = [mutant for mutant in MUTANTS if mutant.op in args.op]
    killed = 0
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            unchanged = {op: pool.submit(_run, None, op) for op in args.op}
            runs = [pool.submit(_run, mutant, mutant.op) for mutant in mutants]
            for op, run in unchanged.items():
                red, what, seconds = run.result()
                print(f"{op:<21} {'unchanged':<43} {what if red else 'green'} {seconds:.0f} s", flush=True)
                if red:
                    raise RuntimeError(f"the suite is red without a mutant in kernels/{op}.py")
            for mutant, run in zip(mutants, runs, strict=True):
                red, what, seconds = run.result()
                killed += red
                print(f"{mutant.op:<21} {mutant.name:<43} {what if red else 'SURVIVED'} {seconds:.0f} s", flush=True)
        except (RuntimeError, ValueError, KeyboardInterrupt) as error:
            pool.shutdown(wait=False, cancel_futures=True)
            print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
            return 2
    print(f"{killed} of {len(mutants)} killed")
    return 0 if killed == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
