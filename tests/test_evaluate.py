"""Loss over a text, and what is derived from it."""

from __future__ import annotations

import math
import runpy
import sys

import numpy as np
import pytest
import torch

from model import checkpoint, data
from model.cli import UserError, run
from model.config import GPTConfig
from model.evaluate import EvaluateConfig, bits_per_byte, evaluate, main, perplexity
from model.gpt import GPT

V, T = 7, 8
TOKENS = np.random.default_rng(0).integers(0, V, 101).astype(np.uint16)


@pytest.fixture
def model() -> GPT:
    return GPT(GPTConfig(vocab_size=V, n_positions=T, n_embd=8, n_layer=1, n_head=2, embd_pdrop=0.5))


def by_hand(model: GPT, tokens: np.ndarray) -> list[float]:
    """-log p of each token after the first, one window at a time."""
    losses = []
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, T):
            window = torch.from_numpy(tokens[start : start + T + 1].astype(np.int64))
            log_p = model.eval()(window[None, :-1])[0][0].double().log_softmax(-1)
            losses += [-log_p[i, target].item() for i, target in enumerate(window[1:])]
    return losses


@pytest.mark.parametrize("n", [2, 8, 9, 10, 33, 101], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_loss_is_the_mean_over_all_targets(model, n, batch_size):
    losses = by_hand(model, TOKENS[:n])
    assert len(losses) == n - 1
    loss = evaluate(model, TOKENS[:n], context=T, batch_size=batch_size)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_max_windows_are_few_spread_and_always_the_same(model, monkeypatch):
    seen = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, idx, targets: seen.append(idx) or forward(self, idx, targets))
    first = evaluate(model, TOKENS, context=T, batch_size=2, max_windows=5)
    assert [len(idx) for idx in seen] == [2, 2, 1]
    assert first == pytest.approx(evaluate(model, TOKENS, context=T, batch_size=4, max_windows=5), rel=1e-6)
    everything = torch.cat([idx for idx, _ in data.windows(TOKENS, T, 100)])
    n = len(everything)
    spread = everything[[i * n // 5 for i in range(5)]]
    assert n > 12 and torch.equal(torch.cat(seen[:3]), spread) and torch.equal(torch.cat(seen[3:]), spread)
    seen.clear()
    assert evaluate(model, TOKENS, context=T, batch_size=2, max_windows=1000) != first
    assert sum(map(len, seen)) == n


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_random_state_are_as_before(model, training, monkeypatch):
    model.train(training)
    before = torch.get_rng_state()
    assert evaluate(model, TOKENS, context=T, batch_size=4) == evaluate(model, TOKENS, context=T, batch_size=4)
    assert model.training is training
    assert torch.equal(before, torch.get_rng_state())

    def broken(*args):
        raise ZeroDivisionError

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, TOKENS, context=T, batch_size=4)
    assert model.training is training


def test_nothing_is_kept_for_a_backward_pass(model, monkeypatch):
    seen = []
    forward = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda *args: seen.append(torch.is_grad_enabled()) or forward(*args))
    evaluate(model, TOKENS, context=T, batch_size=100)
    assert seen == [False]


def test_too_short_a_text_is_refused(model):
    with pytest.raises(UserError, match="at least 2"):
        evaluate(model, TOKENS[:1], context=T, batch_size=1)


def test_a_model_that_knows_nothing(model):
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loss = evaluate(model, TOKENS, context=T, batch_size=4)
    assert loss == pytest.approx(math.log(V))
    assert perplexity(loss) == pytest.approx(V)
    assert bits_per_byte(loss, len(TOKENS), len(TOKENS)) == pytest.approx(math.log2(V))  # one byte per token
    assert bits_per_byte(loss, 100, 400) == pytest.approx(math.log2(V) / 4)


def test_perplexity_of_a_hopeless_model_is_infinite():
    assert perplexity(1e6) == math.inf


@pytest.fixture
def folder(tmp_path):
    """A run of one step."""
    text = tmp_path / "book.txt"
    text.write_text("the cat sat on the mat, the cat ate. " * 20)
    tokens = data.prepare(text, tmp_path / "run/data", "char")
    tokens.tokenizer.save(tmp_path / "run/tokenizer")
    model = GPT(GPTConfig(vocab_size=tokens.tokenizer.n_vocab, n_positions=T, n_embd=8, n_layer=1, n_head=2))
    parts = {"model": dict(model.named_parameters())}
    checkpoint.save(tmp_path / "run", 1, parts, config={}, model=model.config, best_val_loss=None, elapsed_s=1.0)
    return tmp_path / "run"


def call(*argv) -> int:
    try:
        run(main, EvaluateConfig, prog="python -m model.evaluate", argv=[*map(str, argv), "--device", "cpu"])
    except SystemExit as exit_:
        return exit_.code
    return 0


def test_command_measures_the_validation_text(folder, capsys):
    assert call(folder) == 0
    model, _ = checkpoint.load_model(folder)
    loss = evaluate(model, data.load(folder / "data").val, context=T, batch_size=1)
    size, result = capsys.readouterr().out.splitlines()
    assert size == "74 tokens, 74 bytes"
    bits = loss / math.log(2)
    assert result == f"validation loss {loss:.4f} | perplexity {math.exp(loss):.2f} | {bits:.3f} bits per byte"


def test_command_measures_another_text(folder, tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("the mat ate the cat.")
    assert call(folder, "--data", other, "--checkpoint", "last", "--batch-size", 3) == 0
    size, result = capsys.readouterr().out.splitlines()
    assert size == "20 tokens, 20 bytes"
    model, tokenizer = checkpoint.load_model(folder)
    loss = evaluate(model, np.array(tokenizer.encode(other.read_text())), context=T, batch_size=1)
    assert result.startswith(f"{other} loss {loss:.4f} | ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "missing"),
        (["nowhere"], "has no checkpoint"),
        (["RUN", "--checkpoint", "step-9"], "has no checkpoint 'step-9'"),
        (["RUN", "--data", "missing.txt"], "missing.txt"),
        (["RUN", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["RUN", "--max-windows", "0"], "--max-windows must be at least 1"),
    ],
)
def test_command_refuses_bad_input(folder, argv, words, capsys):
    assert call(*(folder if arg == "RUN" else arg for arg in argv)) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") <= 2 and "Traceback" not in err


def test_command_takes_the_old_option_name(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["evaluate", str(folder), "--which", "step-9"])
    monkeypatch.delitem(sys.modules, "model.evaluate")
    with pytest.raises(SystemExit):
        runpy.run_module("model.evaluate", run_name="__main__", alter_sys=True)
    assert "has no checkpoint 'step-9'" in capsys.readouterr().err


def test_command_names_characters_that_the_model_does_not_know(folder, tmp_path, capsys):
    (tmp_path / "greek.txt").write_text("the cat κ the mat")
    assert call(folder, "--data", tmp_path / "greek.txt") == 2
    assert "κ" in capsys.readouterr().err
