"""The shape of a GPT-2: one frozen dataclass with Hugging Face's field names, and the presets.

The four published sizes: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), table 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ACTIVATIONS = {"gelu_new": "tanh", "gelu": "none"}  # Hugging Face's name -> the GELU approximation that it stands for


@dataclass(frozen=True)
class GPTConfig:
    """Everything that defines a model except its weights. Raises ValueError for invalid values."""

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    activation_function: str = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embd_pdrop: float = 0.0
    resid_pdrop: float = 0.0
    attn_pdrop: float = 0.0
    bias: bool = True  # in Linear and LayerNorm; GPT-2 has them all

    def __post_init__(self) -> None:
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in ("layer_norm_epsilon", "initializer_range"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 < value < 1e30:  # in float32 a larger one may become inf
                raise ValueError(f"{name} must be a number above 0 and below 1e30, got {value!r}")
        for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ValueError(f"{name} is a dropout probability and must lie in [0, 1), got {value!r}")
        if type(self.bias) is not bool:
            raise ValueError(f"bias must be true or false, got {self.bias!r}")
        if self.activation_function not in ACTIVATIONS:
            known = " or ".join(repr(name) for name in ACTIVATIONS)
            raise ValueError(f"activation_function must be {known}, got {self.activation_function!r}")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_head must divide n_embd, but {self.n_embd} is not a multiple of {self.n_head}: "
                f"each head takes n_embd / n_head channels"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GPTConfig:
        """The inverse of to_dict. Missing keys take their defaults; unknown keys raise a ValueError that names them."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown model settings: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
        return cls(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


PRESETS: dict[str, GPTConfig] = {
    # tiny and char are for any text: the tokenizer's vocabulary replaces vocab_size.
    "tiny": GPTConfig(n_layer=4, n_head=4, n_embd=128, n_positions=64),
    # nanoGPT's shakespeare-char, which has no biases either.
    "char": GPTConfig(
        n_layer=6, n_head=6, n_embd=384, n_positions=256, embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.2, bias=False
    ),
    "gpt2": GPTConfig(),
    "gpt2-medium": GPTConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(n_layer=48, n_head=25, n_embd=1600),
}
