"""One token at a time: the decode kernel beyond its declared cases, the cache, and the model that uses both."""

import importlib
from dataclasses import replace

import pytest
import torch
from conftest import HAS_CUDA
from torch._dynamo.testing import CompileCounterWithBackend

from kernels import decode_attention, use_backend
from kernels._launch import record_launches
from kernels._proof import compare
from kernels._triton import HAS_TRITON
from model import gpt
from model.config import GPTConfig
from model.gpt import GPT
from model.kv_cache import KVCache

module = importlib.import_module("kernels.decode_attention")  # the package gives the name to the function
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
BACKENDS = ["eager", pytest.param("triton", marks=needs_triton)]
HALF = torch.bfloat16 if HAS_CUDA else torch.float16  # the interpreter has no bfloat16
B, H, S, D = 5, 2, 150, 24
LENGTHS = [0, 1, S, 33, 100]


def inputs(device, dtype=torch.float32, lengths=LENGTHS):
    q = torch.randn(B, H, D, dtype=dtype, device=device)
    k = torch.randn(B, H, S, D, dtype=dtype, device=device)
    v = torch.randn(B, S, D, H, dtype=dtype, device=device).permute(0, 3, 1, 2)  # no stride is k's
    return q, k, v, torch.tensor(lengths, device=device)


def by_definition(q, k, v, lengths):
    """softmax(q . k / sqrt(D)) v, a sequence and head at a time, in float64."""
    o = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b, n in enumerate(lengths.tolist()):
        for h in range(q.shape[1]):
            if n:
                s = k[b, h, :n].double() @ q[b, h].double() / q.shape[-1] ** 0.5
                o[b, h] = s.softmax(0) @ v[b, h, :n].double()
    return o


# --- the kernel


@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("eager", torch.float64),  # the oracle of the other tests
        ("eager", torch.float32),
        pytest.param("triton", torch.float32, marks=needs_triton),
        pytest.param("triton", HALF, marks=needs_triton),
    ],
)
def test_attention_covers_keys_below_the_length(backend, dtype, integers, device):
    q, k, v, lengths = inputs(device, dtype)
    with use_backend(backend):
        o = decode_attention(q, k, v, lengths.to(integers))
    assert o.shape == (B, H, D) and o.dtype == dtype
    assert not o[0].any()
    torch.testing.assert_close(o, by_definition(q, k, v, lengths).to(dtype))


@pytest.mark.parametrize(
    ("backend", "lengths"),
    [
        *(("eager", lengths) for lengths in (LENGTHS, [7] * 5, [0] * 5)),
        *(pytest.param("triton", lengths, marks=needs_triton) for lengths in (LENGTHS, [0] * 5)),
    ],
)
def test_values_past_the_length_do_not_matter(backend, lengths, device):
    q, k, v, lengths = inputs(device, lengths=lengths)
    past = (torch.arange(S, device=device) >= lengths[:, None])[:, None, :, None]
    with use_backend(backend):
        expected = decode_attention(q, k.masked_fill(past, 0.0), v.masked_fill(past, 0.0), lengths)
        for garbage in (float("nan"), float("inf"), 1e30):
            got = decode_attention(q, k.masked_fill(past, garbage), v.masked_fill(past, garbage), lengths)
            assert torch.equal(got, expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_beyond_the_cache_read_nothing(backend, device):
    q, k, v, _ = inputs(device)
    k, v = (torch.cat([x, torch.full_like(x, float("nan"))], 2)[:, :, :S] for x in (k, v))
    with use_backend(backend):
        got, expected = (
            decode_attention(q, k, v, torch.tensor(n, device=device))
            for n in ([S + 9, -1, S, 9, 2 * S], [S, 0, S, 9, S])
        )
    assert torch.equal(got, expected) and got.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend, device):
    with use_backend(backend):
        assert decode_attention(*(x[:0] for x in inputs(device))).shape == (0, H, D)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_within_the_length_propagates(backend, device):
    """In a query, or in a key or value below the length 33, it reaches the output of its head, and of no other."""
    for which, place in enumerate([(3, 1, 4), (3, 1, 32, 4), (3, 1, 0, 4)]):
        tensors = inputs(device)
        tensors[which][place] = float("nan")
        with use_backend(backend):
            o = decode_attention(*tensors)
        wrong = o.isnan().any(-1)
        assert wrong[3, 1] and wrong.sum() == 1


