"""Everything about one GPU in a few minutes: the work in order of importance, inside a budget that it keeps.

Each job has a cap, in seconds. It starts while the budget has that much left, and stops after the group in which it
reaches its cap or the deadline; one that does not answer is stopped. The report names what was skipped, and is on
disk after every group.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime
import functools
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench import command, peers, roofline
from bench.generate import Generate
from bench.kernels import Kernels, proof_failure
from bench.record import CONTROL, Report, Row
from bench.supervise import Budget, Job, supervise
from bench.train_step import PROVIDERS, Train
from kernels import _check, _tables, _tune
from kernels._backend import device_problem
from kernels._compile import check_launches, compile_launch, launches, unique
from kernels._launch import arch_of, sm_count
from kernels._registry import KernelSpec, all_specs, dtype_name
from model.cli import UserError
from model.files import write_atomic

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of the time left, at most: a borrowed GPU is for the measurements too.
TUNE_SHARE, COMPILE_SHARE, PROOF_SHARE = 0.2, 0.25, 0.35
CHECK = "the check of the kernels"
NO_ROOFS = roofline.Roofs({1: 0.0}, {})  # where they could not be measured: no share of a floor


@dataclass(frozen=True)
class Gpu:
    """Proof and measurements on this machine's GPU inside a budget, in one folder: what `make gpu` runs."""

    minutes: float = 8.0  # The budget; what does not fit is skipped, least important first, and listed.
    out: Path | None = (
        None  # Folder for report.{json,md,html}, check.json and tuned.json; runs/gpu-<date>-<time> by default.
    )

    def main(self) -> None:
        command.require_positive(minutes=self.minutes)
        device, budget = _device(), Budget(60 * self.minutes)
        out = self.out or Path("runs") / f"gpu-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        report = command.start_report(device, out / "report.json")
        out.mkdir(parents=True, exist_ok=True)
        result = run_all(report, out, budget)
        command.write_pages([report], out)
        print("\n".join(summary(report, result)))
        print(f"reports in {out} after {budget.seconds - budget.left:.0f} s")
        if result.failures:
            sys.exit(1)


def _device() -> torch.device:
    none = "torch finds no CUDA device (see `python -m kernels`)"
    if problem := device_problem("cuda", 0) if torch.cuda.is_available() else none:
        raise UserError(f"make gpu needs an NVIDIA GPU of compute capability 8.0 or newer: {problem}")
    return torch.device("cuda", 0)


def _compile_case(name: str, dtype: torch.dtype, case: int, is_bench: bool, arch: int, sms: int) -> int:
    """Compile what a case of the check or of the benchmarks launches into the cache on disk -> how many kernels."""
    spec, done = all_specs()[name], 0
    recorded = (
        launches(spec, [spec.bench_cases[case]], dtype, arch, sms)
        if is_bench
        else check_launches(spec, spec.cases[case], dtype, arch, sms)
    )
    for launch in unique(recorded, arch):
        with contextlib.suppress(Exception):  # it will be raised again where it can be reported
            compile_launch(launch, arch)
            done += 1
    return done


def compile_all(arch: int, sms: int, dtypes: list[torch.dtype], budget: Budget) -> tuple[int, int]:
    """Fill Triton's cache on all cores, the shapes of the benchmarks first, which would be compiled one by one later ->
    (cases done within the budget, cases in all)."""
    jobs = [
        (name, dtype, case, is_bench, arch, sms)
        for is_bench in (True, False)
        for dtype in dtypes
        for name, spec in all_specs().items()
        for case in range(len(spec.bench_cases if is_bench else spec.cases))
    ]
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=spawn)
    futures = [pool.submit(_compile_case, *job) for job in jobs]
    done = 0
    with contextlib.suppress(TimeoutError, concurrent.futures.TimeoutError):
        finished = concurrent.futures.as_completed(futures, timeout=max(0.0, budget.left))
        for _ in command.tracked(finished, len(jobs)):
            done += 1
    pool.shutdown(wait=False, cancel_futures=True)
    return done, len(jobs)


