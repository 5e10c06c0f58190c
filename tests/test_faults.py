"""The trainer from the outside, killed, out of disk space and with damaged files: what is lost, and what comes out.

A run that met such a fault and went on has to end with the bits of one that was never stopped.
"""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import pytest

from model import checkpoint
from model.cli import UserError

ROOT = Path(__file__).parents[1]
TEXT = "CHAPTER I. The cat sat on the mat, and the mat was flat. The dog sat by the log, and the log was long.\n" * 60
SAVE_EVERY, STEPS = 5, 40
TRAIN = shlex.split(f"""
    --preset tiny --device cpu --data book.txt --n-layer 1 --n-head 2 --n-embd 64 --context 16 --batch-size 4
    --dropout 0.1
    --lr 1e-2 --min-lr 1e-3 --warmup-steps 2 --eval-every 10 --eval-windows 12 --save-every {SAVE_EVERY} --log-every 1
    --steps {STEPS} --sample-tokens 20 --or-resume
""")
TIMES = ("step_ms", "tok_per_s", "mfu", "peak_mib", "elapsed_s")

# Runs train.py after it has put something between it and the disk. The first argument says what: at the operation of
# that number "kill" ends the process, a file of tensors half written; from it on a disk is "full"; "limit" is a size
# that no file may outgrow. "of" counts only the operations on a path that ends so.
FAULTY = """
import errno, json, os, pathlib, runpy, signal, sys
import safetensors, safetensors.torch
train, fault = sys.argv[1], json.loads(sys.argv.pop(2))
calls = 0
def wrap(owner, name):
    do = getattr(owner, name)
    def operation(*args, **kwargs):
        global calls
        path = os.readlink(f"/proc/self/fd/{args[0]}") if name == "fsync" else str(args[0])
        calls += path.endswith(fault.get("of", ""))
        if calls == fault.get("kill"):
            if name == "save_file":
                do(*args, **kwargs)
                os.truncate(args[1], os.path.getsize(args[1]) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        if calls >= fault.get("full", calls + 1):
            if name == "save_file":
                raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *([] if name == "fsync" else [str(args[0])]))
        return do(*args, **kwargs)
    setattr(owner, name, operation)
for owner, name in [(os, "fsync"), (os, "replace"), (os, "rename"), (safetensors.torch, "save_file")]:
    wrap(owner, name)
if "limit" in fault:
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (fault["limit"], resource.RLIM_INFINITY))
sys.argv.pop(0)
runpy.run_path(train, run_name="__main__")
"""


