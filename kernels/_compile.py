"""Compiling a launch without running it: for an architecture that is not in this machine, or before a first use."""

import concurrent.futures
import contextlib
import io
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ._launch import Launch, record_launches, sm_count
from ._proof import evaluate, launched
from ._registry import Case, KernelSpec, all_specs
from ._triton import HAS_TRITON

# Launches depend on a case's widths, and of its rows on whether there is one, and whether they are a multiple of 16.
_MOST_ROWS = {"B": 16, "M": 48, "T": 256}


@contextlib.contextmanager
def no_compilation(*, this_thread: bool = False) -> Iterator[None]:
    """Inside the block a launch that Triton has not compiled yet is a RuntimeError that names the kernel.

    For the capture of a CUDA graph, which would end in the driver's refusal to load code. this_thread: others may
    compile; the threads of a backward pass are others.
    """
    if not HAS_TRITON:
        yield
        return
    from triton import knobs

    owner = threading.get_ident()

    def refuse(*, repr: str, **details: Any) -> None:
        if this_thread and threading.get_ident() != owner:
            return
        raise RuntimeError(f"a CUDA graph cannot be captured: it launches what no step before it compiled, {repr}")

    previous, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, refuse
    try:
        yield
    finally:
        knobs.runtime.jit_cache_hook = previous


def few_rows(case: Case) -> Case:
    """A case with few rows that launches the same code."""

    def fewer(n: int, most: int) -> int:
        return n if n <= most else most + n % 16

    return {**case, **{name: fewer(case[name], most) for name, most in _MOST_ROWS.items() if name in case}}


def launches(
    spec: KernelSpec,
    cases: Iterable[Case],
    dtype: torch.dtype,
    arch: int,
    sms: int | None = None,
    device: torch.device | None = None,
) -> list[Launch]:
    """The launches of forward and backward on the cases, with the defaults of sm_<arch>; nothing runs.

    sms: multiprocessors of the GPU. device: a GPU, to launch by the tables that were measured on it.
    """
    with record_launches(arch, sms, device) as recorded:
        for case in cases:
            inputs = spec.inputs(few_rows(case), dtype, torch.device("cpu"))
            outputs = evaluate(spec, inputs, None, "triton")
            evaluate(spec, inputs, outputs, "triton")  # any incoming gradient of the right shape and dtype will do
    return recorded


def check_launches(spec: KernelSpec, case: Case, dtype: torch.dtype, arch: int, sms: int | None = None) -> list[Launch]:
    """The launches of `python -m kernels check` on a case: at its own rows, in every layout; nothing runs."""
    with record_launches(arch, sms) as recorded:
        launched(spec, case, dtype)
    return recorded


def source(launch: Launch, arch: int) -> tuple[Any, dict[str, Any]]:
    """A launch as the input of Triton's compiler for sm_<arch>: (ASTSource, options).

    Triton's JIT itself specialises the arguments, tuples included: a later launch finds the compiled file on disk.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", arch, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options, *specialised = kernel._pack_args(backend, launch.meta, *bind(*launch.args, **launch.meta))
    return ASTSource(kernel, *specialised), options.__dict__


def unique(recorded: Iterable[Launch], arch: int) -> list[Launch]:
    """The first of the launches that compile to the same code for sm_<arch>."""
    first: dict[Any, Launch] = {}
    for launch in recorded:
        src, options = source(launch, arch)
        first.setdefault((src.hash(), str(options)), launch)
    return list(first.values())


def compile_launch(launch: Launch, arch: int) -> Any:
    """Triton's compiled kernel for sm_<arch>, from its cache on disk where it can; raises what it raises."""
    import triton
    from triton.backends.compiler import GPUTarget

    src, options = source(launch, arch)
    with contextlib.redirect_stdout(io.StringIO()):  # where ptxas fails, Triton prints the whole program
        return triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)


def unknown_to_ptxas(arch: int) -> bool:
    """True if Triton's assembler is older than the GPU; asked first, for Triton's code generator aborts the process."""
    from triton import knobs

    ptxas = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    listed = subprocess.run([ptxas.path, "--help"], capture_output=True, text=True, check=True).stdout
    return re.search(rf"\bsm_{arch}a?\b", listed) is None


def kernel_name(launch: Launch) -> str:
    """A kernel's name without the dressing: attention_fwd."""
    return launch.kernel.__name__.strip("_").removesuffix("_kernel")


def reason(error: BaseException) -> str:
    """An exception in one line: of a compiler's many, the one that says what is wrong."""
    if error.__cause__ is not None:  # Triton quotes the kernel around the error that it met there
        return reason(error.__cause__)
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")] or [""]
    telling = [line for line in lines if re.search(r"; error\s*:|fatal\s*:", line)] or lines[-1:]  # ptxas, else Triton
    return f"{type(error).__name__}: {telling[0]}"[:240]


def preflight(
    name: str, dtype: torch.dtype, widths: dict[str, Any], arch: int, shared_limit: int, device: torch.device | None
) -> str | None:
    """Why operator `name` cannot run, forward or backward, as a message, or None. Compiles everything, runs nothing.

    widths: entries of a case that replace those of the first bench case. shared_limit: bytes that a block may have.
    device: the compiled kernels are loaded there too; None where there is no GPU.
    """
    spec = all_specs()[name]
    what = "its launch"
    try:
        if unknown_to_ptxas(arch):
            return f"this Triton does not know sm_{arch} yet: a newer one may"
        # In a thread of its own: no grad mode, dispatch mode, default device or trace of the caller's reaches it.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            case = {**spec.bench_cases[0], **widths}
            sms = None if device is None else sm_count(device)
            recorded = thread.submit(lambda: unique(launches(spec, [case], dtype, arch, sms, device), arch)).result()
        for launch in recorded:
            what = kernel_name(launch)
            compiled = compile_launch(launch, arch)
            if compiled.metadata.shared > shared_limit:
                needs = f"{what} needs {compiled.metadata.shared:,} bytes of shared memory"
                return f"{needs} and the GPU gives a block {shared_limit:,}"
            if device is not None:
                with torch.cuda.device(device):
                    _ = compiled.run  # Triton loads the binary here, and builds its launcher, which takes a C compiler
    except Exception as error:  # whatever it is, the launch would have raised it in the middle of a run
        return f"{what} does not compile for sm_{arch}: {reason(error)}"
    return None
