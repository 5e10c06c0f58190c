"""The whole model on both paths: logits, loss and every named gradient, Triton against eager, by the one rule."""

import dataclasses

import pytest
import torch
from conftest import HAS_CUDA

from kernels import use_backend
from kernels._proof import compare
from kernels._triton import HAS_TRITON
from model.config import PRESETS, GPTConfig
from model.gpt import GPT

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
SMALL = GPTConfig(vocab_size=61, n_positions=40, n_embd=48, n_layer=2, n_head=3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if HAS_CUDA else [torch.float32, torch.float16]


def _run(config, backend, dtype, device, B, T, seed=3, loss_only=False, **apart):
    """Loss, logits and gradients by name, of the same weights and batch."""
    torch.manual_seed(seed)
    model = GPT(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones, so that every term of every gradient counts
            parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model = model.double()
    model = model.to(device)
    idx, targets = torch.randint(config.vocab_size, (2, B, T)).to(device)
    with use_backend(backend, **apart):
        _, loss = model(idx, targets)
        if loss_only:
            return {"loss": loss.detach()}
        with torch.no_grad():
            logits, _ = model(idx)
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "loss": loss.detach(), **gradients}


def _assert_proved(config, dtype, device, B, T, more_losses=(), **apart):
    """The rule for every tensor; for the loss, one number that eager may hit by luck, over the draws of more seeds."""
    losses = []
    for seed in (3, *more_losses):
        case = (device, B, T, seed, seed in more_losses)
        truth = {k: v.double() for k, v in _run(config, "eager", torch.float64, *case).items()}
        eager = _run(config, "eager", dtype, *case)
        got = _run(config, "triton", dtype, *case, **apart)
        assert len(got) == (1 if seed in more_losses else 2 + 2 * 12 + 4)
        for name in truth:
            row = compare("model", {}, name, got[name], eager[name], truth[name], gradient=True)
            if name == "loss":
                losses.append(row)
            else:
                assert row.passed, f"{name}: error {row.error:.3e} > allowed {row.allowed:.3e}"
    assert max(row.error for row in losses) <= max(row.allowed for row in losses), losses


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(t, marks=pytest.mark.slow) for t in DTYPES[1:])], ids=str)
def test_logits_loss_and_every_gradient(dtype, device):
    _assert_proved(SMALL, dtype, device, B=2, T=37, more_losses=(4, 5))


@pytest.mark.slow
def test_gpt2_training_step_with_two_layers(device):
    """GPT-2's own width, heads and vocabulary."""
    # the embedding's gradient has three programs a token: 150,000, which the interpreter runs one after another
    apart = {} if HAS_CUDA else {"embedding": "eager"}
    _assert_proved(dataclasses.replace(PRESETS["gpt2"], n_layer=2), torch.float32, device, B=1, T=12, **apart)


def test_dropout_acts_in_training_mode_only(device):
    config = dataclasses.replace(SMALL, resid_pdrop=0.5, attn_pdrop=0.3, embd_pdrop=0.0)
    model = GPT(config).to(device).train()
    idx = torch.randint(61, (1, 20), device=device)
    with use_backend("triton"), torch.no_grad():
        draws = torch.stack([model(idx)[0] for _ in range(3)])
        model.eval()
        still = torch.stack([model(idx)[0] for _ in range(2)])
    assert draws.isfinite().all() and not torch.equal(draws[0], draws[1]) and torch.equal(still[0], still[1])


@pytest.mark.slow
def test_32_training_steps_agree(device):
    """AdamW from the same start on both paths: the losses stay together."""
    from model.training.optim import adamw

    curves = []
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        model = GPT(dataclasses.replace(SMALL, n_layer=1, n_head=1)).to(device)
        optimizer = adamw(model, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.1)
        data = torch.randint(61, (1, 25), generator=torch.Generator().manual_seed(1)).to(device)
        losses = []
        with use_backend(backend):
            for _ in range(32):
                loss = model(data[:, :-1], data[:, 1:])[1]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] / 4
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=1e-4)
