"""The trainer from the outside: options in, folder and words out."""

from __future__ import annotations

import errno
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

import pytest
import torch
from safetensors.torch import load_file

import kernels._dispatch
import train
from model import checkpoint, config, data
from model.cli import UserError, run
from model.generate import generate
from model.gpt import GPT
from model.optim import adamw
from train import PRESETS, TrainConfig

ROOT = Path(__file__).parents[1]
TEXT = "CHAPTER I. The cat sat on the mat, and the mat was flat. The dog sat by the log, and the log was long.\n" * 60
SMALL = shlex.split("""
    --device cpu --data book.txt --n-layer 1 --n-head 2 --n-embd 16 --context 16 --batch-size 4 --dropout 0.1
    --lr 1e-2 --min-lr 1e-3 --warmup-steps 2 --eval-every 10 --eval-batches 3 --save-every 10 --log-every 5
""")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a book in it; 40 characters are sample enough."""
    (tmp_path / "book.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "SAMPLE_TOKENS", 40)
    return tmp_path


def call(*argv) -> int:
    """The exit code of `python train.py ARGV`, in this process."""
    try:
        run(train.main, TrainConfig, prog="train.py", default=train.default_config, argv=[str(arg) for arg in argv])
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
    """Every bit that a run goes on from."""
    saved = checkpoint.load(folder, f"step-{step:08d}")
    tensors = {name: t.numpy().tobytes() for name, t in {**saved.model, **saved.optimizer}.items()}
    return {**tensors, "rng": saved.state["rng"], "val_loss": saved.state["val_loss"]}


def snapshot(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


# A run


def test_a_run_learns_and_leaves_everything_in_its_folder(here, capsys):
    assert call(*SMALL, "--steps", 40) == 0
    folder = here / "runs/tiny"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "tokenizer", "data", "metrics.jsonl", "checkpoints", "sample.txt"
    }  # fmt: skip

    training = [row for row in rows(folder) if row["loss"] is not None]
    validation = [row for row in rows(folder) if row["val_loss"] is not None]
    assert [row["step"] for row in training] == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [row["step"] for row in validation] == [10, 20, 30, 40]
    assert training[0]["loss"] == pytest.approx(math.log(26), abs=0.3)  # the alphabet's size, nothing learnt yet
    assert training[-1]["loss"] < 2.5 and validation[-1]["val_loss"] < 2.5
    keys = {"step", "tokens", "loss", "val_loss", "lr", "grad_norm", "step_ms", "tok_per_s", "elapsed_s"}
    for row in rows(folder):
        assert set(row) == keys and row["tokens"] == row["step"] * 4 * 16
    for row in training:
        assert row["step_ms"] > 0 and row["tok_per_s"] == pytest.approx(64e3 / row["step_ms"])

    best = checkpoint.load(folder, "best").state
    assert best["val_loss"] == min(row["val_loss"] for row in validation) == best["best_val_loss"]
    sample = (folder / "sample.txt").read_text()
    assert sample.startswith("CHAPTER I. ") and len(sample) == len("CHAPTER I. ") + 40 + 1

    out = capsys.readouterr().out
    assert "step 00005/00040 | loss " in out and " tok/s | eta 0:0" in out and "mfu" not in out
    assert "step 00040/00040 | validation loss" in out
    assert sample.strip() in out
    loss = best["val_loss"]
    assert f"validation loss {loss:.4f} | perplexity {math.exp(loss):.2f} | {loss / math.log(2):.3f} bits" in out
    assert out.endswith('more text: python -m model.generate runs/tiny --prompt "CHAPTER I. "\n')


def test_lines_with_and_without_a_terminal(here, monkeypatch):
    """A known GPU would add its MFU; times are left out of the comparison."""
    lines = []
    monkeypatch.setattr(train.LiveLine, "update", lambda self, text: lines.append(text))
    monkeypatch.setattr(train, "peak_flops", lambda device, dtype: 1e9)
    assert call(*SMALL, "--steps", 15, "--out", "a") == 0
    number = r"[\d.,]+"
    pattern = (
        rf"step 00015/00015 \| loss {number} \| lr 1.1e-03 \| {number} ms \| {number} tok/s \| mfu {number} \| eta 0:00"
    )
    assert re.fullmatch(pattern, lines[-1])
    monkeypatch.setattr(train.LiveLine, "__enter__", lambda self: setattr(self, "is_live", True))
    assert call(*SMALL, "--steps", 15, "--out", "b") == 0
    start = (
        rf"step 00015/00015 \| loss {number} \| val {number} \| elapsed 0:0\d \| eta 0:00 \| lr 1.1e-03 \| {number} ms"
    )
    assert re.match(start, lines[-1])
    assert " val " not in lines[4]  # nothing is measured before step 10


def test_the_clock():
    assert [train._clock(s) for s in (0, 9.6, 61, 3599, 3600, 90061)] == [
        "0:00", "0:10", "1:01", "59:59", "1:00:00", "25:01:01"
    ]  # fmt: skip


def test_config_json_holds_every_option_and_the_model(here):
    assert call(*SMALL, "--steps", 2, "--seed", 7) == 0
    stored = json.loads((here / "runs/tiny/config.json").read_text())
    assert stored["model"]["vocab_size"] == len(set(TEXT)) + 1
    assert stored["train"]["seed"] == 7 and stored["train"]["dtype"] == "float32"
    assert train.stored_config(here / "runs/tiny") == replace(
        PRESETS["tiny"], data=Path("book.txt"), n_layer=1, n_head=2, n_embd=16, context=16, batch_size=4, dropout=0.1,
        lr=1e-2, min_lr=1e-3, warmup_steps=2, eval_every=10, eval_batches=3, save_every=10, log_every=5, steps=2,
        seed=7, device="cpu", dtype="float32",
    )  # fmt: skip


def test_the_same_seed_gives_the_same_run_and_another_one_another(here):
    for out, seed in [("a", 1), ("b", 1), ("c", 2)]:
        assert call(*SMALL, "--steps", 12, "--out", out, "--seed", seed) == 0
    assert losses(here / "a") == losses(here / "b") != losses(here / "c")
    assert state(here / "a", 12) == state(here / "b", 12)


def test_how_often_one_looks_changes_nothing(here):
    assert call(*SMALL, "--steps", 12, "--out", "a") == 0
    assert call(*SMALL, "--steps", 12, "--out", "b", "--eval-every", 1, "--log-every", 1, "--save-every", 1) == 0
    assert state(here / "a", 12) == state(here / "b", 12)


def test_accumulated_micro_steps_equal_the_large_batch(here):
    """One step of 3 x 4 sequences against clipping and AdamW on all 12 at once."""
    flags = ["--dropout", 0, "--warmup-steps", 0, "--steps", 1, "--seed", 5]
    assert call(*SMALL, *flags, "--batch-size", 4, "--grad-accum", 3) == 0
    tokens = data.load(here / "runs/tiny/data")
    batches = [data.get_batch(tokens.train, context=16, batch_size=4, seed=5, step=step) for step in range(3)]
    idx, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert len(idx.unique(dim=0)) == 12  # three different batches

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
        torch.testing.assert_close(saved.optimizer[f"exp_avg/{name}"], expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("clip", "expected"), [("0.01", 0.01), ("0", None)])
def test_the_gradient_is_clipped_and_its_own_norm_is_logged(here, clip, expected):
    assert call(*SMALL, "--steps", 1, "--grad-clip", clip) == 0
    norm = rows(here / "runs/tiny")[0]["grad_norm"]
    moments = checkpoint.load(here / "runs/tiny").optimizer
    clipped = math.sqrt(sum(t.double().square().sum().item() for k, t in moments.items() if k.startswith("exp_avg/")))
    assert norm > 0.1
    assert clipped / 0.1 == pytest.approx(expected or norm, rel=1e-3)  # exp_avg = (1 - beta1) * gradient


def test_the_best_weights_are_saved_and_write_the_sample_and_the_report(here, capsys, monkeypatch):
    rates = iter([1e-2] * 10 + [3.0] * 10)  # ten good steps, then ten that spoil the weights
    monkeypatch.setattr(train, "lr_at", lambda step, **schedule: next(rates))
    assert call(*SMALL, "--steps", 20, "--save-every", 1000) == 0
    validation = {row["step"]: row["val_loss"] for row in rows(here / "runs/tiny") if row["val_loss"]}
    assert validation[10] < validation[20]
    assert checkpoint.names(here / "runs/tiny") == ["step-00000010", "step-00000020"]
    out = capsys.readouterr().out
    assert f"the best, of step 10, wrote the text above\nvalidation loss {validation[10]:.4f}" in out
    model, tokenizer = checkpoint.load_model(here / "runs/tiny", which="step-00000010")
    ids = generate(
        model, tokenizer.encode("CHAPTER I. "), tokens=40, temperature=train.SAMPLE_TEMPERATURE, top_k=40, seed=1337
    )
    assert (here / "runs/tiny/sample.txt").read_text() == "CHAPTER I. " + tokenizer.decode(list(ids)) + "\n"


def test_a_text_without_the_letters_of_the_prompt_still_gets_a_sample(here, capsys):
    (here / "book.txt").write_text("0123456789 " * 100)
    assert call(*SMALL, "--steps", 2) == 0
    assert len((here / "runs/tiny/sample.txt").read_text().strip()) > 10
    assert 'model.generate runs/tiny --prompt ""' in capsys.readouterr().out


# Options


def test_nanogpts_cpu_example_can_be_said(monkeypatch):
    flags = (
        "--preset tiny --n-layer 4 --n-head 4 --n-embd 128 --context 64 --batch-size 12 --steps 2000 --dropout 0 "
        "--lr 1e-3 --min-lr 1e-4 --warmup-steps 100 --beta2 0.99"
    )
    seen = []
    run(seen.append, TrainConfig, prog="train.py", default=train.default_config, argv=flags.split())
    wanted = dict(
        tokenizer="char", n_layer=4, n_head=4, n_embd=128, context=64, batch_size=12, grad_accum=1, steps=2000,
        dropout=0.0, lr=1e-3, min_lr=1e-4, warmup_steps=100, beta1=0.9, beta2=0.99, weight_decay=0.1, grad_clip=1.0,
    )  # fmt: skip
    assert {name: getattr(seen[0], name) for name in wanted} == wanted


def test_the_char_preset_is_nanogpts_gpu_example():
    cfg = PRESETS["char"]
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


@pytest.mark.parametrize("name", config.PRESETS)
def test_there_is_a_training_preset_for_every_model(name):
    cfg = PRESETS[name]
    assert cfg.preset == name and cfg.tokenizer == ("gpt2" if name.startswith("gpt2") else "char")
    train.check(cfg)
    if cfg.tokenizer == "gpt2":
        assert train.gpt_config(cfg, 50257) == config.PRESETS[name]
        assert cfg.batch_size * cfg.grad_accum * cfg.context == 2**19


@pytest.mark.parametrize(
    ("argv", "has_gpu", "expected"),
    [
        ([], False, PRESETS["tiny"]),
        ([], True, train.FIRST_GPU_RUN),
        (["--device", "cpu"], True, PRESETS["tiny"]),
        (["--preset", "char"], True, PRESETS["char"]),
        (["--preset=gpt2-xl"], False, PRESETS["gpt2-xl"]),
    ],
)
def test_defaults_come_from_the_preset_or_the_machine(argv, has_gpu, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert train.default_config(argv) == expected


def test_the_command_line_goes_before_the_preset(monkeypatch):
    seen = []
    argv = ["--lr", "5e-4", "--preset", "char"]
    run(seen.append, TrainConfig, prog="train.py", default=train.default_config, argv=argv)
    assert seen == [replace(PRESETS["char"], lr=5e-4)]


# Where a run goes


def test_a_second_run_takes_the_next_free_folder(here):
    for _ in range(3):
        assert call(*SMALL, "--steps", 1) == 0
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["tiny", "tiny-2", "tiny-3"]


def test_an_empty_folder_may_be_named(here):
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
torch.set_num_threads(1)
def kill_in_step_16(step, lr_at=train.lr_at, **schedule):
    if step == 15:
        os.kill(os.getpid(), signal.SIGKILL)
    return lr_at(step, **schedule)
if "--resume" not in sys.argv:
    train.lr_at = kill_in_step_16
train.SAMPLE_TOKENS = 40
run(train.main, train.TrainConfig, prog="train.py", default=train.default_config)
"""


