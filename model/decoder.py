"""Decoding on the device: a batch of texts in a KVCache, and the step that gives each of them one more id.

    decoder = Decoder(model, B, sampling=Sampling(temperature=0))
    decoder.prefill(idx, lengths)       # reads B prompts
    ids = decoder.draw()                # the first id of each
    ids = decoder.step()                # reads those and draws the next ones

Shapes never change and no step waits for the host, so on a GPU the whole step, with the model, the filters, the draw
and the ids seen, is one CUDA graph. What a text is, where it ends and what comes after a full cache is the host's to
decide: `model.generate.generate_batch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from kernels import no_compilation
from model.gpt import GPT
from model.kv_cache import KVCache
from model.sampling import Sampling, log_probs, sample

BLOCK = 256  # uniform numbers of a sequence on the device at a time


class Decoder:
    """B places ("slots") for texts, each with its keys and values, next logits, random numbers and ids seen.

    A slot without a text runs along; its ids mean nothing. A slot whose cache is full is emptied by the next step: to
    continue its text, `read` the part of it to keep in that place.

    ids: (B,) int64 on the device, those last drawn; -1 where the logits gave no distribution (NaN).
    logprobs: (B,) float32, of ids under the model's own softmax, before penalty, temperature and filters; or None.
    lengths: tokens in the cache of each slot, on the host.
    """

    def __init__(
        self,
        model: GPT,
        B: int,
        S: int | None = None,
        *,
        sampling: Sampling,
        logprobs: bool = False,
        graph: bool | None = None,
    ) -> None:
        """S: room for so many tokens a slot, n_positions by default. logprobs: compute those too.

        graph: capture the step in a CUDA graph; by default on a GPU. It holds the kernels of the backend under which
        the first step runs.
        """
        device = model.transformer.wpe.weight.device
        V = model.config.vocab_size
        self.model, self.sampling, self.device = model, sampling, device
        self.cache = KVCache(model.config, B, S, dtype=model.dtype, device=device)
        self.lengths = [0] * B
        self.logits = torch.zeros((B, V), device=device)  # of the next token
        self.ids = torch.zeros(B, dtype=torch.int64, device=device)
        self.token = torch.zeros((B, 1), dtype=torch.int64, device=device)  # ids, to be read by the next step
        self.logprobs = torch.zeros(B, device=device) if logprobs else None
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros((B, V), dtype=torch.bool, device=device)
        self.uniforms = torch.zeros((B, BLOCK), dtype=torch.float64, device=device)
        self.generators = [np.random.default_rng(0) for _ in range(B)]
        self.n_drawn = [0] * B
        self.next_uniform = torch.zeros((B, 1), dtype=torch.int64, device=device)  # n_drawn, on the device
        self.uses_graph = device.type == "cuda" if graph is None else graph
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def begin(self, slot: int, prompt: Sequence[int], seed: int) -> None:
        """Prepare the draws of a new text in this slot: number n of its random numbers is number n of its seed's.

        The text does not depend on the slot, or on what the others hold, except for the rounding of the logits.
        """
        self.generators[slot] = np.random.default_rng(seed)
        self.n_drawn[slot] = 0
        self.next_uniform[slot].zero_()
        if self.seen is not None:
            self.seen[slot].zero_().index_fill_(0, torch.tensor(prompt, device=self.device), True)

    def read(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Read texts by slot, each in place of what the slot held. Equal ones are read once."""
        of_slot = {slot: tuple(texts[slot]) for slot in sorted(texts)}
        rows = list(dict.fromkeys(of_slot.values()))
        lengths = [len(row) for row in rows]
        idx = torch.tensor([[*row, *[0] * (max(lengths) - len(row))] for row in rows], device=self.device)
        every = len(rows) == len(self.lengths)  # then row b is of slot b
        self.prefill(idx, lengths, None if every else {slot: rows.index(text) for slot, text in of_slot.items()})

    @torch.inference_mode()
    def prefill(
        self, idx: Tensor, lengths: Sequence[int] | None = None, slots: Mapping[int, int] | None = None
    ) -> None:
        """Read texts from their beginning, in one pass.

        idx: (R, T) int64 on the device, padded on the right with any ids; lengths: of the R texts, T by default.
        slots: row of idx for each slot that changes; by default row b is of slot b, and R is B.
        """
        R, T = idx.shape
        lengths = [T] * R if lengths is None else lengths
        padded = torch.tensor(lengths, device=self.device) if min(lengths) < T else None
        cache = self.cache
        if slots is not None:
            cache = KVCache(self.model.config, R, T, dtype=self.model.dtype, device=self.device)
        cache.clear()
        logits, _ = self.model(idx, logits="last", cache=cache, lengths=padded)  # (R, 1, V)
        assert logits is not None
        if slots is None:
            self.logits.copy_(logits[:, 0])
            self.lengths = list(lengths)
            return
        changed, rows = (torch.tensor(list(part), device=self.device) for part in (slots.keys(), slots.values()))
        self.cache.put(changed, cache, rows)
        self.logits.index_copy_(0, changed, logits[:, 0].index_select(0, rows).float())
        for slot, row in slots.items():
            self.lengths[slot] = lengths[row]

    @torch.inference_mode()
    def draw(self) -> Tensor:
        """Draw an id for each slot from its logits -> ids."""
        self._supply_uniforms()
        self._draw()
        return self.ids

    @torch.inference_mode()
    def forward(self) -> None:
        """Read the ids last drawn; a slot that is to be read anew may come along."""
        self._make_room()
        self._forward()

    @torch.inference_mode()
    def step(self) -> Tensor:
        """`forward` and `draw` -> ids; the next call overwrites them."""
        self._make_room()
        self._supply_uniforms()
        if self.graph is not None:
            self.graph.replay()
        elif self.uses_graph:
            self._run_and_capture()
        else:
            self._forward()
            self._draw()
        return self.ids

    def _make_room(self) -> None:
        """Count the token about to be read, in slots that are full after emptying them."""
        S = self.cache.k.shape[3]
        if full := [slot for slot, length in enumerate(self.lengths) if length == S]:
            self.cache.clear(torch.tensor(full, device=self.device))
        self.lengths = [length % S for length in self.lengths]
        # Not 0, where all were full: that is the path of a prompt, which a graph does not record.
        self.cache.length = max(1, *self.lengths) if S > 1 else 0
        self.lengths = [length + 1 for length in self.lengths]

    def _supply_uniforms(self) -> None:
        if self.sampling.temperature == 0:
            return
        for slot, n in enumerate(self.n_drawn):
            if n % BLOCK == 0:
                self.uniforms[slot].copy_(torch.from_numpy(self.generators[slot].random(BLOCK)))
        self.n_drawn = [n + 1 for n in self.n_drawn]

    def _forward(self) -> None:
        logits, _ = self.model(self.token, logits="last", cache=self.cache)  # (B, 1, V)
        assert logits is not None
        self.logits.copy_(logits[:, 0])

    def _draw(self) -> None:
        uniforms = None
        if self.sampling.temperature:
            uniforms = self.uniforms.gather(1, self.next_uniform % BLOCK)[:, 0]
            self.next_uniform += 1
        self.ids.copy_(sample(self.logits, self.sampling, uniforms, self.seen))
        self.token.copy_(self.ids[:, None].clamp(min=0))  # -1 is the host's to report
        if self.logprobs is not None:
            self.logprobs.copy_(log_probs(self.logits, self.token[:, 0]))
        if self.seen is not None:
            self.seen.scatter_(1, self.token, True)

    def _run_and_capture(self) -> None:
        """Run this step, which compiles what it launches, and record it for the next ones."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._forward()
            self._draw()
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.cache.length = 1  # recording reads nothing: whatever the length is now, there is room for it
        graph = torch.cuda.CUDAGraph()
        mine = "thread_local"  # other threads may use CUDA
        with no_compilation(this_thread=True), torch.cuda.graph(graph, stream=stream, capture_error_mode=mine):
            self._forward()
            self._draw()
        self.graph = graph
