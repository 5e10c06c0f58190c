"""GGUF files: what the gguf package reads in them, the model and the ids that this makes, and what is refused."""

from __future__ import annotations

import itertools
import re
import resource
import sys
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
import regex
import torch
from commands import exit_code
from hypothesis import given, settings
from hypothesis import strategies as st

from model import bpe, checkpoint
from model import gguf as exporter
from model import tokenizer as tk
from model.cli import UserError, explain
from model.config import GPTConfig
from model.gguf import GGUFConfig, main, write
from model.gpt import GPT
from model.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, TrainedTokenizer

TEXT = "the quick brown fox jumps over the lazy dog. THE END, 1234567890\n — “é” äöü 中文 🙂🙃 it's we'd\t\n\n" * 3
ALPHABETS = {"char": TEXT, "ascii": "abc ", "snowman": "☃", "surrogate": "a\ud800"}  # the last is none of UTF-8's
TOKENIZERS = {
    **{name: CharTokenizer(text) for name, text in ALPHABETS.items()},
    "bpe": TrainedTokenizer.train([TEXT], 300),
    "gpt2": GPT2Tokenizer(),
}
PATTERN = regex.compile(tk._PATTERN)


def small(tokenizer: Tokenizer, **kwargs) -> GPT:
    """Random in every parameter, biases and LayerNorm too."""
    model = GPT(
        GPTConfig(
            **{"vocab_size": tokenizer.n_vocab, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 2} | kwargs
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.eval()


def values(reader: gguf.GGUFReader) -> dict:
    return {key: field.contents() for key, field in reader.fields.items()}


@dataclass(frozen=True)
class File:
    tokenizer: Tokenizer
    model: GPT
    tensors: dict[str, np.ndarray]
    content: dict


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, File]:
    """A file for each tokenizer, read back; the models of ascii and bpe have no biases."""
    made = {}
    for name, tokenizer in TOKENIZERS.items():
        model = small(tokenizer, bias=name not in ("ascii", "bpe"))
        path = tmp_path_factory.mktemp("gguf") / "m.gguf"
        write(model, tokenizer, path)
        reader = gguf.GGUFReader(path)
        made[name] = File(tokenizer, model, {t.name: t.data for t in reader.tensors}, values(reader))
    return made


@pytest.fixture(params=TOKENIZERS)
def file(files, request) -> File:
    return files[request.param]


# Weights


def test_every_tensor_reads_back(file):
    transformer, found = file.model.transformer, dict(file.tensors)
    for name, embedding in (("token_embd", transformer.wte), ("position_embd", transformer.wpe)):
        np.testing.assert_array_equal(found.pop(f"{name}.weight"), embedding.weight.detach().numpy())
    modules = {"output_norm": transformer.ln_f}
    for i, block in enumerate(transformer.h):
        theirs = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
        ours = (block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
        modules |= {f"blk.{i}.{name}": module for name, module in zip(theirs, ours, strict=True)}
    for name, module in modules.items():
        weight = module.weight.detach()
        bias = module.bias.detach() if file.model.config.bias else torch.zeros(len(weight))
        np.testing.assert_array_equal(found.pop(f"{name}.weight"), weight.numpy())
        np.testing.assert_array_equal(found.pop(f"{name}.bias"), bias.numpy())
    assert not found


def test_shape_of_the_model_reads_back(tmp_path):
    tokenizer = TOKENIZERS["char"]
    model = small(tokenizer, n_layer=3, n_head=4, layer_norm_epsilon=1e-3)
    write(model, tokenizer, tmp_path / "m.gguf", name="mine \ud800")
    found = values(gguf.GGUFReader(tmp_path / "m.gguf"))
    assert found["general.architecture"] == "gpt2" and found["general.name"] == "mine ?"
    shape = {key.removeprefix("gpt2."): value for key, value in found.items() if key.startswith("gpt2.")}
    assert shape == {
        "context_length": 20,
        "embedding_length": 32,
        "feed_forward_length": 128,
        "block_count": 3,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": pytest.approx(1e-3),
    }


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_matrices_keep_their_numbers_within_a_step(kind, tmp_path):
    tokenizer = TOKENIZERS["char"]
    model = small(tokenizer)
    write(model, tokenizer, tmp_path / "f32.gguf")
    write(model, tokenizer, tmp_path / "m.gguf", kind)
    exact = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "f32.gguf").tensors}
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert values(reader)["general.file_type"] == {"f16": 1, "q8_0": 7}[kind]
    packed = set()
    for tensor in reader.tensors:
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type == gguf.GGMLQuantizationType.F32:
            np.testing.assert_array_equal(found, exact[tensor.name])
            continue
        packed.add(tensor.name.split(".")[-2])
        assert tensor.tensor_type.name == kind.upper()
        if kind == "f16":
            np.testing.assert_array_equal(found, exact[tensor.name].astype(np.float16))
            continue
        blocks = exact[tensor.name].reshape(-1, 32)
        step = np.abs(blocks).max(1, keepdims=True) / 127
        error = np.abs(found.reshape(-1, 32) - blocks)
        assert (error <= step * (0.5 + 127 / 2048)).all()  # and the step itself is a float16
        assert error.max() > step.min() / 4
    assert packed == {"token_embd", "attn_qkv", "attn_output", "ffn_up", "ffn_down"}