def start(here: Path, argv: list[str], fault: dict[str, int | str] | None = None) -> subprocess.Popen[str]:
    """`python train.py ARGV`; one thread, so that every process adds up its numbers in the same order."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    faulty = [] if fault is None else ["-c", FAULTY]
    with_fault = [] if fault is None else [json.dumps(fault)]
    command = [sys.executable, *faulty, str(ROOT / "train.py"), *with_fault, *argv]
    return subprocess.Popen(command, cwd=here, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(here: Path, argv: list[str], fault: dict[str, int | str] | None = None) -> tuple[int, str]:
    """-> exit code, standard error."""
    process = start(here, argv, fault)
    _, err = process.communicate()
    return process.returncode, err


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    """What a run wrote about itself, without the times; a row that a crash has cut in two is none."""
    lines = (run / name).read_text().splitlines(keepends=True) if (run / name).exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in whole]


def result(run: Path) -> dict:
    """All that has to be the same in two runs that should be the same."""
    last = checkpoint.load(run)
    return {
        "checkpoints": checkpoint.list_checkpoints(run)[
            -2:
        ],  # a kill before a superfluous one was dropped leaves one more
        "state": {key: last.state[key] for key in ("step", "val_loss", "best_val_loss")},
        "tensors": {
            f"{part}/{name}": tensor.numpy().tobytes()
            for part, tensors in last.parts.items()
            for name, tensor in tensors.items()
        },
        "metrics": rows(run),
        "samples": rows(run, "samples.jsonl"),
        "sample": (run / "sample.txt").read_text(),
        "leftovers": leftovers(run),
    }


def leftovers(run: Path) -> list[str]:
    """Kinds of files and folders that a crash leaves behind."""
    left = {path for path in run.rglob("*") if re.search(r"\.tmp|\.incomplete|-new$", path.name)}
    outer = [path.relative_to(run).as_posix() for path in left if left.isdisjoint(path.parents)]
    return sorted(re.sub(r"[0-9a-f]{8}", "N", name) for name in outer)


@dataclass(frozen=True)
class Straight:
    """A run that was never stopped."""

    here: Path
    result: dict
    starting: float  # seconds to its first line
    training: float  # seconds from there to its end


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Straight:
    here = tmp_path_factory.mktemp("straight")
    (here / "book.txt").write_text(TEXT)
    times = [time.perf_counter()]
    process = start(here, [*TRAIN, "--out", "run"])
    process.stdout.readline()
    times.append(time.perf_counter())
    _, err = process.communicate()
    times.append(time.perf_counter())
    assert (process.returncode, err) == (0, "")
    found = result(here / "run")
    assert found["state"]["step"] == STEPS == len([row for row in found["metrics"] if row["loss"] is not None])
    assert found["leftovers"] == []
    return Straight(here, found, times[1] - times[0], times[2] - times[1])


@pytest.fixture
def here(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text(TEXT)
    return tmp_path


# Killed


@dataclass
class Kills:
    """What was seen after each kill."""

    kinds: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)  # steps that had been done and have to be done again
    early: int = 0  # before the first save
    leftovers: Counter[str] = field(default_factory=Counter)
    finished: int = 0  # runs

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(self.kinds.items()))
        left = ", ".join(f"{name} x{n}" for name, n in sorted(self.leftovers.items())) or "none"
        return (
            f"kills: {self.kinds.total()} ({kinds}), {self.early} of them before the first save\n"
            f"steps to do again: {sum(self.lost) / len(self.lost):.1f} on average, {max(self.lost)} at most\n"
            f"left behind by a kill: {left}\n"
            f"runs finished, all equal to the one that was never stopped: {self.finished}"
        )


def look(run: Path, kills: Kills) -> None:
    """A kill has left a whole checkpoint, or none yet, and took no more than the steps since the last save."""
    names = checkpoint.list_checkpoints(run)
    done = checkpoint.load(run).state["step"] if names else 0
    for name in names:
        checkpoint.load(run, name)
    lost = max((row["step"] for row in rows(run)), default=0) - done
    assert lost <= SAVE_EVERY, f"{lost} steps are lost, and it saves every {SAVE_EVERY}"
    kills.lost.append(max(lost, 0))
    kills.early += not names
    kills.leftovers.update(leftovers(run))


def prove(here: Path, straight: Straight, n: int, seed: int) -> Kills:
    """Start the same command again and again, kill it n times, and let the last run finish.

    In turn at one of its operations on the disk, most of which belong to a save, and at a moment of the whole training;
    every tenth kill comes before the training begins.
    """
    rng, kills, argv = random.Random(seed), Kills(), [*TRAIN, "--out", "run"]
    while kills.kinds.total() < n:
        number = kills.kinds.total()
        if number % 2 == 0:  # the first one: the checkpoint of step 10 is there, its validation loss is not
            fault = {"kill": rng.randint(1, 60)} if number else {"kill": 2, "of": "/checkpoints"}
            kind, process = "inside a save", start(here, argv, fault)
        else:
            kind = "while it starts" if number % 10 == 9 else "at a moment"
            process = start(here, argv)
            if kind == "at a moment":
                process.stdout.readline()
            time.sleep(rng.uniform(0, straight.training if kind == "at a moment" else straight.starting))
            process.kill()
        _, err = process.communicate()
        if process.returncode == -signal.SIGKILL:
            kills.kinds[kind] += 1
            look(here / "run", kills)
        else:
            assert (process.returncode, err) == (0, "")
            finish(here, straight, kills)
    assert call(here, argv) == (0, "")
    finish(here, straight, kills)
    return kills


def finish(here: Path, straight: Straight, kills: Kills) -> None:
    assert result(here / "run") == straight.result
    shutil.rmtree(here / "run")
    kills.finished += 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # a dozen processes, most of their time spent on imports
def test_repeated_kills_end_like_an_undisturbed_run(here, straight):
    kills = prove(here, straight, n=8, seed=1)
    assert set(kills.kinds) == {"inside a save", "at a moment"}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_fifty_kills(here, straight, capsys):
    kills = prove(here, straight, n=50, seed=2)
    with capsys.disabled():
        print(f"\n{kills}")


# A full disk


def at_step(straight: Straight, here: Path, step: int) -> Path:
    """A run that was killed right after its checkpoint of `step`, which is one of those the straight run has kept."""
    run = here / "run"
    shutil.copytree(straight.here / "run", run)
    for name in checkpoint.list_checkpoints(run):
        if name > f"step-{step:08d}":
            shutil.rmtree(run / "checkpoints" / name)
    assert checkpoint.load(run).state["step"] == step
    return run


def kept(straight: Straight) -> list[int]:
    return [int(name.removeprefix("step-")) for name in straight.result["checkpoints"]]


def refused(here: Path, fault: dict[str, int | str], *words: str) -> bool:
    """Resume without room: False if the run came to its end nevertheless, else it has to end in these words."""
    code, err = call(here, ["--resume", "run"], fault)
    if code != 0:
        assert code == 2 and err.startswith("error: ") and err.count("\n") <= 2, err
        for text in words:
            assert text in err
    for name in checkpoint.list_checkpoints(here / "run"):
        checkpoint.load(here / "run", name)
    return code != 0


@pytest.mark.slow
def test_full_disk_is_reported_and_resumable(here, straight):
    """First no file may be as large as that of the optimizer, then nothing at all can be flushed."""
    step = kept(straight)[-2]
    run = at_step(straight, here, step)
    folder = run / "checkpoints" / f"step-{step:08d}"
    small, large = ((folder / f"{part}.safetensors").stat().st_size for part in ("model", "optimizer"))
    limit = (small + large) // 2
    assert all(path.stat().st_size < limit for path in run.rglob("*") if path.name != "optimizer.safetensors")
    assert refused(here, {"limit": limit}, "optimizer.safetensors")
    assert checkpoint.list_checkpoints(run)[-1] == folder.name
    assert refused(here, {"full": 8}, "the disk is full while writing run/")
    assert checkpoint.list_checkpoints(run)[-1] == folder.name
    assert call(here, ["--resume", "run"]) == (0, "")
    assert result(run) == straight.result


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_disk_full_from_any_operation(here, straight, capsys):
    step = kept(straight)[-2]
    run = at_step(straight, here, step)
    times = next(at for at in count(1) if not refused(here, {"full": at}, "the disk is full while writing "))
    assert times > 10 and result(run) == straight.result
    with capsys.disabled():
        print(f"\nfull disks: {times - 1}, at one operation after the other; then the run ended equal")


# Damage


def damages(path: Path, rng: random.Random, n: int):
    """n times the file cut short, and n times with one bit of it changed; whole again afterwards."""
    data = path.read_bytes()
    for _ in range(n):
        path.write_bytes(data[: rng.randrange(len(data))])
        yield
        offset = rng.randrange(len(data))
        path.write_bytes(data[:offset] + bytes([data[offset] ^ 1 << rng.randrange(8)]) + data[offset + 1 :])
        yield
    path.write_bytes(data)


def files_of_last(run: Path) -> list[Path]:
    return sorted((run / "checkpoints" / checkpoint.list_checkpoints(run)[-1]).iterdir())


@pytest.mark.slow
def test_damaged_byte_in_any_file_is_refused(here, straight):
    run = here / "run"
    shutil.copytree(straight.here / "run", run)
    rng, before = random.Random(3), checkpoint.list_checkpoints(run)[-2]
    for path in files_of_last(run):
        for _ in damages(path, rng, 8):
            with pytest.raises(UserError) as caught:
                checkpoint.load(run)
            first, second = str(caught.value).splitlines()
            assert first.startswith(f"{path} is damaged: ") and second.endswith(f"use --checkpoint {before}")
    checkpoint.load(run)


def go_on_from_the_one_before(here: Path, straight: Straight, name: str, rng: random.Random) -> None:
    run = here / "run"
    shutil.copytree(straight.here / "run", run)
    path, before = (
        run / "checkpoints" / checkpoint.list_checkpoints(run)[-1] / name,
        checkpoint.list_checkpoints(run)[-2],
    )
    next(damages(path, rng, 1))
    code, err = call(here, ["--resume", "run"])
    assert code == 2 and f"{path.relative_to(here)} is damaged: " in err and f"use --checkpoint {before}" in err, err
    assert call(here, ["--resume", "run", "--checkpoint", before]) == (0, "")
    assert result(run) == straight.result
    shutil.rmtree(run)


@pytest.mark.slow
def test_run_resumes_before_a_damaged_checkpoint(here, straight):
    go_on_from_the_one_before(here, straight, "model.safetensors", random.Random(4))


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_run_resumes_before_any_damage(here, straight):
    for path in files_of_last(straight.here / "run"):
        go_on_from_the_one_before(here, straight, path.name, random.Random(path.name))
