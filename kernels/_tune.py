"""The measurement of `python -m kernels tune`: the launch options of every kernel that declares a space, on this GPU.

A candidate takes the place of the default of its kernel and key only if it

    compiles without a problem, and issues at most 1.25 times the instructions of the best (kernels/_machine_code.py)
    is right by the tolerance rule (kernels/_proof.py), and gives the default's results bit for bit, unless any bits do
    beats the default by 3 % in 80 % of the rounds, in which all candidates take turns

What is timed is the pass of the operator in which the kernel runs, in a CUDA graph of about twenty calls on three sets
of inputs in turn, or as many as the L2 cache does not hold: what other launches, sums and allocations an option costs
is part of it. Each entry is written as soon as it is measured: a kill loses the one that was under way.
"""

import concurrent.futures
import contextlib
import itertools
import math
import multiprocessing
import os
import re
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _tables
from ._backend import use_backend
from ._check import progress_bar
from ._compile import few_rows, kernel_name, launches, reason, unique
from ._launch import capturing, on_stream, record_launches
from ._machine import gpu_state
from ._machine_code import read_back
from ._proof import FAMILIES, evaluate, prove_family
from ._registry import Case, KernelSpec, all_specs, case_text
from ._tables import Choice, Options, Table, entry_id, overriding, plain_key, source_hash, surveying

GAIN, ROUNDS_WON = 0.03, 0.8  # of the time, and of the rounds
ISSUE = 1.25  # times the instructions of the best candidate
BEHIND, HEATS = 1.1, 3  # a candidate that takes so much longer than the best after so many rounds leaves
CALLS, SETS, GRAPH_S = 20, 3, 0.02  # in a graph; of inputs; seconds of a graph, where fewer calls take as long
MOST_SETS = 64  # of inputs that the L2 cache could hold
ROUNDS, QUICK_S = {True: 10, False: 30}, 110.0  # seconds to begin a target in
FIRST_PROOF = ("shapes", "repeats", "memory")  # of every candidate; all families of the one that is chosen

Pass = Callable[[], object]


@dataclass(eq=False)
class Candidate:
    """Options for a target. refused: why they are out; seconds: of a call, by round, for each case."""

    options: Options
    refused: str = ""
    stage: str = ""  # "static", "proof", "bits" or "time", where it was refused
    issue: float | None = None
    compile_s: float = 0.0
    same_bits: bool = True
    seconds: list[list[float]] = field(default_factory=list)

    def refuse(self, stage: str, why: str) -> None:
        self.stage, self.refused = stage, why


@dataclass(eq=False)
class Target:
    """A kernel under a key. cases: of the benchmarks that launch it; kind: the first pass in which it runs."""

    op: str
    dtype: torch.dtype
    choice: Choice
    kind: str  # "forward", "forward for training" or "backward"
    candidates: list[Candidate]  # the default first
    cases: list[Case] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.choice.kernel} " + " ".join(f"{k}={v}" for k, v in plain_key(self.choice.key).items())

    def under(self, options: Options) -> contextlib.AbstractContextManager[None]:
        """Inside the block this kernel has these options, and every other one its default."""
        return overriding(lambda choice: options if choice.id == self.choice.id else choice.default)

    def left(self) -> list[Candidate]:
        return [c for c in self.candidates if not c.refused]


