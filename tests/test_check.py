"""`python -m kernels` and `python -m kernels check`, the tolerance rule itself, and life without Triton."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import __main__ as command
from kernels import _check, _proof, use_backend
from kernels._backend import current_backend
from kernels._registry import KernelSpec, all_specs, register

ROOT = Path(__file__).parent.parent


def _scale_spec(factor: float) -> KernelSpec:
    """A kernel `y = 2x` that is off by a factor on the Triton path."""

    def fn(x):
        return x * (2.0 * factor if current_backend() == "triton" else 2.0)

    def make_inputs(case, draw):
        return {"x": draw.normal(case["M"])}

    return KernelSpec("scale", fn, make_inputs, ("x",), ({"M": 64},), (), lambda case, dtype: (0, 0))


@pytest.fixture
def specs(monkeypatch):
    """The registry in place of which the check sees this dictionary."""
    mine = {}
    for module in (_check, command):
        monkeypatch.setattr(module, "all_specs", lambda: mine)
    monkeypatch.setattr(command, "device_problem", lambda *args: None)
    return mine


@pytest.mark.parametrize("factor, code", [(1.0, 0), (1.001, 1), (float("nan"), 1)])
def test_check_finds_a_wrong_kernel(factor, code, specs, capsys, tmp_path):
    specs["scale"] = _scale_spec(factor)
    path = tmp_path / "check.json"
    assert command.main(["check", "--json", str(path)]) == code
    out, written = capsys.readouterr().out, json.loads(path.read_text())
    assert ("FAILED scale float32 shapes M=64: y is off by" in out) == bool(code)
    assert ("all within the rule" in out) == (not code) == written["passed"]
    assert {row["family"] for row in written["rows"]} == set(_proof.FAMILIES)
    assert written["verdict"] == out.splitlines()[-1] and bool(written["failures"]) == bool(code)


def test_quick_takes_the_first_case(specs):
    specs["scale"] = dataclasses.replace(_scale_spec(1.0), cases=({"M": 64}, {"M": 3}))
    whole = _check.check(["scale"], [torch.float32], torch.device("cpu"))
    quick = _check.check(["scale"], [torch.float32], torch.device("cpu"), quick=True)
    assert {row.case["M"] for row in whole.comparisons} == {64, 3}
    assert {row.case["M"] for row in quick.comparisons} == {64}


def test_check_out_of_time_reaches_every_kernel_first(specs):
    specs["scale"], specs["wrong"] = _scale_spec(1.0), dataclasses.replace(_scale_spec(1.001), name="wrong")
    asked = iter([False, False, True])
    result = _check.check(["scale", "wrong"], [torch.float32], torch.device("cpu"), out_of_time=lambda: next(asked))
    assert {row.kernel for row in result.comparisons} == {"scale", "wrong"}
    assert result.failed == {("wrong", torch.float32)}
    assert result.skipped == 2 * len(_proof.FAMILIES) - 2 == result.as_dict()["left_out"]
    assert f"no time for {result.skipped} cases" in result.line() and "FAILED" in result.line()


@pytest.mark.parametrize("cases", [(), None])
def test_check_that_compares_nothing_is_an_error(cases, specs, capsys):
    """No kernel, or none that has a case, proves nothing."""
    if cases is not None:
        specs["scale"] = dataclasses.replace(_scale_spec(1.0), cases=cases)
    assert command.main(["check", "--quick"]) == 2
    assert capsys.readouterr().err == "error: nothing was compared, so nothing is proven: no kernel has a case\n"
    specs["scale"] = _scale_spec(1.0)
    with pytest.raises(_check.NothingCompared, match="no time for a case"):
        _check.check(["scale"], [torch.float32], torch.device("cpu"), out_of_time=lambda: True)


def test_check_reports_a_raising_kernel_and_continues(specs, capsys):
    def broken(x):
        raise RuntimeError("no such register")

    specs["bad"], specs["scale"] = dataclasses.replace(_scale_spec(1.0), name="bad", fn=broken), _scale_spec(1.0)
    assert command.main(["check", "--quick", "--dtype", "float32"]) == 1
    out = capsys.readouterr().out
    assert "FAILED bad float32 shapes M=64: RuntimeError: no such register" in out
    assert "\nscale " in out


def test_unwritable_report_is_an_error(specs, capsys, tmp_path):
    specs["scale"] = _scale_spec(1.0)
    assert command.main(["check", "--json", str(tmp_path / "no" / "check.json")]) == 2
    assert capsys.readouterr().err.startswith("error: cannot write ")


def test_tolerance_rule():
    truth = torch.tensor([1.0, -3.0], dtype=torch.float64)
    eager = torch.tensor([1.0, -3.0 + 2**-20])
    # twice eager's error of 2^-20, and two ulps of 3, which lies in [2, 4): 2^-22 each
    assert _proof.budget(truth, eager, 2.0) == pytest.approx(2 * 2**-20 + 2 * 2**-22)
    assert _proof.budget(truth.new_empty(0), eager.new_empty(0), 2.0) == 0.0
    got = torch.tensor([1.0, -3.0 + 2**-18])
    assert not _proof.compare("op", {}, "y", got, eager, truth, gradient=False).passed
    with pytest.raises(ValueError, match="eager gives"):
        _proof.compare("op", {}, "y", got.half(), eager, truth, gradient=False)


@pytest.mark.parametrize("argv", [[], ["info"]])
def test_command_describes_this_machine(argv, capsys):
    assert command.main(argv) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "backend auto picks: " in out and all(name in out for name in all_specs())


@pytest.mark.parametrize("argv", [["check", "--op", "nothing"], ["prove"], ["check", "--dtype", "int8"]])
def test_bad_arguments_give_one_line(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_duplicate_kernel_name_is_refused():
    all_specs()
    with pytest.raises(ValueError, match="'layer_norm' is registered already"):
        register(all_specs()["layer_norm"])


def _python(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **env}, cwd=ROOT, timeout=120
    )


NO_TRITON = """
import sys
sys.modules["triton"] = None  # import triton raises ImportError
import torch, kernels
from kernels.__main__ import main
x, w = torch.randn(3, 4), torch.ones(4)
assert torch.equal(kernels.layer_norm(x, w), torch.nn.functional.layer_norm(x, (4,), w))
assert kernels.causal_attention(torch.randn(1, 3, 12), 2).shape == (1, 3, 4)
assert kernels.bias_gelu(x, w).shape == x.shape
kernels.linear_cross_entropy(x.requires_grad_(), torch.randn(5, 4), torch.tensor([0, 1, 4])).backward()
try:
    with kernels.use_backend("triton"):
        kernels.layer_norm(x, w)
except RuntimeError as error:
    assert "triton is not installed" in str(error), error
else:
    raise AssertionError("triton ran without triton")
assert main([]) == 0
sys.exit(main(["check"]))
"""


def test_eager_paths_work_without_triton():
    done = _python(NO_TRITON)
    assert done.returncode == 2, done.stderr
    assert "no triton" in done.stdout
    assert done.stderr == "error: the kernels cannot run here: triton is not installed (it is published for Linux)\n"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_triton_on_cpu_needs_the_interpreter():
    done = _python(
        "import torch, kernels\n"
        "try:\n"
        "    with kernels.use_backend('triton'): kernels.layer_norm(torch.ones(2, 3), torch.ones(3))\n"
        "except RuntimeError as error: print(error)"
    )
    assert done.stdout.startswith("layer_norm: backend 'triton' was asked for, but the input is on cpu"), done


def test_backend_is_restored_after_an_error():
    with pytest.raises(KeyError), use_backend("eager"):
        raise KeyError
    assert current_backend() == "auto"
