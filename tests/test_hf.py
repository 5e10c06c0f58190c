"""GPT-2 folders of Hugging Face: what transformers makes of ours, what we make of theirs, and the round trip."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import tokenizers
import torch
from commands import exit_code
from hf_folders import TEXT, TOKENIZERS, lively, same, write_run
from hypothesis import given, settings
from hypothesis import strategies as st

from model import checkpoint, evaluate, files, hf
from model import generate as generate_module
from model.cli import UserError
from model.config import GPTConfig
from model.generate import generate
from model.tokenizer import CharTokenizer, GPT2Tokenizer, TrainedTokenizer
from model.training import run_folder

transformers = pytest.importorskip("transformers", reason="needs the transformers package")

KINDS = [(kind, bias) for kind in TOKENIZERS for bias in (True, False)]
PROMPT = "CHAPTER I. "


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-{'bias' if p[1] else 'no-bias'}")
def exported(request, tmp_path_factory):
    """A run's model and tokenizer, and the folder that it was exported to."""
    kind, bias = request.param
    root = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    model = write_run(root / "run", TOKENIZERS[kind], bias=bias, resid_pdrop=0.1)
    hf.export(root / "run", root / "hf")
    return model, TOKENIZERS[kind], root / "hf"


@pytest.fixture(scope="module")
def pipe(exported):
    folder = str(exported[2])
    return transformers.pipeline("text-generation", model=folder, tokenizer=folder, device=-1)


@pytest.fixture
def theirs(tmp_path):
    """Makes a GPT2LMHeadModel of transformers, saved in tmp_path/hf -> that model."""

    def make(folder=tmp_path / "hf", shard_size="1GB", **settings):
        config = {"vocab_size": 50257, "bos_token_id": 0, "eos_token_id": 50256, **settings}
        config = transformers.GPT2Config(n_positions=32, n_embd=16, n_layer=2, n_head=2, **config)
        model = lively(transformers.GPT2LMHeadModel(config))
        model.save_pretrained(folder, max_shard_size=shard_size)
        return model

    return make


