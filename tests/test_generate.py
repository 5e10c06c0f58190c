"""Which ids are drawn, what the model reads for them, and where texts end."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_model import CONTEXT, batch, small_model, small_tokenizer

from kernels import use_backend
from kernels._triton import HAS_TRITON
from model import decoder
from model.cli import UserError
from model.config import GPTConfig
from model.decoder import Decoder
from model.generate import (
    Continuation,
    generate,
    generate_batch,
)
from model.gpt import GPT
from model.quantize import prepare
from model.sampling import Sampling, sample
from model.tokenizer import CharTokenizer

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5], [1, 2, 3], [*range(CONTEXT)], [7, 7, 7, 7, 7]]


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return small_model(tokenizer)


def ids(model: GPT, prompt=(1, 2, 3), **kwargs) -> list[int]:
    return list(generate(model, prompt, **{"tokens": 20, **kwargs}))


def by_definition(model: GPT, prompt, tokens: int, sampling: Sampling) -> tuple[list[int], list[list[int]]]:
    """What generate means, without a cache -> the ids, and what the model reads for each.

    The model reads the text from the beginning of its window. That is the first token of the text, until the window
    exceeds the context of N tokens: then it begins N // 2 tokens before the end of the text.
    """
    device = model.transformer.wte.weight.device
    uniforms = torch.from_numpy(np.random.default_rng(sampling.seed).random(tokens)).to(device)
    text, begin, windows = list(prompt), 0, []
    for n in range(tokens):
        if len(text) - begin > CONTEXT:
            begin = len(text) - CONTEXT // 2
        windows.append(text[begin:])
        with torch.no_grad():
            logits, _ = model(torch.tensor([windows[-1]], device=device))
        seen = torch.zeros_like(logits[:, -1], dtype=torch.bool)
        seen[0, text] = True
        text.append(int(sample(logits[:, -1], sampling, uniforms[n : n + 1], seen)))
    return text[len(prompt) :], windows


# --- which ids


def test_greedy_takes_the_most_likely_token(model):
    expected = [1, 2, 3]
    for _ in range(9):  # up to the context
        logits, _ = model(torch.tensor([expected]))
        expected.append(int(logits[0, -1].argmax()))
    assert ids(model, tokens=9, temperature=0) == expected[3:]
    assert len(set(expected[3:])) > 2


@pytest.mark.parametrize("prompt", PROMPTS[:3], ids=len)
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.0},
        {"temperature": 1.3, "top_k": 4},
        {"top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_ids_are_those_without_a_cache(model, settings, prompt, device):
    model = copy.deepcopy(model).to(device)
    expected, _ = by_definition(model, prompt, 23, Sampling(**settings, seed=4))  # the cache is full twice
    assert ids(model, prompt, tokens=23, seed=4, **settings) == expected


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"repetition_penalty": 1.3, "top_k": 9}], ids=str)
def test_text_does_not_depend_on_its_batch(model, settings, batch_size, device):
    """Prompts of different lengths, each twice, whose texts end at different times and outgrow the context."""
    model, sampling = copy.deepcopy(model).to(device), Sampling(**settings, seed=2)
    texts = [Continuation(prompt, sample) for prompt in PROMPTS for sample in (0, 1)]
    expected = [by_definition(model, text.prompt, 15, Sampling(**settings, seed=2 + text.sample))[0] for text in texts]
    stop_id = expected[2][4]
    ends = [new.index(stop_id) if stop_id in new else 15 for new in expected]
    assert len(set(ends)) > 1
    got = batch(model, texts, tokens=15, sampling=sampling, stop_id=stop_id, batch_size=batch_size)
    assert got == [new[:end] for new, end in zip(expected, ends, strict=True)]


@needs_triton
def test_kernels_draw_the_eager_ids(model, device):
    model = copy.deepcopy(model).to(device)
    drawn = []
    for backend in ("eager", "triton"):
        with use_backend(backend):
            texts = [Continuation([5, 1]), Continuation([*range(10)])]  # the second outgrows the context
            drawn.append(batch(model, texts, tokens=5, sampling=Sampling(top_k=9)))
    assert drawn[0] == drawn[1]


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.2}], ids=str)
def test_graph_draws_the_eager_ids(model, settings, device):
    model = prepare(copy.deepcopy(model).to(device))
    eager, graph = (
        batch(model, [Continuation(p) for p in PROMPTS], sampling=Sampling(**settings), batch_size=3, graph=graph)
        for graph in (False, True)
    )
    assert graph == eager


def test_greedy_needs_no_seed_and_top_1_is_greedy(model):
    greedy = ids(model, temperature=0, seed=1)
    assert greedy == ids(model, temperature=0, seed=2)
    assert greedy == ids(model, temperature=1.7, top_k=1, seed=3)


def test_seed_repeats_and_another_differs(model):
    first = ids(model, seed=1)
    torch.rand(7)  # the global generator has no part in it
    assert ids(model, seed=1) == first
    assert ids(model, seed=2) != first
    assert ids(model, seed=1 + 2**40) != first  # all of its bits count


def test_sampling_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    ids(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_of_random_numbers_do_not_show(model, monkeypatch):
    expected = ids(model, seed=5)
    assert ids(model, seed=5, tokens=7) == expected[:7]
    monkeypatch.setattr(decoder, "BLOCK", 3)
    assert ids(model, seed=5) == expected


# --- what the model reads


@pytest.fixture
def passes(model, monkeypatch) -> list[list[list[int]]]:
    """The ids of each pass of the model."""
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kwargs: seen.append(idx.tolist()) or forward(idx, **kwargs))
    return seen


def test_ids_are_drawn_only_on_request(model, passes):
    stream = generate(model, [1], tokens=5)
    assert not passes
    for i in range(1, 6):
        next(stream)
        assert len(passes) == i  # nothing is drawn ahead of what was asked for
    assert next(stream, None) is None and len(passes) == 5


def test_tokens_are_read_once_until_the_cache_is_full(model, passes):
    """Then half of the context is read anew."""
    _, windows = by_definition(model, [1, 2, 3], 23, GREEDY)
    passes.clear()
    ids(model, [1, 2, 3], tokens=23, temperature=0)
    begins = [n for n, window in enumerate(windows) if n == 0 or len(window) <= len(windows[n - 1])]
    assert begins == [0, 10, 17] and [len(windows[n]) for n in begins] == [3, 6, 6]
    assert passes == [[window if n in begins else window[-1:]] for n, window in enumerate(windows)]


def test_prompt_of_several_samples_is_read_once(model, passes):
    batch(model, [Continuation([1, 2, 3], sample) for sample in range(4)], tokens=3)
    assert passes[0] == [[1, 2, 3]] and [len(idx) for idx in passes[1:]] == [4, 4]


def test_next_text_takes_the_place_of_one_that_ended(model, passes):
    texts = [Continuation([i], i) for i in range(5)]
    steps = generate_batch(model, texts, tokens=6, sampling=Sampling(), batch_size=2)
    for step in steps:
        texts[0].done |= len(texts[0].ids) == 2
        assert len(step) <= 2
    assert [len(text.ids) for text in texts] == [2, 6, 6, 6, 6]
    # 26 ids, two at a time. A pass of width 1 reads a new prompt.
    assert [len(idx) for idx in passes].count(1) == 3 and passes[0] == [[0], [1]]


def test_finished_slot_outlives_the_context(model):
    """A text that ends early leaves its slot running, which becomes full before the other text ends."""
    texts = [Continuation([1] * 11), Continuation([2])]
    for _ in generate_batch(model, texts, tokens=30, sampling=GREEDY):
        texts[0].done = True
    assert len(texts[0].ids) == 1 and texts[1].ids == by_definition(model, [2], 30, GREEDY)[0]


def test_context_of_one_token(tokenizer):
    model = GPT(GPTConfig(9, 1, n_embd=8, n_layer=1, n_head=1, initializer_range=0.5)).eval()
    text = [3]
    with torch.no_grad():
        for _ in range(4):
            text.append(int(model(torch.tensor([text[-1:]]))[0][0, -1].argmax()))
    assert ids(model, [3], tokens=4, temperature=0) == text[1:]


# --- ends, log-probabilities


def test_ends_where_the_stop_id_is_drawn(model):
    free = ids(model, tokens=20, seed=1)
    stop = free[6]
    assert stop not in free[:6]
    assert ids(model, tokens=20, seed=1, stop_id=stop) == free[:6]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 3, "repetition_penalty": 2.0}], ids=str)
def test_logprobs_are_the_models_own(model, settings):
    """Not of the distribution that the ids were drawn from."""
    texts = [Continuation(prompt) for prompt in PROMPTS]
    batch(model, texts, tokens=6, sampling=Sampling(**settings), logprobs=True)
    for text in texts[:2]:  # those within the context
        with torch.no_grad():
            logits, _ = model(torch.tensor([[*text.prompt, *text.ids]]))
        expected = logits[0].log_softmax(-1)[len(text.prompt) - 1 : -1].gather(1, torch.tensor(text.ids)[:, None])
        torch.testing.assert_close(torch.tensor(text.logprobs), expected[:, 0], rtol=1e-4, atol=1e-5)


def test_logits_of_nan_are_an_error(model):
    broken = copy.deepcopy(model)
    broken.transformer.ln_f.weight.data.fill_(float("nan"))
    for temperature in (0.0, 1.0):
        with pytest.raises(UserError, match="logits are NaN"):
            ids(broken, temperature=temperature, repetition_penalty=1.1)


# --- the model is left as it was


@pytest.mark.parametrize("training", [True, False])
def test_eval_mode_during_and_the_old_mode_after(tokenizer, training):
    model = GPT(GPTConfig(tokenizer.n_vocab, CONTEXT, 16, 1, 2, resid_pdrop=0.5, attn_pdrop=0.5)).train(training)
    stream = generate(model, [1], tokens=3)
    assert model.training == training  # nothing has begun
    next(stream)
    assert not model.training and not model.transformer.h[0].training
    stream.close()
    assert model.training == training and model.transformer.h[0].training == training
    assert ids(model, seed=1) == ids(model, seed=1)  # with dropout on, the second would differ
    assert model.training == training


def test_error_restores_the_mode_too(model, monkeypatch):
    model.train()
    monkeypatch.setattr(decoder, "sample", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ids(model)
    assert model.training
    model.eval()


def test_no_gradients_and_no_mode_leaks_out(model):
    for _ in generate(model, [1], tokens=2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    decoder = Decoder(model, 1, sampling=GREEDY)
    decoder.prefill(torch.tensor([[1, 2]]))
    assert not decoder.draw().requires_grad and not decoder.logits.requires_grad


def test_step_of_full_slots_reads_the_token_alone(model):
    """By the path of a token, as a graph would record it, and not by that of a prompt."""
    S = 8
    decoder = Decoder(model, 2, S, sampling=GREEDY)
    decoder.prefill(torch.arange(2 * S).view(2, S) % model.config.vocab_size)
    drawn = decoder.draw().clone()
    decoder.step()
    with torch.inference_mode():
        alone = model(drawn[:, None], logits="last")[0][:, 0]
    torch.testing.assert_close(decoder.logits, alone.float())
    assert decoder.lengths == [1, 1] and decoder.cache.length > 1


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [1] * 13}, "the prompt has 13 tokens and the model's context is 12"),
        ({"prompt": [1, 99]}, "the prompt has ids from 1 to 99 and the model's are 0 to 28"),
        ({"prompt": [-1]}, "the prompt has ids from -1 to -1"),
    ],
)
def test_refuses_before_the_first_token(model, arguments, words):
    with pytest.raises(UserError, match=words):
        generate(model, **{"prompt": [1], "tokens": 5, **arguments})


def test_batch_of_no_texts_or_no_slots(model):
    assert list(generate_batch(model, [], tokens=3, sampling=GREEDY)) == []
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        generate_batch(model, [Continuation([1])], tokens=3, sampling=GREEDY, batch_size=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prepared_model_computes_the_same(dtype):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT(config, dtype).eval()
    idx = torch.randint(50, (2, 12))
    with torch.no_grad():
        before = model(idx)[0]
        assert prepare(model) is model
        after = model(idx)[0]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]  # the tables of 16 bits are rounded before their sum
    torch.testing.assert_close(after, before, rtol=0, atol=rounding * float(before.abs().max()))
    wte, block = model.transformer.wte.weight, model.transformer.h[0]
    assert wte.dtype == block.mlp.c_fc.weight.dtype == dtype and block.ln_1.weight.dtype == torch.float32
    # by columns where a product with one row gains by it, by rows elsewhere
    assert wte.stride() == (1, 50) and block.mlp.c_fc.weight.stride() == (1, 64)
    assert block.mlp.c_proj.weight.stride() == (64, 1) and model.transformer.wpe.weight.stride() == (16, 1)