def test_sizes_of_the_types(tmp_path):
    tokenizer = TOKENIZERS["bpe"]
    sizes = []
    for kind in ("f32", "f16", "q8_0"):
        write(small(tokenizer, n_embd=128), tokenizer, tmp_path / f"{kind}.gguf", kind)
        sizes.append((tmp_path / f"{kind}.gguf").stat().st_size)
    assert sizes[1] / sizes[0] == pytest.approx(1 / 2, rel=0.05)
    assert sizes[2] / sizes[0] == pytest.approx(34 / 128, rel=0.1)  # a block of 32: 34 bytes


# Tokens


class LlamaTokenizer:
    """Ids as llama.cpp finds them in a file: split by the pattern, merge pairs by rank, look up what is left."""

    def __init__(self, file: File) -> None:
        *tokens, _ = file.content["tokenizer.ggml.tokens"]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks: dict[tuple[str, ...], int] = {}
        for rank, pair in enumerate(file.content["tokenizer.ggml.merges"]):
            self.ranks.setdefault(tuple(pair.split(" ")), rank)

    def encode(self, text: str) -> list[int]:
        found = []
        for word in PATTERN.findall(text):
            parts = [*bpe.to_printable(word.encode("utf-8", "surrogatepass"))]
            while known := [(self.ranks[p], i) for i, p in enumerate(itertools.pairwise(parts)) if p in self.ranks]:
                i = min(known)[1]
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            found += [self.ids[part] for part in parts]
        return found


@pytest.fixture(scope="module")
def pairs(files) -> list[tuple[Tokenizer, LlamaTokenizer]]:
    return [(file.tokenizer, LlamaTokenizer(file)) for file in files.values()]


def test_tokens_read_back(file):
    tokenizer = file.tokenizer
    content = {key.removeprefix("tokenizer.ggml."): value for key, value in file.content.items()}
    *tokens, last = content["tokens"]
    assert [bpe.from_printable(token) for token in tokens] == tokenizer._bytes[:-1]
    assert last == "<|endoftext|>" and len({*tokens, last}) == tokenizer.n_vocab
    assert content["token_type"] == [1] * len(tokens) + [3]
    assert (content["model"], content["pre"]) == ("gpt2", "gpt-2")
    assert content["bos_token_id"] == content["eos_token_id"] == tokenizer.eot_id
    assert content["add_bos_token"] is False


def test_merges_read_back(files):
    merges = {name: file.content["tokenizer.ggml.merges"] for name, file in files.items()}
    for name in ("bpe", "gpt2"):
        pairs = TOKENIZERS[name].merges()
        assert merges[name] == [f"{bpe.to_printable(a)} {bpe.to_printable(b)}" for a, b in pairs]
    of_replacement = ["ï ¿", "ï¿ ½"]  # llama.cpp refuses a file without merges
    assert merges["ascii"] == of_replacement
    assert merges["snowman"] == ["â ĺ", "âĺ ĥ", *of_replacement]
    assert len(set(merges["char"])) == len(merges["char"])


@settings(deadline=None)
@given(text=st.text(st.sampled_from(sorted(set(TEXT)))))
def test_any_text_has_our_ids(pairs, text):
    for ours, theirs in pairs:
        if not isinstance(ours, CharTokenizer) or set(text) <= set(ours.chars):
            assert theirs.encode(text) == ours.encode(text)


def test_alphabets_have_our_ids(pairs):
    for ours, theirs in pairs[: len(ALPHABETS)]:
        text = ours.chars * 2 + ours.chars[::-1]
        assert theirs.encode(text) == ours.encode(text)


# The command


