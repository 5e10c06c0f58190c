"""Somebody else's kernel, from a file: the page's template is proven; what deceives or does not fit is refused."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import exit_code

from bench import kernels as bench_kernels
from bench import roofline, timing, watch
from bench.__main__ import Command
from bench.record import Report
from kernels import KernelSpec, _proof, bias_gelu
from kernels import __main__ as command
from kernels._compile import launches
from kernels._foreign import judges, replaced
from kernels._registry import load_spec
from kernels._triton import HAS_TRITON, INTERPRET
from model.cli import UserError

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "kernels" / "YOUR_KERNEL.md").read_text()
TEMPLATE = re.search(r"<!-- template -->\n```python\n(.*?)```\n<!-- /template -->", PAGE, re.DOTALL)[1]
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRET, reason="needs Triton's interpreter")


@pytest.fixture
def file(tmp_path):
    """Writes the template with some of its text changed."""

    def write(*changes, text=TEMPLATE):
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "my_kernel.py"
        path.write_text(text)
        return path

    yield write
    sys.modules.pop("_kernel_file_my_kernel", None)


def _check(path, capsys, *options):
    code = command.main(["check", str(path), "--quick", "--dtype", "float32", *options])
    return code, *capsys.readouterr()


# --- right and wrong -------------------------------------------------------------------------------------------------


@interpreted
def test_template_is_proven(file, capsys):
    assert len(TEMPLATE.splitlines()) < 60
    assert command.main(["check", str(file())]) == 0
    out = capsys.readouterr().out
    assert "launches forward_kernel, backward_kernel\n" in out and "all within the rule" in out
    rows = [
        line.split() for line in out.splitlines() if line.startswith("squared_relu float") or "squared_relu  " in line
    ]
    assert [row[1] for row in rows] == ["float32", "float16"]


@interpreted
@pytest.mark.parametrize(
    "change, found",
    [
        (("dx = 2.0 * r", "dx = r"), "dx is off by"),
        (("(r * r).to(y_ptr.dtype.element_ty), mask=n < N)", "(r * r).to(y_ptr.dtype.element_ty), mask=n < N - 1)"),
         "y is off by"),
        (("x = x.contiguous()\n", "pass\n"), "layouts"),
    ],
)  # fmt: skip
def test_wrong_kernel_is_found(change, found, file, capsys):
    code, out, _ = _check(file(change), capsys)
    assert code == 1 and "FAILED squared_relu float32" in out and found in out


@pytest.mark.slow  # for three architectures
def test_template_is_compiled_without_a_gpu(file):
    """In a process of its own: what is compiled cannot be interpreted."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    argv = ["-m", "bench", "static", str(file()), "--arch", "90", "--dtype", "float16", "--bench-only"]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "2 compiled kernels, 0 with a problem" in done.stdout, done.stdout + done.stderr


@interpreted
def test_launches_of_every_configuration_are_recorded(file):
    """Those under @triton.autotune, by kernel[grid](...) with a grid that is computed from the options."""
    tuned = "@triton.autotune([triton.Config({'BLOCK': b}) for b in (256, 512)], key=[])\n@triton.jit\ndef forward"
    path = file(
        ("@triton.jit\ndef forward", tuned),
        ("(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)",
         "lambda meta: (triton.cdiv(meta['N'], meta['BLOCK']),)](x, y, N=x.numel())"),
    )  # fmt: skip
    spec = load_spec(path)
    recorded = launches(spec, spec.cases[1:], torch.float32, 90)
    forward = [launch for launch in recorded if "forward" in launch.kernel.__name__]
    assert [launch.grid for launch in forward] == [(24,), (12,), (24,), (12,)]
    assert {launch.meta["BLOCK"] for launch in forward} == {256, 512}


# --- files that do not fit -------------------------------------------------------------------------------------------

