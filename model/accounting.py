"""What a model costs, from its configuration alone: parameters, FLOPs, share of a GPU's peak, memory of training."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass
from typing import Literal

import torch

from kernels.linear_cross_entropy import SCRATCH_BYTES
from model.config import GPTConfig


def parameters(config: GPTConfig) -> int:
    """Number of parameters of GPT(config), the tied output head counted once. 124,439,808 for the gpt2 preset."""
    C = config.n_embd
    weights = 12 * C * C  # c_attn 3, attn.c_proj 1, mlp.c_fc 4, mlp.c_proj 4
    biases = 9 * C if config.bias else 0
    norm = 2 * C if config.bias else C
    return (config.vocab_size + config.n_positions) * C + config.n_layer * (weights + biases + 2 * norm) + norm


def flops_per_token(config: GPTConfig, context: int) -> int:
    """Floating-point operations of one training step (forward and backward) per token of a `context`-token sequence.

        6 * N + 12 * n_layer * n_embd * context

    The formula of PaLM's appendix B (Chowdhery et al. 2022, arXiv 2204.02311), as nanoGPT counts it: N leaves out the
    position table, which is only looked up, and keeps the token table, which is the output head's weight; attention
    counts in full, although a causal kernel computes about half of it. Published MFU figures are counted this way.
    855,166,464 for gpt2 at 1024.
    """
    matmul_parameters = parameters(config) - config.n_positions * config.n_embd
    return 6 * matmul_parameters + 12 * config.n_layer * config.n_embd * context


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


def mfu(tokens_per_second: float, config: GPTConfig, context: int, peak: float | None) -> float:
    """Model FLOPs utilisation: flops_per_token * tokens_per_second as a fraction of `peak` FLOP/s; nan without a peak.

    For several GPUs give the tokens per second of one of them, or the sum of their peaks.
    """
    return flops_per_token(config, context) * tokens_per_second / peak if peak else float("nan")


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds, by what they are for.

    activations: what autograd keeps from the forward pass for the backward pass, the tokens and targets included.
    workspace: what a forward or backward pass holds at its highest beyond parameters, optimizer state and activations:
        scratch, gradients of activations, and those gradients of parameters that are there by then.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int

    @property
    def peak(self) -> int:
        """What a step that begins without gradients holds at its highest.

        Activations go while gradients come, so that the gradients are no term of their own. Where those of earlier
        micro-steps are kept (gradient accumulation), peak + gradients is an upper bound.
        """
        return self.parameters + self.optimizer + self.activations + self.workspace


Backend = Literal["triton", "eager"]
_LARGE_CARD = 64 * SCRATCH_BYTES  # from here on the logits' scratch is at its largest


def memory(
    config: GPTConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    backend: Backend = "triton",
    *,
    card: int = _LARGE_CARD,
) -> Memory:
    """What one training step of GPT(config, dtype) needs: (batch, context) tokens, AdamW, no gradients before it.

    Parameters, gradients and both moments of AdamW are float32. Kept for the backward pass, with M = batch * context
    rows of C channels, a row of C in `dtype` being 1 and a weight counting where it is another dtype than float32, as
    its copy in `dtype`:

        embedding    the tokens, int64
        ln_1, ln_2   the input, 1           mean and rstd of each row, float32       eager: weight and bias, if copied
        c_attn       the input, 1           its weight, if copied
        attention    q, k, v: 3             output: 1, which is c_proj's input       log-sum-exp of each row and head
        c_proj       its weight, if copied
        c_fc         the input, 1           its weight, if copied
        gelu         the input, 4
        mlp.c_proj   the input, 4           its weight, if copied
        ln_f         as ln_1
        loss         the targets, int64     eager: the input, 1, log-probabilities (M, V) float32, the table, if copied
                                            triton: both gradients, 1 and (V, C) float32, which the forward pass makes

    (16 a block.) The peak is the largest of these moments, each beyond parameters and optimizer state:

        loss, forward     triton: activations, the input, a chunk of logits, the table, if copied
        loss, backward    activations, and    eager: gradients of log-probabilities and of logits, both float32
                                              triton: both gradients scaled
        gelu, backward    of the last and of the first block: its input's and its output's gradient, 4 each, the
                          residual's, 1, and the gradients of the weights above; mlp.c_proj has given back its input
        end               all gradients, and that of the token table again: from the output head, from the embedding,
                          and their sum, a third tensor but where autograd may write it over the first (eager's head
                          with a copied table)

    A CUDA device pads the rows of eager's table to a multiple of 128, and that is always a copy. Left out: what is
    smaller than a row of C for each token (partial sums of weight gradients, a CPU's statistics in `dtype`), the
    scratch of matrix products (cuBLAS's, oneDNN's, a CPU's float32 copies in the loss), and the allocator's rounding.

    card: bytes of the GPU's memory, which bound the chunk of logits: from 64 GiB on nothing changes; 0 for a CPU.
    ValueError for a config with dropout: its masks are not counted.
    """
    if config.embd_pdrop or config.resid_pdrop or config.attn_pdrop:
        raise ValueError("memory is predicted without dropout: set embd_pdrop, resid_pdrop and attn_pdrop to 0")
    C, V, L, M = config.n_embd, config.vocab_size, config.n_layer, batch * context
    eager, size = backend == "eager", dtype.itemsize
    copy = size if dtype != torch.float32 else 0  # bytes of a weight's copy
    row, stats, ids = M * C * size, 2 * M * 4, M * 8
    table, gradients = V * C * 4, parameters(config) * 4
    norm = row + stats + (2 if config.bias else 1) * C * (copy if eager else 0)
    block = 2 * norm + 14 * row + M * config.n_head * 4 + 12 * C * C * copy
    if eager:
        head = (V + -V % 128) * C * size if card else V * C * copy
        loss = ids + row + 4 * M * V + head
        moments = [2 * 4 * M * V]
        sums = 1 if head else 2
    else:
        loss = ids + row + table
        moments = [_scratch(M, V, size, card) + row + V * C * copy, row + table]
        sums = 2
    activations = ids + L * block + norm + loss
    weights_above = (4 * C + (1 if config.bias else 0)) * C * 4  # mlp.c_proj
    block_gradients = 4 * (parameters(config) - (V + config.n_positions) * C) // L
    for layer in {0, L - 1}:
        kept = 2 * ids + (layer + 1) * block - 4 * row - 4 * C * C * copy
        grown = 9 * row + table + weights_above + (L - 1 - layer) * block_gradients
        moments.append(kept + grown - activations)
    moments.append(2 * ids + gradients + sums * table - activations)
    return Memory(gradients, gradients, 2 * gradients, activations, max(moments))


def _scratch(M: int, V: int, size: int, card: int) -> int:
    """Bytes of the chunk of logits in kernels/linear_cross_entropy.py."""
    row_bytes = (V + -V % 64) * size
    most = max(128, min(SCRATCH_BYTES, card // 64) // row_bytes // 64 * 64)
    chunks = -(-M // most)
    return min(M, -(-M // (64 * chunks)) * 64) * row_bytes


# Bytes of a card that training does not get. A guess, and a round one: CUDA's context takes about half of it, cuBLAS's
# workspace 8 to 32 MiB; the rest is for blocks that the allocator cannot join, and for a desktop.
RESERVE = 2**30


def largest_batch(config: GPTConfig, context: int, dtype: torch.dtype, backend: Backend, bytes: int) -> int:
    """The largest batch that trains on a card of `bytes`, 0 if not even one sequence does.

    RESERVE is left free, and gradients may accumulate over micro-steps. Chunks of logits come in even sizes, so that a
    slightly larger batch may need slightly less and fit as well.
    """
    limit = bytes - RESERVE

    def need(batch: int) -> int:
        held = memory(config, batch, context, dtype, backend, card=bytes)
        return held.peak + held.gradients

    # a sequence keeps more than a byte for each of its tokens
    return bisect.bisect_right(range(1, max(1, limit // context)), limit, key=need)