def assert_equal_models(model, their_model):
    """Logits within 1e-4, and the same ids written greedily."""
    V = model.config.vocab_size
    idx = torch.randint(V, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, expected = model(idx)[0], their_model(idx).logits[..., :V]
    assert expected.std() > 0.1  # there is something to compare
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    ids = list(generate(model, idx[0].tolist(), tokens=12, temperature=0.0))
    mask = torch.ones_like(idx[:1])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert their_model.generate(idx[:1], attention_mask=mask, **options)[0, 16:].tolist() == ids


# Export


@pytest.mark.slow
def test_pipeline_runs_the_exported_model(exported, pipe):
    model, tokenizer, _ = exported
    torch.manual_seed(1)
    text = pipe(PROMPT, max_new_tokens=120)[0]["generated_text"]
    assert text.startswith(PROMPT) and len(text) > len(PROMPT)
    greedy = pipe(PROMPT, max_new_tokens=120, do_sample=False)[0]["generated_text"]
    ids = generate(model, tokenizer.encode(PROMPT), tokens=120, temperature=0.0, stop_id=tokenizer.eot_id)
    assert greedy == PROMPT + tokenizer.decode(ids) != PROMPT
    assert pipe.model.generation_config.temperature == generate_module.GenerateConfig.temperature
    assert_equal_models(model, pipe.model)


def test_exported_tokenizer_gives_our_ids(exported, pipe):
    _, tokenizer, _ = exported
    texts = [TEXT, TEXT[::-1], "  out \n\n\n  again\t\t", ""]
    if tokenizer.name != "char":
        texts += ["<|endoftext|>", "a<|endoftext|>b", "it's 12345 \x00\x1c\r\n\u3000 naïve e\u0301 한국어 😀"]
    for text in texts:
        ids = tokenizer.encode(text)
        assert pipe.tokenizer(text)["input_ids"] == ids
        assert pipe.tokenizer.decode(ids) == text
        assert pipe.tokenizer.decode([*ids, tokenizer.eot_id], skip_special_tokens=True) == text
    assert len(pipe.tokenizer) == pipe.tokenizer.vocab_size == tokenizer.n_vocab
    assert pipe.tokenizer.eos_token_id == pipe.tokenizer.pad_token_id == tokenizer.eot_id
    assert pipe.tokenizer.model_max_length == 140
    if tokenizer.name == "char":
        with pytest.raises(Exception, match="Missing"):
            pipe.tokenizer("Ω")


CHARACTERS = st.text(st.sampled_from(sorted(set(TEXT))), max_size=60)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(deadline=None, max_examples=40)
@given(characters=CHARACTERS, text=ANY_TEXT)
def test_exported_tokenizer_gives_our_ids_to_any_text(exported, pipe, characters, text):
    _, tokenizer, _ = exported
    text = characters if tokenizer.name == "char" else text
    assert pipe.tokenizer(text)["input_ids"] == tokenizer.encode(text)


def test_exported_files(exported):
    model, tokenizer, folder = exported
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    assert len(tensors) == 2 + 12 * 2 + 2 and "lm_head.weight" not in tensors
    assert tensors["transformer.wte.weight"].shape == (tokenizer.n_vocab, 16)
    assert tensors["transformer.h.0.attn.c_attn.weight"].shape == (16, 48)
    assert all(t.dtype == torch.float32 for t in tensors.values())
    biases = [t for name, t in tensors.items() if name.endswith(".bias")]
    assert all(t.any() == model.config.bias for t in biases) and len(biases) == 6 * 2 + 1
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["eos_token_id"] == tokenizer.eot_id
    assert transformers.AutoConfig.from_pretrained(folder).resid_pdrop == 0.1


def test_round_trip_is_bit_exact(exported, tmp_path):
    model, tokenizer, folder = exported
    hf.import_folder(folder, tmp_path / "run")
    back, same_tokenizer = checkpoint.load_model(tmp_path / "run")
    assert same(back, model) and same_tokenizer.equals(tokenizer)
    hf.export(tmp_path / "run", tmp_path / "again")
    for path in folder.iterdir():
        assert files.sha256(path) == files.sha256(tmp_path / "again" / path.name), path.name


def test_round_trip_through_transformers_keeps_the_model(exported, pipe, tmp_path):
    model, tokenizer, _ = exported
    pipe.model.save_pretrained(tmp_path)
    pipe.tokenizer.save_pretrained(tmp_path)
    back, same_tokenizer = hf.load_pretrained(tmp_path)
    assert same(back, model) and same_tokenizer.equals(tokenizer)


def test_biases_that_were_trained_elsewhere_are_kept(tmp_path):
    write_run(tmp_path / "run", TOKENIZERS["char"], bias=False)
    hf.export(tmp_path / "run", tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["transformer.h.1.ln_2.bias"][3] = 1.0
    safetensors.torch.save_file(tensors, path)
    model, _ = hf.load_pretrained(tmp_path / "hf")
    assert model.config.bias and model.transformer.h[1].ln_2.bias[3] == 1.0


def test_biases_of_zero_are_kept_where_the_folder_has_them(tmp_path):
    """They are what training starts with."""
    settings = {"vocab_size": 50257, "n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 8}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**settings)).save_pretrained(tmp_path)
    model, _ = hf.load_pretrained(tmp_path)
    assert model.config.bias and not model.transformer.ln_f.bias.any()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **settings}))
    assert hf.load_pretrained(tmp_path)[0].config == model.config  # what is not said is as in transformers
    assert model.config.attn_pdrop == model.config.embd_pdrop == model.config.resid_pdrop == 0.1


def test_export_takes_the_checkpoint_that_is_asked_for(tmp_path):
    write_run(tmp_path / "run", TOKENIZERS["char"])
    with pytest.raises(UserError, match="has no checkpoint 'step-00000009'"):
        hf.export(tmp_path / "run", tmp_path / "hf", "step-00000009")
    assert not (tmp_path / "hf").exists()


# Import


@pytest.mark.parametrize("shards", [False, True])
def test_import_of_what_transformers_saves(theirs, tmp_path, shards):
    """Without a tokenizer in the folder the ids are GPT-2's."""
    their_model = theirs(shard_size="20KB" if shards else "1GB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) == (3 if shards else 1)
    model, tokenizer = hf.load_pretrained(tmp_path / "hf")
    assert tokenizer.equals(GPT2Tokenizer()) and not model.training
    assert model.config == GPTConfig(
        50257, 32, 16, 2, 2, embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.1, activation_function="gelu_new"
    )
    assert_equal_models(model, their_model)
    assert all(p.requires_grad and p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())


def old_file(state):
    """As the published files of 2019: no prefix, and the causal mask with each layer."""
    state = {name.removeprefix("transformer."): t for name, t in state.items() if name != "lm_head.weight"}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril().to(torch.uint8) for i in range(2)}
    return {**state, **masks, "h.0.attn.masked_bias": torch.tensor(-1e4)}


def with_head(state):
    return {**state, "lm_head.weight": state["transformer.wte.weight"].clone()}


