"""Checkpoints: a folder per step, safetensors and JSON, written so that a crash at any byte leaves the last one intact.

    RUN/checkpoints/step-00000100/
        model.safetensors       parameters by name, the tied weight once; or, of a run with --lora-rank,
        adapter_model.safetensors, adapter_config.json      its adapters alone, in PEFT's format (model/lora.py)
        optimizer.safetensors   SLOT/NAME
        ema.safetensors         averages of the trained parameters by name, if the run keeps them
        trainer.safetensors     small tensors of the trainer
        state.json              format version, step, best validation loss, configuration, size and SHA-256 of each file
        validation.json         the validation loss of these parameters, once it is measured
    RUN/failed/step-00000100/   the state before a step that went wrong; state.json has the details

Tensors are stored whole, so a checkpoint does not depend on devices or the number of processes. A folder is filled and
flushed under a temporary name, then renamed: a `step-...` folder is complete, and a crash leaves only `.tmp-...`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from model import files
from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import FILE as TOKENIZER_FILE
from model.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
STATE, VALIDATION = "state.json", "validation.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model", "adapter_config.json"  # files that PEFT knows
PEFT_PREFIX = "base_model.model."  # of the names in the former
WEIGHTS = "model", ADAPTER, "ema"
Parts = dict[str, dict[str, Tensor]]  # "model" or ADAPTER, "optimizer", "ema", "trainer" -> tensors by name


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    state: step, val_loss (of these parameters; None if not measured), best_val_loss (the lowest of the run so far, or
    None), elapsed_s, config, model (of GPTConfig), lora and tables (see `save`), and details of a failure.
    parts: on the CPU, memory-mapped; changing a tensor does not change its file.
    """

    folder: Path
    state: dict[str, Any]
    parts: Parts


