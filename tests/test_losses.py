"""The two losses where no comparison of ordinary numbers looks: infinities, wrong targets, chunks, memory, refusals."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import cross_entropy, linear_cross_entropy, use_backend
from kernels._proof import compare
from kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")

module = importlib.import_module("kernels.linear_cross_entropy")  # the package's attribute is the function
INF, NAN = float("inf"), float("nan")


def _gradients(backend, fn, leaves, *more, **options):
    """(loss, gradients of the leaves) of fn(*leaves, *more) on a backend, for one incoming gradient."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    with use_backend(backend):
        loss = fn(*leaves, *more, **options)
        return loss.detach(), *torch.autograd.grad(loss, leaves, torch.tensor(0.7, device=loss.device))


def _same_on_both_backends(fn, leaves, *more, **options):
    got, expected = (_gradients(backend, fn, leaves, *more, **options) for backend in ("triton", "eager"))
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, equal_nan=True)
    return got


def _linear_inputs(M, C, V, device, dtype=torch.float32):
    x = torch.randn(M, C, device=device, dtype=dtype)
    w = torch.randn(V, C, device=device) / C**0.5
    return x, w, torch.randint(0, V, (M,), device=device)


# --- non-finite numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns, value",
    [(slice(8192), -INF), (slice(None), -INF), (5, INF), (8500, INF), (5, NAN), (8500, NAN), (slice(2, 9000), -INF)],
)
def test_non_finite_logits(columns, value, device):
    """Impossible classes, among them a whole first tile and a whole row; infinities and NaN in any tile."""
    logits = torch.randn(2, 9000, device=device)
    logits[0, columns] = value
    _, dlogits = _same_on_both_backends(cross_entropy, [logits], torch.tensor([8999, 3], device=device))
    assert dlogits[1].isfinite().all() and not dlogits[0].equal(dlogits[1])


def test_impossible_target_costs_infinity(device):
    logits = torch.tensor([[0.0, -INF, 1.0]], device=device)
    loss, _ = _same_on_both_backends(cross_entropy, [logits], torch.tensor([1], device=device))
    assert loss == INF


def test_large_logits_keep_small_differences(device):
    """A float32 log-sum-exp of 10,000 is exact to 1e-3; the loss is to be exact to the last bits of itself."""
    logits = torch.tensor([[0.0, 1.0, 2.0]], device=device)
    targets = torch.tensor([2], device=device)
    for got, expected in zip(
        _gradients("triton", cross_entropy, [logits + 1e4], targets),
        _gradients("eager", cross_entropy, [logits], targets),
        strict=True,
    ):
        assert_close(got, expected)


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_index", [-1, 1, 3])
def test_ignore_index_may_be_a_class(ignore_index, device):
    x, w, targets = _linear_inputs(40, 8, 5, device)
    targets = targets.where(targets != 0, ignore_index)
    for fn, leaves in ((cross_entropy, [x @ w.T]), (linear_cross_entropy, [x, w])):
        _, dx, *_ = _same_on_both_backends(fn, leaves, targets, ignore_index=ignore_index)
        ignored = targets == ignore_index
        assert ignored.any() and not dx[ignored].any() and dx[~ignored].any(1).all()


def test_ignored_rows_have_no_gradient(device):
    logits = torch.randn(3, 5, device=device)
    logits[1] = NAN
    loss, dlogits = _gradients("triton", cross_entropy, [logits], torch.tensor([0, -100, 4], device=device))
    assert loss.isfinite() and dlogits.isfinite().all() and not dlogits[1].any()


def test_mean_over_no_target_is_nan(device):
    x, w, targets = _linear_inputs(4, 8, 5, device)
    for fn, leaves in ((cross_entropy, [x @ w.T]), (linear_cross_entropy, [x, w])):
        loss, *gradients = _same_on_both_backends(fn, leaves, torch.full_like(targets, -100))
        assert loss.isnan() and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("wrong", [-1, 5, 2**40, -(2**62)])
def test_invalid_target_makes_the_loss_nan(wrong, device):
    """And is no address: the other rows, and rows of padding, are as ever."""
    x, w, targets = _linear_inputs(3, 8, 5, device)
    targets[1] = wrong
    loss, dlogits = _gradients("triton", cross_entropy, [x @ w.T], targets)
    assert loss.isnan() and dlogits[1].isnan().all() and dlogits[::2].isfinite().all()
    loss, dx, dw = _gradients("triton", linear_cross_entropy, [x, w], targets)
    assert loss.isnan() and dx[1].isnan().all() and dx[::2].isfinite().all() and dw.isnan().all()


