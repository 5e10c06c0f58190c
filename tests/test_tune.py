"""Launch tables: what is chosen by measurement, what is refused, which table is in force. No GPU: a made-up clock."""

import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_kernel import DEFAULT, RAISES, RIGHT, SPACE, SPEC, ULP, WRONG, _triple_fwd_kernel

from kernels import __main__ as command
from kernels import _compile, _registry, _tables, _tune
from kernels._launch import assume_arch, record_launches
from kernels._proof import evaluate
from kernels._tables import Gpu, Table, choose
from kernels._triton import HAS_TRITON, triton
from model import checkpoint
from model.config import GPTConfig
from model.training import log
from model.training.options import default_config
from model.training.parallel import World

ROOT = Path(__file__).parent.parent
TINY = GPTConfig(vocab_size=8, n_positions=8, n_embd=8, n_layer=1, n_head=1)

GPU = Gpu("NVIDIA Test GPU 80GB", 90, 132, str(triton.__version__))
CUDA = torch.device("cuda", 0)  # a name: nothing is allocated on it
F32 = [torch.float32]
interpreted = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A registry with the toy, folders of their own, and nothing loaded."""
    monkeypatch.setitem(_registry._specs, "triple", SPEC)
    monkeypatch.setenv("KERNELS_TABLES", str(tmp_path / "user"))
    monkeypatch.setattr(_tables, "COMMITTED", tmp_path / "committed")
    monkeypatch.setattr(_tables, "gpu_of", lambda device: GPU)
    monkeypatch.setattr(_tables, "_loaded", {})
    monkeypatch.setattr(_tables, "_chosen", {})
    monkeypatch.setattr(_tables, "warn_once", lambda text: warned.append(text) if text not in warned else None)
    warned: list[str] = []
    return warned


class Machine:
    """A GPU that takes `seconds(options, round)` for a call, and a compiler that says `static(options)`."""

    device, gpu, cache_bytes = torch.device("cpu"), GPU, 0

    def __init__(self, seconds, static=lambda options: ("", None)):
        self.seconds, self.static, self.now, self.timed = seconds, static, 0.0, []

    def clock(self):
        return self.now

    def state(self):
        return {"sm_mhz": 1980.0, "watts": 400.0}

    def check(self): ...

    @contextlib.contextmanager
    def compiling(self, targets, arch, sms):
        def wait(target):
            for candidate in target.candidates:
                problem, candidate.issue = self.static(candidate.options)
                if problem:
                    candidate.refuse("static", problem)
            _tune.prune(target)

        yield wait

    def sampler(self, calls, options):
        for call in calls:
            call()
        self.timed.append(options)
        rounds = iter(range(1000))

        def sample():
            self.now += (taken := self.seconds(options, next(rounds)))
            return taken

        return sample


def _survey(quick=False):
    return _tune.survey(["triple"], F32, 90, 132, quick=quick)


def _path():
    return _tables.user_file(GPU)


def _tuned(machine, **options):
    return _tune.tune(machine, _survey(), _path(), say=lambda line: None, **options)


def _entries(path=None):
    return {entry["kernel"]: entry for entry in json.loads((path or _path()).read_text())["entries"]}


def _ask(kernel="triple_fwd", device=CUDA, N=8):
    return choose(kernel, DEFAULT, SPACE, device, dtype=torch.float32, N=N)


FASTEST = {"BLOCK": 64, "MODE": RIGHT}


def _optimum(options, i):
    """BLOCK 64 is a tenth faster; what is wrong, raises or rounds differently would be twice as fast."""
    return {16: 1.2, 32: 1.0, 64: 0.9}[options["BLOCK"]] * (1.0 if options["MODE"] == RIGHT else 0.5)


# --- measurement -----------------------------------------------------------------------------------------------------


@interpreted
def test_survey_finds_launches_from_the_registry_alone():
    forward, backward = _survey()
    assert (forward.choice.kernel, forward.kind) == ("triple_fwd", "forward")
    assert (backward.choice.kernel, backward.kind) == ("triple_bwd", "backward")
    assert forward.cases == [*SPEC.bench_cases] and len(forward.candidates) == 12
    assert forward.candidates[0].options == DEFAULT
    quick, _ = _survey(quick=True)
    assert quick.cases == [SPEC.bench_cases[0]] and len(quick.candidates) == 1 + 2 + 3


@interpreted
def test_known_optimum_is_found_and_then_launched():
    machine = Machine(_optimum)
    result = _tuned(machine)
    assert result.measured == 2 and not result.problem and not result.skipped
    entry = _entries()["triple_fwd"]
    assert entry["chosen"] == FASTEST and entry["same_bits"] and entry["gain"] == pytest.approx(0.1)
    assert entry["state"]["before"]["sm_mhz"] == 1980.0
    out = {tuple(c["options"].values()): c["refused"] for c in entry["candidates"]}
    assert "is off by" in out[16, WRONG] and "no room for it" in out[16, RAISES] and "other bits" in out[16, ULP]
    assert not any(options["MODE"] for options in machine.timed), "fast and wrong is not even timed"
    kept = next(c for c in entry["candidates"] if c["options"] == FASTEST)
    assert len(kept["seconds"]) == 2 and len(kept["seconds"][0]) == 30
    assert _ask() == FASTEST and _ask(N=16) == DEFAULT and _ask(device=torch.device("cpu")) == DEFAULT


@interpreted
def test_other_bits_are_taken_where_they_are_allowed():
    _tuned(Machine(_optimum), any_bits=True)
    entry = _entries()["triple_fwd"]
    assert entry["chosen"] == {"BLOCK": 64, "MODE": ULP} and not entry["same_bits"]


@interpreted
@pytest.mark.parametrize("edge", [0.0, 0.02, 0.06])
def test_noise_keeps_the_default(edge):
    """Candidates whose time is that of the default, or a little less, under a noise of 3 %; 6 % are enough."""
    random.seed(5)
    _tuned(Machine(lambda o, i: (1 - edge * (o["BLOCK"] == 64)) * (1 + random.gauss(0, 0.01))))
    assert [entry["chosen"] == DEFAULT for entry in _entries().values()] == [edge < 0.03] * 2


@interpreted
def test_large_gains_in_too_few_rounds_keep_the_default():
    _tuned(Machine(lambda o, i: 0.5 if o["BLOCK"] == 64 and i % 5 < 3 else 1.0))
    assert _entries()["triple_fwd"]["chosen"] == DEFAULT


@interpreted
def test_compiled_code_prunes_but_never_the_default():
    issue = {16: 10.0, 32: 40.0, 64: 12.6}
    machine = Machine(_optimum, lambda o: ("spills 8 bytes" if o["MODE"] else "", issue[o["BLOCK"]]))
    _tuned(machine)
    assert [options["BLOCK"] for options in machine.timed[:2]] == [32, 16] and 64 not in [
        o["BLOCK"] for o in machine.timed
    ]
    refused = {tuple(c["options"].values()): c["refused"] for c in _entries()["triple_fwd"]["candidates"]}
    assert (
        refused[64, RIGHT] == "issues 1.26 times the instructions of the best" and refused[16, ULP] == "spills 8 bytes"
    )
    assert refused[32, RIGHT] == ""


@interpreted
def test_the_winner_passes_every_family_or_the_next_takes_its_place(monkeypatch):
    """A fault that few rows in their usual layout do not show."""
    wrong = _tune._wrong

    def in_layouts(target, candidate, cases, machine, families):
        if "layouts" in families and candidate.options["BLOCK"] == 64:
            return "y is off"
        return wrong(target, candidate, cases, machine, families)

    monkeypatch.setattr(_tune, "_wrong", in_layouts)
    _tuned(Machine(lambda o, i: {16: 0.75, 32: 1.0, 64: 0.7}[o["BLOCK"]]))
    assert _entries()["triple_fwd"]["chosen"] == {"BLOCK": 16, "MODE": RIGHT}


@interpreted
def test_time_that_is_over_skips_the_rest():
    result = _tuned(Machine(_optimum), seconds=1.0)
    assert result.measured == 1 and [name.split()[0] for name in result.skipped] == ["triple_bwd"]
    assert "no time for triple_bwd" in result.report()[0]


@interpreted
def test_broken_default_costs_its_own_kernel_alone(monkeypatch):
    race = _tune.race
    monkeypatch.setattr(_tune, "race", lambda t, m, n: 1 / 0 if t.choice.kernel == "triple_fwd" else race(t, m, n))
    said = []
    _tune.tune(Machine(_optimum), _survey(), _path(), say=said.append)
    assert "not measured: ZeroDivisionError" in said[0] and [*_entries()] == ["triple_bwd"]


@interpreted
def test_lost_gpu_ends_the_work_and_keeps_what_was_found():
    machine = Machine(_optimum)

    def check():
        if len(machine.timed) > 3:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    machine.check = check
    result = _tuned(machine)
    assert result.problem.startswith("the GPU is lost: ") and [*_entries()] == ["triple_fwd"]


# --- a kill, Ctrl-C, a full disk -------------------------------------------------------------------------------------


def _interrupt(*args):
    raise KeyboardInterrupt


class Killed(BaseException):
    """What no handler catches, as SIGKILL."""


@interpreted
@pytest.mark.parametrize("where", ["measurement", "replace"])
def test_kill_in_the_middle_keeps_what_was_found(where, monkeypatch):
    machine = Machine(_optimum)

    def seconds(options, i):
        if len(machine.timed) > 6:  # of the second kernel
            raise Killed
        return _optimum(options, i)

    if where == "measurement":
        machine.seconds = seconds
    else:
        replace, done = _tables.os.replace, []

        def third(old, new):
            done.append(new)
            if len(done) == 3:
                raise Killed
            replace(old, new)

        monkeypatch.setattr(_tables.os, "replace", third)
    with pytest.raises(Killed):
        _tuned(machine)
    assert _entries()["triple_fwd"]["chosen"] == FASTEST and [p.name for p in _path().parent.iterdir()] == [
        _path().name
    ]


@interpreted
def test_interrupt_keeps_what_was_found_and_a_later_run_adds_to_it():
    machine = Machine(_optimum)
    machine.seconds = lambda o, i: (
        _optimum(o, i) if len(machine.timed) <= 6 else (_ for _ in ()).throw(KeyboardInterrupt)
    )
    result = _tuned(machine)
    assert result.problem == "interrupted" and [*_entries()] == ["triple_fwd"]
    assert result.report() == [f"interrupted; 1 measured and kept in {_path()}"]
    _tune.tune(Machine(_optimum), _survey()[1:], _path(), say=lambda line: None)
    assert [*_entries()] == ["triple_fwd", "triple_bwd"]


@interpreted
def test_no_permission_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    (tmp_path / "user").write_text("a file where the folder would be")
    machine = Machine(_optimum)
    with pytest.raises(OSError):
        _tuned(machine)
    assert not machine.timed


@interpreted
def test_never_in_a_capture(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="while a CUDA graph is captured"):
        _tuned(Machine(_optimum))
    assert not _path().exists()


# --- which table is in force -----------------------------------------------------------------------------------------


def _write(path, gpu=GPU, **changes):
    entry = {"kernel": "triple_fwd", "key": {"dtype": "float32", "N": 8}, "source": _tables.source_hash("triple_fwd"),
             "default": DEFAULT, "chosen": FASTEST} | changes  # fmt: skip
    table = Table(str(path), gpu)
    table.entries[_tables.entry_id(entry["kernel"], entry["key"])] = entry
    _tables.write(table)
    return table


def _committed():
    return _tables.COMMITTED / _path().name


def test_users_file_comes_before_the_committed_one():
    assert _ask() == DEFAULT
    other = {"BLOCK": 16, "MODE": RIGHT}
    for path, chosen in ((_committed(), other), (_path(), FASTEST)):
        _write(path, chosen=chosen)
        assert _ask() != chosen, "files are read once"
        _tables.use_tables(CUDA)
        assert _ask() == chosen
    _ask().clear()
    assert _ask() == FASTEST, "a launch may take options out"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"source": "0" * 16}, "its source has changed"),
        ({"default": {**DEFAULT, "BLOCK": 64}}, "its default has changed"),
        ({"chosen": {"BLOCK": 64}}, "the values that its options may take"),
        ({"chosen": {"BLOCK": 48, "MODE": 0}}, "the values that its options may take"),
    ],
)
def test_stale_entry_is_the_default_and_said_once(changes, why, files):
    _write(_path(), **changes)
    assert _ask() == _ask() == DEFAULT
    assert len(files) == 1 and why in files[0] and "python -m kernels tune" in files[0]
    _write(_committed())
    _tables.use_tables(CUDA)
    assert _ask() == FASTEST, "the next one counts"


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "\x00", '{"schema": 1}', '{"schema": 2, "gpu": {}}', '{"schema": 1, "gpu": 3, "entries": 1}'],
)
def test_damaged_table_is_the_default_and_said_once(text, files):
    _path().parent.mkdir(parents=True)
    _path().write_text(text)
    assert _ask() == _ask("triple_bwd") == DEFAULT
    assert len(files) == 1 and str(_path()) in files[0]


@pytest.mark.parametrize("other", [{"name": "Another GPU"}, {"arch": 80}, {"sms": 114}, {"triton": "2.0"}])
def test_table_of_another_gpu_does_not_count(other, files):
    _write(_path(), dataclasses.replace(GPU, **other))
    ((name, value),) = other.items()
    assert _ask() == DEFAULT and len(files) == 1 and f"was made for {name} {value}" in files[0]


@interpreted
def test_tuning_replaces_a_damaged_table():
    _path().parent.mkdir(parents=True)
    _path().write_text("{")
    _tuned(Machine(_optimum))
    assert _ask() == FASTEST


def test_unreadable_table_is_the_default(files):
    _path().mkdir(parents=True)
    assert _ask() == DEFAULT and "cannot be read" in files[0]


def test_surveys_see_defaults_unless_they_are_of_the_gpu_itself():
    _write(_path())
    cpu = torch.device("cpu")
    with record_launches(90):
        assert _ask() == _ask(device=cpu) == DEFAULT
    with assume_arch(80):
        assert _ask() == DEFAULT
    with record_launches(90, 132, CUDA):
        assert _ask(device=cpu) == FASTEST
    assert _ask() == FASTEST
    with _tables.untuned():
        assert _ask() == DEFAULT


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
def test_preflight_compiles_what_the_table_launches(monkeypatch):
    """Or a capture would meet a kernel that is not compiled."""
    _write(_path())
    seen = []
    monkeypatch.setattr(_compile, "unknown_to_ptxas", lambda arch: False)
    monkeypatch.setattr(_compile, "sm_count", lambda device: 132)
    monkeypatch.setattr(_compile, "unique", lambda recorded, arch: seen.extend(recorded) or [])
    assert _compile.preflight("triple", torch.float32, {}, 90, 1 << 17, CUDA) is None
    assert [x.meta["BLOCK"] for x in seen if x.kernel is _triple_fwd_kernel] == [64, 64]


def test_one_lookup_a_launch(monkeypatch):
    _write(_path())
    _ask()
    monkeypatch.setattr(_tables, "_look_up", None)
    monkeypatch.setattr(_tables, "tables", None)
    assert _ask() == FASTEST


def test_source_counts_what_the_kernel_calls(monkeypatch):
    before = _tables.source_hash("triple_fwd")
    assert before != _tables.source_hash("triple_bwd") and len(before) == 16
    _tables.source_hash.cache_clear()
    getsource = _tables.inspect.getsource
    changed = lambda f: getsource(f) + "#" * (f.__name__ == "_triple")  # noqa: E731
    monkeypatch.setattr(_tables.inspect, "getsource", changed)
    assert _tables.source_hash("triple_fwd") != before
    _tables.source_hash.cache_clear()


def test_ranks_take_the_table_of_rank_0(monkeypatch):
    rank_0 = [_write(_committed())]
    _write(_path(), chosen={"BLOCK": 16, "MODE": RIGHT})
    assert _ask() == {"BLOCK": 16, "MODE": RIGHT}
    own = _tables.launch_tables(CUDA)
    _tables.use_tables(CUDA, rank_0)
    assert _ask() == FASTEST and _tables.launch_tables(CUDA) not in (own, None)
    _tables.use_tables(CUDA, [dataclasses.replace(rank_0[0], gpu=dataclasses.replace(GPU, sms=114))])
    assert _ask() == DEFAULT, "a table of another GPU holds for nobody else"
    _tables.use_tables(CUDA, [])
    assert _ask() == DEFAULT and _tables.launch_tables(CUDA) is None
    _tables.use_tables(torch.device("cpu"), rank_0)


RANKS = """
import os
import torch
from kernels import _tables
from model.training import parallel

