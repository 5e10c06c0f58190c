"""Text generation: sample token ids one at a time from a model, and decode them as a stream.

    python -m model.generate runs/book --prompt "CHAPTER I. " --tokens 200 --temperature 0.8 --top-k 40 --seed 1

The first step reads the whole prompt, each of the others the token drawn before: a cache holds the keys and values.
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
    """Yield up to `tokens` ids that continue `prompt`, each as soon as it is drawn.

    temperature: 0 takes the most likely token each time, 1 samples from the model's own distribution.
    top_k: sample among the k most likely tokens only; None for all of them.
    seed: of a separate generator on the model's device: the same arguments give the same ids.
    stop_id: ends the text when it is drawn, and is not yielded; None never stops early.

    When the text outgrows the model's context, its oldest tokens are dropped (see next_logits). The model is in
    evaluation mode until the iterator is exhausted or closed. Raises UserError, before the first token, for a prompt
    that is empty or longer than the context, and for invalid settings.
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
        raise UserError("the prompt has no tokens: give at least one, such as the end-of-text id")
    if len(prompt) > (most := model.config.n_positions):
        raise UserError(f"the prompt has {len(prompt)} tokens and the model's context is {most}: shorten it")
    return _generate(model, list(prompt), tokens, temperature, top_k, seed, stop_id)


def _generate(
    model: GPT, ids: list[int], tokens: int, temperature: float, top_k: int | None, seed: int, stop_id: int | None
) -> Iterator[int]:
    device = model.transformer.wte.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    S = min(model.config.n_positions, len(ids) + tokens - 1)  # the last token is drawn but not read
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
    """Cast and lay out the weight matrices for decoding, in place -> model, which must not be trained any more.

    Each token reads every weight once, so they are cast to the model's dtype here and not at each use. On a CPU those
    with out >= in are stored by columns: a sum of columns is up to twice as fast as a dot product per row (LOG.md).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            weight = module.weight.data.to(model.dtype)
            n_out, n_in = weight.shape
            if weight.device.type == "cpu" and n_out >= n_in and module is not model.transformer.wpe:
                weight = weight.t().contiguous().t()
            module.weight.data = weight
    return model


@torch.inference_mode()
def next_logits(model: GPT, ids: Sequence[int], cache: KVCache) -> Tensor:
    """Logits of the token after `ids`, of which the model sees the last n_positions: (V,) float32.

    cache: empty (prefill), or holds the first of `ids`; the model reads the others into it.
    """
    n_positions = model.config.n_positions
    # Positions are learned, one vector each: when the window slides by a token, every token in it has another position,
    # so no key or value of the previous step can be reused.
    fits = len(ids) <= n_positions
    idx = torch.tensor([ids[cache.length :] if fits else ids[-n_positions:]], device=cache.lengths.device)
    logits, _ = model(idx, logits="last", cache=cache if fits else None)  # (1, 1, V)
    return logits[0, 0].float()


@torch.inference_mode()
def sample(
    logits: Tensor, *, temperature: float, top_k: int | None = None, generator: torch.Generator | None = None
) -> int:
    """Draw an id from softmax(logits / temperature) over the top_k largest of logits, (V,) float32; 0: the largest."""
    if temperature == 0:
        return int(logits.argmax())
    ids = None
    if top_k is not None and top_k < len(logits):
        logits, ids = logits.topk(top_k)
    # A smaller temperature would overflow float32 and make the largest logit nan.
    probs = (logits / max(temperature, 1e-30)).softmax(0)
    drawn = torch.multinomial(probs, 1, generator=generator)
    return int(drawn if ids is None else ids[drawn])


def stream_text(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text of `ids` in pieces, each as early as it is complete; joined they are tokenizer.decode(all ids).

    The bytes of a character wait for the rest of it, and become U+FFFD if it never comes.
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
    prompt: str = ""  # text to continue; default: start from the end-of-text token
    tokens: int = 200  # maximum tokens to write
    temperature: float = 0.8  # 0 takes the most likely token, 1 samples from the model's distribution
    top_k: int | None = 40  # sample among the k most likely tokens only; None for all
    seed: int = 1  # the same seed writes the same text on the same machine
    greedy: bool = False  # always take the most likely token, whatever the temperature
    stop: bool = True  # stop at the end-of-text token
    checkpoint: str = "best"  # last, best (lowest validation loss), or a name such as step-00000100
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one


def main(cfg: GenerateConfig) -> None:
    model, tokenizer = load_model(cfg.run, pick_device(cfg.device), name=cfg.checkpoint)
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
        print()  # also after Ctrl-C, so that the shell's prompt or the error starts on a new line


if __name__ == "__main__":
    run(main, GenerateConfig, prog="python -m model.generate", aliases={"--which": "--checkpoint"})
