"""Accounting against built models and against figures published elsewhere."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.memory import step_peak
from kernels import use_backend
from kernels._triton import INTERPRET
from kernels.linear_cross_entropy import SCRATCH_BYTES, chunk_rows
from model import accounting, optim
from model.accounting import PEAK_TFLOPS, RESERVE, flops_per_token, largest_batch, memory, mfu, parameters, peak_flops
from model.config import PRESETS, GPTConfig
from model.gpt import GPT, num_parameters


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_are_those_of_the_built_model(preset, bias):
    config = replace(PRESETS[preset], bias=bias)
    with torch.device("meta"):
        model = GPT(config)
    assert parameters(config) == num_parameters(model)


def test_parameters_of_the_published_models():
    published = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}
    assert {name: parameters(PRESETS[name]) for name in published} == published


def test_flops_per_token_is_the_palm_formula():
    # By hand for 2 layers of width 8, 10 tokens, 4 positions: N = 10*8 + 2*(12*8*8 + 13*8) + 2*8 = 1840 without wpe.
    config = GPTConfig(vocab_size=10, n_positions=4, n_embd=8, n_layer=2, n_head=2)
    assert flops_per_token(config, context=4) == 6 * 1840 + 12 * 2 * 8 * 4
    assert flops_per_token(PRESETS["gpt2"], context=1024) == 855_166_464  # the usual 855 MFLOP per token


def test_flops_count_the_context_that_is_trained_not_the_one_that_fits():
    gpt2 = PRESETS["gpt2"]
    assert flops_per_token(gpt2, 1024) - flops_per_token(gpt2, 512) == 12 * 12 * 768 * 512


@pytest.mark.parametrize(
    ("name", "bf16", "fp16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 989.4e12, 494.7e12),
        ("NVIDIA H100 PCIe", 756e12, 756e12, 378e12),
        ("NVIDIA H100 NVL", 835.5e12, 835.5e12, 417.5e12),
        ("NVIDIA H200", 989.4e12, 989.4e12, 494.7e12),
        ("NVIDIA GH200 480GB", 989.4e12, 989.4e12, 494.7e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 312e12, 156e12),
        ("NVIDIA A100 80GB PCIe", 312e12, 312e12, 156e12),
        ("NVIDIA A10G", 70e12, 70e12, 35e12),
        ("NVIDIA A10", 125e12, 125e12, 62.5e12),
        ("NVIDIA L40S", 362e12, 362e12, 183e12),
        ("NVIDIA L4", 121e12, 121e12, 60e12),
        ("NVIDIA RTX A6000", 154.8e12, 154.8e12, 77.4e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12, 165.2e12, 82.6e12),
        ("Tesla V100-SXM2-16GB", None, 125e12, 15.7e12),
        ("Tesla T4", None, 65e12, 8.1e12),
        # Names that contain a listed one and are other cards, or a slice of it.
        ("NVIDIA RTX A4000", None, None, None),
        ("NVIDIA GeForce RTX 4090 D", None, None, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None, None, None),
        ("NVIDIA GeForce RTX 3080 Ti", None, None, None),
        ("NVIDIA GeForce RTX 4080 SUPER", None, None, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None, None),
        ("AMD Instinct MI300X", None, None, None),
    ],
)
def test_peak_by_device_name(monkeypatch, name, bf16, fp16, fp32):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    expected = [value and pytest.approx(value) for value in (bf16, fp16, fp32)]
    assert [peak_flops("cuda", dtype) for dtype in dtypes] == expected
    assert peak_flops("cuda", torch.float64) is None


def test_every_listed_card_finds_its_own_row(monkeypatch):
    for card, row in PEAK_TFLOPS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, card=card: f"NVIDIA {card} 80GB")
        assert peak_flops(torch.device("cuda", 0), torch.float16) == pytest.approx(row[1] * 1e12), card


def test_no_peak_for_a_cpu():
    assert peak_flops("cpu", torch.float32) is None
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_mfu():
    gpt2 = PRESETS["gpt2"]
    # 475k tokens/s on one H100 is 41.1 % by this formula.
    assert mfu(475_000, gpt2, 1024, peak=989.4e12) == pytest.approx(0.411, abs=5e-4)
    assert math.isnan(mfu(475_000, gpt2, 1024, peak=None))


# --- memory ----------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
BACKENDS = ("eager", "triton")
# Each has its highest moment somewhere else.
SHAPES = {  # V, C, layers, batch, context, bias
    "loss, backward": (300, 32, 2, 2, 16, True),
    "loss, forward, in two chunks": (320, 32, 1, 4, 33, False),
    "gelu of the last block": (40, 64, 2, 2, 32, True),
    "gelu of the first block": (40, 64, 3, 2, 21, False),
    "end": (700, 32, 1, 1, 4, True),
}


def _config(V: int, C: int, layers: int, context: int, bias: bool) -> GPTConfig:
    return GPTConfig(vocab_size=V, n_positions=context, n_embd=C, n_layer=layers, n_head=4, bias=bias)


@pytest.fixture
def runs(monkeypatch):
    """use_backend on a CPU. Triton's interpreter leaves its arguments to the garbage collector: called here at once."""

    def choose(backend: str) -> None:
        if backend == "eager":
            return
        if not INTERPRET:
            pytest.skip("needs Triton's interpreter, which is not used where there is a GPU")
        from triton.runtime.interpreter import GridExecutor

        launch = GridExecutor.__call__

        def launch_and_collect(self, *args, **options):
            launch(self, *args, **options)
            gc.collect()

        monkeypatch.setattr(GridExecutor, "__call__", launch_and_collect)
        gc.collect()
        gc.freeze()

    yield choose
    gc.unfreeze()


