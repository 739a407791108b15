"""The Markov chain against enumeration of all its sequences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from imagewright.models.tokens import PixelCodec
from imagewright.noise import StepNoise
from imagewright.oracles import MarkovChain, MarkovTokens
from imagewright.types import LikelihoodModel, TokenModel, UserError


def chain(values: int = 3, length: int = 4) -> MarkovChain:
    draws = torch.rand(values + 1, values, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
    rows = draws / draws.sum(1, keepdim=True)
    return MarkovChain(rows[0], rows[1:], length)


def every_sequence() -> Tensor:
    return torch.tensor(list(itertools.product(range(3), repeat=4)))


def test_probabilities_sum_to_one_and_make_the_entropy() -> None:
    log_p = chain().log_prob(every_sequence())
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert chain().entropy() == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-12)


@pytest.mark.parametrize("visible", [[], [0], [3], [1, 2], [0, 3], [0, 1, 2, 3]])
def test_conditionals_are_those_of_enumeration(visible: list[int]) -> None:
    sequences = every_sequence()
    p = chain().log_prob(sequences).exp()
    shown = torch.full_like(sequences, 3)
    shown[:, visible] = sequences[:, visible]
    found = chain().conditionals(shown).exp()
    for row in range(0, len(sequences), 7):
        fits = (sequences[:, visible] == sequences[row, visible]).all(1)
        for place in range(4):
            counted = torch.stack([(p * fits * (sequences[:, place] == v)).sum() for v in range(3)]) / (p * fits).sum()
            torch.testing.assert_close(found[row, place], counted, rtol=0, atol=1e-12)


def test_samples_have_the_chains_entropy() -> None:
    nats = -chain().log_prob(chain().sample(20_000, StepNoise(1)))
    error = float(nats.std()) / math.sqrt(len(nats))
    assert float(nats.mean()) == pytest.approx(chain().entropy(), abs=3 * error)


def test_as_a_token_model_it_keeps_the_protocols() -> None:
    many = chain(values=256, length=4)
    causal = MarkovTokens(many, PixelCodec(2, 1))
    assert isinstance(causal, TokenModel)
    assert isinstance(causal, LikelihoodModel)
    tokens = many.sample(5, StepNoise(2))
    summed = -causal.logits(tokens).gather(2, tokens[..., None]).sum((1, 2))
    torch.testing.assert_close(summed, causal.nll(tokens), rtol=1e-12, atol=0)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(UserError, match="needs distributions"):
        MarkovChain(torch.tensor([0.5, 0.5]), torch.tensor([[0.5, 0.6], [1.0, 0.0]]), 3)
    with pytest.raises(UserError, match=r"transition is \[3, 2\]; it must be \[2, 2\]"):
        MarkovChain(torch.tensor([0.5, 0.5]), torch.ones(3, 2) / 2, 3)
    with pytest.raises(UserError, match="4 tokens of 3 values; the codec 4 of 256"):
        MarkovTokens(chain(), PixelCodec(2, 1))
