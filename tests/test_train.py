"""The trainer from the outside: options in, folder and words out."""

from __future__ import annotations

import errno
import gzip
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import kernels._backend
import model.training.log
import model.training.step
import train
from model import checkpoint, config, data, files
from model.cli import UserError, run
from model.generate import generate
from model.gpt import GPT
from model.training import memory, options, parallel, run_folder, summary
from model.training.deadline import steps_that_fit
from model.training.failure import torch_errors_as_user_errors
from model.training.memory import MemoryModel
from model.training.optim import adamw
from model.training.options import ALIASES, TrainConfig, preset

ROOT = Path(__file__).parents[1]
TEXT = "CHAPTER I. The cat sat on the mat, and the mat was flat. The dog sat by the log, and the log was long.\n" * 60
SMALL = shlex.split("""
    --device cpu --data book.txt --n-layer 1 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --dropout 0.1
    --lr 1e-2 --min-lr 1e-3 --warmup-steps 2 --eval-every 10 --eval-windows 12 --save-every 10 --log-every 5
    --sample-tokens 3
""")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a book in it; 40 characters are sample enough."""
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(summary, "SAMPLE_TOKENS", 40)
    return tmp_path


def call(*argv) -> int:
    """The exit code of `python train.py ARGV`, in this process."""
    try:
        run(
            train.main,
            TrainConfig,
            prog="train.py",
            default=train.default_config,
            aliases=ALIASES,
            argv=[str(arg) for arg in argv],
        )
    except SystemExit as exit_:
        return exit_.code
    return 0


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[tuple]:
    """What has to be the same in two runs that should be the same: all but the times."""
    return [
        tuple(row[key] for key in ("step", "tokens", "loss", "val_loss", "lr", "grad_norm")) for row in rows(folder)
    ]


def state(folder: Path, step: int) -> dict:
    """Every bit that a run resumes from."""
    saved = checkpoint.load(folder, f"step-{step:08d}")
    tensors = {(part, name): t.numpy().tobytes() for part, found in saved.parts.items() for name, t in found.items()}
    return {**tensors, "val_loss": saved.state["val_loss"], "best_val_loss": saved.state["best_val_loss"]}


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# A run


def test_run_learns_and_fills_its_folder(here, capsys):
    assert call(*SMALL, "--steps", 40) == 0
    folder = here / "runs/tiny"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer", "data", "metrics.jsonl", "checkpoints", "sample.txt", "samples.jsonl",
        "report.html", "lock",
    }  # fmt: skip

    training = [row for row in rows(folder) if row["loss"] is not None]
    validation = [row for row in rows(folder) if row["val_loss"] is not None]
    assert [row["step"] for row in training] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [row["step"] for row in validation] == [10, 20, 30, 40]
    assert training[0]["loss"] == pytest.approx(math.log(26), abs=0.3)  # the alphabet's size, nothing learnt yet
    assert training[-1]["loss"] < 2.5 and validation[-1]["val_loss"] < 2.5
    keys = {"step", "tokens", *model.training.log.COLUMNS, "elapsed_s"}
    for row in rows(folder):
        assert set(row) == keys and row["tokens"] == row["step"] * 4 * 16
    for row in training:
        assert row["step_ms"] > 0 and row["tok_per_s"] == pytest.approx(64e3 / row["step_ms"])
        assert row["peak_mib"] > 10 and row["mfu"] is None and row["skipped"] == 0
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [10, 20, 30, 40]
    assert all(row["text"].startswith("CHAPTER I. ") and len(row["text"]) == 14 for row in samples)

    best = checkpoint.load(folder, "best").state
    assert best["val_loss"] == min(row["val_loss"] for row in validation) == best["best_val_loss"]
    sample = (folder / "sample.txt").read_text()
    assert sample.startswith("CHAPTER I. ") and len(sample) == len("CHAPTER I. ") + 40 + 1

    out = capsys.readouterr().out
    assert "step 00005/00040 | loss " in out and " tok/s | eta " in out and "mfu" not in out
    assert "step 00040/00040 | validation loss" in out
    assert sample.strip() in out
    loss = best["val_loss"]
    assert f"validation loss {loss:.4f} | perplexity {math.exp(loss):.2f} | {loss / math.log(2):.3f} bits" in out
    assert out.endswith('more text: python -m model.generate runs/tiny --prompt "CHAPTER I. "\n')


def test_progress_lines_with_and_without_a_terminal(here, monkeypatch):
    """A known GPU would add its MFU; times are not compared."""
    lines = []
    monkeypatch.setattr(model.training.log.LiveLine, "update", lambda self, text: lines.append(text))
    monkeypatch.setattr(model.training.log, "peak_flops", lambda device, dtype: 1e9)
    assert call(*SMALL, "--steps", 15, "--out", "a") == 0
    number = r"[\d.,]+"
    pattern = (
        rf"step 00015/00015 \| loss {number} \| lr 1.1e-03 \| {number} ms \| {number} tok/s \| mfu {number} \| eta 0:00"
    )
    assert re.fullmatch(pattern, lines[-1])
    monkeypatch.setattr(model.training.log.LiveLine, "__enter__", lambda self: setattr(self, "is_live", True) or self)
    assert call(*SMALL, "--steps", 15, "--out", "b") == 0
    start = (
        rf"step 00015/00015 \| loss {number} \| val {number} \| elapsed [\d:]+ \| eta 0:00 \| lr 1.1e-03 \| {number} ms"
    )
    assert re.match(start, lines[-1])
    assert " val " not in lines[4]  # nothing is measured before step 10


def test_clock():
    assert [model.training.log.clock(s) for s in (0, 9.6, 61, 3599, 3600, 90061)] == [
        "0:00", "0:10", "1:01", "59:59", "1:00:00", "25:01:01"
    ]  # fmt: skip


def test_config_json_holds_options_and_model(here):
    assert call(*SMALL, "--steps", 2, "--seed", 7) == 0
    stored = json.loads((here / "runs/tiny/config.json").read_text())
    assert stored["model"]["vocab_size"] == len(set(TEXT)) + 1
    assert stored["train"]["seed"] == 7 and stored["train"]["dtype"] == "float32"
    assert options.stored_config(here / "runs/tiny") == replace(
        preset("tiny"), data=Path("book.txt"), n_layer=1, n_head=2, n_embd=16, context=16, batch_size=4, dropout=0.1,
        lr=1e-2, min_lr=1e-3, warmup_steps=2, eval_every=10, eval_windows=12, save_every=10, log_every=5, steps=2,
        seed=7, device="cpu", dtype="float32", sample_tokens=3,
    )  # fmt: skip


def test_seed_determines_the_run(here):
    for out, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert call(*SMALL, "--steps", 12, "--out", out, "--seed", seed) == 0
    assert losses(here / "a") == losses(here / "b") != losses(here / "c")
    assert state(here / "a", 12) == state(here / "b", 12)


def test_logging_interval_does_not_change_training(here):
    assert call(*SMALL, "--steps", 12, "--out", "a") == 0
    assert call(*SMALL, "--steps", 12, "--out", "b", "--eval-every", 1, "--log-every", 1, "--save-every", 1) == 0
    assert state(here / "a", 12) == state(here / "b", 12)


def test_accumulation_equals_the_large_batch(here):
    """One step of 3 x 4 sequences against clipping and AdamW on all 12 at once."""
    flags = ["--dropout", 0, "--warmup-steps", 0, "--steps", 1, "--seed", 5]
    assert call(*SMALL, *flags, "--batch-size", 4, "--grad-accum", 3) == 0
    tokens = data.load(here / "runs/tiny/data")
    idx, targets = data.get_batch(tokens.train, context=16, seed=5, step=0, rows=range(12))
    assert len(idx.unique(dim=0)) == 12

    saved = checkpoint.load(here / "runs/tiny")
    torch.manual_seed(5)
    model = GPT(config.GPTConfig.from_dict(saved.state["model"]))
    optimizer = adamw(model, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    loss = model(idx, targets)[1]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert rows(here / "runs/tiny")[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert rows(here / "runs/tiny")[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        # Moments, not weights: the first update of AdamW is lr * sign(gradient), whatever the gradient's size.
        expected = optimizer.state[parameter]["exp_avg"]
        torch.testing.assert_close(saved.parts["optimizer"][f"exp_avg/{name}"], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("clip", "expected"), [("0.01", 0.01), ("0", None)])
def test_gradient_is_clipped_and_unclipped_norm_logged(here, clip, expected):
    assert call(*SMALL, "--steps", 1, "--grad-clip", clip) == 0
    norm = rows(here / "runs/tiny")[0]["grad_norm"]
    moments = checkpoint.load(here / "runs/tiny").parts["optimizer"]
    clipped = math.sqrt(sum(t.double().square().sum().item() for k, t in moments.items() if k.startswith("exp_avg/")))
    assert norm > 0.1
    assert clipped / 0.1 == pytest.approx(expected or norm, rel=1e-3)  # exp_avg = (1 - beta1) * gradient


def test_best_weights_write_the_sample_and_report(here, capsys, monkeypatch):
    # ten good steps, then ten that spoil the weights
    monkeypatch.setattr(TrainConfig, "lr_at", lambda self, step: 1e-2 if step <= 10 else 3.0)
    assert call(*SMALL, "--steps", 20, "--save-every", 1000) == 0
    validation = {row["step"]: row["val_loss"] for row in rows(here / "runs/tiny") if row["val_loss"]}
    assert validation[10] < validation[20]
    assert checkpoint.list_checkpoints(here / "runs/tiny") == ["step-00000010", "step-00000020"]
    out = capsys.readouterr().out
    assert f"the text above is by the best weights, of step 10\nvalidation loss {validation[10]:.4f}" in out
    model, tokenizer = checkpoint.load_model(here / "runs/tiny", name="step-00000010")
    ids = generate(
        model, tokenizer.encode("CHAPTER I. "), tokens=40, temperature=summary.SAMPLE_TEMPERATURE, top_k=40, seed=1337
    )
    assert (here / "runs/tiny/sample.txt").read_text() == "CHAPTER I. " + tokenizer.decode(list(ids)) + "\n"


def test_text_without_prompt_letters_gets_a_sample(here, capsys):
    (here / "book.txt").write_text("0123456789 " * 100)
    assert call(*SMALL, "--steps", 2) == 0
    assert len((here / "runs/tiny/sample.txt").read_text().strip()) > 10
    assert 'model.generate runs/tiny --prompt ""' in capsys.readouterr().out


# Options


def test_nanogpt_cpu_example_is_expressible(monkeypatch):
    flags = (
        "--preset tiny --n-layer 4 --n-head 4 --n-embd 128 --context 64 --batch-size 12 --steps 2000 --dropout 0 "
        "--lr 1e-3 --min-lr 1e-4 --warmup-steps 100 --beta2 0.99"
    )
    seen = []
    run(seen.append, TrainConfig, prog="train.py", default=train.default_config, aliases=ALIASES, argv=flags.split())
    wanted = dict(
        tokenizer="char", n_layer=4, n_head=4, n_embd=128, context=64, batch_size=12, grad_accum=1, steps=2000,
        dropout=0.0, lr=1e-3, min_lr=1e-4, warmup_steps=100, beta1=0.9, beta2=0.99, weight_decay=0.1, grad_clip=1.0,
    )  # fmt: skip
    assert {name: getattr(seen[0], name) for name in wanted} == wanted


def test_char_preset_is_nanogpts_gpu_example():
    cfg = preset("shakespeare-char")
    assert (cfg.n_layer, cfg.n_head, cfg.n_embd, cfg.context, cfg.dropout, cfg.bias) == (6, 6, 384, 256, 0.2, False)
    assert (cfg.batch_size, cfg.grad_accum, cfg.steps, cfg.warmup_steps, cfg.eval_every) == (64, 1, 5000, 100, 250)
    assert (cfg.lr, cfg.min_lr, cfg.beta1, cfg.beta2, cfg.weight_decay, cfg.grad_clip) == (
        1e-3,
        1e-4,
        0.9,
        0.99,
        0.1,
        1,
    )


def test_presets_are_named_and_valid():
    names = options.preset_names()
    assert {"tiny", "shakespeare-char", "gpt2-124M", "gpt2-medium", "gpt2-large", "gpt2-xl"} <= set(names)
    assert {f"gpt2-124M-{size}GB" for size in (6, 8, 12, 24)} <= set(names)
    for name in names:
        cfg = preset(name)
        cfg.check()
        assert cfg.preset == name and cfg.tokenizer == ("gpt2" if name.startswith("gpt2") else "char")
        if cfg.tokenizer == "gpt2" and name != "gpt2-first-run":
            assert cfg.sequences * cfg.context == 2**19
    for name in ("gpt2-medium", "gpt2-large", "gpt2-xl"):
        assert preset(name).gpt_config(50257) == config.PRESETS[name]


@pytest.mark.parametrize(
    ("argv", "has_gpu", "expected"),
    [
        ([], False, "tiny"),
        ([], True, "gpt2-first-run"),
        (["--device", "cpu"], True, "tiny"),
        (["--preset", "shakespeare-char"], True, "shakespeare-char"),
        (["--preset=gpt2-xl"], False, "gpt2-xl"),
    ],
)
def test_defaults_come_from_the_preset_or_the_machine(argv, has_gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert options.default_config(argv) == preset(expected)


def test_command_line_overrides_the_preset(monkeypatch):
    seen = []
    argv = ["--lr", "5e-4", "--preset", "shakespeare-char"]
    run(seen.append, TrainConfig, prog="train.py", default=options.default_config, argv=argv)
    assert seen == [replace(preset("shakespeare-char"), lr=5e-4)]


def test_user_preset_extends_another(here):
    (here / "mine.toml").write_text('preset = "tiny"\nn_layer = 1\nlr = 2e-3\ndata = "book.txt"\n')
    cfg = preset("mine.toml")
    assert (cfg.n_layer, cfg.lr, cfg.data) == (1, 2e-3, Path("book.txt"))
    assert replace(cfg, n_layer=4, lr=3e-3, data=Path("Book"), preset="tiny") == preset("tiny")
    assert call("--preset", "mine.toml", *SMALL, "--steps", 1) == 0
    assert (here / "runs/mine/sample.txt").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("n_layer = ", "mine.toml is not TOML"),
        ('preset = "tiny"\nlearning_rate = 1.0', "mine.toml: unknown option 'learning_rate'"),
        ('preset = "tiny"\nn_layer = "4"', "mine.toml: n_layer must be int, got '4'"),
        ('preset = "tiny"\nbatch_size = "auto"', "mine.toml: batch_size must be int"),
        ('preset = "tinny"', "unknown preset 'tinny'"),
        ('shape = "gpt3"', "mine.toml: unknown shape 'gpt3'"),
        ("n_layer = 4", "mine.toml lacks options"),
    ],
)
def test_unreadable_preset_is_refused(here, capsys, content, words):
    (here / "mine.toml").write_text(content)
    refused(here, capsys, ["--preset", "mine.toml"], words)
    (here / "mine.toml").unlink()
    refused(here, capsys, ["--preset", "mine.toml"], "no such file or folder: mine.toml")


# Where a run goes


def test_second_run_takes_the_next_free_folder(here):
    for _ in range(3):
        assert call(*SMALL, "--steps", 1) == 0
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["tiny", "tiny-2", "tiny-3"]


def test_empty_out_folder_is_accepted(here):
    (here / "empty").mkdir()
    assert call(*SMALL, "--steps", 1, "--out", "empty") == 0
    assert (here / "empty/sample.txt").exists()


# Stopping and going on


def straight_run(here: Path) -> Path:
    assert call(*SMALL, "--steps", 20, "--out", "straight") == 0
    return here / "straight"


KILLED = """
import os, signal, sys, torch, train
from model.cli import run
from model.training import summary
torch.set_num_threads(1)
def kill_in_step_16(self, step, lr=train.TrainConfig.lr_at):
    if step == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return lr(self, step)
