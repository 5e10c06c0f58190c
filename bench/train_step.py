"""A whole training step of a GPT, forward, backward, clipping and AdamW: tokens per second, MFU, peak memory."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from bench.timing import Timing, measure
from kernels import use_backend
from model import optim
from model.accounting import mfu, peak_flops
from model.config import PRESETS
from model.gpt import GPT


@dataclass(frozen=True)
class TrainRow:
    """One preset, batch and provider. mfu by PaLM's formula; peak_mib: device memory at its highest, 0 on a CPU."""

    preset: str
    batch: int
    context: int
    dtype: str
    provider: str
    timing: Timing
    tokens_per_s: float
    mfu: float
    peak_mib: float
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON takes it; an unknown MFU is null."""
        return asdict(self) | {"mfu": None if self.mfu != self.mfu else self.mfu}


def _step(preset: str, batch: int, context: int, dtype: torch.dtype, device: torch.device, compiled: bool):
    torch.manual_seed(0)
    config = PRESETS[preset]
    model = GPT(config, dtype=dtype).to(device)
    optimizer = optim.adamw(model, lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1)
    forward: Callable[..., Any] = torch.compile(model) if compiled else model
    idx = torch.randint(config.vocab_size, (batch, context), device=device)
    targets = idx.roll(-1, 1)

    def step() -> None:
        _, loss = forward(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run(
    device: torch.device, preset: str, batches: list[int], context: int | None, dtype: torch.dtype, seconds: float = 5.0
) -> Iterator[TrainRow]:
    """Yields a row per batch and provider: eager, compile (torch.compile of it), triton (where it can run)."""
    config = PRESETS[preset]
    T = context or config.n_positions
    providers = {"eager": ("eager", False), "compile": ("eager", True)}
    if device.type == "cuda":
        providers["triton"] = ("triton", False)
    for batch in batches:
        for provider, (backend, compiled) in providers.items():
            row = (preset, batch, T, str(dtype).removeprefix("torch."), provider)
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                with use_backend(backend):  # type: ignore[arg-type]
                    step = _step(preset, batch, T, dtype, device, compiled)
                    timing = measure({provider: step}, device, seconds=seconds)[provider]
            except Exception as error:  # out of memory, most likely: it is this row's result
                why = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:160]
                yield TrainRow(*row, Timing(0, 0, 0, 0), 0.0, float("nan"), 0.0, error=why)
                continue
            tokens_per_s = batch * T / timing.p50_ms * 1e3
            peak_mib = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else 0.0
            share = mfu(tokens_per_s, config, T, peak_flops(device, dtype))
            yield TrainRow(*row, timing, tokens_per_s, share, peak_mib)
