"""Keys and values of the tokens that a model has read, so that each is computed once."""

from __future__ import annotations

import torch
from torch import Tensor

from model.config import GPTConfig


class KVCache:
    """Room for the first S tokens of each of B sequences; GPT.forward fills it and reads it.

    kv: (n_layer, 2, B, H, S, D) in the model's dtype, keys and values; the first lengths[b] places of sequence b hold
    tokens. k, v: its halves, (n_layer, B, H, S, D).
    lengths: (B,) int64, what decode_attention reads: on the device, so the host never waits for it.
    length: on the host, at least the largest of them; 0 where the cache is empty.
    """

    def __init__(
        self, config: GPTConfig, B: int, S: int | None = None, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        """S: n_positions unless less is enough. ValueError if it is more: the model has no positions for them."""
        S = config.n_positions if S is None else S
        if not 0 < S <= config.n_positions:
            raise ValueError(f"a cache must have 1 to {config.n_positions} tokens, the positions of the model, got {S}")
        H = config.n_head
        # Zeros: PyTorch's attention also multiplies what lies past the lengths, by a weight of 0.
        self.kv = torch.zeros((config.n_layer, 2, B, H, S, config.head_dim), dtype=dtype, device=device)
        self.k, self.v = self.kv.unbind(1)
        self.lengths = torch.zeros(B, dtype=torch.int64, device=device)
        self.length = 0
        self.is_prefill = True  # whether the tokens of this step are the first
        # Where the first tokens and this step's go, in a layer's kv as (2 * B * H * S, D): (B, 1, 2, H).
        self._first = S * torch.arange(2 * B * H, device=device).view(2, B, H).transpose(0, 1)[:, None]
        self._places = self._first

    def extend(self, B: int, T: int, lengths: Tensor | None = None) -> Tensor:
        """Make room for T more tokens of each sequence -> their positions, int64: (T,), or (B, 1) after other tokens.

        lengths: (B,) int64, how many of the T are text where a cache is empty; the others are padding. Default: all.

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
        if self.length and (T != 1 or lengths is not None):
            got = f"{T}" if T != 1 else "lengths of several"
            raise ValueError(f"a cache that holds tokens takes one at a time, got {got}: read a text into a new one")
        self.is_prefill = self.length == 0
        if self.is_prefill:
            positions = torch.arange(T, device=self.lengths.device)
            if lengths is None:
                self.lengths.fill_(T)
            else:
                self.lengths.copy_(lengths)
        else:
            positions = self.lengths[:, None].clone()
            self._places = self._first + positions[..., None, None]
            self.lengths += 1
        self.length += T
        return positions

    def write(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """kv: (B, T, 2, H, D) of this step's tokens, any strides -> the layer's whole k and v, (B, H, S, D) each."""
        cache = self.kv[layer]
        if self.is_prefill:  # what padding leaves here lies past the lengths, until tokens take its place
            cache[..., : kv.shape[1], :] = kv.permute(2, 0, 3, 1, 4)
        else:
            cache.flatten(0, 3).index_put_((self._places,), kv)
        return cache[0], cache[1]

    def clear(self, sequences: Tensor | None = None) -> None:
        """Drop the tokens of these sequences, (R,) int64, of all of them by default. No host sync.

        `length` changes only where all are dropped: whoever drops some sets it.
        """
        if sequences is None:
            self.lengths.zero_()
            self.length = 0
        else:
            self.lengths.index_fill_(0, sequences, 0)

    def put(self, sequences: Tensor, other: KVCache, sources: Tensor) -> None:
        """Replace sequences[i] by sequence sources[i] of another cache of the same model; (R,) int64 each.

        What is replaced may be longer; `length` stays at least the largest.
        """
        T = other.length
        self.kv[..., :T, :].index_copy_(2, sequences, other.kv[..., :T, :].index_select(2, sources))
        self.lengths.index_copy_(0, sequences, other.lengths.index_select(0, sources))
        self.length = max(self.length, T)
