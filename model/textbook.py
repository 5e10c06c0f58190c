"""What a learner writes first: the same results as the model's own code, without what makes that fast."""

from __future__ import annotations

import torch
from torch import Tensor

from model.gpt import GPT


@torch.no_grad()
def generate_text_simple(model: GPT, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Continue texts by the most likely token each time: (B, T) ids -> (B, T + max_new_tokens).

    Every token reads all of the text that fits again. Put the model in evaluation mode first. Within the context the
    ids are those of generate(..., temperature=0); beyond it this window slides by one token each time.
    """
    for _ in range(max_new_tokens):
        idx_cond = idx[:, -context_size:]  # (B, at most context_size)
        logits, _ = model(idx_cond)  # (B, T, V)
        probas = torch.softmax(logits[:, -1], dim=-1)  # (B, V)
        idx_next = torch.argmax(probas, dim=-1, keepdim=True)  # (B, 1)
        idx = torch.cat((idx, idx_next), dim=1)
    return idx
