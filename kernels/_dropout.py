"""Counter-based dropout: the bit of an element depends on a seed and on the element's own coordinates, on nothing else.

    s0, s1 = philox(seed, stream)
    r_i = mix(s0 + i G)     c_j = mix(s1 + j G)     keep_ij = mix(r_i xor c_j) >= threshold    (G = 2^32 / golden ratio)

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns the seed and the number of the
mask into two words; steps of G from each, mixed, are one key per row and one per column (the Weyl sequence of Steele et
al. 2014, "Fast splittable pseudorandom number generators"). mix is the two-round hash of 32-bit integers that Wellons
found by search: a bijection in which each input bit flips each output bit with a probability close to 1/2. Philox for
each element would cost attention several times the instructions of its softmax. Forward, backward and a recomputed
forward see one mask without storing it, whatever the tiling, and PyTorch can compute the same one.
"""

import torch
from torch import Tensor

from ._triton import tl, triton

_M32 = 0xFFFFFFFF


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0xD35A2D97
    return x ^ (x >> 15)


@triton.jit
def dropout_words(seed, stream):
    """Where row keys and column keys start from, two uint32 words. stream: int32, another for each mask of a seed."""
    s0, s1, _, _ = tl.philox(seed, stream, 0, 0, 0)
    return s0, s1


@triton.jit
def dropout_hash(word, index):
    """One uint32 key for each index of an int32 tile."""
    return _mix(word + index.to(tl.uint32) * 0x9E3779B9)


@triton.jit
def keep_tile(row_hash, col_hash, threshold):
    """Mask of the elements that dropout keeps, for keys that broadcast to the tile."""
    # 31 bits, so that the comparison is between plain int32 numbers
    return (_mix(row_hash ^ col_hash) >> 1).to(tl.int32, bitcast=True) >= threshold


def dropout_threshold(dropout_p: float) -> int:
    """The 31-bit number under which a word means "drop": p is rounded to a multiple of 2^-31."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return int(dropout_p * 2**31)


def _mix64(x: Tensor) -> Tensor:
    """`_mix` on int64 numbers in [0, 2^32)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _M32
    x = (x ^ (x >> 15)) * 0xD35A2D97 & _M32
    return x ^ (x >> 15)


def _words64(seed: Tensor, stream: Tensor) -> tuple[Tensor, Tensor]:
    """`dropout_words` on int64 numbers."""
    k0, k1 = seed & _M32, (seed >> 32) & _M32
    c0, c1, c2, c3 = stream, *(torch.zeros_like(stream) for _ in range(3))
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((high >> 32) & _M32) ^ c1 ^ k0,
            high & _M32,
            ((low >> 32) & _M32) ^ c3 ^ k1,
            low & _M32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return c0, c1


def keep_mask(seed: Tensor, dropout_p: float, rows: int, columns: int, stream: Tensor) -> Tensor:
    """The mask of `keep_tile` in plain PyTorch. stream: (...) int64 -> (..., rows, columns) bool, True = keep."""
    s0, s1 = _words64(seed, stream)
    row_hash, col_hash = (
        _mix64(s[..., None] + torch.arange(n, device=stream.device) * 0x9E3779B9 & _M32)
        for s, n in ((s0, rows), (s1, columns))
    )
    return (_mix64(row_hash[..., :, None] ^ col_hash[..., None, :]) >> 1) >= dropout_threshold(dropout_p)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """() int64 on device. None draws from PyTorch's generator: torch.manual_seed decides, checkpointing replays."""
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64).reshape(())
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)
