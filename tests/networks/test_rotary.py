"""Rotary positions in two dimensions and SwiGLU against complex numbers and the formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from imagewright.networks.gated import SwiGLU, swiglu_hidden
from imagewright.networks.rotary import grid, turned, turns


def test_pairs_turn_as_complex_numbers_do_half_by_row_half_by_column() -> None:
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    where = grid(2, 3).double()
    assert where.tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    speed = torch.tensor([1, 10_000**-0.5], dtype=torch.float64)
    angles = torch.cat([where[:, :1] * speed, where[:, 1:] * speed], 1)
    expected = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned(x, turns(where, 8)), torch.view_as_real(expected).flatten(-2))


def test_inner_products_depend_on_the_difference_of_positions() -> None:
    query, key = torch.randn(2, 1, 16, dtype=torch.float64)

    def product(a: list[float], b: list[float]) -> float:
        one, other = (turns(torch.tensor([p], dtype=torch.float64), 16) for p in (a, b))
        return float(turned(query, one) @ turned(key, other).T)

    first = product([2, 5.5], [1, 3])
    assert product([7, 9], [6, 6.5]) == pytest.approx(first, abs=1e-12)
    assert abs(product([5.5, 2], [3, 1]) - first) > 1e-3  # rows are no columns


def test_each_image_may_have_positions_of_its_own_and_zeros_give_zeros() -> None:
    x, where = torch.randn(2, 3, 4, 8), torch.rand(2, 4, 2) * 5
    each = turned(x, turns(where, 8)[:, None])
    for i in range(2):
        torch.testing.assert_close(each[i], turned(x[i], turns(where[i], 8)), rtol=0, atol=0)
    assert not turned(x, torch.zeros(4, 4, 2)).any()
    half = turned(x.bfloat16(), turns(where, 8)[:, None])
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), each, rtol=2e-2, atol=2e-2)


def test_a_width_that_cannot_be_halved_into_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 4 channels, not 6"):
        turns(grid(2, 2), 6)


@pytest.mark.parametrize("bias", [False, True])
def test_swiglu_is_its_formula(bias: bool) -> None:
    layer, x = SwiGLU(6, 5, bias=bias), torch.randn(3, 4, 6)
    gate, up = layer.gate_up.weight.split(5)
    a, b = layer.gate_up.bias.split(5) if bias else (torch.zeros(5), torch.zeros(5))
    expected = F.linear(F.silu(F.linear(x, gate, a)) * F.linear(x, up, b), layer.down.weight, layer.down.bias)
    torch.testing.assert_close(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters()) == 3 * 6 * 5 + bias * (2 * 5 + 6)


@pytest.mark.parametrize(("width", "multiple", "hidden"), [(1024, 256, 2816), (1152, 1, 3072), (64, 1, 170), (3, 8, 8)])
def test_swiglus_middle_has_two_thirds(width: int, multiple: int, hidden: int) -> None:
    assert swiglu_hidden(width, multiple) == hidden


def test_the_norm_is_torchs_in_float32() -> None:
    norm, x = nn.RMSNorm(6, eps=1e-5), torch.randn(4, 6)
    norm.weight.data.uniform_(0.5, 2)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
