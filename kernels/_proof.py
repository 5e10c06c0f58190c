"""The definition of a correct kernel, for the tests and for `python -m kernels check`.

The rule, for a result `got` that should equal `truth` (the eager path in float64 on the same, dtype-rounded inputs):

    max|got - truth| <= k * max|eager - truth| + 2 ulp,      k = 2 for outputs, 3 for gradients

where `eager` is PyTorch's own operator in the kernel's dtype and an ulp is that of max|truth| in that dtype. It asks no
more of a kernel than PyTorch itself reaches, and none of its constants is tuned. (The form is flash-attention's.)

A kernel goes through families of cases, FAMILIES: shapes, layouts in memory, numbers, a second run, canaries, far
addresses. It always runs before its oracle, so that no memory holds an answer yet.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ._backend import Backend, use_backend
from ._launch import record_launches, recorded_with, recording
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


class Refused(ValueError):
    """A kernel that must not be believed; the message is the whole reason."""


def function(spec: KernelSpec, backend: Backend) -> Callable[..., Any]:
    """What computes an operator, to be called under ``use_backend(backend)``."""
    return spec.eager if backend == "eager" and spec.eager is not None else spec.fn


def evaluate(
    spec: KernelSpec,
    inputs: Mapping[str, Any],
    incoming: Mapping[str, Tensor] | None,
    backend: Backend,
    fn: Callable[..., Any] | None = None,
    *,
    again: bool = False,
) -> dict[str, Tensor]:
    """Every output by its name and, as "d" + name, the gradient of every differentiable input.

    incoming: the gradient that arrives at each output, by name; None runs forward only. again: the gradients are those
    of a second backward pass over the same forward pass.
    Refused for an output that is no plain tensor: it could put off its work until somebody looks.
    """
    leaves = {}
    if incoming is not None:
        differentiable = {name: inputs[name] for name in spec.grads if inputs[name] is not None}
        leaves = {name: value.detach().requires_grad_() for name, value in differentiable.items()}
    with recorded_with(backend) if recording() else use_backend(backend):
        result = (fn or function(spec, backend))(**{**inputs, **leaves})
        results = result if isinstance(result, tuple) else (result,)
        if len(results) != len(spec.outputs):
            raise ValueError(f"{spec.name} returns {len(results)} outputs, its spec names {len(spec.outputs)}")
        outputs = dict(zip(spec.outputs, results, strict=True))
        for name, y in outputs.items():
            if type(y) is not Tensor:
                raise Refused(f"{name} is a {type(y).__name__}: an output must be a plain torch.Tensor")
        if leaves:
            assert incoming is not None
            graph = list(outputs.values()), list(leaves.values()), list(incoming.values())
            if again:
                torch.autograd.grad(*graph, retain_graph=True)
            gradients = torch.autograd.grad(*graph)
            outputs |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: value.detach() for name, value in outputs.items()}


def incoming_gradients(spec: KernelSpec, inputs: Mapping[str, Any], seed: int) -> dict[str, Tensor]:
    """A random gradient for each output, in the shape and dtype that eager gives it."""
    generator = torch.Generator().manual_seed(seed)
    outputs = evaluate(spec, inputs, None, "eager")
    incoming = {name: torch.randn(y.shape, generator=generator).to(y) for name, y in outputs.items()}
    given = {x.untyped_storage().data_ptr() for x in inputs.values() if isinstance(x, Tensor)}
    for y in outputs.values():  # the memory that a kernel is about to be given must not hold the answer
        if y.is_floating_point() and y.untyped_storage().data_ptr() not in given:
            y.fill_(float("nan"))
    return incoming


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
    strided_dy = _each(layout, incoming_gradients(spec, _each(_plain, strided), seed + 1))
    yield from _compared(spec, case, strided, strided_dy, fn)


def _compared(
    spec: KernelSpec, case: Case, strided: dict[str, Any], strided_dy: dict[str, Tensor], fn: Any = None
) -> Iterator[Comparison]:
    """The comparisons of `prove` on inputs and incoming gradients."""
    inputs, dy = _each(_plain, strided), _each(_plain, strided_dy)  # copies: the kernel cannot touch them
    got = evaluate(spec, strided, strided_dy, "triton", fn)
    truth = evaluate(spec, _each(_in_float64, inputs), _each(_in_float64, dy), "eager", spec.reference)
    eager = evaluate(spec, inputs, dy, "eager", spec.reference)
    for name in truth:
        yield compare(spec.name, case, name, got[name], eager[name], truth[name], gradient=name not in spec.outputs)


def launched(spec: KernelSpec, case: Case, dtype: torch.dtype) -> None:
    """Call the kernel as every family below does, inside record_launches: in each layout, forward and backward."""
    cpu = torch.device("cpu")
    drawn = spec.inputs(case, dtype, cpu)
    for layout in (lambda: _plain, *LAYOUTS.values(), *_far_layouts(spec, case, dtype, cpu).values()):
        with contextlib.suppress(OSError):  # far addresses, where there are none
            inputs = _each(arranged := layout(), drawn)
            outputs = _each(_plain, evaluate(spec, inputs, None, "triton"))
            evaluate(spec, inputs, _each(arranged, outputs), "triton")


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


def in_turn(*layouts: Transform) -> Transform:
    """Another layout for each tensor, so that no two that are alike in shape have the same strides."""
    turn = itertools.cycle(layouts)
    return lambda t: next(turn)(t)


LAYOUTS: dict[str, Callable[[], Transform]] = {  # made anew for each run
    "transposed": lambda: _transposed,
    "sliced": lambda: _sliced,
    "columns_sliced": lambda: _columns_sliced,
    "expanded": lambda: _expanded,
    "mixed": lambda: in_turn(_transposed, _plain, _sliced, _columns_sliced),
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
    """Inside the block what torch.empty and its siblings give is NaN between canaries; the function yielded counts
    canaries overwritten."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty
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

    def like(t: Tensor, *shape: Any, **options: Any) -> Tensor:
        return guarded(*(shape or (t.shape,)), **{"dtype": t.dtype, "device": t.device} | options)

    torch.empty_like = like  # type: ignore[assignment]
    Tensor.new_empty = like  # type: ignore[assignment]
    try:
        yield lambda: sum(int((band != 77).sum()) for band in bands)
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty  # type: ignore[method-assign]


