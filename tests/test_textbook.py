"""The textbook's versions against the model's own."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from kernels import causal_attention, use_backend
from model.config import GPTConfig
from model.data.loader import windows
from model.generate import generate
from model.gpt import GPT
from model.textbook import (
    CausalAttention,
    GPTDatasetV1,
    MultiHeadAttention,
    MultiHeadAttentionWrapper,
    SelfAttention_v1,
    SelfAttention_v2,
    SimpleTokenizerV1,
    SimpleTokenizerV2,
    generate_text_simple,
    word_vocabulary,
)
from model.tokenizer import gpt2_encoding

TEXT = 'The heron said: "It rains." The well-keeper -- an old man -- did not answer, and the heron left.'


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(40, 16, n_embd=16, n_layer=2, n_head=2, initializer_range=1.0)).eval()


def test_vocabulary_has_each_word_once_in_order():
    vocab = word_vocabulary(TEXT)
    assert list(vocab) == sorted(vocab) and list(vocab.values()) == list(range(len(vocab)))
    assert {"heron", "--", '"', ".", "The", "well"} <= set(vocab) and " " not in vocab


def test_simple_tokenizer_returns_the_words_it_knows():
    tokenizer = SimpleTokenizerV1(word_vocabulary(TEXT))
    assert tokenizer.decode(tokenizer.encode("the heron left.")) == "the heron left."
    assert tokenizer.decode(tokenizer.encode("the  heron\nleft .")) == "the heron left."  # what it loses
    with pytest.raises(KeyError, match="otter"):
        tokenizer.encode("the otter left.")


def test_second_tokenizer_has_a_place_for_unknown_words():
    vocab = word_vocabulary(TEXT)
    tokenizer = SimpleTokenizerV2(vocab)
    ids = tokenizer.encode("the otter left. <|endoftext|> The heron")
    assert tokenizer.decode(ids) == "the <|unk|> left. <|endoftext|> The heron"
    assert ids[1] == len(vocab) and ids[4] == len(vocab) + 1
    assert tokenizer.encode(TEXT) == SimpleTokenizerV1(vocab).encode(TEXT)


@pytest.mark.parametrize(("length", "stride"), [(4, 4), (5, 1), (3, 7)])
def test_dataset_has_the_windows_of_the_text(length, stride):
    encoding = gpt2_encoding()
    ids = np.array(encoding.encode(TEXT))
    data = GPTDatasetV1(TEXT, encoding, length, stride)
    assert len(data) == len(range(0, len(ids) - length, stride))
    for n, (x, y) in enumerate(data):
        start = n * stride
        assert x.tolist() == ids[start : start + length].tolist()
        assert y.tolist() == ids[start + 1 : start + length + 1].tolist()


def test_dataset_without_overlap_is_what_evaluation_reads():
    encoding = gpt2_encoding()
    ids = np.array(encoding.encode(TEXT))
    n_whole = (len(ids) - 1) // 4
    (expected,) = windows(ids[: 4 * n_whole + 1], context=4, batch_size=100)
    (batch,) = DataLoader(GPTDatasetV1(TEXT, encoding, 4, 4), batch_size=100)
    assert all(map(torch.equal, batch, expected))


def test_the_two_self_attentions_are_equal():
    v1, v2 = SelfAttention_v1(6, 4), SelfAttention_v2(6, 4)
    for name in ("W_query", "W_key", "W_value"):
        getattr(v1, name).data = getattr(v2, name).weight.data.T
    x = torch.randn(5, 6)
    torch.testing.assert_close(v1(x), v2(x))


def test_causal_attention_of_the_last_token_is_self_attention():
    """Of every other one, the self-attention of the text up to it."""
    causal, plain = CausalAttention(6, 4, context_length=9, dropout=0.0), SelfAttention_v2(6, 4)
    plain.load_state_dict(causal.state_dict())
    x = torch.randn(2, 7, 6)
    y = causal(x)
    for b in range(2):
        for t in range(7):
            torch.testing.assert_close(y[b, t], plain(x[b, : t + 1])[-1])


def test_several_heads_are_one_projection():
    torch.manual_seed(0)
    wrapper = MultiHeadAttentionWrapper(8, 3, context_length=5, dropout=0.0, num_heads=4, qkv_bias=True)
    fused = MultiHeadAttention(8, 12, context_length=5, dropout=0.0, num_heads=4, qkv_bias=True)
    linears = [getattr(head, name) for name in ("W_query", "W_key", "W_value") for head in wrapper.heads]
    fused.c_attn.weight.data = torch.cat([linear.weight for linear in linears])
    fused.c_attn.bias.data = torch.cat([linear.bias for linear in linears])
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(fused(x), fused.c_proj(wrapper(x)))
    with pytest.raises(ValueError, match="not divisible"):
        MultiHeadAttention(8, 10, 5, 0.0, num_heads=4)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_several_heads_are_the_kernel(backend, device):
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 12, context_length=9, dropout=0.0, num_heads=3).to(device)
    x = torch.randn(2, 7, 8, device=device)
    with use_backend(backend):
        o = causal_attention(attention.c_attn(x), n_head=3)
    torch.testing.assert_close(attention(x), attention.c_proj(o))


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    for attention in (CausalAttention(4, 4, 6, dropout=0.5), MultiHeadAttention(4, 4, 6, dropout=0.5, num_heads=2)):
        x = torch.randn(1, 6, 4)
        assert not torch.equal(attention(x), attention(x))
        attention.eval()
        assert torch.equal(attention(x), attention(x))


def test_simple_generation_writes_the_greedy_ids(model):
    prompts = torch.randint(40, (3, 5))
    idx = generate_text_simple(model, prompts, max_new_tokens=11, context_size=16)
    assert idx.shape == (3, 16) and torch.equal(idx[:, :5], prompts) and not idx.requires_grad
    for row, prompt in zip(idx.tolist(), prompts.tolist(), strict=True):
        assert row[5:] == list(generate(model, prompt, tokens=11, temperature=0.0))
        assert len(set(row[5:])) > 2


def test_simple_generation_sees_the_last_tokens_alone(model):
    """Of a prompt that is longer than the context too."""
    idx = generate_text_simple(model, torch.randint(40, (8, 20)), max_new_tokens=3, context_size=16)
    with torch.no_grad():
        expected, first = (
            torch.stack([model(idx[:, n : n + 16])[0][:, -1].argmax(-1) for n in starts], 1)
            for starts in ((4, 5, 6), (0, 0, 0))
        )
    assert torch.equal(idx[:, 20:], expected) and not torch.equal(expected, first)
