"""Fused Triton kernels of a GPT-2, each with the PyTorch operator that it replaces.

Every function here runs anywhere: `use_backend` chooses how, `python -m kernels` says what runs on this machine,
`python -m kernels check` proves the kernels on it.
"""

from ._backend import use_backend
from ._compile import no_compilation
from ._dispatch import check_backend
from ._machine import gpu_problem
from .add_layer_norm import add_layer_norm, residual_dropout_mask
from .attention import attention_dropout_mask, causal_attention, document_bounds
from .attention_qkv import causal_attention_qkv
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention
from .gelu import bias_gelu, linear_gelu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy, lm_logits

__all__ = [
    "add_layer_norm",
    "attention_dropout_mask",
    "bias_gelu",
    "causal_attention",
    "causal_attention_qkv",
    "check_backend",
    "cross_entropy",
    "decode_attention",
    "document_bounds",
    "gpu_problem",
    "layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "lm_logits",
    "no_compilation",
    "residual_dropout_mask",
    "use_backend",
]