@needs_triton
def test_number_of_splits_does_not_matter(monkeypatch, device):
    q, k, v, lengths = (x[2:4] for x in inputs(device))  # the longest, and one that ends before the last split
    truth = by_definition(q, k, v, lengths)
    grids = set()
    launch = module.launch
    monkeypatch.setattr(
        module, "launch", lambda kernel, grid, *a, **m: grids.add(grid) or launch(kernel, grid, *a, **m)
    )
    table = {"BLOCK_N": 4, "num_warps": 4, "programs_per_sm": 4}
    monkeypatch.setattr(module, "_options", lambda *widths: table)
    for sms in (1, 3, 10_000):
        monkeypatch.setattr(module, "sm_count", lambda _, sms=sms: sms)
        with use_backend("triton"):
            o = decode_attention(q, k, v, lengths)
        torch.testing.assert_close(o, truth.float())
    splits = {grid[1] for grid in grids if len(grid) == 2}
    assert splits == {1, 3, module.MAX_SPLITS}


@needs_triton
@pytest.mark.parametrize(("S", "kernels"), [(10, 1), (1000, 2)])
def test_launches_follow_from_shapes_and_never_from_lengths(S, kernels):
    """One CUDA graph then fits every step. One split needs no second kernel."""
    seen = set()
    for n in (0, 1, S // 2, S):
        q, k, v = torch.zeros(1, 2, D), *torch.zeros(2, 1, 2, S, D)
        with record_launches() as launches, use_backend("triton"):
            decode_attention(q, k, v, torch.tensor([n]))
        seen.add(tuple((launch.kernel.__name__, launch.grid) for launch in launches))
    assert len(seen) == 1 and len(seen.pop()) == kernels


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_of_thousands_and_of_minus_infinity(backend, device):
    q, k, v, lengths = inputs(device)
    q, k = q.abs(), k.abs()
    k[3, :, :30] = float("-inf")  # the first of 33 keys have no finite score
    k[4] *= 3000
    with use_backend(backend):
        o = decode_attention(q, k, v, lengths)
    exact = by_definition(q, k, v, lengths)
    assert exact.isfinite().all()
    torch.testing.assert_close(o.double(), exact, rtol=0.01, atol=0.01 * exact.abs().max().item())


@needs_triton
def test_decode_attention_refuses_gradients(device):
    q, k, v, lengths = inputs(device)
    q.requires_grad_()
    with use_backend("triton"):
        o = decode_attention(q, k, v, lengths)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            o.sum().backward()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 3)}, r"q must be \(B, H, D\).* got \(2, 3\)"),
        ({"q": torch.zeros(2, 3, 5)}, r"got \(2, 3, 5\), \(2, 3, 7, 4\)"),
        ({"k_cache": torch.zeros(2, 7, 4)}, r"\(2, 7, 4\)"),
        ({"v_cache": torch.zeros(2, 3, 8, 4)}, r"and \(2, 3, 8, 4\)"),
        ({"v_cache": torch.zeros(2, 3, 7, 4, dtype=torch.float16)}, "float32, torch.float32 and torch.float16"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths must be \(2,\) int64 or int32, got \(3,\)"),
        ({"lengths": torch.zeros(2)}, "got .* torch.float32"),
    ],
)
def test_wrong_arguments_are_refused(change, words):
    good = {
        "q": torch.zeros(2, 3, 4),
        "k_cache": torch.zeros(2, 3, 7, 4),
        "v_cache": torch.zeros(2, 3, 7, 4),
        "lengths": torch.zeros(2, dtype=torch.int64),
    }
    decode_attention(**good)
    with pytest.raises(ValueError, match=words):
        decode_attention(**good | change)


@needs_triton
def test_triton_refuses_a_wide_head(device):
    with use_backend("triton"), pytest.raises(RuntimeError, match="head size 257"):
        decode_attention(
            torch.zeros(1, 1, 257, device=device),
            *torch.zeros(2, 1, 1, 3, 257, device=device),
            torch.ones(1, dtype=torch.int64, device=device),
        )


# --- the model with a cache

CONFIG = GPTConfig(vocab_size=61, n_positions=12, n_embd=48, n_layer=2, n_head=3)


