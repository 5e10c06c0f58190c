"""--track: the metrics of a run in TensorBoard, Trackio and Weights & Biases; what they do cannot end a run."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from trainer import ROOT, SMALL, call, losses, made_once, other_lr, refused, rows

from model.training import options
from model.training.step import Step

LIBRARIES = ("tensorboard", "trackio", "wandb")


class FakeRun:
    """A run in one of the libraries: what it was given. fails: at this call of log, and at finish if it is 0."""

    def __init__(self, fails: int | None = None, **start) -> None:
        self.start, self.fails, self.logged, self.is_finished = start, fails, [], False

    def log(self, values, step=None) -> None:
        self.logged.append((values["step"] if step is None else step, values))
        if len(self.logged) == self.fails:
            raise ConnectionError("the server\nis away")

    def add_scalar(self, key, value, step) -> None:
        self.log({key: value}, step)

    add_text = add_scalar

    def define_metric(self, name, step_metric) -> None:
        assert (name, step_metric) == ("*", "step")

    def finish(self) -> None:
        self.is_finished = True
        if self.fails == 0:
            raise OSError("no route")

    close = finish


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins for the three libraries: start(fails=...) sets what the next runs do, and runs are those begun."""
    runs, fails = [], []

    def start(*where, **given):
        runs.append(FakeRun(fails[-1] if fails else None, **given, **({"folder": where[0]} if where else {})))
        return runs[-1]

    def module(name, **content):
        made = ModuleType(name)
        made.__spec__ = ModuleSpec(name, None)
        made.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, made)

    module("trackio", init=start)
    module("wandb", init=start, Settings=lambda **given: given)
    module("tensorboard")
    module("torch.utils.tensorboard", SummaryWriter=start)
    return runs, fails


def logged(run: FakeRun, name: str) -> list[tuple[int, float]]:
    return [(step, values[name]) for step, values in run.logged if name in values]


@pytest.mark.parametrize("library", LIBRARIES)
def test_library_gets_metrics_and_samples(here, libraries, library):
    assert call(*SMALL, "--steps", 20, "--track", library, "--out", "run") == 0
    (run,), found = libraries[0], rows(here / "run")
    for name in ("loss", "val_loss", "lr", "tok_per_s"):
        assert logged(run, name) == [(row["step"], row[name]) for row in found if row[name] is not None]
    texts = [json.loads(line) for line in (here / "run/samples.jsonl").read_text().splitlines()]
    assert logged(run, "sample") == [(row["step"], row["text"]) for row in texts]
    assert run.is_finished
    if library != "tensorboard":
        assert run.start["config"]["n_embd"] == 16 and run.start["resume"] == "allow"
        assert run.start["name"] == (here / "run/track.txt").read_text().strip() and run.start["project"] == "gpt2"
        json.dumps(run.start["config"])