class CorruptCheckpoint(Exception):
    """A file of a checkpoint is not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")


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
    lora: dict[str, Any] | None = None,
    tables: str | None = None,
) -> Path:
    """Write RUN/checkpoints/step-... atomically, then delete all but the last `keep_last` and the best.

    step: updates done so far. best_val_loss: the lowest before; record_validation adds the loss of these parameters.
    lora: of adapters {"base": what they adapt, "peft": the content of adapter_config.json}. tables: the hash of the
    kernels' launch tables, if the run has any (kernels/_tables.py).
    Raises OSError, and leaves the other checkpoints as they are, if the disk is full or not writable.
    """
    state: dict[str, Any] = {"best_val_loss": best_val_loss, "elapsed_s": elapsed_s, "config": config}
    state |= {"model": model.to_dict(), **({"lora": lora} if lora else {}), **({"tables": tables} if tables else {})}
    folder = _write_checkpoint(run / "checkpoints", step, parts, state)
    _prune(folder.parent, step, keep_last)
    return folder


def save_model(run: Path, model: GPT, tokenizer: Tokenizer, *, step: int = 0, config: dict[str, Any]) -> None:
    """Make `run`, missing or empty, a run that holds this model and its tokenizer; whole or not at all."""
    files.refuse_existing(run)
    with files.new_folder(run, durable=True) as folder:
        tokenizer.save(folder / "tokenizer")
        parts = {"model": {name: p.detach() for name, p in model.named_parameters()}}
        save(folder, step, parts, config=config, model=model.config, best_val_loss=None, elapsed_s=0.0)


def record_validation(run: Path, step: int, val_loss: float, keep_last: int = 2) -> None:
    """Add the validation loss, in nats, to the checkpoint of `step` that it was measured on; then prune like `save`."""
    if not math.isfinite(val_loss):
        raise ValueError(f"a validation loss must be finite, got {val_loss}")
    root = run / "checkpoints"
    _clean(root)
    files.write_atomic(root / _name(step) / VALIDATION, _encode({"step": step, "val_loss": val_loss}), durable=True)
    _prune(root, step, keep_last)


def save_failure(
    run: Path,
    step: int,
    parts: Parts,
    *,
    config: dict[str, Any],
    model: GPTConfig,
    details: dict[str, Any],
    lora: dict[str, Any] | None = None,
) -> Path:
    """Write RUN/failed/step-...: the state before a step that went wrong. Never pruned, never "last" or "best".

    step: updates done before it. details: what else is needed to repeat the step, JSON-serialisable.
    """
    state = {"best_val_loss": None, "elapsed_s": 0.0, "config": config, "model": model.to_dict(), "details": details}
    state |= {"lora": lora} if lora else {}
    return _write_checkpoint(run / "failed", step, parts, state)


def load(run: Path, name: str = "last", *, weights_only: bool = False) -> Checkpoint:
    """Read a checkpoint and compare every byte of it with its SHA-256.

    name: "last", "best" (lowest validation loss; the last if none was measured), a name such as "step-00000100",
    "failed" (the newest failure) or "failed/step-00000100". weights_only: the averages if there are any, else the
    parameters, and no other part. UserError for a checkpoint that is missing, damaged or of another format names the
    one to use instead.
    """
    folder, earlier = _find(run, name)
    try:
        state, paths = _verify(folder, weights_only=weights_only)
    except CorruptCheckpoint as error:
        advice = "no earlier one is intact"
        if intact := next((f for f in reversed(earlier) if _is_intact(f, weights_only=weights_only)), None):
            prefix = "failed/" if folder.parent.name == "failed" else ""
            advice = f"the one before it is intact: use --checkpoint {prefix}{intact.name}"
        raise UserError(f"{error}\n{advice}") from None
    parts = {path.stem: safetensors.torch.load_file(path) for path in paths}
    if ADAPTER in parts:
        parts[ADAPTER] = {name.removeprefix(PEFT_PREFIX): t for name, t in parts[ADAPTER].items()}
    return Checkpoint(folder, state, parts)


def load_model(
    run: Path, device: str | torch.device = "cpu", *, name: str = "best", dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer]:
    """The model of a run, with the averages if there are any, in evaluation mode, and its tokenizer.

    UserError if the tokenizer is not that of the run's tokens, or has another number of ids than the model; and for a
    run that trained adapters, which `model.lora.load_model` opens.
    """
    return open_model(run, load(run, name, weights_only=True), device, dtype=dtype)


def open_model(
    run: Path, checkpoint: Checkpoint, device: str | torch.device = "cpu", *, dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer]:
    """`load_model` from a checkpoint that has been read, of the weights only."""
    if checkpoint.state.get("lora"):
        raise UserError(f"{run} holds adapters: merge them first, python -m model.lora merge {run} DIR")
    config = GPTConfig.from_dict(checkpoint.state["model"])
    check_model(checkpoint, config)
    tokenizer = own_tokenizer(run, config)
    with torch.device("meta"):  # no memory and no random numbers for weights that are about to be replaced
        model = GPT(config, dtype=dtype)
    (weights,) = checkpoint.parts.values()
    model.to_empty(device=device).load_state_dict(weights)
    return model.eval(), tokenizer


def read_state(run: Path, name: str = "best") -> dict[str, Any]:
    """The state of a checkpoint, without reading its tensors. UserError as for `load`."""
    try:
        return _read_state(_find(run, name)[0])
    except CorruptCheckpoint as error:
        raise UserError(f"{error}\nuse another --checkpoint") from None


def own_tokenizer(run: Path, config: GPTConfig) -> Tokenizer:
    """The tokenizer of a run, compared with the run's tokens and its model."""
    folder, data = run / "tokenizer", run / "data"
    tokenizer = load_tokenizer(folder)
    if (data / TOKENIZER_FILE).exists() and not load_tokenizer(data).equals(tokenizer):
        raise UserError(f"{folder} is not the tokenizer of {data}\ncopy {data / TOKENIZER_FILE} into {folder}")
    if tokenizer.n_vocab != config.vocab_size:
        ids = f"{tokenizer.name} has {tokenizer.n_vocab:,} ids, and the model {config.vocab_size:,}"
        raise UserError(f"{folder} is not the tokenizer of the model: {ids}\nput that of this run back")
    return tokenizer


