"""Everything about one GPU in a few minutes: the work in order of importance, inside a budget that it keeps.

A job is started while the budget has room for what it should take; what it should take is a guess that the jobs before
it have corrected. A job that outlives the budget is stopped after the group that it is at. Either way the report names
what was left out, and is on disk after every group.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench import generate, kernels, peers, roofline, train_step
from bench.record import CONTROL, Report, Row, dtype_name
from bench.timing import why
from kernels import __main__ as kernels_command
from kernels._compile import compile_launch, launches, unique
from kernels._launch import arch_of
from kernels._registry import KernelSpec, all_specs

Clock = Callable[[], float]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PROOF_SHARE = 0.35  # of the budget, at most, for the check: it is not the only thing that a borrowed GPU is for


@dataclass(frozen=True)
class Job:
    """A part of the work. name: as the report says it; seconds: a guess; run: yields rows, a list for each group."""

    name: str
    seconds: float
    run: Callable[[], Iterator[list[Row]]]


class Budget:
    """Seconds that are left, and how much slower than the guesses this machine has been."""

    def __init__(self, minutes: float, clock: Clock = time.monotonic) -> None:
        self.clock = clock
        self.deadline = clock() + 60 * minutes
        self._guessed = self._spent = 0.0

    @property
    def left(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline - self.clock()

    @property
    def pace(self) -> float:
        """Seconds spent for each second guessed, 30 s added to both so that no single small job decides."""
        return (self._spent + 30) / (self._guessed + 30)

    def learn(self, guessed: float, spent: float) -> None:
        """What a job was guessed to take, and took."""
        self._guessed += guessed
        self._spent += spent


def carry_out(jobs: list[Job], report: Report, path: Path, budget: Budget, say: Callable[[str], None]) -> None:
    """Runs the jobs in order; the report grows and is written to `path` after each group of rows.

    A job that raises is named in report.dropped, as is one that there is no time for, and the others go on.
    """
    for job in jobs:
        if job.seconds * budget.pace > budget.left:
            report.dropped.append(job.name)
            say(f"dropped, {max(budget.left, 0):.0f} s left: {job.name}")
            continue
        say(f"[{max(budget.left, 0):.0f} s left] {job.name}")
        started = budget.clock()
        try:
            for rows in job.run():
                report.rows += rows
                report.write(path)
                if budget.left < 0:
                    report.dropped.append(f"{job.name}: from here on")
                    break
        except Exception as error:  # one broken part must not cost the rest of a borrowed hour
            report.dropped.append(f"{job.name}: {why(error)}")
            say(f"failed: {job.name}: {why(error)}")
        budget.learn(job.seconds, budget.clock() - started)
    report.write(path)


def _compile_case(name: str, dtype: torch.dtype, index: int, arch: int) -> int:
    """Compiles what one case launches into Triton's cache on disk; what fails there will fail where it can be said."""
    spec, done = all_specs()[name], 0
    for launch in unique(launches(spec, [(spec.cases + spec.bench_cases)[index]], dtype, arch)):
        try:
            compile_launch(launch, arch)
            done += 1
        except Exception:
            continue
    return done


def compile_all(arch: int, dtypes: list[torch.dtype], budget: Budget, share: float = 0.25) -> tuple[int, int]:
    """Fills Triton's cache on all cores, the shapes of the benchmarks first -> (cases done, cases in all).

    The check compiles hundreds of kernels one after the other where it finds none. Stops after `share` of the budget.
    """
    jobs = [
        (name, dtype, index, arch)
        for dtype in dtypes
        for name, spec in all_specs().items()
        for index in reversed(range(len(spec.cases) + len(spec.bench_cases)))
    ]
    end = budget.clock() + share * budget.left
    pool = concurrent.futures.ProcessPoolExecutor(
        min(16, os.cpu_count() or 1), mp_context=multiprocessing.get_context("spawn")
    )
    futures = [pool.submit(_compile_case, *job) for job in jobs]
    done, _ = concurrent.futures.wait(futures, timeout=max(0.0, end - budget.clock()))
    pool.shutdown(wait=False, cancel_futures=True)
    return len(done), len(jobs)


