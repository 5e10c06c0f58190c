"""Reports: what was measured, where, when and how, one JSON file per run.

A report is a pytest-benchmark file with more in it: `pytest-benchmark compare` reads ours and `bench compare` theirs.
Schema 2:

    schema        2
    datetime      UTC, ISO 8601            version       pytest-benchmark's format that `benchmarks` follows
    machine_info  device, versions, threads; on a GPU also compute capability, memory, driver
    commit_info   id, dirty, time          of the checkout that ran
    method        how the times were taken; roofs: {"copy": {bytes: seconds}, "flops": {dtype: FLOP/s}}
    missing       provider -> why it could not run
    dropped       what a budget had no time for, in the planned order
    benchmarks    one entry per row: group, name, fullname, params, extra_info, and
                  stats: data (seconds, one per sample, in the order taken), median, q1, q3, iqr, min, max, ...
    untimed       rows without a time: kind, params, provider, clock, metrics, and error, why there is none

The rows of a group were timed in turn: sample i of each belongs to round i. The provider "control" is no competitor: it
is the same copy and product in every group of every report of a device, and shows how fast the machine was.
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

import numpy as np
import torch

from kernels._machine import gpu_state, nvidia_smi
from kernels._tables import launch_tables
from kernels._triton import HAS_TRITON, triton
from model.cli import UserError
from model.files import write_atomic

SCHEMA = 2
CONTROL = "control"
# The providers of a training step that build on each other, from PyTorch's plain operators to everything on.
LADDER = ("plain", "eager", "compile", "+attention", "+layer_norm", "+gelu", "triton", "triton+graph", "trainer")
_PYTEST_BENCHMARK = "5.1.0"
_UNTIMED = ("kind", "params", "provider", "clock", "metrics", "error")


def params_text(params: dict[str, Any], *omit: str) -> str:
    """Parameters on one line: ``layer_norm M=1024 N=768 float32 forward``."""
    return " ".join(v if isinstance(v, str) else f"{k}={v}" for k, v in params.items() if k not in omit)


@dataclass(frozen=True)
class Row:
    """One provider on one thing that was measured. metrics: numbers derived or measured with the time, named with their
    unit: gb_per_s, floor (what the measured roofs allow, over the median), host_ms, peak_mib, tokens_per_s, mfu, ..."""

    kind: str  # "kernels", "train", "generate", "memory", "quality"; "micro": of a pytest-benchmark file
    params: dict[str, Any]  # in reading order: op, case, dtype, mode; or preset, batch, context, ...
    provider: str
    clock: str = ""  # of timing.py; "" without times
    seconds: tuple[float, ...] = ()  # one sample per call, in the order taken
    metrics: dict[str, float] = field(default_factory=dict)
    error: str = ""  # why there is no time, in one line

    @property
    def group(self) -> str:
        """What its competitors share: ``layer_norm M=1024 N=768 float32 forward``, with the clock where it is timed."""
        return f"{params_text(self.params)} {self.clock}".rstrip()

    @property
    def key(self) -> tuple[str, str, str]:
        """The same measurement in another report has the same key."""
        return self.kind, self.group, self.provider

    def covers(self, params: dict[str, Any], clock: str) -> bool:
        """Whether this row's error is that of another: it stands for all the modes and clocks that it does not name."""
        named = {name: value for name, value in self.params.items() if value != ""}
        return self.clock in ("", clock) and named.items() <= params.items()

    def ms(self, percentile: float = 50) -> float:
        """A percentile of the samples, in milliseconds."""
        return float(np.percentile(self.seconds, percentile)) * 1e3


