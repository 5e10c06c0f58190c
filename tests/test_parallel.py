"""Several processes: the same curve as one, whole checkpoints, and words where one of them dies. gloo, on a CPU."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import cuda_runs
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.training import parallel
from model.training.parallel import World

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, 0, torch.device("cpu"))
SHAPE = GPTConfig(vocab_size=67, n_positions=16, n_embd=32, n_layer=2, n_head=2,
                  embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
STEPS, ROWS, SKIPPED = 20, 8, 5
OPTIONS = shlex.split("""
    --preset tiny --device cpu --n-layer 2 --n-head 2 --n-embd 16 --context 16 --batch-size 2 --grad-accum 4
    --dropout 0 --ema 0.9
    --lr 3e-3 --min-lr 1e-3 --warmup-steps 2 --steps 20 --eval-every 10 --save-every 10 --log-every 1 --sample-tokens 8
""")


# What runs in each process. `python -m pytest` sees none of it; torchrun starts this file as a program.


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A counting task that can be learnt: (ROWS, 16) ids and their successors."""
    start = torch.randint(67, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + 3 * torch.arange(17)) % 67
    return ids[:, :-1], ids[:, 1:]


def learn(world: World, kind: str, batch_size: int, dtype=torch.float32, recompute=False) -> tuple:
    """STEPS steps, one of which is skipped -> model, optimizer, {"loss", "norm"} of each step."""
    torch.manual_seed(7)
    model = GPT(SHAPE, dtype=dtype)
    model.recompute = recompute
    module = parallel.wrap(model, kind, world, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(3e-3), fused=True)
    rows, micro_batch = parallel.local_rows(world, ROWS, batch_size)
    curve: dict[str, list[float]] = {"loss": [], "norm": []}
    for step in range(STEPS):
        idx, targets = (t[rows.start : rows.stop].view(-1, micro_batch, 16) for t in batch(step))
        total = torch.zeros(())
        for i in range(len(idx)):
            with parallel.synchronise(module, i == len(idx) - 1):
                loss = module(idx[i], targets[i])[1] / len(idx)
                loss.backward()
            total += loss.detach()
        norm = parallel.total_norm(model)
        optimizer.grad_scale, optimizer.found_inf = norm.clamp(min=1.0), torch.tensor(float(step == SKIPPED))
        optimizer.step()
        optimizer.zero_grad()
        curve["loss"].append(parallel.sum_all(total, world).item() / world.size)
        curve["norm"].append(norm.item())
    return model, optimizer, curve


