"""What every kernel compiles to, for architectures that need not be in this machine: no GPU is used.

Each launch of a registered kernel on its declared cases is recorded, compiled by Triton and ptxas for the target, and
read back: registers, spilled bytes, shared memory and the architecture's limit, and kinds of instructions.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from bench import command
from bench.record import commit_info, machine_info
from kernels import _sass as sass
from kernels._compile import launches, unique
from kernels._machine_code import ARCHITECTURES, StaticRow, read_back
from kernels._registry import all_specs, load_spec
from kernels._triton import INTERPRET
from model.cli import UserError
from model.files import write_atomic


@dataclass(frozen=True)
class Static:
    """What the kernels compile to, for architectures that need not be here. Uses no GPU; exit code 1 on a problem."""

    file: tyro.conf.Positional[Path | None] = None  # Python file with a kernel of your own: only that is compiled.
    arch: tuple[int, ...] = (80, 90, 100)  # Compute capabilities, times ten.
    op: tuple[str, ...] = ()  # Kernels to compile; all of them by default.
    dtype: tuple[command.Dtype, ...] = ("bfloat16", "float16", "float32")  # Precisions to compile.
    bench_only: bool = False  # Only the shapes of the benchmarks, not those of the tests.
    ceilings: Literal["a100", "h100", "b200"] | None = None  # GPU for which to print the inner loops' speed limits.
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
    """The inner loops of the rows compiled for a device's architecture, and what it could do at most."""
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
