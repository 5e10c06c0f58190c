"""Who else computes an operator: PyTorch, and packages that people install for it.

    eager, compile      PyTorch's operators through our functions; the same under torch.compile
    sdpa_*, sdpa, flex  PyTorch's attention by a backend of choice
    liger, cce, fla     Liger-Kernel 0.8, Cut Cross-Entropy 25.1, Flash Linear Attention 0.5, where they are installed

A peer takes the keyword arguments of the operator and gives what it gives, from tensors as a model has them: attention
goes from the packed projection to (B, T, C). Each is called as its own documentation calls it, with its defaults.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.timing import why
from kernels import _proof, use_backend
from kernels._dispatch import Backend, device_problem
from kernels._registry import KernelSpec
from kernels._triton import INTERPRET

Function = Callable[..., Any]
Tensors = Mapping[str, Tensor]

OURS = ("triton", "eager", "compile")
NOTES = {
    "eager decode_attention": "on a GPU it cleans the whole cache, because it may not look at the lengths",
    "liger cross_entropy": "it writes the gradient into the logits, so that each call finds that of the one before",
    "cce": "its filter skips gradients near zero, of which random logits, as at the start of training, have few",
    "losses": "triton, liger and fla compute gradients of linear_cross_entropy in the forward pass, and so does liger "
    "those of cross_entropy: the backward pass only scales them, so that only both together compare",
}
# peers that write into their arguments: each needs a copy of its own
OVERWRITES = {("cross_entropy", "liger")}
# ||got - truth|| / ||truth|| of every output and gradient; truth: eager in float32. The half dtypes' own rounding, sums
# in them and float16's smallest gradients stay below it, and TF32 in float32; another function does not.
BOUNDS = {torch.float32: 2e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Peer:
    """make: () -> the function; imports what it needs. package: what pip installs for it. cuda: it needs a GPU."""

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


# --- PyTorch ---------------------------------------------------------------------------------------------------------


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


def _decode_sdpa() -> Function:
    """The whole cache under a mask of the lengths; unlike our eager path it trusts what lies past them."""

    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        seen = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]  # (B, S)
        return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=seen[:, None, None])[:, :, 0]

    return call


def _decode_sdpa_full() -> Function:
    """No mask: right where every cache is full, and refused as something else where one is not."""

    def call(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache)[:, :, 0]

    return call


# --- packages --------------------------------------------------------------------------------------------------------


def _liger_layer_norm() -> Function:
    from liger_kernel.transformers.functional import liger_layer_norm

    return lambda x, weight, bias: liger_layer_norm(x, weight, bias, 1e-5)


def _liger_cross_entropy() -> Function:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda logits, targets: liger_cross_entropy(logits, targets)


def _liger_linear_cross_entropy() -> Function:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda x, weight, targets: liger_fused_linear_cross_entropy(x, weight, targets)


def _cce(**options: Any) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x, weight, targets: linear_cross_entropy(x, weight, targets, impl="cce", **options)


def _fla_attention() -> Function:
    from fla.ops.attn import parallel_attn

    def call(qkv: Tensor, n_head: int) -> Tensor:
        return parallel_attn(*qkv.unflatten(-1, (3, n_head, -1)).unbind(2)).flatten(2)  # from (B, T, H, D) each

    return call


def _fla_layer_norm() -> Function:
    from fla.modules.layernorm import layer_norm

    return lambda x, weight, bias: layer_norm(x, weight, bias)


def _fla_add_layer_norm() -> Function:
    from fla.modules.layernorm import layer_norm

    return lambda x, residual, weight, bias: layer_norm(x, weight, bias, residual=residual, prenorm=True)


def _fla_cross_entropy() -> Function:
    from fla.modules import FusedCrossEntropyLoss

    loss = FusedCrossEntropyLoss()
    return lambda logits, targets: loss(logits, targets)


def _fla_linear_cross_entropy() -> Function:
    from fla.modules import FusedLinearCrossEntropyLoss

    loss = FusedLinearCrossEntropyLoss()
    return lambda x, weight, targets: loss(x, targets, weight)


PEERS = (
    Peer("causal_attention", "sdpa_flash", "torch", False, lambda: _sdpa(SDPBackend.FLASH_ATTENTION)),
    Peer("causal_attention", "sdpa_cudnn", "torch", True, lambda: _sdpa(SDPBackend.CUDNN_ATTENTION)),
    Peer("causal_attention", "sdpa_efficient", "torch", True, lambda: _sdpa(SDPBackend.EFFICIENT_ATTENTION)),
    Peer("causal_attention", "sdpa_math", "torch", False, lambda: _sdpa(SDPBackend.MATH)),
    Peer("causal_attention", "flex", "torch", False, _flex),
    Peer("causal_attention", "fla", "fla-core", True, _fla_attention),
    Peer("decode_attention", "sdpa", "torch", False, _decode_sdpa),
    Peer("decode_attention", "sdpa_full", "torch", False, _decode_sdpa_full),
    Peer("layer_norm", "liger", "liger-kernel", True, _liger_layer_norm),
    Peer("layer_norm", "fla", "fla-core", True, _fla_layer_norm),
    Peer("add_layer_norm", "fla", "fla-core", True, _fla_add_layer_norm),
    Peer("cross_entropy", "liger", "liger-kernel", True, _liger_cross_entropy),
    Peer("cross_entropy", "fla", "fla-core", True, _fla_cross_entropy),
    Peer("linear_cross_entropy", "liger", "liger-kernel", True, _liger_linear_cross_entropy),
    Peer("linear_cross_entropy", "cce", "cut-cross-entropy", True, _cce),
    Peer("linear_cross_entropy", "cce_exact", "cut-cross-entropy", True, lambda: _cce(filter_eps=None)),
    Peer("linear_cross_entropy", "fla", "fla-core", True, _fla_linear_cross_entropy),
)


def known_providers(op: str | None = None) -> list[str]:
    """Names of all who may compute an operator, or any operator: known without an import."""
    return list(dict.fromkeys([*OURS, *(peer.provider for peer in PEERS if op in (None, peer.op))]))


def providers(
    spec: KernelSpec, device: torch.device, missing: dict[str, str], keep: Collection[str] | None = None
) -> dict[str, Function]:
    """Those who can compute an operator here, by name; into `missing` goes why others cannot. keep: look at these only.

    "eager" of decode_attention cleans the whole cache on a GPU before it attends to it: it may not look at the lengths
    there, and what lies past them may be NaN. "sdpa" is without that work.
    """
    found: dict[str, Function] = {}
    wanted = [name for name in known_providers(spec.name) if keep is None or name in keep]
    if "triton" in wanted:
        problem = "its kernels would be interpreted" if INTERPRET else device_problem(device.type, device.index)
        if problem:
            missing.setdefault("triton", problem)
        else:
            found["triton"] = _under("triton", spec.fn)
    if "eager" in wanted:
        found["eager"] = _under("eager", spec.fn)
    if "compile" in wanted:
        found["compile"] = _under("eager", torch.compile(spec.fn, dynamic=False))
    for peer in PEERS:
        if peer.op != spec.name or peer.provider not in wanted:
            continue
        if peer.cuda and device.type != "cuda":
            missing.setdefault(peer.provider, "needs a CUDA device")
            continue
        try:
            found[peer.provider] = peer.make()
        except Exception as error:  # a package can fail to import in any way
            missing.setdefault(peer.provider, f"needs {peer.package} (pip install {peer.package}): {why(error)}")
    return found


def disagreement(
    spec: KernelSpec, fn: Function, inputs: Mapping[str, Any], incoming: Tensors | None, truth: Tensors
) -> str:
    """Why a function is not the operator, in words, or "". incoming: as in _proof.evaluate, None for no gradients.

    truth: outputs and gradients of eager in float32. The dtype of the inputs chooses the bound.
    """
    copies = {name: x.clone() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    bound = BOUNDS[next(x.dtype for x in inputs.values() if isinstance(x, Tensor) and x.is_floating_point())]
    for name, got in _proof.evaluate(spec, copies, incoming, "eager", fn).items():
        if got.shape != truth[name].shape:
            return f"computes something else: {name} is {tuple(got.shape)}, not {tuple(truth[name].shape)}"
        error = ((got.float() - truth[name]).norm() / truth[name].norm()).item()
        if not error <= bound:  # so that NaN is wrong
            return f"computes something else: {name} is off by {error:.2g} of its norm, allowed is {bound:.2g}"
    return ""
