"""Causal multi-head attention, forward and backward, without the (T, T) matrix in memory.

    q, k, v: H heads each, packed in one projection or three tensors
    s_ij = sm_scale * q_i . k_j   for j <= i (and j in the document of i, where documents are given), else -inf
    lse_i = log sum_j exp(s_ij)              p_ij = exp(s_ij - lse_i)
    z_ij = keep_ij / (1 - dropout_p)         o_i = sum_j z_ij p_ij v_j          keep_ij: 0 or 1, the dropout mask

    delta_i = do_i . o_i                     ( = sum_j p_ij dp_ij )
    dp_ij = z_ij do_i . v_j                  ds_ij = p_ij (dp_ij - delta_i)
    dq_i = sm_scale sum_j ds_ij k_j          dk_j = sm_scale sum_i ds_ij q_i          dv_j = sum_i z_ij p_ij do_i

Forward: online softmax over key tiles (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv
2205.14135, algorithm 1); all in base 2, exp(x) = exp2(x log2 e): GPUs have an exp2 instruction.
Backward: p is recomputed from lse (Dao 2023, arXiv 2307.08691, algorithm 2), dq and delta by one program per query
tile, then dk and dv by one per key tile: each sum has one writer and one order, so a repeat is equal bit for bit, at
the price of 7 matrix products in place of 5. The kernels are those of _attention.py.

q, k, v, o and their gradients: (B, T, H, D) in one dtype; lse, delta: (B, H, T) float32, lse in base 2. q, k and v are
read where the projection left them, and dq, dk, dv are written where its backward wants them: no transpose, no copy.
Minimum memory traffic, in elements: forward 4 BTHD (q, k, v in, o out); backward 8 BTHD (q, k, v, o, do in, the rest
out).
"""

import math
from collections import namedtuple
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention import Meta, attention_dkv_kernel, attention_dq_kernel, attention_fwd_kernel
from ._dispatch import use_triton
from ._dropout import dropout_threshold, keep_mask, seed_tensor
from ._launch import arch_of, launch
from ._registry import Case, Draw, KernelSpec, register
from ._tables import choose
from ._triton import NAMESPACE, TensorDescriptor, triton

MAX_HEAD_DIM = 256
_LOG2_E = math.log2(math.e)

