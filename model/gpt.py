"""GPT-2 (Radford et al., 2019) as published: learned positions, pre-LayerNorm, tanh-GELU, biases, tied output head.

    x = wte[idx] + wpe[0..T-1]
    x = x + attn(ln_1(x))           n_layer times
    x = x + mlp(ln_2(x))
    logits = ln_f(x) @ wte.T        loss = mean over targets of -log softmax(logits)[target]

B: batch, T: tokens, C: n_embd, H: heads, D: head size, V: vocabulary. Attention, LayerNorm, GELU and the loss come
from `kernels`, which decides what runs on which device. Each residual add is fused with the LayerNorm that follows it,
so a block takes (ln_1(x), x) and returns (the next LayerNorm of x, x); the output head is fused with the loss, which
never stores the logits.

Precision is explicit: parameters are float32, activations have the one dtype given to GPT(config, dtype), and a weight
is cast to it where it is used. In float32 the cast is free; in 16 bits training keeps copies of the matrices from one
update to the next (`keep_working_weights`).

Names are those of Hugging Face's GPT2LMHeadModel, with weights in nn.Linear's order (out, in). The tied output head is
one parameter, transformer.wte.weight: parameters(), state_dict() and files have no second lm_head.weight that could
come untied. load_state_dict accepts the copy that Hugging Face's files have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import (
    add_layer_norm,
    causal_attention,
    decode_attention,
    document_bounds,
    embedding,
    layer_norm,
    linear,
    linear_add_layer_norm,
    linear_cross_entropy,
    linear_gelu,
    lm_logits,
)
from model.config import ACTIVATIONS, GPTConfig
from model.kv_cache import KVCache

IGNORE_INDEX = -100  # a target that the loss ignores


def number_documents(idx: Tensor, document_id: int | None) -> Tensor | None:
    """idx: (B, T) -> the number of each token's document in its row, (B, T); None where document_id is None.

    document_id: the token that begins a document.
    """
    return None if document_id is None else (idx == document_id).cumsum(1)


class GPT(nn.Module):
    """The language model. Parameters float32; activations and logits in `dtype`; loss float32 (float64 in float64)."""

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.transformer = Transformer(config)
        self.recompute = False  # activation checkpointing: save only the inputs of each block
        self.reset_parameters()

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        logits: Literal["all", "last"] = "all",
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """idx, targets: (B, T) int64, T <= n_positions -> (logits, None), or (None, loss) where there are targets.

        logits: (B, T, V) in self.dtype; logits="last" computes the last position only, (B, 1, V), for generation.
        loss: (), the mean cross-entropy in nats over the targets that are not -100.
        Raises ValueError for a sequence longer than n_positions, and on a CPU for ids outside the vocabulary. On a GPU
        such an id gives NaN (without our kernels PyTorch ends the process): to check would make the host wait.

        documents: (B, T) integers; a token attends only to its own document, a run of equal numbers.

        With a cache, idx are the tokens after those in it and are appended: any number to an empty cache, then one a
        sequence at a time. For inference, in eval mode; ValueError where the cache is full or gradients are enabled.

        lengths: (B,) int64, 1 to T, of texts of different lengths that are padded on the right with any ids: the cache
        counts, and logits="last" computes, the last token of each text. No token attends to the padding after it.
        """
        if documents is not None:
            documents = document_bounds(documents)  # (B, 2, T), once for all layers
        x = self._embed(idx, cache, lengths)  # (B, T, C), the residual stream
        blocks: list[Block] = [*self.transformer.h]  # type: ignore[list-item]
        normed = blocks[0].ln_1(x)  # (B, T, C)
        next_norms = [*(block.ln_1 for block in blocks[1:]), self.transformer.ln_f]
        if self.recompute and torch.is_grad_enabled():
            seeds = self._dropout_seeds(idx.device)
            for block, ln_next, block_seeds in zip(blocks, next_norms, seeds, strict=True):
                arguments = (normed, x, ln_next, None, documents, block_seeds)
                normed, x = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            for block, ln_next in zip(blocks, next_norms, strict=True):
                normed, x = block(normed, x, ln_next, cache, documents)
        head = self.transformer.wte
        if targets is not None:
            # logits = normed @ wte.weight.T; loss = F.cross_entropy(logits, targets)
            return None, head.loss(normed.flatten(0, 1), targets.flatten())
        if logits == "last":
            normed = normed[:, -1:] if lengths is None else normed.take_along_dim(lengths[:, None, None] - 1, 1)
        return head.logits(normed), None  # (B, T or 1, V)

    def _embed(self, idx: Tensor, cache: KVCache | None, lengths: Tensor | None) -> Tensor:
        """(B, T) ids -> (B, T, C)."""
        B, T = idx.shape
        if self.config.n_positions < T:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's {self.config.n_positions} positions")
        wte, wpe = self.transformer.wte, self.transformer.wpe
        try:
            if cache is None:
                positions = wpe.weight[:T]  # (T, C)
            else:
                if not idx.is_cuda:
                    wte(idx)  # before the cache changes: an id may be outside the vocabulary
                positions = wpe(cache.extend(B, T, lengths))  # (T, C) or (B, 1, C)
            x = wte(idx, positions, self.dtype)  # (B, T, C)
        except IndexError:
            low, high, V = int(idx.min()), int(idx.max()), self.config.vocab_size
            raise ValueError(f"token ids must lie in [0, {V}), got ids from {low} to {high}") from None
        return F.dropout(x, self.config.embd_pdrop, self.training)

    def _dropout_seeds(self, device: torch.device) -> list[list[Tensor] | None]:
        """The seeds of each block's three dropouts, so that its recomputation draws the same masks.

        To save and restore the generator instead is not allowed inside a CUDA graph.
        """
        if not (self.training and (self.config.attn_pdrop or self.config.resid_pdrop)):
            return [None] * self.config.n_layer
        return [list(row) for row in torch.randint(2**63 - 1, (self.config.n_layer, 3), device=device)]

    def keep_working_weights(self) -> None:
        """Keep a copy of each matrix of the blocks in `dtype`, which `refresh_working_weights` updates.

        A cast at each use would read every float32 weight in every forward pass. Does nothing in float32. The copies
        are not in parameters() or state_dict(); gradients go to the float32 parameters, in float32. A frozen matrix
        itself is put in `dtype`: no update will need more.
        """
        if self.dtype != torch.float32:
            for linear in self._linears():
                weight = linear.weight.detach().to(self.dtype)
                if linear.weight.requires_grad:
                    linear.working = weight
                else:
                    linear.weight.data = weight

    @torch.no_grad()
    def refresh_working_weights(self) -> None:
        """Call after parameters have changed. No host sync."""
        pairs = [(linear.working, linear.weight) for linear in self._linears() if linear.working is not None]
        if pairs:
            torch._foreach_copy_([working for working, _ in pairs], [weight for _, weight in pairs])

    def _linears(self) -> list[Linear]:
        return [module for module in self.modules() if isinstance(module, Linear)]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """GPT-2's initialisation, drawn from torch's global generator.

        Weights are normal with standard deviation initializer_range; the two projections per block that write into the
        residual stream are scaled by 1 / sqrt(2 * n_layer), which keeps its variance from growing with depth.
        """
        std = self.config.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            elif name.endswith(".c_proj.weight"):
                parameter.normal_(0.0, std / math.sqrt(2 * self.config.n_layer))
            else:
                parameter.normal_(0.0, std)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """nn.Module's; the state dict may repeat the tied weight as lm_head.weight. ValueError if the two differ."""
        state_dict = dict(state_dict)
        head = state_dict.pop("lm_head.weight", None)
        if head is not None and not torch.equal(head, state_dict.setdefault("transformer.wte.weight", head)):
            raise ValueError(
                "lm_head.weight differs from transformer.wte.weight: this model ties the two, as GPT-2 does"
            )
        return super().load_state_dict(state_dict, strict, assign)


