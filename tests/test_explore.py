"""The page of model.explore as a file: what it holds, how large it may be, what is refused."""

from __future__ import annotations

import base64
import gzip
import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from commands import exit_code
from small_model import small_model, small_tokenizer

from model import bpe, checkpoint
from model.checkpoint import save_model
from model.config import PRESETS
from model.explore.__main__ import ExploreConfig, main
from model.explore.page import Subject, least_megabytes, megabytes, pack, policy, write
from model.quantize import quantize
from model.report import page as report
from model.tokenizer import CharTokenizer, GPT2Tokenizer


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Runs called mine, other and foreign, the last with another alphabet."""
    monkeypatch.chdir(tmp_path)
    tokenizer = small_tokenizer()
    save_model(Path("mine"), small_model(tokenizer), tokenizer, config={}, step=3)
    other = small_model(tokenizer)
    with torch.no_grad():
        other.transformer.wte.weight.add_(0.1)
    save_model(Path("other"), other, tokenizer, config={}, step=7)
    foreign = CharTokenizer("xyz")
    save_model(Path("foreign"), small_model(foreign), foreign, config={})
    return tmp_path


@pytest.fixture
def call(capsys):
    """The exit code, stdout and stderr of python -m model.explore ARGV."""

    def call(*argv) -> tuple[int, str, str]:
        code = exit_code(main, ExploreConfig, *argv)
        return (code, *capsys.readouterr())

    return call


def content(page: Path) -> tuple[dict[str, torch.Tensor], list[dict], dict]:
    """The tensors in a page, what it says of its models, and its tokenizer's fields."""
    parts = re.findall(r'<script type="text/plain" class="weights">(.*?)</script>', page.read_text())
    data = gzip.decompress(base64.b64decode("".join(parts)))
    size = int.from_bytes(data[:8], "little")
    about = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["page"])
    return safetensors.torch.load(data), about["models"], about["tokenizer"]


def test_page_holds_the_weights_in_float16(folder, call):
    code, out, err = call("mine", "page.html")
    assert (code, err) == (0, "") and out.startswith("page.html: 0.1 MB, float16")
    tensors, about, fields = content(Path("page.html"))
    model, tokenizer = checkpoint.load_model(Path("mine"))
    expected = {f"0.{name}": p.detach().half() for name, p in model.named_parameters()}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert about == [{"name": "mine, step 3", "config": model.config.to_dict(), "shared": []}]
    assert fields == {"name": "char", **tokenizer.fields()}


def test_page_holds_the_matrices_in_int8(folder, call):
    assert call("mine", "page.html", "--weights", "int8")[0] == 0
    tensors, _, _ = content(Path("page.html"))
    model, _ = checkpoint.load_model(Path("mine"))
    name = "transformer.h.1.mlp.c_fc.weight"
    q, scale = quantize(model.get_parameter(name))
    assert torch.equal(tensors[f"0.{name}"], q) and torch.equal(tensors[f"0.{name}.scale"], scale)
    assert tensors["0.transformer.wpe.weight"].dtype == tensors["0.transformer.ln_f.bias"].dtype == torch.float16


def test_second_model_holds_what_differs(folder, call):
    assert call("mine", "other", "page.html")[0] == 0
    tensors, about, _ = content(Path("page.html"))
    assert [name for name in tensors if name.startswith("1.")] == ["1.transformer.wte.weight"]
    assert [model["name"] for model in about] == ["mine, step 3", "other, step 7"]
    assert "transformer.wte.weight" not in about[1]["shared"] and "transformer.wpe.weight" in about[1]["shared"]


def test_two_checkpoints_of_a_run(folder, call):
    model, _ = checkpoint.load_model(Path("mine"))
    weights = {"model": dict(model.named_parameters())}
    checkpoint.save(Path("mine"), 9, weights, config={}, model=model.config, best_val_loss=None, elapsed_s=0)
    assert call("mine", "page.html", "--checkpoint", "step-00000003", "last")[0] == 0
    assert [model["name"] for model in content(Path("page.html"))[1]] == ["mine, step 3", "mine, step 9"]


def test_model_with_and_without_an_adapter(folder, call, monkeypatch):
    asked = []

    def load_model(run, *, name, adapter):
        asked.append(adapter)
        return checkpoint.load_model(run, name=name)

    monkeypatch.setattr("model.explore.__main__.load_model", load_model)
    assert call("mine", "page.html", "--adapter", "theirs")[0] == 0
    assert asked == [None, Path("theirs")]
    assert [model["name"] for model in content(Path("page.html"))[1]] == ["mine, step 3", "mine, step 3, adapted"]


