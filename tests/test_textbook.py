"""The textbook's versions against the model's own."""

import pytest
import torch

from model.config import GPTConfig
from model.generate import generate
from model.gpt import GPT
from model.textbook import generate_text_simple


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(40, 16, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0)).eval()


def test_simple_generation_writes_the_greedy_ids(model):
    prompts = torch.randint(40, (3, 5))
    idx = generate_text_simple(model, prompts, max_new_tokens=11, context_size=16)
    assert idx.shape == (3, 16) and torch.equal(idx[:, :5], prompts) and not idx.requires_grad
    for row, prompt in zip(idx.tolist(), prompts.tolist(), strict=True):
        assert row[5:] == list(generate(model, prompt, tokens=11, temperature=0.0))
        assert len(set(row[5:])) > 2


def test_simple_generation_sees_the_last_tokens_alone(model):
    """Of a prompt that is longer than the context too."""
    idx = generate_text_simple(model, torch.randint(40, (8, 20)), max_new_tokens=3, context_size=16)
    with torch.no_grad():
        expected, first = (
            torch.stack([model(idx[:, n : n + 16])[0][:, -1].argmax(-1) for n in starts], 1)
            for starts in ((4, 5, 6), (0, 0, 0))
        )
    assert torch.equal(idx[:, 20:], expected) and not torch.equal(expected, first)
