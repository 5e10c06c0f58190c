"""Optimizers, the learning rate as a pure function of the step, and the moving average of the weights.

AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019), for every parameter:

    m = beta1 * m + (1 - beta1) * g            v = beta2 * v + (1 - beta2) * g**2
    w = w - lr * (weight_decay * w + m_hat / (sqrt(v_hat) + eps))        hats: divided by 1 - beta**t

Muon (Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024), for matrices of R x C:

    m = mu * m + (1 - mu) * g                  u = mu * m + (1 - mu) * g                    (Nesterov)
    w = w - lr * (weight_decay * w + 0.2 * sqrt(max(R, C)) * orthogonalize(u))

The factor gives its updates the size of AdamW's (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2):
both use the same learning rate and weight decay.

All optimizers here follow the protocol of PyTorch's fused ones, and the host never waits for the device:

    group["lr"]               () float32 on the device, one tensor for all groups of all optimizers: see `set_lr`
    optimizer.grad_scale      () float32 on the device: gradients are divided by it (unscaling and clipping in one)
    optimizer.found_inf       () float32 on the device: 1.0 skips the update of parameters and state

The last two may be missing, or None. A step overwrites p.grad: AdamW with the divided gradient, as PyTorch does, Muon
with u. State exists from the beginning, so that a step can be captured in a CUDA graph, and a checkpoint loaded, before
the first.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from model.cli import UserError
from model.training import parallel

Schedule = Literal["cosine", "linear", "constant", "wsd"]
EPS = 1e-7  # least norm that a matrix is divided by
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: maximal slope at 0 that still converges near 1
NEWTON_SCHULZ_STEPS = 5


def build(
    model: nn.Module, *, kind: Literal["adamw", "muon"], betas: tuple[float, float], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimizers of all parameters of a GPT that are not frozen; the learning rate is 0 until `set_lr`.

    adamw: one AdamW. muon: Muon for the matrices of the blocks (c_attn as three: queries, keys, values), AdamW for
    embeddings, biases and LayerNorm. AdamW takes sharded DTensors; for Muon they are a UserError, because a shard
    of a matrix cannot be orthogonalised.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lr = torch.zeros((), device=next(iter(trained.values())).device)
    if kind == "adamw":
        return [_adamw([*trained.values()], lr, betas, weight_decay)]
    matrices = {name: p for name, p in trained.items() if name.startswith("transformer.h.") and p.dim() == 2}
    is_split = {name: name.endswith(".c_attn.weight") for name in matrices}
    groups = [
        {"params": [p for name, p in matrices.items() if is_split[name]], "parts": 3},
        {"params": [p for name, p in matrices.items() if not is_split[name]], "parts": 1},
    ]
    rest = [p for name, p in trained.items() if name not in matrices]
    return [Muon(groups, lr=lr, weight_decay=weight_decay), _adamw(rest, lr, betas, weight_decay)]


def adamw(model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """The AdamW of `build`, with its learning rate set."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return _adamw(parameters, torch.tensor(lr, device=parameters[0].device), betas, weight_decay)


def set_lr(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    """Fill the tensor that all optimizers of one `build` share. No host sync."""
    optimizers[0].param_groups[0]["lr"].fill_(lr)


def _adamw(parameters: list[nn.Parameter], lr: Tensor, betas: tuple[float, float], weight_decay: float) -> Any:
    """PyTorch's fused AdamW: one pass over each tensor, on the CPU as on CUDA."""
    # capturable: without it PyTorch refuses to record a step in a CUDA graph; the fused step is the same with it
    optimizer = torch.optim.AdamW(_groups(parameters, weight_decay), lr=lr, betas=betas, fused=True, capturable=True)
    for p in parameters:
        moments = {slot: torch.zeros_like(p) for slot in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), **moments}
    return optimizer