@dataclass
class Report:
    """The rows of one run and where they come from. `write` it after every group: a kill then loses nothing."""

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
        name = self.machine["device"]
        return f"{name}, {self.machine.get('threads')} threads" if self.on_cpu else name

    @property
    def on_cpu(self) -> bool:
        return "compute_capability" not in self.machine

    def write(self, path: Path) -> None:
        """Write the report atomically, one line per entry: readable, and with short diffs."""
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {
            "schema": SCHEMA, "datetime": self.datetime, "version": _PYTEST_BENCHMARK, "machine_info": self.machine,
            "commit_info": self.commit, "method": self.method, "missing": self.missing, "dropped": self.dropped,
        }  # fmt: skip
        text = json.dumps(head, indent=1).removesuffix("\n}")
        timed = [_entry(row) for row in self.rows if row.seconds]
        untimed = [{name: getattr(row, name) for name in _UNTIMED} for row in self.rows if not row.seconds]
        for name, entries in (("benchmarks", timed), ("untimed", untimed)):
            lines = ",\n".join(map(json.dumps, entries))
            text += f',\n "{name}": [' + (f"\n{lines}\n]" if lines else "]")
        write_atomic(path, text + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report, or a pytest-benchmark file as rows of kind "micro". UserError for anything else."""
        try:
            data = json.loads(path.read_bytes())
            if "schema" not in data:
                return cls._from_pytest_benchmark(data)
            if data["schema"] != SCHEMA:
                raise UserError(f"{path} has report schema {data['schema']}, and this version reads {SCHEMA}")
            rows = [_row(entry) for entry in data["benchmarks"]]
            rows += [Row(**{name: entry[name] for name in _UNTIMED}) for entry in data["untimed"]]
            more = {name: data[name] for name in ("datetime", "method", "missing", "dropped")}
            return cls(data["machine_info"], data["commit_info"], rows=rows, **more)
        except ValueError as error:
            raise UserError(f"{path} is not a whole report: {error}\nmeasure again, or take another copy") from None
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not a report of schema {SCHEMA}: something is wrong at {error}") from None

    @classmethod
    def _from_pytest_benchmark(cls, data: dict[str, Any]) -> Report:
        """An entry that kept no samples gives its five-number summary instead."""
        rows, machine = [], data["machine_info"]
        for entry in data["benchmarks"]:
            samples = entry["stats"].get("data") or [entry["stats"][k] for k in ("min", "q1", "median", "q3", "max")]
            rows.append(Row("micro", {"test": entry["fullname"]}, "ours", "wall", tuple(samples)))
        device = machine.get("cpu", {}).get("brand_raw") or machine.get("node", "unknown")
        return cls({"device": device, **machine}, data.get("commit_info") or {}, data["datetime"], rows=rows)


BESIDE = ("check.json", "tuned.json")  # what `bench gpu` writes beside its report


def read_reports(paths: Iterable[Path]) -> dict[Path, Report]:
    """Reports by file, from files and from folders that hold some. UserError for a folder without any."""
    files: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.rglob("*.json") if p.name not in BESIDE) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"there is no report in {path}: write one with `python -m bench kernels --out FILE`")
        files += inside
    return {file: Report.read(file) for file in files}


def _entry(row: Row) -> dict[str, Any]:
    data = [float(f"{s:.5g}") for s in row.seconds]
    low, q1, median, q3, high = np.percentile(data, [0, 25, 50, 75, 100]).tolist()
    mean, stddev, iqr = statistics.mean(data), statistics.stdev(data) if len(data) > 1 else 0.0, q3 - q1
    near = [s for s in data if q1 - 1.5 * iqr <= s <= q3 + 1.5 * iqr]
    far, wide = len(data) - len(near), sum(abs(s - mean) > stddev for s in data)
    stats = {
        "min": low, "max": high, "mean": mean, "stddev": stddev, "rounds": len(data), "median": median,
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


def machine_info(device: torch.device) -> dict[str, Any]:
    """The device, its system and the versions of what runs on it."""
    cuda = device.type == "cuda"
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else _cpu_name(), "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}", "python_version": platform.python_version(),
        "torch": torch.__version__, "triton": triton.__version__ if HAS_TRITON else None,
    }  # fmt: skip
    if cuda:
        p = torch.cuda.get_device_properties(device)
        facts |= {
            "compute_capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
            "memory_mib": p.total_memory // 2**20, "cuda": torch.version.cuda,
            "driver": nvidia_smi(device, "driver_version"), "launch_tables": launch_tables(device) or "defaults",
        }  # fmt: skip
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "CPU"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def commit_info() -> dict[str, Any]:
    """The commit of the checkout that this package lies in, whether there are changes, its date; None outside one."""
    commit = _output("git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+")
    time = _output("git", "show", "--no-patch", "--format=%cI", "HEAD") or None
    return {"id": commit.rstrip("+") or None, "dirty": commit.endswith("+"), "time": time}


def _output(*command: str) -> str:
    """The output of a command; "" where it cannot run."""
    try:
        root = Path(__file__).parent
        return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine_state(device: torch.device) -> dict[str, float]:
    """The state of the machine now: clocks, power and temperature of a GPU, the load of a CPU."""
    if device.type == "cpu":
        return {"load": os.getloadavg()[0]} if hasattr(os, "getloadavg") else {}
    return gpu_state(device)
