"""Train a GPT on a text of yours, and keep all there is to know about the run in one folder.

    python train.py                                          # what fits this machine, on Book/: minutes on a laptop
    python train.py --preset gpt2 --data corpus.txt --steps 20000            # GPT-2 124M on a GPU
    python train.py --resume runs/tiny --steps 4000          # go on, bit for bit as if it had never stopped

The folder: config.json, tokenizer/, data/ (tokens), metrics.jsonl, checkpoints/, sample.txt. Ctrl-C saves and says how
to go on.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import count, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from kernels import layer_norm, use_backend
from model import checkpoint, config, data
from model.accounting import mfu, peak_flops
from model.cli import LiveLine, UserError, pick_device, run
from model.config import GPTConfig
from model.evaluate import describe, evaluate
from model.generate import generate
from model.gpt import GPT, num_parameters
from model.optim import adamw, lr_at

PROMPT = "CHAPTER I. "
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 500, 0.6
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR")]
CONFIG, METRICS = "config.json", "metrics.jsonl"  # in the folder of a run


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a GPT on a text. Defaults are those of the preset; without --preset, of what fits this machine."""

    preset: str  # tiny, char, gpt2, gpt2-medium, gpt2-large or gpt2-xl: the values of all other options
    data: Path = Path("Book")  # text to learn: a .txt file, or a folder of them
    out: Folder = None  # folder of the run; without it runs/PRESET, or the next free runs/PRESET-2, -3, ...
    resume: Folder = None  # folder of a run to go on with: only --steps, reporting and machine options may change
    which: str = "last"  # with --resume, the checkpoint to go on from: last, best, or a name such as step-00000100

    tokenizer: str  # char (one token per character) or gpt2 (byte-pair encoding, 50,257 tokens)
    n_layer: int  # blocks
    n_head: int  # attention heads; divides --n-embd
    n_embd: int  # width of the model, channels
    context: int  # tokens that the model sees at once
    dropout: float  # probability in [0, 1) of leaving a value out, in training
    bias: bool = True  # bias vectors in linear layers and LayerNorm

    batch_size: int  # sequences per micro-step: what memory has to hold
    grad_accum: int = 1  # micro-steps per step; a step learns from batch_size * grad_accum * context tokens
    steps: int  # updates of the weights
    lr: float  # peak learning rate
    min_lr: float  # learning rate at the end
    warmup_steps: int = 100  # steps in which the learning rate rises from 0
    weight_decay: float = 0.1  # of matrices and embeddings, per unit of learning rate
    beta1: float = 0.9  # AdamW: memory of the mean gradient
    beta2: float = 0.95  # AdamW: memory of the squared gradient
    grad_clip: float = 1.0  # largest norm of the gradient; 0 does not clip
    seed: int = 1337  # the same seed on the same machine gives the same run

    eval_every: int = 250  # steps between measurements of the validation loss
    eval_batches: int = 50  # batches per measurement, at most; spread over the validation text, always the same
    save_every: int = 250  # steps between checkpoints; a new best validation loss is saved too
    log_every: int = 10  # steps between progress lines

    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of activations; auto is bfloat16 on a GPU that has it
    backend: Literal["auto", "triton", "eager"] = "auto"  # kernels: our own in Triton, or PyTorch's
    compile: bool = False  # torch.compile the model: minutes at the start, faster steps


def _preset(name: str, **training: Any) -> TrainConfig:
    shape = config.PRESETS[name]
    return TrainConfig(
        preset=name,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        context=shape.n_positions,
        dropout=shape.resid_pdrop,
        bias=shape.bias,
        **training,
    )


# GPT-2: half a million tokens per step, and the learning rates of Brown et al. 2020, table 2.1, for these sizes.
_GPT2: dict[str, Any] = dict(tokenizer="gpt2", steps=20_000, warmup_steps=700, eval_every=250, save_every=1000)
PRESETS = {
    # minutes on two CPU cores
    "tiny": _preset(
        "tiny", tokenizer="char", batch_size=16, steps=3000, lr=3e-3, min_lr=1e-4, beta2=0.99, log_every=50
    ),
    # nanoGPT's train_shakespeare_char.py
    "char": _preset("char", tokenizer="char", batch_size=64, steps=5000, lr=1e-3, min_lr=1e-4, beta2=0.99),
    "gpt2": _preset("gpt2", batch_size=16, grad_accum=32, lr=6e-4, min_lr=6e-5, **_GPT2),
    "gpt2-medium": _preset("gpt2-medium", batch_size=8, grad_accum=64, lr=3e-4, min_lr=3e-5, **_GPT2),
    "gpt2-large": _preset("gpt2-large", batch_size=4, grad_accum=128, lr=2.5e-4, min_lr=2.5e-5, **_GPT2),
    "gpt2-xl": _preset("gpt2-xl", batch_size=4, grad_accum=128, lr=2e-4, min_lr=2e-5, **_GPT2),
}
# A first run on a GPU has Book/ to read, not ten billion tokens: minutes, not hours.
FIRST_GPU_RUN = replace(PRESETS["gpt2"], grad_accum=1, steps=300, warmup_steps=30, eval_every=50, save_every=100)

