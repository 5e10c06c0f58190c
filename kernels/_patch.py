"""Hugging Face's GPT-2 on these kernels: `patch(model)` is one line of a training script, `unpatch(model)` undoes it.

    module of transformers       what runs in its place
    LayerNorm                    layer_norm
    GPT2Attention                causal_attention, on the packed projection
    GPT2Block                    dropout, residual and ln_2 by add_layer_norm
    GPT2MLP                      c_fc and GELU by linear_gelu
    GPT2Model                    a padding mask, or packed sequences, become the `documents` of causal_attention
    GPT2LMHeadModel              in training, the loss by linear_cross_entropy, without logits

Only the class of a module changes, to one of the same name that inherits from its own: parameters, buffers, hooks,
state dict, checkpoints and signatures stay, and copies, replicas and adapters of the model work as before. What a
module's inputs or parts do not allow runs as transformers wrote it, with one warning where it costs speed in training.
"""

import functools
import inspect
import sys
import warnings
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._dispatch import warn_once
from .add_layer_norm import add_layer_norm
from .attention import causal_attention, document_bounds
from .gelu import bias_gelu, linear_gelu
from .layer_norm import layer_norm
from .linear_cross_entropy import linear_cross_entropy

M = TypeVar("M", bound=nn.Module)
_SOURCE = "transformers.models.gpt2.modeling_gpt2"
# by the names of transformers' classes
_APPROXIMATE = {"NewGELUActivation": "tanh", "GELUTanh": "tanh", "GELUActivation": "none"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_bare(module: nn.Module, name: str) -> bool:
    """Whether a module is of the class of this name, not an adapter's, and its call would do no more than forward."""
    return type(module).__name__ == name and "forward" not in vars(module) and not any(vars(module)[h] for h in _HOOKS)


def _is_new(cache: Any, layer: int = 0) -> bool:
    """Whether there is no cache, or an empty one that holds what it is given and no more."""
    return cache is None or (type(cache).__name__ == "DynamicCache" and cache.get_seq_length(layer) == 0)


class _LayerNorm(nn.Module):
    def forward(self: Any, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class _Attention(nn.Module):
    def forward(
        self, hidden_states, past_key_values=None, attention_mask=None, *, documents="unknown", keep_p=False, **kwargs
    ):
        """documents: where GPT2Model knows what the mask says, their bounds or None, and the mask is not looked at.

        keep_p: dropout is left to the caller, whose third result is its probability.
        """
        is_mask_known = not isinstance(documents, str)
        if not self._is_fusable(past_key_values, None if is_mask_known else attention_mask, kwargs):
            result = super().forward(hidden_states, past_key_values, attention_mask, **kwargs)
            return (*result, 0.0) if keep_p else result
        qkv = self.c_attn(hidden_states)  # (B, T, 3C)
        if past_key_values is not None:
            _, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, T, H, D)
            past_key_values.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
        p = self.attn_dropout.p if self.training else 0.0
        documents = documents if is_mask_known else None
        o = causal_attention(qkv, self.num_heads, dropout_p=p, sm_scale=self.scaling, documents=documents)  # (B, T, C)
        o = self.c_proj(o)
        return (o, None, self.resid_dropout.p if self.training else 0.0) if keep_p else (self.resid_dropout(o), None)

    def _is_fusable(self: Any, cache: Any, mask: Tensor | None, kwargs: dict[str, Any]) -> bool:
        """False, with a warning in training, for transformers' own attention. mask: None where it is known."""
        if not _is_new(cache, self.layer_idx):
            return False
        if self.config._attn_implementation == "eager":
            why = "attn_implementation='eager' returns its weights"
        elif mask is not None or kwargs.get("encoder_hidden_states") is not None:
            why = "its mask is not padding around one text a row"
        else:
            return True
        if self.training:
            warn_once(f"patch: attention stays transformers' own, as {why}")
        return False


class _Block(nn.Module):
    def forward(
        self, hidden_states, past_key_values=None, attention_mask=None, encoder_hidden_states=None, **kwargs
    ):  # (B, T, C) -> (B, T, C)
        fusable = isinstance(self.attn, _Attention) and isinstance(self.ln_2, _LayerNorm)
        if encoder_hidden_states is not None or not (fusable and _is_bare(self.ln_2, "LayerNorm")):
            return super().forward(hidden_states, past_key_values, attention_mask, encoder_hidden_states, **kwargs)
        x, _, p = self.attn(
            self.ln_1(hidden_states),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            keep_p=True,
            **kwargs,
        )
        x, ln = x.to(hidden_states.dtype), self.ln_2  # under autocast x has 16 bits, and the residual stream 32
        x, hidden_states = add_layer_norm(x, hidden_states, ln.weight, ln.bias, ln.eps, dropout_p=p)
        return hidden_states + self.mlp(x)


class _MLP(nn.Module):
    def forward(self: Any, hidden_states: Tensor) -> Tensor:  # (B, T, C) -> (B, T, C)
        c_fc, approximate = self.c_fc, _APPROXIMATE[type(self.act).__name__]
        if _is_bare(c_fc, "Conv1D"):  # which keeps its weight as (in, out)
            x = linear_gelu(hidden_states, c_fc.weight.t(), c_fc.bias, approximate)
        else:
            x = bias_gelu(c_fc(hidden_states), None, approximate)
        return self.dropout(self.c_proj(x))


class _Model(nn.Module):
    def forward(self, *args, **kwargs):
        if not isinstance(self, _Model):  # accelerate's wrapper of this method, for 16 bits, outlives `unpatch`
            return type(self).forward(self, *args, **kwargs)
        fused = self.config._attn_implementation != "eager" and all(isinstance(b.attn, _Attention) for b in self.h)
        if fused and len(args) < 2 and _is_new(cache := kwargs.get("past_key_values")):
            x = args[0] if args else kwargs.get("input_ids")
            x = kwargs.get("inputs_embeds") if x is None else x  # (B, T) or (B, T, C)
            if x is not None:
                # transformers finds packed sequences where there will be no cache
                caches = self.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]
                position_ids = None if caches or cache is not None else kwargs.get("position_ids")
                documents = _documents(kwargs.get("attention_mask"), position_ids, x.shape[:2])
                if not isinstance(documents, str):
                    # 4 dimensions stop transformers from making a mask of (B, 1, T, T); nothing reads it.
                    seen = x.new_ones((1, 1, 1, 1), dtype=torch.bool)
                    bounds = None if documents is None else document_bounds(documents)  # once for all layers
                    kwargs |= {"attention_mask": seen, "documents": bounds}
        return super().forward(*args, **kwargs)


