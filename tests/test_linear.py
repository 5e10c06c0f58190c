"""A linear layer in 16 bits under float32 parameters: its gradients, and that PyTorch's way to them is less exact."""

import pytest
import torch

from kernels import linear
from kernels._linear import _Float32Gradients


def _gradients(product, dtype):
    """y and the gradients of x, the weight and the bias, by a product; in float64, of the same 16-bit numbers."""
    torch.manual_seed(0)
    x, dy = torch.randn(3, 40, 24).half(), torch.randn(3, 40, 16).half()
    weight, bias = torch.randn(16, 24).half().float(), torch.randn(16).half().float()
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in (x, weight, bias)]
    y = product(*leaves)
    return y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))


def _ours(x, weight, bias):
    return _Float32Gradients.apply(x, weight, bias, weight.detach().to(x.dtype))


def test_gradients_of_float32_parameters_are_not_rounded_to_16_bits():
    truth = _gradients(torch.nn.functional.linear, torch.float64)
    eager, ours = _gradients(linear, None), _gradients(_ours, None)
    for name, exact, a, b in zip(("y", "dx", "dweight", "dbias"), truth, eager, ours, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        errors = [(t.double() - exact).abs().max().item() for t in (a, b)]
        assert errors[1] <= errors[0] if name in ("y", "dx") else errors[1] < errors[0] / 100, (name, errors)


@pytest.mark.parametrize("frozen", [0, 1, 2], ids=["x", "weight", "bias"])
def test_what_needs_no_gradient_gets_none(frozen):
    leaves = [torch.randn(shape).to(dtype) for shape, dtype in (((5, 6), torch.half), ((4, 6), None), ((4,), None))]
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(i != frozen)
    _ours(*leaves).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own, while it traces
def test_it_compiles_without_a_graph_break():
    compiled = torch.compile(_ours, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, _gradients(compiled, None), _gradients(_ours, None)))
