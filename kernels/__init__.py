"""Fused Triton kernels of a GPT-2, each with the PyTorch operator that it replaces.

Every function here runs anywhere: `use_backend` chooses how, `python -m kernels` says what runs on this machine,
`python -m kernels check` proves the kernels on it, and `python -m kernels tune` chooses their launch options there.
"""

from ._backend import use_backend
from ._compile import no_compilation
from ._dispatch import check_backend
from ._linear import linear
from ._machine import gpu_problem
from ._patch import patch, unpatch
from ._proof import prove
from ._registry import Case, Draw, KernelSpec
from ._tables import launch_tables, tables, use_tables
from .add_layer_norm import add_layer_norm, linear_add_layer_norm, residual_dropout_mask
from .attention import attention_dropout_mask, causal_attention, document_bounds
from .attention_qkv import causal_attention_qkv
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention
from .embedding import embedding
from .gelu import bias_gelu, linear_gelu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy, lm_logits

__all__ = [
    "Case",
    "Draw",
    "KernelSpec",
    "add_layer_norm",
    "attention_dropout_mask",
    "bias_gelu",
    "causal_attention",
    "causal_attention_qkv",
    "check_backend",
    "cross_entropy",
    "decode_attention",
    "document_bounds",
    "embedding",
    "gpu_problem",
    "launch_tables",
    "layer_norm",
    "linear",
    "linear_add_layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "lm_logits",
    "no_compilation",
    "patch",
    "prove",
    "residual_dropout_mask",
    "tables",
    "unpatch",
    "use_backend",
    "use_tables",
]
