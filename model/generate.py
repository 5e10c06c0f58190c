"""Text generation: continue prompts with a model, one token at a time, and decode the ids as a stream.

    python -m model.generate runs/book --prompt "CHAPTER I. " --tokens 200 --temperature 0.8 --top-k 40 --seed 1
    python -m model.generate runs/book --prompts prompts.txt --samples 3 --top-p 0.9 --stop "THE END"
    python -m model.generate runs/book --adapter runs/alice --adapter peft-folder
    python -m model.generate runs/book --interactive

A prompt is read at once, then each step reads the ids drawn before: a cache holds keys and values (`model.decoder`).
How an id is drawn: `model.sampling`.

A text may outgrow the model's context N. Positions are learned, one vector each, so no key or value fits another place,
and a window that slides by a token would be read whole for every token. Instead a full cache begins anew with the last
N // 2 tokens: one pass every N // 2 tokens, about one token more to read for each one drawn, and the model sees
between half and all of its context.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from model.cli import UserError, pick_device, run
from model.config import GPTConfig
from model.data import books
from model.decoder import Decoder
from model.gpt import GPT
from model.lora import load_model
from model.quantize import Weights, avoid_amx, prepare
from model.sampling import TEMPERATURE, TOP_K, Sampling
from model.tokenizer import Tokenizer


@dataclass(eq=False)
class Continuation:
    """A prompt and the ids drawn after it."""

    prompt: Sequence[int]
    sample: int = 0  # which one of this prompt; sample i of seed s is the text of seed s + i
    ids: list[int] = field(default_factory=list)  # without the stop id
    logprobs: list[float] = field(default_factory=list)  # of ids, where they are asked for
    done: bool = False  # set it to end the text early


Steps = Generator[list[Continuation], None, None]


def generate(
    model: GPT,
    prompt: Sequence[int],
    *,
    tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    stop_id: int | None = None,
    graph: bool | None = None,
) -> Iterator[int]:
    """Yield up to `tokens` ids that continue `prompt`, each as soon as it is drawn.

    temperature: 0 takes the most likely token each time, 1 samples from the model's own distribution.
    top_k, top_p, min_p, repetition_penalty: see `model.sampling`; the defaults leave the distribution as it is.
    seed: of this text's random numbers: the same arguments give the same ids.
    stop_id: ends the text when it is drawn, and is not yielded; None never stops early.
    graph: capture the step in a CUDA graph; by default on a GPU. The first two steps pay for it.

    A text beyond the model's context is continued from its last tokens (see the module). The model is in evaluation
    mode until the iterator is exhausted or closed. Raises UserError, before the first token, for a prompt that is empty
    or longer than the context, and for invalid settings; later, where the model's logits are NaN.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    steps = generate_batch(
        model, [Continuation(prompt)], tokens=tokens, sampling=sampling, stop_id=stop_id, graph=graph
    )
    return _newest_ids(steps)


def _newest_ids(steps: Steps) -> Iterator[int]:
    with contextlib.closing(steps):
        for step in steps:
            for text in step:
                yield text.ids[-1]


