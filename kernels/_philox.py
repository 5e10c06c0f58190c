"""Counter-based dropout: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").

The random word of an element depends on the seed and the element's own coordinates only. Forward, backward and a
recomputed forward therefore see one mask without storing it, whatever the tiling, and PyTorch can compute the same one.
"""

import torch
from torch import Tensor

from ._triton import tl, triton

_M32 = 0xFFFFFFFF


@triton.jit
def keep_tile(seed, threshold, c0, c1, c2, c3):
    """Mask of the elements that dropout keeps, for int32 counters c0..c3 that broadcast to the tile."""
    word, _, _, _ = tl.philox(seed, c0, c1, c2, c3)
    # 31 bits, so that the comparison is between plain int32 numbers
    return (word >> 1).to(tl.int32, bitcast=True) >= threshold


def dropout_threshold(dropout_p: float) -> int:
    """The 31-bit number under which a word means "drop": p is rounded to a multiple of 2^-31."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return int(dropout_p * 2**31)


def keep_mask(seed: Tensor, dropout_p: float, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> Tensor:
    """The same mask as `keep_tile` in plain PyTorch. c0..c3: int64 counters that broadcast -> bool, True = keep."""
    k0, k1 = seed & _M32, (seed >> 32) & _M32
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
    return (c0 >> 1) >= dropout_threshold(dropout_p)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """() int64 on device. None draws from PyTorch's generator: torch.manual_seed decides, checkpointing replays."""
    if isinstance(seed, Tensor):
        return seed.to(device=device, dtype=torch.int64).reshape(())
    if seed is None:
        return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    return torch.full((), seed, dtype=torch.int64, device=device)
