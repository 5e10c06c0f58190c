"""GPT-2 in Hugging Face's form: a run as a folder that transformers loads, and such a folder as a run.

    python -m model.hf export runs/first-run first-run-hf     # pipeline("text-generation", model="first-run-hf")
    python -m model.hf import folder runs/a                   # any GPT-2, of one file or in shards
    python -m model.hf download gpt2 runs/gpt2                # the published weights, 124M to 1.5B, from huggingface.co

    config.json               model_type gpt2, and the settings under the names of GPTConfig
    model.safetensors         parameters by name, the tied head not repeated; or shards, and an index of them
    tokenizer.json            byte pairs or characters; or vocab.json and merges.txt
    tokenizer_config.json generation_config.json

Their matrices lie the other way round, (in, out), and every layer has biases: a model without any is exported with
biases of zero, which change no number, and "bias": false in config.json lets it come back without.

A folder may come from anywhere (`model.foreign`): tensors are read only after the settings and the headers of all files
agree on every shape, one at a time. They take the memory that the files have, twice that where these are of 16 bits.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.filesize import decimal
from torch import Tensor

from model import bpe, checkpoint, files, foreign
from model.cli import LiveLine, UserError, explain, run
from model.config import PRESETS, GPTConfig
from model.gpt import GPT, num_parameters
from model.sampling import TEMPERATURE, TOP_K
from model.tokenizer import MAX_VOCAB, BytePairTokenizer, CharTokenizer, GPT2Tokenizer, Tokenizer, TrainedTokenizer

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", ("model.safetensors", "pytorch_model.bin")
END_OF_TEXT = "<|endoftext|>"
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # matrices that are (in, out) in these files
_EMBEDDING, _HEAD = "wte.weight", "lm_head.weight"


# Export


def export(run: Path, folder: Path, name: str = "best") -> GPT:
    """Write the model of a run into the new folder `folder`, in float32 -> that model.

    name: of the checkpoint, see checkpoint.load. UserError for a folder that exists and is not empty.
    """
    files.refuse_existing(folder)
    model, tokenizer = checkpoint.load_model(run, name=name)
    end = {"bos_token_id": tokenizer.eot_id, "eos_token_id": tokenizer.eot_id}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", **model.config.to_dict(), **end}
    # As model.generate samples; pipeline would take settings of its own, which differ between versions.
    sampling = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
    settings = {
        TOKENIZER: _tokenizer_json(tokenizer),
        "tokenizer_config.json": _tokenizer_config(model.config.n_positions),
        "generation_config.json": {**end, "pad_token_id": tokenizer.eot_id, **sampling},
        CONFIG: {**config, "tie_word_embeddings": True},
    }
    state = model.state_dict()
    tensors = {name: state.get(name, torch.zeros(shape)) for name, shape in _shapes(model.config).items()}
    with files.new_folder(folder) as temporary:
        checkpoint.write_tensors(
            temporary, "model", {name: _turned(name, t) for name, t in tensors.items()}, metadata={"format": "pt"}
        )
        for file, content in settings.items():
            files.write_file(temporary / file, json.dumps(content, indent=2) + "\n")
    return model


def _shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """The shape of each parameter, biases included, as in our model."""
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(replace(config, bias=True)).named_parameters()}


def _turned(name: str, tensor: Tensor) -> Tensor:
    """A parameter in the other one's order: a view."""
    return tensor.t() if name.endswith(_CONV1D) else tensor


def _tokenizer_config(n_positions: int) -> dict[str, Any]:
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    # split_special_tokens: the characters <|endoftext|> in a text are text, as for our tokenizers.
    settings = {"model_max_length": n_positions, "split_special_tokens": True, "clean_up_tokenization_spaces": False}
    return {"tokenizer_class": "PreTrainedTokenizerFast", **special, **settings}


