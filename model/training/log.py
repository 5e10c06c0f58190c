"""What a run shows while it goes: a line, metrics.jsonl, samples.jsonl, report.html, and TensorBoard if asked for."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from model.cli import LiveLine, UserError
from model.config import GPTConfig
from model.report import page as report
from model.report.history import clock
from model.training import run_folder
from model.training.flops import mfu, peak_flops

MEASURED = ("loss", "val_loss", "lr", "grad_norm", "step_ms", "tok_per_s", "mfu", "peak_mib", "skipped")


class Log:
    """One for each call of the trainer, on the process that writes. A context manager."""

    def __init__(
        self,
        folder: Path,
        *,
        steps: int,
        done: int,
        tokens_per_step: int,
        model: GPTConfig,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
        n_devices: int = 1,
        elapsed_s: float = 0.0,
        tensorboard: bool = False,
    ) -> None:
        """steps: of the run in all; done: before this call, in elapsed_s seconds."""
        self.folder, self.steps, self.tokens_per_step = folder, steps, tokens_per_step
        self.model, self.context, self.device = model, context, device
        one = peak_flops(device, dtype)
        self.peak_flops = one * n_devices if one else None
        self.val_loss: float | None = None
        self.start = time.perf_counter() - elapsed_s
        self.page_written, self.page_s = 0.0, 0.0
        self.line = LiveLine()
        self.tensorboard = _tensorboard(folder) if tensorboard else None
        self.restart_clock(done)

    def __enter__(self) -> Log:
        self.metrics = (self.folder / run_folder.METRICS).open(
            "a", encoding="utf-8", buffering=1
        )  # a row is written at once
        self.line.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.line.__exit__(*error)
        self.metrics.close()
        if self.tensorboard:
            self.tensorboard.close()
        if run_folder.has_begun(self.folder):
            self._write_page()

    def restart_clock(self, step: int) -> None:
        """Time steps from here: what lies between this call and the one before is no part of them."""
        self.clock_step, self.clock = step, time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds of training, over all calls of the run."""
        return time.perf_counter() - self.start

    def training(self, step: int, *, loss: float, grad_norm: float, lr: float, skipped: int) -> None:
        """skipped: steps of the run that were left out so far."""
        step_s = (time.perf_counter() - self.clock) / (step - self.clock_step)
        tok_per_s = self.tokens_per_step / step_s
        share = mfu(tok_per_s, self.model, self.context, self.peak_flops) if self.peak_flops else None
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
        head = [f"step {step:05d}/{self.steps:05d}", f"loss {loss:.4f}"]
        speed = [f"lr {lr:.1e}", f"{step_s * 1e3:.1f} ms", f"{tok_per_s:,.0f} tok/s"]
        if share is not None:
            speed.append(f"mfu {share:.2f}")
        if skipped:
            speed.append(f"skipped {skipped}")
        eta = f"eta {clock(step_s * (self.steps - step))}"
        if self.line.is_live:  # in the order of interest, as a narrow terminal leaves out the end
            val = [] if self.val_loss is None else [f"val {self.val_loss:.4f}"]
            self.line.update(" | ".join([*head, *val, f"elapsed {clock(self.elapsed_s())}", eta, *speed]))
        else:
            self.line.update(" | ".join([*head, *speed, eta]))

    def validation(self, step: int, val_loss: float, *, is_best: bool) -> None:
        self.val_loss = val_loss
        self._write(step, val_loss=val_loss)
        self.line.print(f"step {step:05d}/{self.steps:05d} | validation loss {val_loss:.4f}{' *' * is_best}")

    def sample(self, step: int, text: str) -> None:
        with (self.folder / run_folder.SAMPLES).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "text": text}) + "\n")
        if self.tensorboard:
            self.tensorboard.add_text("sample", text, step)

    def publish(self) -> None:
        """Bring report.html up to date, unless that would take more than a twentieth of the time."""
        if time.perf_counter() - self.page_written > 20 * self.page_s:
            self._write_page()

    def _write_page(self) -> None:
        start = time.perf_counter()
        with contextlib.suppress(OSError, UserError):  # training does not end for want of a page
            report.write(self.folder)
        self.page_written = time.perf_counter()
        self.page_s = self.page_written - start

    def _write(self, step: int, **values: float | None) -> None:
        # JSON has no infinity, which the norm of a float16 step that was left out may be.
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        row = {"step": step, "tokens": step * self.tokens_per_step, **dict.fromkeys(MEASURED), **finite}
        self.metrics.write(json.dumps({**row, "elapsed_s": self.elapsed_s()}) + "\n")
        if self.tensorboard:
            for name, value in finite.items():
                self.tensorboard.add_scalar(name, value, step)


def _peak_mib(device: torch.device) -> float | None:
    """The most memory that was in use so far: of the GPU, by torch; of this process, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError(
            "--tensorboard needs the tensorboard package: pip install tensorboard, or leave it out"
        ) from None
    return SummaryWriter(folder / "tensorboard")  # type: ignore[no-untyped-call]