def passes(spec: KernelSpec, inputs: dict[str, Any]) -> dict[str, Pass]:
    """The three ways in which an operator runs. The backward pass is that of a forward pass made at its first call."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in spec.grads if inputs[name] is not None}
    made: list[Any] = []

    def forward() -> Any:
        with use_backend("triton"):
            outputs = spec.fn(**{**inputs, **leaves})
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward() -> object:
        if not made:
            outputs = forward()
            made.append((outputs, [torch.ones_like(y) for y in outputs]))
        outputs, incoming = made[0]
        return torch.autograd.grad(outputs, [*leaves.values()], incoming, retain_graph=True)

    ways: dict[str, Pass] = {"forward": torch.no_grad()(forward)}
    return ways | ({"forward for training": forward, "backward": backward} if leaves else {})


def survey(ops: Sequence[str], dtypes: Sequence[torch.dtype], arch: int, sms: int, *, quick: bool) -> list[Target]:
    """What the benchmarks' cases launch by a table, with its candidates; nothing runs.

    quick: on the first case of each, and only candidates that differ from the default in one option.
    """
    found: dict[str, Target] = {}
    for op, dtype in itertools.product(ops, dtypes):
        spec = all_specs()[op]
        for case in spec.bench_cases:
            seen: dict[str, tuple[Choice, str]] = {}
            with record_launches(arch, sms):
                for kind, run in passes(spec, spec.inputs(few_rows(case), dtype, torch.device("cpu"))).items():
                    with surveying() as choices:
                        run()
                    seen = {**{choice.id: (choice, kind) for choice in choices}, **seen}
            for name, (choice, kind) in seen.items():
                target = found.setdefault(name, Target(op, dtype, choice, kind, _candidates(choice, quick)))
                target.cases += [] if target.op != op or (quick and target.cases) else [case]
    return [target for target in found.values() if len(target.candidates) > 1]


def _candidates(choice: Choice, quick: bool) -> list[Candidate]:
    """The default, and then all other combinations of the space; quick: those that differ from it in one option."""
    names = [name for name in choice.space if name in choice.default]
    combinations = itertools.product(*(choice.space[name] for name in names))
    options = [choice.default, *({**choice.default, **dict(zip(names, c, strict=True))} for c in combinations)]
    distinct = [o for i, o in enumerate(options) if o not in options[:i]]
    return [Candidate(o) for o in distinct if not quick or sum(o[n] != choice.default[n] for n in names) <= 1]


# --- what compiled code says -----------------------------------------------------------------------------------------


def compile_candidate(
    op: str, case: Case, dtype: torch.dtype, choice: Choice, options: Options, arch: int, sms: int
) -> tuple[str, float | None, float]:
    """Compile a candidate in this process -> (what is wrong with it, instructions to issue, seconds)."""
    started, issues, problem = time.perf_counter(), [], ""
    try:
        with overriding(lambda other: options if other.id == choice.id else other.default):
            recorded = launches(all_specs()[op], [case], dtype, arch, sms)
        for launch in unique((x for x in recorded if kernel_name(x) == choice.kernel), arch):
            row = read_back(launch, dtype, arch)
            issues.append(row.issue)
            problem = problem or row.problem
    except Exception as error:  # an operator may refuse options
        problem = reason(error)
    known = [issue for issue in issues if issue is not None]
    return problem, sum(known) if known and len(known) == len(issues) else None, time.perf_counter() - started


@contextlib.contextmanager
def compiling(targets: Sequence[Target], arch: int, sms: int) -> Iterator[Callable[[Target], None]]:
    """Compile the candidates of all targets on all cores, in order; the function yielded waits for those of a target,
    and refuses the ones with a problem."""
    pool = concurrent.futures.ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the children inherit: Ctrl-C is for this process
    futures = {
        c: pool.submit(compile_candidate, t.op, t.cases[0], t.dtype, t.choice, c.options, arch, sms)
        for t in targets
        for c in t.candidates
    }
    signal.signal(signal.SIGINT, before)

    def wait(target: Target) -> None:
        for candidate in target.candidates:
            problem, candidate.issue, candidate.compile_s = futures[candidate].result()
            if problem and candidate is not target.candidates[0]:
                candidate.refuse("static", problem)
        prune(target)

    try:
        yield wait
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def prune(target: Target) -> None:
    """Refuse the candidates that issue far more instructions than the best one; never the default."""
    best = min((c.issue for c in target.left() if c.issue is not None), default=math.inf)
    for candidate in target.left()[1:]:
        if candidate.issue is not None and candidate.issue > ISSUE * best:
            candidate.refuse("static", f"issues {candidate.issue / best:.2f} times the instructions of the best")


# --- what this GPU says ----------------------------------------------------------------------------------------------


class Machine:
    """What tuning asks of a GPU. Tests bring one of their own."""

    compiling = staticmethod(compiling)
    clock = staticmethod(time.monotonic)

    def __init__(self, device: torch.device) -> None:
        self.device, self.gpu = device, _tables.gpu_of(device)
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.start, self.stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def state(self) -> dict[str, float]:
        return gpu_state(self.device)

    def check(self) -> None:
        """torch.AcceleratorError where the GPU is lost to this process, as after an illegal memory access."""
        torch.cuda.synchronize(self.device)

    def sampler(self, calls: Sequence[Pass], options: Options) -> Callable[[], float]:
        """A function that gives the seconds of one call, from a graph of many, on the inputs in turn."""
        with on_stream(self.stream):  # where a backward pass is captured its forward pass must have run
            for call in calls:
                call()
            self.start.record()
            for call in calls:
                call()
            self.stop.record()
        self.stop.synchronize()
        each = self.start.elapsed_time(self.stop) / 1e3 / len(calls)
        n = max(len(calls), min(CALLS, math.ceil(GRAPH_S / max(each, 1e-6))))
        graph = torch.cuda.CUDAGraph()
        with capturing(graph, self.stream, pool=self.pool):
            for _, call in zip(range(n), itertools.cycle(calls), strict=False):
                call()

        def sample() -> float:
            self.start.record()
            graph.replay()
            self.stop.record()
            self.stop.synchronize()
            return self.start.elapsed_time(self.stop) / 1e3 / n

        sample()
        return sample


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN here, and 0 is not -0."""
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def _small_cases(case: Case) -> list[Case]:
    """A case at few rows, and with a ragged end."""
    few = few_rows(case)
    ragged = {**few, **{name: few[name] - 1 for name in ("M", "T") if few.get(name, 1) > 1}}
    return [few] if ragged == few else [few, ragged]


