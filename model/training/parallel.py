"""Several processes, one model, on PyTorch's own engine: who takes which rows, and what crosses the wire.

    torchrun --nproc-per-node 2 train.py ...       # NCCL between GPUs, gloo between CPUs

A step has the same S sequences for any number of processes W: each takes S / W of them. Their gradients are averaged,
so with losses weighted by W the sum over all sequences is that of a single process.

    DDP     every process holds the model; one all-reduce of the gradients per step
    FSDP2   every process holds 1 / W of each parameter, gradient and optimizer slot, and gathers what it uses next

Nothing else in the project depends on which of the two it is: a sharded tensor is a torch.distributed.tensor.DTensor,
and `total_norm`, `gather` and `scatter` take both kinds. A world of one needs no process group: every function here
then returns what it was given.
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

from kernels import tables, use_tables
from model.cli import UserError

T = TypeVar("T")

# A process that ends closes its connections, which ends gloo's waits at once. These are for one that hangs.
TIMEOUT = timedelta(minutes=5)  # of collectives on the device
HOST_TIMEOUT = timedelta(hours=6)  # of `any_rank` and `broadcast`: rank 0 may be encoding a corpus meanwhile
POLL_S = 0.05  # between checks for processes that have not joined yet

_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError", "was aborted")
_SILENT = ("Timed out", "timed out", "timeout")


@dataclass(frozen=True)
class World:
    """The processes of a run, and this one's rank. host: a gloo group of all; None for a single process."""

    rank: int
    size: int
    local_rank: int  # among those of this machine
    device: torch.device
    host: dist.ProcessGroup | None = field(default=None, repr=False, compare=False)


class PeerLost(UserError):
    """Another process is gone, and the run cannot continue without it."""

    exit_code = 1


@contextlib.contextmanager
def start(device: str) -> Iterator[World]:
    """Join the processes that torchrun started; a world of one without torchrun.

    device: "cuda", which becomes this process's own GPU, or "cpu". Raises UserError for more processes than GPUs, and
    PeerLost where the body fails because another process is gone, without waiting for that one.
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
    world = World(rank, size, local_rank, own, host)
    try:
        use_tables(own, broadcast(tables(own), world))  # or processes would launch, and round, differently
        yield world
    except BaseException as error:
        # When one process dies, torchrun sends SIGTERM to the others: let this one report why it ends.
        words = peer_failure(error)
        signal.signal(signal.SIGTERM, signal.SIG_IGN if words else before)
        if uses_nccl:  # destroy would wait for collectives that wait for the dead process
            dist.destroy_process_group(host)
            dist.group.WORLD.abort()  # type: ignore[union-attr]
        else:
            dist.destroy_process_group()
        if words:
            raise PeerLost(words) from error
        raise
    signal.signal(signal.SIGTERM, before)
    dist.destroy_process_group()


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run on a stream of its own, as no CUDA graph can be captured on the default one; on a CPU nothing changes.

    Enter it before the model is wrapped: DDP lets autograd accumulate each gradient on the stream of that moment, and
    would make it wait for the stream of the step, parameter by parameter.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            stack.enter_context(torch.cuda.stream(stream))
        yield


@contextlib.contextmanager
def rank0_stdout(world: World) -> Iterator[None]:
    """Silence standard output on ranks other than 0."""
    with contextlib.ExitStack() as stack:
        if world.rank > 0:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield


def _exit(number: int, frame: object) -> None:
    """Turn SIGTERM into an exception, which passes through a clean-up that is already under way."""
    raise SystemExit(128 + number)


def _unused(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The store under an unused prefix, agreed on by the processes that are alive.

    torchrun keeps its store across restarts, with the addresses of dead processes in it (PyTorch issue 135712), and its
    restart count differs between machines. So every process posts a name, which may outlive it, and rank 0 answers the
    names it finds until every living process has read an answer to its own.
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
                raise UserError(f"not all of the {size} processes have joined: see their errors above")
            for other in range(1, size):
                store.set(f"answer/{store.get(f'name/{other}').decode()}", name)
            time.sleep(POLL_S)
    return dist.PrefixStore(name, store)


def peer_failure(error: BaseException) -> str | None:
    """The message, if an error of PyTorch means that another process of the run is gone or hangs; else None."""
    if isinstance(error, SystemExit) and error.__context__ is not None:  # SIGTERM arrived during that one
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
        f"{who} {'is gone' if gone else 'does not answer'}, and process {rank} cannot continue without it\n"
        f"the checkpoints are intact: resume with --resume; torchrun --max-restarts 1 with --out resumes by itself"
    )


def local_rows(world: World, rows: int, batch_size: int) -> tuple[range, int]:
    """rows: S, sequences of a step -> those of this process, and the sequences of a micro-step.

    The latter is the largest divisor of the former's number up to batch_size. Raises UserError where W does not divide
    S.
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
    """The module that a step calls. Call it before the optimizer is built: FSDP2 replaces the model's parameters.

    model: on world.device, with the same weights on every process. dtype: of activations. Names and shapes of
    model.named_parameters() stay, and `model` itself can still be called; with FSDP2 that is collective.
    """
    if world.host is None:
        return model
    if kind == "fsdp":
        return _fully_shard(model, world, dtype)
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        forward_sync_buffers=False,  # working weights, which every process computes itself
        gradient_as_bucket_view=True,
    )


