"""The definition of a correct kernel, for the tests and for `python -m kernels check`.

The rule, for a result `got` that should equal `truth` (the eager path in float64 on the same, dtype-rounded inputs):

    max|got - truth| <= k * max|eager - truth| + 2 ulp,      k = 2 for outputs, 3 for gradients

where `eager` is PyTorch's own operator in the kernel's dtype and an ulp is that of max|truth| in that dtype. It asks no
more of a kernel than PyTorch itself reaches, and none of its constants is tuned. (The form is flash-attention's.)

A kernel goes through families of cases, FAMILIES: shapes, layouts in memory, numbers, a second run, canaries.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._backend import Backend, use_backend
from ._registry import Case, KernelSpec

OUTPUT_FACTOR, GRADIENT_FACTOR, ULPS = 2.0, 3.0, 2.0


@dataclass(frozen=True)
class Comparison:
    """One comparison. name: an output, or "d" and the argument whose gradient it is; error, allowed: absolute.

    dtype: of the result; case_dtype: of the inputs, which a loss in float32 does not share.
    """

    kernel: str
    case: Case
    dtype: torch.dtype
    name: str
    error: float
    allowed: float
    family: str = "shapes"
    case_dtype: torch.dtype = torch.float32

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


def compare(
    kernel: str, case: Case, name: str, got: Tensor, eager: Tensor, truth: Tensor, *, gradient: bool
) -> Comparison:
    """One comparison by the rule. ValueError if shape or dtype of the kernel's result is not the eager one's."""
    if got.shape != eager.shape or got.dtype != eager.dtype:
        raise ValueError(
            f"{kernel}: {name} is {got.dtype} {tuple(got.shape)}, eager gives {eager.dtype} {tuple(eager.shape)}"
        )
    allowed = budget(truth, eager, GRADIENT_FACTOR if gradient else OUTPUT_FACTOR)
    return Comparison(kernel, case, eager.dtype, name, _distance(got, truth), allowed)


# --- running one case ------------------------------------------------------------------------------------------------

Transform = Callable[[Tensor], Tensor]


def _each(change: Transform, tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {name: change(t) if isinstance(t, Tensor) else t for name, t in tensors.items()}


def evaluate(
    spec: KernelSpec,
    inputs: Mapping[str, Any],
    incoming: Mapping[str, Tensor] | None,
    backend: Backend,
    fn: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """Every output by its name and, as "d" + name, the gradient of every differentiable input.

    incoming: the gradient that arrives at each output, by name; None runs forward only.
    """
    leaves = {}
    if incoming is not None:
        differentiable = {name: inputs[name] for name in spec.grads if inputs[name] is not None}
        leaves = {name: value.detach().requires_grad_() for name, value in differentiable.items()}
    with use_backend(backend):
        result = (fn or spec.fn)(**{**inputs, **leaves})
        outputs = dict(zip(spec.outputs, result if isinstance(result, tuple) else (result,), strict=True))
        if leaves:
            assert incoming is not None
            gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(incoming.values()))
            outputs |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in outputs.items()}


def incoming_gradients(spec: KernelSpec, inputs: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """A random gradient for each output, in the shape and dtype that eager gives it."""
    generator = torch.Generator().manual_seed(seed)
    outputs = evaluate(spec, inputs, None, "eager")
    return {name: torch.randn(y.shape, generator=generator).to(y) for name, y in outputs.items()}


def _in_float64(t: Tensor) -> Tensor:
    """The oracle starts from the numbers that the kernel gets, already rounded to its dtype."""
    return t.double() if t.is_floating_point() else t


def _plain(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def prove(
    spec: KernelSpec,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
    *,
    seed: int = 0,
    values: Transform = lambda t: t,
    layout: Transform = lambda t: t,
    fn: Callable[..., Any] | None = None,
) -> Iterator[Comparison]:
    """Run a kernel on a case and compare every output and gradient, under random incoming gradients.

    values: gives the floating-point inputs other numbers. layout: gives a tensor other strides; applied to the inputs
    and the incoming gradients. fn: replaces the kernel's public function, to show that the rule rejects a wrong one.
    """
    drawn = spec.inputs(case, dtype, device, seed)
    strided = _each(lambda t: layout(values(t) if t.is_floating_point() else t), drawn)
    inputs = _each(_plain, strided)
    strided_dy = _each(layout, incoming_gradients(spec, inputs, seed + 1))
    dy = _each(_plain, strided_dy)
    truth = evaluate(spec, _each(_in_float64, inputs), _each(_in_float64, dy), "eager")
    eager = evaluate(spec, inputs, dy, "eager")
    got = evaluate(spec, strided, strided_dy, "triton", fn)
    for name in truth:
        yield compare(spec.name, case, name, got[name], eager[name], truth[name], gradient=name not in spec.outputs)


def launched(spec: KernelSpec, case: Case, dtype: torch.dtype) -> None:
    """Call the kernel as every family below does, inside record_launches: in each layout, forward and backward."""
    drawn = spec.inputs(case, dtype, torch.device("cpu"))
    for layout in (_plain, *LAYOUTS.values()):
        inputs = _each(layout, drawn)
        outputs = _each(_plain, evaluate(spec, inputs, None, "triton"))
        evaluate(spec, inputs, _each(layout, outputs), "triton")


# --- layouts and numbers ---------------------------------------------------------------------------------------------


def _surrounded(t: Tensor, shape: list[int]) -> Tensor:
    """A larger tensor of numbers that no kernel may touch."""
    return torch.full(shape, float("nan") if t.is_floating_point() else -(2**40), dtype=t.dtype, device=t.device)


def _transposed(t: Tensor) -> Tensor:
    order = tuple(reversed(range(t.ndim)))
    return t.permute(order).contiguous().permute(order)


def _sliced(t: Tensor) -> Tensor:
    """Every second element of every dimension, past a storage offset."""
    view = _surrounded(t, [2 * n + 1 for n in t.shape])[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _columns_sliced(t: Tensor) -> Tensor:
    """Rows with something before and after them, as one of several packed projections has."""
    return _surrounded(t, [*t.shape[:-1], t.shape[-1] + 7])[..., 3:-4].copy_(t) if t.ndim else t


def _expanded(t: Tensor) -> Tensor:
    """Stride 0: what `.sum()` sends backward, and what a broadcast row is."""
    return t[:1].expand(t.shape) if t.ndim and len(t) else t


LAYOUTS: dict[str, Transform] = {
    "transposed": _transposed,
    "sliced": _sliced,
    "columns_sliced": _columns_sliced,
    "expanded": _expanded,
}
VALUES: dict[str, Callable[[KernelSpec, Tensor], Tensor]] = {
    "large": lambda spec, t: spec.large * t,
    "constant": lambda spec, t: torch.full_like(t, 0.5),
    "zeros": lambda spec, t: torch.zeros_like(t),
    "subnormal": lambda spec, t: t * torch.finfo(t.dtype).tiny,
}


# --- families --------------------------------------------------------------------------------------------------------

BAND = 64  # canaries on either side of every buffer: elements, which keeps 16-byte alignment


@contextlib.contextmanager
def guarded_memory() -> Iterator[Callable[[], int]]:
    """Inside the block torch.empty gives NaN between canaries; the function yielded counts canaries overwritten."""
    empty, empty_like = torch.empty, torch.empty_like
    bands: list[Tensor] = []

    def guarded(shape: Any, *more: Any, **options: Any) -> Tensor:
        size = torch.Size([shape, *more] if isinstance(shape, int) else shape)
        whole = empty(size.numel() + 2 * BAND, **options)
        poison = float("nan") if whole.is_floating_point() else -(2**20)
        whole.fill_(poison)
        for band in (whole[:BAND], whole[-BAND:]):
            bands.append(band.fill_(77))
        return whole[BAND:-BAND].view(size)

    torch.empty = guarded  # type: ignore[assignment]
    torch.empty_like = lambda t, **options: guarded(t.shape, **{"dtype": t.dtype, "device": t.device} | options)  # type: ignore
    try:
        yield lambda: sum(int((band != 77).sum()) for band in bands)
    finally:
        torch.empty, torch.empty_like = empty, empty_like


def _count(spec: KernelSpec, case: Case, dtype: torch.dtype, name: str, wrong: int) -> Comparison:
    """A comparison that counts wrong elements and allows none."""
    return Comparison(spec.name, case, dtype, name, float(wrong), 0.0)


def _layouts(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for name, layout in LAYOUTS.items():
        for row in prove(spec, case, dtype, device, layout=layout):
            yield replace(row, case={**case, "layout": name})


def _values(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for name, values in VALUES.items():
        for row in prove(spec, case, dtype, device, values=functools.partial(values, spec)):
            yield replace(row, case={**case, "values": name})


def _repeats(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """A second run gives the same bits, and the inputs are unchanged."""
    inputs = spec.inputs(case, dtype, device)
    dy = incoming_gradients(spec, inputs, seed=1)
    before = {**_each(_plain, inputs), **_each(_plain, dy)}
    first, second = (evaluate(spec, inputs, dy, "triton") for _ in range(2))
    for name in first:
        yield _count(spec, case, dtype, f"{name} again", int((first[name] != second[name]).sum()))
    after = {**inputs, **dy}
    changed = sum(int((after[k] != v).sum()) for k, v in before.items() if isinstance(v, Tensor))
    yield _count(spec, case, dtype, "inputs changed", changed)


def _memory(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Every element is written and nothing beyond: fresh memory holds NaN between canaries."""
    with guarded_memory() as overwritten:
        yield from prove(spec, case, dtype, device)
        yield _count(spec, case, dtype, "canaries", overwritten())


Family = Callable[[KernelSpec, Case, torch.dtype, torch.device], Iterator[Comparison]]
FAMILIES: dict[str, Family] = {
    "shapes": prove,
    "layouts": _layouts,
    "values": _values,
    "repeats": _repeats,
    "memory": _memory,
}


def prove_family(
    family: str, spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> Iterator[Comparison]:
    """All comparisons of one kernel, case and dtype in one of FAMILIES."""
    for row in FAMILIES[family](spec, case, dtype, device):
        yield replace(row, family=family, case_dtype=dtype)
