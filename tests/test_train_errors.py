"""What train.py refuses, in one or two lines and with everything left as it was; what ends a run."""

from __future__ import annotations

import errno
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainer import SMALL, call, refused, rows

import kernels._backend
from model import checkpoint, files
from model.cli import UserError
from model.gpt import GPT
from model.training.failure import torch_errors_as_user_errors
from model.training.options import TrainConfig


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
        ("--preset tinny", "unknown preset 'tinny': choose one of first-run, shakespeare-char, tiny, gpt2-124M"),
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


def test_restart_resumes_from_the_last_checkpoint(here, monkeypatch):
    """Not from the one that its first attempt was told to resume from; that has removed those after it."""
    lr, left, seen = TrainConfig.lr_at, [22, 32], []

    def lr_at(self, step):
        seen.append(step)
        if step in left:
            left.remove(step)
            raise ZeroDivisionError
        return lr(self, step)

    assert call(*SMALL, "--steps", 30) == 0
    monkeypatch.setattr(TrainConfig, "lr_at", lr_at)
    resume = ("--resume", "runs/tiny", "--checkpoint", "step-00000020", "--steps", 40)
    with pytest.raises(ZeroDivisionError):
        call(*resume)
    assert checkpoint.list_checkpoints(here / "runs/tiny") == ["step-00000020"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(ZeroDivisionError):
        call(*resume)
    seen.clear()
    assert call(*resume) == 0 and seen[0] == 31


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


def test_failure_is_saved_where_the_diagnosis_fails(here, capsys, monkeypatch):
    forward = GPT.forward

    def spoil(self, idx, targets=None, **options):
        if torch.is_grad_enabled() and any(module._forward_hooks for module in self.modules()):
            raise torch.OutOfMemoryError("CUDA out of memory\nTried to allocate")  # it is looked at once more
        logits, loss = forward(self, idx, targets, **options)
        return logits, loss * math.nan if self.training else loss

    monkeypatch.setattr(GPT, "forward", spoil)
    assert call(*SMALL, "--steps", 5) == 1
    assert "not finite at step 1:" in capsys.readouterr().err
    (found,) = checkpoint.load(here / "runs/tiny", "failed").state["details"]["processes"]
    assert found == {"rows": [0, 4], "diagnosis": "failed: CUDA out of memory"}
    assert call("--resume", "runs/tiny", "--checkpoint", "failed") == 2
    assert "--checkpoint failed is the state before a step that went wrong" in capsys.readouterr().err


def test_diverging_learning_rate_gives_advice(here, capsys):
    assert call(*SMALL, "--lr", "1e30", "--grad-clip", 0, "--warmup-steps", 0, "--steps", 40) == 1
    assert "not finite" in capsys.readouterr().err
