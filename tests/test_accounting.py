"""Accounting against built models and against figures published elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from model.accounting import PEAK_TFLOPS, flops_per_token, mfu, parameters, peak_flops
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
