"""Checkpoints: a folder per step, safetensors and JSON, written so that a crash at any byte leaves the last one whole.

    RUN/checkpoints/step-00000100/
        model.safetensors       parameters by name, the tied weight once
        optimizer.safetensors   SLOT/NAME
        ema.safetensors         averages of the parameters by name, where the run keeps them
        trainer.safetensors     small tensors of the trainer
        state.json              format version, step, best validation loss, configuration, size and SHA-256 of each file
        validation.json         the validation loss of these parameters, once it is measured
    RUN/failed/step-00000100/   the state before a step that went wrong; state.json has the details

Tensors are whole, so a checkpoint knows of no device and no number of processes. A folder is written under a temporary
name, its files and itself are flushed to the disk, and only then it is renamed: a `step-...` folder is complete, and
what begins with `.tmp-` is rubbish of a crash. The last few and the best are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
STATE, VALIDATION = "state.json", "validation.json"
Parts = dict[str, dict[str, Tensor]]  # "model", "optimizer", "ema", "trainer" -> tensors by name


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    state: step, val_loss (of these parameters; None where it was not measured), best_val_loss (the lowest of the run so
    far, or None), elapsed_s, config, model (of GPTConfig), and details for a failure.
    parts: on the CPU, mapped from the files rather than read; to change such a tensor does not change its file.
    """

    folder: Path
    state: dict[str, Any]
    parts: Parts


def save(
    run: Path,
    step: int,
    parts: Parts,
    *,
    config: dict[str, Any],
    model: GPTConfig,
    best_val_loss: float | None,
    elapsed_s: float,
    keep_last: int = 2,
) -> Path:
    """Write RUN/checkpoints/step-..., then drop those it makes superfluous: all but the last `keep_last` and the best.

    step: updates done so far. best_val_loss: the lowest of the run so far; the loss of these parameters is added by
    record_validation. elapsed_s: seconds of training. Raises OSError where the disk is full or cannot be written to;
    the checkpoints that were there stay as they are.
    """
    root = run / "checkpoints"
    state = {"best_val_loss": best_val_loss, "elapsed_s": elapsed_s, "config": config, "model": model.to_dict()}
    folder = _write_folder(root, step, parts, state)
    _prune(root, step, keep_last)
    return folder


def record_validation(run: Path, step: int, val_loss: float, keep_last: int = 2) -> None:
    """Add to the checkpoint of `step` the validation loss, in nats, of exactly its parameters; then drop as `save`."""
    if not math.isfinite(val_loss):
        raise ValueError(f"a validation loss that is not finite cannot be recorded, got {val_loss}")
    root = run / "checkpoints"
    _tidy(root)
    folder, temporary = root / _name(step), root / f".tmp-{VALIDATION}"
    try:
        _write(temporary, _encode({"step": step, "val_loss": val_loss}))
        os.replace(temporary, folder / VALIDATION)
        _fsync_folder(folder)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _prune(root, step, keep_last)


def save_failure(
    run: Path, step: int, parts: Parts, *, config: dict[str, Any], model: GPTConfig, details: dict[str, Any]
) -> Path:
    """Write RUN/failed/step-...: the state before a step that went wrong. Never dropped, never "last" or "best".

    step: updates done before it. details: what else is needed to repeat the step, as JSON can carry it.
    """
    state = {"best_val_loss": None, "elapsed_s": 0.0, "config": config, "model": model.to_dict(), "details": details}
    return _write_folder(run / "failed", step, parts, state)


def load(run: Path, which: str = "last") -> Checkpoint:
    """Read a checkpoint and check every byte of it against its SHA-256.

    which: "last", "best" (lowest validation loss; the last where none was measured), a name such as "step-00000100",
    "failed" (the newest of the failures) or "failed/step-00000100". Raises UserError for a run without checkpoints, for
    one that is damaged or of another format, and names the one to use instead.
    """
    return _load(run, which, list)


def load_model(
    run: Path, device: str | torch.device = "cpu", *, which: str = "best", dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer]:
    """The model of a run in evaluation mode on `device`, computing in `dtype`, and its tokenizer.

    Its weights are the averages where the checkpoint has them.
    """
    checkpoint = _load(run, which, lambda parts: ["ema" if "ema" in parts else "model"])
    config = GPTConfig.from_dict(checkpoint.state["model"])
    check_model(checkpoint, config)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = GPT(config, dtype=dtype)
    (weights,) = checkpoint.parts.values()
    model.to_empty(device=device).load_state_dict(weights)
    return model.eval(), load_tokenizer(run / "tokenizer")


