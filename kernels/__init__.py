"""Fused Triton kernels of a GPT-2, each with the PyTorch operator that it replaces.

Every function here runs anywhere: `use_backend` chooses how, `python -m kernels` says what runs on this machine,
`python -m kernels check` proves the kernels on it.
"""

from ._backend import use_backend
from ._compile import no_compilation
from ._dispatch import check_backend
from ._machine import gpu_problem
from ._proof import prove
from ._registry import Case, Draw, KernelSpec
from .add_layer_norm import add_layer_norm, residual_dropout_mask
from .attention import attention_dropout_mask, causal_attention
from .cross_entropy import cross_entropy
from .decode_attention import decode_attention
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
    "check_backend",
    "cross_entropy",
    "decode_attention",
    "gpu_problem",
    "layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "lm_logits",
    "no_compilation",
    "prove",
    "residual_dropout_mask",
    "use_backend",
]
