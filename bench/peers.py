"""The other implementations of an operator: PyTorch, and packages that people install for it.

    untuned             our kernels by their default launch options, where this GPU has a table of its own
    eager, compile      PyTorch's operators through our functions; the same under torch.compile
    sdpa_*, sdpa, flex  PyTorch's attention by a backend of choice
    varlen              PyTorch's attention over packed sequences, here all of one length
    linear_ce, linear_ce_chunked    PyTorch's F.linear_cross_entropy (2.13), whole and in chunks
    compile_chunked     torch.compile with Inductor's auto-chunker
    liger, cce, fla     Liger-Kernel 0.8, Cut Cross-Entropy 25.1, Flash Linear Attention 0.5, where they are installed
    fa3, fa4, quack     FlashAttention 3 and 4, QuACK, where they are installed

A peer takes the operator's keyword arguments and returns what it returns, from tensors as a model has them: attention
goes from the packed projection to (B, T, C). Each is called as its documentation calls it, with its defaults.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import error_line
from kernels import _proof, use_backend
from kernels._backend import Backend, device_problem
from kernels._registry import KernelSpec
from kernels._tables import launch_tables
from kernels._triton import INTERPRET

Function = Callable[..., Any]
Tensors = Mapping[str, Tensor]

OWN = ("untuned", "trainer", "hf+patch")  # our kernels under other names
OURS = ("triton", "untuned", "eager", "compile")
NOTES = {
    "eager decode_attention": "on a GPU it cleans the whole cache, because it may not look at the lengths",
    "liger cross_entropy": "it writes the gradient into the logits, so that each call finds that of the one before",
    "cce": "its filter skips gradients near zero, of which random logits, as at the start of training, have few",
    "losses": "triton, liger, fla and linear_ce_chunked compute gradients of linear_cross_entropy in the forward pass, "
    "and so does liger those of cross_entropy: the backward pass only scales them, so that only both together compare",
}
# peers that write into their arguments: they get copies
OVERWRITES = {("cross_entropy", "liger")}
# ||got - truth|| / ||truth|| of every output and gradient; truth: eager in float32. The half dtypes' own rounding, sums
# in them and float16's smallest gradients stay below it, and TF32 in float32; another function does not.
BOUNDS = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}

AUTO_CHUNKER: dict[str, Any] = {"auto_chunker.enable": True}  # an option of Inductor's


@dataclass(frozen=True)
class Peer:
    """make: () -> the function; imports what it needs. package: pip's name for it, or words. cuda: it needs a GPU."""

    op: str
    provider: str
    package: str
    cuda: bool
    make: Callable[[], Function]


def _under(backend: Backend, fn: Function) -> Function:
    def call(**inputs: Any) -> Any:
        with use_backend(backend):
            return fn(**inputs)

    return call


def _heads(qkv: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """q, k, v: (B, H, T, D), strided views."""
    return tuple(x.unflatten(-1, (n_head, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))


def _sdpa(backend: SDPBackend) -> Function:
    def call(qkv: Tensor, n_head: int) -> Tensor:
        q, k, v = _heads(qkv, n_head)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    return call


def _flex() -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)

    @functools.cache
    def mask(T: int, device: torch.device) -> Any:
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=str(device))

    def call(qkv: Tensor, n_head: int) -> Tensor:
        q, k, v = _heads(qkv, n_head)
        return compiled(q, k, v, block_mask=mask(qkv.shape[1], qkv.device)).transpose(1, 2).flatten(2)

    return call


def _varlen() -> Function:
    from torch.nn.attention.varlen import varlen_attn

    def call(qkv: Tensor, n_head: int) -> Tensor:
        B, T, _ = qkv.shape
        q, k, v = qkv.flatten(0, 1).unflatten(-1, (3, n_head, -1)).unbind(1)  # each (B * T, H, D)
        starts = torch.arange(0, (B + 1) * T, T, device=qkv.device, dtype=torch.int32)
        y: Any = varlen_attn(q, k, v, starts, starts, T, T, window_size=(-1, 0))
        return y.flatten(1).unflatten(0, (B, T))

    return call


def _linear_ce(*, chunked: bool) -> Function:
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    theirs = F.linear_cross_entropy  # not in every PyTorch: looked up when the peer is made
    return lambda x, weight, targets: theirs(x, weight.to(x.dtype), targets, options=options)


def _whole_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight.to(x.dtype)).float(), targets)


