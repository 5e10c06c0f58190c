"""Sampling: token ids one at a time from a model, and text from token ids.

    python -m model.generate runs/book --prompt "CHAPTER I. " --tokens 200 --temperature 0.8 --top-k 40 --seed 1

One step: the logits of the last position, divided by the temperature, cut to the top_k largest, softmax, one draw. The
first step reads the whole prompt, each of the others the token drawn before: a cache holds the keys and values.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from model.checkpoint import load_model
from model.cli import UserError, pick_device, run
from model.gpt import GPT
from model.kv_cache import KVCache
from model.tokenizer import Tokenizer


def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
    stop_id: int | None = None,
) -> Iterator[int]:
    """Continue the ids of `prompt` by up to `tokens` ids, yielded one by one as they are drawn.

    temperature: 0 takes the most likely token each time, 1 samples from the model's own distribution.
    top_k: sample among the k most likely tokens only; None for all of them.
    seed: of a generator of our own on the model's device, so the same arguments give the same ids and no other
        random number in the process moves.
    stop_id: ends the text where it is drawn, and is not yielded; None never stops early.

    Where the text outgrows the model's context, its oldest tokens are left out, and each token then takes as long as
    the whole context does (see next_logits). The model is in eval mode until the
    iterator is exhausted or closed, then back in the mode it had. Raises UserError, before the first token, for a
    prompt that is empty or longer than the context, and for settings that mean nothing.
    """
    if tokens < 1:
        raise UserError(f"tokens must be at least 1, got {tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (the most likely token) or a number above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, got {top_k}: 1 takes the most likely token")
    if not 0 <= seed < 2**64:
        raise UserError(f"seed must lie in [0, 2**64), got {seed}")
    if not prompt:
        raise UserError("the prompt has no tokens: start from at least one, such as the end-of-text id")
    if len(prompt) > model.config.n_positions:
        raise UserError(
            f"the prompt has {len(prompt)} tokens and the model's context is {model.config.n_positions}: shorten it"
        )
    return _generate(model, list(prompt), tokens, temperature, top_k, seed, stop_id)


def _generate(
    model: GPT, ids: list[int], tokens: int, temperature: float, top_k: int | None, seed: int, stop_id: int | None
) -> Iterator[int]:
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    S = min(model.config.n_positions, len(ids) + tokens - 1)  # the last token drawn is not read
    cache = KVCache(model.config, 1, S, dtype=model.dtype, device=device)
    was_training = model.training
    model.eval()
    try:
        for _ in range(tokens):
            logits = next_logits(model, ids, cache)
            next_id = sample(logits, temperature=temperature, top_k=top_k, generator=generator)
            if next_id == stop_id:
                return
            ids.append(next_id)
            yield next_id
    finally:
        model.train(was_training)


@torch.no_grad()
def prepare_for_decoding(model: GPT) -> GPT:
    """Weight matrices as a token's product wants them, in place; shapes and names stay. Not to be trained on. -> model

    Each token reads all of every weight once, so they are cast to the model's dtype here and not at each use. On a CPU
    those with out >= in are laid out by columns: adding up columns runs at up to twice the speed of a dot product for
    each row (LOG.md).
    """
    for module in model.modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        weight = module.weight.data.to(model.dtype)
        n_out, n_in = weight.shape
        if weight.device.type == "cpu" and n_out >= n_in and module is not model.transformer.wpe:
            weight = weight.t().contiguous().t()
        module.weight.data = weight
    return model


@torch.inference_mode()
def next_logits(model: GPT, ids: Sequence[int], cache: KVCache) -> Tensor:
    """Logits of the token that follows `ids`, of which the model sees the last n_positions: (V,) float32.

    cache: holds the first of `ids`, or nothing yet; the model reads the others into it.
    """
    n_positions, device = model.config.n_positions, cache.lengths.device
    if len(ids) <= n_positions:
        logits, _ = model(torch.tensor([ids[cache.length :]], device=device), logits="last", cache=cache)  # (1, 1, V)
    else:
        # Positions are learned, one vector each: a window that slides by a token gives every token in it another
        # position, so no key or value of the step before can be used again, and all are computed anew.
        logits, _ = model(torch.tensor([ids[-n_positions:]], device=device), logits="last")  # (1, 1, V)
    return logits[0, 0].float()


@torch.inference_mode()
def sample(
    logits: Tensor, *, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> int:
    """Draw an id from softmax(logits / temperature) over the top_k largest of logits: (V,) float32."""
    if temperature == 0:
        return int(logits.argmax())
    candidates = None
    if top_k is not None and top_k < len(logits):
        logits, candidates = logits.topk(top_k)
    # float32 has no room for temperatures below: they would make nan of the largest logit.
    probabilities = (logits / max(temperature, 1e-30)).softmax(0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return int(drawn if candidates is None else candidates[drawn])


def stream_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of `ids` in pieces, each as early as it is complete: together they are tokenizer.decode(all ids).

    A token may end inside a character of several UTF-8 bytes. Its bytes wait here for the rest of the character, and
    what never becomes a character is written as U+FFFD.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        if text := decoder.decode(tokenizer.decode_bytes([token])):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


@dataclass(frozen=True)
class GenerateConfig:
    """Write text with the model of a run to standard output, each piece as soon as it is drawn."""

    run: tyro.conf.Positional[Path]  # folder of a training run
    prompt: str = ""  # text to continue; without one the model starts from its end-of-text token
    tokens: int = 200  # how many tokens to write, at most
    temperature: float = 0.8  # 0 takes the most likely token, 1 samples what the model learned, above 1 is wilder
    top_k: int | None = 40  # sample among the k most likely tokens only; None for all
    seed: int = 1  # the same seed writes the same text on the same machine
    greedy: bool = False  # always take the most likely token, whatever the temperature
    stop: bool = True  # end where the model draws its end-of-text token
    which: str = "best"  # checkpoint: last, best (lowest validation loss), or a name such as step-00000100
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one


def main(cfg: GenerateConfig) -> None:
    model, tokenizer = load_model(cfg.run, pick_device(cfg.device), which=cfg.which)
    ids = generate(
        prepare_for_decoding(model),
        tokenizer.encode(cfg.prompt) or [tokenizer.eot_id],
        tokens=cfg.tokens,
        temperature=0.0 if cfg.greedy else cfg.temperature,
        top_k=cfg.top_k,
        seed=cfg.seed,
        stop_id=tokenizer.eot_id if cfg.stop else None,
    )
    print(cfg.prompt, end="", flush=True)
    try:
        for text in stream_text(ids, tokenizer):
            print(text, end="", flush=True)
    finally:
        print()  # also after Ctrl-C: the shell's prompt, or the error, gets a line of its own


if __name__ == "__main__":
    run(main, GenerateConfig, prog="python -m model.generate")
