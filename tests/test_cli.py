"""What every command shares: options into a dataclass, errors as messages, the live line."""

from __future__ import annotations

import errno
import io
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import tyro

import kernels
from model.cli import LiveLine, UserError, explain, pick_device, run

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Config:
    """Bake bread."""

    flour_g: int = 500  # grams of flour
    heat: float = 230.0  # degrees Celsius
    grain: Literal["rye", "wheat"] = "rye"  # kind of flour
    salt: bool = True  # add salt


@dataclass(frozen=True)
class WithFolder:
    folder: tyro.conf.Positional[Path]  # where to write
    n: int = 1  # how many


def call(main, *argv, config=Config, **options) -> int:
    """The exit code of one call."""
    try:
        run(main, config, prog="bake", argv=argv, **options)
    except SystemExit as exit_:
        return exit_.code
    return 0


def raising(error):
    def main(config):
        raise error

    return main


@pytest.mark.parametrize(
    ("default", "expected"),
    [
        (None, Config(flour_g=700)),
        (Config(heat=180.0), Config(flour_g=700, heat=180.0)),
        (lambda args: Config(heat=float(len(args))), Config(flour_g=700, heat=2.0)),
    ],
    ids=["dataclass", "instance", "function"],
)
def test_options_go_before_defaults(default, expected):
    seen = []
    assert call(seen.append, "--flour-g", "700", default=default) == 0
    assert seen == [expected]


@pytest.mark.parametrize("argv", [["--powder", "700"], ["--powder=700"], ["--flour-g", "700"]])
def test_old_option_names_are_hidden_aliases(argv, capsys):
    seen, options = [], {"aliases": {"--powder": "--flour-g"}, "default": lambda args: Config(heat=float(len(args)))}
    assert call(seen.append, *argv, **options) == 0
    assert seen == [Config(flour_g=700, heat=float(len(argv)))]
    assert call(seen.append, "--salt", "--powder=much", **options) == 2
    assert "--flour-g: invalid literal" in capsys.readouterr().err
    assert call(print, "--help", **options) == 0
    assert "powder" not in capsys.readouterr().out


def test_help_names_options_units_and_defaults(capsys):
    assert call(print, "--help", default=Config(heat=180.0)) == 0
    captured = capsys.readouterr()
    for words in ("Bake bread.", "--flour-g INT", "grams of flour", "180.0", "{rye,wheat}", "--no-salt"):
        assert words in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])  # tyro frames its reports differently on the two
@pytest.mark.parametrize(
    ("config", "argv", "words"),
    [
        (Config, ["--flour-g", "much"], "--flour-g: invalid literal for int() with base 10: 'much'"),
        (Config, ["--flour", "5"], "unrecognized options: --flour, 5 (did you mean --flour-g?)"),
        (Config, ["--zzzzzzzz"], "unrecognized options: --zzzzzzzz"),
        (Config, ["--heat"], "missing value for argument '--heat'"),
        (Config, ["--grain", "oat"], "invalid choice 'oat' for argument '--grain'. Expected one of ('rye', 'wheat')"),
        (Config, ["loaf"], "unrecognized options: loaf"),
        (WithFolder, [], "missing from bake: PATH where to write"),
        (Config, ["--" + "y" * 5000], "..."),
    ],
    ids=["bad value", "near miss", "unknown", "no value", "choice", "stray", "missing", "long"],
)
def test_parse_errors_are_two_plain_lines(config, argv, words, encoding, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert call(print, *argv, config=config) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ") and second == "see `bake --help`"
    assert words.lower() in first.lower() and len(first) < 330
    assert not set("╭│╰─\x1b") & set(first)


def test_user_error_is_its_message_and_exit_code_2(capsys):
    assert call(raising(UserError("the oven is cold\nheat it"))) == 2
    assert capsys.readouterr().err == "error: the oven is cold\nheat it\n"


def test_a_user_error_may_have_its_own_exit_code(capsys):
    class Burnt(UserError):
        exit_code = 1

    assert call(raising(Burnt("burnt"))) == 1
    assert call(print, default=lambda args: raising(UserError("no such preset"))(args)) == 2
    assert "no such preset" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "out/a.bin"), "the disk is full while writing out/a.bin"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full while writing a file"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.bin"), "the disk is full while writing a.bin"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), "no permission for /etc/x"),
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), "/ro/x is on a read-only file system"),
        (
            FileNotFoundError(errno.ENOENT, "No such file or directory", "bread.txt"),
            "no such file or folder: bread.txt",
        ),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a.txt/b"), "a.txt/b: Not a directory"),
    ],
)
def test_errors_about_files_are_one_line(error, words, capsys):
    assert call(raising(error)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {words}") and err.count("\n") == 1


@dataclass(frozen=True)
class WithBatches:
    batch_size: int = 4  # loaves in the oven at a time
    device: str = "auto"  # oven


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "config", "words"),
    [
        (lambda: torch.empty(1 << 60), WithBatches, "use a smaller --batch-size"),
        (lambda: np.empty(1 << 58), WithBatches, "use a smaller --batch-size"),
        (lambda: raising(CUDA)(None), WithBatches, "use a smaller --batch-size or --device cpu"),
        (lambda: raising(MemoryError())(None), Config, "a machine with more is needed"),
        (lambda: raising(CUDA)(None), Config, "a machine with more is needed"),
    ],
    ids=["torch", "numpy", "cuda", "python, no options", "cuda, no options"],
)
def test_too_little_memory_is_one_line(error, config, words, capsys):
    assert call(lambda cfg: error(), config=config) == 2
    assert capsys.readouterr().err == f"error: not enough memory: {words}\n"


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), RuntimeError("a bug"), OSError("a bug"), OSError(errno.EINVAL, "a bug")]
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="a bug"):
        run(raising(error), Config, prog="bake", argv=[])


