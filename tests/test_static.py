"""Kernels compiled for GPUs that are not here: what is asked of the compiler, its answers, and what is a problem."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import static
from kernels._compile import launches, unknown_to_ptxas
from kernels._launch import Launch
from kernels._machine_code import _aligned, _blocks_per_sm, _wanted
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON

ROOT = Path(__file__).parent.parent
LOOPS = Path(__file__).with_name("loops.json")
pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")


def _compiled(*argv):
    """Runs Python where kernels are compiled and not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True)


def _survey(folder, *options):
    """The rows, of compiled kernels with what is wrong with them."""
    done = _compiled("-m", "bench", "static", *options, "--out", str(folder / "static.json"))
    assert done.returncode in (0, 1), done.stdout + done.stderr
    rows = json.loads((folder / "static.json").read_text())["rows"]
    assert rows and done.returncode == any(row["problem"] for row in rows), done.stdout + done.stderr
    return rows


def _problems(rows):
    return [(row["kernel"], row["arch"], row["config"], row["problem"]) for row in rows if row["problem"]]


@pytest.fixture(scope="module")
def surveyed(tmp_path_factory):
    """Those of the benchmarks' shapes, which take a minute to compile."""
    folder = tmp_path_factory.mktemp("survey")
    return _survey(folder, "--arch", "80", "90", "100", "--dtype", "bfloat16", "--bench-only")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_launches_have_no_problem_on_any_architecture(surveyed):
    assert not _problems(surveyed)
    assert {row["arch"] for row in surveyed} == {80, 90, 100}
    for row in surveyed:
        assert 0 < row["registers"] <= 255 and row["instructions"] > 0 and row["blocks_per_sm"] > 0
    kinds = {(row["kernel"], row["arch"]): row["tensor_kind"] for row in surveyed}
    for name in ("attention_fwd", "attention_dkv", "attention_dq"):
        assert kinds[name, 80] == "HMMA" and kinds[name, 90] == "HGMMA" and kinds[name, 100].startswith("UTC")
    # two blocks take turns on a multiprocessor: one's softmax runs beside the other's products
    hopper = [row for row in surveyed if row["arch"] == 90 and row["tensor_kind"]]
    assert all(row["blocks_per_sm"] >= 2 for row in hopper)


MARGIN = 0.03  # by which a loop may get longer or shorter before a change has to say so


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inner_loops_are_as_long_as_recorded(surveyed):
    """Of the benchmarks' shapes on sm_90. RECORD=1 records new ones, after a look at them."""
    now: dict[str, list] = {}
    for row in (
        row for row in surveyed if row["arch"] == 90
    ):  # one configuration may be compiled for several kinds of strides
        now.setdefault(f"{row['kernel']} {row['config']}", []).append([loop["n"] for loop in row["loops"]])
    now = {name: sorted(lengths) for name, lengths in now.items()}
    if os.environ.get("RECORD"):
        LOOPS.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    recorded = json.loads(LOOPS.read_text())
    assert now.keys() == recorded.keys()
    for name, lengths in now.items():
        assert [len(n) for n in lengths] == [len(n) for n in recorded[name]], name
        for n, before in zip(itertools.chain(*lengths), itertools.chain(*recorded[name]), strict=True):
            assert abs(n - before) <= MARGIN * before, f"{name}: a loop of {before} instructions has {n}"