def tune_kernels(device: torch.device, seconds: float) -> Iterator[_tune.Tuned]:
    """What `python -m kernels tune --quick` does, within a time; nothing where no kernel declares other options."""
    targets = _tune.survey(list(all_specs()), DTYPES[:1], arch_of(device), sm_count(device), quick=True)
    if targets:
        machine = _tune.Machine(device)
        yield _tune.tune(machine, targets, _tables.user_file(machine.gpu), quick=True, seconds=seconds)


def run_all(report: Report, out: Path, budget: Budget) -> _check.CheckResult:
    """Launch tables and proof, then measurements, into out/tuned.json, out/check.json and out/report.json."""
    print("\n".join(_check.describe()), flush=True)
    check: list[_check.CheckResult] = []
    roofs: list[roofline.Roofs] = []

    def accept(result: _tune.Tuned | _check.CheckResult | roofline.Roofs | Measured) -> None:
        if isinstance(result, _tune.Tuned):
            print("\n".join(result.report()), flush=True)
            report.method["tuned"] = result.report()[-1]
            report.machine["launch_tables"] = result.hash or "defaults"
            shutil.copyfile(result.table.path, out / "tuned.json")
        elif isinstance(result, _check.CheckResult):
            check.append(result)
            write_atomic(out / "check.json", json.dumps(result.as_dict(), indent=1) + "\n")
            report.method["check"] = result.line()
            print("\n".join(result.report()), flush=True)
        elif isinstance(result, roofline.Roofs):
            roofs.append(result)
            report.method |= {"roofs": result.as_dict(), "peers": peers.NOTES}
        else:
            report.rows += result.rows
            report.missing |= result.missing
        report.write(out / "report.json")

    report.dropped += supervise(functools.partial(preparations, budget), budget, accept)
    if not check:  # then each kernel is proven on its own before it is timed
        why = next((line for line in report.dropped if line.startswith(CHECK)), f"{CHECK}: no result")
        check.append(_check.CheckResult([], [why], set(), 0, 0.0, report.device))
    report.dropped += supervise(functools.partial(plan, check[0], roofs[0] if roofs else NO_ROOFS), budget, accept)
    report.write(out / "report.json")
    return check[0]


def preparations(budget: Budget) -> list[Job]:
    """What comes before the measurements: launch tables, every kernel compiled and proven, what the device can do."""
    device, left = _device(), budget.left
    tuning = TUNE_SHARE * left
    compiling = COMPILE_SHARE * (left - tuning)
    proof = PROOF_SHARE * (left - tuning - compiling)

    def tune() -> Iterator[Any]:
        yield from tune_kernels(device, 0.9 * tuning)

    def compile_ahead() -> Iterator[Any]:
        done, cases = compile_all(arch_of(device), sm_count(device), DTYPES, budget.part(compiling))
        print(f"compiled what {done} of {cases} cases launch; {budget.left:.0f} s left", flush=True)
        yield from ()

    def prove() -> Iterator[Any]:
        own = budget.part(proof)
        yield _check.check(list(all_specs()), DTYPES, device, out_of_time=lambda: own.left < 0)

    def measure_roofs() -> Iterator[Any]:
        yield roofline.measure(device, DTYPES)

    return [
        Job("choosing launch tables", tuning, tune),
        Job("compiling the kernels", compiling, compile_ahead),
        Job(CHECK, proof, prove),
        Job("the device's roofs", 20, measure_roofs),
    ]


@dataclass(frozen=True)
class Measured:
    """A group of a measurement: its rows, and who is missing so far, with the reason."""

    rows: list[Row]
    missing: dict[str, str]


