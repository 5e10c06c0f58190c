"""The page: weights as safetensors, compressed, in base64; the JavaScript of this folder; a policy without network.

The JavaScript is in the page as it is in its files: gpt.js, tokenizer.js and worker.js run in a worker, so that the
page answers while the model works; views.js and page.js are what is seen.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from markupsafe import Markup
from torch import Tensor

from model import bpe
from model.cli import UserError
from model.config import GPTConfig
from model.files import write_atomic
from model.gpt import GPT, num_parameters
from model.quantize import quantize
from model.report.pages import page
from model.sampling import TEMPERATURE, TOP_K
from model.tokenizer import BytePairTokenizer, Tokenizer

Weights = Literal["float16", "int8"]
BYTES: dict[Weights, int] = {"float16": 2, "int8": 1}  # of a weight
FOLDER = Path(__file__).parent
WORKER, SCRIPT = ("gpt.js", "tokenizer.js", "worker.js"), ("views.js", "page.js")
PART = 12 << 20  # characters of base64 in one element: a browser's strings have a limit
PROMPT = "CHAPTER I."


@dataclass(frozen=True)
class Subject:
    """A model that the page holds. name: what it is called there."""

    name: str
    model: GPT


def write(path: Path, title: str, subjects: Sequence[Subject], tokenizer: Tokenizer, weights: Weights) -> None:
    """Write the page of one model, or of two with the same tokenizer, whole or not at all.

    UserError for weights that `weights` cannot hold.
    """
    data = base64.b64encode(gzip.compress(pack(subjects, tokenizer, weights), 6, mtime=0)).decode()
    parts = [
        f'<script type="text/plain" class="weights">{data[i : i + PART]}</script>' for i in range(0, len(data), PART)
    ]
    shell = page(
        FOLDER / "page.html.jinja", title=title, sentence=_sentence(subjects, weights), prompt=_prompt(tokenizer),
        temperature=TEMPERATURE, top_k=TOP_K, css=_source("page.css"), worker=_source(*WORKER), script=_source(*SCRIPT),
    )  # fmt: skip
    head, body = shell.replace('content="@policy@"', f'content="{policy(shell)}"', 1).split("<!-- weights -->")
    write_atomic(path, "\n".join([head, *parts, body]))


def pack(subjects: Sequence[Subject], tokenizer: Tokenizer, weights: Weights) -> bytes:
    """The models and the tokenizer as a safetensors file.

    A tensor is called 0.transformer.wte.weight, of the first model; the second has only those that differ. int8: the
    matrices, each with a scale for a row, except for the positions, which are only added; the rest is float16.
    """
    tensors, about = _distinct(subjects, weights)
    fields = {"name": tokenizer.name, **tokenizer.fields()}
    if isinstance(tokenizer, BytePairTokenizer):  # GPT-2's own are not in its fields
        fields["tokens"] = [bpe.to_printable(token) for token in tokenizer.tokens]
    return safetensors.torch.save(tensors, {"page": json.dumps({"models": about, "tokenizer": fields})})


def _distinct(subjects: Sequence[Subject], weights: Weights) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of `pack`, and what it says of each model."""
    tensors: dict[str, Tensor] = {}
    about = []
    for m, subject in enumerate(subjects):
        shared = []
        for name, tensor in _stored(subject.model, weights).items():
            first = tensors.get(f"0.{name}")
            if first is not None and first.dtype == tensor.dtype and torch.equal(first, tensor):
                shared.append(name)
            else:
                tensors[f"{m}.{name}"] = tensor
        about.append({"name": subject.name, "config": subject.model.config.to_dict(), "shared": shared})
    return tensors, about


def _stored(model: GPT, weights: Weights) -> dict[str, Tensor]:
    """The tensors of a model in the form of the page."""
    stored = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu().float()
        if weights == "int8" and tensor.ndim == 2 and name != "transformer.wpe.weight":
            stored[name], stored[f"{name}.scale"] = quantize(tensor)
        else:
            stored[name] = tensor.half()
            if not stored[name].isfinite().all():
                raise UserError(f"{name} has a number beyond float16, or NaN: use another checkpoint")
    return stored


_MB = 4 / 3 / 1e6  # of 10**6 bytes, for a byte before compression: base64 takes 4 characters for 3 bytes


def least_megabytes(config: GPTConfig, weights: Weights) -> float:
    """The size of a page of one model, without scales and tokenizer: known before its weights are read."""
    with torch.device("meta"):
        return num_parameters(GPT(config)) * BYTES[weights] * _MB


def megabytes(subjects: Sequence[Subject], weights: Weights) -> float:
    """The size of a page; tensors that two models share count once."""
    return sum(tensor.nbytes for tensor in _distinct(subjects, weights)[0].values()) * _MB


def policy(shell: str) -> str:
    """A Content-Security-Policy: no network, and no script or style but those of the page itself, by their SHA-256."""
    allowed = {}
    for tag in ("script", "style"):
        sources = re.findall(rf"<{tag}>(.*?)</{tag}>", shell, re.S)
        digests = [base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() for source in sources]
        allowed[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    others = "default-src 'none'; worker-src blob:; base-uri 'none'; form-action 'none'"
    return f"{others}; script-src {allowed['script']}; style-src {allowed['style']}"


def _source(*names: str) -> Markup:
    return Markup("\n".join((FOLDER / name).read_text(encoding="utf-8") for name in names))


def _sentence(subjects: Sequence[Subject], weights: Weights) -> str:
    sizes = list(dict.fromkeys(f"{num_parameters(subject.model):,}" for subject in subjects))
    what = "a language model" if len(subjects) == 1 else "two language models"
    stored = "float16" if weights == "float16" else "8 bits each"
    return (
        f"This page holds {what} of {' and '.join(sizes)} parameters ({stored}) and runs in your browser, without "
        "a network: type the beginning of a text, see it continued token by token, and look at how each was chosen."
    )


def _prompt(tokenizer: Tokenizer) -> str:
    """A beginning that the tokenizer has ids for."""
    try:
        tokenizer.encode(PROMPT)
    except UserError:
        return ""
    return PROMPT
