"""Loss over a text, and what is derived from it."""

from __future__ import annotations

import json
import math
import runpy
import sys

import numpy as np
import pytest
import torch
from commands import exit_code

from model import checkpoint, choices, data, quantize
from model.choices import Question
from model.cli import UserError
from model.config import GPTConfig
from model.evaluate import EvaluateConfig, bits_per_byte, evaluate, main, perplexity
from model.gpt import GPT
from model.tokenizer import CharTokenizer, GPT2Tokenizer

V, T = 7, 8
TOKENS = np.random.default_rng(0).integers(0, V, 101).astype(np.uint16)


@pytest.fixture
def model() -> GPT:
    return GPT(GPTConfig(vocab_size=V, n_positions=T, n_embd=8, n_layer=1, n_head=2, embd_pdrop=0.5))


def log_p(model: GPT, before, token: int) -> float:
    """log p(token | before)."""
    idx = torch.tensor(np.array([before], dtype=np.int64))
    with torch.no_grad():
        return model.eval()(idx)[0][0, -1].double().log_softmax(-1)[int(token)].item()


def by_hand(model: GPT, tokens: np.ndarray, stride: int = T) -> list[float]:
    """-log p of each token after the first, each from the first window that reaches it."""
    windows = [-(-max(n - T, 0) // stride) for n in range(1, len(tokens))]
    return [-log_p(model, tokens[k * stride : n], tokens[n]) for n, k in enumerate(windows, 1)]


@pytest.mark.parametrize("n", [2, 8, 9, 10, 33, 101], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_loss_is_the_mean_over_all_targets(model, n, batch_size):
    losses = by_hand(model, TOKENS[:n])
    assert len(losses) == n - 1
    loss = evaluate(model, TOKENS[:n], context=T, batch_size=batch_size)
    assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


@pytest.mark.parametrize("n", [2, T, T + 1, T + 2, 30])
@pytest.mark.parametrize("stride", [1, 3, T - 1, T])
def test_stride_scores_each_token_once_in_context(model, n, stride):
    losses = by_hand(model, TOKENS[:n], stride)
    for batch_size in (1, 4):
        loss = evaluate(model, TOKENS[:n], context=T, batch_size=batch_size, stride=stride)
        assert loss == pytest.approx(sum(losses) / (n - 1), rel=1e-6)
    for _, targets in data.windows(TOKENS[:n], T, 1, stride=stride):
        n -= int((targets != -100).sum())
    assert n == 1


def test_stride_of_the_context_is_the_default(model):
    kwargs = {"context": T, "batch_size": 4}
    assert evaluate(model, TOKENS, stride=T, **kwargs) == evaluate(model, TOKENS, **kwargs)
    assert evaluate(model, TOKENS, stride=2, **kwargs) != evaluate(model, TOKENS, **kwargs)


@pytest.mark.parametrize("stride", [-1, 0, T + 1])
def test_stride_outside_the_context_is_refused(model, stride):
    with pytest.raises(UserError, match=f"stride must be 1 to the context of {T} tokens, got {stride}"):
        evaluate(model, TOKENS, context=T, batch_size=1, stride=stride)


@pytest.mark.parametrize("options", [{}, {"stride": 3}, {"max_windows": 5}])
def test_progress_counts_every_window(model, options):
    done = []
    evaluate(model, TOKENS, context=T, batch_size=4, advance=done.append, **options)
    most = options.pop("max_windows", None)
    assert sum(done) == sum(len(idx) for idx, _ in data.windows(TOKENS, T, 1, most, **options)) and len(done) > 1


def test_max_windows_are_few_spread_and_always_the_same(model, monkeypatch):
    seen = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, idx, *args, **kw: seen.append(idx) or forward(self, idx, *args, **kw)
    )
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

    def broken(*args, **kw):
        raise ZeroDivisionError

    monkeypatch.setattr(GPT, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, TOKENS, context=T, batch_size=4)
    assert model.training is training


def test_nothing_is_kept_for_a_backward_pass(model, monkeypatch):
    seen = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda *args, **kw: seen.append(torch.is_grad_enabled()) or forward(*args, **kw)
    )
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


# --- multiple choice


ALPHABET = CharTokenizer("the cat sat on the mat, it ate. THE")
QUESTIONS = [
    Question("the cat", ("sat", "ate the mat", "on"), 0),  # the second is longer than the model's context
    Question("it ", ("ate", "sat on it"), 1),
    Question("the mat, the cat, the mat", ("the", "a hat", "o", "THE THE"), 2),
]


@pytest.fixture
def letters() -> GPT:
    """A model of characters whose answers are far from equally likely."""
    return GPT(GPTConfig(ALPHABET.n_vocab, n_positions=16, n_embd=8, n_layer=1, n_head=2, initializer_range=0.5)).eval()


def score_by_hand(model: GPT, question: Question) -> list[float]:
    """Summed log p of the characters of each ending, and of the spaces before it."""
    scores = []
    for ending in question.endings:
        context, size = question.context.rstrip(), model.config.n_positions
        ids = ALPHABET.encode(f"{question.context} {ending}")
        first = len(context)
        scores.append(sum(log_p(model, ids[:n][max(0, len(ids) - size - 1) :], ids[n]) for n in range(first, len(ids))))
    return scores


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("max_logits", [1, 1 << 26])
def test_endings_are_scored_as_by_hand(letters, batch_size, max_logits, monkeypatch):
    monkeypatch.setattr(choices, "MAX_LOGITS", max_logits)
    sizes, forward = [], GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, idx: sizes.append(len(idx)) or forward(self, idx))
    encoded = [choice for question in QUESTIONS for choice in choices.encode(question, ALPHABET, 16)]
    done = []
    sums = choices.log_probs(letters, encoded, batch_size=batch_size, advance=done.append)
    assert max(sizes) == (1 if max_logits == 1 else min(batch_size, len(encoded))) and sum(sizes) == len(encoded)
    assert sum(done) == sum(len(choice.ids) for choice in encoded)
    monkeypatch.undo()
    expected = [score for question in QUESTIONS for score in score_by_hand(letters, question)]
    np.testing.assert_allclose(sums, expected, rtol=1e-5)