def test_kill_9_and_resume_equal_a_run_that_was_never_stopped(here):
    def process(*argv):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", KILLED, *map(str, argv)]
        return subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)

    died = process(*SMALL, "--steps", 20, "--out", "killed")
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert checkpoint.names(here / "killed") == ["step-00000010"]
    assert [row["step"] for row in rows(here / "killed")] == [1, 5, 10, 10, 15]
    resumed = process("--resume", "killed")
    assert (resumed.returncode, resumed.stderr) == (0, "")

    straight = straight_run(here)
    assert state(here / "killed", 20) == state(straight, 20)
    assert losses(here / "killed") == losses(straight)
    assert (here / "killed/sample.txt").read_text() == (straight / "sample.txt").read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "term"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(here, capsys, monkeypatch, number, code):
    lr_at = train.lr_at

    def signal_in_step_8(step, **schedule):
        if step == 7:
            os.kill(os.getpid(), number)
        return lr_at(step, **schedule)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(train, "lr_at", signal_in_step_8)
        assert call(*SMALL, "--steps", 20) == code
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert checkpoint.names(here / "runs/tiny") == ["step-00000008"]
    captured = capsys.readouterr()
    assert captured.out.endswith("stopped and saved at step 8; to go on: python train.py --resume runs/tiny\n")
    assert captured.err == ""

    assert call("--resume", "runs/tiny") == 0
    assert state(here / "runs/tiny", 20) == state(straight_run(here), 20)