@pytest.mark.parametrize("change", [old_file, with_head])
@pytest.mark.parametrize("suffix", ["safetensors", "zip", "legacy"])
def test_import_of_old_files(theirs, tmp_path, change, suffix):
    their_model = theirs()
    path = tmp_path / "hf" / "model.safetensors"
    state = change(safetensors.torch.load_file(path))
    if suffix == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        path.unlink()
        torch.save(state, path.with_name("pytorch_model.bin"), _use_new_zipfile_serialization=suffix == "zip")
    model, _ = hf.load_pretrained(tmp_path / "hf")
    assert_equal_models(model, their_model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_import_of_16_bits(theirs, tmp_path, dtype):
    their_model = theirs()
    their_model.to(dtype).save_pretrained(tmp_path / "hf")
    model, _ = hf.load_pretrained(tmp_path / "hf")
    assert_equal_models(model, their_model.float())


def test_import_of_a_padded_vocabulary(theirs, tmp_path):
    their_model = theirs()
    their_model.resize_token_embeddings(50304)
    their_model.save_pretrained(tmp_path / "hf")
    model, _ = hf.load_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == 50257
    assert_equal_models(model, their_model)


def test_import_of_vocab_and_merges(theirs, tmp_path):
    """The two files that came before tokenizer.json."""
    their_model = theirs(vocab_size=280, eos_token_id=279)
    exported = hf._tokenizer_json(TOKENIZERS["bpe"])["model"]
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(exported["vocab"]))
    (tmp_path / "hf" / "merges.txt").write_text("\n".join(["#version: 0.2", *exported["merges"], ""]))
    model, tokenizer = hf.load_pretrained(tmp_path / "hf")
    assert tokenizer.equals(TOKENIZERS["bpe"])
    assert_equal_models(model, their_model)


