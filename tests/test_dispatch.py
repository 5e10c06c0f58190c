"""The decision between Triton and eager, on a GPU that is only claimed: every reason, said once, and no cost twice."""

import concurrent.futures
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from kernels import _backend, _dispatch, check_backend, layer_norm, use_backend
from kernels._launch import record_launches, recording

X = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16)
H100 = SimpleNamespace(major=9, minor=0, shared_memory_per_block_optin=232448)


@pytest.fixture
def preflights(monkeypatch):
    """A machine with one H100; what the preflight is asked. `answer` is what it says."""
    asked = []

    def preflight(name, dtype, widths, arch, shared_limit, device):
        asked.append((name, dtype, widths, arch, shared_limit, device))
        return preflight.answer

    preflight.answer, preflight.asked = None, asked
    for module in (_backend, _dispatch):
        monkeypatch.setattr(module, "INTERPRET", False)
    monkeypatch.setattr(_backend, "HAS_TRITON", True)
    monkeypatch.setattr(_dispatch, "_warned", set())
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: H100)
    monkeypatch.setattr(_dispatch, "preflight", preflight)
    forget = _dispatch.kernel_problem.cache_clear
    forget()
    yield preflight
    forget()


def test_preflight_runs_once_per_widths(preflights):
    assert all(_dispatch.use_triton("op", X, N=768) for _ in range(3))
    assert preflights.asked == [("op", torch.bfloat16, {"N": 768}, 90, 232448, X.device)]
    other = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), dtype=torch.float16)
    assert _dispatch.use_triton("op", X, N=33) and _dispatch.use_triton("op", other, N=768)
    assert [(a[1], a[2]["N"], a[5].index) for a in preflights.asked[1:]] == [
        (torch.bfloat16, 33, 0), (torch.float16, 768, 1),
    ]  # fmt: skip


def test_auto_warns_once_before_running_eagerly(preflights):
    preflights.answer = "op_fwd needs 300,000 bytes"
    with pytest.warns(RuntimeWarning, match="op runs eagerly: op_fwd needs 300,000 bytes") as caught:
        assert [_dispatch.use_triton("op", X, N=768) for _ in range(3)] == [False] * 3
    assert len(caught) == 1 and len(preflights.asked) == 1


def test_triton_raises_with_the_same_reason(preflights):
    preflights.answer = "op_fwd needs 300,000 bytes"
    with use_backend("triton"), pytest.raises(RuntimeError, match="but op_fwd needs 300,000 bytes; use 'auto'"):
        _dispatch.use_triton("op", X, N=768)


@pytest.mark.parametrize(
    "x, unsupported, words",
    [
        (X, "rows are too long", "rows are too long"),
        (SimpleNamespace(**{**vars(X), "dtype": torch.float64}), None, "not torch.float64"),
    ],
)
def test_unsupported_arguments_are_not_compiled(x, unsupported, words, preflights):
    with pytest.warns(RuntimeWarning, match=words):
        assert not _dispatch.use_triton("op", x, unsupported, N=768)
    assert not preflights.asked


def test_old_gpus_are_not_compiled_for(preflights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (7, 5))
    with pytest.warns(RuntimeWarning, match=r"capability 7\.5"):
        assert not _dispatch.use_triton("op", X, N=768)
    assert not preflights.asked