def prove_candidates(target: Target, machine: Machine, *, any_bits: bool) -> None:
    """Refuse what is wrong by the tolerance rule, and, unless any bits will do, what differs from the default."""
    spec, cases = all_specs()[target.op], _small_cases(target.cases[0])
    drawn = [spec.inputs(case, target.dtype, machine.device) for case in (*cases, target.cases[0])]

    def results(options: Options) -> list[dict[str, Tensor]]:
        """Those of a pass without gradients, and those of one with: at few rows, and at the size that is timed."""
        found = []
        with target.under(options):
            for inputs in drawn:
                found.append(evaluate(spec, inputs, None, "triton"))
                found.append(evaluate(spec, inputs, {name: y.sin() for name, y in found[-1].items()}, "triton"))
        return found

    expected = results(target.candidates[0].options)  # first: what does not compile later is a candidate's own fault
    for candidate in target.left()[1:]:
        try:
            wrong = _wrong(target, candidate, cases, machine, FIRST_PROOF)
            pairs = () if wrong else zip(results(candidate.options), expected, strict=True)
            candidate.same_bits = all(_same_bits(got[name], own[name]) for got, own in pairs for name in own)
        except Exception as error:
            wrong = reason(error)
        machine.check()
        if wrong:
            candidate.refuse("proof", wrong)
        elif not (candidate.same_bits or any_bits):
            candidate.refuse("bits", "other bits than the default's: --any-bits allows them")


def _wrong(
    target: Target, candidate: Candidate, cases: Sequence[Case], machine: Machine, families: Sequence[str]
) -> str:
    """Which result a candidate gets wrong by the tolerance rule, or ""."""
    spec = all_specs()[target.op]
    with target.under(candidate.options):
        for family, case in itertools.product(families, cases):
            for row in prove_family(family, spec, case, target.dtype, machine.device):
                if not row.passed:
                    what = f"{row.name} is off by {row.error:.3g}, allowed {row.allowed:.3g}"
                    return f"{what}: {family} {case_text(row.case)}"
    return ""