_CHARACTERS = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json of Hugging Face's tokenizers: the ids of ours for any text.

    A character outside the alphabet has no id there either: a WordLevel model without an unknown token raises.
    """
    if isinstance(tokenizer, BytePairTokenizer):
        tokens = list(map(bpe.to_printable, tokenizer.tokens))
        merges = [f"{bpe.to_printable(a)} {bpe.to_printable(b)}" for a, b in tokenizer.merges()]
        model: dict[str, Any] = {"type": "BPE", "merges": merges}
        parts = {"pre_tokenizer": _BYTES, "decoder": _BYTES}
    else:
        assert isinstance(tokenizer, CharTokenizer)
        tokens = list(tokenizer.chars)
        model = {"type": "WordLevel", "unk_token": "<unk>"}
        parts = {"pre_tokenizer": _CHARACTERS, "decoder": {"type": "Fuse"}}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"id": tokenizer.eot_id, "content": END_OF_TEXT, **flags, "special": True}
    model["vocab"] = {token: i for i, token in enumerate([*tokens, END_OF_TEXT])}
    return {"version": "1.0", "added_tokens": [special], "normalizer": None, **parts, "model": model}


# Import


def import_folder(folder: Path, run: Path) -> tuple[GPT, Tokenizer]:
    """Make `run` a run with the model and tokenizer of a Hugging Face folder -> both. See load_pretrained."""
    files.refuse_existing(run)  # before the weights are read
    model, tokenizer = load_pretrained(folder)
    checkpoint.save_model(run, model, tokenizer, config={})
    return model, tokenizer


def is_pretrained(folder: Path) -> bool:
    """Whether `folder` is a GPT-2 in Hugging Face's form, by its config.json alone."""
    with contextlib.suppress(UserError, OSError):
        return _settings(folder).get("model_type") == "gpt2"
    return False


def shape_of(folder: Path) -> GPTConfig:
    """The shape of the model in a Hugging Face folder, without its weights; with padding in the vocabulary, if any."""
    settings = _settings(folder)
    return replace(_config(folder, settings), bias=settings.get("bias") is not False)


def load_pretrained(folder: Path) -> tuple[GPT, Tokenizer]:
    """The model of a Hugging Face folder, float32 on the CPU, in evaluation mode, and its tokenizer.

    Without a tokenizer in the folder it is GPT-2's, if the embedding has the rows for it. Rows that pad the embedding
    are dropped, and tokens that were added besides the end of text, which a line on stderr names; where that one is not
    the last id, ids are numbered anew. UserError for a folder that is not a GPT-2 of this kind, is incomplete or
    damaged.
    """
    settings = _settings(folder)
    config = _config(folder, settings)
    tokenizer, rows = _load_tokenizer(folder, settings, config.vocab_size)
    weights = _read_weights(folder, config)
    if rows != list(range(config.vocab_size)):
        config = replace(config, vocab_size=len(rows))
        weights[_EMBEDDING] = weights[_EMBEDDING][rows]
    if settings.get("bias") is False and not any(t.any() for name, t in weights.items() if name.endswith(".bias")):
        config = replace(config, bias=False)
        weights = {name: t for name, t in weights.items() if not name.endswith(".bias")}
    with torch.device("meta"):
        model = GPT(config)
    model.load_state_dict({f"transformer.{name}": t for name, t in weights.items()}, assign=True)
    return model.eval(), tokenizer


def _settings(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one with a {CONFIG} and weights")
    return foreign.read_json(folder, CONFIG)


def _config(folder: Path, settings: Mapping[str, Any]) -> GPTConfig:
    """config.json as a GPTConfig with biases; UserError for what our GPT-2 has not."""
    path = folder / CONFIG
    if (kind := settings.get("model_type")) != "gpt2":
        raise UserError(f"{path}: model_type is {foreign.quote(kind)}, and only gpt2 can be read")
    # Absent, each is what transformers takes for it; another value is another model.
    fixed = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for name, value in fixed.items():
        if settings.get(name, value) is not value:
            raise UserError(f"{path}: {name} is {foreign.quote(settings[name])}, which this GPT-2 does not support")
    values = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, **settings}
    if values.get("activation_function") == "gelu_pytorch_tanh":
        values["activation_function"] = "gelu_new"  # the same function
    try:
        config = GPTConfig(**{name: values[name] for name in GPTConfig().to_dict().keys() & values} | {"bias": True})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {foreign.clean(error)}") from None
    if (width := settings.get("n_inner")) not in (None, 4 * config.n_embd):
        raise UserError(f"{path}: n_inner is {foreign.quote(width)}, and a GPT-2's is 4 * n_embd, {4 * config.n_embd}")
    return config


# Weights


