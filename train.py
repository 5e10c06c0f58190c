"""Train a GPT on a text of yours, and keep all there is to know about the run in one folder.

    python train.py                                          # what fits this machine, on Book/: minutes on a laptop
    python train.py --preset gpt2-124M --data corpus.txt     # GPT-2 124M on a GPU
    python train.py --resume runs/tiny --steps 4000          # go on, bit for bit as if it had never stopped
    torchrun --nproc-per-node 8 train.py --preset gpt2-124M --data shards --out runs/a      # on eight GPUs

The folder of a run: config.json, tokenizer/, data/ (tokens), metrics.jsonl, samples.jsonl, sample.txt, report.html,
checkpoints/. Ctrl-C saves and says how to go on; SIGUSR1 saves and goes on.
"""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kernels import layer_norm, use_backend
from kernels._dispatch import device_problem
from model import checkpoint, data
from model.cli import UserError, pick_device, run
from model.config import GPTConfig
from model.evaluate import describe, evaluate
from model.generate import generate
from model.gpt import GPT, num_parameters
from model.report.history import clock
from model.tokenizer import Tokenizer
from model.training import memory as step_memory
from model.training import optim, parallel, profiling, run_folder
from model.training.log import Log
from model.training.options import (
    TrainConfig,
    check,
    check_machine,
    check_resumable,
    default_config,
    gpt_config,
    pick_dtype,
    run_options,
    sequences,
    stored_config,
    torch_dtype,
)
from model.training.parallel import World
from model.training.step import SPIKE, Guard, Step

SAMPLE = "sample.txt"  # in the folder of a run: what its best weights write
PROMPT = "CHAPTER I. "
SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 500, 0.6


def main(cfg: TrainConfig) -> None:
    check(cfg)
    with parallel.start(pick_device(cfg.device)) as world, only_one_speaks(world), use_backend(cfg.backend):
        check_machine(cfg, world)
        cfg = replace(cfg, dtype=pick_dtype(cfg.dtype, world.device))
        if world.device.type == "cuda":
            torch.set_float32_matmul_precision("high" if cfg.dtype == "tf32" else "highest")
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as the next line wants it
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        try:  # now, rather than after the text has been read
            layer_norm(torch.zeros(1, 8, device=world.device), torch.ones(8, device=world.device))
        except RuntimeError as error:
            raise UserError(str(error)) from None
        if cfg.resume is not None:
            resume_run(cfg, world, cfg.resume)
        elif is_restart(cfg) and cfg.out is not None and checkpoint.names(cfg.out):
            resume_run(replace(cfg, out=None), world, cfg.out)
        else:
            start_run(cfg, world)


@contextlib.contextmanager
def only_one_speaks(world: World) -> Iterator[None]:
    """Of several processes the first writes to standard output."""
    with contextlib.ExitStack() as stack:
        if world.rank > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def is_restart(cfg: TrainConfig) -> bool:
    """Whether this command may have been started before: it says so, or torchrun has started it again."""
    return cfg.or_resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def start_run(cfg: TrainConfig, world: World) -> None:
    with contextlib.ExitStack() as stack:
        folder, tokens = cfg.out or Path(), None
        if world.rank == 0:
            if is_restart(cfg) and cfg.out is not None and run_folder.is_stillborn(cfg.out):
                with run_folder.lock(cfg.out):  # it was killed before its first checkpoint
                    shutil.rmtree(cfg.out)
            folder = stack.enter_context(run_folder.new_folder(cfg.out, Path(cfg.preset).stem))
            stack.enter_context(run_folder.lock(folder))
            tokens = data.open_source(cfg.data, folder / "data", cfg.tokenizer, skip_bad_shards=cfg.skip_bad_shards)
            tokens.tokenizer.save(folder / "tokenizer")
        folder = parallel.tell(folder, world)
        tokens = tokens or data.load(folder / "data")
        # Too short a text is refused before the model is built.
        data.get_batch(tokens.train, context=cfg.context, seed=0, step=0, rows=range(1))
        data.windows(tokens.val, cfg.context, batch_size=1)
        train(cfg, world, folder, tokens, None, sequences(cfg))


