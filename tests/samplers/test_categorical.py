"""Draws by the inverse of the cumulative distribution."""

from __future__ import annotations

import math

import torch

from imagewright.samplers.categorical import draw


def test_each_value_has_its_share_of_the_unit_interval() -> None:
    p = torch.tensor([0.2, 0.0, 0.5, 0.3, 0.0], dtype=torch.float64)
    uniform = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 1 - 1e-16], dtype=torch.float64)
    assert draw(p.log().expand(6, 5), uniform).tolist() == [0, 0, 2, 2, 3, 3]


def test_a_value_without_probability_is_never_drawn() -> None:
    uniform = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    logits = torch.tensor([-math.inf, 1.0, -math.inf, 3.0, -math.inf])
    drawn = draw(logits.expand(1000, 5), uniform)
    assert set(drawn.tolist()) == {1, 3}
    assert int((drawn == 1).sum()) == math.floor(1000 / (1 + math.exp(2))) + 1
    assert set(draw(logits.expand(1, 5), torch.ones(1)).tolist()) == {3}  # even where a uniform was rounded up to 1


def test_a_draw_does_not_depend_on_the_others() -> None:
    logits = torch.randn(7, 3, 11, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(7, 3, generator=torch.Generator().manual_seed(1))
    together = draw(logits, uniform)
    assert all(torch.equal(draw(logits[i : i + 1], uniform[i : i + 1])[0], together[i]) for i in range(7))
