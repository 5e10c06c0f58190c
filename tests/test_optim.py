"""The optimizers against their formulas and PyTorch's, their protocol, the learning rate, and the moving average."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.training.optim import (
    EMA,
    Muon,
    adamw,
    build,
    load_optimizer_state,
    lr_at,
    optimizer_state,
    orthogonalize,
    planned,
    set_lr,
)

KINDS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "constant", "wsd")


def small_gpt() -> GPT:
    return GPT(GPTConfig(vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2))


def optimizers_of(model: nn.Module, kind: str = "adamw", lr: float = 0.01) -> list[torch.optim.Optimizer]:
    optimizers = build(model, kind=kind, betas=(0.9, 0.95), weight_decay=0.1)
    set_lr(optimizers, lr)
    return optimizers


def step(model, optimizers, seed=0, *, factor=1.0, scale=None, skip=None) -> None:
    """One step with random gradients, times `factor`."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.device) * factor if p.requires_grad else None
    for optimizer in optimizers:
        if scale is not None:
            optimizer.grad_scale = torch.tensor(scale)
        if skip is not None:
            optimizer.found_inf = torch.tensor(skip)
        optimizer.step()


def everything(model, optimizers) -> dict[str, Tensor]:
    """Copies of parameters and state."""
    tensors = dict(model.named_parameters()) | optimizer_state(optimizers, model)
    return {name: t.detach().clone() for name, t in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- who is trained by what


def test_matrices_decay_and_vectors_do_not():
    model = small_gpt()
    (optimizer,) = build(model, kind="adamw", betas=(0.9, 0.95), weight_decay=0.1)
    decay, rest = optimizer.param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {names[p].rsplit(".", 2)[-2] for p in decay["params"]} == {"wte", "wpe", "c_attn", "c_proj", "c_fc"}
    assert all(names[p].endswith(".bias") or ".ln_" in names[p] for p in rest["params"])
    assert len(decay["params"]) + len(rest["params"]) == len(names)  # each once


def test_muon_takes_block_matrices_and_adamw_the_rest():
    model = small_gpt()
    muon, rest = build(model, kind="muon", betas=(0.9, 0.95), weight_decay=0.1)
    names = {p: name for name, p in model.named_parameters()}
    split, whole = ([names[p] for p in group["params"]] for group in muon.param_groups)
    assert [group["parts"] for group in muon.param_groups] == [3, 1]
    assert all(group["weight_decay"] == 0.1 for group in muon.param_groups)
    assert split == [f"transformer.h.{i}.attn.c_attn.weight" for i in range(2)]
    assert {name.split(".", 3)[-1] for name in whole} == {"attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"}
    others = {names[p] for group in rest.param_groups for p in group["params"]}
    assert others.isdisjoint([*split, *whole]) and len(others) + len(split) + len(whole) == len(names)
    assert {"transformer.wte.weight", "transformer.wpe.weight", "transformer.ln_f.weight"} <= others


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameter_has_no_group_or_state(kind):
    model = small_gpt()
    frozen = [model.transformer.wpe.weight, model.transformer.h[0].mlp.c_fc.weight]
    for p in frozen:
        p.requires_grad_(False)
    before = [p.clone() for p in frozen]
    optimizers = optimizers_of(model, kind)
    step(model, optimizers)
    assert all(map(torch.equal, frozen, before))
    assert not any(p in optimizer.state for optimizer in optimizers for p in frozen)


# --- the protocol


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_is_one_shared_tensor(kind):
    model = small_gpt()
    optimizers = build(model, kind=kind, betas=(0.9, 0.95), weight_decay=0.1)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert all(rate is rates[0] for rate in rates) and rates[0].shape == () and rates[0].dtype == torch.float32
    before = everything(model, [])
    step(model, optimizers)
    assert equal(before, everything(model, []))  # 0 at first
    set_lr(optimizers, 0.25)
    step(model, optimizers)
    assert rates[0] == 0.25 and not any(torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_divided_by_grad_scale(kind):
    runs = []
    for factor, scale in ((1.0, None), (8.0, 8.0), (1.0, 8.0)):
        torch.manual_seed(0)
        model = small_gpt()
        optimizers = optimizers_of(model, kind)
        for seed in range(3):
            step(model, optimizers, seed, factor=factor, scale=scale)
        runs.append(everything(model, optimizers))
    assert equal(runs[0], runs[1]) and not equal(runs[0], runs[2])  # a power of 2: to the bit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1.0])
def test_found_inf_changes_no_state(kind, bad):
    model = small_gpt()
    optimizers = optimizers_of(model, kind)
    step(model, optimizers, 0, skip=0.0, scale=2.0)
    before = everything(model, optimizers)
    step(model, optimizers, 1, factor=bad, skip=1.0, scale=bad)
    assert equal(before, everything(model, optimizers))
    step(model, optimizers, 1, skip=0.0, scale=2.0)
    after = everything(model, optimizers)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert all(t.isfinite().all() for t in after.values())


class NoReading(TorchDispatchMode):
    """Refuses to hand the value of a tensor to the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_step_reads_no_tensor_on_the_host(kind):
    model = small_gpt()
    optimizers, ema, zero = optimizers_of(model, kind), EMA(model, 0.99), torch.tensor(0.0)
    with NoReading():
        step(model, optimizers, scale=1.0, skip=0.0)
        ema.update(zero, zero)
        set_lr(optimizers, 0.1)
        with pytest.raises(AssertionError):
            zero.item()


# --- AdamW


def test_adamw_follows_the_formula_in_float64():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    lr, betas, weight_decay, eps = 0.05, (0.8, 0.95), 0.3, 1e-8
    optimizer = adamw(model, lr=lr, betas=betas, weight_decay=weight_decay)
    assert optimizer.defaults["fused"] and optimizer.defaults["capturable"]
    expected = {p: p.detach().double() for p in model.parameters()}
    m = {p: torch.zeros_like(w) for p, w in expected.items()}
    v = {p: torch.zeros_like(w) for p, w in expected.items()}
    for t in range(1, 6):
        for p, w in expected.items():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[p] = betas[0] * m[p] + (1 - betas[0]) * g
            v[p] = betas[1] * v[p] + (1 - betas[1]) * g**2
            m_hat, v_hat = m[p] / (1 - betas[0] ** t), v[p] / (1 - betas[1] ** t)
            decay = weight_decay if p.dim() == 2 else 0.0
            expected[p] = w - lr * (decay * w + m_hat / (v_hat.sqrt() + eps))
        optimizer.step()
    for p, w in expected.items():
        torch.testing.assert_close(p.detach(), w.float(), rtol=2e-6, atol=2e-6)


def test_initial_state_is_what_adamw_would_create():
    model = nn.Linear(3, 2)
    (optimizer,) = optimizers_of(model, lr=0.0)
    reference = torch.optim.AdamW(model.parameters(), fused=True)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    reference.step()
    for p in model.parameters():
        made, expected = optimizer.state[p], reference.state[p]
        assert made.keys() == expected.keys()
        assert {k: (t.shape, t.dtype) for k, t in made.items()} == {k: (t.shape, t.dtype) for k, t in expected.items()}
        assert not any(t.any() for t in made.values())


def test_unscaled_gradient_is_written_back():
    """What the docstring says of PyTorch's fused step."""
    p = nn.Parameter(torch.ones(3))
    optimizer = adamw(nn.ParameterList([p]), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    p.grad = torch.full((3,), 6.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
    optimizer.step()
    assert p.grad.tolist() == [3.0] * 3
    optimizer.found_inf.fill_(1.0)
    optimizer.step()
    assert p.grad.tolist() == [3.0] * 3


# --- Muon


def float32_muon(monkeypatch, parameters, lr: float, weight_decay: float) -> torch.optim.Muon:
    """PyTorch's, kept from rounding to bfloat16, so that it can be compared closely."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())
    return torch.optim.Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def test_muon_matches_pytorch(monkeypatch):
    shapes = [(6, 6), (4, 12), (12, 4), (4, 12), (1, 5)]  # square, wide, tall, two of a shape, a single row
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer = Muon(ours, lr=torch.tensor(0.03), weight_decay=0.2)
    reference = float32_muon(monkeypatch, theirs, 0.03, 0.2)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            q.grad = torch.randn_like(q)
            p.grad = q.grad.clone()
        optimizer.step()
        reference.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])


def test_muon_orthogonalizes_q_k_v_separately(monkeypatch):
    model = small_gpt()
    muon, _ = optimizers_of(model, "muon", lr=0.03)
    packed = model.transformer.h[1].attn.c_attn.weight  # (3C, C)
    thirds = [nn.Parameter(third.clone()) for third in packed.detach().chunk(3)]
    reference = float32_muon(monkeypatch, thirds, 0.03, 0.1)
    for seed in range(3):
        packed.grad = torch.randn(packed.shape, generator=torch.Generator().manual_seed(seed))
        for third, grad in zip(thirds, packed.grad.chunk(3), strict=True):
            third.grad = grad.clone()
        muon.step()
        reference.step()
        torch.testing.assert_close(packed.detach(), torch.cat([*thirds]).detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 32), (2, 32, 8)])
def test_orthogonalize_brings_singular_values_near_one(shape, dtype):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(0, -2, u.shape[2])  # 0.01 of the largest is more than 0.002 of the norm
    y = orthogonalize((u * s @ v).to(dtype) * 1000)
    assert y.dtype == dtype and y.shape == shape
    rounding = 0.05 if dtype == torch.bfloat16 else 1e-4
    inner = u.mT @ y.float() @ v.mT  # the singular vectors stay: this is diagonal
    diagonal = inner.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.68 - rounding and diagonal.max() < 1.21 + rounding
    assert (inner - torch.diag_embed(diagonal)).abs().max() < rounding


def test_muon_update_has_the_size_of_adamws():
    """Of about 0.2 to 0.4 per unit of learning rate; and nothing comes of no gradient."""
    for shape in ((64, 64), (32, 128), (128, 32)):
        p = nn.Parameter(torch.zeros(shape))
        optimizer = Muon([p], lr=torch.tensor(1.0), weight_decay=0.0)
        p.grad = torch.zeros(shape)
        optimizer.step()
        assert not p.any()
        p.grad = torch.randn(shape) * 1e-3
        optimizer.step()
        assert 0.15 < p.square().mean().sqrt() < 0.25, shape


def test_muon_skips_parameters_without_gradient():
    first, second = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Muon([first, second], lr=torch.tensor(0.1), weight_decay=0.1)
    first.grad = torch.randn(4, 4)
    optimizer.step()
    assert not torch.equal(first, torch.ones(4, 4)) and torch.equal(second, torch.ones(4, 4))


# --- state by name


@pytest.mark.parametrize("kind", KINDS)
def test_state_round_trip_is_bitwise_before_the_first_step(kind):
    torch.manual_seed(0)
    model = small_gpt()
    optimizers = optimizers_of(model, kind)
    for seed in range(2):
        step(model, optimizers, seed)
    saved = {key: t.clone() for key, t in optimizer_state(optimizers, model).items()}
    restored = small_gpt()
    restored.load_state_dict(model.state_dict())
    new = optimizers_of(restored, kind)
    addresses = [t.data_ptr() for t in optimizer_state(new, restored).values()]
    load_optimizer_state(new, restored, saved)
    assert [t.data_ptr() for t in optimizer_state(new, restored).values()] == addresses  # as a CUDA graph needs it
    assert equal(everything(model, optimizers), everything(restored, new))
    step(model, optimizers, 9)
    step(restored, new, 9)
    assert equal(everything(model, optimizers), everything(restored, new))
    assert not equal(saved, optimizer_state(new, restored))  # copied, not shared


def test_state_is_named_by_slot_and_parameter():
    model = small_gpt()
    state = optimizer_state(optimizers_of(model, "muon"), model)
    assert state["momentum_buffer/transformer.h.0.attn.c_attn.weight"].shape == (24, 8)
    assert state["exp_avg_sq/transformer.wte.weight"].shape == (11, 8)
    assert state["step/transformer.ln_f.bias"].shape == ()
    names = [name for name, _ in model.named_parameters()]
    matrices = [name for name in names if ".h." in name and name.endswith("weight") and ".ln_" not in name]
    assert len(matrices) == 8 and len(state) == len(matrices) + 3 * (len(names) - len(matrices))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("step/transformer.ln_f.bias"), "step/transformer.ln_f.bias is missing there"),
        (lambda state: state.update(extra=torch.zeros(())), r"extra is \(\) there and missing here"),
        (
            lambda state: state.update({"exp_avg/transformer.ln_f.bias": torch.zeros(1)}),
            r"exp_avg/transformer.ln_f.bias is \(1,\) there and \(8,\) here",
        ),
    ],
)
def test_mismatched_state_is_refused_and_changes_nothing(change, words):
    model = small_gpt()
    optimizers = optimizers_of(model)
    step(model, optimizers)
    before = everything(model, optimizers)
    state = {key: torch.ones_like(t) for key, t in optimizer_state(optimizers, model).items()}
    change(state)
    with pytest.raises(UserError, match=f"of another model or optimizer: {words}"):
        load_optimizer_state(optimizers, model, state)
    assert equal(before, everything(model, optimizers))


@pytest.mark.parametrize(("written", "read"), [("adamw", "muon"), ("muon", "adamw")])
def test_state_of_another_optimizer_is_refused(written, read):
    model = small_gpt()
    state = optimizer_state(optimizers_of(model, written), model)
    with pytest.raises(UserError, match="of another model or optimizer"):
        load_optimizer_state(optimizers_of(model, read), model, state)


# --- sharded parameters


@pytest.fixture
def gloo():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in tensors.items()}


def test_sharded_parameters_behave_like_whole_ones(gloo):
    models, idx = [small_gpt(), small_gpt(), small_gpt()], torch.randint(11, (2, 8))
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
        fully_shard(model, mesh=gloo)
    optimizers = [optimizers_of(model) for model in models]
    averages = [EMA(model, 0.99) for model in models]

    def train(i: int, n: int) -> None:
        skip = torch.tensor(float(n == 1))
        models[i](idx, idx)[1].backward()
        optimizers[i][0].grad_scale, optimizers[i][0].found_inf = torch.tensor(3.0), skip
        optimizers[i][0].step()
        averages[i].update(skip, torch.tensor(n + 1))
        models[i].zero_grad()

    def all_of(i: int) -> dict[str, Tensor]:
        averaged = {f"ema/{name}": t for name, t in averages[i].tensors.items()}
        return whole(everything(models[i], optimizers[i]) | averaged)

    for n in range(3):
        train(0, n)
        train(1, n)
    assert equal(all_of(0), all_of(1))
    with averages[1].swapped():
        assert equal(whole(everything(models[1], [])), averages[0].tensors)
    assert equal(all_of(0), all_of(1))

    fresh = optimizer_state(optimizers[2], models[2])
    assert type(fresh["exp_avg/transformer.wte.weight"]) is type(models[2].transformer.wte.weight.data)
    load_optimizer_state(optimizers[2], models[2], optimizer_state(optimizers[0], models[0]))  # whole, as saved
    assert equal(whole(fresh), optimizer_state(optimizers[0], models[0]))


def test_muon_refuses_shards(gloo):
    model = fully_shard(small_gpt(), mesh=gloo)
    with pytest.raises(UserError, match="whole matrices, and FSDP shards them: use DDP"):
        build(model, kind="muon", betas=(0.9, 0.95), weight_decay=0.1)


# --- the learning rate


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1.0 / 11),  # the first update moves
        (4, 5.0 / 11),
        (9, 10.0 / 11),
        (10, 1.0),  # the peak
        (60, 0.55),  # half-way between peak and floor
        (110, 0.1),  # the floor, and on it stays
        (1000, 0.1),
    ],
)
def test_lr_warms_up_then_follows_half_a_cosine(step, expected):
    assert lr_at(step, lr=1.0, min_lr=0.1, warmup_steps=10, steps=110) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("cosine", {10: 1.0, 35: 0.55 + 0.45 * math.sqrt(0.5), 60: 0.55, 110: 0.1}),
        ("linear", {10: 1.0, 35: 0.775, 60: 0.55, 110: 0.1}),
        ("constant", {10: 1.0, 60: 1.0, 109: 1.0, 110: 1.0, 1000: 1.0}),
        ("wsd", {10: 1.0, 69: 1.0, 70: 1.0, 80: 0.55, 109: 1 - 0.9 * math.sqrt(39 / 40), 110: 0.1, 1000: 0.1}),
    ],
)
def test_lr_after_the_warm_up_by_schedule(schedule, expected):
    options = dict(lr=1.0, min_lr=0.1, warmup_steps=10, steps=110, schedule=schedule, cooldown_steps=40)
    assert lr_at(4, **options) == 5 / 11
    assert {step: lr_at(step, **options) for step in expected} == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("schedule", "until"), [("constant", 100), ("wsd", 60)])
def test_more_steps_do_not_change_the_past(schedule, until):
    options = dict(lr=1.0, min_lr=0.0, warmup_steps=5, schedule=schedule, cooldown_steps=40)
    short, long = ([lr_at(step, steps=steps, **options) for step in range(100)] for steps in (100, 400))
    assert short[:until] == long[:until]
    assert schedule == "constant" or short[until + 1] < long[until + 1]


def test_cooldown_begins_after_the_warm_up():
    options = dict(lr=1.0, min_lr=0.0, warmup_steps=10, schedule="wsd")
    assert lr_at(10, steps=20, cooldown_steps=50, **options) == 1.0
    assert lr_at(15, steps=20, cooldown_steps=50, **options) == 1 - math.sqrt(0.5)
    assert lr_at(19, steps=20, cooldown_steps=0, **options) == 1.0  # none at all


def test_lr_without_warm_up_starts_at_the_peak():
    assert lr_at(0, lr=0.5, min_lr=0.0, warmup_steps=0, steps=4) == 0.5
    assert lr_at(2, lr=0.5, min_lr=0.0, warmup_steps=0, steps=4) == pytest.approx(0.25)


def test_lr_only_rises_within_warm_up():
    rates = [lr_at(step, lr=1.0, min_lr=0.1, warmup_steps=10, steps=5) for step in range(5)]
    assert rates == sorted(rates) and rates[-1] < 1.0


@given(
    steps=st.integers(1, 200),
    warmup=st.integers(0, 200),
    cooldown=st.integers(0, 200),
    low=st.floats(0, 1),
    step=st.integers(0, 300),
    schedule=st.sampled_from(SCHEDULES),
)
def test_lr_is_bounded_and_never_rises_after_warm_up(steps, warmup, cooldown, low, step, schedule):
    options = dict(lr=1.0, min_lr=low, warmup_steps=warmup, steps=steps, schedule=schedule, cooldown_steps=cooldown)
    rate = lr_at(step, **options)
    assert min(low, 1.0 / (warmup + 1)) - 1e-12 <= rate <= 1.0 + 1e-12
    assert step < warmup or lr_at(step + 1, **options) <= rate + 1e-12


def test_new_plan_goes_through_the_rest_of_the_schedule():
    plan = [(15, 65), (40, 90), (65, 70)]  # half of the way in 25 steps, a quarter in 25 more, the rest in 5
    places = [planned(step, plan, warmup_steps=14) for step in (16, 40, 41, 65, 66, 70)]
    assert places == [16, 40, 40.5, 52.5, 55, 65]
    assert [planned(step, plan[:1], 14) for step in (16, 40, 65)] == [16, 40, 65]  # exactly
    assert [planned(step, plan, 3) for step in (15, 40, 70)] == [4, 4 + 61 / 2, 65]  # the peak was held until then


@given(
    steps=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 60)), min_size=1, max_size=5),
    warmup=st.integers(0, 60),
    schedule=st.sampled_from(SCHEDULES),
)
def test_rate_never_jumps_at_a_plan_and_its_past_stays(steps, warmup, schedule):
    """steps: (from one plan to the next, from there to the end that it plans)."""
    ats = [*itertools.accumulate(gap for gap, _ in steps)]
    plan = [(at, at + max(1, left)) for at, (_, left) in zip(ats, steps, strict=True)]
    plan = [pair for i, pair in enumerate(plan) if all(pair[0] < before[1] for before in plan[:i])]
    last = plan[-1][1]
    places = [planned(step, plan, warmup) for step in range(plan[0][0], last + 1)]
    assert places[0] == min(plan[0][0], warmup + 1) and places[-1] == pytest.approx(plan[0][1])
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(places))
    for i, (at, _) in enumerate(plan[1:], 1):
        assert planned(at, plan[: i + 1], warmup) == planned(at, plan[:i], warmup) == planned(at, plan, warmup)


# --- the moving average


def test_ema_follows_the_formula_in_float64():
    model = small_gpt()
    ema, name = EMA(model, 0.5), "transformer.wte.weight"
    p = model.transformer.wte.weight
    expected, decays = p.detach().double(), []
    for n in range(1, 15):
        with torch.no_grad():
            p.normal_()
        decays.append(min(0.5, (1 + n) / (10 + n)))
        expected = decays[-1] * expected + (1 - decays[-1]) * p.detach().double()
        ema.update(torch.tensor(0.0), torch.tensor(n))
    assert decays[0] == 2 / 11 and decays[-1] == 0.5  # it has warmed up
    torch.testing.assert_close(ema.tensors[name], expected.float(), rtol=1e-6, atol=1e-6)
    assert ema.tensors.keys() == {name for name, _ in model.named_parameters()}


def test_ema_ignores_a_skipped_step():
    model = small_gpt()
    ema = EMA(model, 0.9)
    before = {name: t.clone() for name, t in ema.tensors.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert equal(before, ema.tensors)  # copies
    ema.update(torch.tensor(1.0), torch.tensor(1))
    assert equal(before, ema.tensors)
    ema.update(torch.tensor(0.0), torch.tensor(1))
    assert not any(torch.equal(before[name], t) for name, t in ema.tensors.items())


def test_swapped_restores_parameters_even_after_an_error():
    model = small_gpt()
    ema = EMA(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    parameters, averages = everything(model, []), {name: t.clone() for name, t in ema.tensors.items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(KeyError), ema.swapped():
        assert equal(everything(model, []), averages) and equal(ema.tensors, parameters)
        assert torch.is_grad_enabled() and [p.data_ptr() for p in model.parameters()] == addresses
        raise KeyError
    assert equal(everything(model, []), parameters) and equal(ema.tensors, averages)