AHEAD = """
import sys, torch
from kernels import _compile, _proof
from kernels._compile import check_launches, launches, source
from kernels._launch import record_launches
from kernels._registry import all_specs

def code(recorded):
    return {source(launch, 90)[0].hash() + str(source(launch, 90)[1]) for launch in recorded}

for name in sys.argv[1:]:
    spec = all_specs()[name]
    for case in spec.cases:
        ahead = code(check_launches(spec, case, torch.bfloat16, 90, 132))
        with record_launches(90, 132) as recorded:
            for family in _proof.FAMILIES:
                list(_proof.prove_family(family, spec, case, torch.bfloat16, torch.device("cpu")))
        made = code(recorded)
        assert made <= ahead, f"{name} {case}: {len(made - ahead)} of {len(made)} launches are not compiled ahead"
        print(name, len(made))
    few = [code(launches(spec, [case], torch.bfloat16, 90, 132)) for case in spec.bench_cases]
    _compile._MOST_ROWS = {"B": 32, "M": 96, "T": 512}
    more = [code(launches(spec, [case], torch.bfloat16, 90, 132)) for case in spec.bench_cases]
    _compile._MOST_ROWS = {"B": 16, "M": 48, "T": 256}
    assert few == more, f"{name}: a benchmark of more rows launches other code"
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_the_check_launches_is_compiled_ahead():
    """And what a benchmark launches is what a few of its rows launch."""
    done = _compiled("-c", AHEAD, *all_specs())
    assert done.returncode == 0, done.stderr
    printed = [line.split()[0] for line in done.stdout.splitlines()]
    assert printed == [name for name, spec in all_specs().items() for _ in spec.cases]


SPILLS = pytest.mark.xfail(strict=True, reason="needs attention tiles that do not spill on sm_86: now 8 to 32 bytes")


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("arch", ["80", pytest.param("86", marks=SPILLS), "90", "100", "120"])
def test_no_launch_has_a_problem(arch, tmp_path):
    assert not _problems(_survey(tmp_path, "--arch", arch))


def test_every_kernel_is_seen_by_the_survey():
    """Every pass of every kernel is written down without being run."""
    for spec in all_specs().values():
        names = {launch.kernel.__name__ for launch in launches(spec, spec.bench_cases[:1], torch.bfloat16, 90)}
        assert len(names) >= 1 + bool(spec.grads)


# Triton's own way from a launch to a compiled file, up to the hash that names the file, on a stand-in for a GPU.
SAME_FILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton import knobs
from triton.runtime import driver
from kernels import no_compilation
from kernels._compile import launches, source
from kernels._launch import Launch
from kernels._registry import all_specs

class Claimed:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)

driver.set_active(Claimed())
for spec in all_specs().values():
    for launch in launches(spec, spec.bench_cases[:1] + spec.cases[:3], torch.float16, 90):
        kernel, meta = launch.kernel, launch.meta | {"debug": False, "instrumentation_mode": ""}
        *_, backend, binder = kernel.device_caches[0]
        options, *rest = kernel._pack_args(backend, meta, *binder(*launch.args, **meta))
        src, ours = source(launch, 90)
        assert ASTSource(kernel, *rest).hash() == src.hash(), (kernel.__name__, rest, src.signature, src.attrs)
        assert options.hash() == backend.parse_options(ours).hash(), kernel.__name__
        with no_compilation():
            try:
                kernel[launch.grid](*launch.args, **launch.meta)
            except RuntimeError as error:
                assert kernel.__name__ in str(error) and "cannot be captured" in str(error), error
            else:
                raise AssertionError(f"{kernel.__name__} was compiled")
assert knobs.runtime.jit_cache_hook is None
print("same")
"""


@pytest.mark.slow
def test_compiled_source_is_what_a_launch_compiles():
    """The specialisation is Triton's own: a launch on a GPU finds the file that was compiled without one.

    Where nothing may be compiled, a launch of what is not is refused.
    """
    done = _compiled("-c", SAME_FILE)
    assert done.stdout == "same\n", done.stdout + done.stderr


# The preflight with kernels that are good, too large for the GPU, not compilable, and for a GPU of the future.
PREFLIGHT = """
import dataclasses, json, sys, torch
from kernels import _compile, _registry
from kernels._launch import launch
from kernels._triton import tl, triton

@triton.jit
def _broken_kernel(x_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if BLOCK == 16:
        y = tl.inline_asm_elementwise("no_such_instruction $0, $1;", "=r,r", [offs], tl.int32, is_pure=True, pack=1)
    else:
        y = tl.no_such_function(N)
    tl.store(x_ptr + offs, y)

@torch.library.custom_op("mine::broken", mutates_args=())
def broken(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    launch(_broken_kernel, (1,), y, 48, BLOCK=x.shape[-1])
    return y

specs = _registry.all_specs()
bad = dataclasses.replace(
    specs["bias_gelu"], name="broken", fn=lambda x, **_: broken(x), grads=(), bench_cases=({"M": 48, "N": 64},)
)
_registry.register(bad)
ask = lambda name, arch=90, limit=232448, **widths: _compile.preflight(name, torch.bfloat16, widths, arch, limit, None)
with torch.inference_mode(), torch.device("meta"):
    good = [ask("layer_norm", N=768, bias=False), ask("layer_norm", N=33), ask("bias_gelu", N=3072, approximate="none")]
print(json.dumps(good + [
    ask("causal_attention", H=12, D=64, dropout_p=0.0, limit=30_000), ask("broken"), ask("broken", N=48),
    ask("broken", N=16), ask("bias_gelu", arch=130),
]))
"""