def test_import_renumbers_where_the_end_of_text_is_first(theirs, tmp_path):
    """As Hugging Face's trainers number: special tokens, then the bytes, then the pairs."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([TEXT] * 2, 282, 2, False, ["<|endoftext|>", "<pad>"])
    their_model = theirs(vocab_size=trained.get_vocab_size(), eos_token_id=0)
    trained.save(str(tmp_path / "hf" / "tokenizer.json"))
    model, tokenizer = hf.load_pretrained(tmp_path / "hf")
    assert isinstance(tokenizer, TrainedTokenizer) and tokenizer.n_vocab == trained.get_vocab_size() - 1
    ids, their_ids = tokenizer.encode(TEXT[:20]), trained.encode(TEXT[:20]).ids
    assert [i + 2 for i in ids] == their_ids
    with torch.no_grad():
        logits, expected = model(torch.tensor([ids]))[0], their_model(torch.tensor([their_ids])).logits
    torch.testing.assert_close(logits[..., :-1], expected[..., 2:], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[..., -1], expected[..., 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "vocab.json"])
def test_tokens_that_are_dropped_are_named(theirs, tmp_path, capsys, old):
    """But padding, which no text has, goes without a word."""
    theirs(vocab_size=288, eos_token_id=279)
    content = hf._tokenizer_json(TOKENIZERS["bpe"])
    added = {f"<speaker{n}>": 279 + n for n in range(1, 8)} | {"[PAD]": 287}
    if old:
        (tmp_path / "hf/vocab.json").write_text(json.dumps(content["model"]["vocab"]))
        (tmp_path / "hf/merges.txt").write_text("\n".join(content["model"]["merges"]))
        (tmp_path / "hf/added_tokens.json").write_text(json.dumps(added))
    else:
        content["added_tokens"] += [{"content": token, "id": i, "special": False} for token, i in added.items()]
        (tmp_path / "hf/tokenizer.json").write_text(json.dumps(content))
    model, _ = hf.load_pretrained(tmp_path / "hf")
    assert model.config.vocab_size == 280
    names = ", ".join(f"'<speaker{n}>'" for n in range(1, 6))
    assert capsys.readouterr().err.endswith(f"here and are dropped: {names} and 2 more\n")


def test_nan_in_the_embedding_is_no_other_head(theirs, tmp_path):
    theirs()
    path = tmp_path / "hf/model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["transformer.wte.weight"][0, 0] = float("nan")
    safetensors.torch.save_file(tensors, path)
    assert hf.load_pretrained(tmp_path / "hf")[0].transformer.wte.weight[0, 0].isnan()


def test_import_follows_the_links_of_the_cache(theirs, tmp_path):
    """models--NAME/snapshots/VERSION/FILE links to models--NAME/blobs/HASH."""
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1", tmp_path / "models--a" / "blobs"
    theirs(snapshot)
    blobs.mkdir()
    for path in list(snapshot.iterdir()):
        shutil.move(path, blobs / path.name)
        path.symlink_to(f"../../blobs/{path.name}")
    assert hf.load_pretrained(snapshot)[1].name == "gpt2"


def test_is_pretrained(exported, tmp_path):
    assert hf.is_pretrained(exported[2])
    assert not hf.is_pretrained(tmp_path / "missing") and not hf.is_pretrained(tmp_path)
    for content in ('{"model_type": "llama"}', '{"train": {}}', "[]", "{"):
        (tmp_path / "config.json").write_text(content)
        assert not hf.is_pretrained(tmp_path)


# The command


@pytest.fixture
def cli(capsys):
    """Runs a command; returns exit code, stdout, stderr."""

    def call(*argv, module=hf, config=hf.HFConfig) -> tuple[int, str, str]:
        return exit_code(module.main, config, *argv), *capsys.readouterr()

    return call


def test_commands_export_and_import(cli, tmp_path):
    tokenizer = TOKENIZERS["char"]
    model = write_run(tmp_path / "run", tokenizer)
    code, out, err = cli("export", tmp_path / "run", tmp_path / "hf")
    assert (code, err) == (0, "") and f'model="{tmp_path}/hf"' in out
    code, out, err = cli("import", tmp_path / "hf", tmp_path / "new" / "run")
    assert (code, err) == (0, "") and f"tokenizer char, {tokenizer.n_vocab} ids\n" in out
    imported = tmp_path / "new" / "run"
    code, out, _ = cli(
        imported, "--prompt", "Down", "--greedy", "--tokens", 9,
        module=generate_module, config=generate_module.GenerateConfig,
    )  # fmt: skip
    ids = generate(model, tokenizer.encode("Down"), tokens=9, temperature=0.0, stop_id=tokenizer.eot_id)
    assert (code, out) == (0, "Down" + tokenizer.decode(ids) + "\n")
    (tmp_path / "text.txt").write_text(TEXT * 9)
    measure = {"module": evaluate, "config": evaluate.EvaluateConfig}
    assert "perplexity" in cli(imported, "--data", tmp_path / "text.txt", **measure)[1]
    code, _, err = cli(imported, **measure)
    assert code == 2 and err.endswith("no validation text, as a model that was imported: give --data FILE\n")
    with pytest.raises(
        UserError, match=r"holds no run: there is no config\.json in it; fine-tune an imported model with"
    ):
        run_folder.stored_options(imported)  # train.py --resume
    (imported / "config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match=r"config\.json is damaged, or of another version"):
        run_folder.stored_options(imported)


def test_commands_refuse_what_cannot_be(cli, tmp_path):
    write_run(tmp_path / "run", CharTokenizer("ab"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for command, source in (("export", "run"), ("import", "hf"), ("download", "gpt2")):
        code, _, err = cli(command, tmp_path / source, tmp_path / "full")
        assert code == 2 and err.count("\n") == 1 and "full exists and is not an empty folder" in err
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert "--checkpoint is for export" in cli("import", "hf", tmp_path / "new", "--checkpoint", "last")[2]
    assert "has no checkpoint" in cli("export", tmp_path / "hf", tmp_path / "new")[2]
    assert "is not a folder: give one with a config.json" in cli("import", tmp_path / "hf", tmp_path / "new")[2]
    assert "unknown model 'gpt3': choose gpt2, gpt2-medium" in cli("download", "gpt3", tmp_path / "new")[2]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["export", "import"])
def test_commands_write_where_a_link_leads(cli, tmp_path, command):
    write_run(tmp_path / "run", CharTokenizer("ab"))
    hf.export(tmp_path / "run", tmp_path / "hf")
    (tmp_path / "elsewhere/empty").mkdir(parents=True)
    (tmp_path / "elsewhere/empty/.DS_Store").write_bytes(b"x")
    (tmp_path / "link").symlink_to("elsewhere/empty")
    code, _, err = cli(command, tmp_path / {"export": "run", "import": "hf"}[command], tmp_path / "link")
    assert (code, err) == (0, "") and (tmp_path / "link").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf", "elsewhere", "link"}
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["empty"]
    name = {"export": "config.json", "import": "checkpoints"}[command]
    assert (tmp_path / "elsewhere/empty" / name).exists()


def test_commands_refuse_a_folder_that_cannot_be_replaced(cli, tmp_path, monkeypatch):
    write_run(tmp_path / "run", CharTokenizer("ab"))
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(checkpoint, "load_model", None)  # refused before the work
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "empty")
        code, _, err = cli("export", tmp_path / "run", tmp_path / "empty")
        assert code == 2 and "empty is the current folder or where a disk is mounted: choose a new folder in it" in err
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = cli("export", tmp_path / "run", ".")
    assert code == 2 and err.count("\n") == 1 and "choose a new folder in it" in err


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    write_run(tmp_path / "run", CharTokenizer("ab"))

    def full(path, data, **options):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(files, "write_file", full)
    with pytest.raises(OSError, match="No space"):
        hf.export(tmp_path / "run", tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
