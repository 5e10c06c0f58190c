"""The memory of a training step, predicted from the configuration alone."""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kernels.linear_cross_entropy import SCRATCH_BYTES
from model.config import GPTConfig
from model.training.flops import parameters


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds, by what they are for.

    optimizer: AdamW's two moments, or Muon's one for the matrices of the blocks and AdamW's for the rest.
    activations: what autograd keeps from the forward pass for the backward pass, the tokens and targets included.
    workspace: what a pass or the update holds at its highest beyond the other parts of `peak`: scratch, gradients of
        activations, and those gradients of parameters that are there by then.
    working: copies of the blocks' matrices in the dtype of the activations, where that is not float32.
    ema: the average of the parameters.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    working: int = 0
    ema: int = 0

    @property
    def peak(self) -> int:
        """What a step holds at its highest. Gradients come while activations go: they are no term of their own."""
        return self.parameters + self.working + self.optimizer + self.ema + self.activations + self.workspace


Backend = Literal["triton", "eager"]
_LARGE_CARD = 64 * SCRATCH_BYTES  # from here on the logits' scratch is at its largest
_MASK_BYTES = 24  # for each element, while PyTorch writes out the mask of a seed in int64


def memory(
    config: GPTConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    backend: Backend = "triton",
    *,
    card: int = _LARGE_CARD,
    optimizer: Literal["adamw", "muon"] = "adamw",
    ema: bool = False,
    recompute: bool = False,
    accumulate: bool = False,
    graph: bool = False,
) -> Memory:
    """What one training step of GPT(config, dtype) needs on one process: micro-steps of (batch, context) tokens.

    Parameters, gradients, the optimizer's state and the average are float32. Kept for the backward pass, with
    M = batch * context rows of C channels, a row of C in `dtype` being 1:

        embedding    the tokens, int64; with dropout its mask
        ln_1, ln_2   the input, 1           mean and rstd of each row, float32       eager: weight and bias, if copied
        c_attn       the input, 1
        attention    q, k, v: 3             output: 1, which is c_proj's input       log-sum-exp of each row and head
        c_fc         the input, 1
        gelu         the input, 4
        mlp.c_proj   the input, 4
        residual     eager: two masks, with dropout
        ln_f         as ln_1
        loss         the targets, int64     eager: the input, 1, log-probabilities (M, V) float32, the table, if copied
                                            triton: both gradients, 1 and (V, C) float32, which the forward pass makes

    (16 a block; 2 with `recompute`, its two inputs.) Our kernels keep seeds and no masks. An element of PyTorch's masks
    is a byte on a GPU, one of `dtype` on a CPU. Its attention keeps seeds on a GPU; on a CPU, with dropout, q, k and v
    in float32, and probabilities, noise and their product for each pair of positions. With `recompute` eager takes its
    masks from seeds, on any device: a byte an element, and attention written out, in one block at a time.

    The peak is the largest of these moments, each beyond what is there between two steps:

        loss, forward     triton: activations, the input, a chunk of logits, the table, if copied
                                  (with `recompute` also the residual stream, which no pass has kept)
        loss, backward    activations, and    eager: gradients of log-probabilities and of logits, both float32
                                              triton: both gradients scaled
        mlp, backward     of each block: what the blocks up to it keep, the gradients of the parameters above, of
                          mlp.c_proj's weight and input, 4, of its output, 1, and of the residual, 1 (without dropout
                          the same tensor); then, that input given back, those of the gelu's output and input, 8
        mask              eager, `recompute`, dropout: the second mask of a block while it is written out
        attention         eager, dropout: its backward pass on a CPU, the writing out of its mask with `recompute`
        c_attn, backward  all gradients but that of the position table, that of c_attn's weight in `dtype` too, 3 rows
        end               all gradients, and that of the token table again: from the output head, from the embedding,
                          and their sum, a third tensor but where autograd may write it over the first (eager's head
                          with a copied table); or the rows' gradient in float32 in its place
        update            all gradients, and Muon's scratch

    A CUDA device pads the rows of eager's table to a multiple of 128, and that is always a copy. Left out: what is
    smaller than a row of C for each token (partial sums of weight gradients, a CPU's statistics in `dtype`), the tokens
    of a step's other micro-steps, the mask of eager's attention inside documents, the scratch of matrix products
    (cuBLAS's, oneDNN's, a CPU's float32 copies in the loss), and the allocator's rounding.

    card: bytes of the GPU's memory, which bound the chunk of logits: from 64 GiB on nothing changes; 0 for a CPU.
    accumulate: gradients are there all the time, those of earlier micro-steps or DDP's buckets. graph: the step is a
    CUDA graph, which keeps its memory, so that what an evaluation in the same batches takes comes on top. FSDP, where
    processes share parameters and state, needs less than is predicted.
    """
    C, V, L, M = config.n_embd, config.vocab_size, config.n_layer, batch * context
    eager, size, bias = backend == "eager", dtype.itemsize, 1 if config.bias else 0
    copy = size if dtype != torch.float32 else 0  # bytes of a weight's copy
    row, stats, ids = M * C * size, 2 * M * 4, M * 8
    table, matrices, gradients = V * C * 4, 12 * C * C * L * 4, parameters(config) * 4
    norm = row + stats + (1 + bias) * C * (copy if eager else 0)

    # A block, and what is kept of it from one pass to the other.
    mask = M * C * (1 if card or recompute else size) if eager and config.resid_pdrop else 0
    attention, attention_moment = _attention(config, batch, context, size, backend, card=card, recompute=recompute)
    block = 2 * norm + 11 * row + attention + 2 * mask
    kept = 2 * row if recompute else block
    embedding = ids + (M * C * (1 if card else size) if config.embd_pdrop else 0)

    if eager:
        head = (V + -V % 128) * C * size if card else V * C * copy
        loss = ids + row + 4 * M * V + head
        passes = 8 * M * V
        sums = 1 if head else 2
    else:
        loss = ids + row + table
        forward = _scratch(M, V, size, card) + (2 if recompute else 1) * row + V * C * copy
        passes = max(forward, row + table)
        sums = 2
    activations = embedding + L * kept + norm - (row if recompute else 0) + loss

    # Moments, the gradients of earlier micro-steps left out. `made`: gradients of parameters that this one has made,
    # beside that of the table from the output head.
    moments = [activations + passes]
    below, positions = embedding + ids + table, config.n_positions * C * 4
    others = gradients - table - positions
    for layer in range(L):
        made = 0 if accumulate else (L - 1 - layer) * (others // L)
        inputs = below + made + layer * kept + 2 * row
        whole = inputs + block - 2 * row - mask  # the mask at the block's end is given back, or not there yet
        product = (6 if config.resid_pdrop else 5) * row + 4 * C * C * size  # mlp.c_proj's gradients
        cast = row + 4 * C * C * (copy + 4)  # that of its weight in two dtypes; its input is given back
        gelu = 5 * row + (0 if accumulate else 4 * C * C * 4)
        moments.append(whole + max(product, cast, gelu))
        incoming = 1 if layer == L - 1 else 2  # gradients of what the block has given: the last stream is not used
        if recompute and mask:
            moments.append(whole + (1 + incoming) * row + _MASK_BYTES * M * C)
        if attention_moment:
            moments.append(inputs + incoming * row + attention_moment)
    moments.append(below + (12 * C * C if accumulate else others) + 3 * C * C * copy + 3 * row)
    end = 2 * (ids + table) + positions + (0 if accumulate else others)
    moments.append(end + max((sums - 1) * table, 4 * M * C))
    highest = max(moments) + (gradients if accumulate else 0)

    states, scratch = 2 * gradients, 0
    if optimizer == "muon":
        states -= matrices
        # Three stacks of queries, keys and values, and two of their squares; in 16 bits where bfloat16 is at home.
        scratch = 15 * L * C * C * (2 if card and dtype == torch.bfloat16 else 4)
    highest = max(highest, 2 * ids + gradients + scratch)
    if graph:
        highest += _evaluation(config, batch, context, dtype, backend, card)
    return Memory(
        parameters=gradients,
        gradients=gradients,
        optimizer=states,
        activations=activations,
        workspace=highest - activations,
        working=matrices // 4 * copy,
        ema=gradients if ema else 0,
    )


def _attention(
    config: GPTConfig, batch: int, context: int, size: int, backend: Backend, *, card: int, recompute: bool
) -> tuple[int, int]:
    """Bytes that a block's attention keeps, its output left out, and its highest moment beyond the block's inputs."""
    C, M = config.n_embd, batch * context
    row, scores, visible = M * C * size, config.n_head * M * context, context**2
    if backend == "eager" and config.attn_pdrop and recompute:
        kept = 3 * row + (2 * size + 1) * scores + visible  # probabilities, those not dropped, two masks
        return kept, 3 * row + _MASK_BYTES * scores + 2 * visible
    if backend == "eager" and config.attn_pdrop and not card:
        kept = 4 * (3 * M * C + 3 * scores)
        return kept, kept + 4 * (scores + 2 * M * C) + 4 * 9 * C * C  # weights: c_proj, c_fc, mlp.c_proj
    return 3 * row + 4 * config.n_head * M, 0


def _evaluation(config: GPTConfig, batch: int, context: int, dtype: torch.dtype, backend: Backend, card: int) -> int:
    """Bytes that a forward pass without gradients takes beyond the weights: (batch, context) tokens."""
    C, V, M, size = config.n_embd, config.vocab_size, batch * context, dtype.itemsize
    copy = size if dtype != torch.float32 else 0
    row, table = M * C * size, V * C * copy
    if backend == "triton":
        loss = _scratch(M, V, size, card) + table
    else:
        width = V + (-V % 128 if card else 0)  # of the logits, and rows of the table that they are made with
        loss = M * width * size + max(table + (width * C * size if card else 0), M * V * (8 if copy else 4))
    return 2 * M * 8 + max(12 * row, 2 * row + loss)


def _scratch(M: int, V: int, size: int, card: int) -> int:
    """Bytes of the chunk of logits in kernels/linear_cross_entropy.py."""
    row_bytes = (V + -V % 64) * size
    most = max(128, min(SCRATCH_BYTES, card // 64) // row_bytes // 64 * 64)
    chunks = -(-M // most)
    return min(M, -(-M // (64 * chunks)) * 64) * row_bytes


# Bytes of a card, or of a machine, that training does not get. A guess, and a round one: CUDA's context takes about
# half of it, cuBLAS's workspace 8 to 32 MiB; the rest is for blocks that the allocator cannot join, and for a desktop.
RESERVE = 2**30
_USUAL = 8 * 2**30  # of a machine that does not say how much it has
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def largest_batch(
    config: GPTConfig,
    context: int,
    dtype: torch.dtype,
    backend: Backend,
    bytes: int,
    *,
    on_cpu: bool = False,
    **options: Any,
) -> int:
    """The largest batch that trains on a card of `bytes`, or with on_cpu in so much memory; 0 if not one sequence does.

    RESERVE is left free, and gradients may accumulate over micro-steps. Chunks of logits come in even sizes, so that a
    slightly larger batch may need slightly less and fit as well. options: as of `memory`.
    """
    card, options = 0 if on_cpu else bytes, {**options, "accumulate": True}
    limit = bytes - RESERVE

    def need(batch: int) -> int:
        return memory(config, batch, context, dtype, backend, card=card, **options).peak

    # a sequence keeps more than a byte for each of its tokens
    return bisect.bisect_right(range(1, max(1, limit // context)), limit, key=need)


def fit(
    config: GPTConfig,
    sequences: int,
    context: int,
    dtype: torch.dtype,
    backend: Backend,
    bytes: int,
    *,
    on_cpu: bool = False,
    **options: Any,
) -> int:
    """The largest batch that divides `sequences`, those of a step, and fits as largest_batch has it; 0 if none does."""
    return _divisor(sequences, largest_batch(config, context, dtype, backend, bytes, on_cpu=on_cpu, **options))


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, 0 if there is none."""
    return next((divisor for divisor in range(min(n, most), 0, -1) if n % divisor == 0), 0)


def device_bytes(device: torch.device | str) -> int:
    """Memory of a CUDA device; for a CPU that of the machine, or what its container may take."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if not hasattr(os, "sysconf"):  # Windows
        return _USUAL
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total  # without a limit it reads "max"


def advice(
    config: GPTConfig,
    batch: int,
    sequences: int,
    context: int,
    dtype: torch.dtype,
    backend: Backend,
    bytes: int,
    *,
    on_cpu: bool = False,
    **options: Any,
) -> str:
    """What to do when a step of `sequences` in micro-steps of `batch` has run out of memory, in one line.

    options: as of `memory`. The batch that is named is smaller than the one that failed, whatever was predicted of it:
    other programs may hold memory too.
    """

    def options_up_to(batch: int, **more: Any) -> str:
        most = largest_batch(config, context, dtype, backend, bytes, on_cpu=on_cpu, **{**options, **more})
        found = _divisor(sequences, min(most, batch))
        return f"--batch-size {found} --grad-accum {sequences // found}" if found else ""

    if found := options_up_to(batch - 1):
        return f"use {found}: it should fit, and a step learns from as many sequences"
    if not options.get("recompute") and (found := options_up_to(batch, recompute=True)):
        return f"add --recompute and use {found}: it should fit, and a step takes about a third longer"
    return "no smaller --batch-size should fit: choose a smaller --context or preset"


def describe(memory: Memory, bytes: int) -> str:
    """A prediction beside what there is: "memory: 2.9 GiB predicted of 8.0 GiB: 0.5 parameters, 0.9 optimizer, ..."."""
    unit, name, digits = (2**30, "GiB", 1) if memory.peak >= 2**30 else (2**20, "MiB", 0)
    parts = {
        "parameters": memory.parameters,
        "working weights": memory.working,
        "optimizer": memory.optimizer,
        "average": memory.ema,
        "activations": memory.activations,
        "gradients and workspace": memory.workspace,
    }
    of = ", ".join(f"{size / unit:.{digits}f} {part}" for part, size in parts.items() if size)
    return f"memory: {memory.peak / unit:.{digits}f} {name} predicted of {bytes / 2**30:.1f} GiB: {of}"
