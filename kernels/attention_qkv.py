"""Causal attention of queries, keys and values in three tensors: the kernels of attention.py, without a copy.

Formulas are those of attention.py. q, k, v, o and their gradients: (B, T, H, D).
"""

import dataclasses
from typing import Any

from torch import Tensor

from . import attention
from ._dropout import seed_tensor
from ._registry import Case, Draw, register
from .attention import attention_fwd, checked_options, draw_options, eager_attention, runs_on_triton


def causal_attention_qkv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    sm_scale: float | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """causal_attention of queries, keys and values that are not packed, as after a rotation of q and k.

    q, k, v: (B, T, H, D) each, any strides, one dtype -> (B, T, H, D); the gradients are three tensors.
    ValueError if the three differ in shape or dtype, or as causal_attention raises it.
    """
    if q.ndim != 4 or not q.shape == k.shape == v.shape or not q.dtype == k.dtype == v.dtype or 0 in q.shape[2:]:
        got = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in (q, k, v))
        raise ValueError(f"causal_attention_qkv: q, k and v must be alike, (B, T, H, D), got {got}")
    B, T, H, D = q.shape
    sm_scale, bounds = checked_options("causal_attention_qkv", (B, T, D), dropout_p, sm_scale, documents)
    if runs_on_triton("causal_attention_qkv", q, H, D, dropout_p, bounds):
        seed = seed_tensor(seed, q.device) if dropout_p else None
        return attention_fwd(q, k, v, seed, bounds, dropout_p, sm_scale)[0]
    return eager_attention(q, k, v, dropout_p, seed, sm_scale, bounds)


def _make_inputs(case: Case, draw: Draw) -> dict[str, Any]:
    B, H, T, D = (case[name] for name in "BHTD")
    return {name: draw.normal(B, T, H, D) for name in "qkv"} | draw_options(case, draw)


SPEC = register(
    dataclasses.replace(
        attention.SPEC,
        name="causal_attention_qkv",
        fn=causal_attention_qkv,
        make_inputs=_make_inputs,
        grads=("q", "k", "v"),
        cases=(
            {"B": 2, "H": 2, "T": 97, "D": 32, "dropout_p": 0.2, "why": "heads and sequences, dropout"},
            {"B": 2, "H": 2, "T": 130, "D": 24, "documents": 4, "why": "documents that end inside tiles"},
            {"B": 1, "H": 3, "T": 17, "D": 1, "why": "head size 1, one ragged tile"},
        ),
        # Where every token sees itself alone, dq and dk are zero, in eager exactly: no rule compares that. The packed
        # form has them beside dv, in one tensor.
        space={**attention.SPEC.space, "T": range(5, 150)},
        bench_cases=attention.SPEC.bench_cases[1:2],
    )
)