def test_no_preflight_where_nothing_compiles(preflights, monkeypatch):
    cpu = SimpleNamespace(is_cuda=False, device=torch.device("cpu"), dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _dispatch.use_triton("op", cpu, N=768)
        with use_backend("eager"):
            assert not _dispatch.use_triton("op", X, N=768)
        with use_backend("triton"), record_launches(90):
            assert _dispatch.use_triton("op", cpu, N=768)
        for module in (_backend, _dispatch):
            monkeypatch.setattr(module, "INTERPRET", True)
        with use_backend("triton"):
            assert _dispatch.use_triton("op", cpu, N=768)
    assert not preflights.asked


def test_torch_compile_asks_while_tracing(preflights, monkeypatch):
    """No graph break; a width that has become a symbol is asked about as the number that it is."""
    asked = []
    monkeypatch.setattr(_dispatch, "device_problem", lambda *args: None)
    monkeypatch.setattr(_dispatch, "kernel_problem", lambda name, dtype, index, **widths: asked.append(widths))

    @torch.compile(fullgraph=True, backend="eager")
    def fn(x):
        return x + 1 if _dispatch.use_triton("op", x, N=x.shape[-1], rate=0.5) else x

    with use_backend("triton"):
        for n in (8, 9, 10):
            assert torch.equal(fn(torch.ones(3, n)), torch.full((3, n), 2.0))
    assert asked == [{"N": n, "rate": 0.5} for n in (8, 9, 10)] and all(type(w["N"]) is int for w in asked)


def test_backend_of_one_operator(preflights):
    with use_backend("eager", layer_norm="triton"):
        assert _dispatch.use_triton("layer_norm", X, N=768) and not _dispatch.use_triton("bias_gelu", X, N=768)
        with use_backend("triton", bias_gelu="eager"):  # the innermost block alone counts
            assert _dispatch.use_triton("layer_norm", X, N=768) and not _dispatch.use_triton("bias_gelu", X, N=768)
        assert not _dispatch.use_triton("bias_gelu", X, N=768)
    assert _dispatch.use_triton("bias_gelu", X, N=768)


@pytest.mark.parametrize(
    "operators, words",
    [({"layernorm": "triton"}, "no operator 'layernorm': choose from add_layer_norm"),
     ({"layer_norm": "cuda"}, "unknown backend 'cuda'")],
)  # fmt: skip
def test_unknown_operator_or_backend_is_refused(operators, words):
    with pytest.raises(ValueError, match=words), use_backend("auto", **operators):
        pass
    assert _backend.per_operator == {}


@pytest.mark.interpreted
def test_another_thread_launches_while_this_one_records():
    """As the replicas of nn.DataParallel do, each of which compiles its kernels before their first use."""
    x, weight = torch.randn(3, 8), torch.randn(8)

    def run():
        with use_backend("triton"):
            return layer_norm(x, weight)

    with concurrent.futures.ThreadPoolExecutor(1) as other, record_launches(90) as recorded:
        y = other.submit(run).result()
        assert not recorded and not other.submit(recording).result() and recording()
        run()
        assert len(recorded) == 1
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (8,), weight))


@pytest.mark.interpreted
def test_threads_that_record_leave_triton_as_it_was():
    from triton.runtime.interpreter import InterpretedFunction

    before, inside, done = InterpretedFunction.run, threading.Event(), threading.Event()

    def second():
        with record_launches(90):
            inside.set()
            done.wait(60)

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        with record_launches(90):
            future = other.submit(second)
            inside.wait(0.2)  # it must not get there before this block ends
        done.set()
        future.result()
    assert InterpretedFunction.run is before and not recording()


@pytest.fixture
def everywhere(monkeypatch):
    """Kernels run on any device."""
    monkeypatch.setattr(_dispatch, "device_problem", lambda *args: None)
    monkeypatch.setattr(_dispatch, "kernel_problem", lambda *args, **widths: None)


def test_compiled_function_follows_the_operator(everywhere):
    def f(x):
        return torch.ones(()) if _dispatch.use_triton("bias_gelu", x) else torch.zeros(())

    compiled = torch.compile(f, backend="eager", fullgraph=True)
    x = torch.randn(3)
    answers = []
    for choice in ({}, {"bias_gelu": "triton"}, {"layer_norm": "triton"}):
        with use_backend("eager", **choice):
            answers.append(float(compiled(x)))
    assert answers == [0.0, 1.0, 0.0]


def test_compiled_function_follows_the_backend(everywhere):
    """Dynamo guards on the globals of `_backend`: a new choice recompiles."""
    compiled = torch.compile(lambda x: x + _dispatch.use_triton("bias_gelu", x), backend="eager", fullgraph=True)
    answers = []
    for backend in ("eager", "triton", "eager", "auto"):
        with use_backend(backend):
            answers.append(float(compiled(torch.zeros(()))))
    assert answers == [0.0, 1.0, 0.0, 0.0]


def test_check_backend(preflights, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    with use_backend("triton"), pytest.raises(RuntimeError, match="'triton' was asked for, but the input is on cpu"):
        check_backend(cpu)
    check_backend(cpu)  # "auto" runs eagerly there
    monkeypatch.setattr(torch, "empty", lambda *shape, device: X)
    check_backend(cuda)
    assert [asked[2:4] for asked in preflights.asked] == [({"N": 8, "bias": False}, 90)]
    preflights.answer = "it needs a C compiler"
    _dispatch.kernel_problem.cache_clear()
    with pytest.warns(RuntimeWarning, match="it needs a C compiler"):
        check_backend(cuda)
    with use_backend("triton"), pytest.raises(RuntimeError, match="it needs a C compiler"):
        check_backend(cuda)
    with use_backend("eager"):
        check_backend(cuda)