def _documents(mask: Tensor | None, position_ids: Tensor | None, shape: torch.Size) -> Tensor | str | None:
    """(B, T) for `causal_attention`, None where it needs none, "unknown" for what is left to transformers.

    mask: (B, T), 1 for a token and 0 for padding. A row's text is one document and the padding beside it others, so
    that no token attends to padding. Padding on the right needs none: no token sees what comes after it.
    position_ids: (B, T) or (1, T); where they do not go on by 1 another sequence begins, if there is no mask.
    """
    tracing = torch.compiler.is_compiling()  # then nothing may depend on a value
    if mask is not None:
        if mask.ndim != 2 or mask.shape != shape:
            return "unknown"
        begins = mask[:, 1:] > mask[:, :-1]  # (B, T - 1)
        if not tracing and not begins.any():
            return None
        is_one_run = (begins.sum(1) + mask[:, 0] <= 1).all()
        if tracing:
            torch._assert_async(is_one_run, "a row of attention_mask has a gap: not for a patched, compiled model")
        elif not is_one_run:
            return "unknown"
        return mask.int()
    if position_ids is None and tracing:
        return None
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != shape[1]:
        return "unknown"
    jumps = position_ids[:, 1:] - position_ids[:, :-1] != 1
    if not tracing and not jumps.any():
        return "unknown"
    return F.pad(jumps, (1, 0)).cumsum(1).expand(shape)