def build(dtype, device, config=CONFIG):
    torch.manual_seed(3)
    model = GPT(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return (model.double() if dtype == torch.float64 else model).to(device)


def cached_logits(model, idx, prompt, S=None):
    """The logits of every position: a prompt at once, then one token at a time."""
    cache = KVCache(model.config, len(idx), S, dtype=model.dtype, device=idx.device)
    cache.k.fill_(float("nan"))  # whatever the memory held
    cache.v.fill_(float("nan"))
    steps = [idx[:, :prompt], *(idx[:, t : t + 1] for t in range(prompt, idx.shape[1]))]
    with torch.inference_mode():
        return torch.cat([model(step, cache=cache)[0] for step in steps], 1)


@pytest.mark.parametrize("prompt", [1, 5, CONFIG.n_positions])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("eager", torch.float32),
        ("eager", torch.bfloat16),
        pytest.param("triton", torch.float32, marks=needs_triton),
        pytest.param("triton", HALF, marks=[needs_triton, pytest.mark.slow]),
    ],
)
def test_cached_logits_equal_uncached(backend, dtype, prompt, device):
    idx = torch.randint(61, (2, CONFIG.n_positions)).to(device)  # to the last position
    with torch.inference_mode(), use_backend("eager"):
        truth, eager = build(torch.float64, device)(idx)[0], build(dtype, device)(idx)[0]
    with use_backend(backend):
        got = cached_logits(build(dtype, device), idx, prompt)
    row = compare("model", {}, "logits", got, eager, truth, gradient=True)
    assert row.passed, f"error {row.error:.3e} > allowed {row.allowed:.3e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_smaller_cache_suffices_for_shorter_text(backend, device):
    model, idx = build(torch.float32, device), torch.randint(61, (1, 7)).to(device)
    with use_backend(backend):
        torch.testing.assert_close(cached_logits(model, idx, 3, S=7), cached_logits(model, idx, 3), rtol=0, atol=2e-5)


def test_prompt_and_tokens_use_one_attention_each(monkeypatch, device):
    calls = []
    for name in ("causal_attention", "decode_attention"):
        fn = getattr(gpt, name)
        monkeypatch.setattr(gpt, name, lambda *a, fn=fn, name=name, **kw: calls.append(name) or fn(*a, **kw))
    cached_logits(build(torch.float32, device), torch.randint(61, (2, 4)).to(device), 1)
    assert calls == ["causal_attention"] * 2 + ["decode_attention"] * 6


def test_last_logits_come_from_the_cache(device):
    net, idx = build(torch.float32, device), torch.randint(61, (2, 6)).to(device)
    cache = KVCache(CONFIG, 2, dtype=torch.float32, device=device)
    with torch.inference_mode():
        first, second = (net(part, logits="last", cache=cache)[0] for part in (idx[:, :5], idx[:, 5:]))
        every, _ = net(idx)
    assert first.shape == second.shape == (2, 1, 61)
    torch.testing.assert_close(torch.cat([first, second], 1), every[:, 4:], rtol=0, atol=2e-5)
    assert cache.length == 6 and cache.lengths.tolist() == [6, 6]


