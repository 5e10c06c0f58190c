"""Every registered kernel against float64, by the one tolerance rule; on a CPU in Triton's interpreter."""

import dataclasses
import importlib
import itertools

import pytest
import torch
from conftest import HAS_CUDA
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import (
    add_layer_norm,
    attention_dropout_mask,
    bias_gelu,
    causal_attention,
    causal_attention_qkv,
    document_bounds,
    embedding,
    layer_norm,
    linear_add_layer_norm,
    residual_dropout_mask,
    use_backend,
)
from kernels._backend import current_backend
from kernels._launch import assume_arch
from kernels._proof import FAMILIES, evaluate, incoming_gradients, prove, prove_family
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON, NAMESPACE

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")

SPECS = all_specs()
# bfloat16 arithmetic is silently wrong in the interpreter.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if HAS_CUDA else [torch.float32, torch.float16]
# In the quick suite every family sees the first cases of an operator; the interpreter takes seconds for each.
QUICK = {"causal_attention": 1, "causal_attention_qkv": 0}
FAMILY_CASES = [
    pytest.param(name, i, family, id=f"{name}-{i}-{family}", marks=[pytest.mark.slow] * (i >= QUICK.get(name, 2)))
    for name, spec in SPECS.items()
    for i in range(len(spec.cases))
    for family in FAMILIES
    if family not in ("shapes", "far")
    # 20 seconds each, for the strides and numbers of more tiles than cases 2, 5 and 7 have
    if (name, i) != ("causal_attention", 6) or family not in ("layouts", "values")
]
# The family "memory" begins with these inputs and this comparison: where the quick suite has it, float32 is proved.
CASES = [
    pytest.param(
        name, i, dtype, id=f"{name}-{i}-{dtype}", marks=[pytest.mark.slow] * (dtype == torch.float32 and quick)
    )
    for name, spec in SPECS.items()
    for i in range(len(spec.cases))
    for quick in [i < QUICK.get(name, 2)]
    for dtype in DTYPES
]
# Of the three cases that have far addresses the quick suite sees one, the third unless that is large or of one row.
QUICK_FAR = {"causal_attention": 0, "causal_attention_qkv": None, "cross_entropy": 0}
FAR_CASES = [
    pytest.param(name, i, id=f"{name}-{i}", marks=[pytest.mark.slow] * (i != QUICK_FAR.get(name, 2)))
    for name in SPECS
    for i in range(3)
]
# causal_attention_qkv launches the kernels of causal_attention.
ONE_ATTENTION = [pytest.param(name, marks=[pytest.mark.slow] * (name == "causal_attention_qkv")) for name in SPECS]
HALF_NAMES = [pytest.param(name, marks=[pytest.mark.slow] * ("attention" in name)) for name in SPECS]


def _assert_proved(rows):
    rows = list(rows)
    assert rows
    for row in rows:
        assert row.passed, f"{row.kernel} {row.name}: error {row.error:.3e} > allowed {row.allowed:.3e} on {row.case}"


@pytest.mark.parametrize("name, index, dtype", CASES)
def test_output_and_every_gradient(name, index, dtype, device):
    _assert_proved(prove_family("shapes", SPECS[name], SPECS[name].cases[index], dtype, device))


@pytest.mark.parametrize("name, index, family", FAMILY_CASES)
def test_every_family_of_cases(name, index, family, device):
    """Other layouts, other numbers, equal bits a second time, and no touch beyond the buffers."""
    _assert_proved(prove_family(family, SPECS[name], SPECS[name].cases[index], torch.float32, device))


@pytest.mark.parametrize("name, index", FAR_CASES)
def test_far_addresses(name, index, device):
    rows = list(prove_family("far", SPECS[name], SPECS[name].cases[index], torch.float16, device))
    _assert_proved(rows if rows or not HAS_CUDA else pytest.skip("needs more memory"))