def test_gpt2_vocabulary_is_in_the_page():
    tokenizer = GPT2Tokenizer()
    data = pack([], tokenizer, "float16")
    size = int.from_bytes(data[:8], "little")
    page = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["page"])
    assert tuple(map(bpe.from_printable, page["tokenizer"]["tokens"])) == tokenizer.tokens


def test_same_page_twice(folder, call):
    call("mine", "a.html")
    call("mine", "b.html")
    assert Path("a.html").read_bytes() == Path("b.html").read_bytes()


def test_size_is_guarded_before_the_weights_are_read(folder, call, monkeypatch):
    model, _ = checkpoint.load_model(Path("mine"))
    parameters = sum(p.numel() for p in model.parameters())
    assert least_megabytes(model.config, "float16") == pytest.approx(parameters * 8 / 3 / 1e6)
    between = str(parameters * 2.2 / 1e6)  # too little for float16, enough for int8
    assert "int8" in call("mine", "page.html", "--max-mb", between)[1]
    monkeypatch.setattr("model.explore.__main__.load_model", None)
    code, _, err = call("mine", "page.html", "--max-mb", between, "--weights", "float16")
    assert code == 2 and "more than --max-mb" in err and "or --weights int8" in err
    code, _, err = call("mine", "page.html", "--max-mb", "0.001")
    assert code == 2 and "in int8: more than --max-mb 0.001; raise it\n" in err


def test_gpt2_124m_fits_in_int8_alone():
    size = {form: least_megabytes(PRESETS["gpt2"], form) for form in ("int8", "float16")}
    assert size["int8"] < ExploreConfig(()).max_mb < size["float16"]


def test_what_two_models_share_counts_once(folder, call):
    model, _ = checkpoint.load_model(Path("mine"))
    twice = [Subject("one", model), Subject("two", model)]
    for form in ("float16", "int8"):
        assert megabytes(twice, form) == megabytes(twice[:1], form) > least_megabytes(model.config, form) * 0.99
    assert call("mine", "other", "page.html")[0] == 0
    size = megabytes([Subject("one", model), Subject("two", checkpoint.load_model(Path("other"))[0])], "float16")
    assert size - megabytes(twice, "float16") == pytest.approx(model.transformer.wte.weight.numel() * 8 / 3 / 1e6)


def test_report_of_the_run_links_to_the_page(folder, call):
    config = {"train": {"steps": 3}, "model": checkpoint.load_model(Path("mine"))[0].config.to_dict()}
    Path("mine/config.json").write_text(json.dumps(config))
    Path("mine/metrics.jsonl").write_text('{"step": 3, "loss": 2.5, "elapsed_s": 1.0}\n')
    report.write(Path("mine"))
    assert 'explore.html"' not in Path("mine/report.html").read_text()
    call("mine", "mine/explore.html")
    assert '<a href="explore.html">' in Path("mine/report.html").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "give the folder of a run and the page to write"),
        (("page.html",), "give the folder of a run and the page to write"),
        (("mine", "other"), "give the folder of a run and the page to write"),
        (("nothing", "page.html"), "has no checkpoint"),
        (("mine", "page.html", "--checkpoint", "step-1"), "has no checkpoint 'step-1'"),
        (("mine", "foreign", "page.html"), "different tokenizers"),
        (("mine", "other", "foreign", "page.html"), "2 models at most, and these are 3"),
        (("mine", "mine/../other", "page.html", "--checkpoint", "best", "last"), "and these are 4"),
        (("mine", "page.html", "--adapter", "nothing"), "nothing"),
        (("mine", "page.html", "--weights", "int4"), "int4"),
    ],
)
def test_refused(folder, call, argv, message):
    code, out, err = call(*argv)
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) <= 2
    assert not Path("page.html").exists()


def test_weights_beyond_float16_are_refused(folder):
    tokenizer = small_tokenizer()
    model = small_model(tokenizer)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = 70000.0
    with pytest.raises(Exception, match=r"transformer.h.0.mlp.c_fc.bias has a number beyond float16"):
        write(Path("page.html"), "x", [Subject("x", model)], tokenizer, "float16")
    assert not Path("page.html").exists()


def test_names_are_not_markup(folder, tmp_path):
    tokenizer = small_tokenizer()
    write(Path("page.html"), "</title><b>&", [Subject("</script><b>", small_model(tokenizer))], tokenizer, "float16")
    page = Path("page.html").read_text()
    assert "<b>&" not in page and "&lt;/title&gt;&lt;b&gt;&amp;" in page


def test_policy_allows_what_is_in_the_page_and_no_network(folder, call):
    call("mine", "page.html")
    page = Path("page.html").read_text()
    (found,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert found == policy(page)
    assert found.startswith("default-src 'none'; worker-src blob:;") and "unsafe" not in found and "http" not in found
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#)""", page)
