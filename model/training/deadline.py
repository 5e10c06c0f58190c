"""--minutes: the number of steps that fits into a time, planned by measuring, and a guard for where it does not.

    cost(S) = (S - step) step_s + evaluations eval_s + checkpoints save_s          from `step` to the end of S steps
    steps   = the largest S with elapsed_s + cost(S) <= (1 - MARGIN) seconds, rounded down to three digits

The first plan is made early. Until then the rate is that of the warm-up, and then its peak, from which every schedule
falls. As a machine may be slower or faster later, the run is planned anew after each of SHARES, of the time or of the
steps, by the pace since the plan before; the learning rate then goes through the rest of its schedule in the steps that
are left (`optim.planned`). Every decision is recorded with its step, also that nothing changes, and a resumed run
repeats what is recorded, which depends on steps alone. The time is elapsed_s of the log, over all invocations. If the
machine becomes slower after the last plan, the run ends at the deadline all the same: before its last step, with its
evaluation and its checkpoint in time.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable

from model.training.log import Log
from model.training.options import Plan, TrainConfig
from model.training.parallel import World

WARM_UP_STEPS = 5  # at the beginning of an invocation: they compile, allocate and capture
LEAST_STEPS = 10  # are measured for a plan
SHARES = (0.06, 0.25, 0.5, 0.75, 0.9)  # measured for the first plan, and gone by at each of the others
MARGIN, CHANGE = 0.01, 0.02  # left free, and the smallest change that is worth another number of steps


def steps_that_fit(
    seconds: float, done: int, *, step_s: float, eval_s: float, save_s: float, eval_every: int, save_every: int
) -> int:
    """The largest number of steps that a run can have, `done` of them done, if it is to end in `seconds`.

    step_s, eval_s, save_s: seconds of a step, of an evaluation and of a checkpoint. The last step has both, and an
    evaluation a checkpoint, as if its loss were always the best. At least `done`.
    """
    both = math.lcm(eval_every, save_every)

    def multiples(of: int, steps: int) -> int:
        return steps // of - done // of

    def cost(steps: int) -> float:
        evaluations = multiples(eval_every, steps) + (steps % eval_every > 0)
        checkpoints = evaluations + multiples(save_every, steps) - multiples(both, steps)
        return (steps - done) * step_s + evaluations * eval_s + checkpoints * save_s

    candidates = range(done + 1, done + 2 + int(max(seconds, 0.0) / step_s))
    return done + bisect.bisect_right(candidates, seconds, key=cost)


class Deadline:
    """When a run with --minutes ends. Rank 0 decides: elsewhere `is_over` and `is_due` are always False."""

    def __init__(self, cfg: TrainConfig, world: World, log: Log, done: int) -> None:
        """cfg: the trainer sets it anew with each plan. log: has the clock. done: steps before this invocation."""
        self.cfg, self.elapsed_s, self.show, self.seconds = cfg, log.elapsed_s, log.line.print, 60 * cfg.minutes
        self.decides = cfg.minutes > 0 and world.rank == 0
        self.first_step = done + WARM_UP_STEPS if cfg.minutes > 0 else 0  # the measurement begins at its end
        self.begun: tuple[int, float] | None = None  # the step at whose end it began, and when that was
        self.latest = {"evaluation": 0.0, "checkpoint": 0.0}  # seconds
        self.paused = 0.0  # seconds of all of these since the measurement began

    def timed(self, what: str, work: Callable[[int], None], step: int) -> None:
        """Do work(step), an "evaluation" or a "checkpoint", and keep its time."""
        start = self.elapsed_s()
        work(step)
        self.latest[what] = self.elapsed_s() - start
        self.paused += self.latest[what]

    def begin(self, step: int) -> None:
        """Begin to measure, if `step`, whose results the host has read, is the one to begin at."""
        if step == self.first_step:
            self.begun, self.paused = (step, self.elapsed_s()), 0.0

    def is_due(self, step: int) -> bool:
        """Whether the run is to be planned, or planned anew, at `step`. What has been recorded for later steps holds,
        so that a resumed run does what the first one did."""
        plan = self.cfg.plan
        if not (self.decides and self.begun) or step < self.begun[0] + LEAST_STEPS or len(plan) == len(SHARES):
            return False
        if not plan:
            return self.elapsed_s() - self.begun[1] - self.paused >= SHARES[0] * self.seconds
        if step <= plan[-1][0] or not all(self.latest.values()):  # a resumed run has timed neither at first
            return False
        return max(self.elapsed_s() / self.seconds, step / self.cfg.steps) >= SHARES[len(plan)]

    def is_over(self) -> bool:
        """Whether only an evaluation and a checkpoint fit into what is left."""
        return self.decides and self.elapsed_s() + sum(self.latest.values()) >= self.seconds

    def plan(self, step: int) -> Plan:
        """The plan with what is decided at `step`: after an evaluation and a checkpoint, if it is the first."""
        assert self.begun is not None
        begin, start = self.begun
        now, plan, before = self.elapsed_s(), self.cfg.plan, self.cfg.steps
        step_s = (now - start - self.paused) / (step - begin)
        eval_s, save_s = self.latest["evaluation"], self.latest["checkpoint"]
        steps = steps_that_fit(
            (1 - MARGIN) * self.seconds - now, step, step_s=step_s, eval_s=eval_s, save_s=save_s,
            eval_every=self.cfg.eval_every, save_every=self.cfg.save_every,
        )  # fmt: skip
        steps = max(step + bool(plan), steps - steps % 10 ** max(0, len(str(steps)) - 3))
        self.begun, self.paused = (step, now), 0.0
        each = f"{1e3 * step_s:.1f} ms each, {eval_s:.1f} s an evaluation, {save_s:.1f} s a checkpoint"
        if not plan:
            self.show(f"{steps} steps fit into {self.cfg.minutes:g} minutes: {each}")
        elif abs(steps - before) > CHANGE * before:
            self.show(f"{steps} steps fit into {self.cfg.minutes:g} minutes now, not {before}: {each}")
        else:
            steps = before
        return (*plan, (step, steps))

    def end(self, step: int, steps: int) -> int:
        """Say that the run ends at `step` of `steps`, 0 if they have not been chosen -> `step`."""
        if step != steps:
            of = f" of {steps}" if steps else ""
            self.show(f"{self.cfg.minutes:g} minutes are over: the run ends at step {step}{of}")
        return step