def slots(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {f"{slot}/{name}": optimizer.state[p][slot] for name, p in model.named_parameters()
            for slot in ("exp_avg", "exp_avg_sq", "step")}  # fmt: skip


def reductions(model: GPT, module: torch.nn.Module) -> list[int]:
    """Collectives that carry gradients, in each of three micro-steps."""
    counts = []
    for i in range(3):
        with torch.profiler.profile() as profile, parallel.synchronise(module, i == 2):
            module(*batch(0))[1].backward()
        names = [event.key for event in profile.key_averages() for _ in range(event.count)]
        counts.append(sum(name.startswith("c10d::") and "reduce" in name for name in names))
    model.zero_grad()
    return counts


def learning(world: World, folder: Path) -> dict:
    seen: dict = {}
    for kind in ("ddp", "fsdp"):
        for name, options in {
            kind: {"batch_size": 8},
            f"{kind} accumulated": {"batch_size": 2},
            f"{kind} recomputed": {"batch_size": 8, "recompute": True},
            f"{kind} bfloat16": {"batch_size": 8, "dtype": torch.bfloat16},
        }.items():
            model, _, seen[name] = learn(world, kind, **options)
            whole = parallel.gather(dict(model.named_parameters()), world)
            if world.rank == 0:
                save_file(whole, folder / f"{name}.safetensors")
            seen[name]["gathered"] = len(whole)
            seen[name]["held"] = sum(parallel._local(p).numel() for p in model.parameters())
            seen[name]["grad_dtype"] = str(gradient_dtype(model))
        seen[f"{kind} saved"] = saved_and_loaded(world, folder, kind)
        torch.manual_seed(0)
        model = GPT(SHAPE)
        module = parallel.wrap(model, kind, world, torch.float32)
        seen[f"{kind} reductions"] = [reductions(model, module) for _ in range(3)]
        seen[f"{kind} evaluated"] = evaluated_anew(world, model)
    seen["fsdp gathers"] = gathered_dtypes(world)
    seen["agree"] = parallel.any_rank([world.rank == 0, world.rank == 1, False], world)
    seen["tell"] = parallel.broadcast({"from": world.rank}, world)
    seen["sum"] = parallel.sum_all(torch.tensor([1, world.rank]), world).tolist()
    return seen


def gathered_dtypes(world: World) -> list[str]:
    """Of a block's matrix and of the embedding while the block runs in bfloat16."""
    model = GPT(SHAPE, dtype=torch.bfloat16)
    parallel.wrap(model, "fsdp", world, torch.bfloat16)
    linear, embedding = model.transformer.h[1].mlp.c_proj, model.transformer.wte
    dtypes: list[str] = []
    linear.register_forward_hook(lambda *_: dtypes.extend(map(str, (linear.weight.dtype, embedding.weight.dtype))))
    model(*batch(0))
    return dtypes


def gradient_dtype(model: GPT) -> torch.dtype:
    model(*batch(0))[1].backward()
    dtypes = {p.grad.dtype for p in model.parameters()}
    model.zero_grad()
    return dtypes.pop() if len(dtypes) == 1 else None


def saved_and_loaded(world: World, folder: Path, kind: str) -> dict[str, bool]:
    """Two processes -> whole -> two; and what one process has saved -> two -> whole."""
    model, optimizer, _ = learn(world, kind, 8)
    tensors = {**dict(model.named_parameters()), **slots(model, optimizer)}
    first = {name: t.clone() for name, t in parallel.gather(tensors, world).items()}
    if world.rank == 0:
        save_file(first, folder / "whole")
    parallel.broadcast(None, world)
    for t in tensors.values():
        t.data.zero_()
    parallel.scatter(tensors, load_file(folder / "whole"))
    second = {name: t.clone() for name, t in parallel.gather(tensors, world).items()}
    parallel.scatter(tensors, load_file(folder / "of one process"))
    third = parallel.gather(tensors, world)
    return {
        "two again": all(first[name].equal(second[name]) for name in first),
        "of one": all(t.equal(third[name]) for name, t in load_file(folder / "of one process").items() if third),
    }


def evaluated_anew(world: World, model: GPT) -> bool:
    """Whether a forward pass without gradients sees weights that have changed since the one before."""
    named = dict(model.named_parameters())  # as an optimizer holds them
    with torch.no_grad():
        model(*batch(0))
        for p in named.values():
            p.mul_(1.5)
        loss = model(*batch(0))[1]
    whole = parallel.gather(named, world)
    if world.rank > 0:
        return True
    alone = GPT(SHAPE)
    alone.load_state_dict(whole)
    return torch.allclose(loss, alone(*batch(0))[1])


def lives(world: World, folder: Path) -> None:
    """One process ends in another way in each life, while the other waits for it."""
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    try:
        for step in range(3):
            if step == 2 and world.rank == 1:
                if life == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                if life == 1:
                    raise ValueError("a fault of its own")
                time.sleep(600)  # it hangs
            if life == 1:
                parallel.any_rank([False], world)
            parallel.sum_all(torch.ones(4), world)
    finally:
        if life == 0:
            time.sleep(2)  # a long clean-up, in which torchrun's SIGTERM comes


def call_train(*arguments: object) -> None:
    """`train.py ARGUMENTS` in this process."""
    import train  # here: the processes that do not need it start faster
    from model.cli import run

    run(train.main, train.TrainConfig, prog="train.py", default=train.default_config, argv=[*map(str, arguments)])


def train_and_die(arguments: list[str]) -> None:
    """The same, but in its first life the second process is killed in step 13, as by a lack of memory."""
    from model.training.step import Step

    step = Step.__call__

    def step_or_die(self, idx, targets, **options):
        if options["step"] == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, idx, targets, **options)

    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        Step.__call__ = step_or_die
    call_train(*arguments)


