"""One step of training: what it computes, what it refuses to do, and what it can repeat."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.config import GPTConfig
from model.gpt import GPT
from model.training import optim
from model.training.failure import diagnose
from model.training.parallel import World
from model.training.step import FIRST_SCALE, GROWTH_STEPS, NOT_FINITE, SPIKE, WINDOW, Guard, Step, dropout_seed

CPU = torch.device("cpu")
CONFIG = GPTConfig(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
DROPOUT = replace(CONFIG, embd_pdrop=0.2, resid_pdrop=0.2, attn_pdrop=0.2)


def build(config: GPTConfig = CONFIG, dtype: torch.dtype = torch.float32, **options) -> Step:
    torch.manual_seed(3)
    model = GPT(config, dtype)
    model.keep_working_weights()
    optimizers = optim.build(model, kind=options.pop("kind", "adamw"), betas=(0.9, 0.95), weight_decay=0.1)
    guard = options.pop("guard", None) or Guard(CPU, scaled=dtype == torch.float16)
    ema = optim.EMA(model, options.pop("ema")) if "ema" in options else None
    settings = {"grad_clip": 1.0, "seed": 7, **options}
    return Step(model, model, optimizers, guard, World(0, 1, 0, CPU), ema=ema, **settings)


def tokens(rows: int, *, micro_steps: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    idx = torch.randint(CONFIG.vocab_size, (rows, 17), generator=generator)
    return tuple(x.reshape(micro_steps, rows // micro_steps, 16) for x in (idx[:, :-1].clone(), idx[:, 1:].clone()))


def run(step: Step, count: int, **shape) -> list[float]:
    losses = []
    for k in range(1, count + 1):
        step(*tokens(4, seed=k, **shape), step=k, lr=1e-2)
        losses.append(step.loss.item())
    return losses


def weights(step: Step) -> list[Tensor]:
    return [p.detach().clone() for p in step.model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# What a step computes


def test_step_equals_clip_grad_norm_and_adamw():
    ours, theirs = build(grad_clip=0.3), build()
    reference = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters if p.dim() >= 2], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters if p.dim() < 2], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        lr=1e-2,
    )
    for k in range(1, 6):
        (idx,), (targets,) = tokens(4, seed=k)
        loss = theirs.model(idx, targets)[1]
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters, 0.3)
        reference.step()
        reference.zero_grad()
        ours(idx[None], targets[None], step=k, lr=1e-2)
        torch.testing.assert_close(ours.loss, loss.detach())
        torch.testing.assert_close(ours.norm, norm)
    assert norm > 0.3  # it was clipped
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # keys' biases have no gradient but rounding


@pytest.mark.parametrize("micro_steps", [2, 4])
def test_accumulation_equals_the_large_batch_weighted_by_tokens(micro_steps):
    """Rows with many ignored targets: a mean of means would differ."""
    whole, parts = build(), build()
    for k in range(1, 4):
        idx, targets = tokens(4, seed=k)
        targets[0, 0, 3:] = targets[0, 1, 5:] = -100
        whole(idx, targets, step=k, lr=1e-2)
        shape = (micro_steps, 4 // micro_steps, 16)
        parts(idx.reshape(shape), targets.reshape(shape), step=k, lr=1e-2)
        torch.testing.assert_close(parts.loss, whole.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(parts.norm, whole.norm, rtol=1e-5, atol=0)
    for a, b in zip(weights(whole), weights(parts), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_working_weights_only_save_casts(dtype):
    kept, cast = build(DROPOUT, dtype), build(DROPOUT, dtype)
    for linear in cast.model._linears():
        linear.working = None
    assert run(kept, 4) == run(cast, 4)
    assert equal(weights(kept), weights(cast))
    assert all(linear.working.dtype == dtype for linear in kept.model._linears())
    assert all(p.dtype == torch.float32 for p in kept.parameters)


def test_recompute_gives_the_same_gradients_through_dropout(monkeypatch):
    """Against the same blocks with the same seeds, called without torch's checkpoint."""
    again, plain = build(DROPOUT), build(DROPOUT)
    again.model.recompute = plain.model.recompute = True
    calls = []
    forward = type(again.model.transformer.h[0]).forward

    def counted(self, *arguments):
        calls.append(self)
        return forward(self, *arguments)

    monkeypatch.setattr(type(again.model.transformer.h[0]), "forward", counted)
    losses = run(again, 3)
    assert len(calls) == 2 * 2 * 3  # each of two blocks twice in each of three steps
    monkeypatch.setattr("model.gpt.checkpoint", lambda block, *arguments, **options: block(*arguments))
    assert run(plain, 3) == losses
    assert len(calls) == 2 * 2 * 3 + 2 * 3
    assert equal(weights(again), weights(plain))


