"""The options of a training run: their defaults, presets, and what is refused before anything is done.

A preset is a TOML file in model/presets, or one of the user's; values come from the preset, then the command line.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from model import config
from model.cli import UserError
from model.config import GPTConfig
from model.training import run_folder
from model.training.parallel import World

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Dtype = Literal["auto", "bfloat16", "float16", "tf32", "float32"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a GPT on a text. Defaults are those of the preset; without --preset, of what fits this machine."""

    preset: str  # values of all other options: tiny, shakespeare-char, gpt2-124M, ..., or a .toml file of yours
    data: Path = Path("Book")  # a .txt file, a folder of them, a prepared token folder, or .bin shards
    out: Folder = None  # folder of the run; without it runs/PRESET, or the next free runs/PRESET-2, -3, ...
    resume: Folder = None  # folder of a run to go on with; what may change then is said where something else does
    which: str = "last"  # with --resume, the checkpoint to go on from: last, best, or a name such as step-00000100
    or_resume: bool = False  # if --out holds this run already, go on with it: for schedulers that start a command anew

    tokenizer: str  # char (one token per character) or gpt2 (byte-pair encoding, 50,257 tokens)
    n_layer: int  # blocks
    n_head: int  # attention heads; divides --n-embd
    n_embd: int  # width of the model, channels
    context: int  # tokens that the model sees at once
    dropout: float  # probability in [0, 1) of leaving a value out, in training
    bias: bool = True  # bias vectors in linear layers and LayerNorm
    document_mask: bool = False  # attention stays inside a document, between two end-of-text tokens
    skip_bad_shards: bool = False  # leave out .bin shards that cannot be read, instead of stopping at the first

    batch_size: int | Literal["auto"]  # sequences per micro-step and process: what memory has to hold; auto: what fits
    grad_accum: int = 1  # a step learns from batch_size * grad_accum sequences of --context tokens, in all processes
    steps: int  # updates of the weights
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, and AdamW for the rest
    lr: float  # peak learning rate
    min_lr: float  # learning rate at the end
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # after warm-up; wsd: constant, then down
    warmup_steps: int = 100  # steps in which the learning rate rises from 0
    cooldown_steps: int = 0  # steps at the end in which wsd falls to --min-lr; 0 is a fifth of all
    weight_decay: float = 0.1  # of matrices and embeddings, per unit of learning rate
    beta1: float = 0.9  # AdamW: memory of the mean gradient
    beta2: float = 0.95  # AdamW: memory of the squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    ema: float = 0.0  # decay of an average of the weights, 0.999 for instance, to be measured and kept beside; 0: none
    spikes: Literal["off", "skip", "stop"] = "off"  # steps whose loss or gradient stands out: leave out, or end the run
    spike_z: float = 6.0  # how far a spike stands out, in standard deviations of the last 128 steps
    seed: int = 1337  # the same seed on the same machine gives the same run

    eval_every: int = 250  # steps between measurements of the validation loss
    eval_windows: int = 800  # windows of --context per measurement, at most; spread over the text, always the same
    save_every: int = 250  # steps between checkpoints; a new best validation loss is saved too
    keep_last: int = 2  # checkpoints that stay, beside the best
    log_every: int = 10  # steps between progress lines
    sample_tokens: int = 100  # tokens of text written at each measurement; 0: none
    tensorboard: bool = False  # write the metrics for TensorBoard too

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    dtype: Dtype = "auto"  # of activations; by the GPU's capability
    backend: Literal["auto", "triton", "eager"] = "auto"  # kernels: our own in Triton, or PyTorch's
    compile: bool = False  # torch.compile the model: minutes at the start, faster steps
    graph: Literal["auto", "on", "off"] = "auto"  # the whole step as one CUDA graph; auto: on one GPU
    recompute: bool = False  # keep less for the backward pass and compute it again: less memory, slower steps
    parallel: Literal["ddp", "fsdp"] = "ddp"  # with torchrun: every process holds all weights, or a share of them
    readers: int = 2  # threads that read tokens ahead
    profile: bool = False  # record three steps into trace.json.gz
    memory_snapshot: bool = False  # record allocations on the GPU into memory.pickle


ONE_CALL = ("out", "resume", "which", "or_resume")  # options of one call, not of the run
RESUMABLE = (
    "steps", "eval_every", "eval_windows", "save_every", "keep_last", "log_every", "sample_tokens", "tensorboard",
    "batch_size", "grad_accum", "device", "backend", "compile", "graph", "recompute", "parallel", "readers", "profile",
    "memory_snapshot", "skip_bad_shards",
)  # fmt: skip


