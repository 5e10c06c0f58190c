"""What ends a run early: a step that must not reach the weights, or an error of PyTorch that the user can mend."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from model import checkpoint, data
from model.cli import UserError, is_out_of_memory
from model.data.shards import Tokens
from model.training import parallel
from model.training.options import TrainConfig
from model.training.step import SPIKE, Step


class Diverged(UserError):
    """The loss or the gradient is not finite, or a spike."""

    exit_code = 1

    def __init__(
        self, what: str, run: Path, *, advice: str = "start again with a lower --lr", failure: Path | None = None
    ) -> None:
        """failure: the folder with the state before that step."""
        saved = checkpoint.list_checkpoints(run)
        good = f"{saved[-1]} in {run} is good" if saved else "no checkpoint was saved yet"
        details = [f"the state before that step is in {failure}"] if failure else []
        super().__init__(f"{what}\n{'; '.join([advice, good, *details])}")


def stop_diverged(
    step: Step,
    cfg: TrainConfig,
    run: Path,
    tokens: Tokens,
    batch: tuple[range, int],
    parts: checkpoint.Parts,
    lora: dict[str, Any] | None,
) -> NoReturn:
    """End the run on every process, after saving what reproduces the step that must not reach the weights.

    tokens: of training. batch: this process's rows of a step, and how many a micro-step takes. parts: the state before
    that step, whole in rank 0. lora: as for checkpoint.save.
    """
    number, world, (rows, micro_batch) = int(step.guard.bad_step), step.world, batch
    step.release()  # `diagnose` needs the memory
    idx_targets = data.get_batch(tokens, context=cfg.context, seed=cfg.seed, step=number - 1, rows=rows)
    idx, targets = (t.view(-1, micro_batch, cfg.context).to(world.device) for t in idx_targets)
    is_spike = int(step.guard.cause) == SPIKE
    problem = f"loss or gradient {'stands out from the steps before' if is_spike else 'is not finite'}"
    try:
        found = diagnose(step, idx, targets, number)
    except RuntimeError as error:  # the state before the step matters more
        found = {"diagnosis": f"failed: {str(error).splitlines()[0]}"}
    rank = {"rows": [rows.start, rows.stop], **found}
    details = {
        "step": number,
        "problem": problem,
        "lr": cfg.lr_at(number),
        "seed": cfg.seed,
        "processes": parallel.all_gather_object(rank, world),
    }
    options, config = cfg.run_options(), step.model.config
    failure = None
    if world.rank == 0:
        failure = checkpoint.save_failure(
            run, number - 1, parts, config=options, model=config, details=details, lora=lora
        )
    parallel.barrier(world)  # torchrun stops the others soon after one has ended
    if world.rank > 0:
        raise SystemExit(Diverged.exit_code)
    raise Diverged(
        f"{problem} at step {number}: the run has ended, and the weights are those before it",
        run,
        advice="--spikes skip skips such a step" if is_spike else "start again with a lower --lr",
        failure=failure,
    )


def diagnose(step: Step, idx: Tensor, targets: Tensor, number: int) -> dict[str, Any]:
    """Compute the gradients of step `number` again, to find where values that are not finite come from.

    idx, targets: (A, B, T) int64, as the step had them. The weights do not change. -> JSON-serialisable: the loss of
    each micro-step, the first module in the forward pass whose output is not finite, and the parameters whose gradient
    is not.
    """
    step.seed_dropout(number)
    losses, first = [], None
    with _non_finite_modules(step.model) as modules:
        for i in range(len(idx)):
            with parallel.synchronise(step.module, i == len(idx) - 1):
                loss = step.forward(idx[i], targets[i])
                (loss * step.guard.scale).backward()
            losses.append(loss.item())
            if first is None and modules:
                first = {"micro_step": i, "module": modules[0]}
    gradients = [name for name, p in step.model.named_parameters() if p.grad is not None and not _is_finite(p.grad)]
    step.clear_gradients()
    return {
        "losses": [loss if math.isfinite(loss) else str(loss) for loss in losses],
        "first_module_not_finite": first,
        "gradients_not_finite": gradients,
    }


@contextlib.contextmanager
def _non_finite_modules(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose outputs are not finite, in the order of the forward pass."""
    names: list[str] = []

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(_is_finite(t) for t in tensors if isinstance(t, Tensor)):
                names.append(name)

        return hook

    handles = [module.register_forward_hook(hook_for(name)) for name, module in model.named_modules() if name]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def _is_finite(t: Tensor) -> bool:
    return bool(torch.isfinite(t).all())


@contextlib.contextmanager
def torch_errors_as_user_errors(out_of_memory: Callable[[], str]) -> Iterator[None]:
    """Turn what PyTorch reports by a RuntimeError and a user can mend into a UserError: no memory, no compiler."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise UserError(out_of_memory()) from None
        if "InvalidCxxCompiler" in str(error):  # by its text: Inductor's class must not be imported here
            raise UserError("--compile needs a C++ compiler, such as g++: install one, or omit it") from None
        raise
