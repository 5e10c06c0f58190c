"""Every registered kernel against float64, by the one tolerance rule; on a CPU in Triton's interpreter."""

import dataclasses

import pytest
import torch
from conftest import HAS_CUDA

from kernels import attention_dropout_mask, bias_gelu, causal_attention, layer_norm, use_backend
from kernels._proof import evaluate, prove
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")

SPECS = all_specs()
# bfloat16 arithmetic is silently wrong in the interpreter.
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if HAS_CUDA else [torch.float32, torch.float16]
CASES = [pytest.param(name, i, id=f"{name}-{i}") for name, spec in SPECS.items() for i in range(len(spec.cases))]
NAMES = list(SPECS)


def _transposed(t: torch.Tensor) -> torch.Tensor:
    return t.permute(*reversed(range(t.ndim))).contiguous().permute(*reversed(range(t.ndim)))


def _sliced(t: torch.Tensor) -> torch.Tensor:
    """Every second element of every dimension of a larger tensor full of NaN, past a storage offset."""
    wide = torch.full([2 * n + 1 for n in t.shape], float("nan"), dtype=t.dtype, device=t.device)
    view = wide[tuple(slice(1, None, 2) for _ in t.shape)]
    view.copy_(t)
    return view


def _row_sliced(t: torch.Tensor) -> torch.Tensor:
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 7), float("nan"), dtype=t.dtype, device=t.device)
    wide[..., 3:-4] = t
    return wide[..., 3:-4]


LAYOUTS = {"transposed": _transposed, "sliced": _sliced, "row_sliced": _row_sliced}


def _assert_proved(rows):
    rows = list(rows)
    assert rows
    for row in rows:
        assert row.passed, f"{row.kernel} {row.name}: error {row.error:.3e} > allowed {row.allowed:.3e} on {row.case}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, index", CASES)
def test_output_and_every_gradient(name, index, dtype, device):
    spec = SPECS[name]
    _assert_proved(prove(spec, spec.cases[index], dtype, device))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, index", CASES)