@pytest.mark.parametrize("library", LIBRARIES)
def test_resumed_run_continues_under_its_name(here, monkeypatch, libraries, library):
    with monkeypatch.context() as patch:
        other_lr(patch, 12, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert call(*SMALL, "--steps", 20, "--track", library, "--out", "run") == 143
    assert call("--resume", "run") == 0
    first, second = libraries[0]
    assert logged(first, "loss")[-1][0] == 12 and logged(second, "loss")[0][0] == 15
    if library == "tensorboard":  # which hides what a killed run wrote of these steps
        assert [run.start["purge_step"] for run in (first, second)] == [None, 13]
    else:
        assert first.start["name"] == second.start["name"]
    assert call(*SMALL, "--steps", 2, "--track", library, "--out", "other/run") == 0
    assert libraries[0][2].start.get("name") != first.start.get("name") or library == "tensorboard"


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return made_once(tmp_path_factory, "--steps", 20)


@pytest.mark.parametrize("fails", [1, 3, 0], ids=["at once", "later", "at the end"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_failing_library_does_not_end_the_run(straight, here, capsys, libraries, library, fails):
    libraries[1].append(fails)
    assert call(*SMALL, "--steps", 20, "--track", library, "--out", "run") == 0
    assert losses(here / "run") == losses(straight)
    out = capsys.readouterr().out
    why = "no route" if fails == 0 else "the server"
    warning = f"warning: --track {library} failed and is off until the run is resumed: {why}\n"
    assert out.count("warning: ") == 1 and warning in out
    assert fails == 0 or len(libraries[0][0].logged) == fails


def test_numbers_that_are_not_finite_are_left_out(here, monkeypatch, libraries):
    norm = {5: math.nan, 10: math.inf}
    train_step = Step.__call__

    def patched(self, *args, step, **more):
        train_step(self, *args, step=step, **more)
        self.norm.fill_(norm.get(step, 1.0))

    monkeypatch.setattr(Step, "__call__", patched)
    assert call(*SMALL, "--steps", 12, "--track", "wandb") == 0
    assert logged(libraries[0][0], "grad_norm") == [(1, 1.0), (12, 1.0)]


@pytest.mark.parametrize("library", LIBRARIES)
def test_missing_library_is_named_before_anything_is_done(here, capsys, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    words = f"--track {library} needs the {library} package: pip install {library}, or omit it"
    refused(here, capsys, [*SMALL, "--steps", 1, "--track", library], words)


def test_library_that_cannot_start_is_refused(here, capsys, monkeypatch, libraries):
    def no_key(**given):
        raise RuntimeError("No API key configured.\nUse `wandb login`")

    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    refused(here, capsys, [*SMALL, "--track", "wandb"], "--track wandb cannot start: No API key configured.\nfix that")


def test_unknown_library_is_refused(here, capsys):
    refused(here, capsys, [*SMALL, "--track", "mlflow"], "mlflow")
    (here / "mine.toml").write_text("preset = 'tiny'\ntrack = 'mlflow'\n")
    refused(here, capsys, [*SMALL, "--preset", "mine.toml"], "mine.toml: track must be one of none, tensorboard, tr")


def test_older_option_is_understood(here, libraries):
    assert call(*SMALL, "--steps", 2, "--tensorboard", "--out", "run") == 0
    stored = json.loads((here / "run/config.json").read_text())
    assert stored["train"].pop("track") == "tensorboard" and libraries[0][0].logged
    for old, new in ((True, "tensorboard"), (False, "none")):
        (here / "run/config.json").write_text(json.dumps({**stored, "train": stored["train"] | {"tensorboard": old}}))
        assert options.stored_config(here / "run").track == new


@pytest.mark.slow
def test_only_the_first_process_logs(here):
    pytest.importorskip("tensorboard", reason="needs the tensorboard package: make track installs it")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        ROOT / "train.py",
    ]
    argv = [*command, *SMALL, "--steps", "2", "--track", "tensorboard", "--out", "run"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(arg) for arg in argv], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([*(here / "run/tensorboard").iterdir()]) == 1


# --- the libraries themselves, without a network


def two_processes(here, library: str) -> list[tuple[int, float]]:
    """A run of 10 steps, resumed for 10 more, each in a process of its own -> the (step, loss) that it has logged."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(here / "trackio"), "WANDB_MODE": "offline"}
    for argv in ([*SMALL, "--steps", 10, "--track", library, "--out", "run"], ["--resume", "run", "--steps", 20]):
        command = [sys.executable, ROOT / "train.py", *argv]
        done = subprocess.run([str(x) for x in command], cwd=here, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and "warning: --track" not in done.stdout, done.stdout + done.stderr
    return [(row["step"], pytest.approx(row["loss"], rel=1e-6)) for row in rows(here / "run") if row["loss"]]


@pytest.mark.slow
def test_tensorboard_reads_the_run(here):
    pytest.importorskip("tensorboard", reason="needs the tensorboard package: make track installs it")
    expected = two_processes(here, "tensorboard")
    code = "from tensorboard.backend.event_processing.event_accumulator import EventAccumulator as E; import json; "
    code += "f = E('run/tensorboard').Reload(); print(json.dumps([[e.step, e.value] for e in f.Scalars('loss')]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert [tuple(pair) for pair in json.loads(done.stdout.splitlines()[-1])] == expected, done.stderr


@pytest.mark.slow
def test_trackio_stores_the_run(here):
    pytest.importorskip("trackio", reason="needs the trackio package: make track installs it")
    expected = two_processes(here, "trackio")
    with sqlite3.connect(here / "trackio/gpt2.db") as database:
        stored = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert {name for name, _, _ in stored} == {(here / "run/track.txt").read_text().strip()}
    assert [(step, json.loads(m)["loss"]) for _, step, m in stored if "loss" in json.loads(m)] == expected
    assert len([m for _, _, m in stored if "sample" in json.loads(m)]) == 2


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format, blocks of 32 KiB.

    A chunk has 4 bytes of checksum, 2 of length and 1 of kind: 1 is a whole record, 2, 3 and 4 its first, a middle and
    its last part.
    """
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record = (record if kind in (3, 4) else b"") + content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield record


@pytest.mark.slow
def test_wandb_stores_the_run(here):
    pytest.importorskip("wandb", reason="needs the wandb package: make track installs it")
    expected = two_processes(here, "wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    found, ids = [], set()
    for path in sorted((here / "run/wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = Record.FromString(data)
            row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found += [(row["step"], row["loss"])] if "loss" in row else []
            ids |= {record.run.run_id} - {""}
    assert found == expected and ids == {(here / "run/track.txt").read_text().strip()}
