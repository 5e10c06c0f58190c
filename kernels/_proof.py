"""What it means that a kernel is right, in one place: the tests and `python -m kernels check` both ask here.

The rule, for a result `got` that should equal `truth` (the eager path in float64 on the same, dtype-rounded inputs):

    max|got - truth| <= k * max|eager - truth| + 2 ulp,      k = 2 for outputs, 3 for gradients

where `eager` is PyTorch's own operator in the kernel's dtype and an ulp is that of max|truth| in that dtype. It asks of
a kernel no more than PyTorch reaches itself, and no constant in it was ever tuned. (flash-attention's tests have the
form.)
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._dispatch import Backend, use_backend
from ._registry import Case, KernelSpec

OUTPUT_FACTOR, GRADIENT_FACTOR, ULPS = 2.0, 3.0, 2.0


@dataclass(frozen=True)
class Row:
    """One comparison. name: "y" or the argument whose gradient it is; error, allowed: absolute, in float64."""

    kernel: str
    case: Case
    dtype: torch.dtype
    name: str
    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """error / allowed: at most 1 where the kernel is right. NaN counts as wrong."""
        return 0.0 if self.error == 0.0 else self.error / self.allowed if self.allowed else float("inf")

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def ulp(dtype: torch.dtype, magnitude: float) -> float:
    """Spacing of the numbers of a dtype just above a magnitude's power of two."""
    return torch.finfo(dtype).eps * 2.0 ** torch.tensor(max(magnitude, torch.finfo(dtype).tiny)).log2().floor().item()


def budget(truth: Tensor, eager: Tensor, factor: float) -> float:
    """The largest absolute error that the rule allows. truth: float64; eager: the dtype under test."""
    if truth.numel() == 0:
        return 0.0
    return factor * _distance(eager, truth) + ULPS * ulp(eager.dtype, truth.abs().max().item())


def _distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b).abs().max().item() if b.numel() else 0.0


def compare(kernel: str, case: Case, name: str, got: Tensor, eager: Tensor, truth: Tensor, *, gradient: bool) -> Row:
    """One row of proof. ValueError if shape or dtype of the kernel's result is not the eager one's."""
    if got.shape != eager.shape or got.dtype != eager.dtype:
        raise ValueError(
            f"{kernel}: {name} is {got.dtype} {tuple(got.shape)}, eager gives {eager.dtype} {tuple(eager.shape)}"
        )
    allowed = budget(truth, eager, GRADIENT_FACTOR if gradient else OUTPUT_FACTOR)
    return Row(kernel, case, eager.dtype, name, _distance(got, truth), allowed)


def evaluate(
    spec: KernelSpec,
    inputs: dict[str, Any],
    dy: Tensor | None,
    backend: Backend,
    fn: Callable[..., Tensor] | None = None,
) -> dict[str, Tensor]:
    """Output "y" and the gradient of every differentiable input under an incoming gradient dy, by argument name."""
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if name in spec.grads and value is not None
    }
    with use_backend(backend):
        y = (fn or spec.fn)(**{**inputs, **leaves})
        if dy is None:
            return {"y": y.detach()}
        gradients = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **dict(zip(leaves, gradients, strict=True))}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64: what a kernel is given is already rounded to its dtype, so is the oracle's input."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def prove(
    spec: KernelSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    fn: Callable[..., Tensor] | None = None,
) -> Iterator[Row]:
    """Runs a kernel on a case and compares the output and every gradient, under a random incoming gradient.

    layout: gives a tensor other strides with the same values; applied to the inputs and to the incoming gradient.
    fn: in place of the kernel's public function, to show that a wrong one is found.
    """
    inputs = spec.inputs(case, dtype, device, seed)
    strided = {k: layout(v) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    shape = evaluate(spec, inputs, None, "eager")["y"].shape
    dy = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1)).to(device=device, dtype=dtype)
    truth = evaluate(spec, in_float64(inputs), dy.double(), "eager")
    eager = evaluate(spec, inputs, dy, "eager")
    got = evaluate(spec, strided, layout(dy), "triton", fn)
    for name in truth:
        yield compare(spec.name, case, name, got[name], eager[name], truth[name], gradient=name != "y")
