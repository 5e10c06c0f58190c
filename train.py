"""Train a GPT on a text, and keep everything about the run in one folder.

    python train.py                                          # what fits this machine, on Book/: minutes on a laptop
    python train.py --preset gpt2-124M --data corpus.txt     # GPT-2 124M on a GPU
    python train.py --minutes 5 --until-loss 1.4             # as many steps as fit, or until the loss is low enough
    python train.py --resume runs/first-run --steps 4000     # resume, bit for bit as if the run had never stopped
    torchrun --nproc-per-node 8 train.py --preset gpt2-124M --data shards --out runs/a      # on eight GPUs

The folder of a run: config.json, tokenizer/, data/ (tokens), metrics.jsonl, samples.jsonl, sample.txt, report.html,
checkpoints/. Ctrl-C saves and prints how to resume; SIGUSR1 saves and training continues.
"""

from __future__ import annotations

import model  # noqa: F401  # before torch: it sets how OpenMP waits

# isort: split
import contextlib
import math
import os
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from kernels import check_backend, launch_tables, use_backend
from model import checkpoint, data
from model.cli import UserError, pick_device
from model.cli import run as run_command
from model.evaluate import evaluate
from model.report import page
from model.training import memory, optim, parallel, profiling, run_folder, weights
from model.training.deadline import Deadline
from model.training.failure import Diverged, stop_diverged, torch_errors_as_user_errors
from model.training.log import Log
from model.training.options import ALIASES, Plan, TrainConfig, default_config, pick_dtype
from model.training.parallel import World
from model.training.run import Run, open_run
from model.training.run_folder import resume_command
from model.training.step import Guard, Step
from model.training.summary import print_summary, write_sample


def main(cfg: TrainConfig) -> None:
    cfg.check()
    with parallel.start(pick_device(cfg.device)) as world, parallel.rank0_stdout(world), use_backend(cfg.backend):
        cfg = set_up_device(cfg, world)
        with open_run(cfg, world) as run:
            if run is not None:
                train(cfg, world, run)


def set_up_device(cfg: TrainConfig, world: World) -> TrainConfig:
    """The options with "auto" resolved for this device; deterministic algorithms; UserError for what cannot work."""
    cfg.check_machine(world)
    cfg = replace(cfg, dtype=pick_dtype(cfg.dtype, world.device))
    if world.device.type == "cuda":
        torch.set_float32_matmul_precision("high" if cfg.dtype == "tf32" else "highest")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic algorithms
        torch.use_deterministic_algorithms(True)  # under warn_only PyTorch's attention keeps its other backward pass
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        # Inductor's advice to use tf32: --dtype has been chosen.
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores", UserWarning)
    try:  # now, rather than after the text has been read
        check_backend(world.device)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    return cfg


# --- training --------------------------------------------------------------------------------------------------------


def train(cfg: TrainConfig, world: World, run: Run) -> None:
    """Train from the first step, or from a checkpoint, to the last."""
    config = cfg.gpt_config(run.tokens.tokenizer.n_vocab)
    cfg = memory.fit_batch(replace(cfg, steps=run.steps, plan=run.plan), config, world, run.sequences)
    batch_size = run.sequences // cfg.grad_accum
    needs, limit = memory.memory_model(cfg, config, world)
    with (
        torch_errors_as_user_errors(lambda: memory.out_of_memory(needs, limit, batch_size, run.sequences)),
        parallel.side_stream(world.device),
    ):
        Trainer(cfg, world, run, batch_size).run()


