"""The memory of a training step, predicted from the configuration alone.

model = MemoryModel(PRESETS["gpt2"], 1024, torch.bfloat16, card=80 * 2**30)
model.predict(64).peak             # bytes of a step of 64 sequences
model.largest_batch(24 * 2**30)    # what trains on a card of 24 GiB
"""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from kernels._backend import device_problem
from kernels.linear_cross_entropy import SCRATCH_BYTES
from model.cli import UserError
from model.config import GPTConfig
from model.lora import LoraConfig
from model.training.flops import parameters
from model.training.options import TrainConfig
from model.training.parallel import World, all_gather_object

Backend = Literal["triton", "eager"]
_LARGE_CARD = 64 * SCRATCH_BYTES  # from here on the scratch of the logits is at its largest
_MASK_BYTES = 24  # per element, while PyTorch writes out the mask of a seed in int64

# Bytes of a card, or of a machine, that training does not get. A guess, and a round one: CUDA's context takes about
# half of it, cuBLAS's workspace 8 to 32 MiB; the rest covers fragmentation and a desktop.
RESERVE = 2**30
_USUAL = 8 * 2**30  # of a machine that does not say how much it has
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds, by purpose.

    optimizer: AdamW's two moments, or Muon's one for the matrices of the blocks and AdamW's for the rest.
    activations: what autograd saves in the forward pass for the backward pass, including tokens and targets.
    workspace: what a pass or the update holds at its peak beyond the other parts of `peak`: scratch, gradients of
        activations, and the gradients of parameters that exist by then.
    working: copies of the blocks' matrices in the dtype of the activations, where that is not float32.
    ema: the moving average of the parameters.
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
        """The most that a step holds at once. Gradients replace activations: they are no term of their own."""
        return self.parameters + self.working + self.optimizer + self.ema + self.activations + self.workspace

    def describe(self, limit: int) -> str:
        """ "memory: 2.9 GiB predicted of 8.0 GiB: 0.5 parameters, 0.9 optimizer, ..."; limit: bytes of the device."""
        unit, name, digits = (2**30, "GiB", 1) if self.peak >= 2**30 else (2**20, "MiB", 0)
        parts = {
            "parameters": self.parameters,
            "working weights": self.working,
            "optimizer": self.optimizer,
            "average": self.ema,
            "activations": self.activations,
            "gradients and workspace": self.workspace,
        }
        of = ", ".join(f"{size / unit:.{digits}f} {part}" for part, size in parts.items() if size)
        return f"memory: {self.peak / unit:.{digits}f} {name} predicted of {limit / 2**30:.1f} GiB: {of}"