def race(target: Target, machine: Machine, rounds: int) -> None:
    """Time all that are left in turn; those far behind after a few rounds leave."""
    spec, racers = all_specs()[target.op], target.left()
    for case in target.cases:
        drawn = spec.inputs(case, target.dtype, machine.device)
        size = sum(v.nbytes for v in drawn.values() if isinstance(v, Tensor))
        n = min(MOST_SETS, max(SETS, math.ceil(2 * machine.cache_bytes / max(size, 1))))
        sets = [{k: v.clone() if isinstance(v, Tensor) else v for k, v in drawn.items()} for _ in range(n)]
        calls = [passes(spec, inputs)[target.kind] for inputs in sets]
        ready: dict[Candidate, Callable[[], float]] = {}
        for candidate in racers:
            try:
                with target.under(candidate.options):
                    ready[candidate] = machine.sampler(calls, candidate.options)
                candidate.seconds.append([])
            except Exception as error:
                machine.check()
                if candidate is racers[0]:
                    raise
                candidate.refuse("time", reason(error))
        racers = [c for c in racers if c in ready]
        for i in range(rounds):
            for candidate in racers[i % len(racers) :] + racers[: i % len(racers)]:  # each has each place in the round
                candidate.seconds[-1].append(ready[candidate]())
            if i + 1 == HEATS:
                best = min(statistics.median(c.seconds[-1]) for c in racers)
                for candidate in racers[1:]:
                    if statistics.median(candidate.seconds[-1]) > BEHIND * best:
                        candidate.refuse("time", "far behind after a few rounds")
                racers = [c for c in racers if not c.refused]


def gain(candidate: Candidate, default: Candidate) -> float:
    """How much of the default's time a candidate saves, the mean over the cases; 0 unless it clearly beats it."""
    cases = list(zip(candidate.seconds, default.seconds, strict=True))
    won = [mine <= (1 - GAIN) * its for case in cases for mine, its in zip(*case, strict=True)]
    if sum(won) < ROUNDS_WON * len(won):
        return 0.0
    return 1.0 - statistics.mean(statistics.median(mine) / statistics.median(its) for mine, its in cases)


def measure(target: Target, machine: Machine, *, rounds: int, any_bits: bool) -> dict[str, Any]:
    """Prove and time what static pruning has left of a target -> its entry of the table."""
    before, default, choice = machine.state(), target.candidates[0], target.choice
    chosen, saved = default, 0.0
    if len(target.left()) > 1:
        prove_candidates(target, machine, any_bits=any_bits)
    if len(target.left()) > 1:
        race(target, machine, rounds)
    for candidate in sorted(target.left()[1:], key=lambda c: -gain(c, default)):
        if gain(candidate, default) > 0:
            wrong = _wrong(target, candidate, _small_cases(target.cases[0]), machine, tuple(FAMILIES))
            if not wrong:
                chosen, saved = candidate, gain(candidate, default)
                break
            candidate.refuse("proof", wrong)
    return {
        "kernel": choice.kernel, "key": plain_key(choice.key), "source": source_hash(choice.kernel),
        "default": default.options, "chosen": chosen.options, "gain": round(saved, 4), "same_bits": chosen.same_bits,
        "pass": target.kind, "cases": [case_text(case) for case in target.cases],
        "state": {"before": before, "after": machine.state()},
        "candidates": [
            {"options": c.options, "refused": c.refused, "seconds": [[float(f"{s:.5g}") for s in r] for r in c.seconds]}
            for c in target.candidates
        ],
    }  # fmt: skip


def summary(target: Target, entry: dict[str, Any]) -> str:
    """A target's result in one line."""
    out = {stage: sum(c.stage == stage for c in target.candidates) for stage in ("static", "proof", "bits")}
    words = {"static": "by compiled code", "proof": "wrong", "bits": "of other bits"}
    parts = [f"{n} out {words[stage]}" if stage == "static" else f"{n} {words[stage]}" for stage, n in out.items() if n]
    changed = [f"{k}={v}" for k, v in entry["chosen"].items() if v != entry["default"][k]]
    result = f"{' '.join(changed)}, {entry['gain']:.1%} faster" if changed else "the default stays"
    return f"{target.name}: {result} ({', '.join([f'{len(target.candidates)} candidates', *parts])})"


