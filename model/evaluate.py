"""How well a model predicts a text: loss in nats per token, perplexity, bits per byte; and answers to questions.

    python -m model.evaluate runs/first-run                            # on the validation split of the run
    python -m model.evaluate runs/first-run --data other.txt           # on a text of yours
    python -m model.evaluate runs/first-run --stride 32                # with windows that overlap
    python -m model.evaluate runs/first-run --weights int8             # and what weights of 8 bits cost
    python -m model.evaluate runs/first-run --choices hellaswag.jsonl  # multiple choice: see model/choices.py

    loss = mean of -log p(token | tokens before it in its window)     perplexity = exp(loss)
    bits per byte = loss / log(2) * tokens / bytes                    comparable between tokenizers

A window has C tokens, the model's context, and window k begins at token k * S; S is the stride. Window 0 predicts the
tokens 1 .. C, each later window the S tokens that no window before it reached: the last S of those after its own. So
every token but the first counts once, and from C + 1 on each is predicted from at least C - S + 1 tokens before it. By
default S = C: the windows do not overlap, and the first tokens of each have little context. A longer context alone
lowers the loss, and so does a smaller stride, for C / S times the work.

EleutherAI's lm-evaluation-harness has the windows of S = C. But it also predicts the first token, after the end-of-text
id, and its last window begins early enough to be full. tests/lm-eval has its tasks for a text and for questions.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from model import checkpoint, choices, data, quantize
from model.cli import LiveLine, UserError, pick_device, run
from model.data.loader import count_windows
from model.data.shards import Tokens
from model.gpt import GPT, IGNORE_INDEX, number_documents
from model.lora import load_model
from model.quantize import Weights
from model.tokenizer import Tokenizer
from model.training import parallel
from model.training.parallel import World


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: np.ndarray | Tokens,
    *,
    context: int,
    batch_size: int,
    max_windows: int | None = None,
    stride: int | None = None,
    document_id: int | None = None,
    world: World | None = None,
    advance: Callable[[int], None] = lambda windows: None,
) -> float:
    """Mean loss in nats of `model` over `tokens`, (n,) ids.

    max_windows: at most so many windows of `context` tokens, spread evenly over the text and always the same. stride:
    from window to window, `context` by default; see the top of the file. document_id: the token between documents, for
    a model trained with attention inside each alone. The model is in evaluation mode meanwhile.
    world: processes that share the batches; all get the mean of all. advance: called with the number of windows done
    since the last call. Raises UserError for fewer than two tokens, and for a stride outside 1 to `context`.
    """
    world = world or World(0, 1, 0, torch.device("cpu"))
    device = next(model.parameters()).device
    total = torch.zeros(2, dtype=torch.float64, device=device)  # loss, targets: on the device, for one wait at the end
    was_training = model.training
    model.eval()
    try:
        batches = data.windows(tokens, context, batch_size, max_windows, stride)
        for (idx, targets), counts in parallel.shard_batches(batches, world):
            idx = idx.to(device)
            options = {} if document_id is None else {"documents": number_documents(idx, document_id)}
            _, loss = model(idx, targets.to(device), **options)
            if counts:
                n = int((targets != IGNORE_INDEX).sum())
                total += torch.stack([loss.double() * n, torch.full_like(total[1], n)])
            advance(len(idx))
    finally:
        model.train(was_training)
    loss_sum, n_targets = parallel.sum_all(total, world).tolist()
    return loss_sum / n_targets


def perplexity(loss: float) -> float:
    """exp(loss): the number of equally likely tokens that would be as hard to guess; inf on overflow."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens: int, n_bytes: int) -> float:
    """Loss in nats per token -> bits per byte of UTF-8, for a text of `tokens` tokens and `n_bytes` bytes."""
    return loss / math.log(2) * tokens / n_bytes


def describe(loss: float, tokens: int, n_bytes: int) -> str:
    """`validation loss 1.5123 | perplexity 4.54 | 2.182 bits per byte`, without the first word."""
    bits = bits_per_byte(loss, tokens, n_bytes)
    return f"loss {loss:.4f} | perplexity {perplexity(loss):.2f} | {bits:.3f} bits per byte"