if "--resume" not in sys.argv:
    train.TrainConfig.lr_at = kill_in_step_16
summary.SAMPLE_TOKENS = 40
run(train.main, train.TrainConfig, prog="train.py", default=train.default_config)
"""


def test_resume_after_kill_9_is_bitwise_equal(here):
    def process(*argv):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", KILLED, *map(str, argv)]
        return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)

    died = process(*SMALL, "--steps", 20, "--out", "killed")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert checkpoint.list_checkpoints(here / "killed") == ["step-00000010"]
    assert [row["step"] for row in rows(here / "killed")] == [1, 5, 10, 10, 15]
    resumed = process("--resume", "killed")
    assert (resumed.returncode, resumed.stderr) == (0, "")

    straight = straight_run(here)
    assert state(here / "killed", 20) == state(straight, 20)
    assert losses(here / "killed") == losses(straight)
    assert (here / "killed/sample.txt").read_text() == (straight / "sample.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"])
def test_signal_finishes_the_step_and_saves(here, capsys, monkeypatch, number, code):
    lr = TrainConfig.lr_at
    sent = []

    def signal_in_step_8(self, step):
        if step == 8 and not sent:
            sent.append(os.kill(os.getpid(), number))
        return lr(self, step)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(TrainConfig, "lr_at", signal_in_step_8)
        assert call(*SMALL, "--steps", 20) == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint.list_checkpoints(here / "runs/tiny") == ["step-00000008"]
    captured = capsys.readouterr()
    assert captured.out.endswith("stopped and saved at step 8; resume: python train.py --resume runs/tiny\n")
    assert captured.err == ""

    assert call("--resume", "runs/tiny") == 0
    assert state(here / "runs/tiny", 20) == state(straight_run(here), 20)


def test_second_ctrl_c_ends_at_once(here, capsys, monkeypatch):
    def two_signals(self, step):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return 0.01

    monkeypatch.setattr(TrainConfig, "lr_at", two_signals)
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits SIG_IGN
    try:
        assert call(*SMALL, "--steps", 20) == 130
    finally:
        signal.signal(signal.SIGINT, outer)
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not (here / "runs/tiny").exists()  # nothing was saved, so there is nothing to resume


def test_ctrl_c_while_reading_leaves_nothing(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        (here / "runs/tiny/data").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "open_source", interrupted)
    assert call(*SMALL) == 130
    assert not (here / "runs/tiny").exists()


def test_partial_metrics_row_is_dropped(here):
    assert call(*SMALL, "--steps", 10, "--out", "a") == 0
    with (here / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert call("--resume", "a", "--steps", 12) == 0
    assert [row["step"] for row in rows(here / "a")] == [1, 5, 10, 10, 12, 12]


def test_finished_run_says_so_and_takes_more_steps(here, capsys):
    assert call(*SMALL, "--steps", 10) == 0
    before = snapshot(here)
    capsys.readouterr()
    assert call("--resume", "runs/tiny") == 0
    assert snapshot(here) == before
    assert capsys.readouterr().out == (
        "runs/tiny is finished after 10 steps; for more: python train.py --resume runs/tiny --steps 20\n"
    )
    assert call("--resume", "runs/tiny", "--steps", 12, "--log-every", 1) == 0
    assert [row["step"] for row in rows(here / "runs/tiny")] == [1, 5, 10, 10, 11, 12, 12]
    assert options.stored_config(here / "runs/tiny").steps == 12  # a third call resumes there


def test_resume_from_an_earlier_checkpoint(here):
    assert call(*SMALL, "--steps", 20) == 0
    assert call("--resume", "runs/tiny", "--checkpoint", "step-00000010", "--steps", 15) == 0
    assert checkpoint.list_checkpoints(here / "runs/tiny") == ["step-00000010", "step-00000015"]
    assert [row["step"] for row in rows(here / "runs/tiny")] == [1, 5, 10, 10, 15, 15]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", 0.5], "--lr 0.5 cannot be changed when a run is resumed (in RUN it is 0.01)"),
        (["--data", "other.txt"], "--data other.txt cannot be changed"),
        (["--out", "elsewhere"], "--out elsewhere cannot be changed"),
        (["--preset", "gpt2"], "--preset gpt2 cannot be changed"),
        (["--n-embd", 32], "--n-embd 32 cannot be changed"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 cannot be changed"),
        (["--minutes", 3], "--minutes 3.0 cannot be changed when a run is resumed (in RUN it is 0.0)"),
        (["--minutes", 3, "--steps", 20], "give either --minutes or --steps"),
        (["--steps", 5], "--steps 5 is less than the 10 that RUN has done"),
        (["--batch-size", 3], "--batch-size 3 times --grad-accum 1 is 3 sequences a step, and in RUN it is 4"),
        (["--log-every", 0], "--log-every must be at least 1"),
        (["--checkpoint", "step-00000003"], "has no checkpoint 'step-00000003'"),
    ],
)
def test_resume_refuses_options_that_cannot_change(here, capsys, argv, words):
    assert call(*SMALL, "--steps", 10, "--out", "run") == 0
    refused(here, capsys, ["--resume", "run", *argv], words.replace("RUN", "run"))


def test_resume_refuses_a_folder_without_a_run(here, capsys):
    refused(here, capsys, ["--resume", "nowhere"], "nowhere holds no run")
    refused(here, capsys, ["--resume", "book.txt"], "book.txt holds no run")
    (here / "run").mkdir()
    (here / "run/config.json").write_text("{}")
    refused(here, capsys, ["--resume", "run"], "run/config.json is damaged")


def test_damaged_checkpoint_is_named_and_previous_one_resumes(here, capsys):
    assert call(*SMALL, "--steps", 20, "--out", "run") == 0
    path = here / "run/checkpoints/step-00000020/optimizer.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    refused(
        here,
        capsys,
        ["--resume", "run", "--steps", 30],
        "optimizer.safetensors is damaged",
        "--checkpoint step-00000010",
    )
    path.write_bytes(damaged[:-7])
    refused(here, capsys, ["--resume", "run", "--steps", 30], "optimizer.safetensors is damaged")
    assert call("--resume", "run", "--steps", 30, "--checkpoint", "step-00000010") == 0


def other_lr(monkeypatch, at: int, action) -> None:
    """Let `action` happen once, at the beginning of step `at`."""
    lr, done = TrainConfig.lr_at, []

    def patched(self, step):
        if step == at and not done:
            done.append(action())
        return lr(self, step)

    monkeypatch.setattr(TrainConfig, "lr_at", patched)


def test_sigusr1_saves_and_training_continues(here, monkeypatch):
    other_lr(monkeypatch, 7, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert call(*SMALL, "--steps", 9, "--keep-last", 5) == 0
    assert checkpoint.list_checkpoints(here / "runs/tiny") == ["step-00000007", "step-00000009"]


def test_keep_last_checkpoints_and_the_best(here):
    assert call(*SMALL, "--steps", 20, "--save-every", 2, "--keep-last", 3, "--eval-every", 4) == 0
    best = checkpoint.load(here / "runs/tiny", "best").folder.name
    assert set(checkpoint.list_checkpoints(here / "runs/tiny")) == {f"step-{k:08d}" for k in (16, 18, 20)} | {best}


def test_kill_during_validation_loses_nothing(here, monkeypatch):
    """Killed while the validation loss is computed: nothing is lost, and the curve has no hole."""
    validate = train.Trainer.validate

    def killed(self, step):
        if step == 10:
            raise KeyboardInterrupt
        return validate(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "validate", killed)
        assert call(*SMALL, "--steps", 20, "--out", "killed") == 130
    assert checkpoint.list_checkpoints(here / "killed") == ["step-00000010"]
    assert call("--resume", "killed") == 0
    straight = straight_run(here)
    assert losses(here / "killed") == losses(straight) and state(here / "killed", 20) == state(straight, 20)
    assert (here / "killed/samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_unrecorded_validation_is_repeated(here, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "record_validation", killed)
        assert call(*SMALL, "--steps", 20, "--out", "killed") == 130
    assert call("--resume", "killed") == 0
    assert losses(here / "killed") == losses(straight_run(here))


def test_kill_during_last_validation_repeats_it(here, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "validate", lambda self, step: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(*SMALL, "--steps", 5, "--out", "killed") == 130
    assert call("--resume", "killed") == 0
    assert rows(here / "killed")[-1]["val_loss"] is not None and (here / "killed/sample.txt").exists()


def test_or_resume_starts_resumes_and_ends(here, capsys):
    command = [*SMALL, "--out", "run", "--or-resume"]
    assert call(*command, "--steps", 10) == 0
    assert call(*command, "--steps", 20) == 0
    assert checkpoint.list_checkpoints(here / "run") == ["step-00000010", "step-00000020"]
    assert [row["step"] for row in rows(here / "run") if row["val_loss"]] == [10, 20]
    assert call(*command, "--steps", 20) == 0
    assert "run is finished after" in capsys.readouterr().out
    refused(here, capsys, [*SMALL, "--or-resume"], "--or-resume must be omitted without --out")


def test_or_resume_restarts_without_a_checkpoint(here):
    folder = here / "run"
    assert call(*SMALL, "--steps", 3, "--out", "run") == 0
    for name in checkpoint.list_checkpoints(folder):
        for path in (folder / "checkpoints" / name).iterdir():
            path.unlink()
        (folder / "checkpoints" / name).rmdir()
    assert call(*SMALL, "--steps", 3, "--out", "run", "--or-resume") == 0
    assert [row["step"] for row in rows(folder)] == [1, 3, 3]


def test_or_resume_removes_a_run_killed_while_reading(here, capsys):
    (here / "run/data.incomplete-12ab").mkdir(parents=True)
    (here / "run/lock").write_text("1\n")
    assert call(*SMALL, "--steps", 1, "--out", "run", "--or-resume") == 0
    (here / "letters").mkdir()
    for name in ("lock", "one.txt"):
        (here / "letters" / name).write_text("dear")
    refused(here, capsys, [*SMALL, "--out", "letters", "--or-resume"], "letters exists and is not an empty")


def test_kill_before_the_sample_writes_it_on_resume(here):
    assert call(*SMALL, "--steps", 10, "--out", "run") == 0
    sample = (here / "run/sample.txt").read_text()
    (here / "run/sample.txt").unlink()
    for name in ("sample.txt.tmp", ".report.html.7.tmp"):
        (here / "run" / name).write_text("half")
    before = losses(here / "run")
    assert call("--resume", "run") == 0
    assert (here / "run/sample.txt").read_text() == sample and losses(here / "run") == before
    assert not [*(here / "run").glob("*.tmp"), *(here / "run").glob(".*.tmp")]


def test_lock_keeps_other_processes_out(here, capsys):
    assert call(*SMALL, "--steps", 10, "--out", "run") == 0
    with run_folder.lock(here / "run"):
        refused(here, capsys, ["--resume", "run", "--steps", 20], f"by process {os.getpid()}: wait for it, or stop it")
    assert call("--resume", "run", "--steps", 11) == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--dtype", "bfloat16"],
        ["--dtype", "float16"],
        ["--optimizer", "muon", "--ema", 0.9],
        ["--schedule", "wsd", "--cooldown-steps", 8, "--document-mask"],
        ["--recompute", "--grad-accum", 3, "--spikes", "skip"],
        pytest.param(["--backend", "triton"], marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),  # interpreted
    ],
    ids=lambda flags: flags[1],
)
def test_resume_is_bitwise_equal_for_all_options(here, monkeypatch, flags):
    steps, stop = (4, 3) if "triton" in flags else (16, 11)
    flags = [*SMALL, *flags, "--steps", steps]
    assert call(*flags, "--out", "straight") == 0
    with monkeypatch.context() as patch:
        other_lr(patch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert call(*flags, "--out", "stopped") == 143
    assert call("--resume", "stopped") == 0
    assert state(here / "stopped", steps) == state(here / "straight", steps)
    assert [row for row in losses(here / "stopped") if row[0] != stop] == losses(here / "straight")


def test_resume_with_smaller_micro_steps(here):
    """Its steps have the same sequences; sums are rounded in another order."""
    flags = ["--dropout", 0, "--batch-size", 6, "--schedule", "constant", "--steps", 20]
    assert call(*SMALL, *flags, "--out", "straight") == 0
    assert call(*SMALL, *flags, "--out", "other", "--steps", 10) == 0
    before = rows(here / "other")
    assert call("--resume", "other", "--steps", 20, "--batch-size", 2, "--grad-accum", 3, "--recompute") == 0
    after, straight = rows(here / "other"), rows(here / "straight")
    assert after[: len(before)] == before
    for a, b in zip(after[len(before) :], straight[len(before) :], strict=True):
        assert a["loss"] is None or a["loss"] == pytest.approx(b["loss"], rel=1e-2)
    assert after[-1]["val_loss"] == pytest.approx(straight[-1]["val_loss"], rel=1e-2)


def test_replaced_corpus_is_refused_and_copied_one_accepted(here, capsys):
    assert call(*SMALL, "--steps", 10, "--out", "first") == 0
    shards = [*(here / "first/data").glob("*.bin")]
    assert call(*SMALL[:2], "--data", "first/data", *SMALL[4:], "--steps", 10, "--out", "run") == 0
    assert losses(here / "run") == losses(here / "first")
    assert not [*(here / "run/data").glob("*.bin")]  # used where they lie
    for path in shards:
        os.utime(path, (1, 1))
    assert call("--resume", "run", "--steps", 12) == 0
    path = next(path for path in shards if "train" in path.name)
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    refused(here, capsys, ["--resume", "run", "--steps", 14], str(path.resolve()), "is not what it was when")


def test_checkpoint_of_another_model_is_refused(here, capsys):
    assert call(*SMALL, "--steps", 10, "--out", "a") == 0
    assert call(*SMALL, "--steps", 10, "--out", "b", "--n-embd", 32) == 0
    for name in checkpoint.list_checkpoints(here / "a"):
        (here / "a/checkpoints" / name).rename(here / "a" / name)
    for name in checkpoint.list_checkpoints(here / "b"):
        (here / "b/checkpoints" / name).rename(here / "a/checkpoints" / name)
    refused(here, capsys, ["--resume", "a", "--steps", 20], "is of another model: n_embd is 32 there and 16 here")


# How long a run is


@pytest.fixture
def ticking(monkeypatch) -> dict[str, float]:
    """A clock of the run's log: a step takes 1 s, an evaluation 5 s, a checkpoint 2 s. The values may be changed."""
    takes, now = {"step": 1.0, "evaluation": 5.0, "checkpoint": 2.0}, [0.0]
    monkeypatch.setattr(model.training.log, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(owner, name, what):
        work = getattr(owner, name)

        def wrapped(*args, **kwargs):
            now[0] += takes[what]
            return work(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    slow(model.training.step.Step, "__call__", "step")
    slow(train, "evaluate", "evaluation")
    slow(checkpoint, "save", "checkpoint")
    return takes


def test_minutes_choose_the_steps_and_store_them(here, capsys, ticking):
    """Chosen at step 15, after 29 s: of 118.8 s, 89.8 are left for 47 steps, 5 evaluations and 5 checkpoints."""
    assert call(*SMALL, "--minutes", 2) == 0
    folder = here / "runs/tiny"
    assert "62 steps fit into 2 minutes: 1000.0 ms each, 5.0 s an evaluation, 2.0 s a checkpoint\n" in (
        out := capsys.readouterr().out
    )
    assert "step 00010 | loss " in out and "step 00062/00062 | validation loss" in out
    assert out.count("\n62 steps in 1:58; ") == 1
    cfg, found = options.stored_config(folder), rows(folder)
    assert (cfg.steps, cfg.minutes) == (62, 2.0)
    assert [row["step"] for row in found if row["val_loss"]] == [10, 15, 20, 30, 40, 50, 60, 62]
    assert found[-1]["elapsed_s"] == 118.0 and checkpoint.load(folder).state["elapsed_s"] == 111.0
    rates = [row["lr"] for row in found if row["lr"] is not None and row["step"] > 2]
    assert rates == sorted(rates, reverse=True) and rates[1] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3, rel=0.01)
    capsys.readouterr()
    assert call("--resume", "runs/tiny") == 0
    assert capsys.readouterr().out.endswith(
        "is finished after 62 steps; for more: python train.py --resume runs/tiny --steps 124\n"
    )


def test_resume_with_minutes_is_bitwise_equal(here, monkeypatch, ticking):
    """And so is a run with --steps, where the warm-up was not over when they were chosen."""
    flags = [*SMALL, "--warmup-steps", 15]
    assert call(*flags, "--minutes", 2, "--out", "straight") == 0
    for stop, steps in ((8, 0), (33, 62)):
        out = f"stopped-{stop}"
        with monkeypatch.context() as patch:
            other_lr(patch, stop, lambda: os.kill(os.getpid(), signal.SIGTERM))
            assert call(*flags, "--minutes", 2, "--out", out, "--or-resume") == 143
        assert options.stored_config(here / out).steps == steps
        assert "finished" not in (here / out / "report.html").read_text().split("</header>")[0]
        assert call(*flags, "--minutes", 2, "--out", out, "--or-resume") == 0
    assert state(here / "stopped-33", 62) == state(here / "straight", 62)
    assert [row for row in losses(here / "stopped-33") if row[0] != 33] == losses(here / "straight")
    assert call(*flags, "--steps", 62, "--out", "steps") == 0
    assert state(here / "steps", 62) == state(here / "straight", 62)
    assert options.stored_config(here / "stopped-8").steps == rows(here / "stopped-8")[-1]["step"] > 50


@pytest.mark.parametrize(("slow_from", "last"), [(1, 6), (20, 49)], ids=["before the choice", "after it"])
def test_deadline_ends_a_run_that_became_slower(here, capsys, monkeypatch, ticking, slow_from, last):
    other_lr(monkeypatch, slow_from, lambda: ticking.update(step=20.0 if last == 6 else 2.0))
    assert call(*SMALL, "--minutes", 2) == 0
    folder, of = here / "runs/tiny", "" if last == 6 else " of 62"
    assert f"2 minutes are over: the run ends at step {last}{of}\n" in capsys.readouterr().out
    assert options.stored_config(folder).steps == last == rows(folder)[-1]["step"]
    assert rows(folder)[-1]["val_loss"] and (folder / "sample.txt").exists()
    assert rows(folder)[-1]["elapsed_s"] <= 127  # the first evaluation was not foreseen, and a step is not
    assert call("--resume", "runs/tiny") == 0 and "is finished after" in capsys.readouterr().out


def test_more_steps_take_the_place_of_minutes(here, ticking):
    assert call(*SMALL, "--minutes", 1) == 0
    steps = options.stored_config(here / "runs/tiny").steps
    assert call("--resume", "runs/tiny", "--steps", steps + 5) == 0
    cfg = options.stored_config(here / "runs/tiny")
    assert (cfg.steps, cfg.minutes) == (steps + 5, 0.0) and rows(here / "runs/tiny")[-1]["elapsed_s"] > 60


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
def test_rate_stays_at_its_peak_until_steps_are_chosen(schedule):
    cfg = replace(preset("tiny"), schedule=schedule, minutes=1.0, steps=0)
    assert [cfg.lr_at(step) for step in (101, 10**6)] == [pytest.approx(cfg.lr)] * 2 and cfg.lr_at(50) < cfg.lr
    assert cfg.lr_at(50) == replace(cfg, steps=1000).lr_at(50)


@pytest.mark.parametrize("done", [0, 7, 20])
@pytest.mark.parametrize(("eval_every", "save_every"), [(10, 10), (10, 4), (3, 25), (1000, 1000)])
def test_steps_that_fit_are_as_many_as_can_be(done, eval_every, save_every):
    def seconds(steps):
        time = 0.0
        for step in range(done + 1, steps + 1):
            evaluates = step % eval_every == 0 or step == steps
            time += 1.0 + 5.0 * evaluates + 2.0 * (evaluates or step % save_every == 0)
        return time

    for budget in range(0, 300, 7):
        steps = steps_that_fit(
            budget, done, step_s=1.0, eval_s=5.0, save_s=2.0, eval_every=eval_every, save_every=save_every
        )
        assert steps >= done and (steps == done or seconds(steps) <= budget)
        assert seconds(steps + 1) > budget - 2.0  # a checkpoint in the last step counts twice at most


def until(here, flags=()) -> tuple[Path, float]:
    """A run of 40 steps, and its validation loss at step 20."""
    assert call(*SMALL, *flags, "--steps", 40, "--out", "straight") == 0
    found = {row["step"]: row["val_loss"] for row in rows(here / "straight") if row["val_loss"]}
    assert found[10] > found[20] > found[30]
    return here / "straight", found[20]


@pytest.mark.parametrize("flags", [[], ["--save-every", 1000], ["--ema", 0.9]], ids=["", "unsaved", "ema"])
def test_until_loss_ends_at_the_first_low_evaluation(here, capsys, flags):
    straight, loss = until(here, flags)
    command = [*SMALL, *flags, "--steps", 40, "--out", "run"]
    capsys.readouterr()
    assert call(*command, "--until-loss", loss) == 0
    out = capsys.readouterr().out
    assert re.search(rf"step 00020/00040 \| validation loss {loss:.4f} \* \| reached {loss:g} after 0:0\d\n", out)
    assert re.search(rf"20 steps in 0:0\d to a validation loss of at most {loss:g}; the text above is by the best", out)
    assert losses(here / "run") == [row for row in losses(straight) if row[0] <= 20]
    assert [row["step"] for row in rows(here / "run") if row["reached"]] == [20] and rows(here / "run")[-1][
        "reached"
    ] == loss
    assert (here / "run/sample.txt").exists() and options.stored_config(here / "run").steps == 40
    page = (here / "run/report.html").read_text()
    assert (
        "finished, step 20 of 40." in page and f"to a validation loss of {loss:g}, at step 20, on 1,280 tokens" in page
    )

    before = snapshot(here / "run")
    assert call("--resume", "run") == 0
    assert snapshot(here / "run") == before
    assert capsys.readouterr().out == (
        f"run is finished after 20 steps with a validation loss of {loss:.4f}; "
        "for more: python train.py --resume run --until-loss 0\n"
    )
    assert call("--resume", "run", "--until-loss", 0) == 0
    assert losses(here / "run") == losses(straight) and state(here / "run", 40) == state(straight, 40)


def test_killed_before_the_sample_at_the_loss_writes_it(here):
    _, loss = until(here)
    assert call(*SMALL, "--steps", 40, "--out", "run", "--until-loss", loss) == 0
    (here / "run/sample.txt").unlink()
    assert call("--resume", "run") == 0
    assert rows(here / "run")[-1]["step"] == 20 and (here / "run/sample.txt").exists()


def test_first_of_minutes_and_loss_ends_the_run(here, capsys, ticking):
    _, loss = until(here)
    assert call(*SMALL, "--minutes", 2, "--until-loss", loss, "--out", "loss") == 0
    assert rows(here / "loss")[-1]["step"] <= 20 and rows(here / "loss")[-1]["reached"] == loss
    assert call(*SMALL, "--minutes", 1, "--until-loss", 0.01, "--out", "time") == 0
    assert rows(here / "time")[-1]["elapsed_s"] <= 60 and rows(here / "time")[-1]["reached"] is None


@pytest.mark.slow
def test_two_processes_end_together(here):
    """--minutes by the real clock: what is chosen depends on it, but both processes must choose the same."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _, loss = until(here, ["--dropout", 0])
    for out, flags in (("a", ["--minutes", 0.1]), ("b", ["--steps", 40, "--until-loss", loss + 1e-3])):
        argv = [*command, ROOT / "train.py", *SMALL, "--dropout", 0, *flags, "--out", out]
        done = subprocess.run([str(arg) for arg in argv], cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert options.stored_config(here / "a").steps == rows(here / "a")[-1]["step"] > 0
    assert rows(here / "b")[-1]["step"] == 20 and rows(here / "b")[-1]["reached"]


# Spikes


def with_spike(monkeypatch, at: int) -> None:
    """A step with a loss that is a hundred times too high, once the window is full."""
    forward, calls = GPT.forward, []

    def spoil(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        if self.training:
            calls.append(1)
            loss = loss * 100 if len(calls) == at else loss
        return logits, loss

    monkeypatch.setattr(GPT, "forward", spoil)


def test_spike_is_skipped(here, monkeypatch):
    with_spike(monkeypatch, 140)
    assert call(*SMALL, "--steps", 150, "--spikes", "skip", "--spike-z", 20) == 0
    skipped = {row["step"]: row["skipped"] for row in rows(here / "runs/tiny") if row["skipped"] is not None}
    assert (skipped[135], skipped[140], skipped[150]) == (0, 1, 1)


def test_spike_ends_the_run(here, capsys, monkeypatch):
    with_spike(monkeypatch, 137)
    assert call(*SMALL, "--steps", 150, "--spikes", "stop", "--spike-z", 20) == 1
    err = capsys.readouterr().err
    assert "stands out from the steps before at step 137" in err and "--spikes skip skips such a step" in err
    assert "step-00000130 in runs/tiny is good" in err
    details = checkpoint.load(here / "runs/tiny", "failed").state["details"]
    (found,) = details["processes"]
    assert details["step"] == 137 and found["losses"][0] < 5 and found["gradients_not_finite"] == []


def test_float16_overflow_is_skipped_and_metrics_stay_json(here, monkeypatch):
    monkeypatch.setattr(model.training.step, "FIRST_SCALE", 2.0**40)
    assert call(*SMALL, "--dtype", "float16", "--steps", 30, "--log-every", 1) == 0
    found = [row for row in rows(here / "runs/tiny") if row["loss"] is not None]
    assert "Infinity" not in (here / "runs/tiny/metrics.jsonl").read_text()
    assert found[0]["grad_norm"] is None and found[0]["skipped"] == 1
    assert 5 < found[-1]["skipped"] < 30 and found[-1]["grad_norm"] > 0
    assert found[-1]["loss"] < found[0]["loss"]


# Extras


def test_profile_traces_three_steps(here, capsys):
    assert call(*SMALL, "--steps", 10, "--profile") == 0
    assert "trace of 3 steps: runs/tiny/trace.json.gz" in capsys.readouterr().out
    with gzip.open(here / "runs/tiny/trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name", "").startswith("ProfilerStep#") for event in events) == 3
    assert any("gelu" in event.get("name", "") for event in events)


@pytest.mark.slow
def test_tensorboard_gets_the_metrics(here):
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    code = f"""
import sys, warnings
warnings.simplefilter("ignore")
sys.argv = ["train.py", *{SMALL!r}, "--steps", "10", "--tensorboard", "--out", "run"]
import train
train.run_command(train.main, train.TrainConfig, prog="train.py", default=train.default_config)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator("run/tensorboard").Reload()
print("loss", [(e.step, round(e.value, 4)) for e in found.Scalars("loss")])
print("val", [e.step for e in found.Scalars("val_loss")])
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = [(row["step"], round(row["loss"], 4)) for row in rows(here / "run") if row["loss"]]
    assert f"loss {expected}" in done.stdout and "val [10]" in done.stdout


def test_missing_tensorboard_is_named(here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused(here, capsys, [*SMALL, "--steps", 1, "--tensorboard"], "needs the tensorboard package: pip install")


def test_batch_size_auto_keeps_sequences_per_step(here, capsys, monkeypatch):
    """tiny's 16 sequences, on a machine that has room for few."""
    flags = [x for x in SMALL if x not in ("--batch-size", "4")]
    assert call(*flags, "--batch-size", "auto", "--steps", 2, "--out", "a") == 0
    cfg = options.stored_config(here / "a")
    assert (cfg.batch_size, cfg.grad_accum) == (16, 1)
    monkeypatch.setattr(MemoryModel, "largest_batch", lambda self, limit: 7)
    assert call(*flags, "--batch-size", "auto", "--steps", 2, "--out", "b") == 0
    cfg = options.stored_config(here / "b")
    assert (cfg.batch_size, cfg.grad_accum) == (4, 4)
    assert call("--resume", "b", "--batch-size", "auto", "--steps", 3) == 0
    monkeypatch.setattr(MemoryModel, "largest_batch", lambda self, limit: 0)
    refused(
        here, capsys, [*flags, "--batch-size", "auto"], "do not fit into memory\nno smaller --batch-size should fit"
    )


def test_memory_is_predicted_before_the_first_step(here, capsys):
    assert call(*SMALL, "--steps", 1) == 0
    assert re.search(r"^memory: \d+ MiB predicted of [\d.]+ GiB: \d+ parameters", capsys.readouterr().out, re.M)


def test_step_beyond_memory_is_refused_before_it_starts(here, capsys, monkeypatch):
    """The message names a batch that fits; --force starts all the same."""
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**30 + 2**20)
    flags = [*SMALL, "--batch-size", 8192, "--context", 64]
    refused(
        here,
        capsys,
        flags,
        "of memory, and the machine has 1.0 GiB",
        "use --batch-size ",
        "it should fit",
        "(--force starts",
    )
    monkeypatch.setattr(memory, "device_bytes", lambda device: 2**20)
    assert call(*SMALL, "--steps", 1, "--force") == 0


def test_gpu_options_are_refused_on_a_cpu(here, capsys):
    refused(here, capsys, [*SMALL, "--graph", "on"], "--graph on needs a CUDA device")
    refused(here, capsys, [*SMALL, "--memory-snapshot"], "--memory-snapshot records a GPU's memory")
    refused(here, capsys, [*SMALL, "--dtype", "tf32"], "use --dtype float32")
    refused(here, capsys, [*SMALL, "--parallel", "fsdp"], "--parallel fsdp needs several processes")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel": "fsdp", "optimizer": "muon"}, "--optimizer muon works on whole matrices"),
        ({"parallel": "fsdp", "compile": True}, "--compile does not work with --parallel fsdp"),
        ({"graph": "on", "device": "cuda"}, "--graph on is for one process"),
        ({}, "torchrun --max-restarts needs --out or --resume"),
    ],
)
def test_options_refused_with_several_processes(changes, words, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    device = torch.device(changes.get("device", "cpu"))
    with pytest.raises(UserError, match=words):
        replace(preset("tiny"), **changes).check_machine(parallel.World(0, 2, 0, device))
    replace(preset("tiny"), out=Path("a")).check_machine(parallel.World(0, 2, 0, torch.device("cpu")))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(None, "float32"), ((6, 1), "float32"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_capability_decides_the_dtype(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu" if capability is None else "cuda")
    assert options.pick_dtype("auto", device) == expected
    assert options.pick_dtype("float32", device) == "float32"


# What cannot work is said in one or two lines, and leaves everything as it was


def refused(here: Path, capsys, argv: list, *words: str) -> None:
    before = snapshot(here)
    capsys.readouterr()
    assert call(*argv) == 2
    captured = capsys.readouterr()
    for text in words:
        assert text in captured.err
    assert captured.err.startswith("error: ") and captured.err.count("\n") <= 2 and "Traceback" not in captured.err
    after = snapshot(here)
    after.pop(here / "runs", None)
    assert after == before


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file or folder: book.txt"),
        (b"", "book.txt has no text"),
        (b"\x00\x01\x02" * 100, "not a text file"),
        (b"caf\xe9 " * 100, "not UTF-8"),
        (b"short", "too few for a context of 16"),
    ],
    ids=["missing", "empty", "binary", "latin-1", "too short"],
)
def test_unusable_data_is_refused(here, capsys, content, words):
    (here / "book.txt").unlink()
    if content is not None:
        (here / "book.txt").write_bytes(content)
    refused(here, capsys, SMALL, words)


def test_text_too_short_for_validation_is_refused(here, capsys):
    (here / "book.txt").write_text("abcdef")
    refused(here, capsys, [*SMALL, "--context", 4], "too few to evaluate on")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--preset tinny", "unknown preset 'tinny': choose one of shakespeare-char, tiny, gpt2-124M"),
        ("--tokenizer morse", "unknown tokenizer 'morse': choose char, gpt2, bpe:N, or the folder of a trained one"),
        ("--n-head 3", "n_head must divide n_embd, but 16 is not a multiple of 3"),
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--minutes -1", "--minutes must be 0 (off) or more, got -1.0"),
        ("--minutes nan", "--minutes must be 0 (off) or more, got nan"),
        ("--minutes inf", "--minutes must be 0 (off) or more, got inf"),
        ("--minutes 1 --steps 9", "--minutes sets the number of steps itself: give either --minutes or --steps"),
        ("--until-loss -0.5", "--until-loss must be 0 (off) or more, got -0.5"),
        ("--until-loss nan", "--until-loss must be 0 (off) or more, got nan"),
        ("--batch-size -4", "--batch-size must be at least 1, got -4"),
        ("--context 0", "--context must be at least 1, got 0"),
        ("--eval-every 0", "--eval-every must be at least 1, got 0"),
        ("--warmup-steps -1", "--warmup-steps must be 0 or more, got -1"),
        ("--lr 0", "--lr must be a number above 0, got 0.0"),
        ("--lr nan", "--lr must be a number above 0, got nan"),
        ("--lr inf", "--lr must be a number above 0, got inf"),
        ("--min-lr 0.1", "--min-lr must be from 0 to --lr, 0.01, got 0.1"),
        ("--dropout 1", "--dropout must be in [0, 1), got 1.0"),
        ("--beta1 1.0", "--beta1 must be in [0, 1), got 1.0"),
        ("--beta2 -0.1", "--beta2 must be in [0, 1), got -0.1"),
        ("--grad-clip -1", "--grad-clip must be 0 (off) or more, got -1.0"),
        ("--weight-decay nan", "--weight-decay must be 0 or more, got nan"),
        ("--checkpoint best", "--checkpoint must be omitted without --resume, got best"),
        ("--ema 1", "--ema must be in [0, 1), got 1.0"),
        ("--spike-z 0", "--spike-z must be a number above 0, got 0.0"),
        ("--cooldown-steps 5", "--cooldown-steps must be omitted without --schedule wsd"),
        ("--schedule wsd --cooldown-steps 9999", "--cooldown-steps must be from 0 to --steps, 3000"),
        ("--keep-last 0", "--keep-last must be at least 1"),
        ("--readers 0", "--num-workers must be at least 1"),
        ("--sample-tokens -1", "--sample-tokens must be 0 (none) or more"),
        ("--optimizer sgd", "--optimizer"),
        ("--batch-size some", "--batch-size"),
        ("--seed -1", "--seed must be from 0 to 2**63 - 1, got -1"),
        ("--steps many", "--steps"),
        ("--dtype float64", "--dtype"),
        ("--learning-rate 1", "unrecognized options: --learning-rate"),
        (f"--batch-size {10**15}", "GiB of memory, and the machine has"),
    ],
)
def test_invalid_options_are_refused(here, capsys, argv, words):
    refused(here, capsys, [*SMALL, *argv.split()], words)


