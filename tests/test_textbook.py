"""The textbook's versions against the model's own."""

import torch

from model.config import GPTConfig
from model.generate import generate
from model.gpt import GPT
from model.textbook import generate_text_simple


def test_simple_generation_writes_the_greedy_ids():
    torch.manual_seed(0)
    model = GPT(GPTConfig(40, 16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    prompts = torch.randint(40, (3, 5))
    idx = generate_text_simple(model, prompts, max_new_tokens=11, context_size=16)
    assert idx.shape == (3, 16) and torch.equal(idx[:, :5], prompts) and not idx.requires_grad
    for row, prompt in zip(idx.tolist(), prompts.tolist(), strict=True):
        assert row[5:] == list(generate(model, prompt, tokens=11, temperature=0.0))
        assert len(set(row[5:])) > 2


def test_simple_generation_sees_the_last_tokens_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(40, 16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)).eval()
    idx = torch.randint(40, (1, 20))
    beyond = generate_text_simple(model, idx, max_new_tokens=3, context_size=16)  # longer than the model's context
    assert torch.equal(beyond[:, 4:], generate_text_simple(model, idx[:, 4:], max_new_tokens=3, context_size=16))