def plan(result: _check.CheckResult, roofs: roofline.Roofs) -> list[Job]:
    """The measurements, the most telling first: what is dropped is dropped from the end."""
    device = _device()
    report = Report.start(device)  # takes notes of who is missing
    proven = {(row.kernel, row.case_dtype) for row in result.comparisons} - result.failed

    def gate(spec: KernelSpec, dtype: torch.dtype) -> str:
        if (spec.name, dtype) in result.failed:
            return "not timed: its proof failed (check.json)"
        return "" if (spec.name, dtype) in proven else proof_failure(spec, dtype, device)

    def job(name: str, cap: float, groups: Callable[[], Iterator[list[Row]]]) -> Job:
        def run() -> Iterator[Measured]:
            for rows in groups():
                yield Measured(rows, dict(report.missing))

        return Job(name, cap, run)

    def kernel(name: str, dtype: torch.dtype, part: slice = slice(1)) -> Job:
        timed, what = dtype_name(dtype), "other cases" if part.start else "first case"
        measurement = Kernels(op=(name,), dtype=(timed,), seconds=0.15)  # type: ignore[arg-type]
        run = functools.partial(measurement.run, device, report, roofs, part=part, gate=gate)
        return job(f"{name} {timed}, {what}", 30, run)

    def train(batch: int, cap: float, providers: tuple[str, ...], **about: str) -> Job:
        """about: what tells a group from another one of the same batch."""
        step = Train(batch=(batch,), dtype="bfloat16", provider=providers, seconds=2.0)
        name = f"training gpt2, batch {batch}: {', '.join(providers)}"

        def groups() -> Iterator[list[Row]]:
            for rows in step.groups(device, report):
                yield [replace(row, params={**row.params, **about}) for row in rows]

        return job(name, cap, groups)

    def write(batch: int) -> Job:
        texts = Generate(batch=(batch,), dtype="bfloat16", seconds=1.5)
        return job(f"generation gpt2, batch {batch}", 30, functools.partial(texts.groups, device, report))

    names = list(all_specs())
    core = ("eager", "compile", "compile+graph", "triton", "triton+graph", "trainer", "hf")
    compiled = ("compile", "compile+graph", *peers.STEP_PEERS, "triton+graph", "trainer")
    everyone = tuple(name for name in PROVIDERS if name not in ("nanogpt", *peers.STEP_PEERS))
    return [
        train(64, 90, core),
        *(kernel(name, torch.bfloat16) for name in names),
        write(1),
        train(4, 60, core),
        *(write(batch) for batch in (64, 8)),
        train(16, 120, everyone),
        *(kernel(name, torch.bfloat16, slice(1, None)) for name in names),
        *(kernel(name, dtype) for dtype in (torch.float16, torch.float32) for name in names),
        train(64, 180, compiled, operators="of peers"),
        train(32, 60, core),
    ]


def summary(report: Report, result: _check.CheckResult, most: int = 55) -> list[str]:
    """The end of the output: the result of the check, ours and the best of the others, and what was dropped."""
    lines = [result.line(), ""]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        if row.seconds and row.provider != CONTROL and row.clock != "graph":
            groups.setdefault((row.kind, row.group), []).append(row)
    for (kind, group), rows in groups.items():
        own = min((r for r in rows if r.provider.startswith("triton")), key=Row.ms, default=None)
        others = (r for r in rows if not r.provider.startswith(("triton", "+", *peers.OWN)))
        best = min(others, key=Row.ms, default=None)
        if own:
            other = (
                f"  best other {best.provider} {best.ms():.3f} ms, {best.ms() / own.ms():.2f} x ours" if best else ""
            )
            before = next((f"  untuned {r.ms():.3f} ms" for r in rows if r.provider == "untuned"), "")
            lines.append(f"{kind:<9}{group:<60} {own.provider:<13}{own.ms():9.3f} ms{before}{other}")
    missing = (f"not here: {name}: {reason}" for name, reason in report.missing.items())
    dropped = [*(f"dropped: {name}" for name in report.dropped), *missing]
    room = most - len(lines)
    more = ["... and more in report.md"] if len(dropped) > room else []
    return [*lines[:most], "", *dropped[: max(0, room - len(more))], *more]
