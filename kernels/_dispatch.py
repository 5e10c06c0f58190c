"""The one place that decides between a Triton kernel and PyTorch's own operator."""

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ._launch import recording
from ._registry import all_specs
from ._triton import HAS_TRITON, INTERPRET

Backend = Literal["auto", "triton", "eager"]
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MIN_CAPABILITY = (8, 0)  # Triton's own lower bound; bfloat16 tensor cores start there too

# Plain module globals, not ContextVars: torch.compile guards on them and recompiles when they change.
_backend: Backend = "auto"
_operators: dict[str, Backend] = {}  # those that have a backend of their own
_warned: set[str] = set()


@contextlib.contextmanager
def use_backend(backend: Backend, **operators: Backend) -> Iterator[None]:
    """Chooses how the functions of this package run, inside a ``with`` block.

    - ``"auto"`` (the default outside any block): Triton on a CUDA device that it supports, else eager PyTorch. What
      Triton could not take or not compile on a CUDA device is said once, as a warning.
    - ``"triton"``: Triton or a RuntimeError that says why not. CPU tensors run where ``TRITON_INTERPRET=1`` was set
      before this package was imported.
    - ``"eager"``: PyTorch's functional operators under ordinary autograd.

    operators: a backend of its own for an operator by name, such as ``causal_attention="eager"``: what one kernel
    brings, or whether it is the one to blame. ValueError for a name or a backend that does not exist.

    The choice is global to the process, not per thread.
    """
    global _backend, _operators
    for choice in (backend, *operators.values()):
        if choice not in get_args(Backend):
            raise ValueError(f"unknown backend {choice!r}: use one of {', '.join(map(repr, get_args(Backend)))}")
    if unknown := sorted(operators.keys() - (all_specs().keys() if operators else set())):
        raise ValueError(f"there is no operator {unknown[0]!r}: choose from {', '.join(all_specs())}")
    previous = _backend, _operators
    _backend, _operators = backend, operators
    try:
        yield
    finally:
        _backend, _operators = previous


def current_backend() -> Backend:
    """The backend that was asked for: "auto" outside any `use_backend` block."""
    return _backend


def device_problem(device_type: str, device_index: int | None = None) -> str | None:
    """Why Triton cannot run on a device, in words, or None where it can."""
    if not HAS_TRITON:
        return "triton is not installed (it is published for Linux)"
    if INTERPRET:
        return None
    if device_type != "cuda":
        return (
            f"the input is on {device_type} and Triton compiles for NVIDIA GPUs (TRITON_INTERPRET=1 interprets on CPU)"
        )
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs and these kernels are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < MIN_CAPABILITY:
        return "the GPU has compute capability {}.{} and Triton needs 8.0 or newer".format(*capability)
    return None


@torch.compiler.assume_constant_result  # a property of the machine: no graph break, no guard
def _device_problem_traced(device_type: str, device_index: int | None) -> str | None:
    return device_problem(device_type, device_index)


@functools.cache  # a dictionary look-up from the second time on
def kernel_problem(name: str, dtype: torch.dtype, device_index: int, **widths: Any) -> str | None:
    """Why operator `name` cannot run on this CUDA device, in words, or None: everything it launches was compiled.

    widths: what its launches depend on, as entries of a case of its KernelSpec.
    """
    from ._compile import preflight  # which imports this module

    gpu = torch.cuda.get_device_properties(device_index)
    device = torch.device("cuda", device_index)
    shared_limit = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # absent from the stubs
    return preflight(name, dtype, widths, 10 * gpu.major + gpu.minor, shared_limit, device)


@torch.compiler.assume_constant_result
def _kernel_problem_traced(name: str, dtype: torch.dtype, device_index: int, **widths: Any) -> str | None:
    return kernel_problem(name, dtype, device_index, **widths)


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def use_triton(name: str, x: Tensor, unsupported: str | None = None, **widths: Any) -> bool:
    """True if operator `name` is to run its Triton kernel on x.

    unsupported: why the kernel cannot take these arguments, in words; None if it can.
    widths: what its launches depend on, as entries of a case of its KernelSpec. Before the first use with them
    everything that forward and backward will launch is compiled: what would fail is known before it does.
    """
    backend = _operators.get(name, _backend)
    if backend == "eager" or (backend == "auto" and not x.is_cuda):
        return False
    problem = unsupported if recording() else _device_problem_traced(x.device.type, x.device.index) or unsupported
    if problem is None and x.dtype not in TRITON_DTYPES:
        problem = f"the kernel takes float32, float16 and bfloat16, not {x.dtype}"
    if problem is None and not (INTERPRET or recording()):
        if torch.compiler.is_compiling():  # a width may be a symbol there; a range has its length as a number
            widths = {k: len(range(n)) if isinstance(n, int) else n for k, n in widths.items()}
        problem = _kernel_problem_traced(name, x.dtype, x.device.index, **widths)
    if problem is None:
        return True
    if backend == "triton":
        raise RuntimeError(f"{name}: backend 'triton' was asked for, but {problem}; use 'auto' or 'eager'")
    _warn_once(f"{name} runs eagerly: {problem}")
    return False