def everything(
    device: torch.device, report: Report, out: Path, budget: Budget, say: Callable[[str], None]
) -> kernels_command.Verdict:
    """Proof, then measurements, into out/check.json and out/report.json."""
    say("\n".join(kernels_command.describe()))
    done, cases = compile_all(arch_of(device), DTYPES, budget)
    say(f"compiled what {done} of {cases} cases launch; {budget.left:.0f} s left")
    end = budget.clock() + PROOF_SHARE * budget.left
    verdict = kernels_command.check(list(all_specs()), DTYPES, device, over=lambda: budget.clock() > end)
    (out / "check.json").write_text(json.dumps(verdict.as_dict(), indent=1) + "\n")
    shown = verdict.failures[:20]
    say("\n".join([*verdict.table(), *(f"FAILED {line}" for line in shown), verdict.line()]))
    report.method["check"] = verdict.line()
    roofs = roofline.measure(device, DTYPES)
    report.method |= {"roofs": roofs.as_dict(), "peers": peers.NOTES}
    carry_out(plan(device, verdict, roofs, report.missing), report, out / "report.json", budget, say)
    return verdict


def plan(
    device: torch.device, verdict: kernels_command.Verdict, roofs: roofline.Roofs, missing: dict[str, str]
) -> list[Job]:
    """The measurements, the most telling first: what is dropped is dropped from the end."""
    proven = {(row.kernel, row.case_dtype) for row in verdict.rows} - verdict.red

    def gate(spec: KernelSpec, dtype: torch.dtype) -> str:
        if (spec.name, dtype) in verdict.red:
            return "not timed: its proof failed (check.json)"
        return "" if (spec.name, dtype) in proven else kernels.red(spec, dtype, device)

    def kernel(name: str, dtype: torch.dtype, *, quick: bool) -> Job:
        def run() -> Iterator[list[Row]]:
            yield from kernels.run(
                device, [dtype], [name], missing, roofs, seconds=0.15, quick=quick, gate=gate, skip_first=not quick
            )

        what = "first case" if quick else "other cases"
        return Job(f"{name} {dtype_name(dtype)}, {what}", 20, run)

    def train(batch: int, providers: list[str], guess: float) -> Job:
        def run() -> Iterator[list[Row]]:
            config = ("gpt2", [batch], 1024, torch.bfloat16)
            yield from train_step.run(device, *config, missing, providers=providers, seconds=2.0)

        return Job(f"training gpt2, batch {batch}: {', '.join(providers)}", guess, run)

    def write(batch: int) -> Job:
        def run() -> Iterator[list[Row]]:
            yield from generate.run(device, "gpt2", [batch], 512, 64, torch.bfloat16, missing, seconds=1.5)

        return Job(f"generation gpt2, batch {batch}", 20, run)

    names = list(all_specs())
    core = ["eager", "compile", "triton", "triton+graph", "trainer", "hf"]
    everyone = [name for name in train_step.PROVIDERS if name != "nanogpt"]
    return [
        train(64, core, 60),
        *(kernel(name, torch.bfloat16, quick=True) for name in names),
        write(1),
        train(4, core, 40),
        *(write(batch) for batch in (64, 8)),
        train(16, everyone, 80),
        *(kernel(name, torch.bfloat16, quick=False) for name in names),
        *(kernel(name, dtype, quick=True) for dtype in (torch.float16, torch.float32) for name in names),
        train(32, core, 40),
    ]


def summary(report: Report, verdict: kernels_command.Verdict, most: int = 55) -> list[str]:
    """What a reader of a terminal wants last: the verdict, ours beside the best of the others, what was left out."""
    lines = [verdict.line(), ""]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in report.rows:
        if row.seconds and row.provider != CONTROL and row.clock != "graph":
            groups.setdefault((row.kind, row.group), []).append(row)
    for (kind, group), rows in groups.items():
        own = min((r for r in rows if r.provider.startswith("triton")), key=Row.ms, default=None)
        others = min((r for r in rows if not r.provider.startswith(("triton", "+"))), key=Row.ms, default=None)
        if own is None:
            continue
        line = f"{kind:<9}{group:<60} {own.provider:<13}{own.ms():9.3f} ms"
        if others is not None:
            line += f"  best other {others.provider} {others.ms():.3f} ms, {others.ms() / own.ms():.2f} x ours"
        lines.append(line)
    dropped = [f"left out: {name}" for name in report.dropped] + [
        f"not here: {name}: {why_not}" for name, why_not in report.missing.items()
    ]
    room = most - len(lines)
    more = ["... and more in report.md"] if len(dropped) > room else []
    return [*lines[:most], "", *dropped[: max(0, room - len(more))], *more]
