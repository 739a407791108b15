"""Mixtures of products: conditionals by enumeration, likelihood, entropy."""

from __future__ import annotations

import itertools

import pytest
import torch

from imagewright.models.tokens import PixelCodec
from imagewright.noise import StepNoise
from imagewright.oracles import MixtureTokens, ProductMixture
from imagewright.types import UserError

K, LENGTH, VALUES = 3, 4, 3


def mixture() -> ProductMixture:
    torch.manual_seed(0)
    weights = torch.rand(K, dtype=torch.float64)
    tables = torch.rand(K, LENGTH, VALUES, dtype=torch.float64) ** 3
    return ProductMixture(weights / weights.sum(), tables / tables.sum(2, keepdim=True))


ALL = torch.tensor(list(itertools.product(range(VALUES), repeat=LENGTH)))


def test_probabilities_sum_to_one_and_are_those_of_the_formula() -> None:
    source = mixture()
    p = source.log_prob(ALL).exp()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    x = ALL[37]
    by_hand = sum(
        float(source.weights[k]) * float(torch.stack([source.tables[k, n, x[n]] for n in range(LENGTH)]).prod())
        for k in range(K)
    )
    assert float(p[37]) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("shown", [(3, 3, 3, 3), (1, 3, 3, 2), (0, 2, 1, 3), (2, 2, 0, 1)])
def test_conditionals_are_those_of_the_enumeration(shown: tuple[int, ...]) -> None:
    source = mixture()
    p = source.log_prob(ALL).exp()
    fits = torch.stack([(ALL[:, n] == v) | (v == VALUES) for n, v in enumerate(shown)]).all(0)
    p = p * fits / (p * fits).sum()
    exact = torch.stack([torch.stack([p[ALL[:, n] == v].sum() for v in range(VALUES)]) for n in range(LENGTH)])
    torch.testing.assert_close(source.conditionals(torch.tensor([shown])).exp()[0], exact)


def test_samples_and_entropy() -> None:
    source = mixture()
    log_p = source.log_prob(ALL)
    p = log_p.exp()
    entropy, error = source.entropy(20_000, StepNoise(0))
    assert abs(entropy + float((p * log_p).sum())) < 4 * error < 0.05
    drawn = source.sample(20_000, StepNoise(1))
    counts = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(1), minlength=len(ALL))
    assert float(((counts / 20_000 - p).square() / (p / 20_000)).mean()) == pytest.approx(1, abs=0.6)  # chi-squared


def test_the_model_answers_with_them() -> None:
    source = mixture()
    model = MixtureTokens(source, PixelCodec(2, 1, VALUES))
    tokens = torch.tensor([[0, 3, 1, 3]])
    assert torch.equal(model.logits(tokens), source.conditionals(tokens))
    assert torch.equal(model.nll(ALL), -source.log_prob(ALL))


def test_mistakes_are_named() -> None:
    source = mixture()
    with pytest.raises(UserError, match="needs distributions"):
        ProductMixture(source.weights * 2, source.tables)
    with pytest.raises(UserError, match="needs distributions"):
        ProductMixture(source.weights, source.tables - 0.5)
    with pytest.raises(UserError, match=r"tables is \[3, 4, 3\]; it must be \[2, length, V\]"):
        ProductMixture(source.weights[:2], source.tables)
    with pytest.raises(UserError, match="the mixture has 4 tokens of 3 values; the codec 4 of 5"):
        MixtureTokens(source, PixelCodec(2, 1, 5))