Source = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
Questions = Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")]


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure how well the model of a run predicts a text, or answers questions of multiple choice."""

    run: tyro.conf.Positional[Path]  # folder of a training run
    data: Source = None  # text file, or folder of them; default: the validation text of the run
    stride: int | None = None  # tokens from window to window; default: the context, so that windows do not overlap
    choices: Questions = None  # questions instead of a text, one {"ctx", "endings", "label"} a line, as HellaSwag's
    weights: Weights = "float32"  # measure the model with its matrices in this form too, and compare
    adapter: Source = None  # adapter to merge into the weights first, of a run or made by PEFT
    checkpoint: str = "best"  # last, best (lowest validation loss), or a name such as step-00000100
    batch_size: int = 16  # windows, or endings, in memory at a time
    max_windows: int | None = None  # maximum windows to measure on, spread over the text
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    json: bool = False  # print one line of JSON

    def check(self, context: int) -> None:
        """UserError for values that cannot be."""
        for name in ("batch_size", "max_windows", "stride"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if self.stride is not None and self.stride > context:
            raise UserError(f"--stride must be at most the model's context of {context:,} tokens, got {self.stride:,}")
        if self.choices and (self.data or self.stride or self.max_windows):
            raise UserError("--choices measures answers, not a text: omit --data, --stride and --max-windows")


def main(cfg: EvaluateConfig) -> None:
    model, tokenizer = load_model(cfg.run, pick_device(cfg.device), name=cfg.checkpoint, adapter=cfg.adapter)
    cfg.check(model.config.n_positions)
    measure = _measure_choices if cfg.choices else _measure_text
    measure(cfg, model, tokenizer)


def _forms(model: GPT, weights: Weights) -> Iterator[Weights]:
    """Yield "float32", then `weights` with the model in that form, unless they are the same."""
    yield "float32"
    if weights != "float32":
        quantize.prepare(model, weights)
        yield weights


def _measure_text(cfg: EvaluateConfig, model: GPT, tokenizer: Tokenizer) -> None:
    context = model.config.n_positions
    options = checkpoint.read_state(cfg.run, cfg.checkpoint)["config"]
    losses: dict[str, float] = {}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:  # Windows keeps mapped files
        if cfg.data is None:
            if not (cfg.run / "data").exists():
                raise UserError(f"{cfg.run} has no validation text, as a model that was imported: give --data FILE")
            text = data.load(cfg.run / "data")
            tokens, n_bytes, name = text.val, text.meta["val"]["bytes"], "validation"
        else:
            text = data.prepare(cfg.data, Path(temporary) / "data", tokenizer, val_fraction=0.0)
            tokens, n_bytes, name = text.train, text.meta["train"]["bytes"], str(cfg.data)
        n_windows = count_windows(len(tokens), context, cfg.stride or context)
        n_windows = min(n_windows, cfg.max_windows or n_windows) * (1 + (cfg.weights != "float32"))
        with LiveLine("windows", n_windows, stderr=True) as line:
            for form in _forms(model, cfg.weights):
                losses[form] = evaluate(
                    model, tokens, context=context, batch_size=cfg.batch_size, max_windows=cfg.max_windows,
                    stride=cfg.stride, document_id=tokenizer.eot_id if options.get("document_mask") else None,
                    advance=line.advance,
                )  # fmt: skip
                _check_finite(losses[form])
    if cfg.json:
        n = len(tokens)
        results = {
            form: {
                "loss": loss,
                "perplexity": perplexity(loss) if loss < 700 else None,  # JSON has no inf
                "bits_per_byte": bits_per_byte(loss, n, n_bytes),
            }
            for form, loss in losses.items()
        }
        _print_json(cfg, results, text=name, tokens=n, bytes=n_bytes, stride=cfg.stride or context)
        return
    print(f"{len(tokens):,} tokens, {n_bytes:,} bytes")
    print(f"{name} {describe(losses['float32'], len(tokens), n_bytes)}")
    if cfg.weights != "float32":
        cost = 100 * math.expm1(losses[cfg.weights] - losses["float32"])
        print(f"{cfg.weights} {describe(losses[cfg.weights], len(tokens), n_bytes)} | {cost:+.2f} % perplexity")


def _measure_choices(cfg: EvaluateConfig, model: GPT, tokenizer: Tokenizer) -> None:
    assert cfg.choices is not None
    questions, endings = choices.load(cfg.choices, tokenizer, model.config.n_positions)
    results: dict[str, choices.Accuracy] = {}
    n_tokens = sum(len(ending.ids) for ending in endings) * (1 + (cfg.weights != "float32"))
    with LiveLine("tokens", n_tokens, stderr=True) as line:
        for form in _forms(model, cfg.weights):
            sums = choices.log_probs(model, endings, batch_size=cfg.batch_size, advance=line.advance)
            _check_finite(sums)  # else the first ending would be taken for the likeliest
            results[form] = choices.accuracy(questions, sums)
    if cfg.json:
        content = {form: {"acc": found.acc, "acc_norm": found.acc_norm} for form, found in results.items()}
        _print_json(cfg, content, choices=str(cfg.choices), questions=len(questions))
        return
    names = {"float32": f"{cfg.choices} {len(questions):,} questions"}
    for name, found in results.items():
        print(f"{names.get(name, name)} | {found}")


def _check_finite(values: float | np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError("the model's logits are NaN or infinite: its training diverged or its weights are damaged")


def _print_json(cfg: EvaluateConfig, results: Mapping[str, Any], **about: Any) -> None:
    """results: of each form of the weights."""
    print(json.dumps({"run": str(cfg.run), "checkpoint": cfg.checkpoint, **about, "results": results}))


if __name__ == "__main__":
    run(main, EvaluateConfig, prog="python -m model.evaluate", aliases={"--which": "--checkpoint"})
