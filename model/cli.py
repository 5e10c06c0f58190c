"""What every command of this project shares: options from a frozen dataclass, readable errors, a line of progress.

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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tyro
from rich import progress
from rich.console import Console

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
    aliases: Mapping[str, str] = {},
) -> None:
    """Parse `argv` (default: the command line) into the dataclass `config` and call `main` with it.

    default: values for the options that are not on the command line, or a function from the arguments to such values.
    aliases: old option names, which `--help` does not show, to new ones. Raises SystemExit after `--help` and after an
    error that has been reported.
    """
    parts = [arg.partition("=") for arg in (sys.argv[1:] if argv is None else argv)]
    args = [aliases.get(option, option) + equals + value for option, equals, value in parts]
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
        if (message := explain(error)) is None:
            raise
        _fail(message, 2)
    except (MemoryError, RuntimeError) as error:
        if (message := _out_of_memory(error, config)) is None:
            raise
        _fail(message, 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def pick_device(device: str) -> str:
    """What "auto" stands for here, "cuda" or "cpu". Raises UserError for a "cuda" that is not there.

    Where "auto" passes over an NVIDIA GPU that torch cannot use, a line on stderr says why.
    """
    if device == "cpu":
        return device
    import torch

    from kernels import gpu_problem  # here, as some commands need no torch and its import takes seconds

    problem = gpu_problem()
    if torch.cuda.is_available() and problem is None:
        return "cuda"
    if device == "cuda":
        nothing = "torch finds no CUDA device on this machine: use --device cpu"
        raise UserError(f"the NVIDIA GPU cannot be used: {problem}; or use --device cpu" if problem else nothing)
    if problem:
        print(f"note: this machine's NVIDIA GPU is not used: {problem}", file=sys.stderr)
    return "cpu"


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
    return f"{name}: {error.strerror or ' '.join(map(str, error.args))}"  # str(error) would be without these words


def clock(seconds: float) -> str:
    """m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


class LiveLine:
    """Progress on one line, which a terminal rewrites. Any thread may call its methods.

    LiveLine() shows the text given to `update` at once; without a terminal each text is a line of its own.
    LiveLine("reading", total) counts the amounts given to `advance` and adds the time left. It shows nothing for the
    first two seconds; without a terminal it then prints a line every ten seconds.
    """

    def __init__(
        self,
        label: str = "",
        total: float | None = None,
        *,
        is_bytes: bool = False,
        stderr: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        columns: list[progress.ProgressColumn] = [progress.TextColumn("{task.description}", markup=False)]
        if total is not None:
            bytes_columns = [progress.DownloadColumn(), progress.TransferSpeedColumn()]
            columns += [
                progress.TaskProgressColumn(),
                *(bytes_columns if is_bytes else [progress.MofNCompleteColumn()]),
            ]
            columns += [progress.TimeRemainingColumn(), progress.TextColumn("left")]
        self.console = Console(stderr=stderr, highlight=False, markup=False, emoji=False, soft_wrap=True)
        self.is_live = self.console.is_interactive
        self._progress = progress.Progress(
            *columns, console=self.console, auto_refresh=False, transient=True,
            redirect_stdout=not stderr, get_time=clock,
        )  # fmt: skip
        self._task = self._progress.add_task(label, total=total)
        self._clock, self._next, self._lock = clock, clock() + 2, threading.Lock()

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress.live.is_started:  # else rich may print a blank line
            self._progress.stop()

    @property
    def done(self) -> float:
        """The sum of what `advance` was given."""
        return self._progress.tasks[0].completed

    def update(self, text: str) -> None:
        """Show `text` in place of the line before; what exceeds the width of the terminal is cut off."""
        if self.is_live:
            self._progress.start()
            self._progress.update(self._task, description=text, refresh=True)
        else:
            print(text, flush=True)

    def advance(self, amount: float) -> None:
        """Count `amount` more of the total as done."""
        self._progress.advance(self._task, amount)
        with self._lock:
            if self._clock() < self._next:
                return
            self._next = self._clock() + (0.2 if self.is_live else 10)
            if self.is_live:
                self._progress.start()
                self._progress.refresh()
            else:
                self.console.print(self._progress.get_renderable())

    def print(self, text: str) -> None:
        """Print a line that stays, above the live one."""
        if self.is_live:
            self.console.print(text)
        else:
            print(text, flush=True)


_NO_MEMORY = "out of memory|not enough memory|(can't|annot) allocate memory"


def is_out_of_memory(error: Exception) -> bool:
    """Torch's is known by its text: on the CPU it has no class of its own, and not every command imports torch."""
    return isinstance(error, MemoryError) or re.search(_NO_MEMORY, str(error)) is not None


def _out_of_memory(error: Exception, config: type) -> str | None:
    """One line if that is the error, with the options of `config` that need less; else None."""
    if not is_out_of_memory(error):
        return None
    options = getattr(config, "__dataclass_fields__", {})
    ways = ["a smaller --batch-size"] if "batch_size" in options else []
    ways += ["--device cpu"] if "device" in options and "CUDA" in str(error) else []
    return f"not enough memory: {'use ' + ' or '.join(ways) if ways else 'a machine with more is needed'}"


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _parse(config: type[C], prog: str, default: C | None, args: list[str]) -> C:
    """tyro.cli, its boxed error reports turned into a UserError."""
    stderr = io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(config, prog=prog, args=args, **options)
    except SystemExit as exit_:
        if exit_.code in (0, None):  # --help
            raise
        raise UserError(f"{_plain(stderr.getvalue())}\nsee `{prog} --help`") from None


def _plain(box: str) -> str:
    """tyro's box -> one line: its first section, and the first option that it suggests.

    tyro's error events (tyro._errors) are private and may change in any release; tests pin the text read here.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    sections = re.split(r"^[│\s]*[─-]{5,}[│\s]*$", re.sub(r"^[╭╰].*$", "", text, flags=re.M), flags=re.M)
    if "╭" not in text:  # where the terminal is not UTF-8 there is no frame, and the title is a section of its own
        sections = sections[1:] or sections
    message = " ".join(sections[0].replace("│", " ").split()).removeprefix("Error ")
    if suggestion := re.search(r"Perhaps you meant:[│\s]*(--[\w-]+)", text):
        message += f" (did you mean {suggestion[1]}?)"
    return textwrap.shorten(message[:1].lower() + message[1:], 300, placeholder=" ...")
