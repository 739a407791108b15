"""Distances between images against their closed forms and gradients."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from imagewright.methods.distances import Distance, Kind
from imagewright.noise import StepNoise
from imagewright.types import UserError

SHAPE = (3, 2, 4, 4)
"""N images of D = 32 numbers."""


def pair(gap: float) -> tuple[Tensor, Tensor]:
    """Images that differ by `gap` in every number, up or down."""
    a = StepNoise(0).normal(torch.empty(SHAPE, dtype=torch.float64))
    sign = StepNoise(1).integers(2, a).double() * 2 - 1
    return a, a + gap * sign


def features(images: Tensor) -> list[Tensor]:
    """Two feature maps: the pixels, and their 2x2 means times a number that normalisation takes out again."""
    return [images, 5 * torch.nn.functional.avg_pool2d(images, 2)]


@pytest.mark.parametrize("gap", [1e-3, 0.25, 40.0])
def test_closed_forms_of_a_uniform_difference(gap: float) -> None:
    a, b = pair(gap)
    c = 0.00054 * math.sqrt(32)
    whole, each = math.sqrt(32 * gap**2 + c**2) - c, 32 * (math.sqrt(gap**2 + c**2) - c)
    expected = {
        "l1": gap, "l2": gap**2, "norm": math.sqrt(32) * gap, "pseudo_huber": whole, "pseudo_huber_each": each
    }  # fmt: skip
    for kind, value in expected.items():
        got = Distance(kind=kind)(a, b)  # type: ignore[arg-type]
        torch.testing.assert_close(got, torch.full((3,), value, dtype=torch.float64), rtol=1e-9, atol=0)


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far() -> None:
    d = Distance(kind="pseudo_huber", huber_c=0.03)
    c = 0.03 * math.sqrt(32)
    a, near = pair(1e-6)
    torch.testing.assert_close(d(a, near), torch.full((3,), 32e-12 / (2 * c), dtype=torch.float64), rtol=1e-3, atol=0)
    a, far = pair(1e4)
    torch.testing.assert_close(d(a, far), torch.full((3,), 1e4 * math.sqrt(32), dtype=torch.float64), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_symmetric_positive_and_zero_only_where_equal(kind: Kind) -> None:
    d = Distance(kind=kind)
    a, b = pair(0.3)
    b[0] = a[0]
    there, back = d(a, b, features), d(b, a, features)
    assert there.shape == (3,)
    torch.testing.assert_close(there, back)
    assert there[0] == 0
    assert (there[1:] > 0).all()


@pytest.mark.parametrize("kind", get_args(Kind))
def test_gradient_is_finite_where_equal(kind: Kind) -> None:
    """A student that has met its target must not turn into NaN."""
    a = pair(0.3)[0].requires_grad_()
    Distance(kind=kind)(a, a.detach().clone(), features).sum().backward()
    assert a.grad is not None
    torch.testing.assert_close(a.grad, torch.zeros_like(a.grad))


def test_perceptual_compares_directions_of_feature_vectors() -> None:
    one = torch.ones(1, 2, 2, 2, dtype=torch.float64)
    other = one.clone()
    other[:, 1] = 0
    # Unit vectors (1, 1)/sqrt 2 and (1, 0) at every position: squared difference 2 - sqrt 2; one feature map.
    got = Distance(kind="perceptual")(one, other, lambda x: [x])
    torch.testing.assert_close(got, torch.tensor([2 - math.sqrt(2)], dtype=torch.float64))
    torch.testing.assert_close(Distance(kind="perceptual")(3 * one, other, lambda x: [x]), got)
    torch.testing.assert_close(Distance(kind="perceptual")(one, other, lambda x: [x, x]), 2 * got)


def test_perceptual_needs_features() -> None:
    with pytest.raises(ValueError, match="feature maps"):
        Distance(kind="perceptual")(*pair(0.3))


def test_bad_fields_are_told() -> None:
    with pytest.raises(UserError, match=r"distance.kind is 'l3'; allowed: l1, l2, norm, pseudo_huber, "):
        Distance(kind="l3")  # type: ignore[arg-type]
    for value in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=r"distance.huber_c is"):
            Distance(huber_c=value)
