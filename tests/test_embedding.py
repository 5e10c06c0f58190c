"""What the tolerance rule does not see of the embedding: ids out of range, and one rounding too many."""

import pytest
import torch

from kernels import embedding, use_backend
from kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")


def test_embedding_is_rounded_once(device):
    """The sum of float32 tables is bit for bit PyTorch's: an error of one rounding more is within the rule."""
    idx = torch.randint(9, (2, 6), device=device)
    wte, wpe = torch.randn(9, 40, device=device), torch.randn(6, 40, device=device)
    for dtype in (torch.float16, torch.float32):
        with use_backend("triton"):
            assert torch.equal(embedding(idx, wte, wpe, dtype), (wte[idx] + wpe).to(dtype))


@pytest.mark.parametrize("bad", [-1, 5, 2**40])
def test_embedding_of_an_unknown_token_is_nan(bad, device):
    """Nothing else is: its row of the table is not read, and nobody else's gets its gradient."""
    idx = torch.tensor([[0, 4, bad, 4]], device=device)
    wide = torch.full((9, 8), 3.0, device=device)  # numbers before the table and after it
    wte, wpe = wide[2:7].requires_grad_(), torch.zeros(4, 8, device=device)
    with use_backend("triton"):
        y = embedding(idx, wte, wpe)
        (gradient,) = torch.autograd.grad(y, wte, torch.ones_like(y))
    assert y.isnan().all(-1).tolist() == [[False, False, True, False]] and (y[~y.isnan()] == 3.0).all()
    assert gradient[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 2.0]
