"""The one place that decides between a Triton kernel and PyTorch's own operator."""

import functools
import threading
import warnings
from typing import Any

import torch
from torch import Tensor

from . import _backend
from ._backend import device_problem
from ._compile import preflight
from ._launch import recorded_backend, recording
from ._triton import INTERPRET

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_warned: set[str] = set()
_preflight = threading.Lock()  # it redirects the output of the process


@functools.cache  # a dictionary look-up from the second time on
def kernel_problem(name: str, dtype: torch.dtype, device_index: int, **widths: Any) -> str | None:
    """Why operator `name` cannot run on this CUDA device, as a message, or None: everything it launches compiles.

    widths: what its launches depend on, as entries of a case of its KernelSpec.
    """
    gpu = torch.cuda.get_device_properties(device_index)
    shared_limit = gpu.shared_memory_per_block_optin  # type: ignore[attr-defined]  # absent from the stubs
    device = torch.device("cuda", device_index)
    with _preflight:
        return preflight(name, dtype, widths, 10 * gpu.major + gpu.minor, shared_limit, device)


# Properties of the machine, constant while torch.compile traces: no graph break and no guard.
@torch.compiler.assume_constant_result
def _device_problem_traced(device_type: str, device_index: int | None) -> str | None:
    return device_problem(device_type, device_index)


@torch.compiler.assume_constant_result
def _kernel_problem_traced(name: str, dtype: torch.dtype, device_index: int, **widths: Any) -> str | None:
    return kernel_problem(name, dtype, device_index, **widths)


@torch.compiler.assume_constant_result
def warn_once(message: str) -> None:
    """A RuntimeWarning, once in this process."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)


def use_triton(name: str, x: Tensor, unsupported: str | None = None, **widths: Any) -> bool:
    """Whether operator `name` runs its Triton kernel on x. RuntimeError where backend "triton" cannot.

    unsupported: why the kernel cannot take these arguments, as a message; None if it can.
    widths: what its launches depend on, as entries of a case of its KernelSpec. Everything that forward and backward
    launch for them is compiled before their first use, so that a failure is known before it can happen in a run.
    """
    backend = recorded_backend() or _backend.per_operator.get(name, _backend.current)
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
    warn_once(f"{name} runs eagerly: {problem}")
    return False


def check_backend(device: torch.device) -> None:
    """Fail early: RuntimeError unless the backend of the current `use_backend` block can run on a device.

    Under "auto" it warns where Triton was expected and cannot run. One small kernel stands for all.
    """
    use_triton("layer_norm", torch.empty(0, 8, device=device), N=8, bias=False)