def _auto_chunker() -> Function:
    return torch.compile(_whole_loss, dynamic=False, options=AUTO_CHUNKER)


def _decode_sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """The whole cache under a mask of the lengths; unlike our eager path it trusts what lies past them."""
    valid = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]  # (B, S)
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=valid[:, None, None])[:, :, 0]


def _decode_sdpa_full(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """No mask: right where every cache is full, and refused as another function where one is not."""
    return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache)[:, :, 0]


def _package(module: str, name: str, call: Callable[..., Any]) -> Callable[[], Function]:
    """A maker that imports a function, or makes an object of a class, and passes it to `call` with the inputs."""

    def make() -> Function:
        imported = getattr(importlib.import_module(module), name)
        return functools.partial(call, imported() if isinstance(imported, type) else imported)

    return make


def _liger(op: str, name: str, call: Callable[..., Any]) -> Peer:
    return Peer(op, "liger", "liger-kernel", True, _package("liger_kernel.transformers.functional", name, call))


def _cce(provider: str, **options: Any) -> Peer:
    call = lambda f, x, weight, targets: f(x, weight, targets, impl="cce", **options)  # noqa: E731
    make = _package("cut_cross_entropy", "linear_cross_entropy", call)
    return Peer("linear_cross_entropy", provider, "cut-cross-entropy", True, make)


def _fla(op: str, module: str, name: str, call: Callable[..., Any]) -> Peer:
    return Peer(op, "fla", "fla-core", True, _package(f"fla.{module}", name, call))


def _torch(op: str, provider: str, make: Callable[[], Function], *, cuda: bool = False) -> Peer:
    return Peer(op, provider, "torch", cuda, make)


def _fla_attention(f: Function, qkv: Tensor, n_head: int) -> Tensor:
    return f(*qkv.unflatten(-1, (3, n_head, -1)).unbind(2)).flatten(2)  # from (B, T, H, D) each


def _flash_attention(f: Function, qkv: Tensor, n_head: int) -> Tensor:
    y = f(*qkv.unflatten(-1, (3, n_head, -1)).unbind(2), causal=True)
    return (y[0] if isinstance(y, tuple) else y).flatten(2)  # some versions return the log-sum-exp too


def _fla_add_norm(
    f: Function, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor | None = None
) -> Any:
    return f(x if x_bias is None else x + x_bias, weight, bias, residual=residual, prenorm=True)


PEERS = (
    _torch("causal_attention", "sdpa_flash", lambda: _sdpa(SDPBackend.FLASH_ATTENTION)),
    _torch("causal_attention", "sdpa_cudnn", lambda: _sdpa(SDPBackend.CUDNN_ATTENTION), cuda=True),
    _torch("causal_attention", "sdpa_efficient", lambda: _sdpa(SDPBackend.EFFICIENT_ATTENTION), cuda=True),
    _torch("causal_attention", "sdpa_math", lambda: _sdpa(SDPBackend.MATH)),
    _torch("causal_attention", "flex", _flex),
    _torch("causal_attention", "varlen", _varlen, cuda=True),
    Peer(
        "causal_attention", "fa3", "FlashAttention 3, built from flash-attention/hopper", True,
        _package("flash_attn_interface", "flash_attn_func", _flash_attention),
    ),
    Peer(
        "causal_attention", "fa4", "flash-attn-4", True,
        _package("flash_attn.cute", "flash_attn_func", _flash_attention),
    ),
    _fla("causal_attention", "ops.attn", "parallel_attn", _fla_attention),
    _torch("decode_attention", "sdpa", lambda: _decode_sdpa),
    _torch("decode_attention", "sdpa_full", lambda: _decode_sdpa_full),
    _liger("layer_norm", "liger_layer_norm", lambda f, x, weight, bias: f(x, weight, bias, 1e-5)),
    _fla("layer_norm", "modules.layernorm", "layer_norm", lambda f, x, weight, bias: f(x, weight, bias)),
    _fla("add_layer_norm", "modules.layernorm", "layer_norm", _fla_add_norm),
    _liger("cross_entropy", "liger_cross_entropy", lambda f, logits, targets: f(logits, targets)),
    _fla("cross_entropy", "modules", "FusedCrossEntropyLoss", lambda f, logits, targets: f(logits, targets)),
    Peer(
        "cross_entropy", "quack", "quack-kernels", True,
        _package("quack.cross_entropy", "cross_entropy", lambda f, logits, targets: f(logits, targets)),
    ),
    _torch("linear_cross_entropy", "linear_ce", lambda: _linear_ce(chunked=False)),
    _torch("linear_cross_entropy", "linear_ce_chunked", lambda: _linear_ce(chunked=True)),
    _torch("linear_cross_entropy", "compile_chunked", _auto_chunker, cuda=True),
    _liger(
        "linear_cross_entropy", "liger_fused_linear_cross_entropy",
        lambda f, x, weight, targets: f(x, weight, targets),
    ),
    Peer(
        "linear_cross_entropy", "quack", "quack-kernels", True,
        _package(
            "quack.linear_cross_entropy", "chunked_linear_cross_entropy",
            lambda f, x, weight, targets: f(x, weight, targets),
        ),
    ),
    _cce("cce"),
    _cce("cce_exact", filter_eps=None),
    _fla(
        "linear_cross_entropy", "modules", "FusedLinearCrossEntropyLoss",
        lambda f, x, weight, targets: f(x, targets, weight),
    ),
)  # fmt: skip
# Those whose operator bench/train_step.py puts into a compiled step; the auto-chunker works on the whole step.
_IN_STEPS = ("varlen", "fa3", "fa4", "linear_ce", "linear_ce_chunked", "auto_chunker", "liger", "cce", "quack")
STEP_PEERS = {
    f"compile+{peer.provider}": peer
    for peer in (*PEERS, _torch("linear_cross_entropy", "auto_chunker", lambda: _whole_loss, cuda=True))
    if peer.provider in _IN_STEPS and peer.op in ("causal_attention", "linear_cross_entropy")
}