@pytest.fixture
def call(tmp_path, capsys, monkeypatch):
    """Runs the command in a folder with the run `mine`; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    tokenizer = TOKENIZERS["char"]
    run_folder = tmp_path / "mine"
    tokenizer.save(run_folder / "tokenizer")

    def command(*argv: str, **kwargs) -> tuple[int, str, str]:
        for step, loss in ((1, 1.0), (2, 2.0)):
            model = small(tokenizer, **kwargs)
            parts = {"model": dict(model.named_parameters())}
            checkpoint.save(
                tmp_path / "mine", step, parts, config={}, model=model.config, best_val_loss=None, elapsed_s=0
            )
            checkpoint.record_validation(tmp_path / "mine", step, loss)
        return exit_code(main, GGUFConfig, *argv), *capsys.readouterr()

    return command


def test_command_writes_the_best_checkpoint(call, tmp_path):
    code, out, err = call("mine", "m.gguf", "--type", "f16")
    size = (tmp_path / "m.gguf").stat().st_size
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"m.gguf: {size:,} bytes, f16, {TOKENIZERS['char'].n_vocab} ids, context 20",
        "prompt and text must fit in 20 tokens: llama.cpp rounds contexts up to a multiple of 256",
    ]
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert values(reader)["general.name"] == "mine"
    (wpe,) = [tensor.data for tensor in reader.tensors if tensor.name == "position_embd.weight"]
    model, _ = checkpoint.load_model(tmp_path / "mine", name="step-00000001")
    np.testing.assert_array_equal(wpe, model.transformer.wpe.weight.detach().numpy())
    _, out, _ = call("mine", "last.gguf", "--checkpoint", "last", n_positions=256)
    assert out.count("\n") == 1
    (wpe,) = [t.data for t in gguf.GGUFReader(tmp_path / "last.gguf").tensors if t.name == "position_embd.weight"]
    model, _ = checkpoint.load_model(tmp_path / "mine", name="last")
    np.testing.assert_array_equal(wpe, model.transformer.wpe.weight.detach().numpy())


@pytest.mark.parametrize(
    ("argv", "kwargs", "message"),
    [
        (["mine", "old.gguf"], {}, "old.gguf exists: choose another name, or remove it"),
        (["mine", "mine"], {}, "mine exists: choose another name, or remove it"),
        (["mine", "none/m.gguf"], {}, "none is not a folder: create it first, or choose another path"),
        (["mine", "old.gguf/m.gguf"], {}, "old.gguf is not a folder: create it first, or choose another path"),
        (["mine", "m" * 300], {}, f"{'m' * 300}: File name too long"),
        (["none", "m.gguf"], {}, "none has no checkpoint: is it the folder of a run, and did the run reach its first"),
        (["old.gguf", "m.gguf"], {}, "old.gguf has no checkpoint: is it the folder of a run"),
        (["mine", "m.gguf", "--checkpoint", "step-9"], {}, "mine has no checkpoint 'step-9': use last, best, "),
        (["mine", "m.gguf", "--type", "q4_0"], {}, "invalid choice 'q4_0' for argument '--type'"),
        (["mine", "m.gguf", "--type", "q8_0"], {"n_embd": 48}, "q8_0 needs a width that is a multiple of 32, and "),
        (["mine", "m.gguf"], {"activation_function": "gelu"}, "this model has the activation function 'gelu'"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)  # fmt: skip
def test_what_cannot_be_written_is_refused(call, tmp_path, argv, kwargs, message):
    (tmp_path / "old.gguf").write_text("old")
    code, out, err = call(*argv, **kwargs)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}") and err.count("\n") <= 2
    assert (tmp_path / "old.gguf").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "old.gguf"]


@pytest.mark.parametrize("number", [70000.0, -70000.0, float("inf"), float("nan")])
def test_numbers_beyond_float16_are_refused(number, tmp_path):
    tokenizer = TOKENIZERS["char"]
    model = small(tokenizer)
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = number  # stays float32
        write(model, tokenizer, tmp_path / "a.gguf", "f16")
        model.transformer.h[1].mlp.c_proj.weight[0, 0] = number
        write(model, tokenizer, tmp_path / "b.gguf", "f32")
    for kind in ("f16", "q8_0"):
        with pytest.raises(UserError, match=r"^transformer\.h\.1\.mlp\.c_proj\.weight has a number beyond float16, or"):
            write(model, tokenizer, tmp_path / "c.gguf", kind)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "b.gguf"]


def test_missing_package_is_named(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert call("mine", "m.gguf") == (2, "", "error: a GGUF file needs the gguf package: pip install gguf\n")


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_full_disk_leaves_nothing(share, tmp_path):
    tokenizer = TOKENIZERS["bpe"]
    model = small(tokenizer)
    write(model, tokenizer, tmp_path / "whole.gguf")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * (tmp_path / "whole.gguf").stat().st_size), limits[1]))
        with pytest.raises((UserError, OSError)) as raised:
            write(model, tokenizer, tmp_path / "part.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    message = explain(raised.value) if isinstance(raised.value, OSError) else str(raised.value)
    assert re.search(r"part\.gguf (would be larger than|could not be written to its end: is the disk full)", message)
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(small(TOKENIZERS["char"]), TOKENIZERS["char"], tmp_path / "m.gguf")
    assert [*tmp_path.iterdir()] == []


def test_vocabulary_gives_no_id_to_a_part_of_a_character():
    tokens, merges = exporter.vocabulary(TOKENIZERS["snowman"])
    assert tokens == ["☃".encode()]
    assert all(len(b) == 1 and (a + b).decode(errors="ignore") in ("", "☃", "\ufffd") for a, b in merges)