def test_documents_keep_attention_inside():
    """A token that begins a document is the first that later ones see."""
    step = build(document_id=0)
    idx, targets = tokens(1)
    idx[idx == 0] = 1
    idx[0, 0, 9] = 0
    other = idx.clone()
    other[0, 0, :9] = 2
    seen = []
    step.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("documents")), with_kwargs=True
    )
    step.forward(idx[0], targets[0])
    assert seen[0].tolist() == [[0] * 9 + [1] * 7]
    with torch.no_grad():
        documents = seen[0]
        a, b = (step.model(x[0], documents=documents)[0] for x in (idx, other))
        c = step.model(other[0])[0]
    assert torch.equal(a[:, 9:], b[:, 9:]) and not torch.equal(a[:, 9:], c[:, 9:])


def test_dropout_depends_on_seed_step_and_rank():
    seeds = {dropout_seed(seed, step, rank) for seed in (1, 2) for step in range(50) for rank in range(3)}
    assert len(seeds) == 2 * 50 * 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert dropout_seed(1337, 5, 0) == dropout_seed(1337, 5, 0)
    first, second = build(DROPOUT), build(DROPOUT)
    losses = run(first, 4)
    for k in range(1, 5):
        torch.manual_seed(k * 11)  # whatever others draw in between
        torch.rand(k)
        second(*tokens(4, seed=k), step=k, lr=1e-2)
        assert second.loss.item() == losses[k - 1]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_step_reduces_the_loss(kind):
    step = build(kind=kind, ema=0.5)
    losses = []
    for k in range(1, 61):
        step(*tokens(4), step=k, lr=2e-2)
        losses.append(step.loss.item())
    assert losses[-1] < 0.3 * losses[0]
    with step.ema.swapped():
        averaged = step.model(*(x[0] for x in tokens(4)))[1].item()
    assert averaged < 0.5 * losses[0]


# Guards


def judge(guard: Guard, step: int, loss: float, norm: float = 1.0) -> float:
    return guard.should_skip(torch.tensor(step), torch.tensor(loss), torch.tensor(norm)).item()


@pytest.mark.parametrize(("loss", "norm"), [(float("nan"), 1.0), (1.0, float("inf")), (float("-inf"), float("nan"))])
def test_non_finite_step_ends_all_updates(loss, norm):
    guard = Guard(CPU)
    assert [judge(guard, k, 1.0) for k in (1, 2)] == [0.0, 0.0]
    assert judge(guard, 3, loss, norm) == 1.0
    assert [judge(guard, k, 1.0) for k in (4, 5)] == [1.0, 1.0]
    assert judge(guard, 6, loss, norm) == 1.0
    assert (guard.bad_step.item(), guard.cause.item(), guard.skipped.item()) == (3, NOT_FINITE, 0)


def test_bad_step_changes_no_state():
    step = build(ema=0.9)
    run(step, 2)
    before = weights(step), optim.optimizer_state(step.optimizers, step.model), step.ema.tensors
    before = [[t.clone() for t in (part.values() if isinstance(part, dict) else part)] for part in before]
    handle = step.model.transformer.ln_f.weight.register_hook(lambda grad: grad * float("nan"))
    step(*tokens(4, seed=3), step=3, lr=1e-2)
    handle.remove()
    step(*tokens(4, seed=4), step=4, lr=1e-2)
    after = weights(step), optim.optimizer_state(step.optimizers, step.model), step.ema.tensors
    for a, b in zip(before, after, strict=True):
        assert equal(a, list(b.values()) if isinstance(b, dict) else b)
    assert step.guard.bad_step.item() == 3


def noise(k: int) -> float:
    return 2.0 + 0.1 * ((k * 7919) % 13 - 6) / 6


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_spike_is_skipped_and_training_continues(which):
    guard = Guard(CPU, spikes="skip", z=6.0)
    spike = {"loss": (9.0, 2.0), "norm": (2.0, 9.0)}[which]
    for k in range(1, WINDOW):
        assert judge(guard, k, noise(k), noise(k + 1)) == 0.0
    assert judge(guard, WINDOW, 2.0, 2.0) == 0.0
    assert judge(guard, WINDOW + 1, *spike) == 1.0
    assert judge(guard, WINDOW + 2, 2.0, 2.0) == 0.0
    assert judge(guard, WINDOW + 3, -9.0, 2.0) == 0.0  # a fall is no spike
    assert (guard.bad_step.item(), guard.skipped.item()) == (0, 1)


