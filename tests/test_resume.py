"""Runs that are stopped, killed or locked, and what resumes them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from trainer import ROOT, SMALL, call, losses, made_once, other_lr, refused, rows, snapshot, state, straight_run

import train
from model import checkpoint, data
from model.training import options, run_folder, summary
from model.training.options import TrainConfig

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


def test_resume_after_kill_9_is_bitwise_equal(here, capsys):
    command = [sys.executable, "-c", KILLED, *map(str, SMALL), "--steps", "20", "--out", "killed"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert checkpoint.list_checkpoints(here / "killed") == ["step-00000010"]
    assert [row["step"] for row in rows(here / "killed")] == [1, 5, 10, 10, 15]
    assert call("--resume", "killed") == 0
    assert capsys.readouterr().err == ""

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


@pytest.fixture(scope="module")
def ten_steps(tmp_path_factory):
    return made_once(tmp_path_factory, "--steps", 10)


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
def test_resume_refuses_options_that_cannot_change(ten_steps, here, capsys, argv, words):
    shutil.copytree(ten_steps, here / "run")
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
        pytest.param(
            ["--backend", "triton", "--eval-windows", 4],
            marks=[pytest.mark.interpreted, pytest.mark.slow, pytest.mark.timeout(1800)],
        ),
    ],
    ids=lambda flags: flags[1],
)
def test_resume_is_bitwise_equal_for_all_options(here, monkeypatch, flags):
    steps, stop = (4, 3) if "triton" in flags else (16, 11)
    if "triton" in flags:
        monkeypatch.setattr(summary, "SAMPLE_TOKENS", 4)
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
    assert call(*SMALL, "--data", "first/data", "--steps", 10, "--out", "run") == 0
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