class Transformer(nn.Module):
    """Embeddings, blocks and the final LayerNorm, under Hugging Face's names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = TiedEmbedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = LayerNorm(config)


class Block(nn.Module):
    """One layer: two sub-layers that each read the normalised residual stream and add to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        normed: Tensor,
        x: Tensor,
        ln_next: LayerNorm,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        seeds: list[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: the residual stream, normed: ln_1(x), (B, T, C) each -> ln_next(x) and x, after this layer.

        ln_next: ln_1 of the next block, or ln_f. seeds: of the dropout inside attention, after attention and after the
        MLP; drawn if there are none.
        """
        probs_seed, attn_seed, mlp_seed = seeds or (None, None, None)
        # x = x + dropout(attn(normed)); normed = ln_2(x)
        normed, x = self.attn(normed, cache, documents, probs_seed, Sum(x, self.ln_2, attn_seed))
        # x = x + dropout(mlp(normed)); normed = ln_next(x)
        return self.mlp(normed, Sum(x, ln_next, mlp_seed))


class Sum(NamedTuple):
    """What a sub-layer does with its result y: x = x + dropout(y), and the LayerNorm ln of that. seed: of the dropout.

    Its last linear layer needs to know: where the sum is one of our kernels, that adds the layer's bias too.
    """

    x: Tensor  # (B, T, C), the residual stream
    ln: LayerNorm
    seed: Tensor | None

    @property
    def dropout_p(self) -> float:
        return self.ln.resid_pdrop if self.ln.training else 0.0

    def of(self, y: Tensor) -> tuple[Tensor, Tensor]:  # (B, T, C) -> (B, T, C) twice
        w, b, eps = self.ln.weight, self.ln.bias, self.ln.eps
        return add_layer_norm(y, self.x, w, b, eps, dropout_p=self.dropout_p, seed=self.seed)


class CausalSelfAttention(nn.Module):
    """Every token attends to itself and the tokens before it, with H heads of D = C // H channels."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.layer = layer
        self.attn_pdrop = config.attn_pdrop

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        seed: Tensor | None = None,
        into: Sum | None = None,
    ) -> Any:
        """(B, T, C) -> (B, T, C); with a sum, what comes of that: the new LayerNorm and residual stream, alike."""
        qkv = self.c_attn(x)  # (B, T, 3C): queries, keys and values, which stay packed
        if cache is not None:
            heads = qkv.unflatten(-1, (3, self.n_head, -1))  # (B, T, 3, H, D)
            k_cache, v_cache = cache.write(self.layer, heads[:, :, 1:])
            if not cache.is_prefill:  # one token, after others
                o = decode_attention(heads[:, 0, 0], k_cache, v_cache, cache.lengths)  # (B, H, D)
                return self.c_proj(o.flatten(1)[:, None], into)  # (B, 1, C)
        p = self.attn_pdrop if self.training else 0.0
        o = causal_attention(qkv, self.n_head, dropout_p=p, seed=seed, documents=documents)  # (B, T, C)
        return self.c_proj(o, into)


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = ACTIVATIONS[config.activation_function]

    def forward(self, x: Tensor, into: Sum | None = None) -> Any:
        """As CausalSelfAttention's."""
        return self.c_proj(self.c_fc.gelu(x, self.approximate), into)  # (B, T, 4C) between the two


