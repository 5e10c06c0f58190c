"""What a launch compiles to: registers, spills, shared memory, instructions by kind, and what is wrong with it."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _sass as sass
from ._compile import compile_launch, kernel_name, reason
from ._launch import Launch, tensors
from ._registry import dtype_name


class Architecture(NamedTuple):
    """Limits of one multiprocessor: CUDA C++ Programming Guide, table of technical specifications."""

    shared_kib: int  # that one block may ask for; a multiprocessor has 1 KiB more for each block it holds
    threads: int
    blocks: int


ARCHITECTURES = {
    80: Architecture(163, 2048, 32), 86: Architecture(99, 1536, 16), 89: Architecture(99, 1536, 24),
    90: Architecture(227, 2048, 32), 100: Architecture(227, 2048, 32), 120: Architecture(99, 1536, 24),
}  # fmt: skip


def limits_of(arch: int) -> Architecture:
    """Those of sm_<arch>, or of the newest one before it that is known."""
    return ARCHITECTURES[max(known for known in ARCHITECTURES if known <= arch)]


_REGISTERS, _TENSOR_COLUMNS = 65536, 512  # of a multiprocessor; columns: Blackwell's tensor memory

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", re.MULTILINE)
_TENSOR_CORE = re.compile(r"(HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA)")
_WIDE_LOAD = re.compile(r"LDG(STS)?\..*(128|256)|UTMALDG")
_DOT = re.compile(r"tt\.dot .*?(tf32)? : tensor<\d+x\d+x(\w+)> \* .*-> tensor<(\d+)x\d+x\w+>")


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
    wide_loads: int = 0  # loads of 16 bytes or more, bulk copies included
    aligned: bool = False  # loads of 16 bytes are possible
    blocks_per_sm: int = 0  # blocks that a multiprocessor holds at a time
    loops: tuple[sass.Loop, ...] = ()  # the innermost ones, in the order of the code
    body: sass.Loop = sass.Loop(0)  # the whole code, as if it were one  # noqa: RUF009
    error: str = ""

    @property
    def issue(self) -> float | None:
        """Instructions of a warp per FLOP in the cheapest loop with products, which runs most; without products per
        byte, of all loops, or of the whole code where there is none. None where the code does not say."""
        if self.tensor_core:
            return min((loop.n / loop.flops for loop in self.loops if loop.flops), default=None)
        parts = self.loops or (self.body,)
        return sum(part.n / part.bytes for part in parts) if all(part.bytes for part in parts) else None

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
        elif name == "strides":  # of several tensors
            strides |= {f"{name}[{i}]": of_tensor for i, of_tensor in enumerate(value)}
    one_unit = bool(strides) and all(of_tensor.count(1) == 1 for of_tensor in strides.values())
    multiples = [n for of_tensor in strides.values() for n in of_tensor if n != 1]
    return one_unit and all(n % 16 == 0 for n in (*multiples, *(t.data_ptr() for t in tensors(launch.args))))


def _blocks_per_sm(arch: int, registers: int, shared: int, num_warps: int, tensor_columns: int) -> int:
    limits = limits_of(arch)
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
        num_warps=launch.meta.get("num_warps", 4), shared_limit=limits_of(arch).shared_kib * 1024,
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
    instructions, num_warps = _INSTRUCTION.findall(code), compiled.metadata.num_warps
    tensor = Counter(match[1] for name in instructions if (match := _TENSOR_CORE.match(name)))
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    return StaticRow(
        **row, registers=registers, spill=local + stack, shared=compiled.metadata.shared,
        instructions=len(instructions), tensor_core=tensor.total(), tensor_kind="+".join(sorted(tensor)),
        wanted=_wanted(compiled.asm["ttir"], arch, row["num_warps"]),
        wide_loads=sum(bool(_WIDE_LOAD.match(name)) for name in instructions), aligned=_aligned(launch),
        blocks_per_sm=_blocks_per_sm(arch, registers, compiled.metadata.shared, row["num_warps"], columns),
        loops=tuple(sass.loops(code, num_warps)), body=sass.whole(code, num_warps),
    )  # fmt: skip
