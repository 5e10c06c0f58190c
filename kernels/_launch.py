"""Shared launch helpers: the one call that starts a kernel, streams and graphs, row tiles, multiprocessor count."""

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._foreign import intercepted
from ._triton import TensorDescriptor, triton


@dataclass(frozen=True)
class Launch:
    """One kernel launch as it was asked for: enough to compile it for any architecture without a GPU."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    meta: dict[str, Any] = field(default_factory=dict)


class _Thread(threading.local):
    """What the blocks below have set in this thread: others launch meanwhile, as the replicas of nn.DataParallel do."""

    recorded: list[Launch] | None = None
    arch: int | None = None
    sms: int | None = None
    device: torch.device | None = None
    backend: str | None = None


_thread = _Thread()


@contextlib.contextmanager
def _set(**values: Any) -> Iterator[None]:
    """Inside the block this thread has these values."""
    previous = {name: getattr(_thread, name) for name in values}
    vars(_thread).update(values)
    try:
        yield
    finally:
        vars(_thread).update(previous)


@contextlib.contextmanager
def record_launches(
    arch: int | None = None, sms: int | None = None, device: torch.device | None = None
) -> Iterator[list[Launch]]:
    """Inside the block this thread's launches are written down and not run, those by kernel[grid](...) too: outputs
    hold whatever memory held.

    arch: the defaults of that architecture are used, as in `assume_arch`. sms: its streaming multiprocessors.
    device: the GPU that will launch them, with the tables that were measured on it; None: the defaults alone.
    """
    recorded: list[Launch] = []
    with (
        _set(recorded=recorded, sms=sms, device=device),
        assume_arch(arch),
        intercepted(lambda *launched: recorded.append(Launch(*launched))),
    ):
        yield recorded


def assume_arch(arch: int | None) -> contextlib.AbstractContextManager[None]:
    """Inside the block launch tables are those of sm_<arch>, whatever the device; None changes nothing."""
    return _set(arch=arch or _thread.arch)


def recorded_with(backend: str) -> contextlib.AbstractContextManager[None]:
    """`use_backend` inside `record_launches`, for this thread alone."""
    return _set(backend=backend)


def arch_of(device: torch.device) -> int:
    """Compute capability of a CUDA device as a number, 90 for 9.0; 90 on a CPU, to interpret what newer GPUs run."""
    if _thread.arch is not None:
        return _thread.arch
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def table_device(device: torch.device) -> torch.device | None:
    """The GPU whose measured launch tables hold for a launch on `device`; None on a CPU and in a static survey."""
    if _thread.recorded is not None or _thread.arch is not None:
        return _thread.device
    return device if device.type == "cuda" else None


@torch.compiler.assume_constant_result  # which cannot trace what belongs to a thread; nothing is compiled in the block
def recording() -> bool:
    """True inside `record_launches`: nothing runs, so any device will do."""
    return _thread.recorded is not None


@torch.compiler.assume_constant_result
def recorded_backend() -> str | None:
    """That of the innermost `recorded_with` block, None outside any."""
    return _thread.backend


def tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among the arguments of a launch, those in tuples and under descriptors included, in order."""
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, tuple):
            yield from tensors(arg)
        elif isinstance(arg, TensorDescriptor):
            yield arg.base


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """kernel[grid](*args, **meta) on the device of the first tensor argument; an empty grid launches nothing.

    args: tensors, tensor descriptors, numbers, None, and tuples of all but descriptors.
    meta: the tl.constexpr arguments and num_warps, num_stages.
    """
    if 0 in grid:
        return
    if _thread.recorded is not None:
        _thread.recorded.append(Launch(kernel, grid, args, meta))
        return
    device = next(tensors(args)).device
    # Triton launches on the current device, which need not be the tensor's on a machine with several.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **meta)


@contextlib.contextmanager
def on_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Run on another stream, after the work of the current one, which then waits for it."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@contextlib.contextmanager
def capturing(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, **options: Any) -> Iterator[None]:
    """torch.cuda.graph that leaves the current stream as it was after an error, too: PyTorch's stays on `stream`."""
    current = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(current), torch.cuda.graph(graph, stream=stream, **options):
        yield


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 2 on a CPU, so that interpreted row loops take several turns."""
    return _sm_count(device) if _thread.sms is None else _thread.sms


@functools.cache
def _sm_count(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def row_tile(n: int, elements: int, per_thread: int = 16) -> tuple[int, int, int]:
    """Tile of a row-wise kernel over rows of n: (BLOCK_M, BLOCK_N, num_warps), about `elements` elements a program.

    per_thread: elements of a thread. 16 keep a row's inputs, its accumulators and its weights in registers; a kernel of
    more inputs wants fewer.
    """
    block_n = triton.next_power_of_2(n)
    block_m = max(1, elements // block_n)
    return block_m, block_n, min(32, max(4, block_m * block_n // (32 * per_thread)))


def as_rows(x: Tensor) -> Tensor:
    """(..., N) -> (M, N): a view where strides allow one (any packed, sliced or expanded rows), else a copy."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