def padded(rows, T, fill):
    return torch.stack([torch.cat([row, row.new_full((T - len(row),), fill)]) for row in rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_texts_of_different_lengths_share_a_cache(backend, device):
    """Read with padding, then a token each: the logits of each are those of its text alone."""
    net, lengths = build(torch.float32, device), torch.tensor([1, 6, 4], device=device)
    texts = [torch.randint(61, (n + 2,)).to(device) for n in lengths]
    cache = KVCache(CONFIG, 3, dtype=torch.float32, device=device)
    cache.k.fill_(float("nan"))
    cache.v.fill_(float("nan"))
    with torch.inference_mode():
        alone = [net(text[None])[0][0] for text in texts]
    with torch.inference_mode(), use_backend(backend):
        for padding in (0, 60)[: 1 if backend == "triton" else 2]:  # what the padding is does not matter
            cache.clear()
            idx = padded([text[:n] for text, n in zip(texts, lengths, strict=True)], 7, padding)
            got = [net(idx, logits="last", cache=cache, lengths=lengths)[0]]
            assert torch.equal(got[0], net(idx, logits="last", lengths=lengths)[0])  # without a cache too
            for t in range(2):
                idx = torch.stack([text[n + t] for text, n in zip(texts, lengths, strict=True)])[:, None]
                got.append(net(idx, logits="last", cache=cache)[0])
            for b, n in enumerate(lengths):
                torch.testing.assert_close(torch.cat(got, 1)[b], alone[b][n - 1 :], rtol=0, atol=2e-5)
    assert cache.lengths.tolist() == [3, 8, 6] and cache.length == 9  # 7 with padding, and 2


def test_sequences_are_replaced_by_those_of_another_cache(device):
    net, (held, text) = build(torch.float32, device), torch.randint(61, (2, 3, 9)).to(device)
    own, other = (KVCache(CONFIG, B, S, dtype=torch.float32, device=device) for B, S in ((3, 12), (2, 4)))
    with torch.inference_mode():
        net(held[:, :8], cache=own)
        net(text[:2, :4], cache=other, lengths=torch.tensor([4, 2], device=device))
        own.put(torch.tensor([2, 0], device=device), other, torch.tensor([0, 1], device=device))
        assert own.lengths.tolist() == [2, 8, 4] and own.length == 8
        idx = torch.stack([text[1, 2], held[1, 8], text[0, 4]])[:, None]
        got, _ = net(idx, cache=own)
        for b, expected in enumerate((text[1, :3], held[1], text[0, :5])):
            torch.testing.assert_close(got[b, 0], net(expected[None])[0][0, -1], rtol=0, atol=2e-5)


def test_cleared_sequence_begins_anew(device):
    net, idx = build(torch.float32, device), torch.randint(61, (2, 6)).to(device)
    cache = KVCache(CONFIG, 2, 6, dtype=torch.float32, device=device)
    with torch.inference_mode():
        net(idx[:, :5], cache=cache)
        cache.clear(torch.tensor([1], device=device))
        got, _ = net(idx[:, 5:], cache=cache)
        assert cache.lengths.tolist() == [6, 1]
        torch.testing.assert_close(got[0, 0], net(idx)[0][0, -1], rtol=0, atol=2e-5)
        torch.testing.assert_close(got[1, 0], net(idx[1:, 5:])[0][0, 0], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("held", "came", "words"),
    [
        (11, (2, 2), "full: it has room for 12 tokens, holds 11, and got 2 more"),
        (12, (2, 1), "full: it has room for 12 tokens, holds 12, and got 1 more"),
        (3, (2, 2), "takes one at a time, got 2"),
        (3, "lengths", "takes one at a time, got lengths of several"),
        (3, (1, 1), "has 2 sequences, got 1"),
        (3, "ids", r"\[0, 61\)"),
    ],
)
def test_cache_refuses_bad_input_and_stays_unchanged(held, came, words):
    net, idx = build(torch.float32, "cpu"), torch.randint(61, (2, 12))
    cache = KVCache(CONFIG, 2, dtype=torch.float32)
    lengths = torch.ones(2, dtype=torch.int64) if came == "lengths" else None
    new = torch.full((2, 1), 61) if came == "ids" else torch.zeros((2, 1) if came == "lengths" else came).long()
    with torch.inference_mode():
        net(idx[:, :held], cache=cache)
        before = cache.k.clone()
        with pytest.raises(ValueError, match=words):
            net(new, cache=cache, lengths=lengths)
    assert cache.length == held and cache.lengths.tolist() == [held, held]
    assert torch.equal(cache.k[:, :, :, :held], before[:, :, :, :held])


def test_cache_is_for_inference():
    cache = KVCache(CONFIG, 1, dtype=torch.float32)
    with pytest.raises(ValueError, match="inference_mode"):
        build(torch.float32, "cpu")(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


@pytest.mark.parametrize("S", [0, 13])
def test_cache_size_out_of_range_is_refused(S):
    with pytest.raises(ValueError, match=f"1 to 12 tokens, the positions of the model, got {S}"):
        KVCache(CONFIG, 1, S, dtype=torch.float32)


@needs_triton
def test_cached_step_compiles_once_for_all_lengths(device):
    torch.compiler.reset()
    config = replace(CONFIG, n_layer=1)
    net, idx = build(torch.float32, device, config), torch.randint(61, (1, 8)).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    with use_backend("triton"), torch.inference_mode():
        expected, _ = net(idx)
        cache = KVCache(config, 1, dtype=torch.float32, device=device)
        net(idx[:, :2], cache=cache)
        for t in range(2, 8):
            got, _ = compiled(idx[:, t : t + 1], cache=cache)
            torch.testing.assert_close(got[:, 0], expected[:, t], rtol=0, atol=2e-5)
    assert counter.frame_count <= 2  # for the first length, then for any
