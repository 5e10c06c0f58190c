"""Attention: how its tiles are read and its documents are found. test_kernels.py proves its numbers."""

import importlib

import pytest
import torch

from kernels import causal_attention, causal_attention_qkv, document_bounds, use_backend
from kernels._compile import launches
from kernels._launch import record_launches
from kernels._proof import prove_family
from kernels._registry import all_specs
from kernels._triton import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs triton, which is published for Linux")

SPECS = all_specs()


@pytest.mark.parametrize(
    "family", ["memory", *(pytest.param(name, marks=pytest.mark.slow) for name in ("layouts", "repeats"))]
)
@pytest.mark.parametrize("name", ["causal_attention", pytest.param("causal_attention_qkv", marks=pytest.mark.slow)])
def test_every_family_of_attention_by_descriptors(name, family, device):
    """Float32 is read through pointers. Far addresses and other numbers in half precision: test_kernels.py."""
    spec = SPECS[name]
    for case in spec.cases if family == "repeats" else spec.cases[:2]:
        for row in prove_family(family, spec, case, torch.float16, device):
            assert row.passed, row


def _descriptors(qkv, n_head, arch=90):
    """Of each launch, forward and backward, whether it reads by tensor descriptors."""
    with record_launches(arch) as recorded, use_backend("triton"):
        y = causal_attention(qkv.requires_grad_(), n_head)
        torch.autograd.grad(y, qkv, torch.ones_like(y.detach()))
    return [launch.meta["META"].DESCRIPTORS for launch in recorded]


def test_descriptors_are_used_where_the_tensor_allows_it():
    half = torch.zeros(2, 40, 3 * 2 * 24, dtype=torch.half)
    assert _descriptors(half, 2) == [True] * 3
    assert _descriptors(half, 2, arch=80) == [False] * 3
    assert _descriptors(half.float(), 2) == [False] * 3
    assert _descriptors(half[..., :72], 2) == [False] * 3  # heads of 12, 24 bytes
    assert _descriptors(torch.zeros(half.numel() + 1, dtype=torch.half)[1:].view(half.shape), 2) == [False] * 3
    assert _descriptors(half.mT.contiguous().mT, 2) == _descriptors(half[:, :1].expand(-1, 40, -1), 2) == [False] * 3


def test_descriptors_span_less_than_2_gib_on_sm_100():
    """Because of what Triton's launcher gets wrong there."""
    takes = importlib.import_module("kernels.attention")._takes_descriptor
    near, far = (
        torch.empty_strided((1, 200, 2, 24), (8, step, 24, 1), dtype=torch.half, device="meta")
        for step in (5_000_000, 6_000_000)
    )
    assert [takes(near, 90), takes(far, 90), takes(near, 100), takes(far, 100)] == [True, True, True, False]


def test_both_ways_of_reading_give_the_same_bits(device):
    wide = torch.randn(2, 150, 3 * 2 * 40, dtype=torch.half, device=device, requires_grad=True)
    module = importlib.import_module("kernels.attention")
    tiles = {name: module.Tile(64, 64, 4, 2, 1) for name in ("attention_fwd", "attention_dq", "attention_dkv")}
    dy = torch.randn(2, 150, 80, dtype=torch.half, device=device)
    results = []
    for descriptors in (1, 0):
        chosen = {name: tile._replace(DESCRIPTORS=descriptors) for name, tile in tiles.items()}
        with pytest.MonkeyPatch.context() as patch, use_backend("triton"):
            patch.setattr(module, "_default_tiles", lambda *args, chosen=chosen, **key: chosen)
            y = causal_attention(wide, 2)
            results.append((y, *torch.autograd.grad(y, wide, dy)))
    assert all(map(torch.equal, *results))


