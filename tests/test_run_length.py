"""--minutes and --until-loss: when a run ends."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trainer import ROOT, SMALL, call, losses, made_once, other_lr, refused, rows, snapshot, state

import model.training.log
import model.training.step
import train
from model import checkpoint
from model.training import options
from model.training.deadline import steps_that_fit
from model.training.options import preset


@pytest.fixture
def ticking(monkeypatch) -> dict[str, Any]:
    """A clock of the run's log: a step takes 1 s, an evaluation 5 s, a checkpoint 2 s. The values may be changed, also
    into functions of the time."""
    takes: dict[str, Any]
    takes, now = {"step": 1.0, "evaluation": 5.0, "checkpoint": 2.0}, [0.0]
    monkeypatch.setattr(model.training.log, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(owner, name, what):
        work = getattr(owner, name)

        def wrapped(*args, **kwargs):
            now[0] += takes[what](now[0]) if callable(takes[what]) else takes[what]
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    slow(model.training.step.Step, "__call__", "step")
    slow(train, "evaluate", "evaluation")
    slow(checkpoint, "save", "checkpoint")
    return takes


def test_minutes_choose_the_steps_and_store_them(here, capsys, ticking):
    """Chosen at step 15, after 29 s: of 118.8 s, 89.8 are left for 47 steps, 5 evaluations and 5 checkpoints."""
    assert call(*SMALL, "--minutes", 2) == 0
    folder = here / "runs/tiny"
    assert "62 steps fit into 2 minutes: 1000.0 ms each, 5.0 s an evaluation, 2.0 s a checkpoint\n" in (
        out := capsys.readouterr().out
    )
    assert "step 00010 | loss " in out and "step 00062/00062 | validation loss" in out
    assert out.count("\n62 steps in 1:58; ") == 1
    cfg, found = options.stored_config(folder), rows(folder)
    assert (cfg.steps, cfg.minutes) == (62, 2.0) and {steps for _, steps in cfg.plan} == {62}
    assert [row["step"] for row in found if row["val_loss"]] == [10, 15, 20, 30, 40, 50, 60, 62]
    assert found[-1]["elapsed_s"] == 118.0 and checkpoint.load(folder).state["elapsed_s"] == 111.0
    rates = [row["lr"] for row in found if row["lr"] is not None and row["step"] > 2]
    assert rates == sorted(rates, reverse=True) and rates[1] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3, rel=0.01)
    capsys.readouterr()
    assert call("--resume", "runs/tiny") == 0
    assert capsys.readouterr().out.endswith(
        "is finished after 62 steps; for more: python train.py --resume runs/tiny --steps 124\n"
    )


def test_resume_with_minutes_is_bitwise_equal(here, monkeypatch, ticking):
    """And so is a run with --steps, where the warm-up was not over when they were chosen and the speed was constant;
    and one by an older version, which stored no plan."""
    flags = [*SMALL, "--warmup-steps", 15]
    assert call(*flags, "--minutes", 2, "--out", "straight") == 0
    for stop, steps in ((8, 0), (33, 62)):
        out = f"stopped-{stop}"
        with monkeypatch.context() as patch:
            other_lr(patch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert call(*flags, "--minutes", 2, "--out", out, "--or-resume") == 143
        assert options.stored_config(here / out).steps == steps
        assert "finished" not in (here / out / "report.html").read_text().split("</header>")[0]
        path = here / out / "config.json"
        older = json.loads(path.read_text())
        assert bool(older["train"].pop("plan")) == (stop == 33)
        path.write_text(json.dumps(older))
        assert call(*flags, "--minutes", 2, "--out", out, "--or-resume") == 0
    assert state(here / "stopped-33", 62) == state(here / "straight", 62)
    both = [{row[:4:3]: row for row in losses(here / out) if row[0] % 5 == 0} for out in ("stopped-33", "straight")]
    assert both[0] == both[1]  # further rows are of steps at which it was planned anew
    assert call(*flags, "--steps", 62, "--out", "steps") == 0
    assert state(here / "steps", 62) == state(here / "straight", 62)
    assert options.stored_config(here / "stopped-8").steps == rows(here / "stopped-8")[-1]["step"] > 50


@pytest.mark.parametrize(("slow_from", "last"), [(1, 6), (59, 61)], ids=["before the first plan", "after the last"])
def test_deadline_ends_a_run_that_became_slower(here, capsys, monkeypatch, ticking, slow_from, last):
    other_lr(monkeypatch, slow_from, lambda: ticking.update(step=20.0 if last == 6 else 2.0))
    assert call(*SMALL, "--minutes", 2) == 0
    folder, of = here / "runs/tiny", "" if last == 6 else " of 62"
    assert f"2 minutes are over: the run ends at step {last}{of}\n" in capsys.readouterr().out
    assert options.stored_config(folder).steps == last == rows(folder)[-1]["step"]
    assert rows(folder)[-1]["val_loss"] and (folder / "sample.txt").exists()
    assert rows(folder)[-1]["elapsed_s"] <= 127  # the first evaluation was not foreseen, and a step is not
    assert call("--resume", "runs/tiny") == 0 and "is finished after" in capsys.readouterr().out


SPEEDS = {  # seconds of a step at a time, of 120 s
    "constant": lambda now: 1.0,
    "slow start": lambda now: 2.0 if now < 24 else 1.0,
    "faster midway": lambda now: 2.0 if now < 60 else 1.0,
    "slower midway": lambda now: 1.0 if now < 60 else 2.0,
    "slow end": lambda now: 1.0 if now < 110 else 2.0,  # after the last plan
    "bursts": lambda now: 3.0 if now % 30 < 8 else 1.0,
}


@pytest.mark.parametrize("speed", SPEEDS)
def test_minutes_are_used_whatever_the_speed(here, capsys, ticking, speed):
    ticking |= {"step": SPEEDS[speed], "evaluation": 1.0, "checkpoint": 0.5}
    assert call(*SMALL, "--minutes", 2, "--eval-every", 50, "--save-every", 50, "--log-every", 1, "--out", "run") == 0
    cfg, found = options.stored_config(here / "run"), rows(here / "run")
    assert 0.92 * 120 < found[-1]["elapsed_s"] <= 120 + 2  # the step that crosses it
    assert cfg.steps == found[-1]["step"] and [at for at, _ in cfg.plan] == sorted({at for at, _ in cfg.plan})
    rates = [row["lr"] for row in found if row["lr"] is not None and row["step"] > 2]
    falls = [before - after for before, after in itertools.pairwise(rates)]
    assert min(falls) >= 0 and max(falls) < 4e-4  # of 9e-3: it never jumps
    assert rates[-1] < 1e-3 * (1.2 if speed == "slow end" else 1.02)
    is_known_at_first = speed in ("constant", "slow end")
    planned = len(set(dict(cfg.plan).values()))
    assert ("steps fit into 2 minutes now, not" in capsys.readouterr().out) == (planned > 1) == (not is_known_at_first)


def repeated(here: Path, folder: Path) -> Path:
    """A run without a stop and without a clock, by the plan that `folder` has recorded."""
    cfg = options.stored_config(folder)
    (here / "again.toml").write_text(f"preset = 'tiny'\nplan = {list(map(list, cfg.plan))}\nsteps = {cfg.steps}\n")
    assert call(*SMALL, "--preset", "again.toml", "--out", "again") == 0
    return here / "again"


@pytest.mark.parametrize(("crash", "resume_at", "pace"), [(0, 0, 1.0), (36, 30, 1.5), (36, 10, 4.0)])
def test_resumed_run_keeps_the_plan(here, monkeypatch, ticking, crash, resume_at, pace):
    """It crashes after the machine became faster, and resumes before the steps of its last plans; the machine is slow
    again, once so slow that the time for another plan comes before them. What it computes depends on the plan alone."""

    def fail():
        raise SystemExit("crashed")

    ticking["step"] = lambda now: 2.0 if now < 60 else 1.0
    if crash:
        with monkeypatch.context() as patch:
            other_lr(patch, crash, fail)
            assert call(*SMALL, "--minutes", 2, "--keep-last", 9, "--out", "run") == "crashed"
        before = options.stored_config(here / "run").plan
        assert before[-1][0] > resume_at and before[-1][1] > before[0][1]
        ticking["step"] = pace
        assert call("--resume", "run", "--checkpoint", f"step-{resume_at:08d}") == 0
        plan = options.stored_config(here / "run").plan
        assert plan[: len(before)] == before and list(plan) == sorted(plan)
    else:
        assert call(*SMALL, "--minutes", 2, "--out", "run") == 0
    steps = options.stored_config(here / "run").steps
    again = repeated(here, here / "run")
    assert state(here / "run", steps) == state(again, steps)


def test_damaged_plan_is_refused(here, capsys):
    (here / "bad.toml").write_text("preset = 'tiny'\nplan = [[1, 2, 3]]\n")
    refused(here, capsys, [*SMALL, "--preset", "bad.toml"], "bad.toml: plan must be pairs of steps, got [[1, 2, 3]]")


def test_more_steps_take_the_place_of_minutes(here, ticking):
    assert call(*SMALL, "--minutes", 1) == 0
    steps = options.stored_config(here / "runs/tiny").steps
    assert call("--resume", "runs/tiny", "--steps", steps + 5) == 0
    cfg = options.stored_config(here / "runs/tiny")
    assert (cfg.steps, cfg.minutes, cfg.plan) == (steps + 5, 0.0, ()) and rows(here / "runs/tiny")[-1]["elapsed_s"] > 60


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_rate_stays_at_its_peak_until_steps_are_chosen(schedule):
    cfg = replace(preset("tiny"), schedule=schedule, minutes=1.0, steps=0)
    assert [cfg.lr_at(step) for step in (101, 10**6)] == [pytest.approx(cfg.lr)] * 2 and cfg.lr_at(50) < cfg.lr
    assert cfg.lr_at(50) == replace(cfg, steps=1000).lr_at(50)


@pytest.mark.parametrize("done", [0, 7, 20])
@pytest.mark.parametrize(("eval_every", "save_every"), [(10, 10), (10, 4), (3, 25), (1000, 1000)])
def test_steps_that_fit_are_as_many_as_can_be(done, eval_every, save_every):
    def seconds(steps):
        time = 0.0
        for step in range(done + 1, steps + 1):
            evaluates = step % eval_every == 0 or step == steps
            time += 1.0 + 5.0 * evaluates + 2.0 * (evaluates or step % save_every == 0)
        return time

    for budget in range(0, 300, 7):
        steps = steps_that_fit(
            budget, done, step_s=1.0, eval_s=5.0, save_s=2.0, eval_every=eval_every, save_every=save_every
        )
        assert steps >= done and (steps == done or seconds(steps) <= budget)
        assert seconds(steps + 1) > budget - 2.0  # a checkpoint in the last step counts twice at most


@pytest.fixture(scope="module")
def until(tmp_path_factory) -> Callable[..., tuple[Path, float]]:
    """A run of 40 steps, and its validation loss at step 20."""

    @functools.cache
    def straight(*flags) -> tuple[Path, float]:
        run = made_once(tmp_path_factory, *flags, "--steps", 40)
        found = {row["step"]: row["val_loss"] for row in rows(run) if row["val_loss"]}
        assert found[10] > found[20] > found[30]
        return run, found[20]

    return straight


@pytest.mark.parametrize("flags", [[], ["--save-every", 1000], ["--ema", 0.9]], ids=["", "unsaved", "ema"])
def test_until_loss_ends_at_the_first_low_evaluation(until, here, capsys, flags):
    straight, loss = until(*flags)
    command = [*SMALL, *flags, "--steps", 40, "--out", "run"]
    capsys.readouterr()
    assert call(*command, "--until-loss", loss) == 0
    out = capsys.readouterr().out
    assert re.search(rf"step 00020/00040 \| validation loss {loss:.4f} \* \| reached {loss:g} after 0:0\d\n", out)
    assert re.search(rf"20 steps in 0:0\d to a validation loss of at most {loss:g}; the text above is by the best", out)
    assert losses(here / "run") == [row for row in losses(straight) if row[0] <= 20]
    assert [row["step"] for row in rows(here / "run") if row["reached"]] == [20] and rows(here / "run")[-1][
        "reached"
    ] == loss
    assert (here / "run/sample.txt").exists() and options.stored_config(here / "run").steps == 40
    page = (here / "run/report.html").read_text()
    assert (
        "finished, step 20 of 40." in page and f"to a validation loss of {loss:g}, at step 20, on 1,280 tokens" in page
    )

    before = snapshot(here / "run")
    assert call("--resume", "run") == 0
    assert snapshot(here / "run") == before
    assert capsys.readouterr().out == (
        f"run is finished after 20 steps with a validation loss of {loss:.4f}; "
        "for more: python train.py --resume run --until-loss 0\n"
    )
    assert call("--resume", "run", "--until-loss", 0) == 0
    assert losses(here / "run") == losses(straight) and state(here / "run", 40) == state(straight, 40)


def test_killed_before_the_sample_at_the_loss_writes_it(until, here):
    _, loss = until()
    assert call(*SMALL, "--steps", 40, "--out", "run", "--until-loss", loss) == 0
    (here / "run/sample.txt").unlink()
    assert call("--resume", "run") == 0
    assert rows(here / "run")[-1]["step"] == 20 and (here / "run/sample.txt").exists()


def test_first_of_minutes_and_loss_ends_the_run(until, here, capsys, ticking):
    _, loss = until()
    assert call(*SMALL, "--minutes", 2, "--until-loss", loss, "--out", "loss") == 0
    assert rows(here / "loss")[-1]["step"] <= 20 and rows(here / "loss")[-1]["reached"] == loss
    assert call(*SMALL, "--minutes", 1, "--until-loss", 0.01, "--out", "time") == 0
    assert rows(here / "time")[-1]["elapsed_s"] <= 60 and rows(here / "time")[-1]["reached"] is None


@pytest.mark.slow
def test_two_processes_end_together(until, here):
    """--minutes by the real clock: what is chosen depends on it, but both processes must choose the same."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _, loss = until("--dropout", 0)
    for out, flags in (("a", ["--minutes", 0.1]), ("b", ["--steps", 40, "--until-loss", loss + 1e-3])):
        argv = [*command, ROOT / "train.py", *SMALL, "--dropout", 0, *flags, "--out", out]
        done = subprocess.run([str(arg) for arg in argv], cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert options.stored_config(here / "a").steps == rows(here / "a")[-1]["step"] > 0
    assert rows(here / "b")[-1]["step"] == 20 and rows(here / "b")[-1]["reached"]
