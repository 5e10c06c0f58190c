"""The weights that a run begins with, random or another model's, and those of them that it trains and saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model import checkpoint, lora
from model.config import GPTConfig
from model.gpt import GPT, num_parameters
from model.lora import Base
from model.training.options import TrainConfig

Saved = checkpoint.Checkpoint | None


def load_base(cfg: TrainConfig, saved: Saved = None) -> Base | None:
    """The model that a run begins with, or None; with adapters it is needed on resuming, too.

    UserError for one of another shape, or that has changed since the run began.
    """
    if cfg.init is None or (saved and not cfg.lora):
        return None
    about = saved.state["lora"]["base"] if saved else {}
    base = lora.load_base(cfg.init, about.get("checkpoint"), about.get("sha256"))
    lora.fit(cfg.gpt_config(base.tokenizer.n_vocab), base.model.config, cfg.init)
    return base


def tokenizer_name(cfg: TrainConfig, base: Base | None, folder: Path) -> str:
    """What to encode the text of a run with: --tokenizer, or that of its base, which is saved in `folder`."""
    if base is None:
        return cfg.tokenizer
    base.tokenizer.save(folder)
    return base.tokenizer.name if base.tokenizer.name == "gpt2" else str(folder)


def build(cfg: TrainConfig, config: GPTConfig, base: Base | None, saved: Saved) -> GPT:
    """The model of a run, on the CPU: as `saved`, or as it begins, by the seed."""
    torch.manual_seed(cfg.seed)
    model = GPT(config, dtype=cfg.torch_dtype)
    model.recompute = cfg.recompute
    if base:
        lora.take(model, base)
    if cfg.lora:
        lora.add(model, cfg.lora)
    if saved:
        model.load_state_dict(saved.parts[_part(cfg)], strict=not cfg.lora)
    return model


def check_saved(cfg: TrainConfig, config: GPTConfig, saved: checkpoint.Checkpoint) -> None:
    """Raise UserError if the checkpoint is of another model, or of weights alone."""
    with torch.device("meta"):
        model = GPT(config)
        checkpoint.check_model(saved, config, lora.trained(lora.add(model, cfg.lora) if cfg.lora else model))


def parts(cfg: TrainConfig, model: GPT) -> checkpoint.Parts:
    """The part of a checkpoint with the parameters that are trained."""
    return {_part(cfg): {name: p.detach() for name, p in lora.trained(model).items()}}


def notes(cfg: TrainConfig, base: Base | None) -> dict[str, Any] | None:
    """What each checkpoint of a run with adapters says of them and of their base."""
    return {"base": base.about, "peft": cfg.lora.to_peft(base.about["path"])} if cfg.lora and base else None


def describe(model: GPT) -> str:
    """ "124,439,808 parameters", or "294,912 of 124,734,720 parameters trained"."""
    n, all_ = sum(p.numel() for p in lora.trained(model).values()), num_parameters(model)
    return f"{all_:,} parameters" if n == all_ else f"{n:,} of {all_:,} parameters trained"


def _part(cfg: TrainConfig) -> str:
    return checkpoint.ADAPTER if cfg.lora else "model"
