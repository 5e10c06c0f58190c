"""Runs of train.py in this process, on a small book, and what they leave."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from commands import exit_code

import train
from model import checkpoint
from model.training import summary
from model.training.options import ALIASES, TrainConfig

ROOT = Path(__file__).parents[1]
TEXT = "CHAPTER I. The cat sat on the mat, and the mat was flat. The dog sat by the log, and the log was long.\n" * 60
SMALL = shlex.split("""
    --preset tiny --device cpu --data book.txt --n-layer 1 --n-head 2 --n-embd 16 --context 16 --batch-size 4
    --dropout 0.1
    --lr 1e-2 --min-lr 1e-3 --warmup-steps 2 --eval-every 10 --eval-windows 12 --save-every 10 --log-every 5
    --sample-tokens 3
""")


def call(*argv) -> int:
    """The exit code of `python train.py ARGV`, in this process."""
    options = {"default": train.default_config, "aliases": ALIASES}
    return exit_code(train.main, TrainConfig, *argv, prog="train.py", **options)


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder, with a book in it; 40 characters are sample enough."""
    (folder / "book.txt").write_text(TEXT)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(summary, "SAMPLE_TOKENS", 40)


def made_once(tmp_path_factory: pytest.TempPathFactory, *argv) -> Path:
    """The run of SMALL and ARGV, for the tests of a module to copy."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as monkeypatch:
        settle(folder, monkeypatch)
        assert call(*SMALL, *argv, "--out", "run") == 0
    return folder / "run"


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


def straight_run(here: Path) -> Path:
    assert call(*SMALL, "--steps", 20, "--out", "straight") == 0
    return here / "straight"


def other_lr(monkeypatch, at: int, action) -> None:
    """Let `action` happen once, at the beginning of step `at`."""
    lr, done = TrainConfig.lr_at, []

    def patched(self, step):
        if step == at and not done:
            done.append(action())
        return lr(self, step)

    monkeypatch.setattr(TrainConfig, "lr_at", patched)


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
