"""A whole training step of a GPT: forward, backward, gradients clipped to norm 1, fused AdamW.

All start from the same weights, take the same batch of random tokens, run without dropout, and share the optimizer:

    plain          PyTorch's operators, attention as a textbook writes it (SDPA's math backend)
    eager          PyTorch's operators, attention by the SDPA backend that it picks; on a CPU the loss in chunks
    compile        torch.compile of eager, forward and backward
    compile+graph  the same, the optimizer included, as one CUDA graph
    compile+...    compile with the attention or the loss of a peer, of those in bench/peers.py; auto_chunker: with
                   Inductor's, over the whole step
    +attention     eager with our attention
    +layer_norm    and our LayerNorms
    +gelu          and our GELU
    triton         and our loss and embedding: all operators are ours
    triton+graph   the same, the optimizer included, as one CUDA graph
    trainer        the step of train.py: that, with weights kept in the activations' dtype, clipping inside the
                   optimizer, and guards; on a CPU eager and without a graph
    hf             GPT2LMHeadModel of transformers, attention by SDPA
    hf+patch       the same after kernels.patch; on a CPU eager
    hf+liger       the same with Liger's LayerNorm and fused linear cross-entropy
    nanogpt        the model.py of a nanoGPT checkout

Weights are float32 for all, and no loss is scaled. In 16 bits ours keeps all activations in that dtype; the last four
run under torch.autocast, as their users run them, which keeps residual stream and LayerNorm in float32.

Each provider is proven before it is timed: its first loss, the fall of the loss after two updates and the norm of the
gradient after the third must be those of the first provider of the group. The third loss of a graph is its first
replay's. With a peer's operator the losses are what eager computes from the weights: some peers return a loss rounded
to 16 bits, and training takes no more than its gradient.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import command, peer_models, peers
from bench.memory import MIB, card_bytes, free_bytes, peak, training_step
from bench.record import CONTROL, LADDER, Report, Row
from bench.timing import Call, Maker, Measured, Refused, clocks, measure
from kernels import patch, use_backend
from kernels._launch import capturing, on_stream
from kernels._registry import dtype_name
from model.cli import UserError
from model.config import PRESETS, GPTConfig
from model.gpt import GPT, CausalSelfAttention
from model.training import flops
from model.training.memory import Backend, Memory, MemoryModel
from model.training.optim import adamw, build
from model.training.parallel import World
from model.training.step import Guard, Step

PROVIDERS = (*LADDER, "compile+graph", *peers.STEP_PEERS, "hf", "hf+patch", "hf+liger", "nanogpt")
_NORMS = ("causal_attention", "layer_norm", "add_layer_norm")
_OURS = {"+attention": _NORMS[:1], "+layer_norm": _NORMS, "+gelu": (*_NORMS, "bias_gelu")}  # which run on Triton
# Relative: of the first loss; of its fall and the gradient's norm. Rounding alone makes 2e-5 and 2e-3 in 16 bits.
_TOLERANCE = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-3, 2e-2), torch.float16: (1e-3, 2e-2)}


@dataclass(frozen=True)
class _Task:
    config: GPTConfig
    batch: int
    context: int
    dtype: torch.dtype
    device: torch.device
    nanogpt: Path | None

    def tokens(self) -> tuple[Tensor, Tensor]:
        """(batch, context) random ids, and their successors as targets."""
        generator = torch.Generator().manual_seed(1)
        idx = torch.randint(self.config.vocab_size, (self.batch, self.context), generator=generator).to(self.device)
        return idx, idx.roll(-1, 1)

    def memory(self, backend: Backend, **options: Any) -> Memory:
        card = card_bytes(self.device)
        return MemoryModel(self.config, self.context, self.dtype, backend, card=card, **options).predict(self.batch)


@dataclass
class _Proof:
    losses: dict[str, list[float]] = field(default_factory=dict)  # of three steps, by provider
    norms: dict[str, float] = field(default_factory=dict)  # of the gradient after them
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Train(command.Timed):
    """Whole training steps, from plain attention in eager PyTorch to everything on, and Hugging Face's model."""

    preset: str = "gpt2"  # Model preset.
    batch: tuple[int, ...] = (4, 16, 64)  # Sequences per step.
    context: int | None = None  # Tokens per sequence; the preset's own length by default.
    dtype: command.Dtype | None = None  # Precision of activations; bfloat16 on a GPU and float32 on a CPU by default.
    vocab_size: int | None = None  # Size of the vocabulary; the preset's by default.
    bias: bool = True  # Biases in linear layers and LayerNorm, as GPT-2 has them.
    nanogpt: Path | None = None  # Folder of a nanoGPT checkout, to be timed in the same rounds.

    def check(self) -> None:
        command.require_model(self.preset, self.batch, self.context)
        command.pick("provider", self.provider, PROVIDERS)
        command.require_positive(seconds=self.seconds)
        peer_models.require_nanogpt(self.nanogpt, "model.py")

    def total(self, device: torch.device) -> int:
        return len(self.batch)

    def groups(self, device: torch.device, report: Report) -> Iterator[list[Row]]:
        """Yield a list of rows per batch size.

        Metrics of a row: tokens_per_s, mfu where the device's peak is known, the memory of one step in MiB, measured
        (by part) and predicted, and interleaved: 1 where the providers took turns, 0 where they did not fit in memory
        together and were timed one after another.
        """
        original = PRESETS[self.preset]
        chosen: dict[str, Any] = {"bias": self.bias, "vocab_size": self.vocab_size}
        changed = {name: v for name, v in chosen.items() if v is not None and v != getattr(original, name)}
        try:
            config = replace(original, **changed, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)
        except ValueError as error:
            raise UserError(f"{self.preset} cannot take these options: {error}") from None
        providers = self.provider or PROVIDERS
        names = peer_models.available(providers, device, config, report.missing, self.nanogpt)
        context, dtype = self.context or config.n_positions, command.dtype_of(self.dtype, device)
        for batch in self.batch:
            params = {"preset": self.preset, **changed, "batch": batch, "context": context, "dtype": dtype_name(dtype)}
            yield _group(_Task(config, batch, context, dtype, device, self.nanogpt), names, params, self.seconds)