BAD = {
    "no such file": (None, "there is no such file"),
    "syntax": ("def f(:\n", "line 1 of"),
    "raises": ("import torch\n\nx = 1 / 0\n", "line 3: ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(0)\n", "line 1: SystemExit: 0"),
    "no spec": ("x = 1\n", "it declares no KernelSpec"),
    "two specs": (TEMPLATE + "\nimport dataclasses\nMORE = dataclasses.replace(SPEC, name='more')\n",
                  "it declares 2 kernels, squared_relu, more: one is wanted"),
    "missing field": (TEMPLATE.replace('    grads=("x",),\n', ""), "missing 1 required positional argument: 'grads'"),
    "field of another kind": (TEMPLATE.replace('grads=("x",)', 'grads="x"'), "grads must be a tuple of names, got 'x'"),
    "no cases": (re.sub(r"    cases=.*\n", "    cases=(),\n", TEMPLATE), "its spec has no cases"),
    "cases of another kind": (re.sub(r"    cases=.*\n", "    cases=(5, 33),\n", TEMPLATE), "cases must be a tuple of"),
    "gradient of nothing": (TEMPLATE.replace('grads=("x",)', 'grads=("w",)'), "grads names 'w', and make_inputs"),
    "shape of the result": (TEMPLATE.replace("y = torch.empty_like(x)", "y = torch.empty_like(x)[1:]"),
                            "fn's y is torch.float32 (4, 33), and the reference's is torch.float32 (5, 33)"),
    "inputs": (TEMPLATE.replace('{"x": draw', '(0, draw').replace('case["N"])}', 'case["N"]))'),
               "make_inputs must return the arguments of fn as a dictionary"),
    "shapes": (TEMPLATE.replace("torch.relu(x) ** 2", "torch.relu(x) @ x"), "eager fails on the first case, {'M': 5"),
    "outputs": (TEMPLATE.replace('    grads=("x",)', '    outputs=("y", "z"),\n    grads=("x",)'),
                "squared_relu returns 1 outputs, its spec names 2"),
    "case without a size": (TEMPLATE.replace('{"M": 5, "N": 33}', '{"M": 5}'), "make_inputs fails on the first case"),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", BAD)
def test_file_that_does_not_fit_gives_two_lines(name, file, tmp_path, capsys):
    text, message = BAD[name]
    path = tmp_path / "absent.py" if text is None else file(text=text)
    code, out, err = _check(path, capsys)
    assert code == 2 and out == ""
    assert err.startswith(f"error: {path}: ") and message in err and err.count("\n") <= 2
    if name in ("no spec", "syntax", "shapes"):
        for what in ("kernels", "static"):
            assert exit_code(lambda chosen: chosen.main(), Command, what, path) == 2
            assert message in capsys.readouterr().err


# --- tricks ----------------------------------------------------------------------------------------------------------

RETURN = "    return SquaredReLU.apply(x)\n"
REFUSED_BEFORE = {
    "PyTorch does the work": ((RETURN, "    return torch.relu(x) ** 2\n"), "fn launches no Triton kernel"),
    "the kernel's result is thrown away": ((RETURN, "    SquaredReLU.apply(x)\n    return torch.relu(x) ** 2\n"),
                                           "the same result without its kernels"),
    "no reference": (("    eager=lambda x: torch.relu(x) ** 2,\n", ""), "the reference launches forward_kernel"),
    "a lazy result": ((RETURN, "    return SquaredReLU.apply(x).as_subclass(type('Lazy', (torch.Tensor,), {}))\n"),
                      "y is a Lazy: an output must be a plain torch.Tensor"),
}  # fmt: skip
TWICE = "        SEEN.add(len(SEEN))\n        if len(SEEN) < 3:\n"  # long enough for what comes before the check
REFUSED = {
    "a cache of results": (
        (RETURN, "    key = x.data_ptr(), x._version\n    if key not in CACHE:\n"
                 "        CACHE[key] = SquaredReLU.apply(x)\n    return CACHE[key]\n"),
        "y is in the memory of the result of the call before: an output must be new memory"),
    "results kept by address": (
        ("        forward_kernel[", "        y = CACHE.setdefault(x.data_ptr(), y)\n        if x.data_ptr() in SEEN:\n"
         "            return y.clone()\n        SEEN.add(x.data_ptr())\n        forward_kernel["),
        "y of other numbers in the same memory is off by"),
    "the input's memory": (("y = torch.empty_like(x)", "y = x.detach()"), "y is in the memory of an input"),
    "memory that nobody wrote": (("        forward_kernel[", f"{TWICE}            forward_kernel["),
                                 "memory M=5 N=33: y is off by nan"),
    "the same by new_empty": (
        ("        forward_kernel[", f"        y = x.new_empty(x.shape)\n{TWICE}            forward_kernel["),
        "memory M=5 N=33: y is off by nan"),
    "the oracle's result": (
        ("        forward_kernel[", "        import gc\n        for t in gc.get_objects():\n            if type(t) is "
         "torch.Tensor and t.dtype == torch.float64 and t.shape == x.shape:\n                return t.to(x.dtype)\n"
         f"{TWICE}            forward_kernel["),
        "y is off by"),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", REFUSED_BEFORE)
def test_trick_is_refused_before_the_check(name, file, capsys):
    change, message = REFUSED_BEFORE[name]
    code, out, err = _check(file(change), capsys)
    assert code == 2 and message in err and err.count("\n") <= 2 and out == ""


@interpreted
@pytest.mark.parametrize("name", REFUSED)
def test_trick_turns_the_check_red(name, file, capsys):
    change, message = REFUSED[name]
    text = TEMPLATE.replace("\n\n@triton.jit\ndef forward", "\n\nCACHE, SEEN = {}, set()\n\n\n@triton.jit\ndef forward")
    if "cache" in name:  # of a forward pass: its graph belongs to one call
        text = text.replace('grads=("x",)', "grads=()")
    code, out, _ = _check(file(change, text=text), capsys)
    assert code == 1 and message in out, out


@interpreted
@pytest.mark.parametrize("what", ["time.perf_counter", "kernels._proof.budget", "torch.Tensor.double"])
def test_replaced_judge_is_named(what, file, capsys, monkeypatch):
    owner, name = what.rsplit(".", 1)
    path = file(
        (RETURN, f"    import time, kernels._proof\n    {what} = {what}.__get__ if False else HONEST\n{RETURN}")
    )
    target = {"time": sys.modules["time"], "kernels._proof": _proof, "torch.Tensor": torch.Tensor}[owner]
    monkeypatch.setattr(target, name, getattr(target, name))  # is put back
    honest = getattr(target, name)
    path.write_text(path.read_text() + "\n\ndef HONEST(*args, **options):\n    return ORIGINAL(*args, **options)\n"
                    f"\n\nimport time, kernels._proof\nORIGINAL = {what}\n")  # fmt: skip
    code, _, err = _check(path, capsys)
    assert code == 2 and f"my_kernel.py replaces {what.removeprefix('torch.')}, on which the check relies" in err
    assert getattr(target, name) is not honest


# --- tricks while the clock runs -------------------------------------------------------------------------------------


def _spec(**fields):
    return KernelSpec(
        "double", lambda x: 2 * x, lambda case, draw: {"x": draw.normal(case["M"], 64)}, ("x",), ({"M": 64},),
        eager=lambda x: 2 * x, **fields,
    )  # fmt: skip


def _timed(fn, mode="forward", floor=0.0):
    spec = _spec()
    inputs = spec.inputs(spec.cases[0], torch.float32, CPU)
    maker = lambda: bench_kernels.make_call(spec, inputs, fn, mode, watched=True)  # noqa: E731
    measured = timing.measure({"triton": maker}, CPU, "wall", seconds=1e-4)
    watch.refuse_impossible(measured, floor, mode)
    return measured.failed.get("triton", "")


def _cached(copy):
    kept = {}

    def fn(x):
        if x.data_ptr() not in kept:
            kept[x.data_ptr()] = 2 * x
        return copy(kept[x.data_ptr()])

    return fn


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_honest_kernel_is_timed(mode):
    assert _timed(lambda x: 2 * x, mode) == ""


def test_deceptive_timed_calls_are_refused():
    assert "y is in the memory of the result of the call before" in _timed(_cached(lambda y: y))
    assert _timed(_cached(torch.clone)).startswith("what was timed is wrong: y is off by")
    assert "y is in the memory of an input" in _timed(lambda x: x.mul_(2))
    calls = iter(range(10**6))  # right at first, and nothing is done once it is timed
    assert _timed(lambda x: 2 * x if next(calls) < 3 else torch.zeros_like(x)).startswith("what was timed is wrong")
    assert _timed(lambda x: 2 * x, floor=3600.0).startswith("not believed: ")
    assert _timed(lambda x: 2 * x, "backward", floor=3600.0) == ""  # the forward pass may have done the work


def test_wrong_gradient_that_was_timed_is_refused():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            return 2.1 * dy

    for mode in ("backward", "both"):
        assert _timed(Wrong.apply, mode).startswith("what was timed is wrong: dx is off by")


ROOFS = roofline.Roofs({2**10: 1e-9}, {})


def test_own_kernel_is_in_the_report(file):
    timed = bench_kernels.Kernels(file=file(), provider=("eager",), mode=("forward",), seconds=1e-4)
    report = Report.start(CPU)
    rows = [row for rows in timed.run(CPU, report, ROOFS, part=slice(1)) for row in rows if row.provider == "eager"]
    assert [row.params["op"] for row in rows] == ["squared_relu"] and rows[0].seconds and rows[0].metrics["bytes"] > 0


def test_clock_that_was_replaced_is_named(file, monkeypatch):
    def run(self, *args, **options):
        monkeypatch.setattr(timing, "control", lambda device: None)
        yield []

    monkeypatch.setattr(roofline, "measure", lambda *args: ROOFS)
    monkeypatch.setattr(bench_kernels.Kernels, "run", run)
    with pytest.raises(UserError, match=r"my_kernel\.py replaces bench\.timing\.control, on which its timing relies"):
        list(bench_kernels.Kernels(file=file()).groups(CPU, Report.start(CPU)))


def test_what_torch_compile_puts_into_a_module_and_removes_is_no_replacement():
    torch.compile(bias_gelu, backend="eager")(torch.ones(2, 3))
    assert any(name.startswith("__compiled_fn") for name in vars(sys.modules["kernels.gelu"]))
    before = judges("kernels")
    torch.compiler.reset()
    assert replaced(before) is None


def test_bytes_are_those_of_the_tensors_where_the_spec_is_silent():
    spec = _spec()
    inputs = spec.inputs({"M": 2}, torch.float16, CPU)
    assert watch.bytes_moved(spec, {"M": 2}, inputs) == (2 * 2 * 64 * 2, 3 * 2 * 64 * 2)
    assert watch.bytes_moved(_spec(bytes_moved=lambda case, dtype: (case["M"], 7)), {"M": 2}, inputs) == (2, 7)
