"""Which ids are drawn, texts and their ends, and `python -m model.generate`."""

from __future__ import annotations

import copy
import io
import itertools
import math
import os
import re
import runpy
import sys

import numpy as np
import pytest
import torch

from kernels import use_backend
from kernels._triton import HAS_TRITON
from model import checkpoint, decoder
from model import generate as generate_module
from model.cli import UserError, run
from model.config import GPTConfig
from model.decoder import Decoder
from model.generate import (
    ALIASES,
    Continuation,
    GenerateConfig,
    generate,
    generate_batch,
    main,
)
from model.gpt import GPT
from model.quantize import prepare
from model.sampling import Sampling, sample
from model.tokenizer import CharTokenizer

CONTEXT = 12
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
TEXT = "CHAPTER I. Down the rabbit-hole, and after a while out again."
GREEDY = Sampling(temperature=0.0)
PROMPTS = [[5], [1, 2, 3], [*range(CONTEXT)], [7, 7, 7, 7, 7]]


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


def batch(model: GPT, texts: list[Continuation], **kwargs) -> list[list[int]]:
    for _ in generate_batch(model, texts, **{"tokens": 20, "sampling": Sampling(), **kwargs}):
        pass
    assert all(text.done for text in texts)
    return [text.ids for text in texts]


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


# --- python -m model.generate


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("run")
    parts = {"model": dict(model.named_parameters())}
    checkpoint.save(folder, 1, parts, config={}, model=model.config, best_val_loss=None, elapsed_s=0.0)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture
def cli(capsys, run_folder):
    """Runs the command; returns exit code, stdout, stderr."""

    def call(*argv, folder=run_folder) -> tuple[int, str, str]:
        try:
            argv = [str(arg) for arg in (folder, *argv)]
            run(main, GenerateConfig, prog="python -m model.generate", argv=argv, aliases=ALIASES)
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def script(monkeypatch):
    """Ids to be drawn in place of the model's, one for each text a step, over and over."""

    def set_script(ids) -> itertools.count:
        """-> a counter of the steps."""
        drawn, steps = itertools.cycle(ids), itertools.count()

        def draw(logits, *_):
            next(steps)
            return torch.full((len(logits),), next(drawn))

        monkeypatch.setattr(decoder, "sample", draw)
        return steps

    return set_script


def text(model, tokenizer, prompt: str, **kwargs) -> str:
    """Prompt and continuation, to the end-of-text token."""
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    settings = {"tokens": 20, "temperature": 0.8, "top_k": 40, "seed": 1, "stop_id": tokenizer.eot_id}
    return prompt + tokenizer.decode(generate(model, ids, **{**settings, **kwargs}))


def test_command_continues_the_prompt(cli, model, tokenizer):
    settings = {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "seed": 3}
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    code, out, err = cli("--prompt", "Down ", "--tokens", 20, *options)
    assert (code, err) == (0, "")
    assert out == text(model, tokenizer, "Down ", **settings) + "\n"


def test_command_greedy_equals_temperature_zero(cli):
    greedy = cli("--prompt", "and", "--tokens", 15, "--greedy", "--seed", 1)
    assert greedy == cli("--prompt", "and", "--tokens", 15, "--temperature", 0, "--seed", 2)
    assert greedy != cli("--prompt", "and", "--tokens", 15, "--temperature", 2, "--seed", 2)


@pytest.mark.parametrize("option", ["--ignore-end", "--no-stop"])
def test_command_without_prompt_starts_from_eot(cli, model, tokenizer, option):
    code, out, _ = cli("--tokens", 8, "--greedy", option, "--checkpoint", "last", "--device", "cpu")
    assert code == 0
    assert out == text(model, tokenizer, "", tokens=8, temperature=0, stop_id=None) + "\n"


def test_command_stops_at_eot_by_default(cli, script, tokenizer):
    ids = [*tokenizer.encode("out"), tokenizer.eot_id, *tokenizer.encode("line")]
    script(ids)
    assert cli("--prompt", "a ", "--tokens", len(ids))[1] == "a out\n"
    script(ids)
    assert cli("--prompt", "a ", "--tokens", len(ids), "--ignore-end")[1] == "a outline\n"


def test_command_stops_before_a_text(cli, script, tokenizer):
    steps = script(tokenizer.encode("out again. "))
    options = ["--prompt", "a ", "--tokens", 30]
    assert cli(*options, "--stop", "again", "--stop", "xyz")[1] == "a out \n"
    assert next(steps) == len("out again")  # and nothing is drawn after it
    script(tokenizer.encode("out again. "))
    assert cli(*options, "--stop=n. o")[1] == "a out agai\n"


