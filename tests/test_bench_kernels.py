"""Benchmarks of the kernels: who is timed, on what, against which roofs; and that nothing wrong is."""

import dataclasses
import itertools
import json
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch._functorch import config as autograd_config

from bench import kernels, peers, roofline, timing
from bench.record import CONTROL, Report
from bench.roofline import Roofs
from kernels import _proof, _tables
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON

CPU = torch.device("cpu")
ROOFS = Roofs({2**10: 1e-6, 2**20: 1e-4}, {"float32": 1e9})
SMALL = {
    **{key: {"M": 4, "N": 8} for key in ("add_layer_norm", "bias_gelu", "layer_norm")},
    **{key: {"B": 2, "H": 2, "T": 16, "D": 8} for key in ("causal_attention", "causal_attention_qkv")},
    "cross_entropy": {"M": 6, "V": 30, "ignored": 0.3},
    "decode_attention": {"B": 3, "H": 2, "S": 12, "D": 8, "full": True},
    "embedding": {"B": 2, "T": 3, "V": 5, "C": 8},
    "linear_cross_entropy": {"M": 6, "C": 8, "V": 30},
}


# --- roofs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, seconds",
    [(2**10, 1e-6), (2**20, 1e-4), (2**15, 1e-5), (1, 1e-6), (2**22, 4e-4)],
    ids=["measured", "measured too", "between: the geometric mean of both", "below", "above: in proportion"],
)
def test_copy_floor_of_any_size(size, seconds):
    assert ROOFS.floor(size, 0, torch.float32) == pytest.approx(seconds)


def test_higher_floor_counts():
    assert ROOFS.floor(2**10, 1e6, torch.float32) == pytest.approx(1e-3)
    assert ROOFS.floor(2**10, 1e6, torch.float16) == 1e-6  # whose product was not measured


def test_roofs_are_json_serialisable():
    roofs = dataclasses.replace(ROOFS, float32="high")
    data = json.loads(json.dumps(roofs.as_dict()))
    assert data == {"copy": {"1024": 1e-6, "1048576": 1e-4}, "flops": {"float32": 1e9}, "float32": "high"}


def test_roofs_are_the_best_samples(monkeypatch):
    took = {"65536": (3e-6, 2e-6), "262144": (9e-6, 1e-6), "1048576": (4e-6, 5e-6)}

    def measure(makers, device, clock, *, seconds):
        assert clock == "wall" and all(callable(maker()) for maker in makers.values())
        return timing.Measured(clock, {name: took.get(name, (0.5, 0.25)) for name in [*makers, CONTROL]})

    monkeypatch.setattr(roofline.timing, "measure", measure)
    monkeypatch.setattr(roofline, "_LARGEST_COPY", {"cpu": 2**20})
    monkeypatch.setattr(roofline, "_SIDES", {"cpu": (4, 8)})
    roofs = roofline.measure(CPU, [torch.float32, torch.float16])
    assert roofs.copy == {2**16: 1e-6, 2**18: 1e-6, 2**20: 4e-6}  # a small copy is no slower than a larger one
    assert roofs.flops == {"float32": 2 * 4**3 / 0.25, "float16": 2 * 4**3 / 0.25}  # 8 would take too long


def test_copy_reads_half_and_writes_half():
    call = roofline._copy(2**16, CPU)()
    target = call()
    assert 2 * target.numel() * target.itemsize == 2**16 and target.std() > 0.5


# --- peers -----------------------------------------------------------------------------------------------------------


def _inputs(op, dtype=torch.float32, **case):
    spec = all_specs()[op]
    return spec, spec.inputs({**SMALL[op], **case}, dtype, CPU)


def _disagreement(spec, fn, inputs, gradients=True):
    exact = {k: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in inputs.items()}
    incoming = _proof.incoming_gradients(spec, exact, seed=1) if gradients else None
    return peers.disagreement(spec, fn, inputs, incoming, _proof.evaluate(spec, exact, incoming, "eager"))


