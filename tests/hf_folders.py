"""Runs of tiny models with each kind of tokenizer, and GPT-2 folders as Hugging Face's library writes them."""

from __future__ import annotations

from pathlib import Path

import torch

from model import checkpoint
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, TrainedTokenizer

TEXT = "CHAPTER I. Down the rabbit-hole, “é” äöü 中🙂\n\tand after a while, after all, out again.  "
TOKENIZERS = {"char": CharTokenizer(TEXT), "bpe": TrainedTokenizer.train([TEXT] * 2, 280), "gpt2": GPT2Tokenizer()}


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights, biases included, that make logits depend on every token."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def write_run(folder: Path, tokenizer: Tokenizer, **shape) -> GPT:
    """A run with one checkpoint -> its model."""
    shape = {"n_positions": 140, "n_embd": 16, "n_layer": 2, "n_head": 2, **shape}
    model = lively(GPT(GPTConfig(tokenizer.n_vocab, initializer_range=0.2, **shape)))
    checkpoint.save_model(folder, model, tokenizer, step=1, config={})
    return model


def same(a: GPT, b: GPT) -> bool:
    """Whether two models have the same settings and, bit for bit, the same parameters."""
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return a.config == b.config and all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)