def resume_run(cfg: TrainConfig, world: World, folder: Path) -> None:
    stored = stored_config(folder)
    check_resumable(cfg, stored, folder)
    with contextlib.ExitStack() as stack:
        if world.rank == 0:
            stack.enter_context(run_folder.lock(folder))
            checkpoint.tidy(folder)
        parallel.tell(None, world)  # no process reads what is being tidied
        saved = checkpoint.load(folder, cfg.which)
        done = saved.state["step"]
        to_be_measured = saved.state["val_loss"] is None and (done % cfg.eval_every == 0 or done == cfg.steps)
        if done > cfg.steps:
            raise UserError(f"--steps {cfg.steps} is less than the {done} that {folder} has done: give more, or none")
        if done == cfg.steps and not to_be_measured and (folder / SAMPLE).exists():
            print(f"{folder} is finished, all {done} steps of it; for more: {_command(folder)} --steps {2 * done}")
            return
        tokens = data.load(folder / "data")
        checkpoint.check_model(saved, gpt_config(cfg, tokens.tokenizer.n_vocab))
        if world.rank == 0:
            (folder / SAMPLE).unlink(missing_ok=True)  # it is written when the run is finished
            run_folder.trim(folder, done, to_be_measured=to_be_measured)
        train(cfg, world, folder, tokens, saved, sequences(stored), to_be_measured=to_be_measured)


def _command(folder: Path) -> str:
    return f"python train.py --resume {shlex.quote(str(folder))}"


def train(
    cfg: TrainConfig,
    world: World,
    folder: Path,
    tokens: data.TokenData,
    saved: checkpoint.Checkpoint | None,
    n_sequences: int,
    *,
    to_be_measured: bool = False,
) -> None:
    """From the first step, or from a checkpoint, to the last.

    n_sequences: of a step, in all processes. to_be_measured: the run ended between saving a checkpoint and measuring
    its validation loss.
    """
    shape = gpt_config(cfg, tokens.tokenizer.n_vocab)
    cfg = fit_batch(cfg, shape, world, n_sequences)
    batch_size = n_sequences // cfg.grad_accum
    with torch_errors_in_words(lambda: out_of_memory(cfg, shape, world, batch_size, n_sequences)):
        Trainer(cfg, world, folder, tokens, saved, batch_size, to_be_measured=to_be_measured).run()