SESSION = ("out", "resume", "which")  # options of one call, not of the run
RESUMABLE = ("steps", "eval_every", "eval_batches", "save_every", "log_every", "device", "backend", "compile")


def default_config(args: list[str]) -> TrainConfig:
    """The values of the options that `args` leaves out: of the run to resume, of the preset, or of this machine."""
    if resume := _option(args, "--resume"):
        return stored_config(Path(resume))
    if preset := _option(args, "--preset"):
        if preset not in PRESETS:
            raise UserError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
        return PRESETS[preset]
    return FIRST_GPU_RUN if torch.cuda.is_available() and _option(args, "--device") != "cpu" else PRESETS["tiny"]


def _option(args: list[str], name: str) -> str | None:
    """The value of the last `--name VALUE` or `--name=VALUE` in args."""
    values = [value for key, value in pairwise(args) if key == name and value[:2] != "--"]
    values += [arg.removeprefix(f"{name}=") for arg in args if arg.startswith(f"{name}=")]
    return values[-1] if values else None


def check(cfg: TrainConfig) -> None:
    """Raises UserError, naming the option, for a value that cannot work."""
    counts = "n_layer n_head n_embd context batch_size grad_accum steps eval_every eval_batches save_every log_every"
    ranges = [(name, getattr(cfg, name) >= 1, "at least 1") for name in counts.split()]
    ranges += [
        ("warmup_steps", cfg.warmup_steps >= 0, "0 or more"),
        ("seed", 0 <= cfg.seed < 2**63, "from 0 to 2**63 - 1"),
        ("lr", 0 < cfg.lr < math.inf, "a number above 0"),
        ("min_lr", 0 <= cfg.min_lr <= cfg.lr, f"from 0 to --lr, {cfg.lr}"),
        ("weight_decay", 0 <= cfg.weight_decay < math.inf, "0 or more"),
        ("beta1", 0 <= cfg.beta1 < 1, "in [0, 1)"),
        ("beta2", 0 <= cfg.beta2 < 1, "in [0, 1)"),
        ("grad_clip", 0 <= cfg.grad_clip < math.inf, "0 (off) or more"),
        ("dropout", 0 <= cfg.dropout < 1, "in [0, 1)"),
        ("which", cfg.resume is not None or cfg.which == "last", "left out where there is no --resume"),
    ]
    for name, good, words in ranges:
        if not good:
            raise UserError(f"{_flag(name)} must be {words}, got {getattr(cfg, name)}")
    try:
        gpt_config(cfg, vocab_size=1)
    except ValueError as error:
        raise UserError(str(error)) from None


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


def main(cfg: TrainConfig) -> None:
    check(cfg)
    device = torch.device(pick_device(cfg.device))
    if cfg.dtype == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        cfg = replace(cfg, dtype="bfloat16" if has_bfloat16 else "float32")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # float32 products as TF32
    with use_backend(cfg.backend), torch_errors_in_words():
        try:  # now, rather than after the text has been read
            layer_norm(torch.zeros(1, 8, device=device), torch.ones(8, device=device))
        except RuntimeError as error:
            raise UserError(str(error)) from None
        if cfg.resume is None:
            with new_folder(cfg) as folder:
                train(cfg, device, folder, prepare(cfg, folder), None)
        elif found := resume(cfg, cfg.resume):
            train(cfg, device, cfg.resume, *found)