def test_spike_needs_a_full_window_and_z():
    guard = Guard(CPU, spikes="skip", z=6.0)
    for k in range(1, WINDOW):
        assert judge(guard, k, noise(k)) == 0.0
    assert judge(guard, WINDOW, 50.0) == 0.0
    values = guard.window[0]
    inside = values.mean() + 5.9 * values.std(correction=0)
    assert judge(guard, WINDOW + 1, inside.item()) == 0.0
    off = Guard(CPU)
    assert all(judge(off, k, noise(k)) == 0.0 for k in range(1, WINDOW + 1)) and judge(off, WINDOW + 1, 1e9) == 0.0


def test_lasting_change_of_loss_stops_being_skipped():
    guard = Guard(CPU, spikes="skip", z=6.0)
    for k in range(1, WINDOW + 1):
        judge(guard, k, noise(k))
    skipped = sum(judge(guard, k, 4.0 + noise(k)) for k in range(WINDOW + 1, 3 * WINDOW))
    assert 1 <= skipped < WINDOW / 4


def test_spike_can_end_the_run():
    guard = Guard(CPU, spikes="stop", z=6.0)
    for k in range(1, WINDOW + 1):
        judge(guard, k, noise(k))
    assert judge(guard, WINDOW + 1, 9.0) == 1.0
    assert judge(guard, WINDOW + 2, 2.0) == 1.0
    assert (guard.bad_step.item(), guard.cause.item()) == (WINDOW + 1, SPIKE)


def test_restored_guard_decides_identically():
    first, second = (Guard(CPU, spikes="skip", z=3.0, scaled=True) for _ in range(2))
    for k in range(1, WINDOW + 40):
        judge(first, k, noise(k))
    second.load({name: t.clone() for name, t in first.tensors.items()})
    values = [noise(k) + (k % 9 == 0) for k in range(200, 260)]
    assert [judge(first, k, v) for k, v in enumerate(values)] == [judge(second, k, v) for k, v in enumerate(values)]
    assert all(torch.equal(t, second.tensors[name]) for name, t in first.tensors.items())
    assert first.skipped > 0


# float16


def test_overflow_is_skipped_and_halves_the_scale():
    guard = Guard(CPU, scaled=True)
    assert guard.scale.item() == FIRST_SCALE
    assert judge(guard, 1, 1.0, float("inf")) == 1.0
    assert (guard.scale.item(), guard.skipped.item(), guard.bad_step.item()) == (FIRST_SCALE / 2, 1, 0)
    for k in range(GROWTH_STEPS):
        assert judge(guard, k + 2, 1.0) == 0.0
        assert guard.scale.item() == (FIRST_SCALE / 2 if k < GROWTH_STEPS - 1 else FIRST_SCALE)
    assert judge(guard, 9, float("nan"), float("nan")) == 1.0  # the loss is not scaled: no overflow of gradients
    assert guard.bad_step.item() == 9


def test_overflow_at_scale_one_ends_the_run():
    guard = Guard(CPU, scaled=True)
    for k in range(1, 18):
        assert judge(guard, k, 1.0, float("inf")) == 1.0
    assert guard.scale.item() == 1.0 and guard.bad_step.item() == 17 and guard.skipped.item() == 16


def test_float16_matches_float32_and_survives_overflows():
    """The first scale is far too large here, so the first steps are skipped."""
    step, reference = build(dtype=torch.float16), build()
    step.guard.scale.fill_(2.0**40)
    k = 0
    while step.guard.skipped.item() == k:
        k += 1
        assert k < 40
        step(*tokens(4, seed=1), step=k, lr=1e-2)
    assert k > 5 and step.guard.bad_step.item() == 0
    reference(*tokens(4, seed=1), step=1, lr=1e-2)
    torch.testing.assert_close(step.norm, reference.norm, rtol=2e-2, atol=0)
    torch.testing.assert_close(step.loss, reference.loss, rtol=2e-3, atol=0)
    for name, t in optim.optimizer_state(step.optimizers, step.model).items():
        if name.startswith("exp_avg/"):
            expected = optim.optimizer_state(reference.optimizers, reference.model)[name]
            torch.testing.assert_close(t, expected, rtol=5e-2, atol=2e-3 * expected.abs().max().item() + 1e-7)