class Trainer:
    """A run on one process: model, optimizer and step, then the loop."""

    def __init__(self, cfg: TrainConfig, world: World, run: Run, batch_size: int) -> None:
        self.cfg, self.world, self.folder, self.tokens = cfg, world, run.folder, run.tokens
        self.batch_size, self.to_validate, saved = batch_size, run.to_validate, run.saved
        self.rows, self.micro_batch = parallel.local_rows(world, run.sequences, batch_size)
        self.start_step = saved.state["step"] if saved else 0
        self.best_val_loss: float | None = saved.state["best_val_loss"] if saved else None
        self.saved_at = self.start_step if saved else None
        self.is_reached = saved is not None and cfg.is_reached(saved.state["val_loss"])
        self.config = cfg.gpt_config(self.tokens.tokenizer.n_vocab)
        needs, limit = memory.memory_model(cfg, self.config, world)
        needs = replace(needs, accumulate=len(self.rows) > self.micro_batch or world.size > 1)
        self.memory = memory.check_memory(cfg, needs, limit, self.micro_batch, run.sequences).describe(limit)

        # Model
        self.model = weights.build(cfg, self.config, run.base, saved)
        self.lora = weights.notes(cfg, run.base)
        if cfg.parallel != "fsdp":  # a sharded model moves to the device shard by shard
            self.model.to(world.device)
            self.model.keep_working_weights()
        module: torch.nn.Module = torch.compile(self.model) if cfg.compile else self.model  # type: ignore[assignment]
        module = parallel.wrap(module, cfg.parallel, world, cfg.torch_dtype)

        # Optimizer
        self.optimizers = optim.build(
            self.model, kind=cfg.optimizer, betas=(cfg.beta1, cfg.beta2), weight_decay=cfg.weight_decay
        )
        self.ema = optim.EMA(self.model, cfg.ema) if cfg.ema else None
        self.guard = Guard(world.device, spikes=cfg.spikes, z=cfg.spike_z, scaled=cfg.dtype == "float16")
        if saved:
            optim.load_optimizer_state(self.optimizers, self.model, saved.parts["optimizer"])
            self.guard.load(saved.parts["trainer"])
            if self.ema:
                parallel.scatter(self.ema.tensors, saved.parts["ema"])

        self.train_step = Step(
            self.model, module, self.optimizers, self.guard, world, grad_clip=cfg.grad_clip, seed=cfg.seed,
            document_id=self.tokens.tokenizer.eot_id if cfg.document_mask else None,
            ema=self.ema, graph=cfg.uses_graph(world),
        )  # fmt: skip
        self.log = Log(
            self.folder, cfg, self.config, world, sequences=run.sequences, done=self.start_step,
            elapsed_s=saved.state["elapsed_s"] if saved else 0.0, publish=page.write,
        )  # fmt: skip
        self.deadline = Deadline(cfg, world, self.log, self.start_step)
        self.set_steps(cfg.steps, cfg.plan)

    def set_steps(self, steps: int, plan: Plan) -> None:
        """Set the number of steps of the run and how it came about, also for when it is resumed."""
        self.cfg = self.log.cfg = self.deadline.cfg = replace(self.cfg, steps=steps, plan=plan)
        if self.world.rank == 0:
            run_folder.store_config(self.folder, self.cfg.run_options(), self.config)

    def run(self) -> None:
        cfg, world = self.cfg, self.world
        self.print_header()
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.log)
            signals = stack.enter_context(run_folder.signals())
            stack.enter_context(profiling.memory_snapshot(self.folder, wanted=cfg.memory_snapshot and world.rank == 0))
            profile_step = stack.enter_context(profiling.trace(self.folder, wanted=cfg.profile and world.rank == 0))
            loader = data.Loader(
                self.tokens.train, context=cfg.context, seed=cfg.seed, first_step=self.start_step, rows=self.rows,
                micro_batch=self.micro_batch, device=world.device, num_workers=cfg.num_workers,
            )  # fmt: skip
            stack.callback(loader.close)
            if self.to_validate:
                self.validate(self.start_step)

            step = self.start_step
            while step < (self.cfg.steps or math.inf) and not self.is_reached:
                step += 1
                idx, targets = next(loader)  # (A, B, T) int64 each, A micro-steps
                # DDP rearranges its buckets after its first backward pass, which is to be no step of a resumed run.
                if step == self.start_step + 1 and (world.device.type == "cuda" or world.size > 1):
                    print(f"kernels ready in {self.train_step.warm_up(idx, targets):.1f} s", flush=True)
                lr = self.cfg.lr_at(step)
                self.train_step(idx, targets, step=step, lr=lr)
                profile_step()

                flags = [*signals.take(), self.deadline.is_due(step), self.deadline.is_over()]
                stop, save, due, over = parallel.any_rank(flags, world)
                if over:
                    self.set_steps(self.deadline.end(step, self.cfg.steps), self.cfg.plan)
                last = step == self.cfg.steps
                due &= not (stop or last)
                first = due and not self.cfg.plan  # an evaluation and a checkpoint are timed for it
                validate = last or first or step % cfg.eval_every == 0
                save |= stop or last or first or step % cfg.save_every == 0
                if validate or save or due or step in (1, self.deadline.first_step) or step % cfg.log_every == 0:
                    # .item() waits for the device: only for these steps.
                    if self.guard.bad_step > 0:
                        batch = self.rows, self.micro_batch
                        parts = self.gather_state()
                        stop_diverged(
                            self.train_step, self.cfg, self.folder, self.tokens.train, batch, parts, self.lora
                        )
                    loss, norm = self.train_step.loss.item(), self.train_step.norm.item()
                    self.log.training(step, loss=loss, grad_norm=norm, lr=lr, skipped=int(self.guard.skipped))
                    if save:
                        self.deadline.timed("checkpoint", self.save, step)
                    if first and world.device.type == "cuda":
                        self.measure()  # it compiles what the next one is timed without
                    if validate and (last or not stop):  # after a request to stop, the resumed run validates
                        self.deadline.timed("evaluation", self.validate, step)
                    if due and not self.is_reached:
                        plan = parallel.broadcast(self.deadline.plan(step), world)
                        self.set_steps(plan[-1][1], plan)
                    # The other ranks wait here for what rank 0 does alone, with a timeout of hours.
                    parallel.barrier(world)
                    self.log.restart_clock(step)
                    self.deadline.begin(step)
                if stop and not last:
                    self.log.line.print(f"stopped and saved at step {step}; resume: {resume_command(self.folder)}")
                    raise SystemExit(128 + signals.number())
        self.train_step.release()
        if world.rank == 0:
            print_summary(self.cfg, self.folder, self.tokens, self.model, step, self.log.elapsed_s())

    def print_header(self) -> None:
        cfg, world = self.cfg, self.world
        processes = f", {world.size} processes ({cfg.parallel})" if world.size > 1 else ""
        where = f"{world.device}{processes}, {cfg.dtype}, {cfg.backend} kernels"
        if world.device.type == "cuda" and cfg.backend != "eager":
            untimed = "untimed defaults; this GPU's own: python -m kernels tune"
            print(f"launch tables: {self.log.tables.get('tables', untimed)}")
        print(f"{self.folder} | {weights.describe(self.model)} | {where}")
        print(f"{cfg.data} | {len(self.tokens.train):,} tokens for training, {len(self.tokens.val):,} for validation")
        print(self.memory, flush=True)

    def measure(self) -> tuple[float, str | None]:
        """The validation loss and a sample of text; of the averaged weights, if there are any."""
        cfg = self.cfg
        with self.ema.swapped() if self.ema else contextlib.nullcontext():
            self.model.refresh_working_weights()
            val_loss = evaluate(
                self.model, self.tokens.val, context=cfg.context, batch_size=self.batch_size,
                max_windows=cfg.eval_windows, document_id=self.train_step.document_id, world=self.world,
            )  # fmt: skip
            val_loss, sample = parallel.broadcast(val_loss, self.world), None
            wanted = cfg.sample_tokens > 0 and math.isfinite(val_loss)
            if wanted and (self.world.rank == 0 or cfg.parallel == "fsdp"):  # sharded, all ranks take part
                _, sample = write_sample(self.model, self.tokens.tokenizer, tokens=cfg.sample_tokens, seed=cfg.seed)
        self.model.refresh_working_weights()
        return val_loss, sample

    def validate(self, step: int) -> None:
        val_loss, sample = self.measure()
        if not math.isfinite(val_loss):
            raise Diverged(f"the validation loss is {val_loss} at step {step}", self.folder)
        is_best = self.best_val_loss is None or val_loss < self.best_val_loss
        self.best_val_loss = val_loss if is_best else self.best_val_loss
        self.is_reached = self.cfg.is_reached(val_loss)
        self.log.validation(step, val_loss, is_best=is_best)
        if sample is not None:
            self.log.sample(step, sample)
        if (is_best or self.is_reached) and self.saved_at != step:
            self.save(step)
        if self.world.rank == 0 and self.saved_at == step:
            checkpoint.record_validation(self.folder, step, val_loss, self.cfg.keep_last)
        self.log.publish()

    def save(self, step: int) -> None:
        parts = self.gather_state()
        # An update can spoil them after a loss and a gradient that were finite.
        spoilt = not all(t.isfinite().all() for name in checkpoint.WEIGHTS for t in parts.get(name, {}).values())
        if parallel.any_rank([spoilt], self.world)[0]:
            raise Diverged(f"the weights are not finite after step {step}", self.folder)
        if self.world.rank == 0:
            checkpoint.save(
                self.folder, step, parts, config=self.cfg.run_options(), model=self.config,
                best_val_loss=self.best_val_loss, elapsed_s=self.log.elapsed_s(), keep_last=self.cfg.keep_last,
                lora=self.lora, tables=launch_tables(self.world.device),
            )  # fmt: skip
        self.saved_at = step
        parallel.barrier(self.world)  # what comes next may be collectives on the device, with a shorter timeout

    def gather_state(self) -> dict[str, dict[str, Tensor]]:
        """All that changes from step to step, whole and on the CPU, in rank 0; collective."""
        parts: dict[str, dict[str, Tensor]] = {
            **weights.parts(self.cfg, self.model),
            "optimizer": optim.optimizer_state(self.optimizers, self.model),
            "trainer": self.guard.tensors,
        }
        if self.ema:
            parts["ema"] = self.ema.tensors
        return {name: parallel.gather(tensors, self.world) for name, tensors in parts.items()}


if __name__ == "__main__":
    run_command(main, TrainConfig, prog="train.py", default=default_config, aliases=ALIASES)