@contextlib.contextmanager
def torch_errors_in_words() -> Iterator[None]:
    """What torch reports by a RuntimeError and a user can mend: no memory, and no compiler for torch.compile."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Recognised by its text: a CPU's allocator has no class of its own, and Inductor's must not be imported here.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise UserError(
                "this model and batch do not fit into memory\nlower --batch-size and raise --grad-accum by the same "
                "factor for the same result, or choose a smaller --context or preset"
            ) from None
        if "InvalidCxxCompiler" in str(error):
            raise UserError("--compile needs a C++ compiler, such as g++: install one, or leave it out") from None
        raise


@contextlib.contextmanager
def new_folder(cfg: TrainConfig) -> Iterator[Path]:
    """Make the folder of a new run. A run that ends before its first step takes its folder away again."""
    if cfg.out is None:
        names = (cfg.preset if n == 1 else f"{cfg.preset}-{n}" for n in count(1))
        folder = next(path for path in map(Path("runs").joinpath, names) if not path.exists())
    else:
        folder = cfg.out
        if (folder / CONFIG).exists():
            raise UserError(f"{folder} holds a run already: go on with --resume {folder}, or choose another --out")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already and is not an empty folder: choose another --out")
    was_there = folder.exists()
    folder.mkdir(parents=True, exist_ok=was_there)
    try:
        yield folder
    finally:
        metrics = folder / METRICS
        if not (metrics.exists() and metrics.stat().st_size):
            shutil.rmtree(folder, ignore_errors=True)
            if was_there:
                folder.mkdir(exist_ok=True)


def prepare(cfg: TrainConfig, folder: Path) -> data.TokenData:
    """Write the tokens, the tokenizer and the options of a new run into its folder."""
    tokens = data.prepare(cfg.data, folder / "data", cfg.tokenizer)
    tokens.tokenizer.save(folder / "tokenizer")
    store_config(cfg, gpt_config(cfg, tokens.tokenizer.n_vocab), folder)
    # Too short a text is refused before the model is built.
    data.get_batch(tokens.train, context=cfg.context, batch_size=1, seed=0, step=0)
    data.windows(tokens.val, cfg.context, batch_size=1)
    return tokens


def resume(cfg: TrainConfig, folder: Path) -> tuple[data.TokenData, checkpoint.Checkpoint] | None:
    """Open the folder of a run where nothing stands in the way; None, and a word about it, if the run is finished."""
    stored = stored_config(folder)
    for name in (field.name for field in fields(cfg) if field.name not in (*RESUMABLE, "resume", "which")):
        if (new := getattr(cfg, name)) != (old := getattr(stored, name)):
            raise UserError(
                f"{_flag(name)} {new} cannot be changed when a run goes on (in {folder} it is {old}): leave it out, or "
                f"start a new run\nwhat can be changed: {', '.join(map(_flag, RESUMABLE))}"
            )
    saved = checkpoint.load(folder, cfg.which)
    done = saved.state["step"]
    if done > cfg.steps:
        raise UserError(f"--steps {cfg.steps} is less than the {done} steps that {folder} has done: give more, or none")
    if done == cfg.steps:
        print(f"{folder} is finished, all {done} steps of it; for more: {_command(folder)} --steps {2 * done}")
        return None
    tokens = data.load(folder / "data")
    trim_metrics(folder / METRICS, done)
    store_config(cfg, gpt_config(cfg, tokens.tokenizer.n_vocab), folder)
    return tokens, saved


def _command(folder: Path) -> str:
    return f"python train.py --resume {shlex.quote(str(folder))}"


def stored_config(folder: Path) -> TrainConfig:
    """The options of the run in `folder`."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_bytes())["train"]
        return TrainConfig(**{**values, "data": Path(values["data"])})
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} holds no run: there is no {CONFIG} in it") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, or of another version of this project: start a new run") from None


def store_config(cfg: TrainConfig, model: GPTConfig, folder: Path) -> None:
    content = {"train": run_options(cfg), "model": model.to_dict()}
    replace_text(folder / CONFIG, json.dumps(content, indent=2) + "\n")


def run_options(cfg: TrainConfig) -> dict[str, Any]:
    """The options that belong to the run, and not to one call of it, as JSON can carry them."""
    return {**{key: value for key, value in asdict(cfg).items() if key not in SESSION}, "data": str(cfg.data)}


def trim_metrics(path: Path, step: int) -> None:
    """Drop the rows after `step`, which will be written again, and a last row that a crash has cut in two."""
    rows = path.read_text().splitlines(keepends=True) if path.exists() else []
    replace_text(path, "".join(row for row in rows if row.endswith("}\n") and json.loads(row)["step"] <= step))


