"""What every kernel compiles to, for architectures that need not be in this machine: no GPU is used.

Each launch that a registered kernel makes on its declared cases is written down, compiled by Triton and ptxas for the
target, and read back: registers, spilled bytes, shared memory against the architecture's limit, and what the machine
code is made of.
"""

import concurrent.futures
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.record import dtype_name
from kernels._compile import compile_launch, kernel_name, launches, reason, unique
from kernels._launch import Launch
from kernels._registry import all_specs
from kernels._triton import INTERPRET


@dataclass(frozen=True)
class Architecture:
    """Limits of one multiprocessor: CUDA C++ Programming Guide, table of technical specifications."""

    shared_kib: int  # that one block may ask for; a multiprocessor has 1 KiB more for each block it holds
    threads: int
    blocks: int


ARCHITECTURES = {
    80: Architecture(163, 2048, 32),
    86: Architecture(99, 1536, 16),
    89: Architecture(99, 1536, 24),
    90: Architecture(227, 2048, 32),
    100: Architecture(227, 2048, 32),
    120: Architecture(99, 1536, 24),
}
_REGISTERS, _TENSOR_COLUMNS = 65536, 512  # of a multiprocessor; columns: Blackwell's tensor memory

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)")
_WIDE_LOAD = re.compile(r"LDG(STS)?\..*(128|256)")
_DOT = re.compile(r"tt\.dot .*?(tf32)? : tensor<\d+x\d+x(\w+)> \* .*-> tensor<(\d+)x\d+x\w+>")


@dataclass(frozen=True)
class StaticRow:
    """One compiled kernel.

    registers, spill: a thread, in bytes the latter, the stack included; shared: bytes a block; instructions: in all,
    tensor_core of them on the tensor cores and wide_loads of them loads of 16 bytes or more; tensor_kind: their names;
    wanted: the tensor-core instruction that the kernel's products call for, empty for none; aligned: 16-byte loads are
    possible; blocks_per_sm: blocks that a multiprocessor holds at a time.
    """

    kernel: str
    arch: int
    dtype: str
    config: str
    num_warps: int
    shared_limit: int
    registers: int = 0
    spill: int = 0
    shared: int = 0
    instructions: int = 0
    tensor_core: int = 0
    tensor_kind: str = ""
    wanted: str = ""
    wide_loads: int = 0
    aligned: bool = False
    blocks_per_sm: int = 0
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
        if self.wanted and not self.tensor_core:
            return "its matrix products missed the tensor cores"
        if self.wanted == "HGMMA" and self.tensor_kind != "HGMMA":
            return f"its matrix products run as {self.tensor_kind}, its tiles could as HGMMA"
        if self.aligned and not self.wide_loads:
            return "no load is 16 bytes wide, although rows begin at multiples of 16 bytes"
        return ""


def _wanted(ttir: str, arch: int, num_warps: int) -> str:
    """The tensor-core instruction that all matrix products of a kernel call for; float32 ones may stay off them."""
    dots = [(int(m), dtype) for tf32, dtype, m in _DOT.findall(ttir) if dtype != "f32" or tf32]
    if arch == 90 and dots and num_warps >= 4 and all(m >= 64 for m, _ in dots):
        return "HGMMA"
    return "MMA" if dots else ""


def _aligned(launch: Launch) -> bool:
    """True where 16-byte loads must come out: in every tensor one unit stride, and all else multiples of 16."""
    values = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    strides = {name: n for name, n in values.items() if name.startswith("stride_")}
    units = Counter(name[:-1] for name, n in strides.items() if n == 1)  # by tensor: stride_xm, stride_xn -> stride_x
    pointers = [t.data_ptr() for t in launch.args if isinstance(t, Tensor)]
    return (
        bool(strides)
        and all(units[name[:-1]] == 1 for name in strides)
        and all(n % 16 == 0 for n in [*strides.values(), *pointers] if n != 1)
    )