def test_accuracies_take_the_largest_sum_and_mean():
    sums = np.array([-1.5, -4.0, -2.0, -9.0, -9.5, -4.0, -5.0, -1.0, -6.0])
    # by sum: "sat", "ate", "o"; divided by characters: -0.5, -0.36, -1 | -3, -1.06 | -1.3, -1, -1, -0.86
    result = choices.accuracy(QUESTIONS, sums)
    assert (result.questions, result.acc, result.acc_norm) == (3, 2 / 3, 1 / 3)
    error = math.sqrt(1 / 3 * 2 / 3 / 2)  # of the mean of three
    assert str(result) == f"acc 0.6667 ± {error:.4f} | acc_norm 0.3333 ± {error:.4f}"
    assert "nan" in str(choices.accuracy(QUESTIONS[:1], sums[:3]))


def test_equally_likely_endings_count_as_the_first():
    question = Question("a", ("x", "y"), 0)
    assert choices.accuracy([question], np.array([-1.0, -1.0])).acc == 1


def test_tokens_do_not_merge_across_the_cut():
    tokenizer = GPT2Tokenizer()
    for context in ("She opened", "She opened  ", "She opened\n"):
        for choice in choices.encode(Question(context, ("the door.", " it"), 0), tokenizer, 1024):
            assert tokenizer.decode(choice.ids[: -choice.n_scored]) == "She opened"