def _kept_by_autograd(model: GPT, idx: torch.Tensor, targets: torch.Tensor) -> int:
    """Bytes of the storages, each once, that the forward pass keeps beside the parameters."""
    theirs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in theirs:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(idx, targets)[1]
    return sum(kept.values())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_are_what_autograd_keeps(backend, dtype, bias, runs):
    runs(backend)
    config = _config(300, 32, 2, 16, bias)
    idx, targets = (torch.randint(300, (2, 16)) for _ in range(2))
    with use_backend(backend):
        kept = _kept_by_autograd(GPT(config, dtype), idx, targets)
    predicted = memory(config, 2, 16, dtype, backend, card=0).activations
    if backend == "triton":
        assert predicted == kept
    elif dtype == torch.float32:
        assert predicted == kept - 4  # the sum of the classes' weights, a scalar
    else:  # on a CPU eager keeps statistics in `dtype`: 5 LayerNorms, 32 rows, mean and rstd
        assert predicted == kept - 4 + 5 * 32 * 2 * 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_of_a_training_step(backend, dtype, shape, runs):
    runs(backend)
    V, C, layers, batch, context, bias = SHAPES[shape]
    config = _config(V, C, layers, context, bias)
    predicted = memory(config, batch, context, dtype, backend, card=0)
    state = predicted.parameters + predicted.optimizer  # exact, and large: what comes and goes is compared without it
    measured = step_peak(config, batch, context, dtype, backend, CPU)
    if backend == "triton" and dtype == torch.float16 and shape == "loss, forward, in two chunks":
        measured -= 4 * 128 * (V + C)  # a CPU multiplies in float32: copies of a chunk of logits and of its input
    needed = predicted.peak - state
    if backend == "triton" and dtype == torch.float16 and shape == "loss, backward":
        copies = 4 * 32 * (V + C)  # those copies lift the forward pass over the backward pass, by less than their size
        assert 0.98 * needed <= measured - state <= 1.02 * needed + copies
    else:
        assert needed == pytest.approx(measured - state, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_peak_of_a_training_step_on_a_gpu(backend, dtype, device):
    config = _config(20000, 256, 4, 256, bias=True)
    card = torch.cuda.get_device_properties(device).total_memory
    for batch in (1, 8, 64):
        predicted = memory(config, batch, 256, dtype, backend, card=card)
        assert predicted.peak == pytest.approx(step_peak(config, batch, 256, dtype, backend, device), rel=0.05)


def test_parameters_gradients_and_moments_are_those_of_a_step():
    config = _config(300, 32, 2, 16, bias=True)
    model = GPT(config)
    optimizer = optim.adamw(model, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    model(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64))[1].backward()
    optimizer.step()
    predicted = memory(config, 1, 4, torch.bfloat16)
    assert predicted.parameters == sum(p.nbytes for p in model.parameters())
    assert predicted.gradients == sum(p.grad.nbytes for p in model.parameters())
    states = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert predicted.optimizer == sum(t.nbytes for t in states)


def test_scratch_is_the_chunk_of_logits_that_the_kernel_takes(monkeypatch):
    cuda = torch.device("cuda", 0)
    for gib in (0, 6, 24, 80):
        properties = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, p=properties: p)
        for M, V, size in ((1, 10, 4), (100, 300, 2), (5000, 50257, 2), (65536, 50257, 2), (65536, 50304, 4)):
            row_bytes = -(-V // 64) * 64 * size
            rows = min(M, chunk_rows(M, row_bytes, cuda))
            assert accounting._scratch(M, V, size, gib * 2**30) == rows * row_bytes, (gib, M, V)


def test_a_card_that_is_not_named_is_a_large_one():
    gpt2, step = PRESETS["gpt2"], (64, 1024, torch.bfloat16)
    assert memory(gpt2, *step).peak == memory(gpt2, *step, card=64 * SCRATCH_BYTES).peak
    assert memory(gpt2, *step).peak == memory(gpt2, *step, card=200 * 2**30).peak
    assert memory(gpt2, *step).peak > memory(gpt2, *step, card=24 * 2**30).peak


@pytest.mark.parametrize("name", ["embd_pdrop", "resid_pdrop", "attn_pdrop"])
def test_memory_counts_no_dropout(name):
    with pytest.raises(ValueError, match="without dropout"):
        memory(replace(PRESETS["gpt2"], **{name: 0.1}), 1, 1024, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("preset", ["tiny", "gpt2", "gpt2-xl"])
def test_largest_batch_fits_and_one_more_does_not(preset, backend):
    config = PRESETS[preset]
    for card in (12 * 2**30, 80 * 2**30):

        def left(batch, card=card):
            needs = memory(config, batch, config.n_positions, torch.bfloat16, backend, card=card)
            return card - RESERVE - needs.peak - needs.gradients

        batch = largest_batch(config, config.n_positions, torch.bfloat16, backend, card)
        assert left(batch + 1) < 0
        assert batch == 0 or left(batch) >= 0


def test_no_batch_fits_a_card_that_is_too_small():
    for card in (0, RESERVE, 6 * 2**30):
        assert largest_batch(PRESETS["gpt2-large"], 1024, torch.bfloat16, "triton", card) == 0
