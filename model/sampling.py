"""From logits to a token id: the distribution to draw from, and the draw.

    l_i <- l_i / r if l_i > 0 else l_i r,  i in the text    repetition penalty r (Keskar et al. 2019, "CTRL")
    p = softmax(l / t)                                      temperature t; 0 takes the most likely id
    top-k: the k most likely ids                            (Fan, Lewis, Dauphin 2018)
    top-p: the fewest most likely ids that sum to p         (Holtzman et al. 2020, nucleus sampling)
    min-p: the ids with p_i >= min_p * max p                (Nguyen et al. 2024)

in this order, which is Hugging Face's: each filter sees what the one before has left, renormalised. Of equally likely
ids at a border top-k and top-p keep as many as the definition asks for, top-p alone those with the smaller ids.

The draw inverts the cumulative distribution: the first id at which it exceeds u, with u uniform in [0, 1), float64, one
for each sequence and step. The numbers come from outside, so that the draw can be a part of a CUDA graph and a text
depends on its own numbers alone. Probabilities are summed as integers, in units of 2**-50: exact, so the same in any
order, and an id that a filter has dropped is never drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from model.cli import UserError

ONE = 2**50  # the unit's inverse: the total of a row, and of any part of it, is a float64 without rounding


TEMPERATURE, TOP_K = 0.8, 40  # with which texts are shown: defaults of model.generate and of exported models


@dataclass(frozen=True)
class Sampling:
    """How ids are drawn. Raises UserError for a value out of range."""

    temperature: float = 1.0  # 0 takes the most likely id, 1 samples from the model's own distribution
    top_k: int | None = None  # None keeps all
    top_p: float = 1.0  # 1 keeps all
    min_p: float = 0.0  # 0 keeps all
    repetition_penalty: float = 1.0  # of the ids in prompt and text; 1 changes nothing, more makes them rarer
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(
                f"temperature must be 0 (the most likely token) or a number above 0, got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, got {self.top_k}: 1 takes the most likely token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, got {self.top_p}: 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must lie in [0, 1], got {self.min_p}: 0 keeps every token")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty must be a number above 0, got {self.repetition_penalty}: 1 changes nothing"
            )
        if not 0 <= self.seed < 2**64:
            raise UserError(f"seed must lie in [0, 2**64), got {self.seed}")

    def sample_seed(self, sample: int) -> int:
        """The seed of sample number 0, 1, 2, ...: sample i is the text that seed + i writes on its own."""
        return (self.seed + sample) % 2**64


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor | None = None, seen: Tensor | None = None) -> Tensor:
    """Draw an id for each row -> (B,) int64; -1 for a row that has no distribution, such as one with a NaN.

    logits: (B, V) float32. uniforms: (B,) float64 in [0, 1), needed unless temperature is 0. seen: (B, V) bool, the ids
    in prompt and text, needed for a repetition penalty. No host sync.
    """
    if sampling.temperature == 0:
        best = _penalise(logits, sampling, seen).max(-1)
        return best.indices.where(~best.values.isnan(), -1)
    assert uniforms is not None
    probs, ids = _candidates(logits, sampling, seen)
    places = draw(probs, uniforms)
    if ids is None:
        return places
    return ids.gather(1, places.clamp(min=0)[:, None])[:, 0].where(places >= 0, -1)


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The first place of each row at which the sum of probs exceeds u times their total -> (B,) int64.

    probs: (B, K), 0 to 1, of any total; uniforms: (B,) float64 in [0, 1). -1 for a row that sums to 0 or NaN.
    """
    cdf = _units(probs).cumsum(-1)  # (B, K)
    total = cdf[:, -1:]
    target = (uniforms[:, None] * total).long()  # below the total: 1 - 2**-53, the largest u, takes half an ulp off
    places = torch.searchsorted(cdf, target, right=True)  # (B, 1)
    return places.where(total > 0, -1)[:, 0]


def logits_to_probs(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """The distribution that `sample` draws from: (B, V) float32 logits -> (B, V) float32 that sum to 1."""
    if sampling.temperature == 0:
        best = _penalise(logits, sampling, seen).argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(1, best, 1.0)
    probs, ids = _candidates(logits, sampling, seen)
    probs = probs / probs.sum(-1, keepdim=True)
    return probs if ids is None else torch.zeros_like(logits).scatter(1, ids, probs)


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """The natural logarithm of softmax(logits) at ids, no filter applied: (B, V) float32, (B,) -> (B,) float32."""
    return logits.gather(1, ids[:, None])[:, 0] - logits.logsumexp(-1)


def _units(probs: Tensor) -> Tensor:
    """Probabilities -> int64 multiples of 1 / ONE; NaN -> 0."""
    return (probs.double() * ONE).nan_to_num(0.0).long()


def _penalise(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> Tensor:
    penalty = sampling.repetition_penalty
    if penalty == 1:
        return logits
    assert seen is not None
    return logits.where(~seen, (logits / penalty).where(logits > 0, logits * penalty))


def _candidates(logits: Tensor, sampling: Sampling, seen: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The ids that may be drawn -> probs, ids: (B, K) each; ids None for all in order.

    probs: 0 for what a filter has dropped, so that they may sum to less than 1.
    """
    # A smaller temperature would overflow float32 and make the largest logit nan.
    logits, ids = _penalise(logits, sampling, seen) / max(sampling.temperature, 1e-30), None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    probs = logits.softmax(-1)
    if sampling.top_p < 1:
        units = _units(probs)
        before = units.cumsum(-1) - units  # the sum of those more likely; 0 for the first
        probs = probs.where(before < math.ceil(sampling.top_p * ONE), 0.0)
    if sampling.min_p > 0:
        probs = probs.where(probs >= sampling.min_p * probs.amax(-1, keepdim=True), 0.0)
    return probs, ids