def _fully_shard(model: nn.Module, world: World, dtype: torch.dtype) -> nn.Module:
    """Shard the matrices of each block as one group, gathered in the dtype of activations, to which GPT casts anyway.

    The root holds the rest, in float32 and gathered for the whole pass: embeddings, which are added in float32 and used
    again as the output head, and the LayerNorms (0.1 % of GPT-2), which the previous block applies.
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
    if dist.get_backend() == "gloo":  # which returned the sum for the average (PyTorch issue 162338)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)

    def reshard(module: Any, *_: object) -> None:
        # The root reshards in its backward pass. Without one, the next forward pass would use the gathered weights
        # although the sharded ones may have changed.
        if not torch.is_grad_enabled():
            module.reshard()

    model.register_forward_hook(reshard)
    return model


@contextlib.contextmanager
def synchronise(module: nn.Module, on: bool) -> Iterator[None]:
    """Wraps a micro-step: gradients accumulated so far are reduced across processes only if `on`."""
    # By method, not class: torch.compile's module forwards attributes of the module it wraps.
    if (switch := getattr(module, "set_requires_gradient_sync", None)) is not None:  # FSDP2
        switch(on)
    no_sync = None if on else getattr(module, "no_sync", None)  # DDP
    with no_sync() if no_sync else contextlib.nullcontext():
        yield


@torch.no_grad()
def total_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients, sharded or not: () float32, equal on every process. No host sync."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([_local(g) for g in gradients])
    if mesh := mesh_of(gradients[0]):
        squares = norm.square()
        dist.all_reduce(squares, group=mesh.get_group())
        norm = squares.sqrt()
    return norm


def gather(named: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU in rank 0, and {} elsewhere. Collective.

    The device holds one whole tensor at a time. A whole CPU tensor is returned as it is, not copied.
    """
    whole = {}
    for name, tensor in named.items():
        t = tensor.detach()
        if mesh_of(t):
            t = t.full_tensor()  # type: ignore[attr-defined]
        if world.rank == 0:
            whole[name] = t.cpu()
    return whole


@torch.no_grad()
def scatter(named: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors of `state`, which every process has, into tensors of the same names, sharded or not.

    The device holds one whole tensor at a time. Raises ValueError, before any change, where names or shapes differ.
    """
    for name in [*named, *(name for name in state if name not in named)]:
        shapes = [tuple(t[name].shape) if name in t else "missing" for t in (state, named)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} there and {shapes[1]} here")
    for name, tensor in named.items():
        whole = state[name]
        if mesh := mesh_of(tensor):
            from torch.distributed.tensor import distribute_tensor

            whole = distribute_tensor(whole, mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
        tensor.copy_(whole)


def any_rank(flags: list[bool], world: World) -> list[bool]:
    """Logical or over all processes, elementwise. Hosts wait for each other, but not for their devices."""
    if world.size == 1:
        return flags
    either = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(either, dist.ReduceOp.MAX, group=world.host)
    return either.bool().tolist()


def all_gather_object(value: T, world: World) -> list[T]:
    """The values of all processes, by rank; pickled on the way."""
    if world.size == 1:
        return [value]
    found: list[T] = [value] * world.size
    dist.all_gather_object(found, value, group=world.host)
    return found


def broadcast(value: T, world: World) -> T:
    """rank 0's value, on all, within HOST_TIMEOUT."""
    if world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=world.host)
    return values[0]


def barrier(world: World) -> None:
    """Wait for all hosts, up to HOST_TIMEOUT: for what rank 0 does alone."""
    broadcast(None, world)


def sum_all(t: Tensor, world: World) -> Tensor:
    """Add up t over all processes, in place, on its device."""
    if world.host is not None:
        dist.all_reduce(t)
    return t


def shard_batches(batches: Iterable[T], world: World) -> Iterator[tuple[T, bool]]:
    """Every W-th of `batches`: equally many in each process, because FSDP2's forward passes are collective.

    If the last round has none for this process, it gets another's and False: not to be counted.
    """
    rest = iter(batches)
    while around := list(islice(rest, world.size)):
        counts = world.rank < len(around)
        yield around[world.rank if counts else 0], counts


def mesh_of(t: Tensor) -> Any:
    """The DeviceMesh that t is sharded over, or None. By attribute: importing DTensor takes a second."""
    return getattr(t, "device_mesh", None)


def _local(t: Tensor) -> Tensor:
    return t.to_local() if mesh_of(t) else t  # type: ignore[attr-defined]
