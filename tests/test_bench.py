"""The benchmarks' base: turns and clocks, reports, comparison, and error messages."""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import pytest
import torch
from pytest_benchmark.cli import main as pytest_benchmark_main
from reports import CPU, PARAMS, make_report, make_row, refusal

from bench import __main__ as bench_main
from bench import command, record, timing
from bench import compare as comparison
from bench.record import CONTROL, Report, Row
from model.cli import UserError

# ---- clocks


def test_providers_take_turns(monkeypatch):
    order = []

    class Timer:
        def __init__(self, statement, globals, num_threads):
            self.call = globals["call"]

        def timeit(self, number):
            self.call()
            order.append(number)
            return dataclasses.make_dataclass("M", ["mean"])(timing._WALL_SAMPLE / 4 if len(order) == 2 else 2.0)

    monkeypatch.setattr(timing, "Timer", Timer)
    monkeypatch.setattr(timing, "control", lambda device: lambda: order.append(CONTROL))
    makers = {name: lambda name=name: lambda: order.append(name) for name in "ab"}
    makers["broken"] = lambda: 1 / 0
    measured = timing.measure(makers, CPU, "wall", seconds=0.0)
    assert measured.failed == {"broken": "ZeroDivisionError: division by zero"}
    assert measured.seconds == {name: (2.0,) * 5 for name in ("a", "b", CONTROL)}
    turns = [entry for entry in order if isinstance(entry, str)]
    rounds = [turns[i : i + 3] for i in range(3, 18, 3)]
    assert len(turns) == 18 and all(set(names) == {"a", "b", CONTROL} for names in rounds)
    assert len({*map(tuple, rounds)}) > 2  # in another order each time
    numbers = {(name, n) for name, n in itertools.pairwise(order[6:]) if isinstance(name, str)}
    assert order[:2] == ["a", 1] and {("a", 4), ("b", 1)} <= numbers  # a short call is repeated within a sample


def test_failure_during_timing_spares_the_others():
    calls = iter(range(9))

    def dies_later():
        if next(calls) > 7:
            raise torch.OutOfMemoryError("out of memory")

    measured = timing.measure({"a": lambda: dies_later, "b": lambda: lambda: None}, CPU, "wall", seconds=0)
    assert measured.failed == {"a": "OutOfMemoryError: out of memory"}
    assert {name: len(samples) for name, samples in measured.seconds.items()} == {"b": 5, CONTROL: 5}


def test_measure_on_this_cpu():
    x = torch.randn(64, 64)
    measured = timing.measure(
        {"small": lambda: lambda: x + x, "large": lambda: lambda: x @ x @ x @ x}, CPU, "wall", seconds=0.01
    )
    assert set(measured.seconds) == {"small", "large", CONTROL}
    rows = measured.rows("kernels", PARAMS, lambda provider, median: {"twice": 2 * median})
    control = rows.pop()
    assert control.provider == CONTROL and set(control.metrics) <= {"load"}
    for row in rows:
        assert row.metrics == {"twice": 2 * statistics.median(row.seconds)} and row.clock == "wall"
        assert 5 <= len(row.seconds) <= 50 and min(row.seconds) > 0