def _read_weights(folder: Path, config: GPTConfig) -> dict[str, Tensor]:
    """The parameters in our order, float32, by their names without `transformer.`."""
    paths = _weight_files(folder)
    before = [foreign.stamp(path) for path in paths]
    stored = _stored(paths)
    _check_shapes(folder, config, stored)
    total = sum(t.nbytes for name, t in stored.items() if name != _HEAD)
    if total > sum(size for size, _ in before):  # tensors that share their numbers
        raise UserError(f"{folder}: the weights have fewer bytes than the {total:,} of their tensors")
    weights = {}
    with LiveLine("reading", total, is_bytes=True, stderr=True) as line:
        for name, tensor in sorted(stored.items(), key=lambda item: item[0] == _HEAD):  # the head last
            weights[name] = _turned(name, tensor.read()).float().contiguous()
            line.advance(tensor.nbytes)
    for path, stamp in zip(paths, before, strict=True):
        if foreign.stamp(path) != stamp:
            raise UserError(f"{path} has changed while it was read: wait until the folder is complete")
    if _HEAD in weights and not torch.equal(weights.pop(_HEAD), weights[_EMBEDDING]):
        raise UserError(f"{folder}: {_HEAD} differs from {_EMBEDDING}, and GPT-2 ties the two")
    return weights


def _weight_files(folder: Path) -> list[Path]:
    """The file or the shards with the weights; transformers prefers them in the same order."""
    for name in WEIGHTS:
        if foreign.has(folder, name):
            return [foreign.inside(folder, name)]
        index = f"{name}.index.json"
        if foreign.has(folder, index):
            shards = foreign.read_json(folder, index).get("weight_map")
            names = [*shards.values()] if isinstance(shards, dict) else []
            if not names or not all(isinstance(n, str) and n.endswith(Path(name).suffix) for n in names):
                raise UserError(f"{folder / index} does not say in which {Path(name).suffix} file each tensor is")
            return [foreign.inside(folder, n) for n in sorted(set(names))]
    raise UserError(f"{folder} has no weights: neither {' nor '.join(WEIGHTS)}, nor an index of shards")


def _stored(paths: list[Path]) -> dict[str, foreign.StoredTensor]:
    """The tensors of all files by name, without `transformer.` and without the masks that old files have."""
    stored: dict[str, foreign.StoredTensor] = {}
    for path in paths:
        for full_name, tensor in foreign.tensors(path):
            name = full_name.removeprefix("transformer.")
            if name in stored:
                raise UserError(f"{path}: {foreign.quote(name)} is there twice")
            if not re.fullmatch(r"h\.[0-9]+\.attn\.(masked_)?bias", name):
                stored[name] = tensor
    return stored


def _check_shapes(folder: Path, config: GPTConfig, stored: Mapping[str, foreign.StoredTensor]) -> None:
    """UserError unless the tensors are those of the model in config.json. Absurd sizes are found before it is built."""
    n_layers = len({name.split(".")[1] for name in stored if name.startswith("h.")})
    if n_layers != config.n_layer:
        raise UserError(
            f"{folder}: n_layer is {config.n_layer:,} in {CONFIG}, and the weights have {n_layers:,} layers"
        )
    embeddings = {_EMBEDDING: (config.vocab_size, config.n_embd), "wpe.weight": (config.n_positions, config.n_embd)}
    _compare(folder, embeddings, stored)
    expected = {}
    for full_name, shape in _shapes(config).items():
        name = full_name.removeprefix("transformer.")
        expected[name] = tuple(reversed(shape)) if name.endswith(_CONV1D) else tuple(shape)
    _compare(folder, expected, stored)
    if other := next((name for name in stored if name not in expected and name != _HEAD), None):
        raise UserError(f"{folder} has a tensor {foreign.quote(other)}, which a GPT-2 language model does not have")
    if _HEAD in stored:
        _compare(folder, {_HEAD: embeddings[_EMBEDDING]}, stored)


def _compare(folder: Path, expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, foreign.StoredTensor]) -> None:
    for name, shape in expected.items():
        if name not in stored:
            raise UserError(f"{folder}: the weights lack {name}: is the folder complete?")
        path, found = stored[name].path, stored[name].shape
        if found != shape:
            raise UserError(f"{path}: {name} is {foreign.quote(found)}, and {CONFIG} says {shape}")
        stored[name].check_dtype(name)


# Tokenizers

_ADDED = "added_tokens.json"  # beside vocab.json; tokenizer.json has them itself
_PADDING = re.compile(r"[\W_]*pad[\W_]*", re.IGNORECASE)  # a token that no text has


