"""The whole model on both paths: logits, loss and every named gradient, Triton against eager, by the one rule."""

import pytest
import torch
from conftest import HAS_CUDA

from kernels import use_backend
from kernels._proof import compare
from kernels._triton import HAS_TRITON
from model.config import GPTConfig
from model.gpt import GPT

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
CONFIG = GPTConfig(vocab_size=61, n_positions=40, n_embd=48, n_layer=2, n_head=3)
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if HAS_CUDA else [torch.float32, torch.float16]


def _run(backend, dtype, device):
    """Logits, loss and gradients by name, of the same weights and batch."""
    torch.manual_seed(3)
    model = GPT(CONFIG, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # away from zeros and ones, so that every term of every gradient counts
            parameter.add_(0.1 * torch.randn_like(parameter))
    if dtype == torch.float64:
        model = model.double()
    model = model.to(device)
    idx, targets = torch.randint(61, (2, 2, 37)).to(device)
    with use_backend(backend):
        logits, loss = model(idx, targets)
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_loss_and_every_gradient(dtype, device):
    truth = {k: v.double() for k, v in _run("eager", torch.float64, device).items()}
    eager, got = _run("eager", dtype, device), _run("triton", dtype, device)
    assert len(got) == 2 + 2 * 12 + 4
    for name in truth:
        row = compare("model", {}, name, got[name], eager[name], truth[name], gradient=True)
        assert row.passed, f"{name}: error {row.error:.3e} > allowed {row.allowed:.3e}"


def test_training_steps_agree(device):
    """Eight steps of AdamW from the same start: the losses stay together."""
    from model.optim import adamw

    curves = []
    for backend in ("eager", "triton"):
        torch.manual_seed(0)
        model = GPT(CONFIG).to(device)
        optimizer = adamw(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        data = torch.randint(61, (2, 25), generator=torch.Generator().manual_seed(1)).to(device)
        losses = []
        with use_backend(backend):
            for _ in range(8):
                loss = model(data[:, :-1], data[:, 1:])[1]
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0] / 1.5
    torch.testing.assert_close(*map(torch.tensor, curves), rtol=1e-4, atol=1e-4)
