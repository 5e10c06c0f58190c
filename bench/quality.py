"""Seconds of training to a validation loss, or the loss after some minutes, over several seeds.

    python -m bench quality --until-loss 1.6 --seeds 3 -- --lr 2e-3        # options of train.py follow --
    python -m bench quality --minutes 2 --nanogpt nanoGPT                  # nanoGPT's train.py in turn with ours

A run is a process of its own. Its time is elapsed_s of its metrics: steps, evaluations and checkpoints, from the moment
the model is built to the end of the evaluation; no text is sampled. steps_s is the part of the steps alone. Losses of
different tokenizers compare in bits per byte: a loss to reach is converted for nanoGPT, which trains on characters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import command, peer_models, peer_training, tables
from bench.record import Report, Row
from model.cli import UserError, clock
from model.data import TokenData, load, prepare
from model.evaluate import bits_per_byte
from model.report import history
from model.training.options import stored_config

TRAIN = Path(__file__).parents[1] / "train.py"
METHOD = "seconds of training to the end of the evaluation: steps, evaluations, checkpoints"
SAVING_S = 60.0  # that an interrupted run may take to save
_OWN = ("preset", "data", "until-loss", "minutes", "seed", "out", "resume", "or-resume")  # options of train.py set here


class Failed(Exception):
    """A process has ended with an error. The message is the last of its output."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def lines(argv: list[str], **where: Any) -> Generator[str]:
    """The output of a process, line by line; raises Failed if it fails. Closing the generator ends the process."""
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    tail: deque[str] = deque(maxlen=20)
    with subprocess.Popen(argv, text=True, errors="replace", **streams, **where) as process:
        try:
            for line in process.stdout or ():
                tail.append(line.strip())
                yield tail[-1]
            process.wait()
        finally:
            process.terminate()  # unless it has ended: a run of ours saves first
            process.wait(SAVING_S)
    if process.returncode:
        errors = [i for i, line in enumerate(tail) if line.startswith("error: ")]
        message = [*tail][errors[-1] if errors else -1 :] or ["it failed without a message"]
        raise Failed(process.returncode, "\n".join(message).removeprefix("error: "))


@dataclass(frozen=True)
class Result:
    """An evaluation of a run. seconds: of training up to its end; steps_s: of them, those of steps alone."""

    step: int
    loss: float  # nats per token
    seconds: float
    steps_s: float
    tokens: int
    bits_per_byte: float

    def row(self, params: dict[str, Any], provider: str, seed: int) -> Row:
        names = ("step", "tokens", "loss", "bits_per_byte", "steps_s")
        metrics = {"seed": float(seed)} | {name: float(getattr(self, name)) for name in names}
        return Row("quality", params, provider, seconds=(self.seconds,), metrics=metrics)