def preset(name: str) -> TrainConfig:
    """The options of a preset, by name or file."""
    values = run_folder.read_preset(name)
    shape = values.pop("shape", None)
    if shape is not None and shape not in config.PRESETS:
        raise UserError(f"{name}: unknown shape {shape!r}: choose one of {', '.join(config.PRESETS)}")
    model = config.PRESETS[shape] if shape else None
    of_shape = {} if model is None else dict(
        n_layer=model.n_layer, n_head=model.n_head, n_embd=model.n_embd, context=model.n_positions,
        dropout=model.resid_pdrop, bias=model.bias,
    )  # fmt: skip
    return _from_values({**of_shape, **values}, name)


def _from_values(values: dict[str, Any], source: Path | str) -> TrainConfig:
    """TrainConfig(**values) with the types checked: they come from a file. UserError names the file and the option."""
    known = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{source}: unknown option {unknown[0]!r}: see python train.py --help")
    try:
        cfg = TrainConfig(**{**values, "data": Path(values.get("data", "Book"))})
    except TypeError as error:
        raise UserError(f"{source} lacks options: {str(error).split(': ')[-1]}") from None
    for name in known:
        value, wanted = getattr(cfg, name), TrainConfig.__annotations__[name]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = {"int": type(value) is int, "float": number, "bool": type(value) is bool, "str": isinstance(value, str)}
        if not good.get(wanted, True) or (name == "batch_size" and type(value) is not int):
            raise UserError(f"{source}: {name} must be {wanted.split(' | ')[0]}, got {value!r}")
    return cfg


def default_config(args: list[str]) -> TrainConfig:
    """The values of the options that `args` leaves out: of the run to resume, of the preset, or of this machine."""
    if folder := _option(args, "--resume"):
        return stored_config(Path(folder))
    if name := _option(args, "--preset"):
        return preset(name)
    has_gpu = torch.cuda.is_available() and _option(args, "--device") != "cpu"
    return preset("gpt2-first-run" if has_gpu else "tiny")


def _option(args: list[str], name: str) -> str | None:
    """The value of the last `--name VALUE` or `--name=VALUE` in args."""
    values = [value for key, value in pairwise(args) if key == name and value[:2] != "--"]
    values += [arg.removeprefix(f"{name}=") for arg in args if arg.startswith(f"{name}=")]
    return values[-1] if values else None


def check(cfg: TrainConfig) -> None:
    """Raises UserError, naming the option, for a value or a combination that cannot work."""
    counts = (
        "n_layer n_head n_embd context grad_accum steps eval_every eval_windows save_every keep_last log_every readers"
    )
    ranges = [(name, getattr(cfg, name) >= 1, "at least 1") for name in counts.split()]
    ranges += [
        ("batch_size", cfg.batch_size == "auto" or cfg.batch_size >= 1, "at least 1"),
        ("sample_tokens", cfg.sample_tokens >= 0, "0 (none) or more"),
        ("warmup_steps", cfg.warmup_steps >= 0, "0 or more"),
        ("cooldown_steps", 0 <= cfg.cooldown_steps <= cfg.steps, f"from 0 to --steps, {cfg.steps}"),
        ("seed", 0 <= cfg.seed < 2**63, "from 0 to 2**63 - 1"),
        ("lr", 0 < cfg.lr < math.inf, "a number above 0"),
        ("min_lr", 0 <= cfg.min_lr <= cfg.lr, f"from 0 to --lr, {cfg.lr}"),
        ("weight_decay", 0 <= cfg.weight_decay < math.inf, "0 or more"),
        ("beta1", 0 <= cfg.beta1 < 1, "in [0, 1)"),
        ("beta2", 0 <= cfg.beta2 < 1, "in [0, 1)"),
        ("ema", 0 <= cfg.ema < 1, "in [0, 1)"),
        ("grad_clip", 0 <= cfg.grad_clip < math.inf, "0 (off) or more"),
        ("spike_z", 0 < cfg.spike_z < math.inf, "a number above 0"),
        ("dropout", 0 <= cfg.dropout < 1, "in [0, 1)"),
        ("which", cfg.resume is not None or cfg.which == "last", "left out where there is no --resume"),
        ("cooldown_steps", cfg.cooldown_steps == 0 or cfg.schedule == "wsd", "left out without --schedule wsd"),
        ("or_resume", not cfg.or_resume or cfg.out is not None, "left out without --out"),
    ]
    for name, good, words in ranges:
        if not good:
            raise UserError(f"{_flag(name)} must be {words}, got {getattr(cfg, name)}")
    try:
        gpt_config(cfg, vocab_size=1)
    except ValueError as error:
        raise UserError(str(error)) from None


