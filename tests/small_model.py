"""A model of characters that is small and yet depends on every token."""

from __future__ import annotations

import torch

from model.config import GPTConfig
from model.generate import Continuation, generate_batch
from model.gpt import GPT
from model.sampling import Sampling
from model.tokenizer import CharTokenizer

CONTEXT = 12
TEXT = "CHAPTER I. Down the rabbit-hole, and after a while out again."


def small_tokenizer() -> CharTokenizer:
    return CharTokenizer(TEXT)


def small_model(tokenizer: CharTokenizer) -> GPT:
    """Weights large enough that the distribution is far from uniform and depends on every token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, CONTEXT, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))
    return model.eval()


def batch(model: GPT, texts: list[Continuation], **kwargs) -> list[list[int]]:
    """The ids of each text, once all are done."""
    for _ in generate_batch(model, texts, **{"tokens": 20, "sampling": Sampling(), **kwargs}):
        pass
    assert all(text.done for text in texts)
    return [text.ids for text in texts]
