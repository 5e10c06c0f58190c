"""Reports: what was measured, where, when and how, one JSON file a run.

A report is a file of pytest-benchmark with more in it, so `pytest-benchmark compare` reads ours and `bench compare`
reads theirs. Schema 2:

    schema        2
    datetime      UTC, ISO 8601            version       pytest-benchmark's format that `benchmarks` follows
    machine_info  device, versions, threads; on a GPU also compute capability, memory, driver
    commit_info   id, dirty                of the checkout that ran
    method        how the times were taken, in words; roofs: {"copy": {bytes: seconds}, "flops": {dtype: FLOP/s}}
    missing       provider -> why none of its rows is here
    dropped       what a budget left out, in the order in which it was to run
    benchmarks    a row each: group, name, fullname, params, extra_info, and
                  stats: data (seconds, a sample each, in the order taken), median, q1, q3, iqr, min, max, ...
    untimed       rows without a time: kind, params, provider, clock, metrics, and error, why there is none

Rows of one group were timed in turn: sample i of each belongs to round i. The provider "control" is no competitor: it
is the same copy and product in every group of every report of a device, and tells how fast the machine was just then.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kernels._triton import HAS_TRITON, triton
from model.cli import UserError

SCHEMA = 2
CONTROL = "control"
_PYTEST_BENCHMARK = "5.1.0"


@dataclass(frozen=True)
class Row:
    """One provider on one thing that was measured.

    kind: "kernels", "train", "generate", "memory" or "micro".
    params: what was measured, in the order in which it is read: op, case, dtype, mode; or preset, batch, context, ...
    clock: what `seconds` are: "events" (CUDA events around a call: device time and what the host fails to hide),
        "graph" (the call replayed inside a CUDA graph: device time alone), "wall" (CPU); "" without times.
    seconds: one sample each, of one call, in the order taken.
    metrics: numbers derived or measured beside the time, named with their unit: gb_per_s, tflop_per_s, floor (fraction
        of the time that the measured roofs allow), host_ms, peak_mib, tokens_per_s, mfu, ...
    error: why there is no time, in a line.
    """

    kind: str
    params: dict[str, Any]
    provider: str
    clock: str = ""
    seconds: tuple[float, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""

    @property
    def group(self) -> str:
        """What its competitors share: ``layer_norm M=1024 N=768 float32 forward``, with the clock where it is timed."""
        words = [str(v) if isinstance(v, str) else f"{k}={v}" for k, v in self.params.items()]
        return " ".join([*words, *([self.clock] if self.clock else [])])

    @property
    def key(self) -> tuple[str, str, str]:
        """The same measurement in another report has the same key."""
        return self.kind, self.group, self.provider

    def ms(self, percentile: int = 50) -> float:
        """A percentile of the samples in milliseconds: 20, 50 or 80."""
        if len(self.seconds) == 1:
            return self.seconds[0] * 1e3
        if percentile == 50:
            return statistics.median(self.seconds) * 1e3
        return statistics.quantiles(self.seconds, n=10, method="inclusive")[percentile // 10 - 1] * 1e3


@dataclass
class Report:
    """The rows of one run and where they come from; `write` after every group, so that a kill loses nothing."""

    machine: dict[str, Any]
    commit: dict[str, Any]
    datetime: str
    method: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def start(cls, device: torch.device) -> Report:
        """An empty report of this machine, now."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        return cls(machine_info(device), commit_info(), now)

    @property
    def device(self) -> str:
        """What must be equal for two reports to be compared."""
        return (
            f"{self.machine['device']}, {self.machine.get('threads')} threads"
            if self.on_cpu
            else self.machine["device"]
        )

    @property
    def on_cpu(self) -> bool:
        return "compute_capability" not in self.machine

    def write(self, path: Path) -> None:
        """Writes the report; under a temporary name first, so that a kill leaves the one before."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "schema": SCHEMA, "datetime": self.datetime, "version": _PYTEST_BENCHMARK, "machine_info": self.machine,
            "commit_info": self.commit, "method": self.method, "missing": self.missing, "dropped": self.dropped,
        }  # fmt: skip
        timed = [_entry(row) for row in self.rows if row.seconds]
        untimed = [
            {name: getattr(row, name) for name in ("kind", "params", "provider", "clock", "metrics", "error")}
            for row in self.rows
            if not row.seconds
        ]
        lists = {"benchmarks": timed, "untimed": untimed}
        body = "".join(f',\n "{name}": [{_lines(entries)}]' for name, entries in lists.items())
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(head, indent=1).removesuffix("\n}") + body + "\n}\n")
        temporary.replace(path)

    @classmethod
    def read(cls, path: Path) -> Report:
        """A report, or a file of pytest-benchmark as rows of kind "micro". UserError in words for anything else."""
        try:
            data = json.loads(path.read_text())
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a report: it is no text file") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path} is not a whole report: {error.msg} in line {error.lineno}\n"
                f"it was cut off or edited: measure again, or take another copy"
            ) from None
        if not isinstance(data, dict) or "benchmarks" not in data:
            raise UserError(
                f"{path} is not a report: it has no benchmarks (write one with `python -m bench ... --out`)"
            )
        if data.get("schema", SCHEMA) != SCHEMA:
            raise UserError(
                f"{path} has report schema {data['schema']}, and this version reads {SCHEMA}\n"
                f"read it with the version that wrote it (commit {data.get('commit_info', {}).get('id', 'unknown')})"
            )
        try:
            return cls._from(data)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a report of schema {SCHEMA}: something is wrong at {error}") from None

    @classmethod
    def _from(cls, data: dict[str, Any]) -> Report:
        ours = "schema" in data
        rows = [_row(entry) if ours else _foreign_row(entry) for entry in data["benchmarks"]]
        for e in data.get("untimed", []):
            rows.append(Row(e["kind"], e["params"], e["provider"], e["clock"], (), e["metrics"], e["error"]))
        machine = data["machine_info"] if ours else _foreign_machine(data["machine_info"])
        return cls(
            machine, data.get("commit_info") or {}, data["datetime"], data.get("method", {}), data.get("missing", {}),
            data.get("dropped", []), rows,
        )  # fmt: skip


def _lines(entries: Iterable[dict[str, Any]]) -> str:
    """An entry a line: a report stays readable and its diffs short."""
    text = ",\n".join(json.dumps(entry) for entry in entries)
    return f"\n{text}\n" if text else ""


def _entry(row: Row) -> dict[str, Any]:
    data = [float(f"{s:.5g}") for s in row.seconds]
    q1, median, q3 = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    mean, stddev, iqr = statistics.mean(data), statistics.stdev(data) if len(data) > 1 else 0.0, q3 - q1
    near = [s for s in data if q1 - 1.5 * iqr <= s <= q3 + 1.5 * iqr]
    far, wide = len(data) - len(near), sum(abs(s - mean) > stddev for s in data)
    stats = {
        "min": min(data), "max": max(data), "mean": mean, "stddev": stddev, "rounds": len(data), "median": median,
        "iqr": iqr, "q1": q1, "q3": q3, "iqr_outliers": far, "stddev_outliers": wide, "outliers": f"{wide};{far}",
        "ld15iqr": min(near), "hd15iqr": max(near), "ops": 1 / mean, "total": sum(data), "data": data, "iterations": 1,
    }  # fmt: skip
    name = f"{row.group}[{row.provider}]"
    return {
        "group": row.group, "name": name, "fullname": f"{row.kind}::{name}", "param": row.provider,
        "params": row.params, "options": {}, "stats": stats,
        "extra_info": {"kind": row.kind, "provider": row.provider, "clock": row.clock, "metrics": row.metrics},
    }  # fmt: skip


def _row(entry: dict[str, Any]) -> Row:
    extra, seconds = entry["extra_info"], tuple(entry["stats"]["data"])
    return Row(extra["kind"], entry["params"], extra["provider"], extra["clock"], seconds, extra["metrics"])


def _foreign_row(entry: dict[str, Any]) -> Row:
    """A benchmark of a pytest-benchmark file; one that kept no samples gives its five-number summary instead."""
    stats = entry["stats"]
    seconds = stats.get("data") or [stats[k] for k in ("min", "q1", "median", "q3", "max")]
    return Row("micro", {"test": entry["fullname"]}, "ours", "wall", tuple(seconds))


def _foreign_machine(info: dict[str, Any]) -> dict[str, Any]:
    return {**info, "device": info.get("device") or info.get("cpu", {}).get("brand_raw") or info.get("node", "unknown")}


def dtype_name(dtype: torch.dtype) -> str:
    """As parameters of a row have it: float32."""
    return str(dtype).removeprefix("torch.")


def machine_info(device: torch.device) -> dict[str, Any]:
    """Where and with what a report is made."""
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python_version": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
    }
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "compute_capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_mib": p.total_memory // 2**20, "cuda": torch.version.cuda,
            "driver": _nvidia_smi(device, "driver_version"),
        }  # fmt: skip
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def commit_info() -> dict[str, Any]:
    """The commit of the checkout that this package lies in, and whether it was changed; None outside one."""
    commit = _say("git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    return {"id": commit.rstrip("+") or None, "dirty": commit.endswith("+")}


def _say(*command: str) -> str:
    """What a command prints; "" where it cannot run."""
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _nvidia_smi(device: torch.device, query: str) -> str:
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)  # its own numbers are not always torch's
    chosen = f"--id=GPU-{uuid}" if uuid else f"--id={device.index or 0}"
    return _say("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", chosen)


def machine_state(device: torch.device) -> dict[str, float]:
    """What the machine is doing just now: clocks, power and temperature of a GPU, the load of a CPU."""
    if device.type == "cpu":
        return {"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    query = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    text = _nvidia_smi(device, query)
    names = ("sm_mhz", "memory_mhz", "watts", "celsius")
    state = {}
    for name, value in zip(names, text.split(","), strict=False):
        try:
            state[name] = float(value)
        except ValueError:  # "[N/A]" where a card does not tell
            continue
    return state