def program(scenario: str, folder: Path) -> None:
    torch.set_num_threads(1)
    if scenario == "train":
        return train_and_die(sys.argv[2:])
    if scenario == "lives" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "2":
        parallel.TIMEOUT = timedelta(seconds=3)
    try:
        with parallel.start("cpu") as world:
            seen = {"learning": learning, "lives": lives}[scenario](world, folder)
    except UserError as error:
        life = os.environ["TORCHELASTIC_RESTART_COUNT"]
        (folder / f"words-{life}").write_text(f"{os.environ['RANK']} {error}")
        sys.exit(error.exit_code)
    (folder / f"rank-{world.rank}.json").write_text(json.dumps(seen))


# The tests


def launch(*command: object, max_restarts: int = 0) -> subprocess.CompletedProcess:
    """`torchrun COMMAND` in two processes."""
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", str(max_restarts), *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[Path, list[dict]]:
    """What two processes have seen and left in a folder."""
    folder = tmp_path_factory.mktemp("two")
    model, optimizer, _ = learn(ALONE, "ddp", 8)
    save_file({k: t.detach() for k, t in {**dict(model.named_parameters()), **slots(model, optimizer)}.items()},
              folder / "of one process")  # fmt: skip
    done = launch(__file__, "learning", folder)
    assert done.returncode == 0, done.stderr
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one() -> tuple[dict, dict]:
    """The curve and the weights of one process."""
    model, _, curve = learn(ALONE, "ddp", 8)
    return curve, dict(model.named_parameters())


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["{}", "{} accumulated", "{} recomputed"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_match_one(one, two, kind, how):
    (curve, weights), (folder, seen) = one, two
    for of_rank in seen:
        of_two = of_rank[how.format(kind)]
        assert largest_difference(curve["loss"], of_two["loss"]) < 1e-5
        assert largest_difference(curve["norm"], of_two["norm"]) < 1e-4
    assert curve["loss"][-1] < 0.7 * curve["loss"][0]
    saved = load_file(folder / f"{how.format(kind)}.safetensors")
    assert list(saved) == sorted(weights)
    for name, weight in weights.items():
        torch.testing.assert_close(saved[name], weight.detach(), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_processes_agree_on_loss_and_norm(two, kind):
    first, second = (seen[kind] for seen in two[1])
    assert first["loss"] == second["loss"] and first["norm"] == second["norm"]  # bit for bit: they decide what happens


@pytest.mark.slow
def test_bfloat16_computes_and_keeps_float32_parameters(two):
    """FSDP2 gathers the matrices as bfloat16, where DDP casts them when they are used."""
    _, _, alone = learn(ALONE, "ddp", 8, dtype=torch.bfloat16)
    for kind in ("ddp", "fsdp"):
        for seen in two[1]:
            of_two = seen[f"{kind} bfloat16"]
            assert largest_difference(alone["loss"], of_two["loss"]) < 0.02
            assert of_two["loss"] != seen[kind]["loss"]
            assert of_two["grad_dtype"] == seen[kind]["grad_dtype"] == "torch.float32"
            assert seen["fsdp gathers"] == ["torch.bfloat16", "torch.float32"]


@pytest.mark.slow
def test_gradients_synchronise_only_in_the_last_micro_step(two):
    for seen in two[1]:
        assert seen["ddp reductions"] == [[0, 0, 1]] * 3  # one bucket
        assert seen["fsdp reductions"] == [[0, 0, SHAPE.n_layer + 1]] * 3  # each block, and the root


@pytest.mark.slow
def test_sharded_weights_are_held_once(one, two):
    total = sum(weight.numel() for weight in one[1].values())
    assert [seen["ddp"]["held"] for seen in two[1]] == [total, total]
    halves = [seen["fsdp"]["held"] for seen in two[1]]
    assert sum(halves) == total and max(halves) < 0.52 * total


@pytest.mark.slow
def test_saved_state_fits_any_number_of_processes(one, two):
    for kind in ("ddp", "fsdp"):
        assert [seen[kind]["gathered"] for seen in two[1]] == [len(one[1]), 0]  # rank 0 has all, the other nothing
        for seen in two[1]:
            assert seen[f"{kind} saved"] == {"two again": True, "of one": True}


@pytest.mark.slow
def test_evaluation_sees_updated_weights(two):
    for seen in two[1]:
        assert seen["fsdp evaluated"] and seen["ddp evaluated"]


@pytest.mark.slow
def test_host_collectives(two):
    for seen in two[1]:
        assert seen["agree"] == [True, True, False]
        assert seen["tell"] == {"from": 0}
        assert seen["sum"] == [2, 1]


@pytest.mark.slow
def test_dead_process_is_reported_and_restarted(tmp_path):
    """Killed, failed, hanging: three lives, and each of them was a good one until then."""
    done = launch(__file__, "lives", tmp_path, max_restarts=2)
    assert done.returncode != 0
    for life, what in enumerate(["is gone", "is gone", "does not answer"]):
        words = (tmp_path / f"words-{life}").read_text()
        assert words.startswith(f"0 process 1 of 2 {what}, and process 0 cannot continue without it\n"), words
        assert "--resume" in words and "--max-restarts" in words
    assert "ValueError: a fault of its own" in done.stderr  # who fails says why


def test_restarted_processes_ignore_addresses_of_dead_ones():
    """torchrun's store outlives its processes; here one had left its name and died, twice."""
    store = dist.HashStore()
    stores: dict[tuple[int, int], dist.Store] = {}
    for life in range(2):
        store.set("name/1", "of a dead process")
        threads = [
            threading.Thread(target=lambda r=r: stores.update({(life, r): parallel._unused(store, r, 3)}))  # noqa: B023
            for r in (2, 0, 1)
        ]
        for thread in threads:
            thread.start()
            time.sleep(2 * parallel.POLL_S)  # the last one comes late
        for thread in threads:
            thread.join(30)
        stores[life, 0].set("life", str(life))
        assert [stores[life, rank].get("life") for rank in range(3)] == [str(life).encode()] * 3
    assert stores[0, 2].get("life") == b"0"


# train.py


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two runs that differ in the number of processes, `one` and `two`, saved at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("The cat sat on the mat, and the mat was flat; the dog sat by the log.\n" * 80)
    options = [*OPTIONS, "--data", str(folder / "book.txt")]
    call_train(*options, "--out", folder / "one")
    done = launch("train.py", *options, "--out", folder / "two")
    assert done.returncode == 0, done.stderr
    return folder


def rows(run_: Path) -> list[tuple]:
    """All of metrics.jsonl but the times."""
    keys = ("step", "tokens", "loss", "val_loss", "lr", "grad_norm", "skipped")
    lines = (run_ / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[key] for key in keys) for line in lines]


def assert_same_within_rounding(a: Path, b: Path) -> None:
    for x, y in zip(rows(a), rows(b), strict=True):
        assert x == pytest.approx(y, abs=2e-5)
    for x, y in zip(tensors(a).items(), tensors(b).items(), strict=True):
        assert x[0] == y[0]
        torch.testing.assert_close(x[1], y[1], atol=2e-4, rtol=1e-3)


def tensors(run_: Path) -> dict[str, torch.Tensor]:
    """All that a run resumes from, at its end."""
    parts = checkpoint.load(run_, "step-00000020").parts
    assert set(parts) == {"model", "optimizer", "ema", "trainer"}
    return {f"{part}/{name}": t for part, content in parts.items() for name, t in sorted(content.items())}


@pytest.mark.slow
def test_run_on_two_processes_matches_one(runs):
    assert len(rows(runs / "one")) == 22  # 20 steps and two validations
    assert_same_within_rounding(runs / "one", runs / "two")


@pytest.mark.slow
def test_run_resumes_on_another_number_of_processes(runs):
    for name in ("one", "two"):
        shutil.copytree(runs / name, runs / f"{name} resumed")
    half = ["--checkpoint", "step-00000010"]
    call_train("--resume", runs / "two resumed", *half)
    assert_same_within_rounding(runs / "two resumed", runs / "two")
    done = launch("train.py", "--resume", runs / "one resumed", *half, "--parallel", "fsdp")
    assert done.returncode == 0, done.stderr
    assert "2 processes (fsdp)" in done.stdout
    assert_same_within_rounding(runs / "one resumed", runs / "one")


@pytest.mark.slow
def test_killed_process_costs_nothing(runs):
    """torchrun restarts both, and they resume from step 10: bit for bit the undisturbed run."""
    data = ["--data", runs / "book.txt"]
    done = launch(__file__, "train", *OPTIONS, *data, "--out", runs / "killed", max_restarts=1)
    assert done.returncode == 0, done.stderr
    assert "error: process 1 of 2 is gone, and process 0 cannot continue without it" in done.stderr
    assert "Traceback" not in done.stderr
    assert rows(runs / "killed") == rows(runs / "two")
    for (name, x), (_, y) in zip(tensors(runs / "killed").items(), tensors(runs / "two").items(), strict=True):
        assert x.equal(y), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_bad_step_ends_the_run_on_both_ranks(runs, kind):
    """A learning rate that spoils the first update: the failure of each process is saved, with its rows."""
    flags = ["--lr", 1e30, "--grad-clip", 0, "--warmup-steps", 0, "--parallel", kind, "--out", runs / f"bad-{kind}"]
    done = launch(ROOT / "train.py", *OPTIONS, "--data", runs / "book.txt", *flags)
    assert done.returncode == 1 and "not finite at step 2:" in done.stderr
    details = checkpoint.load(runs / f"bad-{kind}", "failed").state["details"]
    first, second = details["processes"]
    assert details["step"] == 2 and (first["rows"], second["rows"]) == ([0, 4], [4, 8])
    assert "nan" in first["losses"] and "nan" in second["losses"]


# One process


def test_local_rows():
    worlds = [World(rank, 4, rank, torch.device("cpu")) for rank in range(4)]
    assert [parallel.local_rows(world, 48, 16) for world in worlds] == [
        (range(0, 12), 12), (range(12, 24), 12), (range(24, 36), 12), (range(36, 48), 12)
    ]  # fmt: skip
    assert parallel.local_rows(ALONE, 48, 16) == (range(48), 16)
    assert parallel.local_rows(worlds[1], 160, 16) == (range(40, 80), 10)  # 16 does not divide 40
    assert parallel.local_rows(worlds[3], 4, 16) == (range(3, 4), 1)


def test_indivisible_sequences_are_refused():
    with pytest.raises(UserError, match=r"--batch-size 16 x --grad-accum 1 = 16 sequences .* by 3 processes") as error:
        parallel.local_rows(World(0, 3, 0, torch.device("cpu")), 16, 16)
    assert "--grad-accum that 3 divides" in str(error.value)
    with pytest.raises(UserError, match="--grad-accum that 2 divides"):
        parallel.local_rows(World(0, 8, 0, torch.device("cpu")), 12, 4)


def test_one_process_needs_no_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.start("cpu") as world:
        assert world == ALONE and not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process
    with pytest.raises(ValueError, match="mine"), parallel.start("cpu") as world:
        assert world == ALONE and not dist.is_initialized()
        raise ValueError("mine")
    model = GPT(SHAPE)
    assert parallel.wrap(model, "fsdp", ALONE, torch.float32) is model
    assert parallel.any_rank([True, False], ALONE) == [True, False] and parallel.broadcast("x", ALONE) == "x"
    assert parallel.sum_all(torch.tensor(3.0), ALONE) == 3


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_group_of_one_changes_nothing(kind):
    cuda_runs.one_of_a_group(kind, torch.device("cpu"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "3", "RANK": "2", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = r"process 3 .* there are 2: start torchrun with --nproc-per-node 2"
    with pytest.raises(UserError, match=words), parallel.start("cuda"):
        pass


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"), "is gone"),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:5] Read error: Connection reset by peer"), "is gone"),
        (RuntimeError("[/x/gloo/x.cc:78] Timed out waiting 2000ms for recv operation to complete"), "does not answer"),
        (dist.DistBackendError("NCCL error: remote process exited, ncclRemoteError: A call failed"), "is gone"),
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), "is gone"),
        (dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0"), "does not answer"),
        (dist.DistBackendError("NCCL error: invalid usage, Duplicate GPU detected"), None),
        (RuntimeError("Connection reset by peer"), None),  # of somebody else's connection
        (RuntimeError("CUDA out of memory"), None),
        (ValueError("x"), None),
    ],
)
def test_errors_that_mean_a_dead_process(monkeypatch, error, what):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = parallel.peer_failure(error)
    assert words is None if what is None else words.startswith(f"process 0 of 2 {what}")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert what is None or parallel.peer_failure(error).startswith(f"one of the 8 processes {what}")