# Tile sizes and options of a launch. DESCRIPTORS: 1 reads tiles by tensor descriptors, 0 by pointers.
Tile = namedtuple("Tile", "BLOCK_M BLOCK_N num_warps num_stages DESCRIPTORS")
_SPACE = {
    "attention_fwd": Tile((64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (0, 1)),
    "attention_dq": Tile((64, 128), (32, 64, 128), (4, 8), (2, 3), (0, 1)),
    "attention_dkv": Tile((32, 64), (64, 128), (4, 8), (2, 3), (0, 1)),
}


def _block_d(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def _default_tiles(head_dim: int, dtype: torch.dtype, arch: int, dropout: bool, descriptors: bool) -> dict[str, Tile]:
    """Tiles of the kernels by padded head size, dtype and architecture. descriptors: the tensors can be read by them.

    Untimed, chosen from compiled code (`python -m bench static`): no spills, tensor cores, two blocks or more per
    multiprocessor (except for heads larger than 128), and then the fewest instructions per score.
    """
    BLOCK_D = _block_d(head_dim)

    def tiles(*fwd_dkv_dq: tuple[int, int, int, int], descriptors: bool = False) -> dict[str, Tile]:
        names = ("attention_fwd", "attention_dkv", "attention_dq")
        return {name: Tile(*tile, int(descriptors)) for name, tile in zip(names, fwd_dkv_dq, strict=True)}

    if dtype == torch.float32:  # full-precision products run on the ordinary float32 units, operands in registers
        if BLOCK_D <= 32:
            return tiles((64, 16, 4, 1), (16, 64, 4, 1), (32, 32, 4, 1))
        if BLOCK_D == 64:
            return tiles((32, 16, 4, 1), (16, 32, 4, 1), (32, 32, 4, 1))
        return tiles((16, 16, 8, 1), (16, 16, 4, 2), (16, 16, 8, 2))
    if BLOCK_D > 128:
        return tiles((32, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 2))
    # Products of 64 rows by 4 warps are one instruction with operands in shared memory (wgmma, tcgen05): tiles may be
    # larger. The mask of dropout takes registers, and so do pointers, of which there are none left then.
    if arch in (90, 100, 103):
        if BLOCK_D <= 64:
            dkv = (32, 64, 4, 2) if dropout or BLOCK_D < 64 else (64, 64, 4, 3)
            fwd = (64 if dropout and not descriptors else 128, 64, 4, 2)
            return tiles(fwd, dkv, (64, 64, 4, 3), descriptors=descriptors)
        return tiles((64, 64, 4, 2), (16, 64, 4, 2), (64, 32 if dropout else 64, 4, 2), descriptors=descriptors)
    # mma.sync, operands in registers; all fits the 99 KiB of shared memory of sm_86, 89 and 120
    if BLOCK_D <= 64:
        return tiles((64, 64, 4, 3), (32, 64, 4, 3), (64, 32, 4, 2))
    return tiles((64, 64, 4, 2), (16, 64, 4, 2), (64, 32, 4, 2))


def _takes_descriptor(x: Tensor, arch: int) -> bool:
    """Whether x: (B, T, H, D) can be read by a tensor descriptor: unit stride in D, all else in steps of 16 bytes."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(0 < step < 2**40 and step % 16 == 0 for step in steps)
    # Triton 3.7's launcher sums the bytes that a descriptor spans in an int, and on sm_100 sets a bit by the sum.
    spans = sum(step * (n - 1) for step, n in zip(steps, x.shape, strict=False))
    return arch >= 90 and aligned and x.stride(-1) == 1 and x.numel() > 0 and (arch < 100 or spans < 2**31 - 2**16)


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], others: tuple[Tensor, ...], rest: tuple[Any, ...],
    dropout_p: float, sm_scale: float, seed: Tensor | None, documents: Tensor | None,
) -> None:  # fmt: skip
    """Launch a kernel. tensors: q, k, v and, backward, do, (B, T, H, D) each; rest: its arguments from strides to T.

    others: tensors in rest whose strides it takes too.
    """
    name = kernel.__name__.removesuffix("_kernel")
    B, T, H, D = tensors[0].shape
    device, dtype = tensors[0].device, tensors[0].dtype
    arch = arch_of(device)
    key = {"dropout": seed is not None, "descriptors": all(_takes_descriptor(x, arch) for x in tensors)}
    default = _default_tiles(D, dtype, arch, **key)[name]
    space = _SPACE[name]._replace(DESCRIPTORS=(0, 1) if key["descriptors"] else (0,))
    options = choose(name, default._asdict(), space._asdict(), device, dtype=dtype, D=D, **key)
    BLOCK_M, BLOCK_N, num_warps, num_stages, descriptors = Tile(**options)
    BLOCK_D = _block_d(D)
    heads: list[Any] = list(tensors)
    if descriptors:
        rows = (BLOCK_M, BLOCK_N, BLOCK_N, BLOCK_M)
        heads = [TensorDescriptor.from_tensor(x, [1, n, 1, BLOCK_D]) for x, n in zip(tensors, rows, strict=False)]
    # of float32 products: PyTorch's own setting, by the name that its older and newer functions both answer to
    precision = "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    meta = Meta(D, documents is not None, seed is not None, precision, bool(descriptors), BLOCK_M, BLOCK_N, BLOCK_D)
    launch(
        kernel,
        (B * H * triton.cdiv(T, BLOCK_N if kernel is attention_dkv_kernel else BLOCK_M),),
        *heads,
        tuple(x.stride() for x in (*tensors, *others)),
        *rest,
        T, H, (sm_scale, sm_scale * _LOG2_E, seed, dropout_threshold(dropout_p), 1.0 / (1.0 - dropout_p)),
        META=meta, num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip


def _parts(q: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, ...]:
    """q, k, v: (B, T, H, D) each, or q packed, (B, T, 3H, D), and k and v None -> q, k, v: (B, T, H, D) each."""
    return q.chunk(3, 2) if k is None or v is None else (q, k, v)


@torch.library.custom_op(f"{NAMESPACE}::attention_fwd", mutates_args=())
def attention_fwd(
    q: Tensor, k: Tensor | None, v: Tensor | None, seed: Tensor | None, documents: Tensor | None,
    dropout_p: float, sm_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q, k, v: as in _parts, any strides; seed: () int64; documents: (B, 2, T) -> o: (B, T, H, D), lse: (B, H, T)."""
    parts = _parts(q, k, v)
    B, T, H, D = parts[0].shape
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    _launch(attention_fwd_kernel, parts, (o,), (o, (lse, documents)), dropout_p, sm_scale, seed, documents)
    return o, lse


@attention_fwd.register_fake
def _(q, k, v, seed, documents, dropout_p, sm_scale):
    B, T, H, D = _parts(q, k, v)[0].shape
    return q.new_empty((B, T, H, D)), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op(f"{NAMESPACE}::attention_bwd", mutates_args=())
def attention_bwd(
    do: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None, o: Tensor, lse: Tensor,
    seed: Tensor | None, documents: Tensor | None, dropout_p: float, sm_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """do: (B, T, H, D), any strides; o, lse: of the forward -> the gradients of q, k and v, contiguous.

    Where q is packed so is its gradient, and the other two are (0,).
    """
    parts = (*_parts(q, k, v), do)
    dq, dk, dv = (torch.empty(x.shape if x is not None else 0, dtype=q.dtype, device=q.device) for x in (q, k, v))
    grads = _parts(dq, None if k is None else dk, None if v is None else dv)
    delta = torch.empty_like(lse)
    others, rest = (o, grads[0]), ((lse, delta, documents), grads)
    _launch(attention_dq_kernel, parts, others, (o, *rest), dropout_p, sm_scale, seed, documents)
    _launch(attention_dkv_kernel, parts, others, rest, dropout_p, sm_scale, seed, documents)
    return dq, dk, dv


@attention_bwd.register_fake
def _(do, q, k, v, o, lse, seed, documents, dropout_p, sm_scale):
    return tuple(q.new_empty(x.shape if x is not None else 0) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.dropout_p, ctx.sm_scale = inputs
    o, lse = output
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, o, lse)


def _backward(ctx, do, _dlse):
    q, k, v, seed, documents, o, lse = ctx.saved_tensors
    dq, dk, dv = attention_bwd(do, q, k, v, o, lse, seed, documents, ctx.dropout_p, ctx.sm_scale)
    return (dq, None, None, *[None] * 4) if k is None else (dq, dk, dv, *[None] * 4)


attention_fwd.register_autograd(_backward, setup_context=_setup_context)


def eager_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float, seed: int | Tensor | None, sm_scale: float,
    documents: Tensor | None,
) -> Tensor:  # fmt: skip
    """PyTorch's own attention; with dropout and a seed the probabilities are written out, to take the kernel's mask.

    q, k, v: (B, T, H, D), documents: (B, 2, T) -> (B, T, H, D).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    B, H, T, _ = q.shape
    if documents is None and (dropout_p == 0.0 or seed is None):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p, scale=sm_scale)
        return o.transpose(1, 2)
    visible = torch.ones((T, T), dtype=torch.bool, device=q.device).tril()
    if documents is not None:
        visible = visible & (documents[:, None, 0, :, None] <= torch.arange(T, device=q.device))  # (B, 1, T, T)
    if dropout_p == 0.0 or seed is None:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout_p, scale=sm_scale)
    else:
        keep = attention_dropout_mask(B, H, T, dropout_p, seed, q.device)
        p = (q @ k.mT * sm_scale).masked_fill(~visible, -math.inf).softmax(-1)
        o = p.where(keep, 0.0) / (1.0 - dropout_p) @ v
    return o.transpose(1, 2)


def document_bounds(documents: Tensor) -> Tensor:
    """The first position of each position's document and the one past its last: (B, T) integers -> (B, 2, T) int32.

    Consecutive equal numbers are one document. `causal_attention` takes the result as its documents, so that a model
    computes it once for all of its layers. ValueError for anything but (B, T) integers.
    """
    if documents.ndim != 2 or documents.is_floating_point():
        got = f"{documents.dtype} {tuple(documents.shape)}"
        raise ValueError(f"document_bounds: documents must be (B, T) integers, got {got}")
    T = documents.shape[1]
    position = torch.arange(T, device=documents.device, dtype=torch.int32).expand(documents.shape)
    differs = documents[:, 1:] != documents[:, :-1]
    doc_start = F.pad(position[:, 1:].where(differs, 0), (1, 0)).cummax(1).values
    doc_end = F.pad(position[:, 1:].where(differs, T), (0, 1), value=T).flip(1).cummin(1).values.flip(1)
    return torch.stack([doc_start, doc_end], 1)


def attention_dropout_mask(
    B: int, H: int, T: int, dropout_p: float, seed: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """The mask that causal_attention applies under a seed: (B, H, T, T) bool, True where a probability is kept."""
    bh = torch.arange(B * H, device=device).view(B, H)
    return keep_mask(seed_tensor(seed, bh.device), dropout_p, T, T, bh)


def why_unsupported(head_dim: int) -> str | None:
    """Why heads of this size do not fit the kernels, or None if they do."""
    return f"the head size {head_dim} is larger than the kernel's {MAX_HEAD_DIM}" if head_dim > MAX_HEAD_DIM else None


def checked_options(
    name: str, shape: tuple[int, int, int], dropout_p: float, sm_scale: float | None, documents: Tensor | None
) -> tuple[float, Tensor | None]:
    """sm_scale and the bounds of the documents, for B, T and D. ValueError for what is out of range."""
    B, T, D = shape
    sm_scale = D**-0.5 if sm_scale is None else sm_scale
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"{name}: dropout_p must be in [0, 1), got {dropout_p}")
    if not sm_scale > 0.0:
        raise ValueError(f"{name}: sm_scale must be positive, got {sm_scale}")
    if documents is None:
        return sm_scale, None
    if documents.is_floating_point() or documents.shape != ((B, T) if documents.ndim == 2 else (B, 2, T)):
        got = f"{documents.dtype} {tuple(documents.shape)}"
        raise ValueError(f"{name}: documents must be integers of {(B, T)} or document_bounds of them, got {got}")
    bounds = document_bounds(documents) if documents.ndim == 2 else documents.to(torch.int32).contiguous()
    return sm_scale, bounds


def runs_on_triton(name: str, x: Tensor, H: int, D: int, dropout_p: float, bounds: Tensor | None) -> bool:
    """Whether an operator that launches these kernels runs them on x."""
    # dropout_p itself: Triton compiles another kernel where the threshold of its random numbers is divisible by 16
    options = {"dropout_p": dropout_p, "documents": int(bounds is not None)}
    return use_triton(name, x, why_unsupported(D), H=H, D=D, **options)


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
    tiles of other documents are skipped. `document_bounds` of them, (B, 2, T), are taken too.
    ValueError if 3 * n_head does not divide the last dimension, a shape does not fit or a number is out of range.
    """
    shape = tuple(qkv.shape)
    if qkv.ndim != 3 or n_head < 1 or shape[-1] % (3 * n_head) or shape[-1] == 0:
        raise ValueError(f"causal_attention: qkv must be (B, T, 3 * n_head * D), got {shape}, n_head {n_head}")
    D = qkv.shape[-1] // (3 * n_head)
    sm_scale, bounds = checked_options("causal_attention", (*qkv.shape[:2], D), dropout_p, sm_scale, documents)
    if runs_on_triton("causal_attention", qkv, n_head, D, dropout_p, bounds):
        seed = seed_tensor(seed, qkv.device) if dropout_p else None
        packed = qkv.unflatten(-1, (3 * n_head, D))
        return attention_fwd(packed, None, None, seed, bounds, dropout_p, sm_scale)[0].flatten(2)
    # three chunks and not one permuted view, whose gradient would be copied once more
    q, k, v = (x.unflatten(-1, (n_head, D)) for x in qkv.chunk(3, -1))
    return eager_attention(q, k, v, dropout_p, seed, sm_scale, bounds).flatten(2)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    B, H, T, D = (case[name] for name in "BHTD")
    return {"qkv": draw.normal(B, T, 3 * H * D), "n_head": H} | draw_options(case, draw)


def draw_options(case: Case, draw: Draw) -> dict[str, Any]:
    """The options that a case names."""
    inputs: dict[str, Any] = {}
    if case.get("dropout_p"):
        inputs |= {"dropout_p": case["dropout_p"], "seed": 0x1234_5678_9ABC}
    if case.get("documents"):
        inputs["documents"] = draw.integers(0, case["documents"], case["B"], case["T"]).sort(1).values
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
