"""`python -m model.generate`: prompts, samples, stop texts, the interactive mode, and what is refused."""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import runpy
import sys

import pytest
import torch
from commands import exit_code
from small_model import batch, small_model, small_tokenizer

from model import checkpoint, decoder
from model import generate as generate_module
from model.generate import (
    ALIASES,
    Continuation,
    GenerateConfig,
    generate,
    main,
)
from model.gpt import GPT
from model.sampling import Sampling, sample
from model.tokenizer import CharTokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CharTokenizer:
    return small_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer) -> GPT:
    return small_model(tokenizer)


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
        return exit_code(main, GenerateConfig, folder, *argv, aliases=ALIASES), *capsys.readouterr()

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
        (["--prompt", "a", "--prompt-file", "{}/good"], "--prompt and --prompt-file cannot be combined"),
        (["--prompts", "{}/good", "--interactive"], "--prompts and --interactive cannot be combined"),
        (["--interactive", "--samples", "2"], "omit --samples"),
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