def test_peers_are_named_without_their_packages():
    assert {peer.op for peer in peers.PEERS} <= set(all_specs())
    assert peers.known_providers("layer_norm") == ["triton", "untuned", "eager", "compile", "liger", "fla"]
    assert peers.known_providers("bias_gelu") == ["triton", "untuned", "eager", "compile"]
    assert len(set(peers.known_providers())) == len(peers.known_providers()) > 12
    assert {(p.op, p.provider) for p in peers.PEERS} >= peers.OVERWRITES


def test_missing_providers_are_named_with_the_reason(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)  # not installed
    monkeypatch.setattr(peers, "INTERPRET", True)
    missing = {}
    found = peers.providers(all_specs()["layer_norm"], torch.device("cuda"), missing)
    assert "liger" not in found and {"eager", "compile"} <= set(found)
    assert missing["liger"].startswith("needs liger-kernel (pip install liger-kernel): ModuleNotFoundError")
    assert missing["triton"] == "its kernels would be interpreted"
    missing = {"cce": "said before"}
    found = peers.providers(all_specs()["linear_cross_entropy"], CPU, missing, ["eager", "cce", "fla"])
    assert list(found) == ["eager"]
    assert missing == {"cce": "said before", "fla": "needs a CUDA device"}  # and not a word of those not asked for


def test_triton_is_a_provider_where_it_compiles(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    monkeypatch.setattr(peers, "INTERPRET", False)
    monkeypatch.setattr(peers, "device_problem", lambda kind, index: None)
    assert next(iter(peers.providers(all_specs()["bias_gelu"], CPU, {}))) == "triton"
    monkeypatch.setattr(peers, "device_problem", lambda kind, index: "too old")
    missing = {}
    assert "triton" not in peers.providers(all_specs()["bias_gelu"], CPU, missing) and missing["triton"] == "too old"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("provider", ["sdpa_flash", "sdpa_math", "flex"])
def test_pytorch_attention_agrees(provider, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda fn, **options: fn)
    spec, inputs = _inputs("causal_attention")
    fn = next(peer for peer in peers.PEERS if peer.provider == provider).make()
    assert _disagreement(spec, fn, inputs, gradients=provider != "flex") == ""  # which has none on a CPU


def test_pytorch_decoding_agrees():
    makers = {peer.provider: peer.make for peer in peers.PEERS if peer.op == "decode_attention"}
    spec, inputs = _inputs("decode_attention")
    assert {name: _disagreement(spec, make(), inputs) for name, make in makers.items()} == {"sdpa": "", "sdpa_full": ""}
    inputs["lengths"] -= torch.tensor([0, 3, 11])
    found = {name: _disagreement(spec, make(), inputs) for name, make in makers.items()}
    assert found["sdpa"] == "" and found["sdpa_full"].startswith("computes something else: y is off by")


@pytest.mark.parametrize("provider", ["linear_ce", "linear_ce_chunked"])
def test_pytorch_linear_cross_entropy_agrees(provider):
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("needs F.linear_cross_entropy, which PyTorch has from 2.13 on")
    spec, inputs = _inputs("linear_cross_entropy")
    fn = next(peer for peer in peers.PEERS if peer.provider == provider).make()
    assert _disagreement(spec, fn, inputs) == ""


@pytest.mark.slow
def test_auto_chunker_agrees():
    spec, inputs = _inputs("linear_cross_entropy")
    fn = next(peer for peer in peers.PEERS if peer.provider == "compile_chunked").make()
    assert _disagreement(spec, fn, inputs) == ""


def test_packed_attention_agrees(monkeypatch):
    """By a stand-in: PyTorch's own runs on a GPU alone."""

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        assert cu_seq_q.dtype == torch.int32 and cu_seq_q.equal(cu_seq_k) and max_q == max_k and window_size == (-1, 0)
        parts = []
        for start, stop in itertools.pairwise(cu_seq_q.tolist()):
            q, k, v = (x[start:stop].transpose(0, 1) for x in (query, key, value))
            parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen_attn))
    spec, inputs = _inputs("causal_attention")
    fn = next(peer for peer in peers.PEERS if peer.provider == "varlen").make()
    assert _disagreement(spec, fn, inputs) == ""