def check_model(checkpoint: Checkpoint, config: GPTConfig, trained: Mapping[str, Tensor] | None = None) -> None:
    """Raise UserError if the checkpoint is of another model; it names the first setting or tensor that differs.

    trained: the parameters that a checkpoint has, by name; all of GPT(config) by default.
    """
    if trained is None:
        with torch.device("meta"):
            trained = dict(GPT(config).named_parameters())
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    weights = [checkpoint.parts[part] for part in WEIGHTS if part in checkpoint.parts]
    pairs = [({name: tuple(t.shape) for name, t in tensors.items()}, shapes) for tensors in weights]
    for saved, wanted in [(checkpoint.state["model"], config.to_dict()), *pairs]:
        for name in wanted | saved:
            there, here = saved.get(name, "missing"), wanted.get(name, "missing")
            if there != here:
                raise UserError(f"{checkpoint.folder} is of another model: {name} is {there} there and {here} here")


def remove_partial(run: Path) -> None:
    """Remove what a crash left. Only for the process that trains: another one would remove a save in progress."""
    for name in ("checkpoints", "failed"):
        _clean(run / name)


def remove_after(run: Path, step: int) -> None:
    """Remove the checkpoints after `step`, from which the run is resumed: the metrics after it are removed as well."""
    for folder in _folders(run / "checkpoints"):
        if folder.name > _name(step):
            _discard(folder)
    _remove_temporary(run / "checkpoints")


def list_checkpoints(run: Path) -> list[str]:
    """The names of the complete checkpoints of a run, oldest first."""
    return [folder.name for folder in _folders(run / "checkpoints")]


# Reading


def _find(run: Path, name: str) -> tuple[Path, list[Path]]:
    """The folder of the checkpoint called `name`, and those older than it, oldest first."""
    prefix = "failed/" if name.split("/")[0] == "failed" else ""
    folders = _folders(run / ("failed" if prefix else "checkpoints"))
    if not folders and prefix:
        raise UserError(f"{run} has no state of a failed step: use last, best or the name of a checkpoint")
    if not folders:
        raise UserError(f"{run} has no checkpoint: is it the folder of a run, and did the run reach its first save?")
    last = folders[-1]
    choices = {"failed": last} if prefix else {"last": last, "best": _best(folders) or last}
    choices |= {prefix + folder.name: folder for folder in folders}
    if name not in choices:
        raise UserError(f"{run} has no checkpoint {name!r}: use {', '.join(choices)}")
    return choices[name], folders[: folders.index(choices[name])]


def _verify(folder: Path, *, weights_only: bool = False, hashes: bool = True) -> tuple[dict[str, Any], list[Path]]:
    """The state of a checkpoint and the files of its parts, after checking their sizes and, with `hashes`, content."""
    state = _read_state(folder)
    entries = state["files"]
    if weights_only:
        weights = next(f"{part}.safetensors" for part in ("ema", ADAPTER, "model") if f"{part}.safetensors" in entries)
        entries = {weights: entries[weights]}
    for name, entry in entries.items():
        path = folder / name
        if not path.exists():
            raise CorruptCheckpoint(path, "it is missing")
        if (size := path.stat().st_size) != entry["bytes"]:
            raise CorruptCheckpoint(path, f"it has {size} bytes instead of {entry['bytes']}")
        if hashes and files.sha256(path) != entry["sha256"]:
            raise CorruptCheckpoint(path, "its SHA-256 is not the one that was written")
    return state, [folder / name for name in entries]


def _is_intact(folder: Path, **options: bool) -> bool:
    with contextlib.suppress(CorruptCheckpoint, UserError):
        _verify(folder, **options)
        return True
    return False


def _read_state(folder: Path) -> dict[str, Any]:
    """state.json, with the loss of validation.json if there is one."""
    state = _read_json(folder / STATE)
    if (version := state["format"]) != FORMAT:
        age, advice = ("a newer", "update this one") if version > FORMAT else ("an older", "continue with that one")
        formats = f"(format {version}, this one reads {FORMAT})"
        raise UserError(f"{folder} was written by {age} version of this project {formats}: {advice}")
    val_loss = None
    if (folder / VALIDATION).exists():
        validation = _read_json(folder / VALIDATION)
        if validation["step"] != state["step"]:
            raise CorruptCheckpoint(folder / VALIDATION, f"it is of step {validation['step']}")
        val_loss = validation["val_loss"]
    losses = [loss for loss in (val_loss, state["best_val_loss"]) if loss is not None]
    return {**state, "val_loss": val_loss, "best_val_loss": min(losses, default=None)}


