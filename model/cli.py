"""What every command of this project shares: options from a frozen dataclass, and errors in plain words.

    run(main, Config, prog="train.py")      # parse the command line into Config, call main(config)
    with LiveLine() as line: line.update("step 1/100")

Exit codes: 0 done, 2 something the user can mend (one or two lines on stderr, no traceback), 130 interrupted.
Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import TypeVar

import tyro
from rich.console import Console
from rich.live import Live
from rich.text import Text

C = TypeVar("C")


class UserError(Exception):
    """Something the user can mend. The message is one or two lines: what is wrong and what to do about it."""

    exit_code = 2


def run(
    main: Callable[[C], None],
    config: type[C],
    *,
    prog: str,
    default: C | Callable[[list[str]], C] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse `argv` (default: the command line) into the dataclass `config` and call `main` with it.

    default: values for the options that the command line leaves out, or a function from the arguments to such
    values. Returns when `main` returns; leaves by SystemExit after `--help` and after an error that has been reported.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that is not UTF-8 shows `?` for what it cannot show
            stream.reconfigure(errors="replace")
    try:
        main(_parse(config, prog, default(args) if callable(default) else default, args))
        sys.stdout.flush()  # here, where a reader that went away can still be dealt with
    except UserError as error:
        _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader went away, as in `... | head`: nothing to report, and nobody to report it to
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        message = explain(error)
        if message is None:
            raise
        _fail(message, 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def pick_device(device: str) -> str:
    """What "auto" stands for here, "cuda" or "cpu". Raises UserError for a "cuda" that is not there."""
    import torch  # here, as some commands need no torch and its import takes seconds

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device on this machine: use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def explain(error: OSError) -> str | None:
    """One line for an error about a file or a full disk; None for any other OSError."""
    name = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full while writing {name}: free some space, or choose a folder on another disk"
    if error.errno == errno.EFBIG:
        return f"{name} would be larger than this system allows a file to be: raise the limit (ulimit -f)"
    if error.filename is None:
        return None
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"no permission for {name}: change its permissions, or choose another path"
    if error.errno == errno.EROFS:
        return f"{name} is on a read-only file system: choose a folder that can be written to"
    if error.errno == errno.ENOENT:
        return f"no such file or folder: {name}"
    return f"{name}: {error.strerror or error}"


class LiveLine:
    """Progress on standard output: one line that is rewritten on a terminal, a line each time where there is none."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.is_live = self.console.is_interactive
        self._live = Live(console=self.console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveLine:
        if self.is_live:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def update(self, text: str) -> None:
        """Show `text` in place of the line before; what does not fit the width of the terminal is left out."""
        if self.is_live:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        else:
            print(text, flush=True)

    def print(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self.is_live:
            self.console.print(text)
        else:
            print(text, flush=True)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parse(config: type[C], prog: str, default: C | None, args: list[str]) -> C:
    """tyro.cli, its boxed error reports turned into a UserError."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            if default is None:
                return tyro.cli(config, prog=prog, args=args)
            return tyro.cli(config, prog=prog, args=args, default=default)
    except SystemExit as exit_:
        if exit_.code in (0, None):  # --help
            raise
        raise UserError(f"{_plain(stderr.getvalue())}\nsee `{prog} --help`") from None


def _plain(box: str) -> str:
    """tyro's box -> one line: its first section, and the first option that it suggests."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    sections = re.split(r"^[│\s]*[─-]{5,}[│\s]*$", re.sub(r"^[╭╰].*$", "", text, flags=re.M), flags=re.M)
    if "╭" not in text:  # where the terminal is not UTF-8 there is no frame, and the title is a section of its own
        sections = sections[1:] or sections
    message = " ".join(sections[0].replace("│", " ").split()).removeprefix("Error ")
    if suggestion := re.search(r"Perhaps you meant:[│\s]*(--[\w-]+)", text):
        message += f" (did you mean {suggestion[1]}?)"
    return textwrap.shorten(message[:1].lower() + message[1:], 300, placeholder=" ...")