def test_explain_knows_a_real_error(tmp_path):
    with pytest.raises(OSError) as caught:
        (tmp_path / "missing").read_text()
    assert explain(caught.value) == f"no such file or folder: {tmp_path / 'missing'}"


def test_interrupt_is_exit_code_130(capsys):
    assert call(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


SCRIPT = """
import sys
from dataclasses import dataclass
from model.cli import run
@dataclass(frozen=True)
class Config:
    n: int = 1
run(lambda config: [print("\\u2014" * 70) for _ in range(config.n)], Config, prog="x")
"""


@pytest.mark.parametrize("n", ["20000", "1"], ids=["in the middle", "at the end"])
def test_broken_pipe_exits_quietly(n):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-c", SCRIPT, "--n", n]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 141


def test_what_the_terminal_cannot_show_is_replaced():
    env = {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"?" * 70 + b"\n", b"")


def test_pick_device(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "gpu_problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [pick_device(name) for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [pick_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(UserError, match="no CUDA device on this machine: use --device cpu"):
        pick_device("cuda")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("available", [False, True])  # True: torch sees it, and has no code for it
def test_gpu_that_torch_cannot_use_is_passed_over_with_a_word(available, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "gpu_problem", lambda: "its driver is too old")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto") == "cpu"
    assert capsys.readouterr().err == "note: this machine's NVIDIA GPU is not used: its driver is too old\n"
    assert pick_device("cpu") == "cpu" and capsys.readouterr().err == ""
    with pytest.raises(UserError, match="its driver is too old; or use --device cpu"):
        pick_device("cuda")


def test_without_a_terminal_every_update_is_a_line(capsys):
    with LiveLine() as line:
        line.update("step 1")
        line.print("[bold]validation[/bold] 3")
        line.update("step 2 " + "x" * 300)
    assert not line.is_live
    assert capsys.readouterr().out == f"step 1\n[bold]validation[/bold] 3\nstep 2 {'x' * 300}\n"


def test_updates_take_one_line_of_a_terminal(monkeypatch):
    terminal(monkeypatch, columns=40)
    with LiveLine() as line:
        assert line.is_live
        line.update("step 1 " + "x" * 300)
        assert screen(sys.stdout.getvalue()) == ["step 1 " + "x" * 32 + "\u2026"]
        line.print("[bold]validation[/bold] 3")
        line.update("step 2")
    shown = screen(sys.stdout.getvalue())
    assert [row for row in shown if row] == ["[bold]validation[/bold] 3"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal(monkeypatch, columns: int = 80) -> Terminal:
    """Put a terminal in place of both streams."""
    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    return stream


BYTES = "encoding  50% 100.0/200.0 MB 11.6 MB/s 0:00:09 left"


def encode(line: LiveLine, clock: list[float]) -> None:
    """Half of 200 MB: the first second is for nothing that would be shown."""
    for clock[0] in (0.5, 1.0, 1.9):
        line.advance(1_000_000)
    clock[0] = 9.0
    line.advance(97_000_000)


def test_long_work_prints_lines_without_a_terminal(capsys):
    clock = [0.0]
    with LiveLine("encoding", 200_000_000, is_bytes=True, stderr=True, clock=lambda: clock[0]) as line:
        encode(line, clock)
        assert capsys.readouterr() == ("", BYTES + "\n")
        clock[0] = 18.9
        line.advance(0)
        assert capsys.readouterr().err == ""
        clock[0] = 19.0
        line.advance(1_000_000)
        assert capsys.readouterr().err.startswith("encoding  50% 101.0/200.0 MB ")
    assert line.done == 101_000_000 and capsys.readouterr() == ("", "")


def test_long_work_takes_one_line_of_a_terminal(monkeypatch):
    clock, stream = [0.0], terminal(monkeypatch)
    with LiveLine("encoding", 200_000_000, is_bytes=True, stderr=True, clock=lambda: clock[0]) as line:
        encode(line, clock)
        assert screen(stream.getvalue()) == [BYTES]
        clock[0] = 9.3
        line.advance(50_000_000)
        assert [row[:28] for row in screen(stream.getvalue())] == ["encoding  75% 150.0/200.0 MB"]
    assert not any(screen(stream.getvalue()))


@pytest.mark.parametrize("is_terminal", [False, True])
def test_short_work_shows_nothing(is_terminal, monkeypatch, capsys):
    clock, stream = [0.0], terminal(monkeypatch) if is_terminal else io.StringIO()
    with LiveLine("compiled", 3, clock=lambda: clock[0]) as line:
        for clock[0] in (0.5, 1.0, 1.9):
            line.advance(1)
    assert capsys.readouterr() == ("", "") and stream.getvalue() == ""


def test_any_thread_may_advance(capsys):
    with LiveLine("compiled", 4000) as line, ThreadPoolExecutor(8) as pool:
        for _ in range(4000):
            pool.submit(line.advance, 1)
    assert line.done == 4000


def screen(output: str) -> list[str]:
    """What a terminal shows after `output`, for the few control sequences that rich writes."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[\r\n]|[^\x1b\r\n]+", output):
        if token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
            column = 0
        elif token == "\r":
            column = 0
        elif token.startswith("\x1b["):
            if token.endswith("m"):  # a colour
                continue
            if token.endswith("K"):
                rows[row] = rows[row][:column] if token == "\x1b[K" else ""
            elif token.endswith("A"):
                row = max(0, row - int(token[2:-1] or 1))
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + len(token) :]
            column += len(token)
    return rows