def replace_text(path: Path, text: str) -> None:
    """Write a file whole, or leave the old one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def train(
    cfg: TrainConfig, device: torch.device, folder: Path, tokens: data.TokenData, saved: checkpoint.Checkpoint | None
) -> None:
    """Train to cfg.steps, from the beginning or from a checkpoint, and report.

    Nothing waits for the GPU between two lines of the log. A loss or gradient that is not finite is noticed on the
    device: from that step on the optimizer leaves the weights alone, and the next look at `bad_step` ends the run.
    """
    torch.manual_seed(cfg.seed)
    model = GPT(gpt_config(cfg, tokens.tokenizer.n_vocab), dtype=getattr(torch, cfg.dtype)).to(device)
    optimizer = adamw(model, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay)
    if saved is not None:
        checkpoint.restore(saved, model, optimizer)
    first = saved.state["step"] + 1 if saved else 1
    forward = torch.compile(model) if cfg.compile else model
    bad_step = torch.zeros((), device=device)  # the first step with a loss or gradient that is not finite; 0: none
    print(f"{folder} | {num_parameters(model):,} parameters | {device}, {cfg.dtype}, {cfg.backend} kernels")
    print(f"{cfg.data} | {len(tokens.train):,} tokens to learn from, {len(tokens.val):,} for validation", flush=True)
    with Log(cfg, folder, model, saved) as log, stop_signals() as received:
        for step in range(first, cfg.steps + 1):
            lr = lr_at(step - 1, lr=cfg.lr, min_lr=cfg.min_lr, warmup_steps=cfg.warmup_steps, steps=cfg.steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = torch.zeros((), device=device)
            for micro_step in range((step - 1) * cfg.grad_accum, step * cfg.grad_accum):
                idx, targets = batch(cfg, tokens, device, micro_step)
                micro_loss = forward(idx, targets)[1] / cfg.grad_accum
                micro_loss.backward()
                loss += micro_loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip or math.inf)
            bad_step = torch.where((bad_step == 0) & ~torch.isfinite(loss + norm), step, bad_step)
            optimizer.found_inf = (bad_step > 0).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()

            stop, last = bool(received), step == cfg.steps
            measure = last or step % cfg.eval_every == 0
            save = stop or last or step % cfg.save_every == 0
            if not (measure or save or step == 1 or step % cfg.log_every == 0):
                continue
            if bad_step > 0:
                raise Diverged(folder, int(bad_step))
            log.training(step, loss.item(), norm.item(), lr)
            val_loss = None
            if measure:
                val_loss = validation_loss(cfg, model, tokens)
                if not math.isfinite(val_loss):
                    raise Diverged(folder, step)
                save |= log.validation(step, val_loss)  # a new best
            if save:
                checkpoint.save(
                    folder,
                    step,
                    model,
                    optimizer,
                    config=run_options(cfg),
                    val_loss=val_loss,
                    best_val_loss=log.best,
                    elapsed_s=log.elapsed_s(),
                )
            if stop and not last:
                log.line.print(f"stopped and saved at step {step}; to go on: {_command(folder)}")
                raise SystemExit(128 + received[0])
            log.restart_clock(step)
    report(cfg, folder, tokens, model, log.elapsed_s())


def batch(cfg: TrainConfig, tokens: data.TokenData, device: torch.device, micro_step: int) -> list[Tensor]:
    """idx and targets of one micro-step, (batch_size, context) int64 on the device."""
    pair = data.get_batch(tokens.train, context=cfg.context, batch_size=cfg.batch_size, seed=cfg.seed, step=micro_step)
    if device.type == "cpu":
        return list(pair)
    return [x.pin_memory().to(device, non_blocking=True) for x in pair]  # pinned: the host need not wait for the copy


def validation_loss(cfg: TrainConfig, model: GPT, tokens: data.TokenData) -> float:
    return evaluate(model, tokens.val, context=cfg.context, batch_size=cfg.batch_size, max_batches=cfg.eval_batches)


class Diverged(UserError):
    """The loss or the gradient is not finite."""

    exit_code = 1

    def __init__(self, folder: Path, step: int) -> None:
        kept = checkpoint.names(folder)
        super().__init__(
            f"loss or gradient is not finite at step {step}, and the run has ended before it could spoil the weights\n"
            f"start again with a lower --lr; {f'{kept[-1]} in {folder} is good' if kept else 'nothing was saved yet'}"
        )


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list while the body runs; the second of a kind ends the process as ever."""
    received: list[int] = []

    def note(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Log:
    """metrics.jsonl, and progress on standard output."""

    def __init__(self, cfg: TrainConfig, folder: Path, model: GPT, saved: checkpoint.Checkpoint | None) -> None:
        self.cfg, self.model_config = cfg, model.config
        self.peak = peak_flops(next(model.parameters()).device, model.dtype)
        self.tokens_per_step = cfg.batch_size * cfg.grad_accum * cfg.context
        self.best: float | None = saved.state["best_val_loss"] if saved else None
        self.val_loss: float | None = None
        self.start = time.perf_counter() - (saved.state["elapsed_s"] if saved else 0.0)
        self.path = folder / METRICS
        self.line = LiveLine()
        self.restart_clock(saved.state["step"] if saved else 0)

    def __enter__(self) -> Log:
        self.file = self.path.open("a", buffering=1)  # each row is handed to the system when it is written
        self.line.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.line.__exit__(*error)
        self.file.close()

    def restart_clock(self, step: int) -> None:
        """Time steps from here: what lies between this call and the one before is no part of them."""
        self.clock_step, self.clock = step, time.perf_counter()

    def elapsed_s(self) -> float:
        """Seconds of training, over all sessions of the run."""
        return time.perf_counter() - self.start

    def training(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        step_s = (time.perf_counter() - self.clock) / (step - self.clock_step)
        tok_per_s = self.tokens_per_step / step_s
        self._write(step, loss=loss, lr=lr, grad_norm=grad_norm, step_ms=step_s * 1e3, tok_per_s=tok_per_s)
        head = [f"step {step:05d}/{self.cfg.steps:05d}", f"loss {loss:.4f}"]
        speed = [f"lr {lr:.1e}", f"{step_s * 1e3:.1f} ms", f"{tok_per_s:,.0f} tok/s"]
        if self.peak:
            speed.append(f"mfu {mfu(tok_per_s, self.model_config, self.cfg.context, self.peak):.2f}")
        eta = f"eta {_clock(step_s * (self.cfg.steps - step))}"
        if self.line.is_live:  # in the order of interest, as a narrow terminal leaves out the end
            val = [] if self.val_loss is None else [f"val {self.val_loss:.4f}"]
            self.line.update(" | ".join([*head, *val, f"elapsed {_clock(self.elapsed_s())}", eta, *speed]))
        else:
            self.line.update(" | ".join([*head, *speed, eta]))

    def validation(self, step: int, val_loss: float) -> bool:
        """True if this is the lowest validation loss of the run so far."""
        is_best = self.best is None or val_loss < self.best
        self.val_loss, self.best = val_loss, val_loss if is_best else self.best
        self._write(step, val_loss=val_loss)
        self.line.print(f"step {step:05d}/{self.cfg.steps:05d} | validation loss {val_loss:.4f}{' *' * is_best}")
        return is_best

    def _write(self, step: int, **values: float) -> None:
        names = ("loss", "val_loss", "lr", "grad_norm", "step_ms", "tok_per_s")
        row = {"step": step, "tokens": step * self.tokens_per_step, **dict.fromkeys(names), **values}
        self.file.write(json.dumps({**row, "elapsed_s": self.elapsed_s()}) + "\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"


def report(cfg: TrainConfig, folder: Path, tokens: data.TokenData, model: GPT, elapsed_s: float) -> None:
    """Write a sample with the best weights of the run, and say how good they are and what to do with them."""
    best = checkpoint.load(folder, "best")
    model.load_state_dict(best.model)
    tokenizer = tokens.tokenizer
    # A byte-pair token brings the space before its word along: a space at the end of the prompt would stand alone.
    prompt = PROMPT if tokenizer.name == "char" else PROMPT.rstrip()
    try:
        ids = tokenizer.encode(prompt)[-cfg.context :]
    except UserError:  # a character tokenizer of a text that has no such letters
        ids, prompt = [tokenizer.eot_id], ""
    new = generate(model, ids, tokens=SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, top_k=40, seed=cfg.seed)
    sample = prompt + tokenizer.decode(list(new))
    (folder / "sample.txt").write_text(sample + "\n", encoding="utf-8")
    print(f"\n{sample}\n")
    print(f"{cfg.steps} steps in {_clock(elapsed_s)}; the best, of step {best.state['step']}, wrote the text above")
    print(f"validation {describe(best.state['val_loss'], len(tokens.val), tokens.meta['val']['bytes'])}")
    print(f'more text: python -m model.generate {shlex.quote(str(folder))} --prompt "{prompt}"')


if __name__ == "__main__":
    run(main, TrainConfig, prog="train.py", default=default_config)
