"""The options of a training run: defaults, presets, and what is refused before anything is done.

A preset is a TOML file in model/training/presets, or one of the user's. Values come from the preset, then the command
line.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
import tyro

from kernels import gpu_problem
from model import config, lora
from model.cli import UserError
from model.config import GPTConfig
from model.lora import LoraConfig
from model.training import optim, run_folder
from model.training.parallel import World
from model.training.track import Library, require

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
Dtype = Literal["auto", "bfloat16", "float16", "tf32", "float32"]
Plan = tyro.conf.Suppress[tyro.conf.Fixed[tuple[tuple[int, int], ...]]]  # recorded, and no option of the command line
PRESETS = Path(__file__).parent / "presets"
# old name -> new name; both are understood
ALIASES = {"--readers": "--num-workers", "--which": "--checkpoint", "--tensorboard": "--track=tensorboard"}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a GPT on a text. Defaults are those of the preset; without --preset, of what fits this machine."""

    preset: str  # defaults of all other options: first-run, tiny, gpt2-124M, ..., or a .toml file of yours
    data: Path = Path("Book")  # a .txt file, a folder of them, a prepared token folder, or .bin shards
    out: Folder = None  # folder of the run; without it runs/PRESET, or the next free runs/PRESET-2, -3, ...
    resume: Folder = None  # folder of a run to resume; options that cannot change then are refused by name
    checkpoint: str = "last"  # with --resume, where to resume from: last, best, or a name such as step-00000100
    or_resume: bool = False  # resume the run in --out if it exists: for schedulers that restart a command

    tokenizer: str  # char (one per character), gpt2 (50,257 byte pairs), bpe:N (N ids, trained on --data), or a folder
    n_layer: int  # transformer blocks
    n_head: int  # attention heads; divides --n-embd
    n_embd: int  # width of the model, channels
    context: int  # tokens per sequence
    dropout: float  # probability in [0, 1), in training
    attention_dropout: float | None = None  # of attention's probabilities; --dropout if not given. Slow on a CPU
    bias: bool = True  # bias vectors in linear layers and LayerNorm
    activation_function: Literal["gelu_new", "gelu"] = "gelu_new"  # GELU: the tanh approximation, as in GPT-2, or exact
    layer_norm_epsilon: float = 1e-5  # added to the variance in LayerNorm
    document_mask: bool = False  # attention does not cross end-of-text tokens
    init: Folder = None  # begin with the weights, shape and tokenizer of a run, or of a Hugging Face folder
    lora_rank: int = 0  # train adapters of this rank for the model of --init, which is frozen; 0 trains all weights
    lora_alpha: float = 16.0  # adapters are scaled by --lora-alpha / --lora-rank
    lora_dropout: float = 0.0  # of adapters' inputs, probability in [0, 1), in training
    lora_targets: str = "c_attn,c_proj,c_fc"  # matrices to adapt, by name suffix, such as mlp.c_proj
    skip_bad_shards: bool = False  # skip .bin shards that cannot be read, instead of stopping at the first

    batch_size: int | Literal["auto"]  # sequences per micro-step and process; auto: the largest that fits into memory
    grad_accum: int = 1  # micro-steps; a step has batch_size * grad_accum sequences, in all processes
    steps: int  # optimizer steps
    minutes: float = 0.0  # minutes of training in place of --steps: as many steps as fit, measured on the way; 0: off
    plan: Plan = ()  # of --minutes: after step a, a run of b steps was planned, ((a, b), ...)
    until_loss: float = 0.0  # end at the first evaluation with at most this validation loss, nats per token; 0: off
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of the blocks, and AdamW for the rest
    lr: float  # peak learning rate
    min_lr: float  # learning rate at the end
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"  # after warm-up; wsd: constant, then a cooldown
    warmup_steps: int = 100  # steps in which the learning rate rises from 0
    cooldown_steps: int = 0  # steps at the end in which wsd falls to --min-lr; 0 is a fifth of all
    weight_decay: float = 0.1  # of matrices and embeddings, per unit of learning rate
    beta1: float = 0.9  # AdamW: decay of the running mean of the gradient
    beta2: float = 0.95  # AdamW: decay of the running mean of its square
    grad_clip: float = 1.0  # maximum norm of the gradient; 0: no clipping
    ema: float = 0.0  # decay of the average of the weights that is evaluated and saved, for instance 0.999; 0: none
    spikes: Literal["off", "skip", "stop"] = "off"  # steps whose loss or gradient is an outlier: skip, or end the run
    spike_z: float = 6.0  # what counts as a spike, in standard deviations of the last 128 steps
    seed: int = 1337  # the same seed on the same machine gives the same run

    eval_every: int = 250  # steps between evaluations of the validation loss
    eval_windows: int = 800  # windows of --context per evaluation, at most; spread over the text, always the same
    save_every: int = 250  # steps between checkpoints; a new best validation loss is saved too
    keep_last: int = 2  # checkpoints to keep in addition to the best
    log_every: int = 10  # steps between progress lines
    sample_tokens: int = 100  # tokens of text sampled at each evaluation; 0: none
    track: Library = "none"  # also log the metrics to TensorBoard, Trackio or Weights & Biases

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: the GPU if there is one
    dtype: Dtype = "auto"  # of activations; auto: by the GPU's capability
    backend: Literal["auto", "triton", "eager"] = "auto"  # kernels: our own in Triton, or PyTorch's
    compile: bool = False  # torch.compile the model: minutes at the start, faster steps
    graph: Literal["auto", "on", "off"] = (
        "auto"  # the whole step as one CUDA graph; auto: on one GPU, unless there are many micro-steps
    )
    recompute: bool = False  # activation checkpointing: less memory, slower steps
    parallel: Literal["ddp", "fsdp"] = "ddp"  # with torchrun: every process holds all weights, or a shard of them
    num_workers: int = 2  # threads that read tokens ahead
    force: bool = False  # start although more memory is predicted than the device has
    profile: bool = False  # record three steps into trace.json.gz
    memory_snapshot: bool = False  # record allocations on the GPU into memory.pickle

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "tf32" else getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def sequences(self) -> int:
        """Of one step, in all processes. With --batch-size auto, as many as with the preset's batch size."""
        batch_size = preset(self.preset).batch_size if self.batch_size == "auto" else self.batch_size
        assert batch_size != "auto"  # a preset has a number
        return batch_size * self.grad_accum

    def uses_graph(self, world: World) -> bool:
        is_small = self.grad_accum * self.n_layer <= GRAPH_BLOCKS
        return (
            world.device.type == "cuda"
            and world.size == 1
            and (self.graph == "on" or (self.graph == "auto" and is_small))
        )

    def gpt_config(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(
            vocab_size=vocab_size,
            n_positions=self.context,
            n_embd=self.n_embd,
            n_layer=self.n_layer,
            n_head=self.n_head,
            embd_pdrop=self.dropout,
            resid_pdrop=self.dropout,
            attn_pdrop=self.dropout if self.attention_dropout is None else self.attention_dropout,
            bias=self.bias,
            activation_function=self.activation_function,
            layer_norm_epsilon=self.layer_norm_epsilon,
        )

    @property
    def lora(self) -> LoraConfig | None:
        if not self.lora_rank:
            return None
        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, tuple(self.lora_targets.split(",")))

    def is_reached(self, val_loss: float | None) -> bool:
        """Whether a validation loss ends the run."""
        return val_loss is not None and self.until_loss > 0 and val_loss <= self.until_loss

    def lr_at(self, step: int) -> float:
        """Learning rate of step 1, 2, ...; of a run without end as long as --minutes has not set `steps`."""
        place, steps = float(step), self.steps
        if self.plan and step <= self.plan[0][0]:
            steps = 0
        elif self.plan:
            place, steps = optim.planned(step, self.plan, self.warmup_steps), self.plan[0][1]
        return optim.lr_at(
            place - 1,
            lr=self.lr,
            min_lr=self.min_lr,
            warmup_steps=self.warmup_steps,
            steps=steps or sys.maxsize,
            schedule=self.schedule,
            cooldown_steps=self.cooldown_steps or steps // 5,
        )

    def run_options(self) -> dict[str, Any]:
        """The options that belong to the run rather than to one invocation; JSON-serialisable."""
        options = {key: value for key, value in asdict(self).items() if key not in PER_INVOCATION}
        init = None if self.init is None else str(self.init.absolute())
        return {**options, "data": str(self.data), "init": init, "plan": [list(pair) for pair in self.plan]}

    def check(self) -> None:
        """Raise UserError, naming the option, for a value or a combination that cannot work."""
        counts = "n_layer n_head n_embd context grad_accum eval_every eval_windows save_every keep_last log_every"
        cooldown_limit = math.inf if self.minutes else self.steps
        ranges = [(name, getattr(self, name) >= 1, "at least 1") for name in [*counts.split(), "num_workers"]]
        ranges += [
            ("batch_size", self.batch_size == "auto" or self.batch_size >= 1, "at least 1"),
            ("minutes", 0 <= self.minutes < math.inf, "0 (off) or more"),
            ("until_loss", 0 <= self.until_loss < math.inf, "0 (off) or more"),
            ("steps", self.steps >= 1 or (self.steps == 0 and self.minutes > 0), "at least 1"),
            ("sample_tokens", self.sample_tokens >= 0, "0 (none) or more"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
            ("cooldown_steps", 0 <= self.cooldown_steps <= cooldown_limit, f"from 0 to --steps, {self.steps}"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            ("lr", 0 < self.lr < math.inf, "a number above 0"),
            ("min_lr", 0 <= self.min_lr <= self.lr, f"from 0 to --lr, {self.lr}"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "0 or more"),
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("ema", 0 <= self.ema < 1, "in [0, 1)"),
            ("grad_clip", 0 <= self.grad_clip < math.inf, "0 (off) or more"),
            ("spike_z", 0 < self.spike_z < math.inf, "a number above 0"),
            ("dropout", 0 <= self.dropout < 1, "in [0, 1)"),
            ("attention_dropout", 0 <= (self.attention_dropout or 0) < 1, "in [0, 1)"),
            ("lora_rank", self.lora_rank >= 0, "0 (none) or more"),
            ("lora_rank", not self.lora_rank or self.init is not None, "omitted without --init, the model to adapt"),
            ("lora_rank", self.lora_rank <= self.n_embd, f"at most the model's width, {self.n_embd}"),
            ("lora_alpha", 0 < self.lora_alpha < math.inf, "a number above 0"),
            ("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)"),
            (
                "lora_dropout",
                not (self.lora_dropout and self.recompute),
                "0 with --recompute, which needs its masks twice",
            ),
            ("lora_targets", set(self.lora_targets.split(",")) <= {*lora.TARGETS}, f"some of {','.join(lora.TARGETS)}"),
            ("tokenizer", self.init is None or self.tokenizer == OF_INIT, "omitted with --init, which has its own"),
            ("checkpoint", self.resume is not None or self.checkpoint == "last", "omitted without --resume"),
            ("cooldown_steps", self.cooldown_steps == 0 or self.schedule == "wsd", "omitted without --schedule wsd"),
            ("or_resume", not self.or_resume or self.out is not None, "omitted without --out"),
        ]
        for name, good, words in ranges:
            if not good:
                raise UserError(f"{_flag(name)} must be {words}, got {getattr(self, name)}")
        try:
            self.gpt_config(vocab_size=1)
        except ValueError as error:
            raise UserError(str(error)) from None

    def check_machine(self, world: World) -> None:
        """Raise UserError for what cannot work on this device or in this number of processes."""
        require(self.track)
        cuda, several, fsdp = world.device.type == "cuda", world.size > 1, self.parallel == "fsdp"
        restarts = several and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) > 0
        impossible = {
            "--dtype tf32 is a format of NVIDIA GPUs: use --dtype float32": self.dtype == "tf32" and not cuda,
            "--memory-snapshot records a GPU's memory, and this is a CPU: omit it": self.memory_snapshot and not cuda,
            f"--checkpoint {self.checkpoint} is the state before a step that went wrong: resume from another one": (
                self.resume is not None and self.checkpoint.split("/")[0] == "failed"
            ),
            "--graph on needs a CUDA device: omit it": self.graph == "on" and not cuda,
            "--graph on is for one process: omit it with torchrun": self.graph == "on" and several,
            "--parallel fsdp needs several processes: start it with torchrun": fsdp and not several,
            "--optimizer muon works on whole matrices and --parallel fsdp shards them: use --parallel ddp": (
                fsdp and self.optimizer == "muon"
            ),
            "--compile does not work with --parallel fsdp: omit one of them": fsdp and self.compile,
            "torchrun --max-restarts needs --out or --resume, so that a restart finds the run": (
                restarts and not (self.out or self.resume)
            ),
        }
        for message, applies in impossible.items():
            if applies:
                raise UserError(message)

    def check_resumable(self, stored: TrainConfig, folder: Path) -> None:
        """Raise UserError for an option that may not change when a run is resumed."""
        for name in (field.name for field in fields(self) if field.name not in (*RESUMABLE, *PER_INVOCATION)):
            new, old = getattr(self, name), getattr(stored, name)
            if new != old and not (name in ("minutes", "plan") and not new):  # --steps takes the place of --minutes
                raise UserError(
                    f"{_flag(name)} {new} cannot be changed when a run is resumed (in {folder} it is {old}): omit it, "
                    f"or start a new run\nwhat can be changed: {', '.join(map(_flag, RESUMABLE))}"
                )
        if self.out is not None:
            raise UserError(f"--out {self.out} cannot be changed when a run is resumed: omit it")
        if self.batch_size != "auto" and self.sequences != stored.sequences:
            raise UserError(
                f"--batch-size {self.batch_size} times --grad-accum {self.grad_accum} is {self.sequences} sequences a "
                f"step, and in {folder} it is {stored.sequences}: change both, so that their product stays"
            )


# Layers times micro-steps that `--graph auto` records: the driver keeps memory for each kernel of a graph, and no
# prediction counts it.
GRAPH_BLOCKS = 1024
OF_INIT = "of --init"  # the tokenizer of a run that begins with another model
PER_INVOCATION = ("out", "resume", "checkpoint", "or_resume", "force")  # not stored with the run
RESUMABLE = (
    "steps", "until_loss", "eval_every", "eval_windows", "save_every", "keep_last", "log_every", "sample_tokens",
    "track", "batch_size", "grad_accum", "device", "backend", "compile", "graph", "recompute", "parallel",
    "num_workers", "profile", "memory_snapshot", "skip_bad_shards", "init",
)  # fmt: skip


def preset_names() -> list[str]:
    """The presets of this project, small before large."""
    return sorted((path.stem for path in PRESETS.glob("*.toml")), key=lambda name: (name.startswith("gpt2"), name))


def read_preset(name: str) -> dict[str, Any]:
    """The content of a preset: a name, or the path of a TOML file of the user's.

    Keys are train.py's options with underscores. `preset = "NAME"` takes the values of that preset for what the file
    does not set.
    """
    is_file = name.endswith(".toml")
    if not is_file and name not in preset_names():
        raise UserError(f"unknown preset {name!r}: choose one of {', '.join(preset_names())}, or a .toml file")
    path = Path(name) if is_file else PRESETS / f"{name}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    base = values.pop("preset", None)
    return {**(read_preset(base) if base is not None else {}), **values, "preset": name}


def preset(name: str) -> TrainConfig:
    """The options of a preset, by name or file."""
    values = read_preset(name)
    shape = values.pop("shape", None)
    if shape is not None and shape not in config.PRESETS:
        raise UserError(f"{name}: unknown shape {shape!r}: choose one of {', '.join(config.PRESETS)}")
    model = config.PRESETS[shape] if shape else None
    of_shape = {} if model is None else dict(
        n_layer=model.n_layer, n_head=model.n_head, n_embd=model.n_embd, context=model.n_positions,
        dropout=model.resid_pdrop, bias=model.bias,
    )  # fmt: skip
    return _from_values({**of_shape, **values}, name)


def stored_config(folder: Path) -> TrainConfig:
    """The options of the run in `folder`."""
    return _from_values(run_folder.stored_options(folder), folder / run_folder.CONFIG)


def _from_values(values: dict[str, Any], source: Path | str) -> TrainConfig:
    """TrainConfig(**values), with the types checked: they come from a file. UserError names the file and the option."""
    if values.get("tensorboard") is not None:  # an older version's option
        values = {**values, "track": "tensorboard" if values["tensorboard"] else "none"}
        del values["tensorboard"]
    renamed = {old.strip("-"): new.strip("-").replace("-", "_") for old, new in ALIASES.items()}
    values = {renamed.get(name, name): value for name, value in values.items()}
    known = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{source}: unknown option {unknown[0]!r}: see python train.py --help")
    try:
        plan = tuple((int(at), int(steps)) for at, steps in values.get("plan", ()))
    except (TypeError, ValueError):
        raise UserError(f"{source}: plan must be pairs of steps, got {values['plan']!r}") from None
    try:
        init = None if values.get("init") is None else Path(values["init"])
        cfg = TrainConfig(**{**values, "data": Path(values.get("data", "Book")), "init": init, "plan": plan})
    except TypeError as error:
        raise UserError(f"{source} lacks options: {str(error).split(': ')[-1]}") from None
    for name, hint in get_type_hints(TrainConfig).items():
        value, wanted = getattr(cfg, name), TrainConfig.__annotations__[name]
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{source}: {name} must be one of {', '.join(get_args(hint))}, got {value!r}")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        good = {"int": type(value) is int, "float": number, "bool": type(value) is bool, "str": isinstance(value, str)}
        if not good.get(wanted, True) or (name == "batch_size" and type(value) is not int):
            raise UserError(f"{source}: {name} must be {wanted.split(' | ')[0]}, got {value!r}")
    return cfg


def default_config(args: list[str]) -> TrainConfig:
    """The values of options that are not in `args`: of the run to resume, of the preset, or of this machine.

    The shape of the model is that of --init, where it is in `args`.
    --steps in `args` takes the place of --minutes there. Raises UserError for both in `args`.
    """
    if folder := _option(args, "--resume"):
        cfg = stored_config(Path(folder))
    elif name := _option(args, "--preset"):
        cfg = preset(name)
    else:
        has_gpu = _option(args, "--device") != "cpu" and torch.cuda.is_available() and gpu_problem() is None
        cfg = preset("gpt2-first-run" if has_gpu else "first-run")
    if (init := _option(args, "--init")) and not folder:
        shape = lora.shape_of(Path(init))
        cfg = replace(
            cfg, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, context=shape.n_positions,
            bias=shape.bias, activation_function=shape.activation_function,  # type: ignore[arg-type]
            layer_norm_epsilon=shape.layer_norm_epsilon, tokenizer=OF_INIT,
        )  # fmt: skip
    if _option(args, "--steps"):
        if _option(args, "--minutes"):
            raise UserError("--minutes sets the number of steps itself: give either --minutes or --steps")
        cfg = replace(cfg, minutes=0.0, plan=())
    return cfg


def _option(args: list[str], name: str) -> str | None:
    """The value of the last `--name VALUE` or `--name=VALUE` in args."""
    values = [value for key, value in pairwise(args) if key == name and value[:2] != "--"]
    values += [arg.removeprefix(f"{name}=") for arg in args if arg.startswith(f"{name}=")]
    return values[-1] if values else None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def pick_dtype(dtype: Dtype, device: torch.device) -> Dtype:
    """Resolve "auto": bfloat16 from compute capability 8.0, float16 on 7.x, else float32."""
    if dtype != "auto":
        return dtype
    capability = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0
    return "bfloat16" if capability >= 8 else "float16" if capability == 7 else "float32"
