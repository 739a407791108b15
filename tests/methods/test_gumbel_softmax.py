"""Discrete latents are drawn: Gumbel noise, shares of all values, and the docking program's straight-through draw."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from imagewright.methods.disco_diff import gumbel_softmax, perplexity
from imagewright.models.discrete_latents import LatentCodec, gumbel
from imagewright.networks import LatentEncoder, LatentEncoderConfig
from imagewright.noise import StepNoise
from imagewright.types import UserError

F64 = torch.float64
M, K = 4, 5


def test_gumbel_max_draws_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=F64)
    n = 40_000
    drawn = (logits + gumbel(logits.expand(n, 1, 4), StepNoise(1))).argmax(-1)[:, 0]
    share, p = drawn.bincount(minlength=4) / n, logits.softmax(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()
    # Its mean is Euler's number and its deviation pi / sqrt(6).
    noise = gumbel(torch.empty(n, dtype=F64), StepNoise(2))
    assert float(noise.mean()) == pytest.approx(0.5772157, abs=5 * 1.283 / math.sqrt(n))
    assert float(noise.std()) == pytest.approx(math.pi / math.sqrt(6), rel=0.03)


def test_the_encoder_s_draws_are_its_distribution_s() -> None:
    torch.manual_seed(0)
    sizes = {"img_resolution": 8, "in_channels": 1, "patch": 4, "width": 8, "depth": 1, "heads": 2}
    encoder = LatentEncoder(LatentEncoderConfig(**sizes, length=1, values=3)).double()
    image = StepNoise(2).uniform(torch.empty(1, 1, 8, 8, dtype=F64)) * 2 - 1
    codec, n = LatentCodec(encoder), 8_000
    p = encoder(image).softmax(-1)[0, 0].detach()
    share = codec.encode(image.expand(n, -1, -1, -1), StepNoise(1))[:, 0].bincount(minlength=3) / n
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all() and float(p.max()) < 0.9
    assert int(codec.encode(image)) == int(p.argmax())
    with pytest.raises(UserError, match="alone are no image"):
        codec.decode(torch.zeros(1, 1))


def test_a_low_temperature_is_one_hot_and_a_hard_draw_has_the_soft_one_s_gradient() -> None:
    logits = StepNoise(1).normal(torch.empty(5, M, K, dtype=F64)).requires_grad_()
    soft = gumbel_softmax(logits, StepNoise(2), 0.7)
    cold, hard = gumbel_softmax(logits, StepNoise(2), 1e-4), gumbel_softmax(logits, StepNoise(2), 0.7, hard=True)
    one = torch.nn.functional.one_hot(soft.argmax(-1), K).double()
    torch.testing.assert_close(soft.sum(-1), torch.ones(5, M, dtype=F64))
    torch.testing.assert_close(cold, one, rtol=0, atol=1e-6)
    torch.testing.assert_close(hard, one, rtol=0, atol=1e-12)
    assert float((soft - one).abs().max().detach()) > 0.1
    weight = StepNoise(3).normal(torch.empty(K, dtype=F64))
    slopes = [torch.autograd.grad((s * weight).sum(), logits)[0] for s in (soft, hard)]
    torch.testing.assert_close(*slopes)
    assert torch.autograd.gradcheck(lambda x: gumbel_softmax(x, StepNoise(2), 0.7), (logits[:1, :1],))


class Fixed:
    """Uniform numbers that are known."""

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    def uniform(self, like: Tensor) -> Tensor:
        return self.numbers.to(like).view_as(like)


def test_the_straight_through_draw_is_the_docking_program_s() -> None:
    """`models/layers.py` of disco-diffdock at the same uniform numbers, temperature 0.7: one-hot, and its gradient."""
    logits = torch.sin(torch.arange(12.0) + 1).reshape(1, 3, 4).requires_grad_()
    noise: Any = Fixed((torch.arange(12.0) * 0.0793 + 0.031) % 1)
    hard = gumbel_softmax(logits, noise, 0.7, hard=True)
    assert hard.argmax(-1).tolist() == [[1, 3, 3]]
    (hard * torch.cos(torch.arange(4.0))).sum().backward()
    want = [0.22385706, 0.16922919, -0.23029143, -0.16279483, 0.03697852, 0.09728454, 0.12092923, -0.25519225,
            0.47473806, 0.11965828, -0.02990338, -0.56449300]  # fmt: skip
    assert logits.grad is not None and logits.grad.flatten().tolist() == pytest.approx(want, abs=1e-6)


def test_perplexity_counts_the_values_in_use() -> None:
    used = torch.tensor([0, 1, 2, 3] * 6)
    logits = 100 * torch.nn.functional.one_hot(used, 8).double()[:, None]
    assert float(perplexity(logits)) == pytest.approx(4)
    assert float(perplexity(torch.zeros(3, 2, 8))) == pytest.approx(8)