rank = os.environ["RANK"]
parallel.tables = lambda device: [_tables.Table(f"table of rank {rank}", _tables.Gpu("a GPU", 90, 132, "3.7.1"))]
parallel.use_tables = lambda device, given: print(f"rank {rank}: {given[0].path}", flush=True)
with parallel.start("cpu") as world:
    parallel.barrier(world)
"""


@pytest.mark.slow  # two processes import torch
def test_processes_agree_when_they_start():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [os.environ | both | {"RANK": r, "LOCAL_RANK": r, "PYTHONPATH": str(ROOT)} for r in "01"]
    started = [
        subprocess.Popen([sys.executable, "-c", RANKS], env=env, stdout=subprocess.PIPE, text=True) for env in ranks
    ]
    assert [p.communicate()[0] for p in started] == [f"rank {r}: table of rank 0\n" for r in "01"]


def test_run_records_its_tables(monkeypatch, tmp_path):
    """The hash is in every row of the metrics and in the checkpoint, where there is a table."""
    monkeypatch.setattr(log, "launch_tables", lambda device: "0123456789ab")
    cfg = dataclasses.replace(default_config([]), dtype="float32")
    world = World(0, 1, 0, torch.device("cpu"))
    with log.Log(tmp_path, cfg, TINY, world, sequences=1, done=0, elapsed_s=0.0, publish=print) as written:
        written.validation(1, 2.0, is_best=True)
    (row,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["tables"] == "0123456789ab"
    parts = {"model": {"w": torch.zeros(1)}}
    shared = {"config": {}, "model": TINY, "best_val_loss": None, "elapsed_s": 0.0}
    for step, tables in ((1, "0123456789ab"), (2, None)):
        folder = checkpoint.save(tmp_path, step, parts, **shared, tables=tables)
        assert json.loads((folder / "state.json").read_text()).get("tables") == tables


def test_command_says_which_table_is_in_force():
    assert [*_tables.describe(CUDA)] == [
        "launch tables: untimed defaults, there is none for this GPU: python -m kernels tune"
    ]
    _write(_path())
    _tables.use_tables(CUDA)
    head, line = _tables.describe(CUDA)
    assert head == f"launch tables: {_tables.launch_tables(CUDA)}"
    assert line == f"  {_path()}: 1 measured, 1 of them faster than the default"
    _write(_path(), source="")
    _tables.use_tables(CUDA)
    assert "stale, their source has changed: triple_fwd" in [*_tables.describe(CUDA)][1]


def test_cache_folder(monkeypatch, tmp_path):
    assert _path() == tmp_path / "user" / "nvidia-test-gpu-80gb.json"
    monkeypatch.delenv("KERNELS_TABLES")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert _path().parent == tmp_path / "cache" / "gpt2-kernels"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _path().parent == tmp_path / ".cache" / "gpt2-kernels"


# --- the command -----------------------------------------------------------------------------------------------------


def _refused(argv, capsys):
    assert command.main(["tune", *argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(command, "INTERPRET", False)
    assert "tune measures on an NVIDIA GPU: torch finds no CUDA device" in _refused([], capsys)
    monkeypatch.setattr(command, "INTERPRET", True)
    assert "unset TRITON_INTERPRET" in _refused(["--quick"], capsys)


@pytest.fixture
def gpu(monkeypatch):
    """The command on a machine with a GPU."""
    monkeypatch.setattr(command, "INTERPRET", False)
    monkeypatch.setattr(command, "this_device", lambda: CUDA)
    monkeypatch.setattr(command, "device_problem", lambda *args: None)
    monkeypatch.setattr(command, "describe", lambda: ["a GPU"])
    monkeypatch.setattr(command, "arch_of", lambda device: 90)
    monkeypatch.setattr(command, "sm_count", lambda device: 132)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine = Machine(_optimum)
    monkeypatch.setattr(_tune, "Machine", lambda device: machine)
    return machine


ARGV = ["--op", "triple", "--dtype", "float32"]


@interpreted
def test_command_tunes_and_copies(gpu, capsys, tmp_path):
    out = tmp_path / "mine.json"
    assert command.main(["tune", *ARGV, "--out", str(out)]) == 0
    assert _entries(out) == _entries() and _ask() == FASTEST
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "a GPU" and lines[-1] == f"2 measured and kept in {_path()}"
    assert "triple_fwd dtype=float32 N=8: BLOCK=64, 10.0% faster (12 candidates, 6 wrong, 3 of other bits)" in lines
    assert "exists: name another file" in _refused([*ARGV, "--out", str(out)], capsys)


@interpreted
def test_command_ends_well(gpu, capsys, tmp_path):
    gpu.seconds = _interrupt
    assert command.main(["tune", *ARGV, "--quick"]) == 130
    assert "interrupted; 0 measured" in capsys.readouterr().out
    (tmp_path / "user").rename(tmp_path / "moved")
    (tmp_path / "user").touch()
    assert "KERNELS_TABLES names another folder" in _refused(ARGV, capsys)


def test_gradients_and_outputs_are_those_of_the_toy(device):
    """The toy is a kernel like any other."""
    x = torch.randn(3, 8, device=device)
    got = evaluate(SPEC, {"x": x}, {"y": x}, "triton")
    assert torch.equal(got["y"], x * 3) and torch.equal(got["dx"], x * 3)
