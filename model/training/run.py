"""The run that is about to train: a new one, or one that is resumed from its folder."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from model import checkpoint, data
from model.cli import UserError
from model.lora import Base
from model.training import parallel, run_folder, weights
from model.training.options import Plan, TrainConfig, stored_config
from model.training.parallel import World
from model.training.run_folder import resume_command
from model.training.summary import SAMPLE


@dataclass(frozen=True)
class Run:
    """A run that is about to train, its folder locked. Every process has one.

    sequences: per step, over all processes. steps: of the whole run, 0 as long as --minutes has not set them, as
    recorded in plan. saved: the checkpoint to resume from, None for a new run. to_validate: the run ended between
    saving that checkpoint and computing its validation loss. base: the model to begin with, or to adapt.
    """

    folder: Path
    tokens: data.TokenData
    sequences: int
    steps: int
    plan: Plan = ()
    saved: checkpoint.Checkpoint | None = None
    to_validate: bool = False
    base: Base | None = None


@contextlib.contextmanager
def open_run(cfg: TrainConfig, world: World) -> Iterator[Run | None]:
    """Resume --resume, or --out if this is a restart and it has a checkpoint, or start anew. None: it is finished."""
    is_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    restart = cfg.or_resume or is_restarted
    with contextlib.ExitStack() as stack:
        if cfg.resume is not None:
            # Its first attempt has removed the checkpoints after the one that was asked for.
            yield _resume(replace(cfg, checkpoint="last") if is_restarted else cfg, world, cfg.resume, stack)
        elif restart and cfg.out is not None and checkpoint.list_checkpoints(cfg.out):
            yield _resume(replace(cfg, out=None), world, cfg.out, stack)
        else:
            if restart and world.rank == 0 and cfg.out and run_folder.died_before_first_checkpoint(cfg.out):
                with run_folder.lock(cfg.out):
                    shutil.rmtree(cfg.out)
            yield _start(cfg, world, stack)


def _start(cfg: TrainConfig, world: World, stack: contextlib.ExitStack) -> Run:
    folder, tokens = cfg.out or Path(), None
    base = weights.load_base(cfg)
    if world.rank == 0:
        folder = stack.enter_context(run_folder.new_folder(cfg.out, Path(cfg.preset).stem))
        stack.enter_context(run_folder.lock(folder))
        tokenizer = weights.tokenizer_name(cfg, base, folder / "tokenizer")
        tokens = data.open_source(cfg.data, folder / "data", tokenizer, skip_bad_shards=cfg.skip_bad_shards)
        tokens.tokenizer.save(folder / "tokenizer")
    folder = parallel.broadcast(folder, world)
    tokens = tokens or data.load(folder / "data")
    # Refuse a text that is too short before the model is built.
    data.get_batch(tokens.train, context=cfg.context, seed=0, step=0, rows=range(1))
    data.windows(tokens.val, cfg.context, batch_size=1)
    return Run(folder, tokens, cfg.sequences, 0 if cfg.minutes else cfg.steps, cfg.plan, base=base)


def _resume(cfg: TrainConfig, world: World, folder: Path, stack: contextlib.ExitStack) -> Run | None:
    stored = stored_config(folder)
    cfg.check_resumable(stored, folder)
    if world.rank == 0:
        stack.enter_context(run_folder.lock(folder))
        checkpoint.remove_partial(folder)
    parallel.barrier(world)  # no process reads while the folder is cleaned
    saved = checkpoint.load(folder, cfg.checkpoint)
    done, val_loss = saved.state["step"], saved.state["val_loss"]
    steps, plan = (stored.steps, stored.plan) if cfg.minutes else (cfg.steps, cfg.plan)
    if cfg.minutes and steps and not plan:
        plan = ((1, steps),)  # an older version planned once, and stored no more than the number of steps
    to_validate = val_loss is None and (done % cfg.eval_every == 0 or done == steps)
    if done > steps > 0:
        raise UserError(
            f"--steps {steps} is less than the {done} that {folder} has done: give a larger --steps, or omit it"
        )
    reached = cfg.is_reached(val_loss)
    if (reached or (done == steps and not to_validate)) and (folder / SAMPLE).exists():
        loss = f" with a validation loss of {val_loss:.4f}" if reached else ""
        more = " --until-loss 0" * reached + f" --steps {2 * done}" * (done == steps)
        print(f"{folder} is finished after {done} steps{loss}; for more: {resume_command(folder)}{more}")
        return None
    tokens = data.load(folder / "data")
    weights.check_saved(cfg, cfg.gpt_config(tokens.tokenizer.n_vocab), saved)
    base = weights.load_base(cfg, saved)
    if world.rank == 0:
        checkpoint.remove_after(folder, done)
        (folder / SAMPLE).unlink(missing_ok=True)  # it is written when the run is finished
        run_folder.truncate_metrics(folder, done, keep_validation=not to_validate)
    return Run(folder, tokens, stored.sequences, steps, plan, saved, to_validate, base)
