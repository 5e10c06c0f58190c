"""What a run shows while it trains: a line, metrics.jsonl, samples.jsonl, report.html, and --track."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kernels import launch_tables
from model.cli import LiveLine, UserError, clock
from model.config import GPTConfig
from model.training import run_folder
from model.training.flops import mfu, peak_flops
from model.training.options import TrainConfig
from model.training.parallel import World
from model.training.track import Tracker

COLUMNS = ("loss", "val_loss", "lr", "grad_norm", "step_ms", "tok_per_s", "mfu", "peak_mib", "skipped", "reached")


class Log:
    """The log of one invocation of the trainer; a context manager. Only rank 0 writes files."""

    def __init__(
        self,
        folder: Path,
        cfg: TrainConfig,
        config: GPTConfig,
        world: World,
        *,
        sequences: int,
        done: int,
        elapsed_s: float,
        publish: Callable[[Path], object],
    ) -> None:
        """sequences: of a step. done: steps before this invocation, in elapsed_s seconds. publish: writes the page."""
        self.folder, self.cfg, self.config = folder, cfg, config
        self.device, self.is_writer = world.device, world.rank == 0
        self.tokens_per_step = sequences * cfg.context
        per_device = peak_flops(world.device, cfg.torch_dtype)
        self.peak_flops = per_device * world.size if per_device else None
        self.val_loss: float | None = None
        self.start = time.perf_counter() - elapsed_s
        self.publish_page, self.page_written, self.page_s = publish, 0.0, 0.0
        hashed = launch_tables(world.device)
        self.tables = {"tables": hashed} if hashed else {}
        self.line = LiveLine()
        self.tracker: Tracker | None = None
        if cfg.track != "none" and self.is_writer:
            self.tracker = Tracker(cfg.track, folder, cfg.run_options(), done=done, warn=self.line.print)
        self.restart_clock(done)

    def __enter__(self) -> Log:
        # line-buffered: a row is written at once
        self.metrics = self._path(run_folder.METRICS).open("a", encoding="utf-8", buffering=1)
        self.line.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.line.__exit__(*error)
        self.metrics.close()
        if self.tracker:
            self.tracker.close()
        if self.is_writer and run_folder.has_begun(self.folder):
            self._write_page()

    def _path(self, name: str) -> Path:
        return self.folder / name if self.is_writer else Path(os.devnull)

    def restart_clock(self, step: int) -> None:
        """Time steps from here; the time since the last logged step is not part of any."""
        self.clock_step, self.clock = step, time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds of training, over all invocations of the run: of steps, evaluations, samples and checkpoints.

        The clock starts when the model is built; reading the text is not counted, nor is the sample at the end.
        """
        return time.perf_counter() - self.start

    def training(self, step: int, *, loss: float, grad_norm: float, lr: float, skipped: int) -> None:
        """Log a step. skipped: steps of the run that were skipped so far."""
        step_s = (time.perf_counter() - self.clock) / (step - self.clock_step)
        tok_per_s = self.tokens_per_step / step_s
        share = None
        if self.peak_flops:
            frozen = self.cfg.lora is not None
            share = mfu(tok_per_s, self.config, self.cfg.context, self.peak_flops, frozen=frozen)
        self._write(
            step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            step_ms=step_s * 1e3,
            tok_per_s=tok_per_s,
            mfu=share,
            peak_mib=_peak_mib(self.device),
            skipped=skipped,
        )
        head = [self._of(step), f"loss {loss:.4f}"]
        speed = [f"lr {lr:.1e}", f"{step_s * 1e3:.1f} ms", f"{tok_per_s:,.0f} tok/s"]
        if share is not None:
            speed.append(f"mfu {share:.2f}")
        if skipped:
            speed.append(f"skipped {skipped}")
        left = step_s * (self.cfg.steps - step) if self.cfg.steps else 60 * self.cfg.minutes - self.elapsed_s()
        eta = f"eta {clock(max(left, 0.0))}"
        if self.line.is_live:  # most interesting first: a narrow terminal cuts the end
            val = [] if self.val_loss is None else [f"val {self.val_loss:.4f}"]
            self.line.update(" | ".join([*head, *val, f"elapsed {clock(self.elapsed_s())}", eta, *speed]))
        else:
            self.line.update(" | ".join([*head, *speed, eta]))

    def validation(self, step: int, val_loss: float, *, is_best: bool) -> None:
        """Log the validation loss of a step, in nats per token, and whether it is what --until-loss asks for."""
        self.val_loss = val_loss
        goal = self.cfg.until_loss if self.cfg.is_reached(val_loss) else None
        elapsed_s = self._write(step, val_loss=val_loss, reached=goal)
        reached = "" if goal is None else f" | reached {goal:g} after {clock(elapsed_s)}"
        self.line.print(f"{self._of(step)} | validation loss {val_loss:.4f}{' *' * is_best}{reached}")

    def _of(self, step: int) -> str:
        """``step 00100/02000``; without the number of all steps as long as --minutes has not set it."""
        return f"step {step:05d}" + (f"/{self.cfg.steps:05d}" if self.cfg.steps else "")

    def sample(self, step: int, text: str) -> None:
        with self._path(run_folder.SAMPLES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}) + "\n")
        if self.tracker:
            self.tracker.log(step, {"sample": text})

    def publish(self) -> None:
        """Update report.html, unless that would take more than a twentieth of the time."""
        if self.is_writer and time.perf_counter() - self.page_written > 20 * self.page_s:
            self._write_page()

    def _write_page(self) -> None:
        start = time.perf_counter()
        with contextlib.suppress(OSError, UserError):  # a page that cannot be written does not stop training
            self.publish_page(self.folder)
        self.page_written = time.perf_counter()
        self.page_s = self.page_written - start

    def _write(self, step: int, **values: float | None) -> float:
        """Write a row -> its elapsed_s."""
        # JSON has no infinity, which the norm of a skipped float16 step may be.
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        row = {"step": step, "tokens": step * self.tokens_per_step, **dict.fromkeys(COLUMNS), **finite}
        elapsed_s = self.elapsed_s()
        self.metrics.write(json.dumps({**row, "elapsed_s": elapsed_s, **self.tables}) + "\n")
        if self.tracker:
            self.tracker.log(step, finite)
        return elapsed_s


def _peak_mib(device: torch.device) -> float | None:
    """Peak memory so far: of the GPU, allocated by torch; on a CPU, of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20