def test_any_strides_of_inputs_and_incoming_gradient(name, index, layout, device):
    spec = SPECS[name]
    _assert_proved(prove(spec, spec.cases[index], torch.float32, device, layout=LAYOUTS[layout]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_one_percent_error_is_found(name, dtype, device):
    """The rule has teeth: 1 % on the output, or on the gradients alone, must fail."""
    spec, case = SPECS[name], max(SPECS[name].cases, key=lambda case: len(case))

    class OnePercent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy * 1.01

    wrong_output = list(prove(spec, case, dtype, device, fn=lambda **kw: spec.fn(**kw) * 1.01))
    wrong_gradient = list(prove(spec, case, dtype, device, fn=lambda **kw: OnePercent.apply(spec.fn(**kw))))
    assert not wrong_output[0].passed
    assert wrong_gradient[0].passed and not any(row.passed for row in wrong_gradient[1:])


@pytest.mark.parametrize("name, index", CASES)
def test_repeats_are_equal_bit_for_bit_and_inputs_stay(name, index, device):
    spec = SPECS[name]
    inputs = spec.inputs(spec.cases[index], torch.float32, device)
    before = {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}
    dy = torch.randn_like(evaluate(spec, inputs, None, "eager")["y"])
    first, second = (evaluate(spec, inputs, dy, "triton") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(before[k], inputs[k]) for k in before)


@pytest.mark.parametrize("name, index", CASES)
def test_every_element_is_written(name, index, device, monkeypatch):
    """Fresh memory full of NaN: an element that no program writes shows up."""
    empty, empty_like = torch.empty, torch.empty_like

    def poison(t):
        return t.fill_(float("nan")) if t.is_floating_point() else t

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
    spec = SPECS[name]
    _assert_proved(prove(spec, spec.cases[index], torch.float32, device))


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


def test_expanded_inputs_and_gradients(device):
    """Stride 0: what `.sum()` sends backward and what a broadcast row is."""
    w = torch.randn(8, device=device, requires_grad=True)
    row = torch.randn(8, device=device, requires_grad=True)
    qkv_row = torch.randn(1, 1, 3 * 2 * 8, device=device, requires_grad=True)
    for fn, leaves in (
        (lambda: layer_norm(row.expand(5, 8), w) + torch.arange(8, device=device), (row, w)),
        (lambda: bias_gelu(row.expand(5, 8), w), (row, w)),
        (lambda: causal_attention(qkv_row.expand(2, 9, -1), 2), (qkv_row,)),
    ):
        results = []
        for backend in ("triton", "eager"):
            with use_backend(backend):
                results.append(torch.autograd.grad(fn().sum(), leaves))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


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
    for backend in ("triton", "eager"):
        qkv = torch.randn(B, T, 24, device=device, requires_grad=True)
        with use_backend(backend):
            y = causal_attention(qkv, 2)
            y.sum().backward()
        assert y.shape == (B, T, 8) and qkv.grad.shape == qkv.shape


def test_float32_weights_beside_float16_activations(device):
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


def _op_calls(device):
    """The forward and backward op of each kernel with arguments: what opcheck is run on."""
    x = torch.randn(5, 24, device=device, requires_grad=True)
    w = torch.randn(24, device=device, requires_grad=True)
    qkv = torch.randn(2, 5, 24, device=device, requires_grad=True)
    seed = torch.tensor(7, device=device)
    ops = torch.ops.gpt2
    y, mean, rstd = ops.layer_norm_fwd(x, w, w, 1e-5)
    o, lse = ops.attention_fwd(qkv, seed, 2, 0.1, 0.5)
    inert = [t.detach() for t in (y, x, w, mean, rstd)]
    return {
        "layer_norm_fwd": (x, w, w.detach().clone().requires_grad_(), 1e-5),
        "layer_norm_bwd": tuple(inert),
        "bias_gelu_fwd": (x, w, "tanh"),
        "bias_gelu_bwd": (y.detach(), x.detach(), w.detach(), "none"),
        "attention_fwd": (qkv, seed, 2, 0.1, 0.5),
        "attention_bwd": (o.detach(), qkv.detach(), o.detach(), lse.detach(), seed, 2, 0.1, 0.5),
    }


OP_NAMES = ["layer_norm_fwd", "layer_norm_bwd", "bias_gelu_fwd", "bias_gelu_bwd", "attention_fwd", "attention_bwd"]


def test_every_registered_op_is_checked():
    from torch._C import _dispatch_get_registrations_for_dispatch_key as registrations

    registered = {
        name.split("::")[1] for name in registrations("CUDA") + registrations("") if name.startswith("gpt2::")
    }
    registered |= {name for name in dir(torch.ops.gpt2) if name.endswith(("_fwd", "_bwd"))}
    assert registered == set(OP_NAMES)


@pytest.mark.parametrize("op", OP_NAMES)
def test_opcheck(op, device):
    torch.library.opcheck(getattr(torch.ops.gpt2, op), _op_calls(device)[op])


@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_a_graph_break(name, device):
    spec = SPECS[name]
    for case in (spec.cases[1], spec.cases[-1]):
        inputs = spec.inputs(case, torch.float32, device)
        dy = torch.randn_like(evaluate(spec, inputs, None, "eager")["y"])
        expected = evaluate(spec, inputs, dy, "triton")
        torch.compiler.reset()
        compiled = torch.compile(spec.fn, fullgraph=True, backend="aot_eager")
        got = evaluate(spec, inputs, dy, "triton", compiled)
        assert all(torch.equal(got[k], expected[k]) for k in expected)


@pytest.mark.parametrize("name", NAMES)
def test_same_gradients_under_activation_checkpointing(name, device):
    from torch.utils.checkpoint import checkpoint

    spec, case = SPECS[name], SPECS[name].cases[-1]
    inputs = spec.inputs(case, torch.float32, device)
    dy = torch.randn_like(evaluate(spec, inputs, None, "eager")["y"])
    expected = evaluate(spec, inputs, dy, "triton")
    got = evaluate(spec, inputs, dy, "triton", lambda **kw: checkpoint(spec.fn, use_reentrant=False, **kw))
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_unseeded_dropout_is_recomputed_with_the_same_mask(device):
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

    def times_thirty(case, randn):
        return spec.make_inputs(case, lambda *shape: 30 * randn(*shape))

    large = dataclasses.replace(spec, make_inputs=times_thirty)
    _assert_proved(prove(large, {"B": 1, "H": 2, "T": 90, "D": 32}, torch.float32, device))


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


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_fraction(p):
    keep = attention_dropout_mask(2, 3, 200, p, seed=11)
    assert abs(keep.float().mean().item() - (1 - p)) < 0.005
    # neighbours, rows, heads and batches are independent: no axis has a constant pattern
    for dim in range(4):
        a, b = keep.unbind(dim)[:2]
        assert abs((a & b).float().mean().item() - (1 - p) ** 2) < 0.03


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
        (lambda: bias_gelu(torch.zeros(2, 3), torch.zeros(4)), r"got \(4,\)"),
        (lambda: bias_gelu(torch.zeros(2, 3), approximate="erf"), "approximate"),
    ],
)
def test_wrong_arguments_are_refused_in_words(call, words):
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
    import kernels.layer_norm as module

    calls = []
    monkeypatch.setattr(module, "layer_norm_fwd", lambda x, *rest: calls.append(x) or (x,))
    layer_norm(torch.ones(2, 3, device="cuda"), torch.ones(3, device="cuda"))
    assert len(calls) == 1