@pytest.mark.parametrize("name", HALF_NAMES)
def test_other_numbers_in_half_precision(name, device):
    for case in SPECS[name].cases[:3]:
        _assert_proved(prove_family("values", SPECS[name], case, torch.float16, device))


@pytest.mark.parametrize("arch", [80, pytest.param(86, marks=pytest.mark.slow), 100])
@pytest.mark.parametrize("name", ONE_ATTENTION)
def test_launch_tables_of_other_architectures(name, arch, device):
    with assume_arch(arch):
        for case in SPECS[name].cases[:1] + SPECS[name].cases[-1:]:
            _assert_proved(prove_family("shapes", SPECS[name], case, torch.float16, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ONE_ATTENTION)
def test_one_percent_error_is_found(name, dtype, device):
    """The rule has teeth: 1 % (4 ulp where that is more) on the outputs, or on the gradients alone, must fail."""
    spec = SPECS[name]
    factor = 1 + max(0.01, 4 * torch.finfo(dtype).eps)

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * factor

    def changed(change):
        def fn(**inputs):
            y = spec.fn(**inputs)
            return tuple(map(change, y)) if isinstance(y, tuple) else change(y)

        return {row.name: row.passed for row in prove(spec, few_rows(spec.cases[0]), dtype, device, fn=fn)}

    wrong_output, wrong_gradient = changed(lambda y: y * factor), changed(Wrong.apply)
    assert not any(wrong_output[name] for name in spec.outputs)
    assert all(passed == (name in spec.outputs) for name, passed in wrong_gradient.items())


def test_unwritten_and_foreign_memory_is_found(device):
    """The guards themselves: a skipped element and a write past the end both turn the family red."""
    spec = SPECS["bias_gelu"]
    case = {"M": 4, "N": 8}

    def shortened(x, bias, approximate):
        y = torch.empty(x.shape, device=device)
        y[:3] = bias_gelu(x, bias, approximate)[:3]
        return y

    def overrun(x, bias, approximate):
        y = torch.empty(x.shape, device=device)
        beyond = min(33, y.untyped_storage().nbytes() // 4)  # 32 where nothing guards the memory
        y.as_strided((beyond,), (1,)).zero_()
        return y.copy_(bias_gelu(x, bias, approximate))

    for fn, wrong in ((shortened, "y"), (overrun, "canaries")):
        with use_backend("triton"):
            chosen = lambda fn=fn, **kw: (fn if current_backend() == "triton" else spec.fn)(**kw)  # noqa: E731
            bad = dataclasses.replace(spec, grads=(), fn=chosen)
            rows = {row.name: row.passed for row in prove_family("memory", bad, case, torch.float32, device)}
        assert not rows.pop(wrong) and rows["canaries" if wrong == "y" else "y"]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 5), (2, 1, 3, 7)])