@pytest.fixture
def fake_cuda(monkeypatch):
    """A GPU that is a number: `now` in ms. A call of `cost` takes cost ms, emptying the cache 0.5 ms."""

    class Gpu:
        now, captured, stream, sync_mode = 0.0, None, None, "default"

        def wait(self):
            if self.sync_mode == "error":
                raise RuntimeError("called a synchronizing CUDA operation")
            if self.captured is not None:
                raise RuntimeError("operation not permitted when stream is capturing")

        def work(self, ms):
            if self.captured is None:
                self.now += ms
            else:
                self.captured.append(ms)

    gpu_ = Gpu()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = gpu_.now

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return other.at - self.at

    class Graph:
        def __init__(self):
            self.kernels = []

        def replay(self):
            gpu_.now += sum(self.kernels)

    class Capture:
        def __init__(self, graph, stream):
            self.graph, self.stream = graph, stream

        def __enter__(self):
            self.before, gpu_.stream = gpu_.stream, self.stream
            gpu_.captured = self.graph.kernels

        def __exit__(self, kind, *error):
            gpu_.captured = None
            if kind is None:  # PyTorch's raises before it gets here
                gpu_.stream = self.before

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            pass

        def __enter__(self):
            self.before, gpu_.stream = gpu_.stream, self

        def __exit__(self, *error):
            gpu_.stream = self.before

    gpu_.stream = default = Stream(None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: setattr(gpu_, "sync_mode", mode))
    flush = type("Flush", (), {"zero_": lambda self: gpu_.work(0.5)})()
    monkeypatch.setattr(timing.torch, "empty", lambda *a, **k: flush)
    for name, value in {"Event": Event, "CUDAGraph": Graph, "graph": Capture, "Stream": Stream}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu_.stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "control", lambda device: lambda: gpu_.work(1.0))
    monkeypatch.setattr(timing, "machine_state", lambda device: {"watts": 100.0})
    yield gpu_
    assert gpu_.stream is default and gpu_.sync_mode == "default"


@pytest.mark.parametrize("clock", ["events", "graph"])
def test_gpu_clocks_time_the_call_alone(clock, fake_cuda):
    def prepared():
        fake_cuda.work(50.0)  # the forward pass of a backward pass
        return lambda: fake_cuda.work(0.25)

    measured = timing.measure(
        {"a": prepared, "b": lambda: lambda: fake_cuda.work(2.0)}, torch.device("cuda", 0), clock, seconds=0
    )
    medians = {name: statistics.median(samples) * 1e3 for name, samples in measured.seconds.items()}
    assert medians == {"a": pytest.approx(0.25), "b": pytest.approx(2.0), CONTROL: pytest.approx(1.0)}
    assert measured.state == {"watts": 100.0}
    rows = {row.provider: row for row in measured.rows("kernels", PARAMS, lambda *_: {})}
    assert ("host_ms" in rows["a"].metrics) == (clock == "events") and rows[CONTROL].metrics == {"watts": 100.0}


def test_call_that_waits_is_refused_before_its_capture(fake_cuda):
    """And one that fails in its capture leaves the stream to the next."""

    def fails():
        fake_cuda.work(1.0)
        if fake_cuda.captured is not None:
            raise RuntimeError("no")

    def waits():
        fake_cuda.work(1.0)
        fake_cuda.wait()

    makers = {"waits": lambda: waits, "fails": lambda: fails, "fine": lambda: lambda: fake_cuda.work(2.0)}
    measured = timing.measure(makers, torch.device("cuda", 0), "graph", seconds=0)
    assert measured.failed["waits"] == "cannot be captured in a CUDA graph: it makes the host wait for the device"
    assert measured.failed["fails"] == "RuntimeError: no" and len(measured.failed) == 2
    assert statistics.median(measured.seconds["fine"]) == pytest.approx(2e-3)


@pytest.mark.parametrize("repeats", [1, 4])
def test_lead_in_is_not_timed(repeats, monkeypatch):
    now = [0.0]

    class Timer:
        def __init__(self, statement, globals, num_threads):
            self.call = globals["call"]

        def timeit(self, number):
            began = now[0]
            for _ in range(number):
                self.call()
            took = (now[0] - began) / number
            for _ in range(2):  # warm-up of other lengths, which must not count
                now[0] += 0.5
                self.call()
            return dataclasses.make_dataclass("M", ["mean"])(took)

    def run(start):
        now[0] += 3.0
        start()
        now[0] += 0.25

    monkeypatch.setattr(timing, "Timer", Timer)
    monkeypatch.setattr(timing, "_WALL_SAMPLE", 3.25 * repeats)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    measured = timing.measure({"a": lambda: timing.Partial(run, CPU)}, CPU, "wall", seconds=0.0)
    assert measured.seconds["a"] == (0.25,) * 5


def test_lead_in_on_a_gpu_is_not_timed(fake_cuda):
    def run(start):
        fake_cuda.work(3.0)
        start()
        fake_cuda.work(0.25)

    device = torch.device("cuda", 0)
    measured = timing.measure({"a": lambda: timing.Partial(run, device)}, device, "events", seconds=0)
    assert measured.seconds["a"] == pytest.approx([0.25e-3] * 5)