@dataclass(frozen=True)
class Quality(command.Measurement):
    """Time to a validation loss, or the loss after some minutes of training, over several seeds."""

    preset: str | None = None  # Preset of train.py; the one for this machine by default.
    data: Path | None = None  # Text to train on; Book/ by default.
    until_loss: float = 0.0  # Train until this validation loss, in nats per token.
    minutes: float = 0.0  # Minutes of training; with --until-loss, at most so many.
    seeds: int = 3  # Number of runs, with the seeds 1, 2, ...
    nanogpt: Path | None = None  # Folder of a nanoGPT checkout, to be trained in turn with an equal configuration.
    runs: Path | None = None  # Folder for the runs; unfinished runs of ours in it resume. Temporary by default.
    options: tyro.conf.Positional[tuple[str, ...]] = ()  # Options of train.py, after `--`.

    def check(self) -> None:
        command.require_positive(seeds=self.seeds)
        for name, value in (("until-loss", self.until_loss), ("minutes", self.minutes)):
            if not 0 <= value < math.inf:
                raise UserError(f"--{name} must be above 0, got {value:g}")
        if not (self.until_loss or self.minutes):
            raise UserError("a run has no end: give --until-loss, --minutes, or both")
        peer_models.require_nanogpt(self.nanogpt, "train.py", "model.py", "configurator.py")
        for name in _OWN:
            if any(option.partition("=")[0] == f"--{name}" for option in self.options):
                own = {"seed": "--seeds N", "preset": "--preset", "data": "--data"}.get(name, "nothing here")
                raise UserError(f"--{name} cannot be passed on to train.py: give {own} before the --")

    def total(self, device: torch.device) -> int:
        return self.seeds

    def main(self) -> None:
        if any(row.error for row in self.measure().rows):
            sys.exit(1)

    def groups(self, device: torch.device, report: Report) -> Iterator[list[Row]]:
        """Yield the rows of each seed: all have the same key, and the seed is one of the metrics."""
        report.method["quality"] = METHOD
        with contextlib.ExitStack() as stack:
            folder = self.runs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quality-")))
            for seed in range(1, self.seeds + 1):
                yield self._seed(folder / f"seed-{seed}", seed)
        for line in summary(report.rows):
            print(line)

    def _seed(self, run: Path, seed: int) -> list[Row]:
        output = lines([sys.executable, str(TRAIN), *self._arguments(run, seed)])
        try:
            with contextlib.closing(output):
                for line in output:
                    if "| validation loss" in line:
                        print(f"ours, seed {seed}: {line}", flush=True)
        except Failed as failed:
            if failed.code == 2:  # the same for all seeds
                raise UserError(str(failed)) from None
            if failed.code == 130:
                raise KeyboardInterrupt from None
            return [self._error(self._params(run), "ours", seed, str(failed).splitlines()[0])]
        params, text = self._params(run), load(run / "data")
        rows = [self._row(params, "ours", seed, _of_ours(run, text, self.until_loss), self.until_loss)]
        return [*rows, self._nanogpt(run, text, params, seed)] if self.nanogpt else rows

    def _arguments(self, run: Path, seed: int) -> list[str]:
        """What train.py is called with."""
        values = {"preset": self.preset, "data": self.data, "until-loss": self.until_loss, "minutes": self.minutes}
        if not any(option.startswith("--sample-tokens") for option in self.options):
            values["sample-tokens"] = "0"
        own = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in values.items() if value)
        return [*own, *self.options, "--seed", str(seed), "--out", str(run), "--or-resume"]

    def _params(self, run: Path) -> dict[str, Any]:
        cfg = stored_config(run)
        goals = {"until_loss": self.until_loss, "minutes": self.minutes}
        params: dict[str, Any] = {"preset": Path(cfg.preset).stem, "data": cfg.data.name}
        params |= {name: value for name, value in goals.items() if value}
        return params | ({"options": " ".join(self.options)} if self.options else {})

    def _nanogpt(self, run: Path, text: TokenData, params: dict[str, Any], seed: int) -> Row:
        """Train nanoGPT like the run of ours that has just ended, on its characters."""
        assert self.nanogpt is not None
        cfg, folder, goal = stored_config(run), run.with_name(f"nanogpt-{seed}"), self.until_loss
        if text.tokenizer.name != "char":
            chars = prepare(cfg.data, folder / "chars", "char")
            goal *= (_bits(1.0, text) / _bits(1.0, chars)) if goal else 0.0
            text = chars
        peer_training.write_ids(text, folder)

        def train(steps: int, every: int, wanted: Callable[[float], bool]) -> peer_training.Evaluation | None:
            argv = peer_training.arguments(cfg, text, folder, seed=seed, steps=steps, eval_every=every)
            output = lines(argv, cwd=self.nanogpt, env=peer_training.environment())
            last = None
            with contextlib.closing(output):  # ends the process
                for last in peer_training.evaluations(output):
                    print(f"nanogpt, seed {seed}: step {last.step}, validation loss {last.loss:.4f}", flush=True)
                    if wanted(last.loss):
                        break
            return last

        steps, every = cfg.steps, cfg.eval_every
        try:
            if self.minutes:
                trial = train(peer_training.TRIAL_STEPS, peer_training.TRIAL_STEPS, lambda loss: True)
                assert trial is not None
                steps, every = peer_training.plan(self.minutes, trial, every)
            last = train(steps, every, lambda loss: loss <= goal)
        except Failed as failed:
            return self._error(params, "nanogpt", seed, str(failed))
        if last is None:
            return self._error(params, "nanogpt", seed, f"no evaluation in its output: {steps} steps, one each {every}")
        tokens = last.step * cfg.sequences * cfg.context
        result = Result(last.step, last.loss, last.seconds, last.steps_s, tokens, _bits(last.loss, text))
        return self._row(params, "nanogpt", seed, result, goal)

    def _row(self, params: dict[str, Any], provider: str, seed: int, result: Result, goal: float) -> Row:
        if not goal or result.loss <= goal:
            return result.row(params, provider, seed)
        after = f"after {result.step} steps and {clock(result.seconds)} the validation loss is {result.loss:.4f}"
        return self._error(params, provider, seed, f"{after}, above {goal:.4g}: allow more steps, or a higher loss")

    @staticmethod
    def _error(params: dict[str, Any], provider: str, seed: int, reason: str) -> Row:
        return Row("quality", params, provider, error=f"seed {seed}: {reason}")


def _bits(loss: float, text: TokenData) -> float:
    return bits_per_byte(loss, len(text.val), text.meta["val"]["bytes"])


def _of_ours(run: Path, text: TokenData, goal: float) -> Result:
    """The first evaluation that has reached the goal; the last one of a run that has not, or has none."""
    made = history.read(run)
    rows = made.rows("val_loss", "elapsed_s")
    reached = rows[made.columns["val_loss"][rows] <= goal]
    row = int(reached[0] if len(reached) else rows[-1])
    step, loss, seconds, tokens = (float(made.columns[n][row]) for n in ("step", "val_loss", "elapsed_s", "tokens"))
    logged = [i for i in made.rows("step_ms").tolist() if made.columns["step"][i] <= step]
    ends, each = ([0.0, *made.columns["step"][logged].tolist()], made.columns["step_ms"][logged].tolist())
    steps_s = sum((b - a) * ms for (a, b), ms in zip(itertools.pairwise(ends), each, strict=True)) / 1e3
    return Result(int(step), loss, seconds, steps_s, int(tokens), _bits(loss, text))


def summary(rows: Sequence[Row]) -> list[str]:
    """A line for each provider: how many of its runs have a result, and their means and standard deviations."""
    made = []
    for provider in dict.fromkeys(row.provider for row in rows):
        own = [row for row in rows if row.provider == provider]
        timed = [row for row in own if row.seconds]
        words = [f"{provider}: {len(timed)} of {len(own)} runs"]
        words += [f"{tables.mean_text([row.seconds[0] for row in timed])} s"] if timed else []
        for head, name, show in tables.QUALITY if timed else ():
            words.append(f"{tables.mean_text([row.metrics[name] for row in timed], show)} {head}")
        made.append(", ".join(words))
    return made