def test_sigterm_during_cleanup_keeps_the_message(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as exit_:
        try:
            raise RuntimeError("[/x/gloo/x.cc:1] Connection closed by peer")
        finally:
            parallel._exit(signal.SIGTERM, None)
    assert exit_.value.code == 143
    assert parallel.peer_failure(exit_.value).startswith("process 1 of 2 is gone")
    assert parallel.peer_failure(SystemExit(143)) is None  # a stop that was asked for


def test_total_norm_is_of_all_gradients_concatenated():
    model = GPT(SHAPE)
    model(*batch(0))[1].backward()
    norm = parallel.total_norm(model)
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).double().norm()
    assert norm.dtype == torch.float32 and norm.shape == ()
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    model.transformer.ln_f.bias.grad[0] = float("inf")
    assert not torch.isfinite(parallel.total_norm(model))


def test_scatter_refuses_other_names_and_shapes():
    state = {"a": torch.ones(2), "b": torch.ones(3)}
    with pytest.raises(ValueError, match="b is missing"):
        parallel.scatter({"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.ones(2)})
    with pytest.raises(ValueError, match=r"b is \(3,\) there and missing here"):
        parallel.scatter({"a": torch.zeros(2)}, state)
    with pytest.raises(ValueError, match=r"b is \(3,\) there and \(1,\) here"):
        parallel.scatter({"a": torch.zeros(2), "b": torch.zeros(1)}, state)
    named = {"a": torch.nn.Parameter(torch.zeros(2)), "b": torch.zeros(3)}
    parallel.scatter(named, state)
    assert named["a"].sum() == 2 and named["b"].sum() == 3


def test_shard_batches_gives_each_batch_once():
    worlds = [World(rank, 3, rank, torch.device("cpu")) for rank in range(3)]
    for n in range(8):
        taken = [list(parallel.shard_batches(range(n), world)) for world in worlds]
        assert len({len(of_rank) for of_rank in taken}) == 1
        assert sorted(batch for of_rank in taken for batch, counts in of_rank if counts) == list(range(n))
    assert list(parallel.shard_batches("ab", ALONE)) == [("a", True), ("b", True)]


if __name__ == "__main__":
    program(sys.argv[1], Path(sys.argv[2]))
