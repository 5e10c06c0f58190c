"""What every kernel compiles to, for architectures that need not be in this machine: no GPU is used.

Each launch that a registered kernel makes on its declared cases is written down, compiled by Triton and ptxas for the
target, and read back: registers, spilled bytes, shared memory against the architecture's limit, and the tensor-core
instructions in the machine code.
"""

import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels._launch import Launch, record_launches
from kernels._proof import evaluate, incoming_gradients
from kernels._registry import Case, KernelSpec, all_specs
from kernels._triton import INTERPRET

# Shared memory that one block may ask for, in KiB: CUDA C++ Programming Guide, table of technical specifications.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTC\w*MMA|UTCHMMA|QGMMA|IMMA)\b")
_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32",
}  # fmt: skip


@dataclass(frozen=True)
class StaticRow:
    """One compiled kernel. registers: per thread; spill: bytes of local memory a thread; shared: bytes a block."""

    kernel: str
    arch: int
    dtype: str
    config: str
    num_warps: int
    registers: int
    spill: int
    shared: int
    shared_limit: int
    tensor_core: int
    wide_loads: int
    blocks_per_sm: int
    error: str = ""

    @property
    def problem(self) -> str:
        """What is wrong with the compiled kernel, in words; empty where nothing is."""
        if self.error:
            return self.error
        if self.spill:
            return f"spills {self.spill} bytes a thread"
        if self.shared > self.shared_limit:
            return f"needs {self.shared} bytes of shared memory, the architecture has {self.shared_limit}"
        if "dot" in self.config and not self.tensor_core:
            return "its matrix products missed the tensor cores"
        return ""


def launches(spec: KernelSpec, cases: Iterable[Case], dtype: torch.dtype, arch: int) -> list[Launch]:
    """The launches that forward and backward make on the cases, on one row or batch each: tiles do not depend on it."""
    with record_launches(arch) as recorded:
        for case in cases:
            small = dict(case) | {name: value for name, value in (("B", 1), ("M", 48)) if name in case}
            inputs = spec.inputs(small, dtype, torch.device("cpu"))
            evaluate(spec, inputs, incoming_gradients(spec, inputs, seed=0), "triton")
    return recorded


def source(launch: Launch) -> tuple[Any, dict[str, int]]:
    """A launch as Triton's compiler takes it, with the same specialisation that a real launch would get."""
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list] = {}
    options = {name: value for name, value in launch.meta.items() if name not in launch.kernel.arg_names}
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.meta
    for i, name in enumerate(launch.kernel.arg_names):
        value, constexpr = values[name], launch.kernel.params[i].is_constexpr
        if isinstance(value, Tensor):
            signature[name] = _TYPES[value.dtype]
            attrs[(i,)] = [["tt.divisibility", 16]]
        elif constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constexprs[(i,)] = "constexpr", value
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(launch.kernel, signature, constexprs, attrs), options


def _label(launch: Launch) -> str:
    shown = {k: v for k, v in launch.meta.items() if k not in ("num_warps", "PRECISION")}
    dot = " dot" if "PRECISION" in launch.meta and launch.meta["PRECISION"] != "ieee" else ""
    return " ".join(f"{k}={int(v)}" for k, v in shown.items()) + dot


def _tool(name: str, *args: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([str(folder / name), *args], capture_output=True, text=True, check=True).stdout


def compile_launch(launch: Launch, dtype: torch.dtype, arch: int) -> StaticRow:
    """Compiles one launch for sm_<arch> and reads the machine code back."""
    import triton
    from triton.backends.compiler import GPUTarget

    src, options = source(launch)
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    row = dict(
        kernel=name, arch=arch, dtype=str(dtype).removeprefix("torch."), config=_label(launch),
        num_warps=options.get("num_warps", 4), shared_limit=SHARED_KIB[arch] * 1024,
    )  # fmt: skip
    try:
        compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # whatever the compiler raises is the result of this row
        text = str(error).strip().splitlines()
        return StaticRow(
            **row, registers=0, spill=0, shared=0, tensor_core=0, wide_loads=0, blocks_per_sm=0,
            error=f"{type(error).__name__}: {text[0] if text else ''}"[:200],
        )  # fmt: skip
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("cuobjdump", "-sass", file.name)
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    spill = int(re.search(r"LOCAL:(\d+)", usage)[1]) + int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    shared = compiled.metadata.shared
    threads = 32 * row["num_warps"]  # type: ignore[operator]
    # registers are handed out to a warp in steps of 256
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * row["num_warps"])  # type: ignore[operator]
    by_shared = (row["shared_limit"] + 1024) // (shared + 1024)  # type: ignore[operator]
    return StaticRow(
        **row, registers=registers, spill=spill, shared=shared, tensor_core=len(TENSOR_CORE.findall(sass)),
        wide_loads=len(re.findall(r"LDG\.E[\w.]*\.128|LDGSTS[\w.]*\.128", sass)),
        blocks_per_sm=min(by_registers, by_shared, 2048 // threads),
    )  # fmt: skip


def _work(job: tuple[str, tuple[Case, ...], str, int, int]) -> StaticRow:
    name, cases, dtype_name, index, arch = job
    dtype = getattr(torch, dtype_name)
    return compile_launch(_unique(all_specs()[name], cases, dtype, arch)[index], dtype, arch)


def _unique(spec: KernelSpec, cases: tuple[Case, ...], dtype: torch.dtype, arch: int) -> list[Launch]:
    seen: dict[tuple, Launch] = {}
    for launch in launches(spec, cases, dtype, arch):
        src, options = source(launch)
        key = (launch.kernel.__name__, *src.signature.items(), str(src.constants), str(src.attrs), *options.items())
        seen.setdefault(key, launch)
    return list(seen.values())


def survey(
    archs: Iterable[int], dtypes: Iterable[torch.dtype], ops: Iterable[str] | None = None, *, bench_only: bool = False
) -> Iterator[tuple[int, int, StaticRow]]:
    """Compiles everything on all cores; yields (done, total, row) as rows are ready.

    RuntimeError under TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
    """
    if INTERPRET:
        raise RuntimeError("bench static compiles the kernels: run it without TRITON_INTERPRET")
    jobs = []
    for name, spec in all_specs().items():
        if ops is not None and name not in ops:
            continue
        cases = spec.bench_cases if bench_only else spec.bench_cases + spec.cases
        for dtype in dtypes:
            for arch in archs:
                count = len(_unique(spec, cases, dtype, arch))
                jobs += [(name, cases, str(dtype).removeprefix("torch."), index, arch) for index in range(count)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for done, future in enumerate(concurrent.futures.as_completed([pool.submit(_work, job) for job in jobs]), 1):
            yield done, len(jobs), future.result()


def as_dict(row: StaticRow) -> dict[str, Any]:
    """A row as JSON takes it, its verdict included."""
    return asdict(row) | {"problem": row.problem}