def _group(task: _Task, names: Sequence[str], params: dict[str, Any], seconds: float) -> list[Row]:
    torch.compiler.reset()  # frees what other groups compiled
    proof = _Proof()
    makers = {name: functools.partial(_prepare, name, task, proof) for name in names}
    measured, together = _measure(makers, task, seconds)
    peak_flops = flops.peak_flops(task.device, task.dtype)

    def metrics(provider: str, median: float) -> dict[str, float]:
        rate = task.batch * task.context / median
        mfu = {"mfu": flops.mfu(rate, task.config, task.context, peak_flops)} if peak_flops else {}
        return {"tokens_per_s": rate, "interleaved": float(together), **mfu, **proof.metrics[provider]}

    return measured.rows("train", params, metrics)


def _measure(makers: Mapping[str, Maker], task: _Task, seconds: float) -> tuple[Measured, bool]:
    """Time the providers in turn, or one after another where memory is short; and whether it was in turn."""
    clock = clocks(task.device)[0]  # a step is many launches: what the host fails to hide is part of it
    if _fit_together(task, len(makers)):
        with contextlib.suppress(torch.OutOfMemoryError):
            measured = measure(makers, task.device, clock, seconds=seconds)
            if not any("OutOfMemoryError" in text for text in measured.failed.values()):
                return measured, True
    whole, control = Measured(clock), tuple[float, ...]()
    for name, maker in makers.items():
        part = measure({name: maker}, task.device, clock, seconds=seconds)
        control += part.seconds.pop(CONTROL, ())
        for attribute in ("seconds", "host", "failed", "state"):
            getattr(whole, attribute).update(getattr(part, attribute))
    if control:
        whole.seconds[CONTROL] = control
    return whole, False


def _fit_together(task: _Task, providers: int) -> bool:
    """Whether half of the free memory has room for the states of all and two working sets, as a graph keeps its own;
    the other half is for what is not predicted: attention with all its probabilities, other people's models."""
    if task.device.type != "cuda":
        return True
    need = task.memory("eager")
    state = need.parameters + need.optimizer
    return providers * state + 2 * (need.peak - state) <= free_bytes(task.device) / 2