def test_a_second_ctrl_c_ends_at_once(here, capsys, monkeypatch):
    def two_signals(step, **schedule):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return 0.01

    monkeypatch.setattr(train, "lr_at", two_signals)
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits SIG_IGN
    try:
        assert call(*SMALL, "--steps", 20) == 130
    finally:
        signal.signal(signal.SIGINT, outer)
    assert capsys.readouterr().err == "error: interrupted\n"
    assert not (here / "runs/tiny").exists()  # nothing was saved, so there is nothing to go on from


def test_ctrl_c_while_the_text_is_read_leaves_nothing(here, capsys, monkeypatch):
    def interrupted(*args, **kwargs):
        (here / "runs/tiny/data").mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "prepare", interrupted)
    assert call(*SMALL) == 130
    assert not (here / "runs/tiny").exists()


def test_a_row_that_a_crash_has_cut_is_dropped(here):
    assert call(*SMALL, "--steps", 10, "--out", "a") == 0
    with (here / "a/metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert call("--resume", "a", "--steps", 12) == 0
    assert [row["step"] for row in rows(here / "a")] == [1, 5, 10, 10, 12, 12]


def test_a_finished_run_says_so_and_takes_more_steps(here, capsys):
    assert call(*SMALL, "--steps", 10) == 0
    before = snapshot(here)
    capsys.readouterr()
    assert call("--resume", "runs/tiny") == 0
    assert snapshot(here) == before
    assert capsys.readouterr().out == (
        "runs/tiny is finished, all 10 steps of it; for more: python train.py --resume runs/tiny --steps 20\n"
    )
    assert call("--resume", "runs/tiny", "--steps", 12, "--log-every", 1) == 0
    assert [row["step"] for row in rows(here / "runs/tiny")] == [1, 5, 10, 10, 11, 12, 12]
    assert train.stored_config(here / "runs/tiny").steps == 12  # a third session goes on from there


def test_resume_can_go_back_to_an_earlier_checkpoint(here):
    assert call(*SMALL, "--steps", 20) == 0
    assert call("--resume", "runs/tiny", "--which", "step-00000010", "--steps", 15) == 0
    assert checkpoint.names(here / "runs/tiny") == ["step-00000010", "step-00000015"]
    assert [row["step"] for row in rows(here / "runs/tiny")] == [1, 5, 10, 10, 15, 15]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lr", 0.5], "--lr 0.5 cannot be changed when a run goes on (in RUN it is 0.01)"),
        (["--data", "other.txt"], "--data other.txt cannot be changed"),
        (["--out", "elsewhere"], "--out elsewhere cannot be changed"),
        (["--preset", "gpt2"], "--preset gpt2 cannot be changed"),
        (["--n-embd", 32], "--n-embd 32 cannot be changed"),
        (["--dtype", "bfloat16"], "--dtype bfloat16 cannot be changed"),
        (["--steps", 5], "--steps 5 is less than the 10 steps that RUN has done"),
        (["--log-every", 0], "--log-every must be at least 1"),
        (["--which", "step-00000003"], "has no checkpoint 'step-00000003'"),
    ],
)
def test_resume_refuses_by_name_what_cannot_work(here, capsys, argv, words):
    assert call(*SMALL, "--steps", 10, "--out", "run") == 0
    refused(here, capsys, ["--resume", "run", *argv], words.replace("RUN", "run"))


