"""The folder of a run: who may write in it, its options and its metrics; presets; the signals that stop a run.

RUN/config.json      {"train": options, "model": GPTConfig}
RUN/metrics.jsonl    a row for each look at the training loss and each measurement of the validation loss
RUN/samples.jsonl    {"step", "text"}
RUN/lock             held by the process that trains
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from model.cli import UserError
from model.config import GPTConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONFIG, METRICS, SAMPLES, LOCK = "config.json", "metrics.jsonl", "samples.jsonl", "lock"


# Presets

PRESETS = Path(__file__).parent / "presets"


def preset_names() -> list[str]:
    """The presets of this project, small before large."""
    return sorted((path.stem for path in PRESETS.glob("*.toml")), key=lambda name: (name.startswith("gpt2"), name))


def read_preset(preset: str) -> dict[str, Any]:
    """The options of a preset: a name, or the path of a TOML file of one's own.

    The file's keys are train.py's options with underscores. `preset = "NAME"` in it takes that preset's values for
    whatever the file leaves out.
    """
    path = Path(preset) if preset.endswith(".toml") else PRESETS / f"{preset}.toml"
    if not preset.endswith(".toml") and preset not in preset_names():
        raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(preset_names())}, or a .toml file")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    base = values.pop("preset", None)
    return {**(read_preset(base) if base is not None else {}), **values, "preset": preset}


# The folder


@contextlib.contextmanager
def new_folder(out: Path | None, name: str) -> Iterator[Path]:
    """Make the folder of a new run: `out`, or the first of runs/NAME, runs/NAME-2, ... that is free.

    A run that ends before its first step takes its folder away again.
    """
    if out is None:
        names = (name if n == 1 else f"{name}-{n}" for n in count(1))
        folder = next(path for path in map(Path("runs").joinpath, names) if not path.exists())
    else:
        folder = out
        if (folder / CONFIG).exists():
            raise UserError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already and is not an empty folder: choose another --out")
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=was_there)
    try:
        yield folder
    finally:
        if not has_begun(folder):
            shutil.rmtree(folder, ignore_errors=True)
            if was_there:
                folder.mkdir(exist_ok=True)


def has_begun(folder: Path) -> bool:
    """Whether the run in `folder` has left something of a step: its numbers, or what went wrong in it."""
    metrics = folder / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or (folder / "failed").exists()


def is_stillborn(folder: Path) -> bool:
    """Whether `folder` is that of a run which was killed before its first checkpoint, and nothing but that."""
    if not (folder / LOCK).is_file():
        return False
    names = "checkpoints config data failed lock memory metrics report sample samples tensorboard tokenizer trace"
    ours = {path.name.removeprefix(".").split(".")[0] in names.split() for path in folder.iterdir()}
    return all(ours) and not any((folder / "checkpoints").glob("step-*"))


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other processes from training in `folder`. The system lets go when this process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{folder} is being trained already, by process {file.read().strip() or '?'}: wait for it, or stop it"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def store_config(folder: Path, options: dict[str, Any], model: GPTConfig) -> None:
    replace_text(folder / CONFIG, json.dumps({"train": options, "model": model.to_dict()}, indent=2) + "\n")


def stored_options(folder: Path) -> dict[str, Any]:
    """The options of the run in `folder`, as they were stored."""
    path = folder / CONFIG
    try:
        return dict(json.loads(path.read_bytes())["train"])
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: there is no {CONFIG} in it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, or of another version of this project: start a new run") from None


def trim(folder: Path, step: int, *, to_be_measured: bool) -> None:
    """Drop the rows after `step`, which will be written again, and what a crash left: half a row, temporary files.

    to_be_measured: the validation loss of `step` itself will be written again too.
    """

    def stays(row: str) -> bool:
        if not row.endswith("}\n"):
            return False
        values = json.loads(row)
        again = to_be_measured and values["step"] == step and values.get("val_loss", 0.0) is not None
        return values["step"] <= step and not again

    for path in folder.glob("*.tmp"):
        path.unlink()
    for name in (METRICS, SAMPLES):
        path = folder / name
        rows = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        replace_text(path, "".join(row for row in rows if stays(row)))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# Signals


class Signals:
    """What arrived: numbers of signals that ask to stop, and whether a checkpoint was asked for."""

    def __init__(self) -> None:
        self.stop: list[int] = []
        self.save = False


@contextlib.contextmanager
def signals() -> Iterator[Signals]:
    """Collect SIGINT and SIGTERM (stop) and SIGUSR1 (save) while the body runs.

    The second SIGINT or SIGTERM of a kind ends the process as ever.
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
