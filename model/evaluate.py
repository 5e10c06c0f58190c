"""How well a model predicts a text: loss in nats per token, perplexity, bits per byte.

    python -m model.evaluate runs/tiny                     # on the validation split of the run
    python -m model.evaluate runs/tiny --data other.txt    # on a text of yours

    loss = mean of -log p(token | tokens before it in its window)     perplexity = exp(loss)
    bits per byte = loss / log(2) * tokens / bytes                    comparable between tokenizers

The text is split into windows of the model's context that do not overlap: a longer context alone lowers the loss.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro

from model import data
from model.checkpoint import load_model
from model.cli import UserError, pick_device, run
from model.data.shards import Tokens
from model.gpt import GPT, IGNORE_INDEX
from model.training import parallel
from model.training.parallel import World


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: np.ndarray | Tokens,
    *,
    context: int,
    batch_size: int,
    max_windows: int | None = None,
    world: World | None = None,
) -> float:
    """Mean loss in nats of `model` over `tokens`, (n,) ids.

    max_windows: at most so many windows of `context` tokens, spread evenly over the text and always the same. The model
    is in evaluation mode meanwhile. world: processes that share the batches; all get the mean of all. Raises UserError
    for fewer than two tokens.
    """
    world = world or World(0, 1, 0, torch.device("cpu"))
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets: on the device, for one wait at the end
    was_training = model.training
    model.eval()
    try:
        batches = data.windows(tokens, context, batch_size, max_windows)
        for (idx, targets), counts in parallel.shard_batches(batches, world):
            _, loss = model(idx.to(device), targets.to(device))
            if counts:
                n = int((targets != IGNORE_INDEX).sum())
                total += torch.stack([loss.double() * n, torch.full_like(total[1], n)])
    finally:
        model.train(was_training)
    loss_sum, n_targets = parallel.sum_all(total, world).tolist()
    return loss_sum / n_targets


def perplexity(loss: float) -> float:
    """exp(loss): the number of equally likely tokens that would be as hard to guess; inf on overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """Loss in nats per token -> bits per byte of UTF-8, for a text of `tokens` tokens and `n_bytes` bytes."""
    return loss / math.log(2) * tokens / n_bytes


def describe(loss: float, tokens: int, n_bytes: int) -> str:
    """`validation loss 1.5123 | perplexity 4.54 | 2.182 bits per byte`, without the first word."""
    bits = bits_per_byte(loss, tokens, n_bytes)
    return f"loss {loss:.4f} | perplexity {perplexity(loss):.2f} | {bits:.3f} bits per byte"


Source = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how well the model of a run predicts a text."""

    run: tyro.conf.Positional[Path]  # folder of a training run
    data: Source = None  # text file, or folder of them; default: the validation text of the run
    checkpoint: str = "best"  # last, best (lowest validation loss), or a name such as step-00000100
    batch_size: int = 16  # windows in memory at a time
    max_windows: int | None = None  # maximum windows to measure on, spread over the text
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one


def main(cfg: EvaluateConfig) -> None:
    for name in ("batch_size", "max_windows"):
        if (value := getattr(cfg, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    model, tokenizer = load_model(cfg.run, pick_device(cfg.device), name=cfg.checkpoint)
    with tempfile.TemporaryDirectory() as temporary:
        if cfg.data is None:
            text = data.load(cfg.run / "data")
            tokens, n_bytes, name = text.val, text.meta["val"]["bytes"], "validation"
        else:
            text = data.prepare(cfg.data, Path(temporary) / "data", tokenizer, val_fraction=0.0)
            tokens, n_bytes, name = text.train, text.meta["train"]["bytes"], str(cfg.data)
        loss = evaluate(
            model, tokens, context=model.config.n_positions, batch_size=cfg.batch_size, max_windows=cfg.max_windows
        )
    print(f"{len(tokens):,} tokens, {n_bytes:,} bytes")
    print(f"{name} {describe(loss, len(tokens), n_bytes)}")


if __name__ == "__main__":
    run(main, EvaluateConfig, prog="python -m model.evaluate", aliases={"--which": "--checkpoint"})
