"""The distribution that an id is drawn from, against the filters' definitions; the draw against its probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from model.cli import UserError
from model.sampling import Sampling, draw, log_probs, logits_to_probs, sample

V = 13


def by_definition(logits: list[float], sampling: Sampling, seen: set[int] = frozenset()) -> list[float]:
    """The distribution of one row, filter by filter, in float64."""
    r, ids = sampling.repetition_penalty, range(len(logits))
    logits = [(x / r if x > 0 else x * r) if i in seen else x for i, x in enumerate(logits)]
    if sampling.temperature == 0:
        return [float(i == logits.index(max(logits))) for i in ids]
    p = [math.exp((x - max(logits)) / sampling.temperature) for x in logits]
    kept = sorted(ids, key=lambda i: (-p[i], i))[: sampling.top_k]
    total, nucleus = sum(p[i] for i in kept), []
    while kept and (sampling.top_p == 1 or sum(p[i] for i in nucleus) / total < sampling.top_p):
        nucleus.append(kept.pop(0))
    left = [i for i in nucleus if p[i] >= sampling.min_p * max(p)]
    return [p[i] / sum(p[j] for j in left) if i in left else 0.0 for i in ids]


SETTINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 100},
    {"top_p": 0.6},
    {"top_p": 1e-9},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.5},
    {"repetition_penalty": 1.7, "temperature": 0.0},
    {"temperature": 1.5, "top_k": 8, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3},
    {"temperature": 0.7, "top_p": 0.9, "min_p": 0.05},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_are_those_of_the_definition(settings):
    sampling = Sampling(**settings)
    logits = 2 * torch.randn(40, V)
    seen = torch.rand(40, V) < 0.3
    got = logits_to_probs(logits, sampling, seen)
    expected = [
        by_definition(row.tolist(), sampling, set(ids.nonzero().flatten().tolist()))
        for row, ids in zip(logits.double(), seen, strict=True)
    ]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_probabilities_equal_hugging_faces():
    from transformers.generation import logits_process as hf

    ids = torch.randint(V, (30, 4))
    logits, seen = 2 * torch.randn(30, V), torch.zeros(30, V, dtype=torch.bool).scatter(1, ids, True)
    scores = logits
    for step in (
        hf.RepetitionPenaltyLogitsProcessor(1.4), hf.TemperatureLogitsWarper(0.8), hf.TopKLogitsWarper(9),
        hf.TopPLogitsWarper(0.9), hf.MinPLogitsWarper(0.07),
    ):  # fmt: skip
        scores = step(ids, scores)
    got = logits_to_probs(logits, Sampling(0.8, 9, 0.9, 0.07, 1.4), seen)
    torch.testing.assert_close(got, scores.softmax(-1), rtol=1e-5, atol=1e-7)
    assert ((got == 0).sum(-1) > V - 9).any()  # more than top-k was at work


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_p": 0.25}, [0]),  # reached exactly
        ({"top_p": 0.2501}, [0, 1]),
        ({"top_p": 0.5}, [0, 1]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"min_p": 1.0}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_ties_are_kept_in_order(settings, kept):
    probs = logits_to_probs(torch.full((1, 4), 0.7), Sampling(**settings))
    assert probs[0].nonzero().flatten().tolist() == kept


def test_top_k_keeps_k_of_equal_ids():
    assert (logits_to_probs(torch.zeros(1, 9), Sampling(top_k=4)) > 0).sum() == 4


def test_top_p_of_one_keeps_the_smallest():
    logits = torch.tensor([[0.0, -40.0, -80.0]])  # their probabilities vanish in the sum
    assert (logits_to_probs(logits, Sampling(top_p=1.0)) > 0).all()


def test_penalty_divides_positive_and_multiplies_negative_logits():
    logits, seen = torch.tensor([[2.0, -1.0, 2.0, -1.0]]), torch.tensor([[True, True, False, False]])
    expected = torch.tensor([[1.0, -2.0, 2.0, -1.0]]).softmax(-1)
    torch.testing.assert_close(logits_to_probs(logits, Sampling(repetition_penalty=2.0), seen), expected)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-9])
def test_temperature_next_to_zero_is_greedy(temperature):
    logits, u = torch.tensor([[88.0, -1e4, 89.0, 3.0]]), torch.tensor([0.999], dtype=torch.float64)
    assert sample(logits, Sampling(temperature=temperature), u).tolist() == [2]


# --- the draw


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 2.0}, {"top_k": 6}, {"top_p": 0.9}, {"min_p": 0.05, "top_p": 0.95}], ids=str
)
def test_drawn_ids_have_their_probabilities(settings):
    """Pearson's chi-squared, sum (observed - expected)^2 / expected, over 20,000 draws of a fixed seed.

    Its 99.9th percentile with 12 degrees of freedom (V - 1; fewer after a filter) is 32.9.
    """
    n, sampling = 20_000, Sampling(**settings)
    logits = torch.tensor([1.3 * math.sin(3 * i) for i in range(V)])
    uniforms = torch.from_numpy(np.random.default_rng(0).random(n))
    drawn = torch.bincount(sample(logits.expand(n, V), sampling, uniforms), minlength=V)
    expected = n * torch.tensor(by_definition(logits.tolist(), sampling), dtype=torch.float64)
    possible = expected > 0
    assert drawn[~possible].sum() == 0
    statistic = ((drawn - expected)[possible].square() / expected[possible]).sum()
    assert statistic < 32.9


def float64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("u", "place"),
    [(0.0, 1), (0.2499, 1), (0.25, 3), (0.5, 3), (1 - 2**-53, 3)],
)
def test_draw_inverts_the_cumulative_distribution(u, place):
    probs = torch.tensor([[0.0, 0.2, 0.0, 0.6, 0.0]])  # sums to 0.8
    assert draw(probs, float64(u)).tolist() == [place]


def test_largest_number_draws_a_possible_id():
    """Its product with the total stays below the total, which no id exceeds."""
    probs = torch.rand(500, V).softmax(-1).where(torch.rand(500, V) < 0.7, 0.0)
    places = draw(probs, torch.full((500,), 1 - 2**-53, dtype=torch.float64))
    expected = [max(row.nonzero().flatten().tolist(), default=-1) for row in probs]
    assert places.tolist() == expected


def test_rare_id_is_drawn():
    assert draw(torch.tensor([[1.0, 1e-9]]), float64(1 - 5e-10)).tolist() == [1]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_rows_with_nan_give_no_id(settings):
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, 5.0, 1.0]])
    assert sample(logits, Sampling(**settings), float64(0.5, 0.5)).tolist() == [-1, 1]


def test_log_probs_are_of_the_softmax():
    logits, ids = torch.randn(5, V), torch.randint(V, (5,))
    torch.testing.assert_close(log_probs(logits, ids), logits.log_softmax(-1)[torch.arange(5), ids])


def test_samples_have_the_next_seeds():
    assert [Sampling(seed=7).sample_seed(i) for i in range(3)] == [7, 8, 9]
    assert Sampling(seed=2**64 - 1).sample_seed(1) == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -0.1}, "temperature must be 0 .* got -0.1"),
        ({"temperature": math.nan}, "temperature must be 0 .* got nan"),
        ({"temperature": math.inf}, "temperature must be 0 .* got inf"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0"),
        ({"top_p": 2.0}, "top_p must be above 0 and at most 1, got 2"),
        ({"top_p": math.nan}, "top_p .* got nan"),
        ({"min_p": -0.01}, r"min_p must lie in \[0, 1\], got -0.01"),
        ({"min_p": 1.01}, r"min_p must lie in \[0, 1\], got 1.01"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be a number above 0, got 0"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be a number above 0, got -1"),
        ({"repetition_penalty": math.inf}, "repetition_penalty .* got inf"),
        ({"seed": -1}, "seed must lie in"),
        ({"seed": 2**64}, "seed must lie in"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Sampling(**settings)