def test_torch_errors_become_user_errors():
    def words():
        return torch_errors_as_user_errors(lambda: "it does not fit")

    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")):
        with pytest.raises(UserError, match="it does not fit"), words():
            raise error
    with pytest.raises(UserError, match=r"install one, or omit it"), words():
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")
    with pytest.raises(NotImplementedError), words():  # a RuntimeError too
        raise NotImplementedError


def test_missing_backend_or_device_is_refused(here, capsys, monkeypatch):
    monkeypatch.setattr(kernels._backend, "INTERPRET", False)
    refused(here, capsys, [*SMALL, "--backend", "triton"], "backend 'triton' was asked for, but")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(here, capsys, [*SMALL, "--device", "cuda"], "no CUDA device on this machine: use --device cpu")


def test_occupied_folder_is_refused(here, capsys):
    assert call(*SMALL, "--steps", 1, "--out", "run") == 0
    refused(
        here,
        capsys,
        [*SMALL, "--out", "run"],
        "run holds a run already: resume it with --resume run, or choose another",
    )
    (here / "letters").mkdir()
    (here / "letters/one.txt").write_text("dear")
    refused(here, capsys, [*SMALL, "--out", "letters"], "letters exists and is not an empty folder")
    refused(here, capsys, [*SMALL, "--out", "book.txt"], "book.txt exists")
    refused(here, capsys, [*SMALL, "--out", "book.txt/run"], "book.txt")
    (here / "empty").mkdir()
    refused(here, capsys, [*SMALL, "--out", "empty", "--data", "missing.txt"], "missing.txt")


