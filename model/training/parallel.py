"""Several processes, one model, on PyTorch's own engine: who takes which rows, and what crosses the wire.

    torchrun --nproc-per-node 2 train.py ...       # NCCL between GPUs, gloo between CPUs

A step learns from the same S sequences whatever the number of processes W: each takes S / W of them. Their gradients
are averaged, so with losses weighted by W the sum over all sequences is the one that a single process would have.

    DDP     every process holds the model; 1 all-reduce of the gradients for each step
    FSDP2   every process holds 1 / W of each parameter, gradient and optimizer slot, and gathers what it next uses

Nothing else in the project knows which of the two it is: a sharded tensor is a torch.distributed.tensor.DTensor, and
`total_norm`, `gather` and `scatter` take both kinds. A world of one needs no process group, and every function here
does nothing in it but return what it was given.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
import uuid
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.cli import UserError

T = TypeVar("T")

# A process that ends closes its connections, which ends gloo's waits for it at once. These are for one that hangs.
TIMEOUT = timedelta(minutes=5)  # of collectives on the device
HOST_TIMEOUT = timedelta(hours=6)  # of `agree` and `tell`: rank 0 may be encoding a corpus meanwhile
POLL_S = 0.05  # between two looks for processes that are still to come

_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "was aborted")
_SILENT = ("Timed out", "timed out", "timeout")


@dataclass(frozen=True)
class World:
    """The processes of a run, and which of them this one is. host: a gloo group of all, None where there is one."""

    rank: int
    size: int
    local_rank: int  # among those of this machine
    device: torch.device
    host: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)


class Lost(UserError):
    """Another process is gone, and the run cannot go on without it."""

    exit_code = 1


@contextlib.contextmanager
def start(device: str) -> Iterator[World]:
    """Join the processes that torchrun started; without it, and with one process, a world of one.

    device: "cuda", which becomes this process's own GPU, or "cpu". Raises UserError for more processes than GPUs, and
    Lost where the body ends because another process is gone. Leaving does not wait for that one.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(0, 1, 0, torch.device(device))
        return
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    own = torch.device(device)
    if own.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank + 1} on this machine finds no GPU of its own, as there are "
                f"{torch.cuda.device_count()}: start torchrun with --nproc-per-node {torch.cuda.device_count()}"
            )
        own = torch.device("cuda", local_rank)
        torch.cuda.set_device(own)
    uses_nccl = own.type == "cuda" and dist.is_nccl_available()
    store = _unused(next(dist.rendezvous("env://", timeout=TIMEOUT))[0], rank, size)
    dist.init_process_group(
        "nccl" if uses_nccl else "gloo",
        timeout=TIMEOUT,
        store=store,
        rank=rank,
        world_size=size,
        device_id=own if own.type == "cuda" else None,
    )
    host = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield World(rank, size, local_rank, own, host)
    except BaseException as error:
        # Where one process dies torchrun sends SIGTERM to the others, and they have something to say first.
        words = lost(error)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if words else before)
        if uses_nccl:  # destroying NCCL's group waits for its collectives, and they may wait for who is gone
            dist.destroy_process_group(host)
            dist.group.WORLD.abort()  # type: ignore[union-attr]
        else:
            dist.destroy_process_group()
        if words:
            raise Lost(words) from error
        raise
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


def _exit(number: int, frame: object) -> None:
    """SIGTERM as an exception: it finds its way through the clean-up that another one has started."""
    raise SystemExit(128 + number)


