"""What a learner writes first, as the notebooks teach it: the same results as the project's own code, short and slow.

Each class is the next step of the one before it: words, then words with a place for the unknown; windows of a text;
attention for one head, without and with nn.Linear, with a causal mask, by several heads, and by one projection for all.
"""

from __future__ import annotations

import re

import torch
from tiktoken import Encoding
from torch import Tensor, nn
from torch.utils.data import Dataset

from model.gpt import GPT

WORDS = re.compile(r"<\|\w+\|>|\w+|--|[^\w\s]")  # a special token, a word, a dash, or one other sign


def word_vocabulary(text: str) -> dict[str, int]:
    """The words and signs of a text in alphabetical order, each with its id."""
    return {word: i for i, word in enumerate(sorted(set(WORDS.findall(text))))}


class SimpleTokenizerV1:
    """Words and signs to ids and back. A word outside the vocabulary is a KeyError; spaces and line ends are lost."""

    def __init__(self, vocab: dict[str, int]) -> None:
        self.str_to_int = vocab
        self.int_to_str = {i: word for word, i in vocab.items()}

    def encode(self, text: str) -> list[int]:
        return [self.str_to_int[word] for word in WORDS.findall(text)]

    def decode(self, ids: list[int]) -> str:
        text = " ".join(self.int_to_str[i] for i in ids)
        return re.sub(r" ([.,:;!?)])", r"\1", text)  # no space before a sign that ends something


class SimpleTokenizerV2(SimpleTokenizerV1):
    """The same, with one id that all unknown words share, and one that separates texts."""

    def __init__(self, vocab: dict[str, int]) -> None:
        special = ("<|unk|>", "<|endoftext|>")
        words = [*vocab, *(word for word in special if word not in vocab)]
        super().__init__({word: i for i, word in enumerate(words)})

    def encode(self, text: str) -> list[int]:
        unknown = self.str_to_int["<|unk|>"]
        return [self.str_to_int.get(word, unknown) for word in WORDS.findall(text)]


class GPTDatasetV1(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text: (input, target), (max_length,) int64 each, where the target is the input one token later.

    stride: tokens from the start of a window to that of the next. A window that would be shorter is skipped.
    """

    def __init__(self, text: str, tokenizer: Encoding, max_length: int, stride: int) -> None:
        ids = torch.tensor(tokenizer.encode(text, allowed_special={"<|endoftext|>"}))
        starts = range(0, len(ids) - max_length, stride)
        self.input_ids = [ids[i : i + max_length] for i in starts]
        self.target_ids = [ids[i + 1 : i + max_length + 1] for i in starts]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.input_ids[index], self.target_ids[index]


class SelfAttention_v1(nn.Module):
    """softmax(q k^T / sqrt(d_out)) v of one sequence: (T, d_in) -> (T, d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x @ self.W_query, x @ self.W_key, x @ self.W_value  # (T, d_out) each
        scores = q @ k.T  # (T, T)
        weights = torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1)  # each row sums to 1
        return weights @ v


class SelfAttention_v2(nn.Module):
    """The same with nn.Linear, which initialises its weights better and keeps them transposed: (out, in)."""

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.W_query(x), self.W_key(x), self.W_value(x)
        weights = torch.softmax(q @ k.T / k.shape[-1] ** 0.5, dim=-1)
        return weights @ v


class CausalAttention(nn.Module):
    """One head that reads a token and those before it, for a batch: (B, T, d_in) -> (B, T, d_out)."""

    mask: Tensor

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        future = torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)
        self.register_buffer("mask", future, persistent=False)  # moves with the module, is not a weight

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        q, k, v = self.W_query(x), self.W_key(x), self.W_value(x)  # (B, T, d_out) each
        scores = q @ k.transpose(1, 2) / k.shape[-1] ** 0.5  # (B, T, T)
        scores = scores.masked_fill(self.mask[:T, :T], float("-inf"))  # exp(-inf) = 0: no weight on the future
        weights = self.dropout(torch.softmax(scores, dim=-1))
        return weights @ v


class MultiHeadAttentionWrapper(nn.Module):
    """Several heads, one after the other: (B, T, d_in) -> (B, T, num_heads * d_out), their outputs side by side."""

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        heads = [CausalAttention(d_in, d_out, context_length, dropout, qkv_bias) for _ in range(num_heads)]
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)


class MultiHeadAttention(nn.Module):
    """All heads at once, as in GPT-2: one projection for queries, keys and values, (B, T, d_in) -> (B, T, d_out).

    d_out is that of all heads together. Without dropout, what lies between the two projections is
    kernels.causal_attention(c_attn(x), num_heads).
    """

    mask: Tensor

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out = {d_out} is not divisible by num_heads = {num_heads}")
        self.num_heads = num_heads
        self.c_attn = nn.Linear(d_in, 3 * d_out, bias=qkv_bias)
        self.c_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        future = torch.ones(context_length, context_length, dtype=torch.bool).triu(diagonal=1)
        self.register_buffer("mask", future, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.num_heads, -1).unbind(2)  # (B, T, H, D) each
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D): a matrix for each head
        scores = q @ k.transpose(2, 3) / k.shape[-1] ** 0.5  # (B, H, T, T)
        scores = scores.masked_fill(self.mask[:T, :T], float("-inf"))
        weights = self.dropout(torch.softmax(scores, dim=-1))
        o = (weights @ v).transpose(1, 2).contiguous()  # (B, T, H, D), in memory too, so that view can join the heads
        return self.c_proj(o.view(B, T, -1))


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
