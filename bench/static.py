"""What every kernel compiles to, for architectures that need not be in this machine: no GPU is used.

Each launch of a registered kernel on its declared cases is recorded, compiled by Triton and ptxas for the target, and
read back: registers, spilled bytes, shared memory and the architecture's limit, and kinds of instructions.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro

from bench import command, sass
from bench.record import commit_info, dtype_name, machine_info
from kernels._compile import compile_launch, kernel_name, launches, reason, unique
from kernels._launch import Launch, tensors
from kernels._registry import all_specs, load_spec
from kernels._triton import INTERPRET
from model.cli import UserError
from model.files import write_atomic


class Architecture(NamedTuple):
    """Limits of one multiprocessor: CUDA C++ Programming Guide, table of technical specifications."""

    shared_kib: int  # that one block may ask for; a multiprocessor has 1 KiB more for each block it holds
    threads: int
    blocks: int


ARCHITECTURES = {
    80: Architecture(163, 2048, 32), 86: Architecture(99, 1536, 16), 89: Architecture(99, 1536, 24),
    90: Architecture(227, 2048, 32), 100: Architecture(227, 2048, 32), 120: Architecture(99, 1536, 24),
}  # fmt: skip
_REGISTERS, _TENSOR_COLUMNS = 65536, 512  # of a multiprocessor; columns: Blackwell's tensor memory

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)")
_WIDE_LOAD = re.compile(r"LDG(STS)?\..*(128|256)")
_DOT = re.compile(r"tt\.dot .*?(tf32)? : tensor<\d+x\d+x(\w+)> \* .*-> tensor<(\d+)x\d+x\w+>")


@dataclass(frozen=True)
class Static:
    """What the kernels compile to, for architectures that need not be here. Uses no GPU; exit code 1 on a problem."""

    file: tyro.conf.Positional[Path | None] = None  # Python file with a kernel of your own: only that is compiled.
    arch: tuple[int, ...] = (80, 90, 100)  # Compute capabilities, times ten.
    op: tuple[str, ...] = ()  # Kernels to compile; all of them by default.
    dtype: tuple[command.Dtype, ...] = ("bfloat16", "float16", "float32")  # Precisions to compile.
    bench_only: bool = False  # Only the shapes of the benchmarks, not those of the tests.
    ceilings: Literal["a100", "h100", "b200"] | None = None  # GPU whose ceilings of the inner loops are printed.
    out: Path | None = None  # JSON file to write; none by default.

    def main(self) -> None:
        for arch in self.arch:
            if arch not in ARCHITECTURES:
                raise UserError(f"--arch {arch} is not known: choose from {', '.join(map(str, ARCHITECTURES))}")
        ops = [command.own_kernel(self.file).name] if self.file else command.pick("kernel", self.op, all_specs())
        command.require_new(self.out)
        dtypes = [getattr(torch, name) for name in self.dtype]
        groups = survey(self.arch, dtypes, ops, bench_only=self.bench_only, file=self.file)
        tracked = command.tracked(groups, len(ops) * len(dtypes) * len(self.arch))
        rows = [row for group in tracked for row in group]
        rows.sort(key=lambda r: (r.kernel, r.arch, r.dtype, r.config))
        print(HEAD)
        for row in rows:
            print(line(row))
        if self.ceilings:
            print("\n".join(ceilings(rows, self.ceilings)))
        problems = sum(bool(r.problem) for r in rows)
        print(f"{len(rows)} compiled kernels, {problems} with a problem")
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            entries = [asdict(row) | {"problem": row.problem} for row in rows]
            data = {"machine_info": machine_info(torch.device("cpu")), "commit_info": commit_info(), "rows": entries}
            write_atomic(self.out, json.dumps(data, indent=1) + "\n")
        if problems:
            sys.exit(1)


@dataclass(frozen=True)
class StaticRow:
    """One compiled kernel."""

    kernel: str
    arch: int
    dtype: str
    config: str
    num_warps: int
    shared_limit: int
    registers: int = 0  # of a thread
    spill: int = 0  # bytes of a thread, the stack included
    shared: int = 0  # bytes of a block
    instructions: int = 0
    tensor_core: int = 0  # instructions on the tensor cores
    tensor_kind: str = ""  # their names
    wanted: str = ""  # the tensor-core instruction that the products call for; empty for none
    wide_loads: int = 0  # loads of 16 bytes or more
    aligned: bool = False  # loads of 16 bytes are possible
    blocks_per_sm: int = 0  # blocks that a multiprocessor holds at a time
    loops: tuple[sass.Loop, ...] = ()  # the innermost ones, in the order of the code
    error: str = ""

    @property
    def problem(self) -> str:
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
        if any(loop.warpgroup > sass.MAX_WARPGROUP for loop in self.loops):
            return "a loop's asynchronous products wait for one another"
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
    strides: dict[str, tuple[int, ...]] = {}  # by tensor: stride_xm, stride_xn and stride_x=(m, n) -> stride_x
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if name.startswith("stride_"):
            tensor, of_tensor = (name, value) if isinstance(value, tuple) else (name[:-1], (value,))
            strides[tensor] = strides.get(tensor, ()) + of_tensor
    one_unit = bool(strides) and all(of_tensor.count(1) == 1 for of_tensor in strides.values())
    multiples = [n for of_tensor in strides.values() for n in of_tensor if n != 1]
    return one_unit and all(n % 16 == 0 for n in (*multiples, *(t.data_ptr() for t in tensors(launch.args))))


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
    meta: dict[str, Any] = {}
    for name, value in launch.meta.items():  # a NamedTuple of constants is listed by its fields
        meta |= value._asdict() if hasattr(value, "_asdict") else {name: value}
    return " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in meta.items() if k != "num_warps")


def _tool(name: str, *args: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return subprocess.run([str(folder / name), *args], capture_output=True, text=True, check=True).stdout


def read_back(launch: Launch, dtype: torch.dtype, arch: int) -> StaticRow:
    """Compile one launch for sm_<arch> and read the machine code."""
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
        usage, code = _tool("cuobjdump", "--dump-resource-usage", file.name), _tool("cuobjdump", "-sass", file.name)
    registers, local, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "LOCAL", "STACK"))  # type: ignore[index]
    instructions = _INSTRUCTION.findall(code)
    tensor = Counter(match[1] for name in instructions if (match := _TENSOR_CORE.match(name)))
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return StaticRow(
        **row, registers=registers, spill=local + stack, shared=compiled.metadata.shared,
        instructions=len(instructions), tensor_core=tensor.total(), tensor_kind="+".join(sorted(tensor)),
        wanted=_wanted(compiled.asm["ttir"], arch, row["num_warps"]),
        wide_loads=sum(bool(_WIDE_LOAD.match(name)) for name in instructions), aligned=_aligned(launch),
        blocks_per_sm=_blocks_per_sm(arch, registers, compiled.metadata.shared, row["num_warps"], columns),
        loops=tuple(sass.loops(code, compiled.metadata.num_warps)),
    )  # fmt: skip


def _work(name: str, bench_only: bool, dtype: torch.dtype, arch: int, file: Path | None) -> list[StaticRow]:
    spec = load_spec(file) if file else all_specs()[name]
    cases = spec.bench_cases if bench_only else spec.bench_cases + spec.cases
    return [read_back(launch, dtype, arch) for launch in unique(launches(spec, cases, dtype, arch), arch)]


def survey(
    archs: Iterable[int],
    dtypes: Iterable[torch.dtype],
    ops: Iterable[str],
    *,
    bench_only: bool = False,
    file: Path | None = None,
) -> Iterator[list[StaticRow]]:
    """Compile everything on all cores; yield the rows of one operator, dtype and architecture as they are ready.

    file: declares the one operator in `ops`, where it is not a registered one.
    """
    if INTERPRET:
        raise RuntimeError("bench static compiles the kernels: run it without TRITON_INTERPRET")
    jobs = [(name, bench_only, dtype, arch, file) for name in ops for dtype in dtypes for arch in archs]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(_work, *job) for job in jobs]):
            yield future.result()


HEAD = "kernel             arch   dtype     warps  regs spill  shared of all blocks instr tensor kind     wide  config"


def line(r: StaticRow) -> str:
    """One compiled kernel as text, under HEAD. blocks: on a multiprocessor; wide: loads of 16 bytes."""
    head = f"{r.kernel:<18} sm_{r.arch:<3} {r.dtype:<9} {r.num_warps:>5} {r.registers:>5} {r.spill:>5} {r.shared:>7}"
    text = f"{head} {r.shared / r.shared_limit:>6.0%} {r.blocks_per_sm:>6} {r.instructions:>5} {r.tensor_core:>6}"
    text += f" {r.tensor_kind or '-':<8} {r.wide_loads:>4}  {r.config}"
    return f"{text}  <- {r.problem}" if r.problem else text


def ceilings(rows: Iterable[StaticRow], name: str) -> Iterator[str]:
    """The inner loops of the rows compiled for a device's architecture, and what it could do at most: `bench.sass`."""
    device = sass.DEVICES[name]
    yield (
        f"Inner loops on {name}: instructions of an iteration by kind, and ceilings, with {device.multiprocessors} "
        f"multiprocessors at {device.ghz} GHz, {device.tensor} FLOP a cycle each, {device.bandwidth:,.0f} GB/s"
    )
    for row in rows:
        for loop in row.loops if row.arch == device.arch else ():
            kinds = " ".join(f"{kind} {n}" for kind, n in loop.kinds.items())
            limits = ", ".join(f"{what} {value:,.0f}" for what, value in loop.ceilings(device).items())
            yield f"{row.kernel:<18} {row.dtype:<9} {loop.n:>4}: {kinds}; {limits or 'no ceiling'}  {row.config}"