def test_command_reads_the_prompt_from_a_file(cli, model, tokenizer, tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xef\xbb\xbfDown \r\n")  # as an editor on Windows saves it
    assert cli("--prompt-file", file, "--tokens", 20)[1] == text(model, tokenizer, "Down ") + "\n"


def test_command_writes_samples_one_after_the_other(cli, model, tokenizer):
    out = cli("--prompt", "Down ", "--samples", 3, "--tokens", 20, "--batch-size", 2)[1]
    pages = [
        f"--- sample {i + 1} of 3, seed {1 + i}\n{text(model, tokenizer, 'Down ', seed=1 + i)}\n" for i in range(3)
    ]
    assert out == "\n".join(pages) and len({page[-20:] for page in pages}) == 3


def test_command_continues_each_line_of_a_file(cli, model, tokenizer, tmp_path):
    (tmp_path / "prompts.txt").write_text("Down\n\na while out\nand ")
    prompts = ["Down", "a while out", "and "]
    out = cli("--prompts", tmp_path / "prompts.txt", "--tokens", 20, "--batch-size", 2)[1]
    pages = [f"--- prompt {i + 1} of 3\n{text(model, tokenizer, p)}\n" for i, p in enumerate(prompts)]
    assert out == "\n".join(pages)
    out = cli("--prompts", tmp_path / "prompts.txt", "--samples", 2, "--tokens", 20)[1]
    heads = [line for line in out.splitlines() if line.startswith("---")]
    assert heads[1] == "--- prompt 1 of 3, sample 2 of 2, seed 2" and len(heads) == 6


def test_command_lists_log_probabilities(cli, model, tokenizer):
    out = cli("--prompt", "Down ", "--tokens", 5, "--logprobs", "--seed", 2)[1]
    shown, _, table = out.partition("\n\n")
    (continuation,) = texts = [Continuation(tokenizer.encode("Down "))]
    batch(model, texts, tokens=5, sampling=Sampling(0.8, 40, seed=2), logprobs=True)
    assert shown == "Down " + tokenizer.decode(continuation.ids)
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    assert [(int(token), eval(piece)) for _, token, piece in rows[:5]] == [
        (i, tokenizer.decode([i])) for i in continuation.ids
    ]
    assert [float(row[0]) for row in rows[:5]] == pytest.approx(continuation.logprobs, abs=1e-3)
    assert float(rows[5][0]) == pytest.approx(math.fsum(continuation.logprobs), abs=1e-3)
    assert table.splitlines()[5].split(maxsplit=1)[1].startswith("in 5 tokens, ")


def test_part_of_a_character_is_listed_as_bytes():
    assert generate_module._shown("é".encode()) == "'é'" and generate_module._shown(b"\xc3") == "b'\\xc3'"


class Pipe(io.StringIO):
    """A stdout whose reader sees what has been flushed."""

    seen = ""

    def flush(self) -> None:
        self.seen = self.getvalue()


def test_command_writes_each_piece_as_it_is_drawn(run_folder, monkeypatch):
    pipe, seen = Pipe(), []
    monkeypatch.setattr(sys, "stdout", pipe)

    def watched(*args):
        seen.append(pipe.seen)  # what the reader had when the next token was drawn
        return sample(*args)

    monkeypatch.setattr(decoder, "sample", watched)
    main(GenerateConfig(run_folder, prompt="Down", tokens=4, ignore_end=True, device="cpu"))
    assert [len(text) for text in seen] == [4, 5, 6, 7] and pipe.getvalue().startswith(seen[-1])


def interrupted_after(monkeypatch, ids):
    drawn = iter(ids)

    def draw(logits, *_):
        try:
            return torch.full((len(logits),), next(drawn))
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(decoder, "sample", draw)


def test_interrupt_ends_the_line_and_nothing_else(cli, monkeypatch, tokenizer):
    interrupted_after(monkeypatch, tokenizer.encode("out"))
    code, out, err = cli("--prompt", "do ")
    assert (code, out) == (130, "do out\n")
    assert len(err.splitlines()) == 1 and "Traceback" not in err


# --- interactive


class Typed(io.StringIO):
    """A standard input, of a terminal or not."""

    def __init__(self, lines: str, is_terminal: bool = False) -> None:
        super().__init__(lines)
        self.isatty = lambda: is_terminal


@pytest.fixture
def interact(cli, monkeypatch):
    """Runs the command with these answers to the prompts; an exception among them is raised."""

    def call(answers, *argv):
        given, asked = iter(answers), []

        def answer(question):
            asked.append(question)
            if isinstance(line := next(given), str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", answer)
        monkeypatch.setattr(sys, "stdin", Typed("", is_terminal=True))
        return *cli("--interactive", "--tokens", 20, *argv), asked

    return call


def test_interactive_continues_each_line(interact, model, tokenizer):
    code, out, err, asked = interact(["Down", "Down", EOFError()])
    pages = [text(model, tokenizer, "Down", seed=seed) for seed in (1, 2)]
    assert (code, err) == (0, "") and pages[0] != pages[1]
    assert out == "\n".join(["Ctrl-C stops a text, Ctrl-D or an empty line ends", *pages, "", ""])
    assert asked == ["> "] * 3


def test_interrupt_stops_the_text_and_not_the_session(interact, monkeypatch, tokenizer):
    interrupted_after(monkeypatch, tokenizer.encode("out"))
    code, out, err, asked = interact(["do ", KeyboardInterrupt(), "a", ""])
    assert (code, err) == (0, "") and len(asked) == 4
    assert out.splitlines()[1:] == ["do out", "", "a"]


def test_interactive_reports_a_bad_line(interact):
    code, out, err, _ = interact(["Zebra", "Down the rabbit-hole", "and", ""])
    assert code == 0 and out.splitlines()[1].startswith("and")
    assert "'Z'" in err and "20 tokens and the model's context is 12" in err and "Traceback" not in err


def test_interactive_reads_lines_from_a_pipe(cli, model, tokenizer, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Typed("Down\nand\n"))
    code, out, err = cli("--interactive", "--tokens", 20)
    assert (code, err) == (0, "")
    assert out == text(model, tokenizer, "Down", seed=1) + "\n" + text(model, tokenizer, "and", seed=2) + "\n"


def test_interactive_refuses_other_encodings(interact):
    code, _, err, _ = interact([UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")])
    assert code == 2 and err.startswith("error: standard input is not UTF-8") and len(err.splitlines()) == 1


# --- bad input


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, content in {
        "empty": b"", "blank": b"\n \n\n", "latin1": b"caf\xe9", "nul": b"a\0b", "good": b"Down\nand",
        "long": b"Down\nDown the rabbit-hole\n", "zebra": b"Down\n\nZebra\n",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "Down the rabbit-hole"], "20 tokens .* context is 12"),
        (["--prompt", "Zebra"], "'Z'"),
        (["--tokens", "0"], "tokens must be at least 1, got 0"),
        (["--tokens", "-5"], "tokens must be at least 1, got -5"),
        (["--tokens", "many"], "many"),
        (["--temperature", "-1"], "temperature must be 0"),
        (["--temperature", "nan"], "temperature must be 0"),
        (["--temperature", "warm"], "warm"),
        (["--top-k", "0"], "top_k must be at least 1"),
        (["--top-p", "0"], "top_p must be above 0 and at most 1, got 0"),
        (["--top-p", "2"], "top_p must be above 0 and at most 1, got 2"),
        (["--min-p", "-0.1"], "min_p must lie in"),
        (["--min-p", "1.5"], "min_p must lie in"),
        (["--repetition-penalty", "0"], "repetition_penalty must be a number above 0"),
        (["--repetition-penalty", "inf"], "repetition_penalty must be a number above 0"),
        (["--seed", "-1"], "seed must lie in"),
        (["--stop", ""], "a stop string must not be empty"),
        (["--stop"], "stop"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--checkpoint", "step-7"], "no checkpoint 'step-7'"),
        (["--device", "tpu"], "tpu"),
        (["--prompt-file", "{}/missing"], "no such file or folder: .*missing"),
        (["--prompt-file", "{}/empty"], "no prompt in .*empty: the file is empty"),
        (["--prompt-file", "{}/latin1"], "latin1 is not UTF-8: byte 0xe9 at offset 3"),
        (["--prompt-file", "{}/nul"], "nul is not a text file"),
        (["--prompt-file", "{}"], "directory"),
        (["--prompts", "{}/blank"], "no prompt in .*blank: the file is empty"),
        (["--prompts", "{}/long"], "prompt 2: the prompt has 20 tokens"),
        (["--prompts", "{}/zebra"], "prompt 2: .*'Z'"),
        (["--prompt", "a", "--prompt-file", "{}/good"], "--prompt and --prompt-file exclude each other"),
        (["--prompts", "{}/good", "--interactive"], "--prompts and --interactive exclude each other"),
        (["--interactive", "--samples", "2"], "leave out --samples"),
        (["--interactive", "--top-p", "2"], "top_p must be above 0"),
    ],
)
def test_command_refuses_bad_input(cli, files, arguments, words):
    code, out, err = cli(*(argument.format(files) for argument in arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and len(err.splitlines()) <= 2 and re.search(words, err)


def test_command_takes_the_old_option_name(run_folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", str(run_folder), "--which=step-9", "--no-stop"])
    monkeypatch.delitem(sys.modules, "model.generate")
    with pytest.raises(SystemExit):
        runpy.run_module("model.generate", run_name="__main__", alter_sys=True)
    assert "has no checkpoint 'step-9'" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["bfloat16", "float16", "int8"])
def test_command_takes_low_precision_weights(cli, weights, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    os.environ.pop("ONEDNN_MAX_CPU_ISA", None)
    code, out, err = cli("--prompt", "Down ", "--tokens", 5, "--greedy", "--weights", weights)
    assert (code, err) == (0, "") and out.startswith("Down ")
    assert ("ONEDNN_MAX_CPU_ISA" in os.environ) == (weights == "int8")


def test_command_refuses_a_folder_without_a_run(cli, tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        code, out, err = cli(folder=folder)
        assert (code, out) == (2, "")
        assert str(folder) in err and len(err.splitlines()) <= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_command_refuses_a_gpu_that_is_not_there(cli):
    code, _, err = cli("--device", "cuda")
    assert code == 2 and "--device cpu" in err


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
