"""AdamW against its formula, the groups, and the learning rate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import GPTConfig
from model.gpt import GPT
from model.optim import adamw, lr_at, parameter_groups


def small_gpt() -> GPT:
    return GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def test_matrices_decay_and_vectors_do_not():
    model = small_gpt()
    decay, rest = parameter_groups(model, 0.1)
    names = {p: name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {names[p].rsplit(".", 2)[-2] for p in decay["params"]} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert all(names[p].endswith(".bias") or ".ln_" in names[p] for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)  # each once


def test_a_frozen_parameter_is_in_no_group():
    model = small_gpt()
    model.transformer.wpe.weight.requires_grad_(False)
    assert not any(p is model.transformer.wpe.weight for group in parameter_groups(model, 0.1) for p in group["params"])


def test_adamw_follows_the_formula_in_float64():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    lr, betas, weight_decay, eps = 0.05, (0.8, 0.95), 0.3, 1e-8
    optimizer = adamw(model, lr=lr, betas=betas, weight_decay=weight_decay)
    assert optimizer.defaults["fused"]
    expected = {p: p.detach().double() for p in model.parameters()}
    m = {p: torch.zeros_like(w) for p, w in expected.items()}
    v = {p: torch.zeros_like(w) for p, w in expected.items()}
    for t in range(1, 6):
        for p, w in expected.items():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[p] = betas[0] * m[p] + (1 - betas[0]) * g
            v[p] = betas[1] * v[p] + (1 - betas[1]) * g**2
            m_hat, v_hat = m[p] / (1 - betas[0] ** t), v[p] / (1 - betas[1] ** t)
            decay = weight_decay if p.dim() == 2 else 0.0
            expected[p] = w - lr * (decay * w + m_hat / (v_hat.sqrt() + eps))
        optimizer.step()
    for p, w in expected.items():
        torch.testing.assert_close(p.detach(), w.float(), rtol=2e-6, atol=2e-6)


def test_found_inf_leaves_weights_and_state_alone():
    model = small_gpt()
    optimizer = adamw(model, lr=0.1, betas=(0.9, 0.99), weight_decay=0.1)

    def step(value: float) -> None:
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.step()

    def snapshot() -> list[torch.Tensor]:
        return [x.clone() for p in model.parameters() for x in (p.detach(), *optimizer.state[p].values())]

    step(0.5)
    before = snapshot()
    optimizer.found_inf = torch.tensor(1.0)
    step(math.nan)
    assert all(map(torch.equal, before, snapshot()))
    optimizer.found_inf = torch.tensor(0.0)
    step(0.5)
    assert not any(map(torch.equal, before, snapshot()))


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1.0 / 11),  # the first update moves
        (4, 5.0 / 11),
        (9, 10.0 / 11),
        (10, 1.0),  # the peak
        (60, 0.55),  # half-way between peak and floor
        (110, 0.1),  # the floor, and on it stays
        (1000, 0.1),
    ],
)
def test_lr_warms_up_then_follows_half_a_cosine(step, expected):
    assert lr_at(step, lr=1.0, min_lr=0.1, warmup_steps=10, steps=110) == pytest.approx(expected, rel=1e-12)


def test_lr_without_warm_up_starts_at_the_peak():
    assert lr_at(0, lr=0.5, min_lr=0.0, warmup_steps=0, steps=4) == 0.5
    assert lr_at(2, lr=0.5, min_lr=0.0, warmup_steps=0, steps=4) == pytest.approx(0.25)


def test_lr_of_a_run_shorter_than_its_warm_up_only_rises():
    rates = [lr_at(step, lr=1.0, min_lr=0.1, warmup_steps=10, steps=5) for step in range(5)]
    assert rates == sorted(rates) and rates[-1] < 1.0


@given(steps=st.integers(1, 200), warmup=st.integers(0, 200), low=st.floats(0, 1), step=st.integers(0, 300))
def test_lr_stays_within_its_bounds(steps, warmup, low, step):
    rate = lr_at(step, lr=1.0, min_lr=low, warmup_steps=warmup, steps=steps)
    assert min(low, 1.0 / (warmup + 1)) - 1e-12 <= rate <= 1.0 + 1e-12
