"""Weights in 8 and 16 bits for inference, on a CPU."""

from __future__ import annotations

import copy
import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from model import quantize
from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT, Linear, TiedEmbedding
from model.kv_cache import KVCache
from model.quantize import prepare

LOW = ("bfloat16", "float16", "int8")
SHAPES = [(1, 1), (3, 5), (16, 64), (50, 24), (257, 48), (96, 130)]  # (N, K)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CPUINFO = Path("/proc/cpuinfo")
HAS_VNNI = CPUINFO.exists() and "vnni" in CPUINFO.read_text() and "ONEDNN_MAX_CPU_ISA" not in os.environ
needs_int8 = pytest.mark.skipif(not HAS_VNNI, reason="needs a CPU with VNNI, whose products of int8 are exact")


def make(**settings) -> GPT:
    """Weights large enough that the tokens are far from equally likely."""
    torch.manual_seed(0)
    settings = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2, **settings}
    return GPT(GPTConfig(initializer_range=0.3, **settings)).eval()


@pytest.fixture(params=["packed", "widened"])
def products(request, monkeypatch):
    """The products of CPUs with and without the instructions."""
    if request.param == "widened":
        monkeypatch.setattr(quantize, "_multiplies", lambda dtype: False)
        monkeypatch.setattr(quantize, "PART", 70)  # a few rows at a time, the last part shorter
    elif not all(map(quantize._multiplies, (torch.int8, torch.bfloat16, torch.float16))):
        pytest.skip("needs a CPU with products of 8 and 16 bits")
    return request.param


@torch.no_grad()
def greedy(model: GPT, prompt, tokens: int) -> list[int]:
    cache = KVCache(model.config, 1, dtype=model.dtype)
    ids, step = [], torch.tensor([prompt])
    with torch.inference_mode():
        for _ in range(tokens):
            logits, _ = model(step, logits="last", cache=cache)
            step = logits[:, -1].argmax(-1, keepdim=True)
            ids.append(int(step))
    return ids


# --- the integers


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_weights_are_within_half_a_step(shape):
    weight = torch.randn(shape) * torch.logspace(-30, 30, shape[0])[:, None]  # each row in a range of its own
    q, scale = quantize.quantize(weight)
    assert (q.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, shape[:1])
    assert torch.equal(scale, weight.abs().amax(1) / 127) and (q.abs().amax(1) == 127).all()
    error = (q.double() * scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * scale.double()[:, None]).all()


def test_symmetric_weights_have_symmetric_integers():
    weight = torch.randn(7, 9)
    (q, scale), (minus_q, minus_scale) = quantize.quantize(weight), quantize.quantize(-weight)
    assert torch.equal(q, -minus_q) and torch.equal(scale, minus_scale)


@pytest.mark.parametrize("largest", [0.0, 1e-45, 2.5e-43, 1e-38])
def test_rows_of_zeros_and_of_almost_zeros(largest):
    weight = torch.tensor([[largest, -largest, 0.0], [1.0, -2.0, 127.0]])
    q, scale = quantize.quantize(weight)
    assert q[1].tolist() == [1, -2, 127] and scale[1] == 1
    product = quantize.widened(q, scale, None)(torch.eye(3))
    assert torch.allclose(product.T, weight, rtol=0.01, atol=1e-43)
    if largest == 0:
        assert scale[0] == 0 and not q[0].any() and not product[:, 0].any()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(wrong):
    model = make()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 2] = wrong
    with pytest.raises(UserError, match="not finite"):
        prepare(model, "int8")


# --- the products


@needs_int8
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("M", [1, 2, 9])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_product_is_exact_up_to_two_digits(shape, M, bias):
    """Against float64 with the same integers: |error| <= r / 2 * sum_k |W[n, k]|, r = max |x| / 32512, and rounding."""
    N, K = shape
    q, scale = quantize.quantize(torch.randn(shape) * torch.logspace(-3, 3, N)[:, None])
    b = torch.randn(N) if bias else None
    x = torch.randn(M, K) * torch.logspace(-4, 4, M)[:, None]
    got = quantize.packed_int8(q, scale, b)(x)
    weight = q.double() * scale.double()[:, None]
    truth = F.linear(x.double(), weight, None if b is None else b.double())
    step = x.double().abs().amax(1, keepdim=True) / 32512
    size = F.linear(x.double().abs(), weight.abs(), None if b is None else b.double().abs())
    assert got.dtype == torch.float32 and got.shape == (M, N)
    assert ((got - truth).abs() <= 0.501 * step * weight.abs().sum(1) + 1e-6 * size).all()