@pytest.mark.parametrize("V", [1, 5])
def test_no_rows(V, device):
    x, w, targets = _linear_inputs(0, 8, V, device)
    for fn, leaves in ((cross_entropy, [x @ w.T]), (linear_cross_entropy, [x, w])):
        loss, *gradients = _same_on_both_backends(fn, leaves, targets)
        assert loss.isnan() and gradients[0].shape == leaves[0].shape


# --- dtypes ----------------------------------------------------------------------------------------------------------


def test_float64_stays_float64_in_eager(device):
    x, w, targets = (t.double() if t.is_floating_point() else t for t in _linear_inputs(3, 8, 5, device))
    with use_backend("eager"):
        losses = cross_entropy(x @ w.T, targets), linear_cross_entropy(x, w, targets)
    assert all(loss.dtype == torch.float64 for loss in losses)


def test_float32_weight_with_float16_activations(device):
    """By the rule: products in float16, sums over chunks in float32, each gradient in the dtype of what it is of."""
    x, w, targets = _linear_inputs(300, 24, 70, device, torch.float16)
    got = _gradients("triton", linear_cross_entropy, [x, w], targets)
    eager = _gradients("eager", linear_cross_entropy, [x, w], targets)
    truth = _gradients("eager", linear_cross_entropy, [x.double(), w.half().double()], targets)
    for name, *results in zip(("loss", "dx", "dw"), got, eager, truth, strict=True):
        assert compare("linear_cross_entropy", {}, name, *results, gradient=name != "loss").passed, name
    assert [t.dtype for t in got] == [torch.float32, torch.float16, torch.float32]


def test_weight_gradient_is_summed_in_float32(device):
    x, w, targets = _linear_inputs(100, 8, 5, device, torch.float16)
    dw = module.linear_cross_entropy_fwd(x, w, targets, -100, False, True)[2]
    assert dw.dtype == torch.float32 and (dw != dw.half()).float().mean() > 0.9


def test_the_scale_is_not_rounded_to_float16(device):
    """dloss / count may lie below what float16 holds, where its product with a gradient does not."""
    g = torch.full((4, 3), 30000.0, device=device, dtype=torch.float16)
    dloss = torch.tensor(3e-8, device=device)
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    for scaled in module.linear_cross_entropy_bwd(dloss, targets, -100, g, g.float()):
        assert_close(scaled.double(), torch.full_like(scaled.double(), 9e-4), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_chunks_on_a_cpu_are_as_exact_as_the_whole(dtype, ignore_index):
    """By the rule, against the operators of PyTorch that they replace; a class may be what is ignored."""
    x, w, targets = _linear_inputs(300, 24, 70, "cpu", dtype)
    targets[5:250] = ignore_index

    def whole(x, w, targets):
        return cross_entropy(x @ w.to(x.dtype).T, targets, ignore_index)

    got = _gradients("eager", linear_cross_entropy, [x, w], targets, ignore_index)
    eager = _gradients("eager", whole, [x, w], targets)
    truth = _gradients("eager", whole, [x.double(), w.to(dtype).double()], targets)
    for name, *results in zip(("loss", "dx", "dw"), got, eager, truth, strict=True):
        assert compare("linear_cross_entropy", {}, name, *results, gradient=name != "loss").passed, name
    with pytest.raises(IndexError):
        linear_cross_entropy(x, w, targets.clamp(min=70), ignore_index)


# --- chunks and memory -----------------------------------------------------------------------------------------------


def test_chunks_follow_shapes_and_the_total_memory(monkeypatch):
    gib = 2**30
    row = 50304 * 2
    for total, most in ((80 * gib, gib), (24 * gib, 24 * gib // 64), (gib, 128 * row)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, total=total: SimpleNamespace(total_memory=total)
        )
        for M in (1, 127, 128, 129, 9000, 65536, 2**20 + 1):
            rows = module.chunk_rows(M, row, torch.device("cuda"))
            chunks = -(-M // rows)
            assert rows % 64 == 0 and 0 < rows * row <= max(most, 128 * row)
            assert (chunks - 1) * rows < M and rows - M // chunks <= 64  # as many as needed, of about one size
    assert module.chunk_rows(0, row, torch.device("cuda")) > 0


def test_number_of_chunks_changes_only_rounding(device, monkeypatch):
    inputs = _linear_inputs(200, 16, 33, device)
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 200)
    whole = _gradients("triton", linear_cross_entropy, inputs[:2], inputs[2])
    monkeypatch.setattr(module, "chunk_rows", lambda *_: 64)
    for got, expected in zip(_gradients("triton", linear_cross_entropy, inputs[:2], inputs[2]), whole, strict=True):
        assert_close(got, expected)


def test_logits_are_never_whole_in_memory(device, monkeypatch):
    """No buffer of forward or backward holds more than a chunk of 128 rows, the weight or the activations."""
    monkeypatch.setattr(module, "SCRATCH_BYTES", 0)
    M, C, V = 300, 8, 200
    x, w, targets = _linear_inputs(M, C, V, device)
    sizes = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (y if isinstance(y, tuple) else (y,)) if isinstance(t, torch.Tensor))
            return y

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append((t := empty(*a, **k)).numel()) or t)
    for backend in ("triton", *["eager"] * (device.type == "cpu")):
        sizes.clear()
        with Record():
            _gradients(backend, linear_cross_entropy, [x, w], targets)
        assert max(sizes) == 128 * (256 if backend == "triton" else V)
    sizes.clear()
    with Record():
        _gradients("eager", linear_cross_entropy, [x.double(), w.double()], targets)
    assert max(sizes) == M * V  # what is avoided


