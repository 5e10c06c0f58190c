"""Outputs of 2^31 elements and more. Inputs whose strides reach that far are the family "far" of the proof.

The memory is mapped and hardly touched. On a CPU the interpreter runs the last programs of a large grid, no others.
"""

import sys

import pytest
import torch
from conftest import HAS_CUDA

from kernels import causal_attention, use_backend
from kernels._proof import FAR, compare, evaluate, far, incoming_gradients, mapped, prove
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON

if HAS_TRITON:
    from triton.runtime import interpreter

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")

SPECS = all_specs()


def _mapped(numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    try:
        return mapped(numel, dtype, device)
    except OSError as error:
        pytest.skip(str(error))


def test_cross_entropy_reaches_far_tiles_of_a_row(device):
    """Of logits in several tiles, the second of which begins 2^31 elements after the first."""
    case = {"M": 1, "V": 9000}
    for row in prove(SPECS["cross_entropy"], case, torch.float16, device, layout=lambda t: far(t, -1, 2**18)):
        assert row.passed, f"{row.name}: error {row.error:.3e} > allowed {row.allowed:.3e}"


# Name -> a case of one row, its name for the rows, and how many of them are more than 2^31 elements, the last tile
# ragged and in the last program of the backward kernels, which walk the rows in steps of their grid.
LARGE = {
    "layer_norm": ({"M": 1, "N": 512}, 2**22 + 2**19 - 1),
    "add_layer_norm": ({"M": 1, "N": 512, "dropout_p": 0.0}, 2**22 + 2**19 - 1),
    "bias_gelu": ({"M": 1, "N": 512}, 2**22 + 2**19 - 1),
    "causal_attention": ({"B": 1, "H": 1, "T": 16, "D": 256}, 2**19 + 1),
    "cross_entropy": ({"M": 1, "V": 50257}, 2**31 // 50257 + 3),
}


@pytest.fixture
def large_outputs(monkeypatch):
    """Large tensors are mapped, kernels run the last programs of their grid, row loops are short. None on a GPU.

    What the programs that do not run would have written is zero.
    """
    if HAS_CUDA:
        return

    def mapped(*shape, dtype, device):
        size = torch.Size(shape if isinstance(shape[0], int) else shape[0])
        large = size.numel() >= FAR
        zeros = torch.zeros(size, dtype=dtype, device=device) if not large else _mapped(size.numel(), dtype, device)
        return zeros.view(size)

    monkeypatch.setattr(torch, "empty", mapped)
    monkeypatch.setattr(torch, "empty_like", lambda t: mapped(*t.shape, dtype=t.dtype, device=t.device))
    # The interpreter walks each dimension of a grid by range(n).
    last = lambda *bounds: range(*bounds)[-4:] if len(bounds) == 1 else range(*bounds)  # noqa: E731
    monkeypatch.setattr(interpreter, "range", last, raising=False)
    for name in LARGE:
        monkeypatch.setattr(sys.modules[SPECS[name].fn.__module__], "sm_count", lambda device: 2**13, raising=False)


@pytest.mark.parametrize("name", LARGE)
def test_last_rows_of_large_outputs(name, device, large_outputs):
    """All rows are one row, read with stride 0; the last one written is what eager makes of it."""
    spec, (case, rows) = SPECS[name], LARGE[name]
    inputs = spec.inputs(case, torch.float16, device)
    dy = incoming_gradients(spec, inputs, seed=1)
    exact = {
        key: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for key, t in inputs.items()
    }
    truth = evaluate(spec, exact, {key: t.double() for key, t in dy.items()}, "eager")
    eager = evaluate(spec, inputs, dy, "eager")

    def repeated(t):
        return t.expand(rows, *t.shape[1:]) if isinstance(t, torch.Tensor) and t.ndim and len(t) == 1 else t

    # the mean of a loss takes 1 / rows of each gradient
    incoming = {key: repeated(t) if t.ndim else t * rows for key, t in dy.items()}
    got = evaluate(spec, {key: repeated(t) for key, t in inputs.items()}, incoming, "triton")
    checked = [key for key in got if got[key].numel() >= FAR]
    assert checked
    for key in checked:
        row = compare(name, case, key, got[key][-1:], eager[key], truth[key], gradient=key not in spec.outputs)
        assert row.passed, f"{key}: error {row.error:.3e} > allowed {row.allowed:.3e}"


def test_attention_reaches_the_end_of_a_long_sequence(device, large_outputs, monkeypatch):
    """All its rows are one row, in documents of three: a token's y is that row, its dv a share of each later dy, and
    dq and dk are zero, for which delta is taken from the last rows of y."""
    T, D = 2**23 + 40, 256
    qkv = torch.randn(1, 1, 3 * D, device=device).half().expand(1, T, -1).requires_grad_()
    documents = ((torch.arange(T, device=device) - T) // 3)[None]
    if not HAS_CUDA:  # queries begin with their last tile
        ends = lambda *bounds: sorted({*range(*bounds)[:2], *range(*bounds)[-2:]})  # noqa: E731
        monkeypatch.setattr(interpreter, "range", ends, raising=False)
    with use_backend("triton"):
        y = causal_attention(qkv, 1, documents=documents)
        (dqkv,) = torch.autograd.grad(y, qkv, torch.ones(1, 1, D, device=device).half().expand(1, T, -1))
    assert y.numel() >= FAR and dqkv.numel() >= FAR
    torch.testing.assert_close(y[0, -3:], qkv[0, -3:, -D:], rtol=1e-3, atol=1e-3)
    shares = torch.tensor([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3], device=device).half()
    torch.testing.assert_close(dqkv[0, -3:, -D:], shares[:, None].expand(3, D), rtol=1e-3, atol=1e-3)
    assert dqkv[0, -3:, :-D].abs().max() < 0.02


def test_large_linear_cross_entropy_gradient_reaches_its_end(device, large_outputs):
    """Its backward pass scales what the forward pass left: here two targets, so by half of what arrives."""
    module = sys.modules[SPECS["linear_cross_entropy"].fn.__module__]
    dx = _mapped(FAR + 3, torch.float16, device)
    dx[-5:] = torch.arange(5)
    targets, none = torch.tensor([0, 0], device=device), torch.zeros(0, device=device)
    scaled, _ = module.linear_cross_entropy_bwd(torch.tensor(3.0, device=device), targets, -100, dx, none)
    assert scaled[-5:].tolist() == [0.0, 1.5, 3.0, 4.5, 6.0]


def test_large_embeddings_reach_their_ends(device, large_outputs):
    """The vectors of more than 2^31 / C tokens, and the gradient of a table of as many."""
    module = sys.modules[SPECS["embedding"].fn.__module__]
    rows, C = 2**22 + 2**19 - 1, 512
    wte, wpe = torch.randn(4, C, device=device).half(), torch.randn(1, C, device=device).half()
    y = module.embedding_fwd(torch.full((1, 1), 2, device=device).expand(rows, 1), wte, wpe, torch.float16)
    assert y.numel() >= FAR and torch.equal(y[-1, 0], wte[2] + wpe[0])
    last = torch.full((1, 3), rows - 1, device=device)
    dwte = module.embedding_bwd(torch.ones(1, 3, C, device=device), last, rows)
    assert (dwte[-1] == 3.0).all() and not dwte[-2].any()
