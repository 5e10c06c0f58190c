"""A museum of published kernel bugs: python tests/museum.py prints its page, kernels/MUSEUM.md.

Each exhibit is a bug from a public issue tracker, made in one of our kernels by changing a line or two: the kernel as
it is is the repaired form. `check` turns it red in the family that is named; tests/test_museum.py shows that it does,
in one case of the kernel and one dtype.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from mutants import ROOT, Mutant

PAGE = ROOT / "kernels" / "MUSEUM.md"


@dataclass(frozen=True)
class Exhibit:
    """source: owner/repository#number; what: the bug, in a sentence; op: a file of kernels/; changes: (old, new) lines;
    kernel: the operator whose proof shows it, by default op; family, case, dtype: where; raises: words of the error
    that ends the proof, where one does.
    """

    source: str
    what: str
    op: str
    changes: tuple[tuple[str, str], ...]
    family: str = "shapes"
    case: int = 0
    dtype: str = "float32"
    kernel: str = ""
    raises: str = ""
    kind: str = "issues"

    @property
    def name(self) -> str:
        """The operator that it breaks."""
        return self.kernel or {
            "gelu": "bias_gelu",
            "attention": "causal_attention",
            "_attention": "causal_attention",
        }.get(self.op, self.op)

    @property
    def url(self) -> str:
        repository, number = self.source.split("#")
        return f"https://github.com/{repository}/{self.kind}/{number}"

    def text(self) -> str:
        """The changed file. ValueError if a line is not there exactly once."""
        text = (ROOT / "kernels" / f"{self.op}.py").read_text()
        for old, new in self.changes:
            text = Mutant(self.source, self.op, old, new).applied(text)
        return text

    def diff(self) -> str:
        """The changed lines, as a diff without its head."""
        right = (ROOT / "kernels" / f"{self.op}.py").read_text().splitlines()
        lines = difflib.unified_diff(right, self.text().splitlines(), n=0, lineterm="")
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def _pull(*args: object, **fields: object) -> Exhibit:
    return Exhibit(*args, kind="pull", **fields)  # type: ignore[arg-type]


_FORWARD_SCORES = (
    "k = _load_tile(k_head, n, T, META.BLOCK_N, DIAGONAL, META)  # (BLOCK_N, BLOCK_D)\n"
    "        s = tl.dot(q, tl.trans(k), input_precision=META.PRECISION)  # (BLOCK_M, BLOCK_N)\n        if DIAGONAL:\n"
)

EXHIBITS = (
    # --- layouts
    _pull("unslothai/unsloth#10675", "LayerNorm reads columns as if they lay side by side, whatever their stride.",
          "layer_norm", (("+ offs_n[None, :] * stride_x[1]", "+ offs_n[None, :]"),), "layouts", 2),
    _pull("unslothai/unsloth#10617",
          "A norm's backward pass assumes a contiguous incoming gradient; a sliced one is read at the wrong columns.",
          "layer_norm", (("tile_ptrs(dy_ptr, stride_dy,", "tile_ptrs(dy_ptr, (stride_dy[0], 1),"),), "layouts", 2),
    Exhibit("ModelTC/LightLLM#1467", "The first pass over a row knows the column stride, the second one forgets it.",
            "cross_entropy", (("tl.load(scale_ptr), stride_x[1], mask_m", "tl.load(scale_ptr), 1, mask_m"),),
            "layouts", 2),
    _pull("ROCm/TransformerEngine#623",
          "The gradient that `.sum()` sends has stride 0; the kernel assumes it is contiguous and reads past its end.",
          "gelu", (("dy_rows.stride(), rows.stride(), M, N,", "(N, 1), rows.stride(), M, N,"),), "layouts", 2),
    Exhibit("Dao-AILab/flash-attention#355",
            "The backward pass of attention reads the output's gradient as if it were contiguous, like the output.",
            "_attention", (("do_tile = _load_tile(_head(do, strides[3], b, h, META)",
                            "do_tile = _load_tile(_head(do, strides[4], b, h, META)"),), "layouts", 3),
    Exhibit("flagos-ai/FlagAttention#45",
            "Values are addressed by the strides of the keys: invisible as long as both have the same.",
            "decode_attention", (("v_ptr + rows[:, None] * stride_v[2]", "v_ptr + rows[:, None] * stride_k[2]"),),
            "layouts", 2),
    Exhibit("Dao-AILab/quack#88", "The gradient is flattened by `view`, which a broadcast one does not allow.",
            "_launch", (("return x.reshape(-1,", "return x.view(-1,"),), "layouts", 6, kernel="layer_norm",
            raises="view size is not compatible"),
    # --- shapes
    Exhibit("flagos-ai/FlagGems#5392",
            "LayerNorm's forward pass takes any rank, its backward pass treats the first dimension as the rows.",
            "layer_norm", (("as_rows(x), as_rows(dy)\n    M, N = rows.shape",
                            "as_rows(x), as_rows(dy)\n    M, N = x.shape[0], x.numel() // x.shape[0]"),), "shapes", 6,
            raises=r"got \[60\] but expected shape compatible with \[20\]"),
    Exhibit("linkedin/Liger-Kernel#1375",
            "The gradient's buffer is sized before the input is flattened, and written as large as it is afterwards.",
            "layer_norm", (("dx = torch.empty(x.shape, ", "dx = torch.empty(x.shape[-2:], "),), "memory", 6,
            raises=r"got \[3, 20\] but expected shape compatible with \[2, 3, 20\]"),
    Exhibit("facebookresearch/xformers#785", "Columns beyond the largest block are never visited.", "_launch",
            (("block_n = triton.next_power_of_2(n)", "block_n = min(4096, triton.next_power_of_2(n))"),),
            "shapes", 5, kernel="layer_norm"),
    Exhibit("triton-lang/triton#621", "The head size is fixed to 64; what a wider head has beyond is ignored.",
            "attention", (("return max(16, triton.next_power_of_2(head_dim))",
                           "return min(64, max(16, triton.next_power_of_2(head_dim)))"),), "shapes", 8),
    Exhibit("BobMcDear/attorch#14", "The head's offset rounds to zero: every head reads and writes the first one.",
            "_attention", (("return bh, bh // H, bh % H, pid", "return bh, bh // H, bh % H * 0, pid"),), "memory", 3),
    # --- masked lanes
    Exhibit("triton-lang/triton#9838",
            "Lanes past the row hold minus the mean after the subtraction, and count in the variance.",
            "layer_norm", (("xc = tl.where(mask_n[None, :], x - mean[:, None], 0.0)", "xc = x - mean[:, None]"),),
            "shapes", 2),
    _pull("verl-project/verl#5349", "Lanes past the vocabulary hold 0, so that each adds exp(0) to the sum.",
          "cross_entropy", (('    x = tl.where((last + tl.arange(0, BLOCK_V) < V)[None, :], x, float("-inf"))\n', ""),),
          "shapes", 2),
    Exhibit("triton-lang/triton#4541", "The backward pass of attention does not apply the forward pass's mask.",
            "_attention", (('sT = tl.where(offs_m[None, :] >= offs_n[:, None], sT, float("-inf"))', "sT = sT"),),
            "shapes", 3),
    Exhibit("keras-team/keras#23038", "With dropout the causal mask is dropped, too.", "_attention",
            ((_FORWARD_SCORES, _FORWARD_SCORES.replace("if DIAGONAL:", "if DIAGONAL and not META.DROPOUT:")),),
            "shapes", 0),
    Exhibit("Dao-AILab/flash-attention#2424", "The mask that the caller gives is not passed on to the backward pass.",
            "attention", (("attention_bwd(do, q, k, v, o, lse, seed, documents, ctx",
                           "attention_bwd(do, q, k, v, o, lse, seed, None, ctx"),), "shapes", 2),
    Exhibit("flashinfer-ai/flashinfer#4051", "Merging two empty parts gives NaN: their maxima are both -inf.",
            "decode_attention", (('tl.exp2(m_i - tl.where(m == float("-inf"), 0.0, m))', "tl.exp2(m_i - m)"),),
            "shapes", 1),
    # --- memory
    _pull("flashinfer-ai/flashinfer#50", "The log-sum-exp of a part, which the merge needs, is not always stored.",
          "decode_attention", (("    if META.SPLIT:\n", "    if META.SPLIT and splits > 32:\n"),), "memory", 0),
    _pull("Dao-AILab/flash-attention#2388", "Two kernels address the parts' log-sum-exp by different strides.",
          "decode_attention", (("tl.store(lse_ptr + part, lse)",
                                "tl.store(lse_ptr + split * tl.num_programs(0) + bh, lse)"),), "shapes", 0),
    _pull("pytorch/FBGEMM#5754", "Rows without a gradient are skipped and hold garbage: the buffer was not zeroed.",
          "cross_entropy", (("    mask = mask_m[:, None]\n    if RAGGED:\n        mask &= (offs_v",
                             "    mask = counted[:, None]\n    if RAGGED:\n        mask &= (offs_v"),), "memory", 0),
    _pull("meta-pytorch/tritonbench#1266",
          "Programs race for one row of partial sums: the last one overwrites what the others added.", "layer_norm",
          (("dw_ptr + pid.to(tl.int64) * N", "dw_ptr + 0 * pid"),), "memory", 3),
    Exhibit("unslothai/unsloth#5002", "The backward pass of the loss overwrites the logits with their gradient.",
            "cross_entropy",
            (("dlogits = torch.empty((M, V), dtype=logits.dtype, device=logits.device)", "dlogits = logits"),
             ("    return dlogits\n", "    return dlogits.clone()\n")), "repeats", 2),
    _pull("Dao-AILab/quack#209", "Gradients saved by the forward pass are scaled in place: a second backward pass "
          "scales them again.", "linear_cross_entropy",
          (("scaled = torch.empty_like(dx), torch.empty_like(dw)", "scaled = dx, dw"),
           ("    return scaled\n", "    return scaled[0].clone(), scaled[1].clone()\n")), "repeats", 2),
    # --- dropout
    _pull("aws-neuron/nki-samples#81", "The backward pass of attention forgets that dropout acts on dp as well.",
          "_attention", (("            dpT = dpT * zT\n", ""),), "shapes", 0),
    _pull("pytorch/pytorch#197563", "The backward pass draws its mask from a different seed than the forward pass.",
          "attention", (("    q, k, v, seed, documents, o, lse = ctx.saved_tensors\n",
                         "    q, k, v, seed, documents, o, lse = ctx.saved_tensors\n"
                         "    seed = None if seed is None else torch.zeros_like(seed)\n"),), "shapes", 0),
    _pull("NVIDIA/apex#816", "The backward pass scales what dropout kept by p and not by 1 / (1 - p).",
          "add_layer_norm", (("(seed, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)),  # seed: ()",
                              "(seed, dropout_threshold(dropout_p), dropout_p),  # seed: ()"),), "shapes", 2),
    Exhibit("facebookresearch/xformers#173", "The seed's address in memory is used in place of the seed.",
            "add_layer_norm", (("    launch(\n        _add_layer_norm_fwd_kernel,",
                                "    seed = None if seed is None else torch.full_like(seed, seed.data_ptr())\n"
                                "    launch(\n        _add_layer_norm_fwd_kernel,"),), "shapes", 2),
    # --- numbers
    Exhibit("xlite-dev/LeetCUDA#309", "eps is added to the number of columns and not to the variance.", "layer_norm",
            (("xc, 1) / N + eps)", "xc, 1) / (N + eps))"),), "shapes", 1),
    _pull("NVIDIA/cutlass#1112", "eps is a constant of the kernel, and the caller's is ignored.", "layer_norm",
          (("xc, 1) / N + eps)", "xc, 1) / N + 1e-6)"),), "values", 2),
    Exhibit("pytorch/pytorch#190491", "The variance is E[x^2] - E[x]^2, which cancels.", "layer_norm",
            (("tl.sqrt(tl.sum(xc * xc, 1) / N + eps)", "tl.sqrt(tl.sum(x * x, 1) / N - mean * mean + eps)"),),
            "shapes", 6),
    _pull("flagos-ai/FlagGems#59", "The backward sums run over all rows of a tile in place of each row.", "layer_norm",
          (("c1 = tl.sum(g, 1) / N", "c1 = tl.sum(tl.sum(g, 1), 0) / N + 0.0 * mean"),), "shapes", 3),
    # --- losses
    _pull("PaddlePaddle/Paddle#28622", "Rows whose target is to be ignored have a gradient.", "cross_entropy",
          (("counted = mask_m & (t != ignore_index)", "counted = mask_m"),), "shapes", 0),
    _pull("flagos-ai/FlagGems#73", "The mean is over all rows, those to be ignored included.", "cross_entropy",
          (("return (targets != ignore_index).sum()", "return torch.ones_like(targets).sum()"),), "shapes", 0),
    _pull("NVIDIA/TransformerEngine#2139",
          "The factor of the gradient is read through a pointer that moves on with the rows.", "linear_cross_entropy",
          (("* tl.load(scale_ptr)\n", "* tl.load(scale_ptr + tl.program_id(0))\n"),), "shapes", 0),
    # --- far addresses
    Exhibit("thu-ml/SageAttention#386", "Rows of a packed projection are addressed in int32, which wraps.",
            "_attention", (("offs_t = (t + tl.arange(0, BLOCK_T)).to(tl.int64)",
                            "offs_t = t + tl.arange(0, BLOCK_T)"),), "far", 0, "float16"),
    Exhibit("fla-org/flash-linear-attention#1080", "The offset of a sequence and head is computed in int32.",
            "decode_attention", (("b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)", "b, h = bh // H, bh % H"),),
            "far", 1, "float16"),
    _pull("databricks/megablocks#185", "A row's number is multiplied by its stride in int32.", "gelu",
          (("= tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)\n    offs_n = tl.program_id(1)",
            "= tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)\n    offs_n = tl.program_id(1)"),),
          "far", 2, "float16"),
)  # fmt: skip


def page() -> str:
    """kernels/MUSEUM.md."""
    lines = [
        "# A museum of kernel bugs",
        "",
        f"{len(EXHIBITS)} bugs that were published in issue trackers of other projects, each reproduced in a kernel of",
        "this folder by changing a line or two. `python -m kernels check` finds each, which `tests/test_museum.py`",
        "shows: the family in the heading fails. The unmodified kernel passes. The list is the",
        "data of `tests/museum.py`; the families are explained in [README.md](README.md#how-a-kernel-is-tested).",
        "",
    ]
    for family in dict.fromkeys(exhibit.family for exhibit in EXHIBITS):
        lines += [f"## Found by: {family}", ""]
        for e in (e for e in EXHIBITS if e.family == family):
            lines += [f"**[{e.source}]({e.url})**, in `{e.op}.py`: {e.what}", "", "```diff", e.diff(), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
