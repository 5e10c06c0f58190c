"""The folder of a run: its lock, options and metrics, and the signals that stop a run.

RUN/config.json      {"train": options, "model": GPTConfig}; steps is 0 as long as --minutes has not set it
RUN/metrics.jsonl    one row per logged training loss and per evaluation of the validation loss; elapsed_s: seconds of
                     training so far; reached: the --until-loss that this validation loss is at most
RUN/samples.jsonl    {"step", "text"}
RUN/lock             held by the process that trains
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from model import files
from model.cli import UserError
from model.config import GPTConfig

CONFIG, METRICS, SAMPLES, LOCK = "config.json", "metrics.jsonl", "samples.jsonl", "lock"


@contextlib.contextmanager
def new_folder(out: Path | None, name: str) -> Iterator[Path]:
    """Make the folder of a new run: `out`, or the first free one of runs/NAME, runs/NAME-2, ...

    A run that ends before its first step removes its folder.
    """
    if out is None:
        names = (name if n == 1 else f"{name}-{n}" for n in count(1))
        folder = next(path for path in map(Path("runs").joinpath, names) if not path.exists())
    else:
        folder = out
        if (folder / CONFIG).exists():
            raise UserError(f"{folder} holds a run already: resume it with --resume {folder}, or choose another --out")
        if folder.exists() and (not folder.is_dir() or files.names(folder)):
            raise UserError(f"{folder} exists and is not an empty folder: choose another --out")
    existed = folder.exists()
    folder.mkdir(parents=True, exist_ok=existed)
    try:
        yield folder
    finally:
        if not has_begun(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if existed:
                folder.mkdir(exist_ok=True)


def has_begun(folder: Path) -> bool:
    """Whether the run in `folder` has recorded a step: its metrics, or its failure."""
    metrics = folder / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or (folder / "failed").exists()


def died_before_first_checkpoint(folder: Path) -> bool:
    """Whether `folder` holds a run that was killed before its first checkpoint, and nothing else."""
    if not (folder / LOCK).is_file():
        return False
    names = "checkpoints config data failed lock memory metrics report sample samples tokenizer trace"
    names += " tensorboard track wandb"
    stems = [re.sub(r"^\.(tmp-\d+-)?", "", path.name).split(".")[0] for path in folder.iterdir()]
    return set(stems) <= set(names.split()) and not any((folder / "checkpoints").glob("step-*"))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder`. The system releases the lock when this process ends, however."""
    path = folder / LOCK
    held = FileLock(path, timeout=0)
    try:
        held.acquire()
    except Timeout:
        holder = path.read_text().strip() or "?"
        raise UserError(f"{folder} is being trained by process {holder}: wait for it, or stop it") from None
    try:
        path.write_text(f"{os.getpid()}\n")
        yield
    finally:
        held.release()


def resume_command(folder: Path) -> str:
    return f"python train.py --resume {shlex.quote(str(folder))}"


def store_config(folder: Path, options: dict[str, Any], model: GPTConfig) -> None:
    content = {"train": options, "model": model.to_dict()}
    files.write_atomic(folder / CONFIG, json.dumps(content, indent=2) + "\n", durable=True)


def stored_options(folder: Path) -> dict[str, Any]:
    """The options of the run in `folder`, as they were stored."""
    path = folder / CONFIG
    try:
        return dict(json.loads(path.read_bytes())["train"])
    except (FileNotFoundError, NotADirectoryError):
        advice = "; fine-tune an imported model with --init" * (folder / "checkpoints").is_dir()
        raise UserError(f"{folder} holds no run: there is no {CONFIG} in it{advice}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged, or of another version of this project: start a new run") from None


def truncate_metrics(folder: Path, step: int, *, keep_validation: bool) -> None:
    """Drop the rows after `step`, which will be written again, and what a crash left: half a row, temporary files.

    keep_validation: False drops the validation loss of `step` too, because it will be computed again.
    """

    def stays(row: str) -> bool:
        if not row.endswith("}\n"):
            return False
        values = json.loads(row)
        is_validation = values["step"] == step and values.get("val_loss", 0.0) is not None
        return values["step"] <= step and (keep_validation or not is_validation)

    for path in [*folder.glob(f"{files.TEMPORARY}*"), *folder.glob("*.tmp")]:  # the latter by an older version
        path.unlink()
    for name in (METRICS, SAMPLES):
        path = folder / name
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        files.write_atomic(path, "".join(row for row in rows if stays(row)))


class Signals:
    """Requests that have arrived: the numbers of the signals that ask to stop, and whether to save a checkpoint."""

    def __init__(self) -> None:
        self.stop: list[int] = []
        self.save = False

    def number(self) -> int:
        """Of the first signal that asked to stop; SIGTERM where another process received it."""
        return self.stop[0] if self.stop else signal.SIGTERM

    def take(self) -> list[bool]:
        """[stop, save]; a request to save is answered once."""
        flags = [bool(self.stop), self.save]
        self.save = False
        return flags


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Collect SIGINT and SIGTERM (stop) and SIGUSR1 (save) while the body runs.

    A second SIGINT or SIGTERM ends the process as usual.
    """
    received = Signals()

    def stop(number: int, frame: object) -> None:
        received.stop.append(number)
        signal.signal(number, before[number])

    def save(number: int, frame: object) -> None:
        received.save = True

    handlers: dict[int, Any] = {signal.SIGINT: stop, signal.SIGTERM: stop}
    if hasattr(signal, "SIGUSR1"):
        handlers[signal.SIGUSR1] = save
    before: dict[int, Any] = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