def test_rowwise_kernels_take_any_rank(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    w, b = (torch.randn(shape[-1], device=device, requires_grad=True) for _ in range(2))
    dy = torch.randn(shape, device=device)
    for fn in (lambda: layer_norm(x, w, b), lambda: bias_gelu(x * w, b)):
        results = []
        for backend in ("triton", "eager"):
            with use_backend(backend):
                y = fn()
                results.append((y, *torch.autograd.grad(y, (x, w, b), dy)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_empty_rows(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    w, b = (torch.randn(4, device=device, requires_grad=True) for _ in range(2))
    with use_backend("triton"):
        for y in (layer_norm(x, w, b), bias_gelu(x * w, b)):
            dx, dw, db = torch.autograd.grad(y, (x, w, b), torch.ones_like(y))
            assert y.shape == dx.shape == shape
            assert not dw.any() and not db.any()


@pytest.mark.parametrize("B, T", [(0, 4), (2, 0)])
def test_empty_attention(B, T, device):
    for backend, documents in itertools.product(("triton", "eager"), (None, torch.zeros(B, T, device=device).long())):
        qkv = torch.randn(B, T, 24, device=device, requires_grad=True)
        with use_backend(backend):
            y = causal_attention(qkv, 2, documents=documents)
            y.sum().backward()
        assert y.shape == (B, T, 8) and qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_stay_in_their_row(bad, device):
    x, residual = torch.randn(2, 5, 40, device=device)
    x[2, 7] = bad
    w, b = torch.randn(2, 40, device=device)
    dy = torch.randn(5, 40, device=device)
    fns = [
        lambda t: layer_norm(t, w, b),
        lambda t: add_layer_norm(t, residual, w, b)[0],
        lambda t: bias_gelu(t, b),
    ]
    if bad != float("inf"):  # there PyTorch itself says NaN for 40 elements and inf for one
        fns.append(lambda t: bias_gelu(t, b, approximate="none"))
    for fn in fns:
        results = []
        for backend in ("eager", "triton"):
            leaf = x.clone().requires_grad_()
            with use_backend(backend):
                y = fn(leaf)
                results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
        for expected, got in zip(*results, strict=True):
            assert got[[0, 1, 3, 4]].isfinite().all()
            torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["query", "key"])
def test_nan_reaches_only_the_attention_that_sees_it(part, device):
    T, D = 150, 16
    qkv = torch.randn(1, T, 3 * D, device=device)
    qkv[:, 90, D * (part == "key")] = float("nan")
    spoilt = torch.zeros(T, dtype=torch.bool, device=device)
    spoilt[90 : 91 if part == "query" else T] = True
    for backend in ("eager", "triton"):
        with use_backend(backend):
            assert torch.equal(causal_attention(qkv, 1)[0].isnan().any(-1), spoilt), backend


def test_float32_weights_with_float16_activations(device):
    """GPT keeps its parameters in float32: the kernels read them as they are, their gradients come back in float32."""
    x = torch.randn(6, 40, device=device, dtype=torch.float16, requires_grad=True)
    w, b = (torch.randn(40, device=device, requires_grad=True) for _ in range(2))
    for fn in (lambda: layer_norm(x, w, b), lambda: bias_gelu(x, b) * 1):
        for backend in ("triton", "eager"):
            with use_backend(backend):
                y = fn()
                db = torch.autograd.grad(y, b, torch.ones_like(y))[0]
            assert y.dtype == torch.float16 and db.dtype == torch.float32


# --- torch integration -----------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Writes down the calls of our registered operators."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == NAMESPACE:
            self.calls.setdefault(func, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
        return func(*args, **(kwargs or {}))


MOST = {**dict.fromkeys("MTS", 8), **dict.fromkeys("NCV", 40)}


def few_rows(case):
    """The case with few rows, tokens, keys and columns: what is registered does not depend on their number."""
    return {key: min(n, MOST.get(key, n)) for key, n in case.items()}


@pytest.mark.parametrize("name", ONE_ATTENTION)
def test_opcheck(name, device):
    """Schema, fake tensors, autograd registration and dynamic shapes of every operator that the kernel calls."""
    spec, case = SPECS[name], few_rows(SPECS[name].cases[0])
    inputs = spec.inputs(case, torch.float32, device)
    dy = incoming_gradients(spec, inputs, seed=1)
    with _Recorder() as recorder:
        evaluate(spec, inputs, dy, "triton")
    assert len(recorder.calls) >= 1 + bool(spec.grads)
    for op, args in recorder.calls.items():
        forward = "_bwd" not in op.__name__ and spec.grads
        given = tuple(
            a.requires_grad_() if forward and isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
        )
        torch.library.opcheck(op, given)


class _Gradients(TorchDispatchMode):
    """Counts the elements that our backward operators return."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == NAMESPACE and "_bwd" in func.__name__:
            self.n += sum(t.numel() for t in (result if isinstance(result, tuple) else (result,)))
        return result


@pytest.mark.parametrize("frozen", [("bias",), ("weight",), ("weight", "bias", "x_bias")], ids="+".join)
@pytest.mark.parametrize("name", ["bias_gelu", "layer_norm", "add_layer_norm", "linear_cross_entropy"])
def test_frozen_parameters_get_no_gradient(name, frozen, device):
    """Nor is one computed, where all of a kernel's are frozen; the other gradients keep their bits."""
    spec = SPECS[name]
    inputs = spec.inputs(few_rows(spec.cases[0]), torch.float32, device)
    if name == "add_layer_norm":
        inputs["dropout_p"] = 0.0  # then x and the residual have one gradient
    parameters = [key for key in ("weight", "bias", "x_bias") if key in spec.grads]

    def gradients(frozen):
        leaves = {key: inputs[key].detach().requires_grad_(key not in frozen) for key in spec.grads}
        with use_backend("triton"):
            y = spec.fn(**inputs | leaves)
            y = y if isinstance(y, torch.Tensor) else y[0]
            with _Gradients() as counted:
                (y * torch.arange(1, y.numel() + 1, device=device).view_as(y)).sum().backward()
        return {key: leaf.grad for key, leaf in leaves.items()}, counted.n

    (every, _), (some, n) = gradients(()), gradients(frozen)
    for key in spec.grads:
        assert some[key] is None if key in frozen else some[key].equal(every[key]), key
    if set(parameters) <= set(frozen):
        assert n == every["x"].numel()


@pytest.mark.parametrize("name", ONE_ATTENTION)
def test_compiles_without_a_graph_break(name, device):
    spec = SPECS[name]
    torch.compiler.reset()
    compiled = torch.compile(spec.fn, fullgraph=True, backend="aot_eager")
    for case in spec.cases[:3]:  # the second and third have other shapes: dynamic ones are compiled
        inputs = spec.inputs(few_rows(case), torch.float32, device)
        dy = incoming_gradients(spec, inputs, seed=1)
        expected = evaluate(spec, inputs, dy, "triton")
        got = evaluate(spec, inputs, dy, "triton", compiled)
        assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.grads])
def test_same_gradients_under_activation_checkpointing(name, device):
    from torch.utils.checkpoint import checkpoint

    spec = SPECS[name]
    inputs = spec.inputs(few_rows(spec.cases[0]), torch.float32, device)
    dy = incoming_gradients(spec, inputs, seed=1)
    expected = evaluate(spec, inputs, dy, "triton")
    got = evaluate(spec, inputs, dy, "triton", lambda **kw: checkpoint(spec.fn, use_reentrant=False, **kw))
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_unseeded_dropout_recomputes_the_same_mask(device):
    from torch.utils.checkpoint import checkpoint

    qkv = torch.randn(1, 40, 48, device=device, requires_grad=True)
    dy = torch.randn(1, 40, 16, device=device)
    gradients = []
    for run in (lambda f: f(qkv), lambda f: checkpoint(f, qkv, use_reentrant=False)):
        torch.manual_seed(5)
        with use_backend("triton"):
            y = run(lambda t: causal_attention(t, 2, dropout_p=0.5))
            gradients.append(torch.autograd.grad(y, qkv, dy)[0])
    assert torch.equal(*gradients)


# --- attention: what no pointwise comparison sees --------------------------------------------------------------------


def test_attention_is_causal(device):
    qkv = torch.randn(1, 200, 3 * 32, device=device)
    changed = qkv.clone()
    changed[:, 130] += 1.0
    with use_backend("triton"):
        before, after = causal_attention(qkv, 2), causal_attention(changed, 2)
    assert torch.equal(before[:, :130], after[:, :130])
    assert not torch.equal(before[:, 130], after[:, 130])


def test_no_gradient_flows_to_the_future(device):
    qkv = torch.randn(1, 150, 3 * 16, device=device, requires_grad=True)
    with use_backend("triton"):
        causal_attention(qkv, 1)[:, :70].square().sum().backward()
    assert qkv.grad[:, :70].abs().sum(-1).gt(0).all()
    assert not qkv.grad[:, 70:].any()


def test_large_scores_neither_overflow_nor_vanish(device):
    spec = SPECS["causal_attention"]
    inputs = spec.inputs({"B": 1, "H": 2, "T": 90, "D": 32}, torch.float32, device)
    inputs["qkv"] *= 30
    dy = incoming_gradients(spec, inputs, seed=1)
    exact = {"qkv": inputs["qkv"].double(), "n_head": 2}
    truth = evaluate(spec, exact, {"y": dy["y"].double()}, "eager")
    got = evaluate(spec, inputs, dy, "triton")
    for name in truth:
        torch.testing.assert_close(
            got[name].double(), truth[name], rtol=0.01, atol=0.01 * truth[name].abs().max().item()
        )


def test_scores_of_minus_infinity_first(device):
    """A row whose first key tile holds no finite score must not turn into NaN when a later tile does."""
    T, D = 140, 16
    qkv = torch.randn(1, T, 3 * D, device=device).abs()
    qkv[:, :130, D] = float("-inf")  # keys 0..129: every score is -inf, queries being positive
    with use_backend("eager"):
        expected = causal_attention(qkv, 1)
    with use_backend("triton"):
        got = causal_attention(qkv, 1)
    assert got[:, 130:].isfinite().all()
    torch.testing.assert_close(got[:, 130:], expected[:, 130:])


def test_packed_documents_equal_separate_documents(device):
    lengths, H, D = (1, 70, 130, 9), 2, 16
    parts = [torch.randn(1, n, 3 * H * D, device=device) for n in lengths]
    ids = torch.cat([torch.full((1, n), i % 2) for i, n in enumerate(lengths)], 1).to(device)  # 0 and 1 in turn
    with use_backend("triton"):
        packed = causal_attention(torch.cat(parts, 1), H, documents=ids)
        alone = torch.cat([causal_attention(part, H) for part in parts], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_no_gradient_crosses_documents(device):
    qkv = torch.randn(1, 150, 48, device=device, requires_grad=True)
    ids = (torch.arange(150, device=device) >= 70).long().view(1, -1)
    for backend in ("triton", "eager"):
        with use_backend(backend):
            (gradient,) = torch.autograd.grad(causal_attention(qkv, 1, documents=ids)[:, 70:].square().sum(), qkv)
        assert not gradient[:, :70].any() and gradient[:, 70:].abs().sum(-1).gt(0).all()


# --- dropout ---------------------------------------------------------------------------------------------------------


def test_dropout_mask_matches_the_kernel(device):
    """Values are the identity matrix: the output is the kernel's own probabilities, zero where it dropped one."""
    B, H, T, p, seed = 2, 2, 70, 0.3, 2**40 + 5
    q, k = (torch.randn(B, T, H, T, device=device) for _ in range(2))
    v = torch.eye(T, device=device).view(1, T, 1, T).expand(B, T, H, T)
    qkv = torch.stack([q, k, v], dim=2).flatten(2)
    with use_backend("triton"):
        dropped = causal_attention(qkv, H, dropout_p=p, seed=seed).view(B, T, H, T).transpose(1, 2)
        whole = causal_attention(qkv, H).view(B, T, H, T).transpose(1, 2)
    keep = attention_dropout_mask(B, H, T, p, seed, device)
    torch.testing.assert_close(dropped, torch.where(keep, whole / (1 - p), 0.0))


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_residual_dropout_mask_matches_forward_and_backward(backend, device):
    x = torch.ones(3, 5, 70, device=device, requires_grad=True)
    w, residual = torch.ones(70, device=device), torch.zeros(3, 5, 70, device=device)
    keep = residual_dropout_mask(x.shape, 0.25, 11, device)
    with use_backend(backend):
        _, h = add_layer_norm(x, residual, w, dropout_p=0.25, seed=11)
        (dx,) = torch.autograd.grad(h, x, torch.ones_like(h))
    assert torch.equal(h != 0, keep) and torch.equal(dx != 0, keep)
    assert abs(keep.float().mean().item() - 0.75) < 0.03
    torch.testing.assert_close(h[keep], torch.full_like(h[keep], 1 / 0.75))


def test_added_norm_is_the_norm_of_the_sum(device):
    """Bit for bit: a model may take the two apart, or never drop anything, and see no difference."""
    x, residual = torch.randn(2, 9, 40, device=device).half()
    w, b = torch.randn(2, 40, device=device)
    with use_backend("triton"):
        y, h = add_layer_norm(x, residual, w, b)
        assert torch.equal(h, x + residual) and torch.equal(y, layer_norm(h, w, b))
        assert all(map(torch.equal, (y, h), add_layer_norm(x, residual, w, b, dropout_p=0.0, seed=4)))


@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_bias_before_the_norm_is_added_once(backend, device):
    """In the kernel, or in the product before it: the sum and the gradient of the bias are the same."""
    torch.manual_seed(0)
    x, residual, dh = (torch.randn(9, n, device=device).half() for n in (24, 40, 40))
    weight, bias = torch.randn(40, 24, device=device), torch.randn(40, device=device, requires_grad=True)
    norm = torch.ones(40, device=device), torch.zeros(40, device=device)
    with use_backend(backend):
        _, h = linear_add_layer_norm(x, weight, bias, residual, *norm)
        (dbias,) = torch.autograd.grad(h, bias, dh)
    truth = residual.double() + x.double() @ weight.half().double().T + bias.detach().double()
    torch.testing.assert_close(h.double(), truth, rtol=2e-3, atol=1e-2)
    exact = dh.double().sum(0)
    assert dbias.dtype == torch.float32
    torch.testing.assert_close(dbias.double(), exact, rtol=1e-5 if backend == "triton" else 1e-2, atol=1e-5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_fraction(p):
    keep = attention_dropout_mask(2, 3, 200, p, seed=11)
    assert abs(keep.float().mean().item() - (1 - p)) < 0.005
    # neighbours, rows, heads and batches are independent: no axis has a constant pattern
    for dim in range(4):
        a, b = keep.unbind(dim)[:2]
        assert abs((a & b).float().mean().item() - (1 - p) ** 2) < 0.03


def test_dropout_has_no_pattern_of_rows_and_columns():
    """Row and column keys are combined: the parity of a rectangle's corners would show it if they were only xored."""
    keep = attention_dropout_mask(1, 4, 256, 0.5, seed=5)[0]
    i = torch.arange(128)
    for step in (1, 2, 64):
        a, b = keep[:, i], keep[:, i + step]
        parity = a ^ b ^ a.roll(step, -1) ^ b.roll(step, -1)
        assert abs(parity.float().mean().item() - 0.5) < 0.01
    rows, columns = keep.float().mean(-1), keep.float().mean(-2)
    for means in (rows, columns):  # 256 fair coins each: standard deviation 1/32
        assert abs(means.std().item() - 1 / 32) < 0.003


def test_dropout_follows_the_seed(device):
    qkv = torch.randn(1, 33, 48, device=device)
    for backend in ("triton", "eager"):
        with use_backend(backend):
            same = [causal_attention(qkv, 2, dropout_p=0.4, seed=s) for s in (3, torch.tensor(3, device=device))]
            other = causal_attention(qkv, 2, dropout_p=0.4, seed=4)
            torch.manual_seed(1)
            first = causal_attention(qkv, 2, dropout_p=0.4)
            torch.manual_seed(1)
            again, then = (causal_attention(qkv, 2, dropout_p=0.4) for _ in range(2))
        assert torch.equal(*same) and not torch.equal(same[0], other)
        assert torch.equal(first, again) and not torch.equal(again, then)


def test_no_dropout_is_bitwise_the_plain_kernel(device):
    qkv = torch.randn(2, 40, 48, device=device)
    with use_backend("triton"):
        assert torch.equal(causal_attention(qkv, 2, dropout_p=0.0, seed=9), causal_attention(qkv, 2))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: causal_attention(torch.zeros(2, 3, 10), 2), r"3 \* n_head \* D"),
        (lambda: causal_attention(torch.zeros(2, 3), 1), "must be"),
        (lambda: causal_attention(torch.zeros(2, 3, 12), 2, dropout_p=1.0), "dropout_p"),
        (lambda: causal_attention(torch.zeros(2, 3, 12), 2, sm_scale=0.0), "sm_scale"),
        (lambda: layer_norm(torch.zeros(2, 3), torch.zeros(4)), r"weight \(4,\)"),
        (lambda: layer_norm(torch.zeros(2, 3), torch.zeros(3), torch.zeros(1)), r"bias \(1,\)"),
        (lambda: causal_attention(torch.zeros(2, 3, 12), 2, documents=torch.zeros(2, 4).long()), r"of \(2, 3\) or"),
        (lambda: causal_attention(torch.zeros(2, 3, 12), 2, documents=torch.zeros(2, 3)), "must be integers"),
        (lambda: causal_attention(torch.zeros(2, 3, 12), 2, documents=torch.zeros(2, 3, 3).long()), "must be integers"),
        (lambda: document_bounds(torch.zeros(2, 3)), "must be .* integers"),
        (lambda: causal_attention_qkv(*torch.zeros(2, 1, 3, 2, 4), torch.zeros(1, 3, 2, 8)), "must be alike"),
        (lambda: causal_attention_qkv(*torch.zeros(2, 1, 3, 2, 4), torch.zeros(1, 3, 2, 4).half()), "must be alike"),
        (lambda: add_layer_norm(torch.zeros(2, 3), torch.zeros(3), torch.zeros(3)), "must be alike"),
        (lambda: add_layer_norm(torch.zeros(2, 3), torch.zeros(2, 3).half(), torch.zeros(3)), "must be alike"),
        (lambda: add_layer_norm(*torch.zeros(2, 2, 3), torch.zeros(4)), r"weight \(4,\)"),
        (lambda: add_layer_norm(*torch.zeros(2, 2, 3), torch.zeros(3), dropout_p=-0.1), "dropout_p"),
        (
            lambda: add_layer_norm(*torch.zeros(2, 2, 3), torch.zeros(3), x_bias=torch.zeros(2)),
            r"x_bias must be \(3,\)",
        ),
        (lambda: embedding(torch.zeros(2, 3).long(), torch.zeros(5, 4), torch.zeros(2, 4)), r"got \(2, 3\)"),
        (lambda: embedding(torch.zeros(2, 3), torch.zeros(5, 4), torch.zeros(3, 4)), "int32"),
        (lambda: bias_gelu(torch.zeros(2, 3), torch.zeros(4)), r"got \(4,\)"),
        (lambda: bias_gelu(torch.zeros(2, 3), approximate="erf"), "approximate"),
    ],
)
def test_wrong_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_triton_refuses_what_it_cannot_take(device):
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="float64"):
            layer_norm(torch.zeros(2, 3, dtype=torch.float64, device=device), torch.zeros(3, device=device))
        with pytest.raises(RuntimeError, match="head size 257"):
            causal_attention(torch.zeros(1, 2, 3 * 257, device=device), 1)
        with pytest.raises(RuntimeError, match="rows of 40000"):
            layer_norm(torch.zeros(1, 40000, device=device), torch.zeros(40000, device=device))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'auto', 'triton', 'eager'"), use_backend("cuda"):
        pass


@pytest.mark.gpu
def test_auto_runs_the_kernels_on_a_gpu(monkeypatch):
    module = importlib.import_module("kernels.layer_norm")  # as an attribute of the package the name is the function
    calls = []
    monkeypatch.setattr(module, "layer_norm_fwd", lambda x, *rest: calls.append(x) or (x,))
    layer_norm(torch.ones(2, 3, device="cuda"), torch.ones(3, device="cuda"))
    assert len(calls) == 1