def test_three_tensors_give_the_bits_of_one(device):
    """Also where q and k are no views of it, and where heads come before positions, as many have them."""
    qkv = torch.randn(2, 70, 3, 2, 24, dtype=torch.half, device=device, requires_grad=True)
    dy = torch.randn(2, 70, 2, 24, dtype=torch.half, device=device)
    with use_backend("triton"):
        y = causal_attention(qkv.flatten(2), 2, dropout_p=0.3, seed=5).view(dy.shape)
        (dqkv,) = torch.autograd.grad(y, qkv, dy)
        for layout in (lambda t: t, lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)):
            q, k, v = (layout(t).detach().requires_grad_() for t in qkv.unbind(2))
            with record_launches() as recorded:
                causal_attention_qkv(q, k, v)
            assert all(launch.meta["META"].DESCRIPTORS for launch in recorded)
            o = causal_attention_qkv(q, k, v, dropout_p=0.3, seed=5)
            gradients = torch.autograd.grad(o, (q, k, v), dy)
            assert o.equal(y) and torch.stack(gradients, 2).equal(dqkv)


@pytest.mark.parametrize("dtype", [torch.half, torch.float32], ids=str)
def test_a_sequence_of_nan_spoils_no_other(dtype, device):
    """The tile past the end of a sequence is the beginning of the next one in memory."""
    qkv = torch.randn(3, 70, 48, dtype=dtype, device=device)
    dy = torch.randn(3, 70, 16, dtype=dtype, device=device)
    qkv[1] = float("nan")
    qkv.requires_grad_()
    with use_backend("triton"):
        y = causal_attention(qkv, 1)
        (gradient,) = torch.autograd.grad(y, qkv, dy)
    for got in (y, gradient):
        assert got[[0, 2]].isfinite().all() and got[1].isnan().all()


def test_document_bounds(device):
    documents = torch.tensor([[3, 3, 5, 5, 5], [1, 0, 0, 0, 1]], device=device)
    bounds = document_bounds(documents)
    assert bounds.tolist() == [[[0, 0, 2, 2, 2], [2, 2, 5, 5, 5]], [[0, 1, 1, 1, 4], [1, 4, 4, 4, 5]]]
    qkv = torch.randn(2, 5, 24, device=device)
    for backend in ("triton", "eager"):
        with use_backend(backend):
            y = causal_attention(qkv, 2, documents=documents)
            for same in (bounds, bounds.long(), bounds.mT.contiguous().mT):
                assert causal_attention(qkv, 2, documents=same).equal(y)
            one = bounds[:1].expand(2, 2, 5)
            assert causal_attention(qkv, 2, documents=one).equal(causal_attention(qkv, 2, documents=one.clone()))


@pytest.mark.parametrize("name", ["causal_attention", "causal_attention_qkv"])
def test_kernels_for_documents_are_compiled_before_their_first_use(name, monkeypatch):
    asked = []
    monkeypatch.setattr(
        importlib.import_module("kernels.attention"), "use_triton", lambda *_, **widths: asked.append(widths)
    )
    spec = SPECS[name]
    for documents in (0, 3):
        case = {"B": 1, "H": 2, "T": 5, "D": 8, "documents": documents}
        spec.fn(**spec.inputs(case, torch.float32, torch.device("cpu")))
    monkeypatch.undo()
    for widths, wanted in zip(asked, (False, True), strict=True):
        recorded = launches(spec, [{**spec.bench_cases[0], **widths}], torch.float16, 90)
        assert [launch.meta["META"].DOCUMENTS for launch in recorded] == [wanted] * len(recorded) != []


def test_attention_follows_pytorchs_float32_setting_by_either_name():
    """Once it was made by the newer name, torch.get_float32_matmul_precision() raises."""

    def precision() -> str:
        with record_launches(90) as recorded, use_backend("triton"):
            causal_attention(torch.zeros(1, 4, 48), 1)
        return recorded[0].meta["META"].PRECISION

    assert precision() == "ieee"
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert precision() == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert precision() == "ieee"
        torch.set_float32_matmul_precision("high")
        assert precision() == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