def check_machine(cfg: TrainConfig, world: World) -> None:
    """Raises UserError for what cannot work here: on this device, in so many processes."""
    cuda, several = world.device.type == "cuda", world.size > 1
    impossible = [
        (cfg.dtype == "tf32" and not cuda, "--dtype tf32 is a format of NVIDIA GPUs: use --dtype float32"),
        (cfg.memory_snapshot and not cuda, "--memory-snapshot records a GPU's memory, and this is a CPU: leave it out"),
        (cfg.graph == "on" and not cuda, "--graph on needs a CUDA device: leave it out"),
        (cfg.graph == "on" and several, "--graph on is for one process: leave it out with torchrun"),
        (cfg.parallel == "fsdp" and not several, "--parallel fsdp needs several processes: start it with torchrun"),
        (
            cfg.parallel == "fsdp" and cfg.optimizer == "muon",
            "--optimizer muon works on whole matrices and --parallel fsdp cuts them up: use --parallel ddp",
        ),
        (cfg.parallel == "fsdp" and cfg.compile, "--compile does not go with --parallel fsdp: leave one of them out"),
        (
            several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0 and not (cfg.out or cfg.resume),
            "torchrun --max-restarts needs --out or --resume, so that a restart finds the run",
        ),
    ]  # fmt: skip
    for problem, words in impossible:
        if problem:
            raise UserError(words)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def gpt_config(cfg: TrainConfig, vocab_size: int) -> GPTConfig:
    return GPTConfig(
        vocab_size=vocab_size,
        n_positions=cfg.context,
        n_embd=cfg.n_embd,
        n_layer=cfg.n_layer,
        n_head=cfg.n_head,
        embd_pdrop=cfg.dropout,
        resid_pdrop=cfg.dropout,
        attn_pdrop=cfg.dropout,
        bias=cfg.bias,
    )


def check_resumable(cfg: TrainConfig, stored: TrainConfig, folder: Path) -> None:
    """Raises UserError for an option that may not change while a run goes on."""
    for name in (field.name for field in fields(cfg) if field.name not in (*RESUMABLE, *ONE_CALL)):
        if (new := getattr(cfg, name)) != (old := getattr(stored, name)):
            raise UserError(
                f"{_flag(name)} {new} cannot be changed when a run goes on (in {folder} it is {old}): leave it out, or "
                f"start a new run\nwhat can be changed: {', '.join(map(_flag, RESUMABLE))}"
            )
    if cfg.out is not None:
        raise UserError(f"--out {cfg.out} cannot be changed when a run goes on: leave it out")
    if cfg.batch_size != "auto" and sequences(cfg) != sequences(stored):
        raise UserError(
            f"--batch-size {cfg.batch_size} times --grad-accum {cfg.grad_accum} is {sequences(cfg)} sequences a step, "
            f"and in {folder} it is {sequences(stored)}: change both, so that their product stays"
        )


def sequences(cfg: TrainConfig) -> int:
    """Of one step, in all processes. With --batch-size auto, as many as the preset's batch size makes them."""
    batch_size = preset(cfg.preset).batch_size if cfg.batch_size == "auto" else cfg.batch_size
    assert batch_size != "auto"  # a preset has a number
    return batch_size * cfg.grad_accum


def stored_config(folder: Path) -> TrainConfig:
    """The options of the run in `folder`."""
    return _from_values(run_folder.stored_options(folder), folder / run_folder.CONFIG)


def run_options(cfg: TrainConfig) -> dict[str, Any]:
    """The options that belong to the run, and not to one call of it, as JSON can carry them."""
    return {**{key: value for key, value in asdict(cfg).items() if key not in ONE_CALL}, "data": str(cfg.data)}


def pick_dtype(dtype: Dtype, device: torch.device) -> Dtype:
    """What "auto" stands for: bfloat16 from compute capability 8.0 on, float16 on 7.x, else float32."""
    if dtype != "auto":
        return dtype
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return "bfloat16" if capability >= 8 else "float16" if capability == 7 else "float32"


def torch_dtype(cfg: TrainConfig) -> torch.dtype:
    return torch.float32 if cfg.dtype == "tf32" else getattr(torch, cfg.dtype)  # type: ignore[no-any-return]
