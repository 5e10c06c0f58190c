"""GPT-2 as others wrote it, with the weights of ours: then a comparison is one of speed alone."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import STEP_PEERS, load
from model.cli import UserError
from model.config import ACTIVATIONS, GPTConfig
from model.gpt import GPT

_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # transformers keeps these as (in, out)
_ON_GPU = ("+", "triton", "compile+graph", "hf+liger", "hf_static")  # providers whose names begin so run on a GPU alone


def available(
    names: Iterable[str], device: torch.device, config: GPTConfig, missing: dict[str, str], nanogpt: Path | None = None
) -> list[str]:
    """The providers that can run this model here; `missing` gets the others, and why not."""
    reasons = {name: _absent(name, device, config, nanogpt) for name in names}
    missing.update({name: reason for name, reason in reasons.items() if reason})
    return [name for name, reason in reasons.items() if not reason]


def _absent(name: str, device: torch.device, config: GPTConfig, nanogpt: Path | None) -> str:
    """Why a provider cannot run here, or ""."""
    if name.startswith(_ON_GPU) and device.type != "cuda":
        return "needs a CUDA device"
    if peer := STEP_PEERS.get(name):
        return load(peer, device)[1]
    if name == "nanogpt":
        return "" if nanogpt else "no folder of a nanoGPT checkout was given"
    if not name.startswith("hf"):
        return ""
    for package in ("liger_kernel", "transformers") if name == "hf+liger" else ("transformers",):
        if not importlib.util.find_spec(package):
            return f"the package {package} is not installed"
    return "" if config.bias else "transformers' GPT-2 has biases, and this model has none"


def require_nanogpt(folder: Path | None, *files: str) -> None:
    """UserError for a folder that lacks one of these files of a nanoGPT checkout."""
    for name in files:
        if folder is not None and not (folder / name).is_file():
            raise UserError(f"{folder} is not a nanoGPT checkout: it has no {name}")


def transformers_gpt2(model: GPT) -> nn.Module:
    """transformers' GPT2LMHeadModel with `model`'s configuration and weights, on its device, attention by SDPA."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = {name: value for name, value in model.config.to_dict().items() if name != "bias"}
    config = GPT2Config(**settings, bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "sdpa"
    theirs: Any = GPT2LMHeadModel(config)
    theirs.loss_type = "ForCausalLM"  # its default too, but then with a warning
    state = {name: t.T if name.endswith(_CONV1D) else t for name, t in model.state_dict().items()}
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    return theirs.to(model.transformer.wte.weight)


def transformers_loss(theirs: Any, idx: Tensor, targets: Tensor) -> Tensor:
    """The loss of a GPT2LMHeadModel as it computes it itself: (B, T), (B, T) -> ()."""
    return theirs(input_ids=idx, labels=targets, shift_labels=targets, use_cache=False).loss


def give_liger_norms(theirs: nn.Module) -> None:
    """Replace every nn.LayerNorm by Liger's, with the same parameters."""
    from liger_kernel.transformers.layer_norm import LigerLayerNorm

    for parent in [*theirs.modules()]:
        for name, norm in parent.named_children():
            if isinstance(norm, nn.LayerNorm):
                fused = LigerLayerNorm(norm.normalized_shape[0], eps=norm.eps, bias=True)
                fused.weight, fused.bias = norm.weight, norm.bias
                setattr(parent, name, fused)


def liger_loss(theirs: Any, idx: Tensor, targets: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy over the last hidden states of a GPT2LMHeadModel: (B, T), (B, T) -> ()."""
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    x = theirs.transformer(input_ids=idx, use_cache=False).last_hidden_state  # (B, T, C)
    return LigerFusedLinearCrossEntropyLoss()(theirs.lm_head.weight, x.flatten(0, 1), targets.flatten())


def nanogpt(model: GPT, folder: Path) -> nn.Module:
    """GPT of the model.py in a nanoGPT checkout with `model`'s configuration and weights, on its device.

    nanoGPT's GELU is the exact one; it is set to the model's own, as GPT-2's is the approximation.
    """
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    ours = model.config
    config = module.GPTConfig(
        block_size=ours.n_positions, vocab_size=ours.vocab_size, n_layer=ours.n_layer, n_head=ours.n_head,
        n_embd=ours.n_embd, dropout=0.0, bias=ours.bias,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
        theirs = module.GPT(config)
    for block in theirs.transformer.h:
        block.mlp.gelu = nn.GELU(ACTIVATIONS[ours.activation_function])
    state = model.state_dict()
    theirs.load_state_dict({**state, "lm_head.weight": state["transformer.wte.weight"]})
    return theirs.to(model.transformer.wte.weight)


def nanogpt_loss(theirs: Any, idx: Tensor, targets: Tensor) -> Tensor:
    """(B, T), (B, T) -> ()."""
    return theirs(idx, targets)[1]