@pytest.mark.parametrize(
    ("fields", "context", "endings"),
    [
        ({"ctx": " A [b]  c "}, " A [b]  c ", (" d [title] e [x]", "f")),
        # the other fields win: so do lm-evaluation-harness's lines of HellaSwag, which have both
        (
            {"ctx": "x", "activity_label": "Run", "ctx_a": "A man [title] b [c] d", "ctx_b": "he RUNS"},
            "Run: A man. b d He runs",
            ("d. e ", "f"),
        ),
        ({"ctx_a": "[header] Cook", "ctx_b": ""}, " Cook", ("d. e ", "f")),
    ],
)
def test_lines_are_read_in_both_forms(tmp_path, fields, context, endings):
    path = tmp_path / "q.jsonl"
    lines = [json.dumps({**fields, "endings": [" d [title] e [x]", "f"], "label": label}) for label in (1, "1")]
    path.write_text(f"{lines[0]}\n\n  \n{lines[1]}")
    assert list(choices.read_questions(path)) == [(n, Question(context, endings, 1)) for n in (1, 4)]


# --- python -m model.evaluate


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
    return exit_code(main, EvaluateConfig, *argv, "--device", "cpu")


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


def test_command_overlaps_windows(folder, capsys):
    assert call(folder, "--stride", 3) == 0
    model, _ = checkpoint.load_model(folder)
    losses = by_hand(model, data.load(folder / "data").val[:], 3)
    assert f"validation loss {sum(losses) / len(losses):.4f} | " in capsys.readouterr().out


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_command_shows_the_cost_of_weights(folder, weights, capsys):
    assert call(folder, "--weights", weights, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    model, _ = checkpoint.load_model(folder)
    val = data.load(folder / "data").val
    losses = {"float32": evaluate(model, val, context=T, batch_size=16)}
    losses[weights] = evaluate(quantize.prepare(model, weights), val, context=T, batch_size=16)
    expected = {
        form: {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / math.log(2)}
        for form, loss in losses.items()
    }
    about = {"run": str(folder), "checkpoint": "best", "text": "validation", "tokens": 74, "bytes": 74, "stride": T}
    assert content == {**about, "results": expected}

    assert call(folder, "--weights", weights) == 0
    _, plain, low = capsys.readouterr().out.splitlines()
    assert plain.startswith(f"validation loss {losses['float32']:.4f} | ")
    cost = 100 * (math.exp(losses[weights] - losses["float32"]) - 1)
    assert losses[weights] != losses["float32"]
    assert low.startswith(f"{weights} loss {losses[weights]:.4f} | ") and low.endswith(f" | {cost:+.2f} % perplexity")


def spoil(folder, value: float) -> None:
    """Put a number into the last LayerNorm of the run's model: all logits are NaN, or very far apart."""
    model, tokenizer = checkpoint.load_model(folder)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = value
    checkpoint.save_model(folder / "spoilt", model, tokenizer, config={})


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
@pytest.mark.parametrize("option", ["--data", "--choices"])
def test_command_refuses_a_model_of_nans(folder, tmp_path, capsys, option, options):
    """The likeliest of endings that are all NaN would be the first, here the right one."""
    spoil(folder, math.nan)
    text = {"--data": "the mat ate the cat.", "--choices": LINES[0]}[option]
    (tmp_path / "text").write_text(text)
    assert call(folder / "spoilt", option, tmp_path / "text", *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: the model's logits are NaN or infinite: ") and err.count("\n") == 1


def test_a_perplexity_beyond_all_numbers_is_null(folder, tmp_path, capsys):
    spoil(folder, 1e6)
    (tmp_path / "text").write_text("the mat ate the cat.")
    assert call(folder / "spoilt", "--data", tmp_path / "text", "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["results"]["float32"]
    assert found["loss"] > 700 and found["perplexity"] is None


ANSWERS = [
    {"ctx": "the cat", "endings": ["sat", "ate the", "on"], "label": 0},
    {"ctx": "the mat", "endings": ["ate", "sat on"], "label": 1},
]
LINES = [json.dumps(line) for line in ANSWERS]


def test_command_answers_questions(folder, tmp_path, capsys):
    (tmp_path / "q.jsonl").write_text("\n".join(LINES))
    assert call(folder, "--choices", tmp_path / "q.jsonl") == 0
    model, tokenizer = checkpoint.load_model(folder)
    questions, endings = choices.load(tmp_path / "q.jsonl", tokenizer, T)
    result = choices.accuracy(questions, choices.log_probs(model, endings, batch_size=1))
    assert capsys.readouterr().out == f"{tmp_path / 'q.jsonl'} 2 questions | {result}\n"
    assert call(folder, "--choices", tmp_path / "q.jsonl", "--weights", "int8") == 0
    assert [line.split(" | ")[0] for line in capsys.readouterr().out.splitlines()][1:] == ["int8"]
    assert call(folder, "--choices", tmp_path / "q.jsonl", "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["questions"] == 2 and content["results"]["float32"] == {
        "acc": result.acc,
        "acc_norm": result.acc_norm,
    }


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "has no questions"),
        ('{"ctx": "the", "endings": [', r"line 3: it is not JSON (Expecting value at column 28)"),
        (b'{"ctx": "\xff"}', "line 3: it is not JSON in UTF-8"),
        (f'{{"ctx": {"1" * 5000}}}', "line 3: it is not JSON in UTF-8"),
        ({"label": "1" * 5000}, "line 3: it is not JSON in UTF-8"),
        ({"label": ["x"] * 999}, "line 3: its label must be 0 to 2"),
        ("[1, 2]", "line 3: it is not a JSON object"),
        ({"endings": []}, "line 3: it has no list of at least two endings"),
        ({"endings": "the cat"}, "line 3: it has no list of at least two endings"),
        ({"endings": ["the", ""]}, "line 3: ending 1 is empty"),
        ({"endings": [1, "the"]}, "line 3: ending 0 is empty or not a string"),
        ({"label": 3}, "line 3: its label must be 0 to 2, the number of the right ending, got 3"),
        ({"label": -1}, "got -1"),
        ({"label": None}, "got None"),
        ({"label": "x"}, "got 'x'"),
        ({"label": True}, "got True"),
        ({"ctx": " "}, "line 3: its ctx is empty or missing"),
        ({"ctx": None}, "line 3: its ctx is empty or missing"),
        ({"ctx_a": "", "ctx_b": ""}, "line 3: its ctx is empty or missing"),
        ({"ctx": "Zebra"}, "line 3: not in this tokenizer's alphabet"),
        ({"endings": ["a", "the cat the"]}, f"line 3: ending 1 has 12 tokens and the model's context is {T}"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_command_names_the_line_of_a_bad_question(folder, tmp_path, capsys, line, words):
    path = tmp_path / "q.jsonl"
    line = json.dumps(ANSWERS[0] | line) if isinstance(line, dict) else line
    line = line.encode() if isinstance(line, str) else line
    path.write_bytes(LINES[0].encode() + b"\n\n" + line + b"\n" if line else b"\n")
    assert call(folder, "--choices", path) == 2
    out, err = capsys.readouterr()
    assert not out and str(path) in err and words in err and err.count("\n") <= 2 and "Traceback" not in err
    assert len(err) < 500


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "missing"),
        (["nowhere"], "has no checkpoint"),
        (["RUN", "--checkpoint", "step-9"], "has no checkpoint 'step-9'"),
        (["RUN", "--data", "missing.txt"], "missing.txt"),
        (["RUN", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["RUN", "--max-windows", "0"], "--max-windows must be at least 1"),
        (["RUN", "--stride", "0"], "--stride must be at least 1"),
        (["RUN", "--stride", str(T + 1)], f"--stride must be at most the model's context of {T} tokens, got {T + 1}"),
        (["RUN", "--weights", "int4"], "int4"),
        (["RUN", "--choices", "missing.jsonl"], "no such file or folder: missing.jsonl"),
        (["RUN", "--choices", "q.jsonl", "--stride", "4"], "omit --data, --stride and --max-windows"),
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