@pytest.mark.parametrize("need_dx, need_dw", [(False, False), (True, False), (False, True)])
def test_only_needed_gradients_are_computed(need_dx, need_dw, device, monkeypatch):
    x, w, targets = _linear_inputs(20, 8, 5, device)
    products, gradient = [], []
    multiply, launch = module._multiply, module.launch
    monkeypatch.setattr(module, "_multiply", lambda *a, **k: products.append(a) or multiply(*a, **k))
    monkeypatch.setattr(module, "launch", lambda *a, **k: gradient.append(k.get("GRADIENT")) or launch(*a, **k))
    with use_backend("triton"):
        loss = linear_cross_entropy(x.requires_grad_(need_dx), w.requires_grad_(need_dw), targets)
    assert loss.requires_grad == (need_dx or need_dw)
    assert len(products) == 1 + need_dx + need_dw and gradient == [need_dx or need_dw]
    if loss.requires_grad:
        loss.backward()
        assert (x.grad is not None, w.grad is not None) == (need_dx, need_dw)
    products.clear()
    with use_backend("triton"), torch.no_grad():
        linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), targets)
    assert len(products) == 1


@pytest.mark.parametrize("fn", [cross_entropy, linear_cross_entropy])
def test_retained_graph_gives_the_same_gradients(fn, device):
    x, w, targets = _linear_inputs(20, 8, 5, device)
    leaves = [t.requires_grad_() for t in ((x, w) if fn is linear_cross_entropy else (x,))]
    with use_backend("triton"):
        loss = fn(*leaves, targets % 5)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
        third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert a.any() and b.equal(2 * a) and c.equal(a)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda x, t: cross_entropy(x[0], t), r"must be \(M, V\).*got \(4,\)"),
        (lambda x, t: cross_entropy(x[:, :0], t), r"V >= 1, got \(3, 0\)"),
        (lambda x, t: cross_entropy(x, t[:2]), r"cross_entropy: 3 rows need targets of \(3,\).*got \(2,\)"),
        (lambda x, t: cross_entropy(x, t.int()), "torch.int64, got .* torch.int32"),
        (lambda x, t: linear_cross_entropy(x, x[:, :3], t), r"got \(3, 4\) and \(3, 3\)"),
        (lambda x, t: linear_cross_entropy(x, x[:0], t), "V >= 1"),
        (lambda x, t: linear_cross_entropy(x[0], x, t), r"x must be \(M, C\)"),
        (lambda x, t: linear_cross_entropy(x, x, t[None]), r"linear_cross_entropy: 3 rows.*got \(1, 3\)"),
    ],
)
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))


def test_padding_of_a_row_adds_nothing(device):
    """Its logits are 0, and e^(0 - max) is infinite where all classes are unlikely."""
    x = torch.full((2, 8), -10.0, device=device, requires_grad=True)
    weight = torch.full((65, 8), 10.0, device=device, requires_grad=True)
    targets = torch.tensor([3, 64], device=device)
    found = []
    for backend in ("triton", "eager"):
        with use_backend(backend):
            found.append(torch.autograd.grad(linear_cross_entropy(x, weight, targets), (x, weight)))
    torch.testing.assert_close(*found)
