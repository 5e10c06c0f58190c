"""Folders that are damaged, incomplete, of another model or hostile: refused by name, with nothing executed or left."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
import safetensors.torch
import torch
from hf_folders import TOKENIZERS, write_run

from model import foreign, hf
from model.cli import UserError, explain, run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    write_run(root / "run", TOKENIZERS["bpe"])
    hf.export(root / "run", root / "hf")
    return root / "hf"


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "hf"))


def config(**changes):
    """Change settings of config.json; None removes one."""

    def change(folder):
        path = folder / "config.json"
        values = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return change


def tokenizer(function):
    """Change the content of tokenizer.json in place."""

    def change(folder):
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        function(content)
        path.write_text(json.dumps(content))

    return change


def write(name, data):
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def weights(function):
    """Change the tensors of model.safetensors in place."""

    def change(folder):
        path = folder / "model.safetensors"
        tensors = safetensors.torch.load_file(path)
        function(tensors)
        safetensors.torch.save_file(tensors, path)

    return change


def header(function=lambda header: None, length=None, data=None):
    """Change the header of model.safetensors, what it says of its length, or the bytes after it."""

    def change(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (n,) = struct.unpack("<Q", content[:8])
        values, rest = json.loads(content[8 : 8 + n]), content[8 + n :]
        function(values)
        text = json.dumps(values).encode()
        path.write_bytes(struct.pack("<Q", length or len(text)) + text + (rest if data is None else data))

    return change


WTE = "transformer.wte.weight"


def overlap(values):
    values[WTE]["data_offsets"] = values["transformer.h.0.mlp.c_fc.weight"]["data_offsets"]


def pickled(content, **options):
    def change(folder):
        state = safetensors.torch.load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(
            content(state) if isinstance(content, FunctionType) else content, folder / "pytorch_model.bin", **options
        )

    return change


class Command:
    """A pickle that runs a command where it is loaded."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def raw_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Command()))


def empty_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").write_bytes(b"")


def compressed(folder):
    pickled(lambda state: state)(folder)
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def expanded(state):
    """A tensor of one number that says it has as many as the embedding."""
    return {**state, WTE: torch.zeros(1).expand(state[WTE].shape)}


def shared(state):
    """Every number of the file many times over."""
    numbers = torch.zeros(max(t.numel() for t in state.values()))
    return {name: numbers[: t.numel()].view(t.shape) for name, t in state.items()}


