"""What a model costs to compute: parameters, FLOPs of a training step, and their share of a GPU's peak."""

from __future__ import annotations

import re

import torch

from model.config import GPTConfig


def parameters(config: GPTConfig) -> int:
    """Number of parameters of GPT(config), the tied output head counted once. 124,439,808 for the gpt2 preset."""
    C = config.n_embd
    weights = 12 * C * C  # c_attn 3, attn.c_proj 1, mlp.c_fc 4, mlp.c_proj 4
    biases = 9 * C if config.bias else 0
    norm = 2 * C if config.bias else C
    return (config.vocab_size + config.n_positions) * C + config.n_layer * (weights + biases + 2 * norm) + norm


def flops_per_token(config: GPTConfig, context: int, *, frozen: bool = False) -> int:
    """Floating-point operations of one training step (forward and backward) per token of a `context`-token sequence.

        6 * N + 12 * n_layer * n_embd * context

    The formula of PaLM's appendix B (Chowdhery et al. 2022, arXiv 2204.02311), as nanoGPT counts it: N leaves out the
    position table, which is only looked up, and keeps the token table, which is the output head's weight; attention
    counts in full, although a causal kernel computes about half of it. Published MFU figures are counted this way.
    855,166,464 for gpt2 at 1024. frozen: no gradients of the parameters, 4 * N; adapters are not counted.
    """
    matmul_parameters = parameters(config) - config.n_positions * config.n_embd
    return (4 if frozen else 6) * matmul_parameters + 12 * config.n_layer * config.n_embd * context


# Dense tensor-core peaks in TFLOP/s with float32 accumulation, from NVIDIA's data sheets and architecture white papers
# (half of the figure "with sparsity" where only that is printed). float32 means TF32 where the card has it.
#                   bfloat16 float16 float32
PEAK_TFLOPS: dict[str, tuple[float | None, float, float]] = {
    "GB200": (2500, 2500, 1250),
    "B200": (2250, 2250, 1125),
    "GH200": (989.4, 989.4, 494.7),
    "H200": (989.4, 989.4, 494.7),
    "H200 NVL": (835.5, 835.5, 417.5),
    "H100": (989.4, 989.4, 494.7),
    "H100 NVL": (835.5, 835.5, 417.5),
    "H100 PCIe": (756, 756, 378),
    "H800": (989.4, 989.4, 494.7),
    "H20": (148, 148, 74),
    "L40S": (362, 362, 183),
    "L40": (181, 181, 90.5),
    "L4": (121, 121, 60),
    "A100": (312, 312, 156),
    "A800": (312, 312, 156),
    "A40": (149.7, 149.7, 74.8),
    "A30": (165, 165, 82),
    "A10": (125, 125, 62.5),
    "A10G": (70, 70, 35),
    "V100-SXM2": (None, 125, 15.7),
    "V100-PCIE": (None, 112, 14),
    "T4": (None, 65, 8.1),
    "RTX 6000 Ada": (364.2, 364.2, 182.1),
    "RTX A6000": (154.8, 154.8, 77.4),
    "RTX 5090": (209.5, 209.5, 104.8),
    "RTX 5080": (112.6, 112.6, 56.3),
    "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 4080": (97.5, 97.5, 48.7),
    "RTX 3090": (71, 71, 35.6),
    "RTX 3080": (59.5, 59.5, 29.8),
    "RTX 3070": (40.6, 40.6, 20.3),
}
_COLUMN = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
_VARIANT = r"(?! (?:PCIe|NVL|Ti|SUPER|D|Laptop)\b)(?!.*\bMIG\b)"  # another card, or a slice of this one


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """FLOP/s of dense matrix products in `dtype` that `device` has by its data sheet; None where none is listed."""
    device = torch.device(device)
    if device.type != "cuda" or dtype not in _COLUMN:
        return None
    name = torch.cuda.get_device_name(device)
    for card, tflops in PEAK_TFLOPS.items():
        if re.search(rf"\b{card}\b{_VARIANT}", name):
            peak = tflops[_COLUMN[dtype]]
            return None if peak is None else peak * 1e12
    return None


def mfu(
    tokens_per_second: float, config: GPTConfig, context: int, peak: float | None, *, frozen: bool = False
) -> float:
    """Model FLOPs utilisation: flops_per_token * tokens_per_second as a fraction of `peak` FLOP/s; nan without a peak.

    For several GPUs give the tokens per second of one of them, or the sum of their peaks.
    """
    return flops_per_token(config, context, frozen=frozen) * tokens_per_second / peak if peak else float("nan")
