"""Checkpoints of a tiny model, to be recognised by a number, and ways to damage them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from model import checkpoint
from model.config import GPTConfig
from model.gpt import GPT

CONFIG = GPTConfig(vocab_size=5, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1)
PARTS = ("model", "optimizer", "ema", "trainer")
FILES = (*(f"{part}.safetensors" for part in PARTS), "state.json", "validation.json")


def parts(mark: float = 0.0) -> checkpoint.Parts:
    """Every part, with tensors as odd as they come. mark: to be recognised by."""
    return {
        "model": {name: p.detach() for name, p in GPT(CONFIG).named_parameters()},
        "optimizer": {"exp_avg/a": torch.randn(3, 4).t(), "step/a": torch.tensor(7.0), "scale/a": torch.ones(2).half()},
        "ema": {name: torch.full_like(p, 0.01) for name, p in GPT(CONFIG).named_parameters()},
        "trainer": {"mark": torch.tensor(mark), "none": torch.empty(0, 3), "count": torch.tensor([1, 2])},
    }


def save(run, step, val_loss=None, *, mark=0.0, best=None, keep_last=2, content=None) -> Path:
    folder = checkpoint.save(
        run,
        step,
        parts(mark) if content is None else content,
        config={"lr": 0.01},
        model=CONFIG,
        best_val_loss=best,
        elapsed_s=1.5,
        keep_last=keep_last,
    )
    if val_loss is not None:
        checkpoint.record_validation(run, step, val_loss, keep_last)
    return folder


def save_failure(run, step, *, mark=0.0) -> Path:
    return checkpoint.save_failure(run, step, parts(mark), config={}, model=CONFIG, details={"loss": "nan", "rank": 1})


def kept(run) -> list[int]:
    return [int(name.removeprefix("step-")) for name in checkpoint.list_checkpoints(run)]


def mark(run, name="last") -> float:
    return checkpoint.load(run, name).parts["trainer"]["mark"].item()


def partial(run) -> list[str]:
    return sorted(path.name for path in run.rglob("*") if ".tmp" in path.name or "-new" in path.name)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")