def test_read_only_folder_is_refused(here, capsys, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(here, capsys, SMALL, "runs/tiny is on a read-only file system: choose a folder that can be written to")


def test_full_disk_keeps_the_last_checkpoint(here, capsys, monkeypatch):
    write = files.write_file

    def full(path, content, **options):
        if "step-00000020" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content, **options)

    monkeypatch.setattr(files, "write_file", full)
    assert call(*SMALL, "--steps", 30, "--out", "run") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the disk is full while writing run/checkpoints/") and err.count("\n") == 1
    assert [path.name for path in (here / "run/checkpoints").iterdir()] == ["step-00000010"]
    monkeypatch.setattr(files, "write_file", write)
    assert call("--resume", "run") == 0
    assert checkpoint.list_checkpoints(here / "run")[-1] == "step-00000030"


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_non_finite_values_never_reach_the_weights(here, capsys, monkeypatch, spoilt):
    """At step 13, noticed at step 20 when it is time to save: the weights are those after step 12."""
    models, calls = [], []
    forward = GPT.forward

    def spoil(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        if self.training:
            models.append(self)
            calls.append(idx)
            if len(calls) >= 13 and torch.equal(idx, calls[12]):
                if spoilt == "loss":
                    loss = loss * math.nan
                else:
                    self.transformer.ln_f.weight.register_hook(lambda grad: grad * math.inf)
        return logits, loss

    constant = [*SMALL, "--min-lr", "1e-2", "--warmup-steps", 0]  # so that the schedule does not depend on --steps
    assert call(*constant, "--steps", 12, "--out", "good") == 0
    monkeypatch.setattr(GPT, "forward", spoil)
    capsys.readouterr()
    assert call(*constant, "--steps", 30, "--out", "bad", "--log-every", 100) == 1
    err = capsys.readouterr().err
    assert "not finite at step 13" in err and "step-00000010 in bad is good" in err and err.count("\n") == 2
    assert checkpoint.list_checkpoints(here / "bad") == ["step-00000010"]
    good = load_file(here / "good/checkpoints/step-00000012/model.safetensors")
    assert len(calls) == 21 and torch.equal(calls[20], calls[12])  # looked at once more
    failed = checkpoint.load(here / "bad", "failed")
    assert failed.state["step"] == 12 and all(torch.equal(good[name], t) for name, t in failed.parts["model"].items())
    details = failed.state["details"]
    assert (details["step"], details["lr"]) == (13, 1e-2)
    (found,) = details["processes"]
    assert found["rows"] == [0, 4]
    assert (
        found["losses"] == ["nan"] if spoilt == "loss" else "transformer.ln_f.weight" in found["gradients_not_finite"]
    )
    assert "bad/failed/step-00000012" in err
    assert all(torch.equal(good[name], p) for name, p in models[-1].named_parameters())
    for row in rows(here / "bad"):
        assert all(value is None or math.isfinite(value) for value in row.values())


def test_failure_in_the_first_step_is_saved(here, capsys, monkeypatch):
    forward = GPT.forward

    def spoil(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        return logits, loss * math.nan if self.training else loss

    monkeypatch.setattr(GPT, "forward", spoil)
    assert call(*SMALL, "--steps", 5) == 1
    err = capsys.readouterr().err
    assert "not finite at step 1:" in err and "no checkpoint was saved yet" in err
    assert checkpoint.load(here / "runs/tiny", "failed").state["details"]["processes"][0]["losses"] == ["nan"]


def test_diverging_learning_rate_gives_advice(here, capsys):
    assert call(*SMALL, "--lr", "1e30", "--grad-clip", 0, "--warmup-steps", 0, "--steps", 40) == 1
    assert "not finite" in capsys.readouterr().err


def test_bpe_prompt_has_no_trailing_space(here, capsys):
    """A space alone is a token that stands before runs of spaces: the sample would be one."""
    assert call(*SMALL, "--tokenizer", "gpt2", "--steps", 1) == 0
    assert '--prompt "CHAPTER I."\n' in capsys.readouterr().out
    assert (here / "runs/tiny/sample.txt").read_text().startswith("CHAPTER I.")