class _LMHeadModel(nn.Module):
    def forward(self, *args, **kwargs):
        if not isinstance(self, _LMHeadModel):  # as in _Model
            return type(self).forward(self, *args, **kwargs)
        if kwargs.get("labels") is None or not self.training or self._needs_logits(args, kwargs):
            return super().forward(*args, **kwargs)
        from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions

        loss = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
        out = self.transformer(*args, **kwargs)
        return CausalLMOutputWithCrossAttentions(
            loss=_loss(out.last_hidden_state, self.lm_head.weight, **loss),
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
            cross_attentions=out.cross_attentions,
        )

    def _needs_logits(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if len(args) > 1 or kwargs.get("return_dict", self.config.return_dict) is False:
            return True
        kept = kwargs.get("logits_to_keep", 0)
        if isinstance(kept, Tensor) or kept or kwargs.get("ignore_index", -100) != -100:
            return True
        head = _is_bare(self.lm_head, "Linear") and self.lm_head.bias is None
        if not (head and self.loss_function.__name__ == "ForCausalLMLoss"):
            warn_once("patch: logits are kept for the loss, as lm_head or the loss function is not GPT-2's own")
            return True
        return False


def _loss(
    x: Tensor, weight: Tensor, labels: Tensor, shift_labels: Tensor | None, num_items_in_batch: Tensor | int | None
) -> Tensor:
    """transformers' ForCausalLMLoss. x: (B, T, C), weight: (V, C), labels: (B, T), of which each predicts the next."""
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    targets = targets.reshape(-1).to(x.device)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    loss = linear_cross_entropy(x.flatten(0, -2), weight, targets)
    if num_items_in_batch is None:
        return loss
    count = (targets != -100).sum()  # the mean over no target is NaN, and its sum is 0
    items = num_items_in_batch.to(x.device) if isinstance(num_items_in_batch, Tensor) else num_items_in_batch
    return loss.where(count > 0, 0.0) * (count / items)


_MIXINS: dict[str, Any] = {
    "GPT2Attention.forward": _Attention,
    "GPT2Block.forward": _Block,
    "GPT2LMHeadModel.forward": _LMHeadModel,
    "GPT2MLP.forward": _MLP,
    "GPT2Model.forward": _Model,
}


def _mixin(module: Any) -> Any:
    """What runs in place of a module's forward, if that is transformers': a subclass may have another one."""
    forward = type(module).forward
    if forward.__module__ != _SOURCE:
        return None
    mixin = _MIXINS.get(forward.__qualname__)
    if mixin is _Attention and module.is_cross_attention:
        return None
    if mixin is _MLP and type(module.act).__name__ not in _APPROXIMATE:
        warn_once(f"patch: the activation stays transformers' own: {type(module.act).__name__} is not GPT-2's GELU")
        return None
    return mixin


@functools.cache
def _patched(mixin: Any, cls: Any) -> Any:
    """A class with cls's name, under which transformers, peft and accelerate know it, and its forward's signature."""
    mixin.forward.__signature__ = inspect.signature(cls.forward)
    names = ("__module__", "__qualname__", "__doc__")
    return type(cls.__name__, (mixin, cls), {name: getattr(cls, name) for name in names})


def patch(model: M) -> M:
    """Put these kernels into a GPT-2 of transformers, in place, and return it. To patch twice does no harm.

    model: GPT2LMHeadModel, another class of transformers around a GPT2Model, or one that peft has wrapped. Before or
    after get_peft_model, before torch.compile and DDP. In training a loss comes without logits: `outputs.logits` is
    None; in eval mode all outputs are there. At positions that attention_mask hides, outputs are not transformers'.
    ValueError if there is no GPT-2 of transformers 5.8 or newer in it.
    """
    version = getattr(sys.modules.get("transformers"), "__version__", "5.8")
    if tuple(map(int, version.split(".")[:2])) < (5, 8):
        raise ValueError(f"patch: needs transformers 5.8 or newer, this is {version}: pip install -U transformers")
    found = [(module, mixin) for module in model.modules() if (mixin := _mixin(module))]
    found += [
        (norm, _LayerNorm)
        for module, mixin in found
        if mixin in (_Block, _Model)
        for norm in module.children()
        if type(norm) is nn.LayerNorm
    ]
    if not (found or any(isinstance(module, tuple(_MIXINS.values())) for module in model.modules())):
        raise ValueError(f"patch: there is no GPT-2 of transformers in this {type(model).__name__}")
    for module, mixin in found:
        if "forward" in vars(module):  # accelerate's device_map, or a patch of somebody else's
            warnings.warn(f"patch: {type(module).__name__} has a forward of its own and stays as it is", stacklevel=2)
        else:
            cls: Any = type(module)
            module.__class__ = _patched(mixin, cls)
    return model


def unpatch(model: M) -> M:
    """Undo `patch`, in place, and return the model."""
    for module in model.modules():
        if type(module).__bases__[0] in (*_MIXINS.values(), _LayerNorm):
            module.__class__ = type(module).__bases__[1]
    return model