@dataclass(frozen=True)
class MemoryModel:
    """Predicts what one training step of GPT(config, dtype) needs on one process.

    Parameters, gradients, the optimizer's state and the average are float32. Saved for the backward pass, with
    M = batch * context rows of C channels, in units of one row of C in `dtype`:

        embedding    the tokens, int64; with dropout its mask
        ln_1, ln_2   the input, 1           mean and rstd of each row, float32       eager: weight and bias, if copied
        c_attn       the input, 1
        attention    q, k, v: 3             output: 1, which is c_proj's input       log-sum-exp of each row and head
        c_fc         the input, 1
        gelu         the input, 4
        mlp.c_proj   the input, 4
        residual     eager: two masks, with dropout
        ln_f         as ln_1
        loss         the targets, int64     eager on a GPU: the input, 1, log-probabilities (M, V) float32, the table
                                            else: both gradients, 1 and (V, C) float32, which the forward pass makes

    (16 per block; 2 with `recompute`, its two inputs.) Our kernels save seeds instead of masks. An element of PyTorch's
    masks is a byte on a GPU and one of `dtype` on a CPU. PyTorch's attention saves seeds on a GPU; on a CPU, with
    dropout, it saves q, k and v in float32, and probabilities, noise and their product for each pair of positions. With
    `recompute` the eager path takes its masks from seeds on any device: a byte per element, and attention written out,
    in one block at a time.

    The peak is the largest of these moments, each beyond what exists between two steps:

        loss, forward     activations, the input, a chunk of logits (eager: twice), the table, if copied
                          (with `recompute` also the residual stream, which no pass has saved)
        loss, backward    activations, and    eager on a GPU: gradients of log-probabilities and logits, both float32
                                              else: both gradients scaled
        mlp, backward     of each block: what the blocks up to it saved, the gradients of the parameters above, of
                          mlp.c_proj's weight and input, 4, of its output, 1, and of the residual, 1 (without dropout
                          the same tensor); then, that input freed, those of the gelu's output and input, 8
        mask              eager, `recompute`, dropout: the second mask of a block while it is written out
        attention         eager, dropout: its backward pass on a CPU, the writing out of its mask with `recompute`
        c_attn, backward  all gradients but that of the position table, on a CPU that of c_attn's weight in `dtype` too,
                          3 rows
        end               all gradients, and that of the token table again: from the output head, from the embedding,
                          and their sum, a third tensor unless autograd may write it over the first (eager); or, eager,
                          the rows' gradient in float32 in its place
        update            all gradients, and Muon's scratch

    A CUDA device pads the rows of eager's table to a multiple of 128, which is always a copy. Not counted: what is
    smaller than a row of C for each token (partial sums of weight gradients, a CPU's statistics in `dtype`), the tokens
    of a step's other micro-steps, the mask of eager's attention inside documents, the scratch of matrix products
    (cuBLAS's, oneDNN's, a CPU's float32 copies in the loss), and the allocator's rounding.

    context: tokens of a sequence. card: bytes of the GPU's memory, which bound the chunk of logits: from 64 GiB on
    nothing changes; 0 for a CPU. accumulate: gradients exist throughout, those of earlier micro-steps or DDP's buckets.
    graph: the step is a CUDA graph, which keeps its memory, so that an evaluation in the same batches comes on top.
    lora: adapters are trained and all else is frozen; see `_LoraStep`.
    FSDP, where processes share parameters and state, needs less than is predicted.
    """

    config: GPTConfig
    context: int
    dtype: torch.dtype
    backend: Backend = "triton"
    card: int = _LARGE_CARD
    optimizer: Literal["adamw", "muon"] = "adamw"
    ema: bool = False
    recompute: bool = False
    accumulate: bool = False
    graph: bool = False
    lora: LoraConfig | None = None

    def predict(self, batch: int) -> Memory:
        """Micro-steps of (batch, context) tokens."""
        step = _LoraStep(self, batch) if self.lora else _Step(self, batch)
        moments = [step.activations + step.loss_passes, *step.block_moments(), *step.end_moments()]
        highest = max(moments) + (step.gradients if self.accumulate else 0)
        states, scratch = 2 * step.gradients, 0
        if self.optimizer == "muon":
            states -= step.muon_matrices
            # In 16 bits on GPUs with bfloat16.
            scratch = step.muon_scratch() * (2 if self.card and self.dtype == torch.bfloat16 else 4)
        highest = max(highest, 2 * step.ids + step.gradients + scratch)
        if self.graph:
            highest += step.evaluation()
        return Memory(
            parameters=step.parameters,
            gradients=step.gradients,
            optimizer=states,
            activations=step.activations,
            workspace=highest - step.activations,
            working=step.working,
            ema=step.gradients if self.ema else 0,
        )

    def largest_batch(self, limit: int) -> int:
        """The largest batch that trains in `limit` bytes, the memory of the card or machine; 0 if none does.

        RESERVE stays free, and gradients may accumulate over micro-steps. Chunks of logits come in even sizes, so that
        a slightly larger batch may need slightly less and fit as well.
        """
        model = replace(self, accumulate=True, card=limit if self.card else 0)
        usable = limit - RESERVE
        # a sequence saves more than a byte for each of its tokens
        return bisect.bisect_right(
            range(1, max(1, usable // self.context)), usable, key=lambda batch: model.predict(batch).peak
        )

    def fit(self, sequences: int, limit: int) -> int:
        """The largest batch that fits and divides `sequences`, those of a step; 0 if none does."""
        return _divisor(sequences, self.largest_batch(limit))

    def advice(self, batch: int, sequences: int, limit: int) -> str:
        """What to do when a step of `sequences` in micro-steps of `batch` does not fit into `limit` bytes, in one line.

        The batch that it names is smaller than the one that failed, whatever was predicted of it: other programs may
        hold memory too.
        """

        def options(model: MemoryModel, most: int) -> str:
            fits = _divisor(sequences, min(model.largest_batch(limit), most))
            return f"--batch-size {fits} --grad-accum {sequences // fits}" if fits else ""

        if smaller := options(self, batch - 1):
            return f"use {smaller}: it should fit, and a step learns from as many sequences"
        if not self.recompute and (smaller := options(replace(self, recompute=True), batch)):
            return f"add --recompute and use {smaller}: it should fit, and a step takes about a third longer"
        return "no smaller --batch-size should fit: choose a smaller --context or preset"


class _Step:
    """The terms of MemoryModel's table for one batch, in bytes."""

    def __init__(self, model: MemoryModel, batch: int) -> None:
        self.model, self.config, self.batch = model, model.config, batch
        self.C, self.V, self.L = self.config.n_embd, self.config.vocab_size, self.config.n_layer
        self.M = batch * model.context
        self.eager, self.card, self.size = model.backend == "eager", model.card, model.dtype.itemsize
        self.fused_loss = not (self.eager and self.card)
        self.copy = self.size if model.dtype != torch.float32 else 0  # of one element of a weight's copy
        self.row, self.ids = self.M * self.C * self.size, self.M * 8
        self.table, self.matrices = self.V * self.C * 4, 12 * self.C * self.C * self.L * 4
        self.parameters = self.gradients = parameters(self.config) * 4
        self.working, self.muon_matrices = self.matrices // 4 * self.copy, self.matrices
        self.loss, self.loss_passes, self.table_gradients = self._loss()
        self.attention, self.attention_moment = self._attention()
        C, M = self.C, self.M
        bias = 1 if self.config.bias else 0
        norm = self.row + 2 * M * 4 + (1 + bias) * C * (self.copy if self.eager else 0)
        self.mask = 0
        if self.eager and self.config.resid_pdrop:
            self.mask = M * C * (1 if self.card or model.recompute else self.size)
        self.block = 2 * norm + 11 * self.row + self.attention + 2 * self.mask  # within a block's backward pass
        self.saved = 2 * self.row if model.recompute else self.block  # of a block, from one pass to the other
        self.embedding = self.ids + (M * C * (1 if self.card else self.size) if self.config.embd_pdrop else 0)
        stream = self.row if model.recompute else 0
        self.activations = self.embedding + self.L * self.saved + norm - stream + self.loss

    def muon_scratch(self) -> int:
        """Elements: three stacks of queries, keys and values, the most of one shape, and two of their squares."""
        return 15 * self.L * self.C * self.C

    @property
    def _rows(self) -> int:
        """Rows of the table and of its gradient in kernels/linear_cross_entropy.py."""
        return self.V if self.eager else self.V + -self.V % 64

    def _head(self) -> int:
        """The table in the activations' dtype, as kernels/linear_cross_entropy.py multiplies by it, if it is a copy."""
        return self._rows * self.C * self.size if self.copy or self._rows != self.V else 0

    def _loss(self) -> tuple[int, int, int]:
        """What the loss saves, what its passes need beyond the activations, and gradients of the table at the end."""
        M, V, C = self.M, self.V, self.C
        if not self.fused_loss:
            head = (V + -V % 128) * C * self.size
            return self.ids + self.row + 4 * M * V + head, 8 * M * V, 1
        inputs = 2 if self.model.recompute else 1
        forward = self._scratch() + inputs * self.row + self._head()
        gradient = self._rows * C * 4
        return self.ids + self.row + gradient, max(forward, self.row + self.table), 1 if self.eager else 2

    def _attention(self) -> tuple[int, int]:
        """What a block's attention saves without its output, and its highest moment beyond the block's inputs."""
        M, C, context = self.M, self.C, self.model.context
        scores, visible = self.config.n_head * M * context, context**2
        drops = self.eager and self.config.attn_pdrop
        if drops and self.model.recompute:
            saved = 3 * self.row + (2 * self.size + 1) * scores + visible  # probabilities, those not dropped, two masks
            return saved, 3 * self.row + _MASK_BYTES * scores + 2 * visible
        if drops and not self.card:
            saved = 4 * (3 * M * C + 3 * scores)
            return saved, saved + 4 * (scores + 2 * M * C) + 4 * 9 * C * C  # weights: c_proj, c_fc, mlp.c_proj
        return 3 * self.row + 4 * self.config.n_head * M, 0

    @property
    def _inner_gradients(self) -> int:
        """Gradients of the parameters of all blocks and ln_f."""
        return self.gradients - self.table - self.config.n_positions * self.C * 4

    def block_moments(self) -> list[int]:
        """Backward through the blocks, without the gradients of earlier micro-steps."""
        C, row, model = self.C, self.row, self.model
        below = self.embedding + self.ids + self.table
        weight = 4 * C * C  # elements of mlp.c_proj's
        copy = 0 if self.card else self.copy  # of a weight's gradient: a GPU makes it in float32
        moments = []
        for layer in range(self.L):
            above = 0 if model.accumulate else (self.L - 1 - layer) * (self._inner_gradients // self.L)
            inputs = below + above + layer * self.saved + 2 * row
            whole = inputs + self.block - 2 * row - self.mask  # the last mask is freed, or not written yet
            product = (6 if self.config.resid_pdrop else 5) * row + weight * (copy or 4)  # mlp.c_proj's gradients
            cast = row + weight * (copy + 4)  # its weight's in two dtypes; its input's is freed
            gelu = 5 * row + (0 if model.accumulate else weight * 4)
            moments.append(whole + max(product, cast, gelu))
            incoming = 1 if layer == self.L - 1 else 2  # gradients of a block's outputs: the last stream is not used
            if model.recompute and self.mask:
                moments.append(whole + (1 + incoming) * row + _MASK_BYTES * self.M * C)
            if self.attention_moment:
                moments.append(inputs + incoming * row + self.attention_moment)
        c_attn = 12 * C * C if model.accumulate else self._inner_gradients
        moments.append(below + c_attn + 3 * C * C * copy + 3 * row)
        return moments

    def end_moments(self) -> list[int]:
        """The end of the backward pass: the gradients of the two embeddings."""
        inner = 0 if self.model.accumulate else self._inner_gradients
        end = 2 * (self.ids + self.table) + self.config.n_positions * self.C * 4 + inner
        rows = 4 * self.M * self.C if self.eager else 0
        return [end + max((self.table_gradients - 1) * self.table, rows)]

    def evaluation(self) -> int:
        """A forward pass without gradients, beyond the weights."""
        M, V, C, size = self.M, self.V, self.C, self.size
        table = V * C * self.copy
        if self.fused_loss:
            loss = self._scratch() + self._head()
        else:
            width = V + -V % 128  # of the logits, and rows of the table that makes them
            loss = M * width * size + max(table + width * C * size, M * V * (8 if self.copy else 4))
        return 2 * self.ids + max(12 * self.row, 2 * self.row + loss)

    def _scratch(self) -> int:
        """The chunk of logits in kernels/linear_cross_entropy.py; eager: also in float32, and log-probabilities."""
        row_bytes = self.V * self.size if self.eager else (self.V + -self.V % 64) * self.size
        most = max(128, min(SCRATCH_BYTES, self.card // 64) // row_bytes // 64 * 64)
        chunks = -(-self.M // most)
        row_bytes += (4 + 4 * (self.copy > 0)) * self.V if self.eager else 0
        return min(self.M, -(-self.M // (64 * chunks)) * 64) * row_bytes


class _LoraStep(_Step):
    """The same of a step that trains adapters of rank r, where it differs. Frozen matrices are kept in `dtype` alone.

    A frozen parameter's product saves no input, its LayerNorm and the embedding nothing but what their own inputs'
    gradients need, and the loss no gradient of the table. Beside each matrix with an adapter: its input, which
    attention saves as its output anyway, A x, and in 16 bits A and B. With --lora-dropout the input after it, and a
    mask. Up to the first adapter nothing is saved: no gradient goes further back. Moments that remain:

        loss              as in MemoryModel, without the table
        mlp, backward     the gradients of mlp.c_proj's input, 4, through the matrix, through the adapter, and their
                          sum; or, without an adapter there, those of the gelu's output and input
        mlp, forward      with --lora-dropout: inputs and outputs that exist without being saved
        mask, attention   as in MemoryModel
        update            all gradients, and Muon's scratch
    """

    def __init__(self, model: MemoryModel, batch: int) -> None:
        super().__init__(model, batch)
        C, M, row, lora = self.C, self.M, self.row, model.lora
        assert lora is not None
        self.shapes = {
            "attn.c_attn": (C, 3 * C),
            "attn.c_proj": (C, C),
            "mlp.c_fc": (C, 4 * C),
            "mlp.c_proj": (4 * C, C),
        }
        self.targets = [name for name in self.shapes if lora.is_target(f".{name}")]
        sizes = {name: lora.rank * sum(self.shapes[name]) for name in self.targets}  # elements of A and B
        self.gradients = self.muon_matrices = 4 * self.L * sum(sizes.values())
        self.parameters += self.gradients - self.matrices // 4 * (4 - self.size)
        self.working = 0
        norm = row + 2 * M * 4 + (1 + bool(self.config.bias)) * C * (self.copy if self.eager else 0)
        self.noise = noise = (1 if self.card else self.size) * bool(lora.dropout)
        self.mlp_gradients = 4 * sizes.get("mlp.c_proj", 0)
        # What writes the probabilities out does not save attention's output.
        writes_out = self.eager and self.config.attn_pdrop and (model.recompute or not self.card)

        def adapter(name: str) -> int:
            """What is saved of a product beside its matrix."""
            if name not in sizes:
                return 0
            n_in = self.shapes[name][0]
            kept = name == "attn.c_proj" and not lora.dropout and not writes_out  # as the output of attention
            return M * (n_in * (self.size * (not kept) + noise) + lora.rank * self.size) + sizes[name] * self.copy

        self.mlp_saved = adapter("mlp.c_proj")
        saved = {  # in the order of the forward pass
            "ln_1": norm,
            "attn.c_attn": adapter("attn.c_attn"),
            "attention": self.attention + (0 if writes_out else row),
            "attn.c_proj": adapter("attn.c_proj"),
            "ln_2": self.mask + norm,
            "mlp.c_fc": adapter("mlp.c_fc"),
            "gelu": 4 * row,
            "mlp.c_proj": self.mlp_saved,
            "dropout": self.mask,
        }
        self.block = sum(saved.values())
        self.first_block = sum([*saved.values()][[*saved].index(self.targets[0]) :])
        if self.attention_moment and not model.recompute:
            self.attention_moment -= 4 * 9 * C * C  # gradients of weights
        n_in = self.shapes[self.targets[0]][0]
        # The first adapter's input has no gradient: no mask, and no A in 16 bits.
        self.first_block -= M * n_in * noise + lora.rank * n_in * self.copy
        if self.targets[0] == "attn.c_proj" and not lora.dropout and not writes_out:
            self.first_block += row  # attention's output, saved for A alone
        if model.recompute:  # keeps both inputs of a block
            other = row * ("attn.c_attn" not in sizes or bool(lora.dropout))
            self.block, self.first_block = self.block + other, self.first_block + other + row
        self.saved, self.first_saved = (2 * row, 2 * row) if model.recompute else (self.block, self.first_block)
        end = 0 if model.recompute else norm  # of ln_f
        self.activations = self.ids + self.first_saved + (self.L - 1) * self.saved + end + self.loss

    def muon_scratch(self) -> int:
        """As `_Step`'s, of the factors of one shape that take the most."""
        counts: dict[tuple[int, int], int] = {}
        r = self.model.lora.rank  # type: ignore[union-attr]
        for name in self.targets:
            for shape in ((r, self.shapes[name][0]), (self.shapes[name][1], r)):
                counts[shape] = counts.get(shape, 0) + self.L
        return max(n * (3 * R * C + 2 * min(R, C) ** 2) for (R, C), n in counts.items())

    def _loss(self) -> tuple[int, int, int]:
        M, V, C = self.M, self.V, self.C
        if not self.fused_loss:
            return self.ids + 4 * M * V + (V + -V % 128) * C * self.size, 8 * M * V, 0
        inputs = 2 if self.model.recompute else 1
        forward = self._scratch() + inputs * self.row + self._head()
        return self.ids + self.row, max(forward, 8 * M * C if self.eager and self.copy else self.row), 0

    def block_moments(self) -> list[int]:
        """Backward through the blocks, without the gradients of earlier micro-steps."""
        row, model, moments = self.row, self.model, []
        adapts = "mlp.c_proj" in self.targets  # what it saved is freed, and the gradients of A and B are there
        highest = 13 * row + self.mlp_gradients - self.mlp_saved if adapts else 9 * row
        if self.noise:  # forward through mlp.c_proj: its input, both outputs, and those of ln_1 and ln_2
            highest = max(highest, (7 if model.recompute else 8) * row)
        for layer in range(self.L):
            above = 0 if model.accumulate else (self.L - 1 - layer) * (self.gradients // self.L)
            inputs = 2 * self.ids + above + (self.first_saved + (layer - 1) * self.saved if layer else 0)
            whole = inputs + (self.block if layer else self.first_block) - self.mask
            moments.append(whole + highest)
            incoming = 1 if layer == self.L - 1 else 2
            if model.recompute and self.mask:
                moments.append(whole + (1 + incoming) * row + _MASK_BYTES * self.M * self.C)
            if self.attention_moment:
                moments.append(inputs + (2 + incoming) * row + self.attention_moment)
        return moments

    def end_moments(self) -> list[int]:
        return []


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n up to `most`, 0 if there is none."""
    return next((divisor for divisor in range(min(n, most), 0, -1) if n % divisor == 0), 0)


def device_bytes(device: torch.device | str) -> int:
    """Memory of a CUDA device; for a CPU that of the machine, or the limit of its container."""
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


def memory_model(cfg: TrainConfig, config: GPTConfig, world: World) -> tuple[MemoryModel, int]:
    """The model of a run's step, and the bytes this process has for it: its GPU's, or a share of the machine's."""
    on_cpu = world.device.type == "cpu"
    works = cfg.backend != "eager" and device_problem(world.device.type, world.device.index) is None
    limit = device_bytes(world.device) // (world.size if on_cpu else 1)
    model = MemoryModel(
        config,
        cfg.context,
        cfg.torch_dtype,
        "triton" if works and (not on_cpu or cfg.backend == "triton") else "eager",
        card=0 if on_cpu else limit,
        optimizer=cfg.optimizer,
        ema=cfg.ema > 0,
        recompute=cfg.recompute,
        graph=cfg.uses_graph(world),
        lora=cfg.lora,
    )
    return model, limit


def fit_batch(cfg: TrainConfig, config: GPTConfig, world: World, sequences: int) -> TrainConfig:
    """Resolve --batch-size auto to the largest batch that fits; --grad-accum then makes up a step's `sequences`.

    Raises UserError where none fits.
    """
    if cfg.batch_size != "auto":
        return cfg
    model, limit = memory_model(cfg, config, world)
    limit = min(all_gather_object(limit, world))  # all processes take the same batches
    fits = model.fit(sequences // world.size, limit)
    if not fits:
        raise UserError(out_of_memory(model, limit, 1, sequences))
    return replace(cfg, batch_size=fits, grad_accum=sequences // fits)


def check_memory(cfg: TrainConfig, model: MemoryModel, limit: int, batch: int, sequences: int) -> Memory:
    """The prediction for micro-steps of `batch`. Raises UserError where it is more than the device has.

    Not with --force, and not for FSDP, which needs less than is predicted.
    """
    needed = model.predict(batch)
    if needed.peak > limit and not cfg.force and cfg.parallel != "fsdp":
        gib = 2**30
        raise UserError(
            f"a step needs about {needed.peak / gib:,.1f} GiB of memory, and the {'GPU' if model.card else 'machine'} "
            f"has {limit / gib:,.1f} GiB\n{model.advice(batch, sequences, limit)} (--force starts anyway)"
        )
    return needed


def out_of_memory(model: MemoryModel, limit: int, batch: int, sequences: int) -> str:
    """The message for a step of `sequences` in micro-steps of `batch` that does not fit."""
    return f"this model and batch do not fit into memory\n{model.advice(batch, sequences, limit)}"