@dataclass
class Tuned:
    """table: what was found, with what the file held before; skipped: what there was no time for."""

    table: Table
    measured: int = 0
    skipped: list[str] = field(default_factory=list)
    problem: str = ""  # why it ended early
    hash: str | None = None  # of the tables that are in force from here on

    def report(self) -> list[str]:
        """What was done, and what was not, in a few lines."""
        lines = [f"no time for {', '.join(self.skipped)}: omit --quick"] if self.skipped else []
        ended = f"{self.problem}; " if self.problem else ""
        return [*lines, f"{ended}{self.measured} measured and kept in {self.table.path}"]


def tune(
    machine: Machine,
    targets: Sequence[Target],
    path: Path,
    *,
    quick: bool = False,
    any_bits: bool = False,
    seconds: float | None = None,
    say: Callable[[str], None] = print,
) -> Tuned:
    """Measure targets in order, and write the table after each one. Ctrl-C ends it early, and so do `seconds`, of which
    a quick one has QUICK_S by default.

    RuntimeError inside the capture of a CUDA graph; OSError, before any measurement, where the file cannot be written.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("kernels cannot be tuned while a CUDA graph is captured")
    try:
        table = _tables.read(path, machine.gpu)
    except ValueError:  # of another GPU, or damaged: it counts for nothing
        table = None
    result = Tuned(table or Table(str(path), machine.gpu))
    _tables.write(result.table, torch=torch.__version__)
    end = machine.clock() + (seconds or (QUICK_S if quick else math.inf))
    total = sum(len(target.candidates) for target in targets)
    try:
        with machine.compiling(targets, machine.gpu.arch, machine.gpu.sms) as wait, progress_bar(total) as advance:
            for i, target in enumerate(targets):
                if machine.clock() > end:
                    result.skipped = [t.name for t in targets[i:]]
                    break
                advance(0, target.name)
                try:
                    wait(target)
                    entry = measure(target, machine, rounds=ROUNDS[quick], any_bits=any_bits)
                except Exception as error:  # one kernel must not cost the others
                    say(f"{target.name}: not measured: {reason(error)}")
                    machine.check()
                    continue
                result.table.entries[entry_id(entry["kernel"], entry["key"])] = entry
                _tables.write(result.table, torch=torch.__version__)
                result.measured += 1
                say(summary(target, entry))
                advance(len(target.candidates), "")
    except KeyboardInterrupt:
        result.problem = "interrupted"
    except torch.AcceleratorError as error:
        result.problem = f"the GPU is lost: {reason(error)}: start again, with --op for what is left"
    _tables.use_tables(machine.device)
    result.hash = _tables.launch_tables(machine.device)
    return result


def dry_run(targets: Sequence[Target], arch: int, sms: int) -> None:
    """Say how many candidates compiled code leaves of each target, and what compiling took."""
    left, started = 0, time.perf_counter()
    with compiling(targets, arch, sms) as wait:
        for target in targets:
            wait(target)
            why = Counter(re.sub(r"\d[\d.,]*(?<=\d)", "N", c.refused) for c in target.candidates if c.refused)
            text = "".join(f"; {n} out: {reason}" for reason, n in why.most_common())
            took = sum(c.compile_s for c in target.candidates)
            print(
                f"{target.name}: {len(target.left())} of {len(target.candidates)} left, {took:.0f} s{text}", flush=True
            )
            left += len(target.left())
    candidates = [c for target in targets for c in target.candidates]
    wall, core = time.perf_counter() - started, sum(c.compile_s for c in candidates)
    print(f"sm_{arch}: {left} of {len(candidates)} candidates left, compiled in {wall:.0f} s, {core:.0f} s one by one")
