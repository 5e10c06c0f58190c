"""One step of training on one process: micro-steps, clipping, guards, update. No host sync.

    L = sum_i n_i L_i / sum_i n_i                    over the micro-steps i of all processes, n_i targets each
    g = grad (s L)          norm = |g| / s           s: the loss scale of float16, else 1
    w = update(w, g / (s max(1, norm / clip)))       unless the step is skipped

The optimizer divides while it reads g, so clipping and unscaling cost no pass over the gradients. Whether a step is
skipped is decided on the device (`Guard`). The host may read the decision later; it never has to wait.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from kernels import no_compilation
from model.gpt import GPT, IGNORE_INDEX, number_documents
from model.lora import LoraLinear
from model.training import parallel
from model.training.optim import EMA, set_lr
from model.training.parallel import World

WINDOW = 128  # steps that a spike is compared with, as in llm.c's outlier detector
FIRST_SCALE, GROWTH_STEPS = 2.0**16, 2000  # of the loss in float16: torch.amp.GradScaler's defaults
EAGER_STEPS = 3  # before a CUDA graph is captured: libraries initialise in them
AHEAD = 2  # steps that may be queued on the device
Spikes = Literal["off", "skip", "stop"]
NOT_FINITE, SPIKE = 1, 2  # causes that end a run


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """The seed of a step's dropout: a pure function, so that no checkpoint holds the state of a generator."""
    counter = (1 << 192) + (rank << 128) + (step << 64)  # the loader's Philox counters stay below 1 << 128
    return int(np.random.Philox(key=seed, counter=counter).random_raw() >> 1)