def _blocks_per_sm(arch: int, registers: int, shared: int, num_warps: int, tensor_columns: int) -> int:
    limits = ARCHITECTURES[arch]
    return min(
        _REGISTERS // (-(-registers * 32 // 256) * 256 * num_warps),  # a warp gets them in steps of 256
        (limits.shared_kib + 1) * 1024 // (shared + 1024),
        limits.threads // (32 * num_warps),
        limits.blocks,
        _TENSOR_COLUMNS // tensor_columns if tensor_columns else limits.blocks,
    )


def _label(launch: Launch) -> str:
    return " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in launch.meta.items() if k != "num_warps")


def _tool(name: str, *args: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([str(folder / name), *args], capture_output=True, text=True, check=True).stdout


def read_back(launch: Launch, dtype: torch.dtype, arch: int) -> StaticRow:
    """Compiles one launch for sm_<arch> and reads the machine code."""
    row: dict[str, Any] = dict(
        kernel=kernel_name(launch), arch=arch, dtype=dtype_name(dtype), config=_label(launch),
        num_warps=launch.meta.get("num_warps", 4), shared_limit=ARCHITECTURES[arch].shared_kib * 1024,
    )  # fmt: skip
    try:
        compiled = compile_launch(launch, arch)
    except Exception as error:  # whatever the compiler raises is the result of this row
        return StaticRow(**row, error=reason(error))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("cuobjdump", "-sass", file.name)
    registers, local, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "LOCAL", "STACK"))  # type: ignore[index]
    instructions = _INSTRUCTION.findall(sass)
    tensor = Counter(match[1] for name in instructions if (match := _TENSOR_CORE.match(name)))
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return StaticRow(
        **row, registers=registers, spill=local + stack, shared=compiled.metadata.shared,
        instructions=len(instructions), tensor_core=tensor.total(), tensor_kind="+".join(sorted(tensor)),
        wanted=_wanted(compiled.asm["ttir"], arch, row["num_warps"]),
        wide_loads=sum(bool(_WIDE_LOAD.match(name)) for name in instructions), aligned=_aligned(launch),
        blocks_per_sm=_blocks_per_sm(arch, registers, compiled.metadata.shared, row["num_warps"], columns),
    )  # fmt: skip


def _work(name: str, bench_only: bool, dtype: torch.dtype, arch: int) -> list[StaticRow]:
    spec = all_specs()[name]
    cases = spec.bench_cases if bench_only else spec.bench_cases + spec.cases
    return [read_back(launch, dtype, arch) for launch in unique(launches(spec, cases, dtype, arch))]


def survey(
    archs: Iterable[int], dtypes: Iterable[torch.dtype], ops: Iterable[str], *, bench_only: bool = False
) -> Iterator[tuple[int, int, list[StaticRow]]]:
    """Compiles everything on all cores; yields (done, total, rows) as one operator, dtype and architecture is ready.

    RuntimeError under TRITON_INTERPRET=1: interpreted kernels cannot be compiled.
    """
    if INTERPRET:
        raise RuntimeError("bench static compiles the kernels: run it without TRITON_INTERPRET")
    jobs = [(name, bench_only, dtype, arch) for name in ops for dtype in dtypes for arch in archs]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        futures = [pool.submit(_work, *job) for job in jobs]
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            yield done, len(jobs), future.result()


def as_dict(row: StaticRow) -> dict[str, Any]:
    """A row as JSON takes it, its verdict included."""
    return asdict(row) | {"problem": row.problem}


HEAD = "kernel             arch   dtype     warps  regs spill  shared of all blocks instr tensor kind     wide  config"


def line(r: StaticRow) -> str:
    """One compiled kernel as text, under HEAD. blocks: on a multiprocessor; wide: loads of 16 bytes."""
    head = f"{r.kernel:<18} sm_{r.arch:<3} {r.dtype:<9} {r.num_warps:>5} {r.registers:>5} {r.spill:>5} {r.shared:>7}"
    text = f"{head} {r.shared / r.shared_limit:>6.0%} {r.blocks_per_sm:>6} {r.instructions:>5} {r.tensor_core:>6}"
    text += f" {r.tensor_kind or '-':<8} {r.wide_loads:>4}  {r.config}"
    return f"{text}  <- {r.problem}" if r.problem else text