def _groups(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices (linear weights, embeddings) decay; vectors (biases, LayerNorm) do not."""
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


class Muon(torch.optim.Optimizer):
    """Momentum with an orthogonalised update, so that every direction of a matrix learns at about the same speed.

    Matrices of one shape are stacked for one batched iteration, in bfloat16 on GPUs that compute in it and in float32
    elsewhere. A group's `parts` is the number of matrices, one below the other, that its tensors consist of. A step
    needs scratch for three such stacks, and two of their products x x'.
    """

    def __init__(self, params: Any, *, lr: Tensor, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(parallel.mesh_of(p) for p in parameters):
            raise UserError("--optimizer muon works on whole matrices, and FSDP shards them: use DDP")
        for p in parameters:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
        on_gpu = lr.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        self.dtype = torch.bfloat16 if on_gpu else torch.float32

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is never called
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for parameters in alike.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """parameters: n of one shape, (parts * R, C)."""
        lr, momentum, parts = group["lr"], group["momentum"], group["parts"]
        grads: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]  # none of them is None
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        if (scale := getattr(self, "grad_scale", None)) is not None:
            torch._foreach_div_(grads, scale)
        if (found_inf := getattr(self, "found_inf", None)) is not None:
            # A skipped step averages the momentum with itself, which changes nothing, and learns at rate 0.
            for grad, buffer in zip(grads, buffers, strict=True):
                torch.where(found_inf > 0, buffer, grad, out=grad)
            lr = lr * (1 - found_inf)
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        torch._foreach_lerp_(grads, buffers, momentum)  # u
        stack = torch.stack([grad.to(self.dtype) for grad in grads])  # (n, parts * R, C)
        matrices = stack.unflatten(1, (parts, -1)).flatten(0, 1)  # (n * parts, R, C)
        updates = orthogonalize(matrices).reshape(stack.shape)
        size = 0.2 * math.sqrt(max(matrices.shape[1:]))
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        for p, update in zip(parameters, updates, strict=True):
            p.addcmul_(update, lr, value=-size)


def orthogonalize(x: Tensor) -> Tensor:
    """x: (n, R, C) -> (n, R, C): with x = U S V', about U V', by five steps of a quintic Newton-Schulz.

        x = a x + (b A + c A A) x,  A = x x'        starting from x / |x|, Frobenius norm

    Maps singular values from 0.002 of the norm up into [0.68, 1.21], which is close enough to 1, by matrix products
    alone. A zero matrix stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS)
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x  # the shorter side first, so that A is small
    for _ in range(NEWTON_SCHULZ_STEPS):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def lr_at(
    step: float,
    *,
    lr: float,
    min_lr: float,
    warmup_steps: int,
    steps: int,
    schedule: Schedule = "cosine",
    cooldown_steps: int = 0,
) -> float:
    """Learning rate of update `step` (0-based): a linear warm-up to `lr`, and then by schedule:

    cosine     half a cosine from lr to min_lr
    linear     a straight line from lr to min_lr
    constant   lr
    wsd        lr, and in the last `cooldown_steps` down to min_lr as 1 - sqrt (Hägele et al., "Scaling laws and
               compute-optimal training beyond fixed training durations", 2024)

    The first update has lr / (warmup_steps + 1). At `steps` and beyond the rate is min_lr, except for "constant". With
    "constant", and with "wsd" before the cool-down, a larger `steps` does not change earlier rates.
    """
    if step < warmup_steps:
        return lr * (step + 1) / (warmup_steps + 1)
    start = max(warmup_steps, steps - cooldown_steps) if schedule == "wsd" else warmup_steps
    if schedule == "constant" or step < start:
        return lr
    if step >= steps:
        return min_lr
    progress = (step - start) / (steps - start)
    if schedule == "cosine":
        left = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        left = 1.0 - (math.sqrt(progress) if schedule == "wsd" else progress)
    return min_lr + left * (lr - min_lr)


def planned(step: int, plan: Sequence[tuple[int, int]], warmup_steps: int) -> float:
    """The place of `step` in the schedule of plan[0]'s steps, for `lr_at`, in a run that was planned on the way.

    plan: (at, steps), ... in order: the run was given so many steps after its step `at`. Until the first, the rate was
    that of the warm-up and then its peak. Each plan goes through the rest of the schedule in its own number of steps:

        place(at) = as before            place(steps) = plan[0]'s steps            a straight line between

    So the rate never jumps, and a plan does not change what was before its `at`.
    """
    at, end = plan[0]
    steps, place = end, float(min(at, warmup_steps + 1))
    for later, steps_then in plan[1:]:
        if step <= later:
            break
        place += (later - at) * ((end - place) / max(steps - at, 1))
        at, steps = later, steps_then
    return place + (step - at) * ((end - place) / max(steps - at, 1))


def optimizer_state(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """SLOT/NAME -> the optimizers' own tensors, not copies: exp_avg/transformer.wte.weight, and so on."""
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    return {
        f"{slot}/{names[p]}": tensor
        for optimizer in optimizers
        for p, slots in optimizer.state.items()
        for slot, tensor in slots.items()
    }


def load_optimizer_state(
    optimizers: Sequence[torch.optim.Optimizer], model: nn.Module, state: dict[str, Tensor]
) -> None:
    """Copy whole tensors, named as by `optimizer_state`, into the optimizers' own: its inverse, bit for bit.

    A sharded tensor takes its part. Raises UserError, before anything changes, for a state of another model or
    optimizer.
    """
    try:
        parallel.scatter(optimizer_state(optimizers, model), state)
    except ValueError as error:
        raise UserError(
            f"the checkpoint is of another model or optimizer: {error}\n"
            "resume with the options that it was written with, or start a new run"
        ) from None


class EMA:
    """The exponential moving average of a model's trained parameters: less noisy while the learning rate is high.

        average = d * average + (1 - d) * parameter,    d = min(decay, (1 + step) / (10 + step))

    The rising d (as in tf.train.ExponentialMovingAverage) forgets the initial weights soon. It is a function of the
    step, so `tensors` is the whole state: name -> average, float32, placed and sharded like the parameter.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self._parameters.items()}

    @torch.no_grad()
    def update(self, skip: Tensor, step: Tensor) -> None:
        """skip: (), 1.0 keeps the averages. step: (), number of the step, from 1. Both on the device."""
        weight = (1 - ((1 + step) / (10 + step)).clamp(max=self.decay)) * (1 - skip)
        # A list of weights: a single tensor would be read by the host, which would have to wait for it.
        torch._foreach_lerp_([*self.tensors.values()], [*self._parameters.values()], [weight] * len(self.tensors))

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Swap the parameters with the averages in the body."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, p in self._parameters.items():
            parameter = p.clone()
            p.copy_(self.tensors[name])
            self.tensors[name].copy_(parameter)