def _load_tokenizer(folder: Path, settings: Mapping[str, Any], n_rows: int) -> tuple[Tokenizer, list[int]]:
    """The tokenizer of a folder, and which of the n_rows rows of the embedding each of its ids has there."""
    name = next((name for name in (TOKENIZER, "vocab.json") if foreign.has(folder, name)), None)
    if name is None:
        gpt2 = GPT2Tokenizer()
        if not gpt2.n_vocab <= n_rows < gpt2.n_vocab + 128:  # some pad it to a multiple of 128
            raise UserError(f"{folder} has no {TOKENIZER}, and {n_rows:,} ids are not GPT-2's: put the file there")
        return gpt2, list(range(gpt2.n_vocab))
    content = foreign.read_json(folder, name, foreign.LARGE)
    try:
        if name == TOKENIZER:
            ids, merges = _parse(content)
        else:
            lines = foreign.read(folder, "merges.txt", foreign.LARGE).decode().splitlines()
            added = foreign.read_json(folder, _ADDED) if foreign.has(folder, _ADDED) else {}
            ids, merges = content | added, [s.split(" ") for s in lines if s and not s.startswith("#version")]
        tokenizer, tokens = _character_ids(ids) if merges is None else _byte_pairs(ids, merges)
        rows: list[Any] = [ids[token] for token in tokens] + [ids.get(END_OF_TEXT, settings.get("eos_token_id"))]
        if not all(type(row) is int for row in rows):
            raise ValueError("there is no id of the end of text")
        if len(set(rows)) < len(rows) or min(rows) < 0 or max(rows) >= n_rows:
            raise ValueError(f"its ids are not different rows of the {n_rows:,} that the embedding has")
        used = {*rows}
        dropped = [token for token, row in ids.items() if row not in used and not _PADDING.fullmatch(token)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = foreign.clean(error) if type(error) is ValueError else "it is damaged"
        kinds = "of byte pairs as GPT-2's, or of characters as exported here"
        raise UserError(f"{folder / name} is not a tokenizer {kinds}: {reason}") from None
    if dropped:
        some = ", ".join(map(foreign.quote, dropped[:5])) + (f" and {len(dropped) - 5:,} more" if dropped[5:] else "")
        print(f"note: added tokens cannot be used here and are dropped: {some}", file=sys.stderr)
    return tokenizer, rows


def _parse(content: dict[str, Any]) -> tuple[dict[str, int], list[list[str]] | None]:
    """tokenizer.json -> the id of each token, special ones included, and the merges; None for characters."""
    model, splits = content["model"], content["pre_tokenizer"]
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in content.get("added_tokens") or []}}
    if content.get("normalizer"):
        raise ValueError("it changes the text first")
    if model.get("type", "BPE") == "WordLevel" and splits == _CHARACTERS:
        return ids, None
    if model.get("type", "BPE") != "BPE" or {**_BYTES, **splits, "trim_offsets": True} != _BYTES:
        raise ValueError("it splits text in another way")
    if any(model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        raise ValueError("it merges in another way")
    return ids, [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]


def _character_ids(ids: Mapping[str, int]) -> tuple[Tokenizer, list[str]]:
    tokenizer = CharTokenizer(token for token in ids if len(token) == 1)
    return tokenizer, list(tokenizer.chars)


def _byte_pairs(ids: Mapping[str, int], merges: list[list[str]]) -> tuple[Tokenizer, list[str]]:
    """The tokenizer with these merges, and its tokens in print."""
    alphabet = sorted((bpe.to_printable(bytes([b])) for b in range(256)), key=ids.__getitem__)
    tokens = [*alphabet, *(a + b for a, b in merges)]
    if len(tokens) >= MAX_VOCAB:
        raise ValueError(f"{len(tokens):,} tokens are too many")
    as_bytes = tuple(map(bpe.from_printable, tokens))
    gpt2 = GPT2Tokenizer()
    tokenizer = gpt2 if as_bytes == gpt2.tokens else TrainedTokenizer(as_bytes)
    if tokenizer.merges() != tuple((bpe.from_printable(a), bpe.from_printable(b)) for a, b in merges):
        raise ValueError("its merges do not make its tokens in order")
    return tokenizer, tokens


# Download

PUBLISHED = tuple(name for name in PRESETS if name.startswith("gpt2"))
_WANTED = r"(config|tokenizer|vocab|added_tokens)\.json|merges\.txt"
_WEIGHTS = (  # the second where there is none of the first
    r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json",
    r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json",
)


def download(name: str, run: Path) -> tuple[GPT, Tokenizer]:
    """Fetch a GPT-2 from huggingface.co, or HF_ENDPOINT, into Hugging Face's cache, and import it into `run`.

    name: one of PUBLISHED, or OWNER/NAME of another. A connection that breaks is resumed where it broke; files that are
    in the cache are not fetched again. Weights are compared with the SHA-256 that the server has for them.
    """
    files.refuse_existing(run)
    if name not in PUBLISHED and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UserError(f"unknown model {name!r}: choose {', '.join(PUBLISHED)}, or OWNER/NAME on huggingface.co")
    repo = f"openai-community/{name}" if name in PUBLISHED else name
    try:
        from huggingface_hub import HfApi, constants, hf_hub_download  # here: an extra, and nothing else needs it
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError:
        raise UserError("to download models needs a package: python -m pip install huggingface_hub") from None
    server = constants.ENDPOINT
    try:
        info = HfApi().model_info(repo, files_metadata=True)
        wanted = _wanted(info.siblings or [])
        size = decimal(sum(file.size or 0 for file in wanted))
        print(f"{server}/{repo}, version {info.sha}: {len(wanted)} files, {size}", flush=True)
        paths = [Path(hf_hub_download(repo, file.rfilename, revision=info.sha)) for file in wanted]
    except RepositoryNotFoundError:
        raise UserError(f"{server} has no public model {repo}: check its name") from None
    except Exception as error:  # of huggingface_hub, of the HTTP library that its version has, or of the system
        if isinstance(error, OSError) and (message := explain(error)):
            raise UserError(message) from None
        advice = f"try again, what is complete stays; or copy a folder here: python -m model.hf import FOLDER {run}"
        raise UserError(f"could not download {repo} from {server}: {foreign.clean(error)}\n{advice}") from None
    for path, file in zip(paths, wanted, strict=True):
        if file.lfs and files.sha256(path) != file.lfs.sha256:
            raise UserError(f"{path} is not what {server} has (SHA-256): remove {path.resolve()}, and try again")
    if not paths:
        raise UserError(f"{repo} has no weights that can be read: neither {' nor '.join(WEIGHTS)}, nor shards of them")
    print(f"complete, in {paths[0].parent}")
    return import_folder(paths[0].parent, run)


def _wanted(listed: list[Any]) -> list[Any]:
    """The files of a repository that make a model; none where it has no weights of a kind that can be read."""
    for pattern in _WEIGHTS:
        if any(re.fullmatch(pattern, file.rfilename) for file in listed):
            return [file for file in listed if re.fullmatch(f"{_WANTED}|{pattern}", file.rfilename)]
    return []


# The command


@dataclass(frozen=True)
class HFConfig:
    """Exchange models with Hugging Face: export a run as a folder for transformers, import one, or download GPT-2."""

    command: tyro.conf.Positional[Literal["export", "import", "download"]]
    source: tyro.conf.Positional[str]
    """export: the folder of a run; import: a folder with config.json; download: gpt2, gpt2-medium, gpt2-large, gpt2-xl,
    or OWNER/NAME"""
    target: tyro.conf.Positional[Path]
    """new folder: export's, or that of a run"""
    checkpoint: str = "best"
    """of export: last, best (lowest validation loss), or a name such as step-00000100"""


def main(cfg: HFConfig) -> None:
    source, target = Path(cfg.source), shlex.quote(str(cfg.target))
    if cfg.command == "export":
        model = export(source, cfg.target, cfg.checkpoint)
        name = json.dumps(str(cfg.target))
        print(f"{cfg.target}: {num_parameters(model):,} parameters")
        print(f'use it: transformers.pipeline("text-generation", model={name}, tokenizer={name})')
        return
    if cfg.checkpoint != "best":
        raise UserError(f"--checkpoint is for export: omit it with {cfg.command}")
    fetched = download(cfg.source, cfg.target) if cfg.command == "download" else import_folder(source, cfg.target)
    model, tokenizer = fetched
    print(f"{cfg.target}: {num_parameters(model):,} parameters, tokenizer {tokenizer.name}, {tokenizer.n_vocab:,} ids")
    print(f"use it: python -m model.generate {target}")


if __name__ == "__main__":
    run(main, HFConfig, prog="python -m model.hf")
