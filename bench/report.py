"""Reports: one JSON file a run, and the same rows as text."""

import datetime
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from bench.kernels import KernelRow
from bench.static import StaticRow
from bench.train_step import TrainRow
from kernels._triton import HAS_TRITON, triton

SCHEMA = 1


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what a report was made."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "commit": _commit(),
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "compute_capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_mib": p.total_memory // 2**20, "cuda": torch.version.cuda,
        }  # fmt: skip
    return facts


def _commit() -> str | None:
    """Commit of the checkout that this package lies in, "+" where it was changed; None outside one."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+"], cwd=root, capture_output=True, text=True, timeout=10
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def write(path: Path, kind: str, device: torch.device, rows: list[dict[str, Any]]) -> None:
    """Writes a report; under a temporary name first, so that a kill leaves the one before."""
    report = {"schema": SCHEMA, "kind": kind, "environment": environment(device), "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def kernel_line(row: KernelRow) -> str:
    """One row of the kernel benchmark as text."""
    head = f"{row.kernel:<17} {row.case:<24} {row.dtype:<9} {row.mode:<17} {row.provider:<15}"
    if row.error:
        return f"{head} {row.error}"
    speed = f"{row.tflop_per_s:8.1f} TFLOP/s" if row.tflop_per_s else f"{row.gb_per_s:8.1f} GB/s"
    t = row.timing
    return f"{head} {t.p50_ms:9.3f} ms ({t.p20_ms:.3f} to {t.p80_ms:.3f}, {t.runs} runs) {speed}"


def train_line(row: TrainRow) -> str:
    """One row of the training benchmark as text."""
    head = f"{row.preset} B={row.batch} T={row.context} {row.dtype} {row.provider:<8}"
    if row.error:
        return f"{head} {row.error}"
    mfu = "" if row.mfu != row.mfu else f"  MFU {row.mfu:.3f}"
    memory = f"  peak {row.peak_mib:,.0f} MiB" if row.peak_mib else ""
    return f"{head} {row.timing.p50_ms:9.2f} ms  {row.tokens_per_s:12,.0f} tokens/s{mfu}{memory}"


STATIC_HEAD = (
    "kernel             arch   dtype     warps  regs spill  shared of all blocks instr tensor kind     wide  config"
)


def static_line(r: StaticRow) -> str:
    """One compiled kernel as text, under STATIC_HEAD. blocks: on a multiprocessor; wide: loads of 16 bytes."""
    head = f"{r.kernel:<18} sm_{r.arch:<3} {r.dtype:<9} {r.num_warps:>5} {r.registers:>5} {r.spill:>5} {r.shared:>7}"
    line = f"{head} {r.shared / r.shared_limit:>6.0%} {r.blocks_per_sm:>6} {r.instructions:>5} {r.tensor_core:>6}"
    line += f" {r.tensor_kind or '-':<8} {r.wide_loads:>4}  {r.config}"
    return f"{line}  <- {r.problem}" if r.problem else line