def test_resume_refuses_a_folder_that_is_no_run(here, capsys):
    refused(here, capsys, ["--resume", "nowhere"], "nowhere holds no run")
    refused(here, capsys, ["--resume", "book.txt"], "book.txt holds no run")
    (here / "run").mkdir()
    (here / "run/config.json").write_text("{}")
    refused(here, capsys, ["--resume", "run"], "run/config.json is damaged")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_works(here, capsys):
    assert call(*SMALL, "--steps", 20, "--out", "run") == 0
    path = here / "run/checkpoints/step-00000020/optimizer.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    refused(
        here, capsys, ["--resume", "run", "--steps", 30], "optimizer.safetensors is damaged", "--which step-00000010"
    )
    path.write_bytes(damaged[:-7])
    refused(here, capsys, ["--resume", "run", "--steps", 30], "optimizer.safetensors is damaged")
    assert call("--resume", "run", "--steps", 30, "--which", "step-00000010") == 0


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
def test_data_that_cannot_be_learnt_from(here, capsys, content, words):
    (here / "book.txt").unlink()
    if content is not None:
        (here / "book.txt").write_bytes(content)
    refused(here, capsys, SMALL, words)


def test_a_text_with_nothing_left_for_validation(here, capsys):
    (here / "book.txt").write_text("abcdef")
    refused(here, capsys, [*SMALL, "--context", 4], "too few to evaluate on")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--preset tinny", "unknown preset 'tinny': choose one of tiny, char, gpt2, gpt2-medium"),
        ("--tokenizer morse", "unknown tokenizer 'morse': choose one of char, gpt2"),
        ("--n-head 3", "n_head must divide n_embd, but 16 is not a multiple of 3"),
        ("--steps 0", "--steps must be at least 1, got 0"),
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
        ("--which best", "--which must be left out where there is no --resume, got best"),
        ("--seed -1", "--seed must be from 0 to 2**63 - 1, got -1"),
        ("--steps many", "--steps"),
        ("--dtype float64", "--dtype"),
        ("--learning-rate 1", "unrecognized options: --learning-rate"),
        (f"--batch-size {10**15}", "do not fit into memory\nlower --batch-size"),
    ],
)
def test_options_that_cannot_work(here, capsys, argv, words):
    refused(here, capsys, [*SMALL, *argv.split()], words)