class Trainer:
    """A run from its first step, or from a checkpoint, to its last. Every process has one."""

    def __init__(
        self,
        cfg: TrainConfig,
        world: World,
        folder: Path,
        tokens: data.TokenData,
        saved: checkpoint.Checkpoint | None,
        batch_size: int,
        *,
        to_be_measured: bool,
    ) -> None:
        n_sequences = batch_size * cfg.grad_accum
        self.cfg, self.world, self.folder, self.tokens, self.batch_size = cfg, world, folder, tokens, batch_size
        self.to_be_measured = to_be_measured
        self.shape = gpt_config(cfg, tokens.tokenizer.n_vocab)
        self.rows, self.micro_batch = parallel.share(world, n_sequences, batch_size)
        self.done = saved.state["step"] if saved else 0
        self.best: float | None = saved.state["best_val_loss"] if saved else None
        self.saved_at = self.done if saved else None

        torch.manual_seed(cfg.seed)
        self.model = GPT(self.shape, dtype=torch_dtype(cfg))
        self.model.recompute = cfg.recompute
        if saved is not None:
            self.model.load_state_dict(saved.parts["model"])
        sharded = cfg.parallel == "fsdp"
        if not sharded:  # a sharded model goes to the device share by share
            self.model.to(world.device)
            self.model.keep_working_weights()
        module: torch.nn.Module = torch.compile(self.model) if cfg.compile else self.model  # type: ignore[assignment]
        self.module = parallel.wrap(module, cfg.parallel, world, torch_dtype(cfg))
        self.optimizers = optim.build(
            self.model, kind=cfg.optimizer, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
        )
        self.ema = optim.EMA(self.model, cfg.ema) if cfg.ema else None
        self.guard = Guard(world.device, spikes=cfg.spikes, z=cfg.spike_z, scaled=cfg.dtype == "float16")
        if saved is not None:
            optim.load_optimizer_state(self.optimizers, self.model, saved.parts["optimizer"])
            self.guard.load(saved.parts["trainer"])
            if self.ema is not None:
                parallel.scatter(self.ema.tensors, saved.parts["ema"])
        self.step = Step(
            self.model,
            self.module,
            self.optimizers,
            self.guard,
            world,
            grad_clip=cfg.grad_clip,
            seed=cfg.seed,
            document_id=tokens.tokenizer.eot_id if cfg.document_mask else None,
            ema=self.ema,
            graph=uses_graph(cfg, world),
        )
        self.log: Log | None = None
        if world.rank == 0:
            run_folder.store_config(folder, run_options(cfg), self.shape)
            self.log = Log(
                folder,
                steps=cfg.steps,
                done=self.done,
                tokens_per_step=n_sequences * cfg.context,
                model=self.shape,
                context=cfg.context,
                dtype=self.model.dtype,
                device=world.device,
                n_devices=world.size,
                elapsed_s=saved.state["elapsed_s"] if saved else 0.0,
                tensorboard=cfg.tensorboard,
            )

    def run(self) -> None:
        cfg, world = self.cfg, self.world
        self.introduce()
        with contextlib.ExitStack() as stack:
            if self.log is not None:
                stack.enter_context(self.log)
            if world.device.type == "cuda":  # a CUDA graph cannot be captured on the default stream
                stream = torch.cuda.Stream(world.device)
                stream.wait_stream(torch.cuda.current_stream(world.device))
                stack.enter_context(torch.cuda.stream(stream))
            received = stack.enter_context(run_folder.signals())
            stack.enter_context(profiling.memory_snapshot(self.folder, wanted=cfg.memory_snapshot))
            next_step = stack.enter_context(profiling.trace(self.folder, wanted=cfg.profile))
            loader = stack.enter_context(
                contextlib.closing(
                    data.Loader(
                        self.tokens.train,
                        context=cfg.context,
                        seed=cfg.seed,
                        first_step=self.done,
                        rows=self.rows,
                        micro_batch=self.micro_batch,
                        device=world.device,
                        readers=cfg.readers,
                    )
                )
            )
            if self.to_be_measured:
                self.measure(self.done)
            for step in range(self.done + 1, cfg.steps + 1):
                idx, targets = next(loader)
                if world.device.type == "cuda" and step == self.done + 1:
                    print(f"kernels ready in {self.step.warm_up(idx, targets):.1f} s", flush=True)
                self.step(idx, targets, step=step, lr=self.lr(step))
                next_step()
                stop, save = parallel.agree([bool(received.stop), received.save], world)
                received.save = False
                self.look(step, stop=stop, save=save)
                if stop and step < cfg.steps:
                    self.stop(step, received.stop[0] if received.stop else 15)
        if world.rank == 0:
            self.report()

    def introduce(self) -> None:
        cfg, world = self.cfg, self.world
        processes = f", {world.size} processes ({cfg.parallel})" if world.size > 1 else ""
        where = f"{world.device}{processes}, {cfg.dtype}, {cfg.backend} kernels"
        print(f"{self.folder} | {num_parameters(self.model):,} parameters | {where}")
        print(f"{cfg.data} | {len(self.tokens.train):,} tokens to learn from, {len(self.tokens.val):,} for validation")
        print(self.memory_line(), flush=True)

    def memory_line(self) -> str:
        cfg = self.cfg
        dtype, backend, memory, options = memory_arguments(cfg, self.world)
        need = step_memory.memory(
            self.shape,
            self.micro_batch,
            cfg.context,
            dtype,
            backend,
            card=0 if options.pop("on_cpu") else memory,
            accumulate=len(self.rows) > self.micro_batch or self.world.size > 1,
            **options,
        )
        return step_memory.describe(need, memory)

    def lr(self, step: int) -> float:
        """Learning rate of step 1, 2, ..."""
        cfg = self.cfg
        return optim.lr_at(
            step - 1,
            lr=cfg.lr,
            min_lr=cfg.min_lr,
            warmup_steps=cfg.warmup_steps,
            steps=cfg.steps,
            schedule=cfg.schedule,
            cooldown_steps=cfg.cooldown_steps or cfg.steps // 5,
        )

    def look(self, step: int, *, stop: bool, save: bool) -> None:
        """What has to be done after a step, most often nothing: then the host does not wait for the device."""
        cfg = self.cfg
        last = step == cfg.steps
        measure = last or step % cfg.eval_every == 0
        save |= stop or last or step % cfg.save_every == 0
        if not (measure or save or step == self.done + 1 == 1 or step % cfg.log_every == 0):
            return
        if self.guard.bad_step > 0:
            self.fail()
        loss, norm, skipped = self.step.loss.item(), self.step.norm.item(), int(self.guard.skipped)
        if self.log is not None:
            self.log.training(step, loss=loss, grad_norm=norm, lr=self.lr(step), skipped=skipped)
        if save:
            self.save(step)
        if measure and not (stop and not last):  # who wants to stop need not wait: it is measured when the run goes on
            self.measure(step)
        # What the first process did alone may have taken long: the others wait here, where nobody loses patience.
        parallel.tell(None, self.world)
        if self.log is not None:
            self.log.restart_clock(step)

    def measure(self, step: int) -> None:
        """The validation loss and a sample of text, from the averaged weights where they are kept."""
        with self.ema.swapped() if self.ema else contextlib.nullcontext():
            self.model.refresh_working_weights()
            val_loss = evaluate(
                self.model,
                self.tokens.val,
                context=self.cfg.context,
                batch_size=self.batch_size,
                max_windows=self.cfg.eval_windows,
                world=self.world,
            )
            sample = self.sample(self.cfg.sample_tokens)
        self.model.refresh_working_weights()
        if not math.isfinite(val_loss):
            raise Diverged(f"the validation loss is {val_loss} at step {step}", self.folder)
        is_best = self.best is None or val_loss < self.best
        self.best = val_loss if is_best else self.best
        if self.log is not None:
            self.log.validation(step, val_loss, is_best=is_best)
            if sample is not None:
                self.log.sample(step, sample)
        if is_best and self.saved_at != step:
            self.save(step)
        if self.log is not None:
            if self.saved_at == step:
                checkpoint.record_validation(self.folder, step, val_loss, self.cfg.keep_last)
            self.log.publish()

    def sample(self, tokens: int) -> str | None:
        """So many tokens of text by the weights as they are; None where none are wanted, or another process writes."""
        sharded = self.cfg.parallel == "fsdp"  # then all have to take part
        if not tokens or (self.world.rank > 0 and not sharded):
            return None
        return write(self.model, self.tokens.tokenizer, tokens=tokens, seed=self.cfg.seed)[1]

    def save(self, step: int) -> None:
        parts = self.parts()
        if self.world.rank == 0:
            checkpoint.save(
                self.folder,
                step,
                parts,
                config=run_options(self.cfg),
                model=self.shape,
                best_val_loss=self.best,
                elapsed_s=self.log.elapsed_s() if self.log else 0.0,
                keep_last=self.cfg.keep_last,
            )
        self.saved_at = step

    def parts(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that changes from step to step, whole and on the CPU, in the first process."""
        named: dict[str, dict[str, torch.Tensor]] = {
            "model": dict(self.model.named_parameters()),
            "optimizer": optim.optimizer_state(self.optimizers, self.model),
            "trainer": self.guard.tensors,
        }
        if self.ema is not None:
            named["ema"] = self.ema.tensors
        return {name: parallel.gather(tensors, self.world) for name, tensors in named.items()}

    def stop(self, step: int, number: int) -> None:
        if self.log is not None:
            self.log.line.print(f"stopped and saved at step {step}; to go on: {_command(self.folder)}")
        raise SystemExit(128 + number)

    def fail(self) -> None:
        """A step that must not reach the weights: keep what reproduces it, and end the run on every process."""
        step, is_spike = int(self.guard.bad_step), int(self.guard.cause) == SPIKE
        idx, targets = data.get_batch(
            self.tokens.train, context=self.cfg.context, seed=self.cfg.seed, step=step - 1, rows=self.rows
        )
        shape = (-1, self.micro_batch, self.cfg.context)
        found = self.step.examine(
            idx.view(shape).to(self.world.device), targets.view(shape).to(self.world.device), step=step
        )
        what = "stand out from the steps before" if is_spike else "are not finite"
        details = {
            "step": step,
            "problem": f"loss or gradient {what}",
            "lr": self.lr(step),
            "seed": self.cfg.seed,
            "processes": parallel.collect({"rows": [self.rows.start, self.rows.stop], **found}, self.world),
        }
        parts = self.parts()
        if self.world.rank == 0:
            kept = checkpoint.save_failure(
                self.folder, step - 1, parts, config=run_options(self.cfg), model=self.shape, details=details
            )
            stands = "stands out far from the steps before" if is_spike else "is not finite"
            raise Diverged(
                f"loss or gradient {stands} at step {step}, and the run has ended before it could spoil the weights",
                self.folder,
                advice="--spikes skip leaves such a step out" if is_spike else "start again with a lower --lr",
                kept=kept,
            )
        raise SystemExit(Diverged.exit_code)

    def report(self) -> None:
        """Write a sample with the best weights of the run, and say how good they are and what to do with them."""
        best = checkpoint.load(self.folder, "best").state
        model, tokenizer = checkpoint.load_model(self.folder, self.world.device, which="best", dtype=self.model.dtype)
        prompt, sample = write(model, tokenizer, tokens=SAMPLE_TOKENS, seed=self.cfg.seed)
        run_folder.replace_text(self.folder / SAMPLE, sample + "\n")
        assert self.log is not None
        print(f"\n{sample}\n")
        took = clock(self.log.elapsed_s())
        print(f"{self.cfg.steps} steps in {took}; the best, of step {best['step']}, wrote the text above")
        print(f"validation {describe(best['val_loss'], len(self.tokens.val), self.tokens.meta['val']['bytes'])}")
        print(f"curves and samples: {self.folder / 'report.html'}")
        print(f'more text: python -m model.generate {shlex.quote(str(self.folder))} --prompt "{prompt}"')


def write(model: GPT, tokenizer: Tokenizer, *, tokens: int, seed: int) -> tuple[str, str]:
    """Let the model continue a prompt -> the prompt, and all of the text."""
    # A byte-pair token brings the space before its word along: a space at the end of the prompt would stand alone.
    prompt = PROMPT if tokenizer.name == "char" else PROMPT.rstrip()
    try:
        ids = tokenizer.encode(prompt)[-model.config.n_positions :]
    except UserError:  # a character tokenizer of a text that has no such letters
        ids, prompt = [tokenizer.eot_id], ""
    new = generate(model, ids, tokens=tokens, temperature=SAMPLE_TEMPERATURE, top_k=40, seed=seed)
    return prompt, prompt + tokenizer.decode(list(new))


class Diverged(UserError):
    """The loss or the gradient is not finite, or a spike."""

    exit_code = 1

    def __init__(
        self, what: str, run: Path, *, advice: str = "start again with a lower --lr", kept: Path | None = None
    ) -> None:
        good = checkpoint.names(run)
        words = [advice, f"{good[-1]} in {run} is good" if good else "no checkpoint was saved yet"]
        if kept is not None:
            words.append(f"what that step met is in {kept}")
        super().__init__(f"{what}\n{'; '.join(words)}")


# Memory


def uses_graph(cfg: TrainConfig, world: World) -> bool:
    return world.device.type == "cuda" and world.size == 1 and cfg.graph != "off"


def fit_batch(cfg: TrainConfig, shape: GPTConfig, world: World, n: int) -> TrainConfig:
    """With --batch-size auto the largest that should fit; a step goes on to have n sequences, by --grad-accum."""
    if cfg.batch_size != "auto":
        return cfg
    dtype, backend, memory, options = memory_arguments(cfg, world)
    fits = step_memory.fit(shape, n // world.size, cfg.context, dtype, backend, memory, **options)
    if not fits:
        raise UserError(out_of_memory(cfg, shape, world, 1, n))
    return replace(cfg, batch_size=fits, grad_accum=n // fits)


def memory_arguments(cfg: TrainConfig, world: World) -> tuple[torch.dtype, step_memory.Backend, int, dict[str, Any]]:
    """dtype, backend, bytes of this process's device, and the options of step_memory.memory's relatives."""
    on_cpu = world.device.type == "cpu"
    works = cfg.backend != "eager" and device_problem(world.device.type, world.device.index) is None
    backend: step_memory.Backend = "triton" if works and (not on_cpu or cfg.backend == "triton") else "eager"
    shared = world.size if on_cpu else 1
    options = {"on_cpu": on_cpu, "optimizer": cfg.optimizer, "ema": cfg.ema > 0, "recompute": cfg.recompute}
    options["graph"] = uses_graph(cfg, world)
    return torch_dtype(cfg), backend, step_memory.device_bytes(world.device) // shared, options


def out_of_memory(cfg: TrainConfig, shape: GPTConfig, world: World, batch: int, n: int) -> str:
    """What to do where micro-steps of `batch` do not fit, n sequences a step."""
    dtype, backend, memory, options = memory_arguments(cfg, world)
    advice = step_memory.advice(shape, batch, n, cfg.context, dtype, backend, memory, **options)
    return f"this model and batch do not fit into memory\n{advice}"


@contextlib.contextmanager
def torch_errors_in_words(out_of_memory: Callable[[], str]) -> Iterator[None]:
    """What torch reports by a RuntimeError and a user can mend: no memory, no compiler, a process that is gone."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # Recognised by its text: a CPU's allocator has no class of its own, and Inductor's must not be imported here.
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise UserError(out_of_memory()) from None
        if "InvalidCxxCompiler" in str(error):
            raise UserError("--compile needs a C++ compiler, such as g++: install one, or leave it out") from None
        raise


if __name__ == "__main__":
    run(main, TrainConfig, prog="train.py", default=default_config)
