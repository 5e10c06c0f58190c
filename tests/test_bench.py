"""The benchmarks' own logic: turns and percentiles, reports, and refusals."""

import json

import pytest
import torch

from bench import __main__ as command
from bench import kernels as kernel_bench
from bench import report, timing, train_step
from kernels import _proof
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON


def test_calls_take_turns_and_report_percentiles(monkeypatch):
    order = []

    class Clock:
        def time_ms(self, call):
            call()
            return float(len(order))

    monkeypatch.setattr(timing, "_WallClock", Clock)
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    result = timing.measure(calls, torch.device("cpu"), seconds=0.0, warm_up=0)
    assert "".join(order) == "ab" * 5
    assert result["a"] == timing.Timing(p20_ms=pytest.approx(2.6), p50_ms=5.0, p80_ms=pytest.approx(7.4), runs=5)


def test_a_report_replaces_the_one_before_whole(tmp_path):
    path = tmp_path / "new" / "train.json"
    for n in (1, 2):
        report.write(path, "train", torch.device("cpu"), [{"n": n}])
    written = json.loads(path.read_text())
    assert written["schema"] == report.SCHEMA and written["rows"] == [{"n": 2}]
    assert written["environment"]["torch"] == torch.__version__
    assert [p.name for p in path.parent.iterdir()] == ["train.json"]


def test_a_training_step_is_timed():
    rows = list(train_step.run(torch.device("cpu"), "tiny", [1], 8, torch.float32, seconds=0.01))
    assert [row.provider for row in rows] == ["eager", "compile"]
    assert rows[0].error == "" and rows[0].tokens_per_s == pytest.approx(8 / rows[0].timing.p50_ms * 1e3)
    json.dumps([row.as_dict() for row in rows])


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
def test_a_case_is_timed_for_every_provider_and_a_failure_is_a_row(device, monkeypatch):
    def no_compiler(fn, **options):
        def fail(**inputs):
            raise RuntimeError("no compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    spec, case = all_specs()["causal_attention"], {"B": 1, "H": 2, "T": 16, "D": 8}
    rows = list(kernel_bench._run_case(spec, case, torch.float32, device, seconds=0.0))
    timed = {(row.mode, row.provider) for row in rows if not row.error}
    assert {(mode, name) for mode in ("forward", "forward+backward") for name in ("triton", "eager")} <= timed
    errors = {row.provider: row.error for row in rows if row.error}
    assert errors["compile"] == "RuntimeError: no compiler"
    row = next(row for row in rows if (row.mode, row.provider) == ("forward", "triton"))
    assert row.gb_per_s == pytest.approx(4 * 16 * 16 * 4 / row.timing.p50_ms / 1e6)
    assert row.tflop_per_s == pytest.approx(2 * 2 * 16 * 16 * 8 / row.timing.p50_ms / 1e9)
    assert "no compiler" in report.kernel_line(rows[-1]) or "TFLOP/s" in report.kernel_line(row)
    json.dumps([row.as_dict() for row in rows])


def test_a_wrong_kernel_is_not_timed(device, monkeypatch):
    spec = all_specs()["bias_gelu"]
    monkeypatch.setattr(kernel_bench, "all_specs", lambda: {"bias_gelu": spec})
    failing = _proof.Row("bias_gelu", spec.cases[0], torch.float32, "y", 1.0, 0.5)
    monkeypatch.setattr(kernel_bench._proof, "prove", lambda *a, **k: iter([failing]))
    (row,) = kernel_bench.run(device, [torch.float32], None)
    assert row.error.startswith("not timed: 6 comparisons") and row.timing.runs == 0


@pytest.mark.parametrize(
    "argv, words",
    [
        (["kernels", "--op", "nothing"], "there is no kernel 'nothing': choose from"),
        (["train", "--preset", "gpt7"], "there is no preset 'gpt7'"),
        (["train", "--context", "5000"], "--context from 1 to 1024"),
        (["static", "--arch", "11"], "--arch 11 is not known"),
        (["nonsense"], "nonsense"),
    ],
)
def test_bad_arguments(argv, words, capsys, monkeypatch):
    monkeypatch.setattr(command, "_gpu", lambda what: torch.device("cpu"))
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and words in err and err.count("\n") <= 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
@pytest.mark.parametrize("name", ["gpu", "kernels"])
def test_without_a_gpu_one_line_says_so(name, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([name])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "needs an NVIDIA GPU" in err and err.count("\n") == 1