def test_torch_errors_that_a_user_can_mend_are_put_in_words():
    with pytest.raises(UserError, match="do not fit into memory"), train.torch_errors_in_words():
        torch.empty(10**15)
    with pytest.raises(UserError, match="do not fit into memory"), train.torch_errors_in_words():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match=r"install one, or leave it out"), train.torch_errors_in_words():
        raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")
    with pytest.raises(NotImplementedError), train.torch_errors_in_words():  # a RuntimeError too
        raise NotImplementedError


def test_a_backend_or_device_that_is_not_there(here, capsys, monkeypatch):
    monkeypatch.setattr(kernels._dispatch, "INTERPRET", False)
    refused(here, capsys, [*SMALL, "--backend", "triton"], "backend 'triton' was asked for, but")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(here, capsys, [*SMALL, "--device", "cuda"], "no CUDA device on this machine: use --device cpu")


def test_a_folder_that_is_taken(here, capsys):
    assert call(*SMALL, "--steps", 1, "--out", "run") == 0
    refused(
        here, capsys, [*SMALL, "--out", "run"], "run holds a run already: go on with --resume run, or choose another"
    )
    (here / "letters").mkdir()
    (here / "letters/one.txt").write_text("dear")
    refused(here, capsys, [*SMALL, "--out", "letters"], "letters is there already and is not an empty folder")
    refused(here, capsys, [*SMALL, "--out", "book.txt"], "book.txt is there already")
    refused(here, capsys, [*SMALL, "--out", "book.txt/run"], "book.txt")
    (here / "empty").mkdir()
    refused(here, capsys, [*SMALL, "--out", "empty", "--data", "missing.txt"], "missing.txt")


