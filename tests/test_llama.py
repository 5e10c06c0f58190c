"""llama.cpp itself on the files of model.gguf: the ids of texts, and the greedy ids that follow them.

LLAMA: the folder that node-llama-cpp was installed in, by `make llama`. RUN: a run of yours to prove as well.

llama.cpp takes GELU from a table of float16, and rounds the activations that meet matrices in f16 or q8_0 to the same
form. So its greedy ids are those of our model with the weights of the file, or nearly as likely where it took another.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import gguf
import pytest
import torch
from test_bpe import SCRIPTS

from model.checkpoint import load_model
from model.config import GPTConfig
from model.generate import generate
from model.gguf import Type, write
from model.gpt import GPT
from model.tokenizer import CharTokenizer, GPT2Tokenizer, Tokenizer, TrainedTokenizer

LLAMA, RUN = os.environ.get("LLAMA"), os.environ.get("RUN")
pytestmark = [pytest.mark.long, pytest.mark.skipif(not LLAMA, reason="needs llama.cpp: make llama installs it")]

TEXT = "".join(SCRIPTS.values()) * 2
WHITE = " a  b   c\n\nd\n e\t\tf  \n\n\n    g "
TOKENIZERS = {
    "char, biases": lambda: CharTokenizer(TEXT + WHITE),
    "bpe, no biases": lambda: TrainedTokenizer.train([TEXT], 400),
    "gpt2, biases": GPT2Tokenizer,
}
TOKENS = 60
REGRET = {"f32": 0.002, "f16": 0.01, "q8_0": 0.05}  # nats by which an id may be less likely than the best


def ask(file: Path, prompts: list[list[int]], texts: list[str], context: int) -> dict:
    question = {"file": str(file), "prompts": prompts, "texts": texts, "context": context, "tokens": TOKENS}
    command = ["node", str(Path(__file__).with_name("llama.mjs")), str(LLAMA)]
    done = subprocess.run(command, input=json.dumps(question), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def random_model(tokenizer: Tokenizer, *, bias: bool) -> GPT:
    """Weights large enough that every token counts, and biases and LayerNorm that are not zeros and ones."""
    model = GPT(GPTConfig(tokenizer.n_vocab, 256, n_embd=64, n_layer=3, n_head=4, bias=bias, initializer_range=0.1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(params=[*TOKENIZERS, *([RUN] if RUN else [])])
def subject(request) -> tuple[GPT, Tokenizer, list[str]]:
    """A model, its tokenizer and texts that it has ids for."""
    if request.param == RUN:
        model, tokenizer = load_model(Path(RUN))
        return model, tokenizer, ["CHAPTER I. ", "The ", "He said that", "It was"]
    tokenizer = TOKENIZERS[request.param]()
    return random_model(tokenizer, bias="no biases" not in request.param), tokenizer, [*SCRIPTS.values(), WHITE]


def as_stored(model: GPT, file: Path) -> GPT:
    """Our model with the weights that the file has."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    found = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(file).tensors}
    weights = {}
    for name, _ in model.named_parameters():
        module, _, parameter = name.rpartition(".")
        weights[name] = torch.from_numpy(found[f"{names[module]}.{parameter}"].copy())
    stored = GPT(model.config)
    stored.load_state_dict(weights)
    return stored.eval()


@pytest.mark.parametrize("kind", REGRET)
def test_ids_are_ours(subject, kind: Type, tmp_path):
    model, tokenizer, texts = subject
    write(model, tokenizer, tmp_path / "m.gguf", kind)
    model = model if kind == "f32" else as_stored(model, tmp_path / "m.gguf")
    prompts = [[tokenizer.eot_id], *(tokenizer.encode(text)[:40] for text in texts)]
    answer = ask(tmp_path / "m.gguf", prompts, texts, model.config.n_positions)
    assert answer["ids"] == [tokenizer.encode(text) for text in texts]
    n_equal, regrets = 0, []
    for prompt, ids in zip(prompts, answer["greedy"], strict=True):
        ours = [*generate(model, prompt, tokens=TOKENS, temperature=0, stop_id=tokenizer.eot_id)]
        ids, ours = ([*found, tokenizer.eot_id][:TOKENS] for found in (ids, ours))  # both end without the end of text
        n_equal += ids == ours
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]]))[0][0, len(prompt) - 1 : -1]  # (ids, V)
        lost = logits.amax(1) - logits[range(len(ids)), ids]
        parted = [a != b for a, b in zip(ids, ours, strict=False)]
        assert ids == ours or lost[parted.index(True)] > 0  # where they part, llama.cpp took the second best
        regrets += lost.tolist()
    n_best, n = regrets.count(0.0), len(regrets)
    print(
        f"{kind}: {n_equal} of {len(prompts)} texts equal; {n_best} of {n} ids our best, off by {max(regrets):.5f} nats"
    )
    assert max(regrets) <= REGRET[kind] and n_best >= 0.95 * n > TOKENS


@pytest.mark.parametrize("alphabet", ["abc é", "abc"])  # without a line break; with and without pairs to merge
def test_unknown_characters_are_dropped(alphabet, tmp_path):
    tokenizer = CharTokenizer(alphabet)
    write(random_model(tokenizer, bias=True), tokenizer, tmp_path / "m.gguf")
    texts = ["a☃b", "Zé\n", "\ufffdc", "è", ""]
    known = ["".join(char for char in text if char in alphabet) for text in texts]
    answer = ask(tmp_path / "m.gguf", [], texts, 256)
    assert answer["ids"] == [tokenizer.encode(text) for text in known]
    assert answer["texts"] == known