def check_model(checkpoint: Checkpoint, config: GPTConfig) -> None:
    """Raises UserError for a checkpoint of another model, naming the first setting or tensor that differs."""
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    pairs = [(checkpoint.state["model"], config.to_dict())]
    for part in ("model", "ema"):
        if part in checkpoint.parts:
            pairs.append(({name: tuple(t.shape) for name, t in checkpoint.parts[part].items()}, shapes))
    for there, here in pairs:
        for name in [*here, *(name for name in there if name not in here)]:
            if (found := there.get(name, "missing")) != (wanted := here.get(name, "missing")):
                raise UserError(f"{checkpoint.folder} is of another model: {name} is {found} there and {wanted} here")


def tidy(run: Path) -> None:
    """Remove what a crash has left behind. For the process that trains: to another one it may be a save under way."""
    for name in ("checkpoints", "failed"):
        _tidy(run / name)


def names(run: Path) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    return [folder.name for folder in _folders(run / "checkpoints")]


# Reading


class _Damage(Exception):
    """A file of a checkpoint is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")


Choose = Callable[[list[str]], list[str]]  # the parts that a checkpoint has -> those to read


def _load(run: Path, which: str, choose: Choose) -> Checkpoint:
    failed = which.split("/")[0] == "failed"
    prefix, root = ("failed/", run / "failed") if failed else ("", run / "checkpoints")
    if failed:
        which = which.partition("/")[2] or "last"
    folders = _folders(root)
    if not folders and failed:
        raise UserError(f"{run} holds no state of a step that went wrong: use last, best or the name of a checkpoint")
    if not folders:
        raise UserError(f"{run} holds no checkpoint: is it the folder of a run, and did the run reach its first save?")
    if which == "last":
        folder = folders[-1]
    elif which == "best" and not failed:
        folder = _best(folders) or folders[-1]
    elif (folder := root / which) not in folders:
        choices = ["failed"] if failed else ["last", "best"]
        choices += [f"{prefix}{f.name}" for f in folders]
        raise UserError(f"{run} has no checkpoint {prefix + which!r}: use {', '.join(choices)}")
    try:
        state, paths = _verify(folder, choose)
    except _Damage as damage:
        whole = next((f.name for f in reversed(folders[: folders.index(folder)]) if _is_whole(f, choose)), None)
        advice = f"the one before it is whole: use --which {prefix}{whole}" if whole else "no earlier one is whole"
        raise UserError(f"{damage}\n{advice}") from None
    return Checkpoint(folder, state, {path.stem: safetensors.torch.load_file(path) for path in paths})


def _is_whole(folder: Path, choose: Choose) -> bool:
    try:
        _verify(folder, choose)
    except (_Damage, UserError):
        return False
    return True


def _verify(folder: Path, choose: Choose) -> tuple[dict[str, Any], list[Path]]:
    """The state of a checkpoint and the files of the parts chosen, all of them as they were written."""
    state = _read_state(folder)
    paths = [folder / f"{part}.safetensors" for part in choose([Path(name).stem for name in state["files"]])]
    for path in paths:
        _check_size(path, state)
        with path.open("rb") as file:
            if _sha256(file) != state["files"][path.name]["sha256"]:
                raise _Damage(path, "its SHA-256 is not the one that was written")
    return state, paths


def _check_size(path: Path, state: dict[str, Any]) -> None:
    wanted = state["files"][path.name]["bytes"]
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        raise _Damage(path, "it is missing") from None
    if found != wanted:
        raise _Damage(path, f"{found} bytes instead of {wanted}")


def _read_state(folder: Path) -> dict[str, Any]:
    """state.json, with the loss of validation.json where there is one."""
    state = _read_json(folder / STATE)
    if (version := state["format"]) != FORMAT:
        age, advice = ("a newer", "update this one") if version > FORMAT else ("an older", "go on with that one")
        raise UserError(
            f"{folder} was written by {age} version of this project (format {version}, this one reads {FORMAT}): "
            f"{advice}"
        )
    val_loss = None
    if (folder / VALIDATION).exists():
        validation = _read_json(folder / VALIDATION)
        if validation["step"] != state["step"]:
            raise _Damage(folder / VALIDATION, f"it is of step {validation['step']}")
        val_loss = validation["val_loss"]
    losses = [loss for loss in (val_loss, state["best_val_loss"]) if loss is not None]
    return {**state, "val_loss": val_loss, "best_val_loss": min(losses, default=None)}


def _read_json(path: Path) -> dict[str, Any]:
    """What _encode wrote, byte for byte; this holds for all formats, so that damage is not taken for another format."""
    try:
        data = path.read_bytes()
        content = json.loads(data)
        del content["sha256"]
        whole = data == _encode(content)
    except FileNotFoundError:
        raise _Damage(path, "it is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _Damage(path, "it is not the JSON that was written") from None
    if not whole:
        raise _Damage(path, "its SHA-256 is not the one that was written")
    return content


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _folders(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first; `-new` is one that was about to replace the other of its step."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8}(-new)?", path.name))


def _best(folders: list[Path]) -> Path | None:
    """The lowest validation loss, the earliest of equals; None where no readable checkpoint has one."""
    losses = []
    for folder in folders:
        with contextlib.suppress(_Damage, UserError):
            if (loss := _read_state(folder)["val_loss"]) is not None:
                losses.append((loss, folder))
    return min(losses)[1] if losses else None


# Writing


def _write_folder(root: Path, step: int, parts: Parts, state: dict[str, Any]) -> Path:
    if not root.exists():
        root.mkdir()
        _fsync_folder(root.parent)
    _tidy(root)
    folder, temporary = root / _name(step), root / f".tmp-{_name(step)}"
    try:
        temporary.mkdir()
        files = {f"{part}.safetensors": tensors for part, tensors in parts.items()}
        entries = {name: _write_tensors(temporary / name, tensors) for name, tensors in files.items()}
        _write(temporary / STATE, _encode({"format": FORMAT, "step": step, **state, "files": entries}))
        _fsync_folder(temporary)
        # A run that went back comes by a step again: until the new one has its name, one of the two is always there.
        os.replace(temporary, root / f"{folder.name}-new" if folder.exists() else folder)
        _fsync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _tidy(root)
    return folder


def _tidy(root: Path) -> None:
    """Remove the rubbish of a crash, and give its name to a checkpoint that was about to replace another."""
    _remove_rubbish(root)
    for new in list(root.glob("step-*-new")):
        folder = new.with_name(new.name.removesuffix("-new"))
        if folder.exists():
            _discard(folder)
        os.replace(new, folder)
        _remove_rubbish(root)


def _prune(root: Path, step: int, keep_last: int) -> None:
    """Drop all but the last and the best. What lies after `step` belongs to a past that the run went back from.

    A damaged checkpoint is dropped when its turn comes, but it takes no whole one's place.
    """
    folders = _folders(root)
    past = [folder for folder in folders if folder.name <= _name(step)]
    intact = [folder for folder in past if _is_intact(folder)]
    keep = {*past[-keep_last:], *intact[-keep_last:], _best(intact)}
    for folder in folders:
        if folder not in keep:
            _discard(folder)
    _remove_rubbish(root)


def _is_intact(folder: Path) -> bool:
    """True where state.json is whole and the other files have their sizes; what they hold is not read."""
    try:
        state = _read_state(folder)
        for name in state["files"]:
            _check_size(folder / name, state)
    except (_Damage, UserError):
        return False
    return True


def _discard(folder: Path) -> None:
    """Renamed first: a crash half-way through the removal must not leave a damaged `step-...` folder."""
    os.replace(folder, folder.with_name(f".tmp-old-{folder.name}"))


def _remove_rubbish(root: Path) -> None:
    for path in root.glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _encode(content: dict[str, Any]) -> bytes:
    """JSON with the SHA-256 of its content."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1).encode()


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """-> size and SHA-256 of the file, hashed while the system still holds it in memory."""
    try:
        safetensors.torch.save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    except SafetensorError as error:  # its text is all it has to say of the system's error
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # the library's are the owner's alone
    with _named_errors(path), path.open("r+b") as file:
        entry = {"bytes": path.stat().st_size, "sha256": _sha256(file)}
        os.fsync(file.fileno())
    return entry


def _write(path: Path, data: bytes) -> None:
    with _named_errors(path), path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """write() and fsync() do not say which file it was."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows cannot open a folder, and its file system needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with _named_errors(folder):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