def test_a_folder_that_cannot_be_written_to(here, capsys, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    refused(here, capsys, SMALL, "runs/tiny is on a read-only file system: choose a folder that can be written to")


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(here, capsys, monkeypatch):
    write = checkpoint._write

    def full(path, content):
        if "step-00000020" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    assert call(*SMALL, "--steps", 30, "--out", "run") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: the disk is full while writing run/checkpoints/") and err.count("\n") == 1
    assert [path.name for path in (here / "run/checkpoints").iterdir()] == ["step-00000010"]
    monkeypatch.setattr(checkpoint, "_write", write)
    assert call("--resume", "run") == 0
    assert checkpoint.names(here / "run")[-1] == "step-00000030"


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_what_is_not_finite_never_reaches_the_weights(here, capsys, monkeypatch, spoilt):
    """At step 13, noticed at step 20 when it is time to save: the weights are those after step 12."""
    models, calls = [], []
    forward = GPT.forward

    def spoil(self, idx, targets=None, **options):
        logits, loss = forward(self, idx, targets, **options)
        if self.training:
            models.append(self)
            calls.append(idx)
            if len(calls) == 13:
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
    assert checkpoint.names(here / "bad") == ["step-00000010"]
    assert len(calls) == 20
    good = load_file(here / "good/checkpoints/step-00000012/model.safetensors")
    assert all(torch.equal(good[name], p) for name, p in models[-1].named_parameters())
    for row in rows(here / "bad"):
        assert all(value is None or math.isfinite(value) for value in row.values())


def test_a_learning_rate_that_is_far_too_high_ends_in_words(here, capsys):
    assert call(*SMALL, "--lr", "1e30", "--grad-clip", 0, "--warmup-steps", 0, "--steps", 40) == 1
    assert "not finite" in capsys.readouterr().err


def test_byte_pairs_are_prompted_without_a_space_at_the_end(here, capsys):
    """A space alone is a token that stands before runs of spaces: the sample would be one."""
    assert call(*SMALL, "--tokenizer", "gpt2", "--steps", 1) == 0
    assert '--prompt "CHAPTER I."\n' in capsys.readouterr().out
    assert (here / "runs/tiny/sample.txt").read_text().startswith("CHAPTER I.")
