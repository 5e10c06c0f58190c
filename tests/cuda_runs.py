"""Runs of train.py and texts on a CUDA device, with a CUDA graph and without one: a GPU's, or the one of fake_cuda.

Each function raises where a graph, or a stop in the middle, changes a bit of what is computed.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from small_model import batch, small_model, small_tokenizer
from trainer import SMALL, call, state

from kernels import use_backend
from model import checkpoint
from model.config import GPTConfig
from model.generate import Continuation
from model.gpt import GPT
from model.sampling import Sampling
from model.training import optim, parallel
from model.training.options import TrainConfig
from model.training.parallel import World
from model.training.step import Guard, Step

STEPS = 8  # three eager ones, the capture, and replays; the evaluation and the checkpoint of step 6 lie between
STOP = 6
SHORT = ("--device", "cuda", "--eval-every", STOP, "--save-every", STOP, "--eval-windows", 2, "--schedule", "constant")


def product(**choices: list[str]) -> list[list[str]]:
    """Every combination, as options of train.py."""
    return [" ".join(chosen).split() for chosen in itertools.product(*choices.values())]


OPTIONS = product(
    backend=["--backend auto", "--backend eager"],
    dtype=["--dtype bfloat16", "--dtype float16", "--dtype float32", "--dtype tf32"],
    optimizer=["--optimizer adamw", "--optimizer muon"],
    documents=["", "--document-mask"],
    recompute=["", "--recompute"],
    accumulation=["", "--batch-size 1 --grad-accum 3 --context 15"],  # of targets that lie 8 bytes off
    dropout=["--dropout 0", "--dropout 0.1"],
    ema=["", "--ema 0.9 --spikes skip"],
)


def run(*options: str, steps: int = STEPS, code: int = 0) -> Path:
    """The folder of a run of train.py."""
    folder = Path(tempfile.mkdtemp(dir=".")) / "run"
    got = call(*SMALL, *SHORT, "--steps", steps, "--out", folder, *options)
    assert got == code, f"train.py {options} ends with {got}"
    return folder


def train(*options: str) -> None:
    graphed, eager = (state(run(*options, "--graph", graph), STEPS) for graph in ("on", "off"))
    assert graphed == eager, f"the graph of {options} computes something else"


def resume(*options: str) -> None:
    """The second part captures a graph of its own."""
    straight, stopped = run(*options), run(*options, steps=STOP)
    assert call("--resume", stopped, "--steps", STEPS) == 0
    assert state(stopped, STEPS) == state(straight, STEPS), f"{options}, resumed, is another run"


def one_of_a_group(kind: str, device: torch.device) -> None:
    """Steps of one process in a group of one, whose collectives are NCCL's on a GPU, are those without a group."""
    with tempfile.NamedTemporaryFile() as file:
        store = dist.FileStore(file.name, 1)
        backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=own)
        try:
            host = dist.new_group(backend="gloo")
            losses, weights = zip(*(steps(kind, World(0, 1, 0, device, group)) for group in (None, host)), strict=True)
        finally:
            dist.destroy_process_group()
    torch.testing.assert_close(losses[1], losses[0])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, msg=name)


def steps(kind: str, world: World) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of some steps with two micro-steps each, and the whole weights after them."""
    torch.manual_seed(3)
    with parallel.side_stream(world.device):
        model = GPT(GPTConfig(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2)).to(world.device)
        module = parallel.wrap(model, kind, world, torch.float32)
        assert (module is model) == (world.host is None or kind == "fsdp")  # which shards the model itself
        optimizers = optim.build(model, kind="adamw", betas=(0.9, 0.95), weight_decay=0.1)
        step = Step(model, module, optimizers, Guard(world.device), world, grad_clip=1.0, seed=7)
        losses = []
        for k in range(1, STEPS + 1):
            ids = torch.randint(40, (2, 3, 17), generator=torch.Generator().manual_seed(k)).to(world.device)
            step(ids[..., :-1].contiguous(), ids[..., 1:].contiguous(), step=k, lr=1e-2)
            losses.append(step.loss.item())
    return losses, parallel.gather(dict(model.named_parameters()), world)


def fail(*options: str) -> None:
    """A replay whose loss is not finite ends the run, which names the step."""
    lr_at = TrainConfig.lr_at
    TrainConfig.lr_at = lambda self, step: 1e30 if step == STOP - 1 else lr_at(self, step)  # type: ignore[method-assign]
    try:
        folder = run(*options, code=1)
    finally:
        TrainConfig.lr_at = lr_at  # type: ignore[method-assign]
    assert checkpoint.load(folder, "failed").state["details"]["step"] == STOP


def generate(backend: str = "auto", **sampling) -> None:
    """Texts that outgrow the context, more of them than slots."""
    tokenizer = small_tokenizer()
    model, written = small_model(tokenizer).to("cuda"), []
    for graph in (True, False):
        texts = [Continuation(tokenizer.encode(text), sample=i) for i, text in enumerate(("Down", "a", "the hole"))]
        with use_backend(backend):
            batch(model, texts, sampling=Sampling(**sampling), batch_size=2, logprobs=True, graph=graph)
        written.append([(text.ids, text.logprobs) for text in texts])
    assert written[0] == written[1], f"the graph of {backend} {sampling} writes another text"
