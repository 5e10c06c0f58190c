"""Keys and values of the tokens that a model has read, so that each is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import GPTConfig


class KVCache:
    """Room for the first S tokens of B sequences of the same length; GPT.forward fills it and reads it.

    k, v: (n_layer, B, H, S, D) in the model's dtype, of which the first `length` places hold tokens.
    lengths: (B,) int64, what decode_attention reads: on the device, so the host never waits for it.
    length: the same number on the host.
    """

    def __init__(
        self, config: GPTConfig, B: int, S: int | None = None, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """S: n_positions unless less is enough. ValueError if it is more: the model has no positions for them."""
        S = config.n_positions if S is None else S
        if not 0 < S <= config.n_positions:
            raise ValueError(f"a cache must have 1 to {config.n_positions} tokens, the positions of the model, got {S}")
        shape = (config.n_layer, B, config.n_head, S, config.head_dim)
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.length = 0
        self.positions = torch.arange(0, device=device)  # of the tokens of this step: none so far

    def extend(self, B: int, T: int) -> Tensor:
        """Make room for T more tokens of each sequence -> (T,) int64: their positions.

        ValueError, with nothing changed, for another batch size, a full cache, or T other than 1 in a cache that holds
        tokens; and if gradients are enabled, which a cache would keep alive step after step.
        """
        S = self.k.shape[3]
        if torch.is_grad_enabled():
            raise ValueError("a cache is for inference: call the model under torch.inference_mode()")
        if len(self.lengths) != B:
            raise ValueError(f"the cache has {len(self.lengths)} sequences, got {B}")
        if self.length + T > S:
            raise ValueError(f"the cache is full: it has room for {S} tokens, holds {self.length}, and got {T} more")
        if self.length and T != 1:
            raise ValueError(f"a cache that holds tokens takes one at a time, got {T}: read a text into a new one")
        self.positions = self.lengths[:1] + torch.arange(T, device=self.lengths.device)
        self.lengths += T
        self.length += T
        return self.positions

    def write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v: (B, H, T, D) of this step's tokens, any strides -> the layer's whole k and v, (B, H, S, D)."""
        k_cache, v_cache = self.k[layer], self.v[layer]
        k_cache.index_copy_(2, self.positions, k)
        v_cache.index_copy_(2, self.positions, v)
        return k_cache, v_cache