@pytest.mark.slow
def test_preflight_passes_good_kernels_and_names_faults(tmp_path):
    script = tmp_path / "preflight.py"  # a file: Triton reads the source of a kernel
    script.write_text(PREFLIGHT)
    done = _compiled(str(script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, "the compiler's own output stays out of the way"
    *good, large, absent, size, assembler, future = json.loads(done.stdout)
    assert good == [None] * 3
    assert large.startswith("attention_") and "of shared memory and the GPU gives a block 30,000" in large
    assert absent.startswith("broken does not compile for sm_90: ") and "no_such_function" in absent
    assert size.startswith("broken does not compile for sm_90: ") and "power of 2" in size
    assert assembler.startswith("broken does not compile for sm_90: ") and "no_such_instruction" in assembler
    assert "does not know sm_130" in future
    assert all(len(words) < 300 and "\n" not in words for words in (large, absent, size, assembler, future))


def test_the_assembler_knows_the_architectures_of_the_survey():
    assert not any(map(unknown_to_ptxas, static.ARCHITECTURES))


GOOD = dict(
    kernel="k", arch=90, dtype="bfloat16", config="D=64", num_warps=4, registers=100, spill=0, shared=1024,
    shared_limit=2048, instructions=900, tensor_core=8, tensor_kind="HGMMA", wanted="HGMMA", wide_loads=1, aligned=True,
    blocks_per_sm=4,
)  # fmt: skip


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"wide_loads": 0, "aligned": False}, ""),
        ({"wanted": "", "tensor_core": 0, "tensor_kind": ""}, ""),
        ({"wanted": "MMA", "tensor_kind": "HMMA"}, ""),
        ({"spill": 16}, "spills 16 bytes"),
        ({"shared": 4096}, "needs 4096 bytes"),
        ({"tensor_core": 0, "tensor_kind": ""}, "missed the tensor cores"),
        ({"tensor_kind": "HMMA"}, "run as HMMA"),
        ({"tensor_kind": "HGMMA+HMMA"}, "run as HGMMA+HMMA"),
        ({"wide_loads": 0}, "no load is 16 bytes wide"),
        ({"error": "PTXASError: no"}, "PTXASError"),
    ],
)
def test_problem_is_named(change, words):
    row = static.StaticRow(**{**GOOD, **change})
    assert (words in row.problem) if words else row.problem == ""
    assert ("<-" in static.line(row)) == bool(words)


def test_products_are_read_from_the_program():
    line = "%s = tt.dot %q, %k, %c, inputPrecision = {} : tensor<{}x64x{}> * tensor<64x32x{}> -> tensor<{}x32xf32>"
    program = lambda m, dtype, precision="tf32": line.format(precision, m, dtype, dtype, m)  # noqa: E731
    assert _wanted(program(64, "bf16"), 90, 4) == "HGMMA"
    assert _wanted(program(32, "bf16"), 90, 4) == _wanted(program(64, "bf16"), 80, 4) == "MMA"
    assert _wanted(program(64, "f16"), 90, 2) == "MMA"
    assert _wanted(program(64, "f32"), 90, 4) == "HGMMA"
    assert _wanted(program(64, "f32", "ieee"), 90, 4) == _wanted("tt.load", 90, 4) == ""


def test_where_wide_loads_are_expected():
    kernel = SimpleNamespace(arg_names=["x_ptr", "stride_xm", "stride_xn", "N"])

    def ask(*strides, start=0):
        return _aligned(Launch(kernel, (1,), (torch.empty(64)[start:], *strides, 48)))

    assert ask(48, 1) and ask(1, 48)
    assert not ask(33, 1) and not ask(48, 2) and not ask(1, 1) and not ask(48, 32) and not ask(48, 1, start=1)
    bare = SimpleNamespace(arg_names=["x_ptr", "N"])
    assert not _aligned(Launch(bare, (1,), (torch.empty(64), 48)))
    packed = SimpleNamespace(arg_names=["x", "stride_x"])  # the strides of a tensor as one tuple
    assert _aligned(Launch(packed, (1,), ((torch.empty(64), None), (48, 1))))
    assert not _aligned(Launch(packed, (1,), ((torch.empty(64), None), (1, 1))))
    assert not _aligned(Launch(packed, (1,), ((None, torch.empty(64)[1:]), (48, 1))))
    several = SimpleNamespace(arg_names=["x", "strides"])
    assert _aligned(Launch(several, (1,), (torch.empty(64), ((48, 1), (1, 32)))))
    assert not _aligned(Launch(several, (1,), (torch.empty(64), ((48, 1), (40, 1)))))


def test_blocks_on_a_multiprocessor():
    assert _blocks_per_sm(90, registers=128, shared=65536, num_warps=8, tensor_columns=0) == 2  # registers
    assert _blocks_per_sm(90, registers=129, shared=65536, num_warps=8, tensor_columns=0) == 1
    assert _blocks_per_sm(90, registers=32, shared=73728, num_warps=4, tensor_columns=0) == 3  # shared memory
    assert _blocks_per_sm(86, registers=32, shared=0, num_warps=8, tensor_columns=0) == 6  # threads
    assert _blocks_per_sm(86, registers=16, shared=0, num_warps=1, tensor_columns=0) == 16  # blocks
    assert _blocks_per_sm(100, registers=32, shared=0, num_warps=4, tensor_columns=256) == 2  # tensor memory