# What went wrong


def test_diagnose_names_the_first_bad_module():
    step = build(DROPOUT)
    run(step, 2)
    module = step.model.transformer.h[1].mlp
    module.register_forward_hook(lambda module, arguments, output: tuple(t / 0 for t in output))
    idx, targets = tokens(4, seed=3, micro_steps=2)
    step(idx, targets, step=3, lr=1e-2)
    before = weights(step)
    found = diagnose(step, idx, targets, 3)
    assert found["losses"] == ["nan", "nan"]
    assert found["first_module_not_finite"] == {"micro_step": 0, "module": "transformer.h.1.mlp"}
    assert "transformer.ln_f.weight" in found["gradients_not_finite"]
    assert equal(before, weights(step)) and all(p.grad is None for p in step.parameters)


def test_diagnose_draws_the_same_dropout():
    step = build(DROPOUT, grad_clip=0.0)
    idx, targets = tokens(4, seed=1)
    step(idx, targets, step=1, lr=0.0)
    assert diagnose(step, idx, targets, 1)["losses"] == [step.loss.item()]
    assert diagnose(step, idx, targets, 2)["losses"] != [step.loss.item()]


def test_warm_up_changes_nothing():
    first, second = build(DROPOUT), build(DROPOUT)
    assert first.warm_up(*tokens(4)) > 0
    assert run(first, 3) == run(second, 3)


# Without a GPU: what a CUDA graph would record is called as often, and on the same buffers


@pytest.fixture
def events(monkeypatch):
    """What is done with the events of a device, by their number."""
    log, numbers = [], itertools.count(1)

    class Event:
        def __init__(self):
            self.number = next(numbers)

        def record(self):
            log.append(("record", self.number))

        def synchronize(self):
            log.append(("wait", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return log


def test_graph_is_captured_once_and_replayed(monkeypatch, events):
    graphed, eager = build(DROPOUT, graph=True), build(DROPOUT)

    class Graph:
        """Records the call, as CUDA records its kernels."""

        def __init__(self, *arguments):
            self.arguments = arguments

        def replay(self):
            graphed._run(*self.arguments)

    captures = []

    def capture(idx, targets):
        captures.append(graphed.step.item())
        graphed.graph = Graph(idx, targets)

    monkeypatch.setattr(graphed, "_capture", capture)
    assert run(graphed, 8) == run(eager, 8)
    assert captures == [4] and equal(weights(graphed), weights(eager))
    # at most two steps ahead of the device
    waits = [[("wait", n), ("record", n + 2)] for n in (1, 2, 3)]
    assert events == [("record", 1), ("record", 2), *itertools.chain(*waits)]
    graphed.release()
    assert graphed.graph is None
    run(graphed, 1)
    assert captures == [4]


def test_captured_batch_is_that_of_the_eager_steps(monkeypatch, events):
    """In one memory, aligned as the loader's: targets of an odd number of tokens lie 8 bytes off, and stay there."""
    step, places = build(graph=True), []
    monkeypatch.setattr(step, "_capture", lambda *batch: setattr(step, "graph", SimpleNamespace(replay=list)))
    run_ = step._run

    def seen(idx, targets):
        places.append((idx.data_ptr(), targets.data_ptr()))
        run_(idx, targets)

    monkeypatch.setattr(step, "_run", seen)
    for k in range(1, 5):
        loaded = torch.stack(tokens(3, seed=k))[..., :13].contiguous()  # (2, 1, 3, 13)
        assert loaded[1].data_ptr() % 16 == 8
        step(*loaded, step=k, lr=1e-2)
        assert torch.equal(step.batch, loaded)
    assert len(places) == 3 and len({*places}) == 1 and places[0][1] % 16 == 8


def test_step_never_waits_for_the_device():
    """Nothing asks for a number: on a GPU each would stop the queue, and a CUDA graph could not be captured."""
    step = build(DROPOUT, torch.float16, guard=Guard(CPU, spikes="skip", scaled=True), ema=0.9, document_id=0)

    class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), (
                function
            )
            return function(*args, **(kwargs or {}))

    with NoReading():
        step(*tokens(4, micro_steps=2), step=1, lr=1e-2)