def generate_batch(
    model: GPT,
    texts: Sequence[Continuation],
    *,
    tokens: int,
    sampling: Sampling,
    stop_id: int | None = None,
    batch_size: int | None = None,
    logprobs: bool = False,
    graph: bool | None = None,
) -> Steps:
    """Continue texts by up to `tokens` ids each -> after each step, those that got another id, the last of `ids`.

    batch_size: texts at a time, all by default; as one ends, the next one takes its place.
    logprobs: fill Continuation.logprobs with the log-probability of each id, in nats, under the model's own softmax:
    before penalty, temperature and filters.
    stop_id, graph, errors, the model's mode: see generate.

    The ids of a text do not depend on the others, up to the rounding of logits, which differs with the batch size.
    """
    for name, value in (("tokens", tokens), ("batch_size", 1 if batch_size is None else batch_size)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    for text in texts:
        _check_prompt(text.prompt, model.config)
    longest = max((len(text.prompt) for text in texts), default=0)
    S = min(model.config.n_positions, longest + tokens - 1)  # the last token is drawn but not read
    B = min(len(texts), batch_size or len(texts))
    return _run(model, texts, B, S, tokens, sampling, stop_id, logprobs, graph)


def _check_prompt(prompt: Sequence[int], config: GPTConfig) -> None:
    if not prompt:
        raise UserError("the prompt has no tokens: give at least one, such as the end-of-text id")
    if len(prompt) > (most := config.n_positions):
        raise UserError(f"the prompt has {len(prompt)} tokens and the model's context is {most}: shorten it")
    low, high, last = min(prompt), max(prompt), config.vocab_size - 1
    if low < 0 or high > last:
        raise UserError(f"the prompt has ids from {low} to {high} and the model's are 0 to {last}: use its tokenizer")


def _run(
    model: GPT,
    texts: Sequence[Continuation],
    B: int,
    S: int,
    tokens: int,
    sampling: Sampling,
    stop_id: int | None,
    logprobs: bool,
    graph: bool | None,
) -> Steps:
    """generate_batch with B slots of S tokens."""
    waiting = deque(text for text in texts if not text.done)
    slots: list[Continuation | None] = [None] * B
    N = model.config.n_positions
    was_training = model.training
    model.eval()
    try:
        decoder = Decoder(model, B, S, sampling=sampling, logprobs=logprobs, graph=graph)
        while True:
            to_read: dict[int, Sequence[int]] = {}  # by slot: texts that are new or have outgrown the cache
            for slot, text in enumerate(slots):
                if text is None or text.done:
                    slots[slot] = text = waiting.popleft() if waiting else None
                    if text is not None:
                        decoder.begin(slot, text.prompt, sampling.sample_seed(text.sample))
                        to_read[slot] = text.prompt
                elif decoder.lengths[slot] == N:
                    to_read[slot] = [*text.prompt, *text.ids][-max(1, N // 2) :]
            active = [(slot, text) for slot, text in enumerate(slots) if text is not None]
            if not active:
                return
            if not to_read:
                decoder.step()
            else:
                if len(to_read) < len(active):
                    decoder.forward()
                decoder.read(to_read)
                decoder.draw()
            yield _collect(active, decoder, tokens, stop_id)
    finally:
        model.train(was_training)


def _collect(
    active: list[tuple[int, Continuation]], decoder: Decoder, tokens: int, stop_id: int | None
) -> list[Continuation]:
    """Add the ids just drawn to their texts -> those that go on or end with them; a stop id ends a text without."""
    ids = decoder.ids.tolist()
    logprobs = None if decoder.logprobs is None else decoder.logprobs.tolist()
    step = []
    for slot, text in active:
        if ids[slot] < 0:
            raise UserError("the model's logits are NaN: its training diverged or its weights are damaged")
        if ids[slot] == stop_id:
            text.done = True
            continue
        text.ids.append(ids[slot])
        if logprobs is not None:
            text.logprobs.append(logprobs[slot])
        text.done = len(text.ids) == tokens
        step.append(text)
    return step


# Text


class TextStream:
    """The text of ids that come one at a time, in whole characters, up to the first stop string.

    The bytes of a character wait for the rest of it, and become U+FFFD if it never comes. Of what may become a stop
    string, no more is held back than the part that is there. The text ends before the stop string that is complete
    first, wherever the tokens' borders lie; `stopped` is then True.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """UserError for an empty stop string."""
        if "" in stops:
            raise UserError("a stop string must not be empty: give the text to stop at")
        self.tokenizer, self.stops, self.stopped = tokenizer, stops, False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that is certain with this id, often ""; "" for all after a stop string."""
        return self._release(self._decoder.decode(self.tokenizer.decode_bytes([token])))

    def end(self) -> str:
        """The text that was held back, where no more ids come."""
        text = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text, self._held = self._held + new, ""
        complete = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if complete:
            self.stopped = True
            return text[: min(complete)[1]]
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text with which stop begins, less than all of stop."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def stream_text(ids: Iterable[int], tokenizer: Tokenizer, stops: Sequence[str] = ()) -> Iterator[str]:
    """Yield the text of `ids` in pieces, each as early as it is certain (see TextStream).

    Joined they are tokenizer.decode(all ids), up to the first stop string, after which no id is asked for.
    """
    stream = TextStream(tokenizer, stops)
    for token in ids:
        if text := stream.feed(token):
            yield text
        if stream.stopped:
            return
    if text := stream.end():
        yield text


# The command

Source = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
ALIASES = {"--which": "--checkpoint", "--no-stop": "--ignore-end"}


@dataclass(frozen=True)
class GenerateConfig:
    """Write text with the model of a run to standard output, each piece as soon as it is certain.

    Several texts, of --samples or --prompts, are written together and shown one after the other.
    """

    run: tyro.conf.Positional[Path]  # folder of a training run
    prompt: str = ""  # text to continue; default: start from the end-of-text token
    prompt_file: Source = None  # text file to continue, without its last line break
    prompts: Source = None  # text file with a prompt on each line; blank lines are skipped
    interactive: bool = False  # read prompts line by line; Ctrl-C stops a text, Ctrl-D or an empty line ends
    samples: int = 1  # texts to write for each prompt; number i has the seed --seed + i, from i = 0
    batch_size: int = 16  # texts to write at a time
    tokens: int = 200  # maximum tokens to write
    temperature: float = TEMPERATURE  # 0 takes the most likely token, 1 samples from the model's distribution
    top_k: int | None = TOP_K  # sample among the k most likely tokens only; None for all
    top_p: float = 1.0  # of those, the fewest most likely tokens whose probabilities sum to this; 1 for all
    min_p: float = 0.0  # of those, the tokens at least this times as likely as the most likely one; 0 for all
    repetition_penalty: float = 1.0  # above 1 makes the tokens of prompt and text less likely
    seed: int = 1  # the same seed writes the same text on the same machine
    greedy: bool = False  # always take the most likely token, whatever the temperature
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # end before this text; may be given several times
    ignore_end: bool = False  # write on after the end-of-text token
    logprobs: bool = False  # after each text, list its tokens with their log-probabilities
    weights: Weights = "float32"  # int8 and 16 bits take less memory, and are faster where the CPU or GPU has them
    adapter: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()  # of a run or PEFT's; several write one after the other
    checkpoint: str = "best"  # last, best (lowest validation loss), or a name such as step-00000100
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one

    @property
    def sampling(self) -> Sampling:
        temperature = 0.0 if self.greedy else self.temperature
        return Sampling(temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty, self.seed)


class _Page:
    """A text on its way to standard output."""

    def __init__(self, header: str, prompt: str, sample: int, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.text = Continuation(tokenizer.encode(prompt) or [tokenizer.eot_id], sample)
        self.stream = TextStream(tokenizer, stops)
        self.pending = header + prompt  # what is to be printed once it is this page's turn

    def feed(self) -> None:
        """Take the last id of the text; end it where a stop string is complete."""
        self.pending += self.stream.feed(self.text.ids[-1])
        self.text.done |= self.stream.stopped

    def finish(self) -> None:
        self.pending += self.stream.end() + "\n"
        if self.text.logprobs:
            self.pending += _table(self.text, self.stream.tokenizer)


def main(cfg: GenerateConfig) -> None:
    for name in ("samples", "batch_size", "tokens"):
        if (value := getattr(cfg, name)) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    prompts, sampling = _read_prompts(cfg), cfg.sampling
    if cfg.weights == "int8":
        avoid_amx()
    for adapter in cfg.adapter or [None]:
        if len(cfg.adapter) > 1:
            print(f"--- adapter {adapter}")
        model, tokenizer = load_model(cfg.run, pick_device(cfg.device), name=cfg.checkpoint, adapter=adapter)
        prepare(model, cfg.weights)
        TextStream(tokenizer, cfg.stop)  # refuses empty stop strings
        if cfg.interactive:
            _interact(cfg, model, tokenizer)
        else:
            _write(cfg, model, tokenizer, _pages(cfg, sampling, prompts, model, tokenizer))


def _pages(
    cfg: GenerateConfig, sampling: Sampling, prompts: Sequence[str], model: GPT, tokenizer: Tokenizer
) -> list[_Page]:
    """The texts to write. UserError for a prompt that the model cannot read."""
    pages = []
    for (i, prompt), sample in itertools.product(enumerate(prompts), range(cfg.samples)):
        header = _header(i, len(prompts), sample, cfg.samples, sampling)
        try:
            page = _Page(header, prompt, sample, tokenizer, cfg.stop)
            _check_prompt(page.text.prompt, model.config)
        except UserError as error:
            raise UserError(f"prompt {i + 1}: {error}" if len(prompts) > 1 else str(error)) from None
        pages.append(page)
    return pages


def _read_prompts(cfg: GenerateConfig) -> list[str]:
    """The prompts of the command line. UserError for two sources of them and for a file without any."""
    given = {
        "--prompt": bool(cfg.prompt),
        "--prompt-file": cfg.prompt_file is not None,
        "--prompts": cfg.prompts is not None,
        "--interactive": cfg.interactive,
    }
    if sum(given.values()) > 1:
        raise UserError(f"{' and '.join(name for name in given if given[name])} cannot be combined: give one of them")
    if cfg.interactive and cfg.samples > 1:
        raise UserError("--interactive writes one text for each prompt: omit --samples")
    if cfg.interactive and len(cfg.adapter) > 1:
        raise UserError("--interactive writes with one adapter: give --adapter once")
    if cfg.prompt_file is not None:
        prompts = [_read_file(cfg.prompt_file).removesuffix("\n")]
    elif cfg.prompts is not None:
        prompts = [line for line in _read_file(cfg.prompts).split("\n") if line.strip()]
    else:
        return [cfg.prompt]
    if not any(prompts):
        raise UserError(f"no prompt in {cfg.prompt_file or cfg.prompts}: the file is empty")
    return prompts


def _read_file(path: Path) -> str:
    return "".join(books.clean(books.read(path)))


def _header(i: int, n_prompts: int, sample: int, n_samples: int, sampling: Sampling) -> str:
    parts = [f"prompt {i + 1} of {n_prompts}"] if n_prompts > 1 else []
    if n_samples > 1:
        parts.append(f"sample {sample + 1} of {n_samples}, seed {sampling.sample_seed(sample)}")
    first = "" if i == sample == 0 else "\n"
    return f"{first}--- {', '.join(parts)}\n" if parts else ""


def _write(cfg: GenerateConfig, model: GPT, tokenizer: Tokenizer, pages: Sequence[_Page]) -> None:
    """Print pages in order, the first unfinished one as it grows."""
    steps = generate_batch(
        model,
        [page.text for page in pages],
        tokens=cfg.tokens,
        sampling=cfg.sampling,
        stop_id=None if cfg.ignore_end else tokenizer.eot_id,
        batch_size=cfg.batch_size,
        logprobs=cfg.logprobs,
    )
    of_text = {page.text: page for page in pages}
    queue = deque(pages)
    _print_finished(queue)
    try:
        with contextlib.closing(steps):
            for step in steps:
                for text in step:
                    of_text[text].feed()
                _print_finished(queue)
    finally:
        if queue:
            print()  # after Ctrl-C, so that the shell's prompt or the error starts on a new line


def _print_finished(queue: deque[_Page]) -> None:
    """Print what there is of the first page, and of those after it as long as the one before is done."""
    while queue:
        page = queue[0]
        if page.text.done:
            page.finish()
            queue.popleft()
        print(page.pending, end="", flush=True)
        page.pending = ""
        if not page.text.done:
            return


def _table(text: Continuation, tokenizer: Tokenizer) -> str:
    """The tokens of a text with their log-probabilities, one a line, and the sum."""
    lines = [
        f"{logprob:10.4f} {token:6d} {_shown(tokenizer.decode_bytes([token]))}\n"
        for token, logprob in zip(text.ids, text.logprobs, strict=True)
    ]
    total, n = sum(text.logprobs), len(lines)
    own = "nats under the model's own distribution, before temperature and filters"
    return "\n" + "".join(lines) + f"{total:10.4f} in {n} tokens, {total / n:.4f} each: {own}\n"


def _shown(token: bytes) -> str:
    try:
        return repr(token.decode())
    except UnicodeDecodeError:  # a part of a character
        return repr(token)


def _interact(cfg: GenerateConfig, model: GPT, tokenizer: Tokenizer) -> None:
    """Continue each line of standard input, until an empty one or its end.

    Text number i has the seed --seed + i, so that a prompt given again is continued anew.
    """
    with contextlib.suppress(ImportError):  # absent on Windows
        import readline  # noqa: F401  # history and editing in input()
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("Ctrl-C stops a text, Ctrl-D or an empty line ends")
    for number in itertools.count():
        try:
            line = input("> " if is_terminal else "")
        except KeyboardInterrupt:  # drops the line
            print()
            continue
        except EOFError:
            line = ""
            print(end="\n" if is_terminal else "")
        except UnicodeDecodeError:
            raise UserError("standard input is not UTF-8: convert it first, for example with iconv") from None
        if not line:
            return
        try:
            _write(cfg, model, tokenizer, [_Page("", line, number, tokenizer, cfg.stop)])
        except KeyboardInterrupt:
            pass
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    run(main, GenerateConfig, prog="python -m model.generate", aliases=ALIASES)