class Guard:
    """Decides on the device whether a step may change the weights, and keeps float16's loss scale.

    A loss or norm that is not finite ends the run: from that step on nothing is updated, and the host reads the number
    of the step from `bad_step` later. In float16 a norm that is not finite is an overflow: the step is skipped and the
    scale halved, until the scale is 1 and can no longer be the cause. A spike is a loss or norm of more than `z`
    standard deviations above the mean of the last WINDOW steps; it is skipped ("skip") or ends the run ("stop").
    """

    def __init__(self, device: torch.device, *, spikes: Spikes = "off", z: float = 6.0, scaled: bool = False) -> None:
        self.spikes, self.z, self.scaled = spikes, z, scaled
        self.bad_step = torch.zeros((), dtype=torch.int64, device=device)  # 0: none
        self.cause = torch.full((), NOT_FINITE, dtype=torch.int64, device=device)  # of bad_step
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # steps skipped so far
        self.scale = torch.full((), FIRST_SCALE if scaled else 1.0, device=device)
        self.clean = torch.zeros((), dtype=torch.int64, device=device)  # steps since the scale changed
        self.n_finite = torch.zeros((), dtype=torch.int64, device=device)
        self.window = torch.zeros((2, WINDOW), dtype=torch.float64, device=device)  # their losses and norms
        self.slots = torch.arange(WINDOW, device=device)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state to save: a resumed run decides as one that was never stopped."""
        state = {"skipped": self.skipped, "seen": self.n_finite, "window": self.window}
        return state | ({"scale": self.scale, "clean": self.clean} if self.scaled else {})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])

    def should_skip(self, step: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        """step: () int64; loss, norm: () of all processes -> () float32, 1.0 where the weights must not change."""
        finite = torch.isfinite(loss + norm)
        bad, skip = ~finite, None
        if self.scaled:
            # Only the scaled gradients overflowed: skip the step and lower the scale.
            overflow = torch.isfinite(loss) & ~finite & (self.scale > 1.0)
            bad, skip = bad & ~overflow, overflow
            self._rescale(overflow)
        if self.spikes != "off":
            spike = self._is_spike(finite, loss, norm)
            skip = spike if skip is None else skip | spike
            if self.spikes == "stop":
                bad = bad | spike
                self.cause.copy_(torch.where((self.bad_step == 0) & spike, SPIKE, self.cause))
        self.bad_step.copy_(torch.where((self.bad_step == 0) & bad, step, self.bad_step))
        frozen = self.bad_step > 0
        if skip is None:
            return frozen.float()
        self.skipped.add_(skip)
        return (skip | frozen).float()

    def _rescale(self, overflow: Tensor) -> None:
        self.clean.copy_(torch.where(overflow, 0, self.clean + 1))
        grow = self.clean == GROWTH_STEPS
        self.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0)))
        self.clean.mul_(~grow)

    def _is_spike(self, finite: Tensor, loss: Tensor, norm: Tensor) -> Tensor:
        values = torch.stack([loss, norm]).double()
        deviation = values - self.window.mean(1)
        spike = finite & (self.n_finite >= WINDOW) & (deviation > self.z * self.window.std(1, correction=0)).any()
        # Spikes enter the window too, so that a lasting change of the loss does not skip steps forever.
        is_slot = finite & (self.slots == self.n_finite % WINDOW)
        self.window.copy_(torch.where(is_slot, values[:, None], self.window))
        self.n_finite.add_(finite)
        return spike


class Step:
    """Runs one training step per call; `loss` and `norm` are then its results, () on the device."""

    def __init__(
        self,
        model: GPT,
        module: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        guard: Guard,
        world: World,
        *,
        grad_clip: float,
        seed: int,
        document_id: int | None = None,
        ema: EMA | None = None,
        graph: bool = False,
    ) -> None:
        """module: model as this process runs it (compiled, DDP, FSDP2). grad_clip: largest norm, 0 for none.

        document_id: the token between documents, if attention is to stay inside each. graph: capture the whole step in
        a CUDA graph after EAGER_STEPS; all calls must then be on one stream other than the default one.
        """
        self.model, self.module, self.optimizers, self.guard, self.world = model, module, optimizers, guard, world
        self.grad_clip, self.seed, self.document_id, self.ema = grad_clip, seed, document_id, ema
        self.parameters = list(model.parameters())
        self.loss = self.norm = torch.zeros((), device=world.device)
        self.step = torch.zeros((), dtype=torch.int64, device=world.device)
        config = model.config
        adapters = [module.dropout for module in model.modules() if isinstance(module, LoraLinear)]
        self.has_dropout = max(config.embd_pdrop, config.resid_pdrop, config.attn_pdrop, *adapters) > 0
        self.uses_graph = graph
        self.batch: Tensor | None = None  # (2, A, B, T): the tokens and targets that the graph reads
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager_steps = 0
        self.replays: deque[torch.cuda.Event] = deque()  # of the last steps

    def __call__(self, idx: Tensor, targets: Tensor, *, step: int, lr: float) -> None:
        """idx, targets: (A, B, T) int64, A micro-steps. step: number of the step, from 1. lr: learning rate."""
        self.seed_dropout(step)
        set_lr(self.optimizers, lr)
        self.step.fill_(step)
        if self.uses_graph:
            idx, targets = self._static(idx, targets)
            if self.graph is None and self.eager_steps == EAGER_STEPS:
                self._capture(idx, targets)
        if self.graph is None:
            self._run(idx, targets)
            self.eager_steps += 1
        else:
            self._replay(self.graph)

    def seed_dropout(self, step: int) -> None:
        """Seed the generator that dropout draws from; torch.manual_seed would visit those of all backends."""
        if self.has_dropout:
            generator = torch.cuda if self.world.device.type == "cuda" else torch.default_generator
            generator.manual_seed(dropout_seed(self.seed, step, self.world.rank))  # type: ignore[attr-defined]

    def _run(self, idx: Tensor, targets: Tensor) -> None:
        self.loss = self._gradients(idx, targets)
        scaled_norm = parallel.total_norm(self.model)
        scale = self.guard.scale.clone()  # should_skip may change it
        self.norm = scaled_norm / scale
        skip = self.guard.should_skip(self.step, self.loss, self.norm)
        grad_scale = scale
        if self.grad_clip:
            grad_scale = scale * torch.clamp((self.norm + 1e-6) / self.grad_clip, min=1.0)
        for optimizer in self.optimizers:
            optimizer.grad_scale, optimizer.found_inf = grad_scale, skip  # type: ignore[attr-defined]
            optimizer.step()
        self.clear_gradients()
        if self.ema is not None:
            self.ema.update(skip, self.step)
        self.model.refresh_working_weights()

    def clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _gradients(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Leave the gradient of s L in p.grad -> L, () float32."""
        counts = (targets != IGNORE_INDEX).sum((1, 2))  # (A,)
        # DDP and FSDP2 average the gradients of processes; times world.size, that is the sum.
        weights = counts * self.world.size / parallel.sum_all(counts.sum(), self.world)
        total = torch.zeros((), device=idx.device)
        for i in range(len(idx)):
            with parallel.synchronise(self.module, i == len(idx) - 1):
                loss = self.forward(idx[i], targets[i])
                (loss * (weights[i] * self.guard.scale)).backward()
            total = total + loss.detach() * weights[i]
        return parallel.sum_all(total, self.world) / self.world.size

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:  # (B, T) int64 each -> loss, ()
        return self.module(idx, targets, documents=number_documents(idx, self.document_id))[1]

    def _static(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The batch in the memory that the graph reads, laid out as the loader's.

        The eager steps read it too: Triton compiles anew for an address that is aligned otherwise, and what is launched
        in a capture has to be compiled.
        """
        if self.batch is None:
            self.batch = torch.stack((idx, targets))
        else:
            self.batch[0].copy_(idx)
            self.batch[1].copy_(targets)
        return self.batch[0], self.batch[1]

    def _capture(self, idx: Tensor, targets: Tensor) -> None:
        """Record `_run` on the static batch. Recording computes nothing: the replay that follows is this step."""
        graph = torch.cuda.CUDAGraph()
        with no_compilation(), torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._run(idx, targets)
        self.graph = graph

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Replay at most AHEAD steps ahead of the device: signals and the deadline are looked at between steps."""
        if len(self.replays) == AHEAD:
            self.replays.popleft().synchronize()
        graph.replay()
        event = torch.cuda.Event()
        event.record()
        self.replays.append(event)

    def release(self) -> None:
        """Free the graph and the memory of a step that it keeps: for what comes after the last step."""
        self.graph, self.uses_graph = None, False
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()

    def warm_up(self, idx: Tensor, targets: Tensor) -> float:
        """Run forward and backward once, only to compile the kernels -> seconds."""
        start = time.perf_counter()
        with parallel.synchronise(self.module, True):
            self.forward(idx[0], targets[0]).backward()
        self.clear_gradients()
        if idx.is_cuda:
            torch.cuda.synchronize(idx.device)
        return time.perf_counter() - start
