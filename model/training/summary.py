"""What a run ends with: a sample of text by its best weights, how good they are, and how to use them."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from model import checkpoint, files
from model.cli import UserError, clock
from model.data import TokenData
from model.evaluate import describe
from model.generate import generate
from model.gpt import GPT
from model.lora import load_model
from model.tokenizer import Tokenizer
from model.training.options import TrainConfig

SAMPLE = "sample.txt"  # in the folder of a run
PROMPT = "CHAPTER I. "
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 500, 0.6


def print_summary(cfg: TrainConfig, folder: Path, tokens: TokenData, model: GPT, steps: int, elapsed_s: float) -> None:
    """Write SAMPLE with the best weights, in the dtype of `model` and on its device; print their loss.

    steps, elapsed_s: how long the run took.
    """
    best = checkpoint.read_state(folder, "best")
    # A sharded model need not fit on one device.
    device = torch.device("cpu") if cfg.parallel == "fsdp" else next(model.parameters()).device
    best_model, tokenizer = load_model(folder, device, name="best", dtype=model.dtype)
    prompt, sample = write_sample(best_model, tokenizer, tokens=SAMPLE_TOKENS, seed=cfg.seed)
    files.write_atomic(folder / SAMPLE, sample + "\n")
    print(f"\n{sample}\n")
    goal = f" to a validation loss of at most {cfg.until_loss:g}" if cfg.is_reached(best["val_loss"]) else ""
    took = f"{steps} steps in {clock(elapsed_s)}{goal}"
    print(f"{took}; the text above is by the best weights, of step {best['step']}")
    print(f"validation {describe(best['val_loss'], len(tokens.val), tokens.meta['val']['bytes'])}")
    print(f"curves and samples: {folder / 'report.html'}")
    run, page = shlex.quote(str(folder)), shlex.quote(str(folder / "explore.html"))
    print(f'more text: python -m model.generate {run} --prompt "{prompt}"')
    print(f"in a browser: python -m model.explore {run} {page}")


def write_sample(model: GPT, tokenizer: Tokenizer, *, tokens: int, seed: int) -> tuple[str, str]:
    """Let the model continue PROMPT -> the prompt, and the whole text."""
    # A byte-pair token includes the space before its word: a space at the end of the prompt would be one of its own.
    prompt = PROMPT if tokenizer.name == "char" else PROMPT.rstrip()
    try:
        ids = tokenizer.encode(prompt)[-model.config.n_positions :]
    except UserError:  # a character tokenizer of a text without these letters
        ids, prompt = [tokenizer.eot_id], ""
    # No graph: capturing one empties the allocator's cache, in the middle of a training run.
    new = generate(model, ids, tokens=tokens, temperature=SAMPLE_TEMPERATURE, top_k=40, seed=seed, graph=False)
    return prompt, prompt + tokenizer.decode(list(new))