class Linear(nn.Linear):
    """nn.Linear that computes in the dtype of its input."""

    working: Tensor | None

    def __init__(self, n_in: int, n_out: int, *, bias: bool) -> None:
        super().__init__(n_in, n_out, bias=bias)
        self.register_buffer("working", None, persistent=False)

    def reset_parameters(self) -> None:
        """Do nothing: GPT.reset_parameters initialises every weight."""

    def forward(self, x: Tensor, into: Sum | None = None) -> Any:
        """(..., in) -> (..., out); with a sum, the two tensors that come of that."""
        if into is None:
            return linear(x, self.weight, self.bias, self.working)
        return linear_add_layer_norm(
            x, self.weight, self.bias, into.x, into.ln.weight, into.ln.bias, into.ln.eps,
            working=self.working, dropout_p=into.dropout_p, seed=into.seed,
        )  # fmt: skip

    def gelu(self, x: Tensor, approximate: str) -> Tensor:
        """gelu(self(x)) in one pass: (..., in) -> (..., out)."""
        return linear_gelu(x, self.weight, self.bias, approximate, self.working)


class TiedEmbedding(nn.Embedding):
    """The vectors of the tokens, (V, C), which are also the weights of the output head."""

    def forward(self, idx: Tensor, positions: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(B, T) ids -> (B, T, C); with positions, (T, C) or (B, 1, C), added in float32 and rounded once to dtype."""
        return super().forward(idx) if positions is None else embedding(idx, self.weight, positions, dtype)

    def logits(self, x: Tensor) -> Tensor:  # (..., C) -> (..., V)
        return lm_logits(x, self.weight)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """x: (M, C), targets: (M,) -> (), the mean cross-entropy over the targets that are not -100."""
        return linear_cross_entropy(x, self.weight, targets, IGNORE_INDEX)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm over the channels, through the kernels."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.resid_pdrop = config.resid_pdrop

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        return layer_norm(x, self.weight, self.bias, self.eps)


def num_parameters(model: nn.Module) -> int:
    """Number of parameters; the tied weight counts once. 124,439,808 for the gpt2 preset."""
    return sum(parameter.numel() for parameter in model.parameters())
