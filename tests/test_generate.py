"""Sampling, streaming and `python -m model.generate`."""

from __future__ import annotations

import copy
import io
import itertools
import re
import runpy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import use_backend
from kernels._triton import HAS_TRITON
from model import checkpoint
from model import generate as generate_module
from model.cli import UserError, run
from model.config import GPTConfig
from model.generate import GenerateConfig, generate, main, next_logits, prepare_for_decoding, sample, stream_text
from model.gpt import GPT
from model.kv_cache import KVCache
from model.tokenizer import CharTokenizer, GPT2Tokenizer

CONTEXT = 12
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
TEXT = "CHAPTER I. Down the rabbit-hole, and after a while out again."


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return CharTokenizer(TEXT)


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    """Weights large enough that the distribution is far from uniform and depends on every token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.n_vocab, CONTEXT, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3))
    return model.eval()


def ids(model: GPT, prompt=(1, 2, 3), **kwargs) -> list[int]:
    return list(generate(model, prompt, **{"tokens": 20, **kwargs}))


def without_a_cache(model: GPT, prompt, tokens: int, seed: int, **kwargs) -> list[int]:
    """What generate means: for each token the model reads all of the text that fits its context."""
    device = model.transformer.wte.weight.device
    text, generator = list(prompt), torch.Generator(device).manual_seed(seed)
    for _ in range(tokens):
        logits, _ = model(torch.tensor([text[-CONTEXT:]], device=device))
        text.append(sample(logits[0, -1].detach(), generator=generator, **kwargs))
    return text[len(prompt) :]


# --- which ids


def test_greedy_takes_the_most_likely_token_each_time(model):
    expected = [1, 2, 3]
    for _ in range(9):  # up to the context
        logits, _ = model(torch.tensor([expected]))
        expected.append(int(logits[0, -1].argmax()))
    assert ids(model, tokens=9, temperature=0) == expected[3:]
    assert len(set(expected[3:])) > 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("prompt", [[5], [1, 2, 3], list(range(CONTEXT))], ids=len)
@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0}, {"temperature": 1.3}, {"temperature": 1.0, "top_k": 4}], ids=str
)
def test_ids_are_those_without_a_cache(model, kwargs, prompt, backend, device):
    model = copy.deepcopy(model).to(device)
    tokens = CONTEXT - len(prompt) + 3  # the cache exactly full, then outgrown
    expected = without_a_cache(model, prompt, tokens, seed=4, **kwargs)
    with use_backend(backend):
        assert ids(model, prompt, tokens=tokens, seed=4, **kwargs) == expected


def test_logits_are_those_without_a_cache(model):
    text = list(range(1, CONTEXT + 4))
    cache = KVCache(model.config, 1, dtype=model.dtype)
    for n in range(3, len(text) + 1):
        expected, _ = model(torch.tensor([text[:n][-CONTEXT:]]))
        got = next_logits(model, text[:n], cache)
        assert got.shape == (model.config.vocab_size,) and got.dtype == torch.float32
        torch.testing.assert_close(got, expected[0, -1].detach(), rtol=0, atol=1e-5)
    assert cache.length == CONTEXT


def test_greedy_needs_no_seed_and_top_1_is_greedy(model):
    greedy = ids(model, temperature=0, seed=1)
    assert greedy == ids(model, temperature=0, seed=2)
    assert greedy == ids(model, temperature=1.7, top_k=1, seed=3)


def test_a_seed_repeats_and_another_differs(model):
    first = ids(model, seed=1)
    torch.rand(7)  # the global generator has no part in it
    assert ids(model, seed=1) == first
    assert ids(model, seed=2) != first


def test_sampling_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    ids(model)
    assert torch.equal(torch.get_rng_state(), before)


def frequencies(logits: torch.Tensor, draws: int = 4000, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = [sample(logits, generator=generator, **kwargs) for _ in range(draws)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_divides_the_logits(temperature):
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0])
    expected = (logits / temperature).softmax(0)
    # 4,000 draws: one standard deviation of a frequency is below 0.008.
    torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, atol=0.03, rtol=0)


def test_top_k_keeps_the_k_largest_in_their_proportions():
    logits = torch.tensor([0.3, -1.0, 1.2, 0.0])
    expected = torch.tensor([0.3, -torch.inf, 1.2, -torch.inf]).softmax(0)
    frequency = frequencies(logits, temperature=1.0, top_k=2)
    assert frequency[1] == frequency[3] == 0
    torch.testing.assert_close(frequency, expected, atol=0.03, rtol=0)
    for k in (4, 5, 1000):  # as many as there are, or more
        torch.testing.assert_close(frequencies(logits, temperature=1.0, top_k=k), logits.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9])
def test_a_temperature_next_to_zero_is_greedy(temperature):
    logits = torch.tensor([88.0, -1e4, 89.0, 3.0])
    assert frequencies(logits, draws=20, temperature=temperature)[2] == 1


# --- length, context, end of text


def test_ids_are_drawn_only_on_request(model, monkeypatch):
    calls = []
    monkeypatch.setattr(generate_module, "next_logits", lambda *args: calls.append(1) or next_logits(*args))
    stream = generate(model, [1], tokens=5)
    assert not calls
    for i in range(1, 6):
        next(stream)
        assert len(calls) == i  # nothing is drawn ahead of what was asked for
    assert next(stream, None) is None


def test_each_token_is_read_once_within_the_context(model, monkeypatch):
    """Then the window slides, every token of it has another position, and all are read again each time."""
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda idx, **kwargs: seen.append(idx[0].tolist()) or forward(idx, **kwargs))
    prompt = [1, 2, 3]
    new = ids(model, prompt, tokens=20, seed=4)
    text = prompt + new
    assert len(new) == 20
    once = [prompt, *([text[n - 1]] for n in range(4, CONTEXT + 1))]
    assert seen == once + [text[n - CONTEXT : n] for n in range(CONTEXT + 1, 23)]


def test_a_prompt_may_fill_the_context(model):
    assert len(ids(model, range(CONTEXT), tokens=2)) == 2


def test_ends_where_the_stop_id_is_drawn(model):
    free = ids(model, tokens=20, seed=1)
    stop = free[6]
    assert stop not in free[:6]
    assert ids(model, tokens=20, seed=1, stop_id=stop) == free[:6]


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


def test_an_error_in_the_middle_restores_the_mode_too(model, monkeypatch):
    model.train()
    monkeypatch.setattr(generate_module, "sample", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ids(model)
    assert model.training
    model.eval()


def test_no_gradients_and_no_mode_leaks_out(model):
    cache = KVCache(model.config, 1, dtype=model.dtype)
    assert next_logits(model, [1, 2], cache).is_inference()
    assert next_logits(model, [1, 2, 3], cache).is_inference()
    for _ in generate(model, [1], tokens=2):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": 0}, "tokens must be at least 1, got 0"),
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 .* got nan"),
        ({"temperature": float("inf")}, "temperature must be 0 .* got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**64}, "seed must lie in"),
        ({"prompt": []}, "the prompt has no tokens"),
        ({"prompt": [1] * 13}, "the prompt has 13 tokens and the model's context is 12"),
    ],
)
def test_refuses_before_the_first_token(model, arguments, words):
    with pytest.raises(UserError, match=words):
        generate(model, **{"prompt": [1], "tokens": 5, **arguments})


# --- streaming


class Bytes:
    """A tokenizer whose ids are bytes: every cut is possible."""

    def decode_bytes(self, ids) -> bytes:
        return bytes(ids)


@given(st.text())
def test_no_piece_breaks_a_character(text):
    pieces = list(stream_text(text.encode(), Bytes()))
    assert pieces == list(text)  # one piece per character, each when its last byte came


@given(st.lists(st.integers(0, 255)))
def test_bytes_that_are_not_utf8_stream_as_they_decode(ids):
    assert "".join(stream_text(ids, Bytes())) == bytes(ids).decode("utf-8", errors="replace")


def test_gpt2_tokens_that_end_inside_a_character():
    tokenizer = GPT2Tokenizer()
    text = "naïve 🦊🦊 日本語 — “quoted”"
    ids = tokenizer.encode(text)
    assert any("\ufffd" in tokenizer.decode([i]) for i in ids)  # there are such tokens
    pieces = list(stream_text(ids, tokenizer))
    assert "".join(pieces) == text and len(pieces) > 5


def test_a_character_that_stays_unfinished():
    assert list(stream_text([*b"a", *"🦊".encode()[:2]], Bytes())) == ["a", "\ufffd"]


def test_text_comes_as_early_as_it_is_complete():
    drawn = []
    fox = "🦊".encode()
    stream = stream_text((drawn.append(b) or b for b in (*b"a", *fox, *b"b")), Bytes())
    assert [(next(stream), len(drawn)) for _ in range(3)] == [("a", 1), ("🦊", 5), ("b", 6)]


# --- python -m model.generate


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("run")
    parts = {"model": dict(model.named_parameters())}
    checkpoint.save(folder, 1, parts, config={}, model=model.config, best_val_loss=None, elapsed_s=0.0)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture
def cli(capsys):
    """Runs the command; returns exit code, stdout, stderr."""

    def call(*argv) -> tuple[int, str, str]:
        try:
            run(main, GenerateConfig, prog="python -m model.generate", argv=[str(arg) for arg in argv])
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


def test_command_continues_the_prompt(cli, run_folder, model, tokenizer):
    code, out, err = cli(
        run_folder, "--prompt", "Down ", "--tokens", 20, "--temperature", 0.7, "--top-k", 5, "--seed", 3
    )
    new = generate(
        model, tokenizer.encode("Down "), tokens=20, temperature=0.7, top_k=5, seed=3, stop_id=tokenizer.eot_id
    )
    assert (code, err) == (0, "")
    assert out == "Down " + tokenizer.decode(new) + "\n"


def test_command_greedy_equals_temperature_zero(cli, run_folder):
    greedy = cli(run_folder, "--prompt", "and", "--tokens", 15, "--greedy", "--seed", 1)
    assert greedy == cli(run_folder, "--prompt", "and", "--tokens", 15, "--temperature", 0, "--seed", 2)
    assert greedy != cli(run_folder, "--prompt", "and", "--tokens", 15, "--temperature", 2, "--seed", 2)


def test_command_without_prompt_starts_from_eot(cli, run_folder, model, tokenizer):
    code, out, _ = cli(run_folder, "--tokens", 8, "--greedy", "--no-stop", "--checkpoint", "last", "--device", "cpu")
    assert code == 0
    assert out == tokenizer.decode(generate(model, [tokenizer.eot_id], tokens=8, temperature=0)) + "\n"


def test_command_stops_at_eot_by_default(cli, run_folder, monkeypatch, tokenizer):
    script = [*tokenizer.encode("out"), tokenizer.eot_id, *tokenizer.encode("line")]
    drawn = itertools.cycle(script)
    monkeypatch.setattr(generate_module, "sample", lambda *args, **kwargs: next(drawn))
    assert cli(run_folder, "--prompt", "a ", "--tokens", len(script))[1] == "a out\n"
    drawn = itertools.cycle(script)
    assert cli(run_folder, "--prompt", "a ", "--tokens", len(script), "--no-stop")[1] == "a outline\n"


class Pipe(io.StringIO):
    """A stdout whose reader sees what has been flushed."""

    seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


def test_command_writes_each_piece_as_it_is_drawn(run_folder, monkeypatch):
    pipe, seen = Pipe(), []
    monkeypatch.setattr(sys, "stdout", pipe)

    def watched(*args, **kwargs):
        seen.append(pipe.seen)  # what the reader had when the next token was drawn
        return sample(*args, **kwargs)

    monkeypatch.setattr(generate_module, "sample", watched)
    main(GenerateConfig(run_folder, prompt="Down", tokens=4, stop=False, device="cpu"))
    assert [len(text) for text in seen] == [4, 5, 6, 7] and pipe.getvalue().startswith(seen[-1])


def test_interrupt_ends_the_line_and_nothing_else(cli, run_folder, monkeypatch, tokenizer):
    drawn = iter(tokenizer.encode("out"))

    def interrupted(*args, **kwargs):
        try:
            return next(drawn)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(generate_module, "sample", interrupted)
    code, out, err = cli(run_folder, "--prompt", "do ")
    assert (code, out) == (130, "do out\n")
    assert len(err.splitlines()) == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "Down the rabbit-hole"], "20 tokens .* context is 12"),
        (["--prompt", "Zebra"], "'Z'"),
        (["--tokens", "0"], "tokens must be at least 1"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--top-k", "0"], "top_k must be at least 1"),
        (["--checkpoint", "step-7"], "no checkpoint 'step-7'"),
        (["--temperature", "warm"], "warm"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_command_refuses_bad_input(cli, run_folder, arguments, words):
    code, out, err = cli(run_folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) <= 2 and re.search(words, err)


def test_command_takes_the_old_option_name(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", str(run_folder), "--which=step-9"])
    monkeypatch.delitem(sys.modules, "model.generate")
    with pytest.raises(SystemExit):
        runpy.run_module("model.generate", run_name="__main__", alter_sys=True)
    assert "has no checkpoint 'step-9'" in capsys.readouterr().err


def test_command_refuses_a_folder_without_a_run(cli, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        code, out, err = cli(folder)
        assert (code, out) == (2, "")
        assert str(folder) in err and len(err.splitlines()) <= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_command_refuses_a_gpu_that_is_not_there(cli, run_folder):
    code, _, err = cli(run_folder, "--device", "cuda")
    assert code == 2 and "--device cpu" in err


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_prepared_for_decoding_computes_the_same(dtype):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    model = GPT(config, dtype).eval()
    idx = torch.randint(50, (2, 12))
    with torch.no_grad():
        before = model(idx)[0]
        assert prepare_for_decoding(model) is model
        after = model(idx)[0]
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-6}[dtype]  # the tables of 16 bits are rounded before their sum
    torch.testing.assert_close(after, before, rtol=0, atol=rounding * float(before.abs().max()))
    wte, block = model.transformer.wte.weight, model.transformer.h[0]
    assert wte.dtype == block.mlp.c_fc.weight.dtype == dtype and block.ln_1.weight.dtype == torch.float32
    # by columns where a product with one row gains by it, by rows elsewhere
    assert wte.stride() == (1, 50) and block.mlp.c_fc.weight.stride() == (1, 64)
    assert block.mlp.c_proj.weight.stride() == (64, 1) and model.transformer.wpe.weight.stride() == (16, 1)