@needs_int8
def test_int8_product_of_the_largest_sums():
    """Where every product is as large as it can be, in a row as long as GPT-2 XL's."""
    K = 6400
    q = torch.tensor([[127] * K, [-127] * K], dtype=torch.int8)
    y = quantize.packed_int8(q, torch.ones(2), torch.ones(2))(torch.tensor([[1.0] * K, [-1.0] * K, [0.0] * K]))
    exact = 127.0 * K
    torch.testing.assert_close(y - 1, torch.tensor([[exact, -exact], [-exact, exact], [0.0, 0.0]]), rtol=1e-6, atol=0)
    assert quantize._multiplies(torch.int8)


@needs_int8
def test_a_row_does_not_depend_on_the_others():
    q, scale = quantize.quantize(torch.randn(40, 48))
    product, x = quantize.packed_int8(q, scale, torch.randn(40)), torch.randn(33, 48)
    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", LOW)
def test_widened_products_are_those_of_the_weights(shape, form, monkeypatch):
    monkeypatch.setattr(quantize, "PART", 70)
    weight, scale = torch.randn(shape), None
    weight, scale = quantize.quantize(weight) if form == "int8" else (weight.to(DTYPES[form]), None)
    x, bias = torch.randn(4, shape[1]), torch.randn(shape[0])
    truth = F.linear(x, weight.float() * (1.0 if scale is None else scale[:, None]), bias)
    torch.testing.assert_close(quantize.widened(weight, scale, bias)(x), truth)
    low = quantize.widened(weight, scale, bias)(x.bfloat16())  # as on a GPU
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), truth, rtol=0.02, atol=0.1)


def test_int8_that_is_not_exact_is_noticed(monkeypatch):
    """As on a CPU that adds pairs of products up in 16 bits."""
    exact = quantize.packed_int8
    monkeypatch.setattr(quantize, "packed_int8", lambda *args: lambda x: exact(*args)(x) * (32767 / 64770))
    assert not quantize._int8_is_exact()
    monkeypatch.undo()

    def missing(*args):
        raise AttributeError("no such operator")

    quantize._multiplies.cache_clear()
    monkeypatch.setattr(quantize, "_int8_is_exact", missing)
    assert not quantize._multiplies(torch.int8)
    quantize._multiplies.cache_clear()


# --- the model


@pytest.mark.parametrize("form", LOW)
@pytest.mark.parametrize("max_logits", [1, 61 * 4, 1 << 25])
def test_loss_is_that_of_the_logits(form, max_logits, monkeypatch):
    monkeypatch.setattr(quantize, "MAX_LOGITS", max_logits)
    model = prepare(make(), form)
    idx, targets = torch.randint(61, (3, 16)), torch.randint(61, (3, 16))
    targets[0, 3:] = targets[2, 2] = -100
    with torch.no_grad():
        loss = model(idx, targets)[1]
        expected = F.cross_entropy(model(idx)[0].flatten(0, 1).float(), targets.flatten())
        torch.testing.assert_close(loss, expected, rtol=1e-3 if form == "bfloat16" else 1e-5, atol=0)
        assert model(idx, torch.full_like(targets, -100))[1].isnan()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", LOW)
def test_logits_and_loss_are_close_to_float32(form, bias, products):
    model = make(bias=bias)
    idx = torch.randint(61, (3, 16))
    with torch.no_grad():
        logits, loss = model(idx)[0], model(idx[:, :-1], idx[:, 1:])[1]
        low = prepare(model, form)
        got, got_loss = low(idx)[0], low(idx[:, :-1], idx[:, 1:])[1]
        assert low is model and got.dtype == low.dtype and got_loss.dtype == torch.float32
        assert low.dtype == (DTYPES[form] if products == "packed" and form != "int8" else torch.float32)
        bound = {"bfloat16": 0.03, "float16": 0.004, "int8": 0.06}[form]
        assert 0 < (got.float() - logits).norm() <= bound * logits.norm()
        assert abs(got_loss - loss) <= bound * loss