def index(weight_map, keep=False):
    def change(folder):
        if not keep:
            (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def link(name, target):
    def change(folder):
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def outside(folder):
    shutil.move(folder / "model.safetensors", folder.parent / "other.safetensors")
    (folder / "model.safetensors").symlink_to("../other.safetensors")


def duplicate(folder):
    shutil.copy(folder / "model.safetensors", folder / "b.safetensors")
    index({WTE: "a.safetensors", "x": "b.safetensors"})(folder)


def fifo(folder):
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def drop(key):
    return lambda content: content.pop(key)


def split_elsewhere(content):
    """The same tokens, the last one made of its first byte and the rest."""
    merges = content["model"]["merges"]
    token = merges[-1].replace(" ", "")
    merges[-1] = f"{token[0]} {token[1:]}" if merges[-1].index(" ") > 1 else f"{token[:-1]} {token[-1]}"


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 548105171\n"
ESCAPES = "\x1b[31m\n" * 200
CASES = {
    # config.json
    "config missing": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config empty": (write("config.json", ""), "config.json is not a JSON object"),
    "config a list": (write("config.json", "[1]"), "config.json is not a JSON object"),
    "config nested": (write("config.json", "[" * 200_000), "config.json is not a JSON object"),
    "config not text": (write("config.json", b"\xff\xfe\x00"), "config.json is not a JSON object"),
    "config huge": (write("config.json", " " * (foreign.SMALL + 1)), "config.json has 1,048,577 bytes"),
    "config a pipe": (fifo, "config.json is not a file"),
    "config a pointer": (write("config.json", POINTER), "config.json is a Git LFS pointer.* run `git lfs pull`"),
    "epsilon of 401 digits": (config(layer_norm_epsilon=10**400), "layer_norm_epsilon must be a number above 0 and"),
    "other model": (config(model_type="llama"), "model_type is 'llama'"),
    "no model type": (config(model_type=None), "model_type is None"),
    "absurd layers": (config(n_layer=10**12), "n_layer is 1,000,000,000,000 in config.json, and the weights have 2"),
    "absurd vocabulary": (config(vocab_size=10**15), r"wte.weight is \(280, 16\), and config.json says"),
    "absurd width": (config(n_embd=2 * 10**18), r"config.json says \(280, 2000000000000000000\)"),
    "absurd context": (config(n_positions=10**18), "wpe.weight is"),
    "negative": (config(n_layer=-1), "n_layer must be a whole number of at least 1"),
    "text for a number": (config(n_head="2"), "n_head must be a whole number"),
    "heads that do not divide": (config(n_head=3), "n_head must divide n_embd"),
    "unknown activation": (config(activation_function="relu"), "activation_function must be"),
    "activation a list": (config(activation_function=["gelu"]), "config.json: "),
    "terminal escapes": (config(activation_function=ESCAPES), "activation_function must be"),
    "wide MLP": (config(n_inner=8), "n_inner is 8, and a GPT-2's is 4"),
    "unscaled attention": (config(scale_attn_weights=False), "scale_attn_weights is False"),
    "scaled by layer": (config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    "cross attention": (config(add_cross_attention=True), "add_cross_attention is True"),
    # safetensors
    "weights missing": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: neither"),
    "weights empty": (write("model.safetensors", b""), "not a complete safetensors file"),
    "weights a pointer": (write("model.safetensors", POINTER), "model.safetensors is a Git LFS pointer, not the file"),
    "weights text": (write("model.safetensors", "not weights"), "not a complete safetensors file"),
    "weights cut": (header(data=b"\0" * 100), "not a complete safetensors file"),
    "weights with a tail": (lambda f: header(data=(f / "model.safetensors").read_bytes())(f), "not a complete"),
    "header beyond the file": (header(length=2**19), "not a complete safetensors file"),
    "header of 2**63 bytes": (header(length=2**63), "a header of 9,223,372,036,854,775,808 bytes"),
    "header of another length": (header(length=7), "not a complete safetensors file"),
    "header nested": (write("model.safetensors", struct.pack("<Q", 90_000) + b"[" * 90_000), "not a complete"),
    "overlap": (header(overlap), "not a complete safetensors file"),
    "offsets backwards": (header(lambda h: h[WTE]["data_offsets"].reverse()), "not a complete"),
    "offset negative": (header(lambda h: h[WTE].update(data_offsets=[-8, 8])), "not a complete"),
    "shape beyond 64 bits": (header(lambda h: h[WTE].update(shape=[2**40, 2**40])), "not a complete"),
    "unknown dtype": (header(lambda h: h[WTE].update(dtype="F12")), "not a complete"),
    "dtype of integers": (header(lambda h: h[WTE].update(dtype="I32")), "wte.weight is 'I32': convert it"),
    "transposed": (header(lambda h: h[WTE]["shape"].reverse()), r"wte.weight is \(16, 280\)"),
    "name with a path": (weights(lambda t: t.update({"../../etc/x": torch.zeros(1)})), "a tensor '../../etc/x'"),
    "name with escapes": (weights(lambda t: t.update({ESCAPES: torch.zeros(1)})), r"a tensor '\\x1b"),
    "tensor missing": (weights(drop("transformer.h.1.ln_2.bias")), "the weights lack h.1.ln_2.bias"),
    "layer missing": (weights(lambda t: [t.pop(n) for n in [*t] if ".h.1." in n]), "the weights have 1 layers"),
    "twice with a prefix": (weights(lambda t: t.update({"wte.weight": t[WTE].clone()})), "'wte.weight' is there twice"),
    "untied head": (weights(lambda t: t.update({"lm_head.weight": t[WTE] + 1})), "lm_head.weight differs"),
    "another head": (weights(lambda t: t.update({"score.weight": torch.zeros(2, 16)})), "a tensor 'score.weight'"),
    # shards
    "index of nothing": (index({}), "does not say in which .safetensors file"),
    "index of numbers": (index({WTE: 3}), "does not say in which .safetensors file"),
    "index of a list": (index([WTE]), "does not say in which .safetensors file"),
    "index of another kind": (index({WTE: "a.bin"}), "does not say in which .safetensors file"),
    "index with a path": (index({WTE: "../a.safetensors"}), "leads out of the folder"),
    "index with a root": (index({WTE: "/etc/a.safetensors"}), "leads out of the folder"),
    "index with a null": (index({WTE: "a\0.safetensors"}), "leads out of the folder"),
    "shard missing": (index({WTE: "a.safetensors", "b": "b.safetensors"}), "has no b.safetensors: is it complete"),
    "shards that overlap": (duplicate, "is there twice"),
    # links
    "link out": (outside, "leads out of the folder"),
    "link to a device": (link("model.safetensors", "/dev/zero"), "leads out of the folder"),
    "link to nothing": (link("model.safetensors", "nothing.safetensors"), "has no model.safetensors"),
    "link to itself": (link("model.safetensors", "model.safetensors"), "model.safetensors"),
    "folder for a file": (lambda f: ((f / "tokenizer.json").unlink(), (f / "tokenizer.json").mkdir()), "is not a file"),
    # pickles
    "pickle that executes": (raw_pickle, "does not hold weights alone, nothing of it was executed"),
    "pickle that executes, in torch's form": (pickled(Command()), "nothing of it was executed"),
    "command among weights": (pickled(lambda s: {**s, "x": Command()}), "nothing of it was executed"),
    "command in an old pickle": (pickled(Command(), _use_new_zipfile_serialization=False), "nothing of it was"),
    "pickled list": (pickled([1, 2]), "no tensors by name"),
    "pickled module": (pickled(torch.nn.Linear(2, 2)), "does not hold weights alone"),
    "pickled numbers": (pickled({WTE: 3}), "is not a tensor of numbers"),
    "pickled tensors without memory": (pickled(lambda s: {**s, WTE: s[WTE].to("meta")}), "is not a tensor of numbers"),
    "pickled sparse": (pickled(lambda s: {**s, WTE: s[WTE].to_sparse()}), "is not a tensor of numbers"),
    "pickle compressed": (compressed, "it is compressed"),
    "pickle expanded": (pickled(expanded), "has fewer numbers than its shape says"),
    "pickle shared": (pickled(shared), "the weights have fewer bytes than"),
    "pickle empty": (empty_pickle, "does not hold weights alone"),
    # tokenizers
    "tokenizer empty": (write("tokenizer.json", "{}"), "is not a tokenizer of byte pairs .*: it is damaged"),
    "tokenizer of words": (tokenizer(lambda t: t["model"].update(type="WordLevel")), "splits text in another way"),
    "tokenizer that normalizes": (tokenizer(lambda t: t.update(normalizer={"type": "NFC"})), "changes the text first"),
    "tokenizer with a space": (
        tokenizer(lambda t: t["pre_tokenizer"].update(add_prefix_space=True)),
        "splits text in another way",
    ),
    "tokenizer with dropout": (tokenizer(lambda t: t["model"].update(dropout=0.1)), "merges in another way"),
    "merges out of order": (tokenizer(lambda t: t["model"]["merges"].reverse()), "is not a tokenizer of byte pairs"),
    "merges of other pairs": (tokenizer(split_elsewhere), "its merges do not make its tokens in order"),
    "merges of three": (tokenizer(lambda t: t["model"].update(merges=["a b c"])), "is not a tokenizer of byte pairs"),
    "merges of numbers": (tokenizer(lambda t: t["model"].update(merges=[[1, 2]])), "it is damaged"),
    "byte missing": (tokenizer(lambda t: t["model"]["vocab"].pop("a")), "it is damaged"),
    "id twice": (tokenizer(lambda t: t["model"]["vocab"].update(a=1)), "are not different rows of the 280"),
    "id too large": (tokenizer(lambda t: t["model"]["vocab"].update(a=10**9)), "is not a tokenizer of byte pairs"),
    "id not a number": (tokenizer(lambda t: t["model"]["vocab"].update(a="0")), "it is damaged"),
    "no end of text": (
        lambda f: (
            config(eos_token_id=None)(f),
            tokenizer(lambda t: (t.pop("added_tokens"), t["model"]["vocab"].pop("<|endoftext|>")))(f),
        ),
        "there is no id of the end of text",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json, and 280 ids are not GPT-2's"),
    "merges missing": (
        lambda f: ((f / "tokenizer.json").unlink(), write("vocab.json", "{}")(f)),
        "has no merges.txt",
    ),
    "merges huge": (
        lambda f: (
            (f / "tokenizer.json").unlink(),
            write("vocab.json", "{}")(f),
            write("merges.txt", "a b\n" * (1 << 22) + "\n")(f),
        ),
        "merges.txt has 16,777,217 bytes",
    ),
}  # fmt: skip


def test_the_folder_is_good_before_it_is_changed(folder, tmp_path):
    hf.import_folder(folder, tmp_path / "run")


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about what is written here
@pytest.mark.parametrize("case", CASES)
def test_bad_folder_is_refused(case, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    damage, message = CASES[case]
    damage(folder)
    with pytest.raises(SystemExit) as exit_:
        run(hf.main, hf.HFConfig, prog="x", argv=["import", "hf", "run"])
    out, err = capsys.readouterr()
    assert exit_.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") <= 2 and len(err) < 600
    assert err.replace("\n", "").isprintable()
    assert re.search(message, err), err
    assert {path.name for path in tmp_path.iterdir()} <= {"hf", "other.safetensors"}


def test_a_file_that_changes_while_it_is_read_is_refused(folder, tmp_path, monkeypatch):
    """A tensor that is no longer there, and a file that was written anew behind what has been read."""
    path, read = folder / "model.safetensors", np.fromfile

    def cut(*arguments, **options):
        os.truncate(path, 4000)
        return read(*arguments, **options)

    def touch(*arguments, **options):
        os.utime(path, ns=(1, 1))
        return read(*arguments, **options)

    content = path.read_bytes()
    for change in (cut, touch):
        path.write_bytes(content)
        monkeypatch.setattr(np, "fromfile", change)
        with pytest.raises(UserError, match="has changed while it was read: wait until the folder is complete"):
            hf.load_pretrained(folder)


def test_a_file_that_cannot_be_mapped_is_named(folder, monkeypatch):
    def fail(path, framework):
        raise OSError("No such device (os error 19)")  # of safetensors, without a number or a name

    monkeypatch.setattr(foreign, "safe_open", fail)
    with pytest.raises(OSError) as caught:
        hf.load_pretrained(folder)
    assert explain(caught.value) == f"{folder}/model.safetensors: No such device (os error 19)"


MEASURED = """
import resource, sys
from pathlib import Path
from model import hf
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
for folder in sys.argv[1:]:
    try:
        hf.load_pretrained(Path(folder))
    except hf.UserError:
        print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, where ru_maxrss is in KiB")
def test_refused_folders_take_no_memory(good, tmp_path):
    names = ["absurd layers", "absurd vocabulary", "header of 2**63 bytes", "pickle expanded", "pickle shared"]
    for name in names:
        CASES[name][0](Path(shutil.copytree(good, tmp_path / name)))
    argv = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in names)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=200)
    peaks = [int(line) for line in done.stdout.split()]
    assert len(peaks) == len(names) and max(peaks) < 64e6, done.stdout + done.stderr


def test_messages_name_the_file(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=f"^{folder}/config.json is not a JSON object: is the folder complete"):
        hf.load_pretrained(folder)