def _prepare(provider: str, task: _Task, proof: _Proof) -> Call:
    """A provider's step, ready to be timed: it computes what the others compute, and its memory is known."""
    free_bytes(task.device)  # frees what the previous provider held, a failed one too
    module, loss = _model(provider, task)
    if provider == "trainer":
        plain_step, optimizer = _trainer(module, task)
    else:
        optimizer = adamw(module, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1)
        plain_step = training_step(module, optimizer, loss)

    def step() -> Tensor:
        with _backend(provider, task.device):
            return plain_step()

    three_steps = _three_steps_in_a_graph if provider.endswith("+graph") else _three_steps
    if provider in peers.STEP_PEERS:
        three_steps = functools.partial(_three_steps_by_eager, loss=functools.partial(_eager_loss, module, task))
    losses, call, highest = three_steps(step, task.device)
    with _backend(provider, task.device):
        parts, norm = _parts(module, loss)
    _check(provider, [value.item() for value in losses], norm, task.dtype, proof)
    if provider == "trainer":  # its fourth step is captured, where there is a graph
        highest = max(highest, peak(step, task.device))
    parts["optimizer"] = _bytes(t for state in optimizer.state.values() for t in state.values())
    kept = parts["parameters"] + parts["optimizer"]
    parts["peak"] = kept + _bytes(task.tokens()) + highest
    parts["workspace"] = parts["peak"] - kept - parts["activations"]
    graph = provider == "trainer" and task.device.type == "cuda"
    if provider in ("eager", "triton", "triton+graph", "trainer"):
        ours = graph or provider.startswith("triton")
        parts["predicted"] = task.memory("triton" if ours else "eager", graph=graph).peak
    proof.metrics[provider] = {f"{name}_mib": size / MIB for name, size in parts.items()}
    return call


def _model(provider: str, task: _Task) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The provider's model with the weights of all, and the loss of the batch as a function without arguments."""
    torch.manual_seed(0)
    model = GPT(task.config, dtype=task.dtype).to(task.device)
    idx, targets = task.tokens()
    if provider.startswith("compile"):
        if peer := peers.STEP_PEERS.get(provider):
            _take_from(peer, model)
        options = peers.AUTO_CHUNKER if provider == "compile+auto_chunker" else None
        # Isolated: they share GPT's code, and Dynamo falls back to eager after 8 compilations of one function.
        compile_: Any = torch.compile  # whose overloads do not know the argument
        compiled = compile_(model, dynamic=False, isolate_recompiles=True, options=options)
        return model, lambda: compiled(idx, targets)[1]
    if provider in LADDER:
        return model, lambda: model(idx, targets)[1]
    if provider == "nanogpt":
        assert task.nanogpt is not None
        theirs, forward = peer_models.nanogpt(model, task.nanogpt), peer_models.nanogpt_loss
    else:
        theirs, forward = peer_models.transformers_gpt2(model), peer_models.transformers_loss
    if provider == "hf+patch":
        patch(theirs)
    if provider == "hf+liger":
        peer_models.give_liger_norms(theirs)
        forward = peer_models.liger_loss

    def loss() -> Tensor:  # float32 weights and 16-bit products, as the users of these models run them
        with torch.autocast(task.device.type, task.dtype, enabled=task.dtype != torch.float32):
            return forward(theirs, idx, targets)

    return theirs, loss


def _take_from(peer: peers.Peer, model: GPT) -> None:
    """Make a peer compute the attention or the loss of this model, in training without dropout."""
    fn = peer.make()
    wte: Any = model.transformer.wte

    def loss(x: Tensor, targets: Tensor) -> Tensor:
        return fn(x=x, weight=wte.weight.to(x.dtype), targets=targets)

    def attend(attn: Any, x: Tensor, cache: None, documents: None, seed: Tensor | None, into: Any) -> Any:
        return attn.c_proj(fn(qkv=attn.c_attn(x), n_head=attn.n_head), into)

    if peer.op == "linear_cross_entropy":
        wte.loss = loss
    for attn in model.modules():
        if peer.op == "causal_attention" and isinstance(attn, CausalSelfAttention):
            attn.forward = functools.partial(attend, attn)  # type: ignore[method-assign]


def _eager_loss(model: nn.Module, task: _Task) -> Tensor:
    """What PyTorch's operators make of the weights of a GPT."""
    eager = GPT(task.config, dtype=task.dtype).to(task.device)
    eager.load_state_dict(model.state_dict())
    with torch.no_grad():
        return eager(*task.tokens())[1]


