"""The model of a run: its weights, its tokenizer, and what does not belong to it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import CONFIG, flip, parts, save

from model import checkpoint
from model.cli import UserError
from model.config import GPTConfig
from model.gpt import GPT
from model.tokenizer import CharTokenizer


@pytest.fixture
def run(tmp_path) -> Path:
    CharTokenizer("abcd").save(tmp_path / "tokenizer")
    return tmp_path


def test_load_model_gives_the_model_and_its_tokenizer(run):
    model = GPT(CONFIG)
    idx = torch.tensor([[0, 1, 2, 3]])
    expected = model.eval()(idx)[0]
    save(run, 10, 1.0, content={"model": dict(model.named_parameters())})
    save(run, 20, 2.0, content={"model": parts()["model"]})
    state = torch.get_rng_state()
    loaded, tokenizer = checkpoint.load_model(run)
    assert torch.equal(loaded(idx)[0], expected)  # of the best; evaluation mode, so without dropout
    assert not loaded.training and loaded.config == CONFIG
    assert tokenizer.encode("dab") == [3, 0, 1]
    assert not torch.equal(checkpoint.load_model(run, "cpu", name="last")[0](idx)[0], expected)
    assert checkpoint.load_model(run, dtype=torch.bfloat16)[0](idx)[0].dtype == torch.bfloat16
    assert torch.equal(torch.get_rng_state(), state)


def test_load_model_refuses_the_tokenizer_of_another_model(run):
    save(run, 10)
    CharTokenizer("abcde").save(run / "tokenizer")
    with pytest.raises(
        UserError, match="/tokenizer is not the tokenizer of the model: char has 6 ids, and the model 5\n"
    ):
        checkpoint.load_model(run)


def test_load_model_refuses_another_tokenizer_than_the_data_have(run):
    save(run, 10)
    CharTokenizer("abcd").save(run / "data")
    checkpoint.load_model(run)
    CharTokenizer("abce").save(run / "tokenizer")  # as many ids
    with pytest.raises(
        UserError, match=r"/tokenizer is not the tokenizer of .*/data\ncopy .*/data/tokenizer\.json into"
    ):
        checkpoint.load_model(run)


def test_load_model_reads_only_the_averages(run):
    folder = save(run, 10)
    for name in ("model.safetensors", "optimizer.safetensors", "trainer.safetensors"):
        (folder / name).unlink()
    model, _ = checkpoint.load_model(run)
    assert all(torch.equal(p, torch.full_like(p, 0.01)) for p in model.parameters())
    flip(folder / "ema.safetensors")
    with pytest.raises(UserError, match=r"ema\.safetensors is damaged"):
        checkpoint.load_model(run)


def test_checkpoint_of_another_model_names_the_difference(run):
    save(run, 10)
    saved = checkpoint.load(run)
    checkpoint.check_model(saved, CONFIG)
    other = GPTConfig(**{**CONFIG.to_dict(), "n_embd": 16, "n_layer": 3})
    with pytest.raises(UserError, match=r"step-00000010 is of another model: n_embd is 8 there and 16 here$"):
        checkpoint.check_model(saved, other)
    biased = parts()
    del biased["model"]["transformer.h.0.attn.c_attn.bias"]
    save(run, 20, content=biased)
    with pytest.raises(UserError, match=r"h\.0\.attn\.c_attn\.bias is missing there and \(24,\) here"):
        checkpoint.check_model(checkpoint.load(run), CONFIG)
    wide = parts()
    wide["ema"]["transformer.wte.weight"] = torch.zeros(6, 8)
    save(run, 30, content=wide)
    with pytest.raises(UserError, match=r"wte\.weight is \(6, 8\) there and \(5, 8\) here"):
        checkpoint.check_model(checkpoint.load(run), CONFIG)
    with pytest.raises(UserError, match=r"wte\.weight is \(6, 8\) there"):
        checkpoint.load_model(run, name="last")
    more = parts()
    more["model"]["lm_head.bias"] = torch.zeros(5)
    save(run, 40, content=more)
    with pytest.raises(UserError, match=r"lm_head\.bias is \(5,\) there and missing here"):
        checkpoint.check_model(checkpoint.load(run), CONFIG)