def _count(spec: KernelSpec, case: Case, dtype: torch.dtype, name: str, wrong: int) -> Comparison:
    """A comparison that counts wrong elements and allows none."""
    return Comparison(spec.name, case, dtype, name, float(wrong), 0.0)


def _layouts(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for name, layout in LAYOUTS.items():
        for row in prove(spec, case, dtype, device, layout=layout()):
            yield replace(row, case={**case, "layout": name})


def _values(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for name, values in VALUES.items():
        for row in prove(spec, case, dtype, device, values=functools.partial(values, spec)):
            yield replace(row, case={**case, "values": name})


def _repeats(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """A second run, its backward pass run twice, gives the same bits in memory of its own, and the inputs are
    unchanged."""
    inputs = spec.inputs(case, dtype, device)
    dy = incoming_gradients(spec, inputs, seed=1)
    before = {**_each(_plain, inputs), **_each(_plain, dy)}
    first, second = (evaluate(spec, inputs, dy, "triton", again=again) for again in (False, True))
    refuse_shared(second, {"an input": inputs, "an incoming gradient": dy, "the result of the call before": first})
    for name in first:
        yield _count(spec, case, dtype, f"{name} again", int((first[name] != second[name]).sum()))
    after = {**inputs, **dy}
    changed = sum(int((after[k] != v).sum()) for k, v in before.items() if isinstance(v, Tensor))
    yield _count(spec, case, dtype, "inputs changed", changed)


def refuse_shared(outputs: Mapping[str, Tensor], others: Mapping[str, Mapping[str, Any]]) -> None:
    """Refused if an output lies in memory of a tensor among the others, which are named by their key."""
    for what, tensors in others.items():
        taken = {t.untyped_storage().data_ptr() for t in tensors.values() if isinstance(t, Tensor) and t.numel()}
        for name, y in outputs.items():
            if y.numel() and y.untyped_storage().data_ptr() in taken:
                raise Refused(f"{name} is in the memory of {what}: an output must be new memory")


def stir(tensors: Iterable[Any], generator: torch.Generator) -> None:
    """Give tensors other numbers of their kind, in place: each is rolled along all its dimensions by random steps, and
    a single floating-point number is scaled."""
    for t in tensors:
        if isinstance(t, Tensor) and t.numel() > 1:
            steps = [int(torch.randint(n, (), generator=generator)) for n in t.shape]
            t.copy_(t.roll(steps, tuple(range(t.ndim))))
        elif isinstance(t, Tensor) and t.is_floating_point():
            t.mul_(0.5 + torch.rand((), generator=generator).item())


def _memory(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Every element is written and nothing beyond: fresh memory holds NaN between canaries. Then other numbers in the
    memory of the inputs: nothing of the call before counts."""
    inputs = spec.inputs(case, dtype, device)
    dy = incoming_gradients(spec, inputs, seed=1)
    with guarded_memory() as overwritten:
        yield from _compared(spec, case, inputs, dy)
        yield _count(spec, case, dtype, "canaries", overwritten())
    stir([*inputs.values(), *dy.values()], torch.Generator().manual_seed(2))
    for row in _compared(spec, case, inputs, dy):
        yield replace(row, name=f"{row.name} of other numbers in the same memory")


FAR = 2**31  # elements: past it, an offset in int32 wraps


def mapped(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector of zeros. FAR more lie before it, so that an address which wrapped gives wrong numbers and no crash.

    OSError where there is no such memory; on a CPU it takes no room until it is touched.
    """
    size = FAR + numel
    try:
        if device.type == "cuda":
            return torch.zeros(size, dtype=dtype, device=device)[FAR:]
        # Pages of an anonymous file are made when touched, whatever the machine promises of its memory.
        with os.fdopen(os.memfd_create("tensor"), "wb") as file:
            file.truncate(size * dtype.itemsize)
            return torch.from_file(f"/dev/fd/{file.fileno()}", shared=True, size=size, dtype=dtype)[FAR:]
    except (RuntimeError, AttributeError) as error:  # out of memory; not a Linux
        raise OSError(f"{size * dtype.itemsize / 2**30:.0f} GiB cannot be mapped: {error}") from error


def far(t: Tensor, dim: int, stride: int | None = None) -> Tensor:
    """The same numbers with a stride in a dimension that takes its last one FAR elements from the first, or as given.

    t itself where it has no such dimension or that is of length 1.
    """
    if t.ndim < -dim or t.shape[dim] < 2:
        return t
    steps = t.shape[dim] - 1
    stride = stride or -(-FAR // steps)
    strides = list(torch.empty(t.select(dim, 0).shape, device="meta").stride())
    strides.insert(dim % t.ndim, stride)
    return mapped(stride * steps + t.numel(), t.dtype, t.device).as_strided(t.shape, strides).copy_(t)


def _far_layouts(
    spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> dict[str, Callable[[], Transform]]:
    """Layouts that reach FAR elements, along each dimension: of the first cases, in half precision.

    On a CPU, where the memory is only mapped, also rows whose stride is an int32 still, and not when it is multiplied.
    """
    if dtype.itemsize != 2 or case not in spec.cases[:3]:
        return {}
    layouts = {str(dim): functools.partial(far, dim=dim) for dim in (-1, -2, -3, -4)}
    if device.type == "cpu":
        layouts[f"-2, stride {FAR // 2}"] = functools.partial(far, dim=-2, stride=FAR // 2)
    return {name: lambda layout=layout: layout for name, layout in layouts.items()}  # type: ignore[misc]


def _far_addresses(spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    for name, layout in _far_layouts(spec, case, dtype, device).items():
        try:
            rows = list(prove(spec, case, dtype, device, layout=layout()))
        except OSError:  # this machine cannot say
            return
        for row in rows:
            yield replace(row, case={**case, "far": name})


Family = Callable[[KernelSpec, Case, torch.dtype, torch.device], Iterator[Comparison]]
FAMILIES: dict[str, Family] = {
    "shapes": prove,
    "layouts": _layouts,
    "values": _values,
    "repeats": _repeats,
    "memory": _memory,
    "far": _far_addresses,
}


def prove_family(
    family: str, spec: KernelSpec, case: Case, dtype: torch.dtype, device: torch.device
) -> Iterator[Comparison]:
    """All comparisons of one kernel, case and dtype in one of FAMILIES."""
    for row in FAMILIES[family](spec, case, dtype, device):
        yield replace(row, family=family, case_dtype=dtype)


# --- somebody else's kernel ------------------------------------------------------------------------------------------


def trial(spec: KernelSpec, device: torch.device) -> list[str]:
    """The names of the kernels that a spec's function launches on its first case; they are not run.

    ValueError, in one line, where the spec does not fit together; Refused where it could prove nothing.
    """
    if not spec.cases:
        raise ValueError("its spec has no cases: there is nothing to prove")
    where = f"on the first case, {dict(spec.cases[0])}"

    def attempt(what: str, run: Callable[[], Any]) -> tuple[Any, list[str]]:
        with record_launches() as launched:
            try:
                return run(), [launch.kernel.__name__ for launch in launched]
            except Exception as error:
                message = " ".join(str(error).split())
                raise ValueError(f"{what} fails {where}: {type(error).__name__}: {message}") from error

    inputs, _ = attempt("make_inputs", lambda: spec.inputs(spec.cases[0], torch.float32, device))
    if not isinstance(inputs, dict) or not any(
        isinstance(x, Tensor) and x.is_floating_point() for x in inputs.values()
    ):
        raise ValueError(
            "make_inputs must return the arguments of fn as a dictionary, floating-point tensors among them"
        )
    if wrong := [name for name in spec.grads if name not in inputs]:
        raise ValueError(f"grads names {wrong[0]!r}, and make_inputs returns only {', '.join(inputs)} {where}")

    dy, _ = attempt("eager", lambda: incoming_gradients(spec, inputs, 1))
    eager, launched = attempt("eager", lambda: evaluate(spec, inputs, dy, "eager"))
    if launched:
        raise Refused(f"the reference launches {launched[0]}: give KernelSpec an eager=... made of PyTorch's operators")
    with guarded_memory():
        got, launched = attempt("fn", lambda: evaluate(spec, inputs, None, "triton"))
        for name, y in got.items():
            if y.shape != eager[name].shape or y.dtype != eager[name].dtype:
                what = (
                    f"{y.dtype} {tuple(y.shape)}, and the reference's is {eager[name].dtype} {tuple(eager[name].shape)}"
                )
                raise ValueError(f"fn's {name} is {what} {where}")
        if not launched:
            raise Refused(f"fn launches no Triton kernel {where}: there is nothing to prove")
        if all(torch.allclose(y, eager[name], 1e-2, 1e-2) for name, y in got.items()):
            raise Refused(f"fn gives the same result without its kernels {where}: they are not what would be proven")
        if spec.grads:
            launched = attempt("fn", lambda: evaluate(spec, inputs, dy, "triton"))[1]
    return list(dict.fromkeys(launched))