@pytest.mark.parametrize("form", ["float32", *LOW])
def test_every_matrix_and_the_head_are_converted(form, products):
    """With each matrix set to the value of its own quantised weights, int8 changes nothing but by two digits of x."""
    model = make()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Linear | TiedEmbedding):
                if form == "int8":
                    q, scale = quantize.quantize(module.weight)
                    module.weight.copy_(q * scale[:, None])
                else:
                    module.weight.copy_(module.weight.to(DTYPES.get(form, torch.float32)))
        idx = torch.randint(61, (2, 16))
        exact = model(idx)[0]
        low = prepare(copy.deepcopy(model), form)
        left = [m for m in low.modules() if isinstance(m, Linear | TiedEmbedding)]
        assert bool(left) == (form == "float32")
        bound = {"bfloat16": 0.03, "float16": 0.004}.get(form, 1e-3) if low.dtype != torch.float32 else 1e-3
        assert (low(idx)[0].float() - exact).norm() <= bound * exact.norm()


def test_int8_generates_what_its_weights_say(products):
    """The ids of the float32 model with the values of the quantised weights; with the original ones, nearly all."""
    model = make()
    ids = greedy(prepare(copy.deepcopy(model), "int8"), [1, 2, 3], 13)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, Linear | TiedEmbedding):
                q, scale = quantize.quantize(module.weight)
                module.weight.copy_(q * scale[:, None])
    assert ids == greedy(rounded, [1, 2, 3], 13)
    assert len(set(ids)) > 3


@pytest.mark.parametrize("form", LOW)
def test_cache_and_batch_agree_with_one_pass(form, products):
    model = prepare(make(), form)
    idx = torch.randint(61, (5, 16))
    with torch.inference_mode():
        whole = model(idx)[0].float()
        cache = KVCache(model.config, 5, dtype=model.dtype)
        parts = [model(idx[:, :9], cache=cache)[0], *(model(idx[:, n : n + 1], cache=cache)[0] for n in range(9, 16))]
    bound = {"bfloat16": 0.05, "float16": 0.005, "int8": 1e-3}[form] * float(whole.abs().max())
    torch.testing.assert_close(torch.cat(parts, 1).float(), whole, rtol=0, atol=bound)


@pytest.mark.parametrize("form", LOW)
def test_ids_outside_the_vocabulary_are_refused(form):
    model = prepare(make(), form)
    for wrong in (-1, 61):
        with pytest.raises(ValueError, match=r"token ids must lie in \[0, 61\)"):
            model(torch.tensor([[wrong]]))


@pytest.mark.parametrize("weights", [None, "float32"])
def test_float32_keeps_logits_and_state(weights):
    model = make()
    state, idx = copy.deepcopy(model.state_dict()), torch.randint(61, (2, 16))
    with torch.no_grad():
        before = model(idx)[0]
        after = prepare(model, weights)(idx)[0]
    torch.testing.assert_close(after, before)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("form", LOW)
def test_conversion_leaves_no_matrix_behind(form):
    """Neither as a parameter nor in what would be saved; and another model is not touched."""
    model = make()
    other, state = copy.deepcopy(model), copy.deepcopy(model.state_dict())
    prepare(model, form)
    matrices = {name for name, value in state.items() if value.ndim == 2 and "wpe" not in name}
    assert not matrices & model.state_dict().keys() and not matrices & dict(model.named_parameters()).keys()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    with pytest.raises(ValueError, match="have been converted"):
        prepare(model, "int8")


def test_amx_is_avoided_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    quantize.avoid_amx()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    quantize.avoid_amx()
    assert os.environ["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"


def test_no_warning_is_shown():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare(make(), "int8")
        with torch.no_grad():
            model(torch.tensor([[1, 2]]))


@pytest.mark.gpu
@pytest.mark.parametrize("form", LOW)
def test_gpu_computes_in_16_bits(form):
    model = make().cuda()
    idx = torch.randint(61, (3, 16), device="cuda")
    with torch.no_grad():
        expected = model(idx)[0]
        low = prepare(model, form)
        got = low(idx)[0]
    assert got.dtype == low.dtype == DTYPES.get(form, torch.bfloat16)
    assert (got.float() - expected).norm() <= 0.08 * expected.norm()
    cache = KVCache(model.config, 3, dtype=model.dtype, device="cuda")
    with torch.inference_mode():
        parts = [low(idx[:, :15], cache=cache)[0], low(idx[:, 15:], cache=cache)[0]]
    assert (torch.cat(parts, 1) - got).float().norm() <= 0.05 * expected.norm()
