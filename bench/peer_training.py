"""nanoGPT's train.py as a process: on the ids of a run of ours, with an equal configuration, timed by its own output.

Its folder is only read. What is not equal: it draws other windows; its validation loss is the mean of random batches,
as many as ours evaluates, and it evaluates as many of the training text; it evaluates before the first step, which is
not counted here; its GELU is the exact one.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import statistics
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.cli import pick_device
from model.data import TokenData
from model.training.deadline import steps_that_fit
from model.training.options import TrainConfig

TRIAL_STEPS = 20  # from which the number of steps that fit into a time is estimated
# It has no option for the seed.
_SEEDED = """
import runpy, sys, torch
seed, manual_seed = int(sys.argv.pop(1)), torch.manual_seed
torch.manual_seed = lambda _: manual_seed(seed)
runpy.run_path("train.py", run_name="__main__")
"""
_EVALUATION = re.compile(r"step (\d+): train loss \S+, val loss (\S+)")
_STEP = re.compile(r"iter \d+: loss \S+, time ([\d.]+)ms")


def write_ids(tokens: TokenData, folder: Path) -> None:
    """Write train.bin, val.bin and meta.pkl, as data/shakespeare_char/prepare.py does."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, ids in (("train", tokens.train), ("val", tokens.val)):
        ids[:].astype(np.uint16).tofile(folder / f"{name}.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": tokens.tokenizer.n_vocab}))


def arguments(
    cfg: TrainConfig, tokens: TokenData, folder: Path, *, seed: int, steps: int, eval_every: int
) -> list[str]:
    """The command for a run with the configuration of ours; its working directory is the checkout. folder: the ids."""
    device, folder = pick_device(cfg.device), folder.resolve()
    windows = min(cfg.eval_windows, len(tokens.val) // cfg.context)
    options: dict[str, Any] = {
        "dataset": folder, "out_dir": folder / "out", "always_save_checkpoint": False, "wandb_log": False,
        "eval_interval": eval_every, "eval_iters": max(1, math.ceil(windows / int(cfg.batch_size))), "log_interval": 1,
        "n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd, "block_size": cfg.context,
        "dropout": float(cfg.dropout), "bias": cfg.bias, "batch_size": cfg.batch_size,
        "gradient_accumulation_steps": cfg.grad_accum, "max_iters": steps, "lr_decay_iters": steps,
        "learning_rate": float(cfg.lr), "min_lr": float(cfg.lr if cfg.schedule == "constant" else cfg.min_lr),
        "warmup_iters": cfg.warmup_steps, "weight_decay": float(cfg.weight_decay), "beta1": float(cfg.beta1),
        "beta2": float(cfg.beta2), "grad_clip": float(cfg.grad_clip), "device": device,
        "dtype": "float32" if cfg.dtype == "tf32" else cfg.dtype, "compile": device == "cuda",
    }  # fmt: skip
    return [sys.executable, "-c", _SEEDED, str(seed), *(f"--{name}={value}" for name, value in options.items())]


def environment() -> dict[str, str]:
    """The environment of its process, without what model/ sets for ours."""
    ours = ("GOMP_SPINCOUNT", "PYTHONPATH")
    env = {name: value for name, value in os.environ.items() if name not in ours}
    return env | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Evaluation:
    """seconds: of training, up to the end of this evaluation; steps_s: of them, those of steps alone."""

    step: int
    loss: float  # nats per token
    seconds: float
    steps_s: float


def evaluations(lines: Iterable[str]) -> Iterator[Evaluation]:
    """The evaluations after the first step, from the output of a run that logs every iteration.

    The iteration that is printed after an evaluation includes it; the rest of it counts as the median iteration.
    """
    plain: list[float] = []  # seconds of the iterations without an evaluation
    pauses, at = 0.0, None
    for line in lines:
        if match := _EVALUATION.match(line):
            at = int(match[1]), float(match[2])
        elif match := _STEP.match(line):
            seconds = float(match[1]) / 1e3
            if at is None:
                plain.append(seconds)
            elif at[0] > 0:
                step_s = statistics.median(plain) if plain else 0.0
                steps_s = sum(plain) + (at[0] - len(plain)) * step_s
                pauses += seconds - step_s
                yield Evaluation(*at, steps_s + pauses, steps_s)
            at = None


def plan(minutes: float, trial: Evaluation, eval_every: int) -> tuple[int, int]:
    """Steps, and steps between evaluations, that fit into a time. trial: the evaluation at TRIAL_STEPS.

    The last step is one of an evaluation, which nanoGPT would not have by itself.
    """
    step_s, eval_s = trial.steps_s / trial.step, trial.seconds - trial.steps_s
    steps = steps_that_fit(
        60 * minutes, 0, step_s=step_s, eval_s=eval_s, save_s=0.0, eval_every=eval_every, save_every=eval_every
    )
    count = max(1, round(steps / eval_every))
    every = max(1, steps // count)
    return every * count, every
