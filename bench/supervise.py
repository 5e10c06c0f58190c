"""Jobs in a process of their own: one that hangs, dies or loses the GPU costs its own results and no others'.

After an illegal memory access every call of a process to CUDA fails, and a kernel that never ends cannot be stopped
from within. So the jobs run in a child, which sends what it has after each group; where it does not answer or dies, the
next child resumes with the next job.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.timing import error_line

CONTEXT = "spawn"  # a process that has used CUDA cannot be forked
STARTING = 120.0  # seconds that a child may take to import torch and to list its jobs
PATIENCE = 60.0  # seconds beyond a job's cap, or beyond the deadline, after which a child that is silent is stopped

Send = Callable[[tuple[str, Any]], None]


class Budget:
    """So many seconds from now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self.deadline = clock() + seconds

    @property
    def left(self) -> float:
        """Seconds to the deadline; negative after it."""
        return self.deadline - self.clock()

    def part(self, seconds: float) -> Budget:
        """A budget of its own, which ends with this one at the latest."""
        return Budget(min(seconds, self.left), self.clock)


@dataclass(frozen=True)
class Job:
    """A part of the work."""

    name: str
    cap: float  # seconds that it may take; it stops after the group in which it reaches them
    run: Callable[[], Iterator[Any]]  # yields the results of each group


def supervise(make_jobs: Callable[[], list[Job]], budget: Budget, accept: Callable[[Any], None]) -> list[str]:
    """Run jobs in order in child processes, and call accept with each result -> what was dropped, and why.

    A job starts while the budget has its cap left. make_jobs and results are pickled; make_jobs is called in each child
    and gives the same jobs every time.
    """
    context = multiprocessing.get_context(CONTEXT)
    dropped: list[str] = []
    first: int | None = 0
    while first is not None:
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, make_jobs, first, budget))  # type: ignore[attr-defined]
        child.start()
        theirs.close()  # so that the end of the child is the end of the pipe
        try:
            first = _watch(ours, child, budget, accept, dropped)
        finally:
            child.kill()
            child.join()
    return dropped


def _watch(
    connection: Connection, child: Any, budget: Budget, accept: Callable[[Any], None], dropped: list[str]
) -> int | None:
    """Take what a child sends -> the job that the next child starts with, or None after the last one."""
    index, name, limit = None, "the first job", time.monotonic() + STARTING
    while True:
        problem = ""
        if not connection.poll(max(0.0, limit - time.monotonic())):
            child.kill()
            problem = "stopped, as it did not answer"
        else:
            try:
                kind, value = connection.recv()
            except EOFError:
                child.join()
                code = child.exitcode
                ended = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                problem = f"its process ended: {ended}"
        if problem:
            dropped.append(f"{name}: {problem}")
            print(f"failed: {dropped[-1]}", flush=True)
            return None if index is None else index + 1
        if kind == "start":
            index, name, cap = value
            limit = time.monotonic() + min(cap, max(budget.left, 0.0)) + PATIENCE
        elif kind == "result":
            accept(value)
        elif kind == "dropped":
            dropped.append(value)
        elif kind == "lost":
            return value + 1
        else:
            return None


def _child(connection: Connection, make_jobs: Callable[[], list[Job]], first: int, budget: Budget) -> None:
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):  # the parent says what there is to say, or is gone
        work(connection.send, make_jobs(), first, budget)


def work(send: Send, jobs: list[Job], first: int, budget: Budget) -> None:
    """Run the jobs from `first` on, and send what happens: start, result, dropped, lost or end, each with a value."""
    for index, job in enumerate(jobs[first:], first):
        left = f"{max(budget.left, 0):.0f} s left"
        if job.cap > budget.left:
            print(f"dropped, {left}: {job.name}", flush=True)
            send(("dropped", job.name))
            continue
        print(f"[{left}] {job.name}", flush=True)
        send(("start", (index, job.name, job.cap)))
        own = budget.part(job.cap)
        try:
            for result in job.run():
                send(("result", result))
                if own.left < 0:
                    send(("dropped", f"{job.name}: from here on"))
                    break
        except BrokenPipeError:
            raise
        except Exception as error:  # one broken part must not cost the rest of a borrowed hour
            line = f"{job.name}: {error_line(error)}"
            print(f"failed: {line}", flush=True)
            send(("dropped", line))
            del error  # with its traceback, which holds tensors
        gc.collect()
        if _gpu_is_lost():
            return send(("lost", index))
    send(("end", None))


def _gpu_is_lost() -> bool:
    """Whether CUDA fails from now on in this process. Gives memory back where it does not."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return True
    return False