def _package(monkeypatch, name, **contents):
    """A package that is not installed: the names that are taken from it, with its own signatures."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(contents)


def _fake_packages(monkeypatch):
    def liger_layer_norm(X, W, B, eps):
        return F.layer_norm(X, W.shape, W, B, eps)

    def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100):
        return F.cross_entropy(input, target, weight, ignore_index=ignore_index)

    def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None, ignore_index=-100):
        return F.cross_entropy(F.linear(input, weight, bias), target, ce_weight, ignore_index=ignore_index)

    def linear_cross_entropy(
        e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
    ):
        assert (softcap, reduction, shift, impl) == (None, "mean", False, "cce") and filter_eps in ("high", None)
        return F.cross_entropy(e @ c.mT, targets, ignore_index=ignore_index)

    def layer_norm(x, weight, bias, residual=None, eps=1e-5, prenorm=False, residual_in_fp32=False, is_rms_norm=False):
        h = x if residual is None else x + residual
        y = F.layer_norm(h, weight.shape, weight, bias, eps)
        return (y, h) if prenorm else y

    class FusedCrossEntropyLoss:
        def __call__(self, input, target):
            return F.cross_entropy(input, target)

    class FusedLinearCrossEntropyLoss:
        def __call__(self, x, target, weight, bias=None):
            return F.cross_entropy(F.linear(x, weight, bias), target)

    def parallel_attn(q, k, v, g=None, scale=None):  # each (B, T, H, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    def flash_attn_3(q, k, v, softmax_scale=None, causal=False):
        assert causal
        return parallel_attn(q, k, v, scale=softmax_scale)

    def flash_attn_4(q, k, v, softmax_scale=None, causal=False):
        return flash_attn_3(q, k, v, softmax_scale, causal), None

    def quack_cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean"):
        return F.cross_entropy(x, target, weight, ignore_index=ignore_index, reduction=reduction)

    _package(monkeypatch, "flash_attn_interface", flash_attn_func=flash_attn_3)
    _package(monkeypatch, "flash_attn.cute", flash_attn_func=flash_attn_4)
    _package(monkeypatch, "quack.cross_entropy", cross_entropy=quack_cross_entropy)
    liger = (liger_layer_norm, liger_cross_entropy, liger_fused_linear_cross_entropy)
    _package(monkeypatch, "quack.linear_cross_entropy", chunked_linear_cross_entropy=liger[-1])  # called alike
    _package(monkeypatch, "liger_kernel.transformers.functional", **{fn.__name__: fn for fn in liger})
    _package(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)
    _package(monkeypatch, "fla.ops.attn", parallel_attn=parallel_attn)
    losses = (FusedCrossEntropyLoss, FusedLinearCrossEntropyLoss)
    _package(monkeypatch, "fla.modules", **{loss.__name__: loss for loss in losses})
    monkeypatch.setitem(sys.modules, "fla.modules.layernorm", types.ModuleType("fla.modules.layernorm"))
    sys.modules["fla.modules.layernorm"].layer_norm = layer_norm


@pytest.mark.parametrize("peer", [p for p in peers.PEERS if p.package != "torch"], ids=lambda p: f"{p.provider}-{p.op}")
def test_packages_are_called_by_their_signatures(peer, monkeypatch):
    _fake_packages(monkeypatch)
    spec, inputs = _inputs(peer.op)
    assert _disagreement(spec, peer.make(), inputs) == ""


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x, w, b: 1.01 * F.layer_norm(x, w.shape, w, b), "y is off by 0.01 of its norm"),
        (lambda x, w, b: F.layer_norm(x, w.shape, w, b) * float("nan"), "y is off by nan"),
        (lambda x, w, b: F.layer_norm(x, w.shape, w, b + b.detach()) - b, "dbias is off by 1 "),
        (lambda x, w, b: F.layer_norm(x, w.shape, 2 * w - w.detach(), b), "dweight is off by 1 "),
    ],
    ids=["output", "nan", "no gradient", "a wrong gradient"],
)
def test_wrong_function_is_refused(wrong, words):
    spec, inputs = _inputs("layer_norm")
    said = _disagreement(spec, lambda x, weight, bias: wrong(x, weight, bias), inputs)
    assert said.startswith("computes something else: ") and words in said


def test_wrong_shape_is_refused():
    spec, inputs = _inputs("layer_norm")
    said = _disagreement(spec, lambda x, weight, bias: x[:2], inputs, gradients=False)
    assert said == "computes something else: y is (2, 8), not (4, 8)"


def test_half_precision_rounding_is_accepted():
    for op in ("layer_norm", "bias_gelu", "linear_cross_entropy"):
        for dtype in (torch.float16, torch.bfloat16):
            spec, inputs = _inputs(op, dtype)
            assert _disagreement(spec, spec.fn, inputs) == ""


# --- cases -----------------------------------------------------------------------------------------------------------


def test_gpu_cases_are_the_bench_cases():
    for spec in all_specs().values():
        assert kernels.cases(spec, torch.device("cuda")) == list(spec.bench_cases)


def test_cpu_cases_are_small():
    for spec in all_specs().values():
        cut = kernels.cases(spec, CPU)
        assert cut and all(sum(spec.flops(case)) <= 2**34 for case in cut)
        assert all(case not in cut[:i] for i, case in enumerate(cut))
    specs = all_specs()
    assert kernels.cases(specs["layer_norm"], CPU)[0] == {"M": 1024, "N": 768}
    assert [(c["B"], c["T"]) for c in kernels.cases(specs["causal_attention"], CPU)] == [(2, 512), (1, 1024)]
    assert [c["B"] for c in kernels.cases(specs["decode_attention"], CPU)] == [1, 8, 64]
    assert {c["V"] for c in kernels.cases(specs["linear_cross_entropy"], CPU)} == {50304, 50257}


def test_cases_that_become_equal_are_timed_once():
    spec = dataclasses.replace(all_specs()["layer_norm"], bench_cases=tuple({"M": M, "N": 8} for M in (64, 127, 128)))
    assert kernels.cases(spec, CPU) == [{"M": 1, "N": 8}, {"M": 2, "N": 8}]


def test_untuned_is_timed_beside_a_table_by_default_options_alone(monkeypatch):
    """Forward and backward, in the call that is timed."""
    spec, seen, missing = all_specs()["bias_gelu"], [], {}
    monkeypatch.setattr(peers, "INTERPRET", False)
    monkeypatch.setattr(peers, "device_problem", lambda *args: None)
    assert "untuned" not in peers.providers(spec, CPU, missing) and not missing
    assert "untuned" not in peers.providers(spec, CPU, missing, ["untuned"]) and "tune" in missing["untuned"]
    monkeypatch.setattr(peers, "launch_tables", lambda device: "0123456789ab")
    assert [*peers.providers(spec, CPU, {})][:2] == ["triton", "untuned"]
    monkeypatch.setattr(
        kernels, "make_call", lambda *args, **options: lambda: seen.append(_tables._override is not None)
    )
    case = kernels._Case(spec, {"M": 3, "N": 4}, torch.float32, CPU, {}, None, 0.1)
    for name in ("triton", "untuned"):
        case._maker(name, spec.fn, "both")()()
    assert seen == [False, True] and _tables._override is None


def test_case_text_has_no_reason():
    assert kernels.case_text({"M": 3, "N": 4, "why": "ragged"}) == "M=3 N=4"


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """The operators on one small case each that needs no cutting; a clock and a memory that answer at once."""
    specs = {
        name: dataclasses.replace(spec, cases=(SMALL[name],), bench_cases=(SMALL[name],))
        for name, spec in all_specs().items()
    }
    monkeypatch.setattr(kernels, "all_specs", lambda: specs)
    monkeypatch.setattr(kernels, "cpu_case", lambda spec, case: case)
    makers = []

    def peak(call, device):
        result = call()
        return 2**20 * (1 if isinstance(result, torch.Tensor) else 2)

    def measure(given, device, clock, *, seconds):
        makers.append(given)
        measured = timing.Measured(clock)
        for name, maker in given.items():
            try:
                maker()()
                measured.seconds[name] = (1e-3, 2e-3, 4e-3)
            except Exception as error:
                measured.failed[name] = timing.error_line(error)
        measured.seconds[CONTROL] = (1e-3,)
        return measured

    monkeypatch.setattr(kernels.timing, "measure", measure)
    monkeypatch.setattr(kernels.memory, "peak", peak)
    monkeypatch.setattr(kernels.memory, "free_bytes", lambda device: 0)  # whose garbage collection takes seconds in all
    return types.SimpleNamespace(specs=specs, makers=makers)


def _run(*op, dtypes=("float32",), providers=("eager",), modes=kernels.MODES, part=slice(None), gate=None):
    command = kernels.Kernels(op=op, dtype=dtypes, provider=tuple(providers), mode=tuple(modes), seconds=0.0)
    return list(command.run(CPU, Report({}, {}, ""), ROOFS, part=part, gate=gate))


def test_case_has_a_group_per_mode(small):
    groups = _run("causal_attention")
    assert [group[0].group for group in groups] == [
        f"causal_attention B=2 H=2 T=16 D=8 float32 {mode} wall" for mode in ("forward", "backward", "both")
    ]
    btc, product = 2 * 16 * 2 * 8 * 4, 2 * 2 * 16**2 * 8
    for group, moved, work in zip(groups, (4, 8, 12), (2, 5, 7), strict=True):
        row, control = group
        assert (row.kind, row.provider, control.provider) == ("kernels", "eager", CONTROL)
        assert list(row.params) == ["op", "case", "dtype", "mode"] and control.metrics == {}
        assert (row.metrics["bytes"], row.metrics["flops"]) == (moved * btc, work * product)
        assert row.metrics["gb_per_s"] == pytest.approx(moved * btc / 2e-3 / 1e9)
        assert row.metrics["tflop_per_s"] == pytest.approx(work * product / 2e-3 / 1e12)
        floor = ROOFS.floor(moved * btc, work * product, torch.float32)
        assert row.metrics["floor_ms"] == pytest.approx(floor * 1e3)
        assert row.metrics["floor"] == pytest.approx(floor / 2e-3)
    forward, backward, both = (group[0].metrics for group in groups)
    assert (forward["peak_mib"], both["peak_mib"]) == (1.0, 2.0) and "peak_mib" not in backward


def test_modes_and_operators_can_be_chosen(small, monkeypatch):
    assert [group[0].params["mode"] for group in _run("layer_norm", modes=("both", "forward"))] == ["forward", "both"]
    assert [group[0].params["mode"] for group in _run("decode_attention")] == ["forward"]  # which has no gradients
    assert "tflop_per_s" not in _run("layer_norm", modes=["forward"])[0][0].metrics
    every = _run(modes=["forward"])
    assert [group[0].params["op"] for group in every] == list(small.specs)
    unused = dataclasses.replace(
        small.specs["layer_norm"], make_inputs=lambda case, draw: pytest.fail("drawn for none")
    )
    monkeypatch.setitem(small.specs, "layer_norm", unused)
    assert _run("layer_norm", providers=["sdpa"]) == []


def test_part_of_the_cases(small):
    spec = dataclasses.replace(small.specs["layer_norm"], bench_cases=tuple({"M": 4, "N": n} for n in (8, 9, 10)))
    small.specs["layer_norm"] = spec
    quick, rest = (
        [group[0].params["case"] for group in _run("layer_norm", modes=["forward"], **options)]
        for options in ({"part": slice(1)}, {"part": slice(1, None)})
    )
    assert (quick, rest) == (["M=4 N=8"], ["M=4 N=9", "M=4 N=10"])


def test_modes_compute_what_they_say(small):
    _run("layer_norm")
    forward, backward, both = (makers["eager"]() for makers in small.makers)
    y = forward()
    assert y.shape == (4, 8) and not y.requires_grad
    first, again, whole = backward(), backward(), both()
    assert [g.shape for g in first] == [(4, 8), (8,), (8,)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, whole, strict=True))
    assert first[2].std() > 0.1  # random numbers came in, not ones


def test_incoming_gradient_of_a_loss_is_one(small):
    _run("cross_entropy", modes=["backward"])
    (gradient,) = small.makers[0]["eager"]()()
    inputs = small.specs["cross_entropy"].inputs(SMALL["cross_entropy"], torch.float32, CPU)
    logits = inputs["logits"].requires_grad_()
    F.cross_entropy(logits, inputs["targets"]).backward()
    torch.testing.assert_close(gradient, logits.grad)


def test_backward_is_timed_without_forward(small, monkeypatch):
    calls = []
    monkeypatch.setattr(peers, "PEERS", (_peer("layer_norm", "fla", lambda **given: calls.append(1) or _eager(given)),))
    _run("layer_norm", modes=["backward"], providers=["fla"])
    call, before = small.makers[0]["fla"](), len(calls)
    call(), call()
    assert len(calls) == before


def test_forward_records_no_graph(small, monkeypatch):
    recording = []

    def fn(**given):
        recording.append(torch.is_grad_enabled())
        return _eager(given)

    monkeypatch.setattr(peers, "PEERS", (_peer("layer_norm", "fla", fn),))
    _run("layer_norm", modes=["forward"], providers=["fla"])
    recording.clear()
    small.makers[0]["fla"]()()
    assert recording == [False]


def _eager(given):
    weight = given["weight"]
    return F.layer_norm(given["x"], weight.shape, weight, given["bias"])


def _peer(op, provider, fn):
    return peers.Peer(op, provider, "torch", False, lambda: fn)


def test_overwriting_peer_gets_copies(small, monkeypatch):
    seen = []

    def overwrites(logits, targets):
        loss = F.cross_entropy(logits.clone(), targets)
        logits.data.zero_()
        return loss

    def looks(logits, targets):
        seen.append(logits.detach().clone())
        return F.cross_entropy(logits, targets)

    both = (_peer("cross_entropy", "liger", overwrites), _peer("cross_entropy", "fla", looks))
    monkeypatch.setattr(peers, "PEERS", both)
    groups = _run("cross_entropy", providers=["liger", "fla"])
    assert [[row.error for row in group] for group in groups] == [["", "", ""]] * 3
    assert all(torch.equal(logits, seen[0]) and logits.std() > 0.5 for logits in seen)


def test_wrong_peer_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (_peer("layer_norm", "fla", lambda **given: 1.01 * _eager(given)),))
    groups = _run("layer_norm", providers=["eager", "fla"])
    rows = [row for group in groups for row in group if row.provider == "fla"]
    assert [row.params["mode"] for row in rows] == ["forward"] and not rows[0].seconds
    assert rows[0].error.startswith("computes something else: y is off by 0.01")
    assert all("fla" not in makers and "eager" in makers for makers in small.makers)


def test_unchecked_peer_is_not_timed(small, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (_peer("layer_norm", "fla", lambda **given: _eager(given)),))
    real = _proof.evaluate

    def full(spec, inputs, incoming, backend, fn=None):
        if fn is None and incoming is not None:
            raise torch.OutOfMemoryError("16 GiB")
        return real(spec, inputs, incoming, backend, fn)

    monkeypatch.setattr(kernels._proof, "evaluate", full)
    groups = _run("layer_norm", providers=["eager", "fla"])
    timed = {(row.params["mode"], row.provider) for group in groups for row in group if row.seconds}
    assert {("forward", "fla"), ("both", "eager")} <= timed and ("both", "fla") not in timed
    errors = [row.error for group in groups for row in group if row.error]
    assert errors == ["not checked, eager in float32 gives no result: OutOfMemoryError: 16 GiB"]


def test_failure_is_reported_once(small, monkeypatch):
    def no_compiler(fn, **options):
        def fail(**inputs):
            raise RuntimeError("no compiler\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    groups = _run("layer_norm", providers=["eager", "compile"])
    errors = [(row.provider, row.params["mode"], row.error) for group in groups for row in group if row.error]
    assert errors == [("compile", "forward", "RuntimeError: no compiler")]
    assert [row.params["mode"] for group in groups for row in group if row.provider == "eager"] == list(kernels.MODES)
    (only,) = _run("layer_norm", providers=["compile"])
    assert [row.provider for row in only] == ["compile"]  # and no control of nothing


def test_peer_without_gradients_runs_forward(small, monkeypatch):
    def forward_only(x, weight, bias):
        if x.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("no backward")
        return F.layer_norm(x, weight.shape, weight, bias)

    monkeypatch.setattr(peers, "PEERS", (_peer("layer_norm", "fla", forward_only),))
    rows = [row for group in _run("layer_norm", providers=["fla"]) for row in group if row.provider == "fla"]
    assert [(row.params["mode"], row.error) for row in rows] == [
        ("forward", ""), ("backward", "NotImplementedError: no backward")
    ]  # fmt: skip


def test_each_mode_compiles_anew(small, monkeypatch):
    """What torch.compile may do to saved tensors is decided when it compiles, and would last into the next mode."""
    resets, donated = [], []
    measure = kernels.timing.measure

    def look(makers, device, clock, *, seconds):
        donated.append((len(resets), autograd_config.donated_buffer))
        return measure(makers, device, clock, seconds=seconds)

    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(1))
    monkeypatch.setattr(kernels.timing, "measure", look)
    _run("layer_norm")
    assert donated == [(1, True), (2, False), (3, True)]  # forward, backward, both


# --- the gate --------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_triton(monkeypatch):
    """As on a machine where Triton compiles; the kernels themselves run where they can."""
    monkeypatch.setattr(peers, "INTERPRET", False)
    monkeypatch.setattr(peers, "device_problem", lambda kind, index: None)


@pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")
@pytest.mark.interpreted
def test_proven_kernel_is_timed(small, with_triton):
    groups = _run("bias_gelu", providers=["triton", "eager"])
    assert [[row.provider for row in group] for group in groups] == [["triton", "eager", CONTROL]] * 3


def test_wrong_kernel_is_not_timed(small, with_triton, monkeypatch):
    failing = _proof.Comparison("bias_gelu", SMALL["bias_gelu"], torch.float32, "y", 1.0, 0.5)
    monkeypatch.setattr(kernels._proof, "prove", lambda *a, **k: iter([failing, failing]))
    first, *groups = _run("bias_gelu", providers=["triton", "eager"])
    assert [(row.provider, row.error) for row in first] == [
        ("triton", "not timed: 2 comparisons with float64 fail (python -m kernels check)")
    ]
    assert [[row.provider for row in group] for group in groups] == [["eager", CONTROL]] * 3


def test_gate_is_asked_once_per_dtype(small, with_triton, monkeypatch):
    asked = []

    def gate(spec, dtype):
        asked.append((spec.name, dtype))
        return "no"

    cases = tuple({"M": 4, "N": n} for n in (8, 9))
    small.specs["bias_gelu"] = dataclasses.replace(small.specs["bias_gelu"], bench_cases=cases)
    dtypes = ("float32", "float16")
    _run("bias_gelu", dtypes=dtypes, providers=["triton", "eager"], gate=gate)
    assert asked == [("bias_gelu", torch.float32), ("bias_gelu", torch.float16)]
    _run("bias_gelu", dtypes=dtypes, gate=gate)
    monkeypatch.setattr(peers, "INTERPRET", True)
    _run("bias_gelu", dtypes=dtypes, providers=["triton"], gate=gate)
    assert len(asked) == 2


def test_operator_has_time_and_memory():
    """The whole way once, by the real clock, on a small case."""
    spec = all_specs()["bias_gelu"]
    found = peers.providers(spec, CPU, {}, ["eager"])
    case = kernels._Case(spec, {"M": 64, "N": 512}, torch.float32, CPU, found, ROOFS, 0.0)
    ((eager, control),) = case.run(["both"])
    assert eager.clock == control.clock == "wall" and len(eager.seconds) == timing.MIN_ROUNDS and eager.ms() > 0
    assert 2 * 64 * 512 * 4 / 2**20 <= eager.metrics["peak_mib"] < 1