def known_providers(op: str | None = None) -> list[str]:
    """Names of all providers of an operator, or of any operator: known without an import."""
    return list(dict.fromkeys([*OURS, *(peer.provider for peer in PEERS if op in (None, peer.op))]))


def providers(
    spec: KernelSpec, device: torch.device, missing: dict[str, str], keep: Collection[str] = ()
) -> dict[str, Function]:
    """The functions that compute an operator here, by provider, of `keep` or of all; `missing` gets the others, and why
    not."""
    functions: dict[str, Function] = {}
    wanted = [name for name in known_providers(spec.name) if not keep or name in keep]
    if "triton" in wanted:
        if problem := "its kernels would be interpreted" if INTERPRET else device_problem(device.type, device.index):
            missing.setdefault("triton", problem)
        else:
            functions["triton"] = _under("triton", spec.fn)
    if "untuned" in wanted and ("triton" in functions or "untuned" in keep):
        if launch_tables(device) is not None:
            functions["untuned"] = _under("triton", spec.fn)  # bench/kernels.py sets the tables aside for it
        elif "untuned" in keep:
            missing.setdefault("untuned", "no launch table is in force: python -m kernels tune")
    eager = _proof.function(spec, "eager")
    if "eager" in wanted:
        functions["eager"] = _under("eager", eager)
    if "compile" in wanted:
        functions["compile"] = _under("eager", torch.compile(eager, dynamic=False))
    for peer in PEERS:
        if peer.op != spec.name or peer.provider not in wanted:
            continue
        fn, problem = load(peer, device)
        if fn is None:
            missing.setdefault(peer.provider, problem)
        else:
            functions[peer.provider] = fn
    return functions


def load(peer: Peer, device: torch.device) -> tuple[Function | None, str]:
    """A peer's function, or None and why it cannot run here."""
    if peer.cuda and device.type != "cuda":
        return None, "needs a CUDA device"
    try:
        return peer.make(), ""
    except Exception as error:  # a package can fail to import in any way
        command = "" if " " in peer.package else f" (pip install {peer.package})"
        return None, f"needs {peer.package}{command}: {error_line(error)}"


def disagreement(
    spec: KernelSpec, fn: Function, inputs: Mapping[str, Any], incoming: Tensors | None, truth: Tensors
) -> str:
    """Why a function is not the operator, or "". incoming: as in _proof.evaluate; truth: of eager in float32."""
    copies = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    bound = BOUNDS[next(x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point())]
    for name, got in _proof.evaluate(spec, copies, incoming, "eager", fn).items():
        if got.shape != truth[name].shape:
            return f"computes something else: {name} is {tuple(got.shape)}, not {tuple(truth[name].shape)}"
        error = ((got.float() - truth[name]).norm() / truth[name].norm()).item()
        if not error <= bound:  # so that NaN is wrong
            return f"computes something else: {name} is off by {error:.2g} of its norm, allowed is {bound:.2g}"
    return ""