# ---- reports


def test_report_round_trip(tmp_path):
    path = tmp_path / "new" / "r.json"
    rows = (
        make_row(seconds=(0.25, 0.5, 1.0), gb_per_s=3.0),
        Row("kernels", PARAMS, "flex", "graph", error="RuntimeError: no"),
    )
    written = make_report(*rows)
    written.missing["liger"] = "not installed"
    for _ in range(2):
        written.write(path)
    assert Report.read(path) == written
    assert [p.name for p in path.parent.iterdir()] == ["r.json"]
    data = json.loads(path.read_text())
    assert data["schema"] == record.SCHEMA and data["machine_info"]["torch"] == torch.__version__
    stats = data["benchmarks"][0]["stats"]
    assert (stats["median"], stats["q1"], stats["q3"], stats["rounds"]) == (0.5, 0.375, 0.75, 3)


def test_killed_write_keeps_the_previous_report(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    make_report(make_row()).write(path)
    before = path.read_bytes()
    monkeypatch.setattr("model.files.os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_report(make_row(), make_row("compile")).write(path)
    assert path.read_bytes() == before


def test_pytest_benchmark_reads_our_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.json"
    make_report(make_row(), make_row("compile", (2.0, 3.0, 4.0)), Row("kernels", PARAMS, "flex", error="no")).write(
        path
    )
    monkeypatch.setattr("sys.argv", ["pytest-benchmark", "compare", str(path), "--columns=median,iqr,outliers,rounds"])
    pytest_benchmark_main()
    out = capsys.readouterr().out
    assert "[eager]" in out and "[compile]" in out and "3.0000" in out


def test_pytest_benchmark_files_are_read(tmp_path):
    stats = {"min": 1.0, "q1": 2.0, "median": 3.0, "q3": 4.0, "max": 5.0}
    theirs = {
        "machine_info": {"node": "x", "cpu": {"brand_raw": "A CPU"}}, "commit_info": {"id": "abc"}, "datetime": "today",
        "benchmarks": [
            {"fullname": "t.py::a", "stats": {**stats, "data": [1.0, 3.0]}},
            {"fullname": "t.py::b", "stats": stats},
        ],
    }  # fmt: skip
    path = tmp_path / "theirs.json"
    path.write_text(json.dumps(theirs))
    read = Report.read(path)
    assert [(row.group, row.seconds) for row in read.rows] == [
        ("t.py::a wall", (1.0, 3.0)), ("t.py::b wall", (1.0, 2.0, 3.0, 4.0, 5.0)),
    ]  # fmt: skip
    assert read.device.startswith("A CPU")


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"schema": 1, "benchmarks": [], "commit_info": {"id": "abc"}}', "report schema 1, and this version reads 2"),
        ('{"schema": 2, "benchmarks": [{"group"', "not a whole report"),
        ('{"schema": 2, "benchmarks": [{}]}', "is not a report of schema 2"),
        ('{"machine_info": {}, "benchmarks": []}', "is not a report of schema 2"),
        ("[1, 2]", "is not a report of schema 2"),
        ("\xff", "is not a whole report"),
    ],
)
@pytest.mark.parametrize("call", [["report"], ["compare", "whole.json"]])
def test_damaged_reports_are_refused(text, words, call, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_report(make_row()).write(Path("whole.json"))
    Path("bad.json").write_text(text)
    assert words in refusal([*call, "bad.json"], capsys)


def test_binary_files_are_refused(tmp_path, capsys):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00")
    assert "is not a whole report" in refusal(["report", str(tmp_path / "bad.json")], capsys)


# ---- comparison

STEADY = [1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01, 0.99, 1.00, 1.00, 1.01, 0.99]


def _scaled(factor, samples=STEADY):
    return tuple(factor * s for s in samples)


def _compared(factor, control, **options):
    a = make_report(make_row(seconds=_scaled(1)), make_row(CONTROL, _scaled(0.5)))
    b = make_report(make_row(seconds=_scaled(factor)), make_row(CONTROL, _scaled(0.5 * control)))
    (change,) = comparison.compare([a], [b], **options).changes
    return change


@pytest.mark.parametrize(
    "factor, control, verdict",
    [
        (1.0, 1.0, "same"), (1.3, 1.0, "slower"), (0.7, 1.0, "faster"),
        (1.3, 1.3, "same"),  # the machine was slower
        (0.7, 0.7, "same"),
        (1.0, 1.3, "same"),  # only the control was: that proves nothing about the row
        (1.06, 1.0, "unclear"),  # 6 % and the noise of 2 %
    ],
)  # fmt: skip
def test_verdict_needs_more_than_noise_and_machine(factor, control, verdict):
    change = _compared(factor, control)
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(factor) and change.drift == pytest.approx(control)
    assert change.low < factor < change.high


def test_threshold_is_an_option():
    assert _compared(1.3, 1.0, threshold=0.5).verdict == "same"
    assert _compared(1.06, 1.0, threshold=0.005).verdict == "slower"


def test_noise_is_unclear():
    noisy = [1.0, 2.0, 0.6, 1.4, 0.9, 3.0, 1.2, 0.7]
    a, b = (make_report(make_row(seconds=_scaled(f, noisy)), make_row(CONTROL, STEADY[:8])) for f in (1.0, 1.3))
    assert [c.verdict for c in comparison.compare([a], [b]).changes] == ["unclear"]


def _twenty(factors, controls):
    """Two reports of twenty rows, each in a group of its own, B's times being A's by these factors."""
    a, b = make_report(), make_report()
    for i, (factor, drift) in enumerate(zip(factors, controls, strict=True)):
        a.rows += [make_row(op=f"op{i}", seconds=STEADY), make_row(CONTROL, STEADY, op=f"op{i}")]
        b.rows += [make_row(op=f"op{i}", seconds=_scaled(factor)), make_row(CONTROL, _scaled(drift), op=f"op{i}")]
    return comparison.compare([a], [b])


def test_several_runs_widen_the_interval(tmp_path, capsys):
    def side(*factors):
        return [make_report(make_row(seconds=_scaled(f)), make_row(CONTROL, STEADY)) for f in factors]

    assert comparison.compare(side(1.0), side(1.3)).of("slower")
    assert not comparison.compare(side(1.0, 1.28), side(1.3, 1.0)).of("slower")  # runs of one code differ as much
    (change,) = comparison.compare(side(1.0, 1.1), side(1.5, 1.4, 1.6)).of("slower")
    assert change.ratio == pytest.approx(1.5 / 1.05) and change.low < 1.4 / 1.1 < 1.6 < change.high
    for name, reports in (("before", side(1.0, 1.1)), ("after", side(1.5, 1.4))):
        for i, found in enumerate(reports):
            found.write(tmp_path / name / f"{i}.json")
    with pytest.raises(SystemExit):
        bench_main.main(["compare", str(tmp_path / "before"), str(tmp_path / "after")])
    assert "one run of a side" not in capsys.readouterr().out


def test_change_must_exceed_that_of_the_control():
    assert not _twenty([1.0] * 19 + [1.4], [1.5] + [1.0] * 19).of("slower")
    assert len(_twenty([1.0] * 19 + [1.6], [1.5] + [1.0] * 19).of("slower")) == 1


def test_one_time_says_nothing():
    for n, verdict in ((1, "unclear"), (8, "slower")):
        rows = [Row("quality", {}, "ours", "wall", (seconds,) * n) for seconds in (1.0, 1.5)]
        assert comparison._change(rows[:1], rows[1:], [], [], 0.05).verdict == verdict


def test_median_interval_covers_99_percent():
    generator = torch.Generator().manual_seed(0)
    hits, draws = 0, 2000
    for _ in range(draws):
        low, high = comparison.median_interval(torch.randn(30, generator=generator).tolist())
        hits += low <= 0.0 <= high
    assert 0.985 < hits / draws < 1.0
    assert comparison.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_fatter_and_lost_rows():
    a = make_report(make_row(peak_mib=100.0), make_row("compile", peak_mib=100.0), make_row("liger"), make_row("fla"))
    b = make_report(
        make_row(peak_mib=102.5), make_row("compile", peak_mib=100.4), make_row("flex"),
        Row("kernels", {k: v for k, v in PARAMS.items() if k != "mode"}, "liger", error="not timed: red"),
    )  # fmt: skip
    result = comparison.compare([a], [b])
    assert [change.row.provider for change in result.fatter] == ["eager"] and result.regressed
    assert [(row.provider, error) for row, error in result.lost] == [("liger", "not timed: red")]
    assert (result.only_a, result.only_b) == (1, 1)
    text = comparison.text([a], [b], result, threshold=0.05)
    assert "100.0 -> 102.5 MiB" in text and "not timed: red" in text
    only = comparison.compare([a], [b], providers=["compile"])
    assert len(only.changes) == 1 and not only.regressed


@pytest.mark.parametrize("factor, code", [(1.0, None), (1.4, 1), (0.6, None)])
def test_exit_code_of_compare(factor, code, tmp_path, capsys):
    paths = []
    for f in (1.0, factor):
        paths.append(str(tmp_path / f"{len(paths)}.json"))
        make_report(
            make_row(seconds=_scaled(f)), make_row(op="layer_norm", seconds=_scaled(1)), make_row(CONTROL, STEADY)
        ).write(Path(paths[-1]))
    try:
        bench_main.main(["compare", *paths])
        got = None
    except SystemExit as stop:
        got = stop.code
    out = capsys.readouterr().out
    assert got == code
    assert ("slower by more than 5%: 1\n  kernels bias_gelu" in out) == (factor > 1)
    assert ("faster by more than 5%: 1\n  kernels bias_gelu" in out) == (factor < 1)
    assert "1.400 x (" in out if factor > 1 else True


def test_two_devices_are_compared_on_request_only():
    a, b = make_report(make_row(), device="A"), make_report(make_row(), device="B")
    with pytest.raises(UserError, match=r"different devices: A, .*; B, .*\n.*--across-devices"):
        comparison.compare([a], [b])
    assert len(comparison.compare([a], [b], across_devices=True).changes) == 1
    with pytest.raises(UserError, match="no measurement in common"):
        comparison.compare([make_report(make_row())], [make_report(make_row(op="layer_norm"))])


# ---- refusals


def test_reported_command_has_no_local_paths():
    typed = ["train", "--nanogpt", "/home/someone/nanoGPT", "--batch", "4", "--out", "/home/someone/t.json"]
    assert command.typed(typed) == "python -m bench train --nanogpt nanoGPT --batch 4"


@pytest.mark.parametrize(
    "argv, words",
    [
        (["kernels", "--op", "nothing"], "there is no kernel 'nothing': choose from"),
        (["kernels", "--provider", "cuda"], "there is no provider 'cuda': choose from"),
        (["kernels", "--seconds", "0"], "--seconds must be above 0"),
        (["kernels", "--dtype", "int8"], "int8"),
        (["train", "--preset", "gpt7"], "there is no preset 'gpt7'"),
        (["train", "--context", "5000"], "--context must lie in 1 to 1024"),
        (["train", "--batch", "0"], "--batch must be at least 1"),
        (["train", "--vocab-size", "0"], "vocab_size must be a whole number of at least 1"),
        (["train", "--provider", "jax"], "there is no provider 'jax'"),
        (["train", "--nanogpt", "."], "it has no model.py"),
        (["generate", "--prompt", "1000", "--tokens", "500"], "1500 together, and the preset gpt2 has 1024"),
        (["generate", "--provider", "vllm"], "there is no provider 'vllm'"),
        (["memory", "--preset", "gpt7"], "there is no preset 'gpt7'"),
        (["static", "--arch", "11"], "--arch 11 is not known"),
        (["report"], "name at least one report"),
        (["report", "none.json"], "no such file or folder: none.json"),
        (["compare", "none.json", "none.json"], "no such file or folder: none.json"),
        (["report", "empty"], "there is no report in empty"),
        (["kernels", "--out", "taken.json"], "taken.json exists: name another file"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_arguments(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("taken.json").write_text("{}")
    assert words in refusal(argv, capsys)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_gpu_command_without_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    err = refusal(["gpu"], capsys)
    assert "needs an NVIDIA GPU" in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