def _trainer(model: nn.Module, task: _Task) -> tuple[Callable[[], Tensor], torch.optim.Optimizer]:
    """The step of train.py on one process, and its optimizer."""
    assert isinstance(model, GPT)
    model.keep_working_weights()
    (optimizer,) = build(model, kind="adamw", betas=(0.9, 0.95), weight_decay=0.1)
    world, guard = World(0, 1, 0, task.device), Guard(task.device, scaled=task.dtype == torch.float16)
    graph = task.device.type == "cuda"
    step = Step(model, model, [optimizer], guard, world, grad_clip=1.0, seed=0, graph=graph)
    idx, targets = (x[None] for x in task.tokens())
    numbers = itertools.count(1)
    stream = torch.cuda.Stream(task.device) if graph else None  # a graph cannot be captured on the default stream

    def run() -> Tensor:
        with on_stream(stream) if stream else contextlib.nullcontext():
            step(idx, targets, step=next(numbers), lr=1e-4)
            return step.loss.clone()

    return run, optimizer


@contextlib.contextmanager
def _backend(provider: str, device: torch.device) -> Iterator[None]:
    on_gpu = provider in ("trainer", "hf+patch") and device.type == "cuda"
    everywhere: Backend = "triton" if provider.startswith("triton") or on_gpu else "eager"
    attention = sdpa_kernel(SDPBackend.MATH) if provider == "plain" else contextlib.nullcontext()
    some: dict[str, Backend] = dict.fromkeys(_OURS.get(provider, ()), "triton")
    with use_backend(everywhere, **some), attention:
        yield


def _three_steps(step: Callable[[], Tensor], device: torch.device) -> tuple[list[Tensor], Call, int]:
    """The losses of three steps, the call to be timed, and the peak bytes of a step."""
    losses = [step(), step()]
    highest = peak(lambda: losses.append(step()), device)
    return losses, step, highest


def _three_steps_in_a_graph(step: Callable[[], Tensor], device: torch.device) -> tuple[list[Tensor], Call, int]:
    """The same: the third step is the first replay, and its bytes are those of the capture."""
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with on_stream(stream):
        losses = [step(), step()]
    torch.cuda.synchronize(device)

    def capture() -> None:
        with capturing(graph, stream):
            losses.append(step())

    highest = peak(capture, device)
    graph.replay()
    return losses, graph.replay, highest


def _three_steps_by_eager(
    step: Callable[[], Tensor], device: torch.device, loss: Callable[[], Tensor]
) -> tuple[list[Tensor], Call, int]:
    """The same with the losses before each step that `loss` computes."""
    losses = []
    for _ in range(2):
        losses.append(loss())
        step()
    losses.append(loss())
    return losses, step, peak(step, device)


def _check(provider: str, losses: list[float], norm: float, dtype: torch.dtype, proof: _Proof) -> None:
    """Raise Refused unless the losses and the gradient's norm are those of the first provider that got here."""
    reference, (first, _, third) = next(iter(proof.losses.items()), (provider, losses))
    reference_norm = proof.norms.get(reference, norm)
    value, change = _TOLERANCE[dtype]
    same = abs(losses[0] - first) <= value * abs(first)
    same_fall = abs((losses[0] - losses[2]) - (first - third)) <= change * abs(first - third)
    if not (same and same_fall):  # NaN is never the same
        expected = f"{reference} has {first:.5f} and {third:.5f}"
        raise Refused(f"computes another loss: {losses[0]:.5f}, after two steps {losses[2]:.5f}; {expected}")
    # AdamW and the clipping before it divide by the gradient's scale, so the losses cannot show it.
    if not abs(norm - reference_norm) <= change * reference_norm:
        raise Refused(f"computes another gradient, of norm {norm:.5f}; {reference} has {reference_norm:.5f}")
    proof.losses[provider], proof.norms[provider] = losses, norm


def _parts(module: nn.Module, loss: Callable[[], Tensor]) -> tuple[dict[str, int], float]:
    """Bytes of the parameters, of what autograd keeps for the backward pass, and of the gradients; and their norm."""
    state = (*module.parameters(), *module.buffers())
    own = {t.untyped_storage().data_ptr() for t in state}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        value = loss()
    value.backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients).item()
    module.zero_grad(set_to_none=True)
    return {"parameters": _bytes(state), "gradients": _bytes(gradients), "activations": sum(kept.values())}, norm


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)
