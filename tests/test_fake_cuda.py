"""What runs on a GPU only, proven on a machine without one: train.py and generation on the device of tests/fake_cuda.

It fails on what CUDA refuses in the capture of a graph (to wait for the device, to copy pageable memory, to read a
value, a shape that depends on one, another stream, code that no step before it loaded), on tensors of two devices in
one call, on a warning, and where a graph computes something else than the same steps without it.
Attention is PyTorch's unfused one here, and Triton's kernels are not run: their numbers are proven elsewhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_runs import OPTIONS
from fake_cuda import fake

from kernels._triton import HAS_TRITON

TRACE = Path(fake.__file__).with_name("trace.py")
COMPILER = os.environ.get("CXX", "g++")
pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux"),
    pytest.mark.skipif(not shutil.which(COMPILER), reason=f"needs a C++ compiler, and {COMPILER} is not installed"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fake_cuda") / "device.so"
    fake.build(path, COMPILER)
    return path


@pytest.fixture
def trace(library, tmp_path):
    """Runs code of trace.py."""

    def run(code: str) -> None:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
        argv = [sys.executable, str(TRACE), str(library), code]
        done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]

    return run


@pytest.mark.slow
def test_graphs_of_runs_and_texts(trace):
    """Every option, with others that meet it."""
    trace("""
train("--backend", "eager", "--dtype", "float16", "--optimizer", "muon", "--recompute", "--ema", "0.9")
train("--backend", "eager", "--document-mask", "--batch-size", "1", "--grad-accum", "3", "--context", "15")
train("--backend", "auto", "--recompute", "--optimizer", "muon", "--document-mask", "--spikes", "skip")
train("--backend", "auto", "--dtype", "float32", "--batch-size", "3", "--context", "15", "--ema", "0.9")
resume("--backend", "eager", "--dtype", "bfloat16", "--recompute", "--grad-accum", "2", "--ema", "0.9")
fail("--backend", "eager")
wrapped("--backend", "auto")
generate("auto", temperature=0)
generate("eager", top_p=0.9, repetition_penalty=1.2)
""")


@pytest.mark.slow
def test_tuning_captures_every_pass(trace):
    """Of every operator, as kernels/_tune.py times it; Triton's kernels compute nothing here."""
    trace("""
from kernels import _tune
from kernels._registry import all_specs
from kernels._tables import Choice

machine, captured = _tune.Machine(torch.device("cuda", 0)), 0
for name, spec in all_specs().items():
    case = spec.cases[0]
    for kind in _tune.passes(spec, spec.inputs(case, torch.bfloat16, machine.device)):
        racers = [_tune.Candidate({}), _tune.Candidate({})]
        target = _tune.Target(name, torch.bfloat16, Choice("none", {}, {}, {}), kind, racers, [case])
        _tune.race(target, machine, rounds=4)
        assert not racers[1].refused, (name, kind, racers[1].refused)
        assert [len(seconds) for c in racers for seconds in c.seconds] == [4, 4]
        captured += 1
assert captured > len(all_specs())
""")


@pytest.mark.slow
def test_set_up_of_a_gpu(trace):
    """Strictly deterministic, for else PyTorch's attention is not; and Inductor has no advice about a chosen dtype."""
    trace("""
run("--backend", "eager", steps=1)
assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch._inductor.compile_fx import _warn_tf32_disabled
_warn_tf32_disabled()
""")


@pytest.mark.slow
def test_wrong_lines_are_seen(trace):
    trace("""
def odd():
    run("--backend", "auto", "--batch-size", "1", "--context", "15")

def eager():
    train("--backend", "eager", "--recompute", "--ema", "0.9")

STEP = "model.training.step"
turns_red(
    "pageable memory", eager, "kernels.add_layer_norm", "residual_dropout_mask",
    "torch.full((), STREAM.value, device=device)", "torch.tensor(STREAM.value, device=device)",
)
turns_red(
    "what no step before it compiled", odd, STEP, "Step._static", "return self.batch[0], self.batch[1]",
    "return (idx, targets) if self.eager_steps < EAGER_STEPS else (self.batch[0], self.batch[1].clone())",
)
turns_red(
    "what no step before it compiled", lambda: run("--backend", "auto"), STEP, "Step._capture",
    "self._run(idx, targets)", "self._run(idx[..., 1:], targets[..., 1:])",
)
turns_red("reads a value", odd, STEP, "Step._run", "scaled_norm / scale", "scaled_norm / scale.item()")
turns_red(
    "pageable memory", odd, STEP, "Step._run", "scaled_norm / scale", "scaled_norm / torch.ones(()).to(scale.device)"
)
turns_red("asks for values", odd, STEP, "Step._gradients", "counts.sum()", "counts[counts > 0].sum()")
turns_red(
    "takes a tensor of the CPU", odd, STEP, "Step._run", "scaled_norm / scale", "scaled_norm / torch.ones(())"
)
turns_red(
    "computes something else", eager, STEP, "Step.__call__", "self.step.fill_(step)",
    "self.step = torch.full_like(self.step, step)",
)
turns_red(
    "AccumulateGrad", lambda: wrapped("--backend", "auto"), "train", "Trainer.__init__",
    "module = parallel.wrap(", "with torch.cuda.stream(torch.cuda.Stream()): module = parallel.wrap(",
)
""")


KERNELS = sorted({tuple(options[:4]) for options in OPTIONS})  # backend and dtype


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kernels", KERNELS, ids=lambda options: f"{options[1]}-{options[3]}")
def test_graphs_under_all_options(kernels, trace):
    trace(f"for options in OPTIONS:\n    if options[:4] == {[*kernels]}: train(*options)")