def _read_json(path: Path) -> dict[str, Any]:
    """What _encode wrote, byte for byte. True of every format, so a damaged file never looks like another format."""
    try:
        data = path.read_bytes()
        content = json.loads(data)
        del content["sha256"]
        if data == _encode(content):
            return content
    except FileNotFoundError:
        raise CorruptCheckpoint(path, "it is missing") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CorruptCheckpoint(path, "it is not the JSON that was written")


def _folders(root: Path) -> list[Path]:
    """Complete checkpoints, oldest first; a name with `-new` is one that was about to replace that of its step."""
    return sorted(path for path in root.glob("step-*") if re.fullmatch(r"step-\d{8}(-new)?", path.name))


def _best(folders: list[Path]) -> Path | None:
    """The one with the lowest validation loss, the earliest of equals; None if no readable checkpoint has a loss."""
    losses = []
    for folder in folders:
        with contextlib.suppress(CorruptCheckpoint, UserError):
            if (loss := _read_state(folder)["val_loss"]) is not None:
                losses.append((loss, folder))
    return min(losses)[1] if losses else None


# Writing


def _write_checkpoint(root: Path, step: int, parts: Parts, state: dict[str, Any]) -> Path:
    if not root.exists():
        root.mkdir()
        files.fsync_folder(root.parent)
    _clean(root)
    folder = root / _name(step)
    # A run that was resumed from an earlier step may save this step again. The new folder gets a name of its own first,
    # so one of the two is there at any time.
    path = folder.with_name(f"{folder.name}-new") if folder.exists() else folder
    with files.new_folder(path, root / f"{files.TEMPORARY}{folder.name}", durable=True) as temporary:
        entries = {f"{part}.safetensors": write_tensors(temporary, part, tensors) for part, tensors in parts.items()}
        if state.get("lora"):
            files.write_file(temporary / ADAPTER_CONFIG, json.dumps(state["lora"]["peft"], indent=2), durable=True)
        content = _encode({"format": FORMAT, "step": step, **state, "files": entries})
        files.write_file(temporary / STATE, content, durable=True)
    _clean(root)
    return folder


def _clean(root: Path) -> None:
    """Remove what a crash left, and let a checkpoint that was about to replace another do so."""
    _remove_temporary(root)
    for new in list(root.glob("step-*-new")):
        folder = new.with_name(new.name.removesuffix("-new"))
        if folder.exists():
            _discard(folder)
        os.replace(new, folder)
        _remove_temporary(root)


def _prune(root: Path, step: int, keep_last: int) -> None:
    """Delete all but the last and the best, and those after `step`, which the run was resumed from before.

    A damaged checkpoint is deleted in its turn, but never keeps an intact one from being kept.
    """
    folders = _folders(root)
    past = [folder for folder in folders if folder.name <= _name(step)]
    intact = [folder for folder in past if _is_intact(folder, hashes=False)]
    keep = {*past[-keep_last:], *intact[-keep_last:], _best(intact)}
    for folder in folders:
        if folder not in keep:
            _discard(folder)
    _remove_temporary(root)


def _discard(folder: Path) -> None:
    """Rename it first: a crash during the removal must not leave a damaged `step-...` folder."""
    os.replace(folder, folder.with_name(f"{files.TEMPORARY}old-{folder.name}"))


def _remove_temporary(root: Path) -> None:
    for path in [*root.glob(f"{files.TEMPORARY}*"), *root.glob(f"step-*/{files.TEMPORARY}*")]:
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


def write_tensors(
    folder: Path, part: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> dict[str, Any]:
    """Write PART.safetensors and flush it -> its size and SHA-256."""
    path, prefix = folder / f"{part}.safetensors", PEFT_PREFIX if part == ADAPTER else ""
    tensors = {prefix + name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    try:
        safetensors.torch.save_file(tensors, path, metadata)
    except SafetensorError as error:  # the number of the system's error is only in its text
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
    path.chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that only their owner can read
    with files.named_errors(path), path.open("r+b") as file:
        os.fsync(file.fileno())
    return {"bytes": path.stat().st_size, "sha256": files.sha256(path)}
