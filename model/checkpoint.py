"""Checkpoints: a folder per step, safetensors and JSON, written so that a crash at any byte leaves the last one whole.

    RUN/checkpoints/step-00000100/
        model.safetensors       parameters by name, float32, the tied weight once
        optimizer.safetensors   exp_avg/NAME, exp_avg_sq/NAME, step/NAME
        state.json              format version, step, validation loss, configuration, random states, size and SHA-256

A folder is written under a temporary name, its files and itself are flushed to the disk, and only then it is renamed:
a `step-...` folder is complete, and a `.tmp-...` folder is rubbish of a crash. The last two and the best are kept.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import Tokenizer, load_tokenizer

FORMAT = 1
KEEP_LAST = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
SLOTS = ("exp_avg", "exp_avg_sq", "step")  # what AdamW holds for each parameter


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. state: the content of state.json; tensors on the CPU."""

    folder: Path
    state: dict[str, Any]
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def save(
    run: Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    *,
    config: dict[str, Any],
    val_loss: float | None,
    best_val_loss: float | None,
    elapsed_s: float,
) -> Path:
    """Write RUN/checkpoints/step-..., then drop those it makes superfluous.

    step: updates done so far. val_loss: of exactly these parameters, or None where it was not measured; best_val_loss:
    the lowest of the run so far. elapsed_s: seconds of training. Raises OSError where the disk is full or cannot be
    written to; the checkpoints that were there stay as they are.
    """
    root = run / "checkpoints"
    root.mkdir(exist_ok=True)
    _remove_rubbish(root)
    named = dict(model.named_parameters())  # each parameter once, also a tied one
    slots = {f"{slot}/{name}": optimizer.state[p][slot] for name, p in named.items() for slot in SLOTS}
    state: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "val_loss": val_loss,
        "best_val_loss": best_val_loss,
        "elapsed_s": elapsed_s,
        "config": config,
        "model": model.config.to_dict(),
        "rng": _rng_states(),
        "files": {},
    }
    folder, temporary = root / f"step-{step:08d}", root / f".tmp-step-{step:08d}"
    try:
        temporary.mkdir()
        for name, tensors in ((MODEL, named), (OPTIMIZER, slots)):
            data = safetensors.torch.save({key: t.detach().cpu().contiguous() for key, t in tensors.items()})
            _write(temporary / name, data)
            state["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write(temporary / STATE, json.dumps({**state, "sha256": _digest(state)}, indent=1).encode())
        _fsync_folder(temporary)
        if folder.exists():  # a run that went back to an earlier checkpoint comes by here again
            folder.rename(root / f".tmp-old-{folder.name}")
        temporary.rename(folder)
        _fsync_folder(root)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(root, step)
    return folder


def load(run: Path, which: str = "last") -> Checkpoint:
    """Read a checkpoint and check every byte of it against its SHA-256.

    which: "last", "best" (lowest validation loss; the last where none was measured) or a name such as "step-00000100".
    Raises UserError for a run without checkpoints, a damaged or a newer checkpoint, and names the one to use instead.
    """
    return _load(run, which, (MODEL, OPTIMIZER))


def restore(checkpoint: Checkpoint, model: GPT, optimizer: torch.optim.Optimizer) -> None:
    """Copy a checkpoint into the model, the optimizer and torch's random generators, as if there had been no stop."""
    model.load_state_dict(checkpoint.model)
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {
            slot: checkpoint.optimizer[f"{slot}/{name}"].to(parameter.device, copy=True) for slot in SLOTS
        }
    _set_rng_states(checkpoint.state["rng"])


def load_model(
    run: Path, device: str | torch.device = "cpu", *, which: str = "best", dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer]:
    """The model of a run in evaluation mode on `device`, computing in `dtype`, and its tokenizer."""
    checkpoint = _load(run, which, (MODEL,))
    model = GPT(GPTConfig.from_dict(checkpoint.state["model"]), dtype=dtype)
    model.load_state_dict(checkpoint.model)
    return model.to(device).eval(), load_tokenizer(run / "tokenizer")


def names(run: Path) -> list[str]:
    """The complete checkpoints of a run, oldest first."""
    return [folder.name for folder in _folders(run / "checkpoints")]


class _Damage(Exception):
    """A file of a checkpoint is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")


def _load(run: Path, which: str, names: tuple[str, ...]) -> Checkpoint:
    folders = _folders(run / "checkpoints")
    if not folders:
        raise UserError(f"{run} holds no checkpoint: is it the folder of a run, and did the run reach its first save?")
    if which == "last":
        folder = folders[-1]
    elif which == "best":
        folder = _best(folders) or folders[-1]
    elif (folder := run / "checkpoints" / which) not in folders:
        raise UserError(f"{run} has no checkpoint {which!r}: use last, best, {', '.join(f.name for f in folders)}")
    try:
        return _read(folder, names)
    except _Damage as damage:
        whole = next((f.name for f in reversed(folders[: folders.index(folder)]) if _is_whole(f, names)), None)
        advice = f"the one before it is whole: use --which {whole}" if whole else "no earlier checkpoint is whole"
        raise UserError(f"{damage}\n{advice}") from None


def _is_whole(folder: Path, names: tuple[str, ...]) -> bool:
    try:
        _read(folder, names)
    except (_Damage, UserError):
        return False
    return True


def _read(folder: Path, names: tuple[str, ...]) -> Checkpoint:
    """The files `names` of a checkpoint, verified."""
    state = _read_state(folder)
    tensors = {}
    for name in names:
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            raise _Damage(folder / name, "it is missing") from None
        if len(data) != state["files"][name]["bytes"]:
            raise _Damage(folder / name, f"{len(data)} bytes instead of {state['files'][name]['bytes']}")
        if hashlib.sha256(data).hexdigest() != state["files"][name]["sha256"]:
            raise _Damage(folder / name, "its SHA-256 is not the one that was written")
        tensors[name] = safetensors.torch.load(data)
    return Checkpoint(folder, state, tensors[MODEL], tensors.get(OPTIMIZER, {}))


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_bytes())
        written = state.pop("sha256")
        version = state["format"]
    except FileNotFoundError:
        raise _Damage(folder / STATE, "it is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Damage(folder / STATE, "it is not the JSON that was written") from None
    if isinstance(version, int) and version > FORMAT:
        raise UserError(
            f"{folder} was written by a newer version of this project (format {version}, this one reads {FORMAT}): "
            f"update this one"
        )
    if written != _digest(state):
        raise _Damage(folder / STATE, "its SHA-256 is not the one that was written")
    return state


def _digest(state: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _folders(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first; temporary folders have other names."""
    return sorted(root.glob("step-" + "[0-9]" * 8))


def _best(folders: list[Path]) -> Path | None:
    """The lowest validation loss, the earliest of equals; None where no intact checkpoint has one."""
    losses = []
    for folder in folders:
        with contextlib.suppress(_Damage, UserError):
            if (loss := _read_state(folder)["val_loss"]) is not None:
                losses.append((loss, folder))
    return min(losses)[1] if losses else None


def _prune(root: Path, step: int) -> None:
    """Drop all but the last two and the best. What lies after `step` belongs to a past that the run went back from."""
    folders = _folders(root)
    past = [folder for folder in folders if folder.name <= f"step-{step:08d}"]
    keep = {*past[-KEEP_LAST:], _best(past)}
    for folder in folders:
        if folder not in keep:
            # Renamed first: a crash half-way through the removal must not leave a damaged `step-...` folder.
            folder.rename(root / f".tmp-old-{folder.name}")
    _remove_rubbish(root)


def _remove_rubbish(root: Path) -> None:
    for folder in root.glob(".tmp-*"):
        shutil.rmtree(folder)


def _write(path: Path, data: bytes) -> None:
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # write() and fsync() do not say which file it was
        error.filename = error.filename or str(path)
        raise


def _fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Windows cannot open a folder, and its file system needs no such call."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rng_states() -> dict[str, str]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def _set_rng_states(states: dict[str, str]) -> None:
    for name, text in states.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(state)
