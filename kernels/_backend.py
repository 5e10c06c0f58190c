"""Which backend the caller asked for, and why a device cannot run Triton."""

import contextlib
from collections.abc import Iterator
from typing import Literal, get_args

import torch

from ._machine import build_problem
from ._registry import all_specs
from ._triton import HAS_TRITON, INTERPRET

Backend = Literal["auto", "triton", "eager"]
MIN_CAPABILITY = (8, 0)  # Triton's own lower bound; bfloat16 tensor cores start there too

# Plain module globals, not ContextVars: torch.compile guards on them and recompiles when they change. Read them as
# attributes of this module: a name imported from it would keep its first value.
current: Backend = "auto"
per_operator: dict[str, Backend] = {}


@contextlib.contextmanager
def use_backend(backend: Backend, **operators: Backend) -> Iterator[None]:
    """Choose how the functions of this package run, inside a ``with`` block.

    - ``"auto"`` (the default outside any block): Triton on a CUDA device that it supports, else eager PyTorch. What
      Triton cannot take or compile on a CUDA device is reported once, as a warning.
    - ``"triton"``: Triton, or a RuntimeError that gives the reason. CPU tensors run where ``TRITON_INTERPRET=1`` was
      set before this package was imported.
    - ``"eager"``: PyTorch's functional operators under ordinary autograd.

    operators: a backend for one operator by name, such as ``causal_attention="eager"``, to measure what one kernel
    gains or to find the one at fault. ValueError for an unknown name or backend.

    The choice is global to the process, not per thread.
    """
    global current, per_operator
    for choice in (backend, *operators.values()):
        if choice not in get_args(Backend):
            raise ValueError(f"unknown backend {choice!r}: use one of {', '.join(map(repr, get_args(Backend)))}")
    if unknown := sorted(operators.keys() - (all_specs().keys() if operators else set())):
        raise ValueError(f"there is no operator {unknown[0]!r}: choose from {', '.join(all_specs())}")
    previous = current, per_operator
    current, per_operator = backend, operators
    try:
        yield
    finally:
        current, per_operator = previous


def current_backend() -> Backend:
    """The backend of the innermost `use_backend` block, "auto" outside any."""
    return current


def device_problem(device_type: str, device_index: int | None = None) -> str | None:
    """Why Triton cannot run on a device, as a message, or None where it can."""
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
    return build_problem()