def _unused(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The store under a name that is new to it, agreed on by the processes that are alive now.

    torchrun keeps its store when it starts processes again, with the addresses of the dead ones in it (PyTorch issue
    135712), and its count of restarts differs between machines. So every process leaves a name, which may be read
    after its death, and rank 0 answers to names until all that are alive have read an answer to theirs.
    """
    name = uuid.uuid4().hex
    if rank > 0:
        store.set(f"name/{rank}", name)
        name = store.get(f"answer/{name}").decode()
        store.add(f"here/{name}", 1)
    else:
        end = time.monotonic() + TIMEOUT.total_seconds()
        while store.add(f"here/{name}", 0) < size - 1:
            if time.monotonic() > end:
                raise UserError(f"not all of the {size} processes have come: see above for what became of them")
            for other in range(1, size):
                store.set(f"answer/{store.get(f'name/{other}').decode()}", name)
            time.sleep(POLL_S)
    return dist.PrefixStore(name, store)


def lost(error: BaseException) -> str | None:
    """In words, if an error of torch's means that another process of the run is gone or hangs; None otherwise."""
    if isinstance(error, SystemExit) and error.__context__ is not None:  # SIGTERM came while that one was on its way
        error = error.__context__
    text = str(error)
    if not isinstance(error, dist.DistError) and "gloo" not in text:
        return None
    gone, silent = (any(word in text for word in words) for words in (_GONE, _SILENT))
    if not (gone or silent):
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    who = f"process {1 - rank} of 2" if size == 2 else f"one of the {size} processes"
    return (
        f"{who} {'is gone' if gone else 'does not answer'}, and process {rank} cannot go on without it\n"
        f"what was saved is whole: go on with --resume; torchrun --max-restarts 1 does so by itself, given --out"
    )


def share(world: World, rows: int, batch_size: int) -> tuple[range, int]:
    """rows: S, sequences of a step -> those of this process, and how many of them a micro-step takes.

    The second is the largest divisor of the first's length that is at most batch_size. Raises UserError where the
    processes cannot take equally many.
    """
    if rows % world.size:
        factor = world.size // math.gcd(world.size, batch_size)
        raise UserError(
            f"--batch-size {batch_size} x --grad-accum {rows // batch_size} = {rows} sequences a step cannot be shared "
            f"by {world.size} processes\nchoose a --grad-accum that {factor} divides, or another number of processes"
        )
    own = rows // world.size
    micro_steps = next(n for n in range(-(-own // batch_size), own + 1) if own % n == 0)
    return range(world.rank * own, (world.rank + 1) * own), own // micro_steps


def wrap(model: nn.Module, kind: Literal["ddp", "fsdp"], world: World, dtype: torch.dtype) -> nn.Module:
    """The module that a step calls; before the optimizer is built, as FSDP2 puts sharded parameters into the model.

    model: on world.device, with the same weights on every process. dtype: of activations. Names and shapes of
    model.named_parameters() stay, and calls of `model` itself go on to work; with FSDP2 they are collective.
    """
    if world.size == 1:
        return model
    if kind == "fsdp":
        return _fully_shard(model, world, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.13 has a new name for it, which 2.11 does not know
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # working weights, which every process makes from its own
            gradient_as_bucket_view=True,
        )


def _fully_shard(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """One group for the matrices of each block, gathered in the dtype of activations: GPT casts them to it anyway.

    The rest goes with the root, in float32 and gathered for the whole pass: embeddings, which are added in float32 and
    used once more as the output head, and the LayerNorms (0.1 % of GPT-2), each of which serves the block before it.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: importing it takes a second
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.transformer.h:  # type: ignore[union-attr]
        fully_shard([block.attn, block.mlp], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    # The outputs of linear layers are views on a CPU; nothing writes to them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    if dist.get_backend() == "gloo":  # which has taken the sum for the average (PyTorch issue 162338)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    def reshard(module: Any, *_: object) -> None:
        # The root waits for its backward pass with that. Where none comes, the next forward pass would find the
        # gathered weights still there, and use them though the sharded ones had changed.
        if not torch.is_grad_enabled():
            module.reshard()

    model.register_forward_hook(reshard)
    return model


@contextlib.contextmanager
def synchronise(module: nn.Module, on: bool) -> Iterator[None]:
    """Around a micro-step: its gradients cross the wire, with those of the micro-steps before, only where `on`."""
    # By method rather than class: torch.compile's module hands on the attributes of the one it wraps.
    if (switch := getattr(module, "set_requires_gradient_sync", None)) is not None:  # FSDP2
        switch(on)
    no_sync = None if on else getattr(module, "no_sync", None)  # DDP
    with no_sync() if no_sync else contextlib.nullcontext():
        yield


@torch.no_grad()
def total_norm(model: nn.Module) -> Tensor:
    """-> () float32, the norm of all gradients together, sharded or not; the same on every process, without a wait."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([_local(g) for g in gradients])
    if mesh := _mesh(gradients[0]):
        squares = norm.square()
        dist.all_reduce(squares, group=mesh.get_group())
        norm = squares.sqrt()
    return norm


def gather(named: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU in rank 0, and {} elsewhere. To be called by all processes.

    The device holds one whole tensor at a time. What lies whole on a CPU already is handed on, not copied.
    """
    whole = {}
    for name, tensor in named.items():
        t = tensor.detach()
        if _mesh(t):
            t = t.full_tensor()  # type: ignore[attr-defined]
        if world.rank == 0:
            whole[name] = t.cpu()
    return whole


@torch.no_grad()
def scatter(named: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors of `state`, which every process has read, into tensors of the same names, sharded or not.

    The device holds one whole tensor at a time. Raises ValueError where names or shapes differ.
    """
    if wrong := sorted(named.keys() ^ state.keys()):
        raise ValueError(f"{wrong[0]} is {'missing' if wrong[0] in named else 'not expected'} in what was saved")
    for name, tensor in named.items():
        whole = state[name]
        if tensor.shape != whole.shape:
            raise ValueError(f"{name} has shape {tuple(whole.shape)} where {tuple(tensor.shape)} is needed")
        if mesh := _mesh(tensor):
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
        tensor.copy_(whole)


def agree(flags: list[bool], world: World) -> list[bool]:
    """Logical or over all processes, flag by flag. The hosts wait for each other, but not for their devices."""
    if world.size == 1:
        return flags
    either = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(either, dist.ReduceOp.MAX, group=world.host)
    return either.bool().tolist()


def collect(value: T, world: World) -> list[T]:
    """What each process gives, by rank, in all of them; it is pickled on the way."""
    if world.size == 1:
        return [value]
    found: list[T] = [value] * world.size
    dist.all_gather_object(found, value, group=world.host)
    return found


def tell(value: T, world: World) -> T:
    """rank 0's value, to all. The others wait for it up to HOST_TIMEOUT: also for what rank 0 has to do alone."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=world.host)
    return values[0]


def sum_all(t: Tensor, world: World) -> Tensor:
    """Add up t over all processes, in place, on its device."""
    if world.size > 1:
        dist.all_reduce(t)
    return t


def turns(batches: Iterable[T], world: World) -> Iterator[tuple[T, bool]]:
    """This process's share of `batches`, every W-th: as many in each process, as FSDP2's forward passes are collective.

    Where the last round has none for this process, it is given one that is another's, and False: do not count it.
    """
    rest = iter(batches)
    while around := list(islice(rest, world.size)):
        counts = world.rank < len(around)
        yield around[world.rank if counts else 0], counts


def _mesh(t: Tensor) -> Any:
    """The DeviceMesh that t is spread over, or None. By attribute: importing DTensor takes a second where none is."""
    return getattr(t, "device_mesh", None)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if _mesh(t) else t  # type: ignore[attr-defined]
